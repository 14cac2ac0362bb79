"""Files of predictions, ours and those of other programs, are scored by one command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bertscale.cli import main
from bertscale.config import UserError
from bertscale.examples.score import score_files

GOLD = {"1": ["the big cat", "cat"], "2": [], "3": ["Paris"]}


@pytest.fixture
def gold(tmp_path: Path) -> Path:
    """Three questions, whose answers are not in the context: only their texts count."""
    questions = [
        {"id": i, "question": "?", "answers": [{"text": text, "answer_start": 0} for text in texts]}
        for i, texts in GOLD.items()
    ]
    article = {"title": "A", "paragraphs": [{"context": "none of them", "qas": questions}]}
    return write(tmp_path / "gold.json", {"data": [article]})


def write(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value))
    return path


def silent(line: str) -> None:
    raise AssertionError(line)


def lines(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("form", ["object", "list", "jsonl", "metric"])
def test_answers_of_any_program(tmp_path: Path, gold: Path, form: str) -> None:
    answers = {"1": "big cat", "2": "", "3": "London"}
    rows = [{"id": i, "answer": text} for i, text in answers.items()]
    path = tmp_path / "predictions.json"
    if form == "object":
        write(path, answers)
    elif form == "list":
        write(path, rows)
    elif form == "metric":
        write(path, [{"id": i, "prediction_text": text} for i, text in answers.items()])
    else:
        path = lines(tmp_path / "predictions.jsonl", *rows)
    figures = score_files("squad", gold, path, say=silent)
    assert figures["exact_match"] == figures["f1"] == pytest.approx(2 / 3)
    assert (figures["no_answer_f1"], figures["has_answer_f1"]) == (1, 0.5)
    assert "best_f1" not in figures


def test_one_prediction_on_one_line(tmp_path: Path, gold: Path) -> None:
    said: list[str] = []
    one = lines(tmp_path / "a.jsonl", {"id": "3", "answer": "Paris"})
    figures = score_files("squad", gold, one, say=said.append)
    assert figures["has_answer_f1"] == 0.5
    assert said == [f"{one}: 2 of 3 questions have no prediction; each counts as empty"]


def test_the_best_threshold_from_a_second_file_or_our_own_scores(tmp_path: Path, gold: Path) -> None:
    answers = {"1": "cat", "2": "fish", "3": "Paris"}
    scores = {"1": 0.1, "2": 0.9, "3": 0.2}
    path = write(tmp_path / "predictions.json", answers)
    figures = score_files("squad", gold, path, no_answer=write(tmp_path / "null.json", scores), say=silent)
    assert figures["f1"] == pytest.approx(2 / 3)
    assert (figures["best_f1"], figures["best_threshold"]) == (1, 0.2)
    ours = [
        {
            **{"id": i, "answer": "" if i == "1" else text, "no_answer_score": scores[i]},
            "nbest": [{"text": ""}, {"text": text}],
        }
        for i, text in answers.items()
    ]
    figures = score_files("squad", gold, lines(tmp_path / "ours.jsonl", *ours), say=silent)
    assert figures["f1"] == pytest.approx(1 / 3)
    assert (figures["best_f1"], figures["best_threshold"]) == (1, 0.2)
    with pytest.raises(UserError, match="has nothing for the question 2"):
        score_files("squad", gold, path, no_answer=write(tmp_path / "null.json", {"1": 0.5}), say=silent)


@pytest.mark.parametrize(
    ("predictions", "message"),
    [
        ({"1": "cat", "9": "x", "8": "y"}, "'9' and 1 more is the id of no question of"),
        ({"1": None}, "is no answer; give text"),
        ([{"id": "1"}], "is no answer; give text"),
    ],
)
def test_predictions_that_do_not_fit(tmp_path: Path, gold: Path, predictions: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        score_files("squad", gold, write(tmp_path / "p.json", predictions))


def test_gold_that_is_cut_off(tmp_path: Path, gold: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = gold.read_text()
    gold.write_text(text[:-2] + ', {"title": "B", "para')
    path = write(tmp_path / "p.json", {"1": "cat", "2": "", "3": "Paris"})
    assert main(["score", "squad", str(gold), str(path)]) == 2
    assert "after 1 whole article, the last one 'A'" in capsys.readouterr().err
    assert main(["score", "squad", str(gold), str(path), "--salvage"]) == 0
    output = capsys.readouterr()
    assert "f1                      1.0000" in output.out
    assert "takes the 1 whole article" in output.err


def test_gold_without_answers(tmp_path: Path) -> None:
    rows = lines(tmp_path / "gold.jsonl", {"id": "1", "question": "?", "context": "a"})
    with pytest.raises(UserError, match="it has no answers"):
        score_files("squad", rows, write(tmp_path / "p.json", {"1": "a"}))


# ------------------------------------------------------------------------------------- classification


def test_labels_by_order_and_by_id(tmp_path: Path) -> None:
    gold = tmp_path / "gold.tsv"
    gold.write_text("id\tlabel\na\t1\nb\t0\nc\t1\nd\t1\n")
    by_id = lines(
        tmp_path / "a.jsonl",
        *({"id": i, "predicted": label} for i, label in [("d", 1), ("c", 0), ("b", 0), ("a", 1)]),
    )
    figures = score_files("classification", gold, by_id, say=silent)
    by_order = tmp_path / "b.tsv"
    by_order.write_text("index\tprediction\n0\t1\n1\t0\n2\t0\n3\t1\n")
    assert score_files("classification", gold, by_order, say=silent) == figures
    assert figures["accuracy"] == figures["micro_f1"] == 0.75
    assert figures["f1"] == pytest.approx(0.8)  # 2 of 2 and of 3
    assert figures["macro_f1"] == pytest.approx((0.8 + 2 / 3) / 2)
    assert figures["matthews"] == pytest.approx(1 / 3**0.5)


def test_labels_that_are_missing_or_too_many(tmp_path: Path) -> None:
    gold = lines(tmp_path / "gold.jsonl", {"label": "x"}, {"label": "y"})
    with pytest.raises(UserError, match=r"has 2 rows and .* 1: without a column 'id'"):
        score_files("classification", gold, lines(tmp_path / "p.jsonl", {"label": "x"}))
    with pytest.raises(UserError, match=r"no column 'predicted' or .*, but 'class'"):
        score_files("classification", gold, lines(tmp_path / "p.jsonl", {"class": "x"}))
    with pytest.raises(UserError, match=r"no column 'topic'"):
        score_files("classification", gold, gold, label="topic")
    gold = lines(tmp_path / "gold.jsonl", {"id": 1, "label": "x"}, {"id": 2, "label": "y"})
    said: list[str] = []
    part = lines(tmp_path / "p.jsonl", {"id": 1, "label": "x"})
    assert score_files("classification", gold, part, say=said.append)["accuracy"] == 0.5
    assert said == [f"{part}: 1 of 2 rows have no prediction; each counts as wrong"]


# -------------------------------------------------------------------------------------------- command


def test_the_command(tmp_path: Path, gold: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "p.json", {"1": "cat", "3": "Paris"})
    assert main(["score", "squad", str(gold), str(path)]) == 0
    output = capsys.readouterr()
    assert "exact_match             1.0000\n" in output.out
    assert "1 of 3 questions have no prediction" in output.err
    assert main(["score", "squad", str(gold), str(path), "--json", "--chinese"]) == 0
    assert json.loads(capsys.readouterr().out)["f1"] == 1
    assert main(["score", "squad", str(gold), str(tmp_path / "none.json")]) == 2
    assert "none.json" in capsys.readouterr().err


# ------------------------------------------------------------------------------- tokens, and our own files

WORDS = [["Ada", "met", "Alan", "Turing"], ["Rome"]]
TRUE_TAGS = [["B-PER", "O", "B-PER", "I-PER"], ["B-LOC"]]
SAID_TAGS = [["B-PER", "O", "B-PER", "O"], ["B-LOC"]]


def conll(path: Path, tags: list[list[str]]) -> Path:
    sentences = [
        "".join(f"{word} {tag}\n" for word, tag in zip(*pair, strict=True))
        for pair in zip(WORDS, tags, strict=True)
    ]
    path.write_text("\n".join(sentences))
    return path


@pytest.mark.parametrize("form", ["conll", "lists", "ours"])
def test_tags_of_any_program(tmp_path: Path, form: str) -> None:
    gold = conll(tmp_path / "gold.txt", TRUE_TAGS)
    if form == "conll":
        said = conll(tmp_path / "said.txt", SAID_TAGS)
    elif form == "lists":
        said = lines(tmp_path / "said.jsonl", *({"tags": tags} for tags in SAID_TAGS))
    else:
        rows = [
            {"tokens": words, "tags": true, "prediction": {"tags": tags}}
            for words, true, tags in zip(WORDS, TRUE_TAGS, SAID_TAGS, strict=True)
        ]
        said = lines(tmp_path / "said.jsonl", *rows)
    figures = score_files("tokens", gold, said, say=silent)
    assert figures["entity_f1"] == pytest.approx(2 / 3)  # two of three, and three were said
    assert figures["token_accuracy"] == pytest.approx(4 / 5)


def test_tags_of_other_sentences(tmp_path: Path) -> None:
    gold = conll(tmp_path / "gold.txt", TRUE_TAGS)
    fewer = lines(tmp_path / "fewer.jsonl", {"tags": TRUE_TAGS[0]})
    with pytest.raises(UserError, match=r"has 2 sentences and .*fewer\.jsonl 1"):
        score_files("tokens", gold, fewer)
    short = lines(tmp_path / "short.jsonl", {"tags": ["O"]}, {"tags": ["O"]})
    with pytest.raises(UserError, match=r"short\.jsonl, line 1 has 1 tags, and .*gold\.txt, line 1 4 words"):
        score_files("tokens", gold, short)


def test_our_own_predictions(tmp_path: Path, gold: Path) -> None:
    answers = {"1": "big cat", "2": "", "3": "London"}
    rows = [{"id": i, "prediction": {"id": i, "answer": text}} for i, text in answers.items()]
    figures = score_files("squad", gold, lines(tmp_path / "predictions.jsonl", *rows), say=silent)
    assert figures["f1"] == pytest.approx(2 / 3)
    labels = lines(tmp_path / "gold.jsonl", {"label": "a"}, {"label": "b"})
    said = lines(
        tmp_path / "said.jsonl",
        {"label": "a", "prediction": {"label": "a"}},
        {"label": "b", "prediction": {"label": "a"}},
    )
    assert score_files("classification", labels, said, say=silent)["accuracy"] == 0.5
