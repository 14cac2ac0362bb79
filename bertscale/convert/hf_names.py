"""Maps native names and row orders to those of transformers, and ModelConfig to config.json, and back.

`model.fused_rows` tells how matrices lie in one native weight; Hugging Face holds them one after another, or
in separate weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from bertscale.config import MODERN_KEYS, ModelConfig, UserError, check_config, padded_vocab_size
from bertscale.config.table import Table, check_table, read_object
from bertscale.model.model import fused_rows, join_fused, split_fused

# Native module -> Hugging Face module, outside the layers and inside one; `query_key_value` is divided where
# Hugging Face has three weights. What is in no table (the sentence head of `modern`) is not exported.
HEADS = {
    "encoder.embeddings.word_embeddings": "bert.embeddings.word_embeddings",
    "encoder.embeddings.position_embeddings": "bert.embeddings.position_embeddings",
    "encoder.embeddings.token_type_embeddings": "bert.embeddings.token_type_embeddings",
    "encoder.pooler": "bert.pooler.dense",
    "predictions.dense": "cls.predictions.transform.dense",
    "predictions.LayerNorm": "cls.predictions.transform.LayerNorm",
    "predictions.decoder": "cls.predictions",
    "seq_relationship": "cls.seq_relationship",
}
OUTSIDE = {
    "bert": {**HEADS, "encoder.embeddings.LayerNorm": "bert.embeddings.LayerNorm"},
    "megatron-bert": {**HEADS, "encoder.LayerNorm": "bert.encoder.ln"},
    "modern": {
        "encoder.embeddings.word_embeddings": "model.embeddings.tok_embeddings",
        "encoder.embeddings.LayerNorm": "model.embeddings.norm",
        "encoder.LayerNorm": "model.final_norm",
        "predictions.dense": "head.dense",
        "predictions.LayerNorm": "head.norm",
        "predictions.decoder": "decoder",
    },
}
LAYERS = {"bert": "bert.encoder.layer", "megatron-bert": "bert.encoder.layer", "modern": "model.layers"}
BERT_LAYER = {
    "attention.query_key_value": tuple(f"attention.self.{part}" for part in ("query", "key", "value")),
    "attention.dense": ("attention.output.dense",),
    "attention.LayerNorm": ("attention.output.LayerNorm",),
    "feed_forward.intermediate": ("intermediate.dense",),
    "feed_forward.dense": ("output.dense",),
    "feed_forward.LayerNorm": ("output.LayerNorm",),
}
WITHIN: dict[str, dict[str, tuple[str, ...]]] = {
    "bert": BERT_LAYER,
    "megatron-bert": {
        **BERT_LAYER,
        "attention.LayerNorm": ("attention.ln",),
        "feed_forward.LayerNorm": ("ln",),
    },
    "modern": {
        "attention.query_key_value": ("attn.Wqkv",),
        "attention.dense": ("attn.Wo",),
        "attention.LayerNorm": ("attn_norm",),
        "feed_forward.intermediate": ("mlp.Wi",),
        "feed_forward.dense": ("mlp.Wo",),
        "feed_forward.LayerNorm": ("mlp_norm",),
    },
}
CLASSES = {  # preset -> how the names of its classes begin, and their model_type
    "bert": ("Bert", "bert"),
    "megatron-bert": ("MegatronBert", "megatron-bert"),
    "modern": ("ModernBert", "modernbert"),
}
PADDED = ("encoder.embeddings.word_embeddings.weight", "predictions.decoder.bias")
SENTENCE_HEAD = ("encoder.pooler.", "seq_relationship.")


def hugging_face_names(name: str, preset: str) -> list[str]:
    """Returns the names of the native parameter `name` in transformers' class: mostly one, perhaps none."""
    module, kind = name.rsplit(".", 1)
    if module in OUTSIDE[preset]:
        return [f"{OUTSIDE[preset][module]}.{kind}"]
    if not module.startswith("encoder.layers."):
        return []
    _, _, layer, part = module.split(".", 3)  # encoder.layers.N.part
    return [f"{LAYERS[preset]}.{layer}.{theirs}.{kind}" for theirs in WITHIN[preset][part]]


def to_hugging_face(name: str, value: Tensor, model: ModelConfig, vocab_size: int) -> dict[str, Tensor]:
    """Turns a native tensor into none, one or three of Hugging Face; padded vocabulary rows are cut off."""
    names = hugging_face_names(name, model.preset)
    if name in PADDED:
        value = value[:vocab_size]
    value = split_fused(name, value, model).flatten(0, 1)
    return dict(zip(names, value.chunk(len(names)), strict=True)) if names else {}


def from_hugging_face(name: str, values: list[Tensor], model: ModelConfig) -> Tensor:
    """Inverts `to_hugging_face`; padded vocabulary rows are zero."""
    value = torch.cat(values) if len(values) > 1 else values[0]
    _, matrices = fused_rows(name, model)
    value = join_fused(name, value.reshape(matrices, -1, *value.shape[1:]), model)
    if name not in PADDED:
        return value
    padded = value.new_zeros(padded_vocab_size(len(value)), *value.shape[1:])
    padded[: len(value)] = value
    return padded


def hugging_face_config(model: ModelConfig, vocab_size: int, pad_token_id: int) -> dict[str, Any]:
    """Returns the config.json of a model, for transformers and for `model_of`."""
    shared = {"vocab_size": vocab_size, "pad_token_id": pad_token_id, "tie_word_embeddings": True}
    sizes = model.model_dump(exclude={"preset", "generator_size"}, exclude_none=True)
    name, kind = CLASSES[model.preset]
    if name != "ModernBert":
        head = "ForPreTraining" if model.sentence_head else "ForMaskedLM"
        return {
            "architectures": [name + head],
            "model_type": kind,
            "hidden_act": "gelu",
            **shared,
            **{key: value for key, value in sizes.items() if key not in MODERN_KEYS},
        }
    of_hidden, of_attention, eps = (
        sizes.pop(key) for key in ("hidden_dropout_prob", "attention_probs_dropout_prob", "layer_norm_eps")
    )
    del sizes["type_vocab_size"], sizes["sentence_head"]
    return {
        "architectures": [f"{name}ForMaskedLM"],
        "model_type": kind,
        **shared,
        **sizes,
        "embedding_dropout": of_hidden,
        "mlp_dropout": of_hidden,
        "attention_dropout": of_attention,
        "norm_eps": eps,
        **MODERN_FORM,
        "layer_types": [
            "sliding_attention" if number % model.global_attn_every_n_layers else "full_attention"
            for number in range(model.num_hidden_layers)
        ],
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": model.global_rope_theta},
            "sliding_attention": {"rope_type": "default", "rope_theta": model.local_rope_theta},
        },
    }


# Keys that a config of each family may set otherwise, and a preset may not: they change the network.
BERT_FORM = {
    "hidden_act": "gelu",
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}
MODERN_FORM = {
    "tie_word_embeddings": True,
    "hidden_activation": "gelu",
    "classifier_activation": "gelu",
    "norm_bias": False,
    "attention_bias": False,
    "mlp_bias": False,
    "classifier_bias": False,
    "decoder_bias": True,
}


_Dimension = Annotated[int, Field(ge=1, lt=2**24)]  # no shape is asked for that torch cannot even name


class _Rope(Table):
    rope_type: str = "default"


class _Ropes(Table):
    full_attention: _Rope | None = None
    sliding_attention: _Rope | None = None


class _HuggingFaceConfig(Table):
    """The keys of a config.json that are read here; `ModelConfig` checks the rest of the sizes."""

    model_type: str | None = None
    architectures: list[str] | None = None
    vocab_size: _Dimension
    hidden_size: _Dimension
    num_hidden_layers: Annotated[int, Field(ge=1, lt=2**12)]
    num_attention_heads: _Dimension
    intermediate_size: _Dimension
    max_position_embeddings: _Dimension = 1
    type_vocab_size: _Dimension = 1
    sliding_window: _Dimension | None = None
    layer_types: list[str] | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: _Ropes | None = None


def read_config(path: Path) -> dict[str, Any]:
    """Reads a config.json. Raises UserError where it is damaged."""
    remedy = "save the model there again with model.save_pretrained(folder)"
    config = read_object(path, remedy)
    check_table(_HuggingFaceConfig, config, path, remedy)
    return config


def masked_class(config: dict[str, Any]) -> str:
    """Names transformers' class for masked language modelling of a config.json."""
    return next(name for name, kind in CLASSES.values() if kind == config["model_type"]) + "ForMaskedLM"


def model_of(config: dict[str, Any], origin: str) -> ModelConfig:
    """Reads the native config from a config.json. Raises UserError where no preset equals it."""
    kind = config.get("model_type")
    preset = next((preset for preset, (_, name) in CLASSES.items() if name == kind), None)
    supported = "this version converts bert and megatron-bert with gelu, and modernbert"
    if kind == "electra":
        supported += "; for an electra that was trained here, give its checkpoint"
    if preset is None:
        raise UserError(f"{origin} describes a model of type {kind!r}; {supported}")
    for key, wanted in (MODERN_FORM if preset == "modern" else BERT_FORM).items():
        if config.get(key, wanted) != wanted:
            raise UserError(f"{origin}: {key}={config[key]!r}; {supported} with {key}={wanted!r}")
    values = {key: config[key] for key in ModelConfig.model_fields if key in config} | {"preset": preset}
    if preset == "modern":
        values |= {
            native: config[key]
            for native, key in (
                ("layer_norm_eps", "norm_eps"),
                ("hidden_dropout_prob", "mlp_dropout"),
                ("attention_probs_dropout_prob", "attention_dropout"),
            )
            if key in config
        }
        values |= _layers_and_bases(config, origin, supported)
    return check_config(ModelConfig, values, origin)


def _layers_and_bases(config: dict[str, Any], origin: str, supported: str) -> dict[str, Any]:
    """Reads what newer ModernBert configs write as lists: which layers are global, and the rotary bases."""
    values: dict[str, Any] = {}
    if config.get("sliding_window"):  # half of local_attention, which transformers sets by it
        values["local_attention"] = 2 * config["sliding_window"]
    scaling = config.get("rope_scaling") or {}  # the older spelling of rope_parameters
    if scaling.get("rope_type", scaling.get("type", "default")) != "default":
        raise UserError(f"{origin}: rope_scaling={scaling}; {supported} without it")
    if kinds := config.get("layer_types"):
        locals_ = [kind == "sliding_attention" for kind in kinds]
        every = next((n for n in range(1, len(kinds)) if not locals_[n]), len(kinds))
        if locals_ != [number % every > 0 for number in range(len(kinds))]:
            raise UserError(
                f"{origin}: layer_types={kinds}; this version converts models in which the first and then "
                "every n-th layer is 'full_attention' and all others are 'sliding_attention'"
            )
        values["global_attn_every_n_layers"] = every
    for kind, key in (("full_attention", "global_rope_theta"), ("sliding_attention", "local_rope_theta")):
        rope = (config.get("rope_parameters") or {}).get(kind) or {}
        if rope.get("rope_type", "default") != "default":
            raise UserError(
                f"{origin}: rope_parameters of {kind} have rope_type={rope['rope_type']!r}; this version "
                "converts 'default'"
            )
        if "rope_theta" in rope:
            values[key] = rope["rope_theta"]
    return values
