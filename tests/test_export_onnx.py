"""`bertscale convert --as onnx`: folders that onnxruntime and transformers' tokenizer read, and refusals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from sharded import write_run
from test_heads import random_model
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from bertscale import cli
from bertscale.convert.task_models import write_task_model
from bertscale.export.convert import convert
from bertscale.export.options import ConvertOptions
from bertscale.model.heads import HeadConfig
from bertscale.onnx import write
from bertscale.tokenizer import load_tokenizer
from bertscale.train.checkpoint import open_checkpoint

TEXTS = ["The cat finds some bread at 7.", "Every teacher likes an answer."]
SMALL = {"num_hidden_layers": 1}


@pytest.fixture(scope="module")
def place(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, and the output of a fine-tuning of texts: a folder `model` in it."""
    place = tmp_path_factory.mktemp("onnx")
    write_run(place / "run", tiny_data, SMALL, (2, 2, 3))
    shape, head = open_checkpoint(place / "run").model, HeadConfig("classification", 3)
    model = random_model(shape, head, 330)
    (place / "task" / "model").mkdir(parents=True)
    tensors = ((name, value.detach()) for name, value in model.named_parameters())
    labels, tokenizer = ["a", "b", "c"], load_tokenizer(tiny_data)
    write_task_model(place / "task" / "model", shape, 330, head, labels, tensors, tokenizer, 32, {})
    return place


def answers(folder: Path) -> tuple[dict[str, np.ndarray], dict[str, torch.Tensor]]:
    """The outputs of a graph for two texts, padded, and the inputs that the folder's tokenizer gives."""
    batch = AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="np")
    session = onnxruntime.InferenceSession(folder / "onnx/model.onnx", providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    outputs = dict(zip(names, session.run(names, dict(batch)), strict=True))
    return outputs, {name: torch.from_numpy(values) for name, values in batch.items()}


@torch.no_grad()
def test_vectors_of_texts(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--as", "onnx", "--pooling", "mean", "--normalize"]
    assert cli.main(["convert", str(place / "run"), str(tmp_path / "graph"), *options]) == 0
    said = capsys.readouterr().out
    assert "graph     onnx/model.onnx of opset 18: last_hidden_state, sentence_embedding" in said
    assert "verified  in onnxruntime, at three lengths and two sizes of batches" in said
    outputs, inputs = answers(tmp_path / "graph")
    convert(place / "run", tmp_path / "encoder", ConvertOptions(show=False))
    hidden = AutoModel.from_pretrained(tmp_path / "encoder").eval()(**inputs).last_hidden_state
    mask = inputs["attention_mask"][:, :, None]
    expected = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    np.testing.assert_allclose(outputs["sentence_embedding"], expected, rtol=1e-5, atol=1e-5)
    config = json.loads((tmp_path / "graph" / "config.json").read_text())
    assert config["architectures"] == ["BertModel"]
    assert {path.name for path in (tmp_path / "graph").iterdir()} >= {
        *("config.json", "onnx", "tokenizer.json", "tokenizer_config.json", "bertscale-convert.json"),
    }
    capsys.readouterr()
    assert cli.main(["convert", str(place / "run"), str(tmp_path / "graph"), *options]) == 0
    assert "already converted" in capsys.readouterr().out


@torch.no_grad()
def test_a_fine_tuned_model(place: Path, tmp_path: Path) -> None:
    convert(place / "task", tmp_path / "graph", ConvertOptions(as_="onnx"))
    outputs, inputs = answers(tmp_path / "graph")
    model = AutoModelForSequenceClassification.from_pretrained(place / "task" / "model").eval()
    np.testing.assert_allclose(outputs["logits"], model(**inputs).logits, rtol=1e-4, atol=1e-5)
    given = json.loads((place / "task" / "model" / "config.json").read_text())
    assert json.loads((tmp_path / "graph" / "config.json").read_text()) == given


def test_masked_tokens(place: Path, tmp_path: Path) -> None:
    convert(place / "run", tmp_path / "graph", ConvertOptions(as_="onnx-masked-lm", show=False))
    outputs, inputs = answers(tmp_path / "graph")
    assert outputs["logits"].shape == (*inputs["input_ids"].shape, 330)


@pytest.mark.parametrize(
    ("source", "options", "words"),
    [
        ("task", ["--as", "onnx", "--pooling", "mean"], "is a task model, whose head gives its outputs"),
        ("run", ["--as", "onnx", "--normalize"], "--normalize needs --pooling"),
        ("run", ["--as", "onnx", "--dtype", "float16"], "--dtype goes with --as"),
        ("run", ["--as", "onnx-masked-lm", "--pooling", "mean"], "--pooling goes with --as"),
    ],
)
def test_what_is_refused(
    source: str,
    options: list[str],
    words: str,
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["convert", str(place / source), str(tmp_path / "out"), *options]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert len(error.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_without_the_extra(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(write, "PACKAGES", ("no_such_package",))
    assert cli.main(["convert", str(place / "run"), str(tmp_path / "out"), "--as", "onnx"]) == 2
    assert capsys.readouterr().err == (
        "bertscale convert: error: a graph of ONNX needs the package no_such_package: "
        "pip install 'bertscale[onnx]'\n"
    )
