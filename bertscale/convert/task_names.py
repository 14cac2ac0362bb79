"""Names and row orders of task models in transformers: Bert, MegatronBert, ModernBert and Electra For X."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from bertscale.config import ModelConfig, UserError
from bertscale.config.examples import TaskKind
from bertscale.convert.hf_names import CLASSES, hugging_face_names, model_of, to_hugging_face
from bertscale.model.heads import head_family

SUFFIXES: dict[TaskKind, str] = {  # of the class
    "classification": "ForSequenceClassification",
    "multi_label": "ForSequenceClassification",
    "regression": "ForSequenceClassification",
    "tokens": "ForTokenClassification",
    "question_answering": "ForQuestionAnswering",
    "multiple_choice": "ForMultipleChoice",
}
PREFIXES = {**{preset: prefix for preset, (prefix, _) in CLASSES.items()}, "electra": "Electra"}
MODERN_HEAD = {"head.dense": "head.dense", "head.LayerNorm": "head.norm", "head.output": "classifier"}
# How the class's name ends -> native module -> theirs, for every family but ModernBert.
HEADS = {
    "ForSequenceClassification": {"head.output": "classifier"},
    "ForTokenClassification": {"head.output": "classifier"},
    "ForQuestionAnswering": {"head.output": "qa_outputs"},
    "ForMultipleChoice": {"head.output": "classifier"},
}
ELECTRA_HEADS = {
    **HEADS,
    "ForSequenceClassification": {"head.dense": "classifier.dense", "head.output": "classifier.out_proj"},
    "ForMultipleChoice": {"head.dense": "sequence_summary.summary", "head.output": "classifier"},
}
# Keys that change an Electra, as its classes have them by default.
ELECTRA_FORM = {"summary_type": "first", "summary_use_proj": True, "summary_activation": "gelu"}


def task_class(model: ModelConfig, kind: TaskKind) -> str:
    """Names transformers' class of a task model."""
    return PREFIXES[head_family(model)] + SUFFIXES[kind]


def task_names(name: str, model: ModelConfig, kind: TaskKind) -> list[str]:
    """Returns the names of a task model's native parameter in transformers' class: one or three."""
    family = head_family(model)
    if name.startswith("head."):
        module, _, part = name.rpartition(".")
        heads = {"modern": dict.fromkeys(HEADS, MODERN_HEAD), "electra": ELECTRA_HEADS}.get(family, HEADS)
        return [f"{heads[SUFFIXES[kind]][module]}.{part}"]
    return hugging_face_names(name, "electra" if family == "electra" else model.preset)


def to_task(
    name: str, value: Tensor, model: ModelConfig, vocab_size: int, kind: TaskKind
) -> dict[str, Tensor]:
    """Turns a native tensor into one or three of transformers; padded vocabulary rows are cut off."""
    names = task_names(name, model, kind)
    if name.startswith("head."):
        return dict.fromkeys(names, value)
    return dict(zip(names, to_hugging_face(name, value, model, vocab_size).values(), strict=True))


def encoder_model_of(config: dict[str, Any], origin: Path) -> ModelConfig:
    """Reads the native config of the encoder from a config.json. Raises UserError where no preset equals it.

    An Electra becomes a `bert` with a generator, of which the config of a discriminator does not tell the
    size: 1 stands for any.
    """
    if config.get("model_type") != "electra":
        return model_of(config, str(origin))
    given = {"embedding_size": 128, **ELECTRA_FORM, **config}
    for key, value in {"embedding_size": config["hidden_size"], **ELECTRA_FORM}.items():
        if given[key] != value:
            raise UserError(
                f"{origin}: {key}={given[key]!r}; this version reads an electra with {key}={value!r}"
            )
    as_bert = {**config, "model_type": "bert", "sentence_head": False, "generator_size": 1.0}
    return model_of(as_bert, str(origin))
