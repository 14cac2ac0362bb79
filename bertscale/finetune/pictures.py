"""Draws the tables of labels as pictures for TensorBoard: the confusion matrix, and figures by label.

A picture is uint8 [height, width, 3]. The font that comes with Pillow has Latin letters alone: a label in
another script is shown by its number, which the table in TensorBoard's tab TEXT explains.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from bertscale.finetune.by_label import Tables, shorten

Picture = npt.NDArray[np.uint8]

LINE = 20  # height of a line of text, in pixels
MARGIN = 10
SIDE = 800  # of the matrix, at most about; cells of many labels become small
CELL = 48  # of few labels
TEXT_CELL = 26  # the smallest cell that has room for its count
MOST_ROWS = 60
DARK = 140  # of 255: on darker ground counts are white
FIGURES = ("precision", "recall", "f1")


def draw_tables(tables: Tables) -> dict[str, Picture]:
    """Returns pictures by name: `labels` and `confusion`, as far as there are such tables."""
    pictures = {}
    if rows := tables.get("per_label"):
        pictures["labels"] = draw_labels(rows)
    if cells := tables.get("confusion"):
        pictures["confusion"] = draw_confusion([row["label"] for row in tables["per_label"]], cells)
    return pictures


def draw_labels(rows: Sequence[dict[str, Any]]) -> Picture:
    """Draws a row for each label, its figures as bars too; of more than MOST_ROWS labels the worst ones."""
    numbered = list(enumerate(rows, 1))
    if len(rows) > MOST_ROWS:
        numbered = sorted(numbered, key=lambda row: row[1]["f1"])[:MOST_ROWS]
    names = [_name(number, row["label"]) for number, row in numbered]
    left = MARGIN + max(map(_width, ["label", *names])) + 2 * MARGIN
    bar = 120
    width = left + len(FIGURES) * (bar + MARGIN) + 90
    image = Image.new("RGB", (width, 2 * MARGIN + LINE * (len(names) + 1)), "white")
    draw = ImageDraw.Draw(image)
    for column, title in enumerate(("label", *FIGURES, "examples")):
        x = MARGIN if not column else left + (column - 1) * (bar + MARGIN)
        draw.text((x, MARGIN), title, "black", _font())
    for line, (name, (_, row)) in enumerate(zip(names, numbered, strict=True), 1):
        y = MARGIN + line * LINE
        draw.text((MARGIN, y), name, "black", _font())
        for column, figure in enumerate(FIGURES):
            x = left + column * (bar + MARGIN)
            draw.rectangle((x, y + 1, x + round(bar * row[figure]), y + LINE - 4), fill=_shade(0.35))
            draw.text((x + 4, y), f"{row[figure]:.3f}", "black", _font())
        draw.text((left + len(FIGURES) * (bar + MARGIN), y), f"{row['support']:,}", "black", _font())
    return np.asarray(image)


def draw_confusion(labels: Sequence[str], cells: Sequence[dict[str, Any]]) -> Picture:
    """Draws the matrix, a row for what is right and a column for what it was taken for; a cell is darker the
    larger its share of the row."""
    numbers = {label: number for number, label in enumerate(labels)}
    counts = np.zeros((len(labels), len(labels)), np.int64)
    for cell in cells:
        counts[numbers[cell["label"]], numbers[cell["predicted"]]] = cell["count"]
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    size = max(2, min(CELL, SIDE // len(labels)))
    if size < TEXT_CELL:
        return _without_text(shares, size)
    names = [_name(number, label) for number, label in enumerate(labels, 1)]
    names = [name if name[0] == "#" else f"{number}  {name}" for number, name in enumerate(names, 1)]
    left, top = MARGIN + max(map(_width, names)) + MARGIN, 2 * MARGIN + 2 * LINE
    side = size * len(labels)
    image = Image.new("RGB", (max(left + side + MARGIN, 340), top + side + MARGIN), "white")
    draw = ImageDraw.Draw(image)
    draw.text((MARGIN, MARGIN), "row: what it is; column: what it was taken for", "black", _font())
    for row, name in enumerate(names):
        middle = row * size + size // 2
        draw.text((MARGIN, top + middle), name, "black", _font(), anchor="lm")
        draw.text((left + middle, top - 4), str(row + 1), "black", _font(), anchor="mb")
        for column in range(len(labels)):
            x, y = left + column * size, top + row * size
            fill = _shade(shares[row, column])
            draw.rectangle((x, y, x + size - 2, y + size - 2), fill=fill)
            if count := int(counts[row, column]):
                ink = "white" if fill[1] < DARK else "black"
                text = str(count) if count < 10_000 else f"{count / 1000:.0f}k"
                draw.text((x + size // 2, y + size // 2), text, ink, _font(), anchor="mm")
    return np.asarray(image)


def labels_as_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Returns the figures of the labels as a table in Markdown, with their numbers."""
    lines = [
        f"| {number} | {row['label'].replace('|', '&#124;')} | {row['precision']:.3f} "
        f"| {row['recall']:.3f} | {row['f1']:.3f} | {row['support']:,} |"
        for number, row in enumerate(rows, 1)
    ]
    return "\n".join(
        ["| | label | precision | recall | f1 | examples |", "| --- | --- | --- | --- | --- | --- |", *lines]
    )


def _without_text(shares: npt.NDArray[np.float64], size: int) -> Picture:
    """Draws the matrix of many labels, as cells alone."""
    large = np.kron(shares, np.ones((size, size)))[:, :, None]
    white, full = np.array(_shade(0.0)), np.array(_shade(1.0))
    picture: Picture = (white + (full - white) * large).astype(np.uint8)
    return picture


def _shade(share: float) -> tuple[int, int, int]:
    """Returns a blue that is darker the larger the share, white for 0."""
    red, green, blue = (round(255 + (end - 255) * share) for end in (8, 64, 129))
    return red, green, blue


def _name(number: int, label: str) -> str:
    text = shorten(label, 24).replace("…", "...")
    return text if all(character < "\u0250" for character in text) else f"#{number}"


def _width(text: str) -> int:
    return round(_font().getlength(text))


@cache
def _font() -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(13)
