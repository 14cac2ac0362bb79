"""Questions are read from SQuAD's files and from tables, and every answer is found again from its tokens."""

from __future__ import annotations

import bz2
import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from bertscale.config import UserError
from bertscale.config.examples import EncodingConfig, ExamplesConfig
from bertscale.examples.squad import read_questions
from bertscale.tasks.questions import QuestionTask
from bertscale.tasks.task import QuestionExample
from bertscale.tokenizer import Tokenizer, load_tokenizer

DATA = os.environ.get("BERTSCALE_DATA", "")  # the fixture of all tests takes such variables away
CONTEXT = "Mary  had a little lamb. Its fleece was white."
real = pytest.mark.skipif(not DATA, reason="BERTSCALE_DATA names no folder of real data")


def article(title: str, *questions: dict[str, Any], context: str = CONTEXT) -> dict[str, Any]:
    return {"title": title, "paragraphs": [{"context": context, "qas": list(questions)}]}


def asked(identity: str, *answers: tuple[str, int], **more: Any) -> dict[str, Any]:
    found = [{"text": text, "answer_start": start} for text, start in answers]
    return {"id": identity, "question": "Who?", "answers": found, **more}


def read(
    path: Path, said: list[str] | None = None, **keys: Any
) -> tuple[list[QuestionExample], list[dict[str, Any]]]:
    data = ExamplesConfig.model_validate({"train": str(path), **keys})
    return read_questions(path, data, (said if said is not None else []).append)


def write(path: Path, *articles: dict[str, Any]) -> Path:
    path.write_text(json.dumps({"version": "v2.0", "data": articles}, ensure_ascii=False), encoding="utf-8")
    return path


# ------------------------------------------------------------------------------------------- formats


def test_both_versions_of_squad(tmp_path: Path) -> None:
    none = asked("3", is_impossible=True, plausible_answers=[{"text": "Its", "answer_start": 25}])
    path = write(
        tmp_path / "a.json", article("Lamb", asked("1", ("Mary", 0), ("lamb", 19)), asked("2"), none)
    )
    examples, broken = read(path)
    assert broken == []
    assert [example.answers for example in examples] == [(("Mary", 0), ("lamb", 19)), (), ()]
    assert [example.identity for example in examples] == ["1", "2", "3"]
    assert all(example.known for example in examples)
    assert examples[0].place == f"{path}, article 'Lamb', paragraph 1, question 1"
    assert examples[0].row == {"title": "Lamb", "id": "1", "question": "Who?"}


def test_questions_that_are_only_to_be_answered(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", article("Lamb", {"id": 7, "question": "Who?"}))
    [example], _ = read(path)
    assert (example.known, example.answers, example.identity) == (False, (), "7")


@pytest.mark.parametrize("ending", ["", ".gz", ".bz2", ".zst"])
def test_compressed_and_with_a_byte_order_mark(tmp_path: Path, ending: str) -> None:
    content = (
        b"\xef\xbb\xbf" + write(tmp_path / "a.json", article("Lamb", asked("1", ("Mary", 0)))).read_bytes()
    )
    compress: dict[str, Callable[[bytes], bytes]] = {
        "": bytes,
        ".gz": gzip.compress,
        ".bz2": bz2.compress,
        ".zst": lambda data: pa.compress(data, "zstd", asbytes=True),
    }
    path = tmp_path / f"b.json{ending}"
    path.write_bytes(compress[ending](content))
    assert read(path)[0][0].answers == (("Mary", 0),)


ROWS = [
    {"id": "1", "question": "Who?", "context": CONTEXT, "answers": {"text": ["Mary"], "answer_start": [0]}},
    {"id": "2", "question": "Where?", "context": CONTEXT, "answers": {"text": [], "answer_start": []}},
]


@pytest.mark.parametrize("form", ["jsonl", "json", "parquet", "flat"])
def test_tables_in_the_form_of_hugging_face(tmp_path: Path, form: str) -> None:
    path = tmp_path / f"a.{'json' if form == 'flat' else form}"
    if form == "parquet":
        pa.parquet.write_table(pa.Table.from_pylist(ROWS), path)
    elif form == "jsonl":
        path.write_text("\n".join(map(json.dumps, ROWS)))
    else:
        path.write_text(json.dumps({"data": ROWS} if form == "flat" else ROWS))
    examples, broken = read(path)
    assert broken == []
    assert [example.answers for example in examples] == [(("Mary", 0),), ()]
    assert [example.identity for example in examples] == ["1", "2"]
    assert examples[1].row["question"] == "Where?"


def test_columns_have_other_names_and_answers_other_forms(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    row = {"q": "Who?", "text": CONTEXT, "gold": [{"text": "Mary", "answer_start": 0}]}
    path.write_text(json.dumps(row) + "\n" + json.dumps({**row, "gold": json.dumps(row["gold"])}))
    examples, _ = read(path, question="q", context="text", answers="gold")
    assert [example.answers for example in examples] == [(("Mary", 0),)] * 2
    assert examples[0].identity == f"{path}, line 1"
    with pytest.raises(UserError, match=r"no column 'question'.*data\.question"):
        read(path)


# ----------------------------------------------------------------------------------------- bad answers


@pytest.mark.parametrize(
    ("answer", "start", "found"),
    [
        ("Mary had", 0, ("Mary  had", 0)),  # other white space
        ("little\nlamb", 12, ("little lamb", 12)),
        ("lamb", 20, ("lamb", 19)),  # counted wrongly
        ("lamb", -1, ("lamb", 19)),
        ("white", 900, ("white", 40)),
        ("lamb.Its", 19, ("lamb. Its", 19)),  # a space is missing
        (" had ", 5, (" had ", 5)),
        ("\uff2dary", 0, ("Mary", 0)),  # a full-width M
        ("Its  fleece was white", 25, ("Its fleece was white", 25)),
        ("a", 3, None),  # several are near
        ("wolf", 19, None),
        ("", 0, None),
    ],
)
def test_answers_are_checked_and_mended(
    tmp_path: Path, answer: str, start: int, found: tuple[str, int] | None
) -> None:
    said: list[str] = []
    path = write(tmp_path / "a.json", article("Lamb", asked("1", (answer, start)), asked("2", ("Mary", 0))))
    examples, broken = read(path, said)
    if found is None:
        assert [example.identity for example in examples] == ["2"]
        assert [row["place"] for row in broken] == [f"{path}, article 'Lamb', paragraph 1, question 1"]
        assert broken[0]["row"]["id"] == "1"
        assert said == []
    else:
        assert examples[0].answers == (found,)
        assert broken == []
        assert len(said) == (found != (answer, start))
        assert CONTEXT[found[1] :].startswith(found[0])


def test_a_broken_answer_says_where_it_differs(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", article("Lamb", asked("1", ("little wolf", 12)), asked("2", ("a", 3))))
    _, broken = read(path)
    assert broken[0]["reason"] == (
        "the answer does not stand in the context: it has 'wolf' where, from character 19, the context has "
        "'lamb'"
    )
    assert broken[1]["reason"].startswith("the answer 'a' is not at character 3, but at several others")


@pytest.mark.parametrize(
    ("question", "reason"),
    [
        ({"question": "Who?", "answers": []}, "without `id`"),
        ({"id": "1", "question": None, "answers": []}, "no text"),
        ({"id": "1", "question": " ", "answers": []}, "the question is blank"),
        ({"id": "1", "question": "Who?", "answers": ["Mary"]}, "not of the form"),
        ({"id": "1", "question": "Who?", "answers": [{"text": "Mary"}]}, "not of the form"),
        (
            {"id": "1", "question": "Who?", "answers": {"text": ["Mary"], "answer_start": []}},
            "not of the form",
        ),
        ("Who?", "without `id`"),
    ],
)
def test_broken_questions_are_told(tmp_path: Path, question: Any, reason: str) -> None:
    examples, broken = read(write(tmp_path / "a.json", article("Lamb", question, asked("2", ("Mary", 0)))))
    assert [example.identity for example in examples] == ["2"]
    assert reason in broken[0]["reason"]


def test_what_is_not_of_squads_form(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"data": [{"title": "Lamb", "paragraphs": [{"qas": []}]}]}))
    with pytest.raises(UserError, match=r"article 'Lamb': not of SQuAD's form, it lacks 'context'"):
        read(path)
    path.write_text("[1, 2]")
    with pytest.raises(UserError, match="not of SQuAD's form"):
        read(path, format="squad")
    path.write_bytes(json.dumps({"data": [article("Caf\u00e9")]}, ensure_ascii=False).encode("latin-1"))
    with pytest.raises(UserError, match=r"line 1, byte 24: bytes that are not utf-8.*data\.encoding"):
        read(path)
    assert read(path, encoding="latin-1") == ([], [])


def test_a_file_that_is_not_there_or_damaged(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with pytest.raises(UserError, match=r"^cannot read .*a\.json: No such file"):
        read(path)
    path = tmp_path / "a.json.gz"
    path.write_bytes(gzip.compress(os.urandom(1000).hex().encode())[:500])
    with pytest.raises(UserError, match=r"^cannot read .*a\.json\.gz: the file is damaged"):
        read(path)


# ------------------------------------------------------------------------------------------ cut files


@pytest.mark.parametrize("form", ["plain", "gzip", "inside a character"])
def test_a_file_that_is_cut_off(tmp_path: Path, form: str) -> None:
    whole = write(
        tmp_path / "a.json", *(article(title, asked(title, ("Mary", 0))) for title in ("A", "B", "\u00e9"))
    )
    content = whole.read_bytes()
    path = tmp_path / "b.json"
    cut = content.index("\u00e9".encode()) + 1 if form == "inside a character" else len(content) - 30
    path.write_bytes(content[:cut])
    if form == "gzip":
        path = tmp_path / "b.json.gz"
        path.write_bytes(gzip.compress(content, 0)[:-38])
    with pytest.raises(UserError) as caught:
        read(path)
    message = str(caught.value)
    assert message.startswith(f"{path} is cut off at line 1, character ")
    assert message.endswith(
        "after 2 whole articles, the last one 'B'; get a whole copy of the file, or take the whole articles "
        "with data.salvage=true (`bertscale score`: --salvage)"
    )
    said: list[str] = []
    examples, broken = read(path, said, salvage=True)
    assert [example.identity for example in examples] == ["A", "B"]
    assert broken == []
    assert said[0].endswith("data.salvage takes the 2 whole articles, the last one 'B'")


def test_a_file_without_a_whole_article_cannot_be_salvaged(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"data": [{"title": "A", "par')
    with pytest.raises(UserError, match=r"after 0 whole articles; get a whole copy of the file$"):
        read(path, salvage=True)


# ------------------------------------------------------------------------------------------ real files


@real
def test_the_real_file_that_is_cut_off() -> None:
    path = Path(DATA, "tasks/squad/v11_truncated_ermeba_train-v1.1.json")
    with pytest.raises(UserError, match=r"cut off at line 1, .*\(byte 1,280,000\), after 11 whole articles"):
        read(path)
    examples, broken = read(path, salvage=True)
    assert (len(examples), broken) == (3807, [])


@real
@pytest.mark.parametrize(
    ("name", "count", "broken", "mended"),
    [
        ("squad/v11_3articles_maddy6_train-v1.1.json", 393, 3, 6),
        ("squad/v20_10articles_PhongNTDo_train-v2.0.json", 4719, 0, 0),
        ("drcd/DRCD_dev.json", 3524, 0, 0),
    ],
)
def test_real_files_are_read(name: str, count: int, broken: int, mended: int) -> None:
    said: list[str] = []
    examples, left_out = read(Path(DATA, "tasks", name), said)
    assert (len(examples), len(left_out)) == (count, broken)
    assert [line.split(": ")[1].split(" ")[0] for line in said] == [str(mended)] * (mended > 0)


def tokenizer_of(name: str, tiny_data: Path) -> Tokenizer:
    path = tiny_data if name == "tiny" else Path(DATA, f"vocab/bert-base-{name}-vocab.txt")
    return load_tokenizer(path)


SQUAD = [
    "squad/v11_3articles_maddy6_train-v1.1.json",
    "squad/v11_truncated_ermeba_train-v1.1.json",
    "squad/v20_10articles_PhongNTDo_train-v2.0.json",
]


@real
@pytest.mark.parametrize(
    ("files", "tokenizer", "wider"),
    [
        (SQUAD, "uncased", 52),
        (SQUAD, "cased", 51),
        (SQUAD, "tiny", 13),
        (["drcd/DRCD_dev.json"], "chinese", 2),
        (["drcd/DRCD_dev.json"], "uncased", 3),
        (["drcd/DRCD_dev.json"], "tiny", 0),
    ],
)
def test_every_answer_is_found_again_from_its_tokens(
    files: list[str], tokenizer: str, wider: int, tiny_data: Path
) -> None:
    """Exactly, but for `wider` answers that are a part of a piece, such as `six` of `sixth`."""
    examples = [example for name in files for example in read(Path(DATA, "tasks", name), salvage=True)[0]]
    encoding = EncodingConfig(max_length=512, overlap=256)
    samples = QuestionTask.of(examples, encoding).encode(
        examples, tokenizer_of(tokenizer, tiny_data), encoding
    )
    assert samples.targets is not None
    assert samples.spans is not None
    places: dict[int, set[tuple[int, int]]] = {}
    for sample, (first, last) in enumerate(samples.targets.tolist()):
        if first:
            here = samples.spans[samples.starts[sample] :]
            span = int(here[first, 0]), int(here[last, 1])
            places.setdefault(int(samples.example[sample]), set()).add(span)
    exact = covering = too_long = 0
    for number, example in enumerate(examples):
        found = places.get(number, set())
        if not example.answers:
            assert not found
            continue
        text, start = example.answers[0]
        if not found:  # an answer of many sentences, longer than what neighbouring windows share
            assert len(text) > 256 // (4 if tokenizer == "tiny" else 1)
            too_long += 1
            continue
        [(begin, end)] = found  # the same in each window
        if example.context[begin:end] == text:
            exact += 1
        else:
            assert begin <= start
            assert end >= start + len(text)
            covering += 1
    assert covering == wider
    assert exact > 0.99 * (exact + covering + too_long)
