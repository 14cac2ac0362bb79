"""Exports a `bert` with a generator as ElectraForPreTraining and ElectraForMaskedLM of transformers.

The discriminator is the native encoder with its detector, the generator the native one with the head for
masked tokens. Both of theirs hold the embeddings, which our two share; neither has our sentence head. Used by
`bertscale convert`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from bertscale.config import ModelConfig, UserError
from bertscale.convert.hf_names import hugging_face_config, hugging_face_names, to_hugging_face

GENERATOR = "generator"  # the inner folder, and the part of an ELECTRA that it holds
CLASSES = {"discriminator": "ElectraForPreTraining", "generator": "ElectraForMaskedLM"}


def check_exportable(model: ModelConfig, origin: str) -> None:
    """Raises UserError where transformers has no class for a model with a generator."""
    if model.preset != "bert":
        raise UserError(
            f"{origin} is a {model.preset} with a generator (generator_size={model.generator_size:g}), and "
            "transformers has classes for replaced-token detection for preset bert only; `bertscale "
            "finetune` reads the checkpoint itself"
        )


def electra_names(name: str, part: str) -> list[str]:
    """Returns the names of the native parameter `name` in the class of `part`: three for a query, key and
    value, else one; none if the class has no such parameter."""
    form = {"discriminator": "electra", "generator": "electra-generator"}[part]
    if ".layers." not in name:
        return hugging_face_names(name, form)
    as_of_bert = _layer_name(name, part)
    return hugging_face_names(as_of_bert, form) if as_of_bert else []


def _layer_name(name: str, part: str) -> str | None:
    """Returns the name that a parameter of the part's layers has in a model without a generator."""
    owner = {"discriminator": "encoder.layers.", "generator": "generator.layers."}[part]
    return f"encoder.layers.{name.removeprefix(owner)}" if name.startswith(owner) else None


def to_electra(name: str, value: Tensor, model: ModelConfig, vocab_size: int, part: str) -> dict[str, Tensor]:
    """Turns one native tensor into those of the part's class; padded vocabulary rows are cut off."""
    names = electra_names(name, part)
    if len(names) == 3 or name.startswith("encoder.embeddings."):
        shape = shape_of(model, part)
        as_of_bert = _layer_name(name, part) or name
        return dict(zip(names, to_hugging_face(as_of_bert, value, shape, vocab_size).values(), strict=True))
    return dict.fromkeys(names, value[:vocab_size] if name == "predictions.decoder.bias" else value)


def shape_of(model: ModelConfig, part: str) -> ModelConfig:
    """Returns the native config of one part alone."""
    shape = model.generator if part == "generator" else model.model_copy(update={"generator_size": None})
    assert shape is not None
    return shape


def electra_config(model: ModelConfig, vocab_size: int, pad_token_id: int, part: str) -> dict[str, Any]:
    """Returns the part's config.json."""
    values = hugging_face_config(shape_of(model, part), vocab_size, pad_token_id)
    del values["sentence_head"]
    return {
        **values,
        "architectures": [CLASSES[part]],
        "model_type": "electra",
        "embedding_size": model.hidden_size,
    }
