"""Bad input to `bertscale pretrain`, as a person meets it: one clear line, exit code 2, nothing started."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Command
from tiny import pretrain_config

Damage = Callable[[Path], None]


def nothing(data: Path) -> None:
    pass


def first_shard(data: Path) -> Path:
    return min(data.glob("train-*.arrow"))


def remove_all(data: Path) -> None:
    shutil.rmtree(data)


def remove_manifest(data: Path) -> None:
    (data / "manifest.json").unlink()


def cut_shard(data: Path) -> None:
    os.truncate(first_shard(data), first_shard(data).stat().st_size // 2)


def flip_byte(data: Path) -> None:
    content = bytearray(first_shard(data).read_bytes())
    content[len(content) // 2] ^= 1
    first_shard(data).write_bytes(content)


def another_tokenizer(data: Path) -> None:
    content = bytearray((data / "tokenizer.model").read_bytes())
    content[-1] ^= 1
    (data / "tokenizer.model").write_bytes(content)


CASES: dict[str, tuple[Damage, list[str], list[str]]] = {
    "missing data folder": (remove_all, [], ["data", "prep"]),
    "no manifest": (remove_manifest, [], ["manifest.json", "bertscale prep"]),
    "shard cut short": (cut_shard, [], ["train-00000.arrow"]),
    "flipped byte": (flip_byte, ["--verify"], ["train-00000.arrow", "digest"]),
    "another tokenizer": (another_tokenizer, [], ["tokenizer.model"]),
    "unknown key": (nothing, ["train.step=5"], ["unknown key train.step; did you mean train.steps?"]),
    "heads": (nothing, ["parallel.tensor=3"], ["parallel.tensor=3", "num_attention_heads=4", "1, 2, 4"]),
    "batch": (nothing, ["parallel.ranks=3"], ["global_batch=8", "micro_batch=2"]),
    "ranks": (
        nothing,
        ["parallel.tensor=2", "parallel.ranks=3"],
        ["3 ranks", "parallel.tensor=2", "parallel.ranks"],
    ),
    "not a number": (nothing, ["train.steps=many"], ["train.steps='many'"]),
}


@pytest.mark.parametrize("case", CASES)
def test_one_line_that_names_it_and_nothing_started(
    case: str, tiny_data: Path, tmp_path: Path, bertscale: Command
) -> None:
    damage, arguments, words = CASES[case]
    data = Path(shutil.copytree(tiny_data, tmp_path / "data"))
    damage(data)
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(pretrain_config(data, tmp_path / "run").model_dump()))
    result = bertscale("pretrain", str(config), *arguments)
    assert result.returncode == 2, result.stdout + result.stderr
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    for word in words:
        assert word in lines[0]
    assert not (tmp_path / "run").exists()
