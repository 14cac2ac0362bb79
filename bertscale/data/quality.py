"""What a manifest's counters say of language and tokenizer: shares of pieces, lengths, and doubts about both.

    for line in doubts(read_manifest(folder)):
        print(line)     # 93% of the letters are Han, but language=en: ...; set language=zh and run prep again

A wrong `language` or tokenizer stops nothing, and the loss alone does not show it.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt

from bertscale.config import language_code
from bertscale.data.shards import Ids

TOKENS_AT_ONCE = 2**22  # counted together: `bincount` makes an int64 copy of them
# Limits between right and wrong settings: the figures are in docs/prep.md.
MOST_UNKNOWN, MOST_BYTES = 0.03, 0.03  # shares of the tokens
LONGEST_SENTENCES = 60  # tokens on average
MOST_LETTERS = 0.5  # in one script: then the text is of a language that is written in it
MOST_KANA = 0.1  # of the letters; above it the text is Japanese

# The codes of the languages that are written in each script that `data_prep.clean` counts, the most frequent
# one first. All others are written in Latin script, or in one that is not counted.
LANGUAGES_OF = {
    "han": "zh ja",
    "kana": "ja zh",  # the same rules find the sentences of both
    "hangul": "ko",
    "cyrillic": "ru uk be bg sr mk kk ky tg tt ba cv mn os uz ab av ce kv az bs cu sh",
    "greek": "el",
    "arabic": "ar fa ur ps sd ku ug ks az ms ha pa kk uz",
    "hebrew": "he yi",
    "devanagari": "hi mr ne sa ks sd bh pi",
    "thai": "th",
}
ALSO_LATIN = "sr bs sh uz kk az tt ku ms ha mn ug"  # of these


def count_pieces(tokens: Ids, vocab_size: int) -> npt.NDArray[np.int64]:
    """How often each piece is among `tokens`, int64 [vocabulary]; takes little memory."""
    counts = np.zeros(vocab_size, np.int64)
    for begin in range(0, len(tokens), TOKENS_AT_ONCE):
        counts += np.bincount(tokens[begin : begin + TOKENS_AT_ONCE], minlength=vocab_size)
    return counts


def facts(manifest: dict[str, Any]) -> str:
    """The shares of unknown and byte pieces and the sentences' length; "" where an older prep wrote it."""
    counters = manifest["counters"]
    if "unknown" not in counters:
        return ""
    return (
        f"{_share(counters, 'unknown'):.2%} of the tokens are unknown pieces, "
        f"{_share(counters, 'single_bytes'):.2%} single bytes of characters without a piece; "
        f"a sentence has {_length(counters):.1f} tokens on average"
        + (f", a word {counters['tokens'] / words:.2f}" if (words := counters.get("words")) else "")
    )


def doubts(manifest: dict[str, Any]) -> list[str]:
    """A line, with what to do, for each setting that the counters speak against."""
    counters, settings = manifest["counters"], manifest["settings"]
    if "unknown" not in counters:  # an older prep wrote it
        return []
    lines = []
    if doubt := _of_language(counters["letters"], settings["language"]):
        lines.append(doubt)
    unknown, in_bytes = _share(counters, "unknown"), _share(counters, "single_bytes")
    if unknown > MOST_UNKNOWN or in_bytes > MOST_BYTES:
        what = f"{unknown:.0%} of the tokens are unknown pieces"
        if unknown <= MOST_UNKNOWN:
            what = f"{in_bytes:.0%} of the tokens are single bytes of characters without a piece"
        given = settings.get("tokenizer")
        remedy = "raise train_tokenizer.vocab_size or train_tokenizer.character_coverage"
        if settings.get("train_tokenizer", {}).get("model") == "byte_bpe":
            remedy = "raise train_tokenizer.vocab_size"
        if given:
            remedy = f"give another one than {given}, or leave `tokenizer` out, and prep trains one"
        lines.append(f"{what}, so the tokenizer does not fit this text: {remedy}")
    if not lines and (length := _length(counters)) > LONGEST_SENTENCES:  # what may come of either
        lines.append(
            f"a sentence has {length:.0f} tokens on average, where 20 to 40 are usual: look at samples "
            f"(bertscale inspect), and whether language={settings['language']} is right"
        )
    return lines


def _share(counters: dict[str, Any], name: str) -> float:
    return float(counters[name] / max(counters["tokens"], 1))


def _length(counters: dict[str, Any]) -> float:
    return float(counters["tokens"] / max(counters["sentences"], 1))


def _of_language(letters: dict[str, int], language: str) -> str:
    """The doubt about `language` where most letters are of a script that it is not written in; or ""."""
    code = language_code(language)
    total, counts = sum(letters.values()), Counter(letters)
    counts["han"] += counts.pop("kana", 0)
    [(script, count)] = counts.most_common(1)
    if code == "lines" or script == "other" or count <= MOST_LETTERS * total:
        return ""
    name = script.capitalize()
    if letters.get("kana", 0) > MOST_KANA * total:
        script, name = "kana", "Han and Kana"
    languages = LANGUAGES_OF.get(script, "en").split()
    fits = code in languages
    if script == "latin":
        fits = code in ALSO_LATIN.split() or not any(code in o.split() for o in LANGUAGES_OF.values())
    if fits:
        return ""
    others = " or its own" if script in ("latin", "cyrillic", "arabic", "devanagari", "hebrew") else ""
    return (
        f"{count / total:.0%} of the letters are {name}, but language={language}, whose rules are not for "
        f"such text: set language={languages[0]}{others} and run prep again"
    )
