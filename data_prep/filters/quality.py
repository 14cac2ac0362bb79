"""Rules of quality, in the style of Gopher and C4: which lines are left out, which documents are dropped.

    text = keep_lines(text, config.quality, changes)
    reason = why_drop(text, config.quality)      # "quality.min_words", the first rule that it breaks, or ""

Sources: Rae et al. 2021, https://arxiv.org/abs/2112.11446, appendix A.1.1; Raffel et al. 2020,
https://arxiv.org/abs/1910.10683, section 2.2. Off, a rule costs nothing.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from functools import cached_property, partial

from bertscale.config import QualityConfig

_ENDS = (".", "!", "?", "…", "。", "！", "？")
_CLOSING = "\"'”’»」』）)]"
_BULLETS = ("•", "‣", "◦", "▪", "·", "●", "- ", "* ", "– ")
_ellipsis = re.compile(r"\.\.\.|…")
_sentence_end = re.compile(r"[.!?…]+[\"'”’»)\]]*(?=\s|\Z)|[。！？]+")
_letter = re.compile(r"[^\W\d_]")

# The values that were published, for those rules that are off when somebody wants to see what they would do.
PUBLISHED: dict[str, float] = {
    "min_sentences": 3,
    "min_words": 50,
    "max_words": 100_000,
    "min_word_length": 3,
    "max_word_length": 10,
    "max_symbols": 0.1,
    "max_bullet_lines": 0.9,
    "max_ellipsis_lines": 0.3,
    "min_alphabetic_words": 0.8,
    "min_stop_words": 2,
    "max_repeated_lines": 0.3,
    "max_repeated_line_characters": 0.2,
    "max_top_2_grams": 0.2,
    "max_top_3_grams": 0.18,
    "max_top_4_grams": 0.16,
    "max_repeated_5_grams": 0.15,
    "max_repeated_10_grams": 0.1,
}


class Looks:
    """What the rules measure of a document, each computed when a rule first asks."""

    def __init__(self, text: str, rules: QualityConfig) -> None:
        self.text, self.rules = text, rules

    @cached_property
    def words(self) -> list[str]:
        return self.text.split()

    @cached_property
    def lines(self) -> list[str]:
        return [line for line in self.text.split("\n") if line]

    @cached_property
    def word_length(self) -> float:
        return sum(map(len, self.words)) / max(len(self.words), 1)

    def symbols(self) -> float:
        most = max(self.text.count("#"), sum(1 for _ in _ellipsis.finditer(self.text)))
        return most / max(len(self.words), 1)

    def bullet_lines(self) -> float:
        return sum(line.startswith(_BULLETS) for line in self.lines) / max(len(self.lines), 1)

    def ellipsis_lines(self) -> float:
        return sum(line.endswith(("...", "…")) for line in self.lines) / max(len(self.lines), 1)

    def alphabetic_words(self) -> float:
        return sum(1 for word in self.words if _letter.search(word)) / max(len(self.words), 1)

    def stop_words(self) -> int:
        return len(set(self.rules.stop_words).intersection(self.text.lower().split()))

    def sentences(self) -> int:
        return sum(1 for _ in _sentence_end.finditer(self.text))

    def repeated_lines(self) -> float:
        return 1 - len(set(self.lines)) / max(len(self.lines), 1)

    def repeated_line_characters(self) -> float:
        again = sum(map(len, self.lines)) - sum(map(len, set(self.lines)))
        return again / max(len(self.text), 1)

    def top_grams(self, size: int) -> float:
        """The share of characters in the most frequent `size` words in a row, where they are there twice."""
        grams = Counter(zip(*(self.words[start:] for start in range(size)), strict=False))
        gram, count = max(grams.items(), key=lambda item: item[1], default=((), 0))
        return count * (sum(map(len, gram)) + size - 1) / max(len(self.text), 1) if count > 1 else 0.0

    def repeated_grams(self, size: int) -> float:
        """The share of characters in `size` words that stood there before; no word counts twice."""
        seen, characters, place = set[tuple[str, ...]](), 0, 0
        while place + size <= len(self.words):
            gram = tuple(self.words[place : place + size])
            if gram in seen:
                characters += sum(map(len, gram)) + size - 1
                place += size
            else:
                seen.add(gram)
                place += 1
        return characters / max(len(self.text), 1)


# What a rule, named by its key, measures: too little of it for `min_`, too much for `max_`.
_MEASURES: dict[str, Callable[[Looks], float]] = {
    "min_words": lambda looks: len(looks.words),
    "max_words": lambda looks: len(looks.words),
    "min_sentences": Looks.sentences,
    "min_word_length": lambda looks: looks.word_length,
    "max_word_length": lambda looks: looks.word_length,
    "max_symbols": Looks.symbols,
    "max_bullet_lines": Looks.bullet_lines,
    "max_ellipsis_lines": Looks.ellipsis_lines,
    "min_alphabetic_words": Looks.alphabetic_words,
    "min_stop_words": Looks.stop_words,
    "max_repeated_lines": Looks.repeated_lines,
    "max_repeated_line_characters": Looks.repeated_line_characters,
    **{f"max_top_{size}_grams": partial(Looks.top_grams, size=size) for size in (2, 3, 4)},
    **{f"max_repeated_{size}_grams": partial(Looks.repeated_grams, size=size) for size in (5, 10)},
}


def breaks(looks: Looks, rule: str, limit: float) -> bool:
    """Whether a document breaks the rule of this key, if it had this limit."""
    value = _MEASURES[rule](looks)
    return value < limit if rule.startswith("min_") else value > limit


def why_drop(text: str, rules: QualityConfig) -> str:
    """The rule by which a document is dropped, or ""."""
    lower = text.lower() if rules.drop_documents_with else ""
    if any(phrase.lower() in lower for phrase in rules.drop_documents_with):
        return "quality.drop_documents_with"
    looks = Looks(text, rules)
    for rule in _MEASURES:
        limit = getattr(rules, rule)
        if limit is not None and breaks(looks, rule, limit):
            return f"quality.{rule}"
    return ""


def keep_lines(text: str, rules: QualityConfig, changes: Counter[str]) -> str:
    """The text without the lines that break a rule; each of those is counted in `changes`."""
    if not (rules.line_ends or rules.min_line_words or rules.drop_lines_with):
        return text
    kept = []
    for line in text.split("\n"):
        if rule := _why_leave_out(line, rules):
            changes[f"lines left out: quality.{rule}"] += 1
        else:
            kept.append(line)
    return "\n".join(kept)


def _why_leave_out(line: str, rules: QualityConfig) -> str:
    if rules.line_ends and not line.rstrip(_CLOSING).endswith(_ENDS):
        return "line_ends"
    if rules.min_line_words and len(line.split()) < rules.min_line_words:
        return "min_line_words"
    lower = line.lower() if rules.drop_lines_with else ""
    return "drop_lines_with" if any(phrase.lower() in lower for phrase in rules.drop_lines_with) else ""
