"""What `bertscale glue` is asked for, on its command line, in a pipeline or as a Slurm job."""

from __future__ import annotations

import argparse
import difflib
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from bertscale.config.glue_tasks import RECIPES, TASKS, Found, FoundTask, Recipe, plain
from bertscale.config.section import Section, check_config
from bertscale.errors import UserError


class GlueConfig(Section):
    """What `bertscale glue` is asked for."""

    model: str = Field(description="Run folder, checkpoint or Hugging Face folder to fine-tune.")
    folder: str = Field(description="Folder that holds a folder for each task, by its official name.")
    output: str | None = Field(None, description="Folder for the table and the tasks; by default MODEL-glue.")
    tasks: list[str] | None = Field(
        None, min_length=1, description="Tasks to run; by default all that are found."
    )
    seeds: list[int] = Field([0], min_length=1, description="Seeds, one run of each task for each.")
    recipe: Recipe | None = Field(
        None, description="Learning rates, weight decays and epochs; by default those that fit the model."
    )
    intermediate: bool = Field(
        True, description="Whether RTE, MRPC and STS-B start from the model of MNLI, where it is a task."
    )
    checkpoints: int | Literal["all", "last"] = Field(
        "last",
        description="Checkpoints of a run to fine-tune: the last, all, or a number of them, evenly spread.",
    )
    set: list[str] = Field(
        [], description="Settings of the fine-tunings, each as key=value; TASK.key=value for one task."
    )

    @property
    def target(self) -> str:
        """The folder for the output."""
        return self.output or f"{self.model.rstrip('/')}-glue"

    @model_validator(mode="after")
    def _check(self) -> GlueConfig:
        if isinstance(self.checkpoints, int) and self.checkpoints < 1:
            raise ValueError(f"checkpoints={self.checkpoints} is not a number of at least 1")
        return self

    @field_validator("tasks")
    @classmethod
    def _check_tasks(cls, tasks: list[str] | None) -> list[str] | None:
        for name in tasks or []:
            if plain(name) not in TASKS:
                near = difflib.get_close_matches(plain(name), TASKS, n=1, cutoff=0.4)
                hint = f"did you mean {near[0]}?" if near else f"the tasks are {', '.join(TASKS)}"
                raise ValueError(f"there is no task {name!r}; {hint}")
        return None if tasks is None else [plain(name) for name in tasks]

    @field_validator("set")
    @classmethod
    def _check_set(cls, settings: list[str]) -> list[str]:
        for setting in settings:
            if "=" not in setting.lstrip("="):
                raise ValueError(f"{setting!r} is not of the form key=value, such as train.epochs=1")
        return settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what `bertscale glue` and `bertscale submit glue` take, for `from_options`."""
    help_of = {name: each.description or "" for name, each in GlueConfig.model_fields.items()}
    parser.add_argument("model", metavar="MODEL", help=help_of["model"])
    parser.add_argument("folder", metavar="FOLDER", help=help_of["folder"])
    parser.add_argument("set", metavar="key=value", nargs="*", help=help_of["set"])
    parser.add_argument("--output", metavar="RUN", help=help_of["output"])
    # Of any number of words: a setting may stand behind them.
    parser.add_argument("--seeds", metavar="N", nargs="+", default=["0"], help=help_of["seeds"])
    parser.add_argument("--tasks", metavar="NAME", nargs="+", help=help_of["tasks"])
    parser.add_argument("--recipe", choices=list(RECIPES), help=help_of["recipe"])
    text = "Start RTE, MRPC and STS-B from the encoder, and not from the model of MNLI."
    parser.add_argument("--no-intermediate", dest="intermediate", action="store_false", help=text)
    text = "Checkpoints of a run to fine-tune: the last, all, or a number of them, evenly spread (last)."
    parser.add_argument("--checkpoints", metavar="all|last|N", type=_checkpoints, default="last", help=text)


def from_options(options: argparse.Namespace) -> GlueConfig:
    """Makes the config of the options of `add_arguments`. Raises UserError for what they cannot be."""
    settings = list(options.set)
    values: dict[str, Any] = {name: getattr(options, name) for name in GlueConfig.model_fields}
    for name in ("seeds", "tasks"):
        words = values[name]
        if words is not None:
            settings += [word for word in words if "=" in word]
            values[name] = [word for word in words if "=" not in word]
    values["set"] = settings
    values["seeds"] = [_number("--seeds", word) for word in values["seeds"]]
    return check_config(GlueConfig, values, "bertscale glue")


def _checkpoints(word: str) -> int | str:
    if word not in ("all", "last") and not word.isdecimal():
        raise argparse.ArgumentTypeError(f"{word!r} is not a number, all or last")
    return int(word) if word.isdecimal() else word


def _number(option: str, word: str) -> int:
    if not word.isdecimal():
        raise UserError(f"{option} {word}: {word!r} is not a number")
    return int(word)


def words_of(config: GlueConfig) -> list[str]:
    """The words behind `bertscale glue` that ask for just this."""
    words = [config.model, config.folder, *config.set, "--output", config.target]
    if config.tasks is not None:
        words += ["--tasks", *config.tasks]
    words += ["--seeds", *map(str, config.seeds), "--checkpoints", str(config.checkpoints)]
    if config.recipe is not None:
        words += ["--recipe", config.recipe]
    return words if config.intermediate else [*words, "--no-intermediate"]


# ------------------------------------------------------------------------------ what starts from what


def shares(config: GlueConfig, found: Found) -> tuple[list[FoundTask], list[FoundTask]]:
    """The tasks that others start from, and the others."""
    needed = {start for task in found.tasks if (start := start_of(config, found, task))}
    first = [task for task in found.tasks if task.name in needed]
    return first, [task for task in found.tasks if task.name not in needed]


def start_of(config: GlueConfig, found: Found, task: FoundTask) -> str | None:
    """Names the task whose model a task starts from, where that is among them."""
    there = any(other.name == task.task.starts_from for other in found.tasks)
    return task.task.starts_from if config.intermediate and there else None
