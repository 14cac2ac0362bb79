"""The supervisor inside a Slurm job: the loop of launcher.supervise over Slurm steps on this job's nodes.

python -m launcher.watch JOB_FOLDER -- srun ...    # the last line of a batch script

It leaves nodes out that are down or fail their check, requeues the job when a signal (time limit,
pre-emption) has stopped it, and ends the pipeline when it gives up. Exit codes: bertscale.errors.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import socket
import subprocess
import sys
import time
from collections import Counter
from datetime import datetime
from pathlib import Path
from typing import Any

from bertscale.errors import (
    CRASH_LOOP,
    FAULT,
    INTERRUPTED,
    MISTAKE,
    STOPPED_AND_SAVED,
    TOO_FEW_NODES,
    UserError,
)
from bertscale.files import write_json
from bertscale.run_folder import (
    CANCELLED,
    EVENTS,
    GUARD_LOG,
    JOB_SPEC,
    PREP_WORK,
    Events,
    attempt_number,
    done_marks,
    newest_step,
    read_events,
)
from launcher import slurm
from launcher.enqueue import queue
from launcher.job import TRAINING, JobSpec
from launcher.nodes.check import bad_nodes, check_nodes, nodes_alive, remember_bad
from launcher.nodes.step import NOT_BEGUN, OF_JOB
from launcher.rank_groups import SlurmStep
from launcher.ranks import job_port
from launcher.supervise import Limits, StopRequests, new_attempt, supervise

RETRY_SECONDS = 2.0  # between two questions to a controller that does not answer
END_SECONDS = 900.0  # until Slurm has ended a job that it said it would
SIGNAL_EARLY_SECONDS = 90.0
GUARD_END_SECONDS = 5.0  # for its srun to end
SAVE_SHARE = 0.8  # of the seconds between the signal and the time limit; the rest is for the requeue


def main(arguments: list[str]) -> int:
    """Runs the job of the folder `arguments`[0] to its end; returns the exit code of the batch script."""
    if len(arguments) < 3 or arguments[1] != "--":
        print("usage: python -m launcher.watch JOB_FOLDER -- srun ...", file=sys.stderr)
        return MISTAKE
    with StopRequests() as stop:  # first of all: until here the script ignores USR1
        folder = Path(arguments[0])
        try:
            spec = JobSpec.from_json((folder / JOB_SPEC).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            print(f"{folder / JOB_SPEC} cannot be read ({error}); submit the run again", file=sys.stderr)
            return MISTAKE
        job = Job(spec, arguments[2:], stop)
        try:
            return job.run()
        except UserError as error:
            return job.give_up(MISTAKE, str(error))
        finally:
            job.end_guard()


class TooFewNodesError(Exception):
    """Too few nodes are sound; `bad`: nodes that failed their check, each with the reason."""

    def __init__(self, message: str, bad: dict[str, str]) -> None:
        super().__init__(message)
        self.bad = bad


class Job:
    """This Slurm job, or this task of an array: its nodes, its place in the queue, its marks on the disk."""

    def __init__(self, spec: JobSpec, command: list[str], stop: StopRequests) -> None:
        env = os.environ
        self.spec, self.command, self.stop = spec, command, stop
        self.folder = Path(spec.folder)
        self.number = env["SLURM_JOB_ID"]
        self.index = env.get("SLURM_ARRAY_TASK_ID", "") if spec.array else ""
        # The number alone would mean the whole array where it is also the number of this task.
        self.name = f"{env['SLURM_ARRAY_JOB_ID']}_{self.index}" if self.index else self.number
        self.events = Events(self.folder / EVENTS, job=self.name)
        self.run_folder = Path(spec.target) if spec.stage in TRAINING else None
        self.done = self.folder / done_marks(spec.array)[int(self.index or 0)]
        self.nodes = slurm.hosts(env["SLURM_JOB_NODELIST"])  # in the order in which srun fills them
        self.last: SlurmStep | None = None
        self.guard: subprocess.Popen[bytes] | None = None
        self.guard_node = ""
        self.reached = 0  # step of the newest checkpoint when the ranks were last started
        self.replaced: dict[str, str] = {}  # nodes that made room for a spare then, with the reason

    def run(self) -> int:
        """From the first check to the last mark."""
        if self.done.exists():
            print(f"already done: {self.done}")
            return 0
        for folder in self.spec.previous:
            if missing := _unfinished(Path(folder)):
                reason = f"the job before this one, {folder}, is not done: {missing} is missing"
                return self.give_up(FAULT, reason)
        if (self.folder / CANCELLED).exists():
            print("cancelled before it began", flush=True)
            return INTERRUPTED
        spec = self.spec
        limits = Limits(
            start_seconds=spec.start_seconds,
            hang_seconds=spec.hang_seconds if spec.start_seconds else 0,
            restarts=spec.restarts,
            restarts_without_progress=spec.restarts_without_progress,
            save_seconds=SAVE_SHARE * spec.signal_seconds,
        )
        self.began = self.progress()
        try:
            code = supervise(self.start, limits, self.events, self.run_folder, self.stop)
        except TooFewNodesError as error:
            return self.requeue(TOO_FEW_NODES, str(error), error.bad)
        if code == 0:
            self.finish()
            return 0
        if code == STOPPED_AND_SAVED or (self.stop.count and code != MISTAKE):
            if code != STOPPED_AND_SAVED and (words := self.too_short()):
                return self.give_up(MISTAKE, words)
            reason = self.stop.name or "SIGTERM to the ranks"
            return self.requeue(INTERRUPTED if code == INTERRUPTED else STOPPED_AND_SAVED, reason)
        return self.give_up(code, f"exit code {code}; what failed is above, and in {self.spec.logs}")

    # ------------------------------------------------------------------------------------- one start

    def start(self) -> SlurmStep:
        """All ranks on sound nodes, as soon as the controller answers. Raises TooFewNodesError."""
        self.wait_until_running()
        if self.last is not None:
            self.last.wait_until_gone()
        spec = self.spec
        if newest_step(self.run_folder) > self.reached:
            self.convict()
        attempt = new_attempt(Path(spec.logs), self.name, self.index)
        nodes = self.choose_nodes(attempt)
        self.reached = reached = newest_step(self.run_folder)
        number = attempt_number(attempt.name)
        restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        self.events.write("started", attempt=attempt.name, nodes=nodes, restart_count=restarts)
        if reached:
            self.events.write("resumed", step=reached)
        ranks = f"{spec.ranks} rank{'s' if spec.ranks > 1 else ''}"
        print(f"{ranks} on {', '.join(nodes)}, logs in {attempt}", flush=True)
        address = {"MASTER_ADDR": _address(nodes), "MASTER_PORT": str(job_port(self.number, number))}
        self.last = SlurmStep(self.command, nodes, spec.ranks, self.number, attempt, address)
        return self.last

    def choose_nodes(self, attempt: Path) -> list[str]:
        """As many nodes as work, of those that Slurm and their check find sound; suspected ones last."""
        alive = nodes_alive(self.nodes)
        bad = {node: "Slurm finds it down or gets no answer" for node in self.nodes if node not in alive}
        failed = check_nodes(self.spec, alive, attempt) if self.spec.node_check and alive else {}
        self.blame_the_job(alive, failed)
        for node, reason in (bad | failed).items():
            print(f"{node} is left out: {reason}", flush=True)
            self.events.write("node_left_out", node=node, reason=reason)
            # When all of them fail, the fault may be the job's.
            if node in failed and self.spec.bad_nodes and len(failed) < len(alive):
                remember_bad(Path(self.spec.bad_nodes), node, reason)
        self.keep_guard(alive)
        suspects = self.last.suspects() if self.last else set()
        first = Counter(event["node"] for event in self.history() if event["event"] == "failed")
        often = {node: times for node, times in first.items() if node and times > 1}
        sound = sorted(
            (node for node in alive if node not in failed),
            key=lambda node: (node in suspects, often.get(node, 0)),
        )
        if len(sound) < self.spec.nodes:
            words = f"{len(sound)} of {len(self.nodes)} nodes are sound, and {self.spec.nodes} are needed"
            raise TooFewNodesError(words, failed)
        self.replaced = {
            node: f"its ranks failed first in {often[node]} starts"
            for node in sound[self.spec.nodes :]
            if node in often
        }
        for node, reason in self.replaced.items():
            print(f"{node} is left out: {reason}", flush=True)
            self.events.write("node_left_out", node=node, reason=reason)
        return [node for node in self.nodes if node in sound[: self.spec.nodes]]

    def convict(self) -> None:
        """Remembers the nodes without which the job has come further: the fault was theirs."""
        for node, reason in self.replaced.items():
            if self.spec.bad_nodes:
                remember_bad(Path(self.spec.bad_nodes), node, reason)
        self.replaced = {}

    def keep_guard(self, alive: list[str]) -> None:
        """Has a process on another node miss this one, if the job may outlive the loss of its batch host."""
        here = os.environ.get("SLURMD_NODENAME", self.nodes[0])
        others = [node for node in alive if node != here]
        watched = self.guard is not None and self.guard.poll() is None and self.guard_node in alive
        if not self.spec.spares or watched or not others:
            return
        self.end_guard()
        self.guard_node = others[-1]
        shape = ["--nodes=1", "--ntasks=1", "--ntasks-per-node=1", "--cpus-per-task=1"]
        shape.append(f"--nodelist={self.guard_node}")
        step = ["srun", *shape, "--job-name=guard", "--overlap", "--no-kill", "--export=ALL"]
        command = [self.spec.batch_python, "-m", "launcher.guard", str(self.folder), self.name, here]
        with open(Path(self.spec.logs, GUARD_LOG), "ab") as log:
            self.guard = subprocess.Popen(
                [*step, *command], stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def end_guard(self) -> None:
        if self.guard is not None:
            self.guard.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.guard.wait(GUARD_END_SECONDS)

    def blame_the_job(self, alive: list[str], failed: dict[str, str]) -> None:
        """Raises UserError where all nodes fail alike, in a way that the job's python or container may cause:
        other nodes would do no better. One node is enough if nothing ran on it, else another one of before
        counts too, since a job of one node may have met a broken one."""
        reasons = set(failed.values())
        if len(failed) < len(alive) or len(reasons) != 1 or not OF_JOB.match(reason := reasons.pop()):
            return
        before = [event for event in self.history() if event["event"] == "node_left_out"]
        nodes = {*failed, *(str(event.get("node")) for event in before if event.get("reason") == reason)}
        if len(nodes) > 1 or reason.startswith(NOT_BEGUN):
            raise UserError(
                f"{reason.removeprefix(NOT_BEGUN)}: so the check ended on all of {', '.join(sorted(nodes))}; "
                "see to python, container, setup and srun of the cluster file (a container must pass on the "
                "environment, and show the GPUs)"
            )

    def history(self) -> list[dict[str, Any]]:
        """The events of this job, and of those whose place it has taken, since a person queued it."""
        events = read_events(self.events.path)
        queued = [i for i, event in enumerate(events) if event["event"] == "queued"]
        since = events[max((i for i in queued if "succeeds" not in events[i]), default=0) :]
        return [event for event in since if str(event.get("job", "")).partition("_")[2] == self.index]

    # -------------------------------------------------------------------------------- the job in Slurm

    def wait_until_running(self) -> dict[str, str]:
        """Returns the record of the job when the controller says that it runs; stays until the end when Slurm
        is ending it."""
        said = False
        while True:
            try:
                record = slurm.show_job(self.name) or {}
            except UserError as error:
                if not said:
                    print(f"waiting: {error}", file=sys.stderr, flush=True)
                said = True
                time.sleep(RETRY_SECONDS)
                continue
            if record.get("JobState") in ("RUNNING", "CONFIGURING"):
                return record
            state = record.get("JobState", "unknown")
            print(f"Slurm is ending this job ({state})", file=sys.stderr, flush=True)
            time.sleep(END_SECONDS)
            raise SystemExit(INTERRUPTED)

    def requeue(self, code: int, reason: str, bad: dict[str, str] | None = None) -> int:
        """Has Slurm end this job and queue it again; returns `code` where that is not to be, and where the
        site lets none be requeued, and another one takes its place."""
        if (self.folder / CANCELLED).exists():
            print("cancelled: not requeued", flush=True)
            return code
        reached = self.progress()
        if newest_step(self.run_folder) > self.reached:
            self.convict()
        if self.idle_requeues(reached) > self.spec.restarts:
            last = f"checkpoint after that of step {reached}" if self.run_folder else "progress"
            return self.give_up(CRASH_LOOP, f"no {last} in all requeues")
        record = self.wait_until_running()
        saved = code == STOPPED_AND_SAVED
        self.events.write("requeued", reason=reason, checkpoint=reached, saved=saved)
        refused = "the site lets no job be requeued"
        if record.get("Requeue") != "0":
            print(f"requeued ({reason})", flush=True)
            done = slurm.insist("scontrol", "requeue", self.name, pause=RETRY_SECONDS)
            # Killed by a signal it was granted: Slurm ends what runs in a requeued job, this scontrol too.
            if done.returncode <= 0:
                if bad:
                    self.exclude(list(bad))
                time.sleep(END_SECONDS)
                return code
            refused = slurm.complaint(done)
        try:
            job = self.queue_successor(record, list(bad or ()))
        except UserError as error:
            why = f"job {self.name} cannot be requeued ({refused}), and no other be queued: {error}"
            return self.give_up(code, why)
        print(f"{reason}: job {job} resumes, since {self.name} cannot be requeued ({refused})", flush=True)
        return code

    def queue_successor(self, record: dict[str, str], bad: list[str]) -> str:
        """Queues the same job anew, to begin when this one has ended, and has the next one of the pipeline
        wait for it; its id. Raises UserError."""
        listed = bad_nodes(Path(self.spec.bad_nodes), self.spec.bad_node_hours) if self.spec.bad_nodes else {}
        left_out = record.get("ExcNodeList", "(null)").replace("(null)", "")
        exclude = list(dict.fromkeys([*slurm.hosts(left_out), *listed, *bad]))
        options = [f"--array={self.index}"] if self.index else []
        job = queue(self.spec, [self.name], exclude, *options, succeeds=self.name)
        for folder in self.spec.following[:1]:
            events = [event for event in read_events(Path(folder, EVENTS)) if event["event"] == "queued"]
            with contextlib.suppress(UserError):  # without it that job begins too early, and says so
                waits = str(events[-1]["job"]) if events else ""
                if waits and (next_one := slurm.show_job(waits)):
                    # It says afterany:17(unfulfilled).
                    before = re.sub(r"\(\w*\)", "", next_one.get("Dependency", ""))
                    dependency = ",".join(filter(None, [before, f"afterany:{job}"]))
                    slurm.ask("scontrol", "update", f"JobId={waits}", f"Dependency={dependency}")
        return job

    def progress(self) -> int:
        """What the job can resume: the step of its newest checkpoint, or how much of its input is done."""
        if self.spec.stage == "prep":
            return sum(1 for _ in Path(self.spec.target, PREP_WORK).glob("*.json"))
        return newest_step(self.run_folder)

    def too_short(self) -> str | None:
        """Why the next start would come no further than this one, ended by its time limit; else None."""
        spec = self.spec
        if spec.stage not in ("prep", "convert") or self.progress() > self.began:
            return None
        try:
            record = slurm.show_job(self.name) or {}
            minutes = slurm.minutes_of(record.get("TimeLimit", ""))
            end = datetime.fromisoformat(record["StartTime"]).timestamp() + (minutes or math.inf) * 60
        except (UserError, KeyError, ValueError):
            return None
        # Slurm sends the signal up to a minute too early. Pre-emption sends it too, but at any time.
        if end - time.time() > spec.signal_seconds + SIGNAL_EARLY_SECONDS:
            return None
        what = "the conversion had ended" if spec.stage == "convert" else "a part of it was done"
        return (
            f"its time limit, {record['TimeLimit']}, came before {what}, and there is nothing to resume: "
            f"submit it again with --time {slurm.show_minutes(2 * (minutes or 0))} or more"
        )

    def idle_requeues(self, reached: int) -> int:
        """How often in a row, since a person queued it, the job was requeued with this newest checkpoint."""
        count = 0
        for event in reversed(self.history()):
            if event["event"] == "requeued":
                if event.get("checkpoint") != reached:
                    break
                count += 1
        return count

    def exclude(self, bad: list[str]) -> None:
        """Has Slurm start the requeued job on other nodes; a job can be told so only once it is queued."""
        for _ in range(20):
            with contextlib.suppress(UserError):
                change = f"ExcNodeList={','.join(bad)}"
                done = slurm.ask("scontrol", "update", f"JobId={self.name}", change, check=False)
                if done.returncode == 0:
                    return
            time.sleep(0.5)

    # ------------------------------------------------------------------------------------- its marks

    def finish(self) -> None:
        """Writes the marker that the next job looks for."""
        self.convict()
        write_json(self.done, {"job": self.name, "time": time.time()})
        self.events.write("done")
        print("done", flush=True)

    def give_up(self, code: int, reason: str) -> int:
        """Says why, cancels the jobs that wait for this one, and returns `code`."""
        print(f"bertscale: error: {reason}", file=sys.stderr, flush=True)
        self.events.write("gave_up", reason=reason, code=code, checkpoint=newest_step(self.run_folder))
        for folder in map(Path, self.spec.following):
            queued = [event for event in read_events(folder / EVENTS) if event["event"] == "queued"]
            if queued:
                job = queued[-1]["job"]
                with contextlib.suppress(UserError):
                    slurm.ask("scancel", job, check=False)
                Events(folder / EVENTS).write("cancelled", job=job, reason=f"{self.folder}: {reason}")
                print(f"job {job} of {folder}, which waited for this one, is cancelled", file=sys.stderr)
        return code


def _unfinished(folder: Path) -> str | None:
    """The mark that a job folder lacks, None when it is done."""
    try:
        tasks = JobSpec.from_json((folder / JOB_SPEC).read_text(encoding="utf-8")).array
    except (OSError, ValueError):
        return JOB_SPEC
    return next((mark for mark in done_marks(tasks) if not (folder / mark).exists()), None)


def _address(nodes: list[str]) -> str:
    """The first node by its name, or by Slurm's address of it; none that means "here" to every node."""
    if _leads_away(nodes[0]):
        return nodes[0]
    [record] = slurm.nodes(nodes[0]) or ({},)
    address = record.get("NodeAddr", "")
    if _leads_away(address):
        return address
    if len(nodes) == 1:
        return "127.0.0.1"
    raise UserError(
        f"the ranks cannot find the first of them: here {nodes[0]} is no address of a network, nor is "
        f"NodeAddr, {address or 'unknown to Slurm'}; have DNS or /etc/hosts name the nodes"
    )


def _leads_away(host: str) -> bool:
    try:
        addresses = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM) if host else []
    except OSError:
        return False
    return bool(addresses) and not any(str(entry[4][0]).startswith(("127.", "::1")) for entry in addresses)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
