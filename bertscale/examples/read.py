"""The labelled files of a run -> training, dev and test examples, with the task that they make.

    data = read_task_data("classification", config.data, config.encoding)

The labels are those of the training examples, or `data.labels`; a dev or test label that is none of them ends
the run. Rows that cannot be used are left out and listed, more than `data.broken_share` of a file end the
run. Without a dev file `data.dev_share` of the training examples become dev: all rows of one group, or with
the same texts, are on one side.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from bertscale.config import UserError
from bertscale.config.examples import EncodingConfig, ExamplesConfig, TaskKind
from bertscale.examples.conll import read_token_examples
from bertscale.examples.rows import Row, column
from bertscale.examples.squad import read_questions
from bertscale.examples.text_rows import check_labels, find_labels, read_text_examples
from bertscale.tasks.choice import ChoiceTask
from bertscale.tasks.questions import QuestionTask
from bertscale.tasks.task import Example, Samples, Task, TaskData, TextExample
from bertscale.tasks.texts import text_task
from bertscale.tasks.tokens import TokenTask

SHOWN = 8  # labels of a set in the lines of the start, the most frequent ones


@dataclass(frozen=True)
class ReadFile:
    """What is in one file: its examples, the rows that were left out, and what there is to say of it."""

    examples: list[Any]
    broken: list[dict[str, Any]]  # {"place", "reason", "row"}
    notes: list[str]


def read_task_data(kind: TaskKind, data: ExamplesConfig, encoding: EncodingConfig) -> TaskData[Any]:
    """Reads all files of a run. Raises UserError, which names file and line, for what ends it."""
    parts = [read_file(kind, file.path, data, training=True) for file in data.training_files]
    train = [example for part in parts for example in part.examples]
    weights = [file.weight for file in data.training_files]
    repeats = np.repeat(np.array(weights, np.float64), [len(part.examples) for part in parts])
    held_out = {
        name: read_file(kind, path, data)
        for name, path in (("dev", data.dev), ("test", data.test))
        if path is not None
    }
    task = make_task(kind, train, data, encoding)
    for part in held_out.values():
        _check_known(task, part.examples, data)
    dev = held_out["dev"].examples if "dev" in held_out else []
    if data.dev_share:
        chosen = draw_dev(train, data)
        dev = [example for example, taken in zip(train, chosen, strict=True) if taken]
        train = [example for example, taken in zip(train, chosen, strict=True) if not taken]
        repeats = repeats[~chosen]
    files = [*parts, *held_out.values()]
    notes = [note for part in files for note in part.notes]
    if isinstance(task, TokenTask):
        notes.append(task.note(train))
    return TaskData(
        task=task,
        train=train,
        repeats=repeats,
        dev=dev,
        test=held_out["test"].examples if "test" in held_out else [],
        broken=[row for part in files for row in part.broken],
        notes=notes,
    )


def read_file(
    kind: TaskKind, path: str, data: ExamplesConfig, *, labelled: bool = True, training: bool = False
) -> ReadFile:
    """Reads the examples of one file; without `labelled` those that are only to be predicted.

    Raises UserError if it has none, or if more than `data.broken_share` of its rows are broken.
    """
    notes: list[str] = []
    examples: Sequence[Any]
    skipped: Counter[str] = Counter()
    if kind == "tokens":
        examples, broken = read_token_examples(path, data, tagged=labelled)
    elif kind == "question_answering":
        examples, broken = read_questions(path, data, notes.append)
    else:
        grouped = training and data.dev_share > 0
        examples, broken, skipped = read_text_examples(path, kind, data, labelled=labelled, grouped=grouped)
    notes += [
        f"{path}: rows with the label {label!r} are left out (data.skip_labels): {count:,}"
        for label, count in skipped.items()
    ]
    rows = len(examples) + len(broken) + skipped.total()
    if broken:
        first = f"{broken[0]['place']}: {broken[0]['reason']}"
        if len(broken) > data.broken_share * rows:
            raise UserError(
                f"{first} ({len(broken):,} of {rows:,} rows of the file are broken, more than "
                f"data.broken_share={data.broken_share:g})"
            )
        notes.append(
            f"{path}: {len(broken):,} of {rows:,} rows are broken and left out, the first one is {first}"
        )
    if not examples:
        raise UserError(f"{path} has no examples{'; data.skip_labels leaves none' if skipped else ''}")
    return ReadFile(list(examples), broken, notes)


def make_task(
    kind: TaskKind, train: Sequence[Any], data: ExamplesConfig, encoding: EncodingConfig
) -> Task[Any]:
    """Makes the task of training examples. Raises UserError for labels that make none."""
    if kind == "multiple_choice":
        return ChoiceTask()
    if kind == "tokens":
        return TokenTask.of(train, data, encoding)
    if kind == "question_answering":
        return QuestionTask.of(train, encoding)
    return text_task(kind, _labels(kind, train, data))


def _labels(kind: TaskKind, train: Sequence[TextExample], data: ExamplesConfig) -> list[str]:
    if kind == "regression":
        return []
    found = find_labels(train)
    labels = data.labels
    if labels is None:
        labels = [str(name) for name in data.label] if isinstance(data.label, list) else found
    else:
        check_labels(train, labels, "data.labels")
    if len(labels) < (2 if kind == "classification" else 1):
        raise UserError(
            f"the training examples have {f'only the label {labels[0]!r}' if labels else 'no label'}; look "
            f"whether data.label={data.label!r} is the column of the labels"
        )
    return labels


def _check_known(task: Task[Any], examples: Iterable[Any], data: ExamplesConfig) -> None:
    """Raises UserError for a label of dev or test examples that the model would never learn."""
    if task.kind in ("classification", "multi_label"):
        source = "those of the training examples" if data.labels is None else "data.labels"
        check_labels(examples, task.labels, source)


# --------------------------------------------------------------------------------------------- dev_share


def draw_dev(train: Sequence[Example], data: ExamplesConfig) -> npt.NDArray[np.bool_]:
    """Returns whether each training example becomes a dev example: about `data.dev_share` of them.

    Examples go together whose column `data.group` has the same value, and those whose texts are the same.
    Raises UserError if they are all one group.
    """
    groups = together(train, data)
    sizes = np.bincount(groups)
    wanted = data.dev_share * len(train)
    chosen = np.zeros(len(sizes), bool)
    order = np.random.default_rng(data.dev_seed).permutation(len(sizes))
    taken = 0
    for group in order.tolist():
        if taken + sizes[group] <= wanted:
            chosen[group] = True
            taken += int(sizes[group])
    if not taken:  # every group is larger than the share
        chosen[order[sizes[order].argmin()]] = True
    if chosen.all():
        by = f"one value of data.group={data.group!r}" if data.group is not None else "the same texts"
        raise UserError(
            f"data.dev_share={data.dev_share:g}: all {len(train):,} training examples have {by}, and cannot "
            "be divided; give a dev file"
        )
    return chosen[groups]


def together(examples: Sequence[Example], data: ExamplesConfig) -> npt.NDArray[np.int64]:
    """Returns the number of the set that each example belongs to: one group, or the same texts, or both."""
    parent = list(range(len(examples)))

    def find(number: int) -> int:
        while parent[number] != number:
            parent[number] = parent[parent[number]]
            number = parent[number]
        return number

    first: dict[Any, int] = {}
    for number, example in enumerate(examples):
        keys: list[Any] = [("texts", plain_content(example))]
        if data.group is not None:
            keys.append(("group", _group_of(example, data)))
        for key in keys:
            other = first.setdefault(key, number)
            parent[find(number)] = find(other)
    roots = [find(number) for number in range(len(examples))]
    numbers: npt.NDArray[np.int64] = np.unique(roots, return_inverse=True)[1]
    return numbers


def plain_content(example: Example) -> tuple[str, ...]:
    """Returns the texts by which examples are compared: those with other white space are the same."""
    return tuple(" ".join(text.split()) for text in example.content)


def _group_of(example: Example, data: ExamplesConfig) -> str:
    assert data.group is not None
    numbered = isinstance(data.group, int) and str(data.group) not in example.row
    value = column(Row(example.place, example.row, numbered), data.group, "data.group")
    return example.place if value is None else str(value)  # of a row without a group: it is one of its own


# ------------------------------------------------------------------------------- what the start says


def describe(data: TaskData[Any], samples: Mapping[str, Samples], max_length: int) -> list[str]:
    """Returns lines of text; `samples` are those of "train", "dev" and "test", as far as they are made."""
    sets: dict[str, list[Any]] = {"train": data.train, "dev": data.dev, "test": data.test}
    lines = list(data.notes)
    for name, examples in sets.items():
        if examples:
            lines.append(f"{name}: {_examples(data.task, examples)}")
            if name in samples:
                lines.append(f"{name}: {_samples(samples[name], len(examples), max_length)}")
    lines += [
        f"warning: no training example has the label {label!r}; the model will not learn it"
        for label, count in data.task.label_counts(data.train).items()
        if not count and data.task.labels
    ]
    train = {plain_content(example) for example in data.train}
    for name in ("dev", "test"):
        alike = sum(plain_content(example) in train for example in sets[name])
        if alike:
            lines.append(
                f"warning: {_count(alike, len(sets[name]))} of the {name} examples have the texts of a "
                "training example: figures on them flatter"
            )
    return lines


def _examples(task: Task[Any], examples: Sequence[Example]) -> str:
    counts = task.label_counts(examples)
    if not counts:
        return f"{len(examples):,} examples"
    frequent = sorted(counts, key=lambda label: -counts[label])[:SHOWN]
    shown = ", ".join(f"{label} {counts[label]:,}" for label in frequent)
    more = f", and {len(counts) - SHOWN:,} more" if len(counts) > SHOWN else ""
    return f"{len(examples):,} examples; {shown}{more}"


def _samples(samples: Samples, examples: int, max_length: int) -> str:
    tokens = len(samples.tokens)
    parts = [f"{tokens / len(samples):.1f} tokens in a sample"]
    if len(samples) != examples:
        parts.insert(0, f"{len(samples):,} samples")
    parts.append(f"{_count(samples.cut, examples)} of the examples are cut at max_length={max_length}")
    parts.append(f"{_count(samples.unknown, tokens)} of the tokens are unknown pieces")
    return ", ".join(parts)


def _count(part: int, whole: int) -> str:
    return f"{part:,} ({part / whole:.1%})" if part else "none"
