"""The task multiple_choice: which of several options fits a text.

Each option is a sample of its own, `[CLS] text [SEP] option [SEP]`, with one logit; the text is cut where
they are too long. An example is learnt by the softmax over its samples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from bertscale.config import UserError
from bertscale.config.examples import EncodingConfig, TaskKind
from bertscale.tasks.task import ChoiceExample, Floats, Samples, Task, lay_out
from bertscale.tasks.texts import encode_texts
from bertscale.tokenizer import Tokenizer


class ChoiceTask(Task[ChoiceExample]):
    """The right one of several options; examples may differ in how many they have."""

    kind: ClassVar[TaskKind] = "multiple_choice"

    def __init__(self) -> None:
        self.labels: list[str] = []

    @property
    def outputs(self) -> int:
        return 1

    @property
    def metric(self) -> str:
        return "accuracy"

    def encode(
        self, examples: Sequence[ChoiceExample], tokenizer: Tokenizer, encoding: EncodingConfig
    ) -> Samples:
        parts = encode_texts([[example.text, *example.options] for example in examples], tokenizer)
        sequences: list[tuple[Sequence[int], Sequence[int] | None]] = []
        numbers: list[int] = []
        cut = 0
        room = encoding.max_length - 3
        for number, (example, (text, *options)) in enumerate(zip(examples, parts, strict=True)):
            if not text or not all(options):
                raise UserError(f"{example.place}: a text or an option of which the tokenizer leaves nothing")
            for option in options:
                kept = option[: max(room - len(text), room - room // 2)]  # half of the room is for the text
                sequences.append((text[: room - len(kept)], kept))
            numbers += [number] * len(options)
            cut += len(text) + max(map(len, options)) > room
        targets = None
        if all(example.target is not None for example in examples):
            targets = np.array([example.target for example in examples], np.int64)
        return lay_out(sequences, numbers, targets, tokenizer, cut=cut)

    def predict(
        self, examples: Sequence[ChoiceExample], samples: Samples, logits: Floats
    ) -> list[dict[str, Any]]:
        begins = np.flatnonzero(np.diff(samples.example, prepend=-1))
        predictions = []
        for scores in np.split(logits[:, 0].astype(np.float64), begins[1:]):
            powers = np.exp(scores - scores.max())
            probabilities = (powers / powers.sum()).tolist()
            predictions.append({"choice": int(scores.argmax()), "probabilities": probabilities})
        return predictions

    def score(
        self, examples: Sequence[ChoiceExample], predictions: Sequence[dict[str, Any]]
    ) -> dict[str, float]:
        right = [
            example.target == prediction["choice"]
            for example, prediction in zip(examples, predictions, strict=True)
        ]
        return {"accuracy": float(np.mean(right))}

    def label_counts(self, examples: Sequence[ChoiceExample]) -> dict[str, int]:
        counts = Counter(example.target for example in examples)
        most = max(len(example.options) for example in examples)
        return {str(number): counts[number] for number in range(most)}

    def majority(self, train: Sequence[ChoiceExample], examples: Sequence[ChoiceExample]) -> dict[str, float]:
        """Returns the figures of the place that is most often right in `train`, taken in all `examples`."""
        counts = self.label_counts(train)
        usual = {"choice": int(max(counts, key=counts.__getitem__))}
        return self.score(examples, [usual] * len(examples))
