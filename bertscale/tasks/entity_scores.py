"""Figures of entities: precision, recall and F1, counted as seqeval counts them, and the accuracy of tags.

    scores = entity_scores(gold, predicted, "bio")           # tags of the words of each text
    scores["entity_f1"], scores["strict_entity_f1"]

An entity is right if its first word, its last word and its label are. Figures without another name are
micro-averaged, over all labels together. What would be divided by zero is 0, as in seqeval.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from bertscale.tasks.tags import Entity, Scheme, entities_of, strict_entities_of

TagLists = Sequence[Sequence[str]]
Rows = list[dict[str, Any]]
Counts = tuple[int, int, int]  # right, predicted, and gold ones
FIGURES = ("precision", "recall", "f1")


def entity_scores(gold: TagLists, predicted: TagLists, scheme: Scheme) -> dict[str, float]:
    """Returns the figures of tags that write entities, or of classes of words with the scheme "none".

    With `strict_` before their name they are by the strict rule; see `tags`.
    """
    table = table_of_labels(gold, predicted, scheme)
    if scheme == "none":
        return {"token_accuracy": token_accuracy(gold, predicted), **_means(table, "")}
    figures = {f"entity_{name}": value for name, value in _together(gold, predicted, None).items()}
    figures |= {f"strict_entity_{name}": value for name, value in _together(gold, predicted, scheme).items()}
    return figures | _means(table, "entity_") | {"token_accuracy": token_accuracy(gold, predicted)}


def token_accuracy(gold: TagLists, predicted: TagLists) -> float:
    """Returns the share of words with the right tag."""
    pairs = [pair for tags in zip(gold, predicted, strict=True) for pair in zip(*tags, strict=True)]
    return sum(a == b for a, b in pairs) / max(len(pairs), 1)


def table_of_labels(gold: TagLists, predicted: TagLists, scheme: Scheme, strict: bool = False) -> Rows:
    """Returns a row for each label that occurs, by the alphabet: label, precision, recall, f1, support.

    Support counts the gold entities; with the scheme "none" the words of a class.
    """
    counts = _counts(*(_read(tags, scheme, strict) for tags in (gold, predicted)))
    return [
        {"label": label, **_figures(counts[label]), "support": counts[label][2]} for label in sorted(counts)
    ]


def averages(table: Rows) -> dict[str, dict[str, float]]:
    """Returns the means of a table's figures: "macro", and "weighted" by support."""
    means: dict[str, dict[str, float]] = {}
    for name, weights in (("macro", [1] * len(table)), ("weighted", [row["support"] for row in table])):
        rows = list(zip(weights, table, strict=True))
        means[name] = {
            figure: sum(weight * row[figure] for weight, row in rows) / max(sum(weights), 1)
            for figure in FIGURES
        }
    return means


def _means(table: Rows, prefix: str) -> dict[str, float]:
    return {f"{prefix}{name}_f1": figures["f1"] for name, figures in averages(table).items()}


def _together(gold: TagLists, predicted: TagLists, strict: Scheme | None) -> dict[str, float]:
    scheme = strict or "bio"
    counts = _counts(*(_read(tags, scheme, strict is not None) for tags in (gold, predicted))).values()
    return _figures((sum(c[0] for c in counts), sum(c[1] for c in counts), sum(c[2] for c in counts)))


def _read(sequences: TagLists, scheme: Scheme, strict: bool) -> list[list[Entity]]:
    if scheme == "none":  # each word is one
        return [[(i, i + 1, tag) for i, tag in enumerate(tags)] for tags in sequences]
    return [strict_entities_of(tags, scheme) if strict else entities_of(tags) for tags in sequences]


def _counts(gold: list[list[Entity]], predicted: list[list[Entity]]) -> dict[str, Counts]:
    """Counts the entities of each label."""
    right: Counter[str] = Counter()
    for ours, theirs in zip(gold, predicted, strict=True):
        right.update(label for _, _, label in set(ours) & set(theirs))
    guessed = Counter(label for entities in predicted for _, _, label in entities)
    wanted = Counter(label for entities in gold for _, _, label in entities)
    return {label: (right[label], guessed[label], wanted[label]) for label in {*guessed, *wanted}}


def _figures(counts: Counts) -> dict[str, float]:
    right, predicted, gold = counts
    # F1 = 2PR / (P + R), where P = right / predicted and R = right / gold
    f1 = 2 * right / max(predicted + gold, 1)
    return {"precision": right / max(predicted, 1), "recall": right / max(gold, 1), "f1": f1}
