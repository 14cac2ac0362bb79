"""Personal data -> marks: addresses of mail, telephone numbers, IP addresses.

    mask("Write to a.b@example.org.", ["mail"], changes)     # "Write to |||EMAIL_ADDRESS|||."

The marks are those of Dolma (Soldaini et al. 2024), which tokenizers of ModernBERT and OLMo have pieces for.
What is found is written as people write it; a number without any sign of a telephone's is none. Names and
postal addresses are not found.
"""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from collections.abc import Callable, Sequence

# No start inside of a run of such characters: else a long one would be read anew from each of them.
_mail = re.compile(
    r"(?<![A-Za-z0-9._%+-])[A-Za-z0-9._%+-]{1,64}+@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}(?![A-Za-z0-9-])"
)
_ip = re.compile(
    r"(?<![\w.:-])(?:(?:25[0-5]|2[0-4]\d|1?\d?\d)\.){3}(?:25[0-5]|2[0-4]\d|1?\d?\d)(?![\w]|\.\d)"
    r"|(?<![\w.:-])[0-9A-Fa-f:]{6,39}(?![\w:])"
)
_phone = re.compile(
    r"(?<![\w.+-])(?:"
    r"\+\d{1,3}(?:[ .-]?(?:\(\d{1,4}\)|\d{1,4})){2,5}"  # +49 (30) 1234-567
    r"|\(\d{2,5}\)[ .-]?\d{3,4}[ .-]\d{3,5}"  # (030) 123-4567
    r"|\d{3}[.-]\d{3}[.-]\d{4}"  # 212-555-0147
    r"|0\d{1,4}[ /-]\d{3,4}[ -]\d{3,5}"  # 030 1234 5678, 03-1234-5678
    r"|1[3-9]\d{9}"  # mobile, China
    r")(?![\w-])"
)
MARKS = {"mail": "|||EMAIL_ADDRESS|||", "phone": "|||PHONE_NUMBER|||", "ip": "|||IP_ADDRESS|||"}
PHONE_DIGITS = (8, 15)  # ITU-T E.164 has at most 15


def _is_ip(found: str) -> bool:
    if "." in found:
        return True
    try:
        ipaddress.IPv6Address(found)
    except ValueError:
        return False
    return any(character.isdigit() for character in found)  # a::b is code


def _is_phone(found: str) -> bool:
    digits = sum(character.isdigit() for character in found)
    return PHONE_DIGITS[0] <= digits <= PHONE_DIGITS[1]


# IP addresses before telephone numbers, which have dots as well.
_FINDERS: dict[str, tuple[re.Pattern[str], Callable[[str], bool]]] = {
    "mail": (_mail, lambda found: True),
    "ip": (_ip, _is_ip),
    "phone": (_phone, _is_phone),
}


def mask(text: str, kinds: Sequence[str], changes: Counter[str]) -> str:
    """The text with a mark for each address or number of these `kinds`, counted in `changes`."""
    for kind, (pattern, is_one) in _FINDERS.items():
        if kind not in kinds or (kind == "mail" and "@" not in text):
            continue

        def replaced(match: re.Match[str], kind: str = kind, is_one: Callable[[str], bool] = is_one) -> str:
            if not is_one(match[0]):
                return match[0]
            changes[f"masked: {kind}"] += 1
            return MARKS[kind]

        text = pattern.sub(replaced, text)
    return text
