"""Windows over contexts, the places of answers in them, and the best spans of a model's scores."""

from __future__ import annotations

import os
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from bertscale.config import UserError
from bertscale.config.examples import EncodingConfig
from bertscale.tasks.questions import QuestionTask, best_spans, cut_windows, most_context
from bertscale.tasks.questions import Window as Part
from bertscale.tasks.task import QuestionExample, Samples
from bertscale.tokenizer import Tokenizer, load_tokenizer
from bertscale.tokenizer.base import SPECIAL

DATA = os.environ.get("BERTSCALE_DATA", "")
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,?\u4e00\u4e8c\u4e09"


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Words of one letter: a piece for each, and one that continues a word."""
    path = tmp_path_factory.mktemp("letters") / "vocab.txt"
    path.write_text("\n".join([*SPECIAL, *LETTERS, *(f"##{c}" for c in LETTERS), "1990"]) + "\n")
    return load_tokenizer(path)


def example(
    context: str, answer: str | None = None, start: int | None = None, **more: object
) -> QuestionExample:
    answers = () if answer is None else ((answer, context.index(answer) if start is None else start),)
    values = {"question": "q", "identity": "1", "place": "here", **more}
    return QuestionExample(context=context, answers=answers, **values)  # type: ignore[arg-type]


def encoding(**values: int | str) -> EncodingConfig:
    return EncodingConfig.model_validate(values)


def logits_for(
    samples: Samples, scores: dict[tuple[int, int], tuple[float, float]]
) -> npt.NDArray[np.float32]:
    """Scores of -5 but for those given: (sample, token of it) -> (begin, end)."""
    logits = np.full((len(samples.tokens), 2), -5.0, np.float32)
    for (sample, token), pair in scores.items():
        logits[samples.starts[sample] + token] = pair
    return logits


# ------------------------------------------------------------------------------------------- windows


@pytest.mark.parametrize("tokens", [1, 9, 10, 11, 17, 100])
@pytest.mark.parametrize("overlap", [0, 3, 5, 9])
def test_windows_cover_every_token_and_overlap(tokens: int, overlap: int) -> None:
    windows = cut_windows(tokens, 10, overlap)
    assert windows[0][0] == 0
    assert windows[-1][1] == tokens
    assert all(end - begin == 10 for begin, end in windows[:-1])
    assert all(before[1] - after[0] == min(overlap, 5) for before, after in pairwise(windows))
    assert len({end for _, end in windows}) == len(windows)  # none is inside another
    central = most_context(windows)
    times = np.zeros(tokens, np.int64)
    for (begin, end), best in zip(windows, central, strict=True):
        times[begin:end] += best
    assert (times == 1).all()


def test_a_token_belongs_to_the_window_with_the_most_context() -> None:
    """The rule of BERT's run_squad, written out for each token."""
    windows = cut_windows(25, 10, 4)
    for number, best in enumerate(most_context(windows)):
        for token in range(*windows[number]):
            context = [
                min(token - begin, end - 1 - token) + 0.01 * (end - begin) if begin <= token < end else -1
                for begin, end in windows
            ]
            assert best[token - windows[number][0]] == (int(np.argmax(context)) == number)


def test_samples_are_question_and_window(letters: Tokenizer) -> None:
    task = QuestionTask(False)
    samples = task.encode(
        [example("a b c d e f g h", "e f", question="x y")], letters, encoding(max_length=10, overlap=2)
    )
    pieces = [[letters.piece(i) for i in samples.tokens[a:b]] for a, b in pairwise(samples.starts)]
    assert pieces == [
        ["[CLS]", "x", "y", "[SEP]", "a", "b", "c", "d", "e", "[SEP]"],
        ["[CLS]", "x", "y", "[SEP]", "d", "e", "f", "g", "h", "[SEP]"],
    ]
    assert samples.second.tolist() == [4, 4]
    assert samples.example.tolist() == [0, 0]
    assert samples.targets is not None
    assert samples.targets.tolist() == [[0, 0], [5, 6]]  # the first has half of the answer only
    assert samples.spans is not None
    assert samples.spans[13:16].tolist() == [[-1, -1], [6, 7], [8, 9]]
    cut = task.encode(
        [example("a b c d e f g h", "e f", question="x y")],
        letters,
        encoding(max_length=10, long_texts="cut"),
    )
    assert (len(cut), cut.cut) == (1, 1)


def test_a_long_question_leaves_room(letters: Tokenizer) -> None:
    long = example("a b c", "b", question="q " * 100)
    samples = QuestionTask(False).encode([long], letters, encoding(max_length=20))
    assert (samples.second.tolist(), samples.cut) == ([10], 1)
    samples = QuestionTask(False).encode([long], letters, encoding(max_length=300))
    assert samples.second.tolist() == [66]


def test_questions_without_known_answers_have_no_targets(letters: Tokenizer) -> None:
    samples = QuestionTask(False).encode([example("a b", known=False)], letters, encoding())
    assert samples.targets is None


@pytest.mark.parametrize("blank", ["question", "context"])
def test_nothing_left_of_a_text_is_told_with_its_place(letters: Tokenizer, blank: str) -> None:
    values: dict[str, Any] = {"context": "a b", "question": "q", blank: "\u00ad"}
    with pytest.raises(UserError, match=f"here: the tokenizer leaves nothing of the {blank}"):
        QuestionTask(False).encode([example(**values)], letters, encoding())


def test_no_examples(letters: Tokenizer) -> None:
    samples = QuestionTask(True).encode([], letters, encoding())
    assert (len(samples), QuestionTask(True).predict([], samples, np.zeros((0, 2), np.float32))) == (0, [])


def test_the_task_is_told_by_its_examples() -> None:
    assert not QuestionTask.of([example("a", "a")], encoding()).unanswerable
    task = QuestionTask.of([example("a", "a"), example("b")], encoding(answers=3, answer_length=7))
    assert (task.unanswerable, task.answers, task.answer_length, task.chinese) == (True, 3, 7, False)
    assert QuestionTask.of([example("\u4e00\u4e8c", "\u4e8c")], encoding()).chinese
    with pytest.raises(UserError, match=r"data\.answers"):
        QuestionTask.of([example("a", known=False)], encoding())


# --------------------------------------------------------------------------------------------- spans


def slow_spans(part: Part, longest: int) -> list[tuple[float, int, int]]:
    """All spans, by three loops."""
    bounds = [*part.starts.tolist(), len(part.scores)]
    spans = []
    for begin, end in pairwise(bounds):
        for i in range(begin, end):
            for j in range(i, min(i + longest, end)):
                if part.central[i] and all(part.spans[k, 0] < part.spans[k, 1] for k in (i, j)):
                    spans.append(
                        (
                            float(part.scores[i, 0] + part.scores[j, 1]),
                            int(part.spans[i, 0]),
                            int(part.spans[j, 1]),
                        )
                    )
    return sorted(spans, reverse=True)


def test_the_best_spans_are_those_of_all() -> None:
    draw = np.random.default_rng(0)
    for longest in (1, 4, 40):
        length = 33
        begins = np.arange(length, dtype=np.int32)
        spans = np.stack([begins, begins + (draw.random(length) < 0.8)], 1)
        part = Part(draw.normal(size=(length, 2)), spans, draw.random(length) < 0.7, np.array([0, 9, 20]))
        assert best_spans(part, longest, 12) == slow_spans(part, longest)[:12]


def test_an_answer_is_characters_of_the_raw_context(letters: Tokenizer) -> None:
    """Capitals, accents, several spaces: as they stand there."""
    task = QuestionTask(False, answers=2)
    examples = [example("A  \u00c9b c", "\u00c9b")]
    samples = task.encode(examples, letters, encoding())
    assert samples.targets is not None
    [(first, last)] = samples.targets.tolist()
    [answer] = task.predict(examples, samples, logits_for(samples, {(0, first): (3, 0), (0, last): (0, 3)}))
    assert (answer["answer"], answer["start"], answer["end"]) == ("\u00c9b", 3, 5)
    assert answer["id"] == "1"
    assert len(answer["nbest"]) == 2
    assert sum(one["score"] for one in answer["nbest"]) == pytest.approx(1)
    assert answer["score"] == answer["nbest"][0]["score"] > 0.9


def test_the_same_text_twice_is_one_answer(letters: Tokenizer) -> None:
    task = QuestionTask(False)
    examples = [example("a b a", "a")]
    samples = task.encode(examples, letters, encoding(answer_length=1))
    logits = logits_for(samples, {(0, 3): (1, 1), (0, 5): (2, 2)})
    [answer] = task.predict(examples, samples, logits)
    texts = [one["text"] for one in answer["nbest"]]
    assert (answer["answer"], answer["start"]) == ("a", 4)
    assert len(texts) == len(set(texts))


def test_a_span_is_taken_where_its_begin_has_most_context(letters: Tokenizer) -> None:
    task = QuestionTask(False)
    examples = [example("a b c d e f g", "e")]
    samples = task.encode(examples, letters, encoding(max_length=9, overlap=2))  # a-e, d-g
    # e is the last of the first window and the second of the other one.
    [answer] = task.predict(examples, samples, logits_for(samples, {(0, 7): (9, 1), (1, 4): (1, 1)}))
    assert (answer["answer"], answer["no_answer_score"]) == ("e", -10 - 2)


def test_no_answer_wins_only_where_the_task_has_such_questions(letters: Tokenizer) -> None:
    examples = [example("a b c")]
    samples = QuestionTask(True).encode(examples, letters, encoding())
    logits = logits_for(samples, {(0, 0): (2, 2), (0, 4): (1, 1)})
    [answer] = QuestionTask(True).predict(examples, samples, logits)
    assert (answer["answer"], answer["start"], answer["end"]) == ("", 0, 0)
    assert answer["no_answer_score"] == pytest.approx(2)
    assert answer["nbest"][0]["text"] == ""
    assert answer["score"] == pytest.approx(1 / (1 + np.exp(-2)), abs=1e-2)
    [answer] = QuestionTask(True, threshold=2.5).predict(examples, samples, logits)
    assert answer["answer"] == "b"
    [answer] = QuestionTask(False).predict(examples, samples, logits)
    assert (answer["answer"], answer["no_answer_score"]) == ("b", pytest.approx(2))
    assert all(one["text"] for one in answer["nbest"])


def test_no_answer_scores_what_its_least_window_says(letters: Tokenizer) -> None:
    examples = [example("a b c d e f g")]
    task = QuestionTask(True)
    samples = task.encode(examples, letters, encoding(max_length=9, overlap=2))
    logits = logits_for(samples, {(0, 0): (4, 4), (1, 0): (1, 1), (1, 5): (2, 2)})
    [answer] = task.predict(examples, samples, logits)
    assert (answer["answer"], answer["no_answer_score"]) == ("f", pytest.approx(-2))


def test_figures_with_a_threshold(letters: Tokenizer) -> None:
    task = QuestionTask(True)
    examples = [example("a b c", "b"), example("a b c")]
    samples = task.encode(examples, letters, encoding())
    assert samples.targets is not None
    logits = logits_for(samples, {(0, 0): (3, 3), (0, 4): (2, 2), (1, 0): (4, 4), (1, 4): (2, 2)})
    predictions = task.predict(examples, samples, logits)
    figures = task.score(examples, predictions)
    assert (figures["exact_match"], figures["no_answer_f1"], figures["has_answer_f1"]) == (0.5, 1, 0)
    assert figures["best_f1"] == 1.0
    assert figures["best_threshold"] == pytest.approx(2)
    better = QuestionTask(True, threshold=figures["best_threshold"])
    assert better.score(examples, better.predict(examples, samples, logits))["f1"] == 1.0
