"""The quickstart around its stages: stand-ins that only write the facts it reads."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bertscale import quickstart
from bertscale.config import PretrainConfig, load_config

ROOT = Path(__file__).parents[1]

FACTS: dict[str, Any] = {
    "collected.json": {"text_bytes": 17_200_000, "documents": 51_234, "packages": 75},
    "data/manifest.json": {
        "shards": [
            {"tokens": 2_000_000, "sentences": 90_000, "bytes": 5_000_000, "rows": 30_000},
            {"tokens": 1_500_000, "sentences": 60_000, "bytes": 4_000_000, "rows": 20_000},
        ]
    },
    "pretrain/result.json": {
        "steps": 600,
        "first_loss": 9.7,
        "last_loss": 4.3,
        "heldout_mlm_loss": 4.1,
        "tokens_per_second": 35_000.0,
        "mfu": 0.42,
        "parameters": 5_400_000,
        "precision": "bfloat16",
    },
    "finetune/result.json": {
        "labels": ["sentence", "shuffled"],
        "examples": {"train": 1000, "dev": 0, "test": 1234},
        "majority": {"test": {"accuracy": 0.5}},
        "pretrained": {"test": {"accuracy": {"mean": 0.75}}, "runs": [{}, {}]},
        "random": {"test": {"accuracy": {"mean": 0.5}}, "runs": [{}, {}]},
    },
}
CURVE = [
    {"step": step, "train/mlm_loss": loss, "speed/tokens_per_second": 35_000.0}
    for step, loss in ((1, 8.25), (300, 6.0), (600, 4.3))
]


def write(run: Path, name: str) -> list[str]:
    code = "import sys, pathlib; p = pathlib.Path(sys.argv[1]); p.parent.mkdir(parents=True, exist_ok=True); "
    return ["python", "-c", code + "p.write_text(sys.argv[2])", str(run / name), json.dumps(FACTS[name])]


def test_summary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    fake_stages = [(name, f"write {name}", write(tmp_path, name)) for name in FACTS]
    monkeypatch.setattr(quickstart, "stages", lambda run, gpus, minutes: fake_stages)
    rows = [*CURVE, {"step": 600, "heldout/mlm_loss": 4.1}]
    (tmp_path / "pretrain").mkdir()
    (tmp_path / "pretrain/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert quickstart.quickstart(tmp_path, gpus=0) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["corpus"] == FACTS["collected.json"]
    assert summary["data"] == {
        "tokens": 3_500_000,
        "sentences": 150_000,
        "bytes": 9_000_000,
        "documents": 50_000,
        "shards": 2,
    }
    assert summary["pretrain"] == FACTS["pretrain/result.json"]
    assert summary["finetune"] == FACTS["finetune/result.json"]
    assert list(summary["seconds"]) == [*FACTS, "all"]
    screen = capfd.readouterr().out
    for text in (
        "=== 1 of 4: write collected.json",
        "17.2 MB",
        "3.50 M tokens",
        "600 steps, 35,000 tokens/s; held-out loss 4.100",
        "which of 2: sentence or shuffled (1,234 held-out texts, mean of 2 seeds)",
        f"pretrained     {'█' * 45} 0.750",
        f"random weights {'█' * 30} 0.500",
        f"one class      {'█' * 30} 0.500",
    ):
        assert text in screen
    assert f"tensorboard --logdir {tmp_path}/pretrain" in screen


def test_the_curve_falls_from_the_highest_loss_to_the_lowest() -> None:
    title, *rows, axis, steps = quickstart.draw_curve([(0, 8.0), (50, 6.0), (100, 4.0)])
    assert title == "loss of masked tokens"
    assert len(rows) == quickstart.HEIGHT
    assert rows[0] == "  8.00 │•"
    assert rows[-1] == "  4.00 │" + "•".rjust(quickstart.WIDTH)
    middle = [row.index("•") for row in rows[1:-1] if "•" in row]
    assert middle == [8 + 50 * (quickstart.WIDTH - 1) // 100]
    assert steps.endswith("step 100")
    assert max(map(len, (*rows, axis, steps))) < 80
    assert quickstart.draw_curve([(1, 5.0)])  # a run of one step


@pytest.mark.parametrize("gpus", [0, 1, 2, 8])
def test_two_ranks_where_there_is_room(gpus: int) -> None:
    commands = {name: command for name, _, command in quickstart.stages(quickstart.DEFAULT_RUN, gpus, 3.0)}
    assert ("parallel" in commands) == (gpus != 1)
    assert "train.hours=0.050000" in commands["pretrain"]
    for name, ranks in (("pretrain", 1), ("parallel", 2)):
        if gpus > 1:
            assert f"parallel.ranks={ranks}" in commands[name]


def test_the_default_budget_is_that_of_the_config() -> None:
    config = load_config(PretrainConfig, ROOT / quickstart.PRETRAINING, [])
    assert config.train.hours is not None
    assert config.train.hours * 60 == pytest.approx(quickstart.MINUTES, rel=1e-5)


def test_a_failed_stage_is_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    fake_stages = [
        ("one", "fail", ["python", "-c", "import sys; sys.exit(3)"]),
        ("two", "write", write(tmp_path, "collected.json")),
    ]
    monkeypatch.setattr(quickstart, "stages", lambda run, gpus, minutes: fake_stages)
    assert quickstart.quickstart(tmp_path, gpus=0) == 3
    assert "stage 1 of 2 (one) ended with exit code 3" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_is_left_to_the_stage(tmp_path: Path) -> None:
    stage = (
        "import pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGINT, lambda number, frame: (time.sleep(0.5), sys.exit(75)))\n"
        f"pathlib.Path({str(tmp_path / 'ready')!r}).touch()\n"
        "time.sleep(1000)\n"
    )
    whole = (
        "import sys\nfrom pathlib import Path\nfrom bertscale import quickstart\n"
        f"quickstart.stages = lambda run, gpus, minutes: [('one', 'wait', ['python', '-c', {stage!r}])]\n"
        "sys.exit(quickstart.quickstart(Path('run'), 0))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", whole], cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to both
    _, err = process.communicate()
    assert process.returncode == 75
    assert "ended with exit code 75" in err
    assert "Traceback" not in err
