"""What is kept of a text, and why a document is dropped."""

from __future__ import annotations

from collections import Counter
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bertscale.config import SCRIPTS, PrepConfig, UserError, check_config
from bertscale.tokenizer import normalize
from data_prep import clean as clean_module
from data_prep.clean import clean, one_form, split_paragraphs


def config(**values: Any) -> PrepConfig:
    return check_config(PrepConfig, {"input": ["x"], "output": "y", **values}, "test")


def kept(text: str, **values: Any) -> str:
    result, reason = clean(text, config(**values), Counter())
    assert not reason
    return result


def reason(text: str, **values: Any) -> str:
    return clean(text, config(**values), Counter())[1]


# Characters that clean treats in different ways, among many others.
TEXTS = st.text(
    st.one_of(
        st.sampled_from(
            " \n\t\r\x00\x1c\x85\xa0\xad\u2028\u3000\u2581\ufeff\u0301\u212b¨ﬁe中か—“.A\u1100\u1161"
        ),
        st.characters(exclude_categories=["Cs"]),
    )
)


@given(st.lists(TEXTS), st.sampled_from(["NFC", "NFKC"]))
def test_one_form_is_normalize_of_each_paragraph(paragraphs: list[str], form: Literal["NFC", "NFKC"]) -> None:
    lines = [paragraph.replace("\n", " ") for paragraph in paragraphs]
    expected = "\n".join(line for text in lines if (line := normalize(text, form)))
    assert one_form(lines, form) == expected


@given(TEXTS)
def test_clean_text_stays_as_it_is(text: str) -> None:
    for form in ("nfc", "nfkc"):
        once, why = clean(text, config(normalization=form), Counter())
        assert bool(once) != bool(why)
        assert "\n\n" not in once
        assert "  " not in once
        if not why:
            assert one_form(once.split("\n"), "NFKC" if form == "nfkc" else "NFC") == once


def test_blank_lines_end_paragraphs() -> None:
    assert kept("One\nline.\r\n \r\n\r\nNext\tone. ") == "One line.\nNext one."
    assert kept("a\rb\r\rc") == "a b\nc"
    assert kept("\ufeffco\u00adop\u200bx \x07y\u00a0z") == "coop\u200bx y z"


def test_every_line_is_a_paragraph_unless_the_text_is_wrapped() -> None:
    long = "It was a long line that nobody had wrapped, and so the next one is another paragraph of it. " * 2
    assert kept(f"Title\n{long}\nEnd.") == f"Title\n{long.strip()}\nEnd."
    wrapped = "\n".join(["Some words on a line, and on the next as well."] * 40)
    assert "\n" not in kept(wrapped)
    assert "\n" not in kept(f"{wrapped}\nhttps://example.org/{'x' * 150}\n{wrapped}")


@pytest.mark.parametrize(
    ("wrapped", "joined"),
    [
        ("春眠不覺曉，\n處處聞啼鳥", "春眠不覺曉，處處聞啼鳥"),
        ("これは\n　テストです", "これはテストです"),
        ("他说：\n“你好”\n然后走了", "他说：“你好”然后走了"),
        ("用 Python\n写的\nC++ 代码", "用 Python 写的 C++ 代码"),
        ("한국어\n문장", "한국어 문장"),
        ("un été\n— oui", "un été — oui"),
    ],
)
def test_wrapped_chinese_gets_no_spaces(wrapped: str, joined: str) -> None:
    assert kept(wrapped) == joined


def test_unicode_forms() -> None:
    assert kept("e\u0301 ﬁ Ａ ½") == "é ﬁ Ａ ½"
    assert kept("e\u0301 ﬁ Ａ ½", normalization="nfkc") == "é fi A 1⁄2"


def test_special_tokens_are_text() -> None:
    assert kept("A [MASK] and <s>.") == "A [MASK] and <s>."


def test_why_documents_are_dropped() -> None:
    assert reason(" \n\x00") == "nothing but white space and control characters"
    assert reason("abc", min_characters=4) == "shorter than min_characters"
    assert reason("abc  ", min_characters=3, max_characters=3) == ""
    assert reason("abcd", max_characters=3) == "longer than max_characters"
    assert reason("12:30 ab", min_letters=0.5) == "fewer letters than min_letters"
    assert reason("12 abc", min_letters=0.5) == ""
    for text in ("中文也是字", "हिन्दी में", "ภาษาไทย", "한국어", "العربية"):
        assert reason(text, min_letters=1) == ""


@pytest.mark.parametrize(
    ("script", "text"),
    [
        ("latin", "Zażółć gęślą jaźń, ﬁn."),
        ("cyrillic", "Съешь ещё этих мягких булок"),
        ("greek", "Ξεσκεπάζω τὴν ψυχοφθόρα"),
        ("han", "𠀀中華人民々 2020"),
        ("kana", "これはカタカナ"),
        ("hangul", "키스의 고유조건은"),
        ("arabic", "نص حكيم لَهُ سِرٌّ"),
        ("hebrew", "דג סקרן שט בים"),
        ("devanagari", "ऋषियों को सताने"),
        ("thai", "เป็นมนุษย์สุดประเสริฐ"),
    ],
)
def test_scripts(script: str, text: str) -> None:
    assert reason(text, scripts=[script]) == ""
    others = [name for name in SCRIPTS if name != script]
    assert reason(text, scripts=others) == "mostly in other scripts"
    mixed = text + " " + "wxyz" * len(text)
    assert bool(reason(mixed, scripts=[script])) == (script != "latin")
    assert reason("123 456", scripts=[script]) == "mostly in other scripts"


def test_scripts_are_checked_when_the_config_is_read() -> None:
    assert tuple(clean_module.SCRIPTS) == SCRIPTS
    with pytest.raises(UserError, match="there is no script 'Cyrilic'; did you mean cyrillic"):
        config(scripts=["latin", "Cyrilic"])


def test_split_paragraphs_keeps_all_text() -> None:
    assert split_paragraphs("a") == ["a"]
    assert "".join("".join(split_paragraphs("a\nb\n\nc\n \nd")).split()) == "abcd"
