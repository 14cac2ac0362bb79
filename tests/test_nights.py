"""Whole jobs on the virtual Slurm cluster, disturbed as clusters disturb them: each ends by itself, with the
weights of the run that nothing disturbed, bit for bit.

Real Slurm, real processes, gloo over the nodes' own addresses.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny import pretrain_config
from virtual import Cluster

from bertscale.run_folder import EVENTS, LOGS, checkpoints, job_folder, read_events
from bertscale.train.checkpoint import open_checkpoint

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

STEPS = 30
SAVE_EVERY = 3
PAUSE = 1.0  # seconds before each step until the fault is over: some are to go when Slurm notices it
PATIENCE = 240  # seconds until a disturbed run must have ended; tests of Slurm have no shorter clock


SHIM = """#!/bin/bash
if [[ "$*" == "-m bertscale"* && -n "$RANK" ]]; then
    shift 2
    exec {python} {folder}/rank.py "$@"
fi
exec {python} "$@"
"""
RANK = """
import os, pathlib, runpy, threading, time
from bertscale.train import step

folder = pathlib.Path(__file__).parent
train_step = step.train_step

def paused_step(*arguments, **settings):
    if not (folder / "over").exists():
        time.sleep({pause})
    return train_step(*arguments, **settings)

def end():
    while not (folder / "now").exists():
        time.sleep(0.05)
    (folder / "now").unlink()
    os._exit(7)

step.train_step = paused_step
if os.environ["RANK"] == "1":
    threading.Thread(target=end, daemon=True).start()
runpy.run_module("bertscale", run_name="__main__", alter_sys=True)
"""


class Night:
    """One pretraining of two ranks on two nodes, and what a test does to it."""

    def __init__(self, cluster: Cluster, folder: Path, data: Path) -> None:
        self.cluster, self.folder, self.data = cluster, folder, data
        self.run = folder / "run"
        self.job_folder = job_folder("pretrain", self.run)
        self.job = ""

    def write_python(self) -> Path:
        """A python for the ranks: one that pauses, and whose rank 1 ends with 7 once, when it is told to."""
        shim = self.folder / "python"
        shim.write_text(SHIM.format(folder=self.folder, python=sys.executable))
        shim.chmod(0o755)
        (self.folder / "rank.py").write_text(RANK.format(pause=PAUSE))
        return shim

    def submit(self, *options: str, hang_seconds: float = 60, **site: Any) -> None:
        """`bertscale submit pretrain`, on nodes of two ranks in all, with the facts of `site`."""
        config = night_config(self.data, self.run)
        values = config.model_dump()
        values["launch"] |= {"hang_seconds": hang_seconds, "start_seconds": 120}
        (self.folder / "run.yaml").write_text(yaml.safe_dump(values))
        facts = {
            "partition": "main",
            "cpus_per_task": 1,
            "environment": {"GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"},
            "signal_seconds": 60,
            "node_check": False,
            "python": str(self.write_python()),
            "batch_python": sys.executable,
            **site,
        }
        (self.folder / "cluster.yaml").write_text(yaml.safe_dump(facts))
        done = self.cluster.run(
            *(sys.executable, "-m", "bertscale", "submit", "pretrain", str(self.folder / "run.yaml")),
            *("--cluster", str(self.folder / "cluster.yaml"), "--nodes", "2", *options),
        )
        self.job = next(event["job"] for event in self.events("queued"))
        assert self.job in done.stdout

    def events(self, *kinds: str) -> list[dict[str, Any]]:
        return [event for event in read_events(self.job_folder / EVENTS) if event["event"] in kinds]

    def until(self, what: str, condition: Callable[[], Any]) -> None:
        """Waits, but not for ever. A requeued job begins when its old credential is void, not sooner."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            if time.monotonic() > deadline:
                raise AssertionError(f"waited in vain for {what}\n{self.story()}")
            time.sleep(0.5)

    def step(self) -> int:
        try:
            lines = (self.run / "metrics.jsonl").read_text().splitlines()
            return int(json.loads(lines[-1])["step"]) if lines else 0
        except (FileNotFoundError, ValueError):
            return 0

    def until_step(self, step: int) -> None:
        self.until(f"step {step}", lambda: self.step() >= step)

    def until_done(self) -> None:
        self.until("the end", lambda: (self.job_folder / "done.json").exists() or self.events("gave_up"))
        assert (self.job_folder / "done.json").exists(), self.story()

    def story(self) -> str:
        texts = [json.dumps(event) for event in read_events(self.job_folder / EVENTS)]
        texts.append(self.cluster.run("squeue", "--all", check=False).stdout)
        texts.append(self.cluster.run("scontrol", "show", "job", self.job, check=False).stdout)
        for log in sorted((self.job_folder / LOGS).rglob("*")):
            if log.is_file():
                texts.append(f"== {log}\n{log.read_text(errors='replace')[-3000:]}")
        return "\n".join(texts)

    def strike(self, fault: str, node: str) -> None:
        """A fault that lasts until Slurm has noticed it, as a node that boots takes its time."""
        self.cluster.fault(fault, node)
        self.until(f"{node} to be down", lambda: self.cluster.node_state(node).startswith("DOWN"))

    def nodes(self) -> list[str]:
        """The nodes that the job works on now, the batch host first."""
        shown = self.cluster.run("squeue", "-h", "-j", self.job, "-o", "%N").stdout.strip()
        return self.cluster.run("scontrol", "show", "hostnames", shown).stdout.split()

    def rank_process(self, rank: int) -> int:
        """The process of one rank, which the nodes' own process table hides but the machine's shows."""
        mine = {f"RANK={rank}".encode(), f"SLURM_JOB_ID={self.job}".encode()}
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                variables = set((entry / "environ").read_bytes().split(b"\0"))
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if b"launcher.rank" in words or not any(str(self.run).encode() in word for word in words):
                continue  # of this night, there may be other clusters
            if mine <= variables and any(
                word == b"bertscale" or word.endswith(b"/rank.py") for word in words
            ):
                return int(entry.name)
        raise AssertionError(f"no process of rank {rank}\n{self.story()}")


def night_config(data: Path, run: Path) -> Any:
    """Two data-parallel ranks under ZeRO-3, slow enough to be disturbed, with many checkpoints."""
    return pretrain_config(
        data,
        run,
        model={"num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 256},
        train={"steps": STEPS, "global_batch": 128, "micro_batch": 32, "save_every": SAVE_EVERY},
        parallel={"tensor": 1, "zero_stage": 3},
    )


def weights(run: Path) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(checkpoints(run)[-1])
    assert checkpoint.step == STEPS
    return {name: checkpoint.tensor(name, "weight") for name in checkpoint.parameters}


@pytest.fixture(scope="module")
def calm(
    tmp_path_factory: pytest.TempPathFactory, tiny_data: Path, bertscale: Any
) -> dict[str, torch.Tensor]:
    """Final weights of the run that nothing disturbs, two ranks on this machine."""
    folder = tmp_path_factory.mktemp("calm")
    config = night_config(tiny_data, folder / "run").model_dump()
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    done = bertscale("pretrain", str(folder / "run.yaml"), "parallel.ranks=2")
    assert done.returncode == 0, done.stderr
    return weights(folder / "run")


@pytest.fixture
def night(cluster: Cluster, tmp_path: Path, tiny_data: Path) -> Iterator[Night]:
    night = Night(cluster, tmp_path, tiny_data)
    yield night
    if night.job:
        cluster.run("scancel", night.job, check=False)
        cluster.mend()


# ---------------------------------------------------------------------------------------- the faults


def crash_of_a_node(night: Night) -> None:
    """A node that is not the batch host loses power; a spare takes its place in the same allocation."""
    night.cluster.fault("crash", night.nodes()[1])
    night.until("the relaunch", lambda: night.events("relaunched"))
    assert not night.events("requeued")


def crash_of_the_batch_host(night: Night) -> None:
    """Slurm itself queues the job again."""
    night.strike("crash", night.nodes()[0])


def death_of_slurmd(night: Night) -> None:
    night.strike("kill-slurmd", night.nodes()[1])


def frozen_slurmd(night: Night) -> None:
    night.strike("freeze", night.nodes()[1])


def cut_network(night: Night) -> None:
    node = night.nodes()[1]
    night.cluster.fault("cut", node)
    time.sleep(12)
    night.cluster.fault("mend", node)


def stopped_rank(night: Night) -> None:
    os.kill(night.rank_process(1), signal.SIGSTOP)
    night.until("the hang", lambda: night.events("hang"))
    assert night.events("hang")[0]["silent"] == [1]
    night.until("the relaunch", lambda: night.events("relaunched"))
    attempt = next((night.job_folder / LOGS).glob("attempt-001-*"))
    assert "Thread" in (attempt / "rank-0000.log").read_text()  # the stacks of the rank that waited


def rank_that_exits_7(night: Night) -> None:
    (night.folder / "now").touch()
    night.until("the relaunch", lambda: night.events("relaunched"))
    failed = night.events("failed")[0]
    assert (failed["rank"], failed["code"], failed["node"]) == (1, 7, night.nodes()[1])


def preemption(night: Night) -> None:
    done = night.cluster.run(
        "sbatch", "-p", "high", "-N4", "--exclusive", "--wrap", "sleep 4", "-o", "/dev/null"
    )
    # By the job itself, or by Slurm where a busy machine has not got it done within the grace time.
    night.until("the requeue", lambda: night.events("requeued") or len(night.events("started")) > 1)
    assert done.returncode == 0


def time_limit(night: Night) -> None:
    """A rank is held up so long that the limit comes first."""
    rank = night.rank_process(1)
    os.kill(rank, signal.SIGSTOP)
    night.until("the signal", lambda: night.events("signal"))
    os.kill(rank, signal.SIGCONT)
    night.until("the requeue", lambda: night.events("requeued"))


def requeue(night: Night) -> None:
    night.cluster.run("scontrol", "requeue", night.job)


def restart_of_slurmctld(night: Night) -> None:
    night.cluster.fault("kill-ctld", "login")
    time.sleep(6)
    night.cluster.fault("start-ctld", "login")
    (night.folder / "over").touch()
    night.until_done()
    assert len(night.events("started")) == 1


@pytest.mark.parametrize(
    ("fault", "options", "site"),
    [
        (crash_of_a_node, ("--spares", "1"), {}),
        (crash_of_the_batch_host, (), {}),
        (death_of_slurmd, (), {}),
        (frozen_slurmd, (), {}),
        (cut_network, (), {}),
        (stopped_rank, (), {"hang_seconds": 15}),
        (rank_that_exits_7, (), {}),
        (preemption, (), {"partition": "spot"}),
        (time_limit, ("--time", "2"), {"signal_seconds": 60, "hang_seconds": 180}),
        (requeue, (), {}),
        (restart_of_slurmctld, (), {}),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_the_run_ends_by_itself_with_the_weights_of_a_calm_night(
    fault: Callable[[Night], None],
    options: tuple[str, ...],
    site: dict[str, Any],
    night: Night,
    calm: dict[str, torch.Tensor],
) -> None:
    night.submit(*options, **site)
    night.until_step(SAVE_EVERY + 2)
    fault(night)
    (night.folder / "over").touch()
    night.cluster.mend()
    night.until_done()
    found = weights(night.run)
    assert found.keys() == calm.keys()
    for name, value in calm.items():
        assert torch.equal(found[name], value), name
