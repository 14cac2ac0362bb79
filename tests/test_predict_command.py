"""`bertscale predict`: files of every kind and form, row by row, and what is said of the broken ones."""

from __future__ import annotations

import csv
import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_finetune import configure, run
from test_finetune import world as world
from test_heads import KINDS
from test_predict import INPUTS, TEXT, close, write_model

import bertscale
from bertscale.cli import main
from bertscale.config.examples import TaskKind

Line = dict[str, Any]
WORDS = TEXT.split()


@pytest.fixture(scope="module")
def models(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {kind: write_model(folder / kind, kind, tiny_data) for kind in KINDS}


def texts(count: int) -> list[str]:
    return [" ".join(WORDS[i % 7 : i % 7 + 3 + i % 5]) for i in range(count)]


def write_rows(path: Path, rows: list[Line]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_lines(path: Path) -> list[Line]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def predict(model: Path, path: Path, *options: str, code: int = 0) -> list[Line]:
    output = path.with_name("predictions.jsonl")
    output.unlink(missing_ok=True)
    assert main(["predict", str(model), "--input", str(path), "--output", str(output), *options]) == code
    return read_lines(output) if output.exists() else []


def said(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if "  predict: " not in line]


# ------------------------------------------------------------------------------------------------ forms


@pytest.mark.parametrize("form", ["jsonl", "csv", "tsv", "numbers", "parquet", "json"])
def test_tables_of_texts(form: str, models: dict[str, Path], tmp_path: Path) -> None:
    rows = [{"id": str(i), "body": text, "more": "x"} for i, text in enumerate(texts(9))]
    path, options = tmp_path / f"in.{form}", ["text=body"]
    if form == "jsonl":
        write_rows(path, rows)
    elif form == "json":
        path.write_text(json.dumps(rows))
    elif form == "parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        options = ["text=1"] if form == "numbers" else options
        path = path if form == "csv" else tmp_path / "in.tsv"
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="," if form == "csv" else "\t")
            if form != "numbers":
                writer.writeheader()
            writer.writerows(rows)
    found = predict(models["classification"], path, *options)
    names = ["0", "1", "2"] if form == "numbers" else ["id", "body", "more"]
    assert [[line[name] for name in names] for line in found] == [list(row.values()) for row in rows]
    expected = bertscale.load_task_model(models["classification"])([row["body"] for row in rows])
    assert close([line["prediction"] for line in found], expected)
    assert [list(line) for line in found] == [[*names, "prediction"]] * 9


@pytest.mark.parametrize("kind", ["classification", "multi_label", "regression"])
def test_pairs_in_chunks_are_as_in_one(
    kind: TaskKind, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"text": one, "second": other} for one, other in zip(texts(11), texts(12)[1:], strict=True)]
    path = write_rows(tmp_path / "in.jsonl", rows)
    whole = predict(models[kind], path, "data.text_pair=second")
    expected = bertscale.load_task_model(models[kind])([(row["text"], row["second"]) for row in rows])
    assert close([line["prediction"] for line in whole], expected)
    monkeypatch.setattr("bertscale.finetune.predict.CHUNK", 3)
    monkeypatch.setattr("bertscale.examples.stream.FIRST", 2)
    assert close(predict(models[kind], path, "text_pair=second"), whole)


# ---------------------------------------------------------------------------------------- broken rows


def test_broken_rows_have_no_prediction_and_the_others_keep_theirs(
    models: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"text": "The cat."}\n{"text": \n{"text": " ", "id": 3}\n{"id": 4}\n{"text": "a dog"}\n')
    for chunk in (4096, 2):
        monkeypatch.setattr("bertscale.finetune.predict.CHUNK", chunk)
        found = predict(models["classification"], path)
        assert [line["prediction"] is None for line in found] == [False, True, True, True, False]
        assert f"{path}, line 2: broken JSON" in found[1]["error"]
        assert found[2] == {
            "text": " ",
            "id": 3,
            "prediction": None,
            "error": f"{path}, line 3: the text (data.text) is blank",
        }
        assert "there is no column 'text', but 'id'" in found[3]["error"]
        expected = bertscale.load_task_model(models["classification"])(["The cat.", "a dog"])
        assert close([found[0]["prediction"], found[4]["prediction"]], expected)
        (warning,) = said(capsys)
        assert "warning: 3 of 5 rows cannot be predicted; the first one is " + found[1]["error"] in warning


def test_a_row_of_which_the_tokenizer_leaves_nothing(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"text": "The cat."}, {"text": "a dog"}, {"text": "a boat"}]
    path = write_rows(tmp_path / "in.jsonl", rows)
    model = bertscale.load_task_model(models["classification"])
    expected = model([row["text"] for row in rows])
    encode = type(model.tokenizer).encode

    def leave_nothing(self: Any, given: list[str]) -> list[list[int]]:
        return [[] if text == "a dog" else encode(self, [text])[0] for text in given]

    monkeypatch.setattr(type(model.tokenizer), "encode", leave_nothing)
    found = predict(models["classification"], path)
    assert found[1]["prediction"] is None
    assert found[1]["error"] == f"{path}, line 2: a text of which the tokenizer leaves nothing"
    assert close([found[0]["prediction"], found[2]["prediction"]], [expected[0], expected[2]])


@pytest.mark.parametrize(
    ("kind", "row", "options", "message"),
    [
        (
            "classification",
            {"txt": "a"},
            [],
            "line 1: there is no column 'text', but 'txt'; did you mean data.text='txt'?",
        ),
        ("classification", {"text": "a"}, ["--score"], "line 1: there is no column 'label', but 'text'"),
        (
            "classification",
            {"text": "a", "label": "bat"},
            ["--score"],
            "the label 'bat' is none of the model's labels",
        ),
        (
            "classification",
            {"text": "a", "label": " "},
            ["--score"],
            "nothing can be scored, since no row has",
        ),
        (
            "classification",
            {"text": "a"},
            ["txt=b"],
            "the form of the input: unknown key txt; did you mean text?",
        ),
        ("classification", {"text": "a"}, ["dev=b"], "dev is a key of `bertscale finetune`"),
        ("tokens", {"words": ["a"]}, ["tokens=word"], "there is no column 'text', but 'words'"),
        ("question_answering", {"question": "Who?", "text": "a"}, [], "there is no column 'context'"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_line(
    kind: str,
    row: Line,
    options: list[str],
    message: str,
    models: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write_rows(tmp_path / "in.jsonl", [row, row])
    found = predict(models[kind], path, *options, code=2)
    (line,) = [line for line in said(capsys) if "error:" in line]
    assert message in line
    assert [entry.name for entry in tmp_path.iterdir() if entry.name != "in.jsonl"] == [
        "predictions.jsonl"
    ] * bool(found)


# ----------------------------------------------------------------------------------------- other kinds


def test_options_of_a_text(models: dict[str, Path], tmp_path: Path) -> None:
    rows = [{"text": "The cat", "first": "watches.", "second": "a boat"}]
    (line,) = predict(models["multiple_choice"], write_rows(tmp_path / "in.jsonl", rows))
    expected = bertscale.load_task_model(models["multiple_choice"])
    given = {"text": "The cat", "options": ["watches.", "a boat"]}
    assert close(line, {**rows[0], "prediction": expected(given)})


@pytest.mark.parametrize("form", ["tokens", "text", "conll"])
def test_tokens(form: str, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lists = [text.split() for text in texts(7)]
    rows: list[Line] = [{"n": i, "tokens": words} for i, words in enumerate(lists)]
    path = tmp_path / "in.jsonl"
    if form == "text":
        rows = [{"text": " ".join(words)} for words in lists]
    if form == "conll":
        path = tmp_path / "in.conll"
        path.write_text("".join("".join(f"{word}\n" for word in words) + "\n" for words in lists))
        rows = [{"tokens": words} for words in lists]
    else:
        write_rows(path, rows)
    model = bertscale.load_task_model(models["tokens"])
    said = model([row["text"] if form == "text" else row["tokens"] for row in rows])
    expected = [{**row, "prediction": one} for row, one in zip(rows, said, strict=True)]
    assert close(predict(models["tokens"], path), expected)
    monkeypatch.setattr("bertscale.finetune.predict.CHUNK", 2)
    assert close(predict(models["tokens"], path), expected)


def test_a_broken_sentence_keeps_its_place(models: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "in.conll"
    path.write_text("The O\ncat O\n\na O\ndog\n\nboat O\n")
    found = predict(models["tokens"], path)
    assert [line["prediction"] and line["prediction"]["words"] for line in found] == [
        ["The", "cat"],
        None,
        ["boat"],
    ]
    assert found[1]["error"] == f"{path}, line 5: 1 columns where other lines have 2"


def squad(path: Path) -> Path:
    questions = INPUTS["question_answering"]
    paragraphs = [
        {
            "context": q["context"],
            "qas": [
                {"id": q["id"], "question": q["question"], "answers": [{"text": "cat", "answer_start": 4}]}
            ],
        }
        for q in questions
    ]
    path.write_text(json.dumps({"data": [{"title": "T", "paragraphs": paragraphs}]}))
    return path


def test_questions_of_squad_and_of_rows(models: dict[str, Path], tmp_path: Path) -> None:
    questions = INPUTS["question_answering"]
    expected = bertscale.load_task_model(models["question_answering"])(questions)
    found = predict(models["question_answering"], squad(tmp_path / "dev.json"))
    assert close([line.pop("prediction") for line in found], expected)
    assert found == [{"title": "T", "id": q["id"], "question": q["question"]} for q in questions]
    rows = [{**q, "answers": {"text": ["nowhere"], "answer_start": [1]}} for q in questions]
    found = predict(models["question_answering"], write_rows(tmp_path / "in.jsonl", rows))
    assert close(found, [{**row, "prediction": one} for row, one in zip(rows, expected, strict=True)])
    output = tmp_path / "answers.json"
    command = ["predict", str(models["question_answering"]), "--input", str(tmp_path / "dev.json")]
    assert main([*command, "--output", str(output)]) == 0
    assert json.loads(output.read_text()) == {one["id"]: one["answer"] for one in expected}


# ----------------------------------------------------------------------------------------- one text


@pytest.mark.parametrize("kind", ["classification", "regression", "tokens", "question_answering"])
def test_one_text(kind: str, models: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    given: Any = TEXT
    options, line = ["--text", TEXT], {"text": TEXT}
    if kind == "regression":
        options, line, given = [*options, "--text-pair", "a"], {"text": TEXT, "text_pair": "a"}, (TEXT, "a")
    if kind == "question_answering":
        options, line = ["--text", "Who?", "--text-pair", TEXT], {"question": "Who?", "context": TEXT}
        given = line
    assert main(["predict", str(models[kind]), *options]) == 0
    found = json.loads(capsys.readouterr().out)
    expected = bertscale.load_task_model(models[kind])(given)
    if kind == "question_answering":
        expected["id"] = found["prediction"]["id"]
    assert close(found, {**line, "prediction": expected})


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("classification", [], "give --input FILE or --text TEXT, one of the two; neither was given"),
        ("classification", ["--text", "a", "--input", "b"], "one of the two; both were given"),
        ("classification", ["--input", "none.tsv"], "--input none.tsv: there is no such file"),
        ("classification", ["--input", __file__, "--text-pair", "a"], "--text-pair goes with --text"),
        ("classification", ["--input", __file__, "--output", "no/x"], "--output no/x: there is no folder no"),
        ("classification", ["--input", __file__, "--output", "/"], "--output / is a folder"),
        ("classification", ["--input", __file__, "--output", __file__], "would take the place of the input"),
        ("classification", ["--input", __file__], "the ending .py does not tell the format"),
        ("classification", ["--text", "a", "--score", "x=1"], "--score and key=value go with --input FILE"),
        ("classification", ["--text", " "], "--text: the text is blank"),
        ("question_answering", ["--text", "a"], "--text is the question: give the text"),
        ("tokens", ["--text", "a", "--text-pair", "b"], "a model for tokens takes one text"),
        ("multiple_choice", ["--text", "a"], "a model for multiple_choice takes a file"),
    ],
)
def test_options_that_do_not_go_together(
    kind: str,
    options: list[str],
    message: str,
    models: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["predict", str(models[kind]), *options]) == 2
    (line,) = said(capsys)
    assert message in line


def test_what_is_no_task_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder, message in (
        (tmp_path, "holds no task model"),
        (tmp_path / "none", "there is no such folder"),
    ):
        assert main(["predict", str(folder), "--text", "a"]) == 2
        (line,) = said(capsys)
        assert message in line


# ------------------------------------------------------------------------------------- as the run itself


def test_predictions_and_figures_are_those_of_the_run(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        ["apple", "fell", "."],
        ["the", "nile", "and", "the", "rhine"],
        ["old", "zinc"],
        ["iron", "nile"],
    ]
    tags = [["B-F", "O", "O"], ["O", "B-R", "O", "O", "B-R"], ["O", "B-M"], ["B-M", "I-M"]]
    sentences = [{"tokens": w, "tags": t} for w, t in zip(words, tags, strict=True)]
    questions = [
        {
            "id": str(i),
            "question": f"Where is the {sentence[-1]} ?",
            "context": " ".join(sentence),
            "answers": {"text": [sentence[-1]], "answer_start": [len(" ".join(sentence[:-1])) + 1]},
        }
        for i, sentence in enumerate(words)
    ]
    configs = []
    for kind, examples in (
        ("classification", None),
        ("tokens", sentences),
        ("question_answering", questions),
    ):
        changes = [f"task={kind}", "train.epochs=3", "train.precision=float32"]
        if examples:
            path = write_rows(tmp_path / f"{kind}.jsonl", examples)
            changes += [f"data.train={path}", f"data.test={path}"]
        configs.append(configure(world, tmp_path / kind, *changes))
    for config, result in zip(configs, run(*configs), strict=True):
        assert config.data.test is not None
        output = tmp_path / "found.jsonl"
        command = ["predict", config.output, "--input", config.data.test, "--output", str(output), "--score"]
        capsys.readouterr()
        assert main(command) == 0
        expected = read_lines(Path(config.output) / "predictions-test.jsonl")
        assert close(read_lines(output), expected, 1e-4)
        shown = dict(line.split() for line in said(capsys))
        figures = {name: figure["mean"] for name, figure in result["pretrained"]["test"].items()}
        figures.pop("loss")
        assert {name: float(value) for name, value in shown.items()} == pytest.approx(figures, abs=1e-4)


def test_rows_without_a_usable_label_are_predicted_and_not_scored(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"text": text, "label": label}
        for text, label in zip(texts(4), ["cat", "dog", None, "-"], strict=True)
    ]
    path = write_rows(tmp_path / "in.jsonl", [*rows, {"text": "", "label": "cat"}])
    found = predict(models["classification"], path, "--score", 'skip_labels=["-"]')
    assert [line["prediction"] is None for line in found] == [False] * 4 + [True]
    broken, left_out, *figures = said(capsys)
    assert "warning: 1 of 5 rows cannot be predicted" in broken
    assert "warning: 3 of 5 rows are not scored" in left_out
    right = sum(line["prediction"]["label"] == line["label"] for line in found[:2]) / 2
    assert f"accuracy{right:.4f}" in [line.replace(" ", "") for line in figures]


# ------------------------------------------------------------------------------------------- the output


def test_lines_go_to_the_standard_output(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_rows(tmp_path / "in.jsonl", [{"text": text} for text in texts(5)])
    expected = predict(models["classification"], path)
    capsys.readouterr()
    assert main(["predict", str(models["classification"]), "--input", str(path)]) == 0
    printed = capsys.readouterr()
    assert [json.loads(line) for line in printed.out.splitlines()] == expected
    assert "predict: 5 rows" in printed.err


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted; run the same command again"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "No space left on device while writing"),
    ],
)
def test_the_output_is_whole_or_not_there(
    error: BaseException,
    code: int,
    message: str,
    models: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = write_rows(tmp_path / "in.jsonl", [{"text": text} for text in texts(6)])
    before = {"in.jsonl"}

    def fail(*_: Any) -> bytes:
        raise error

    for old in (False, True):
        output = tmp_path / "out.jsonl"
        if old:
            output.write_text("older")
            before.add("out.jsonl")
        with monkeypatch.context() as patch:
            patch.setattr("bertscale.finetune.predict.CHUNK", 2)
            patch.setattr("bertscale.finetune.predict_file.as_json", fail)
            command = [
                "predict",
                str(models["classification"]),
                "--input",
                str(path),
                "--output",
                str(output),
            ]
            assert main(command) == code
        assert {entry.name for entry in tmp_path.iterdir()} == before
        shown = "\n".join(said(capsys))
        assert message in shown
        assert code != 2 or str(output) in shown
    assert output.read_text() == "older"


def test_a_reader_that_has_enough(models: dict[str, Path], tmp_path: Path) -> None:
    path = write_rows(tmp_path / "in.jsonl", [{"text": text} for text in texts(3000)])
    command = [
        sys.executable,
        "-m",
        "bertscale",
        "predict",
        str(models["classification"]),
        "--input",
        str(path),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        errors = process.stderr.read().decode()
    assert process.returncode == 141, errors
    assert "Traceback" not in errors
    assert "Exception" not in errors


# --------------------------------------------------------------------------- what a model remembers


def test_remembered_columns_are_the_default(models: dict[str, Path], tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(models["classification"], model)
    config = json.loads((model / "config.json").read_text())
    config["bertscale"]["data"] = {"text": "body", "format": "tsv", "separator": "|", "header": True}
    (model / "config.json").write_text(json.dumps(config))
    (tmp_path / "in.txt").write_text("id|body\n1|The cat.\n2|a dog\n")
    (tmp_path / "in.csv").write_text("id,body\n1,The cat.\n2,a dog\n")
    (tmp_path / "other.csv").write_text("1,The cat.\n2,a dog\n")
    rows = [{"id": "1", "body": "The cat."}, {"id": "2", "body": "a dog"}]
    write_rows(tmp_path / "in.jsonl", rows)
    found = [predict(model, tmp_path / f"in.{ending}") for ending in ("txt", "csv", "jsonl")]
    assert found[0] == found[1] == found[2]
    assert [line["body"] for line in found[0]] == ["The cat.", "a dog"]
    other = predict(model, tmp_path / "other.csv", "text=1")
    assert [line["prediction"] for line in other] == [line["prediction"] for line in found[0]]
