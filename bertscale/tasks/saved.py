"""What the config.json of a task model knows beside its labels: the task, its samples, its files' columns.

    task = task_of("tokens", ["O", "B-PER", "I-PER"], {"scheme": "bio"}, path)

`facts` is the dictionary that `Task.facts` and the end of a fine-tuning have written there; a model that
transformers saved has none, and gets the defaults.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from bertscale.config.examples import NOT_OF_INPUTS, EncodingConfig, ExamplesConfig, TaskKind
from bertscale.config.section import check_config
from bertscale.config.table import Count, Size, Table, check_table
from bertscale.tasks.choice import ChoiceTask
from bertscale.tasks.questions import QuestionTask
from bertscale.tasks.tags import Scheme
from bertscale.tasks.task import Task
from bertscale.tasks.texts import text_task
from bertscale.tasks.tokens import TokenTask

REMEDY = "take another copy of the model, or fine-tune it again"


class _Facts(Table):
    scheme: Scheme | None = None
    unanswerable: bool = False
    answer_length: Size = 30
    answers: Size = 20
    threshold: Annotated[float, Field(allow_inf_nan=False)] = 0.0
    chinese: bool | None = None
    long_texts: Literal["cut", "windows"] | None = None
    overlap: Count | None = None
    data: dict[str, Any] = Field(default_factory=dict)


class _Config(Table):
    bertscale: _Facts


def _check(facts: dict[str, Any], origin: Path) -> _Facts:
    return check_table(_Config, {"bertscale": facts}, origin, REMEDY).bertscale


def task_of(kind: TaskKind, labels: list[str], facts: dict[str, Any], origin: Path) -> Task[Any]:
    """Makes the task again of a model with these labels. Raises UserError, in one line that names the file
    `origin`, where the facts in it are damaged."""
    known = _check(facts, origin)
    match kind:
        case "tokens":
            return TokenTask(labels, known.scheme)
        case "question_answering":
            return QuestionTask(
                known.unanswerable,
                answer_length=known.answer_length,
                answers=known.answers,
                threshold=known.threshold,
                chinese=known.chinese,
            )
        case "multiple_choice":
            return ChoiceTask()
    return text_task(kind, labels)


def encoding_of(facts: dict[str, Any], max_length: int, origin: Path) -> EncodingConfig:
    """Returns how the samples of the model were made. Raises UserError as `task_of`."""
    known = _check(facts, origin)
    values = {"max_length": max_length, "long_texts": known.long_texts, "overlap": known.overlap}
    given = {key: value for key, value in values.items() if value is not None}
    return check_config(EncodingConfig, given, str(origin))


def columns_of(facts: dict[str, Any], origin: Path) -> dict[str, Any]:
    """Returns the keys of `data` that the model's files had otherwise than by default. Raises UserError."""
    return _check(facts, origin).data


def columns_to_keep(data: ExamplesConfig) -> dict[str, Any]:
    """Returns what `columns_of` gives back: the form of the files, as JSON values."""
    return data.model_dump(mode="json", exclude_defaults=True, exclude={*NOT_OF_INPUTS, "salvage"})
