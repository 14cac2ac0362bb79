"""Asking Slurm: one command at a time, its answer as plain values, its errors as sentences.

print(partitions()["main"]["MaxTime"], len(nodes("node[1-4]")))
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import subprocess
import time

from bertscale.errors import UserError

MARK = "bertscale "  # a job's comment is this and its job folder
# What a shell inside a job or of torchrun would pass on, and what sbatch heeds before the script's lines.
FOREIGN = re.compile(
    r"SLURM_(?!CONF$)|SLURMD_|SRUN_|SBATCH_|PMI|BERTSCALE_|LOCAL_|(RANK|WORLD_SIZE|MASTER_ADDR|MASTER_PORT)$"
)
FORMATS = ("SQUEUE_", "SACCT_", "SINFO_", "SLURM_TIME_FORMAT")  # a person's own taste changes what is read
SECONDS = 60  # for an answer; a busy controller takes its time

_SUFFIXES = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def ask(
    *command: str, check: bool = True, text: str = "", env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs a Slurm command with `text` on its stdin, in `env` or in this environment without FORMATS.

    Raises UserError where Slurm is not installed or does not answer, and, with `check`, where it refuses.
    """
    env = env or {name: value for name, value in os.environ.items() if not name.startswith(FORMATS)}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, input=text, env=env)
    except FileNotFoundError:
        raise UserError(
            f"{command[0]} is not installed here: this needs a login node of the cluster "
            "(Debian's packages are slurm-wlm and munge)"
        ) from None
    except subprocess.TimeoutExpired:
        raise UserError(_silent(f"no answer to {command[0]} within {SECONDS} s")) from None
    if done.returncode:
        said = complaint(done)
        if re.search(r"Unable to contact|configuration (source|file)|[Cc]onnection|timed out", said):
            raise UserError(_silent(said))
        if check:
            raise UserError(f"{' '.join(command)}: {said}")
    return done


def own_environment() -> dict[str, str]:
    """The variables of this shell without those that speak of another job or change what a script says."""
    return {name: value for name, value in os.environ.items() if not FOREIGN.match(name)}


def insist(*command: str, pause: float) -> subprocess.CompletedProcess[str]:
    """As `ask` without a check, again and again, `pause` seconds apart, until the controller answers."""
    while True:
        with contextlib.suppress(UserError):
            return ask(*command, check=False)
        time.sleep(pause)


def complaint(done: subprocess.CompletedProcess[str]) -> str:
    """What a Slurm command wrote to stderr, as one line without its prefixes."""
    lines = [re.sub(r"^\w+: (error: |fatal: )?", "", line) for line in done.stderr.splitlines()]
    return "; ".join(dict.fromkeys(filter(None, lines))) or f"exit code {done.returncode}"


def task_error(said: str) -> str:
    """The last line of what the tasks of a step wrote, from all that its srun wrote; else srun's own.

    Slurm says afterwards that the tasks have failed: that is not the reason.
    """
    lines = [line.strip() for line in said.splitlines() if line.strip() and not line.startswith('Try "srun')]
    of_tasks = [line for line in lines if not re.match(r"srun: |slurmstepd\S*: .*\*\*\*", line)]
    last = (of_tasks or lines or ["srun ended without a message"])[-1]
    return re.sub(r"^slurmstepd\S*: error: ", "", last)


def _silent(said: str) -> str:
    return f"the Slurm controller does not answer ({said}): try again; `scontrol ping` tells whether it is up"


def show_job(job: str) -> dict[str, str] | None:
    """Slurm's record of a job that waits, runs or ended a short while ago; None for any other."""
    done = ask("scontrol", "show", "job", "--oneliner", job, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("JobId=")]
    return _record(lines[0]) if done.returncode == 0 and lines else None


def show_jobs() -> list[dict[str, str]]:
    """Slurm's records of all jobs that wait, run or ended a short while ago."""
    lines = ask("scontrol", "show", "job", "--oneliner", check=False).stdout.splitlines()
    return [_record(line) for line in lines if line.startswith("JobId=")]


@functools.cache
def partitions() -> dict[str, dict[str, str]]:
    """Every partition by its name, with Slurm's own words: MaxTime, MaxNodes, Nodes, State, Default."""
    lines = ask("scontrol", "show", "partition", "--oneliner").stdout.splitlines()
    records = [_record(line) for line in lines if line.startswith("PartitionName=")]
    return {record["PartitionName"]: record for record in records}


@functools.cache
def nodes(node_list: str) -> tuple[dict[str, str], ...]:
    """The nodes of `node_list`: NodeName, CPUTot, RealMemory (MiB), Gres, State, AvailableFeatures."""
    if node_list in ("", "(null)"):
        return ()
    lines = ask("scontrol", "show", "node", "--oneliner", node_list).stdout.splitlines()
    return tuple(_record(line) for line in lines if line.startswith("NodeName="))


def is_down(node: str) -> bool:
    """Whether Slurm has given up a node; asked anew each time. False where it gives no answer.

    Not by sinfo, which shows but one state of several: COMPLETING for a node that is down as well.
    """
    try:
        said = ask("scontrol", "show", "node", "--oneliner", node, check=False).stdout
    except UserError:
        return False
    return any(_record(line).get("State", "").startswith("DOWN") for line in said.splitlines())


def hosts(node_list: str) -> list[str]:
    """The hosts of a node list: `gpu[1-2],cpu7` -> gpu1, gpu2, cpu7."""
    if "[" not in node_list:
        return [host for host in node_list.split(",") if host]
    # Each on a line of its own, and none of them what a site's scontrol may say besides.
    said = ask("scontrol", "show", "hostnames", node_list).stdout
    return [line for line in said.splitlines() if re.fullmatch(r"[\w.-]+", line)]


def _record(line: str) -> dict[str, str]:
    """Reads `A=1 B=two words C=3` as a dictionary: a value extends to the next word with an equals sign."""
    return dict(re.findall(r"(\w[\w:/]*)=(.*?)(?=\s+\w[\w:/]*=|\s*$)", line))


def gpus_of(gres: str) -> int:
    """The number of GPUs in Slurm's Gres: `gpu:h100:8(S:0-1),nvme:1` -> 8, `gpu:a100:no_consume:4` -> 4."""
    return sum(int(count) for count in re.findall(r"\bgpu:(?:[^:,()]+:)*(\d+)", gres))


def minutes_of(time: str) -> float | None:
    """Minutes of a time limit as sbatch reads it; infinite for UNLIMITED, None for no such thing.

    Forms (man sbatch): M, M:S, H:M:S, D-H, D-H:M, D-H:M:S.
    """
    if time.upper() in ("UNLIMITED", "INFINITE"):
        return float("inf")
    fields = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time)
    if fields is None:
        return None
    days, *rest = fields.groups()
    first, second, third = (int(part or 0) for part in rest)
    if days is not None:
        return int(days) * 1440 + first * 60 + second + third / 60
    return first + second / 60 if rest[2] is None else first * 60 + second + third / 60


def show_minutes(minutes: float) -> str:
    """A time limit as sbatch reads it: 90 -> 1:30:00, 2880 -> 2-00:00:00."""
    days, rest = divmod(round(minutes), 1440)
    return f"{f'{days}-' if days else ''}{rest // 60:0{2 if days else 1}d}:{rest % 60:02d}:00"


def bytes_of(memory: str) -> int | None:
    """Bytes of a memory size as sbatch --mem reads it (`200G`; MiB by default); None for no such thing."""
    size = re.fullmatch(r"(\d+)([KMGT]?)B?", memory.upper())
    return int(size[1]) * _SUFFIXES[size[2] or "M"] if size else None
