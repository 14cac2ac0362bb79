"""A document -> its sentences, by rules for English.

split_sentences("Dr. Smith paid 3.50 dollars. (He was late.) Why?")
# ["Dr. Smith paid 3.50 dollars.", "(He was late.)", "Why?"]

One regular expression finds the places where a sentence may end: a full stop, question or exclamation mark,
closing quotes or brackets, a space, and a word that does not begin in lower case. Only after a full stop is
the word before it looked at: abbreviations, initials and list numbers do not end a sentence.
"""

from __future__ import annotations

import re

# The character after the space: a digit, or a letter that is not a lower-case one of ASCII.
_candidate = re.compile(r"""([.!?…]+)(["'”’»)\]}*`]*)\ (?=["'“‘«(\[{*`_]*([^\Wa-z_]|`))""", re.VERBOSE)
_word_before = re.compile(r"[^\s(\[{\"'“‘«/]*\Z")
_word_after = re.compile(r"\w+")
_letters_with_stops = re.compile(r"(?:[A-Za-z]\.)+[A-Za-z]\Z")  # U.S, e.g, a.m


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Never the last word of a sentence.
_TITLES = _words(
    "mr mrs ms dr prof st mt gen sen rep gov capt lt col sgt maj cmdr rev hon pres messrs mme mlle "
    "vs cf viz eg ie e.g i.e fig figs eq eqs eqn sec sect ch chap vol pp ref refs tab thm lem prop def "
    "approx resp incl excl esp ca wrt w.r.t nr"
)
# Abbreviations only when a number follows.
_BEFORE_NUMBERS = _words("no nos p art jan feb mar apr jun jul aug sep sept oct nov dec v ver r max min")
# May end a sentence: they do if the next word is one that often begins a sentence.
_EITHER = _words("etc inc ltd co corp bros jr sr al ed eds dept univ assn est ave blvd rd ph.d")
_STARTERS = _words(
    "A After All Also Although An And Any As At Because Before But By Each For From He Her Here His How "
    "However I If In It Its Many More Most My No Not Note On One Or Other Our Returns See She Since So "
    "Some Such That The Their Then There Therefore These They This Those Thus To Use Used Using We What "
    "When Where Which While Who Why With You Your"
)


def split_sentences(text: str) -> list[str]:
    """The sentences of normalised `text`; a newline always ends one. No character but spaces is lost."""
    sentences = []
    for line in text.split("\n"):
        start = 0
        for match in _candidate.finditer(line):
            if match[3].islower() or (match[1] == "." and not _ends(line, start, match)):
                continue
            sentences.append(line[start : match.end()].rstrip(" "))
            start = match.end()
        if rest := line[start:].strip(" "):
            sentences.append(rest)
    return sentences


def _ends(line: str, start: int, match: re.Match[str]) -> bool:
    """Whether the full stop of `match` ends the sentence that began at `start`."""
    stop = match.start()
    before = _word_before.search(line, max(start, stop - 40), stop)
    word = before[0] if before else ""
    if not word:
        return True
    lower = word.lower()
    if lower in _TITLES:
        return False
    if stop - start == len(word) and (word.isdigit() or len(word) == 1):
        return False  # "1. Introduction", "B. Methods"
    after = match[3]
    if lower in _BEFORE_NUMBERS and after.isdigit():
        return False
    if lower in _EITHER or _letters_with_stops.match(word) or (len(word) == 1 and word.isupper()):
        following = _word_after.search(line, match.end())
        return following is not None and following[0] in _STARTERS
    return True
