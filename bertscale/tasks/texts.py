"""Tasks of one text or a pair: classification, several labels at once (multi_label), and regression.

    task = text_task("classification", ["entailment", "neutral", "contradiction"])
    samples = task.encode(examples, tokenizer, encoding)
    figures = task.score(examples, task.predict(examples, samples, logits))

A pair that is too long loses tokens of its longer text, as in the tokenizers of Hugging Face
(`longest_first`). With `long_texts=windows` a single text, or the second one of a pair, becomes several
samples that overlap, each with the target of the example; a prediction is made of the mean of their logits.

N samples, E examples, C labels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from bertscale.config import UserError
from bertscale.config.examples import EncodingConfig, TaskKind
from bertscale.tasks.task import Floats, Ints, Samples, Task, TextExample, lay_out
from bertscale.tasks.windows import cut_to, windows_of
from bertscale.tokenizer import Tokenizer

Doubles = npt.NDArray[np.float64]
Predictions = Sequence[dict[str, Any]]


def text_task(kind: TaskKind, labels: list[str]) -> TextTask:
    """Returns the task of a kind of texts; `labels` are those of its outputs, none for regression."""
    match kind:
        case "classification":
            return ClassificationTask(labels)
        case "multi_label":
            return MultiLabelTask(labels)
        case "regression":
            return RegressionTask(labels)
    raise ValueError(f"{kind} is no kind of task whose examples are a text or a pair")


class TextTask(Task[TextExample]):
    """What the three kinds have in common."""

    def __init__(self, labels: list[str]) -> None:
        self.labels = labels
        self.numbers = {label: number for number, label in enumerate(labels)}

    @property
    def outputs(self) -> int:
        return len(self.labels)

    def encode(
        self, examples: Sequence[TextExample], tokenizer: Tokenizer, encoding: EncodingConfig
    ) -> Samples:
        parts = encode_texts([list(example.texts) for example in examples], tokenizer)
        sequences: list[tuple[Sequence[int], Sequence[int] | None]] = []
        numbers: list[int] = []
        cut = 0
        for number, (example, ids) in enumerate(zip(examples, parts, strict=True)):
            if not all(ids):
                raise UserError(f"{example.place}: a text of which the tokenizer leaves nothing")
            if encoding.long_texts == "windows":
                made, lost = windows_of(ids, encoding.max_length, encoding.overlap)
            else:
                made, lost = cut_to(ids, encoding.max_length)
            sequences += made
            numbers += [number] * len(made)
            cut += lost
        targets = None
        if all(example.target is not None for example in examples):
            targets = self.targets(examples)[numbers]
        return lay_out(sequences, numbers, targets, tokenizer, cut=cut)

    def targets(self, examples: Sequence[TextExample]) -> npt.NDArray[Any]:
        """Returns the target of each example as a row of an array, see `Samples`; all must be known."""
        raise NotImplementedError

    def number(self, label: str, place: str) -> int:
        """Returns the number of a label; raises UserError, with the place, if the task has none."""
        if label not in self.numbers:
            raise UserError(f"{place}: the label {label!r} is none of {', '.join(map(repr, self.labels))}")
        return self.numbers[label]

    def majority(self, train: Sequence[TextExample], examples: Sequence[TextExample]) -> dict[str, float]:
        """Returns the figures of one answer for all `examples`: the most frequent, or mean, of `train`."""
        return self.score(examples, [self.usual(train)] * len(examples))

    def usual(self, train: Sequence[TextExample]) -> dict[str, Any]:
        """Returns the prediction of who knows nothing but the targets of the training examples."""
        raise NotImplementedError


# ------------------------------------------------------------------------------------------- three kinds


class ClassificationTask(TextTask):
    """Exactly one label of each example."""

    kind: ClassVar[TaskKind] = "classification"

    @property
    def metric(self) -> str:
        return "accuracy"

    def targets(self, examples: Sequence[TextExample]) -> Ints:
        return np.array([self.number(str(e.target), e.place) for e in examples], np.int64)

    def predict(
        self, examples: Sequence[TextExample], samples: Samples, logits: Floats
    ) -> list[dict[str, Any]]:
        scores = mean_by_example(samples, logits)
        best = scores.argmax(1).tolist()
        return [
            {
                "label": self.labels[label],
                "probability": row[label],
                "probabilities": dict(zip(self.labels, row, strict=True)),
            }
            for label, row in zip(best, softmax(scores).tolist(), strict=True)
        ]

    def score(self, examples: Sequence[TextExample], predictions: Predictions) -> dict[str, float]:
        matrix = self._counts(examples, predictions)
        right = matrix.diagonal()
        _, _, f1 = precision_recall_f1(right, matrix.sum(0), matrix.sum(1))
        seen = (matrix.sum(0) + matrix.sum(1)) > 0  # as scikit-learn: the labels that occur
        accuracy = float(right.sum() / matrix.sum())
        figures = {"accuracy": accuracy, "macro_f1": float(f1[seen].mean()), "micro_f1": accuracy}
        if len(self.labels) == 2:
            figures["f1"] = float(f1[1])
        return {**figures, "matthews": matthews(matrix)}

    def label_counts(self, examples: Sequence[TextExample]) -> dict[str, int]:
        counts = Counter(example.target for example in examples)
        return {label: counts[label] for label in self.labels}

    def usual(self, train: Sequence[TextExample]) -> dict[str, Any]:
        counts = self.label_counts(train)
        return {
            "label": max(counts, key=counts.__getitem__),
            "probabilities": {label: count / len(train) for label, count in counts.items()},
        }

    def confusion(
        self, examples: Sequence[TextExample], predictions: Predictions
    ) -> tuple[list[str], Ints] | None:
        return self.labels, self._counts(examples, predictions)

    def per_label(self, examples: Sequence[TextExample], predictions: Predictions) -> list[dict[str, Any]]:
        matrix = self._counts(examples, predictions)
        return table_of_labels(self.labels, matrix.diagonal(), matrix.sum(0), matrix.sum(1))

    def _counts(self, examples: Sequence[TextExample], predictions: Predictions) -> Ints:
        truth = self.targets(examples)
        said = np.array([self.numbers[prediction["label"]] for prediction in predictions], np.int64)
        size = len(self.labels)
        return np.bincount(truth * size + said, minlength=size * size).reshape(size, size)  # [C, C]


class MultiLabelTask(TextTask):
    """Any number of labels of each example, none as well."""

    kind: ClassVar[TaskKind] = "multi_label"

    @property
    def metric(self) -> str:
        return "micro_f1"

    def targets(self, examples: Sequence[TextExample]) -> Floats:
        return self._matrix([labels_of(example) for example in examples], [e.place for e in examples])

    def predict(
        self, examples: Sequence[TextExample], samples: Samples, logits: Floats
    ) -> list[dict[str, Any]]:
        scores = mean_by_example(samples, logits)
        probabilities = 1 / (1 + np.exp(-np.clip(scores, -700, 700)))
        return [
            {
                "labels": [label for label, p in zip(self.labels, row, strict=True) if p >= 0.5],
                "probabilities": dict(zip(self.labels, row, strict=True)),
            }
            for row in probabilities.tolist()
        ]

    def score(self, examples: Sequence[TextExample], predictions: Predictions) -> dict[str, float]:
        truth, right, said = self._counts(examples, predictions)
        _, _, f1 = precision_recall_f1(right, said, truth.sum(0))
        _, _, micro = precision_recall_f1(right.sum(), said.sum(), truth.sum())
        exact = [
            set(labels_of(example)) == set(prediction["labels"])
            for example, prediction in zip(examples, predictions, strict=True)
        ]
        given = [[prediction["probabilities"][label] for label in self.labels] for prediction in predictions]
        probabilities = np.array(given, np.float64).reshape(truth.shape)
        return {
            "micro_f1": float(micro),
            "macro_f1": float(f1.mean()),
            "exact_match": float(np.mean(exact)),
            **average_precision(truth, probabilities),
        }

    def label_counts(self, examples: Sequence[TextExample]) -> dict[str, int]:
        counts = Counter(label for example in examples for label in labels_of(example))
        return {label: counts[label] for label in self.labels}

    def usual(self, train: Sequence[TextExample]) -> dict[str, Any]:
        counts = self.label_counts(train)
        return {
            "labels": [max(counts, key=counts.__getitem__)],
            "probabilities": {label: count / len(train) for label, count in counts.items()},
        }

    def per_label(self, examples: Sequence[TextExample], predictions: Predictions) -> list[dict[str, Any]]:
        truth, right, said = self._counts(examples, predictions)
        return table_of_labels(self.labels, right, said, truth.sum(0))

    def _counts(self, examples: Sequence[TextExample], predictions: Predictions) -> tuple[Ints, Ints, Ints]:
        """Returns what is true [E, C], and of each label how often it was said rightly, and said at all."""
        places = [example.place for example in examples]
        truth = self.targets(examples).astype(np.int64)
        said = self._matrix([prediction["labels"] for prediction in predictions], places).astype(np.int64)
        return truth, (truth * said).sum(0), said.sum(0)

    def _matrix(self, labels: Sequence[Sequence[str]], places: Sequence[str]) -> Floats:
        matrix = np.zeros((len(labels), len(self.labels)), np.float32)
        for row, (names, place) in enumerate(zip(labels, places, strict=True)):
            matrix[row, [self.number(name, place) for name in names]] = 1
        return matrix


class RegressionTask(TextTask):
    """A number for each example; it is learnt as it is."""

    kind: ClassVar[TaskKind] = "regression"

    @property
    def outputs(self) -> int:
        return 1

    @property
    def metric(self) -> str:
        return "pearson_spearman"  # their mean, which GLUE quotes for STS-B

    def targets(self, examples: Sequence[TextExample]) -> Floats:
        return np.array([example.target for example in examples], np.float32)

    def predict(
        self, examples: Sequence[TextExample], samples: Samples, logits: Floats
    ) -> list[dict[str, Any]]:
        return [{"score": score} for score in mean_by_example(samples, logits)[:, 0].tolist()]

    def score(self, examples: Sequence[TextExample], predictions: Predictions) -> dict[str, float]:
        truth = np.array([example.target for example in examples], np.float64)
        said = np.array([prediction["score"] for prediction in predictions], np.float64)
        pearson = correlation(truth, said)
        spearman = correlation(ranks(truth), ranks(said))
        both = (pearson + spearman) / 2
        return {"pearson": pearson, "spearman": spearman, "pearson_spearman": both}

    def usual(self, train: Sequence[TextExample]) -> dict[str, Any]:
        return {"score": float(self.targets(train).mean())}


# ------------------------------------------------------------------------------------------- texts to ids


def encode_texts(texts: Sequence[Sequence[str]], tokenizer: Tokenizer) -> list[list[list[int]]]:
    """Returns the ids of each text of each example, without special pieces."""
    flat = iter(tokenizer.encode([tokenizer.normalize(text) for several in texts for text in several]))
    return [[next(flat) for _ in several] for several in texts]


def labels_of(example: TextExample) -> tuple[str, ...]:
    """Returns the labels of an example of multi_label."""
    assert isinstance(example.target, tuple)
    return example.target


# ---------------------------------------------------------------------------------------------- figures


def mean_by_example(samples: Samples, logits: Floats) -> Doubles:
    """Averages the logits [N, C] over the samples of each example: [E, C]."""
    begins = np.flatnonzero(np.diff(samples.example, prepend=-1))
    counts = np.diff(begins, append=len(samples))
    sums: Doubles = np.add.reduceat(logits.astype(np.float64), begins, axis=0)
    return sums / counts[:, None]


def softmax(scores: Doubles) -> Doubles:
    """Returns probabilities, of [E, C] over C."""
    powers = np.exp(scores - scores.max(1, keepdims=True))
    probabilities: Doubles = powers / powers.sum(1, keepdims=True)
    return probabilities


def precision_recall_f1(right: Any, said: Any, true: Any) -> tuple[Any, Any, Any]:
    """Returns precision, recall and F1 of counts; 0 where nothing was said, or nothing is true."""
    right, said, true = (np.asarray(count, np.float64) for count in (right, said, true))
    return (
        right / np.maximum(said, 1),
        right / np.maximum(true, 1),
        2 * right / np.maximum(said + true, 1),
    )


def table_of_labels(labels: Sequence[str], right: Ints, said: Ints, true: Ints) -> list[dict[str, Any]]:
    """Returns the rows of `TextTask.per_label`."""
    columns = [column.tolist() for column in (*precision_recall_f1(right, said, true), true)]
    names = ("label", "precision", "recall", "f1", "support")
    return [dict(zip(names, row, strict=True)) for row in zip(labels, *columns, strict=True)]


def matthews(matrix: Ints) -> float:
    """Returns Matthews' correlation of a confusion matrix [C, C]; 0 where one label is all that occurs.

    For more than two labels: Gorodkin, "Comparing two K-category assignments by a K-category correlation
    coefficient", 2004.
    """
    counts = matrix.astype(np.float64)
    total, true, said = counts.sum(), counts.sum(1), counts.sum(0)
    spread = np.sqrt((total**2 - said @ said) * (total**2 - true @ true))
    return float((counts.trace() * total - true @ said) / spread) if spread else 0.0


def correlation(a: Doubles, b: Doubles) -> float:
    """Returns Pearson's correlation; 0 where one of them is constant."""
    a, b = a - a.mean(), b - b.mean()
    size = np.linalg.norm(a) * np.linalg.norm(b)
    return float(a @ b / size) if size > 1e-12 else 0.0


def ranks(values: Doubles) -> Doubles:
    """Returns the rank of each value; equal ones share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def average_precision(truth: Ints, probabilities: Doubles) -> dict[str, float]:
    """Returns the area under precision over recall: of all labels together, and the mean of those that occur.

    Both are [E, C].
    """
    from sklearn.metrics import average_precision_score

    occurs = truth.any(0)
    if not occurs.any():
        return {"micro_average_precision": 0.0, "average_precision": 0.0}
    return {
        "micro_average_precision": float(average_precision_score(truth.ravel(), probabilities.ravel())),
        "average_precision": float(
            np.mean(
                [average_precision_score(truth[:, i], probabilities[:, i]) for i in np.flatnonzero(occurs)]
            )
        ),
    }
