"""What is kept of a text, and why a document is dropped."""

from __future__ import annotations

import textwrap
from collections import Counter
from itertools import pairwise
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
    result, reason, _ = clean(text, config(**values), Counter())
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
        once, why, _ = clean(text, config(normalization=form), Counter())
        assert bool(once) != bool(why)
        assert "\n\n" not in once
        assert "  " not in once
        if not why:
            assert one_form(once.split("\n"), "NFKC" if form == "nfkc" else "NFC") == once


def test_blank_lines_end_paragraphs() -> None:
    assert kept("One\nline.\r\n \r\n\r\nNext\tone. ", wrapped="yes") == "One line.\nNext one."
    assert kept("a\rb\r\rc", wrapped="yes") == "a b\nc"
    assert kept("a\rb\r\rc") == "a\nb\nc"
    assert kept("\ufeffco\u00adop\u200bx \x07y\u00a0z") == "coop\u200bx y z"


def test_every_line_is_a_paragraph_unless_the_text_is_wrapped() -> None:
    long = "It was a long line that nobody had wrapped, and so the next one is another paragraph of it. " * 2
    assert kept(f"Title\n{long}\nEnd.") == f"Title\n{long.strip()}\nEnd."
    wrapped = textwrap.fill("Some words on a line, and on the next as well. " * 40, 44)
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
    assert kept(wrapped, wrapped="yes") == joined


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
    for wrapped in ("auto", "yes", "no"):
        assert split_paragraphs("a", wrapped) == (["a"], 0)
        paragraphs, joined = split_paragraphs("a\nb\n\nc\n \nd", wrapped)
        assert "".join("".join(paragraphs).split()) == "abcd"
        assert joined == (wrapped == "yes")


PROSE = (
    "The old river carries its reflection past the mill, and the people of the town, who had never seen so "
    "much water in a single spring, came out to look at it. Nobody said a word. In the evening they went "
    "home again, each by a way of his own, and lit the lamps."
)
CHINESE_PROSE = "老河流经过磨坊，镇上的人们从来没有见过这么多的水，他们都出来看。没有人说话。" * 5
KOREAN_PROSE = (
    "오래된 강은 방앗간을 지나 흐르고 마을 사람들은 봄에 그렇게 많은 물을 본 적이 없어서 모두 나와 보았다. "
    * 4
)


def in_lines(text: str, width: int) -> str:
    return "\n".join(text[start : start + width] for start in range(0, len(text), width))


@pytest.mark.parametrize(
    "text",
    [
        *(textwrap.fill(PROSE, width) for width in (40, 60, 72, 100)),
        *(f"{textwrap.fill(PROSE, 72)}\n\n{textwrap.fill(PROSE[60:], 72)}" for _ in range(1)),
        in_lines(CHINESE_PROSE, 35),
        textwrap.fill(KOREAN_PROSE, 40),
        textwrap.fill("Dans la vallée coule une rivière dont personne ne connaît la source. " * 4, 60),
    ],
)
def test_wrapped_text_is_joined_and_counted(text: str) -> None:
    result, _, joined = clean(text, config(), Counter())
    assert result.count("\n") == text.count("\n\n")
    assert joined == sum(bool(a and b) for a, b in pairwise(text.split("\n")))
    assert clean(text, config(wrapped=False), Counter())[::2] == (text.replace("\n\n", "\n"), 0)
    assert clean(text, config(language="lines"), Counter())[::2] == (text.replace("\n\n", "\n"), 0)


@pytest.mark.parametrize(
    "text",
    [
        "Stocks rise on strong earnings\nOil falls for a third day\nMinister resigns after the vote",
        "Shall I compare thee to a summer's day?\nThou art more lovely and more temperate:\n"
        "Rough winds do shake the darling buds of May,\nAnd summer's lease hath all too short a date.",
        "apples\npears\nplums and cherries\na pound of the best flour",
        "\n".join(PROSE.replace(". ", ".\n").split("\n")),  # a sentence a line
        "春眠不覺曉，\n處處聞啼鳥。\n夜來風雨聲，\n花落知多少。",
        "\n".join(
            f"{'他说了很多话，' * (2 + number % 5)}然后走了。" for number in range(12)
        ),  # a paragraph a line
        "한국어 문장입니다.\n다음 문장은 조금 더 길게 쓰여 있습니다.\n끝.",
        "King Henry:\nOnce more unto the breach, dear friends.",
    ],
)
def test_lines_that_mean_something_stay(text: str) -> None:
    assert clean(text, config(), Counter()) == (text, "", 0)


def test_wrapped_lines_and_sentences_a_line_exclude_each_other() -> None:
    with pytest.raises(UserError, match="wrapped=yes joins lines"):
        config(wrapped="yes", language="lines")
