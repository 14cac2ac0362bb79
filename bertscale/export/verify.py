"""Compares what was written with its source: tensor by tensor, and by the logits of transformers' class.

Tensors are always compared, two at a time in memory. Logits need the model, one of the two at a time: they
are compared where it is not too large (`FEASIBLE`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from bertscale.config import UserError
from bertscale.config.table import damaged
from bertscale.convert.electra import GENERATOR
from bertscale.convert.folders import FolderSource
from bertscale.convert.hf_names import first_position, masked_class, read_config, takes_token_types
from bertscale.convert.model_shape import native_shapes
from bertscale.convert.native_files import NativeFiles
from bertscale.convert.weights import SourceWeights, Weights, native_model

LARGEST_DIFFERENCE = 1e-3  # of logits in float32, computed in another order
TOO_LARGE = "logits, for which the model would have to be in memory: it has more than 2 GiB"
FEASIBLE = 2 * 2**30  # bytes of a model in float32 of which logits are compared


class States(Protocol):
    """Gives whole tensors by the names of their parameters."""

    def tensor(self, name: str, state: str = "weight") -> Tensor: ...


def compare_checkpoint(
    weights: States, written: States, states: Mapping[str, Sequence[str]]
) -> Iterator[str]:
    """Compares the `states` of all parameters, bit for bit, and gives the name of each.

    Raises UserError where one differs.
    """
    for name, kept in states.items():
        for state in kept:
            if not _bits(weights.tensor(name, state)).equal(_bits(written.tensor(name, state))):
                raise UserError(f"{state} of {name} is another one in what was written than in the source")
            yield name


def compare_import(weights: SourceWeights, written: Weights) -> list[str]:
    """Compares what transformers' class says with the model of the checkpoint; says how it went.

    Raises UserError where they differ: then the source is another network than its config.json tells.
    """
    if isinstance(weights.source, NativeFiles):
        return []
    if isinstance(weights.source, FolderSource) and weights.source.file:
        return [f"not run   logits: transformers reads no {weights.source.file.name}"]
    if not is_feasible(weights):
        return [f"not run   {TOO_LARGE}"]
    difference = largest_difference(written, weights.folder)
    what = "logits" if _has_logits(_class_in(weights.folder)) else "hidden states"
    if not difference < LARGEST_DIFFERENCE:  # NaN too
        raise UserError(
            f"{weights.folder} is a model that this version does not build: its {what} in transformers "
            f"differ by up to {difference:.1e} from those of the imported weights"
        )
    return [f"verified  {what} of the given and the imported model differ by at most {difference:.1e}"]


def is_feasible(weights: Weights) -> bool:
    """Whether logits are compared: the model is small enough to be in memory."""
    shapes = native_shapes(weights.model, weights.vocab_size)
    return sum(4 * shape.numel() for shape in shapes.values()) <= FEASIBLE


def _class_in(folder: Path) -> str:
    """The name of the class that config.json tells; some published ones tell none."""
    config = read_config(folder / "config.json")
    (kind, *_) = config.get("architectures") or [masked_class(config)]
    return str(kind)


def _has_logits(kind: str) -> bool:
    """Whether the class is one for pretraining or masked language modelling, whose logits are compared."""
    return kind.endswith(("ForPreTraining", "ForMaskedLM"))


def _bits(value: Tensor) -> Tensor:
    """The float32 values as integers: NaN equals itself, and -0 is another than 0."""
    return value.view(torch.int32)


@torch.no_grad()
def largest_difference(weights: Weights, folder: Path) -> float:
    """Returns the largest absolute difference of any logit, native against exported, on random ids."""
    import transformers

    _quiet()

    def load(place: Path) -> Any:
        kind = _class_in(place)
        if not hasattr(transformers, kind):
            raise UserError(
                f"{place / 'config.json'} names the class {kind!r}, which transformers does not have; save "
                "the model there anew with model.save_pretrained(folder)"
            )
        loader = getattr(transformers, kind) if _has_logits(kind) else transformers.AutoModel
        try:
            return loader.from_pretrained(place, dtype=torch.float32).eval()
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
    guesses: list[Any] = outputs
    if model.generator_size is not None:  # which an ELECTRA that was published has somewhere else
        guesses = ask(folder / GENERATOR) if (folder / GENERATOR).is_dir() else [None] * len(outputs)
    ours = native_model(weights)
    differences: list[Tensor] = []
    for sample, output, guess in zip(samples, outputs, guesses, strict=True):
        hidden, pooled = ours.encoder(*sample)
        if "last_hidden_state" in output:  # of a class for something else
            differences.append(hidden - output["last_hidden_state"][0])
        elif ours.detector is not None:
            differences.append(ours.detector(hidden) - output["logits"][0])
        if guess is None or "last_hidden_state" in guess:
            continue
        if ours.generator is not None:
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
