"""What the launcher itself costs, on a virtual Slurm cluster of 16 nodes.

    python benchmarks/launch.py          # needs: apt-get install --no-install-recommends slurm-wlm munge
    python benchmarks/launch.py --nodes 4 --json FILE

Seconds from the first line of submitting to the first line of a rank, with a stub in place of the training
(nothing here imports torch): with one rank, and with four on each node. Medians of three. The limit is two
seconds; beside the time until the last of 64 ranks has started stands that of a bare srun, since 64
interpreters on one machine take their own time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
CLUSTER = ROOT / "slurm" / "cluster"
LIMIT = 2.0  # seconds
STUB = """import json, os, sys, time
names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURMD_NODENAME")
line = json.dumps({"time": time.time(), **{name: os.environ.get(name) for name in names}})
with open(sys.argv[1], "a") as file:
    file.write(line + "\\n")
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--nodes", type=int, default=16, help="Nodes of the virtual cluster.")
    parser.add_argument("--rounds", type=int, default=3, help="Measurements of each case.")
    parser.add_argument("--json", type=Path, help="File for the results.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="launch-", dir="/tmp") as folder:
        subprocess.run(
            [CLUSTER / "up.sh", "-d", folder, "-n", str(options.nodes), "-w", str(os.getpid())], check=True
        )
        try:
            results = measure(Path(folder), options.nodes, options.rounds)
        finally:
            subprocess.run([CLUSTER / "down.sh", "-d", folder], check=True)
    machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    print(f"\n{'case':<52}{'ours, s':>9}{'limit or peer, s':>18}{'ratio':>8}{'goal':>6}")
    for row in results:
        print(
            f"{row['case']:<52}{row['ours']:>9.2f}{row['peer']:>18.2f}{row['ratio']:>8.2f}{row['goal']:>6.1f}"
        )
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")
    return 0


def measure(folder: Path, nodes: int, rounds: int) -> list[dict[str, Any]]:
    """All cases; seconds, medians of the rounds."""
    stub = folder / "stub.py"
    stub.write_text(STUB)
    one = [launch(folder, stub, f"one-{turn}", 1, 1) for turn in range(rounds)]
    all_ = [launch(folder, stub, f"all-{turn}", nodes, 4) for turn in range(rounds)]
    bare = [bare_srun(folder, stub, f"bare-{turn}", nodes, 4) for turn in range(rounds)]

    def median(runs: list[dict[str, float]], key: str) -> float:
        return statistics.median(run[key] for run in runs)

    ranks = nodes * 4
    cases = [
        ("submit to the first line of 1 rank", median(one, "first"), LIMIT),
        ("  of which: freeze and sbatch", median(one, "queued"), LIMIT),
        (f"submit to the first line of {ranks} ranks", median(all_, "first"), LIMIT),
        (
            f"  to the last line of {ranks} ranks, beside srun alone",
            median(all_, "last"),
            median(bare, "last"),
        ),
    ]
    return [
        {"case": case, "ours": ours, "peer": peer, "unit": "s", "ratio": peer / ours, "goal": 1.0}
        for case, ours, peer in cases
    ]


def launch(folder: Path, stub: Path, name: str, nodes: int, tasks: int) -> dict[str, float]:
    """Seconds from the beginning of submitting to the stub's lines; checks the map of ranks."""
    out = folder / f"{name}.txt"
    began = time.time()
    vc(folder, sys.executable, __file__, "--submit", str(stub), str(out), str(nodes), str(tasks))
    queued = time.time()
    lines = wait_for(out, nodes * tasks)
    check(lines, nodes, tasks, "RANK")
    times = [line["time"] for line in lines]
    return {"queued": queued - began, "first": min(times) - began, "last": max(times) - began}


def submit(stub: Path, out: Path, nodes: int, tasks: int) -> None:
    """Runs on the login host: freezes and queues a job whose ranks run the stub."""
    from launcher.enqueue import queue
    from launcher.job import JobSpec
    from launcher.submit.freeze import about_now, freeze, version

    folder = out.with_suffix(".job")
    spec = JobSpec(
        stage="convert",
        name=out.stem,
        folder=str(folder),
        target=str(out),
        logs=str(folder / "logs"),
        command=(str(stub), str(out)),
        python=sys.executable,
        batch_python=sys.executable,
        version=version(),
        nodes=nodes,
        tasks_per_node=tasks,
        start_seconds=0.0,
        node_check=False,
    )
    freeze(spec, None, about_now({}))
    queue(spec)


def bare_srun(folder: Path, stub: Path, name: str, nodes: int, tasks: int) -> dict[str, float]:
    """The same stub by sbatch and srun alone."""
    out = folder / f"{name}.txt"
    words = ["srun", f"--nodes={nodes}", f"--ntasks={nodes * tasks}", sys.executable, str(stub), str(out)]
    script = folder / f"{name}.sh"
    script.write_text(f"#!/bin/bash\n{' '.join(words)}\n")
    began = time.time()
    vc(folder, "sbatch", "-o", "/dev/null", f"--nodes={nodes}", f"--ntasks-per-node={tasks}", str(script))
    lines = wait_for(out, nodes * tasks)
    check(lines, nodes, tasks, "SLURM_PROCID")
    return {"last": max(line["time"] for line in lines) - began}


def check(lines: list[dict[str, Any]], nodes: int, tasks: int, rank: str) -> None:
    """Every rank is there once, neighbours share a node, and each node has its tasks."""
    by_rank = {int(line[rank]): line["SLURMD_NODENAME"] for line in lines}
    assert sorted(by_rank) == list(range(nodes * tasks)), by_rank
    groups = [{by_rank[node * tasks + task] for task in range(tasks)} for node in range(nodes)]
    assert all(len(group) == 1 for group in groups), by_rank
    assert len(set.union(*groups)) == nodes, by_rank


def wait_for(out: Path, lines: int) -> list[dict[str, Any]]:
    deadline = time.monotonic() + 120
    while True:
        lines_written = out.read_text().splitlines() if out.exists() else []
        if len(lines_written) == lines:
            return [json.loads(line) for line in lines_written]
        if time.monotonic() > deadline:
            logs = "\n".join(log.read_text() for log in out.with_suffix(".job").rglob("*.out"))
            raise SystemExit(f"{len(lines_written)} of {lines} ranks have written\n{logs}")
        time.sleep(0.01)


def vc(folder: Path, *command: str) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run(
        [CLUSTER / "vc", "-d", folder, "exec", "login", *command],
        check=True,
        stdout=subprocess.DEVNULL,
        env=environment,
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--submit"]:
        submit(Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]))
    else:
        sys.exit(main())
