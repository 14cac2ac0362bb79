"""Folders of task models, as transformers' classes save and load them.

    write_task_model(folder, model, vocab_size, head, labels, tensors, tokenizer, max_length, facts)
    weights = open_task_model(folder)      # of ours, or saved by transformers' save_pretrained

What other readers do not know (longest sample, tag scheme, threshold of no answer, ...) is one dictionary in
config.json, under the key `bertscale`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from bertscale.config import ModelConfig, UserError
from bertscale.config.examples import TaskKind
from bertscale.config.table import Size, Table, check_table, damaged, parse_object
from bertscale.convert.hf_folder import (
    CONFIG_FILE,
    HuggingFaceFolder,
    write_config,
    write_tokenizer,
)
from bertscale.convert.hf_names import READ_ONLY, hugging_face_config, special_ids
from bertscale.convert.task_names import (
    ELECTRA_FORM,
    SUFFIXES,
    encoder_model_of,
    task_class,
    task_names,
    to_task,
)
from bertscale.convert.tensor_files import WEIGHTS
from bertscale.model.heads import HeadConfig, TaskModel, head_family
from bertscale.tokenizer import Tokenizer
from bertscale.train.checkpoint import stream_tensors

FACTS = "bertscale"  # key of config.json
MODEL = "model"  # the folder of the task model in the output of a fine-tuning
REMEDY = "save the model there again with model.save_pretrained(folder)"
PROBLEMS: dict[TaskKind, str] = {
    "classification": "single_label_classification",
    "multi_label": "multi_label_classification",
    "regression": "regression",
}
OUTPUTS: dict[TaskKind, int] = {"regression": 1, "multiple_choice": 1, "question_answering": 2}
LABELLED = ("classification", "multi_label", "tokens")  # kinds whose outputs have names


def task_shapes(model: ModelConfig, vocab_size: int, head: HeadConfig) -> dict[str, torch.Size]:
    """Returns every native parameter of a task model with its whole shape, in order."""
    with torch.device("meta"):
        skeleton = TaskModel(model, vocab_size, head)
    return {name: parameter.shape for name, parameter in skeleton.named_parameters()}


# ------------------------------------------------------------------------------------------- writing


def write_task_model(
    folder: Path,
    model: ModelConfig,
    vocab_size: int,
    head: HeadConfig,
    labels: list[str],
    tensors: Iterable[tuple[str, Tensor]],
    tokenizer: Tokenizer,
    max_length: int,
    facts: dict[str, Any],
) -> None:
    """Writes what transformers loads as the class of the task into `folder`, which is there. Raises OSError.

    `tensors`: native names and whole float32 values on the CPU, in the order of `TaskModel`'s parameters;
    one is in memory at a time. `max_length` and `facts` (JSON values) are read back as `TaskWeights.facts`.
    """
    assert len(labels) == (head.outputs if head.kind in LABELLED else 0)

    def named(name: str, value: Tensor) -> dict[str, Tensor]:
        return to_task(name, value, model, vocab_size, head.kind)

    shapes = {
        theirs: value.shape
        for name, shape in task_shapes(model, vocab_size, head).items()
        for theirs, value in named(name, torch.empty(shape, device="meta")).items()
    }
    stream_tensors(
        folder / WEIGHTS, shapes, (pair for name, value in tensors for pair in named(name, value).items())
    )
    config = task_config(model, vocab_size, head, labels, tokenizer)
    write_config(folder, {**config, FACTS: {"max_length": max_length, **facts}})
    write_tokenizer(folder, tokenizer, max_length, token_types=not model.rotary)


def task_config(
    model: ModelConfig, vocab_size: int, head: HeadConfig, labels: list[str], tokenizer: Tokenizer
) -> dict[str, Any]:
    """Returns the config.json of a task model, for transformers and for `open_task_model`."""
    family, kind = head_family(model), head.kind
    config = hugging_face_config(model, vocab_size, tokenizer.pad_id)
    config["architectures"] = [task_class(model, kind)]
    config |= special_ids(model, tokenizer)
    if family == "modern":
        config["classifier_pooling"] = head.pooling
    if family == "electra":
        config |= {"model_type": "electra", "embedding_size": model.hidden_size, **ELECTRA_FORM}
    if head.dropout is not None:
        config[dropout_key(model, kind)] = head.dropout
    names = labels or ["LABEL_0"] * (kind == "regression")
    if names:
        config["id2label"] = {str(number): label for number, label in enumerate(names)}
        config["label2id"] = {label: number for number, label in enumerate(names)}
    if kind in PROBLEMS:
        config["problem_type"] = PROBLEMS[kind]
    return config


def dropout_key(model: ModelConfig, kind: TaskKind) -> str:
    """Names the key of config.json for dropout in the head."""
    of_summary = head_family(model) == "electra" and kind == "multiple_choice"
    return "summary_last_dropout" if of_summary else "classifier_dropout"


# ------------------------------------------------------------------------------------------- reading


class _Facts(Table):
    """What this room reads of our own facts."""

    max_length: Size | None = None


class _TaskConfig(Table):
    """The keys of a task model's config.json that are read here; `read_config` checks the encoder's."""

    architectures: Annotated[list[str], Field(min_length=1)]
    id2label: dict[str, str] | None = None
    problem_type: (
        Literal["single_label_classification", "multi_label_classification", "regression"] | None
    ) = None
    classifier_pooling: Literal["cls", "mean"] = "cls"
    classifier_dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    summary_last_dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    bertscale: _Facts | None = None


class TaskWeights(HuggingFaceFolder):
    """Gives the native tensors of a task model that we or transformers saved.

    `facts` is what `write_task_model` was given, {} where transformers saved the folder. `labels` are the
    names of the outputs; none for regression, question_answering and multiple_choice.
    """

    wanted = "task model"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        given = check_table(_TaskConfig, self.config, self.origin, REMEDY)
        self.facts: dict[str, Any] = self.config.get(FACTS) or {}
        suffix = next((suffix for suffix in SUFFIXES.values() if given.architectures[0].endswith(suffix)), "")
        if not suffix:
            raise UserError(
                f"{self.origin} describes a {given.architectures[0]}, which is no task model; give one of a "
                f"class {', '.join(dict.fromkeys(SUFFIXES.values()))}"
            )
        self.model: ModelConfig = encoder_model_of(self.config, self.origin)
        if self.config["model_type"] in READ_ONLY:
            raise UserError(
                f"{self.origin} describes a {given.architectures[0]}, whose head is not that of a Bert; this "
                "version reads its encoder alone: give the folder as encoder="
            )
        self.open_file()
        kinds = [kind for kind in SUFFIXES if SUFFIXES[kind] == suffix]
        outputs = self._outputs(kinds[0])
        kind = kinds[0]
        if len(kinds) > 1:
            # Without a problem type as transformers' classes decide it.
            problem = given.problem_type or PROBLEMS["regression" if outputs == 1 else "classification"]
            kind = next(kind for kind in kinds if PROBLEMS[kind] == problem)
        if given.architectures[0] != task_class(self.model, kind):
            raise UserError(
                f"{self.origin} describes a {given.architectures[0]} of type {self.config['model_type']!r}, "
                f"whose class is {task_class(self.model, kind)}; {REMEDY}"
            )
        if (wanted := OUTPUTS.get(kind, outputs)) != outputs:
            raise UserError(
                f"{self.files.main} has a head with {outputs} outputs, and {kind} needs {wanted}; {REMEDY}"
            )
        pooling = given.classifier_pooling if self.model.preset == "modern" else "cls"
        dropout = getattr(given, dropout_key(self.model, kind))
        self.head = HeadConfig(kind, outputs, pooling, dropout)
        self.labels = self._labels(given.id2label)
        self.shapes = task_shapes(self.model, self.vocab_size, self.head)

    @property
    def names(self) -> list[str]:
        """Lists the native parameters, in the order of `TaskModel`'s."""
        return list(self.shapes)

    @property
    def max_length(self) -> int:
        """The longest sample, in tokens, that the model was fine-tuned for; else that it takes."""
        longest: int | None = self.facts.get("max_length")
        return min(longest or self.model.max_position_embeddings, self.model.max_position_embeddings)

    def tensor(self, name: str) -> Tensor:
        """Returns the native parameter `name`, float32; raises UserError where it is missing or misshapen."""
        return self.read(name, task_names(name, self.model, self.head.kind), self.model, self.shapes[name])

    def _outputs(self, kind: TaskKind) -> int:
        (bias,) = task_names("head.output.bias", self.model, kind)
        if bias not in self.names_in_file:
            raise UserError(f"{self.files.main} lacks {bias}: it is not a complete {self.wanted}; {REMEDY}")
        return math.prod(self.files.shape(bias))

    def _labels(self, given: dict[str, str] | None) -> list[str]:
        if self.head.kind not in LABELLED:
            return []
        if given is None:
            return [f"LABEL_{number}" for number in range(self.head.outputs)]
        labels = [given.get(str(number)) for number in range(self.head.outputs)]
        names = [label for label in labels if label is not None]
        if len(given) != self.head.outputs or len(set(names)) != self.head.outputs:
            reason = f"id2label names {len(set(given.values()))} labels of {self.head.outputs} outputs"
            raise damaged(self.origin, reason, REMEDY)
        return names


def is_task_model(folder: Path) -> bool:
    """Tells whether the folder's config.json names a class for a task."""
    try:
        config = parse_object((folder / CONFIG_FILE).read_bytes(), folder, REMEDY)
    except (OSError, UserError):
        return False
    architectures = config.get("architectures")
    return isinstance(architectures, list) and str([*architectures, ""][0]).endswith(tuple(SUFFIXES.values()))


def find_task_model(path: Path) -> Path:
    """Returns the folder of the task model at `path`: itself, or `model` in the output of a fine-tuning.

    Raises UserError where there is none.
    """
    for folder in (path, path / MODEL):
        if (folder / CONFIG_FILE).is_file():
            return folder
    if not path.is_dir():
        raise UserError(f"there is no folder {path} with a task model; nothing is downloaded")
    raise UserError(
        f"{path} holds no task model: neither it nor {path / MODEL} has a {CONFIG_FILE}; give the output of "
        "`bertscale finetune`, or a folder that transformers saved"
    )


def open_task_model(folder: Path) -> TaskWeights:
    """Opens the folder of a task model. Raises UserError where it is none or is damaged."""
    if not (folder / CONFIG_FILE).is_file():
        raise UserError(
            f"{folder} is no task model: it has no {CONFIG_FILE}; give the folder `model` that `bertscale "
            "finetune` wrote, or one that transformers saved"
        )
    return TaskWeights(folder)
