"""`bertscale inspect` of runs, checkpoints and models, and `bertscale diff` of two of them."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sharded import write_run
from test_heads import random_model
from transformers import BertConfig, BertModel

from bertscale import cli
from bertscale.config import ModelConfig
from bertscale.convert.task_models import write_task_model
from bertscale.export.convert import convert
from bertscale.export.options import ConvertOptions
from bertscale.inspect.diff import diff, measures
from bertscale.inspect.facts import describe
from bertscale.model.heads import HeadConfig
from bertscale.tokenizer import load_tokenizer
from bertscale.train.checkpoint import open_checkpoint


@pytest.fixture(scope="module")
def made(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one set of weights at two topologies, one of others, an export, and a task model."""
    folder = tmp_path_factory.mktemp("made")
    write_run(folder / "run", tiny_data, {}, (2, 2, 3))
    write_run(folder / "same", tiny_data, {}, (1, 3, 1))
    write_run(folder / "other", tiny_data, {}, (1, 1, 0), step=9, seed=2, average=True)
    convert(folder / "run", folder / "exported", ConvertOptions(show=False))
    checkpoint = open_checkpoint(folder / "run")
    head, tokenizer = HeadConfig("tokens", 3), load_tokenizer(tiny_data)
    model = random_model(checkpoint.model, head, 330)
    for name, value in model.named_parameters():
        if name.startswith("encoder."):
            value.data = checkpoint.tensor(name)
    (folder / "task").mkdir()
    tensors = ((name, value.detach()) for name, value in model.named_parameters())
    labels = ["O", "B-x", "I-\ud800"]
    write_task_model(folder / "task", checkpoint.model, 330, head, labels, tensors, tokenizer, 32, {})
    return folder


def said(arguments: list[str], capsys: pytest.CaptureFixture[str], code: int = 0) -> str:
    capsys.readouterr()
    assert cli.main(arguments) == code
    return capsys.readouterr().out


# ------------------------------------------------------------------------------------------- inspect


def test_a_run_and_its_checkpoint(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = json.loads(said(["inspect", str(made / "run"), "--json"], capsys))
    checkpoint = open_checkpoint(made / "run")
    assert (facts["kind"], facts["checkpoint"], facts["finished"]) == ("run", "step-0000007", False)
    assert facts["topology"] == {"tensor": 2, "data": 2, "zero_stage": 3}
    assert facts["model"]["preset"] == "bert"
    assert facts["parameters"] == sum(math.prod(e["shape"]) for e in checkpoint.parameters.values())
    assert (facts["step"], facts["samples"], facts["tokens_at_most"]) == (7, 56, 56 * 48)
    assert facts["optimizer_state"] == ["exp_avg", "exp_avg_sq"]
    assert (facts["optimizer"], facts["average"]) == ("adamw", False)
    assert facts["lineage"][0]["folder"] == "runs/parent"
    assert facts["losses"] == {
        **{"train/loss": 6.25, "train_step": 7, "heldout/mlm_loss": 5.5, "heldout_step": 7}
    }
    assert facts["digests"]["table"] == checkpoint.digest()
    assert facts["digests"]["data"] == "d" * 32
    assert len(facts["files"]) == 4
    inside = describe(checkpoint.folder)
    assert inside["kind"] == "checkpoint"
    assert {key: inside[key] for key in ("step", "losses", "digests", "bytes")} == {
        key: facts[key] for key in ("step", "losses", "digests", "bytes")
    }
    assert describe(made / "other")["average"]
    text = said(["inspect", str(made / "run")], capsys)
    for words in (
        "tensor 2 x data 2 x ZeRO 3",
        "step 7, 56 samples, at most 2,688 tokens",
        "runs/parent, step 3",
    ):
        assert words in text
    assert "train/loss 6.2500, heldout/mlm_loss 5.5000" in text


def test_models(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = describe(made / "exported")
    assert (facts["kind"], facts["class"], facts["dtype"]) == (
        *("Hugging Face folder", "BertForPreTraining", "float32"),
    )
    assert facts["model"]["preset"] == "bert"
    stored = load_file(made / "exported" / "model.safetensors")
    assert facts["parameters"] == sum(value.numel() for value in stored.values())
    assert facts["digests"]["source"] == open_checkpoint(made / "run").digest()
    text = said(["inspect", str(made / "task")], capsys)
    assert "BertForTokenClassification" in text
    assert r"3: O, B-x, I-\ud800" in text
    json.loads(said(["inspect", str(made / "task"), "--json"], capsys))
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    half = BertModel(BertConfig(vocab_size=33, **sizes), add_pooling_layer=False).to(torch.bfloat16)
    half.save_pretrained(tmp_path / "shards", max_shard_size="2KB")
    facts = describe(tmp_path / "shards")
    assert (facts["dtype"], facts["parameters"]) == ("bfloat16", half.num_parameters())
    shutil.copytree(tmp_path / "shards", tmp_path / "pickle", ignore=shutil.ignore_patterns("model*"))
    torch.save(half.state_dict(), tmp_path / "pickle" / "pytorch_model.bin")
    assert describe(tmp_path / "pickle")["parameters"] == half.num_parameters()


def test_a_data_set_for_programs(tiny_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = json.loads(said(["inspect", str(tiny_data), "--json"], capsys))
    assert facts["kind"] == "data set"
    assert facts["splits"]["train"]["documents"] + facts["splits"]["validation"]["documents"] == 300
    assert facts["digests"]["tokenizer"] == load_tokenizer(tiny_data).sha256
    assert cli.main(["inspect", str(tiny_data), "--tensors"]) == 2


def test_tensors(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = json.loads(said(["inspect", str(made / "run"), "--tensors", "--json"], capsys))["tensors"]
    checkpoint = open_checkpoint(made / "run")
    assert [row["name"] for row in rows] == list(checkpoint.parameters)
    for row in rows[:5]:
        value = checkpoint.tensor(row["name"]).double()
        assert row["shape"] == list(value.shape)
        assert row["mean"] == pytest.approx(float(value.mean()))
        assert row["deviation"] == pytest.approx(float(value.std(correction=0)))
        assert row["largest"] == pytest.approx(float(value.abs().max()))
    text = said(["inspect", str(made / "exported"), "--tensors"], capsys)
    assert "bert.encoder.layer.0.attention.self.key.weight" in text


def test_inspect_loads_no_torch(made: Path) -> None:
    code = f"""
import sys
from bertscale import cli
assert cli.main(["inspect", {str(made / "run")!r}]) == 0
assert cli.main(["inspect", {str(made / "exported")!r}]) == 0
assert not {{"torch", "transformers"}} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# ---------------------------------------------------------------------------------------------- diff


def test_equal_at_any_topology_and_after_an_export(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = diff(made / "run", made / "same")
    assert found["equal"]
    assert found["optimizer_state"]
    assert diff(made / "run", made / "exported")["equal"]
    text = said(["diff", str(made / "exported"), str(made / "run")], capsys)
    assert "equal    50 parameters (weights), and the settings" in text


def test_what_differs(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(said(["diff", str(made / "run"), str(made / "other"), "--json"], capsys, 1))
    first, second = open_checkpoint(made / "run"), open_checkpoint(made / "other")
    assert found["steps"] == [7, 9]
    assert len(found["parameters"]) == 3 * len(first.parameters)
    row = found["parameters"][0]
    ours, theirs = (each.tensor(row["name"], row["state"]).double() for each in (first, second))
    assert row["largest"] == pytest.approx(float((ours - theirs).abs().max()))
    assert row["relative"] == pytest.approx(float((ours - theirs).norm() / ours.norm()))
    cosine = torch.nn.functional.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0)
    assert row["cosine"] == pytest.approx(float(cosine))
    assert not found["settings"]
    text = said(["diff", str(made / "run"), str(made / "other")], capsys, 1)
    assert "50 of 50 parameters of both differ (weights and optimizer state)" in text


def test_one_value_one_setting_and_a_head(made: Path, tmp_path: Path) -> None:
    folder = tmp_path / "edited"
    shutil.copytree(made / "exported", folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["bert.pooler.dense.bias"][3] += 0.5
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "layer_norm_eps": 1e-6}))
    found = diff(made / "run", folder)
    assert [row["name"] for row in found["parameters"]] == ["encoder.pooler.bias"]
    assert found["parameters"][0]["largest"] == pytest.approx(0.5)
    assert found["settings"] == [{"key": "model.layer_norm_eps", "first": 1e-12, "second": 1e-6}]
    found = diff(made / "run", made / "task")
    assert not found["parameters"]
    assert found["only_in_second"] == ["head.output.weight", "head.output.bias"]
    assert "predictions.dense.weight" in found["only_in_first"]


def test_values_without_a_number() -> None:
    nothing, infinite = torch.zeros(3), torch.tensor([1.0, torch.inf, 0.0])
    assert measures(nothing, torch.ones(3)) == {"largest": 1.0, "relative": None, "cosine": None}
    assert measures(infinite, nothing) == {"largest": None, "relative": None, "cosine": None}


@pytest.mark.parametrize("name", ["inspect", "diff"])
def test_what_cannot_be_read_is_one_line(
    name: str, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut = tmp_path / "cut"
    shutil.copytree(made / "run", cut)
    shard = next(cut.rglob("shard-t01-d01.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    model = tmp_path / "model"
    shutil.copytree(made / "exported", model)
    (model / "model.safetensors").write_bytes(b"\0" * 100)
    (tmp_path / "empty").mkdir()
    cases: dict[str, Any] = {
        "cut": shard.name,
        "model": "model.safetensors",
        "empty": "empty",
        "none": "none",
    }
    for folder, words in cases.items():
        others = [str(made / "run")] if name == "diff" else []
        capsys.readouterr()
        assert cli.main([name, str(tmp_path / folder), *others]) == 2
        error = capsys.readouterr().err
        assert words in error
        assert len(error.splitlines()) == 1


def test_a_model_of_an_older_table_is_checked(made: Path) -> None:
    assert ModelConfig.model_validate(describe(made / "run")["model"]) == open_checkpoint(made / "run").model
