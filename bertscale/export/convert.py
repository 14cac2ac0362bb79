"""Converts weights from any source into any form, and checks that both agree.

    bertscale convert runs/quickstart/pretrain runs/quickstart/hugging-face   # newest checkpoint of a run
    bertscale convert runs/quickstart/hugging-face runs/imported              # and back
    bertscale convert runs/quickstart/pretrain runs/vectors --as sentence-transformers --pooling mean

`FORMS` has all that can be written, `convert/sources.py` all that is read. Weights are read and written one
tensor at a time, but for graphs of ONNX. It needs no GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from bertscale.config import UserError
from bertscale.convert.hf_folder import tokenizer_of
from bertscale.convert.native_files import Given
from bertscale.convert.sources import CheckpointSource, InitSource, open_source_weights
from bertscale.convert.task_models import TaskWeights
from bertscale.convert.weights import Weights, native_model, open_weights
from bertscale.export.checkpoint import open_for_checkpoint, write_checkpoint
from bertscale.export.hugging_face import write_hugging_face
from bertscale.export.masks import show_masks
from bertscale.export.onnx import find_task, write_onnx
from bertscale.export.options import ConvertOptions
from bertscale.export.output import check_output, check_source, is_output_of, write_record
from bertscale.export.sentence_transformers import write_sentence_transformers
from bertscale.export.universal import write_universal
from bertscale.files import whole_folder
from bertscale.run_folder import CHECKPOINTS, TABLE
from bertscale.tokenizer import load_tokenizer
from bertscale.train.checkpoint import AveragedCheckpoint, Checkpoint

CAUSAL = "note      trained causally; these weights are read with bidirectional attention"


class Form(NamedTuple):
    """One of the things that can be written.

    `open` opens the source, which has a `folder` and a `digest()`, and raises UserError where it cannot
    become this. `write` fills the empty folder that it is given, compares the outcome with the source, and
    returns the lines to print.
    """

    open: Callable[[Path, ConvertOptions], Any]
    write: Callable[[Any, Path, ConvertOptions], list[str]]


def _open_source(source: Path, options: ConvertOptions) -> InitSource:
    opened = open_source_weights(source, Given(options.model, options.tokenizer))
    if not options.average:
        return opened
    weights = opened.weights if isinstance(opened, CheckpointSource) else None
    return CheckpointSource(_average(source, weights))


def _open_weights(source: Path, options: ConvertOptions) -> Weights:
    weights = open_weights(source, Given(options.model, options.tokenizer))
    return _average(source, weights) if options.average else weights


def _average(source: Path, weights: object) -> Checkpoint:
    if not isinstance(weights, Checkpoint):
        raise UserError(f"--average: {source} is no checkpoint of ours; these alone have an average")
    return AveragedCheckpoint(weights)


def _open_for_checkpoint(source: Path, options: ConvertOptions) -> Weights:
    return open_for_checkpoint(_open_weights(source, options), options)


def _open_for_onnx(source: Path, options: ConvertOptions) -> InitSource | TaskWeights:
    return find_task(source, options) or _open_source(source, options)


FORMS = {  # by the keys of `options.FORMS`
    "pretraining": Form(_open_source, partial(write_hugging_face, form="pretraining")),
    "masked-lm": Form(_open_source, partial(write_hugging_face, form="masked-lm")),
    "encoder": Form(_open_source, partial(write_hugging_face, form="encoder")),
    "sentence-transformers": Form(_open_source, write_sentence_transformers),
    "onnx": Form(_open_for_onnx, write_onnx),
    "onnx-masked-lm": Form(_open_source, partial(write_onnx, masked=True)),
    "checkpoint": Form(_open_for_checkpoint, write_checkpoint),
    "universal": Form(_open_weights, write_universal),
}
FILL_MASKS = ("pretraining", "masked-lm")  # forms with the head for it


def convert(source: Path, output: Path, options: ConvertOptions) -> None:
    """Converts `source` into the folder `output`, written under a temporary name, compared and renamed.

    An output that came from the same source is left as it is. Raises UserError where the source is damaged or
    is none for that form, or where `output` holds what no conversion has written (`output.check_output`).
    """
    ours = (source / TABLE).is_file() or (source / CHECKPOINTS).is_dir()
    default = "pretraining" if ours else "checkpoint"
    name = options.as_ or default
    options.check(name)
    form = FORMS[name]
    check_source(source)
    opened = form.open(source, options)
    weights = opened.weights if isinstance(opened, CheckpointSource) else opened
    if isinstance(weights, Checkpoint):
        tokenizer_of(weights.folder)
    digest = f"{opened.digest()} {options.key(name, default)}".strip()
    if is_output_of(output, digest):
        print(f"already converted: {output} is {opened.folder}")
    else:
        check_output(output, opened.folder, replace=options.replace)
        try:
            with whole_folder(output) as folder:
                said = form.write(opened, folder, options)
                if isinstance(weights, Checkpoint) and weights.causal:
                    said.insert(0, CAUSAL)
                write_record(folder, digest)
        except OSError as error:
            raise UserError(f"cannot write {output}: {error.strerror or error}") from error
        print(f"converted {opened.folder} -> {output}", *said, sep="\n")
    if options.show and name in FILL_MASKS and isinstance(weights, Checkpoint):
        show_masks(native_model(weights), weights.table, load_tokenizer(weights.folder))
