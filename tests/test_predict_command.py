"""`bertscale predict`: files of every kind and form, row by row, and what is said of the broken ones."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from test_heads import KINDS
from test_predict import TEXT, close, write_model

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
