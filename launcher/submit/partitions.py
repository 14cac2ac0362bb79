"""Whether a partition can run a job at all: its time limit, its nodes, and what they have.

sbatch takes a job that asks for more time than its partition allows, and lets it wait for ever.

for line in problems(spec, exclude=["node3"]): ...
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence

from bertscale.errors import UserError
from launcher import slurm
from launcher.job import JobSpec

Node = dict[str, str]

AWAY = re.compile(r"DOWN|DRAIN|FAIL|MAINT|RESERVED|NOT_RESPONDING|REBOOT|POWER")


def problems(spec: JobSpec, exclude: Sequence[str]) -> list[str]:
    """One line for each thing that the cluster cannot give; nodes of `exclude` count as not there.

    Raises UserError when Slurm does not answer.
    """
    every = slurm.partitions()
    lines = list(_unreadable(spec))
    names = _partitions_of(spec)
    if not names:
        return [*lines, f"partition: the cluster has no default one; it has {', '.join(every)}"]
    if unknown := [name for name in names if name not in every]:
        return [*lines, f"partition={unknown[0]}: no such partition; the cluster has {', '.join(every)}"]
    # Slurm takes whichever of several partitions can start the job first: one that can is enough.
    return lines + min((list(_partition_problems(spec, every[name], exclude)) for name in names), key=len)


def warnings(spec: JobSpec) -> list[str]:
    """A line where the partition starts no jobs at present."""
    every = slurm.partitions()
    states = {name: every[name].get("State", "") for name in _partitions_of(spec) if name in every}
    if not states or "UP" in states.values():
        return []
    return [f"partition {name} is {state}: jobs wait until it is UP" for name, state in states.items()]


def nodes_away(spec: JobSpec) -> list[str]:
    """The nodes of the job's partitions that take no job now, though they may later: `node3 (IDLE+DRAIN)`."""
    every = slurm.partitions()
    lists = [every[name].get("Nodes", "") for name in _partitions_of(spec) if name in every]
    nodes = {
        node["NodeName"]: node.get("State", "") for node_list in lists for node in slurm.nodes(node_list)
    }
    return [f"{name} ({state})" for name, state in nodes.items() if AWAY.search(state)]


def node_memory(spec: JobSpec) -> int | None:
    """Bytes that the job gets on each node, where that is known."""
    if spec.memory_per_node and (given := slurm.bytes_of(spec.memory_per_node)):
        return given
    try:
        every = slurm.partitions()
        lists = [every[name].get("Nodes", "") for name in _partitions_of(spec) if name in every]
        sizes = [int(node["RealMemory"]) for node_list in lists for node in slurm.nodes(node_list)]
    except UserError:
        return None
    return min(sizes) * 2**20 if sizes else None


def _partitions_of(spec: JobSpec) -> list[str]:
    if spec.partition is not None:
        return spec.partition.split(",")
    return [name for name, record in slurm.partitions().items() if record.get("Default") == "YES"]


def _unreadable(spec: JobSpec) -> Iterator[str]:
    if spec.memory_per_node is not None and slurm.bytes_of(spec.memory_per_node) is None:
        yield f"memory_per_node={spec.memory_per_node} is no size as sbatch reads it, such as 200G"
    minutes = slurm.minutes_of(spec.time) if spec.time is not None else math.inf
    if minutes is None:
        yield f"time={spec.time} is not as Slurm writes it, such as 90 (minutes), 12:00:00 or 1-12 (days)"
    elif minutes * 60 <= spec.signal_seconds:
        yield (
            f"time={spec.time} is no longer than signal_seconds={spec.signal_seconds}, which are kept for "
            "saving; ask for more time, or lower signal_seconds in the cluster file"
        )


def _partition_problems(spec: JobSpec, partition: dict[str, str], exclude: Sequence[str]) -> Iterator[str]:
    name, longest = partition["PartitionName"], partition.get("MaxTime", "UNLIMITED")
    minutes = slurm.minutes_of(spec.time) if spec.time is not None else None
    if minutes is not None and minutes > (slurm.minutes_of(longest) or math.inf):
        yield (
            f"time={spec.time} is more than partition {name} allows ({longest}): the job would never start; "
            "ask for less, since a job that reaches its limit saves, queues itself again and resumes"
        )
    asked = f"nodes={spec.nodes}" + (f" and spares={spec.spares}" if spec.spares else "")
    most = partition.get("MaxNodes", "")
    if most.isdigit() and spec.nodes + spec.spares > int(most):
        yield f"{asked}: partition {name} gives at most {most} nodes to a job"
        return
    every = slurm.nodes(partition.get("Nodes", ""))
    nodes, where = list(every), f"partition {name}"
    if spec.constraint and re.fullmatch(r"[\w.-]+", spec.constraint):  # not an expression of several
        nodes = [node for node in nodes if spec.constraint in node.get("AvailableFeatures", "").split(",")]
        if not nodes:
            yield (
                f"constraint={spec.constraint}: no node of partition {name} has that feature; "
                f"`sinfo --partition={name} --format='%N %f'` shows what they have"
            )
            return
        where += f" with the feature {spec.constraint}"
    for text, need, most_of, unit in _needs(spec):
        best = max(map(most_of, nodes), default=0)
        if need > best:
            yield f"{text}: the nodes of {where} have {best:g} {unit}; ask for less, or another partition"
        else:
            nodes = [node for node in nodes if most_of(node) >= need]
    sound = [node for node in nodes if node["NodeName"] not in exclude]
    if spec.nodes + spec.spares > len(sound):
        missing = [node["NodeName"] for node in nodes if node not in sound]
        left_out = f" but for {','.join(missing)}, left out" if missing else ""
        usable = "1 node" if len(nodes) == 1 else f"{len(nodes)} nodes"
        yield f"{asked}: {where} has {usable} that would do{left_out}; ask for fewer"


def _needs(spec: JobSpec) -> Iterator[tuple[str, float, Callable[[Node], float], str]]:
    """Yields (what is asked of a node, how much, how much a node has, unit)."""
    cores = spec.tasks_per_node * spec.cpus_per_task
    several = f" for each of {spec.tasks_per_node} ranks" if spec.tasks_per_node > 1 else ""
    yield (f"cpus_per_task={spec.cpus_per_task}{several}", cores, lambda node: int(node["CPUTot"]), "cores")
    if spec.gpus_per_node:
        gpus = lambda node: slurm.gpus_of(node.get("Gres", ""))  # noqa: E731
        yield (f"gpus_per_node={spec.gpus_per_node}", spec.gpus_per_node, gpus, "GPUs")
    if spec.memory_per_node and (size := slurm.bytes_of(spec.memory_per_node)):
        text = f"memory_per_node={spec.memory_per_node}"
        yield (text, size / 2**30, lambda node: int(node["RealMemory"]) / 2**10, "GiB")
