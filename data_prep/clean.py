"""A document's text -> the text that is kept, or the reason why it is dropped.

text, reason = clean("Two   words.\\r\\n\\r\\nNext paragraph.", min_characters=10)
"""

from __future__ import annotations

import re

from bertscale.tokenizer import normalize

_blank_line = re.compile(r"\n[^\S\n]*\n\s*")


def clean(text: str, min_characters: int) -> tuple[str, str]:
    """(normalised text with one line for each paragraph, "") or ("", reason).

    Only a blank line ends a paragraph: text is often wrapped at 80 characters.
    """
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    paragraphs = [normalize(paragraph) for paragraph in _blank_line.split(text)]
    kept = "\n".join(paragraph for paragraph in paragraphs if paragraph)
    if not kept:
        return "", "nothing but white space and control characters"
    if len(kept) < min_characters:
        return "", "shorter than min_characters"
    return kept, ""
