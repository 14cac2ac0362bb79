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
from bertscale.tokenizer import Tokenizer

# Form -> native module -> Hugging Face module, outside the layers and inside one; `query_key_value` is
# divided where Hugging Face has three weights. What is in no table (the sentence head of `modern`) is not
# exported. Each preset is a form. The others are forms of `bert`: ELECTRA's, and RoBERTa's and DistilBERT's,
# which are read and not written.
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
_EMBEDDINGS = tuple(
    f"embeddings.{part}"
    for part in ("word_embeddings", "position_embeddings", "token_type_embeddings", "LayerNorm")
)
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
    "roberta": {
        **{f"encoder.{part}": f"roberta.{part}" for part in _EMBEDDINGS},
        "encoder.pooler": "roberta.pooler.dense",
        "predictions.dense": "lm_head.dense",
        "predictions.LayerNorm": "lm_head.layer_norm",
        "predictions.decoder": "lm_head",
    },
    "distilbert": {
        **{f"encoder.{part}": f"distilbert.{part}" for part in _EMBEDDINGS if "type" not in part},
        "predictions.dense": "vocab_transform",
        "predictions.LayerNorm": "vocab_layer_norm",
        "predictions.decoder": "vocab_projector",
    },
    "electra": {
        **{f"encoder.{part}": f"electra.{part}" for part in _EMBEDDINGS},
        "detector.dense": "discriminator_predictions.dense",
        "detector.output": "discriminator_predictions.dense_prediction",
    },
    "electra-generator": {
        **{f"encoder.{part}": f"electra.{part}" for part in _EMBEDDINGS},
        "generator.projection": "electra.embeddings_project",
        "predictions.dense": "generator_predictions.dense",
        "predictions.LayerNorm": "generator_predictions.LayerNorm",
        "predictions.decoder": "generator_lm_head",
    },
}
LAYERS = {
    "bert": "bert.encoder.layer",
    "megatron-bert": "bert.encoder.layer",
    "modern": "model.layers",
    "roberta": "roberta.encoder.layer",
    "distilbert": "distilbert.transformer.layer",
    "electra": "electra.encoder.layer",
    "electra-generator": "electra.encoder.layer",
}
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
    "roberta": BERT_LAYER,
    "electra": BERT_LAYER,
    "electra-generator": BERT_LAYER,
    "distilbert": {
        "attention.query_key_value": tuple(f"attention.{part}_lin" for part in "qkv"),
        "attention.dense": ("attention.out_lin",),
        "attention.LayerNorm": ("sa_layer_norm",),
        "feed_forward.intermediate": ("ffn.lin1",),
        "feed_forward.dense": ("ffn.lin2",),
        "feed_forward.LayerNorm": ("output_layer_norm",),
    },
}
CLASSES = {  # preset -> how the names of its classes begin, and their model_type
    "bert": ("Bert", "bert"),
    "megatron-bert": ("MegatronBert", "megatron-bert"),
    "modern": ("ModernBert", "modernbert"),
}
READ_ONLY = {  # model_type -> how the names of its classes begin, and the form of its names
    "roberta": ("Roberta", "roberta"),
    "xlm-roberta": ("XLMRoberta", "roberta"),
    "camembert": ("Camembert", "roberta"),
    "distilbert": ("DistilBert", "distilbert"),
}
PADDED = ("encoder.embeddings.word_embeddings.weight", "predictions.decoder.bias")
SENTENCE_HEAD = ("encoder.pooler.", "seq_relationship.")


def hugging_face_names(name: str, form: str) -> list[str]:
    """Returns the names of the native parameter `name` in transformers' class: mostly one, perhaps none.

    `form` is a preset, or another key of `OUTSIDE`.
    """
    module, kind = name.rsplit(".", 1)
    if module in OUTSIDE[form]:
        return [f"{OUTSIDE[form][module]}.{kind}"]
    if not module.startswith("encoder.layers."):
        return []
    _, _, layer, part = module.split(".", 3)  # encoder.layers.N.part
    return [f"{LAYERS[form]}.{layer}.{theirs}.{kind}" for theirs in WITHIN[form][part]]


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
            "position_embedding_type": "absolute",  # transformers 5 has no other; older readers ask
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
        "layer_norm_eps": eps,  # vLLM asks for it under this name, too
        **MODERN_FORM,
        "layer_types": [
            "sliding_attention" if number % model.global_attn_every_n_layers else "full_attention"
            for number in range(model.num_hidden_layers)
        ],
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": model.global_rope_theta},
            "sliding_attention": {"rope_type": "default", "rope_theta": model.local_rope_theta},
        },
        # The classes' defaults, which readers in other languages have not.
        "classifier_dropout": 0.0,
        "classifier_pooling": "cls",
        "deterministic_flash_attn": False,
        "sparse_prediction": False,
        "sparse_pred_ignore_index": -100,
    }


def special_ids(model: ModelConfig, tokenizer: Tokenizer) -> dict[str, int]:
    """Returns the ids of special pieces as config.json names them.

    A ModernBert for which they are not told has ids of its own, beyond the vocabulary; its texts begin and
    end with [CLS] and [SEP].
    """
    ids = {f"{role}_token_id": getattr(tokenizer, f"{role}_id") for role in ("pad", "cls", "sep", "mask")}
    if model.preset == "modern":
        ids |= {"bos_token_id": tokenizer.cls_id, "eos_token_id": tokenizer.sep_id}
    return ids


# Keys that a config of each family may set otherwise, and a preset may not: they change the network.
BERT_FORM = {
    "hidden_act": "gelu",
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}
DISTILBERT_FORM = {"activation": "gelu", "tie_word_embeddings": True}
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


class _RobertaConfig(_HuggingFaceConfig):
    """What decides, beside, which row of the position embeddings is the first token's."""

    pad_token_id: Annotated[int, Field(ge=0, lt=2**24)] = 1


class _DistilBertConfig(Table):
    """The keys of a DistilBERT, which has words of its own for the sizes."""

    architectures: list[str] | None = None
    vocab_size: _Dimension
    dim: _Dimension
    n_layers: Annotated[int, Field(ge=1, lt=2**12)]
    n_heads: _Dimension
    hidden_dim: _Dimension
    max_position_embeddings: _Dimension


DISTILBERT_KEYS = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "hidden_dim": "intermediate_size",
    "dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
}


def read_config(path: Path) -> dict[str, Any]:
    """Reads a config.json. Raises UserError where it is damaged."""
    remedy = "save the model there again with model.save_pretrained(folder)"
    config = read_object(path, remedy)
    tables: dict[str, type[Table]] = {"roberta": _RobertaConfig, "distilbert": _DistilBertConfig}
    check_table(tables.get(form_of(config), _HuggingFaceConfig), config, path, remedy)
    return config


def form_of(config: dict[str, Any]) -> str:
    """Returns the form of the names of a config.json's class, a key of `OUTSIDE`; the model_type of one that
    is not known."""
    kind = str(config.get("model_type"))
    of_preset = {name: preset for preset, (_, name) in CLASSES.items()}
    return of_preset.get(kind) or READ_ONLY.get(kind, ("", kind))[1]


def first_position(config: dict[str, Any]) -> int:
    """Returns the row of the position embeddings that a sample's first token has."""
    return int(config.get("pad_token_id", 1)) + 1 if form_of(config) == "roberta" else 0


def takes_token_types(config: dict[str, Any]) -> bool:
    """Tells whether a config.json's class tells the segments of a pair apart."""
    form = form_of(config)
    one_type = form == "roberta" and config.get("type_vocab_size", 2) == 1
    return form not in ("modern", "distilbert") and not one_type


def masked_class(config: dict[str, Any]) -> str:
    """Names transformers' class for masked language modelling of a config.json that names none."""
    prefixes = {kind: prefix for prefix, kind in CLASSES.values()}
    prefixes |= {kind: prefix for kind, (prefix, _) in READ_ONLY.items()}
    if config["model_type"] == "electra":  # of a discriminator as likely as of a generator
        return "ElectraModel"
    return prefixes[config["model_type"]] + "ForMaskedLM"


def model_of(config: dict[str, Any], origin: str) -> ModelConfig:
    """Reads the native config from a config.json. Raises UserError where no preset equals it."""
    kind, form = config.get("model_type"), form_of(config)
    supported = (
        "this version converts bert and megatron-bert with gelu, "
        f"{', '.join(READ_ONLY)}, electra and modernbert"
    )
    if kind not in READ_ONLY and form not in CLASSES:
        raise UserError(f"{origin} describes a model of type {kind!r}; {supported}")
    for key, wanted in {"modern": MODERN_FORM, "distilbert": DISTILBERT_FORM}.get(form, BERT_FORM).items():
        if config.get(key, wanted) != wanted:
            raise UserError(f"{origin}: {key}={config[key]!r}; {supported} with {key}={wanted!r}")
    values = {key: config[key] for key in ModelConfig.model_fields if key in config}
    values["preset"] = "bert" if kind in READ_ONLY else form
    if kind in READ_ONLY:
        values["sentence_head"] = False
    if form == "roberta":
        first, rows = first_position(config), config.get("max_position_embeddings", 512)
        if rows <= first:
            raise UserError(
                f"{origin}: max_position_embeddings={rows}, of which the first {first} are of no token "
                f"(pad_token_id={first - 1}); {supported} with more"
            )
        values["max_position_embeddings"] = rows - first
        values["type_vocab_size"] = max(2, config.get("type_vocab_size", 2))
    if form == "distilbert":
        values |= {ours: config[theirs] for theirs, ours in DISTILBERT_KEYS.items() if theirs in config}
    if form == "modern":
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
