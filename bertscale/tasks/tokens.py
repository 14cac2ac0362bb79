"""Tags of words (names, parts of speech): targets of pieces, and the tags and entities that logits say.

    task = TokenTask.of(examples, data, encoding)
    samples = task.encode(examples, tokenizer, encoding)
    predictions = task.predict(examples, samples, logits)

The text is encoded as running text, and pieces find their words by the characters that they stand for:

- A piece belongs to the first word of which it has a character. The first piece of a word has its tag as the
  target, the others have none, as in transformers' examples of token classification.
- A word without a piece of its own, since one that began in a word before it covers its first character, goes
  with that word: it is inside of the same entity, or outside.
- A word that is no text to the tokenizer, such as a control character, has no target. It is "O", or inside of
  an entity that goes on behind it.

Gold tags are read by the lenient rule of `tags` and written in the scheme that the model learns: files in
IOB1 or BILOU need no setting, and tags that break their scheme become ones that do not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np

from bertscale.config import UserError
from bertscale.config.examples import EncodingConfig, ExamplesConfig, TaskKind
from bertscale.tasks.entity_scores import Rows, entity_scores, table_of_labels
from bertscale.tasks.tags import (
    OUTSIDE,
    Scheme,
    entities_of,
    find_scheme,
    inside_of,
    is_iob1,
    is_tag,
    spread,
    tags_of,
    tags_of_labels,
)
from bertscale.tasks.task import NO_TARGET, Floats, Ints, Samples, Task, TokenExample, lay_out
from bertscale.tasks.windows import cut_windows, most_context
from bertscale.tasks.words import Ranges, entities_of_pieces, words_of_pieces
from bertscale.tokenizer import Tokenizer

Predictions = Sequence[dict[str, Any]]
BATCH = 1000  # texts that are encoded at a time


class TokenTask(Task[TokenExample]):
    """Tags of words; its labels are all tags that it can give, "O" first if it finds entities."""

    kind: ClassVar[TaskKind] = "tokens"

    def __init__(self, labels: Sequence[str], scheme: Scheme | None = None) -> None:
        """Makes the task of a model with these labels; their scheme is found if none is given."""
        self.labels = list(labels)
        self.scheme: Scheme = scheme or find_scheme(labels)
        self._numbers = {label: number for number, label in enumerate(self.labels)}
        self._outside = OUTSIDE if OUTSIDE in self._numbers else self.labels[0]

    @classmethod
    def of(
        cls,
        examples: Sequence[TokenExample],
        data: ExamplesConfig,
        encoding: EncodingConfig,
    ) -> TokenTask:
        """Finds the tags of training examples, all those that their labels can have in their scheme.

        `data.labels`, where given, are the tags in order, or the labels of entities. Raises UserError if
        examples have no tags, or those of no scheme.
        """
        for example in examples:
            if example.tags is None:
                raise UserError(f"{example.place}: no tags; set data.tags to their column")
        counts = Counter(tag for example in examples for tag in example.tags or ())
        if not set(counts) - {OUTSIDE}:
            raise UserError(f"all {counts.total():,} words of the training examples have the tag {OUTSIDE!r}")
        labels = data.labels
        scheme = find_scheme(counts) if encoding.tag_scheme == "auto" else encoding.tag_scheme
        if labels is not None and (scheme == "none" or all(map(is_tag, labels))):
            return cls(labels, scheme)
        if labels is None and scheme == "none":
            labels = sorted(counts)
        elif labels is None:
            labels = sorted({label for tag in counts for _, _, label in entities_of([tag])})
        return cls(tags_of_labels(labels, scheme), scheme)

    def note(self, examples: Sequence[TokenExample]) -> str:
        """Says in a line what the tags of the training examples are, and what is learnt of them."""
        tags = [example.tags or () for example in examples]
        if self.scheme == "none":
            return f"tags are classes of words, {self.outputs} of them"
        found: str = find_scheme(tag for some in tags for tag in some)
        if found == "bio" and is_iob1(tags):
            found = "iob1 (B only between entities of one label)"
        learnt = "" if found == self.scheme else f", and are learnt as {self.scheme}"
        return f"tags are in the scheme {found}{learnt}: {self.outputs} tags"

    @property
    def outputs(self) -> int:
        return len(self.labels)

    @property
    def metric(self) -> str:
        return "token_accuracy" if self.scheme == "none" else "entity_f1"

    def facts(self) -> dict[str, Any]:
        return {"scheme": self.scheme}

    def gold(self, example: TokenExample) -> list[str]:
        """The tags of an example in the scheme of the task."""
        assert example.tags is not None
        if self.scheme == "none":
            return list(example.tags)
        return tags_of(entities_of(example.tags), len(example.words), self.scheme)

    # -------------------------------------------------------------------------------------- samples

    def encode(
        self, examples: Sequence[TokenExample], tokenizer: Tokenizer, encoding: EncodingConfig
    ) -> Samples:
        """Makes a sample of each text, or of each window of a long one. Raises UserError, with the place, for
        a text that leaves no token, or a tag that the task does not have."""
        room = encoding.max_length - 2
        known = all(example.tags is not None for example in examples)
        sequences: list[tuple[Sequence[int], None]] = []
        owners: list[int] = []  # [N] example
        words: list[Ints] = []
        targets: list[Ints] = []
        cut = 0
        for number, (example, ids, spans) in enumerate(_encode_texts(examples, tokenizer)):
            ranges = words_of_pieces(example.words, spans)
            of_pieces = np.zeros((len(ids), 2), np.int64)
            target = np.full(len(ids), NO_TARGET)
            for piece, first, end in ranges:
                of_pieces[piece] = first, end
            if known and ranges:
                target[[piece for piece, _, _ in ranges]] = self._targets(example, ranges)
            windows = cut_windows(len(ids), room, encoding.overlap)
            if encoding.long_texts == "cut":
                cut += len(windows) > 1
                windows = [(0, min(room, len(ids)))]
            for (begin, end), best in zip(windows, most_context(windows), strict=True):
                sequences.append((ids[begin:end], None))
                owners.append(number)
                # One more at both ends, for [CLS] and [SEP].
                words.append(np.pad(of_pieces[begin:end] * best[:, None], ((1, 1), (0, 0))))
                masked = np.where(best, target[begin:end], NO_TARGET)
                targets.append(np.pad(masked, 1, constant_values=NO_TARGET))
        empty: list[Ints] = [np.zeros(0, np.int64)]
        return lay_out(
            sequences,
            owners,
            np.concatenate(empty + targets) if known else None,
            tokenizer,
            cut=cut,
            words=np.concatenate([np.zeros((0, 2), np.int64), *words]),
        )

    def _targets(self, example: TokenExample, ranges: Ranges) -> list[int]:
        """The numbers of the tags of pieces, each of one word or more."""
        assert example.tags is not None
        if self.scheme == "none":
            tags = [example.tags[first] for _, first, _ in ranges]
        else:
            tags = tags_of(entities_of_pieces(entities_of(example.tags), ranges), len(ranges), self.scheme)
        for tag in tags:
            if tag not in self._numbers:
                raise UserError(
                    f"{example.place}: the tag {tag!r} is none of {', '.join(self.labels)}; "
                    "the training examples have none of it"
                )
        return [self._numbers[tag] for tag in tags]

    # ---------------------------------------------------------------------------------- predictions

    def predict(
        self, examples: Sequence[TokenExample], samples: Samples, logits: Floats
    ) -> list[dict[str, Any]]:
        """Returns the tags and entities of each text: {"entities": [{"start", "end", "label", "text",
        "score"}], "tags", "words"}. A score is the mean probability of the tags of an entity's words."""
        assert samples.words is not None
        tokens = np.flatnonzero(samples.words[:, 0] < samples.words[:, 1])
        example_of = np.repeat(samples.example, samples.lengths)[tokens]
        order = np.lexsort((samples.words[tokens, 0], example_of))
        tokens, example_of = tokens[order], example_of[order]
        scores = logits[tokens].astype(np.float64)
        best = scores.argmax(1) if len(tokens) else np.zeros(0, np.int64)
        shares = np.exp(scores - scores.max(1, keepdims=True)) if len(tokens) else scores
        probabilities = 1 / shares.sum(1)  # of the best one, whose share is 1
        edges = np.searchsorted(example_of, np.arange(len(examples) + 1))
        predictions = []
        for example, begin, end in zip(examples, edges[:-1], edges[1:], strict=True):
            of_words = samples.words[tokens[begin:end]].tolist()
            found = zip(of_words, best[begin:end].tolist(), probabilities[begin:end].tolist(), strict=True)
            predictions.append(self._prediction(example, [(*w, self.labels[b], p) for w, b, p in found]))
        return predictions

    def _prediction(
        self, example: TokenExample, answers: Sequence[tuple[int, int, str, float]]
    ) -> dict[str, Any]:
        """Makes the prediction of what pieces say of words, from the first to the one before the end."""
        tags: list[str | None] = [None] * len(example.words)
        probabilities: list[float | None] = [None] * len(example.words)
        for first, end, tag, probability in answers:
            tags[first:end] = spread(tag, end - first, self.scheme)
            probabilities[first:end] = [probability] * (end - first)
        behind = [OUTSIDE] * len(tags)  # of each word, the tag of the next one that has any
        for i in reversed(range(len(tags) - 1)):
            behind[i] = tags[i + 1] or behind[i + 1]
        whole: list[str] = []
        for own, other in zip(tags, behind, strict=True):
            inside = inside_of(whole[-1] if whole else OUTSIDE, other, self.scheme)
            whole.append(own or (self._outside if inside == OUTSIDE else inside))
        entities = []
        for first, end, label in entities_of(whole) if self.scheme != "none" else []:
            start, stop = example.words[first][0], example.words[end - 1][1]
            known = [p for p in probabilities[first:end] if p is not None]
            entities.append(
                {
                    "start": start,
                    "end": stop,
                    "label": label,
                    "text": example.text[start:stop],
                    "score": sum(known) / max(len(known), 1),
                }
            )
        words = [example.text[start:end] for start, end in example.words]
        return {"entities": entities, "tags": whole, "words": words}

    # -------------------------------------------------------------------------------------- figures

    def score(self, examples: Sequence[TokenExample], predictions: Predictions) -> dict[str, float]:
        gold, predicted = self._pairs(examples, predictions)
        return entity_scores(gold, predicted, self.scheme)

    def per_label(self, examples: Sequence[TokenExample], predictions: Predictions) -> Rows:
        """Returns a row for each label of entities, or class: label, precision, recall, f1, support."""
        gold, predicted = self._pairs(examples, predictions)
        return table_of_labels(gold, predicted, self.scheme)

    def confusion(
        self, examples: Sequence[TokenExample], predictions: Predictions
    ) -> tuple[list[str], Ints] | None:
        """Returns the classes of words, and how many words of each were taken for each; None for entities."""
        if self.scheme != "none":
            return None
        counts = np.zeros((len(self.labels), len(self.labels)), np.int64)
        for gold, said in zip(*self._pairs(examples, predictions), strict=True):
            for right, given in zip(gold, said, strict=True):
                if right in self._numbers:  # else it is a tag that the training examples do not have
                    counts[self._numbers[right], self._numbers[given]] += 1
        return self.labels, counts

    def label_counts(self, examples: Sequence[TokenExample]) -> dict[str, int]:
        """Counts the entities of each label, or the words of each class, of all that the task has."""
        if self.scheme == "none":
            counts = Counter(tag for example in examples for tag in self.gold(example))
            return {label: counts[label] for label in self.labels}
        counts = Counter(label for example in examples for _, _, label in entities_of(self.gold(example)))
        labels = dict.fromkeys(label for tag in self.labels for _, _, label in entities_of([tag]))
        return {label: counts[label] for label in labels}

    def majority(self, train: Sequence[TokenExample], examples: Sequence[TokenExample]) -> dict[str, float]:
        """Returns the figures of one tag for all words: "O", or the most frequent class of `train`."""
        tag = OUTSIDE
        if self.scheme == "none":
            counts = self.label_counts(train)
            tag = max(counts, key=counts.__getitem__)
        return self.score(examples, [{"tags": [tag] * len(example.words)} for example in examples])

    def _pairs(
        self, examples: Sequence[TokenExample], predictions: Predictions
    ) -> tuple[list[list[str]], list[list[str]]]:
        return [self.gold(example) for example in examples], [p["tags"] for p in predictions]


# ----------------------------------------------------------------------------------- words and pieces


def _encode_texts(
    examples: Sequence[TokenExample], tokenizer: Tokenizer
) -> Iterator[tuple[TokenExample, list[int], list[tuple[int, int]]]]:
    for first in range(0, len(examples), BATCH):
        some = examples[first : first + BATCH]
        encoded = tokenizer.encode_with_offsets([example.text for example in some])
        for example, (ids, spans) in zip(some, encoded, strict=True):
            if not ids:
                raise UserError(f"{example.place}: the tokenizer has no piece for {example.text[:40]!r}")
            yield example, ids, spans
