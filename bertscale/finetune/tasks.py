"""Reads labelled text for fine-tuning, makes batches of it, and scores predictions.

A task is two jsonl files, one example a line: {"text": "Adds two matrices.", "label": "numpy"}.

S: samples, T: tokens, N: examples, C: classes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bertscale.config import UserError
from bertscale.tokenizer import Tokenizer, normalize

Label = str | int


@dataclass(frozen=True)
class Example:
    text: str  # not blank
    label: Label
    place: str  # file and line, for messages


# ------------------------------------------------------------------------------------------- reading


def read_examples(path: str | Path, text_field: str, label_field: str) -> list[Example]:
    """Reads the examples of a jsonl file; empty lines and a byte order mark are skipped.

    Raises UserError that names file and line of the first row that is not JSON, lacks a field,
    has a blank text, or a label that is blank or neither text nor a whole number.
    """
    path = Path(path)
    examples = []
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                line = line.removeprefix("\ufeff")  # in files of several others, in the midst of them too
                if line.strip():
                    examples.append(_read_row(line, f"{path}, line {number}", text_field, label_field))
    except OSError as error:
        raise UserError(f"cannot read the examples {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"the examples {path} are not UTF-8 text: {error.reason}") from error
    if not examples:
        raise UserError(f"{path} has no examples; write one JSON object a line")
    return examples


def _read_row(line: str, place: str, text_field: str, label_field: str) -> Example:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{place}: not JSON ({error})") from None
    if not isinstance(row, dict):
        raise UserError(f"{place}: not a JSON object but {line.strip()[:40]}")
    for key, field in (("data.text_field", text_field), ("data.label_field", label_field)):
        if field not in row:
            fields = ", ".join(row) or "none"
            raise UserError(f"{place}: no field {field!r}; the fields are: {fields} (set {key}=...)")
    text, label = row[text_field], row[label_field]
    if not isinstance(text, str):
        raise UserError(f"{place}: {text_field!r} is not text but {text!r}")
    if not normalize(text):
        raise UserError(f"{place}: {text_field!r} is blank")
    if isinstance(label, bool) or not isinstance(label, str | int):
        raise UserError(f"{place}: {label_field!r} is {label!r}; a label is text or a whole number")
    if isinstance(label, str) and not normalize(label):
        raise UserError(f"{place}: {label_field!r} is blank")
    return Example(text, label, place)


def find_classes(train: Sequence[Example], test: Sequence[Example]) -> list[Label]:
    """Returns the labels of `train`: whole numbers in their order, then texts in theirs.

    Raises UserError where there is only one, or `test` has another.
    """
    classes = sorted({example.label for example in train}, key=lambda label: (isinstance(label, str), label))
    if len(classes) < 2:
        raise UserError(f"every training example has the label {classes[0]!r}; a classifier needs two")
    for example in test:
        if example.label not in classes:
            known = ", ".join(map(repr, classes[:10])) + (", ..." if len(classes) > 10 else "")
            raise UserError(
                f"{example.place}: no training example has the label {example.label!r}; they have {known}"
            )
    return classes


# ------------------------------------------------------------------------------------------- batches


@dataclass(frozen=True)
class Batch:
    """Holds S samples `[CLS] text [SEP]`, laid end to end without padding, the shorter first."""

    tokens: Tensor  # int64 [T]
    token_types: Tensor  # int64 [T], all 0
    positions: Tensor  # int64 [T], 0, 1, ... within each sample
    lengths: tuple[int, ...]  # S sample lengths in tokens, on the host
    rows: list[int]  # S places in the list of samples, on the host

    def to(self, device: torch.device) -> Batch:
        tokens, token_types = self.tokens.to(device), self.token_types.to(device)
        return Batch(tokens, token_types, self.positions.to(device), self.lengths, self.rows)


def encode(
    texts: Sequence[str], tokenizer: Tokenizer, max_length: int, places: Sequence[str]
) -> list[list[int]]:
    """Returns ids of `[CLS] text [SEP]` for each text; longer ones lose their end.

    Raises UserError that names the place of the first text that leaves no token: of that a model can tell
    nothing.
    """
    for text, place in zip(texts, places, strict=True):
        if not isinstance(text, str):
            raise UserError(f"{place} is not text but {text!r}")
    encoded = tokenizer.encode([tokenizer.normalize(text) for text in texts])
    for ids, text, place in zip(encoded, texts, places, strict=True):
        if not ids:
            raise UserError(f"{place} is blank ({text[:40]!r}): leave it out")
    return [[tokenizer.cls_id, *ids[: max_length - 2], tokenizer.sep_id] for ids in encoded]


def training_batches(samples: Sequence[list[int]], size: int, seed: int, epoch: int) -> Iterator[Batch]:
    """Yields all samples once, in an order that `seed` and `epoch` decide; the last batch may be smaller."""
    order = np.random.default_rng([seed, epoch]).permutation(len(samples)).tolist()
    # Sorted inside a batch only: without padding, batches of equal lengths gain nothing, and so each batch
    # stays a random draw.
    for start in range(0, len(order), size):
        yield lay_out(samples, order[start : start + size])


def all_batches(samples: Sequence[list[int]], size: int) -> Iterator[Batch]:
    """Yields all samples once, by length, for predictions."""
    order = sorted(range(len(samples)), key=lambda row: len(samples[row]))
    for start in range(0, len(order), size):
        yield lay_out(samples, order[start : start + size])


def lay_out(samples: Sequence[list[int]], rows: Sequence[int]) -> Batch:
    """Lays the samples at `rows` end to end."""
    # Equal lengths are neighbours, so that attention takes them as one batch.
    rows = sorted(rows, key=lambda row: len(samples[row]))
    lengths = tuple(len(samples[row]) for row in rows)
    tokens = torch.tensor([token for row in rows for token in samples[row]])
    positions = torch.cat([torch.arange(length) for length in lengths])
    return Batch(tokens, torch.zeros_like(tokens), positions, lengths, list(rows))


# ------------------------------------------------------------------------------------------- metrics


def score(targets: npt.NDArray[np.int64], predicted: npt.NDArray[np.int64]) -> dict[str, float]:
    """Returns accuracy and macro-F1 (the mean of the classes' F1) of class numbers [N]."""
    from sklearn.metrics import accuracy_score, f1_score

    return {
        "accuracy": float(accuracy_score(targets, predicted)),
        "macro_f1": float(f1_score(targets, predicted, average="macro", zero_division=0.0)),
    }


def majority_accuracy(train: Sequence[Example], test: Sequence[Example]) -> float:
    """Returns the lower bound: the accuracy on `test` of the most frequent label of `train`."""
    majority, _ = Counter(example.label for example in train).most_common(1)[0]
    return sum(example.label == majority for example in test) / len(test)
