"""Writes folders of transformers' classes: config.json, weights, tokenizer.

| --as        | bert               | modern                | bert with a generator                         |
| ----------- | ------------------ | --------------------- | --------------------------------------------- |
| pretraining | BertForPreTraining | ModernBertForMaskedLM | ElectraForPreTraining, and ElectraForMaskedLM |
|             |                    |                       | in the folder `generator` inside              |
| masked-lm   | BertForMaskedLM    | ModernBertForMaskedLM | ElectraForMaskedLM                            |
| encoder     | BertModel          | ModernBertModel       | ElectraModel                                  |

megatron-bert is as bert; without sentence head both are ...ForMaskedLM for pretraining, too. One tensor is
in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bertscale.config import UserError
from bertscale.convert.electra import GENERATOR, check_exportable, electra_config, electra_names, to_electra
from bertscale.convert.hf_folder import BASES, write_config, write_tokenizer
from bertscale.convert.hf_names import (
    CLASSES,
    SENTENCE_HEAD,
    hugging_face_config,
    hugging_face_names,
    special_ids,
    to_hugging_face,
)
from bertscale.convert.model_shape import native_shapes
from bertscale.convert.sources import InitSource
from bertscale.convert.tensor_files import open_tensors
from bertscale.export.card import model_card
from bertscale.export.native import Output, native_outputs
from bertscale.export.options import ConvertOptions
from bertscale.export.output import Written
from bertscale.export.reference import Sample, samples_of, sentences, write_reference
from bertscale.export.tensors import Rounding, write_tensors
from bertscale.export.verify import TOO_LARGE, agreement, check_folder, compare_tensor, is_feasible
from bertscale.progress import Progress
from bertscale.tokenizer import load_tokenizer
from bertscale.train.device import one_thread

POOLER = "encoder.pooler."
ENCODERS = ("encoder", "sentence-transformers")


class Target(NamedTuple):
    """A folder that transformers loads: which native parameters its class has, and what becomes of them."""

    folder: str  # inside the output; "" is the output itself
    config: dict[str, Any]  # of config.json
    parameters: dict[str, torch.Size]  # native names and shapes
    tensors: Callable[[str, Tensor], dict[str, Tensor]]  # native name and value -> theirs


def write_hugging_face(source: InitSource, output: Path, options: ConvertOptions, form: str) -> Written:
    """Writes `source` in one of the three forms, compares it, and says how it went.

    Raises UserError where transformers has no class for it, the source lacks a part of it, values do not fit
    the data type, or the outcome differs.
    """
    tokenizer = load_tokenizer(source.tokenizer)
    targets = targets_of(source, form, options.pooler)
    rounding = Rounding(options.dtype, clamp=options.clamp)
    digests = write_folders(source, targets, output, rounding, options.shard_size)
    said = rounding.check()
    if left_out := _left_out(source, targets):
        classes = " and ".join(target.config["architectures"][0] for target in targets)
        said.append(f"left out  {', '.join(left_out)}: {classes} has no place for them")
    texts = sentences(tokenizer)
    samples = samples_of(texts, tokenizer, source.model, source.vocab_size)
    names = {name for target in targets for name in target.parameters}
    ours, compared = _read_again(source, targets, output, rounding, samples, compare=options.verify)
    write_reference(output, texts, samples, ours)
    if options.verify:
        said.append(compared)
        if is_feasible(source):
            said += check_folder(source, output, names, samples, ours, rounding)
        else:
            said.append(f"not run   {TOO_LARGE}")
        said += agreement(tokenizer, output, texts)
    else:
        said.append("verified  not, as --no-verify was given")
    (output / "README.md").write_text(model_card(source, targets[0].config, form, options), encoding="utf-8")
    return Written(said, digests)


def write_folders(
    source: InitSource, targets: list[Target], output: Path, rounding: Rounding, shard_size: int
) -> dict[str, str]:
    """Writes each target's config.json, weights and tokenizer; returns the digests of the weights' files by
    their names in `output`. Raises OSError."""
    tokenizer, model = load_tokenizer(source.tokenizer), source.model
    count = sum(len(target.parameters) for target in targets)
    digests: dict[str, str] = {}
    with one_thread(), Progress("convert", count, "tensors") as progress:
        for target in targets:
            folder = output / target.folder
            folder.mkdir(exist_ok=True)
            for name, digest in _write_weights(
                source, target, folder, rounding, shard_size, progress
            ).items():
                digests[(Path(target.folder) / name).as_posix()] = digest
            config = {**target.config, **special_ids(model, tokenizer)}
            write_config(folder, config, rounding.precision)
            write_tokenizer(folder, tokenizer, model.max_position_embeddings, token_types=not model.rotary)
    return digests


def _write_weights(
    source: InitSource,
    target: Target,
    folder: Path,
    rounding: Rounding,
    shard_size: int,
    progress: Progress,
) -> dict[str, str]:
    shapes = {
        theirs: value.shape
        for name, shape in target.parameters.items()
        for theirs, value in target.tensors(name, torch.empty(shape, device="meta")).items()
    }

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in target.parameters:
            progress.advance(1)
            yield from target.tensors(name, source.tensor(name)).items()

    return write_tensors(folder, shapes, tensors(), rounding, shard_size)


class _Compared:
    """A source each of whose tensors is compared, bit for bit, with what was written when it is read."""

    def __init__(
        self, source: InitSource, targets: list[Target], output: Path, rounding: Rounding, progress: Progress
    ) -> None:
        self.model, self.vocab_size = source.model, source.vocab_size
        self.left = {name for target in targets for name in target.parameters}  # to be compared
        self._source, self._rounding, self._progress = source, rounding, progress
        self._written = [(target, open_tensors(output / target.folder)) for target in targets]

    def tensor(self, name: str) -> Tensor:
        """A parameter of the source. Raises UserError where what was written of it differs."""
        value = self._source.tensor(name)
        for target, files in self._written:
            if name in target.parameters:
                for theirs, part in target.tensors(name, value).items():
                    compare_tensor(files, theirs, self._rounding(part))
                self._progress.advance(1)
        self.left.discard(name)
        return value


def _read_again(
    source: InitSource,
    targets: list[Target],
    output: Path,
    rounding: Rounding,
    samples: list[Sample],
    *,
    compare: bool,
) -> tuple[list[Output], str]:
    """The outputs of the native model for the samples, and what is said of its tensors: on the way each is
    compared with what was written, so that a large source is read once for both."""
    names = {name for target in targets for name in target.parameters}

    def stored(value: Tensor) -> Tensor:
        return rounding(value).float()

    if not compare:
        return native_outputs(source, names, samples, stored), ""
    count = sum(len(target.parameters) for target in targets)
    with one_thread(), Progress("compared", count, "tensors") as progress:
        compared = _Compared(source, targets, output, rounding, progress)
        outputs = native_outputs(compared, names, samples, stored)
        for name in sorted(compared.left):  # those that no output depends on
            compared.tensor(name)
    return outputs, f"verified  {count} tensors are those of the source, bit for bit" + (
        "" if rounding.dtype == torch.float32 else f", rounded to {rounding.precision}"
    )


def _left_out(source: InitSource, targets: list[Target]) -> list[str]:
    written = {name for target in targets for name in target.parameters}
    return [name for name in source.names if name not in written]


# ------------------------------------------------------------------------------------------ the classes


def targets_of(source: InitSource, form: str, pooler: bool | None = None) -> list[Target]:
    """The folders of a form. Raises UserError where transformers has no class, or the source lacks a part."""
    model = source.model
    if model.generator_size is not None:
        check_exportable(model, str(source.folder))
        parts = {"pretraining": ["discriminator", "generator"], "masked-lm": ["generator"]}
        targets = [_of_electra(source, part, form) for part in parts.get(form, ["discriminator"])]
        if form == "pretraining" and any(name.startswith("generator.") for name in source.missing):
            targets = targets[:1]  # the folder of a discriminator alone
    else:
        targets = [_of_preset(source, form, pooler)]
    for target in targets:
        lacking = [name for name in target.parameters if name not in source.names]
        if lacking:
            raise UserError(
                f"{source.folder} lacks {lacking[0]}, which {target.config['architectures'][0]} has; give "
                "another --as, such as encoder"
            )
    return targets


def _of_preset(source: InitSource, form: str, pooler: bool | None) -> Target:
    model, vocab_size = source.model, source.vocab_size
    config = hugging_face_config(model, vocab_size, 0)
    shapes = native_shapes(model, vocab_size)
    names = {name: shape for name, shape in shapes.items() if hugging_face_names(name, model.preset)}
    if form != "pretraining":
        names = {name: shape for name, shape in names.items() if not name.startswith(SENTENCE_HEAD)}
        config["architectures"] = [CLASSES[model.preset][0] + "ForMaskedLM"]
        if not model.rotary:
            config["sentence_head"] = False
    if form in ENCODERS:
        names = {name: shape for name, shape in names.items() if name.startswith("encoder.")}
        config["architectures"] = [CLASSES[model.preset][0] + "Model"]
        whole = native_shapes(model.model_copy(update={"sentence_head": True}), vocab_size)
        trained = all(name in source.names for name in whole if name.startswith(POOLER))
        if not model.rotary and (trained if pooler is None else pooler):
            names |= {name: shape for name, shape in whole.items() if name.startswith(POOLER)}

    def tensors(name: str, value: Tensor) -> dict[str, Tensor]:
        theirs = to_hugging_face(name, value, model, vocab_size)
        return _without_base(theirs) if form in ENCODERS else theirs

    return Target("", config, names, tensors)


def _of_electra(source: InitSource, part: str, form: str) -> Target:
    model, vocab_size = source.model, source.vocab_size
    config = electra_config(model, vocab_size, 0, part)
    shapes = native_shapes(model, vocab_size)
    names = {name: shape for name, shape in shapes.items() if electra_names(name, part)}
    if form in ENCODERS:
        names = {name: shape for name, shape in names.items() if name.startswith("encoder.")}
        config["architectures"] = ["ElectraModel"]

    def tensors(name: str, value: Tensor) -> dict[str, Tensor]:
        theirs = to_electra(name, value, model, vocab_size, part)
        return _without_base(theirs) if form in ENCODERS else theirs

    inside = GENERATOR if part == GENERATOR and form == "pretraining" else ""
    return Target(inside, config, names, tensors)


def _without_base(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names in a class that is an encoder, and has none inside."""
    base = next(base for base in BASES if all(name.startswith(base) for name in tensors))
    return {name.removeprefix(base): value for name, value in tensors.items()}
