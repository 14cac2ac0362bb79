"""Decontamination: documents that have a stretch of words in common with files that a model is evaluated on.

    overlaps(text, ("tasks/dev.jsonl",), words=13, spaced=True)

As for GPT-3 (Brown et al. 2020, appendix C): 13 words in a row, in lower case and without punctuation. Of a
language without spaces twice as many characters. Examples that are shorter than that are not looked for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from bertscale.config import UserError
from data_prep.filters.near import hashes_of, shingles_of

_word = re.compile(r"\w+")


def overlaps(text: str, files: tuple[str, ...], words: int, spaced: bool) -> bool:
    """Whether the text has such a stretch in common with one of the `files`."""
    return bool(np.isin(_stretches(text, words, spaced), _known(files, words, spaced)).any())


def _stretches(text: str, words: int, spaced: bool) -> npt.NDArray[np.uint64]:
    found = _word.findall(text.lower())
    units = hashes_of(found if spaced else "".join(found))
    size = words if spaced else 2 * words
    return shingles_of(units, size) if len(units) >= size else np.zeros(0, np.uint64)


@lru_cache(maxsize=2)
def _known(files: tuple[str, ...], words: int, spaced: bool) -> npt.NDArray[np.uint64]:
    """The hashes of all stretches in the files, sorted; read once by a process."""
    parts = [_stretches(text, words, spaced) for file in files for text in _texts(file)]
    return np.unique(np.concatenate([np.zeros(0, np.uint64), *parts]))


def _texts(name: str) -> Iterator[str]:
    """The strings of each object of .json and .jsonl, the lines of any other file. Raises UserError."""
    try:
        with open(name, encoding="utf-8", errors="replace") as file:
            if name.endswith(".json"):
                yield from _strings(json.load(file))
                return
            for line in file:
                yield from _strings(json.loads(line)) if name.endswith(".jsonl") and line.strip() else (line,)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"decontaminate: cannot read {name}: {error}") from error


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)
