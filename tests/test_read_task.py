"""Labelled files -> the examples of a run: labels, dev shares, broken rows, what the start says of them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bertscale.config import UserError
from bertscale.config.examples import EncodingConfig, ExamplesConfig, TaskKind
from bertscale.examples.read import describe, draw_dev, read_file, read_task_data, together
from bertscale.examples.text_rows import find_labels
from bertscale.tasks.task import TaskData, TextExample
from bertscale.tokenizer import load_tokenizer

DATA = os.environ.get("BERTSCALE_DATA", "")  # the fixture of all tests takes such variables away


def rows(path: Path, *values: Any) -> str:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return str(path)


def labelled(path: Path, *labels: Any) -> str:
    return rows(path, *({"text": f"text {i}", "label": label} for i, label in enumerate(labels)))


def read(kind: TaskKind, **keys: Any) -> TaskData[Any]:
    return read_task_data(kind, ExamplesConfig.model_validate(keys), EncodingConfig())


def targets(examples: list[Any]) -> list[Any]:
    return [example.target for example in examples]


# -------------------------------------------------------------------------------------------- labels


def test_labels_are_those_of_the_training_examples(tmp_path: Path) -> None:
    train = labelled(tmp_path / "a.jsonl", "b", 10, 9, " a ", True, 2.0)
    data = read("classification", train=train, dev=labelled(tmp_path / "dev.jsonl", 9))
    assert data.task.labels == ["2", "9", "10", "a", "b", "true"]
    assert targets(data.train) == ["b", "10", "9", "a", "true", "2"]
    assert targets(data.dev) == ["9"]
    assert data.train[1].place == f"{train}, line 2"
    assert data.train[1].row == {"text": "text 1", "label": 10}
    given_order = ["b", "true", "a", "2", "9", "10"]
    assert read("classification", train=train, labels=given_order).task.labels == given_order


@pytest.mark.parametrize("side", ["dev", "test"])
def test_a_label_that_train_never_had(tmp_path: Path, side: str) -> None:
    train = labelled(tmp_path / "train.jsonl", "positive", "negative")
    other = labelled(tmp_path / "other.jsonl", "positive", "positve")
    with pytest.raises(
        UserError,
        match=r"other\.jsonl, line 2: the label 'positve' is none of those of the training examples, "
        r"'negative', 'positive'; did you mean 'positive'\?.*data\.skip_labels=\[\"positve\"\]",
    ):
        read("classification", train=train, **{side: other})
    data = read("classification", train=train, **{side: other}, skip_labels=["positve"])
    assert data.notes == [f"{other}: rows with the label 'positve' are left out (data.skip_labels): 1"]
    with pytest.raises(UserError, match=r"other\.jsonl, line 2: the label 'positve' is none of data\.labels"):
        read("classification", train=other, labels=["positive", "negative"])


def test_one_label_is_no_task(tmp_path: Path) -> None:
    train = labelled(tmp_path / "a.jsonl", "x", "x")
    with pytest.raises(
        UserError, match=r"only the label 'x'; look whether data\.label='label' is the column"
    ):
        read("classification", train=train)


def test_an_empty_class_is_told(tmp_path: Path) -> None:
    train = labelled(tmp_path / "a.jsonl", "x", "y", "y")
    data = read("classification", train=train, labels=["x", "y", "z"])
    assert describe(data, {}, 128) == [
        "train: 3 examples; y 2, x 1, z 0",
        "warning: no training example has the label 'z'; the model will not learn it",
    ]


def test_what_stands_before_a_separator(tmp_path: Path) -> None:
    path = tmp_path / "trec"
    path.write_text("DESC:manner How did it ?\nENTY:food What is eaten ?\n")
    keys: dict[str, Any] = {"format": "tsv", "separator": " ", "columns": 2, "text": 1, "label": 0}
    data = read("classification", train=str(path), label_separator=":", **keys)
    assert targets(data.train) == ["DESC", "ENTY"]
    assert [example.texts for example in data.train] == [("How did it ?",), ("What is eaten ?",)]
    assert read("classification", train=str(path), **keys).task.labels == ["DESC:manner", "ENTY:food"]


def test_several_labels(tmp_path: Path) -> None:
    lists = labelled(tmp_path / "a.jsonl", ["x", 2], [], "y", ["y", "y"])
    assert targets(read("multi_label", train=lists).train) == [("x", "2"), (), ("y",), ("y",)]
    assert read("multi_label", train=lists).task.labels == ["2", "x", "y"]
    path = tmp_path / "a.csv"
    path.write_text('text,label\na,"x, y"\nb,\nc,y,\n')
    data = read("multi_label", train=str(path), label_separator=",", broken_share=0.5)
    assert targets(data.train) == [("x", "y"), ()]
    path.write_text("id,text,x,y\n1,a,1,0\n2,b,1.0,True\n3,c,0,maybe\n")
    data = read("multi_label", train=str(path), label=["x", "y"], broken_share=0.5)
    assert targets(data.train) == [("x",), ("x", "y")]
    assert "neither 0 nor 1" in data.broken[0]["reason"]
    with pytest.raises(UserError, match="several columns are for multi_label; give classification one"):
        read("classification", train=str(path), label=["x", "y"])


def test_numbers(tmp_path: Path) -> None:
    path = labelled(tmp_path / "a.jsonl", 1, "2.5", " 3 ", "n/a", None, "nan", True)
    data = read("regression", train=path, broken_share=0.9, skip_labels=["n/a"])
    assert targets(data.train) == [1.0, 2.5, 3.0]
    assert [row["reason"].split(", ")[0] for row in data.broken] == [
        "the label None is no number",
        "the label 'nan' is no number",
        "the label True is no number",
    ]


@pytest.mark.parametrize(
    ("label", "keys", "target"),
    [
        (1, {}, 1),
        ("2", {}, 2),
        ("C", {}, 2),
        ("blue", {}, 1),
        ("two", {}, 1),
        ("2", {"labels": ["1", "2", "3"]}, 1),
        ("3", {}, None),
        ("D", {}, None),
        ("5", {"labels": ["1", "2", "3"]}, None),
        ("", {}, None),
        (True, {}, None),
    ],
)
def test_choices(tmp_path: Path, label: Any, keys: dict[str, Any], target: int | None) -> None:
    row = {"text": "Which?", "one": "red", "two": "blue", "three": "sky", "label": label}
    path = rows(tmp_path / "a.jsonl", row)
    columns = {"train": path, "options": ["one", "two", "three"], **keys}
    if target is None:
        with pytest.raises(UserError, match=r"a\.jsonl, line 1: the label"):
            read("multiple_choice", **columns)
        return
    (example,) = read("multiple_choice", **columns).train
    assert (example.text, example.options, example.target) == ("Which?", ("red", "blue", "sky"), target)


def test_choices_of_a_list(tmp_path: Path) -> None:
    good = {"text": "How many?", "options": ["2", "1", "x"], "label": "x"}
    path = rows(tmp_path / "a.jsonl", good, {**good, "label": "1"}, {**good, "options": ["x"]})
    data = read("multiple_choice", train=path, options="options", broken_share=0.9)
    assert [example.target for example in data.train] == [2, 1]
    path = rows(tmp_path / "b.jsonl", {**good, "label": "2"}, {**good, "label": 0})
    with pytest.raises(UserError, match=r"line 1: the label '2' may be several of the options"):
        read("multiple_choice", train=path, options="options")
    with pytest.raises(UserError, match=r"data\.options is missing"):
        read("multiple_choice", train=path)


# -------------------------------------------------------------------------------------- broken rows


def test_broken_rows_are_listed(tmp_path: Path) -> None:
    good: dict[str, Any] = {"text": "a", "text2": "b", "label": "x"}
    changes: list[dict[str, Any]] = [
        {},
        {"label": "y"},
        {"text": " \u200b"},
        {"text2": None},
        {"text": 3},
        {"label": ""},
    ]
    bad = [*({**good, **change} for change in changes), {"text": "a", "label": "x"}, {**good, "label": [1]}]
    path = rows(tmp_path / "a.jsonl", *bad)
    data = read("classification", train=path, text_pair="text2", broken_share=0.9)
    assert len(data.train) == 2
    assert [(row["place"].split(", ")[1], row["reason"].split(";")[0]) for row in data.broken] == [
        ("line 3", "the text (data.text) is blank"),
        ("line 4", "the text (data.text_pair) is null"),
        ("line 5", "the text (data.text) is no text but 3"),
        ("line 6", "the label is blank"),
        ("line 7", "there is no column 'text2', but 'text', 'label'"),
        ("line 8", "the label [1] is neither a text nor a whole number"),
    ]
    assert data.broken[1]["row"] == bad[3]
    assert data.notes == [
        f"{path}: 6 of 8 rows are broken and left out, the first one is {path}, line 3: the text (data.text) "
        "is blank"
    ]
    with pytest.raises(
        UserError,
        match=r"line 3: .* is blank \(6 of 8 rows of the file are broken, more than data\.broken_share=0\.7",
    ):
        read("classification", train=path, text_pair="text2", broken_share=0.7)


def test_a_column_that_no_row_has(tmp_path: Path) -> None:
    path = labelled(tmp_path / "a.jsonl", "x", "y")
    with pytest.raises(
        UserError, match=r"line 1: .*'lable', but 'text', 'label'; did you mean data\.label='label'"
    ):
        read("classification", train=path, label="lable")


def test_files_without_examples(tmp_path: Path) -> None:
    path = labelled(tmp_path / "a.jsonl", "-", "-")
    with pytest.raises(UserError, match=r"a\.jsonl has no examples; data\.skip_labels leaves none"):
        read("classification", train=path, skip_labels=["-"])
    empty = tmp_path / "b.tsv"
    empty.write_text("text\tlabel\n")
    with pytest.raises(UserError, match=r"b\.tsv has no examples"):
        read("classification", train=str(empty))


def test_texts_that_are_only_to_be_predicted(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text("id\ttext\n7\thello\n")
    data = ExamplesConfig(train="x")
    (example,) = read_file("classification", str(path), data, labelled=False).examples
    assert (example.texts, example.target, example.row) == (("hello",), None, {"id": "7", "text": "hello"})


def test_several_training_files(tmp_path: Path) -> None:
    first, second = labelled(tmp_path / "a.jsonl", "x", "y"), labelled(tmp_path / "b.jsonl", "z")
    data = read("classification", train=[first, {"path": second, "weight": 2.5}])
    assert data.repeats.tolist() == [1, 1, 2.5]
    assert data.task.labels == ["x", "y", "z"]
    data = read("classification", train=[first, {"path": second, "weight": 2.5}], dev_share=0.4)
    assert len(data.repeats) == len(data.train) == 2


# --------------------------------------------------------------------------------------------- dev_share


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=2, max_size=60),
    st.floats(0.05, 0.9),
    st.booleans(),
)
def test_a_share_of_dev(values: list[tuple[int, int]], share: float, grouped: bool) -> None:
    examples = [
        TextExample(place="a", row={"g": group}, texts=(f"text  {text}",), target="x")
        for group, text in values
    ]
    data = ExamplesConfig(train="x", dev_share=share, dev_seed=3, group="g" if grouped else None)
    if len(set(together(examples, data))) == 1:
        with pytest.raises(UserError, match="cannot be divided; give a dev file"):
            draw_dev(examples, data)
        return
    chosen = draw_dev(examples, data)
    assert 0 < chosen.sum() < len(examples)
    assert (chosen == draw_dev(examples, data)).all()
    for at in (0, 1) if grouped else (1,):
        sides = [
            {pair[at] for pair, taken in zip(values, chosen, strict=True) if taken == side} for side in (0, 1)
        ]
        assert not sides[0] & sides[1]


def test_the_share_and_the_seed(tmp_path: Path) -> None:
    path = labelled(tmp_path / "a.jsonl", *(i % 2 for i in range(1000)))
    data = read("classification", train=path, dev_share=0.1)
    assert (len(data.train), len(data.dev)) == (900, 100)
    texts = [{example.texts for example in examples} for examples in (data.train, data.dev)]
    assert not texts[0] & texts[1]
    again = read("classification", train=path, dev_share=0.1)
    assert again.dev == data.dev
    assert read("classification", train=path, dev_share=0.1, dev_seed=1).dev != data.dev
    with pytest.raises(UserError, match=r"a\.jsonl, line 1: there is no column 'doc'"):
        read("classification", train=path, dev_share=0.1, group="doc")


def test_the_order_of_labels() -> None:
    examples = [TextExample(place="a", texts=("a",), target=label) for label in ("b", "-1", "10", "9", "a1")]
    assert find_labels(examples) == ["-1", "9", "10", "a1", "b"]


# --------------------------------------------------------------------------------------- what is said


def test_what_the_start_says(tmp_path: Path) -> None:
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "text", "0", "1"]) + "\n")
    train = rows(
        tmp_path / "a.jsonl",
        *({"text": f"text {i % 3} " + "text " * i, "label": f"l{i % 10}"} for i in range(20)),
    )
    dev = rows(tmp_path / "b.jsonl", {"text": "text   1 text", "label": "l1"}, {"text": "new", "label": "l1"})
    data = read("classification", train=train, dev=dev)
    encoding = EncodingConfig(max_length=12)
    tokenizer = load_tokenizer(vocabulary)
    samples = {name: data.task.encode(getattr(data, name), tokenizer, encoding) for name in ("train", "dev")}
    assert describe(data, samples, 12) == [
        "train: 20 examples; l0 2, l1 2, l2 2, l3 2, l4 2, l5 2, l6 2, l7 2, and 2 more",
        "train: 10.2 tokens in a sample, 11 (55.0%) of the examples are cut at max_length=12, 6 (2.9%) of "
        "the tokens are unknown pieces",
        "dev: 2 examples; l1 2, l0 0, l2 0, l3 0, l4 0, l5 0, l6 0, l7 0, and 2 more",
        "dev: 4.0 tokens in a sample, none of the examples are cut at max_length=12, 1 (12.5%) of the tokens "
        "are unknown pieces",
        "warning: 1 (50.0%) of the dev examples have the texts of a training example: figures "
        "on them flatter",
    ]


# -------------------------------------------------------------------------------- tokens and questions


def test_tokens_by_document(tmp_path: Path) -> None:
    path = tmp_path / "a.conll"
    documents = [f"-DOCSTART- O\n\nAnna{i} B-PER\nsings O\n\nBonn{i} B-LOC\n\n" for i in range(2)]
    path.write_text("".join(documents))
    data = read("tokens", train=str(path), dev_share=0.5, group="document")
    assert {example.row["document"] for example in data.dev} != {
        example.row["document"] for example in data.train
    }
    assert len(data.dev) == len(data.train) == 2
    assert describe(data, {}, 128)[0] == "tags are in the scheme bio: 5 tags"
    path.write_text("Anna B-PER\nsings\n\nBonn B-LOC\n")
    with pytest.raises(UserError, match=r"a\.conll, line 2: .*1 of 2 rows of the file are broken"):
        read("tokens", train=str(path))


def test_questions_by_article(tmp_path: Path) -> None:
    def article(title: str, text: str) -> dict[str, Any]:
        answers = [{"text": "Bonn", "answer_start": text.index("Bonn")}]
        asked = [{"id": f"{title}{i}", "question": "Where?", "answers": answers} for i in range(3)]
        return {"title": title, "paragraphs": [{"context": text, "qas": asked}]}

    path = tmp_path / "a.json"
    articles = [article(f"T{i}", f"Anna sings in Bonn {i}.") for i in range(4)]
    path.write_text(json.dumps({"version": "1.1", "data": articles}))
    for group in ("title", None):
        data = read("question_answering", train=str(path), dev_share=0.25, group=group)
        assert (len(data.train), len(data.dev)) == (9, 3)
        assert len({example.row["title"] for example in data.dev}) == 1
    assert describe(data, {}, 128) == ["train: 9 examples", "dev: 3 examples"]


# ------------------------------------------------------------------------------------------- real sets

LABELS: list[tuple[str, TaskKind, dict[str, Any], list[str], int]] = [
    ("cola/train.tsv", "classification", {"text": 3, "label": 1}, ["0", "1"], 7250),
    (
        "rte/train.tsv",
        "classification",
        {"text": "sentence1", "text_pair": "sentence2"},
        ["entailment", "not_entailment"],
        2490,
    ),
    (
        "sick2014/SICK_train.txt",
        "classification",
        {"text": "sentence_A", "text_pair": "sentence_B", "label": "entailment_judgment"},
        ["CONTRADICTION", "ENTAILMENT", "NEUTRAL"],
        4500,
    ),
    (
        "sick2014/SICK_train.txt",
        "regression",
        {"text": "sentence_A", "text_pair": "sentence_B", "label": "relatedness_score"},
        [],
        4500,
    ),
    ("stsb/stsb-zh-train.csv", "regression", {"text": 0, "text_pair": 1, "label": 2}, [], 5749),
    (
        "sent_conv/TREC.train",
        "classification",
        {"format": "tsv", "separator": " ", "columns": 2, "text": 1, "label": 0, "label_separator": ":"},
        ["ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM"],
        5451,
    ),
    (
        "ocnli/train.10k.json",
        "classification",
        {"text": "sentence1", "text_pair": "sentence2", "skip_labels": ["-"], "group": "prem_id"},
        ["contradiction", "entailment", "neutral"],
        9985,
    ),
    ("thucnews_titles/dev.txt", "classification", {"text": 0, "label": 1}, [*"0123456789"], 10000),
]


@pytest.mark.skipif(not DATA, reason="BERTSCALE_DATA names no folder of real data")
@pytest.mark.parametrize(("name", "kind", "keys", "labels", "count"), LABELS)
def test_real_sets(name: str, kind: TaskKind, keys: dict[str, Any], labels: list[str], count: int) -> None:
    data = read(kind, train=str(Path(DATA) / "tasks" / name), dev_share=0.1, **keys)
    assert data.task.labels == labels
    assert len(data.train) + len(data.dev) == count
    assert len(data.dev) == pytest.approx(count / 10, abs=5)
    assert np.allclose(data.repeats, 1)
    assert len(data.broken) == (name == "sent_conv/TREC.train")  # one line has a byte of Latin-1
    if data.broken:
        assert data.broken[0]["place"].endswith("TREC.train, line 66")
        assert "set data.encoding=" in data.broken[0]["reason"]
