"""Texts with their modules -> a classification task: is this a sentence, or are its words shuffled?

Every example is a sentence of its own; of every second one the words between the first and the last are
shuffled. The words themselves tell nothing, so a classifier has to know how English puts them together: an
encoder with random weights learns little of that from some hundred examples, a pretrained one knows it
already. (Word order as a probe of encoders: the task "bigram shift" of Conneau et al., 2018.)

Modules, not sentences, are divided between training and test, so that neighbours, which share their wording,
stand on one side.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from data_prep.segment import split_sentences

TRAIN_EXAMPLES, TEST_EXAMPLES = 1000, 500
FROM_ONE_MODULE = 4  # examples, so that no module makes the task
SHORTEST, LONGEST = 7, 16  # words of an example
LABELS = ("sentence", "shuffled")

_plain_sentence = re.compile(r"[A-Z][a-z]*(?:,? [a-z]+(?:-[a-z]+)*)+\.")


@dataclass(frozen=True)
class LabelledTask:
    train: list[dict[str, str]]
    test: list[dict[str, str]]
    test_modules: frozenset[str]


def make_task(texts: Iterable[tuple[str, str]]) -> LabelledTask:
    """A task out of (text, module) pairs; the same pairs give the same task."""
    by_module: dict[str, set[str]] = defaultdict(set)
    for text, module in texts:
        by_module[module].update(plain_sentences(text))
    modules = iter(sorted(by_module, key=shuffle_key))
    seen = set[str]()
    test = _examples(modules, by_module, TEST_EXAMPLES, seen)
    train = _examples(modules, by_module, TRAIN_EXAMPLES, seen)
    return LabelledTask(train, test, frozenset(example["module"] for example in test))


def plain_sentences(text: str) -> list[str]:
    """The sentences of lower-case words, neither short nor long, with different words to be shuffled."""
    return [
        sentence
        for sentence in split_sentences(text)
        if SHORTEST <= len(words := sentence.split()) <= LONGEST
        and _plain_sentence.fullmatch(sentence)
        and len(set(words[1:-1])) > 3
    ]


def shuffle_words(sentence: str) -> str:
    """The sentence with the words between its first and last in another order; the same each time."""
    first, *between, last = sentence.split()
    shuffled = between.copy()
    generator = random.Random(sentence)
    while sum(old != new for old, new in zip(between, shuffled, strict=True)) <= len(between) // 2:
        generator.shuffle(shuffled)
    return " ".join([first, *shuffled, last])


def _examples(
    modules: Iterable[str], by_module: dict[str, set[str]], wanted: int, seen: set[str]
) -> list[dict[str, str]]:
    """`wanted` examples of the next modules, both labels in turn; `seen` are sentences already taken."""
    examples: list[dict[str, str]] = []
    for module in modules:
        for sentence in sorted(by_module[module] - seen, key=shuffle_key)[:FROM_ONE_MODULE]:
            if len(examples) == wanted:
                return examples
            seen.add(sentence)
            label = LABELS[len(examples) % 2]
            text = sentence if label == "sentence" else shuffle_words(sentence)
            examples.append({"text": text, "label": label, "module": module})
    return examples


def shuffle_key(text: str) -> bytes:
    """A key that sorts texts in an order that is random but always the same."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
