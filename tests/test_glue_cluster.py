"""On the virtual cluster: pretraining -> every task of a folder, as jobs -> the table, in one submission."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from dist import run_ranks
from test_glue import write_glue
from test_pipeline import story
from tiny import pretrain_config
from virtual import Cluster

from bertscale.errors import FAULT
from bertscale.train.checkpoint import open_checkpoint

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

SITE = {
    "environment": {"GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"},
    "sbatch": ["--exclusive"],  # else all tasks of an array are put on one node
    "node_check": False,
}


def wait(cluster: Cluster, folder: Path, mark: Path) -> None:
    deadline = time.monotonic() + 400
    while not mark.exists():
        assert time.monotonic() < deadline, story(folder)
        assert cluster.run("squeue", "-h").stdout.strip() or mark.exists(), story(folder)
        time.sleep(0.5)


def write_phases(run: dict[str, Any], path: Path) -> None:
    phases = {
        "first": {"train": {"steps": 4}},
        "last": {"train": {"steps": 3}, "init": {"optimizer": "keep"}},
    }
    path.write_text(yaml.safe_dump({**run, "phases": phases}))


def check_phases(run: dict[str, Any], folder: Path) -> None:
    """The jobs' weights are those of the chain on this machine, bit for bit."""
    write_phases({**run, "run": str(folder / "here")}, folder / "here.yaml")
    test_phases = Path(__file__).with_name("test_phases.py")
    run_ranks(str(test_phases), "train_chain", world=1, path=str(folder / "here.yaml"), steps=1000)
    here, there = (open_checkpoint(folder / name / "last") for name in ("here", "run"))
    for name in here.parameters:
        assert torch.equal(here.tensor(name), there.tensor(name)), name
    assert [Path(each["folder"]).parts[-3] for each in there.lineage] == ["first"]


def test_a_pretraining_and_its_table(cluster: Cluster, tmp_path: Path, tiny_data: Path) -> None:
    """Two phases of a pretraining, a job each, then the tasks: RTE starts from MNLI's model; a task that
    fails is named in the table, and the others have figures."""
    write_glue(tmp_path / "glue")
    run = pretrain_config(tiny_data, tmp_path / "run").model_dump()
    write_phases(run, tmp_path / "pretrain.yaml")
    (tmp_path / "site.yaml").write_text(yaml.safe_dump(SITE))
    glue = {
        "model": str(tmp_path / "run/last"),
        "output": str(tmp_path / "run-glue"),
        "folder": str(tmp_path / "glue"),
        "tasks": ["mnli", "rte", "cola"],
    }
    # The encoder has two layers: CoLA is refused.
    settings = ["train.epochs=1", "cola.model.freeze_layers=9"]
    pipeline = {
        "name": "tiny",
        "cluster": str(tmp_path / "site.yaml"),
        "stages": [{"pretrain": str(tmp_path / "pretrain.yaml")}, {"glue": glue, "set": settings}],
    }
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump(pipeline))
    words = (sys.executable, "-m", "bertscale", "submit", "pipeline", str(tmp_path / "pipeline.yaml"))
    cluster.run(*words)
    output = tmp_path / "run-glue"
    wait(cluster, tmp_path, output / "glue.json")
    (row,) = json.loads((output / "glue.json").read_text())["rows"]
    assert row["tasks"].keys() == {"mnli", "rte"}, story(tmp_path)
    assert row["failed"]["cola"].startswith("exit code 2 of `bertscale finetune ")
    assert json.loads((output / "rte/result.json").read_text())["pretrained"]["runs"]
    assert f"from {output}/mnli/model" in story(tmp_path)
    check_phases(run, tmp_path)
    while cluster.run("squeue", "-h").stdout.strip():
        time.sleep(0.5)
    assert (tmp_path / "run-glue.job/done-1.json").exists()
    assert not (tmp_path / "run-glue.finish.job/done.json").exists()  # it has ended with FAULT
    gave_up = [json.loads(line) for line in (tmp_path / "run-glue.finish.job/events.jsonl").open()]
    assert gave_up[-1]["event"] == "gave_up"
    assert gave_up[-1]["code"] == FAULT

    # Submitted again without the mistake: what is finished stays, and the table is whole.
    pipeline["stages"][1]["set"] = ["train.epochs=1"]  # type: ignore[index]
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump(pipeline))
    before = (output / "rte/result.json").stat().st_mtime_ns
    cluster.run(*words)
    wait(cluster, tmp_path, tmp_path / "run-glue.finish.job/done.json")
    (row,) = json.loads((output / "glue.json").read_text())["rows"]
    assert row["tasks"].keys() == {"mnli", "rte", "cola"}
    assert row["failed"] == {}
    assert (output / "rte/result.json").stat().st_mtime_ns == before
