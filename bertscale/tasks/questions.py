"""Answers that stand in a context: windows of tokens, the places of the answers, and the best spans.

A sample is `[CLS] question [SEP] window of the context [SEP]`; a context that is too long makes several,
which overlap. The context becomes tokens once, with the characters that each of them stands for, and windows
are cut out of these: so an answer is always characters of the text that was given.

N samples, T tokens of all of them, L tokens of the samples of one question.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from bertscale.config import UserError
from bertscale.config.examples import EncodingConfig
from bertscale.tasks.squad_scores import is_chinese, squad_scores
from bertscale.tasks.task import Floats, QuestionExample, Samples, Task, lay_out
from bertscale.tokenizer import Tokenizer

QUESTION_LENGTH = 64  # tokens, as in BERT
BATCH = 256  # contexts that become tokens at once


class QuestionTask(Task[QuestionExample]):
    """Questions with an answer in their context, or with none where `unanswerable`."""

    kind = "question_answering"

    def __init__(
        self,
        unanswerable: bool,
        *,
        answer_length: int = 30,
        answers: int = 20,
        threshold: float = 0.0,
        chinese: bool | None = None,
    ) -> None:
        """Makes the task of what a model knows of it.

        `answer_length` tokens are the longest answer, `answers` the number of those that are kept. There is
        no answer where "none" scores more than `threshold` above the best one. Figures go by `chinese`
        rules, by default where the right answers are mostly of Han characters.
        """
        self.labels: list[str] = []
        self.unanswerable = unanswerable
        self.answer_length = answer_length
        self.answers = answers
        self.threshold = threshold
        self.chinese = chinese

    @classmethod
    def of(cls, examples: Sequence[QuestionExample], encoding: EncodingConfig) -> QuestionTask:
        """Makes the task of training examples. Raises UserError if none of them has its answers."""
        known = [example for example in examples if example.known]
        if not known:
            raise UserError("no question has answers; give their column as data.answers")
        chinese = is_chinese([text for example in known for text, _ in example.answers])
        return cls(
            any(not example.answers for example in known),
            answer_length=encoding.answer_length,
            answers=encoding.answers,
            chinese=chinese,
        )

    def facts(self) -> dict[str, Any]:
        """Returns what `__init__` is given."""
        return {
            "unanswerable": self.unanswerable,
            "answer_length": self.answer_length,
            "answers": self.answers,
            "threshold": self.threshold,
            "chinese": self.chinese,
        }

    @property
    def outputs(self) -> int:
        """Two: the scores of a token as the begin and as the end of the answer."""
        return 2

    @property
    def metric(self) -> str:
        """F1, of words or, in Chinese, of characters."""
        return "f1"

    def encode(
        self, examples: Sequence[QuestionExample], tokenizer: Tokenizer, encoding: EncodingConfig
    ) -> Samples:
        """Makes the windows of each question. Raises UserError, with the place, where nothing is left.

        The target is the first answer, where a window has it as a whole; else, and where the answer is
        nothing but characters that the tokenizer drops, it is 0, 0.
        """
        sequences: list[tuple[Sequence[int], Sequence[int] | None]] = []
        example_of: list[int] = []
        targets: list[tuple[int, int]] = []
        spans: list[npt.NDArray[np.int32]] = []
        central: list[npt.NDArray[np.bool_]] = []
        cut = 0
        contexts = _encode_contexts(examples, tokenizer)
        questions = tokenizer.encode([tokenizer.normalize(example.question) for example in examples])
        for number, (example, question) in enumerate(zip(examples, questions, strict=True)):
            ids, places = contexts[example.context]
            for name, tokens in (("question", question), ("context", ids)):
                if not len(tokens):
                    raise UserError(f"{example.place}: the tokenizer leaves nothing of the {name}")
            kept = question[: min(QUESTION_LENGTH, (encoding.max_length - 3) // 2)]
            windows = cut_windows(len(ids), encoding.max_length - 3 - len(kept), encoding.overlap)
            if encoding.long_texts == "cut":
                windows = windows[:1]
            cut += len(kept) < len(question) or windows[-1][1] < len(ids)
            answer = find_answer(example, places)
            before = len(kept) + 2
            for (begin, end), best in zip(windows, most_context(windows), strict=True):
                sequences.append((kept, ids[begin:end]))
                example_of.append(number)
                inside = answer is not None and begin <= answer[0] and answer[1] < end
                shift = before - begin
                targets.append((answer[0] + shift, answer[1] + shift) if answer and inside else (0, 0))
                spans.append(np.pad(places[begin:end], ((before, 1), (0, 0)), constant_values=-1))
                central.append(np.pad(best, (before, 1)))
        known = all(example.known for example in examples)
        samples = lay_out(
            sequences,
            example_of,
            np.array(targets, np.int64).reshape(-1, 2) if known else None,
            tokenizer,
            cut=cut,
        )
        none = np.zeros((0, 2), np.int32), np.zeros(0, np.bool_)
        return replace(
            samples,
            spans=np.concatenate([none[0], *spans]),
            central=np.concatenate([none[1], *central]),
        )

    def predict(
        self, examples: Sequence[QuestionExample], samples: Samples, logits: Floats
    ) -> list[dict[str, Any]]:
        """Returns the best answers of each question, with their probabilities among those that are kept.

        An answer begins in the window that gives its first token the most context. `no_answer_score` is how
        much "no answer", the score of [CLS] in the window where it is least, is above the best answer.
        """
        assert samples.spans is not None
        assert samples.central is not None
        bounds = np.searchsorted(samples.example, np.arange(len(examples) + 1))  # [E + 1] samples
        predictions = []
        for example, first, behind in zip(examples, bounds[:-1], bounds[1:], strict=True):
            begin, end = samples.starts[first], samples.starts[behind]
            part = Window(
                scores=logits[begin:end].astype(np.float64),
                spans=samples.spans[begin:end],
                central=samples.central[begin:end],
                starts=samples.starts[first:behind] - begin,
            )
            predictions.append(self._answer(example, part))
        return predictions

    def _answer(self, example: QuestionExample, part: Window) -> dict[str, Any]:
        null = float(part.scores[part.starts].sum(1).min()) if len(part.starts) else 0.0
        best: dict[str, tuple[float, int, int]] = {}
        for score, begin, end in best_spans(part, self.answer_length, 2 * self.answers):
            best.setdefault(example.context[begin:end], (score, begin, end))
        kept = list(best.items())[: self.answers]
        no_answer = null - kept[0][1][0] if kept else 0.0
        if self.unanswerable:
            kept = sorted([*kept, ("", (null, 0, 0))], key=lambda item: -item[1][0])
        scores = np.array([score for _, (score, _, _) in kept])
        shares = np.exp(scores - scores.max()) if kept else scores
        nbest = [
            {"text": text, "start": begin, "end": end, "score": float(share)}
            for (text, (_, begin, end)), share in zip(kept, shares / shares.sum(), strict=True)
        ]
        none = {"text": "", "start": 0, "end": 0, "score": 0.0}
        if self.unanswerable and (no_answer > self.threshold or len(nbest) == 1):
            chosen = next(answer for answer in nbest if not answer["text"])
        else:
            chosen = next((answer for answer in nbest if answer["text"]), none)
        return {
            "id": example.identity,
            "answer": chosen["text"],
            "start": chosen["start"],
            "end": chosen["end"],
            "score": chosen["score"],
            "no_answer_score": no_answer,
            "nbest": nbest,
        }

    def score(
        self, examples: Sequence[QuestionExample], predictions: Sequence[dict[str, Any]]
    ) -> dict[str, float]:
        """Returns exact match and F1 by the rules of SQuAD, or of CMRC 2018 in Chinese."""
        return squad_scores(
            [[text for text, _ in example.answers] for example in examples],
            [prediction["answer"] for prediction in predictions],
            [prediction["no_answer_score"] for prediction in predictions] if self.unanswerable else None,
            answered=[best_text(prediction) for prediction in predictions],
            chinese=self.chinese,
        )

    def tuned(self, figures: dict[str, float]) -> QuestionTask:
        """Returns the task with the threshold for "no answer" that is best for F1 on dev."""
        if "best_threshold" not in figures:
            return self
        return QuestionTask(
            self.unanswerable,
            answer_length=self.answer_length,
            answers=self.answers,
            threshold=figures["best_threshold"],
            chinese=self.chinese,
        )


def best_text(prediction: dict[str, Any]) -> str:
    """Returns the best answer that is not "no answer"."""
    texts = (answer["text"] for answer in prediction.get("nbest", ()) if answer["text"])
    return next(texts, str(prediction["answer"]))


# ----------------------------------------------------------------------------------------- windows


def _encode_contexts(
    examples: Sequence[QuestionExample], tokenizer: Tokenizer
) -> dict[str, tuple[list[int], npt.NDArray[np.int32]]]:
    """The ids of each context and the characters that they stand for, [tokens, 2]."""
    texts = list(dict.fromkeys(example.context for example in examples))
    encoded: dict[str, tuple[list[int], npt.NDArray[np.int32]]] = {}
    for first in range(0, len(texts), BATCH):
        some = texts[first : first + BATCH]
        for text, (ids, spans) in zip(some, tokenizer.encode_with_offsets(some), strict=True):
            encoded[text] = ids, np.array(spans, np.int32).reshape(-1, 2)
    return encoded


def cut_windows(tokens: int, room: int, overlap: int) -> list[tuple[int, int]]:
    """Returns begin and end of each window of `room` tokens; neighbours share `overlap`, at most half."""
    step = room - min(overlap, room // 2)
    begins = range(0, max(tokens - room, 0) + step, step)
    return [(begin, min(begin + room, tokens)) for begin in begins]


def most_context(windows: Sequence[tuple[int, int]]) -> list[npt.NDArray[np.bool_]]:
    """Tells for each token of each window whether no other window gives it more context.

    Context is the lesser of the tokens before and behind it in the window; of equals a longer window is
    better, then the first: BERT's rule.
    """
    owner = np.zeros(windows[-1][1], np.int64)
    most = np.full(windows[-1][1], -1.0)
    for number, (begin, end) in enumerate(windows):
        place = np.arange(end - begin)
        context = np.minimum(place, place[::-1]) + 0.01 * (end - begin)
        better = context > most[begin:end]
        owner[begin:end][better] = number
        most[begin:end][better] = context[better]
    return [owner[begin:end] == number for number, (begin, end) in enumerate(windows)]


def find_answer(example: QuestionExample, places: npt.NDArray[np.int32]) -> tuple[int, int] | None:
    """Returns the first and the last token, at `places`, that have a character of the first answer."""
    if not example.answers:
        return None
    text, begin = example.answers[0]
    inside = np.flatnonzero(
        (places[:, 1] > begin) & (places[:, 0] < begin + len(text)) & (places[:, 1] > places[:, 0])
    )
    return (int(inside[0]), int(inside[-1])) if len(inside) else None


# -------------------------------------------------------------------------------------------- spans


@dataclass(frozen=True)
class Window:
    """The samples of one question, end to end."""

    scores: npt.NDArray[np.float64]  # [L, 2]
    spans: npt.NDArray[np.int32]  # [L, 2]
    central: npt.NDArray[np.bool_]  # [L]
    starts: npt.NDArray[np.int64]  # [samples] the [CLS] of each


def best_spans(part: Window, longest: int, count: int) -> list[tuple[float, int, int]]:
    """Returns score, first character and end of the best spans of at most `longest` tokens, best first."""
    length = len(part.scores)
    text = part.spans[:, 0] < part.spans[:, 1]  # [L] tokens of the context that stand for characters
    begins = np.where(text & part.central, part.scores[:, 0], -np.inf)
    ends = np.where(text, part.scores[:, 1], -np.inf)
    window = np.zeros(length, np.int64)
    window[part.starts[1:]] = 1
    window = np.cumsum(window)
    # One row for each number of tokens: row k has the spans from i to i + k.
    scores = np.full((min(longest, length), length), -np.inf)
    for k in range(len(scores)):
        same = window[k:] == window[: length - k]
        scores[k, : length - k] = np.where(same, begins[: length - k] + ends[k:], -np.inf)
    flat = scores.ravel()
    count = min(count, len(flat))
    chosen = np.argpartition(-flat, count - 1)[:count] if count else np.zeros(0, np.int64)
    chosen = chosen[np.lexsort((chosen, -flat[chosen]))]
    chosen = chosen[np.isfinite(flat[chosen])]
    sizes, firsts = np.divmod(chosen, max(length, 1))
    return [
        (float(flat[place]), int(part.spans[first, 0]), int(part.spans[first + size, 1]))
        for place, first, size in zip(chosen, firsts, sizes, strict=True)
    ]
