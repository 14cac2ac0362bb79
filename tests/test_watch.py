"""The supervisor: real processes that fail, stop and hang, on this machine and on a virtual Slurm cluster.

The ranks are small programs without torch; tests/test_nights.py disturbs whole trainings.
"""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from virtual import Cluster

from bertscale.errors import INTERRUPTED, UserError
from bertscale.run_folder import Events, read_events
from launcher import guard, slurm, watch
from launcher.history import first_failed
from launcher.job import JobSpec, render
from launcher.nodes.check import bad_nodes
from launcher.rank_groups import SlurmStep
from launcher.supervise import Limits, StopRequests
from launcher.supervise import watch as watch_ranks

ROOT = Path(__file__).parents[1]

RANK = """
import os, signal, sys, time
from pathlib import Path
from bertscale.errors import UserError
from bertscale.train.heartbeat import beat
from launcher.ranks import run_as_rank

rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
home = Path(__file__).parent
start = int(Path(os.environ["BERTSCALE_ATTEMPT"]).name.split("-")[1])
stop = []
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: stop.append(number))

def wait_for(name):
    while not (home / name).exists():
        time.sleep(0.02)
        if stop and rank == 0:
            save(reached() + 1)
        if stop:
            sys.exit(75)

def reached():
    return max((int(path.name[5:]) for path in (home / "run/checkpoints").glob("step-*")), default=0)

def save(step):
    folder = home / f"run/checkpoints/step-{step:07d}"
    folder.mkdir(parents=True)
    (folder / "bertscale.json").touch()

def ready():
    (home / f"writing-{start}-{rank}").write_text(str(os.getpid()))
    os.replace(home / f"writing-{start}-{rank}", home / f"ready-{start}-{rank}")

def main():
BODY
    return 0

sys.exit(run_as_rank(main))
"""


def write_rank(folder: Path, body: str) -> Path:
    path = folder / "rank.py"
    path.write_text(RANK.replace("BODY", textwrap.indent(textwrap.dedent(body), "    ")))
    return path


def wait_for(*paths: Path) -> None:
    while not all(path.exists() for path in paths):
        time.sleep(0.02)


def kinds(path: Path) -> list[str]:
    return [event["event"] for event in read_events(path)]


def facts(path: Path, kind: str) -> dict[str, Any]:
    """The last event of a kind."""
    return [event for event in read_events(path) if event["event"] == kind][-1]


# ------------------------------------------------------------------------------------- on this machine

PARENT = """
import sys
from pathlib import Path
from bertscale.errors import UserError
from launcher import rank_groups, supervise

rank_groups.GRACE_SECONDS = 0.5
supervise.STACK_SECONDS, supervise.LOOK_SECONDS = 1.5, 0.1
limits = supervise.Limits(LIMITS)
try:
    command = [sys.executable, "rank.py"]
    sys.exit(supervise.run_here(command, 2, Path("logs"), limits, Path("run")))
except UserError as error:
    print("error:", error, file=sys.stderr)
    sys.exit(2)
"""

Parent = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def parent(tmp_path: Path) -> Parent:
    """Starts a supervisor of two ranks in tmp_path, each of which runs the body it is given."""

    def start(body: str, **limits: float) -> subprocess.Popen[str]:
        arguments = ", ".join(f"{key}={value}" for key, value in limits.items())
        (tmp_path / "parent.py").write_text(PARENT.replace("LIMITS", arguments))
        write_rank(tmp_path, body)
        return subprocess.Popen(
            [sys.executable, "parent.py"],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, err = process.communicate(timeout=120)
    return process.returncode, err


def test_failures_are_started_again_until_the_run_is_done(parent: Parent, tmp_path: Path) -> None:
    code, err = finish(
        parent(
            """
            if start == 1 and rank == 1:
                os._exit(7)
            if start == 2 and rank == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            if start < 3:
                time.sleep(1000)
            """,
            restarts=5,
            restarts_without_progress=2,
        )
    )
    assert code == 0
    assert "rank 1 of 2 failed first: exit code 7" in err
    assert "rank 0 of 2 failed first: killed by SIGKILL" in err
    assert sorted(path.name for path in (tmp_path / "logs").glob("attempt-*")) == [
        "attempt-001",
        "attempt-002",
        "attempt-003",
    ]
    again = ["started", "failed", "relaunched"]
    assert kinds(tmp_path / "logs/events.jsonl") == [*again, *again, "started", "done"]


def test_a_crash_loop_ends_and_names_the_checkpoint(parent: Parent, tmp_path: Path) -> None:
    code, err = finish(
        parent(
            """
            if rank == 0:
                if reached() < 20:
                    save(reached() + 10)
                raise ZeroDivisionError("boom")
            time.sleep(1000)
            """,
            restarts=20,
            restarts_without_progress=2,
        )
    )
    assert code == 77
    # Two starts made a checkpoint each; the three after them made none.
    assert err.count("ZeroDivisionError: boom") == 5
    assert "all ranks are started again from the checkpoint of step 10" in err
    assert err.endswith("gave up: no checkpoint after that of step 20 in 3 starts in a row\n")
    steps = [event["step"] for event in read_events(tmp_path / "logs/events.jsonl") if "step" in event]
    assert steps == [10, 20]


def test_restarts_have_a_bound_in_all(parent: Parent) -> None:
    code, err = finish(
        parent(
            """
            if rank == 0:
                save(reached() + 1)
                os._exit(7)
            time.sleep(1000)
            """,
            restarts=2,
        )
    )
    assert code == 7
    assert err.endswith("gave up after 2 restarts, as many as launch.restarts allows\n")


def test_a_mistake_is_not_tried_again(parent: Parent, tmp_path: Path) -> None:
    limits = {"restarts": 5, "restarts_without_progress": 5}
    assert finish(parent('raise UserError("train.steps=0 is too few")', **limits)) == (
        2,
        "error: train.steps=0 is too few\n",
    )
    code, _ = finish(parent("os._exit(2)", **limits))
    assert code == 2
    assert len(list((tmp_path / "logs").glob("attempt-*"))) == 2


def test_a_stopped_rank_is_named_and_the_others_tell_where_they_stand(parent: Parent, tmp_path: Path) -> None:
    code, err = finish(
        parent(
            """
            if start == 2:
                return 0
            beat(12)
            if rank == 1:
                os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(1000)  # as if it waited for the other
            """,
            start_seconds=60,
            hang_seconds=1,
            restarts=1,
            restarts_without_progress=1,
        )
    )
    assert code == 0
    assert re.search(r"all ranks hung for \d+ s after step 12 and were killed", err)
    assert "rank 1 gave no answer: it was stopped, or its node is dead" in err
    assert "rank 0 gave" not in err
    stack = (tmp_path / "logs/attempt-001/rank-0.log").read_text()
    assert re.search(r'most recent call first\):\n  File ".*rank.py", line \d+ in main', stack)
    hang = facts(tmp_path / "logs/events.jsonl", "hang")
    assert (hang["step"], hang["silent"]) == (12, [1])


def test_ranks_that_never_begin_are_given_up(parent: Parent) -> None:
    code, err = finish(parent("time.sleep(1000)", start_seconds=1, hang_seconds=1))
    assert code == 76
    assert "before the first step and were killed" in err


def test_steps_are_signs_of_life(parent: Parent) -> None:
    code, _ = finish(
        parent(
            """
            for step in range(25):
                beat(step)
                time.sleep(0.2)
            """,
            start_seconds=60,
            hang_seconds=2.5,
        )
    )
    assert code == 0


class Sleepers:
    """Ranks that do nothing, and have ended after so many turns."""

    poll_seconds, ranks, silent = 0.1, 1, ()

    def __init__(self, attempt: Path, turns: int) -> None:
        self.attempt, self.turns, self.killed = attempt, turns, False

    def running(self) -> bool:
        self.turns -= 1
        return self.turns > 0 and not self.killed

    def ask_to_save(self) -> None:
        pass

    ask_for_stacks = ask_to_save

    def kill(self) -> None:
        self.killed = True

    def log(self, rank: int) -> Path:
        return self.attempt / f"rank-{rank}.log"


@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize(("suspended", "ends"), [(True, False), (False, True)])
def test_a_suspended_job_does_not_hang(
    asked: bool, suspended: bool, ends: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under gang scheduling, or `scontrol suspend`, the supervisor stands still as well."""
    clock = [1000.0]

    def sleep(seconds: float) -> None:
        clock[0] += 3 * 3600 if suspended and len(waits) == 10 else 1.0
        waits.append(seconds)

    waits: list[float] = []
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(time, "sleep", sleep)
    group, stop = Sleepers(tmp_path, 50 if suspended else 1000), StopRequests()
    stop.count, stop.name = int(asked), "SIGUSR1"
    limits = Limits(start_seconds=100, hang_seconds=100, save_seconds=60)
    found = watch_ranks(group, limits, Events(tmp_path / "events.jsonl"), None, stop, 0)  # type: ignore[arg-type]
    assert group.killed == ends
    assert (found is not None) == (ends and not asked)


def test_a_signal_saves_and_nothing_is_started_again(parent: Parent, tmp_path: Path) -> None:
    process = parent('ready()\nwait_for("never")', restarts=5, restarts_without_progress=5)
    wait_for(tmp_path / "ready-1-0", tmp_path / "ready-1-1")
    process.send_signal(signal.SIGUSR1)
    code, _ = finish(process)
    assert code == 75
    assert (tmp_path / "run/checkpoints/step-0000001").is_dir()
    assert kinds(tmp_path / "logs/events.jsonl") == ["started", "signal", "checkpoint", "stopped"]


# ----------------------------------------------------------------------------- a job, without a cluster


def make_job(folder: Path, body: str = "", **changes: Any) -> JobSpec:
    """A job folder as `bertscale submit` makes it, whose ranks run the body."""
    folder.mkdir(parents=True)
    (folder / "logs").mkdir()
    (folder / "code").symlink_to(ROOT)
    values: dict[str, Any] = {
        "stage": "pretrain",
        "name": folder.name,
        "folder": str(folder),
        "target": str(folder / "run"),
        "logs": str(folder / "logs"),
        "command": (str(write_rank(folder, body)),),
        "python": sys.executable,
        "batch_python": sys.executable,
        "version": "of this test",
        "nodes": 2,
        "node_check": False,
        "start_seconds": 60.0,
        "hang_seconds": 60.0,
        "signal_seconds": 60,
    }
    spec = JobSpec(**(values | changes))
    (folder / "job.json").write_text(spec.to_json())
    (folder / "script.sh").write_text(render(spec))
    return spec


def test_the_first_node_must_be_found_from_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"n1": "10.0.0.1", "n2": "127.0.1.1", "10.0.0.2": "10.0.0.2"}
    records = {"n2": "10.0.0.2", "n3": "n3"}

    def look_up(host: str, *_: object, **__: object) -> list[Any]:
        if host not in names:
            raise socket.gaierror
        return [(0, 0, 0, "", (names[host], 0))]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(slurm, "nodes", lambda node: ({"NodeAddr": records[node]},))
    assert watch._address(["n1", "n2"]) == "n1"
    assert watch._address(["n2", "n1"]) == "10.0.0.2"
    assert watch._address(["n3"]) == "127.0.0.1"
    with pytest.raises(UserError, match="n3 is no address of a network, nor is NodeAddr, n3;"):
        watch._address(["n3", "n1"])


def test_requeues_without_progress_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = make_job(tmp_path / "job")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-2]")
    done = subprocess.CompletedProcess([], 0, "n1\nn2\n", "")
    monkeypatch.setattr(slurm, "ask", lambda *_, **__: done)
    job = watch.Job(spec, ["srun"], StopRequests())
    assert job.nodes == ["n1", "n2"]
    for checkpoint in (0, 0, 10, 10, 10):
        job.events.write("requeued", job="7", reason="USR1", checkpoint=checkpoint)
        job.events.write("started", job="7")
    assert job.idle_requeues(10) == 3
    assert job.idle_requeues(20) == 0
    job.events.write("queued", job="7")
    assert job.idle_requeues(10) == 0


@pytest.mark.parametrize(("answer", "ends"), [(0, "requeued"), (-15, "requeued"), (1, "gave_up")])
def test_a_requeue_may_end_its_own_scontrol(
    answer: int, ends: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = make_job(tmp_path / "job")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-2]")

    def ask(*command: str, **_: object) -> subprocess.CompletedProcess[str]:
        code = answer if command[1] == "requeue" else 0
        return subprocess.CompletedProcess(command, code, "JobId=7 JobState=RUNNING\n", "")

    monkeypatch.setattr(slurm, "ask", ask)
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    job = watch.Job(spec, ["srun"], StopRequests())
    assert job.requeue(75, "SIGUSR1") == 75
    assert kinds(job.events.path)[-1] == ends
    assert waited == ([watch.END_SECONDS] if ends == "requeued" else [])  # for Slurm to end this process


@pytest.fixture
def fake_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., watch.Job]:
    """Job 7 on n1, n2 and so on, for which Slurm says what it is told to."""

    def make(
        body: str = "", names: tuple[str, ...] = ("n1", "n2"), record: str = "", **changes: Any
    ) -> watch.Job:
        spec = make_job(tmp_path / "job", body, **changes)
        monkeypatch.setenv("SLURM_JOB_ID", "7")
        monkeypatch.setenv("SLURM_JOB_NODELIST", ",".join(names))
        monkeypatch.setattr(watch, "nodes_alive", list)
        monkeypatch.setattr(watch.Job, "keep_guard", lambda *_: None)

        def ask(*command: str, **_: object) -> subprocess.CompletedProcess[str]:
            return subprocess.CompletedProcess(command, 0, f"JobId=7 JobState=RUNNING {record}\n", "")

        monkeypatch.setattr(slurm, "ask", ask)
        return watch.Job(spec, ["srun"], StopRequests())

    return make


def test_a_job_with_spares_has_a_guard_on_another_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_job(tmp_path / "job", spares=1)
    place = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1,n2,n3", "SLURMD_NODENAME": "n1"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    spec = JobSpec.from_json((tmp_path / "job/job.json").read_text())
    job = watch.Job(spec, ["srun"], StopRequests())
    began: list[list[str]] = []

    class Guard:
        code: int | None = None

        def __init__(self, words: list[str], **_: object) -> None:
            began.append([word for word in words if "=" not in word or "nodelist" in word])

        def poll(self) -> int | None:
            return self.code

        def terminate(self) -> None:
            self.code = -15

        def wait(self, seconds: float) -> None:
            pass

    monkeypatch.setattr(subprocess, "Popen", Guard)
    python, folder = sys.executable, str(tmp_path / "job")
    words = ["--overlap", "--no-kill", python, "-m", "launcher.guard", folder, "7", "n1"]
    job.keep_guard(["n1", "n2", "n3"])
    job.keep_guard(["n1", "n2", "n3"])  # it is there
    job.keep_guard(["n1", "n2"])  # its node is gone
    assert isinstance(job.guard, Guard)
    job.guard.terminate()
    job.keep_guard(["n1", "n2"])
    assert began == [["srun", f"--nodelist={node}", *words] for node in ("n3", "n2", "n2")]


@pytest.mark.parametrize(("cancelled", "refused"), [(True, 0), (False, 0), (False, 1)])
def test_what_the_guard_does(
    cancelled: bool, refused: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_job(tmp_path / "job", spares=1)
    if cancelled:
        (tmp_path / "job/cancelled").touch()
    looks = iter(["MIXED", "MIXED+NOT_RESPONDING", "", "DOWN+COMPLETING+NOT_RESPONDING"])
    asked: list[str] = []

    def ask(*command: str, **_: object) -> subprocess.CompletedProcess[str]:
        if command[:3] == ("scontrol", "show", "node"):
            return subprocess.CompletedProcess(command, 0, f"NodeName=n1 State={next(looks)}\n", "")
        asked.append(" ".join(command).replace(str(tmp_path), ""))
        code = refused if command[1] == "requeue" else 0
        return subprocess.CompletedProcess(command, code, "9\n", "")

    monkeypatch.setattr(time, "sleep", lambda _: None)
    monkeypatch.setattr(slurm, "ask", ask)
    assert guard.main([str(tmp_path / "job"), "7", "n1"]) == 0
    successor = "sbatch --parsable --dependency=afterany:7 --exclude=n1 /job/script.sh"
    requeue = ["scontrol requeue 7", *([successor, "scancel 7"] if refused else [])]
    assert asked == (["scancel 7"] if cancelled else requeue)
    events = tmp_path / "job/events.jsonl"
    expected = [] if cancelled else ["requeued", *(["queued"] if refused else [])]
    assert kinds(events) == expected
    assert next(looks, None) is None


BAD_IMAGE = "its check did not begin: FATAL: could not open image a.sif"
NO_GPU = "0 of 8 GPUs are visible"
NO_DISK = "0.1 GB are free in /tmp, 1 are needed"


@pytest.mark.parametrize(
    ("failed", "mistake"),
    [
        ({"n1": BAD_IMAGE, "n2": BAD_IMAGE}, "FATAL: could not open image a.sif: so the check ended on all"),
        ({"n1": NO_GPU, "n2": NO_GPU}, "0 of 8 GPUs are visible: so the check ended on all of n1, n2;"),
        ({"n1": BAD_IMAGE}, None),
        ({"n1": NO_GPU, "n2": "1 of 8 GPUs are visible"}, None),
        ({"n1": NO_DISK, "n2": NO_DISK}, None),
    ],
)
def test_what_fails_alike_on_all_nodes_is_a_mistake_of_the_job(
    failed: dict[str, str],
    mistake: str | None,
    fake_job: Callable[..., watch.Job],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job = fake_job(node_check=True)
    monkeypatch.setattr(watch, "check_nodes", lambda *_: failed)
    with pytest.raises(UserError if mistake else watch.TooFewNodesError) as raised:
        job.choose_nodes(Path())
    assert str(raised.value).startswith(mistake or f"{2 - len(failed)} of 2 nodes are sound")
    assert kinds(job.events.path) == ([] if mistake else ["node_left_out"] * len(failed))


def test_a_job_of_one_node_gives_another_one_a_try(
    fake_job: Callable[..., watch.Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = fake_job(names=("n2",), nodes=1, node_check=True)
    job.events.write("queued")
    monkeypatch.setattr(watch, "check_nodes", lambda *_: {"n2": NO_GPU})
    with pytest.raises(watch.TooFewNodesError):
        job.choose_nodes(Path())
    job.events.write("node_left_out", node="n1", reason=NO_GPU)
    with pytest.raises(UserError, match="on all of n1, n2"):
        job.choose_nodes(Path())


@pytest.mark.parametrize("code", [0, 1])
def test_ranks_that_never_begin_are_a_mistake(code: int, tmp_path: Path) -> None:
    said = "no such image\nsrun: error: n1: task 0: Exited with exit code 1" if code else ""
    srun = tmp_path / "srun"
    srun.write_text(f"#!/bin/sh\necho '{said}' >&2\nexit {code}\n")
    srun.chmod(0o755)
    step = SlurmStep([str(srun)], ["n1"], 1, "7", tmp_path, {})
    step.process.wait()
    [ended] = step.exits()
    what = "no such image" if code else "the command of the ranks ended with exit code 0"
    assert (ended.mistake or "").startswith(f"{what}: so no rank has begun")


@pytest.mark.parametrize("forbidden", ["Requeue=0", "Requeue=1"])
def test_where_no_job_may_be_requeued_another_one_resumes(
    forbidden: str, fake_job: Callable[..., watch.Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    after = make_job(tmp_path / "after")
    Events(Path(after.folder, "events.jsonl")).write("queued", job="8", after=["7"])
    job = fake_job(following=(after.folder, str(tmp_path / "last")))
    asked: list[tuple[str, ...]] = []

    def ask(*command: str, **_: object) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        if command[:2] == ("scontrol", "requeue"):
            return subprocess.CompletedProcess(command, 1, "", "Requested operation is presently disabled")
        record = f"JobId=7 JobState=RUNNING {forbidden} ExcNodeList=n9 Dependency=afterany:7(unfulfilled)"
        return subprocess.CompletedProcess(command, 0, "9\n" if command[0] == "sbatch" else record, "")

    monkeypatch.setattr(slurm, "ask", ask)
    job.events.write("queued", job="7")
    for earlier in range(2):  # these are its own starts, although each was another job
        job.events.write("requeued", job=str(5 + earlier), checkpoint=0)
        job.events.write("queued", job=str(6 + earlier), succeeds=str(5 + earlier))
    assert job.requeue(75, "SIGUSR1") == 75
    script = str(tmp_path / "job/script.sh")
    words = ("sbatch", "--parsable", "--dependency=afterany:7", "--exclude=n9", script)
    assert words in asked
    assert ("scontrol", "update", "JobId=8", "Dependency=afterany:7,afterany:9") in asked
    assert (("scontrol", "requeue", "7") in asked) == (forbidden == "Requeue=1")
    queued = facts(job.events.path, "queued")
    assert (queued["job"], queued["succeeds"]) == ("9", "7")
    assert job.idle_requeues(0) == 3
    assert "gave_up" not in kinds(job.events.path)


@pytest.mark.parametrize(
    ("stage", "minutes_left", "units", "ends"),
    [
        ("convert", 1, 0, "gave_up"),
        ("convert", 20, 0, "requeued"),  # pre-empted
        ("prep", 1, 0, "gave_up"),  # the tokenizer, or units that are too large
        ("prep", 1, 2, "requeued"),  # it resumes
    ],
)
def test_what_cannot_resume_is_not_requeued_for_time(
    stage: str,
    minutes_left: int,
    units: int,
    ends: str,
    fake_job: Callable[..., watch.Job],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    began = datetime.fromtimestamp(time.time() - (30 - minutes_left) * 60).isoformat(timespec="seconds")
    record = f"TimeLimit=00:30:00 StartTime={began} EndTime=Unknown"
    job = fake_job(record=record, stage=stage, target=str(tmp_path / "out"))

    def ranks(*_: object) -> int:
        job.stop.count, job.stop.name = 1, "SIGUSR1"
        (tmp_path / "out/.prep").mkdir(parents=True)
        for number in range(units):
            (tmp_path / f"out/.prep/unit-{number:05d}.json").touch()
        return INTERRUPTED

    monkeypatch.setattr(watch, "supervise", ranks)
    monkeypatch.setattr(watch, "END_SECONDS", 0)
    assert job.run() == (INTERRUPTED if ends == "requeued" else 2)
    assert kinds(job.events.path) == [ends]
    if ends == "requeued":
        assert facts(job.events.path, "requeued")["saved"] is False
    else:
        said = capsys.readouterr().err
        assert "its time limit, 00:30:00, came before" in said
        assert "submit it again with --time 1:00:00 or more" in said


def test_a_prep_that_goes_on_may_be_requeued_for_ever(
    fake_job: Callable[..., watch.Job], tmp_path: Path
) -> None:
    job = fake_job(stage="prep", target=str(tmp_path / "out"))
    (tmp_path / "out/.prep").mkdir(parents=True)
    for number in range(30):
        job.events.write("requeued", checkpoint=job.progress())
        (tmp_path / f"out/.prep/unit-{number:05d}.json").touch()
        assert job.idle_requeues(job.progress()) == 0


ABORTED = {"code": -6, "time": 20.0, "reason": "killed by SIGABRT"}
EXITED = {"code": 7, "time": 20.0, "reason": "exit code 7"}
RAISED = {"code": 1, "time": 10.0, "reason": "exit code 1", "raised": True}  # on a node whose clock is slow
MISTAKEN = {"code": 2, "time": 20.0, "reason": "exit code 2", "raised": True, "mistake": "no disk"}
ENDED = {"code": -9, "time": 5.0, "reason": "killed by SIGKILL", "asked": True}


@pytest.mark.parametrize("cause", [ABORTED, EXITED, MISTAKEN])
def test_the_first_to_fail_is_not_guessed_from_clocks(cause: dict[str, Any], tmp_path: Path) -> None:
    srun = tmp_path / "srun"
    srun.write_text("#!/bin/sh\nexit 1\n")
    srun.chmod(0o755)
    step = SlurmStep([str(srun)], ["n1"], 3, "7", tmp_path, {})
    step.process.wait()
    for rank, facts in enumerate((RAISED, ENDED, cause)):
        report = {"rank": rank, "node": f"n{rank}", **facts}
        (tmp_path / f"rank-{rank:04d}.json").write_text(json.dumps(report))
    assert min(step.exits(), key=lambda ended: ended.order).rank == 2
    first = first_failed(tmp_path)
    assert first is not None
    assert first["rank"] == 2


def test_a_rank_that_dies_with_its_launcher_goes_before_exceptions(tmp_path: Path) -> None:
    srun = tmp_path / "srun"
    lines = "error: n1: task 1: Out Of Memory\nsrun: error: n0: task 0: Exited with exit code 1"
    srun.write_text(f"#!/bin/sh\necho 'srun: {lines}' >&2\nexit 1\n")
    srun.chmod(0o755)
    step = SlurmStep([str(srun)], ["n0", "n1"], 2, "7", tmp_path, {})
    step.process.wait()
    (tmp_path / "rank-0000.json").write_text(json.dumps({"rank": 0, "node": "n0", **RAISED}))
    first = min(step.exits(), key=lambda ended: ended.order)
    assert (first.rank, first.node) == (1, "n1")
    assert first.reason == "its launcher.rank ended as well: Out Of Memory"


def test_a_node_that_fails_first_twice_makes_room_for_a_spare(
    fake_job: Callable[..., watch.Job], tmp_path: Path
) -> None:
    bad = tmp_path / "bad.jsonl"
    job = fake_job(names=("n1", "n2", "n3"), spares=1, bad_nodes=str(bad))
    job.events.write("failed", node="n1")  # of what a person has mended since
    job.events.write("queued")
    job.events.write("failed", node="n1")
    assert job.choose_nodes(tmp_path) == ["n1", "n2"]
    job.events.write("failed", node="n1")
    assert job.choose_nodes(tmp_path) == ["n2", "n3"]
    left_out = facts(job.events.path, "node_left_out")
    assert (left_out["node"], left_out["reason"]) == ("n1", "its ranks failed first in 2 starts")
    assert not bad.exists()
    job.finish()  # without it the job came to its end
    assert list(bad_nodes(bad, 1)) == ["n1"]


# ------------------------------------------------------------------------------------ on a real Slurm


class Run:
    """One job of stub ranks on the virtual cluster."""

    def __init__(self, cluster: Cluster, name: str, body: str, **changes: Any) -> None:
        self.cluster, self.folder = cluster, cluster.shared / f"watch-{name}"
        self.spec = make_job(self.folder, body, **changes)
        self.events = self.folder / "events.jsonl"

    def submit(self, *options: str) -> str:
        words = ("sbatch", "--parsable", *options, str(self.folder / "script.sh"))
        self.job = self.cluster.run(*words).stdout.strip()
        Events(self.events).write("queued", job=self.job)
        return self.job

    def wait(self, states: str) -> str:
        return self.cluster.wait(self.job, states, 120)

    def until(self, condition: Callable[[], Any]) -> None:
        deadline = time.monotonic() + 120
        while not condition():
            assert time.monotonic() < deadline, self.story()
            time.sleep(0.1)

    def ready(self, start: int) -> None:
        self.until(lambda: len(list(self.folder.glob(f"ready-{start}-*"))) == self.spec.ranks)

    def start_again(self) -> None:
        """Until a requeued job has begun again, not before its old credential is void."""
        self.until(lambda: self.cluster.job(self.job)["JobState"] == "PENDING")
        self.until(lambda: self.cluster.job(self.job)["JobState"] != "PENDING")

    def happened(self) -> list[str]:
        return kinds(self.events)

    def said(self) -> str:
        return "".join(path.read_text() for path in sorted((self.folder / "logs").glob("slurm-*.out")))

    def log(self, attempt: int, rank: int) -> str:
        return (self.folder / f"logs/attempt-{attempt:03d}-{self.job}/rank-{rank:04d}.log").read_text()

    def story(self) -> str:
        return f"{self.said()}\n{self.events.read_text()}"

    def process_on(self, node: str, pid: int, number: str) -> None:
        self.cluster.run("kill", f"-{number}", str(pid), host=node)


@pytest.mark.slurm
def test_places_ranks_names_the_first_failure_and_starts_again(cluster: Cluster) -> None:
    run = Run(
        cluster,
        "exit-7",
        """
        print(rank, world, os.environ["LOCAL_RANK"], os.uname().nodename, os.environ["MASTER_ADDR"])
        if start == 1 and rank == 2:
            os._exit(7)
        if start == 1:
            time.sleep(1000)
        """,
        tasks_per_node=2,
    )
    run.submit()
    run.wait("COMPLETED")
    assert run.happened() == ["queued", "started", "failed", "relaunched", "started", "done"]
    failed = facts(run.events, "failed")
    nodes = facts(run.events, "started")["nodes"]
    assert (failed["rank"], failed["node"], failed["code"]) == (2, nodes[1], 7)
    assert f"rank 2 of 4 on {nodes[1]} failed first: exit code 7" in run.said()
    assert [run.log(2, rank).strip() for rank in range(4)] == [
        f"{rank} 4 {rank % 2} {nodes[rank // 2]} {nodes[0]}" for rank in range(4)
    ]
    reports = run.folder / f"logs/attempt-002-{run.job}"
    assert [json.loads((reports / f"rank-{rank:04d}.json").read_text())["code"] for rank in range(4)] == [
        0
    ] * 4
    assert (run.folder / "done.json").exists()
    run.submit()  # by hand, although it is done
    run.wait("COMPLETED")
    assert "already done" in run.said()


@pytest.mark.slurm
def test_a_stopped_rank_of_a_job_is_named_and_all_are_started_again(cluster: Cluster) -> None:
    run = Run(
        cluster,
        "stopped",
        """
        if start == 2:
            return 0
        beat(3)
        if rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(1000)
        """,
        hang_seconds=2.0,
    )
    run.submit()
    run.wait("COMPLETED")
    assert run.happened() == ["queued", "started", "hang", "relaunched", "started", "done"]
    hang = facts(run.events, "hang")
    assert (hang["step"], hang["silent"]) == (3, [1])
    assert f"rank 1 on {facts(run.events, 'started')['nodes'][1]} gave no answer" in run.said()
    assert re.search(r'most recent call first\):\n  File ".*rank.py", line \d+ in main', run.log(1, 0))


@pytest.mark.slurm
def test_a_crash_loop_ends_the_job_and_those_after_it(cluster: Cluster) -> None:
    later = Run(cluster, "later", "", previous=(str(cluster.shared / "watch-loop"),))
    run = Run(cluster, "loop", 'raise ZeroDivisionError("boom")', following=(str(later.folder),))
    run.submit("--hold")
    later.submit(f"--dependency=afterany:{run.job}")
    cluster.run("scontrol", "release", run.job)
    assert run.wait("FAILED COMPLETED") == "FAILED"
    assert cluster.job(run.job)["ExitCode"] == "77:0"
    assert "gave up: no checkpoint in 3 starts in a row" in run.said()
    assert run.happened() == [
        "queued",
        *["started", "failed", "relaunched"] * 2,
        "started",
        "failed",
        "gave_up",
    ]
    later.wait("CANCELLED")
    assert later.happened() == ["queued", "cancelled"]
    # Submitted by hand all the same, it sees that the one before it is not done.
    later.submit()
    later.wait("FAILED")
    assert f"{run.folder}, is not done: done.json is missing" in later.said()


@pytest.mark.slurm
def test_a_signal_saves_requeues_and_resumes(cluster: Cluster) -> None:
    run = Run(cluster, "signal", 'if start == 1:\n    ready()\n    wait_for("never")')
    run.submit()
    run.ready(1)
    cluster.run("scancel", "--batch", "--signal=USR1", run.job)
    run.start_again()
    run.wait("COMPLETED")
    assert run.happened() == [
        *("queued", "started", "signal", "checkpoint", "requeued"),
        *("started", "resumed", "done"),
    ]
    assert facts(run.events, "requeued")["checkpoint"] == facts(run.events, "resumed")["step"] == 1
    assert facts(run.events, "started")["restart_count"] == 1
    assert "requeued (SIGUSR1)" in run.said()


@pytest.mark.slurm
def test_where_no_job_may_be_requeued_the_pipeline_goes_on(cluster: Cluster) -> None:
    body = 'if start == 1:\n    ready()\n    wait_for("never")'
    later = Run(cluster, "behind", "", previous=(str(cluster.shared / "watch-forbidden"),))
    run = Run(cluster, "forbidden", body, following=(str(later.folder),))
    first = run.submit("--no-requeue")
    later.submit(f"--dependency=afterany:{first}")
    run.ready(1)
    cluster.run("scancel", "--batch", "--signal=USR1", first)
    later.wait("COMPLETED")
    assert run.happened() == [
        *("queued", "started", "signal", "checkpoint", "requeued", "queued"),
        *("started", "resumed", "done"),
    ]
    assert facts(run.events, "started")["job"] == facts(run.events, "queued")["job"] != first


@pytest.mark.slurm
def test_ranks_that_save_unasked_have_been_preempted(cluster: Cluster) -> None:
    run = Run(cluster, "preempted", 'if start == 1:\n    ready()\n    wait_for("never")')
    run.submit("--partition=spot", "--exclusive", f"--nodes={len(cluster.nodes)}")
    run.ready(1)
    other = cluster.sbatch(
        "#!/bin/bash\nsleep 1", "--partition=high", "--exclusive", f"--nodes={len(cluster.nodes)}"
    )
    cluster.wait(other, "COMPLETED", 120)
    run.start_again()
    run.wait("COMPLETED")
    assert run.happened() == ["queued", "started", "checkpoint", "requeued", "started", "resumed", "done"]


@pytest.mark.slurm
def test_a_requeue_by_hand_resumes(cluster: Cluster) -> None:
    run = Run(
        cluster,
        "by-hand",
        "if start == 1:\n    save(5) if rank == 0 else 0\n    ready()\n    time.sleep(1000)",
    )
    run.submit()
    run.ready(1)
    cluster.run("scontrol", "requeue", run.job)
    run.start_again()
    run.wait("COMPLETED")
    happened = [kind for kind in run.happened() if kind not in ("signal", "checkpoint", "failed")]
    assert happened == ["queued", "started", "started", "resumed", "done"]


@pytest.mark.slurm
def test_a_cancelled_job_is_not_requeued(cluster: Cluster) -> None:
    run = Run(cluster, "cancelled", 'ready()\nwait_for("never")')
    run.submit()
    run.ready(1)
    (run.folder / "cancelled").touch()
    cluster.run("scancel", run.job)
    run.wait("CANCELLED")
    assert "requeued" not in run.happened()
    assert "relaunched" not in run.happened()


@pytest.mark.slurm
def test_a_crashed_node_is_replaced_by_a_spare(cluster: Cluster) -> None:
    run = Run(
        cluster,
        "spare",
        """
        if start == 1:
            ready()
            time.sleep(1000)
        print(os.uname().nodename)
        """,
        spares=1,
    )
    run.submit()
    run.ready(1)
    first = facts(run.events, "started")["nodes"]
    cluster.fault("crash", first[1])
    run.wait("COMPLETED")
    assert run.happened() == ["queued", "started", "failed", "relaunched", "node_left_out", "started", "done"]
    assert facts(run.events, "failed")["node"] == facts(run.events, "node_left_out")["node"] == first[1]
    second = facts(run.events, "started")["nodes"]
    assert second[0] == first[0]
    assert second[1] not in first
    assert run.log(2, 1).strip() == second[1]


@pytest.mark.slurm
def test_the_death_of_the_first_node_is_noticed_on_another_one(cluster: Cluster) -> None:
    run = Run(cluster, "first-node", 'if start == 1:\n    ready()\n    wait_for("never")', spares=1)
    run.submit()
    run.ready(1)
    first = facts(run.events, "started")["nodes"][0]
    run.until(lambda: "guards job" in (run.folder / "logs/guard.log").read_text())
    cluster.fault("crash", first)
    run.until(lambda: "requeued" in run.happened())
    assert facts(run.events, "requeued")["reason"] == f"{first} is down, on which its supervisor was"
    run.until(lambda: cluster.job(run.job)["Restarts"] == "1")


@pytest.mark.slurm
def test_nodes_that_fail_their_check_are_avoided_after_a_requeue(cluster: Cluster) -> None:
    listed = cluster.shared / "bad.jsonl"
    run = Run(
        cluster, "unfit", "", node_check=True, check_seconds=30.0, min_free_disk_gb=1e9, bad_nodes=str(listed)
    )
    run.submit()
    run.until(lambda: cluster.job(run.job).get("ExcNodeList", "(null)") != "(null)")
    assert run.happened() == ["queued", "node_left_out", "node_left_out", "requeued"]
    assert "0 of 2 nodes are sound, and 2 are needed" in run.said()
    assert cluster.job(run.job)["ExcNodeList"] == "node1,node2"
    assert not listed.exists()  # all of them: the fault may well be the job's


@pytest.mark.slurm
@pytest.mark.slow
def test_a_controller_that_restarts_disturbs_nothing(cluster: Cluster) -> None:
    run = Run(
        cluster,
        "controller",
        """
        if start == 1:
            ready()
            wait_for("fail")
            os._exit(7)
        """,
    )
    run.submit()
    run.ready(1)
    cluster.fault("kill-ctld")
    (run.folder / "fail").touch()
    run.until(lambda: "failed" in run.happened())
    run.until(lambda: "waiting: " in run.said())
    cluster.fault("start-ctld")
    run.wait("COMPLETED")
    assert run.happened() == ["queued", "started", "failed", "relaunched", "started", "done"]


@pytest.mark.slurm
def test_the_tasks_of_an_array_are_jobs_of_their_own(cluster: Cluster) -> None:
    run = Run(
        cluster,
        "array",
        """
        if start == 1 and os.environ["SLURM_ARRAY_TASK_ID"] == "1":
            os._exit(7)
        """,
        stage="prep",
        nodes=1,
        array=2,
    )
    run.submit()
    run.until(lambda: all((run.folder / f"done-{index}.json").exists() for index in range(2)))
    attempts = sorted(path.name for path in (run.folder / "logs").glob("attempt-*"))
    assert attempts == [f"attempt-001-{run.job}_0", f"attempt-001-{run.job}_1", f"attempt-002-{run.job}_1"]
