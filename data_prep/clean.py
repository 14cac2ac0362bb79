"""A document's text -> the text that is kept, one line for each paragraph, or the reason why it is dropped.

    text, reason, joined = clean("Two   words.\\r\\n\\r\\nNext paragraph.", config, Counter())

The lines of a wrapped text are joined and counted (`wrapped`). Newlines, Unicode form, control characters and
white space are made one; then the document is dropped if it is too short, too long, has too few letters
(`min_letters`), is mostly in scripts not wanted (`scripts`), or breaks a rule of `quality`. Personal data is
masked last (`mask`).
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise
from typing import Literal

import numpy as np
import numpy.typing as npt
import xxhash

from bertscale.config import PrepConfig
from bertscale.tokenizer import normalize
from data_prep.filters import overlap, personal, quality
from data_prep.plan import Unit
from data_prep.readers.records import Cut, Record

WRAPPED_WIDTH = 120  # characters: longer lines were not wrapped by hand or by a mail program
UNWRAPPED_SHARE = 0.2  # of the text stands in such lines, and every line is a paragraph
# What the line ends inside of paragraphs show of a text that may be wrapped (`looks_wrapped`).
NARROWEST, NARROWEST_WIDE = 30, 24  # characters of a line; of Chinese and Japanese, where verse is shorter
FULL_SHARE = 0.7  # of the lines have no room for the next word
LOWER_SHARE = 0.4  # of the next lines begin with a small letter, where letters have cases
ENDED_SHARE = 0.5  # of the lines end as a sentence does, where they have none
SCRIPT_SHARE = 0.5  # of the letters are in the wanted scripts

_paragraph_end = re.compile(r"\n[^\S\n]*\n\s*")
# Han, kana and their punctuation: no space stands between these, so none comes where a line was wrapped.
_WIDE = (
    "\u2e80-\u2fdf\u3001-\u312f\u31a0-\u4dbf\u4e00-\u9fff\uf900-\ufaff\ufe30-\ufe4f\uff01-\uff9f"
    "\U00020000-\U0003ffff"
)
_wide_wrap = re.compile(
    f"(?<=[{_WIDE}])[^\\S\\n]*\\n\\s*(?=[{_WIDE}“‘…—])|(?<=[”’…—])[^\\S\\n]*\\n\\s*(?=[{_WIDE}])"
)

_is_wide = re.compile(f"[{_WIDE}]").match
_sentence_end = re.compile(r"[.!?…:;।॥؟。！？：；][\"'”’»」』）)\]]*$").search
_spaces = re.compile("  +")
_PRINTABLE = b"\n" + bytes(range(0x20, 0x7F))

# First and last code points, by name.
SCRIPTS: dict[str, list[tuple[int, int]]] = {
    "latin": [
        (0x41, 0x5A), (0x61, 0x7A), (0xAA, 0xAA), (0xBA, 0xBA), (0xC0, 0x24F), (0x250, 0x2AF),
        (0x1D00, 0x1DBF), (0x1E00, 0x1EFF), (0x2C60, 0x2C7F), (0xA720, 0xA7FF), (0xAB30, 0xAB6F),
        (0xFB00, 0xFB06), (0xFF21, 0xFF3A), (0xFF41, 0xFF5A),
    ],
    "cyrillic": [(0x400, 0x52F), (0x1C80, 0x1C8F), (0x2DE0, 0x2DFF), (0xA640, 0xA69F)],
    "greek": [(0x370, 0x3FF), (0x1F00, 0x1FFF)],
    "han": [(0x3005, 0x3007), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF)],
    "kana": [(0x3041, 0x30FF), (0x31F0, 0x31FF), (0xFF66, 0xFF9F), (0x1B000, 0x1B16F)],
    "hangul": [(0x1100, 0x11FF), (0x3130, 0x318F), (0xA960, 0xA97F), (0xAC00, 0xD7FF), (0xFFA0, 0xFFDC)],
    "arabic": [(0x600, 0x6FF), (0x750, 0x77F), (0x870, 0x8FF), (0xFB50, 0xFDFF), (0xFE70, 0xFEFF)],
    "hebrew": [(0x590, 0x5FF), (0xFB1D, 0xFB4F)],
    "devanagari": [(0x900, 0x97F), (0xA8E0, 0xA8FF)],
    "thai": [(0xE00, 0xE7F)],
}  # fmt: skip
_OTHER = 1  # a letter of another script; 2 and more are SCRIPTS, 0 is no letter


def clean_records(unit: Unit, changes: Counter[str]) -> Iterator[tuple[Record, str, str, bool, int]]:
    """Yields (record, its clean text, or "" and the reason why it is left out, whether it is for validation,
    how many of its line ends were joined).

    What was changed in them is counted in `changes`. All parts of a document are for training, or all for
    validation: what a Cut continues decides. The same text is always on the same side, wherever it stands.
    """
    held_out = False
    for record in unit.records():
        text, reason, joined = "", "", 0
        if isinstance(record, str):
            text, reason, joined = clean(record, unit.config, changes)
        else:
            reason = record.reason
        if not isinstance(record, Cut):
            held_out = xxhash.xxh3_64_intdigest(text.encode()) < unit.config.validation_fraction * 2**64
        yield record, text, reason, held_out, joined


def clean(text: str, config: PrepConfig, changes: Counter[str]) -> tuple[str, str, int]:
    """Returns (the text that is kept, "", how many line ends were joined in it) or ("", reason, 0); counts
    lines that are left out, and marks."""
    cleaned, reason, joined = cleaned_text(text, config, changes)
    if reason := reason or why_drop(cleaned, config) or quality.why_drop(cleaned, config.quality):
        return "", reason, 0
    files = tuple(config.decontaminate)
    if files and overlap.overlaps(cleaned, files, config.decontaminate_words, config.is_spaced):
        return "", "overlap with a file of decontaminate", 0
    return (personal.mask(cleaned, config.mask, changes) if config.mask else cleaned), "", joined


def cleaned_text(text: str, config: PrepConfig, changes: Counter[str]) -> tuple[str, str, int]:
    """The same before the document is judged: the text in one form, with the lines that are kept."""
    wrapped = "no" if config.language == "lines" else config.wrapped
    paragraphs, joined = split_paragraphs(newlines(text), wrapped)
    cleaned = one_form(paragraphs, "NFKC" if config.normalization == "nfkc" else "NFC")
    kept = quality.keep_lines(cleaned, config.quality, changes)
    return (kept, "", joined) if kept or not cleaned else ("", "no line of it is left", 0)


def newlines(text: str) -> str:
    """All newlines as "\n"."""
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def split_paragraphs(text: str, wrapped: Literal["auto", "yes", "no"]) -> tuple[list[str], int]:
    """Returns (paragraphs, each on one line, how many line ends were joined for it).

    Blank lines end a paragraph. Other line ends do unless the text is `wrapped`, or looks so; they never join
    a text that stands for more than UNWRAPPED_SHARE in long lines. No space comes between two Chinese or
    Japanese characters where a line was wrapped.
    """
    if "\n" not in text:
        return [text], 0
    lines = text.split("\n")
    if wrapped == "no":
        return lines, 0
    long = sum([size for size in map(len, lines) if size > WRAPPED_WIDTH])
    if long > UNWRAPPED_SHARE * len(text):
        return lines, 0
    stripped = [line.strip() for line in lines]
    ends = [(line, following) for line, following in pairwise(stripped) if line and following]
    if not ends or (wrapped == "auto" and not looks_wrapped(ends)):
        return lines, 0
    if not text.isascii():
        text = _wide_wrap.sub("", text)
    return [paragraph.replace("\n", " ") for paragraph in _paragraph_end.split(text)], len(ends)


def looks_wrapped(ends: list[tuple[str, str]]) -> bool:
    """Whether lines were broken for their length alone; `ends`: those with another one right behind them.

    Then the next word had no room in most of them, and sentences go on behind them: the next line begins with
    a small letter, or in a script without cases most lines do not end as a sentence does. Verse, lists,
    headlines, a sentence or a paragraph a line are otherwise.
    """
    width = sorted([len(line) for line, _ in ends])[95 * (len(ends) - 1) // 100]  # a few may be longer
    full = lower = upper = ended = wide = 0
    for line, following in ends:
        first = following[0]
        if _is_wide(first):
            wide, room = wide + 1, 3  # a punctuation mark that may not begin a line moves others
        else:
            room = len(following.split(None, 1)[0]) + 1
        full += len(line) + room > width
        lower, upper = lower + first.islower(), upper + first.isupper()
        ended += bool(_sentence_end(line))
    count = len(ends)
    if width < (NARROWEST_WIDE if 2 * wide > count else NARROWEST) or full < FULL_SHARE * count:
        return False
    if 2 * (lower + upper) >= count:
        return lower >= LOWER_SHARE * (lower + upper)
    return count > 1 and ended < ENDED_SHARE * count  # of a single one, nobody knows


def one_form(paragraphs: list[str], form: Literal["NFC", "NFKC"]) -> str:
    """Non-empty lines in this Unicode form, with single spaces and without control characters.

    The same as `normalize` of each paragraph, but several times as fast for most text.
    """
    lines = [line for paragraph in paragraphs if (line := paragraph.strip())]
    text = "\n".join(lines)
    if "\t" in text or "\xa0" in text:  # the most frequent of other spaces
        text = text.replace("\t", " ").replace("\xa0", " ")
    if form == "NFKC" or not _is_printable(text):
        return "\n".join([line for paragraph in lines if (line := _one_form(paragraph, form))])
    text = unicodedata.normalize("NFC", text)
    return _spaces.sub(" ", text) if "  " in text else text


def _one_form(paragraph: str, form: Literal["NFC", "NFKC"]) -> str:
    line = " ".join(paragraph.split())
    if not _is_printable(line):
        return normalize(line, form)
    line = unicodedata.normalize(form, line)
    return " ".join(line.split()) if form == "NFKC" else line  # "¨" becomes a space and an accent


def _is_printable(text: str) -> bool:
    """Whether `text` holds nothing that `normalize` drops, and no space but " " and "\n"."""
    if text.isascii():
        return not text.encode().translate(None, _PRINTABLE)
    return text.replace("\n", " ").isprintable() and "\u2581" not in text


def why_drop(text: str, config: PrepConfig) -> str:
    """The reason why a clean text is dropped, or ""."""
    if not text:
        return "nothing but white space and control characters"
    if len(text) < config.min_characters:
        return "shorter than min_characters"
    if config.max_characters is not None and len(text) > config.max_characters:
        return "longer than max_characters"
    if config.min_letters or config.scripts:
        counts = letters_by_script(text)
        letters = int(counts[_OTHER:].sum())
        spaces = text.count(" ") + text.count("\n")
        if letters < config.min_letters * (len(text) - spaces):
            return "fewer letters than min_letters"
        names = list(SCRIPTS)
        wanted = sum(int(counts[_OTHER + 1 + names.index(name)]) for name in config.scripts)
        if config.scripts and (wanted < SCRIPT_SHARE * letters or not letters):
            return "mostly in other scripts"
    return ""


def count_letters(text: str) -> dict[str, int]:
    """The letters of `text` in each of SCRIPTS that it has, and in "other" ones."""
    counts = letters_by_script(text)[_OTHER:].tolist()
    return {name: count for name, count in zip(("other", *SCRIPTS), counts, strict=True) if count}


def letters_by_script(text: str) -> npt.NDArray[np.int64]:
    """Counts of the characters that are no letter, other letters, and letters of each of SCRIPTS in order."""
    table = _script_table()
    if text.isascii():
        bytes_ = np.bincount(np.frombuffer(text.encode(), np.uint8), minlength=128)
        counts = np.bincount(table[:128], weights=bytes_, minlength=_OTHER + 1 + len(SCRIPTS))
        return counts.astype(np.int64)
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    return np.bincount(table[codes], minlength=_OTHER + 1 + len(SCRIPTS))


@lru_cache(1)
def _script_table() -> npt.NDArray[np.uint8]:
    """For each code point its script. Vowel signs and the like (Thai, Devanagari) count as letters."""
    table = np.zeros(0x110000, np.uint8)
    for code in range(0x30000):
        if unicodedata.category(chr(code))[0] in "LM":
            table[code] = _OTHER
    table[0x30000:0x33480] = _OTHER  # Han
    table[0x300:0x370] = 0  # accents by themselves
    for number, ranges in enumerate(SCRIPTS.values(), _OTHER + 1):
        for first, last in ranges:
            inside = table[first : last + 1]
            inside[inside == _OTHER] = number
    return table
