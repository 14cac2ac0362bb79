"""A real Slurm of several hosts on this machine (slurm/cluster), for tests: `cluster.run("sbatch", ...)`.

Programs run on the login host, jobs on node1 to node4, and all of them share this machine's files. A test
breaks the cluster by `cluster.fault("crash", "node2")`; afterwards it is mended and its jobs are cancelled.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

HERE = Path(__file__).parent.parent / "slurm" / "cluster"
CANNOT = 3  # exit code of up.sh where Slurm is missing or namespaces are not allowed
UNDO = {"crash": "start", "kill-slurmd": "start", "freeze": "thaw", "cut": "mend", "kill-ctld": "start-ctld"}
SKIPPED = "no virtual Slurm cluster: "


class Cluster:
    """Its hosts are `login` and `nodes`; `shared` is an empty folder for what a test writes."""

    def __init__(self, folder: Path, nodes: int) -> None:
        self.folder = folder
        self.shared = folder / "shared"
        self.nodes = [f"node{number}" for number in range(1, nodes + 1)]
        self.open_faults: set[tuple[str, str]] = set()  # what fault() is to be called with to undo them

    def command(self, *command: str | Path, host: str = "login") -> list[str]:
        """The command line that runs `command` on a host, for subprocess.Popen."""
        return [str(word) for word in (HERE / "vc", "-d", self.folder, "exec", host, *command)]

    def run(
        self, *command: str | Path, check: bool = True, host: str = "login", cwd: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a program on a host; with `check` an exit code other than 0 fails the test, with its output."""
        result = subprocess.run(
            self.command(*command, host=host), capture_output=True, text=True, timeout=300, cwd=cwd
        )
        if check and result.returncode != 0:
            pytest.fail(f"{command} exited with {result.returncode}\n{result.stdout}{result.stderr}")
        return result

    def sbatch(self, script: str, *options: str) -> str:
        """Submit the text of a script; the id of the job. Its output is appended to shared/ID.txt."""
        file = self.shared / f"script-{time.monotonic_ns()}.sh"
        file.write_text(script)
        log = f"--output={self.shared}/%j.txt"
        return self.run("sbatch", "--parsable", "--open-mode=append", log, *options, file).stdout.strip()

    def job(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says of a job: JobState, Reason, Restarts, NodeList, ExitCode..."""
        text = self.run("scontrol", "show", "job", "--oneliner", job).stdout
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def wait(self, job: str, states: str, seconds: float = 60) -> str:
        """Wait for one of the states ("COMPLETED FAILED"), which is returned; or the test fails."""
        end = time.monotonic() + seconds
        while (facts := self.job(job))["JobState"] not in states.split():
            if time.monotonic() > end:
                log = Path(facts.get("StdOut", ""))
                text = log.read_text() if log.is_file() else ""
                pytest.fail(
                    f"job {job} is {facts['JobState']} ({facts['Reason']}) after {seconds} s, not {states}\n"
                    f"{self.run('sinfo', '--Node', '--long').stdout}{text}"
                )
            time.sleep(0.1)
        return facts["JobState"]

    def node_state(self, node: str) -> str:
        """The node's state with all its flags, such as IDLE or DOWN+NOT_RESPONDING.

        Not from `sinfo`, which shows but one of them: COMPLETING for a node that is down as well.
        """
        words = self.run("scontrol", "show", "node", node, "--oneliner").stdout.split()
        return next(word for word in words if word.startswith("State=")).removeprefix("State=")

    def fault(self, kind: str, node: str = "") -> None:
        """crash, kill-slurmd, freeze, cut a node, or kill-ctld; start, thaw, mend, start-ctld undo them."""
        vc = [str(HERE / "vc"), "-d", str(self.folder), kind, node]
        result = subprocess.run(vc, capture_output=True, text=True, timeout=60)
        assert result.returncode == 0, result.stderr
        if kind in UNDO:
            self.open_faults.add((UNDO[kind], node))
        self.open_faults.discard((kind, node))

    def jobs(self) -> set[str]:
        """Ids of all jobs that wait or run."""
        return set(self.run("squeue", "--noheader", "--format=%A").stdout.split())

    def mend(self) -> None:
        """Undo every fault that is still there, slurmctld's first.

        A requeued job must not start on a node that still ends its last attempt: mend soon after the fault
        was noticed, or `scontrol hold` the job until then.
        """
        for undo, node in sorted(self.open_faults, key=lambda fault: fault[0] != "start-ctld"):
            self.fault(undo, node)

    def wait_idle(self, seconds: int = 60) -> None:
        """Until no node has a job and all of them answer."""
        vc = [str(HERE / "vc"), "-d", str(self.folder), "wait-idle", str(seconds)]
        result = subprocess.run(vc, capture_output=True, text=True, timeout=seconds + 30)
        assert result.returncode == 0, result.stderr


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line for all tests that were skipped for want of a cluster."""
    for report in terminalreporter.getreports("skipped"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
        if SKIPPED in reason:
            terminalreporter.write_line(f"skipped, {reason[reason.index(SKIPPED) :]}")
            return


@contextmanager
def up(nodes: int) -> Iterator[Cluster]:
    """A cluster of so many nodes, which goes down at the end, and at the latest when this process is gone."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # sockets allow short paths only
    words = [HERE / "up.sh", "-d", folder, "-n", nodes, "-w", os.getpid()]
    try:
        result = subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=120)
        if result.returncode == CANNOT:
            pytest.skip(SKIPPED + result.stderr.strip().removeprefix("up.sh: "))
        assert result.returncode == 0, result.stderr
        yield Cluster(folder, nodes)
    finally:
        subprocess.run([HERE / "down.sh", "-d", folder], check=True, timeout=60)
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A cluster of four nodes for the whole session; skips where there can be none."""
    with up(nodes=4) as four:
        yield four


@pytest.fixture(autouse=True)
def _cluster_as_it_was(request: pytest.FixtureRequest) -> Iterator[None]:
    """What a test has broken is mended, the jobs that it left are cancelled: the next finds idle nodes."""
    if "cluster" not in request.fixturenames:
        yield
        return
    ours: Cluster = request.getfixturevalue("cluster")
    before = ours.jobs()
    yield
    if ("start-ctld", "") in ours.open_faults:
        ours.fault("start-ctld")
    if left := ours.jobs() - before:
        ours.run("scancel", *left)
    ours.mend()
    end = time.monotonic() + 60
    while ours.jobs() - before:
        assert time.monotonic() < end, "cancelled jobs do not end"
        time.sleep(0.1)
    # A node that was to start a job which it still ran is drained, for a person to look at.
    drained = ours.run("sinfo", "--noheader", "--states=drain", "--format=%N").stdout.strip()
    if drained:
        ours.run("scontrol", "update", f"nodename={drained}", "state=resume")
    if not before:
        ours.wait_idle()
