"""docs/chinese.md: its commands, its config and its script do what they say."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/chinese.md").read_text(encoding="utf-8")
# What makes the commands small enough for a test.
SMALLER = {
    "prep": ["train_tokenizer.vocab_size=340", "validation_fraction=0.2", "workers=1"],
    "pretrain": [
        *("model.num_hidden_layers=1", "model.hidden_size=32", "model.num_attention_heads=2"),
        *("model.intermediate_size=64", "samples.max_length=48", "train.hours=0.0003"),
        *("train.global_batch=4", "train.micro_batch=4", "train.eval_samples=4"),
    ],
    "convert": ["--no-show"],
    "finetune": ["train.epochs=1", "samples.max_length=32"],
}
SENTENCES = ["我在北京大学学习自然语言处理。", "他们的工资很高！", "这个酒店很好，服务也不错。", "书太旧了。"]


def blocks(kind: str) -> list[str]:
    fenced = [block.split("\n", 1) for block in PAGE.split("```")[1::2]]
    return [content for name, content in fenced if name == kind]


def commands() -> list[list[str]]:
    lines = "".join(blocks("")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines]


def test_the_page_has_all_stages() -> None:
    stages = [words[1] for words in commands() if words[0] == "bertscale"]
    assert stages == ["prep", "pretrain", "convert", "finetune"]


@pytest.mark.slow
def test_from_text_to_a_classifier(tmp_path: Path) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "text").mkdir()
    documents = ["".join(SENTENCES[n % 3 :]) + f"第{n}个人。" for n in range(200)]
    (tmp_path / "text/a.txt").write_text("\n\n".join(documents), encoding="utf-8")
    for part in ("train", "dev"):
        rows = "".join(f'{n % 2}\t"{SENTENCES[2 + n % 2]}\n' for n in range(8))
        (tmp_path / f"{part}.tsv").write_text(f"label\ttext_a\n{rows}", encoding="utf-8")
    [script], [config] = blocks("python"), blocks("yaml")
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)
    (tmp_path / "reviews.yaml").write_text(config, encoding="utf-8")
    for program, *words in commands():
        if program == "bertscale":
            command = [sys.executable, "-m", "bertscale", *words, *SMALLER[words[0]]]
            done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, done.stdout + done.stderr
    manifest = json.loads((tmp_path / "runs/chinese/data/manifest.json").read_text())
    assert manifest["settings"]["words"].startswith("rjieba ")
    result = json.loads((tmp_path / "runs/chinese/reviews/result.json").read_text())
    assert result["labels"] == ["bad", "good"]
