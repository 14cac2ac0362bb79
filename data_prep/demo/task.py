"""Texts with their packages -> a classification task: which package does a docstring document?

The largest packages are the labels. Modules, not texts, are divided between training and test, so that
neighbours, which share their wording, stand on one side. What names a package is written out of the text.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

LARGEST_PACKAGES = 10
TRAIN_EXAMPLES, TEST_EXAMPLES = 32, 100  # of each label
FROM_ONE_MODULE = 4  # examples, so that no module makes a label
MASKED_NAME = "library"
LONGEST = 1000  # characters; an example ends with the sentence's paragraph that passes it

# How texts spell a package beside its import name and the name of its distribution.
_SPELLINGS = {
    "torch": ["pytorch", "c10"],
    "sklearn": ["scikit learn", "scikit"],
    "numpy": ["np", "numerical python"],
    "networkx": ["nx"],
    "scipy": ["sp"],
    "pyarrow": ["pa"],
    "pandas": ["pd"],
    "tensorflow": ["tf"],
    "matplotlib": ["plt", "mpl"],
    "transformers": ["transformer", "hugging face", "huggingface", "hf", "🤗"],
    "huggingface_hub": ["hugging face", "huggingface", "the hub", "hf", "hfapi", "🤗"],
    "python": ["cpython", "pep"],
    "deepspeed": ["deep speed", "ds"],
    "megatron": ["mcore", "nemo", "nvidia"],
}


@dataclass(frozen=True)
class LabelledTask:
    labels: list[str]
    train: list[dict[str, str]]
    test: list[dict[str, str]]
    test_modules: frozenset[str]


def make_task(texts: list[tuple[str, str, str]]) -> LabelledTask:
    """A task out of (text, package, module) triples; the same triples give the same task."""
    labels = _choose_labels(texts)
    names = names_of(labels)
    by_module: dict[str, dict[str, list[str]]] = {label: defaultdict(list) for label in labels}
    for text, package, module in texts:
        if package in by_module:
            by_module[package][module].append(text)
    train: list[dict[str, str]] = []
    test: list[dict[str, str]] = []
    test_modules = set[str]()
    for label in labels:
        modules = iter(sorted(by_module[label], key=_shuffle))
        for examples, wanted in ((test, TEST_EXAMPLES), (train, TRAIN_EXAMPLES)):
            missing = wanted
            for module in modules:
                chosen = sorted(by_module[label][module], key=_shuffle)[: min(FROM_ONE_MODULE, missing)]
                examples += [
                    {"text": mask_names(_shorten(text), names), "label": label, "module": module}
                    for text in chosen
                ]
                missing -= len(chosen)
                if examples is test:
                    test_modules.add(module)
                if missing == 0:
                    break
    return LabelledTask(labels, train, _without_copies(test, train), frozenset(test_modules))


def names_of(labels: Iterable[str]) -> list[str]:
    """How a text can name one of the packages: import name, distribution, other spellings."""
    distributions = importlib.metadata.packages_distributions()
    names = set[str]()
    for label in labels:
        spellings = {label, *distributions.get(label, []), *_SPELLINGS.get(label, [])}
        names |= {variant.lower() for name in spellings for variant in (name, name.replace("_", "-"))}
    return sorted(names, key=lambda name: (-len(name), name))  # a pattern takes the first that fits


def mask_names(text: str, names: list[str]) -> str:
    """`text` with `names`, and words and dotted paths that hold a long one, made one neutral word."""
    long = "|".join(re.escape(name) for name in names if len(name) > 3 or not name.isascii())
    short = "|".join(re.escape(name) for name in names if len(name) <= 3 and name.isascii())
    pattern = rf"[\w.-]*(?:{long})(?:[\w-]|\.(?=\w))*"
    if short:
        pattern += rf"|(?<![\w.])(?:{short})(?:[._]\w+)*(?!\w)"
    return re.sub(pattern, MASKED_NAME, text, flags=re.IGNORECASE)


def _choose_labels(texts: list[tuple[str, str, str]]) -> list[str]:
    """The packages with the most texts that have modules enough for both sides."""
    usable: Counter[str] = Counter()
    for (package, _), count in Counter((package, module) for _, package, module in texts).items():
        usable[package] += min(count, FROM_ONE_MODULE)
    enough = {package for package, count in usable.items() if count >= TRAIN_EXAMPLES + TEST_EXAMPLES}
    sizes = Counter(package for _, package, _ in texts)
    largest = sorted(enough, key=lambda package: (-sizes[package], package))
    return sorted(largest[:LARGEST_PACKAGES])


def _without_copies(test: list[dict[str, str]], train: list[dict[str, str]]) -> list[dict[str, str]]:
    """The test examples most of whose five-word phrases no training example has."""
    known = set[tuple[str, ...]]().union(*(_phrases(example["text"]) for example in train))
    new = []
    for example in test:
        phrases = _phrases(example["text"])
        if len(phrases & known) <= len(phrases) / 2:
            new.append(example)
    return new


def _phrases(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"[a-z]+", text.lower())
    return set(zip(*(words[start:] for start in range(5)), strict=False))


def _shorten(text: str) -> str:
    """The first paragraphs, up to the one that passes LONGEST characters."""
    end = text.find("\n", LONGEST)
    return text if end < 0 else text[:end]


def _shuffle(text: str) -> bytes:
    """A key that sorts texts in an order that is random but always the same."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
