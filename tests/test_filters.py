"""Rules of quality and masks of personal data: what each of them finds, and that off they change nothing."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from bertscale.cli import main
from bertscale.config import PrepConfig, UserError, check_config
from data_prep.clean import clean
from data_prep.filters.personal import MARKS, mask
from data_prep.filters.quality import PUBLISHED, Looks, breaks, why_drop
from data_prep.plan import Plan

GOOD = (
    "The river runs to the sea, and the boats that lie there have a long way home. "
    "People of the village mend their nets with care.\n"
    "In spring the water rises. Nobody knows how far it will come this year, but all of them hope for the "
    "best, as their fathers did before them, and wait until the old bridge can be crossed again."
)


def config(**values: Any) -> PrepConfig:
    return check_config(PrepConfig, {"input": ["a"], "output": "b", **values}, "test")


def cleaned(text: str, **values: Any) -> tuple[str, str, dict[str, int]]:
    changes = Counter[str]()
    # Every line is a paragraph, whatever it looks like.
    return *clean(text.replace("\n", "\n\n"), config(**values), changes)[:2], dict(changes)


# A document that breaks a rule at its published value, and no other one before it in the table.
BAD: dict[str, str] = {
    "min_words": "A few words of text that have an end.",
    "max_words": "the of " * 50_001,
    "min_word_length": "a b c to be of " * 20,
    "max_word_length": "Internationalisation " * 60,
    "max_symbols": GOOD + " # # # # # # # # # #",
    "max_bullet_lines": "\n".join(f"- the item {n} of a list that we have" for n in range(20)),
    "max_ellipsis_lines": "\n".join(f"the part {n} of a text to read ..." for n in range(20)),
    "min_alphabetic_words": GOOD + " 12345" * 40,
    "min_stop_words": " ".join(f"wort{n}" for n in range(60)),
    "min_sentences": GOOD.replace(".", ","),
    "max_repeated_lines": GOOD + "\nShare\nLike\nShare\nLike\nShare",
    "max_repeated_line_characters": GOOD + "\n" + GOOD.split("\n")[0],
    "max_top_2_grams": GOOD + " yes indeed" * 12,
    "max_top_3_grams": GOOD + " yes we can" * 9,
    "max_top_4_grams": GOOD + " yes we surely can" * 6,
    "max_repeated_5_grams": GOOD + "\n" + GOOD[-150:],
    "max_repeated_10_grams": GOOD + "\n" + GOOD[-150:],
}  # fmt: skip


@pytest.mark.parametrize("rule", PUBLISHED)
def test_each_rule_drops_by_its_own_count(rule: str) -> None:
    assert cleaned(GOOD, quality={rule: PUBLISHED[rule]}) == (GOOD, "", {})
    assert cleaned(BAD[rule], quality={rule: PUBLISHED[rule]}) == ("", f"quality.{rule}", {})
    assert cleaned(BAD[rule])[1] == ""  # off by default


def test_all_published_rules_keep_good_text() -> None:
    assert cleaned(GOOD, quality=PUBLISHED) == (GOOD, "", {})


def test_documents_with_a_phrase() -> None:
    rules = {"drop_documents_with": ["lorem ipsum", "{"]}
    for text in (f"{GOOD} Lorem Ipsum dolor", f"{GOOD} function() {{ }}"):
        assert cleaned(text, quality=rules)[1] == "quality.drop_documents_with"
    assert cleaned(GOOD, quality=rules)[1] == ""


def test_lines_are_left_out_and_counted() -> None:
    text = "Home | News | Sport\nA first sentence stands here.\nYes.\nPlease turn on JavaScript.\n“So?”"
    rules = {"line_ends": True, "min_line_words": 2, "drop_lines_with": ["javascript"]}
    assert cleaned(text, quality=rules) == (
        "A first sentence stands here.",
        "",
        {
            "lines left out: quality.line_ends": 1,
            "lines left out: quality.min_line_words": 2,
            "lines left out: quality.drop_lines_with": 1,
        },
    )
    assert cleaned("Menu\nHome", quality={"line_ends": True})[1] == "no line of it is left"
    assert cleaned("他走了。\nMenu", language="zh", quality={"line_ends": True})[0] == "他走了。"


def test_measures() -> None:
    looks = Looks("one two three one two four\none two", config().quality)
    assert looks.top_grams(2) == 3 * len("one two") / len(looks.text)
    assert looks.top_grams(4) == 0  # none is there twice
    assert looks.repeated_grams(2) == 2 * len("one two") / len(looks.text)
    assert Looks("", config().quality).word_length == 0
    assert not breaks(looks, "min_words", 8)
    assert breaks(looks, "min_words", 9)
    assert breaks(looks, "max_words", 7)


def test_rules_of_words_need_words() -> None:
    with pytest.raises(UserError, match=r"quality\.min_words counts words .* language=zh has none"):
        config(language="zh", quality={"min_words": 50})
    with pytest.raises(UserError, match=r"quality\.min_word"):
        config(quality={"min_word": 50})
    assert why_drop("他走了。", config(language="zh", quality={"min_sentences": 1}).quality) == ""


def test_a_dry_run_shows_each_rule_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [GOOD] * 6 + ["Too short. Mail a@example.org."] * 3 + [BAD["max_symbols"]]
    lines = [json.dumps({"text": text}) for text in texts]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines[:5], "no JSON", *lines[5:]]))
    arguments = [f"input={tmp_path}", f"output={tmp_path}/out", "quality.min_words=20", "--dry-run", "20"]
    path = tmp_path / "config.yaml"
    path.write_text("{}")
    assert main(["prep", str(path), *arguments]) == 0
    said = capsys.readouterr().out
    assert "of 11 documents 7 are kept" in said
    assert re.search(r" 3 dropped: quality\.min_words   Too short", said)
    assert re.search(r" 1 bad: ", said)
    assert re.search(r"min_words +20 +3 +27\.3%", said)
    assert re.search(r"max_symbols +0\.1  off +1 +9\.1%", said)
    assert "3 masked: mail in 3 documents (off)" in said
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.jsonl", "config.yaml"]
    assert main(["prep", str(path), *arguments[:-1], "4"]) == 0
    assert "of 4 documents" in capsys.readouterr().out


# ------------------------------------------------------------------------------------ decontamination


def test_documents_of_the_evaluation_are_dropped(tmp_path: Path) -> None:
    question = "Which of the old boats that lie in the harbour has the longest way home, and why?"
    (tmp_path / "dev.jsonl").write_text(json.dumps({"id": 3, "more": [{"question": question}]}) + "\n\n")
    (tmp_path / "test.tsv").write_text(f"1\t{GOOD.splitlines()[1]}\nshort one\n")
    files = [str(tmp_path / name) for name in ("dev.jsonl", "test.tsv")]
    reason = "overlap with a file of decontaminate"
    quoted = "She asked: WHICH of the old boats, that lie in the harbour, has the longest way home? He wept."
    assert cleaned(quoted, decontaminate=files)[1] == reason
    assert cleaned(GOOD, decontaminate=files)[1] == reason
    assert cleaned(GOOD, decontaminate=files[:1])[1] == ""
    assert cleaned("A short one.", decontaminate=files)[1] == ""
    assert cleaned("Which of the old boats lie in the harbour?", decontaminate=files)[1] == ""
    assert cleaned("Which of the old boats", decontaminate=files, decontaminate_words=5)[1] == reason
    chinese = "他走了很远的路，然后回家去看他的母亲，可是她已经不在那里了。"
    (tmp_path / "zh.txt").write_text(chinese)
    for text, why in ((f"有人说：{chinese}", reason), (chinese[:20], "")):
        assert cleaned(text, language="zh", decontaminate=[str(tmp_path / "zh.txt")])[1] == why


def test_another_content_is_another_setting(tmp_path: Path) -> None:
    path, plans = tmp_path / "dev.txt", []
    (tmp_path / "a.txt").write_text(GOOD)
    for content in ("one", "two"):
        path.write_text(content)
        values = {
            "input": [str(tmp_path / "a.txt")],
            "output": str(tmp_path / "out"),
            "decontaminate": [str(path)],
        }
        plans.append(Plan(PrepConfig.model_validate(values)).content["settings"]["decontaminate"])
    assert plans[0] != plans[1]
    path.unlink()
    with pytest.raises(UserError, match=r"decontaminate: cannot read .*dev\.txt: No such file"):
        Plan(PrepConfig.model_validate(values))


# --------------------------------------------------------------------------------------- personal data


def masked(text: str, *kinds: str) -> tuple[str, dict[str, int]]:
    changes = Counter[str]()
    return mask(text, kinds or tuple(MARKS), changes), dict(changes)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("mail", "a.b+c@mail.example.org"),
        ("mail", "X_1@example.co.uk"),
        ("ip", "192.168.0.1"),
        ("ip", "2001:db8::ff00:42:8329"),
        ("ip", "fe80::1ff:fe23:4567:890a"),
        ("phone", "+49 (30) 1234-5678"),
        ("phone", "+1 212 555 0147"),
        ("phone", "(212) 555-0147"),
        ("phone", "212-555-0147"),
        ("phone", "030 1234 5678"),
        ("phone", "03-1234-5678"),
        ("phone", "13912345678"),
    ],
)
def test_what_is_masked(kind: str, text: str) -> None:
    expected = f"Call or write: {MARKS[kind]}, today. ({MARKS[kind]})"
    assert masked(f"Call or write: {text}, today. ({text})") == (expected, {f"masked: {kind}": 2})
    others = [other for other in MARKS if other != kind]
    assert masked(f"See {text}.", *others) == (f"See {text}.", {})


@pytest.mark.parametrize(
    "text",
    [
        "In 1914-1918 and 1939-1945 there were 100 200 300 men.",
        "It costs 1,234,567.89 dollars; pi is 3.14159265.",
        "At 12:30:45 on 2020-03-15, see std::vector and a::b.",
        "ISBN 978-3-16-148410-0, section 1.2.3, version 10.4.300.1",
        "@home, a@b, me@localhost, 3 x 4 @ 5",
        "from 1 to 2001: 500 pages",
    ],
)
def test_what_is_not(text: str) -> None:
    assert masked(text) == (text, {})


def test_masks_are_off_by_default_and_counted() -> None:
    text = "Write to a@example.org."
    assert cleaned(text) == (text, "", {})
    assert cleaned(text, mask=["mail", "ip"]) == ("Write to |||EMAIL_ADDRESS|||.", "", {"masked: mail": 1})


def test_hostile_text_is_masked_soon() -> None:
    """What is quadratic here would take minutes."""
    for piece in ("a", "a.", "a@", "1", "1.", "1-", "+1 ", "(1", "1:", ":", "a@b.", "0 1", "12 "):
        masked(piece * (200_000 // len(piece)))
