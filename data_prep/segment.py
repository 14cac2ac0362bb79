"""A document -> its sentences.

split = splitter("de")
split("Am 3. Mai kam er. „Warum?“ Niemand weiß es.")  # ["Am 3. Mai kam er.", "„Warum?“", "Niemand weiß es."]

Languages in Latin script with tables of abbreviations, and Chinese and Japanese, are split by rules of our
own; all others by the library sentencex (data_prep/segment_library.py).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from bertscale.config import UserError, check_language, language_code
from data_prep import segment_cjk, segment_latin, segment_library

_LATIN = {
    "en": segment_latin.ENGLISH,
    "fr": segment_latin.FRENCH,
    "de": segment_latin.GERMAN,
    "es": segment_latin.SPANISH,
    "it": segment_latin.ITALIAN,
    "pt": segment_latin.PORTUGUESE,
    "nl": segment_latin.DUTCH,
    "sv": segment_latin.SWEDISH,
    **dict.fromkeys(("da", "no", "nb", "nn"), segment_latin.DANISH_NORWEGIAN),
}

Splitter = Callable[[str], list[str]]


def splitter(language: str) -> Splitter:
    """The function that gives the sentences of a cleaned text (one line for each paragraph, single spaces).

    `language` is an ISO 639-1 code, also with a region or script (`pt-BR`), or `lines`: then each line is a
    sentence. A newline always ends a sentence, no character but spaces is lost, and no sentence is blank.
    Raises UserError for a code that nobody knows.
    """
    try:
        check_language(language)
    except ValueError as error:
        raise UserError(f"language: {error}") from error
    code = language_code(language)
    if code == "lines":
        return partial(_split_lines, _whole)
    if code in _LATIN:
        return partial(_split_lines, partial(segment_latin.split, rules=_LATIN[code]))
    if code in ("zh", "ja"):
        return partial(_split_lines, segment_cjk.split)
    return partial(_split_lines, partial(segment_library.split, code=code))


def with_spaces(text: str, sentences: list[str]) -> list[str]:
    """The `sentences` of `text`, each with the white space that stands before it there."""
    whole, end = [], 0
    for sentence in sentences:
        begin, end = end, text.index(sentence, end) + len(sentence)
        whole.append(text[begin:end])
    return whole


def _split_lines(split: Splitter, text: str) -> list[str]:
    if "\n" not in text:
        return split(text)
    return [sentence for line in text.split("\n") for sentence in split(line)]


def _whole(line: str) -> list[str]:
    return [stripped] if (stripped := line.strip(" ")) else []


split_sentences = splitter("en")
