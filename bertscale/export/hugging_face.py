"""Writes a folder of transformers' class for pretraining: config.json, weights, tokenizer.

Presets become BertForPreTraining, MegatronBertForPreTraining and ModernBertForMaskedLM of transformers, whose
names are in `convert.hf_names`. A bert with a generator becomes ElectraForPreTraining and, in the folder
`generator` inside, ElectraForMaskedLM (`convert.electra`). One tensor is in memory at a time.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from bertscale.config import ModelConfig, UserError
from bertscale.convert.electra import (
    CLASSES,
    GENERATOR,
    check_exportable,
    electra_config,
    electra_names,
    to_electra,
)
from bertscale.convert.hf_folder import write_config, write_tokenizer
from bertscale.convert.hf_names import hugging_face_config, hugging_face_names, to_hugging_face
from bertscale.convert.model_shape import native_shapes
from bertscale.convert.tensor_files import WEIGHTS
from bertscale.convert.weights import Weights
from bertscale.export.options import ConvertOptions
from bertscale.export.verify import largest_difference
from bertscale.tokenizer import load_tokenizer
from bertscale.train.checkpoint import stream_tensors


def write_hugging_face(weights: Weights, folder: Path, options: ConvertOptions) -> list[str]:
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
