"""Writes a folder with an ONNX graph, the tokenizer and config.json.

    bertscale convert runs/base runs/base-onnx --as onnx --pooling mean
    bertscale convert runs/sst2 runs/sst2-onnx --as onnx          # a task model, with its head
    bertscale convert runs/base runs/fill-onnx --as onnx-masked-lm

The graph is `onnx/model.onnx`, where transformers.js, optimum and sentence-transformers look for it. It is
made of the native network, not of transformers' class, and compared in onnxruntime (`bertscale.onnx`).
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from bertscale.config import UserError
from bertscale.convert.hf_folder import CONFIG_FILE, tokenizer_of, write_config, write_tokenizer
from bertscale.convert.hf_names import special_ids
from bertscale.convert.sources import InitSource
from bertscale.convert.task_models import (
    MODEL,
    TaskWeights,
    is_task_model,
    native_task_model,
    open_task_model,
)
from bertscale.export.hugging_face import Target, targets_of
from bertscale.export.options import ConvertOptions
from bertscale.export.output import Written
from bertscale.model.model import PretrainingModel
from bertscale.onnx.write import (
    GRAPH,
    OPSET,
    Network,
    check_installed,
    compared,
    encoder_network,
    masked_network,
    task_network,
    write_graph,
)
from bertscale.tokenizer import load_tokenizer


def find_task(source: Path, options: ConvertOptions) -> TaskWeights | None:
    """Opens the task model at `source`, a folder of one or the output of a fine-tuning; None for all else.

    Raises UserError where a package is missing, or options are given that a task model does not know.
    """
    check_installed()
    folder = next((each for each in (source, source / MODEL) if is_task_model(each)), None)
    if folder is None:
        return None
    if options.pooling is not None or options.average:
        option = "--average" if options.average else "--pooling"
        raise UserError(f"{option}: {folder} is a task model, whose head gives its outputs")
    return open_task_model(folder)


def write_onnx(
    opened: InitSource | TaskWeights, output: Path, options: ConvertOptions, *, masked: bool = False
) -> Written:
    """Fills the empty folder `output` and says how it went; `masked`: with the head that fills masks.

    Raises UserError where the source lacks a part of that, or the outcome differs.
    """
    check_installed()
    if isinstance(opened, TaskWeights):
        network = _task(opened, output)
    else:
        (target, *_) = targets_of(opened, "masked-lm" if masked else "encoder", pooler=False)
        model = _native(opened, target)
        if masked:
            network = masked_network(model)
        else:
            pooling, normalize = options.pooling, options.normalize
            network = encoder_network(model.encoder, opened.vocab_size, pooling, normalize=normalize)
        tokenizer = load_tokenizer(opened.tokenizer)
        write_config(output, {**target.config, **special_ids(opened.model, tokenizer)})
        longest, types = opened.model.max_position_embeddings, not opened.model.rotary
        write_tokenizer(output, tokenizer, longest, token_types=types)
    write_graph(network, output)
    said = [f"graph     {GRAPH} of opset {OPSET}: {', '.join(network.outputs)} of any batch and length"]
    if not options.verify:
        return Written([*said, "verified  not, as --no-verify was given"], {})
    difference = compared(network, output / GRAPH)
    said.append(
        "verified  in onnxruntime, at three lengths and two sizes of batches: outputs differ from those of "
        f"the native model by at most {difference:.1e}"
    )
    return Written(said, {})


@torch.no_grad()
def _native(source: InitSource, target: Target) -> PretrainingModel:
    """The native model, of which only the target's parameters have values."""
    model = PretrainingModel(source.model.model_copy(update={"sentence_head": False}), source.vocab_size)
    parameters = dict(model.named_parameters())
    for name in target.parameters:
        parameters[name].copy_(source.tensor(name))
    return model.eval()


def _task(weights: TaskWeights, output: Path) -> Network:
    """The network of a task model, whose config.json and tokenizer are put into `output`."""
    shutil.copyfile(weights.origin, output / CONFIG_FILE)
    tokenizer = load_tokenizer(tokenizer_of(weights.folder))
    write_tokenizer(output, tokenizer, weights.max_length, token_types=not weights.model.rotary)
    return task_network(native_task_model(weights))
