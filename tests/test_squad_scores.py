"""Exact match and F1 of answers, as SQuAD's and CMRC 2018's scripts count them."""

from __future__ import annotations

import random
import re
import string
from collections import Counter

import numpy as np
import pytest

from bertscale.tasks.squad_scores import (
    best_threshold,
    f1_chinese,
    f1_english,
    is_chinese,
    normalize_answer,
    segment_chinese,
    squad_scores,
)

WORDS = ["the", "Cat", "cat,", "a", "an", "sat", "on", "it's", "U.S.", "1990", "!", "mat"]


def plain_scores(gold: list[str], predicted: str) -> tuple[float, float]:
    """The two figures of one question, written a second time, word by word as the script of v2.0 does it."""

    def clean(text: str) -> list[str]:
        kept = "".join(letter for letter in text.lower() if letter not in set(string.punctuation))
        return [word for word in re.split(r"\s+", re.sub(r"\b(a|an|the)\b", " ", kept)) if word]

    exact, f1 = 0.0, 0.0
    for answer in [answer for answer in gold if clean(answer)] or [""]:
        left, right = clean(answer), clean(predicted)
        exact = max(exact, float(left == right))
        common = sum((Counter(left) & Counter(right)).values())
        if not left or not right:
            f1 = max(f1, float(left == right))
        elif common:
            precision, recall = common / len(right), common / len(left)
            f1 = max(f1, 2 * precision * recall / (precision + recall))
    return exact, f1


def test_answers_of_random_words_score_as_in_the_script() -> None:
    draw = random.Random(0)
    gold = [
        [" ".join(draw.choices(WORDS, k=draw.randint(1, 4))) for _ in range(draw.randint(0, 3))]
        for _ in "x" * 500
    ]
    predicted = [" ".join(draw.choices(WORDS, k=draw.randint(0, 4))) for _ in gold]
    expected = np.array([plain_scores(answers, text) for answers, text in zip(gold, predicted, strict=True)])
    got = squad_scores(gold, predicted, chinese=False)
    assert got["exact_match"] == pytest.approx(expected[:, 0].mean())
    assert got["f1"] == pytest.approx(expected[:, 1].mean())
    has = np.array([bool(answers) for answers in gold])
    assert got["has_answer_f1"] == pytest.approx(expected[has, 1].mean())
    assert got["no_answer_exact_match"] == pytest.approx(expected[~has, 0].mean())
    assert 0 < got["has_answer_f1"] < 1


@pytest.mark.parametrize(
    ("gold", "predicted", "exact", "f1"),
    [
        (["Denver Broncos", "The Denver Broncos"], "denver broncos!", 1, 1),  # case, punctuation, article
        (["Denver Broncos"], "Broncos", 0, 2 / 3),
        (["Santa Clara", "Levi's Stadium"], "levis  stadium", 1, 1),  # the best of several
        (["1990s"], "", 0, 0),  # nothing predicted
        ([], "", 1, 1),  # unanswerable, and told so
        ([], "Paris", 0, 0),
        ([], "the", 1, 1),  # nothing but an article is nothing
        (["the", "Paris"], "Paris", 1, 1),
        (["a a b"], "b b a", 0, 2 / 3),  # articles do not count, and b only once
        (["well-known"], "well known", 0, 0),  # punctuation leaves no space
    ],
)
def test_published_edge_cases(gold: list[str], predicted: str, exact: float, f1: float) -> None:
    figures = squad_scores([gold], [predicted], chinese=False)
    assert figures["exact_match"] == exact
    assert figures["f1"] == pytest.approx(f1)


def test_answers_are_normalised() -> None:
    assert normalize_answer(" The  U.S.A., an Analysis of a theory ") == "usa analysis of theory"
    assert f1_english("one two three", "two three four") == pytest.approx(2 / 3)


def test_parts_come_only_where_some_questions_have_no_answer() -> None:
    assert set(squad_scores([["x"]], ["x"])) == {"exact_match", "f1"}
    assert set(squad_scores([["x"], []], ["x", ""])) == {
        *("exact_match", "f1", "has_answer_exact_match", "has_answer_f1"),
        *("no_answer_exact_match", "no_answer_f1"),
    }
    assert squad_scores([], []) == {"exact_match": 0.0, "f1": 0.0}


# ------------------------------------------------------------------------------------------ threshold


def slow_threshold(
    scores: list[float], has: list[bool], silent: list[bool], null: list[float]
) -> tuple[float, float]:
    """Every threshold tried: the mean score if all above it are unanswered."""
    best, at = float(sum(not h for h in has)), 0.0
    for threshold in sorted(null):
        total = 0.0
        for score, answerable, empty, value in zip(scores, has, silent, null, strict=True):
            if value > threshold:
                total += not answerable
            else:
                total += score if answerable else float(empty)
        if total > best + 1e-12:
            best, at = total, threshold
    return best / len(scores), at


def test_the_best_threshold_is_found() -> None:
    draw = np.random.default_rng(0)
    for _ in range(50):
        scores, has = draw.random(20), draw.random(20) < 0.6
        silent, null = draw.random(20) < 0.2, draw.normal(size=20) + ~has
        scores = np.where(silent & has, 0.0, scores)
        expected = slow_threshold(scores.tolist(), has.tolist(), silent.tolist(), null.tolist())
        assert best_threshold(scores, has, silent, null) == pytest.approx(expected)


def test_a_threshold_of_exact_match_and_one_of_f1() -> None:
    gold, predicted = [["big cat"], ["dog"], [], []], ["cat", "dog", "fish", "bird"]
    figures = squad_scores(gold, predicted, [0.3, 0.1, 0.4, 0.2])
    assert figures["exact_match"] == 0.25
    assert (figures["best_exact_match"], figures["best_exact_match_threshold"]) == (0.75, 0.1)
    assert (figures["best_f1"], figures["best_threshold"]) == (0.75, 0.1)
    all_unanswered = squad_scores([[], []], ["x", "y"], [1.0, 2.0])
    assert (all_unanswered["best_f1"], all_unanswered["best_threshold"]) == (1.0, 0.0)


# -------------------------------------------------------------------------------------------- Chinese


def test_chinese_is_told_by_the_letters_of_the_answers() -> None:
    assert is_chinese(["1786年2月2日", "美國"])
    assert not is_chinese(["Tang 唐 dynasty", "1990"])
    assert not is_chinese([])
    assert not is_chinese(["1990", "50%"])


def test_chinese_is_cut_into_characters_and_words() -> None:
    assert segment_chinese("《紅樓夢》 by Cao, 1,000頁。") == [
        "紅",
        "樓",
        "夢",
        "by",
        "cao",
        ",",
        "1,000",
        "頁",
    ]


@pytest.mark.parametrize(
    ("gold", "predicted", "exact", "f1"),
    [
        ("美國", "美國", 1, 1),
        ("「美國」", "美 國。", 1, 1),  # punctuation and spaces count for nothing
        ("1786年2月2日", "2月2日", 0, 0.8),  # 4 of 4 and of 6
        ("北京大學", "大學北京", 0, 0.5),  # the longest run that both have
        ("北京", "", 0, 0),
        ("北京", "上海", 0, 0),
        ("Apple公司", "apple 公司", 1, 1),
    ],
)
def test_chinese_answers(gold: str, predicted: str, exact: float, f1: float) -> None:
    figures = squad_scores([[gold, "完全不同"]], [predicted], chinese=True)
    assert figures["exact_match"] == exact
    assert figures["f1"] == pytest.approx(f1)


def test_chinese_without_an_answer() -> None:
    assert f1_chinese("", "") == 1.0
    assert squad_scores([[], ["北京"]], ["", "北京"])["f1"] == 1.0


def test_the_rules_can_be_given() -> None:
    assert squad_scores([["北京大學"]], ["北京"])["f1"] == pytest.approx(2 / 3)
    assert squad_scores([["北京大學"]], ["北京"], chinese=False)["f1"] == 0.0
