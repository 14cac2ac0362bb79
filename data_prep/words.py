"""Where words begin in text that has no spaces between them: by a segmenter, for masks of whole words.

    starts = word_starts(tokenizer, sentences, tokenizer.encode(sentences))     # bool, of all their tokens

The segmenter is jieba's (a dictionary, the most probable path through it, a hidden Markov model for words
that are not in it), in Rust, as the package rjieba has it: the words of the Python package at 17 times its
speed. It decides before and behind Han characters and Kana; elsewhere words are what they are without it
(`Tokenizer.starts_word`). A piece that begins inside a word continues that word, also where it reaches into
the next one.

In spill files, where a token is moved about, the highest bit of its 32 says whether it begins a word.
"""

from __future__ import annotations

from importlib import metadata
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from bertscale.config import UserError
from bertscale.data.shards import Ids
from bertscale.tokenizer import Tokenizer, is_han_or_kana

PACKAGE = "rjieba"
_BEGINS = np.uint32(1 << 31)

Bools = npt.NDArray[np.bool_]


def segmenter_version() -> str:
    """The segmenter and its version, on which words depend; raises UserError where it is not installed."""
    try:
        return f"{PACKAGE} {metadata.version(PACKAGE)}"
    except metadata.PackageNotFoundError:
        raise UserError(
            f"words=jieba needs the package {PACKAGE}, which is not installed: pip install {PACKAGE} "
            "(or bertscale with its extra: bertscale[chinese]), or take words=null"
        ) from None


def word_starts(tokenizer: Tokenizer, sentences: list[str], encoded: list[list[int]]) -> Bools:
    """Whether each token begins a word, [tokens] of all `sentences`, of which `encoded` are the ids."""
    import rjieba  # which only text with `words` needs

    # [characters] of all sentences, end to end.
    characters = np.frombuffer("".join(sentences).encode("utf-32-le"), np.uint32)
    sizes = np.fromiter(map(len, sentences), np.int64, len(sentences))
    words = chain.from_iterable(map(rjieba.cut, sentences))
    lengths = np.fromiter(map(len, words), np.int64)
    assert lengths.sum() == len(characters)  # the segmenter loses no character
    cut = np.zeros(len(characters), np.bool_)  # whether a word begins here
    cut[np.cumsum(lengths) - lengths] = True
    decided = is_han_or_kana(characters)  # whether that counts
    decided[1:] |= decided[:-1].copy()
    decided[(np.cumsum(sizes) - sizes)[sizes > 0]] = True  # a sentence begins with a word

    ids = np.fromiter(chain.from_iterable(encoded), np.int64)
    starts = tokenizer.starts_word[ids]
    place = tokenizer.token_starts(sentences, encoded)  # [tokens] in characters
    of_segmenter = np.flatnonzero(place >= 0)
    of_segmenter = of_segmenter[decided[place[of_segmenter]]]
    starts[of_segmenter] = cut[place[of_segmenter]]
    return starts


# ------------------------------------------------------------------------------------------ spill files


def spill_dtype(stored: np.dtype[Any], words: str | None) -> np.dtype[Any]:
    """The type of tokens in spill files, of those that the shards have as `stored`."""
    return np.dtype(np.uint32) if words else stored


def join_words(tokens: Ids, starts: Bools) -> npt.NDArray[np.uint32]:
    """The tokens of a spill file, each with the bit of `starts`."""
    joined: npt.NDArray[np.uint32] = tokens | np.where(starts, _BEGINS, np.uint32(0))
    return joined


def split_words(joined: npt.NDArray[np.uint32], stored: npt.DTypeLike) -> tuple[Ids, Bools]:
    """The tokens, as `stored`, and the bits that `join_words` joined."""
    return (joined & ~_BEGINS).astype(stored), joined >= _BEGINS
