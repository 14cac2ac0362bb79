"""Words of a text, the text of words, and the words of pieces.

text, words = join_tokens(["EU", "rejects"])             # "EU rejects", ((0, 2), (3, 10))
split_words("It's Paris.")                               # It ' s Paris .
"""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_right
from collections.abc import Sequence

from bertscale.tasks.tags import Entity
from bertscale.tasks.task import Spans
from bertscale.tokenizer import han_or_kana

# A piece, the first word that it gives the tag of, and the one behind the last.
Ranges = list[tuple[int, int, int]]

_CJK_MARKS = re.compile("[\u3000-\u303f\uff00-\uffef]")  # the punctuation of Chinese and Japanese
_WORD, _OWN, _JOINS, _SPACE = range(4)


def join_tokens(tokens: Sequence[str], spaces: bool = True) -> tuple[str, Spans]:
    """Joins tokens to running text; returns it with the span of each token.

    Tokens have a space between them, but not where two are written without one: Han characters, Kana and
    their punctuation. With `spaces=False` none has.
    """
    parts: list[str] = []
    spans: list[tuple[int, int]] = []
    place = 0
    before = ""
    for token in tokens:
        if spaces and before and not (_is_chinese(before[-1]) and _is_chinese(token[0])):
            parts.append(" ")
            place += 1
        parts.append(token)
        spans.append((place, place + len(token)))
        place += len(token)
        before = token
    return "".join(parts), tuple(spans)


def are_characters(sentences: Sequence[Sequence[str]]) -> bool:
    """Whether the tokens of a set are the characters of Chinese or Japanese text, its Latin letters too."""
    tokens = [token for sentence in sentences for token in sentence]
    single = sum(len(token) == 1 for token in tokens)
    chinese = sum(han_or_kana.match(token) is not None for token in tokens)
    return bool(tokens) and single > 0.95 * len(tokens) and chinese > 0.5 * len(tokens)


def _is_chinese(character: str) -> bool:
    return bool(han_or_kana.match(character) or _CJK_MARKS.match(character))


def split_words(text: str, cuts: Sequence[int] = ()) -> Spans:
    """Splits text into words, each a span; nothing but white space is outside of them.

    A word is a run of letters and digits, one punctuation mark or symbol, or one Han character or Kana;
    combining marks and characters without width go with what is before them. No word goes across a place
    of `cuts`.
    """
    edges = set(cuts)
    words: list[tuple[int, int]] = []
    before = _SPACE  # what the character before is
    for i, character in enumerate(text):
        kind = _kind(character)
        if kind == _JOINS:
            kind = _WORD if before == _SPACE else before
            new = before == _SPACE
        else:
            new = not (kind == before == _WORD)
        if kind == _SPACE:
            pass
        elif new or i in edges:
            words.append((i, i + 1))
        else:
            words[-1] = (words[-1][0], i + 1)
        before = kind
    return tuple(words)


def _kind(character: str) -> int:
    if character.isspace():
        return _SPACE
    if character.isalnum():
        return _OWN if han_or_kana.match(character) else _WORD
    if character.isascii():
        return _OWN
    if unicodedata.category(character)[0] == "M" or unicodedata.category(character) == "Cf":
        return _JOINS
    return _OWN


def words_of_pieces(words: Spans, pieces: Sequence[tuple[int, int]]) -> Ranges:
    """Finds the pieces that give tags, each with its words: one, and those behind it without a piece.

    `pieces` are the characters that they stand for, ascending.
    """
    ends = [end for _, end in words]
    begins = [begin for begin, _ in pieces]
    first_piece: dict[int, int] = {}  # of each word that owns one
    for i, (begin, end) in enumerate(pieces):
        word = bisect_right(ends, begin)
        if word < len(words) and begin < end and words[word][0] < end:
            first_piece.setdefault(word, i)
    ranges: Ranges = []
    for word, (begin, _) in enumerate(words):
        if word in first_piece:
            ranges.append((first_piece[word], word, word + 1))
        elif ranges and ranges[-1][2] == word:
            covering = bisect_right(begins, begin) - 1
            if covering >= 0 and pieces[covering][1] > begin:
                ranges[-1] = (*ranges[-1][:2], word + 1)
    return ranges


def entities_of_pieces(entities: Sequence[Entity], ranges: Ranges) -> list[Entity]:
    """Entities of words as those of the pieces that give tags; of two in one piece only the first."""
    piece_of = {word: i for i, (_, first, end) in enumerate(ranges) for word in range(first, end)}
    result: list[Entity] = []
    taken = 0
    for first, end, label in entities:
        covered = [piece_of[word] for word in range(first, end) if word in piece_of]
        begin = max(taken, covered[0]) if covered else 0
        if covered and begin <= covered[-1]:
            taken = covered[-1] + 1
            result.append((begin, taken, label))
    return result
