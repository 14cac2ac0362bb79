"""What a conversion may replace: its own earlier output, as it wrote it, and nothing else unasked."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from conftest import Command
from safetensors.torch import load_file, save_file
from test_convert import write_checkpoint
from tiny import pretrain_config
from transformers import AutoModelForPreTraining, AutoModelForSequenceClassification

from bertscale.config import UserError
from bertscale.export.convert import convert
from bertscale.export.options import ConvertOptions
from bertscale.export.output import RECORD
from bertscale.files import file_digest
from bertscale.run_folder import TABLE, checkpoint_folder
from bertscale.train.checkpoint import open_checkpoint, write_whole


@pytest.fixture
def native(tiny_data: Path, tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "native", tiny_data, {})
    return tmp_path / "native"


@pytest.fixture
def exported(native: Path, tmp_path: Path) -> Path:
    convert(native, tmp_path / "hf", ConvertOptions(show=False))
    return tmp_path / "hf"


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def newer(native: Path) -> None:
    """Other weights, as a run's next checkpoint has."""
    checkpoint = open_checkpoint(native)
    tensors = [(name, checkpoint.tensor(name) * 1.25) for name in checkpoint.parameters]
    table = {key: checkpoint.table[key] for key in ("model", "vocab_size", "tokenizer_sha256", "config")}
    tokenizer = native / "tokenizer.model"
    shutil.copy(tokenizer, native.parent / "tokenizer.model")
    shutil.rmtree(native)
    write_whole(native, table, tensors, native.parent / "tokenizer.model")


def refused(source: Path, output: Path, words: str) -> None:
    before = contents(output) if output.is_dir() else {}
    with pytest.raises(UserError) as caught:
        convert(source, output, ConvertOptions(show=False))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert (contents(output) if output.is_dir() else {}) == before
    assert not list(output.parent.glob(".*.partial"))


def test_an_earlier_output_is_replaced_by_a_newer_checkpoint(native: Path, exported: Path) -> None:
    before = file_digest(exported / "model.safetensors")
    newer(native)
    convert(native, exported, ConvertOptions(show=False))
    assert file_digest(exported / "model.safetensors") != before


def test_an_output_that_lost_its_weights_is_made_again(
    native: Path, exported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (exported / "model.safetensors").unlink()
    capsys.readouterr()
    convert(native, exported, ConvertOptions(show=False))
    assert "already converted" not in capsys.readouterr().out
    assert (exported / "model.safetensors").is_file()


def test_a_model_that_was_trained_from_an_export_is_not_replaced(native: Path, exported: Path) -> None:
    """transformers keeps every key of config.json, so none there can tell whose the weights are."""
    model = AutoModelForSequenceClassification.from_pretrained(exported)
    model.save_pretrained(exported)
    refused(native, exported, "config.json in it was changed after `bertscale convert`")
    model = AutoModelForPreTraining.from_pretrained(exported)
    for name in ("README.md", "onnx/model.onnx", "checkpoint-500/model.safetensors"):
        convert(native, exported, ConvertOptions(show=False, replace=True))
        (exported / name).parent.mkdir(exist_ok=True)
        (exported / name).write_text("mine")
        state = "changed after" if name == "README.md" else "not written by"
        refused(native, exported, f"{name} in it was {state} `bertscale convert`")
    convert(native, exported, ConvertOptions(show=False, replace=True))
    assert not (exported / "checkpoint-500").exists()


def test_a_copy_of_config_and_record_beside_other_weights_is_not_the_output(
    native: Path, exported: Path
) -> None:
    tensors = load_file(exported / "model.safetensors")
    save_file({name: value + 1 for name, value in tensors.items()}, exported / "model.safetensors")
    refused(native, exported, "model.safetensors in it was changed after `bertscale convert`")
    (exported / RECORD).write_text("{}")
    refused(native, exported, "was not written by `bertscale convert`")
    (exported / RECORD).write_text("[1")
    refused(native, exported, "was not written by `bertscale convert`")


def test_checkpoints_of_a_run_are_never_replaced(native: Path, exported: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(native, checkpoint_folder(run, 7))
    for output in (run, checkpoint_folder(run, 7), checkpoint_folder(run, 8)):
        for replace in (False, True):
            with pytest.raises(UserError, match="holds a run's checkpoints; they are never replaced"):
                convert(exported, output, ConvertOptions(show=False, replace=replace))
    assert (checkpoint_folder(run, 7) / TABLE).is_file()
    assert not checkpoint_folder(run, 8).exists()


def test_an_import_is_replaced_only_where_it_is_one(exported: Path, tmp_path: Path) -> None:
    imported = tmp_path / "imported"
    convert(exported, imported, ConvertOptions(show=False))
    before = contents(imported)
    convert(exported, imported, ConvertOptions(show=False))
    assert contents(imported) == before
    (imported / "notes.txt").write_text("mine")
    refused(exported, imported, "notes.txt in it was not written by")


def test_odd_outputs_are_one_line(
    native: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bertscale: Command
) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    (tmp_path / "file").write_text("mine")
    refused(native, tmp_path / "link", "is a link")
    refused(native, tmp_path / "file", "is a file, not a folder")
    refused(native, tmp_path / "file" / "below", "file is a file, not a folder")
    refused(native, native, "is, or holds, the source")
    refused(native, native.parent, "is, or holds, the source")
    monkeypatch.chdir(tmp_path / "target")
    refused(native, Path("."), "is, or holds, the current folder")
    result = bertscale("convert", str(native), "/proc/out")
    assert result.returncode == 2
    assert result.stderr.startswith("bertscale convert: error: cannot write /proc/out: ")
    assert len(result.stderr.strip().splitlines()) == 1


# --------------------------------------------------------------------------------- what is not verified


def test_damaged_sources_are_not_exported(native: Path, tmp_path: Path) -> None:
    """Both sides of the comparison read the same file: only the digests know."""
    (shard,) = native.glob("*.safetensors")
    sound = shard.read_bytes()
    shard.write_bytes(sound[:-4] + bytes(byte ^ 1 for byte in sound[-4:]))
    refused(native, tmp_path / "out", "is damaged: its digest differs")
    shard.write_bytes(sound)
    with (native / "tokenizer.model").open("ab") as file:
        file.write(b"\0")
    refused(native, tmp_path / "out", "is not the tokenizer that the checkpoint was trained with")
    assert not (tmp_path / "out").exists()


def test_logits_that_are_not_finite_are_never_verified(native: Path, tmp_path: Path, tiny_data: Path) -> None:
    checkpoint = open_checkpoint(native)
    table = {key: checkpoint.table[key] for key in ("model", "vocab_size", "tokenizer_sha256", "config")}
    name = "encoder.layers.0.attention.dense.bias"
    tensors = [(each, checkpoint.tensor(each)) for each in checkpoint.parameters]
    broken = [(each, torch.full_like(value, math.nan) if each == name else value) for each, value in tensors]
    write_whole(tmp_path / "broken", table, broken, tiny_data / "tokenizer.model")
    refused(tmp_path / "broken", tmp_path / "out", "are not finite, so its export cannot be verified")
    assert not (tmp_path / "out").exists()


def test_the_record_names_every_file(native: Path, exported: Path) -> None:
    record = json.loads((exported / RECORD).read_text())
    assert record["source"] == file_digest(native / TABLE)
    assert record["files"] == {
        name: file_digest(exported / name) for name in contents(exported) if name != RECORD
    }


def test_a_run_does_not_begin_with_random_weights_in_a_model(
    exported: Path, tmp_path: Path, tiny_data: Path, bertscale: Command
) -> None:
    convert(exported, tmp_path / "imported", ConvertOptions(show=False))
    config = tmp_path / "tiny.yaml"
    for folder in (exported, tmp_path / "imported"):
        before = contents(folder)
        config.write_text(
            yaml.safe_dump(pretrain_config(tiny_data, folder).model_dump(mode="json", exclude_none=True))
        )
        result = bertscale("pretrain", str(config))
        assert result.returncode == 2
        assert f"run={folder} is a checkpoint or a model" in result.stderr
        assert f"encoder={folder}" in result.stderr
        assert contents(folder) == before
