"""A Slurm job as data, and the batch script that it is rendered to: a pure function of it.

text = render(spec)    # a script that a person can read, keep and submit by hand
"""

from __future__ import annotations

import dataclasses
import json
import re
import string
from dataclasses import dataclass, field

from bertscale.run_folder import CODE, EVENTS, batch_log_name
from launcher.records import from_json

STAGES = ("prep", "pretrain", "convert", "finetune", "glue")
TRAINING = ("pretrain", "finetune")  # those that ranks make together, with checkpoints


@dataclass(frozen=True)
class JobSpec:
    """Everything that the script and the supervisor inside the job are told; all paths are absolute."""

    stage: str  # one of STAGES, or tasks: those that the job of a pretraining has left
    name: str  # of the job
    folder: str  # the job folder: config, code, script, events
    target: str  # what the stage makes: a run folder or an output folder
    logs: str  # folder of the batch log and of the attempts
    command: tuple[str, ...]  # what a rank runs, after its python: ("-m", "bertscale", "pretrain", ...)
    python: str  # of the ranks
    batch_python: str  # of the supervisor
    version: str  # of the frozen code: "0.1.0, commit 1a2b3c4"
    nodes: int = 1  # that work
    spares: int = 0  # that stand by
    tasks_per_node: int = 1
    cpus_per_task: int = 1
    gpus_per_node: int = 0
    time: str | None = None  # Slurm's notation
    array: int = 0  # tasks of an array, 0: no array
    previous: tuple[str, ...] = ()  # job folders that must be done before this job begins
    following: tuple[str, ...] = ()  # job folders of the pipeline after it, cancelled when it fails
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    memory_per_node: str | None = None
    sbatch: tuple[str, ...] = ()  # further options
    srun: tuple[str, ...] = ()  # further options
    setup: tuple[str, ...] = ()  # shell lines
    environment: dict[str, str] = field(default_factory=dict)
    container: tuple[str, ...] = ()  # words before a rank's command
    signal_seconds: int = 300  # before the time limit
    start_seconds: float = 1800.0  # without a first step: hung; 0: this stage makes no steps
    hang_seconds: float = 600.0
    restarts: int = 20
    restarts_without_progress: int = 2
    node_check: bool = True
    check_seconds: float = 120.0
    min_free_memory_gb: float = 1.0
    min_free_disk_gb: float = 1.0
    min_bandwidth_mb: float = 0.0
    bad_nodes: str | None = None
    bad_node_hours: float = 24.0

    @property
    def ranks(self) -> int:
        """Processes that work together."""
        return self.nodes * self.tasks_per_node

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> JobSpec:
        """Raises ValueError where `text` is no spec."""
        return from_json(cls, text)


def render(spec: JobSpec) -> str:
    """The batch script of `spec`, to be submitted from any folder; a pure function."""
    step = [["exec", spec.batch_python, "-m", "launcher.watch"], *step_lines(spec)]
    supervisor, *words = [" ".join(map(_quote, line)) for line in step]
    return "\n".join(
        [
            "#!/bin/bash",
            f"# {spec.stage} by bertscale {spec.version}; what happens in it: {spec.folder}/{EVENTS}",
            *(f"#SBATCH {_quote(option)}" for option in _sbatch_options(spec)),
            "",
            *spec.setup,
            *(f"export {name}={_quote(value)}" for name, value in spec.environment.items()),
            "",
            "# The code that was submitted, whatever became of the checkout, and wherever a process stands.",
            f"job={_quote(spec.folder)}",
            f'export PYTHONPATH="$job/{CODE}${{PYTHONPATH:+:$PYTHONPATH}}" PYTHONSAFEPATH=1',
            'cd "$job" || exit 1',
            "trap '' USR1 # until the supervisor listens to it",
            " \\\n    ".join([f'{supervisor} "$job" --', *words]),
            "",
        ]
    )


def _sbatch_options(spec: JobSpec) -> list[str]:
    log = batch_log_name("%A_%a" if spec.array else "%j")
    values = {
        "--job-name": spec.name,
        "--comment": f"bertscale {spec.folder}",
        "--partition": spec.partition,
        "--account": spec.account,
        "--qos": spec.qos,
        "--constraint": spec.constraint,
        "--array": f"0-{spec.array - 1}" if spec.array else None,
        "--nodes": str(spec.nodes + spec.spares),
        "--ntasks-per-node": str(spec.tasks_per_node),
        "--cpus-per-task": str(spec.cpus_per_task),
        "--gpus-per-node": str(spec.gpus_per_node) if spec.gpus_per_node else None,
        "--mem": spec.memory_per_node,
        "--time": spec.time,
        "--signal": f"B:USR1@{spec.signal_seconds}",
        "--output": f"{spec.logs.replace('%', '%%')}/{log}",
        "--open-mode": "append",
    }
    options = [f"{name}={value}" for name, value in values.items() if value is not None]
    # The site's own come last: where an option is given twice, sbatch and srun take the second.
    return [*options, "--requeue", *(["--no-kill"] if spec.spares else []), *spec.sbatch]


def step_lines(spec: JobSpec) -> list[list[str]]:
    """The words of the srun command that starts all ranks of one attempt, as the script's lines have them."""
    # Said again, since srun does not inherit all of it (--cpus-per-task), and a step has no spares.
    shape = [
        f"--nodes={spec.nodes}",
        f"--ntasks={spec.ranks}",
        f"--ntasks-per-node={spec.tasks_per_node}",
        f"--cpus-per-task={spec.cpus_per_task}",
        *([f"--gpus-per-node={spec.gpus_per_node}"] if spec.gpus_per_node else []),
    ]
    # No --no-kill for a step: it would switch these two off.
    end = ["--kill-on-bad-exit=1", "--wait=60"]
    lines = [
        ["srun", *shape],
        # Whatever of the environment sbatch was told to pass on, what the script sets is for the ranks.
        [*end, "--export=ALL", *spec.srun],
        [*spec.container],
        [spec.python, "-m", "launcher.rank"],
        [spec.python, *spec.command],
    ]
    return [line for line in lines if line]


PLAIN = frozenset(string.ascii_letters + string.digits + "@%+=:,./_-")


def _quote(word: str) -> str:
    """Quotes `word` for bash, and for an #SBATCH line, where sbatch knows double quotes and backslashes."""
    if word and PLAIN.issuperset(word):
        return word
    option = re.match(r"--[a-z-]+=", word)
    name = option.group() if option else ""
    return name + '"' + re.sub(r'(["\\$`])', r"\\\1", word[len(name) :]) + '"'
