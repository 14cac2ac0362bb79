"""Loads what was written with transformers and compares its logits with the native model's.

One of the two models is in memory at a time.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bertscale.config import UserError
from bertscale.config.table import damaged
from bertscale.convert.electra import GENERATOR
from bertscale.convert.hf_names import first_position, masked_class, read_config, takes_token_types
from bertscale.convert.weights import Weights, native_model

LARGEST_DIFFERENCE = 1e-3  # of logits in float32, computed in another order


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
