"""All ranks of one attempt, on this machine or as a Slurm step: started, signalled, ended, asked.

group = LocalRanks(command, 4, attempt)    # or SlurmStep(srun words, ...)
while group.running(): ...
group.exits()
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bertscale.errors import FAULT, STOPPED_AND_SAVED, UserError
from bertscale.run_folder import ATTEMPT_VARIABLE, SLURM_DIGITS, SRUN_LOG, rank_log, rank_report
from launcher import slurm
from launcher.ranks import COPIED, PARENT, REPORT, Exit, describe_exit, free_port
from launcher.records import from_json

GRACE_SECONDS = 5.0  # between SIGTERM and SIGKILL, for the ranks that outlive a failed one
KILL_SECONDS = 20.0  # for srun to kill all ranks
GONE_SECONDS = 30.0  # until Slurm has noted it; of a dead node it knows only after SlurmdTimeout, often 300 s


# ------------------------------------------------------------------------------------ on this machine


@dataclass(frozen=True)
class Child:
    """A rank on this machine; `report` is the reading end of its pipe."""

    rank: int
    process: subprocess.Popen[bytes]
    report: int


class LocalRanks:
    """Runs `command` as `ranks` processes of this machine.

    Rank 0 writes to this process's stdout, a copy of which `run_as_rank` puts into its log; all other
    output goes to `attempt`/rank-N.log alone. A failed rank is the end of the others: SIGTERM, and SIGKILL
    after GRACE_SECONDS.
    """

    poll_seconds = 0.02
    silent: Sequence[int] = ()  # ranks that wrote no stacks when asked; set by the supervisor

    def __init__(self, command: list[str], ranks: int, attempt: Path) -> None:
        self.ranks, self.attempt = ranks, attempt
        self.died: dict[int, float] = {}  # when a rank failed, in seconds since 1970, not later than it did
        self.deadline = float("inf")
        self.asked: set[int] = set()  # ranks that lived when another one's death ended them
        self.last_look = time.time()
        shared = {
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            ATTEMPT_VARIABLE: str(attempt.absolute()),
            PARENT: str(os.getpid()),
            "PYTHONUNBUFFERED": "1",  # a rank that is killed has still written its log
        }
        defaults = {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // ranks))}
        if sys.platform == "linux":
            defaults["GLOO_SOCKET_IFNAME"] = "lo"  # gloo else looks up the host name, which may lead nowhere
        self.children = []
        for rank in range(ranks):
            reading, writing = os.pipe()
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), REPORT: str(writing)}
            if rank == 0:
                place[COPIED] = "1"
            with open(self.log(rank), "ab") as log:
                process = subprocess.Popen(
                    command,
                    env=defaults | dict(os.environ) | shared | place,
                    stdin=subprocess.DEVNULL,
                    stdout=None if rank == 0 else log,
                    stderr=log,
                    pass_fds=[writing],
                    start_new_session=True,  # Ctrl-C of the terminal is for this process alone
                )
            os.close(writing)
            self.children.append(Child(rank, process, reading))
        self.alive = list(self.children)

    def log(self, rank: int) -> Path:
        """The file that takes a rank's stderr."""
        return rank_log(self.attempt, rank)

    def node(self, rank: int) -> str:
        """Name of the machine of a rank, empty when there is only one."""
        return ""

    def running(self) -> bool:
        """Whether any rank still runs."""
        look = time.time()
        for child in list(self.alive):
            code = child.process.poll()
            if code is not None:
                self.alive.remove(child)
                if code not in (0, STOPPED_AND_SAVED):
                    self.died[child.rank] = self.last_look
        self.last_look = look
        if self.died and self.deadline == float("inf"):
            self.deadline = time.monotonic() + GRACE_SECONDS
            self.asked = {child.rank for child in self.alive}
            self._send(signal.SIGTERM)
        if time.monotonic() > self.deadline:
            self._send(signal.SIGKILL)
        return bool(self.alive)

    def ask_to_save(self) -> None:
        """Sends the signal at which ranks finish the training step, save and exit with STOPPED_AND_SAVED."""
        self._send(signal.SIGTERM)

    def ask_for_stacks(self) -> None:
        """Has every rank write the stacks of its threads to its log."""
        self._send(signal.SIGUSR2)

    def kill(self) -> None:
        """Ends what still runs, stopped processes too, and returns when it is gone."""
        self._send(signal.SIGKILL)
        for child in self.alive:
            child.process.wait()
        self.running()

    def exits(self) -> list[Exit]:
        """After the end: every rank that did not exit with 0."""
        failed = []
        for child in self.children:
            rank, code = child.rank, child.process.returncode
            died = self.died.get(rank, self.last_look)
            ended = describe_exit(rank, "", code, died, child.report, self.log(rank))
            os.close(child.report)
            if code:
                failed.append(dataclasses.replace(ended, asked=rank in self.asked and code < 0))
        return failed

    def _send(self, number: signal.Signals) -> None:
        for child in self.alive:
            child.process.send_signal(number)


# ------------------------------------------------------------------------------- a step of a Slurm job


class SlurmStep:
    """The words of `command`, `srun` first, on `nodes`; each task is a launcher.rank with `variables`.

    The first rank's stdout comes out at srun's, which is this process's; what srun itself says goes
    to `attempt`/srun.log.
    """

    poll_seconds = 0.1
    silent: Sequence[int] = ()

    def __init__(
        self,
        command: list[str],
        nodes: list[str],
        ranks: int,
        job: str,
        attempt: Path,
        variables: dict[str, str],
    ) -> None:
        self.ranks, self.nodes, self.job, self.attempt = ranks, nodes, job, attempt
        self.missing: list[int] = []  # ranks without a report
        self.dead = ""  # the node that Slurm has lost, if any
        # --overlap: what Slurm still counts of an earlier step, on a node that it has lost, holds no cores.
        inserted = [f"--nodelist={','.join(nodes)}", f"--job-name={attempt.name}", "--overlap"]
        with open(attempt / SRUN_LOG, "ab") as log:
            self.process = subprocess.Popen(
                [command[0], *inserted, *command[1:]],
                env=dict(os.environ) | variables | {ATTEMPT_VARIABLE: str(attempt)},
                stdin=subprocess.DEVNULL,
                stderr=log,
                start_new_session=True,
            )

    def log(self, rank: int) -> Path:
        return rank_log(self.attempt, rank, SLURM_DIGITS)

    def node(self, rank: int) -> str:
        return self.nodes[rank * len(self.nodes) // self.ranks]  # srun fills one node after another

    def running(self) -> bool:
        return self.process.poll() is None

    def ask_to_save(self) -> None:
        self.process.send_signal(signal.SIGUSR1)  # srun passes on USR1 and USR2, and takes TERM for itself

    def ask_for_stacks(self) -> None:
        self.process.send_signal(signal.SIGUSR2)

    def kill(self) -> None:
        # srun kills all tasks at once when it is sent SIGTERM; the controller need not be there for it.
        self.process.terminate()
        try:
            self.process.wait(KILL_SECONDS)
        except subprocess.TimeoutExpired:  # a node does not answer
            self.process.kill()
            self.process.wait()

    def wait_until_gone(self) -> None:
        """Returns when Slurm counts the ended step no more, or after GONE_SECONDS."""
        deadline = time.monotonic() + GONE_SECONDS
        while time.monotonic() < deadline:
            with contextlib.suppress(UserError):  # the controller is away
                listing = slurm.ask("squeue", "--steps", f"--jobs={self.job}", "--noheader", "--format=%i %j")
                steps = [line.split() for line in listing.stdout.splitlines()]
                mine = [step[0] for step in steps if step[1:] == [self.attempt.name]]
                if not mine:
                    return
                slurm.ask("scancel", "--signal=KILL", *mine, check=False)
            time.sleep(0.5)

    def exits(self) -> list[Exit]:
        ended, self.missing = list[Exit](), []
        for rank in range(self.ranks):
            try:
                report = rank_report(self.attempt, rank).read_text(encoding="utf-8")
                ended.append(from_json(Exit, report))
            except (OSError, ValueError):
                self.missing.append(rank)
        code = self.process.returncode
        said = (self.attempt / SRUN_LOG).read_text(encoding="utf-8", errors="replace")
        lost = re.search(r"(?:Node failure on|failed on node) ([\w.-]+)", said)
        if code and lost and lost[1] in self.nodes:
            rank = next(rank for rank in range(self.ranks) if self.node(rank) == lost[1])
            self.dead = lost[1]
            ended.append(Exit(rank, lost[1], code, 0.0, "Slurm has lost its node", said))
        elif code and (said_of := re.search(r"error: ([\w.-]+): task (\d+): (.*)", said)):
            node, rank, how = said_of[1], int(said_of[2]), said_of[3]
            if rank in self.missing and len(self.missing) < self.ranks:  # what srun heard of first
                ended.append(Exit(rank, node, code, 0.0, f"its launcher.rank ended as well: {how}", said))
        failed = [report for report in ended if report.code]
        if failed:
            return failed
        began = any(self.log(rank).exists() for rank in range(self.ranks))
        mistake = None
        if not began and len(self.missing) == self.ranks and (code == 0 or "Exited with exit code" in said):
            what = slurm.task_error(said) if code else "the command of the ranks ended with exit code 0"
            mistake = f"{what}: so no rank has begun; see to python, container and setup of the cluster file"
            code = code or FAULT
        if code:  # no rank began, or all were killed together with their launcher.rank
            reason = f"exit code {code} of srun"
            failed.append(Exit(-1, "", code, time.time(), reason, said, mistake))
        return failed

    def suspects(self) -> set[str]:
        """After the end: nodes that Slurm has lost, or of which nothing was heard while others answered."""
        unheard = set(self.silent or self.missing)
        heard = {self.node(rank) for rank in range(self.ranks) if rank not in unheard}
        named = {self.dead} if self.dead else set()
        return named | (set(self.nodes) - heard if heard else set())


RankGroup = LocalRanks | SlurmStep  # what the supervisor takes: both have the methods of LocalRanks
