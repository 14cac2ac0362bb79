"""Rows of labelled files -> examples of a text or a pair, or of a text and its options; and their labels.

    examples, broken, skipped = read_text_examples("train.tsv", "classification", data)

A label is a text or a whole number, and becomes a text without white space at its ends; what `data.label` has
for a kind:

| kind            | one column                                                 | a list of columns         |
| --------------- | ---------------------------------------------------------- | ------------------------- |
| classification  | the label, or what stands before data.label_separator      |                           |
| multi_label     | a list (jsonl, json, parquet), or a text that is cut at    | 0 or 1 in each; the label |
|                 | data.label_separator; nothing in it: no label              | is named by its column,   |
|                 |                                                            | or by data.labels         |
| regression      | a finite number                                            |                           |
| multiple_choice | see `chosen`                                               |                           |
"""

from __future__ import annotations

import json
import math
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from bertscale.config import UserError
from bertscale.config.examples import Column, ExamplesConfig, TaskKind
from bertscale.examples.rows import BadRowError, BrokenRow, Row, column, read_rows, wanted_columns
from bertscale.tasks.task import ChoiceExample, TextExample

YES, NO = ("1", "1.0", "true"), ("0", "0.0", "false")  # in a column of its own for each label
SHOWN = 20  # labels in a message

_whole_number = re.compile(r"-?\d+", re.ASCII)


def read_text_examples(
    path: str | Path, kind: TaskKind, data: ExamplesConfig, *, labelled: bool = True, grouped: bool = False
) -> tuple[list[TextExample | ChoiceExample], list[dict[str, Any]], Counter[str]]:
    """Returns the examples of one file, its broken rows, and how many rows were skipped for which label.

    Without `labelled` there need be no column of labels, and targets are not known; `grouped` wants that of
    `data.group`. Raises UserError for a file that cannot be read at all.
    """
    check_columns(kind, data)
    wanted = wanted_columns(data, labelled)
    if grouped and data.group is not None:
        wanted.append(("data.group", data.group))
    examples: list[TextExample | ChoiceExample] = []
    broken: list[dict[str, Any]] = []
    skipped: Counter[str] = Counter()
    for row in read_rows(path, data, wanted):
        if isinstance(row, BrokenRow):
            broken.append(row.as_json())
            continue
        try:
            label = skipped_label(row, data) if labelled and data.skip_labels else None
            if label is None:
                examples.append(text_example(row, kind, data, labelled))
            else:
                skipped[label] += 1
        except BadRowError as error:
            broken.append(error.as_broken().as_json())
    return examples, broken, skipped


def check_columns(kind: TaskKind, data: ExamplesConfig) -> None:
    """Raises UserError for keys of the config that do not fit the kind of task."""
    if isinstance(data.label, list) and kind != "multi_label":
        raise UserError(f"data.label={data.label}: several columns are for multi_label; give {kind} one")
    if isinstance(data.label, list) and data.labels and len(data.labels) != len(data.label):
        raise UserError(
            f"data.labels has {len(data.labels)} names for the {len(data.label)} columns of data.label"
        )
    if kind == "multiple_choice" and data.options is None:
        raise UserError(
            "data.options is missing: give the columns of the options, or the one with their list"
        )
    if data.options is not None and kind != "multiple_choice":
        raise UserError(f"data.options={data.options} is for multiple_choice, not for {kind}")
    if data.text_pair is not None and kind == "multiple_choice":
        raise UserError("data.text_pair is not for multiple_choice, whose second texts are data.options")


def find_labels(examples: Iterable[TextExample]) -> list[str]:
    """Returns the labels that the examples have: whole numbers in their order, then texts, sorted."""
    found: set[str] = set()
    for example in examples:
        if isinstance(example.target, str):
            found.add(example.target)
        elif isinstance(example.target, tuple):
            found.update(example.target)

    def place(label: str) -> tuple[bool, int, str]:
        whole = _whole_number.fullmatch(label) is not None
        return not whole, int(label) if whole else 0, label

    return sorted(found, key=place)


def check_labels(examples: Iterable[TextExample], labels: Sequence[str], source: str) -> None:
    """Raises UserError, with its place, for a label that is none of `labels`, which come from `source`."""
    known = set(labels)
    for example in examples:
        given = example.target if isinstance(example.target, tuple) else (example.target,)
        for label in given:
            if label not in known:
                near = get_close_matches(str(label), labels, 1, 0.6)
                more = f" and {len(labels) - SHOWN} more" if len(labels) > SHOWN else ""
                raise UserError(
                    f"{example.place}: the label {label!r} is none of {source}, "
                    f"{', '.join(map(repr, labels[:SHOWN]))}{more}"
                    f"{f'; did you mean {near[0]!r}?' if near else ''}; mend it, or leave such rows out with "
                    f"data.skip_labels=[{json.dumps(label, ensure_ascii=False)}]"
                )


# --------------------------------------------------------------------------------------------- one row


def text_example(
    row: Row, kind: TaskKind, data: ExamplesConfig, labelled: bool
) -> TextExample | ChoiceExample:
    """Makes the example of a row, without `labelled` one whose target is not known. Raises BadRowError."""
    text = _text(row, column(row, data.text, "data.text"), "data.text")
    if kind == "multiple_choice":
        options = _options(row, data)
        choice = chosen(row, options, data) if labelled else None
        return ChoiceExample(place=row.place, row=row.values, text=text, options=options, target=choice)
    texts: tuple[str, ...] = (text,)
    if data.text_pair is not None:
        texts = (text, _text(row, column(row, data.text_pair, "data.text_pair"), "data.text_pair"))
    target = _target(row, kind, data) if labelled else None
    return TextExample(place=row.place, row=row.values, texts=texts, target=target)


def _text(row: Row, value: Any, key: str) -> str:
    if value is None:
        raise BadRowError(row, f"the text ({key}) is null")
    if not isinstance(value, str):
        raise BadRowError(row, f"the text ({key}) is no text but {value!r}")
    if is_blank(value):
        raise BadRowError(row, f"the text ({key}) is blank")
    return value


def is_blank(text: str) -> bool:
    """Whether there are spaces, controls and marks alone, of which a tokenizer that cleans leaves nothing."""
    return all(character == "\ufffd" or unicodedata.category(character)[0] in "ZCM" for character in text)


def _target(row: Row, kind: TaskKind, data: ExamplesConfig) -> str | tuple[str, ...] | float:
    if isinstance(data.label, list):
        names = data.labels or [str(name) for name in data.label]
        return tuple(name for name, one in zip(names, data.label, strict=True) if _is_set(row, one))
    value = column(row, data.label, "data.label")
    if kind == "regression":
        return _number(row, value)
    if kind == "multi_label":
        return _several(row, value, data.label_separator)
    label = _label(row, value)
    if data.label_separator is None:
        return label
    return _label(row, label.partition(data.label_separator)[0])


def _label(row: Row, value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():  # as pandas writes whole numbers beside missing ones
        value = int(value)
    if not isinstance(value, str | int):
        reason = "is null" if value is None else f"{value!r} is neither a text nor a whole number"
        raise BadRowError(row, f"the label {reason}")
    label = str(value).strip()
    if not label:
        raise BadRowError(row, "the label is blank")
    return label


def _several(row: Row, value: Any, separator: str | None) -> tuple[str, ...]:
    if isinstance(value, str):
        parts = value.split(separator) if separator is not None else [value]
        value = [part for part in parts if part.strip()]
    elif isinstance(value, int) and not isinstance(value, bool):
        value = [value]
    if not isinstance(value, list):
        raise BadRowError(row, f"the labels {value!r} are neither a list nor a text; write [] for none")
    return tuple(dict.fromkeys(_label(row, one) for one in value))


def _is_set(row: Row, name: Column) -> bool:
    value = column(row, name, "data.label")
    text = str(value).strip().lower()
    if text not in (*YES, *NO):
        raise BadRowError(row, f"the column {name!r} of a label has {value!r}, neither 0 nor 1")
    return text in YES


def _number(row: Row, value: Any) -> float:
    try:
        number = math.nan if isinstance(value, bool) or value is None else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise BadRowError(row, f"the label {value!r} is no number, which regression needs")
    return number


def skipped_label(row: Row, data: ExamplesConfig) -> str | None:
    """Returns the label for which the row is left out, if it has such a one, whole or between separators."""
    if isinstance(data.label, list):
        return None
    value = column(row, data.label, "data.label")
    for one in value if isinstance(value, list) else [value]:
        text = str(one).strip()
        parts = [] if data.label_separator is None else text.split(data.label_separator)
        for label in (text, *map(str.strip, parts)):
            if label in data.skip_labels:
                return label
    return None


# --------------------------------------------------------------------------------------------- choices


def _options(row: Row, data: ExamplesConfig) -> tuple[str, ...]:
    assert data.options is not None
    if isinstance(data.options, list):
        values = [column(row, name, "data.options") for name in data.options]
    else:
        values = column(row, data.options, "data.options")
        if not isinstance(values, list):
            raise BadRowError(row, f"the options (data.options={data.options!r}) are no list")
    if len(values) < 2:
        raise BadRowError(row, f"{len(values)} options, of which none is to be chosen; give two or more")
    return tuple(_text(row, value, "data.options") for value in values)


def chosen(row: Row, options: Sequence[str], data: ExamplesConfig) -> int:
    """Returns the number of the right option, from 0.

    The label is, if `data.labels` are given, one of these, which are in the order of the options; else the
    name of the option's column, its number from 0, its letter from A, or its own text. Raises BadRowError for
    a label that is none of these, or that is two different options at once.
    """
    assert not isinstance(data.label, list)
    label = _label(row, column(row, data.label, "data.label"))
    if data.labels is not None:
        if label not in data.labels[: len(options)]:
            raise BadRowError(row, f"the label {label!r} is none of data.labels for {len(options)} options")
        return data.labels.index(label)
    names = [str(name) for name in data.options] if isinstance(data.options, list) else []
    if label in names and not _whole_number.fullmatch(label):
        return names.index(label)
    numbers = [str(number) for number in range(len(options))]
    ways = (numbers, list(string.ascii_uppercase), [option.strip() for option in options])
    found = {place for way in ways for place, name in enumerate(way[: len(options)]) if name == label}
    if len(found) == 1:
        return found.pop()
    if found:
        raise BadRowError(row, f"the label {label!r} may be several of the options; give data.labels")
    raise BadRowError(
        row,
        f"the label {label!r} is none of {len(options)} options: neither a column, a number from 0, a letter "
        "from A, nor the text of one; give data.labels, one for each option",
    )
