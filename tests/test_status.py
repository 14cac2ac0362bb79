"""`bertscale status`, `logs`, `cancel` and `resume`: words for Slurm's, hand-made folders, a real Slurm."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from virtual import Cluster

from bertscale.errors import UserError
from bertscale.run_folder import Events, job_folder, read_events
from launcher import history, queue_jobs, runs, slurm
from launcher.job import JobSpec
from launcher.status import commands as status
from launcher.status import logs

NOW = datetime(2026, 11, 22, 4, 52, 57).timestamp()

# ------------------------------------------------------------------------------- what Slurm has said

# Lines of the format in queue_jobs.SQUEUE, as Slurm 22.05 wrote them.
QUEUE = """\
5_[0-3]|PENDING|1||N/A|N/A|(null)|PartitionTimeLimit|bertscale /runs/data.job
2|PENDING|2||2026-11-22T05:01:35|2026-11-22T05:11:35|(null)|Resources|bertscale /runs/a | b/job
3|PENDING|1||N/A|N/A|afterany:1(unfulfilled)|Dependency|bertscale /runs/hf.job
6|PENDING|1||2026-11-22T04:53:15|2026-11-29T04:53:15|(null)|BeginTime|bertscale /runs/base/job
7_1|RUNNING|1|node1|2026-11-22T04:52:01|2026-11-29T04:52:01|(null)|None|(null)
1|RUNNING|2|node[1-2]|2026-11-22T04:51:35|2026-11-22T05:01:35|(null)|None|bertscale /runs/base/job
"""
PRIORITY = "jobs of higher priority come first"
RELEASE = "scontrol release 17"
REASONS = [
    ("Priority", PRIORITY, None),
    ("Resources", "it is next, and the nodes that it needs are still in use", None),
    ("Dependency", "the job before it has not ended", None),
    ("DependencyNeverSatisfied", "the job that it waits for failed, so it can never begin", "cancel"),
    (
        "ReqNodeNotAvail, UnavailableNodes:node[1-2]",
        "nodes that it needs are down, drained or reserved; not available: node[1-2]",
        "sinfo --list-reasons",
    ),
    (
        "Nodes required for job are DOWN, DRAINED or reserved for jobs in higher priority partitions",
        "too few nodes are up: some are down or drained",
        "sinfo --list-reasons",
    ),
    ("PartitionTimeLimit", "it asks for more time than the partition allows", "shorter"),
    ("QOSMaxWallDurationPerJobLimit", "it asks for more time than its quality of service allows", "shorter"),
    ("QOSMaxGRESPerUser", "the limit of its quality of service for one person or job is reached", None),
    ("AssocGrpGRES", "the jobs of its account fill the limit that they share", None),
    ("JobHeldUser", "it is held by its owner", RELEASE),
    ("job requeued in held state", "it was requeued and held", RELEASE),
    ("job_requeued_in_held_state", "it was requeued and held", RELEASE),
    ("BeginTime", "its begin time is not there yet (a requeued job waits for two minutes)", None),
    ("JobArrayTaskLimit", "as many tasks of its array run as may at once", None),
    ("", "it was queued a moment ago", None),
    ("PhaseOfTheMoon", "Slurm's reason is PhaseOfTheMoon", None),
]


def test_the_queue_is_read() -> None:
    jobs = {job.id: job for job in queue_jobs.parse_squeue(QUEUE + "a line of something else\n")}
    assert list(jobs) == ["5_[0-3]", "2", "3", "6", "7_1", "1"]
    assert jobs["2"].folder == Path("/runs/a | b/job")  # only the comment may hold a bar
    assert jobs["2"].start == datetime(2026, 11, 22, 5, 1, 35).timestamp()
    assert jobs["5_[0-3]"].number == "5"
    assert jobs["5_[0-3]"].start is None
    assert jobs["7_1"].folder is None  # not ours
    assert jobs["1"].active
    assert not jobs["1"].waits
    assert jobs["6"].waits


def test_the_comment_decides_whose_a_job_is() -> None:
    queue = queue_jobs.parse_squeue(QUEUE)
    assert [job.id for job in queue_jobs.jobs_of(Path("/runs/base/job"), ["2", "3"], queue)] == ["1", "6"]
    assert queue_jobs.jobs_of(Path("/runs/old/job"), ["1", "2"], queue) == []  # Slurm uses its numbers again
    assert [job.id for job in queue_jobs.jobs_of(Path("/runs/old/job"), ["7"], queue)] == ["7_1"]
    # A site's own comment, and a later job of the folder that is gone already.
    queue = queue_jobs.parse_squeue(QUEUE.replace("bertscale /runs/base/job", "project 12"))
    assert [job.id for job in queue_jobs.jobs_of(Path("/runs/base/job"), ["1", "8"], queue)] == ["1"]


@pytest.mark.parametrize(("reason", "sentence", "remedy"), REASONS)
def test_every_reason_has_its_words(reason: str, sentence: str, remedy: str | None) -> None:
    assert queue_jobs.why(queue_jobs.QueueJob("17", "PENDING", "squeue", reason=reason)) == (sentence, remedy)


def test_no_reason_hides_behind_a_shorter_one() -> None:
    seen: list[str] = []
    for beginning, _, _ in queue_jobs.REASONS:
        assert not [earlier for earlier in seen if beginning.startswith(earlier)], beginning
        seen.append(beginning)


def test_states_in_words() -> None:
    jobs = {job.id: queue_jobs.in_words(job, NOW) for job in queue_jobs.parse_squeue(QUEUE)}
    assert jobs["1"] == "job 1 runs on 2 nodes (node[1-2]) for 1:22"
    assert jobs["2"].endswith("still in use; expected to start at 05:01")
    assert jobs["3"] == "job 3 waits: the job before it has not ended (job 1)"
    assert jobs["7_1"] == "job 7_1 runs on node1 for 0:56"


# `sacct` with queue_jobs.SACCT's format.
ACCOUNTS = """\
17|CANCELLED by 1000|4|node[1-4]|2026-11-21T04:51:35|2026-11-21T04:52:00|0:15|None
18|FAILED|4|node[1-4]|2026-11-22T04:51:35|2026-11-22T04:52:00|77:0|NonZeroExitCode
19|TIMEOUT|1|node1|2026-11-22T04:51:35|2026-11-22T04:52:00|0:0|TimeLimit
20|PENDING|4|None assigned|Unknown|Unknown|0:0|Priority
"""


def test_accounts_are_read() -> None:
    cancelled, failed, late, waiting = queue_jobs.parse_sacct(ACCOUNTS)
    assert queue_jobs.in_words(cancelled, NOW) == "job 17 has ended on 21 Nov at 04:52: it was cancelled"
    assert queue_jobs.in_words(failed, NOW) == "job 18 has ended at 04:52: it failed with exit code 77"
    assert queue_jobs.in_words(late, NOW).endswith("its time limit came before it had ended")
    never = queue_jobs.QueueJob("21", "FAILED", "sacct", exit="0:53")
    assert "it failed: Slurm could not start it, perhaps since its log folder" in queue_jobs.in_words(
        never, NOW
    )
    assert queue_jobs.in_words(waiting, NOW) == f"job 20 waits: {PRIORITY}"


RECORD = (
    "JobId=1 JobName=base UserId=me(1000) JobState=FAILED Reason=NonZeroExitCode Dependency=(null) Requeue=1 "
    "Restarts=0 BatchFlag=1 ExitCode=75:0 RunTime=00:00:25 StartTime=2026-11-22T04:51:35 "
    "EndTime=2026-11-22T04:52:00 NodeList=node[1-2] BatchHost=node1 NumNodes=2 NumCPUs=32 "
    "Command=/runs/run a/job/script.sh Comment=bertscale /runs/run a/job  StdErr=/runs/x.out Power= "
)


def test_a_record_of_the_controller_is_read(slurm_says: Callable[..., None]) -> None:
    slurm_says(scontrol=RECORD)
    record = slurm.show_job("1")
    assert record is not None
    job = queue_jobs.from_record(record)
    assert (job.id, job.state, job.exit, job.nodes) == ("1", "FAILED", "75:0", 2)
    assert job.folder == Path("/runs/run a/job")
    assert not job.active


# ----------------------------------------------------------------------------------- hand-made folders


@pytest.fixture
def slurm_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Commands that print what they are told to; without a word for it a command fails as Slurm's do."""
    folder = tmp_path / "commands"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def say(**answers: str) -> None:
        for name in ("squeue", "sacct", "scontrol"):
            answer = answers.get(name)
            (folder / f"{name}.txt").write_text(answer or f"{name}: error: Invalid job id specified\n")
            ends = "" if answer is not None else " >&2; exit 1"
            (folder / name).write_text(f"#!/bin/sh\ncat {folder}/{name}.txt{ends}\n")
            (folder / name).chmod(0o755)

    return say


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory, on a machine without Slurm."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    return folder


def make_job(target: Path, stage: str = "pretrain", script: str = "", **spec: Any) -> Path:
    """A job folder as `bertscale submit` leaves it."""
    job = job_folder(stage, target)
    (job / "logs").mkdir(parents=True)
    facts = JobSpec(
        stage=stage,
        name=target.name,
        folder=str(job),
        target=str(target.absolute()),
        logs=str(job / "logs"),
        command=(),
        python=sys.executable,
        batch_python=sys.executable,
        version="0.1.0",
        **spec,
    )
    (job / "job.json").write_text(facts.to_json())
    (job / "config.yaml").write_text("train: {steps: 1000}\n")
    (job / "script.sh").write_text(
        f"#!/bin/bash\n#SBATCH --comment='bertscale {job}'\n"
        f"#SBATCH --output={job}/logs/slurm-%j.out --open-mode=append\n{script}"
    )
    return job


def save(run: Path, step: int, age: float) -> None:
    table = run / "checkpoints" / f"step-{step:07d}" / "bertscale.json"
    table.parent.mkdir(parents=True)
    table.write_text("{}")
    set_age(table, age)


def set_age(path: Path, age: float) -> None:
    os.utime(path, (time.time() - age, time.time() - age))


def write_metrics(run: Path, step: int, age: float = 0) -> None:
    entry = {"step": step, "train/loss": 6.5, "speed/tokens_per_second": 35_000.0}
    (run / "metrics.jsonl").write_text(json.dumps(entry) + '\n{"step": 9')  # a crash cut the last line short
    set_age(run / "metrics.jsonl", age)


def ask_status(capsys: pytest.CaptureFixture[str], *names: str) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert status.main("status", [*names, "--json"]) == 0
    answer: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return answer


def shown(capsys: pytest.CaptureFixture[str], *names: str) -> str:
    capsys.readouterr()
    assert status.main("status", list(names)) == 0
    return capsys.readouterr().out


def write_events(job: Path, *lines: dict[str, Any] | str, age: float = 100) -> None:
    """Appends events, one second apart."""
    with (job / "events.jsonl").open("a") as file:
        for number, line in enumerate(lines):
            text = line
            if isinstance(line, dict):
                text = json.dumps({"time": time.time() - age + number, **line})
            file.write(f"{text}\n")


STARTED = {"event": "started", "job": "17", "attempt": "attempt-001-17", "nodes": ["node1", "node2"]}


def test_queued_without_an_attempt(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = make_job(here / "runs" / "base")
    write_events(job, {"event": "queued", "job": "17", "after": []})
    [report] = ask_status(capsys)
    assert (report["run"], report["state"], report["jobs"]) == (str(here / "runs/base"), "waiting", ["17"])
    text = shown(capsys, "runs/base")
    assert "queued as job 17" in text
    assert "squeue is not installed here" in text  # which source it had, and why


def test_running_as_far_as_files_tell(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = here / "runs" / "base"
    job = make_job(run)
    write_events(job, {"event": "queued", "job": "17"}, "{damaged", "5", '"text"', '{"event": 3}', age=2100)
    write_events(job, STARTED, {"event": "resumed", "step": 100}, age=2000)
    save(run, 100, 2100)
    save(run, 200, 1000)
    write_metrics(run, 240, 600)
    beat = job / "logs" / "attempt-001-17" / "heartbeat"
    beat.parent.mkdir()
    beat.write_text('{"step": 300}')
    [report] = ask_status(capsys, "runs/base")
    assert report["state"] == "running"
    assert (report["step"], report["steps"], report["loss"]) == (300, 1000, 6.5)
    assert report["checkpoint_step"] == 200
    # 100 steps in the 1000 seconds since the first checkpoint of this attempt, 700 to go.
    assert report["expected_end"] - time.time() == pytest.approx(7000, rel=0.02)
    text = shown(capsys, str(job))
    assert "1 (job 17) on node1, node2" in text
    assert "step 300 of 1,000, loss 6.500, 35,000 tokens/s" in text
    assert "step 200, 16:4" in text
    assert "{damaged" not in text


def test_done(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = make_job(here / "runs" / "base")
    write_events(job, {"event": "queued", "job": "17"}, STARTED, {"event": "done", "job": "17"})
    (job / "done.json").write_text("{}")
    [report] = ask_status(capsys, "runs/base")
    assert (report["state"], report["next"]) == ("done", "bertscale convert runs/base OUTPUT")
    assert report["attempts"][0]["outcome"] == "done"


def test_an_array_is_done_with_its_last_task(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = make_job(here / "runs" / "data", "prep", array=4)
    write_events(job, {"event": "queued", "job": "17"})
    for task in (0, 1, 3):
        write_events(job, {**STARTED, "job": f"17_{task}", "attempt": f"attempt-001-17_{task}"})
        write_events(job, {"event": "done", "job": f"17_{task}"}, age=50)
        (job / f"done-{task}.json").write_text("{}")
    [report] = ask_status(capsys, "runs/data")
    assert (report["tasks_done"], report["done"], report["jobs"]) == (3, False, ["17"])
    assert [attempt["outcome"] for attempt in report["attempts"]] == ["done"] * 3
    (job / "done-2.json").write_text("{}")
    [report] = ask_status(capsys, "runs/data.job")
    assert report["state"] == "done"


def test_a_crash_loop_is_told(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = make_job(here / "runs" / "base")
    write_events(job, {"event": "queued", "job": "17"})
    failed = {"event": "failed", "rank": 3, "node": "node2", "code": 7, "reason": "exit code 7"}
    for number in (1, 2):
        name = f"attempt-00{number}-17"
        write_events(job, {**STARTED, "attempt": name}, failed, {"event": "relaunched", "checkpoint": 100})
        (job / "logs" / name).mkdir()
    write_events(job, {"event": "gave_up", "reason": "exit code 77", "checkpoint": 100})
    [report] = ask_status(capsys, "runs/base")
    assert report["state"] == "gave up"
    assert [attempt["outcome"] for attempt in report["attempts"]] == [
        "rank 3 on node2 failed: exit code 7"
    ] * 2
    text = shown(capsys, "runs/base")
    assert "gave up: exit code 77; last checkpoint: 100" in text
    assert "next        bertscale logs runs/base" in text


def test_job_json_may_be_damaged(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = make_job(here / "runs" / "base")
    (job / "job.json").write_text('{"stage": "pretr')
    write_events(job, {"event": "queued", "job": "17"}, STARTED)
    [report] = ask_status(capsys, "runs/base")
    assert (report["state"], report["stage"], report["steps"]) == ("running", "pretrain", 1000)
    (job / "events.jsonl").write_bytes(b"\xff\xfe\x00")
    assert ask_status(capsys, "runs/base")[0]["state"] == "not queued"


def test_a_run_that_was_started_by_hand(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = here / "runs" / "base"
    attempt = run / "logs" / "attempt-001"
    attempt.mkdir(parents=True)
    (attempt / "rank-1.log").write_text("something\n")
    (run / "config.yaml").write_text("run: runs/base\ntrain: {steps: 300}\n")
    save(run, 200, 1000)
    write_metrics(run, 240, 900)
    set_age(attempt / "rank-1.log", 1000)
    Events(run / "logs" / "events.jsonl").write("failed", rank=1, node="", code=7, reason="exit code 7")

    holder = f"import fcntl, sys; f = open({str(run / '.lock')!r}, 'w'); fcntl.flock(f, fcntl.LOCK_EX); "
    holder += "print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", holder]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        [report] = ask_status(capsys)
        with pytest.raises(UserError, match=f"press Ctrl-C where it runs, or `kill -INT {os.getpid()}`"):
            status.main("cancel", ["runs/base"])
        process.kill()
    assert (report["state"], report["process"]) == ("running", process.pid)

    [report] = ask_status(capsys, "runs/base")
    assert report["state"] == "stopped"
    assert report["sentence"] == "it does not run; its last attempt: rank 1 failed: exit code 7"
    assert report["next"] == "bertscale pretrain runs/base/config.yaml"
    assert status.main("resume", ["runs/base"]) == 0
    assert "to resume: bertscale pretrain runs/base/config.yaml" in capsys.readouterr().out
    save(run, 300, 10)
    assert ask_status(capsys, "runs/base")[0]["state"] == "done"

    (run / "config.yaml").write_text("run: runs/base\ntrain: {steps: null, hours: 2}\n")
    assert ask_status(capsys, "runs/base")[0]["state"] == "stopped"
    (run / "result.json").write_text('{"steps": 300}')  # written when the hours are over
    assert ask_status(capsys, "runs/base")[0]["sentence"] == "done: all 300 steps"


def test_no_such_run(here: Path) -> None:
    make_job(here / "runs" / "base")
    (here / "empty").mkdir()
    with pytest.raises(
        UserError, match="there is no run, output folder or job nix; below runs/ are runs/base"
    ):
        status.main("status", ["nix"])
    with pytest.raises(UserError, match="empty is no run"):
        status.main("logs", ["empty"])
    with pytest.raises(UserError, match="is not installed"):
        status.main("status", ["17"])


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (
            ["manifest.json", ".prep/plan.json"],
            "a data set of `bertscale prep`, which has ended: bertscale inspect",
        ),
        ([".prep/plan.json"], "a data set that `bertscale prep` has not finished"),
        (["result.json", "model/config.json"], "a task model of `bertscale finetune`, which has ended"),
        (["glue.json", "mnli/result.json"], "a table of `bertscale glue`, which has ended: folder/glue.md"),
        (["config.json"], "a model, in which nothing runs"),
    ],
)
def test_a_folder_in_which_nothing_runs_is_named(here: Path, files: list[str], words: str) -> None:
    for file in files:
        (here / "folder" / file).parent.mkdir(parents=True, exist_ok=True)
        (here / "folder" / file).write_text("{}")
    for command in ("status", "logs", "cancel", "resume"):
        with pytest.raises(UserError, match=f"^folder is {words}"):
            status.main(command, ["folder"])


def test_a_checkpoint_leads_to_its_run(here: Path) -> None:
    save(here / "runs/base", 20, 10)
    with pytest.raises(UserError, match="is a checkpoint of the run runs/base: bertscale status runs/base"):
        status.main("logs", ["runs/base/checkpoints/step-0000020"])


def test_a_run_that_has_just_ended_does_not_run(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = here / "runs" / "base"
    save(run, 20, 1)
    (run / "config.yaml").write_text("run: runs/base\ntrain: {steps: 300}\n")
    (run / "logs/attempt-001").mkdir(parents=True)
    events = Events(run / "logs" / "events.jsonl")
    events.write("started", attempt="attempt-001")
    write_metrics(run, 20)
    assert ask_status(capsys, "runs/base")[0]["state"] == "running"
    events.write("stopped", name="SIGINT", checkpoint=20)
    [report] = ask_status(capsys, "runs/base")
    assert report["state"] == "stopped"
    assert report["sentence"].endswith("its last attempt: stopped by SIGINT; newest checkpoint: step 20")


def test_the_end_of_a_budget_in_hours(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = here / "runs" / "base"
    (run / "logs/attempt-001").mkdir(parents=True)
    (run / "config.yaml").write_text("run: runs/base\ntrain: {steps: null, hours: 2}\n")
    Events(run / "logs" / "events.jsonl").write("started", attempt="attempt-001")
    write_metrics(run, 20)
    [report] = ask_status(capsys, "runs/base")
    assert report["expected_end"] == pytest.approx(time.time() + 7200, abs=60)
    save(run, 20, 0)
    (run / "checkpoints/step-0000020/bertscale.json").write_text('{"elapsed_seconds": 3600.0}')
    [report] = ask_status(capsys, "runs/base")
    assert report["expected_end"] == pytest.approx(time.time() + 3600, abs=60)
    assert "ends" in shown(capsys, "runs/base")


def test_nothing_at_all(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no runs below" in shown(capsys)


def test_each_source_in_its_turn(
    here: Path, slurm_says: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    del here
    job = make_job(Path("runs/base").absolute())
    write_events(job, {"event": "queued", "job": "18"})
    os.environ["PATH"] += ":/bin:/usr/bin"
    line = f"18|RUNNING|2|node[1-2]|2026-11-22T04:51:35|N/A|(null)|None|bertscale {job}\n"

    def source() -> tuple[str, str]:
        [report] = ask_status(capsys, "runs/base")
        return report["source"], report["state"]

    slurm_says(squeue=line, sacct=ACCOUNTS, scontrol=RECORD)
    assert source() == ("squeue", "running")
    slurm_says(squeue="", sacct="18|FAILED|4|node[1-4]|N/A|N/A|77:0|None\n", scontrol=RECORD)
    assert source() == ("sacct", "failed")
    slurm_says(squeue="", sacct="18|CANCELLED by 0|4|node[1-4]|N/A|N/A|0:15|None\n", scontrol=RECORD)
    assert source() == ("sacct", "cancelled")  # by scancel
    slurm_says(squeue="", scontrol=RECORD)
    assert source() == ("scontrol", "failed")
    slurm_says(squeue="")
    assert source() == ("its own events", "lost")  # Slurm has forgotten it
    slurm_says(squeue=line)
    assert ask_status(capsys, "18")[0]["run"] == str(job.parent)


def test_each_command_is_asked_once_for_all_runs(
    here: Path, slurm_says: Callable[..., None], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for number in range(30, 36):
        write_events(make_job(here / f"runs/run{number}"), {"event": "queued", "job": str(number)})
    os.environ["PATH"] += ":/bin:/usr/bin"
    accounts = "".join(f"{number}|FAILED|1|node1|N/A|N/A|{number}:0|None\n" for number in (30, 31, 32))
    records = "\n".join(RECORD.replace("JobId=1 ", f"JobId={number} ") for number in (33, 34, 1)) + "\n"
    slurm_says(squeue="", sacct=accounts, scontrol=records)
    for command in ("squeue", "sacct", "scontrol"):
        script = tmp_path / "commands" / command
        script.write_text(script.read_text().replace("cat", f"echo {command} >> {tmp_path}/asked; cat", 1))
    reports = {Path(report["run"]).name: report for report in ask_status(capsys)}
    assert (tmp_path / "asked").read_text().split() == ["squeue", "sacct", "scontrol"]
    sources = [reports[f"run{number}"]["source"] for number in range(30, 36)]
    assert sources == ["sacct"] * 3 + ["scontrol"] * 2 + ["its own events"]
    assert "exit code 31" in reports["run31"]["sentence"]


@pytest.mark.parametrize(("state", "word"), [("DOWN+NOT_RESPONDING", "lost"), ("ALLOCATED", "running")])
def test_a_job_that_runs_without_its_first_node_is_lost(
    state: str,
    word: str,
    here: Path,
    slurm_says: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """A job with spares outlives its first node, and with it the supervisor; nobody is there to save."""
    job = make_job(here / "runs/base", spares=1)
    write_events(job, {"event": "queued", "job": "18"})
    os.environ["PATH"] += ":/bin:/usr/bin"
    slurm_says(
        squeue=f"18|RUNNING|3|node[1-3]|2026-11-22T04:51:35|N/A|(null)|None|bertscale {job}\n",
        scontrol=f"JobId=18 JobState=RUNNING BatchHost=node1\nNodeName=node1 State={state}\n",
    )
    scancel = tmp_path / "commands/scancel"
    scancel.write_text(f"#!/bin/sh\necho $* >> {tmp_path}/asked\n")
    scancel.chmod(0o755)
    [report] = ask_status(capsys, "runs/base")
    assert report["state"] == word
    assert (report["next"] == "scontrol requeue 18") == (word == "lost")
    assert status.main("cancel", ["runs/base"]) == 0
    assert (tmp_path / "asked").read_text() == ("18\n" if word == "lost" else "--batch --signal=USR1 18\n")


@pytest.mark.parametrize(
    ("start", "checkpoints", "newest", "expected"),
    [
        ((0, 0.0), [], (0, 10.0), None),  # no step yet
        ((0, 0.0), [], (10, 20.0), 200.0),
        ((50, 0.0), [], (100, 100.0), 100.0),
        ((0, 0.0), [(10, 500.0)], (20, 600.0), 1400.0),  # without the time that the start took
        ((0, 0.0), [(99, 990.0)], (100, 1000.0), 1000.0),
    ],
)
def test_expected_end(
    start: tuple[int, float],
    checkpoints: list[tuple[int, float]],
    newest: tuple[int, float],
    expected: float | None,
) -> None:
    assert runs.expected_end(start, checkpoints, newest, steps=100) == expected


def test_an_attempt_that_ended_without_a_word() -> None:
    events = [
        {"time": 1.0, **STARTED},
        {"time": 2.0, "event": "signal", "name": "SIGUSR1"},
        {"time": 3.0, "event": "requeued", "reason": "SIGUSR1", "saved": True},
        {"time": 4.0, **STARTED, "attempt": "attempt-002-17"},
        {"time": 5.0, **STARTED, "attempt": "attempt-003-17"},
    ]
    first, second, third = history.read_attempts(events, [])
    assert first.outcome == "told to save and stop by SIGUSR1, saved and requeued: SIGUSR1"
    for nothing_saved in ({}, {"saved": False}):
        event = {"event": "requeued", "reason": "SIGUSR1", **nothing_saved}
        assert history.tell(event) == "requeued: SIGUSR1"
    assert second.outcome == "ended without a report: its node or its batch script died"
    assert (third.number, third.outcome, third.ended) == (3, "", None)


def test_folders_alone_do_not_tell_how_an_attempt_ended(tmp_path: Path) -> None:
    """Those of an earlier version, which wrote no events of a run that went well."""
    folders = [tmp_path / f"attempt-00{number}" for number in (1, 2)]
    for number, folder in enumerate(folders):
        folder.mkdir()
        (folder / "rank-0.log").touch()
        os.utime(folder / "rank-0.log", (100 + number, 100 + number))
    assert [attempt.outcome for attempt in history.read_attempts([], folders)] == ["", ""]


# ------------------------------------------------------------------------------------------------ logs


def test_tail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "BLOCK_BYTES", 7)
    for text in ("", "one", "one\n", "one\ntwo", "one\ntwo\n\nfour\n", "\n\n\n", "a" * 20 + "\n" + "b" * 30):
        path = tmp_path / "log"
        path.write_text(text)
        for count in range(6):
            lines = text.splitlines(keepends=True)
            assert text[logs.tail(path, count) :] == "".join(lines[len(lines) - min(count, len(lines)) :])


def test_bars_and_control_characters(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"10%\r50%\r\n\x1b[2K\x1b[31mred\x1b[0m \x1b]0;title\x07\xffend\t.\nbar 1\rbar 2\r")
    reader = logs.Reader(path, 0)
    lines = reader.read()
    assert lines[0] == "50%"
    assert lines[1].startswith("red ")
    assert "\x1b" not in lines[1]
    assert reader.rest == "bar 2"
    with path.open("ab") as file:
        file.write(b"bar 3\r\n")
    assert reader.read() == ["bar 3"]
    path.write_text("anew\n")
    assert reader.read() == ["anew"]


NOBODY_READS = """
import sys
from pathlib import Path
from launcher.terminal import outlive_readers
outlive_readers()
for number in range(3):
    print("a line", flush=True)
    print("a warning", file=sys.stderr)
Path("went on").touch()
"""


def test_work_goes_on_when_its_reader_has_enough(tmp_path: Path) -> None:
    """`bertscale submit pipeline ... | head -1` queues all jobs, `cancel` and `resume` likewise."""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-c", NOBODY_READS], cwd=tmp_path, stdout=writing, stderr=writing, env={**os.environ}
    )
    assert done.returncode == 0
    assert (tmp_path / "went on").exists()


def test_status_ends_quietly_when_its_reader_has_enough(here: Path) -> None:
    make_job(here / "runs" / "base")
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "bertscale", "status"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (141, "")


def attempt_of(job: Path, number: int, **logs: str) -> Path:
    folder = job / "logs" / f"attempt-{number:03d}-17"
    folder.mkdir()
    for name, text in logs.items():
        (folder / f"{name.replace('_', '-')}.log").write_text(text)
    return folder


def test_which_log_is_shown(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = make_job(here / "runs" / "base")

    def show(*arguments: str) -> str:
        assert status.main("logs", ["runs/base", *arguments]) == 0
        return capsys.readouterr().out

    with pytest.raises(UserError, match="has written no log yet"):
        show()
    (job / "logs" / "slurm-17.out").write_text("line 1\nline 2\nline 3\n")
    assert show("-n", "2") == "line 2\nline 3\n"
    attempt_of(job, 1, rank_0000="first of attempt 1\n", rank_0001="second of attempt 1\n")
    second = attempt_of(job, 2, rank_0000="first of attempt 2\n", rank_0001="Traceback: boom\n")
    assert show().endswith("line 3\n")
    assert show("--rank", "0") == "first of attempt 2\n"
    assert show("--rank", "1", "--attempt", "1") == "second of attempt 1\n"
    with pytest.raises(UserError, match="has no log of rank 9; it has 0, 1"):
        show("--rank", "9")
    with pytest.raises(UserError, match="has no attempt 7; it has 1, 2"):
        show("--attempt", "7")

    # Both ranks failed; which was first decides, by the reports and then by the supervisor's event.
    for rank, when in ((0, 20.0), (1, 10.0)):
        report = {"rank": rank, "node": "node2", "code": 7, "time": when, "reason": "exit code 7"}
        (second / f"rank-{rank:04d}.json").write_text(json.dumps(report))
    assert show() == "Traceback: boom\n"
    write_events(job, STARTED, {"event": "failed", "rank": 0, "node": "node1", "code": 3})
    assert show() == "first of attempt 2\n"


@contextmanager
def run_logs(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """`bertscale logs` as a process, which is killed at the end, and when it says nothing for a minute."""
    command = [sys.executable, "-m", "bertscale", "logs", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        timer = threading.Timer(60, process.kill)
        timer.start()
        try:
            yield process
        finally:
            timer.cancel()
            process.kill()


def test_logs_follow_from_one_attempt_to_the_next(here: Path) -> None:
    job = make_job(here / "runs" / "base")
    write_events(job, {"event": "queued", "job": "17"}, STARTED)
    first = attempt_of(job, 1, rank_0001="begins\n")
    with run_logs("runs/base", "-f", "--rank", "1") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begins\n"
        with (first / "rank-0001.log").open("a") as file:
            file.write("goes on\nlast word")
        assert process.stdout.readline() == "goes on\n"
        attempt_of(job, 2, rank_0001="begins again\n")
        assert process.stdout.readline() == "last word\n"
        assert process.stdout.readline() == "begins again\n"
        (job / "done.json").write_text("{}")
        rest, notes = process.communicate()
    assert (process.returncode, rest) == (0, "")
    assert [line.split(";")[0] for line in notes.splitlines()] == [
        "==> attempt 1",
        "==> attempt 2",
        "==> runs/base is done",
    ]


def test_following_waits_and_ends_quietly(here: Path) -> None:
    job = make_job(here / "runs" / "base")
    with run_logs("runs/base", "-f") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert "has written nothing yet" in process.stderr.readline()
        (job / "logs" / "slurm-17.out").write_text("hello\n")
        assert process.stdout.readline() == "hello\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate()
    assert process.returncode == 0
    assert errors.splitlines() == [f"==> {job / 'logs' / 'slurm-17.out'}"]


def test_following_a_run_that_was_started_by_hand_ends_with_it(here: Path) -> None:
    run = here / "runs" / "base"
    attempt = run / "logs" / "attempt-001"
    attempt.mkdir(parents=True)
    events = Events(run / "logs" / "events.jsonl")
    events.write("started", attempt="attempt-001")
    (attempt / "rank-0.log").write_text("the model\n")
    with run_logs("runs/base", "-f") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "the model\n"
        with (attempt / "rank-0.log").open("a") as file:
            file.write("the last step\n")
        events.write("stopped", name="SIGINT", checkpoint=20)
        rest, notes = process.communicate()
    assert (process.returncode, rest) == (0, "the last step\n")
    assert notes.splitlines()[-1] == "==> runs/base: stopped by SIGINT; newest checkpoint: step 20"


def test_following_ends_with_a_forgotten_job(here: Path, slurm_says: Callable[..., None]) -> None:
    job = make_job(here / "runs" / "base")
    write_events(job, {"event": "queued", "job": "17"}, STARTED)
    failed = attempt_of(job, 1, rank_0000="Traceback\n")
    write_events(job, {"event": "failed", "rank": 0, "node": "node1", "code": 7, "reason": "exit code 7"})
    os.environ["PATH"] += ":/bin:/usr/bin"
    slurm_says(squeue="", sacct=ACCOUNTS.splitlines()[0])
    with run_logs("runs/base", "-f") as process:
        text, notes = process.communicate()
    assert (process.returncode, text) == (0, "Traceback\n")
    assert notes.splitlines() == [
        f"==> rank 0 on node1 failed: exit code 7; {failed / 'rank-0000.log'}",
        "==> runs/base is not in the queue any more: `bertscale status runs/base` tells how it ended",
    ]


# ---------------------------------------------------------------------------------------- a real Slurm

# Like the supervisor: on USR1 it saves, which here takes until the file `saved` is there, and ends with 75.
STUB = """
trap 'until [ -e saved ]; do sleep 0.1; done; exit 75' USR1
echo begins
while :; do sleep 0.1; done
"""


@pytest.fixture
def chain(cluster: Cluster, tmp_path: Path) -> tuple[Callable[..., str], Path, Path]:
    """A pretraining that runs until it is told to stop, a conversion after it, and how to steer them."""
    run, hf = tmp_path / "runs" / "base", tmp_path / "runs" / "hf"
    make_job(run, script=STUB, following=(str(job_folder("convert", hf)),))
    make_job(hf, "convert", script="exit 0\n", previous=(str(job_folder("pretrain", run)),))

    def bertscale(*arguments: str, code: int = 0) -> str:
        command = (sys.executable, "-m", "bertscale", *arguments)
        result = cluster.run(*command, check=False, cwd=tmp_path)
        assert result.returncode == code, result.stdout + result.stderr
        return result.stdout + result.stderr

    return bertscale, run, hf


@pytest.mark.slurm
def test_resume_cancel_resume(
    cluster: Cluster, chain: tuple[Callable[..., str], Path, Path], tmp_path: Path
) -> None:
    bertscale, run, hf = chain
    job, hf_job = run / "job", job_folder("convert", hf)
    (job / "cancelled").touch()
    assert "is not queued or running: nothing to cancel" in bertscale("cancel", "runs/base")
    bertscale("resume", "runs/base")
    assert not (job / "cancelled").exists()
    first = history.slurm_ids(read_events(job / "events.jsonl"))[-1]
    second = history.slurm_ids(read_events(hf_job / "events.jsonl"))[-1]
    cluster.wait(first, "RUNNING")
    wait_for_line(job, first, "begins")
    reports = {report["name"]: report for report in json.loads(bertscale("status", "--json"))}
    assert (reports["base"]["state"], reports["base"]["source"]) == ("running", "squeue")
    assert reports["hf"]["why"] == f"the job before it has not ended (job {first})"
    assert f"job {first} of runs/base is running" in bertscale("resume", first, code=2)

    said = bertscale("cancel", "runs/base").splitlines()
    assert said[0] == f"job {second}, convert of runs/hf, was taken out of the queue"
    assert said[1].startswith(f"job {first}, pretrain of runs/base, on node1 was told to save and end")
    assert said[2] == "to resume later: bertscale resume runs/base"
    assert "ending" in bertscale("status")
    assert "about to end" in bertscale("resume", "runs/base", code=2)
    (tmp_path / "saved").touch()
    cluster.wait(first, "FAILED")
    assert cluster.job(first)["ExitCode"] == "75:0"  # it had its time: no kill cut the saving short
    assert cluster.job(second)["JobState"] == "CANCELLED"
    assert [report["state"] for report in json.loads(bertscale("status", "--json"))] == ["cancelled"] * 2

    bertscale("resume", "runs/base", "--only")
    third = history.slurm_ids(read_events(job / "events.jsonl"))[-1]
    cluster.wait(third, "RUNNING")
    wait_for_line(job, third, "begins")
    assert f"job {third}, pretrain of runs/base, was ended" in bertscale("cancel", third, "--now")
    cluster.wait(third, "CANCELLED")
    assert "is not done: bertscale resume runs/base" in bertscale("resume", "runs/hf", code=2)
    (job / "done.json").write_text("{}")
    assert "runs/base is done already" in bertscale("resume", "runs/base", "--only")
    bertscale("resume", "runs/hf")
    cluster.wait(history.slurm_ids(read_events(hf_job / "events.jsonl"))[-1], "COMPLETED")


@pytest.mark.slurm
def test_status_while_slurmctld_is_down(
    cluster: Cluster, chain: tuple[Callable[..., str], Path, Path]
) -> None:
    bertscale, run, _ = chain
    bertscale("resume", "runs/base", "--only")
    number = history.slurm_ids(read_events(run / "job" / "events.jsonl"))[-1]
    cluster.wait(number, "RUNNING")
    cluster.fault("kill-ctld")
    text = bertscale("status", "runs/base")
    assert f"queued as job {number}" in text
    assert "does not answer" in text
    assert "does not answer" in bertscale("cancel", "runs/base", code=2)
    assert not (run / "job" / "cancelled").exists()
    cluster.fault("start-ctld")


def wait_for_line(job: Path, number: str, line: str) -> None:
    log = job / "logs" / f"slurm-{number}.out"
    deadline = time.monotonic() + 30
    while not log.is_file() or line not in log.read_text().splitlines():
        assert time.monotonic() < deadline, f"{log} lacks {line!r}"
        time.sleep(0.1)
