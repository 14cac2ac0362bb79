"""The fine-tuning benchmark in seconds, on examples made up here: each comparison runs, the table has all."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks/finetune.py"
KINDS = ["train"] * bool(importlib.util.find_spec("accelerate")) + ["predict"]
WORDS = [
    "a",
    "the",
    "film",
    "plot",
    "is",
    "was",
    "good",
    "bad",
    "dull",
    "fine",
    "and",
    "of",
    "it",
    "not",
    "very",
]


def data(folder: Path) -> Path:
    """A folder as the benchmark reads it."""
    for name in ("tasks/sst2", "tasks/imdb", "vocab"):
        (folder / name).mkdir(parents=True)
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab/bert-base-uncased-vocab.txt").write_text("\n".join(pieces) + "\n")
    texts = [" ".join(WORDS[(row + word) % len(WORDS)] for word in range(1 + row % 9)) for row in range(40)]
    rows = [f"{row % 2}\t{text}\n" for row, text in enumerate(texts)]
    (folder / "tasks/sst2/train.tsv").write_text("label\tsentence\n" + "".join(rows))
    lines = [json.dumps({"text": text, "label": row % 2}) + "\n" for row, text in enumerate(texts)]
    (folder / "tasks/imdb/train.jsonl").write_text("".join(lines))
    return folder


def benchmark(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "--data", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_each_side_trains_and_predicts_the_same_examples(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    arguments = ["--quick", "--rounds", "1", "--batch", "4", "--only", "sst2", "imdb", "modern", "float32"]
    done = benchmark(data(tmp_path), *arguments, "--json", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(file.read_text())
    cases = [f"{name}, modern, {kind}, float32" for name in ("sst2", "imdb") for kind in KINDS]
    assert [result["case"] for result in found["results"]] == cases
    for result in found["results"]:
        assert result["case"] in done.stdout
        assert result["ratio"] == pytest.approx(result["ours"] / result["peer"])  # of one round
        assert min(result["peak_mb"]) > 50
    assert found["machine"]["threads"] > 0


def test_what_is_not_there_is_one_line(tmp_path: Path) -> None:
    done = benchmark(data(tmp_path), "--quick", "--only", "bert", "sst3")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: --only sst3: there are bert, bfloat16, float32, ")
