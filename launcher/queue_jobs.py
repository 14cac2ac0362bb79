"""What Slurm says of jobs, from squeue, sacct or scontrol, read into one form and put into words.

jobs = own_jobs()      # all that are queued or running, from squeue
job = other_job("17")  # one that is not among them: sacct, else scontrol show job
"""

from __future__ import annotations

import contextlib
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from bertscale.errors import UserError
from bertscale.progress import show_duration
from bertscale.run_folder import SCRIPT, is_job_folder
from launcher import slurm

SQUEUE = ("squeue", "--me", "--noheader", "--format=%i|%T|%D|%N|%S|%e|%E|%r|%k")
SACCT_FORMAT = "--format=JobID,State,NNodes,NodeList,Start,End,ExitCode,Reason"
SACCT = ("sacct", "--allocations", "--noheader", "--parsable2", SACCT_FORMAT)
# What each of the three answers has, in its order, by the names of QueueJob.
SQUEUE_FIELDS = ("id", "state", "nodes", "node_list", "start", "end", "dependency", "reason", "comment")
SACCT_FIELDS = ("id", "state", "nodes", "node_list", "start", "end", "exit", "reason")
RECORD_FIELDS = {
    "id": "JobId",
    "state": "JobState",
    "nodes": "NumNodes",
    "node_list": "NodeList",
    "start": "StartTime",
    "end": "EndTime",
    "dependency": "Dependency",
    "exit": "ExitCode",
    "reason": "Reason",
    "comment": "Comment",
    "command": "Command",
    "array": "ArrayJobId",
    "task": "ArrayTaskId",
}


@dataclass(frozen=True)
class QueueJob:
    """One job, or some waiting tasks of an array, as Slurm sees it; times in seconds since 1970."""

    id: str  # "17", "17_2" or "17_[0-3]"
    state: str  # Slurm's word: RUNNING
    source: str  # the command that said so
    reason: str = ""  # Slurm's word for why it waits or how it ended
    folder: Path | None = None  # its job folder, from the comment
    nodes: int = 0
    node_list: str = ""  # node[1-4], empty while it waits
    start: float | None = None  # expected, while it waits
    end: float | None = None  # by the time limit, while it runs
    dependency: str = ""
    exit: str = ""  # "7:0" exit code 7, "0:15" signal 15

    @property
    def number(self) -> str:
        """The job id that all tasks of an array share."""
        return self.id.partition("_")[0]

    @property
    def active(self) -> bool:
        """Whether it waits, runs or is being started or ended."""
        return self.state in ACTIVE

    @property
    def waits(self) -> bool:
        return self.state in WAITING


WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD")
RUNNING = (
    "RUNNING",
    "CONFIGURING",
    "COMPLETING",
    "SUSPENDED",
    "STOPPED",
    "SIGNALING",
    "STAGE_OUT",
    "RESIZING",
)
ACTIVE = WAITING + RUNNING


# ------------------------------------------------------------------------------------------ asking


def own_jobs() -> list[QueueJob]:
    """This person's jobs that are queued or running. Raises UserError when Slurm does not answer."""
    return parse_squeue(slurm.ask(*SQUEUE).stdout)


def jobs_of(folder: Path, ids: list[str], queue: list[QueueJob]) -> list[QueueJob]:
    """The jobs of the queue that belong to a job folder which has had `ids`, those that run first.

    Where a job's comment is not ours, but the site's, or a plug-in has taken it away, its id decides.
    """
    of_folder = [
        job
        for job in queue
        if (job.folder.resolve() == folder.resolve() if job.folder else job.number in ids)
    ]
    return sorted(of_folder, key=lambda job: job.waits)


def other_job(number: str, *, controller: bool = True) -> QueueJob | None:
    """A job that has ended, or somebody else's; None when neither sacct nor scontrol knows of it.

    Without `controller` only sacct is asked: its database may answer while the controller is down.
    Raises UserError when the controller does not answer.
    """
    return other_jobs([number], controller=controller).get(number)


def other_jobs(numbers: Sequence[str], *, controller: bool = True) -> dict[str, QueueJob]:
    """As `other_job`, for several jobs, by their numbers; each command is asked once for all of them."""
    found: dict[str, QueueJob] = {}
    if not numbers:
        return found
    with contextlib.suppress(UserError):  # many clusters keep no accounts
        accounted = parse_sacct(slurm.ask(*SACCT, f"--jobs={','.join(numbers)}").stdout)
        found = {job.number: job for job in accounted if job.number in numbers}  # of an array the last task
    unknown = [number for number in numbers if number not in found]
    if controller and len(unknown) == 1:
        if record := slurm.show_job(unknown[0]):
            found[unknown[0]] = from_record(record)
    elif controller and unknown:
        for job in map(from_record, slurm.show_jobs()):
            if job.number in unknown:
                found.setdefault(job.number, job)  # of an array the first task
    return found


def lost_host(job: QueueJob) -> str:
    """The first node of a job that runs on without it (sbatch --no-kill), and so without its supervisor;
    empty where that node is not down. Raises UserError when Slurm does not answer."""
    host = (slurm.show_job(job.id) or {}).get("BatchHost", "") if job.state == "RUNNING" else ""
    return host if host and slurm.is_down(host) else ""


# ----------------------------------------------------------------------------------------- reading


def parse_squeue(text: str) -> list[QueueJob]:
    """Lines of SQUEUE's format; the comment comes last, since only it may hold a `|`."""
    return _rows(text, SQUEUE_FIELDS, "squeue")


def parse_sacct(text: str) -> list[QueueJob]:
    """Lines of SACCT's format; `CANCELLED by 1000` is CANCELLED."""
    return _rows(text, SACCT_FIELDS, "sacct")


def from_record(record: dict[str, str]) -> QueueJob:
    """A job as `scontrol show job` has it; of an array's tasks the first."""
    return _job({name: record.get(key, "") for name, key in RECORD_FIELDS.items()}, "scontrol")


def _rows(text: str, fields: Sequence[str], source: str) -> list[QueueJob]:
    rows = [line.split("|", len(fields) - 1) for line in text.splitlines()]
    return [_job(dict(zip(fields, row, strict=True)), source) for row in rows if len(row) == len(fields)]


def _job(answer: dict[str, str], source: str) -> QueueJob:
    words = defaultdict(str, {name: _given(text) for name, text in answer.items()})
    return QueueJob(
        f"{words['array']}_{words['task']}" if words["array"] else words["id"],
        words["state"].partition(" ")[0].rstrip("+"),
        source,
        reason=words["reason"],
        folder=_folder(words["comment"]) or _folder_of_script(words["command"]),
        nodes=_count(words["nodes"]),
        node_list=words["node_list"],
        start=_seconds(words["start"]),
        end=_seconds(words["end"]),
        dependency=words["dependency"],
        exit=words["exit"],
    )


def _given(text: str) -> str:
    return "" if text in ("(null)", "None", "N/A", "n/a", "None assigned") else text.strip()


def _count(text: str) -> int:
    digits = re.match(r"\d+", text)
    return int(digits[0]) if digits else 0


def _seconds(text: str) -> float | None:
    try:
        return datetime.fromisoformat(text).timestamp()  # Slurm writes local time
    except ValueError:
        return None  # N/A, Unknown


def _folder(comment: str) -> Path | None:
    return Path(comment.removeprefix(slurm.MARK).strip()) if comment.startswith(slurm.MARK) else None


def _folder_of_script(command: str) -> Path | None:
    script = Path(command)
    return script.parent if script.name == SCRIPT and is_job_folder(script.parent) else None


# ---------------------------------------------------------------------------------------- in words

# Slurm's reasons by their beginning, the longer ones first: what they mean, and what a person can do.
DOWN = "sinfo --list-reasons"
REASONS = (
    ("Priority", "jobs of higher priority come first", None),
    ("Resources", "it is next, and the nodes that it needs are still in use", None),
    ("BeginTime", "its begin time is not there yet (a requeued job waits for two minutes)", None),
    ("DependencyNeverSatisfied", "the job that it waits for failed, so it can never begin", "cancel"),
    ("Dependency", "the job before it has not ended", None),
    ("ReqNodeNotAvail", "nodes that it needs are down, drained or reserved", DOWN),
    ("Nodes required for job are DOWN", "too few nodes are up: some are down or drained", DOWN),
    ("NodeDown", "a node that it needs is down", DOWN),
    ("PartitionTimeLimit", "it asks for more time than the partition allows", "shorter"),
    ("PartitionNodeLimit", "it asks for more nodes than the partition allows, or has", "fewer"),
    ("PartitionDown", "its partition takes jobs but starts none at present", "sinfo"),
    ("PartitionInactive", "its partition takes and starts no jobs at present", "sinfo"),
    ("PartitionConfig", "it asks for what its partition cannot give", "sinfo"),
    ("BadConstraints", "no node has what it asks for", "sinfo"),
    ("ReservationDeleted", "the reservation that it was meant for is gone", "cancel"),
    ("Reservation", "its reservation has not begun", None),
    ("Licenses", "it waits for a licence", None),
    ("JobArrayTaskLimit", "as many tasks of its array run as may at once", None),
    ("JobHeldUser", "it is held by its owner", "release"),
    ("JobHeldAdmin", "it is held by an administrator of the cluster, or its start failed", "release"),
    ("job requeued in held state", "it was requeued and held", "release"),
    ("launch failed requeued held", "it could not be started on its nodes, and is held", "release"),
    ("QOSMaxWallDurationPerJobLimit", "it asks for more time than its quality of service allows", "shorter"),
    ("QOSMaxNodePerJobLimit", "it asks for more nodes than its quality of service allows", "fewer"),
    ("QOSUsageThreshold", "its quality of service has used up its share", None),
    ("QOSMax", "the limit of its quality of service for one person or job is reached", None),
    ("QOSGrp", "the jobs of its quality of service fill the limit that they share", None),
    ("QOSMin", "it asks for less than its quality of service demands", "cancel"),
    ("QOSNotAllowed", "its account or partition may not use this quality of service", "cancel"),
    ("QOS", "a limit of its quality of service holds it back", None),
    ("AssocMaxWallDurationPerJobLimit", "it asks for more time than the account allows", "shorter"),
    ("AssocMaxNodePerJobLimit", "it asks for more nodes than the account allows", "fewer"),
    ("AssocGrpCPUMinutesLimit", "the account has used up its core hours", None),
    ("AssocGrp", "the jobs of its account fill the limit that they share", None),
    ("AssocMax", "the account's limit for one person or job is reached", None),
    ("AssociationJobLimit", "the account's limit of jobs is reached", None),
    ("Assoc", "a limit of the account holds it back", None),
    ("MaxCpuPerAccount", "the account's limit of cores is reached", None),
    ("MaxGRESPerAccount", "the account's limit of GPUs is reached", None),
    ("InvalidAccount", "its account is unknown", "cancel"),
    ("InvalidQOS", "its quality of service is unknown", "cancel"),
    ("AccountNotAllowed", "its partition is not open to its account", "cancel"),
    ("DeadLine", "it can no longer end before its deadline", "cancel"),
    ("Prolog", "its nodes are being prepared", None),
    ("Cleaning", "what its last start has left on the nodes is being removed", None),
    ("SchedDefer", "the scheduler looks at it at its next turn", None),
    ("JobLaunchFailure", "it could not be started on its nodes", "release"),
    ("FedJobLock", "the clusters of a federation agree on where it runs", None),
    ("None", "it was queued a moment ago", None),
)

NO_START = "53"  # Slurm's word in the place of a signal: the batch script was never begun

# How a job ended, by Slurm's state.
ENDINGS = {
    "COMPLETED": "it ended with exit code 0",
    "FAILED": "it failed",
    "CANCELLED": "it was cancelled",
    "TIMEOUT": "its time limit came before it had ended",
    "NODE_FAIL": "a node failed",
    "OUT_OF_MEMORY": "it ran out of memory",
    "PREEMPTED": "a job of higher priority took its nodes",
    "BOOT_FAIL": "a node did not boot",
    "DEADLINE": "it could not end before its deadline",
    "REVOKED": "another cluster of the federation took it",
}


def why(job: QueueJob) -> tuple[str, str | None]:
    """Why a waiting job waits, in words, and the command that a person can try, if any."""
    reason = job.reason.replace("_", " ")
    known = next((row for row in REASONS if (reason or "None").startswith(row[0])), None)
    if known is None:
        return f"Slurm's reason is {job.reason}", None
    beginning, sentence, remedy = known
    waited_for = re.findall(r":(\d+)", job.dependency)
    if beginning == "Dependency" and waited_for:
        sentence += f" (job {', '.join(waited_for)})"
    unavailable = re.search(r"UnavailableNodes:(\S+)", reason)
    if unavailable:
        sentence += f"; not available: {unavailable.group(1)}"
    if remedy == "release":
        remedy = f"scontrol release {job.number}"
    return sentence, remedy


def in_words(job: QueueJob, now: float) -> str:
    """The state of one job in one sentence: `job 17 runs on 4 nodes (node[1-4]) for 1:02:03`."""
    if job.waits:
        expected = f"; expected to start {show_time(job.start, now)}" if job.start and job.start > now else ""
        return f"job {job.id} waits: {why(job)[0]}{expected}"
    if job.active:
        verb = {
            "CONFIGURING": "is being started",
            "COMPLETING": "is ending",
            "SUSPENDED": "is suspended",
            "STOPPED": "is stopped",
        }.get(job.state, "runs")
        since = f" for {show_duration(now - job.start)}" if job.start else ""
        return f"job {job.id} {verb} on {show_nodes(job)}{since}"
    ending = ENDINGS.get(job.state, f"Slurm's state is {job.state}")
    code, _, number = job.exit.partition(":")
    if job.state == "FAILED" and (code or "0") != "0":
        ending += f" with exit code {code}"
    elif job.state == "FAILED" and number == NO_START:
        ending += ": Slurm could not start it, perhaps since its log folder is not there on the node"
    elif job.state == "FAILED" and (number or "0") != "0":
        ending += f" by signal {number}"
    when = f" {show_time(job.end, now)}" if job.end else ""
    return f"job {job.id} has ended{when}: {ending}"


def show_nodes(job: QueueJob) -> str:
    """The nodes in words: `4 nodes (node[1-4])`, `node1`."""
    if job.nodes == 1 and job.node_list:
        return job.node_list
    return f"{job.nodes} nodes" + (f" ({job.node_list})" if job.node_list else "")


def show_time(seconds: float, now: float) -> str:
    """A time in words: `at 14:05` on the day of `now`, else `on 24 Dec at 14:05`, local time."""
    then = datetime.fromtimestamp(seconds)
    same_day = then.date() == datetime.fromtimestamp(now).date()
    return f"{then:at %H:%M}" if same_day else f"on {then.day} {then:%b at %H:%M}"
