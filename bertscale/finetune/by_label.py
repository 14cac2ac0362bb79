"""How right a model is on each label, and what it takes for what: for result.json, and for the screen."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np

from bertscale.tasks.task import Example, Task

MOST = 20  # labels of which all are shown
WORST = 10  # labels, or confusions, that are shown of more
WIDTH = 79
LABEL_WIDTH = 24
Tables = dict[str, list[dict[str, Any]]]


def tables_of(
    task: Task[Any], examples: Sequence[Example], predictions: Sequence[dict[str, Any]]
) -> Tables | None:
    """Returns `per_label`, a row for each label, and `confusion`, how often a label was taken for which, the
    most frequent first; as far as the task has them, and None where it has neither."""
    tables: Tables = {}
    if rows := task.per_label(examples, predictions):
        tables["per_label"] = rows
    if (found := task.confusion(examples, predictions)) is not None:
        labels, counts = found
        cells = sorted(zip(*np.nonzero(counts), strict=True), key=lambda cell: -counts[cell])
        tables["confusion"] = [
            {"label": labels[row], "predicted": labels[column], "count": int(counts[row, column])}
            for row, column in cells
        ]
    return tables or None


def show_tables(name: str, tables: Tables) -> list[str]:
    """Returns lines for the screen: of many labels the worst ones, and the most frequent confusions."""
    lines = []
    if rows := tables.get("per_label"):
        lines += _show_labels(name, rows)
    if cells := tables.get("confusion"):
        labels = [row["label"] for row in tables.get("per_label", [])]
        lines += ["", *(_show_matrix(name, labels, cells) or _show_confusions(name, cells))]
    return lines


def _show_labels(name: str, rows: Sequence[dict[str, Any]]) -> list[str]:
    title = f"{name}, by label"
    notes = []
    if len(rows) > MOST:
        seen = [row for row in rows if row["support"]]
        title = f"{name}, {min(WORST, len(seen))} worst of {len(rows):,} labels"
        notes = [f"(all of them: result.json, by_label.{name}.per_label)"]
        rows = sorted(seen, key=lambda row: row["f1"])[:WORST]
    names = [shorten(row["label"], LABEL_WIDTH) for row in rows]
    width = max(map(columns, [title, *names]))
    head = f"{fill(title, width)}   precision   recall      f1   examples"
    return [
        head,
        *(
            f"{fill(label, width)}   {row['precision']:9.3f}   {row['recall']:6.3f}   {row['f1']:5.3f}"
            f"   {row['support']:8,}"
            for label, row in zip(names, rows, strict=True)
        ),
        *notes,
    ]


def _show_matrix(name: str, labels: Sequence[str], cells: Sequence[dict[str, Any]]) -> list[str] | None:
    """Returns the confusion matrix with numbers for the columns; None if it is too large for the screen."""
    if len(labels) > MOST:
        return None
    numbers = {label: number for number, label in enumerate(labels)}
    counts = np.zeros((len(labels), len(labels)), np.int64)
    for cell in cells:
        counts[numbers[cell["label"]], numbers[cell["predicted"]]] = cell["count"]
    title = f"{name}, is (row) and was taken for"
    names = [f"{number:>2} {shorten(label, LABEL_WIDTH)}" for number, label in enumerate(labels, 1)]
    width = max(map(columns, names))
    cell_width = max(len(f"{counts.max():,}"), 2) + 2
    if width + cell_width * len(labels) > WIDTH:
        return None
    heads = "".join(f"{number:>{cell_width}}" for number in range(1, len(labels) + 1))
    return [
        title,
        f"{'':{width}}{heads}",
        *(
            fill(label, width) + "".join(f"{count:>{cell_width},}" for count in row)
            for label, row in zip(names, counts.tolist(), strict=True)
        ),
    ]


def _show_confusions(name: str, cells: Sequence[dict[str, Any]]) -> list[str]:
    wrong = [cell for cell in cells if cell["label"] != cell["predicted"]]
    if not wrong:
        return []
    lines = [
        f"{cell['count']:8,}   {shorten(cell['label'], LABEL_WIDTH)} taken for "
        f"{shorten(cell['predicted'], LABEL_WIDTH)}"
        for cell in wrong[:WORST]
    ]
    more = [f"(all of them: result.json, by_label.{name}.confusion)"] if len(wrong) > WORST else []
    return [f"{name}, most frequent confusions", *lines, *more]


# ------------------------------------------------------------------------------------ columns of a screen


def columns(text: str) -> int:
    """Counts the columns of a text: a Chinese character has two, a combining mark none."""
    return sum(
        0 if unicodedata.combining(letter) else 1 + (unicodedata.east_asian_width(letter) in "WF")
        for letter in text
    )


def fill(text: str, width: int) -> str:
    """Returns the text with spaces behind it, `width` columns in all."""
    return text + " " * (width - columns(text))


def shorten(text: str, width: int) -> str:
    """Returns the text, or as much of its begin as fits `width` columns with an ellipsis behind."""
    text = " ".join(text.split())
    if columns(text) <= width:
        return text
    while columns(text) > width - 1:
        text = text[:-1]
    return text + "…"
