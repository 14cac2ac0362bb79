"""Entity figures are seqeval's: the examples of its README and tests, https://github.com/chakki-works/seqeval."""

from __future__ import annotations

import pytest

from bertscale.tasks.entity_scores import averages, entity_scores, table_of_labels, token_accuracy

README_GOLD = [["O", "O", "O", "B-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]
README_PREDICTED = [["O", "O", "B-MISC", "I-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]


def test_the_readme() -> None:
    scores = entity_scores(README_GOLD, README_PREDICTED, "bio")
    for name in ("precision", "recall", "f1"):
        assert scores[f"entity_{name}"] == scores[f"strict_entity_{name}"] == 0.5
    assert scores["token_accuracy"] == 0.8
    assert (scores["entity_macro_f1"], scores["entity_weighted_f1"]) == (0.5, 0.5)
    for strict in (False, True):
        assert table_of_labels(README_GOLD, README_PREDICTED, "bio", strict) == [
            {"label": "MISC", "precision": 0, "recall": 0, "f1": 0, "support": 1},
            {"label": "PER", "precision": 1, "recall": 1, "f1": 1, "support": 1},
        ]


def test_where_the_two_rules_differ() -> None:
    scores = entity_scores([["B-NP", "I-NP", "O"]], [["I-NP", "I-NP", "O"]], "bio")
    assert (scores["entity_f1"], scores["strict_entity_f1"]) == (1, 0)


def test_report_of_three_labels() -> None:
    table = table_of_labels([["B-A", "B-B", "O", "B-A"]], [["O", "B-B", "B-C", "B-A"]], "bio", strict=True)
    rows = {
        row["label"]: [round(row[name], 2) for name in ("precision", "recall", "f1", "support")]
        for row in table
    }
    assert rows == {"A": [1, 0.5, 0.67, 2], "B": [1, 1, 1, 1], "C": [0, 0, 0, 0]}
    means = averages(table)
    assert [round(value, 2) for value in means["macro"].values()] == [0.67, 0.5, 0.56]
    assert [round(value, 2) for value in means["weighted"].values()] == [1, 0.67, 0.78]
    scores = entity_scores([["B-A", "B-B", "O", "B-A"]], [["O", "B-B", "B-C", "B-A"]], "bio")
    assert [scores[f"entity_{name}"] for name in ("precision", "recall", "f1")] == [pytest.approx(2 / 3)] * 3


@pytest.mark.parametrize(
    ("gold", "predicted"), [(["O"], ["O"]), ([], []), (["B-A"], ["O"]), (["O"], ["B-A"])]
)
def test_nothing_to_divide_by(gold: list[str], predicted: list[str]) -> None:
    scores = entity_scores([gold], [predicted], "bio")
    assert {value for name, value in scores.items() if name != "token_accuracy"} == {0}


def test_texts_of_other_lengths_are_no_pair() -> None:
    for gold, predicted in (([["O"]], [[]]), ([["O"]], [["O"], ["O"]])):
        with pytest.raises(ValueError, match="zip"):
            token_accuracy(gold, predicted)


def test_bmes_counts_as_bioes_does() -> None:
    gold, predicted = ["B-A", "M-A", "E-A", "O", "S-A"], ["B-A", "M-A", "M-A", "O", "S-A"]
    as_bioes = [[tag.replace("M", "I") for tag in tags] for tags in (gold, predicted)]
    scores = entity_scores([gold], [predicted], "bmes")
    assert scores == entity_scores([as_bioes[0]], [as_bioes[1]], "bioes")
    assert (scores["entity_f1"], scores["strict_entity_recall"], scores["strict_entity_precision"]) == (
        1,
        0.5,
        1,
    )


def test_classes_of_words() -> None:
    scores = entity_scores([["NN", "VB", "NN"], ["NN"]], [["NN", "NN", "NN"], ["VB"]], "none")
    # NN: 2 right of 3 and 3; VB: none.
    assert scores == {
        "token_accuracy": 0.5,
        "macro_f1": pytest.approx(1 / 3),
        "weighted_f1": pytest.approx(0.5),
    }
