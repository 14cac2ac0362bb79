"""The tasks of GLUE and CLUE in their official files, and the recipes by which models are fine-tuned on them.

    found = find_tasks(Path("data/glue"))
    values = task_values(found.tasks[0], "bert", encoder="runs/base", output="runs/base-glue/cola")

`bertscale glue` runs each as a fine-tuning of its own; configs/finetune/glue and clue hold the same for one
task. The figures of a model are those of the dev files: labels of the test files are not published.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from bertscale.config.examples import TaskKind
from bertscale.errors import UserError

Recipe = Literal["bert", "modernbert-base", "modernbert-large"]
MAX_LENGTH = 128  # tokens: what the published figures were made with
DEV_SHARE = 0.1  # of the training examples, where there is no dev file
INTERMEDIATE = "mnli"

# --------------------------------------------------------------------------------------------- the tasks


@dataclass(frozen=True)
class Layout:
    """Names that the files of a task have, the preferred first, and what is in them."""

    train: tuple[str, ...]
    dev: tuple[str, ...]
    data: dict[str, Any]  # keys of the section `data`
    second_dev: str | None = None  # read once, as `data.test`


@dataclass(frozen=True)
class GlueTask:
    """A task: its figures of dev, of which the mean is its score, and the forms in which it is published."""

    name: str
    title: str
    suite: Literal["GLUE", "CLUE"]
    layouts: tuple[Layout, ...]
    figures: tuple[str, ...] = ("accuracy",)
    kind: TaskKind = "classification"
    metric: str | None = None  # that chooses the checkpoint, where it is not the kind's
    averaged: bool = True  # whether its score counts for the average
    starts_from: str | None = None

    @property
    def official(self) -> str:
        """The folder's name as it is published."""
        return self.title if self.suite == "GLUE" else f"{self.name}_public"


def _tsv(*, second_dev: str | None = None, train: tuple[str, ...] = ("train.tsv",), **data: Any) -> Layout:
    return Layout(train, ("dev.tsv", "val.tsv", "valid.tsv"), {"quoting": False, **data}, second_dev)


def _json(*, train: tuple[str, ...] = ("train.json",), **data: Any) -> Layout:
    return Layout(train, ("dev.json",), {"format": "jsonl", **data})


_PAIR: dict[str, Any] = {"text": "sentence1", "text_pair": "sentence2"}
# 0 to 5; the csv files are those of https://github.com/PhilipMay/stsb-multi-mt.
_STSB = (
    Layout(("train.tsv",), ("dev.tsv",), {"quoting": False, **_PAIR, "label": "score"}),
    Layout(
        ("stsb-en-train.csv",),
        ("stsb-en-dev.csv",),
        {"header": False, "text": 0, "text_pair": 1, "label": 2},
    ),
)
_LIST = (
    GlueTask(
        "mnli",
        "MNLI",
        "GLUE",
        (
            Layout(
                ("train.tsv",),
                ("dev_matched.tsv",),
                {"quoting": False, **_PAIR, "label": "gold_label", "skip_labels": ["-"]},
                "dev_mismatched.tsv",
            ),
        ),
    ),
    GlueTask(
        "cola",
        "CoLA",
        "GLUE",
        (_tsv(header=False, text=3, label=1),),
        figures=("matthews",),
        metric="matthews",
    ),
    GlueTask("sst2", "SST-2", "GLUE", (_tsv(text="sentence"),)),
    GlueTask(
        "mrpc",
        "MRPC",
        "GLUE",
        (
            _tsv(
                train=("train.tsv", "msr_paraphrase_train.txt"),
                text="#1 String",
                text_pair="#2 String",
                label="Quality",
            ),
        ),
        figures=("f1", "accuracy"),
        starts_from=INTERMEDIATE,
    ),
    GlueTask(
        "stsb",
        "STS-B",
        "GLUE",
        _STSB,
        figures=("pearson", "spearman"),
        kind="regression",
        starts_from=INTERMEDIATE,
    ),
    GlueTask(
        "qqp",
        "QQP",
        "GLUE",
        (_tsv(text="question1", text_pair="question2", label="is_duplicate"),),
        figures=("f1", "accuracy"),
    ),
    GlueTask("qnli", "QNLI", "GLUE", (_tsv(text="question", text_pair="sentence"),)),
    GlueTask("rte", "RTE", "GLUE", (_tsv(**_PAIR),), starts_from=INTERMEDIATE),
    # Its dev examples contradict those of train: published averages leave it out.
    GlueTask("wnli", "WNLI", "GLUE", (_tsv(**_PAIR),), averaged=False),
    GlueTask("afqmc", "AFQMC", "CLUE", (_json(**_PAIR),)),
    GlueTask("tnews", "TNEWS", "CLUE", (_json(text="sentence"),)),
    GlueTask("iflytek", "IFLYTEK", "CLUE", (_json(text="sentence"),)),
    GlueTask("cmnli", "CMNLI", "CLUE", (_json(**_PAIR, skip_labels=["-"]),)),
    GlueTask(
        "ocnli",
        "OCNLI",
        "CLUE",
        (
            _json(
                train=("train.50k.json", "train.json", "train.10k.json", "train.3k.json"),
                **_PAIR,
                skip_labels=["-"],
            ),
        ),
    ),
)
TASKS = {task.name: task for task in _LIST}  # in the order in which they run: others start from the first


def plain(name: str) -> str:
    """The name of a task in any spelling: SST-2, sst2, tnews_public, CLUEtnews."""
    letters = "".join(letter for letter in name.lower() if letter.isalnum())
    return letters.removeprefix("clue").removesuffix("public")


# -------------------------------------------------------------------------------------- what is there


@dataclass(frozen=True)
class FoundTask:
    """A task whose files lie in a folder."""

    task: GlueTask
    train: Path
    dev: Path | None
    second_dev: Path | None
    data: dict[str, Any]

    @property
    def name(self) -> str:
        return self.task.name


@dataclass(frozen=True)
class Found:
    """The tasks in a folder, in the order in which they run, and why others are not among them."""

    tasks: list[FoundTask]
    skipped: list[str] = field(default_factory=list)


def find_tasks(folder: Path, wanted: Sequence[str] | None = None) -> Found:
    """Finds the tasks in the folders of `folder`, or those of them that are `wanted`.

    Raises UserError where a wanted one is not there, or none at all.
    """
    try:
        inner = sorted(path for path in folder.iterdir() if path.is_dir())
    except OSError as error:
        raise UserError(f"cannot read the folder {folder}: {error.strerror}") from error
    there: dict[str, FoundTask] = {}
    skipped: list[str] = []
    unknown = [path.name for path in inner if plain(path.name) not in TASKS]
    for path in inner:
        task = TASKS.get(plain(path.name))
        if task is None or task.name in there or (wanted is not None and task.name not in wanted):
            continue
        found = _found(task, path)
        if found is None:
            names = " or ".join(name for layout in task.layouts for name in layout.train)
            skipped.append(f"{task.name}: there is no {names} in {path}")
        else:
            there[task.name] = found
    if missing := [name for name in wanted or [] if name not in there]:
        why = [line for line in skipped if line.partition(":")[0] in missing]
        official = TASKS[missing[0]].official
        raise UserError(why[0] if why else f"{missing[0]}: there is no folder {official} in {folder}")
    if not there:
        why = [*skipped, f"its folders are {', '.join(unknown[:10])}" if unknown else "it holds no folders"]
        names = ", ".join(task.official for task in TASKS.values())
        raise UserError(f"{folder} holds no task ({'; '.join(why)}); their folders are named {names}")
    if unknown and wanted is None:
        skipped.append(f"no tasks of GLUE or CLUE: {', '.join(unknown)}")
    return Found([there[name] for name in TASKS if name in there], skipped)


def _found(task: GlueTask, folder: Path) -> FoundTask | None:
    for layout in task.layouts:
        train = _first(folder, layout.train)
        if train is not None:
            second = _first(folder, (layout.second_dev,)) if layout.second_dev else None
            return FoundTask(task, train, _first(folder, layout.dev), second, layout.data)
    return None


def _first(folder: Path, names: Sequence[str]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)


# ------------------------------------------------------------------------------------------- the recipes


# Of a task: learning rate, weight decay, epochs.
_Rates = tuple[float, float, float]


@dataclass(frozen=True)
class RecipeTable:
    """Published settings of fine-tunings; a task that they do not name takes `other`."""

    source: str
    other: _Rates
    tasks: dict[str, _Rates]


BATCH = 32  # as BERT's; that of ModernBERT's table is not published with it
RECIPES: dict[Recipe, RecipeTable] = {
    "bert": RecipeTable(
        "examples/pytorch/text-classification/README.md of transformers (2e-5, 3 epochs, MRPC and WNLI 5), "
        "weight decay and warm-up of google-research/bert",
        (2e-5, 0.01, 3),
        {"mrpc": (2e-5, 0.01, 5), "wnli": (2e-5, 0.01, 5)},
    ),
    "modernbert-base": RecipeTable(
        "table 6 of the ModernBERT paper, arXiv 2412.13663; what it does not name as RTE",
        (5e-5, 1e-5, 3),
        {
            "cola": (8e-5, 1e-6, 5),
            "mnli": (5e-5, 5e-6, 1),
            "mrpc": (5e-5, 5e-6, 10),
            "qnli": (8e-5, 5e-6, 2),
            "qqp": (5e-5, 5e-6, 10),
            "rte": (5e-5, 1e-5, 3),
            "sst2": (8e-5, 1e-5, 2),
            "stsb": (8e-5, 5e-6, 10),
        },
    ),
    "modernbert-large": RecipeTable(
        "table 6 of the ModernBERT paper, arXiv 2412.13663; what it does not name as RTE",
        (5e-5, 8e-6, 3),
        {
            "cola": (3e-5, 8e-6, 5),
            "mnli": (3e-5, 1e-5, 1),
            "mrpc": (8e-5, 5e-6, 2),
            "qnli": (3e-5, 5e-6, 2),
            "qqp": (5e-5, 8e-6, 2),
            "rte": (5e-5, 8e-6, 3),
            "sst2": (1e-5, 1e-6, 3),
            "stsb": (8e-5, 1e-5, 10),
        },
    ),
}


def recipe_for(preset: str, hidden_size: int) -> Recipe:
    """The recipe that fits an encoder of this preset and width."""
    if preset != "modern":
        return "bert"
    return "modernbert-large" if hidden_size >= 1024 else "modernbert-base"


def task_values(
    found: FoundTask,
    recipe: Recipe,
    *,
    output: str,
    encoder: str | None = None,
    init: str | None = None,
    seeds: Sequence[int] = (0,),
    max_length: int = MAX_LENGTH,
) -> dict[str, Any]:
    """Returns the values of a FinetuneConfig for a task, from `encoder` or from the task model `init`."""
    task, table = found.task, RECIPES[recipe]
    rate, decay, epochs = table.tasks.get(task.name, table.other)
    held_out: dict[str, Any] = {"dev_share": DEV_SHARE} if found.dev is None else {"dev": str(found.dev)}
    if found.second_dev is not None:
        held_out["test"] = str(found.second_dev)
    return {
        "task": task.kind,
        **({"encoder": encoder} if init is None else {"init": init}),
        "output": output,
        "data": {"train": str(found.train), **held_out, **found.data},
        "samples": {"max_length": max_length},
        "optimizer": {"learning_rate": rate, "weight_decay": decay},
        "train": {
            "epochs": epochs,
            "global_batch": BATCH,
            "seeds": list(seeds),
            **({"metric": task.metric} if task.metric else {}),
        },
    }


def settings_for(name: str, settings: Sequence[str]) -> list[str]:
    """The settings of `GlueConfig.set` that are for a task, without its name."""
    chosen = []
    for setting in settings:
        task, _, rest = setting.partition(".")
        if plain(task) not in TASKS or "=" in task:
            chosen.append(setting)
        elif plain(task) == name:
            chosen.append(rest)
    return chosen
