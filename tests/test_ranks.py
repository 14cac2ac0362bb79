"""Real processes that fail, are killed or are stopped, and the environments of torchrun and srun."""

from __future__ import annotations

import os
import random
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bertscale.config import UserError
from bertscale.run_folder import read_events
from launcher import history
from launcher.ranks import Rank, first_host, free_port, from_environment
from launcher.supervise import farewell

PARENT = """
import sys
from pathlib import Path
from bertscale.config import UserError
from launcher import rank_groups
from launcher.supervise import run_here

rank_groups.GRACE_SECONDS = 0.5
try:
    sys.exit(run_here([sys.executable, "rank.py"], 2, Path("logs")))
except UserError as error:
    print("error:", error, file=sys.stderr)
    sys.exit(2)
"""

RANK = """
import fcntl, os, signal, sys, time
from pathlib import Path
from bertscale.config import UserError
from launcher.ranks import run_as_rank

rank = int(os.environ["RANK"])

def wait_for(path):
    while not Path(path).exists():
        time.sleep(0.01)

def ready():
    Path(f"writing-{rank}").write_text(str(os.getpid()))
    os.replace(f"writing-{rank}", f"ready-{rank}")

def main():
BODY
    return 0

sys.exit(run_as_rank(main))
"""

Parent = Callable[[str], "subprocess.Popen[str]"]


@pytest.fixture
def parent(tmp_path: Path) -> Parent:
    """Starts a process that starts two ranks in tmp_path, each of which runs the body it is given."""

    def start(body: str) -> subprocess.Popen[str]:
        (tmp_path / "parent.py").write_text(PARENT)
        indented = textwrap.indent(textwrap.dedent(body), "    ")
        (tmp_path / "rank.py").write_text(RANK.replace("BODY", indented))
        return subprocess.Popen(
            [sys.executable, "parent.py"],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def wait_for(*paths: Path) -> None:
    while not all(path.exists() for path in paths):
        time.sleep(0.01)


def alive(pid: int) -> bool:
    """A zombie counts as dead: in a container there may be nobody to reap it."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return re.search(r"^State:\s+[ZX]", status, re.MULTILINE) is None


# ------------------------------------------------------------------------------------------- failures


def test_first_traceback_comes_last_and_ends_the_others(parent: Parent, tmp_path: Path) -> None:
    code, _, err = finish(
        parent(
            """
            if rank == 0:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                ready()
                time.sleep(1000)
            wait_for("ready-0")
            raise ZeroDivisionError("boom")
            """
        )
    )
    assert code == 1
    lines = err.splitlines()
    assert lines[-1] == "logs of all ranks: logs/attempt-001"
    assert lines[-2] == "ZeroDivisionError: boom"
    assert "rank 1 of 2 failed first: exit code 1" in lines
    assert not alive(int((tmp_path / "ready-0").read_text()))


def test_the_cause_is_shown_and_not_its_consequence(parent: Parent) -> None:
    code, _, err = finish(
        parent(
            """
            if rank == 0:
                wait_for("reported")
                raise ConnectionError("the other rank is gone")
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            os._exit = lambda code: (
                Path("reported").touch(), time.sleep(0.2), os.kill(os.getpid(), signal.SIGABRT)
            )
            raise ZeroDivisionError("boom")
            """
        )
    )
    assert code == 128 + signal.SIGABRT
    assert "ZeroDivisionError: boom" in err
    assert "the other rank is gone" not in err


def test_a_killed_rank_is_named_before_those_that_lost_it(parent: Parent) -> None:
    # Rank 1 holds a lock that only its death gives to rank 0.
    code, _, err = finish(
        parent(
            """
            lock = open("lock", "w")
            if rank == 1:
                fcntl.flock(lock, fcntl.LOCK_EX)
                ready()
                print("last words")
                wait_for("ready-0")
                os.kill(os.getpid(), signal.SIGKILL)
            wait_for("ready-1")
            ready()
            fcntl.flock(lock, fcntl.LOCK_EX)
            raise ConnectionError("the other rank is gone")
            """
        )
    )
    assert code == 128 + signal.SIGKILL
    assert "rank 1 of 2 failed first: killed by SIGKILL (" in err
    assert err.splitlines()[-2] == "last words"
    assert "the other rank is gone" not in err


def test_a_mistake_of_the_person_is_one_line(parent: Parent) -> None:
    code, _, err = finish(parent('raise UserError("train.steps=0 is too few")'))
    assert (code, err) == (2, "error: train.steps=0 is too few\n")


def test_a_full_disk_does_not_swallow_the_reason(parent: Parent) -> None:
    code, _, err = finish(
        parent(
            """
            sys.stderr = open("/dev/full", "w")
            raise UserError("No space left on device while writing step-10")
            """
        )
    )
    assert (code, err) == (2, "error: No space left on device while writing step-10\n")


def test_a_long_traceback_keeps_its_end(parent: Parent) -> None:
    code, _, err = finish(parent('raise ValueError("ж" * 100_000 + "!")'))
    assert code == 1
    assert err.splitlines()[-2].endswith("жжж!")


# -------------------------------------------------------------------------------------------- signals


def test_ctrl_c_lets_the_ranks_save(parent: Parent, tmp_path: Path) -> None:
    process = parent(
        """
        signal.signal(signal.SIGTERM, lambda number, frame: (Path(f"saved-{rank}").touch(), sys.exit(75)))
        Path(os.environ["BERTSCALE_ATTEMPT"], "heartbeat").write_text('{"step": 1}')
        ready()
        time.sleep(1000)
        """
    )
    wait_for(tmp_path / "ready-0", tmp_path / "ready-1")
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process)
    assert code == 75
    assert err == "\nstopping after this step and saving (Ctrl-C again to kill)\nstopped\n"
    assert (tmp_path / "saved-0").exists()
    assert (tmp_path / "saved-1").exists()


def test_a_second_ctrl_c_kills(parent: Parent, tmp_path: Path) -> None:
    process = parent(
        """
        signal.signal(signal.SIGTERM, lambda number, frame: Path(f"asked-{rank}").touch())
        ready()
        while True:
            time.sleep(1000)
        """
    )
    wait_for(tmp_path / "ready-0", tmp_path / "ready-1")
    process.send_signal(signal.SIGTERM)
    wait_for(tmp_path / "asked-0", tmp_path / "asked-1")
    process.send_signal(signal.SIGTERM)  # Slurm repeats itself: no reason to kill
    time.sleep(0.2)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process)
    assert code == 130
    assert err.endswith("killed\n")


def test_stopped_before_the_ranks_listen(parent: Parent, tmp_path: Path) -> None:
    process = parent("ready()\ntime.sleep(1000)")
    wait_for(tmp_path / "ready-0", tmp_path / "ready-1")
    process.send_signal(signal.SIGTERM)
    code, _, err = finish(process)
    assert code == 130
    assert err == "\nstopping\nstopped\n"  # no word of saving, before the first step


def test_the_last_line_is_true_and_says_how_to_go_on() -> None:
    again = "bertscale pretrain a.yaml"
    assert farewell("stopped", 0, again) == f"stopped before anything was saved; to start again: {again}"
    assert (
        farewell("killed", 1200, again) == f"killed; everything until step 1,200 is saved; to resume: {again}"
    )
    assert farewell("stopped", 0, "") == "stopped"


def test_ranks_die_with_a_killed_parent(parent: Parent, tmp_path: Path) -> None:
    process = parent(
        """
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        ready()
        time.sleep(1000)
        """
    )
    wait_for(tmp_path / "ready-0", tmp_path / "ready-1")
    pids = [int((tmp_path / f"ready-{rank}").read_text()) for rank in range(2)]
    assert all(alive(pid) for pid in pids)
    process.kill()
    finish(process)
    while any(alive(pid) for pid in pids):
        time.sleep(0.01)


# --------------------------------------------------------------------------------- output, environment


def test_outputs_and_environment(parent: Parent, tmp_path: Path) -> None:
    body = """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS")
    print(*(os.environ[name] for name in names), int(os.environ["MASTER_PORT"]) > 0)
    print("a warning", file=sys.stderr)
    """
    for attempt in ("attempt-001", "attempt-002"):
        code, out, err = finish(parent(body))
        assert (code, err) == (0, "")
        assert out == f"2 ranks on this machine, logs in logs/{attempt}\n0 2 0 2 127.0.0.1 1 True\n"
    for attempt in ("attempt-001", "attempt-002"):
        logs = tmp_path / "logs" / attempt
        assert (logs / "rank-0.log").read_text() == "0 2 0 2 127.0.0.1 1 True\na warning\n"
        assert (logs / "rank-1.log").read_text() == "1 2 1 2 127.0.0.1 1 True\na warning\n"


def test_the_history_tells_how_each_attempt_ended(parent: Parent, tmp_path: Path) -> None:
    assert finish(parent("return 0"))[0] == 0
    assert finish(parent('raise UserError("no such data")'))[0] == 2
    process = parent("ready()\ntime.sleep(1000)")
    wait_for(tmp_path / "ready-0", tmp_path / "ready-1")
    process.send_signal(signal.SIGINT)
    assert finish(process)[0] == 130
    for path in tmp_path.glob("ready-*"):
        path.unlink()
    process = parent("ready()\ntime.sleep(1000)")
    wait_for(tmp_path / "ready-0", tmp_path / "ready-1")
    process.kill()
    finish(process)
    assert finish(parent("return 0"))[0] == 0

    logs = tmp_path / "logs"
    attempts = history.read_attempts(read_events(logs / "events.jsonl"), history.attempt_folders(logs))
    assert [attempt.outcome for attempt in attempts] == [
        "done",
        "gave up: no such data",
        "stopped by SIGINT",
        "ended without a report: it was killed, or its machine went down",
        "done",
    ]
    assert [attempt.folder for attempt in attempts] == history.attempt_folders(logs)


def test_no_launcher() -> None:
    assert from_environment() is None


def test_torchrun() -> None:
    os.environ.update(RANK="5", WORLD_SIZE="8", LOCAL_RANK="1", MASTER_ADDR="a", MASTER_PORT="1")
    assert from_environment() == Rank(rank=5, world_size=8, local_rank=1)


def test_ranks_without_an_address() -> None:
    os.environ.update(RANK="0", WORLD_SIZE="8")
    with pytest.raises(UserError, match="RANK=0 and WORLD_SIZE=8 are set, but not MASTER_ADDR"):
        from_environment()


SRUN = {
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NODELIST": "other,gpu[003-010,12]",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "gpu[003-010,12]",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_NTASKS": "32",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
}


def test_srun() -> None:
    os.environ.update(SRUN)
    assert from_environment() == Rank(rank=9, world_size=16, local_rank=1)
    assert os.environ["MASTER_ADDR"] == "gpu003"
    first_port = int(os.environ["MASTER_PORT"])
    # Below Linux's ephemeral ports, which any connection may hold.
    assert 1024 < first_port < 32_768
    # The second look finds what the first one put there.
    assert from_environment() == Rank(rank=9, world_size=16, local_rank=1)
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"):
        del os.environ[name]
    os.environ["SLURM_RESTART_COUNT"] = "1"
    from_environment()
    assert int(os.environ["MASTER_PORT"]) != first_port


@pytest.mark.parametrize(
    "change",
    [
        {"SLURM_STEP_ID": None},  # a batch script
        {"SLURM_STEP_ID": str(0xFFFFFFFA)},  # the shell of salloc
        {"SLURM_STEP_NUM_TASKS": "1"},  # srun of one task, which starts the ranks of its node itself
    ],
)
def test_not_a_rank_of_srun(change: dict[str, str | None]) -> None:
    os.environ.update({key: value for key, value in (SRUN | change).items() if value is not None})
    assert from_environment() is None
    assert "RANK" not in os.environ


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("login", "login"),
        ("a,b", "a"),
        ("node[1-3,7]", "node1"),
        ("node[7,9]", "node7"),
        ("gpu[003-010],cpu[1-2]", "gpu003"),
        ("rack[2-3]n[04-05]", "rack2n04"),
        ("gpu-a[12]-ib,gpu-b1", "gpu-a12-ib"),
    ],
)
def test_first_host(nodelist: str, host: str) -> None:
    assert first_host(nodelist) == host


def test_the_port_of_local_ranks_is_none_that_the_kernel_gives_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else another program's connection may have it before the first rank listens."""
    first_given_away = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    taken = free_port()
    assert 12_000 <= taken < min(32_000, first_given_away)
    draws = iter([taken, taken, taken + 1 if taken < 31_999 else 12_000])
    monkeypatch.setattr(random.SystemRandom, "randrange", lambda *_: next(draws))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", taken))
        listener.listen()
        assert free_port() != taken
