"""The commands of docs/recipes.md, in an empty folder, one recipe after another, each smaller."""

from __future__ import annotations

import json
import random
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from pages import ROOT
from tiny import write_corpus

PAGE = ROOT / "docs/recipes.md"
TINY_MODEL = [
    *("model.num_hidden_layers=1", "model.hidden_size=32", "model.num_attention_heads=2"),
    *("model.intermediate_size=64", "train.eval_samples=4", "parallel.ranks=1"),
]
# What makes the commands small enough for a test; the phases of the recipe for long texts keep their batch.
SMALLER = {
    "prep": ["train_tokenizer.vocab_size=330", "validation_fraction=0.2", "workers=1"],
    "inspect": [],
    "pretrain": [*TINY_MODEL, "train.hours=0.0003", "train.global_batch=4", "train.micro_batch=4"],
    "convert": ["--no-show"],
    "finetune": ["train.steps=2", "train.seeds=[0]", "parallel.ranks=1"],
    "predict": [],
}
OF_PHASES = {"short": 4, "long": 2, "decay": 2}
RECIPES = ("A domain", "Your own language", "Long texts")


def recipe(title: str) -> tuple[list[list[str]], dict[str, str]]:
    """The words of the recipe's commands, and its files: name -> text."""
    text = PAGE.read_text(encoding="utf-8").partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"```(\w*)\n(.*?)```", text, flags=re.DOTALL)
    [shell] = [block for language, block in blocks if not language]
    commands = [shlex.split(line) for line in shell.replace("\\\n", " ").splitlines()]
    files = dict(re.findall(r"`([\w./]+)`:\n\n```yaml\n(.*?)```", text, flags=re.DOTALL))
    return commands, files


def write_inputs(folder: Path) -> None:
    """What the recipes say that the user has."""
    (folder / "configs").symlink_to(ROOT / "configs")
    for name in ("text/general", "text/domain", "labelled"):
        (folder / name).mkdir(parents=True)
    write_corpus(folder / "text/general/corpus.jsonl")
    write_corpus(folder / "text/domain/corpus.jsonl", documents=100)
    draw = random.Random(0)
    rows = [(f"It is {word} at {draw.randint(1, 99)}.", word) for word in ("good", "bad") for _ in range(30)]
    table = "".join(f"{label}\t{text}\n" for text, label in [("sentence", "label"), *rows])
    (folder / "labelled/train.tsv").write_text(table)
    lines = (json.dumps({"text": text, "label": label}) + "\n" for text, label in rows)
    (folder / "labelled/long.jsonl").write_text("".join(lines))


def smaller(stage: str, given: list[str]) -> list[str]:
    """What is added to a command: nothing of a tokenizer that is given, phases each for themselves."""
    added = SMALLER[stage]
    if stage == "prep" and any(word.startswith("tokenizer=") for word in given):
        added = added[1:]
    if stage == "pretrain" and given[0] == "long.yaml":
        batches = [
            f"phases.{name}.train.{key}={size}"
            for name, size in OF_PHASES.items()
            for key in ("global_batch", "micro_batch")
        ]
        hours = [f"phases.{name}.train.hours=0.0002" for name in OF_PHASES]
        added = [*TINY_MODEL, *hours, *batches, "phases.long.samples.min_document_tokens=1"]
    return added


@pytest.mark.slow
def test_every_recipe_from_an_empty_folder(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    commands, files = {}, {}
    for title in RECIPES:
        commands[title], own = recipe(title)
        files.update(own)  # a file of the recipe before may serve
        for name, text in files.items():
            (tmp_path / name).write_text(text)
        assert commands[title]
        for _, stage, *given in commands[title]:
            done = subprocess.run(
                [sys.executable, "-m", "bertscale", stage, *given, *smaller(stage, given)],
                cwd=tmp_path,
                capture_output=True,
                text=True,
                timeout=300,
            )
            assert done.returncode == 0, f"{stage} {given}\n{done.stdout}{done.stderr}"
    for made in ("domain/hugging-face", "french/hugging-face", "long/hugging-face", "domain/task/model"):
        assert (tmp_path / "runs" / made / "model.safetensors").is_file()
    for word in ("general", "domain"):
        metrics = (tmp_path / "runs/domain/encoder/metrics.jsonl").read_text()
        assert f"heldout/{word}/mlm_loss" in metrics
