"""The parameters of a model by its config, and the config of parameters whose files do not tell it.

For the latter, what is told by the files beside, what is given, and the tensors themselves. Looked for beside
the files: config.yaml of a run, else config.json of transformers. `model.KEY=VALUE` on the command line comes
before both; what the tensors tell must agree with them. The tensors do not tell how many attention heads
there are, nor the longest sequence of a `modern`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bertscale.config import ModelConfig, Section, UserError, check_config, padded_vocab_size
from bertscale.config.section import override_values, read_values
from bertscale.convert.hf_folder import CONFIG_FILE
from bertscale.convert.hf_names import read_config
from bertscale.convert.task_names import encoder_model_of
from bertscale.model.layers import Layers
from bertscale.model.model import PretrainingModel
from bertscale.run_folder import CONFIG

# Of each of these a source may lack all parameters; the rest of the network every source has.
PARTS = ("encoder.pooler.", "predictions.", "seq_relationship.", "detector.", "generator.")
WORDS = "encoder.embeddings.word_embeddings.weight"
POSITIONS = "encoder.embeddings.position_embeddings.weight"
TYPES = "encoder.embeddings.token_type_embeddings.weight"


def native_shapes(model: ModelConfig, vocab_size: int) -> dict[str, torch.Size]:
    """Returns every native parameter with its whole shape."""
    with torch.device("meta"):
        skeleton = PretrainingModel(model, vocab_size, Layers())
    return {name: parameter.shape for name, parameter in skeleton.named_parameters()}


class _Given(Section):
    """What may be given on the command line."""

    model: ModelConfig


def read_shape(
    shapes: Mapping[str, torch.Size], places: Iterable[Path], given: Sequence[str], origin: Path
) -> ModelConfig:
    """Returns the shape of the model with the parameters `shapes`, which `origin` holds.

    `places` are the folders to look into, `given` is `model.KEY=VALUE` of the command line. Raises UserError
    that names each key that is missing, or with which the tensors do not agree.
    """
    derived = derived_keys(shapes, origin)
    beside, told = _beside(places)
    values: dict[str, Any] = {"model": dict(beside)}
    override_values(_Given, values, given, "command line")
    if others := sorted(values.keys() - {"model"}):
        raise UserError(
            f"{others[0]}: only model.KEY=VALUE may be given, such as model.num_attention_heads=12"
        )
    model = values["model"]
    for key, value in derived.items():
        if model.setdefault(key, value) != value and not _close(model[key], value):
            raise UserError(
                f"model.{key}={model[key]} ({told if key in beside else 'command line'}), and by its tensors "
                f"{origin} has {value}; give model.{key}={value}, or the files that belong together"
            )
    needed = ["num_attention_heads", *(["max_position_embeddings"] if model["preset"] == "modern" else [])]
    if lacking := [key for key in needed if key not in model]:
        raise UserError(
            f"{origin}: no {CONFIG} or {CONFIG_FILE} lies beside it, and its tensors do not tell "
            f"{' and '.join(f'model.{key}' for key in lacking)}; give "
            f"{' '.join(f'model.{key}=N' for key in lacking)}"
        )
    return check_config(_Given, values, "command line").model


def derived_keys(shapes: Mapping[str, torch.Size], origin: Path) -> dict[str, Any]:
    """Returns what the parameters' names and shapes tell. Raises UserError where they are none of ours."""
    try:
        width = shapes[WORDS][1]
        layers = {int(name.split(".")[2]) for name in shapes if name.startswith("encoder.layers.")}
        keys: dict[str, Any] = {
            "hidden_size": width,
            "num_hidden_layers": len(layers),
            "intermediate_size": shapes["encoder.layers.0.feed_forward.dense.weight"][1],
            "sentence_head": "seq_relationship.weight" in shapes,
        }
        if POSITIONS not in shapes:
            keys["preset"] = "modern"
        else:
            keys["preset"] = "bert" if "encoder.embeddings.LayerNorm.weight" in shapes else "megatron-bert"
            keys["max_position_embeddings"] = shapes[POSITIONS][0]
            keys["type_vocab_size"] = shapes[TYPES][0]
        inside = shapes.get("generator.layers.0.attention.dense.weight")
        keys["generator_size"] = inside[0] / width if inside else None
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(
            f"{origin} holds no model of this project: its tensors lack or misshape {error}; the parameters "
            "must have our names, or those of transformers beside a config.json"
        ) from error
    return keys


def check_rows(shape: torch.Size, vocab_size: int, origin: Path, tokenizer: Path) -> None:
    """Raises UserError where the word embeddings have not as many rows as the tokenizer has pieces, padded or
    not."""
    if shape[0] not in (vocab_size, padded_vocab_size(vocab_size)):
        raise UserError(
            f"{origin} has {shape[0]:,} word embeddings, and {tokenizer} {vocab_size:,} pieces, for which "
            f"there would be {padded_vocab_size(vocab_size):,}: they do not belong together; give its own "
            "tokenizer by --tokenizer"
        )


def _beside(places: Iterable[Path]) -> tuple[dict[str, Any], str]:
    """The model's keys in the first config that lies in one of the places, and the path of that."""
    for place in places:
        if (path := place / CONFIG).is_file():
            values, _ = read_values(path)
            model = values.get("model", {})
            if isinstance(model, dict):
                return model, str(path)
        if (path := place / CONFIG_FILE).is_file():
            return encoder_model_of(read_config(path), path).model_dump(
                exclude={"sentence_head", "generator_size"}
            ), str(path)
    return {}, ""


def _close(one: Any, other: Any) -> bool:
    """Whether two shares are the same but for rounding."""
    return isinstance(one, float) and isinstance(other, float) and abs(one - other) < 0.01
