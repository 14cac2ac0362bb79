"""The arithmetic of predictions and figures, as scikit-learn and scipy have it.

N samples, E examples, C labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from bertscale.tasks.task import Floats, Ints, Samples

Doubles = npt.NDArray[np.float64]


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
