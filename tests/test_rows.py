"""Rows of labelled files in every format, as people have them, and what is said of those that are broken."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bertscale.config import UserError
from bertscale.config.examples import ExamplesConfig
from bertscale.examples.rows import BadRowError, BrokenRow, Row, column, format_of, read_rows

DATA = os.environ.get("BERTSCALE_DATA", "")  # the fixture of all tests takes such variables away


def examples(**keys: Any) -> ExamplesConfig:
    return ExamplesConfig.model_validate({"train": "x", **keys})


def read(path: Path, **keys: Any) -> list[Row | BrokenRow]:
    return list(read_rows(str(path), examples(**keys)))


def values(path: Path, **keys: Any) -> list[dict[str, Any]]:
    rows = read(path, **keys)
    assert all(isinstance(row, Row) for row in rows), rows
    return [row.values for row in rows if isinstance(row, Row)]


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


ROWS = [{"text": "a, b", "label": "x"}, {"text": "c", "label": "y"}]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", 'text,label\n"a, b",x\nc,y\n'),
        ("a.csv", '\ufefftext,label\r\n"a, b",x\r\nc,y\r\n'),
        ("a.tsv", "text\tlabel\na, b\tx\nc\ty"),
        ("a.txt", "\ufefftext\tlabel\r\n\r\na, b\tx\r\nc\ty\r\n"),
        ("a.jsonl", '{"text": "a, b", "label": "x"}\n\n\ufeff{"text": "c", "label": "y"}\n'),
        ("a.json", '{"text": "a, b", "label": "x"}\n{"text": "c", "label": "y"}\n'),
        ("a.json", json.dumps(ROWS, indent=1)),
        ("a.json", "\ufeff" + json.dumps({"version": 1, "data": ROWS})),
        ("a.json", json.dumps({"data": ROWS}, indent=1)),
    ],
)
def test_formats(tmp_path: Path, name: str, content: str) -> None:
    assert values(written(tmp_path / name, content)) == ROWS


def test_parquet(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    assert values(tmp_path / "a.parquet") == ROWS
    with pytest.raises(UserError, match=r"no column 'labels'.*did you mean data.label='label'"):
        read(tmp_path / "a.parquet", label="labels")


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: pa.compress(content, "zstd", asbytes=True),
}


@pytest.mark.parametrize("suffix", PACKERS)
def test_compressed(tmp_path: Path, suffix: str) -> None:
    content = b"text\tlabel\na, b\tx\nc\ty\n"
    packed = PACKERS[suffix](content)
    assert values(written(tmp_path / f"a.tsv{suffix}", packed)) == ROWS
    with pytest.raises(UserError, match=r"cannot read .*a\.tsv.*damaged"):
        read(written(tmp_path / f"a.tsv{suffix}", b"x" + packed))
    with pytest.raises(UserError, match=r"cannot read .*a\.tsv.*damaged"):
        read(written(tmp_path / f"a.tsv{suffix}", packed[:-9]))


def test_numbers_mean_that_there_is_no_header(tmp_path: Path) -> None:
    path = written(tmp_path / "a.tsv", "one\t1\ntwo\t0\n")
    assert values(path, text=0, label=1) == [{"0": "one", "1": "1"}, {"0": "two", "1": "0"}]
    assert values(path, text=0, label=1, header=True) == [{"one": "two", "1": "0"}]
    with pytest.raises(
        UserError, match=r"no column 'text'.*if the file has no header, give data.text a number"
    ):
        read(path)
    with pytest.raises(UserError, match=r"data.label='1': without a header columns have numbers"):
        read(path, text=0, label="1", header=False)
    with pytest.raises(UserError, match=r"no column number 2, counted from 0, but '0', '1'"):
        read(path, text=0, label=2)


def test_columns_by_number_and_by_name(tmp_path: Path) -> None:
    path = written(tmp_path / "a.csv", "id,text,text,1\n7,one,two,x\n")
    (row,) = read(path, text=2, label="1")
    assert isinstance(row, Row)
    assert (column(row, 2, "data.text"), column(row, 3, "data.label")) == ("two", "x")
    assert column(row, "1", "data.label") == "x"
    with pytest.raises(UserError, match=r"2 columns are named 'text'; set data.text to a number"):
        read(path, label="1")
    with pytest.raises(BadRowError, match=r"a\.csv, line 2: there is no column 'lable'"):
        column(row, "lable", "data.label")


def test_a_column_that_a_json_row_has_not() -> None:
    with pytest.raises(BadRowError, match=r"a, line 3: .*'texts'.*did you mean data.text='text'"):
        column(Row("a, line 3", {"text": "x", "label": "y"}), "texts", "data.text")


def test_the_last_column_has_the_rest(tmp_path: Path) -> None:
    path = written(tmp_path / "TREC.train", "DESC:manner How did it ?\nENTY:x What\n")
    rows = values(path, format="tsv", separator=" ", columns=2, text=1, label=0)
    assert rows == [{"0": "DESC:manner", "1": "How did it ?"}, {"0": "ENTY:x", "1": "What"}]
    with pytest.raises(UserError, match=r"TREC\.train: the ending \.train does not tell the format"):
        read(path, text=1, label=0)


def test_quotation_marks_of_tsv_are_text(tmp_path: Path) -> None:
    path = written(tmp_path / "a.tsv", 'text\tlabel\n"a\tx\nb "c"\ty\n')
    assert [row["text"] for row in values(path)] == ['"a', 'b "c"']
    assert values(written(tmp_path / "b.tsv", 'text\tlabel\n"a\tb"\tx\n'), quoting=True) == [
        {"text": "a\tb", "label": "x"}
    ]


def test_a_stray_mark_costs_one_row(tmp_path: Path) -> None:
    """And swallows none of the rows behind it; a text of several lines is one row."""
    path = written(tmp_path / "a.csv", 'text,label\n"a\nb",x\n"c,y\nd,z\n"e"e,z\n"f ""g""",z\n')
    rows = read(path)
    assert [row.values["text"] for row in rows if isinstance(row, Row)] == ["a\nb", "d", 'f "g"']
    broken = [row for row in rows if isinstance(row, BrokenRow)]
    assert [row.place.split(", ")[1] for row in broken] == ["line 4", "line 6"]
    assert all("set data.quoting=false" in row.reason for row in broken)


def test_a_ragged_row_is_broken(tmp_path: Path) -> None:
    rows = read(written(tmp_path / "a.tsv", "text\tlabel\na\tb\tx\nc\ty\nd\n"))
    assert [row.reason for row in rows if isinstance(row, BrokenRow)] == [
        "3 columns where the first line has 2",
        "1 columns where the first line has 2",
    ]
    assert rows[0] == BrokenRow(
        f"{tmp_path}/a.tsv, line 2", "3 columns where the first line has 2", "a\tb\tx"
    )


def test_bytes_of_another_encoding(tmp_path: Path) -> None:
    text = "text\tlabel\n" + "caf\xe9 noir\tx\n" + "th\xe9\ty\n"
    path = written(tmp_path / "a.tsv", text.encode("latin-1"))
    first, second = read(path)
    assert isinstance(first, BrokenRow)
    assert first.place == f"{path}, line 2"
    assert "bytes that are not utf-8" in first.reason
    assert "set data.encoding=cp1252" in first.reason
    assert [row["text"] for row in values(path, encoding="latin-1")] == ["café noir", "thé"]
    assert isinstance(second, BrokenRow)
    assert (
        values(written(tmp_path / "b.tsv", text.encode("utf-16")), encoding="utf16")[0]["text"] == "café noir"
    )
    with pytest.raises(ValueError, match=r"there is no encoding 'latin-33'"):
        examples(encoding="latin-33")
    assert values(tmp_path / "b.tsv")[0]["text"] == "café noir"  # by its mark
    header = written(tmp_path / "c.tsv", "text\tth\xe9\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"c\.tsv, line 1, which should name the columns: .*encoding=cp1252"):
        read(header)


def test_broken_json(tmp_path: Path) -> None:
    lines = '{"text": "a"\n[1]\n{"text": "\\ud83d"}\n{"text": "\\ud83d\\ude00"}\n'
    rows = read(written(tmp_path / "a.jsonl", lines))
    assert [row.reason.split(" (")[0] for row in rows if isinstance(row, BrokenRow)] == [
        "broken JSON",
        "not a JSON object",
        "half of a surrogate pair, which is no character",
    ]
    assert isinstance(rows[3], Row)
    assert rows[3].values == {"text": "\U0001f600"}
    with pytest.raises(UserError, match=r"b\.json, line 2, column \d+: broken JSON"):
        read(written(tmp_path / "b.json", '[{"text": "a"},\n{"text": "b"'))
    with pytest.raises(UserError, match=r"c\.json is neither a list of objects nor"):
        read(written(tmp_path / "c.json", '{"a":\n {"text": "b"}}'))
    with pytest.raises(UserError, match=r"d\.json, line 2: bytes that are not utf-8"):
        read(written(tmp_path / "d.json", b'[{"text":\n "caf\xe9"}]'))
    rows = read(written(tmp_path / "e.json", '[{"text": "a"}, 3]'))
    assert rows[1] == BrokenRow(f"{tmp_path}/e.json, item 2", "not a JSON object", "3")


def test_files_that_are_no_such(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read .*none\.tsv: No such file"):
        read(tmp_path / "none.tsv")
    with pytest.raises(UserError, match=r"cannot read .*: Is a directory"):
        read(tmp_path, format="tsv")
    with pytest.raises(UserError, match=r"cannot read .*a\.parquet: the file is damaged"):
        read(written(tmp_path / "a.parquet", "text"))
    with pytest.raises(UserError, match=r"data.columns=2 is for files without quoting"):
        read(written(tmp_path / "a.csv", "text"), columns=2, quoting=True)
    assert format_of("a.conll.gz", examples()) == "conll"


cells = st.text(st.characters(codec="utf-8", exclude_characters="\r\x00"), max_size=8)


@settings(deadline=None)
@given(st.lists(st.tuples(cells, cells), min_size=1, max_size=6))
def test_csv_is_read_as_it_was_written(tmp_path_factory: pytest.TempPathFactory, rows: list[Any]) -> None:
    text = io.StringIO()
    csv.writer(text).writerows([("text", "label"), *rows])
    path = written(tmp_path_factory.mktemp("csv") / "a.csv", text.getvalue())
    assert [(row["text"], row["label"]) for row in values(path)] == rows


# ------------------------------------------------------------------------------------------- real sets

REAL: list[tuple[str, dict[str, Any], int]] = [
    ("sst2/train.tsv", {"text": "sentence"}, 67349),
    ("cola/train.tsv", {"text": 3, "label": 1}, 7250),
    ("rte/train.tsv", {"text": "sentence1", "text_pair": "sentence2"}, 2490),
    ("wnli/train.tsv", {"text": "sentence1", "text_pair": "sentence2"}, 518),
    (
        "mrpc/msr_paraphrase_train.txt",
        {"text": "#1 String", "text_pair": "#2 String", "label": "Quality"},
        4076,
    ),
    ("stsb/stsb-en-train.csv", {"text": 0, "text_pair": 1, "label": 2}, 5749),
    ("stsb/stsb-zh-train.csv", {"text": 0, "text_pair": 1, "label": 2}, 5749),
    (
        "sick2014/SICK_train.txt",
        {"text": "sentence_A", "text_pair": "sentence_B", "label": "relatedness_score"},
        4500,
    ),
    ("imdb/dev.jsonl", {}, 1500),
    (
        "sent_conv/TREC.train",
        {"format": "tsv", "separator": " ", "columns": 2, "text": 1, "label": 0, "encoding": "latin-1"},
        5452,
    ),
    ("chnsenticorp/train.tsv", {"text": "text_a"}, 9600),
    ("ocnli/train.10k.json", {"text": "sentence1", "text_pair": "sentence2"}, 10000),
    ("thucnews_titles/dev.txt", {"text": 0, "label": 1}, 10000),
]


@pytest.mark.skipif(not DATA, reason="BERTSCALE_DATA names no folder of real data")
@pytest.mark.parametrize(("name", "keys", "count"), REAL, ids=[name for name, _, _ in REAL])
def test_real_sets_lie_as_they_are(name: str, keys: dict[str, Any], count: int) -> None:
    data = examples(**keys)
    rows = read(Path(DATA) / "tasks" / name, **keys)
    assert len(rows) == count
    for row in rows:
        assert isinstance(row, Row)
        assert str(column(row, data.text, "data.text")).strip()
        assert not isinstance(data.label, list)
        assert str(column(row, data.label, "data.label")).strip()
