"""The convergence benchmark in seconds: each contestant trains once, the table has all of them."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks/convergence.py"
SIDES = ["adamw", "lamb"] + ["trainer"] * bool(importlib.util.find_spec("accelerate"))
NAMES = [f"{preset}-{side}" for preset in ("bert", "modern") for side in SIDES]


def compare(data: Path, output: Path, *arguments: str) -> str:
    """What the benchmark prints, on a budget of a second or so for each contestant."""
    command = [
        *(sys.executable, str(SCRIPT), "--data", str(data), "--output", str(output)),
        *("--size", "tiny", "--minutes", "0.02", "--batch", "4", *arguments),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_all_contestants_and_a_second_start(tiny_data: Path, tmp_path: Path) -> None:
    output, file = tmp_path / "runs", tmp_path / "results.json"
    first = ["bert-adamw", NAMES[-1]]
    printed = compare(tiny_data, output, "--only", *first)
    assert "trained already" not in printed
    assert printed.count(" steps, held-out MLM loss") == 2
    before = {path: path.read_bytes() for path in output.glob("*/result.json")}
    assert len(before) == 2

    printed = compare(tiny_data, output, "--together", "--json", str(file))
    assert printed.count("trained already") == 2  # a core with one thread each time
    assert printed.count(" steps, held-out MLM loss") == len(NAMES) - 2
    assert before.items() <= {path: path.read_bytes() for path in output.glob("*/result.json")}.items()

    table = printed[printed.index("held-out loss") :].splitlines()
    assert [line.split()[0] for line in table[1:]] == [*(name.split("-")[0] for name in NAMES), "unigram"]
    found = json.loads(file.read_text())
    assert list(found["contestants"]) == NAMES
    for figures in found["contestants"].values():
        assert figures["steps"] > 0
        assert figures["tokens"] > 0
        assert 0 < figures["heldout_mlm_loss"] < 7  # log 330 is 5.8
        assert 0 <= figures["heldout_mlm_accuracy"] <= 1
    cases = [(result["case"], result["goal"]) for result in found["results"]]
    if "trainer" in SIDES:
        expected = [
            f"{preset} tiny, ours, {name}" for preset in ("bert", "modern") for name in ("AdamW", "LAMB")
        ]
        assert cases == [(case, 1.0) for case in expected]
    else:
        assert not cases
        assert "left out" in printed
