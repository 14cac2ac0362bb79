"""Native parameters in a folder of transformers, whatever the class; see `sources` for what becomes of which.

source = FolderSource(Path("roberta-base"))
source.tensor("encoder.pooler.weight")
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from bertscale.config import ModelConfig, UserError, check_config
from bertscale.convert.electra import electra_names
from bertscale.convert.hf_folder import HuggingFaceFolder, tokenizer_of
from bertscale.convert.hf_names import hugging_face_names, model_of
from bertscale.convert.model_shape import PARTS, native_shapes
from bertscale.convert.task_names import encoder_model_of
from bertscale.convert.tensor_files import checked_digest

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
# A task's head of ModernBert begins with these of the head for masked tokens: in transformers both have one
# name.
SHARED = ("predictions.dense.weight", "predictions.LayerNorm.weight")


class FolderSource(HuggingFaceFolder):
    """Encoder and heads for pretraining in a folder of transformers.

    `discriminator`: the shape of the encoder that the folder, an ELECTRA's, is the generator of. `file`: the
    one to read the weights from, by default what transformers reads. `alone`: for a fine-tuning, the encoder
    without the heads of a pretraining, and what a task's head of `modern` shares with these (`SHARED`).
    """

    wanted = "encoder"
    plain = True

    def __init__(
        self,
        folder: Path,
        discriminator: ModelConfig | None = None,
        *,
        file: Path | None = None,
        alone: bool = False,
    ) -> None:
        super().__init__(folder)
        self.generates = False  # whether its layers become those of our generator
        self.alone, self.file = alone, file
        if self.form == "electra" and not alone:
            self.open_file(file)
            self.model: ModelConfig = self._electra_model(discriminator)
        else:
            self.model = encoder_model_of(self.config, self.origin)
            self.open_file(file)
        self.whole = self.model
        may_relate = not self.model.rotary and self.model.generator_size is None
        shapes = native_shapes(self.model.model_copy(update={"sentence_head": may_relate}), self.vocab_size)
        if alone:
            shared = SHARED if self.form == "modern" else ()
            shapes = {name: each for name, each in shapes.items() if name.startswith(("encoder.", *shared))}
        parts = (*PARTS, "encoder.layers.") if self.generates else PARTS
        lacks = tuple(part for part in parts if not self._has(part, shapes))
        self.shapes = {name: shape for name, shape in shapes.items() if not name.startswith(lacks)}
        self.names: list[str] = list(self.shapes)
        used = [theirs for name in self.names for theirs in self._theirs(name)]
        for theirs in used:
            self.there(theirs)
        self.missing: list[str] = []
        self.left_out: list[str] = []
        if not alone:
            relates = may_relate and "seq_relationship.weight" in self.shapes
            self.model = self.model.model_copy(update={"sentence_head": relates})
            if relates:
                self.whole = self.model
            self.missing += [
                name for name in native_shapes(self.model, self.vocab_size) if name not in self.shapes
            ]
            self.left_out += self.unread(used)
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
        if (part, self.form) == ("predictions.", "modern") and not self.alone:
            part = "predictions.decoder."
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


class PairSource:
    """An ELECTRA whose generator lies in the discriminator's folder, as `bertscale convert` writes both."""

    def __init__(self, discriminator: FolderSource, generator: FolderSource) -> None:
        self.discriminator, self.generator = discriminator, generator
        self.folder, self.model = discriminator.folder, generator.model
        self.whole = self.model
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
        return "-".join([self.discriminator.digest(), *map(checked_digest, files)])
