"""Converts a checkpoint to a Hugging Face folder and back, and checks that both agree.

    bertscale convert runs/quickstart/pretrain runs/quickstart/hugging-face   # newest checkpoint of a run
    bertscale convert runs/quickstart/hugging-face runs/imported              # and back

Presets become BertForPreTraining, MegatronBertForPreTraining and ModernBertForMaskedLM of transformers, whose
names are in `hf_names`. A bert with a generator becomes ElectraForPreTraining and, in the folder `generator`
inside, ElectraForMaskedLM (`electra`). Weights are read and written one tensor at a time; the comparison with
transformers then holds one of the two models after the other. It needs no GPU.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from bertscale.config import ModelConfig, UserError
from bertscale.config.table import damaged
from bertscale.convert.electra import CLASSES, check_exportable, electra_config, electra_names, to_electra
from bertscale.convert.hf_folder import (
    HuggingFaceFolder,
    tokenizer_of,
    write_config,
    write_tokenizer,
)
from bertscale.convert.hf_names import (
    SENTENCE_HEAD,
    first_position,
    hugging_face_config,
    hugging_face_names,
    masked_class,
    model_of,
    read_config,
    takes_token_types,
    to_hugging_face,
)
from bertscale.convert.masks import show_masks
from bertscale.convert.output import check_output, is_output_of, write_record
from bertscale.convert.tensor_files import WEIGHTS
from bertscale.files import whole_folder
from bertscale.model.layers import Layers
from bertscale.model.model import PretrainingModel, initial_value
from bertscale.run_folder import TABLE
from bertscale.tokenizer import load_tokenizer
from bertscale.train.checkpoint import (
    AveragedCheckpoint,
    Checkpoint,
    open_checkpoint,
    stream_tensors,
    write_whole,
)

LARGEST_DIFFERENCE = 1e-3  # of logits in float32, computed in another order
GENERATOR = "generator"  # the inner folder, and the part of an ELECTRA that it holds


class Weights(Protocol):
    """Gives whole native tensors, from a checkpoint or a Hugging Face folder."""

    folder: Path
    model: ModelConfig
    vocab_size: int

    @property
    def parameters(self) -> Any: ...  # an iterable of native names

    def tensor(self, name: str) -> Tensor: ...  # float32, CPU

    def digest(self) -> str: ...  # of all that it is read from; raises UserError where that is damaged


def open_weights(path: Path) -> Weights:
    """Opens a checkpoint, the newest checkpoint of a run, or a Hugging Face folder.

    Raises UserError where `path` is none of them or is damaged.
    """
    if not path.exists():
        raise UserError(
            f"there is no folder {path}: give a run, a checkpoint, or a model's folder; nothing is "
            "downloaded, so save a published model and its tokenizer first, by save_pretrained(FOLDER)"
        )
    if (path / "config.json").is_file():
        return HuggingFaceWeights(path)
    checkpoint = open_checkpoint(path)
    found = {name: torch.Size(entry["shape"]) for name, entry in checkpoint.parameters.items()}
    if found != native_shapes(checkpoint.model, checkpoint.vocab_size):
        reason = "its parameters are not those of its model"
        raise damaged(checkpoint.folder / TABLE, reason, "use another checkpoint")
    return checkpoint


def native_shapes(model: ModelConfig, vocab_size: int) -> dict[str, torch.Size]:
    """Returns every native parameter with its whole shape."""
    with torch.device("meta"):
        skeleton = PretrainingModel(model, vocab_size, Layers())
    return {name: parameter.shape for name, parameter in skeleton.named_parameters()}


class HuggingFaceWeights(HuggingFaceFolder):
    """Reads native tensors from a Hugging Face model for pretraining or masked language modelling.

    A bert or megatron-bert without pooler and next-sentence head gets initial values for them; `missing`
    names them.
    """

    wanted = "model for pretraining or masked language modelling"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.model: ModelConfig = model_of(self.config, str(self.origin))
        self.open_file()
        self.parameters = native_shapes(self.model, self.vocab_size)
        self.missing = [
            name
            for name in self.parameters
            if name.startswith(SENTENCE_HEAD)
            # A part of the head that is there in part is no head of another kind, but a damaged file.
            and not any(self._has(f"{name.rpartition('.')[0]}.{kind}") for kind in ("weight", "bias"))
        ]

    def tensor(self, name: str) -> Tensor:
        """Returns the native parameter `name`, float32; raises UserError where it is missing or misshapen."""
        if name in self.missing:
            return initial_value(name, self.parameters[name], self.model, self.vocab_size, seed=0)
        theirs = hugging_face_names(name, self.form)
        return self.read(name, theirs, self.model, self.parameters[name])

    def unused(self) -> list[str]:
        """Lists the tensors of the file that no parameter is read from, but for copies of tied ones."""
        return self.unread(
            theirs for name in self.parameters for theirs in hugging_face_names(name, self.form)
        )

    def _has(self, name: str) -> bool:
        return all(self.find(theirs) for theirs in hugging_face_names(name, self.form) or [""])


# ---------------------------------------------------------------------------------------- the command


def convert(source: Path, output: Path, show: bool, replace: bool = False, *, average: bool = False) -> None:
    """Converts `source` into the folder `output`, written under a temporary name, compared and renamed.

    An output that came from the same source is left as it is; with `show`, an exported model fills masks
    (`masks.show_masks`). `average`: the moving average of a run's weights is exported. Raises UserError where
    the source is damaged or has no average, or where `output` holds what no conversion has written, unless
    `replace` allows to delete it (`output.check_output`).
    """
    weights = open_weights(source)
    if average:
        if not isinstance(weights, Checkpoint):
            raise UserError(
                f"--average: {source} is a Hugging Face folder; checkpoints alone have an average"
            )
        weights = AveragedCheckpoint(weights)
    tokenizer_of(weights.folder)
    digest = weights.digest()
    if is_output_of(output, digest):
        print(f"already converted: {output} is {weights.folder}")
    else:
        check_output(output, weights.folder, replace=replace)
        try:
            with whole_folder(output) as partial:
                if isinstance(weights, HuggingFaceWeights):
                    said = import_weights(weights, partial)
                else:
                    said = export_verified(weights, partial)
                write_record(partial, digest)
        except OSError as error:
            raise UserError(f"cannot write {output}: {error.strerror or error}") from error
        print(f"converted {weights.folder} -> {output}", *said, sep="\n")
    if show and isinstance(weights, Checkpoint):
        show_masks(native_model(weights), weights.table, load_tokenizer(weights.folder))


def export_verified(weights: Weights, folder: Path) -> list[str]:
    """Exports into the empty `folder` and compares the outcome with the native model; says how it went.

    Raises UserError where the logits are not finite: then nothing has been compared.
    """
    export(weights, folder)
    difference = largest_difference(weights, folder)
    if not math.isfinite(difference):
        raise UserError(
            f"the logits of {weights.folder} are not finite, so its export cannot be verified; take an "
            "earlier checkpoint"
        )
    said = [f"verified  logits of the native and the exported model differ by at most {difference:.1e}"]
    if isinstance(weights, Checkpoint) and weights.causal:
        said.insert(0, "note      trained causally; these weights are read with bidirectional attention")
    if left_out := [name for name in weights.parameters if not exported_names(name, weights.model)]:
        said.insert(0, f"left out  {', '.join(left_out)}: transformers' class has no place for them")
    return said


def exported_names(name: str, model: ModelConfig) -> list[str]:
    """Returns the names of the native parameter `name` in all folders of an export; maybe none."""
    if model.generator_size is None:
        return hugging_face_names(name, model.preset)
    return [theirs for part in CLASSES for theirs in electra_names(name, part)]


def export(weights: Weights, output: Path) -> None:
    """Writes what transformers loads as the preset's class, tokenizer included, into the folder `output`; of
    a model with a generator, a second one inside. Raises UserError where transformers has no class for it."""
    model, vocab_size = weights.model, weights.vocab_size
    if model.generator_size is not None:
        check_exportable(model, str(weights.folder))
    tokenizer = load_tokenizer(weights.folder)
    shapes = native_shapes(model, vocab_size)
    for part in (None,) if model.generator_size is None else CLASSES:
        folder = output / GENERATOR if part == GENERATOR else output
        folder.mkdir(exist_ok=True)

        def named(name: str, value: Tensor, part: str | None = part) -> dict[str, Tensor]:
            if part is None:
                return to_hugging_face(name, value, model, vocab_size)
            return to_electra(name, value, model, vocab_size, part) if electra_names(name, part) else {}

        stream_tensors(
            folder / WEIGHTS,
            {
                theirs: value.shape
                for name, shape in shapes.items()
                for theirs, value in named(name, torch.empty(shape, device="meta")).items()
            },
            (pair for name in shapes for pair in named(name, weights.tensor(name)).items()),
        )
        if part is None:
            config = hugging_face_config(model, vocab_size, tokenizer.pad_id)
        else:
            config = electra_config(model, vocab_size, tokenizer.pad_id, part)
        write_config(folder, config)
        write_tokenizer(folder, tokenizer, model.max_position_embeddings, token_types=not model.rotary)


def import_weights(weights: HuggingFaceWeights, output: Path) -> list[str]:
    """Writes a checkpoint of whole weights, one rank, no optimizer state; says what it lacks."""
    tokenizer = tokenizer_of(weights.folder)
    table = {
        "model": weights.model.model_dump(),
        "vocab_size": weights.vocab_size,
        "tokenizer_sha256": load_tokenizer(tokenizer).sha256,
        "data_digest": None,
        "config": None,
    }
    tensors = ((name, weights.tensor(name)) for name in weights.parameters)
    write_whole(output, table, tensors, tokenizer, weights.parameters)
    difference = largest_difference(open_checkpoint(output), weights.folder)
    if not difference < LARGEST_DIFFERENCE:  # NaN too
        raise UserError(
            f"{weights.folder} is a model that this version does not build: its logits in transformers "
            f"differ by up to {difference:.1e} from those of the imported weights"
        )
    said = [
        "imported  a checkpoint without optimizer state",
        f"verified  logits of the given and the imported model differ by at most {difference:.1e}",
    ]
    if unused := weights.unused():
        said.append(f"left out  {', '.join(unused)}: no parameter of preset {weights.model.preset}")
    if weights.missing:
        said.append(f"missing   {', '.join(weights.missing)}: not in the source, set to initial values")
    return said


def load_model(path: str | Path) -> PretrainingModel:
    """Loads a model for pretraining, float32 on the CPU, in evaluation mode.

    `path` is a run folder, whose newest checkpoint is taken, a checkpoint of any topology, or a Hugging Face
    folder that `bertscale convert` reads; pooler and next-sentence head that such a folder lacks have first
    values. `model(batch)` takes a micro-batch of `iterate_batches` and returns `LossSums`: scalars, summed
    over its predictions. `model.encoder(tokens, token_types, positions, lengths)` takes int64 [T] and returns
    float32 hidden states [T, H] and, with a sentence head, what it pools of each sample [S, H].

    Raises UserError where `path` is none of the three or is damaged.

        model = load_model("runs/quickstart/pretrain")
    """
    return native_model(open_weights(Path(path)))


def native_model(weights: Weights) -> PretrainingModel:
    """Makes the dense native model with these weights, float32 on the CPU, in evaluation mode."""
    model = PretrainingModel(weights.model, weights.vocab_size)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights.tensor(name))
    return model.eval()


@torch.no_grad()
def largest_difference(weights: Weights, folder: Path) -> float:
    """Returns the largest absolute difference of any logit, native against exported, on random ids."""
    import transformers

    _quiet()

    def load(place: Path) -> Any:
        config = read_config(place / "config.json")
        (kind, *_) = config.get("architectures") or [masked_class(config)]  # some published ones tell none
        if not kind.endswith(("ForPreTraining", "ForMaskedLM")) or not hasattr(transformers, kind):
            raise UserError(
                f"{place / 'config.json'} names the class {kind!r}, which is none for pretraining or masked "
                "language modelling; save such a model there with model.save_pretrained(folder)"
            )
        try:
            return getattr(transformers, kind).from_pretrained(place, dtype=torch.float32).eval()
        except Exception as error:  # the library raises errors of many classes for what it cannot read
            raise damaged(place, f"transformers cannot load it: {error}", "save the model anew") from error

    model = weights.model
    # Long enough that a local layer does not see the whole sample.
    longest = max(64, 2 * (model.half_window or 0) + 7)
    generator = torch.Generator().manual_seed(0)
    samples = []
    for length in sorted({min(length, model.max_position_embeddings) for length in (7, longest)}):
        ids = torch.randint(weights.vocab_size, (length,), generator=generator)
        samples.append((ids, (torch.arange(length) > length // 2).long(), torch.arange(length), (length,)))

    def ask(place: Path) -> list[Any]:
        """The outputs of the class in `place`, which is gone afterwards: one model is in memory at a time."""
        theirs, config = load(place), read_config(place / "config.json")
        outputs = []
        for ids, types, positions, _ in samples:
            inputs = {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None]}
            if takes_token_types(config):
                inputs["token_type_ids"] = types[None]
            if first := first_position(config):  # by itself the class counts no position for a pad token
                inputs["position_ids"] = positions[None] + first
            outputs.append(dict(theirs(**inputs)))
        return outputs

    outputs = ask(folder)
    guesses = outputs if model.generator_size is None else ask(folder / GENERATOR)
    ours = native_model(weights)
    differences: list[Tensor] = []
    for sample, output, guess in zip(samples, outputs, guesses, strict=True):
        hidden, pooled = ours.encoder(*sample)
        if ours.generator is not None and ours.detector is not None:
            differences.append(ours.detector(hidden) - output["logits"][0])
            hidden, _ = ours.generator(*sample, ours.encoder.embeddings)
        logits = guess["prediction_logits" if "prediction_logits" in guess else "logits"]
        differences.append(ours.predictions.logits(hidden)[:, : weights.vocab_size] - logits[0])
        if ours.seq_relationship is not None and "seq_relationship_logits" in output:
            differences.append(ours.seq_relationship(pooled) - output["seq_relationship_logits"])
    return float(torch.stack([values.abs().max() for values in differences]).max())  # NaN where one is


def _quiet() -> None:
    """Silences progress bars and lists of unused heads in transformers."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
