"""Files whose words have tags: CoNLL columns, lists of tokens, character spans; and what is broken there."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from bertscale.config import UserError
from bertscale.config.examples import ExamplesConfig
from bertscale.examples.conll import read_token_examples
from bertscale.tasks.task import TokenExample


def read(path: Path, content: str | bytes, tagged: bool = True, **settings: Any) -> Any:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    data = ExamplesConfig(train=str(path), **settings)
    return read_token_examples(str(path), data, tagged=tagged)


def whole(found: tuple[list[TokenExample], list[dict[str, Any]]]) -> list[TokenExample]:
    assert found[1] == []
    return found[0]


def words(example: TokenExample) -> list[str]:
    return [example.text[start:end] for start, end in example.words]


CONLL = """-DOCSTART- -X- -X- O

EU NNP B-NP B-ORG
rejects VBZ B-VP O

-DOCSTART- -X- -X- O

Paris NNP B-NP B-LOC
# # # O
"""


def test_columns(tmp_path: Path) -> None:
    first, second = whole(read(tmp_path / "x.txt", CONLL))
    assert (first.text, first.words, first.tags) == ("EU rejects", ((0, 2), (3, 10)), ("B-ORG", "O"))
    assert first.place == f"{tmp_path / 'x.txt'}, line 3"
    assert first.row == {"tokens": ["EU", "rejects"], "tags": ["B-ORG", "O"], "document": "1"}
    assert (words(second), second.row["document"]) == (["Paris", "#"], "2")
    assert whole(read(tmp_path / "x.train", CONLL, tags=1))[0].tags == ("NNP", "VBZ")
    assert whole(read(tmp_path / "x.train", CONLL, tags=-3, tokens=1))[0].text == "NNP VBZ"
    [untagged, _] = whole(read(tmp_path / "x.conll", CONLL, tagged=False))
    assert untagged.tags is None
    assert whole(read(tmp_path / "x.tsv", "a\n\nb\n"))[0].tags is None
    assert read(tmp_path / "x.txt", "\n\n") == ([], [])
    with pytest.raises(UserError, match=r"x\.txt: data\.tags=7 is no column of it; there are 4"):
        read(tmp_path / "x.txt", CONLL, tags=7)
    with pytest.raises(UserError, match=r"data\.tokens='word' is no column"):
        read(tmp_path / "x.txt", CONLL, tokens="word")
    with pytest.raises(UserError, match=r"cannot read .*none\.txt: No such file"):
        read_token_examples(str(tmp_path / "none.txt"), ExamplesConfig(train="x"))


@pytest.mark.parametrize("change", ["crlf", "bom", "gzip", "tabs", "spaces", "latin-1", "utf-16", "no end"])
def test_files_as_people_have_them(tmp_path: Path, change: str) -> None:
    text = "É B-X\nb O\n\nc O\n"
    path = tmp_path / "x.conll"
    settings: dict[str, Any] = {}
    content = text.encode()
    match change:
        case "crlf":
            content = text.replace("\n", "\r\n").encode()
        case "bom":
            content = b"\xef\xbb\xbf" + content
        case "gzip":
            path, content = tmp_path / "x.conll.gz", gzip.compress(content)
        case "tabs":
            content = text.replace(" ", "\t").encode()
        case "spaces":
            content = text.replace(" ", "   ").replace("\n\n", "\n \t\n").encode()
        case "latin-1" | "utf-16":
            content, settings = text.encode(change), {"encoding": change}
        case "no end":
            content = text.strip().encode()
    first, second = whole(read(path, content, **settings))
    assert (words(first), first.tags, words(second)) == (["É", "b"], ("B-X", "O"), ["c"])


def test_separators(tmp_path: Path) -> None:
    [example] = whole(read(tmp_path / "x.txt", "New York\tB-X\n\u00a0b\tO\n"))
    assert example.row["tokens"] == ["New York", "\u00a0b"]
    [example] = whole(read(tmp_path / "x.txt", "a,O\nb,B-X\n", separator=","))
    assert example.tags == ("O", "B-X")


def test_universal_dependencies(tmp_path: Path) -> None:
    lines = ["# newdoc id = a", "# sent_id = 1", "# text = don't go now, not for all of the tea there is"]
    lines += ["1-2\tdon't" + "\t_" * 8]
    lines += [
        f"{i}\t{token}\t{token}\t{tag}" + "\t_" * 6
        for i, token, tag in ((1, "do", "AUX"), (2, "n't", "PART"))
    ]
    lines += ["2.1\tx" + "\t_" * 8, "3\t#go\tgo\tVERB" + "\t_" * 6, ""]
    [example] = whole(read(tmp_path / "x.conllu", "\n".join(lines), tokens=1, tags=3))
    assert (words(example), example.tags) == (["do", "n't", "#go"], ("AUX", "PART", "VERB"))
    assert example.row["document"] == "1"


def test_a_hashtag_is_no_comment(tmp_path: Path) -> None:
    [example] = whole(read(tmp_path / "x.txt", "# id = 1\n#tag O\n# O\na O\n#\n"))
    assert words(example) == ["#tag", "#", "a"]
    [broken] = read(tmp_path / "x.txt", "a O\n#tag\n")[1]
    assert broken["place"].endswith("line 2")


def test_ragged_lines(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    content = "a O\nb O\n\nc\nd O\n\ne O B-X\n\n\u200b O\n\nf O\n".encode() + b"\n\xe9 O\n\n"
    examples, broken = read(path, content)
    assert [example.text for example in examples] == ["a b", "f"]
    assert [(row["place"].split(", ")[1], row["reason"]) for row in broken][:2] == [
        ("line 4", "1 columns where other lines have 2"),
        ("line 7", "3 columns where other lines have 2"),
    ]
    assert broken[2]["reason"] == "no text"  # nothing but a character without width
    assert broken[3]["reason"].startswith("bytes that are not utf-8")
    assert broken[3]["place"] == f"{path}, line 13"
    assert json.dumps(broken)
    [row] = read(path, "a\tO\n\tO\n")[1]
    assert (row["place"], row["reason"]) == (f"{path}, line 2", "no token in its column")


def test_a_tag_of_no_scheme(tmp_path: Path) -> None:
    content = "a B-X\nb I-X\nc O\n\n" * 10 + "d X\n\n"
    examples, broken = read(tmp_path / "x.txt", content)
    assert len(examples) == 10
    [row] = broken
    assert row["place"].endswith("line 41")
    assert row["reason"] == "the tag 'X' is in no scheme; others are like 'B-X'"
    classes = whole(read(tmp_path / "x.txt", "a NN\nb B-X\nc VB\n"))  # no scheme at all
    assert classes[0].tags == ("NN", "B-X", "VB")


def test_chinese_characters(tmp_path: Path) -> None:
    content = "他 O\n2 O\n0 O\n年 O\n在 O\n北 B-X\n京 E-X\n， O\n"
    [example] = whole(read(tmp_path / "x.bmes", content))
    assert example.text == "他20年在北京，"
    weibo = "北0\tB-X\n京1\tI-X\n8 0\tO\n".replace("8 0", "80")
    [example] = whole(read(tmp_path / "x.conll", weibo, strip_tokens="[0-9]$"))
    assert (example.text, example.row["tokens"]) == ("北京8", ["北", "京", "8"])
    with pytest.raises(ValueError, match="no regular expression"):
        ExamplesConfig(train="x", strip_tokens="[")


LIST = {"tokens": ["EU", "rejects"], "tags": ["B-ORG", "O"]}


@pytest.mark.parametrize("ending", ["jsonl", "json", "parquet", "csv"])
def test_lists(tmp_path: Path, ending: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    path = tmp_path / f"x.{ending}"
    content: str | bytes = json.dumps(LIST) + "\n"
    if ending == "json":
        content = json.dumps([LIST], indent=1)
    elif ending == "csv":
        content = "tokens,tags\nEU rejects,\"['B-ORG', 'O']\"\n"
    elif ending == "parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist([LIST]), path)
        content = path.read_bytes()
    [example] = whole(read(path, content))
    assert (example.text, example.tags) == ("EU rejects", ("B-ORG", "O"))
    assert list(example.row) == ["tokens", "tags"]


def test_lists_with_other_names_and_numbers(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    row = json.dumps({"words": ["a", "b"], "ner_tags": [1, 0]})
    names: dict[str, Any] = {"tokens": "words", "tags": "ner_tags"}
    [example] = whole(read(path, row, **names, labels=["O", "B-X"]))
    assert example.tags == ("B-X", "O")
    assert whole(read(path, row, **names))[0].tags == ("1", "0")
    assert read(path, row, **names, labels=["O", "B-Y"])[0]
    assert read(path, row.replace("1", "2"), **names, labels=["O", "B-X"])[1][0]["reason"] == (
        "tag 2, but data.labels has 2"
    )
    _, [broken] = read(path, row, tokens="word", tags="ner_tags")
    assert "did you mean data.tokens='words'?" in broken["reason"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"tokens": ["a"], "tags": ["O", "O"]}, "1 tokens, but 2 tags"),
        ({"tokens": ["a", " "], "tags": ["O", "O"]}, "token 2 of 2 is blank"),
        ({"tokens": [], "tags": []}, "no text"),
        ({"tokens": {"a": 1}, "tags": []}, "the tokens are \"{'a': 1}\", which is no list of texts"),
        (
            {"tokens": ["a", None], "tags": ["O", "O"]},
            "the tokens are \"['a', None]\", which is no list of texts",
        ),
    ],
)
def test_broken_lists(tmp_path: Path, row: dict[str, Any], reason: str) -> None:
    path = tmp_path / "x.jsonl"
    examples, [broken] = read(path, f"{json.dumps(LIST)}\n{json.dumps(row)}\n")
    assert len(examples) == 1
    assert broken == {"place": f"{path}, line 2", "reason": reason, "row": row}


def test_spans(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    spans: list[Any] = [{"start": 10, "end": 16, "label": "LOC"}, {"start": 0, "end": 2, "label": "ORG"}]
    row = {"text": "EU leaves Parisian caf\u0301e.", "spans": spans}
    [example] = whole(read(path, json.dumps(row), spans="spans"))
    assert words(example) == ["EU", "leaves", "Parisi", "an", "caf\u0301e", "."]
    assert example.tags == ("B-ORG", "O", "B-LOC", "O", "O", "O")
    row["spans"] = [[0, 2, "ORG"], [0, 2, "ORG"], [2, 10, "X"]]  # twice the same; white space at the ends
    [example] = whole(read(path, json.dumps(row), spans="spans"))
    assert example.tags == ("B-ORG", "B-X", "O", "O", "O")
    row["spans"] = []
    assert set(whole(read(path, json.dumps(row), spans="spans"))[0].tags or ()) == {"O"}
    [untagged] = whole(read(path, '{"text": "EU leaves"}', tagged=False))
    assert (words(untagged), untagged.tags) == (["EU", "leaves"], None)
    [untagged] = whole(read(tmp_path / "x.csv", "text\nEU leaves\n", tagged=False))
    assert words(untagged) == ["EU", "leaves"]
    [example] = whole(read(tmp_path / "x.csv", 'text,spans\nEU leaves,"[[0, 2, ""ORG""]]"\n', spans="spans"))
    assert example.tags == ("B-ORG", "O")


@pytest.mark.parametrize(
    ("spans", "reason"),
    [
        ([[0, 9, "X"]], "the span 0 to 9 is outside of the text, of 8 characters"),
        ([[-1, 2, "X"]], "the span -1 to 2 is outside of the text, of 8 characters"),
        ([[3, 3, "X"]], "the span 3 to 3 is outside of the text, of 8 characters"),
        ([[0, 4, "X"], [3, 5, "Y"]], "two spans overlap at character 3; a word has one tag"),
        ([[2, 3, "X"]], "the span 2 to 3 is white space"),
        ([{"start": 0, "end": 2}], "the span {'start': 0, 'end': 2} has no start, end and label"),
        ([[0, "2", "X"]], "the span [0, '2', 'X'] has no start, end and label"),
        ([[0, 2, ""]], "the span [0, 2, ''] has no start, end and label"),
        ("[0", "the spans are no JSON (Expecting ',' delimiter: line 1 column 3 (char 2))"),
        ({"a": 1}, "the spans are no list"),
    ],
)
def test_broken_spans(tmp_path: Path, spans: Any, reason: str) -> None:
    path = tmp_path / "x.jsonl"
    examples, [broken] = read(path, json.dumps({"text": "EU leave", "spans": spans}), spans="spans")
    assert examples == []
    assert (broken["place"], broken["reason"]) == (f"{path}, line 1", reason)
