"""Is each node of an allocation fit to work? Asked before ranks start on it, and remembered for a while.

faults = check_nodes(spec, ["node1", "node2", "node3"], folder)   # {"node2": "0.2 GB free in /tmp, ..."}

One srun step starts launcher.nodes.measure on every node. Each connects to this process, so that nothing
hangs on a shared file system or on the name of a host, measures itself, and then exchanges data with one
other node at a time: an all-reduce over two nodes, since one over all fails without telling whose fault it
was. Two that manage it are both proven. One that fails is tried again, with a proven node as soon as there is
one, so that a sound node does not pay for its neighbour.
"""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from bertscale.run_folder import append_line, read_lines
from launcher.job import JobSpec
from launcher.nodes.step import Check

RESERVE_SECONDS = 8.0  # of spec.check_seconds, to end the step and to clear it away
ASK_SECONDS = 30.0  # until Slurm is taken to be silent
DEAD = ("down", "fail", "unk", "boot", "power", "reboot")  # beginnings of node states


# -------------------------------------------------------------------------------------- Slurm's opinion


def nodes_alive(nodes: Sequence[str]) -> list[str]:
    """Those of `nodes` that Slurm does not call dead; all of them where Slurm gives no answer."""
    states = node_states(nodes)
    return [node for node in nodes if _usable(states.get(node, ""))]


def node_states(nodes: Sequence[str]) -> dict[str, str]:
    """Slurm's state of each node, such as "mixed" or "down*"; empty where Slurm gives no answer."""
    command = ["sinfo", "--noheader", "--all", "--Node", f"--nodes={','.join(nodes)}", "--format=%N %T"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=ASK_SECONDS)
    except (OSError, subprocess.SubprocessError):
        return {}
    # A node stands there once for each partition that it is in.
    return dict(line.split() for line in done.stdout.splitlines() if len(line.split()) == 2)


def _usable(state: str) -> bool:
    # "*": it does not respond. A draining node still works for the jobs that it has.
    return not state.endswith("*") and not state.startswith(DEAD)


# ------------------------------------------------------------------------------------------ the check


def check_nodes(spec: JobSpec, nodes: Sequence[str], folder: Path) -> dict[str, str]:
    """Returns {node: reason} for those `nodes` that are not fit for `spec`; needs at most spec.check_seconds.

    Runs inside the allocation. What each node measured is kept in a new folder `folder/check`, `check-2`...
    Where every node is named, the fault is more likely the job's (its python, its container) than theirs:
    do not remember them as bad.
    """
    end = time.monotonic() + max(spec.check_seconds - RESERVE_SECONDS, spec.check_seconds / 2)
    states = node_states(nodes)
    faults = {node: f"Slurm calls it {states[node]}" for node in nodes if not _usable(states.get(node, ""))}
    left = [node for node in nodes if node not in faults]
    while left:
        verdicts = asyncio.run(Check(spec, left, _new_folder(folder), end).run())
        faults |= {node: reason for node, reason in verdicts.items() if reason}
        unknown = [node for node, reason in verdicts.items() if reason is None]
        if unknown and len(unknown) < len(left) and time.monotonic() < end:
            # srun ends the whole step when one node cannot be reached: the others go again.
            left = [node for node in left if node not in faults]
        else:
            faults |= dict.fromkeys(unknown, "its check was ended before it was through")
            break
    return {node: faults[node] for node in nodes if node in faults}


def _new_folder(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        path = folder / (f"check-{number}" if number > 1 else "check")
        try:
            path.mkdir()
            return path
        except FileExistsError:
            number += 1


# -------------------------------------------------------------------------------------- the bad ones


def remember_bad(path: Path, node: str, reason: str) -> None:
    """Appends one line to the list of nodes to avoid; any number of jobs may at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    append_line(path, {"time": time.time(), "node": node, "reason": reason})


def bad_nodes(path: Path, hours: float) -> dict[str, str]:
    """Returns {node: reason} of the lines that are younger than `hours`; damaged lines are passed over."""
    bad: dict[str, str] = {}
    oldest = time.time() - hours * 3600
    for entry in read_lines(path):
        with contextlib.suppress(ValueError, TypeError, KeyError):
            if float(entry["time"]) >= oldest:
                bad[str(entry["node"])] = str(entry["reason"])
    return bad
