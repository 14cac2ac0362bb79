"""Converts a checkpoint to a Hugging Face folder and back, and checks that both agree.

    bertscale convert runs/quickstart/pretrain runs/quickstart/hugging-face   # newest checkpoint of a run
    bertscale convert runs/quickstart/hugging-face runs/imported              # and back
    bertscale convert runs/quickstart/pretrain runs/vectors --as sentence-transformers --pooling mean

Weights are read and written one tensor at a time. It needs no GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from bertscale.config import UserError
from bertscale.convert.hf_folder import CONFIG_FILE, tokenizer_of
from bertscale.convert.sources import InitSource, open_source_weights, source_of
from bertscale.convert.weights import HuggingFaceWeights, native_model, open_weights
from bertscale.export.checkpoint import write_checkpoint
from bertscale.export.hugging_face import write_hugging_face
from bertscale.export.masks import show_masks
from bertscale.export.options import ConvertOptions
from bertscale.export.output import check_output, is_output_of, write_record
from bertscale.export.sentence_transformers import write_sentence_transformers
from bertscale.files import whole_folder
from bertscale.tokenizer import load_tokenizer
from bertscale.train.checkpoint import AveragedCheckpoint, Checkpoint


class Form(NamedTuple):
    """One of the things that can be written.

    `open` opens the source, which has a `folder` and a `digest()`, and raises UserError where it cannot
    become this. `write` fills the empty folder that it is given, compares the outcome with the source, and
    returns the lines to print.
    """

    open: Callable[[Path, ConvertOptions], Any]
    write: Callable[[Any, Path, ConvertOptions], list[str]]


def open_source(source: Path, options: ConvertOptions) -> InitSource:
    """Opens all that a pretraining may start from; with `average` the average of a checkpoint."""
    if (source / CONFIG_FILE).is_file():
        _refuse_average(source, options)
        return open_source_weights(source)
    weights = open_weights(source)
    if options.average:
        assert isinstance(weights, Checkpoint)
        weights = AveragedCheckpoint(weights)
    return source_of(weights)


def _open_folder(source: Path, options: ConvertOptions) -> HuggingFaceWeights:
    _refuse_average(source, options)
    weights = open_weights(source)
    if not isinstance(weights, HuggingFaceWeights):
        raise UserError(f"--as checkpoint: {source} holds a checkpoint already; give a Hugging Face folder")
    return weights


def _refuse_average(source: Path, options: ConvertOptions) -> None:
    if options.average:
        raise UserError(f"--average: {source} is a Hugging Face folder; checkpoints alone have an average")


FORMS = {  # by the keys of `options.FORMS`
    "pretraining": Form(open_source, partial(write_hugging_face, form="pretraining")),
    "masked-lm": Form(open_source, partial(write_hugging_face, form="masked-lm")),
    "encoder": Form(open_source, partial(write_hugging_face, form="encoder")),
    "sentence-transformers": Form(open_source, write_sentence_transformers),
    "checkpoint": Form(_open_folder, write_checkpoint),
}
FILL_MASKS = ("pretraining", "masked-lm")


def convert(source: Path, output: Path, options: ConvertOptions) -> None:
    """Converts `source` into the folder `output`, written under a temporary name, compared and renamed.

    An output that came from the same source is left as it is. Raises UserError where the source is damaged or
    is none for that form, or where `output` holds what no conversion has written (`output.check_output`).
    """
    default = "checkpoint" if (source / CONFIG_FILE).is_file() else "pretraining"
    name = options.as_ or default
    options.check(name)
    opened = FORMS[name].open(source, options)
    tokenizer_of(opened.folder)
    digest = f"{opened.digest()} {options.key(name, default)}".strip()
    if is_output_of(output, digest):
        print(f"already converted: {output} is {opened.folder}")
    else:
        check_output(output, opened.folder, replace=options.replace)
        try:
            with whole_folder(output) as partial_output:
                said = FORMS[name].write(opened, partial_output, options)
                write_record(partial_output, digest)
        except OSError as error:
            raise UserError(f"cannot write {output}: {error.strerror or error}") from error
        print(f"converted {opened.folder} -> {output}", *said, sep="\n")
    weights = getattr(opened, "weights", None)
    if options.show and name in FILL_MASKS and isinstance(weights, Checkpoint):
        show_masks(native_model(weights), weights.table, load_tokenizer(weights.folder))
