"""Files in other encodings than UTF-8: real bytes through each reader, cut into units, recognised."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bertscale.config import PrepConfig, UserError, check_config
from data_prep.build import prep
from data_prep.readers.encodings import can_be_cut, recognise
from data_prep.readers.read import Part, cut_into_units, find_files, read_records
from data_prep.readers.records import Bad, Record

CHINESE = "人人生而自由，在尊严和权利上一律平等。他们赋有理性和良心，并应以兄弟关系的精神相对待。"
TRADITIONAL = "人人生而自由，在尊嚴和權利上一律平等。他們賦有理性和良心，並應以兄弟關係的精神相對待。"
JAPANESE = "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。表示と機能。"
KOREAN = (
    "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다. 인간은 이성과 양심을 부여받았다."
)
RUSSIAN = "Все люди рождаются свободными и равными в своем достоинстве и правах. Они наделены разумом."
FRENCH = "Tous les êtres humains naissent libres et égaux en dignité et en droits. Ils sont doués de raison."
TEXT = {
    "gb18030": CHINESE
    + "㐂镕丂丄",  # the first of these takes four bytes, the others two with an ASCII letter
    "gbk": CHINESE + "镕丂丄",
    "big5": TRADITIONAL + "功蓋許",  # their second byte is that of a backslash
    "shift_jis": JAPANESE + "ソ能",
    "euc_jp": JAPANESE,
    "cp949": KOREAN,
    "cp1251": RUSSIAN,
    "koi8-r": RUSSIAN,
    "iso8859-5": RUSSIAN,
    "latin-1": FRENCH,
    "cp1252": FRENCH + " « Œuvre »",
    "utf-16": CHINESE + "\u0a0a\u0d0a\u0a20",  # whose bytes are newlines and spaces
    "utf-16-le": CHINESE,
    "utf-32": CHINESE,
    "iso2022_jp": JAPANESE,
    "hz": "人人生而自由，",
    "utf-8": CHINESE,
}
WRITERS: dict[str, Callable[[list[str]], str]] = {
    "a.txt": lambda docs: "\n\n".join(docs),
    "a.md": lambda docs: docs[0],
    "a.jsonl": lambda docs: "".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in docs),
    "a.csv": lambda docs: "id,text\r\n" + "".join(f'1,"{t}"\r\n' for t in docs),
    "a.tsv": lambda docs: "id\ttext\n" + "".join(f"1\t{t}\n" for t in docs),
    "wiki.txt": lambda docs: "".join(f'<doc id="1" title="x">\nx\n\n{t}\n\n</doc>\n' for t in docs),
}


def config(**values: Any) -> PrepConfig:
    return check_config(PrepConfig, {"input": ["x"], "output": "y", **values}, "test")


def cut(path: Path, **values: Any) -> tuple[PrepConfig, list[Part]]:
    settings = config(**values)
    units = cut_into_units(find_files([str(path)]), settings)
    return settings, [part for parts in units for part in parts]


def read(path: Path, **values: Any) -> list[Record]:
    settings, parts = cut(path, **values)
    found = [record for part in parts for record in read_records(part, settings)]
    return [record.strip() if isinstance(record, str) else record for record in found]


def documents(encoding: str, count: int = 3) -> list[str]:
    return [f"{number}. {TEXT[encoding]}" for number in range(count)]


@pytest.mark.parametrize("encoding", TEXT)
@pytest.mark.parametrize("name", WRITERS)
def test_each_reader_reads_each_encoding(name: str, encoding: str, tmp_path: Path) -> None:
    docs = documents(encoding)
    data = WRITERS[name](docs).encode(encoding)
    if name == "a.md":
        docs = docs[:1]
    for written, of in ((data, name), (gzip.compress(data), f"{name}.gz")):
        path = tmp_path / of
        path.write_bytes(written)
        found = read(path, encoding=encoding)
        if name == "a.md":
            assert TEXT[encoding][:6] in str(found[0])
        assert len(found) == len(docs)
        if name != "a.md":
            assert found == docs


@pytest.mark.parametrize("encoding", [name for name in TEXT if can_be_cut(name)])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.tsv", "wiki.txt"])
def test_a_file_is_cut_between_documents_whatever_bytes_its_characters_have(
    name: str, encoding: str, tmp_path: Path
) -> None:
    docs = documents(encoding, 400)
    path = tmp_path / name
    path.write_bytes(WRITERS[name](docs).encode(encoding))
    settings, parts = cut(path, encoding=encoding, split_bytes=1000)
    assert len(parts) > 10
    found = [list(read_records(part, settings)) for part in parts]
    assert [str(record).strip() for of_part in found for record in of_part] == docs
    assert sum(map(bool, found)) > 10


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32", "iso2022_jp", "hz", "utf-7", "cp037"])
def test_a_file_that_cannot_be_read_from_any_line_on_is_not_cut(encoding: str, tmp_path: Path) -> None:
    docs = documents("latin-1" if encoding == "cp037" else encoding if encoding in TEXT else "utf-8", 300)
    path = tmp_path / "a.txt"
    path.write_bytes("\n\n".join(docs).encode(encoding))
    _, parts = cut(path, encoding=encoding, split_bytes=1000)
    assert [(part.start, part.end) for part in parts] == [(0, path.stat().st_size)]
    assert read(path, encoding=encoding, split_bytes=1000) == docs


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["gb18030", "gbk", "big5", "shift_jis", "euc_jp", "cp949", "utf-16", "latin-1"]),
    st.lists(
        st.text("ab 表ソ能許功蓋镕丂㐂가é\u0a0a", min_size=1).filter(str.strip), min_size=1, max_size=40
    ),
)
def test_any_cut_gives_the_documents(tmp_path_factory: Any, encoding: str, docs: list[str]) -> None:
    texts = [doc.encode(encoding, "ignore").decode(encoding) for doc in docs]
    texts = [text.strip() for text in texts if text.strip()]
    path = tmp_path_factory.getbasetemp() / f"cut-{encoding}.txt"
    path.write_bytes("\n\n".join([*texts, "end " * 400]).encode(encoding))
    found = read(path, encoding=encoding, split_bytes=1000)
    assert found == [*texts, ("end " * 400).strip()]


def test_a_byte_that_is_no_character_costs_its_record(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    good = CHINESE.encode("gb18030")
    path.write_bytes(b"\n\n".join([good, b"abc \xff def", good]))
    first, bad, last = read(path, encoding="gb18030")
    assert first == last == CHINESE
    assert isinstance(bad, Bad)
    assert bad.reason == "invalid gb18030"
    assert bad.place == f"{path}, byte {len(CHINESE.encode()) + 2} of its text as UTF-8"
    assert bad.excerpt.strip() == "abc \ufffd def"
    (tmp_path / "cut.txt").write_bytes(b"\n\n".join([good] * 50 + [b"\xff"] + [good] * 50))
    _, parts = cut(tmp_path / "cut.txt", encoding="gb18030", split_bytes=1000)
    (bad,) = (
        record
        for record in read(tmp_path / "cut.txt", encoding="gb18030", split_bytes=1000)
        if isinstance(record, Bad)
    )
    assert any(f"counted from byte {part.start} of the file" in bad.place for part in parts)


def test_tables_have_utf_8_in_any_case(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": documents("utf-8")}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", encoding="gb18030") == documents("utf-8")


# --------------------------------------------------------------------------------- a wrong encoding


@pytest.mark.parametrize(
    ("written", "found"),
    [
        *((name, name) for name in ("gb18030", "big5", "shift_jis", "euc_jp", "cp949")),
        *((name, name) for name in ("cp1251", "koi8-r", "iso8859-5", "cp1252", "utf-16")),
        ("gbk", "gb18030"),
        ("latin-1", "cp1252"),
        ("utf-8", None),
    ],
)
def test_an_encoding_is_recognised(written: str, found: str | None) -> None:
    data = (TEXT[written] * 20).encode(written)
    assert recognise(data) == found
    assert recognise(data[:-1]) in (found, None)  # a character is cut
    assert recognise(b"plain ASCII") is None


@pytest.mark.parametrize("kind", ["txt", "txt.gz", "jsonl", "csv"])
@pytest.mark.parametrize("given", [None, "tokenizer"])
def test_a_wrong_encoding_names_the_right_one(
    kind: str, given: str | None, tmp_path: Path, tiny_data: Path
) -> None:
    name = f"a.{kind}"
    data = WRITERS[name.removesuffix(".gz")](documents("gb18030", 30)).encode("gb18030")
    (tmp_path / name).write_bytes(gzip.compress(data) if kind.endswith("gz") else data)
    values: dict[str, Any] = {"input": [str(tmp_path / name)], "output": str(tmp_path / "out"), "workers": 1}
    if given:
        values["tokenizer"] = str(tiny_data / "tokenizer.model")
    with pytest.raises(UserError) as caught:
        prep(config(**values))
    message = (
        f"30 of 30 records are not utf-8 text; {tmp_path / name} decodes as gb18030: give encoding=gb18030"
    )
    assert str(caught.value) == f"input: {message}"


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-16-be", "utf-32-be"])
@pytest.mark.parametrize("named", ["utf-8", "gb18030"])
def test_marks_of_utf_16_and_utf_32_need_no_setting(
    name: str, encoding: str, named: str, tmp_path: Path
) -> None:
    docs = documents("utf-16", 1 if name == "a.md" else 30)
    path = tmp_path / name
    path.write_bytes(("\ufeff" if encoding.endswith("be") else "").encode(encoding))
    with open(path, "ab") as file:
        file.write(WRITERS[name](docs).encode(encoding))
    (tmp_path / f"b{name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    expected = [doc.removeprefix("0. ") for doc in docs] if name == "a.md" else docs  # the number of a list
    assert read(tmp_path, encoding=named, split_bytes=1000) == expected * 2


def test_utf_8_is_named_as_well(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_bytes("\n\n".join(documents("utf-8", 20)).encode())
    values = {"input": [str(tmp_path / "b.txt")], "output": str(tmp_path / "out"), "encoding": "big5"}
    with pytest.raises(
        UserError, match=r"are not big5 text; \S+b\.txt decodes as utf-8: give encoding=utf-8"
    ):
        prep(config(**values, workers=1))


@pytest.mark.parametrize(
    ("encoding", "said"),
    [
        ("gb1830", "there is no encoding 'gb1830'; did you mean gb18030?"),
        ("hex", "there is no encoding 'hex'; some are utf-8, gb18030, big5, shift_jis and latin-1"),
        ("unicode_escape", "there is no encoding 'unicode_escape'; some are utf-8"),
        ("chinese-simplified", "there is no encoding 'chinese-simplified'; some are utf-8"),
    ],
)
def test_a_name_that_is_no_encoding(encoding: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        config(encoding=encoding)
    assert str(caught.value).startswith(f"test: encoding: {said}")


def test_a_data_set_is_the_same_in_each_encoding_and_for_any_number_of_workers(
    tmp_path: Path, tiny_data: Path
) -> None:
    """And the key left away, or utf-8 said in another way, is the plan of earlier versions."""
    docs = documents("gbk", 200)
    made = []
    for encoding, workers in (("utf-8", 1), ("gb18030", 1), ("gb18030", 2), ("utf-16", 2)):
        folder = tmp_path / f"{encoding}-{workers}"
        folder.mkdir()
        (folder / "a.txt").write_bytes("\n\n".join(docs).encode(encoding))
        values = {"input": [str(folder / "a.txt")], "output": str(folder / "out"), "encoding": encoding}
        tokenizer = str(tiny_data / "tokenizer.model")
        prep(config(**values, workers=workers, tokenizer=tokenizer, split_bytes=10**9))
        made.append((folder / "out/train-00000.arrow").read_bytes())
        said = json.loads((folder / "out/manifest.json").read_text())["settings"].get("encoding")
        assert said == (None if encoding == "utf-8" else encoding)
    assert made[1:] == made[:1] * 3
