"""The virtual Slurm cluster that other tests stand on: its hosts, its jobs, and what each fault does."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from virtual import CANNOT, HERE, Cluster

pytestmark = pytest.mark.slurm


def until(condition: Callable[[], bool], seconds: float = 40) -> None:
    """Wait for it; the test fails if it does not come."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come in time"
        time.sleep(0.1)


def test_hosts_have_names_addresses_and_memory_of_their_own(cluster: Cluster) -> None:
    assert cluster.nodes == ["node1", "node2", "node3", "node4"]
    for number, node in enumerate(cluster.nodes, start=1):
        assert cluster.run("hostname", host=node).stdout.strip() == node
        assert f"10.77.0.{10 + number}/24" in cluster.run("ip", "address", "show", "eth0", host=node).stdout
        cluster.run("touch", f"/dev/shm/{node}", cluster.shared / node, host=node)
    assert cluster.run("ls", "/dev/shm", host="node1").stdout.split() == ["node1"]
    assert sorted(file.name for file in cluster.shared.glob("node?")) == cluster.nodes


def test_a_job_runs_on_all_nodes_and_they_reach_each_other(cluster: Cluster) -> None:
    script = "#!/bin/bash\nsrun bash -c 'echo $SLURM_PROCID $(hostname) && exec 3<>/dev/tcp/node1/6818'"
    job = cluster.sbatch(script, "--nodes=4", "--ntasks-per-node=2", "--gpus-per-node=2")
    assert cluster.wait(job, "COMPLETED FAILED") == "COMPLETED"
    lines = sorted((cluster.shared / f"{job}.txt").read_text().splitlines())
    assert lines == [f"{rank} node{rank // 2 + 1}" for rank in range(8)]


def test_a_requeued_job_starts_again(cluster: Cluster) -> None:
    job = cluster.sbatch("#!/bin/bash\necho start $SLURM_RESTART_COUNT\nsrun sleep 600")
    log = cluster.shared / f"{job}.txt"
    until(lambda: log.exists() and "start" in log.read_text())
    cluster.run("scontrol", "requeue", job)
    until(lambda: "start 1\n" in log.read_text(), 90)  # Slurm lets it wait until its old credential is void
    assert cluster.job(job)["Restarts"] == "1"


def stepd(job: str) -> bool:
    """Whether a slurmstepd of the job lives on any node."""
    return any(line.startswith(f"slurmstepd: [{job}.") for line in command_lines())


def command_lines() -> list[str]:
    """Of every process of this machine."""
    lines = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            lines.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:
            continue  # it ended
    return lines


def test_each_fault_takes_its_node_down_and_its_job_is_requeued(cluster: Cluster) -> None:
    faults = {"node1": "crash", "node2": "kill-slurmd", "node3": "freeze", "node4": "cut"}
    # The job's rank writes on for as long as it lives, wherever it is.
    script = "#!/bin/bash\nsrun bash -c 'while sleep 0.1; do date >$0-$SLURM_RESTART_COUNT; done' " + str(
        cluster.shared / "beat-$SLURM_JOB_ID"
    )
    jobs = {node: cluster.sbatch(script, f"--nodelist={node}") for node in faults}
    beats = {node: cluster.shared / f"beat-{job}-" for node, job in jobs.items()}
    until(lambda: all(beat.exists() for beat in beats.values()))

    for node, fault in faults.items():
        cluster.fault(fault, node)
    until(lambda: all(cluster.node_state(node).startswith("DOWN+NOT_RESPONDING") for node in faults))
    for job in jobs.values():
        cluster.wait(job, "PENDING")

    def beating() -> set[str]:
        before = {node: beat.read_text() for node, beat in beats.items()}
        time.sleep(3)
        return {node for node, beat in beats.items() if beat.read_text() != before[node]}

    assert beating() == {"node2", "node3", "node4"}  # their ranks live on: only the machine of node1 is gone
    assert cluster.run("hostname", host="node1", check=False).returncode != 0
    reach = ["timeout", "1", "bash", "-c", "exec 3<>/dev/tcp/login/6817"]
    assert cluster.run(*reach, host="node3").returncode == 0
    assert cluster.run(*reach, host="node4", check=False).returncode != 0

    cluster.run("scontrol", "hold", *jobs.values())
    cluster.mend()
    until(lambda: not beating())  # a node that is back ends what ran there before
    until(lambda: not any(stepd(job) for job in jobs.values()))  # else Slurm drains it: "Duplicate jobid"
    cluster.wait_idle()
    cluster.run("scontrol", "release", *jobs.values())
    for job in jobs.values():
        cluster.wait(job, "RUNNING")
        assert cluster.job(job)["Restarts"] == "1"


def test_jobs_outlive_their_controller(cluster: Cluster) -> None:
    stop = cluster.shared / "stop"
    job = cluster.sbatch(f"#!/bin/bash\nuntil [ -e {stop} ]; do sleep 0.1; done; echo stopped")
    cluster.wait(job, "RUNNING")
    cluster.fault("kill-ctld")
    assert cluster.run("scontrol", "ping", check=False).returncode != 0
    stop.touch()
    until(lambda: (cluster.shared / f"{job}.txt").read_text() == "stopped\n")
    cluster.fault("start-ctld")
    assert cluster.wait(job, "COMPLETED FAILED") == "COMPLETED"
    assert cluster.job(job)["Restarts"] == "0"


def processes_of(folder: Path) -> list[str]:
    """Command lines that name the folder, of every process of this machine."""
    return [line for line in command_lines() if str(folder) in line]


def test_a_cluster_ends_with_the_process_it_watches_and_leaves_nothing(cluster: Cluster) -> None:
    folder = cluster.shared / "second"
    interfaces = os.listdir("/sys/class/net")
    with subprocess.Popen(["sleep", "600"]) as watched:
        command = [str(HERE / "up.sh"), "-d", str(folder), "-n", "1", "-w", str(watched.pid)]
        subprocess.run(command, check=True, capture_output=True, timeout=60)
        assert subprocess.run(command, capture_output=True, timeout=60).returncode == 2  # it is up already
        vc = [str(HERE / "vc"), "-d", str(folder), "exec", "login"]
        subprocess.run(
            [*vc, "sbatch", "--output=/dev/null", "--wrap=sleep 601"], check=True, capture_output=True
        )
        with subprocess.Popen([*vc, "sleep", "602"]) as guest:
            assert processes_of(folder)
            watched.kill()
            until(lambda: guest.poll() == -9)
    until(lambda: not processes_of(folder))
    assert not (folder / "run").exists()
    assert str(folder) not in Path("/proc/mounts").read_text()
    assert os.listdir("/sys/class/net") == interfaces


def test_without_slurm_one_line_says_what_to_install(tmp_path: Path) -> None:
    for program in ("bash", "dirname", "readlink"):
        (tmp_path / program).symlink_to(str(shutil.which(program)))
    result = subprocess.run(
        [HERE / "up.sh", "-d", tmp_path / "cluster"],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == CANNOT
    assert result.stderr.splitlines() == [
        f"up.sh: {result.stderr.split()[1]} is missing: "
        "apt-get install -y --no-install-recommends slurm-wlm munge"
    ]
