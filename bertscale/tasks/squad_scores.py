"""Exact match and F1 of answers, by the rules of SQuAD v2.0's own script, and by CMRC 2018's in Chinese.

    squad_scores([["the cat"], []], ["cat", ""])["f1"]      # 1.0; [] is "no answer"

SQuAD v1.1's script has the same rules, but for answers that are nothing but articles and punctuation. CMRC
cuts Latin script by NLTK's rules; here it is cut into words and marks, which differs for "don't". White space
inside a Chinese answer counts for nothing.

Cui et al., "A Span-Extraction Dataset for Chinese Machine Reading Comprehension", 2019,
https://arxiv.org/abs/1810.07366
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from bertscale.tokenizer import han_or_kana

_articles = re.compile(r"\b(a|an|the)\b")
_no_punctuation = str.maketrans("", "", string.punctuation)
# What CMRC's script takes for punctuation, and for a Han character.
_no_marks = str.maketrans("", "", "-:_*^/\\~`+=，。：？！“”；’《》·、「」（）－～『』")
_han = re.compile("([\u4e00-\u9fa5])")
_words_and_marks = re.compile(r"\w+(?:[.,]\w+)*|[^\w\s]")

Measure = Callable[[str, str], float]
Figures = npt.NDArray[np.float64]  # of each question


def squad_scores(
    gold: Sequence[Sequence[str]],
    predicted: Sequence[str],
    no_answer: Sequence[float] | None = None,
    *,
    answered: Sequence[str] | None = None,
    chinese: bool | None = None,
) -> dict[str, float]:
    """Returns the figures of the predicted answers, each between 0 and 1; "" predicts that there is none.

    `gold` has all right answers of each question, or none. `no_answer` tells how likely it is that there is
    no answer, on any scale: with it come the best figures that a threshold on it could reach with the
    answers `answered` (by default `predicted`), and that threshold; `best_threshold` is the one of F1.
    """
    if chinese is None:
        chinese = is_chinese([text for answers in gold for text in answers])
    has_answer = np.array([bool(answers) for answers in gold], np.bool_)
    exact, f1 = _both(gold, predicted, chinese)
    figures = {"exact_match": _mean(exact), "f1": _mean(f1)}
    if not has_answer.all():
        for name, part in (("has_answer", has_answer), ("no_answer", ~has_answer)):
            if part.any():
                figures |= {f"{name}_exact_match": _mean(exact[part]), f"{name}_f1": _mean(f1[part])}
    if no_answer is not None and len(gold):
        answered = predicted if answered is None else answered
        reachable = _both(gold, answered, chinese)
        silent = np.array([not text for text in answered], np.bool_)
        for name, scores in zip(("exact_match", "f1"), reachable, strict=True):
            best, threshold = best_threshold(scores, has_answer, silent, np.asarray(no_answer, np.float64))
            figures |= {f"best_{name}": best, f"best_{name}_threshold": threshold}
        figures["best_threshold"] = figures.pop("best_f1_threshold")
    return figures


def best_threshold(
    scores: Figures,
    has_answer: npt.NDArray[np.bool_],
    silent: npt.NDArray[np.bool_],
    no_answer: Figures,
) -> tuple[float, float]:
    """Returns the best mean score if questions with `no_answer` above a threshold stay unanswered, and it.

    As SQuAD's script finds it: from no question answered on, one more at a time, the least `no_answer`
    first. `silent` are questions that have no answer predicted anyway. The threshold is 0 if all should stay
    unanswered.
    """
    gains = np.where(has_answer, scores, np.where(silent, 0.0, -1.0))
    order = np.argsort(no_answer, kind="stable")
    sums = np.append(0.0, np.cumsum(gains[order]))
    best = int(np.argmax(sums))
    threshold = float(no_answer[order[best - 1]]) if best else 0.0
    return float((~has_answer).sum() + sums[best]) / len(scores), threshold


def is_chinese(answers: Sequence[str]) -> bool:
    """Whether most letters of the answers are Han or Kana, which are written without spaces."""
    letters = [character for text in answers for character in text if character.isalpha()]
    return sum(bool(han_or_kana.match(character)) for character in letters) * 2 > len(letters)


def _both(gold: Sequence[Sequence[str]], predicted: Sequence[str], chinese: bool) -> tuple[Figures, Figures]:
    """Exact match and F1 of each question, the greatest over its right answers."""
    exact, f1 = np.zeros(len(gold)), np.zeros(len(gold))
    tokens = _tokens(chinese)
    same: Measure = _same_chinese if chinese else _same
    overlap: Measure = f1_chinese if chinese else f1_english
    for i, (answers, text) in enumerate(zip(gold, predicted, strict=True)):
        right = [answer for answer in answers if tokens(answer)] or [""]
        exact[i] = max(same(answer, text) for answer in right)
        f1[i] = max(overlap(answer, text) for answer in right)
    return exact, f1


def _tokens(chinese: bool) -> Callable[[str], list[str]]:
    return segment_chinese if chinese else lambda text: normalize_answer(text).split()


def _mean(values: Figures) -> float:
    return float(values.mean()) if len(values) else 0.0


# ------------------------------------------------------------------------------------------- English


def normalize_answer(text: str) -> str:
    """Returns `text` in lower case, without ASCII punctuation and articles, with single spaces."""
    return " ".join(_articles.sub(" ", text.lower().translate(_no_punctuation)).split())


def _same(gold: str, predicted: str) -> float:
    return float(normalize_answer(gold) == normalize_answer(predicted))


def f1_english(gold: str, predicted: str) -> float:
    """Returns F1 over the words of two answers; where one has none, 1 if both have none."""
    right, given = normalize_answer(gold).split(), normalize_answer(predicted).split()
    if not right or not given:
        return float(right == given)
    return _f1((Counter(right) & Counter(given)).total(), len(right), len(given))


def _f1(common: int, right: int, given: int) -> float:
    return 2 * common / (right + given)  # the harmonic mean of common / given and common / right


# ------------------------------------------------------------------------------------------- Chinese


def segment_chinese(text: str) -> list[str]:
    """Returns each Han character of `text`, in lower case, and what is between them as words; no marks."""
    segments: list[str] = []
    for part in _han.split(text.lower().translate(_no_marks)):
        segments += [part] if _han.fullmatch(part) else _words_and_marks.findall(part)
    return segments


def _same_chinese(gold: str, predicted: str) -> float:
    return float(_letters(gold) == _letters(predicted))


def _letters(text: str) -> str:
    return "".join(text.lower().translate(_no_marks).split())


def f1_chinese(gold: str, predicted: str) -> float:
    """Returns F1 over the longest run of segments that two answers have in common, as CMRC 2018 counts it."""
    right, given = segment_chinese(gold), segment_chinese(predicted)
    if not right or not given:
        return float(right == given)
    return _f1(_longest_run(right, given), len(right), len(given))


def _longest_run(left: list[str], right: list[str]) -> int:
    longest, before = 0, [0] * (len(right) + 1)
    for one in left:
        now = [0]
        for other, length in zip(right, before, strict=False):
            now.append(length + 1 if one == other else 0)
        longest, before = max(longest, *now), now
    return longest
