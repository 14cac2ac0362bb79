"""What a task is: the examples of each kind, the samples that are made of them, and what a kind must offer.

N samples, T tokens of all of them, E examples, C labels (outputs of the head).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from bertscale.config.examples import EncodingConfig, TaskKind
from bertscale.tokenizer import Tokenizer

NO_TARGET = -100  # of a token that has no label, as in torch's cross-entropy

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Spans = tuple[tuple[int, int], ...]  # begin and end in characters of a text


@dataclass(frozen=True, kw_only=True)
class Example:
    """What all kinds of examples have."""

    place: str  # file and line, for messages
    row: dict[str, Any] = field(default_factory=dict, repr=False)  # its columns as read, for predictions

    @property
    def content(self) -> tuple[str, ...]:
        """The texts that must not lie in training and dev examples alike."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class TextExample(Example):
    """One text or a pair, with a label, several labels, or a number; a target of None is not known."""

    texts: tuple[str, ...]  # one or two, as they stand in the file
    target: str | tuple[str, ...] | float | None

    @property
    def content(self) -> tuple[str, ...]:
        return self.texts


@dataclass(frozen=True, kw_only=True)
class ChoiceExample(Example):
    """A text and the options of which one fits."""

    text: str
    options: tuple[str, ...]
    target: int | None  # number of the right option, from 0

    @property
    def content(self) -> tuple[str, ...]:
        return (self.text, *self.options)


@dataclass(frozen=True, kw_only=True)
class TokenExample(Example):
    """A text whose words have tags."""

    text: str
    words: Spans  # ascending, not empty, not overlapping
    tags: tuple[str, ...] | None  # of each word

    @property
    def content(self) -> tuple[str, ...]:
        return (self.text,)


@dataclass(frozen=True, kw_only=True)
class QuestionExample(Example):
    """A question about a context, with the answers that people gave."""

    identity: str
    question: str
    context: str
    answers: tuple[tuple[str, int], ...]  # text and first character in the context; none: no answer there
    known: bool = True  # whether answers are given; False for questions that are only to be answered

    @property
    def content(self) -> tuple[str, ...]:
        return (self.context,)


AnyExample = TypeVar("AnyExample", bound=Example)


@dataclass(frozen=True)
class Samples:
    """Sequences `[CLS] A [SEP]` or `[CLS] A [SEP] B [SEP]`, end to end.

    `targets`, where they are known:

    | kind                        | targets                                                              |
    | --------------------------- | -------------------------------------------------------------------- |
    | classification              | int64 [N], number of the label                                       |
    | multi_label                 | float32 [N, C], 0 or 1                                               |
    | regression                  | float32 [N]                                                          |
    | tokens                      | int64 [T], number of the tag; NO_TARGET where none is learnt         |
    | question_answering          | int64 [N, 2], first and last token of the answer, counted from the   |
    |                             | sample's [CLS]; 0, 0: no answer in this sample                       |
    | multiple_choice             | int64 [E], number of the right one among the example's samples       |
    """

    tokens: npt.NDArray[np.int32]  # [T]
    starts: Ints  # [N + 1] where each sample begins in `tokens`, and the end
    second: Ints  # [N] tokens of `[CLS] A [SEP]`; the rest is `B [SEP]`, of token type 1
    example: Ints  # [N] number of the example, ascending; several samples may be of one
    targets: npt.NDArray[Any] | None
    cut: int = 0  # examples that lost a part of their text
    unknown: int = 0  # tokens that are the unknown piece
    # For tags: the words of its example that each token gives the tag of, the first and the one behind the
    # last; none where the two are equal. Of a word in several windows, only one has a token that does.
    words: Ints | None = None  # [T, 2]
    # For answers out of a text: the characters of the raw text that each token stands for (-1, -1: none), and
    # whether no other window of the example gives the token more context.
    spans: npt.NDArray[np.int32] | None = None  # [T, 2]
    central: npt.NDArray[np.bool_] | None = None  # [T]

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> Ints:
        """Counts the tokens of each sample, [N]."""
        return np.diff(self.starts)


def lay_out(
    sequences: Sequence[tuple[Sequence[int], Sequence[int] | None]],
    example: Sequence[int],
    targets: npt.NDArray[Any] | None,
    tokenizer: Tokenizer,
    *,
    cut: int = 0,
    words: Ints | None = None,
) -> Samples:
    """Lays samples end to end: each is the ids of A and those of B, or None, without special pieces."""
    cls, sep = [tokenizer.cls_id], [tokenizer.sep_id]
    parts: list[Sequence[int]] = []
    lengths, second = [], []
    for first, other in sequences:
        parts += [cls, first, sep] if other is None else [cls, first, sep, other, sep]
        second.append(len(first) + 2)
        lengths.append(len(first) + 2 + (0 if other is None else len(other) + 1))
    total = sum(lengths)
    tokens = np.fromiter((token for part in parts for token in part), np.int32, total)
    starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    unknown = int((tokens == tokenizer.unk_id).sum())
    ints = np.array(second, np.int64), np.array(example, np.int64)
    return Samples(tokens, starts, *ints, targets, cut, unknown, words)


class Task(ABC, Generic[AnyExample]):
    """A kind of task with its labels: what lies between labelled files and the outputs of a model.

    Outputs of a model are float32 logits: [N, C] of samples for classification, multi_label, regression
    (C = 1) and multiple_choice (C = 1), [T, C] of tokens for tokens and question_answering (C = 2: begin,
    end).
    """

    kind: ClassVar[TaskKind]
    labels: list[str]  # names of the outputs, in order; empty where they have none

    @property
    @abstractmethod
    def outputs(self) -> int:
        """Counts the outputs of the head, C."""

    @property
    @abstractmethod
    def metric(self) -> str:
        """Names the figure of `score` that chooses the checkpoint; higher is better."""

    @abstractmethod
    def encode(
        self, examples: Sequence[AnyExample], tokenizer: Tokenizer, encoding: EncodingConfig
    ) -> Samples:
        """Makes samples. Raises UserError, with the place, for an example that leaves no token."""

    @abstractmethod
    def predict(
        self, examples: Sequence[AnyExample], samples: Samples, logits: Floats
    ) -> list[dict[str, Any]]:
        """Returns what the logits say of each example, as JSON values; see docs/finetune.md for the keys."""

    @abstractmethod
    def score(
        self, examples: Sequence[AnyExample], predictions: Sequence[dict[str, Any]]
    ) -> dict[str, float]:
        """Returns the figures of the predictions, each between -1 and 1."""

    def facts(self) -> dict[str, Any]:
        """Returns what a saved model must know beside its labels, as JSON values, to make the task again."""
        return {}

    def majority(self, train: Sequence[AnyExample], examples: Sequence[AnyExample]) -> dict[str, float]:
        """Returns the figures of one answer for all `examples`, the most frequent one of `train`, where there
        is such an answer."""
        return {}

    def label_counts(self, examples: Sequence[AnyExample]) -> dict[str, int]:
        """Counts the examples of each label, of all the task's labels; empty where it has none."""
        return {}

    def per_label(
        self, examples: Sequence[AnyExample], predictions: Sequence[dict[str, Any]]
    ) -> list[dict[str, Any]]:
        """Returns a row for each label: label, precision, recall, f1, support (how many there are in truth);
        none where the task has no labels."""
        return []

    def confusion(
        self, examples: Sequence[AnyExample], predictions: Sequence[dict[str, Any]]
    ) -> tuple[list[str], Ints] | None:
        """Returns the labels, and how many of each (row) were taken for each (column), [C, C]; None where
        not exactly one of several labels is right."""
        return None

    def tuned(self, figures: dict[str, float]) -> Task[AnyExample]:
        """Returns the task with what the figures of dev say is best for its decisions; itself where they say
        nothing."""
        return self


@dataclass(frozen=True)
class TaskData(Generic[AnyExample]):
    """The examples of a run, as they are read from its files."""

    task: Task[AnyExample]
    train: list[AnyExample]
    repeats: npt.NDArray[np.float64]  # [E] weight of each training example's file
    dev: list[AnyExample]
    test: list[AnyExample]
    broken: list[dict[str, Any]]  # rows that were left out: {"place", "reason", "row"}
    notes: list[str] = field(default_factory=list)  # what the start says of the files
