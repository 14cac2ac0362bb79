"""Checkpoint -> Hugging Face -> checkpoint, and what transformers makes of the exported folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import Command
from dist import run_ranks
from tiny import pretrain_config
from transformers import AutoModelForMaskedLM, AutoModelForPreTraining, AutoTokenizer, pipeline

from bertscale.checkpoint import open_checkpoint
from bertscale.convert import convert, native_model
from bertscale.tokenizer import load_tokenizer


def train(data: str, folder: str) -> int:
    """Runs on each of two ranks: TP 2 x ZeRO-3."""
    from bertscale.pretrain import pretrain

    return pretrain(pretrain_config(data, folder, parallel={"tensor": 2, "zero_stage": 3}))


@pytest.fixture(scope="module")
def run(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    run_ranks(__file__, "train", world=2, data=str(tiny_data), folder=str(folder))
    return folder


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hf") / "exported"
    convert(run, folder, show=False)
    return folder


def test_there_and_back_is_bit_exact(run: Path, exported: Path, tmp_path: Path) -> None:
    convert(exported, tmp_path / "back", show=False)
    before, after = open_checkpoint(run), open_checkpoint(tmp_path / "back")
    assert set(before.parameters) == set(after.parameters)
    assert before.vocab_size == after.vocab_size == 330
    assert before.model == after.model
    for name in before.parameters:
        assert before.tensor(name).equal(after.tensor(name)), name


def test_transformers_gives_the_native_logits(run: Path, exported: Path, tiny_data: Path) -> None:
    model = AutoModelForPreTraining.from_pretrained(exported).eval()
    tokenizer = AutoTokenizer.from_pretrained(exported)
    assert type(model).__name__ == "BertForPreTraining"
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    texts = ["The cat finds some bread at 7.", "A small dog [MASK] the garden."]
    encoded = [tokenizer(text, "Every teacher likes an answer.", return_tensors="pt") for text in texts]
    ours = native_model(open_checkpoint(run))
    for inputs in encoded:
        ids, types = inputs["input_ids"][0], inputs["token_type_ids"][0]
        with torch.no_grad():
            hidden, pooled = ours.encoder(ids, types, torch.arange(len(ids)), (len(ids),))
            theirs = model(**inputs)
            torch.testing.assert_close(
                ours.predictions(hidden)[:, :330], theirs.prediction_logits[0], rtol=1e-5, atol=1e-5
            )
            torch.testing.assert_close(
                ours.seq_relationship(pooled), theirs.seq_relationship_logits, rtol=1e-5, atol=1e-5
            )


def test_masked_model_and_pipeline_load_the_folder_as_it_is(exported: Path) -> None:
    model = AutoModelForMaskedLM.from_pretrained(exported)
    loaded = model.state_dict()["bert.embeddings.word_embeddings.weight"]
    assert loaded.equal(model.cls.predictions.decoder.weight)
    fill = pipeline("fill-mask", model=str(exported), tokenizer=str(exported), device="cpu")
    answers = fill("The cat [MASK] the garden at 9.")
    assert len(answers) == 5
    assert sum(answer["score"] for answer in answers) <= 1.0


def test_the_exported_tokenizer_is_the_native_one(exported: Path) -> None:
    native = load_tokenizer(exported / "tokenizer.model")
    fast = AutoTokenizer.from_pretrained(exported)
    text = "My neighbour remembers the long road at 42."
    assert fast(text)["input_ids"] == [native.cls_id, *native.encode([text])[0], native.sep_id]
    assert fast.mask_token_id == native.mask_id


def test_a_second_conversion_reuses_the_first_and_another_folder_is_not_overwritten(
    run: Path, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], bertscale: Command
) -> None:
    written = (exported / "model.safetensors").stat().st_mtime_ns
    convert(run, exported, show=False)
    assert "already converted" in capsys.readouterr().out
    assert (exported / "model.safetensors").stat().st_mtime_ns == written
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    result = bertscale("convert", str(run), str(tmp_path / "mine"))
    assert result.returncode == 2
    assert "is not an earlier output of this command" in result.stderr
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_what_cannot_be_converted_is_one_line(exported: Path, tmp_path: Path, bertscale: Command) -> None:
    (tmp_path / "unfinished").mkdir()
    result = bertscale("convert", str(tmp_path / "unfinished"), str(tmp_path / "out"))
    assert result.returncode == 2
    assert "is not a finished checkpoint" in result.stderr
    config = json.loads((exported / "config.json").read_text())
    (tmp_path / "roberta").mkdir()
    (tmp_path / "roberta" / "config.json").write_text(json.dumps({**config, "model_type": "roberta"}))
    result = bertscale("convert", str(tmp_path / "roberta"), str(tmp_path / "out"))
    assert result.returncode == 2
    assert "'roberta'" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
