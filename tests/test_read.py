"""Every format and compression gives the documents that were written, and damage costs what is damaged."""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bertscale.config import PrepConfig, UserError, check_config
from data_prep.readers import formats, records
from data_prep.readers.markdown import MarkdownText
from data_prep.readers.read import Part, cut_into_units, find_files, read_records
from data_prep.readers.records import LONGEST, Bad, Cut, Dropped

TEXTS = [
    "First one.\nIts second line.",
    "Zweites, schön.",
    "第三篇。",
    "The 4th, with a \"quote\" & <tag> 'x'.",
]


def config(**values: Any) -> PrepConfig:
    return check_config(PrepConfig, {"input": ["x"], "output": "y", **values}, "test")


def read(*names: Path | str, **values: Any) -> list[str | Bad | Dropped]:
    """All records of the input, through every stage."""
    settings = config(**{"split_bytes": 2**27, **values})
    units = cut_into_units(find_files([str(name) for name in names]), settings)
    return [record for parts in units for part in parts for record in read_records(part, settings)]


def texts(*names: Path | str, **values: Any) -> list[str]:
    """As `read`, where all is readable; each text with single newlines and none at its ends."""
    found = read(*names, **values)
    assert all(isinstance(record, str) for record in found), found
    return [str(record).strip().replace("\n\n", "\n") for record in found]


# ------------------------------------------------------------------------------- writers of each format


def csv_of(documents: list[str]) -> bytes:
    file = io.StringIO(newline="")
    csv.writer(file).writerows([["id", "text"], *([str(i), text] for i, text in enumerate(documents))])
    return file.getvalue().encode()


def wiki_of(documents: list[str]) -> bytes:
    escaped = (text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;") for text in documents)
    block = '<doc id="{0}" url="https://x.org?curid={0}" title="Title {0}">\nTitle {0}\n\n{1}\n\n</doc>\n'
    return "".join(block.format(i, text) for i, text in enumerate(escaped)).encode()


def parquet_of(documents: list[str], group: int = 2, kind: Any = "string") -> bytes:
    file = io.BytesIO()
    nested = pa.array([{"a": 1, "b": "x"}] * len(documents))
    table = pa.table({"nested": nested, "text": pa.array(documents).cast(kind)})
    pq.write_table(table, file, row_group_size=group)
    return file.getvalue()


def arrow_of(documents: list[str], new: Any = pa.ipc.new_file, kind: Any = "string") -> bytes:
    file = io.BytesIO()
    table = pa.table({"id": range(len(documents)), "text": pa.array(documents).cast(kind)})
    with new(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    return file.getvalue()


WRITERS: dict[str, Callable[[list[str]], bytes]] = {
    "a.txt": lambda docs: "\n \r\n".join(docs).encode(),
    "a.jsonl": lambda docs: "".join(json.dumps({"text": t, "id": 1}) + "\n" for t in docs).encode(),
    "a.ndjson": lambda docs: "".join(json.dumps({"text": t, "id": 1}) + "\n" for t in docs).encode(),
    "a.json": lambda docs: json.dumps([{"text": t, "id": 1} for t in docs], indent=1).encode(),
    "lines.json": lambda docs: "".join(json.dumps({"text": t, "id": 1}) + "\n" for t in docs).encode(),
    "json_00": lambda docs: "".join(
        json.dumps({"id": "1", "url": "u", "title": "t", "text": t}) + "\n" for t in docs
    ).encode(),
    "a.csv": csv_of,
    "a.tsv": lambda docs: ("id\ttext\n" + "".join(f"1\t{t}\n" for t in docs)).encode(),
    "a.parquet": parquet_of,
    "a.arrow": arrow_of,
    "stream.arrow": lambda docs: arrow_of(docs, pa.ipc.new_stream, "large_string"),
    "dictionary.arrow": lambda docs: arrow_of(
        docs, pa.ipc.new_stream, pa.dictionary(pa.int32(), pa.string())
    ),
    "wiki_00": wiki_of,
    "wiki.txt": wiki_of,
}
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": lambda data: gzip.compress(data),
    ".bz2": lambda data: bz2.compress(data, 1),
    ".xz": lambda data: lzma.compress(data, preset=0),
    ".zst": lambda data: pa.compress(data, "zstd", asbytes=True),
}


def one_line(document: str, name: str) -> str:
    """A .tsv has no way to write a newline."""
    return document.replace("\n", " ") if name.endswith(".tsv") else document


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("name", WRITERS)
def test_formats(tmp_path: Path, name: str, compression: str) -> None:
    expected = [one_line(text, name) for text in TEXTS]
    path = tmp_path / (name + compression)
    path.write_bytes(COMPRESS[compression](WRITERS[name](expected if "wiki" not in name else TEXTS)))
    assert texts(path) == expected
    assert texts(tmp_path) == expected


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.tsv", "wiki_00", "wiki.txt"])
def test_a_byte_order_mark_is_no_text(tmp_path: Path, name: str, compression: str) -> None:
    plain = ["One.", "Two.", "Three."]
    path = tmp_path / f"{name}{compression}"
    path.write_bytes(COMPRESS[compression](codecs.BOM_UTF8 + WRITERS[name](plain)))
    for split_bytes in (1000, 2**20):
        assert texts(path, split_bytes=split_bytes) == plain


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_members_are_read_as_one(tmp_path: Path, suffix: str) -> None:
    data = WRITERS["a.jsonl"](TEXTS)
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(COMPRESS[suffix](data[:50]) + COMPRESS[suffix](b"") + COMPRESS[suffix](data[50:]))
    assert texts(path) == TEXTS


def test_a_file_may_be_a_document(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt.gz"):
        data = f"{name}\n\nMore of it.\n".encode()
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert read(tmp_path, documents="file", split_bytes=1000) == [
        "a.txt\n\nMore of it.\n",
        "b.txt.gz\n\nMore of it.\n",
    ]
    assert len(read(tmp_path)) == 4


def test_articles(tmp_path: Path) -> None:
    path = tmp_path / "wiki_00"
    path.write_text(
        '<doc id="1" url="u" title="A &amp; "B"">\n'
        'A & "B"\n\nText &lt;br&gt; on () f().\nSection.\nMore.\n</doc>\n'
        '<doc id="2" url="u" title="Only a title">\nOnly a title\n\n\n</doc>\n\nbetween\n'
        '<doc id="3" url="u" title="Not">\nNotably so.\n<doc id="4" url="u" title="">\nNever closed.\n'
    )
    first, *others = read(path)
    assert [line for line in str(first).split("\n") if line] == ["Text   on f().", "Section.", "More."]
    assert "\n\nSection.\n\n" in str(first)
    assert others[0] == Dropped("an article with a title only")
    assert [str(other).strip() for other in others[1:]] == ["Notably so.", "Never closed."]


def test_escaped_text_of_articles_is_text(tmp_path: Path) -> None:
    (tmp_path / "wiki_00").write_text(
        '<doc id="1" url="u" title="C">\nC\n\nA vector&lt;int&gt; v; if 1 &lt;x and y&gt; 2.\nint main () {\n'
        "call ();\n#include &lt;math.h&gt;\nShimen () &lt;br /&gt;is&lt;/ref&gt;.\n</doc>\n"
    )
    assert texts(tmp_path) == [
        "A vector<int> v; if 1 <x and y> 2.\nint main () {\ncall ();\n#include <math.h>\nShimen  is ."
    ]


@pytest.mark.parametrize("line", ["\n", " \t\n", '{"text": "  \\n "}\n', '{"text": ""}\n'])
def test_blank_lines_and_rows_are_dropped(tmp_path: Path, line: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "One."}\n' + line * 3)
    assert read(tmp_path) == ["One.", *[Dropped("blank")] * 3]


@pytest.mark.parametrize("chunk", [30, 47, 64, 200])
def test_articles_are_found_wherever_blocks_end(
    tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = [f"Text {i}.\nM{'o' * (i * 7 % 300)}re</doc, <doc of it." for i in range(60)]
    blocks = [f'<doc id="{i}">\n{document}\n</doc>\n' for i, document in enumerate(documents)]
    (tmp_path / "wiki_00").write_text("".join(blocks).replace("</doc>\n<doc", "<doc", 1) + "<doc ")
    monkeypatch.setattr(formats, "CHUNK", chunk)
    assert texts(tmp_path) == documents


def test_quotation_marks(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_bytes(b'n\ttext\r\n1\t"open\r\n2\tsaid "x" and\r\n\r\n3\r\n')
    found = read(tmp_path / "a.tsv")
    assert found[:2] == ['"open', 'said "x" and']
    assert found[2] == Dropped("blank")
    assert [(r.reason, r.place[-7:]) for r in found[3:] if isinstance(r, Bad)] == [
        ("a row with too few columns", "byte 35"),
    ]
    (tmp_path / "a.csv").write_bytes(
        b'text,n\r\n"a ""b""\r\n\r\nc, d",1\r\n5" disk,2\r\n,3\r\n\xff,4\r\nlast,5'
    )
    found = read(tmp_path / "a.csv")
    assert found[:2] == ['a "b"\r\n\r\nc, d', '5" disk']
    assert found[2] == Dropped("blank")
    assert reasons(found) == [("invalid UTF-8", "line 7")]
    assert found[4] == "last"


def reasons(found: list[str | Bad | Dropped]) -> list[tuple[str, str]]:
    """What is bad of it and where in the file, in order."""
    return [(r.reason, r.place.rpartition(", ")[2]) for r in found if isinstance(r, Bad)]


def good(found: list[str | Bad | Dropped]) -> list[str]:
    return [record for record in found if isinstance(record, str)]


NOT_CLOSED = "broken CSV: a quotation mark that is not closed"
BEHIND = "broken CSV: text behind a closing quotation mark"


@pytest.mark.parametrize("behind", [3, 40])
def test_a_quotation_mark_that_is_not_closed_costs_its_row(tmp_path: Path, behind: int) -> None:
    rows = [f"{number},Text {number}" for number in range(behind)]
    for rest in (rows, [*rows, '7,"Quoted, it is"', *rows]):
        lines = ["id,text", "1,First", '2,"Never closed', *rest, ""]
        (tmp_path / "a.csv").write_text("\n".join(lines))
        found = read(tmp_path / "a.csv")
        assert reasons(found) == [(NOT_CLOSED, "line 3")]
        assert good(found) == ["First", *(row.partition(",")[2].strip('"') for row in rest)]


def test_a_quotation_mark_that_is_not_closed_in_a_long_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "RECORD_BYTES", 1000)
    rows = [f"{number},Text {number}" for number in range(500)]
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress("\n".join(["id,text", '0,"Open', *rows]).encode()))
    found = read(tmp_path / "a.csv.gz")
    assert reasons(found) == [(NOT_CLOSED, "line 2")]
    assert good(found) == [row.partition(",")[2] for row in rows]


def test_a_text_that_is_cut_off_is_one_bad_row(tmp_path: Path) -> None:
    text = "A text of several lines.\n" * 20
    (tmp_path / "a.csv").write_text(f'id,text\n1,First\n2,"{text}')
    assert reasons(read(tmp_path / "a.csv")) == [(NOT_CLOSED, "line 3")]


def test_rows_that_do_not_fit_are_bad(tmp_path: Path) -> None:
    few, many = "a row with too few columns", "a row with too many columns"
    (tmp_path / "a.csv").write_text('id,text,label\n1,A comma, not quoted,x\n2,Short\n3,"Fits, so",y\n')
    found = read(tmp_path / "a.csv")
    assert (reasons(found), good(found)) == ([(many, "line 2"), (few, "line 3")], ["Fits, so"])
    (tmp_path / "a.tsv").write_text("id\ttext\tlabel\n1\tA tab\tmore\tx\n2\tShort\n3\tFits\ty\n")
    found = read(tmp_path / "a.tsv")
    assert (reasons(found), good(found)) == ([(many, "byte 14"), (few, "byte 29")], ["Fits"])


def test_the_dialect_of_csv(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('id,text\n1,"She said \\"yes\\", then left"\n2,Next\n')
    found = read(tmp_path / "a.csv")
    assert (reasons(found), good(found)) == ([(BEHIND, "line 2")], ["Next"])
    assert texts(tmp_path / "a.csv", csv={"escape": "\\"}) == ['She said "yes", then left', "Next"]
    (tmp_path / "b.csv").write_text("id;text\n1;'One; two'\n")
    assert texts(tmp_path / "b.csv", csv={"delimiter": ";", "quote": "'"}) == ["One; two"]
    (tmp_path / "c.csv").write_text('id|text\n1|"Open, and 5" wide\n2|"\n')
    assert texts(tmp_path / "c.csv", csv={"delimiter": "|", "quote": None}) == ['"Open, and 5" wide', '"']
    for wrong in ({"delimiter": "||"}, {"quote": ","}, {"escape": "é"}):
        with pytest.raises(UserError, match="delimiter, quote and escape"):
            config(csv=wrong)


def test_the_two_readings_of_tsv(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text('id\ttext\n1\t"Two\tcells, ""said"" he"\n2\tOne\n')
    assert reasons(read(path)) == [("a row with too many columns", "byte 8")]
    assert texts(path, csv={"quoted_tsv": True}) == ['Two\tcells, "said" he', "One"]


MARKDOWN = """---
title: front matter
---
# A *heading* #

Setext
======
Some **bold _and_ text** with `code`, [a link](https://x.org/a_(b) "t"), [other][ref] and
![an image](x.png)snake_case_name 2 * 3 * 4\\*.<br/> AT&amp;T <https://x.org>[^1]

```python
dropped = True
```
* item *one*
+ item two
  goes on
1984. Year

<!-- a
comment --> > no quote
> quoted
> on

* * * * *

| a | b |
|---|---|

[ref]: https://example.org
[^1]: A note.
    verse
"""


def test_markdown(tmp_path: Path) -> None:
    name = tmp_path / "L'été à la mer.md"
    name.write_text(MARKDOWN)
    expected = [
        "A heading",
        "Setext",
        "Some bold and text with code, a link, other and\nsnake_case_name 2 * 3 * 4*. AT&T https://x.org",
        "item one",
        "item two\n  goes on",
        "Year",
        "no quote\nquoted\non",
        "A note.\n    verse",
    ]
    (found,) = read(tmp_path)
    assert str(found).strip().split("\n\n") == expected
    for size in (1, 7, 100):
        stripper = MarkdownText()
        parts = [MARKDOWN[start : start + size] for start in range(0, len(MARKDOWN), size)]
        result = "".join(stripper.feed(part, False) for part in parts) + stripper.feed("", True)
        assert result == str(found)
    name.write_text("---\nNo front matter, but a line.\n\nText.\n")
    assert texts(name) == ["No front matter, but a line.\nText."]
    name.write_text("```\nonly code\n")
    assert read(name) == [Dropped("Markdown without a text")]


def test_byte_order_marks_of_files_put_together(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"".join(codecs.BOM_UTF8 + WRITERS["a.jsonl"]([text]) for text in TEXTS))
    assert texts(path) == TEXTS


def test_a_byte_order_mark_in_markdown_and_before_a_quoted_column(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_bytes(codecs.BOM_UTF8 + b"# Title\n\nSome text.\n")
    assert texts(tmp_path / "a.md") == ["Title\nSome text."]
    (tmp_path / "a.csv").write_bytes(codecs.BOM_UTF8 + b'"text","id"\n"One.",1\n')
    assert texts(tmp_path / "a.csv") == ["One."]


# ----------------------------------------------------------------------------------------------- cuts

# Any characters but those that end lines, records or texts in one of the formats.
LINES = st.text(st.characters(exclude_categories=["Cc", "Cs", "Zs", "Zl", "Zp"]), min_size=1).filter(
    lambda text: (
        not text.startswith("<doc")
        and not any(c in text for c in ("<", ">", "&", "\ufeff", "（）"))
        and text.strip()
    )
)
DOCUMENTS = st.lists(st.lists(LINES, min_size=1, max_size=3).map("\n".join), min_size=1, max_size=12)


@settings(max_examples=25, deadline=None)
@given(documents=DOCUMENTS, split_bytes=st.integers(1000, 3000), pad=st.integers(0, 700))
@pytest.mark.parametrize("name", WRITERS)
def test_any_cut_gives_every_document_once(
    name: str, documents: list[str], split_bytes: int, pad: int
) -> None:
    documents = [one_line(f"{document}\n{'x' * pad}.", name) for document in documents]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        path.write_bytes(WRITERS[name](documents))
        found = find_files([folder])
        units = cut_into_units(found, config(split_bytes=split_bytes))
        assert texts(folder, split_bytes=split_bytes) == documents
        parts = [part for unit in units for part in unit]
        assert (parts[0].start, parts[-1].end) == (0, path.stat().st_size)
        assert all(a.end == b.start for a, b in pairwise(parts))
        if name in ("a.txt", "a.jsonl", "a.tsv", "wiki_00", "wiki.txt"):
            longest = max(len(WRITERS[name]([document])) for document in documents)
            assert all(part.bytes <= split_bytes + longest for part in parts)


@pytest.mark.parametrize("split_bytes", [1, 7, 50, 200, 10_000])
def test_cuts_fall_between_documents(
    tmp_path: Path, split_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [f"first line {i}\nsecond line é {i}" for i in range(30)]
    (tmp_path / "a.jsonl").write_bytes(WRITERS["a.jsonl"](expected))
    separators = ["\n\n", "\n \t\n", "\n\n\n\n"]
    content = "\n" + "".join(text + separators[i % 3] for i, text in enumerate(expected))
    (tmp_path / "b.txt").write_bytes(content.encode())
    (tmp_path / "wiki_00").write_bytes(wiki_of(expected))
    settings = config().model_copy(update={"split_bytes": split_bytes})
    units = cut_into_units(find_files([str(tmp_path)]), settings)
    found = [record for parts in units for part in parts for record in read_records(part, settings)]
    assert [str(record).strip().replace("\n\n", "\n") for record in found] == expected * 3
    assert all(units)
    if split_bytes <= 50:
        assert len(units) >= 70


def test_row_groups_are_parts(tmp_path: Path) -> None:
    documents = [f"{i} {random.Random(i).randbytes(100).hex()}" for i in range(40)]
    (tmp_path / "a.parquet").write_bytes(parquet_of(documents, group=5))
    units = cut_into_units(find_files([str(tmp_path)]), config(split_bytes=1000))
    assert 3 <= len(units) <= 8
    assert texts(tmp_path, split_bytes=1000) == documents


def test_small_files_share_work_units(tmp_path: Path) -> None:
    for i in range(50):
        (tmp_path / f"{i:02d}.md").write_text(f"Document {i} of some words.")
    files = find_files([str(tmp_path)])
    units = cut_into_units(files, config(split_bytes=1000))
    assert len(units) == 2
    assert [part.name for unit in units for part in unit] == [file.name for file in files]


def test_long_documents_are_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "LONGEST", 1000)
    monkeypatch.setattr(formats, "LONGEST", 1000)
    monkeypatch.setattr(formats, "CHUNK", 600)
    sentences = [f"Sentence {i} schön und gut. " for i in range(300)]
    document = "".join(sentences)
    for name in ("a.txt", "a.md", "wiki_00", "a.jsonl", "a.parquet", "a.csv"):
        folder = tmp_path / name.replace(".", "_")
        folder.mkdir()
        short = "A short one."
        data = WRITERS.get(name, WRITERS["a.txt"])([document, short])
        (folder / name).write_bytes(data)
        found = read(folder)
        last = found.pop() if name != "a.md" else Cut()
        assert str(last).strip() == (short if name != "a.md" else "")
        assert [isinstance(record, Cut) for record in found] == [False, *[True] * (len(found) - 1)], name
        assert not isinstance(last, Cut) or name == "a.md"
        assert len(found) > 7
        assert all(len(str(record)) <= 1000 for record in found)
        assert all(str(record).strip()[-1] == "." for record in found), name
        whole = "".join(map(str, found)).split()
        assert whole[: len(document.split())] == document.split()


def test_cut_places() -> None:
    for text, end in (
        ("a b. c\n\nd e. f", "c\n\n"),
        ("a b. c d", "b. "),
        ("a b c", "b "),
        ("你好。再见", "。"),
    ):
        filler = "x" * (LONGEST - 9)
        document = f"{filler}{text}{'y' * 20}"
        assert document[: records.cut_at(document, 0)].endswith(end)
    assert records.cut_at("x" * LONGEST + "xx", 0) == LONGEST


# ---------------------------------------------------------------------------------------------- damage

BAD_LINES = [
    (b'{"text": "broken \xff byte"}', "invalid UTF-8"),
    (b'{"text": "no end', "broken JSON"),
    (b"[" * 100_000, "broken JSON"),
    (b'["a list"]', "not a JSON object"),
    (b'{"text": 5}', "field 'text' is not a string"),
    (b'{"text": "a lone \\ud800 surrogate"}', "lone surrogate"),
]


def test_bad_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"".join(line + b'\n{"text": "good"}\n' for line, _ in BAD_LINES))
    found = read(path)
    assert found[1::2] == ["good"] * len(BAD_LINES)
    bad = [record for record in found if isinstance(record, Bad)]
    assert [record.reason for record in bad] == [reason for _, reason in BAD_LINES]
    assert bad[0] == Bad("invalid UTF-8", f"{path}, byte 0", '{"text": "broken \ufffd byte"}\n')
    assert len(bad[2].excerpt) == 200


def test_bad_text_costs_its_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"good\n\nb\xe9d\n\ngood\n")
    found = read(tmp_path)
    assert [record for record in found if isinstance(record, str)] == ["good\n", "good\n"]
    assert found[1] == Bad("invalid UTF-8", f"{tmp_path}/a.txt, byte 6", "b\ufffdd\n")
    (tmp_path / "a.txt").write_bytes(b" \n\t")
    assert read(tmp_path, documents="file") == [Dropped("blank")]


@pytest.mark.parametrize("new", [pa.ipc.new_file, pa.ipc.new_stream, None])
def test_bad_rows(tmp_path: Path, new: Any) -> None:
    invalid = pa.array([b"good", None, b" ", b"b\xe9d", b"good"]).cast(pa.binary())
    column = pa.Array.from_buffers(pa.string(), 5, invalid.buffers(), invalid.null_count)
    table = pa.table({"text": column})
    path = tmp_path / ("a.arrow" if new else "a.parquet")
    if new:
        with new(str(path), table.schema) as writer:
            writer.write_table(table)
    else:
        pq.write_table(table, path)
    found = read(path)
    assert [found[0], found[4]] == ["good", "good"]
    bad = [record for record in found if isinstance(record, Bad)]
    assert [(record.reason, record.place) for record in bad] == [("invalid UTF-8", f"{path}, row 3")]
    assert found[1] == found[2] == Dropped("blank")


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("how", ["cut", "flipped", "no start"])
def test_damaged_compression(tmp_path: Path, suffix: str, how: str) -> None:
    generator = random.Random(0)
    documents = [generator.randbytes(200).hex() for _ in range(2_000)]
    data = bytearray(COMPRESS[suffix](WRITERS["a.jsonl"](documents)))
    if how == "cut":
        del data[-len(data) // 4 :]
    elif how == "flipped":
        for place in range(len(data) // 2, len(data), 997):
            data[place] ^= 0xFF
    else:
        data[:8] = b"\0" * 8
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(data)
    (tmp_path / "b.txt").write_text("Another file.")
    *good, last, other = read(tmp_path)
    assert other == "Another file."
    good = [text for text in good if isinstance(text, str)]
    assert isinstance(last, Bad)
    if (suffix, how) != (".zst", "flipped"):  # pyarrow writes no checksum
        assert good == documents[: len(good)]
    if how == "no start":
        assert not good
        assert (last.reason, last.place) == ("a damaged file, the rest of it lost", f"{path}, the whole file")
        with pytest.raises(UserError, match=f"cannot read {path}: "):
            read(path)
    elif how == "cut":
        assert len(good) > 800
        assert last.place == f"{path}, all after record {len(good)}, where it breaks off"
        assert last.excerpt


def lost_share(path: Path) -> float:
    """Of the file's bytes, by what is bad of it."""
    return sum(record.lost for record in read(path.parent) if isinstance(record, Bad)) / path.stat().st_size


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.md"])
def test_what_is_before_a_damaged_place_is_read_and_the_rest_counted(
    tmp_path: Path, name: str, suffix: str
) -> None:
    draw = random.Random(0)
    documents = [draw.randbytes(2000).hex() for _ in range(600)]
    data = COMPRESS[suffix](WRITERS.get(name, WRITERS["a.txt"])(documents))
    place = len(data) // 3
    path = tmp_path / f"{name}{suffix}"
    whole = data[:place]
    if suffix in (
        ".gz",
        ".zst",
    ):  # whose damaged blocks often give some bytes or other: behind a whole member
        whole = COMPRESS[suffix](WRITERS.get(name, WRITERS["a.txt"])(documents[:200]))
    path.write_bytes(whole + b"\1" * (len(data) - place))
    *found, last = read(tmp_path)
    assert isinstance(last, Bad)
    assert last.reason == "a damaged file, the rest of it lost"
    assert not any(isinstance(record, Bad) for record in found)  # what the damage broke is a part of it
    characters = sum(len(str(record).strip()) for record in found)
    if suffix != ".bz2" or name != "a.md":  # whose blocks are large
        assert 0.15 < characters / 2.4e6 < 0.35
    assert 0.6 < lost_share(path) < 0.75


def test_a_file_that_breaks_off_gives_what_there_is(tmp_path: Path) -> None:
    text = "".join(f"Line {number} of a long text.\n" for number in range(20_000))
    data = gzip.compress(text.encode())
    (tmp_path / "a.txt.gz").write_bytes(data[: len(data) // 2])
    first, last = read(tmp_path, documents="file")
    assert str(first) == text[: len(str(first))]
    assert len(str(first)) > len(text) / 3
    assert isinstance(last, Bad)
    assert last.place == f"{tmp_path}/a.txt.gz, all after record 1, where it breaks off"


def test_bad_records_count_their_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n' * 50 + b"{broken of some length\n" * 10)
    assert lost_share(path) == pytest.approx(230 / path.stat().st_size)


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet", "a.arrow"])
def test_a_plain_file_with_the_name_of_a_compressed_one(tmp_path: Path, name: str, suffix: str) -> None:
    (tmp_path / f"{name}{suffix}").write_bytes(WRITERS[name](TEXTS))
    assert texts(tmp_path) == TEXTS
    (tmp_path / f"{name}{suffix}").write_bytes(b"")
    (tmp_path / "b.txt").write_text("Another.")
    assert texts(tmp_path / "b.txt") == ["Another."]


def test_a_zst_that_looks_far_back(tmp_path: Path) -> None:
    """Of a frame whose header asks for a window of 2 GiB, which the library refuses."""
    if shutil.which("zstd") is None:
        pytest.skip("no program zstd here")
    data = WRITERS["a.jsonl"](TEXTS)
    packed = subprocess.run(["zstd", "-cq", "--long=31"], input=data, capture_output=True, check=True).stdout
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(packed)
    with pytest.raises(OSError, match="Frame requires too much memory"):
        pa.CompressedInputStream(pa.OSFile(str(path)), "zstd").read()
    assert texts(path) == TEXTS
    path.write_bytes(packed[:-9])
    assert [r.reason for r in read(tmp_path) if isinstance(r, Bad)] == ["a damaged file, the rest of it lost"]


def test_without_the_program_for_a_zst_that_looks_far_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd\x04\xa8" + b"\0" * 30)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"a\.jsonl\.zst was packed by zstd --long: install the program zstd"):
        read(tmp_path / "a.jsonl.zst")


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "stream.arrow"])
def test_damaged_tables(tmp_path: Path, name: str) -> None:
    documents = [random.Random(i).randbytes(100).hex() for i in range(600)]
    whole = parquet_of(documents, 100) if name == "a.parquet" else WRITERS[name](documents)
    path = tmp_path / name
    for damage in range(20):
        data = bytearray(whole)
        place = random.Random(damage).randrange(len(data) - 400)
        if damage % 2:
            data[place : place + 300] = b"\xff" * 300
        else:
            del data[place:]
        path.write_bytes(data)
        found = read(tmp_path)  # never crashes
        bad = [record for record in found if isinstance(record, Bad)]
        good = [record for record in found if isinstance(record, str)]
        assert bad or len(good) == len(documents) or damage % 2 == 0
        assert set(good) - set(documents) == set() or damage % 2
    path.write_bytes(b"nonsense" * 100)
    (lost,) = read(tmp_path)
    assert isinstance(lost, Bad)
    assert lost.place == f"{path}, the whole file"
    with pytest.raises(UserError, match=f"cannot read {path}: "):
        read(path)


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.parquet", "a.arrow", "a.csv.gz", "a.arrow.zst"])
def test_a_table_without_the_column(tmp_path: Path, name: str) -> None:
    stem, suffix = (
        (name, "") if name.count(".") == 1 else (name[: name.rindex(".")], name[name.rindex(".") :])
    )
    (tmp_path / name).write_bytes(COMPRESS[suffix](WRITERS[stem](["one"])))
    with pytest.raises(
        UserError, match=r"no column 'txet'; did you mean 'text'\?; its columns are '\w+', 'text'"
    ):
        read(tmp_path, text_field="txet")
    with pytest.raises(UserError, match="no column"):
        list(
            read_records(
                Part(str(tmp_path / name), f".{name.split('.')[1]}", 0, 2**20), config(text_field="txet")
            )
        )


def test_a_column_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.arrow").write_bytes(arrow_of(["one"]))
    with pytest.raises(
        UserError,
        match=r"the column 'id' of .*a\.arrow holds int64, not text; its columns of text are 'text'",
    ):
        read(tmp_path, text_field="id")


def test_records_above_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "RECORD_BYTES", 1000)
    monkeypatch.setattr("data_prep.readers.tables.RECORD_BYTES", 1000)
    monkeypatch.setattr("data_prep.readers.tables.BATCH_BYTES", 100)
    documents = ["one", "long, " * 5000, "two", "lines, and\n, " * 1000, "three"]
    for name in ("a.jsonl", "a.tsv", "a.csv", "a.parquet", "a.arrow"):
        path = tmp_path / name
        path.write_bytes(WRITERS[name]([one_line(document, name) for document in documents]))
        found = read(path)
        assert found[::2] == ["one", "two", "three"], name
        bad = [record for record in found if isinstance(record, Bad)]
        assert [record.reason for record in bad] == ["a record of more than 16 MiB"] * 2
        assert all(5 < len(record.excerpt) <= 200 for record in bad)


# ------------------------------------------------------------------------------------------------ find


def test_inputs_are_found_once_and_in_order(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.txt", "c.pdf", "C.CSV", "noted", ".hidden/a.txt", ".b.txt", "sub/d.txt.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "wiki_00").write_text('<doc id="1" title="t">\nText.\n</doc>')
    (tmp_path / "sub" / "loop").symlink_to(tmp_path)
    files = find_files([str(tmp_path / "*.jsonl"), f"{tmp_path}/./a.txt", str(tmp_path)])
    names = [os.path.relpath(file.name, tmp_path) for file in files]
    assert names == ["b.jsonl", "a.txt", "C.CSV", "sub/d.txt.gz", "wiki_00"]
    assert [file.named for file in files] == [False, True, False, False, False]


def test_what_is_not_read_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.txt", "b.html", "c.HTML", "d.xml.gz", "noted", "sub/e.pdf", "sub/f.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "settings.json").write_text('{"vocab": 5}')
    (tmp_path / "text.json").write_text('{"text": "One."}')
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    (tmp_path / "closed").mkdir()
    scan = os.scandir

    def refused(path: str) -> Any:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", refused)
    unread = Counter[str]()
    assert len(find_files([str(tmp_path)], "text", unread)) == 3
    assert unread == {
        ".html": 2,
        ".xml.gz": 1,
        "without an ending": 1,
        ".pdf": 1,
        ".json without a field 'text'": 1,
        "link to nothing": 1,
        "folder: Permission denied": 1,
    }


def test_a_folder_without_permission_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, inner = tmp_path / "closed", tmp_path / "closed" / "a.txt"
    folder.mkdir()
    inner.write_text("x")
    stat, scan = os.stat, os.scandir

    def refused(path: Any, of: Callable[..., Any], *closed: Path, **how: Any) -> Any:
        if str(path) in map(str, closed):
            raise PermissionError(13, "Permission denied", str(path))
        return of(path, **how)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", lambda path: refused(path, scan, folder))
        with pytest.raises(UserError, match=rf"cannot read the folder {folder}: Permission denied; get the"):
            find_files([str(folder)])
    monkeypatch.setattr(os, "stat", lambda path, **how: refused(path, stat, inner, **how))
    with pytest.raises(UserError, match=rf"cannot read {inner}: Permission denied; get the right"):
        find_files([str(inner)])


def test_a_full_folder_of_temporary_files_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "a.parquet.gz"
    path.write_bytes(gzip.compress(WRITERS["a.parquet"](["one"])))
    monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(UserError, match=rf"no room for the content of {path} in .* set TMPDIR to a folder"):
        read(path)


def test_json_of_one_object_and_of_a_broken_array(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"text": "Only one.", "id": 1}, indent=2))
    assert texts(path) == ["Only one."]
    array = json.dumps([{"text": f"Number {number}"} for number in range(100)])
    path.write_text(array[:-500])
    found = read(path)
    assert good(found) == [f"Number {number}" for number in range(len(found) - 1)]
    assert reasons(found) == [("broken JSON, the rest of the file lost", f"object {len(found) - 1}")]
    monkeypatch.setattr(formats, "CHUNK", 50)
    path.write_text(array)
    assert len(texts(path)) == 100
    path.write_bytes(b'[{"text": "a \xff"}, {"body": 1}, 5, {"text": "good"}]')
    assert [reason for reason, _ in reasons(read(path))] == ["invalid UTF-8", "not a JSON object"]
    assert Dropped("no field 'text'") in read(path)


def test_a_field_that_no_line_has_is_told_with_those_there_are(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"txt": "One.", "id": 1}\n{"body": "Two."}\n')
    with pytest.raises(
        UserError, match=r"no field 'text'; did you mean 'txt'\?; its fields are 'txt', 'id', 'body'"
    ):
        read(tmp_path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_record_without_text_is_empty_not_bad(tmp_path: Path, name: str) -> None:
    objects = [{"text": None}, {"id": 1}, {"text": ""}, {"text": "good"}]
    lines = "\n".join(map(json.dumps, objects))
    (tmp_path / name).write_text(lines if name == "a.jsonl" else json.dumps(objects))
    assert read(tmp_path / name) == [Dropped("blank"), Dropped("no field 'text'"), Dropped("blank"), "good"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_field_without_text_is_told_before_anything_is_read(tmp_path: Path, name: str) -> None:
    one = [{"title": "One.", "text": {"body": "Two."}, "id": number} for number in range(3)]
    lines = "\n".join(map(json.dumps, one))
    (tmp_path / name).write_text(lines if name == "a.jsonl" else json.dumps(one))
    for field, what in (("text", "objects"), ("id", "numbers")):
        with pytest.raises(
            UserError,
            match=f"the field '{field}' of .* holds {what}, not text; its fields of text are 'title'$",
        ):
            read(tmp_path / name, text_field=field)
    with pytest.raises(UserError, match=r"no field 'txet'; did you mean 'text'\?; its fields are 'title', "):
        read(tmp_path / name, text_field="txet")


def test_output_of_prep_is_no_input(tmp_path: Path) -> None:
    (tmp_path / "out" / ".prep").mkdir(parents=True)
    for name in ("a.txt", "out/train-00000.arrow", "out/quarantine.jsonl", "out/b.txt"):
        (tmp_path / name).write_text("x")
    assert [Path(file.name).name for file in find_files([str(tmp_path)])] == ["a.txt", "b.txt"]


def test_input_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no file, folder or match for"):
        find_files([str(tmp_path / "none")])
    with pytest.raises(UserError, match=r"has no file of the kinds \.txt, \.md, .*\.zst, and WikiExtractor"):
        find_files([str(tmp_path)])
    (tmp_path / "a.pdf").write_text("x")
    with pytest.raises(UserError, match=r"a\.pdf is none of \.txt, \.md"):
        find_files([str(tmp_path / "a.pdf")])
    with pytest.raises(UserError, match=r"no match of .*\*\.pdf is one of"):
        find_files([str(tmp_path / "*.pdf")])
    (tmp_path / "a.txt").touch()
    with pytest.raises(UserError, match="every file is empty"):
        find_files([str(tmp_path)])
    with pytest.raises(UserError, match=r"cannot read .*gone\.txt: No such file"):
        list(read_records(Part(str(tmp_path / "gone.txt"), ".txt", 0, 5), config()))


def test_a_file_is_asked_once_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wiki_00").write_text("<doc id=1>\nOne.\n</doc>\n" * 100)
    asked = list[str]()

    def ask(name: str) -> bool:
        asked.append(name)
        return True

    monkeypatch.setattr("data_prep.readers.read._begins_as_wiki", ask)
    settings = config(split_bytes=1000)
    parts = [part for some in cut_into_units(find_files([str(tmp_path)]), settings) for part in some]
    assert len(parts) > 2
    for _ in range(2):
        assert sum(len(list(read_records(part, settings))) for part in parts) == 100
    assert asked == [str(tmp_path / "wiki_00")]


# --------------------------------------------------------------------------------------------- memory

MEASURE = """
import gc, resource, sys
from bertscale.config import PrepConfig
from data_prep.readers.read import cut_into_units, find_files, read_records
from data_prep.readers.records import Bad
config = PrepConfig(input=[sys.argv[1]], output="x", documents=sys.argv[2])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
count = bad = size = 0
for parts in cut_into_units(find_files(config.input), config):
    for part in parts:
        for record in read_records(part, config):
            if isinstance(record, Bad):
                bad += 1
            else:
                count += 1
                size += len(record)
print(count, bad, size, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
HUGE = 300 * 2**20
LINE = "Sätze mit Wörtern und 😀, die wir lesen. ".encode() * 1000


def _write_huge(path: Path) -> None:
    """300 MB without a newline, in the form that the name asks for."""
    if path.name.endswith(".parquet"):
        text = pa.array([LINE.decode()[:100_000]] * 8000)
        pq.write_table(pa.table({"text": text}), path, use_dictionary=False, row_group_size=8000)
        return
    if path.name.endswith(".arrow"):
        table = pa.table({"text": pa.array([LINE.decode()] * 7000)})
        with pa.ipc.new_stream(str(path), table.schema) as writer:
            writer.write_table(table)
        return
    head = {"a.jsonl": b'{"text": "', "a.csv": b'text\n"', "a.tsv": b"text\n", "wiki_00": b'<doc id="1">\n'}
    with gzip.open(path, "wb", 1) if path.suffix == ".gz" else path.open("wb") as file:
        file.write(head.get(path.name, b""))
        for _ in range(HUGE // len(LINE)):
            file.write(LINE)
        if path.name == "a.jsonl":
            file.write(b'"}\n{"text": "' + LINE * 300 + b'"}\n')


@pytest.mark.parametrize(
    ("name", "documents"),
    [
        ("a.txt", "blank_line"),
        ("a.txt", "file"),
        ("a.txt.gz", "blank_line"),
        ("a.md", "file"),
        ("wiki_00", "file"),
        ("a.jsonl", "file"),
        ("a.csv", "file"),
        ("a.tsv", "file"),
        ("a.parquet", "file"),
        ("a.arrow", "file"),
    ],
)
def test_memory_stays_small(tmp_path: Path, name: str, documents: str) -> None:
    path = tmp_path / name
    _write_huge(path)
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path), documents], capture_output=True, text=True, check=True
    )
    path.unlink()
    count, bad, size, growth = map(int, result.stdout.split())
    assert growth * 1024 < 200 * 2**20, f"{growth / 1024:.0f} MiB more than at the start"
    if name in ("a.csv", "a.tsv"):
        assert (count, bad) == (0, 1)
    else:
        assert bad == (name == "a.jsonl")
        assert count > 10
        assert size > 10 * LONGEST
