"""The README's commands for text of one's own do what they say."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import write_corpus

ROOT = Path(__file__).parents[1]
# What makes them small enough for a test.
SMALLER = {
    "prep": ["train_tokenizer.vocab_size=330", "validation_fraction=0.2", "workers=1"],
    "pretrain": [
        *("model.num_hidden_layers=1", "model.hidden_size=32", "model.num_attention_heads=2"),
        *("model.intermediate_size=64", "samples.max_length=48", "train.hours=0.0003"),
        *("train.global_batch=4", "train.micro_batch=4", "train.eval_samples=4"),
    ],
    "convert": ["--no-show"],
}


def own_text() -> list[list[str]]:
    """The words of the commands of the block that names FOLDER."""
    blocks = (ROOT / "README.md").read_text(encoding="utf-8").split("```")[1::2]
    [block] = [block for block in blocks if "FOLDER" in block and "bertscale prep" in block]
    return [shlex.split(line) for line in block.strip().splitlines()]


@pytest.mark.slow
def test_own_text(tmp_path: Path) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "text").mkdir()
    write_corpus(tmp_path / "text/corpus.jsonl")
    commands = own_text()
    assert [words[:2] for words in commands] == [["bertscale", stage] for stage in SMALLER]
    for words in commands:
        given = [word.replace("FOLDER", "text") for word in words[1:]]
        command = [sys.executable, "-m", "bertscale", *given, *SMALLER[words[1]]]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "runs/laptop/hugging-face/model.safetensors").is_file()
