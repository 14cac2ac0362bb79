"""Fine-tunes a model on every task of a GLUE- or CLUE-like folder, and shows one table of its dev figures.

    bertscale glue runs/base data/glue --seeds 0 1 2

Each task is a `bertscale finetune` of its own, in OUTPUT/TASK (of several checkpoints OUTPUT/step-N/TASK),
with its config beside it in OUTPUT/TASK.yaml. What is finished is used again, so that the same command goes
on where it was.

OUTPUT/glue.md  glue.json     the table; written last
OUTPUT/tensorboard/           the scores over the steps of pretraining, and the table
"""

from __future__ import annotations

import contextlib
import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from bertscale.config import FinetuneConfig, GlueConfig, UserError, load_config
from bertscale.config.glue import shares, start_of
from bertscale.config.glue_tasks import (
    DEV_SHARE,
    MAX_LENGTH,
    RECIPES,
    TASKS,
    Found,
    FoundTask,
    Recipe,
    find_tasks,
    recipe_for,
    settings_for,
    task_values,
)
from bertscale.config.table import read_object
from bertscale.convert.encoders import open_encoder
from bertscale.errors import FAULT, INTERRUPTED, STOPPED_AND_SAVED
from bertscale.files import write_bytes, write_json
from bertscale.finetune.glue_table import REFERENCES, Scores, figures_of, markdown
from bertscale.finetune.output import make_folder
from bertscale.run_folder import RESULT, TENSORBOARD, checkpoint_step, checkpoints, newest_step
from bertscale.train.metrics import write_overview

TABLE_TEXT, TABLE_JSON = "glue.md", "glue.json"
FAILED = "failed.json"  # TASK.failed.json: why a fine-tuning has no result

# All of it, or a share: the tasks that others start from; task `index` of `count` of the rest; the table.
Part = Literal["all", "intermediate", "finish"] | tuple[int, int]
Run = Callable[[list[str]], int]  # runs `bertscale WORDS` and returns its exit code


@dataclass(frozen=True)
class Start:
    """A model to fine-tune: of a run with several checkpoints, one of these."""

    model: Path
    step: int | None
    folder: Path  # for its tasks

    @property
    def name(self) -> str:
        return str(self.model) if self.step is None else f"step {self.step:,}"


def glue(config: GlueConfig, run: Run, part: Part = "all") -> int:
    """Runs the tasks of `part`, one after another, and makes the table where it has the last of them.

    Returns 0; FAULT if a task of the table failed; the code of a fine-tuning that was stopped. Raises
    UserError for a model, a folder or settings that no task can start with.
    """
    found = find_tasks(Path(config.folder), config.tasks)
    starts = models_to_run(config)
    recipe, positions = recipe_of(config, starts)
    make_folder(Path(config.target))
    for line in introduction(config, found, starts, recipe):
        print(line, flush=True)
    todo = [(start, task) for start in starts for task in tasks_of(part, config, found)]
    for number, (start, task) in enumerate(todo, 1):
        words = write_task(config, found, start, task, recipe, positions)
        print(f"\n=== {number} of {len(todo)}: {task.name}, {start.name}", flush=True)
        code = run_task(config, found, start, task, words, run)
        if code:
            return code
    return finish(config, found, starts, recipe) if part in ("all", "finish") else 0


def tasks_of(part: Part, config: GlueConfig, found: Found) -> list[FoundTask]:
    """The tasks of a part of the work, in the order in which they run."""
    first, rest = shares(config, found)
    if part == "all":
        return [*first, *rest]
    if isinstance(part, tuple):
        return rest[part[0] :: part[1]]
    return first if part == "intermediate" else []


# --------------------------------------------------------------------------------------------- what to run


def models_to_run(config: GlueConfig) -> list[Start]:
    """The model, or the checkpoints of a run that were asked for. Raises UserError where it has none."""
    model, output = Path(config.model), Path(config.target)
    if config.checkpoints == "last":
        return [Start(model, None, output)]
    there = checkpoints(model)
    if not there:
        raise UserError(
            f"--checkpoints {config.checkpoints} is for the folder of a run, and {model} has no checkpoints; "
            "leave it out for a single model"
        )
    if isinstance(config.checkpoints, int) and config.checkpoints < len(there):
        count = config.checkpoints  # evenly spread, the last one always
        there = [there[(number + 1) * len(there) // count - 1] for number in range(count)]
    return [Start(path, checkpoint_step(path), output / path.name) for path in there]


def recipe_of(config: GlueConfig, starts: Sequence[Start]) -> tuple[Recipe, int]:
    """The recipe, and the tokens that the model takes at most. Raises UserError where it is no encoder."""
    model = open_encoder(starts[-1].model).model
    return config.recipe or recipe_for(model.preset, model.hidden_size), model.max_position_embeddings


def introduction(config: GlueConfig, found: Found, starts: Sequence[Start], recipe: Recipe) -> list[str]:
    """Says what will be run, what will not, and by which recipe."""
    names = ", ".join(task.name for task in found.tasks)
    lines = [f"tasks     {len(found.tasks)} in {config.folder}: {names}"]
    lines += [f"skipped   {line}" for line in found.skipped]
    lines += [
        f"dev       {task.name}: no dev file beside {task.train}; dev is a share of {DEV_SHARE:g} of it"
        for task in found.tasks
        if task.dev is None
    ]
    for task in found.tasks:
        if start := start_of(config, found, task):
            lines.append(f"start     {task.name}: the model of {start} (--no-intermediate: the encoder)")
    several = f", {len(starts)} checkpoints" if len(starts) > 1 else ""
    lines.append(f"model     {config.model}{several}; seeds {', '.join(map(str, config.seeds))}")
    lines.append(f"recipe    {recipe}: {RECIPES[recipe].source}")
    return lines


def write_task(
    config: GlueConfig, found: Found, start: Start, task: FoundTask, recipe: Recipe, positions: int
) -> list[str]:
    """Writes the config of a task; returns the words after `bertscale` that run it, which are checked."""
    before = start_of(config, found, task)
    values = task_values(
        task,
        recipe,
        output=str(start.folder / task.name),
        encoder=str(start.model),
        init=str(start.folder / before) if before else None,
        seeds=config.seeds,
        max_length=min(MAX_LENGTH, positions),
    )
    make_folder(start.folder)
    path = start.folder / f"{task.name}.yaml"
    write_bytes(path, yaml.safe_dump(values, sort_keys=False, allow_unicode=True).encode())
    settings = settings_for(task.name, config.set)
    load_config(FinetuneConfig, path, settings)
    return ["finetune", str(path), *settings]


# ------------------------------------------------------------------------------------------------- running


def run_task(
    config: GlueConfig, found: Found, start: Start, task: FoundTask, words: list[str], run: Run
) -> int:
    """Runs a task; returns 0, also where it failed, which is noted, or the code of one that was stopped."""
    note = start.folder / f"{task.name}.{FAILED}"
    before = start_of(config, found, task)
    if before and (start.folder / f"{before}.{FAILED}").exists():
        reason = f"{before}, whose model it starts from, failed"
        print(f"not run: {reason}", flush=True)
        write_json(note, {"reason": reason})
        return 0
    print(f"$ {shlex.join(['bertscale', *words])}", flush=True)
    code = run(words)
    if code in (STOPPED_AND_SAVED, INTERRUPTED):
        return code
    if code:
        reason = f"exit code {code} of `{shlex.join(['bertscale', *words])}`"
        print(f"{task.name} failed: {reason}", flush=True)
        write_json(note, {"reason": reason})
    else:
        note.unlink(missing_ok=True)
    return 0


# ----------------------------------------------------------------------------------------------- the table


def finish(config: GlueConfig, found: Found, starts: Sequence[Start], recipe: Recipe) -> int:
    """Shows the table and writes it; returns FAULT if a task failed."""
    rows = [scores_of(start, found) for start in starts]
    notes = [
        f"{config.model}, recipe {recipe}, mean ± standard deviation of {len(config.seeds)} seeds"
        if len(config.seeds) > 1
        else f"{config.model}, recipe {recipe}, seed {config.seeds[0]}"
    ]
    notes += [
        f"{TASKS[task.name].title}: dev is a share of {DEV_SHARE:g} of the training file, which no other "
        "figure of this column was measured on"
        for task in found.tasks
        if task.dev is None
    ]
    for task in found.tasks:
        if start := start_of(config, found, task):
            notes.append(f"{task.task.title} starts from the model of {TASKS[start].title}")
    text = markdown(rows, [task.name for task in found.tasks], notes)
    output = Path(config.target)
    write_bytes(output / TABLE_TEXT, text.encode())
    scalars = {step_of(start): scalars_of(row) for start, row in zip(starts, rows, strict=True)}
    write_overview(output / TENSORBOARD, "glue", scalars, {"glue": text})
    write_json(
        output / TABLE_JSON,
        {
            "model": config.model,
            "folder": config.folder,
            "recipe": recipe,
            "seeds": config.seeds,
            "intermediate": config.intermediate,
            "rows": [row.as_json() for row in rows],
            "references": [vars(reference) for reference in REFERENCES],
        },
    )
    print(f"\n{text}\nthis table: {output / TABLE_TEXT}; curves: tensorboard --logdir {output}/{TENSORBOARD}")
    return FAULT if any(row.failed for row in rows) else 0


def step_of(start: Start) -> int:
    """The step of pretraining that a model was taken from, 0 where nobody knows."""
    if start.step is not None:
        return start.step
    return checkpoint_step(start.model) or newest_step(start.model)


def scores_of(start: Start, found: Found) -> Scores:
    """Reads what the fine-tunings of a model have found."""
    scores = Scores(start.name, start.step)
    for task in found.tasks:
        with contextlib.suppress(FileNotFoundError):
            note = json.loads((start.folder / f"{task.name}.{FAILED}").read_text(encoding="utf-8"))
            scores.failed[task.name] = str(note["reason"])
            continue
        try:
            scores.tasks[task.name] = figures_of(
                task.task, read_object(start.folder / task.name / RESULT, "")
            )
        except (OSError, UserError, KeyError, TypeError):
            scores.failed[task.name] = f"{start.folder / task.name} holds no finished fine-tuning"
    return scores


def scalars_of(row: Scores) -> dict[str, float]:
    """The scores as TensorBoard shows them."""
    found: dict[str, Any] = {f"glue/{name}": row.score(name) for name in row.tasks}
    return found | {f"glue/{suite}_average": value for suite, value in row.averages().items()}
