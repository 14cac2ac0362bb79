"""What a pretraining may start from: a checkpoint, a run, or a folder of transformers, whatever its head.

    source = open_source_weights(Path("roberta-base"))
    source.names                                     # encoder.embeddings.word_embeddings.weight, ...
    source.missing, source.left_out                  # heads that it lacks, and what it has beyond our network

| classes                            | become                                                             |
| ---------------------------------- | ------------------------------------------------------------------ |
| Bert*, MegatronBert*, ModernBert*  | the preset                                                         |
| Roberta*, XLMRoberta*, Camembert*  | `bert`: the rows of positions behind the pad token's; both types   |
|                                    | of a pair are the only one that they have, or their two            |
| DistilBert*                        | `bert`: both token types are zero                                  |
| Electra*                           | `bert` with a generator: that in the folder `generator` inside, or |
|                                    | a missing one                                                      |
| ElectraForMaskedLM alone           | `bert`; where it is narrower than its embeddings, the generator of |
|                                    | a `bert` whose layers are missing                                  |
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from bertscale.config import ModelConfig, UserError, check_config
from bertscale.convert.electra import GENERATOR, electra_names
from bertscale.convert.hf_folder import CONFIG_FILE, HuggingFaceFolder, tokenizer_of
from bertscale.convert.hf_names import hugging_face_names, model_of
from bertscale.convert.task_names import encoder_model_of
from bertscale.convert.weights import Weights, native_shapes, open_weights
from bertscale.files import file_digest

# Of each of these a source may lack all parameters; the rest of the network every source has.
PARTS = ("encoder.pooler.", "predictions.", "seq_relationship.", "detector.", "generator.")
EMBEDDINGS = "encoder.embeddings."
GENERATOR_HEAD = "generator_predictions.dense.weight"  # tells the folder of a generator
# What a generator's config.json tells, and its discriminator's decides here.
OF_GENERATOR = (
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "type_vocab_size",
    "layer_norm_eps",
)


class InitSource(Protocol):
    """Gives native tensors by their names in `PretrainingModel`."""

    folder: Path
    model: ModelConfig  # with a sentence head if the source relates sentences
    vocab_size: int
    names: list[str]  # the parameters that it has; a pooler even where `model` has no sentence head
    missing: list[str]  # parameters of `model` that it lacks
    left_out: list[str]  # its own tensors, by their own names, that become no parameter

    @property
    def tokenizer(self) -> Path: ...  # of the tokenizer's file; raises UserError where there is none

    def tensor(self, name: str) -> Tensor: ...  # whole, float32, CPU, of `names`

    def digest(self) -> str: ...  # of all that it is read from; raises UserError where that is damaged


def open_source_weights(path: Path) -> InitSource:
    """Opens a checkpoint, the newest checkpoint of a run, or a Hugging Face folder of a class of the table.

    Raises UserError where `path` is none of them, is damaged, or is a network that no preset equals.
    """
    if not (path / CONFIG_FILE).is_file():
        return _OfCheckpoint(open_weights(path))
    source = _OfFolder(path)
    if source.form == "electra" and (path / GENERATOR / CONFIG_FILE).is_file():
        return _OfPair(source, _OfFolder(path / GENERATOR, source.model))
    return source


def source_of(weights: Weights) -> InitSource:
    """The parameters of an open checkpoint."""
    return _OfCheckpoint(weights)


class _OfCheckpoint:
    """All parameters of a model for pretraining."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self.folder, self.model, self.vocab_size = weights.folder, weights.model, weights.vocab_size
        self.names: list[str] = list(weights.parameters)
        self.missing: list[str] = []
        self.left_out: list[str] = []

    @property
    def tokenizer(self) -> Path:
        """The path of the checkpoint's tokenizer."""
        return tokenizer_of(self.folder)

    def tensor(self, name: str) -> Tensor:
        """Returns a parameter of `names`."""
        return self.weights.tensor(name)

    def digest(self) -> str:
        """The digest of the checkpoint."""
        return self.weights.digest()


class _OfFolder(HuggingFaceFolder):
    """Encoder and heads for pretraining in a folder of transformers.

    `discriminator`: the shape of the encoder that the folder, an ELECTRA's, is the generator of.
    """

    wanted = "encoder"
    plain = True

    def __init__(self, folder: Path, discriminator: ModelConfig | None = None) -> None:
        super().__init__(folder)
        self.generates = False  # whether its layers become those of our generator
        if self.form == "electra":
            self.open_file()
            self.model = self._electra_model(discriminator)
        else:
            self.model = encoder_model_of(self.config, self.origin)
            self.open_file()
        may_relate = not self.model.rotary and self.model.generator_size is None
        shapes = native_shapes(self.model.model_copy(update={"sentence_head": may_relate}), self.vocab_size)
        parts = (*PARTS, "encoder.layers.") if self.generates else PARTS
        lacks = tuple(part for part in parts if not self._has(part, shapes))
        self.shapes = {name: shape for name, shape in shapes.items() if not name.startswith(lacks)}
        self.names: list[str] = list(self.shapes)
        relates = may_relate and "seq_relationship.weight" in self.shapes
        self.model = self.model.model_copy(update={"sentence_head": relates})
        self.missing = [
            name for name in native_shapes(self.model, self.vocab_size) if name not in self.shapes
        ]
        used = [theirs for name in self.names for theirs in self._theirs(name)]
        for theirs in used:
            self.there(theirs)
        self.left_out = self.unread(used)
        self.check_copies()

    @property
    def tokenizer(self) -> Path:
        """The path of the folder's tokenizer."""
        return tokenizer_of(self.folder)

    def tensor(self, name: str) -> Tensor:
        """Returns a parameter of `names`; raises UserError where it is misshapen."""
        return self.read(name, self._theirs(name), self.model, self.shapes[name])

    def _theirs(self, name: str) -> list[str]:
        return electra_names(name, "generator") if self.generates else hugging_face_names(name, self.form)

    def _has(self, part: str, shapes: dict[str, Any]) -> bool:
        """Whether the file has a tensor of the part, which is damaged where it lacks another one."""
        # The head of a ModernBert's task has the names of the first layers of that for masked tokens.
        part = "predictions.decoder." if (part, self.form) == ("predictions.", "modern") else part
        names = [name for name in shapes if name.startswith(part)]
        return any(self.find(theirs) for name in names for theirs in self._theirs(name))

    def _electra_model(self, discriminator: ModelConfig | None) -> ModelConfig:
        """The shape of an ELECTRA; finds whether it is a generator, and what that becomes."""
        if not self.find(GENERATOR_HEAD):
            if discriminator is not None:
                raise UserError(
                    f"{self.files.main} lacks {GENERATOR_HEAD}: it is not the generator of "
                    f"{self.folder.parent}; save an ElectraForMaskedLM there, or remove the folder"
                )
            return encoder_model_of(self.config, self.origin)
        self.form = "electra-generator"
        alone = {**self.config, "model_type": "bert", "sentence_head": False}
        sizes = model_of(alone, str(self.origin))
        width, inside = self.config.get("embedding_size", 128), sizes.hidden_size
        if discriminator is None and width == inside:
            return sizes
        if width < inside:
            raise UserError(
                f"{self.origin}: embedding_size={width} is less than hidden_size={inside}; this version has "
                "only generators that are as wide as the embeddings or narrower"
            )
        self.generates = True
        if discriminator is None:
            values = {
                **sizes.model_dump(),
                "hidden_size": width,
                "num_attention_heads": sizes.num_attention_heads * width // inside,
                "intermediate_size": sizes.intermediate_size * width // inside,
            }
            discriminator = check_config(ModelConfig, values, str(self.origin))
        elif width != discriminator.hidden_size:
            raise UserError(
                f"{self.origin}: embedding_size={width}, and the discriminator has "
                f"hidden_size={discriminator.hidden_size}; in this version both have the same embeddings"
            )
        values = {**discriminator.model_dump(), "generator_size": inside / width}
        whole = check_config(ModelConfig, values, str(self.origin))
        assert whole.generator is not None
        for key in ("hidden_size", *OF_GENERATOR):
            ours, theirs = getattr(whole.generator, key), getattr(sizes, key)
            if ours != theirs:
                raise UserError(
                    f"{self.origin}: {key}={theirs}; this version has only generators whose shape follows "
                    f"from their discriminator's, here {key}={ours}"
                )
        return whole


class _OfPair:
    """An ELECTRA whose generator lies in the discriminator's folder, as `bertscale convert` writes both."""

    def __init__(self, discriminator: _OfFolder, generator: _OfFolder) -> None:
        self.discriminator, self.generator = discriminator, generator
        self.folder, self.model = discriminator.folder, generator.model
        self.vocab_size = discriminator.vocab_size
        for name in generator.names:
            if name.startswith(EMBEDDINGS):
                ours, theirs = generator.tensor(name), discriminator.tensor(name)
                if ours.shape != theirs.shape or not ours.equal(theirs):
                    raise UserError(
                        f"{generator.files.main} and {discriminator.files.main} differ in {name}, and in "
                        f"this version both have the same embeddings; remove {generator.folder} to start "
                        "from the discriminator alone"
                    )
        self._of_generator = {name for name in generator.names if not name.startswith(EMBEDDINGS)}
        found = {*discriminator.names, *self._of_generator}
        shapes = native_shapes(self.model, self.vocab_size)
        self.names: list[str] = [name for name in shapes if name in found]
        self.missing = [name for name in shapes if name not in found]
        self.left_out = [*discriminator.left_out, *generator.left_out]

    @property
    def tokenizer(self) -> Path:
        """The path of the discriminator's tokenizer."""
        return self.discriminator.tokenizer

    def tensor(self, name: str) -> Tensor:
        """Returns a parameter of `names`; raises UserError where it is misshapen."""
        return (self.generator if name in self._of_generator else self.discriminator).tensor(name)

    def digest(self) -> str:
        """One of the digests of all files of both."""
        files = (self.generator.origin, *self.generator.files.paths)
        return "-".join([self.discriminator.digest(), *map(file_digest, files)])
