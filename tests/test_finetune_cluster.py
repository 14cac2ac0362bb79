"""`bertscale submit finetune` on several nodes of the virtual cluster: stopped, queued again, resumed."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_finetune import configure, world  # noqa: F401  (a fixture)
from test_nights import Night
from virtual import Cluster

from bertscale.run_folder import checkpoints, job_folder, read_metrics

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

EPOCHS = 40
STEPS = 6 * EPOCHS
CHANGES = [
    *(f"train.epochs={EPOCHS}", "train.eval_every=60", "train.save_every=20", "train.log_every=1"),
    *("parallel.zero_stage=2", "launch.start_seconds=120", "launch.hang_seconds=120"),
]
SITE = {
    "partition": "main",
    "cpus_per_task": 1,
    "environment": {"GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"},
    "signal_seconds": 60,
    "node_check": False,
}


class Tuning(Night):
    """One fine-tuning of two ranks on two nodes, and what a test does to it."""

    def __init__(self, cluster: Cluster, folder: Path, world: Path) -> None:  # noqa: F811
        super().__init__(cluster, folder, world)
        self.job_folder = job_folder("finetune", self.run)
        values = configure(world, self.run, *CHANGES, f"data.dev={world}/test.jsonl").model_dump(mode="json")
        (folder / "finetune.yaml").write_text(yaml.safe_dump(values))
        (folder / "cluster.yaml").write_text(yaml.safe_dump(SITE))

    def submit(self, *options: str, **site: Any) -> None:
        """`bertscale submit finetune`, on two nodes."""
        self.cluster.run(
            *(sys.executable, "-m", "bertscale", "submit", "finetune", str(self.folder / "finetune.yaml")),
            *("--cluster", str(self.folder / "cluster.yaml"), "--nodes", "2"),
        )
        self.job = next(event["job"] for event in self.events("queued"))

    def status(self) -> str:
        return self.cluster.run(sys.executable, "-m", "bertscale", "status", str(self.run)).stdout


@pytest.fixture
def tuning(cluster: Cluster, tmp_path: Path, world: Path) -> Iterator[Tuning]:  # noqa: F811
    tuning = Tuning(cluster, tmp_path, world)
    yield tuning
    if tuning.job:
        cluster.run("scancel", tuning.job, check=False)


def test_stopped_before_its_time_limit_it_is_queued_again_and_ends(tuning: Tuning, bertscale: Any) -> None:
    """Its figures are those of the same fine-tuning that nothing stops, on two ranks of this machine."""
    calm = tuning.folder / "calm"
    done = bertscale("finetune", f"{tuning.folder}/finetune.yaml", f"output={calm}", "parallel.ranks=2")
    assert done.returncode == 0, done.stderr

    tuning.submit()
    tuning.until_step(1)
    rank = tuning.rank_process(1)
    tuning.until("a checkpoint", lambda: checkpoints(tuning.run))
    os.kill(rank, signal.SIGSTOP)  # or the end could come before the signal
    tuning.cluster.run("scancel", "--batch", "--signal=USR1", tuning.job)  # as before a time limit
    tuning.until("the signal", lambda: tuning.events("signal"))
    assert ": finetune, running" in tuning.status()
    os.kill(rank, signal.SIGCONT)
    tuning.until("the requeue", lambda: tuning.events("requeued"))
    saved = int(checkpoints(tuning.run)[-1].name.removeprefix("step-"))
    assert 20 <= saved < STEPS
    tuning.cluster.wait(tuning.job, "PENDING")
    waiting = tuning.status()
    assert ": finetune, waiting\n" in waiting
    assert f"step {saved} of {STEPS}" in waiting
    tuning.until_done()

    one, other = (load_file(folder / "model/model.safetensors") for folder in (tuning.run, calm))
    for name, value in other.items():
        assert torch.equal(one[name], value), name
    for name in ("predictions-dev.jsonl", "predictions-test.jsonl"):
        assert (tuning.run / name).read_bytes() == (calm / name).read_bytes()
    steps = [entry["step"] for entry in read_metrics(tuning.run) if "train/loss" in entry]
    assert steps == list(range(1, STEPS + 1))
    nodes = [event["nodes"] for event in tuning.events("started")]
    assert [len(each) for each in nodes] == [2, 2]
    ended = tuning.status()
    assert ": finetune, done\n" in ended
    assert f"step {STEPS} of {STEPS}" in ended
