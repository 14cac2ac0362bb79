"""What differs between two checkpoints, runs or models, of any topology: parameters and settings.

    bertscale diff runs/base runs/base-hugging-face

Parameters are compared by their native names, as float32 values, and one of them is in memory at a time. A
checkpoint's moments count where both have them; topology, paths and what only one of the two can have do not.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from bertscale.errors import UserError
from bertscale.inspect.sources import Source, open_any
from bertscale.progress import Progress

# Settings of a run that name places, or the ranks; the data counts by its digest.
FREE = {"run", "output", "data", "device", "parallel", "launch", "heldout"}


def diff(first: Path, second: Path) -> dict[str, Any]:
    """What differs, as values of JSON; `equal` tells whether nothing does.

    Raises UserError where one of the two is no checkpoint, run or model, or is damaged.
    """
    sources = open_any(first), open_any(second)
    names = [source.weights.names for source in sources]
    both = [name for name in names[0] if name in set(names[1])]
    if not both:
        raise UserError(f"{first} and {second} have no parameter of one name")
    alone = [[name for name in ours if name not in set(others)] for ours, others in (names, names[::-1])]
    differing: list[dict[str, Any]] = []
    with Progress("compared", len(both), "tensors", file=sys.stderr) as progress:
        for name in both:
            differing += _of_parameter(name, *sources)
            progress.advance(1)
    settings = list(_settings(*sources))
    return {
        "equal": not (differing or alone[0] or alone[1] or settings),
        "folders": [str(source.weights.folder) for source in sources],
        "steps": [source.checkpoint.step if source.checkpoint else None for source in sources],
        "compared": len(both),
        "optimizer_state": all(len(source.states(both[0])) > 1 for source in sources),
        "parameters": differing,
        "only_in_first": alone[0],
        "only_in_second": alone[1],
        "settings": settings,
    }


def _of_parameter(name: str, first: Source, second: Source) -> Iterator[dict[str, Any]]:
    """An entry for each state of a parameter that both have and that differs."""
    for state in first.states(name):
        if state not in second.states(name):
            continue
        ours, theirs = first.tensor(name, state), second.tensor(name, state)
        named = {"name": name, "state": state}
        if ours.shape != theirs.shape:
            yield {**named, "shapes": [list(ours.shape), list(theirs.shape)]}
        elif not ours.equal(theirs):
            yield {**named, **measures(ours, theirs)}


def measures(ours: Tensor, theirs: Tensor) -> dict[str, float | None]:
    """Largest absolute difference, norm of the difference over that of `ours`, cosine of the two.

    None is what has no number: a ratio of nothing, or of values that are not finite.
    """
    ours, theirs = ours.flatten().double(), theirs.flatten().double()
    difference, norm, other = theirs - ours, ours.norm(), theirs.norm()
    figures = {
        "largest": float(difference.abs().max()),
        "relative": float(difference.norm() / norm),
        "cosine": float((ours @ theirs) / (norm * other)),
    }
    return {key: value if math.isfinite(value) else None for key, value in figures.items()}


def _settings(first: Source, second: Source) -> Iterator[dict[str, Any]]:
    """An entry for each setting that both know and have otherwise."""
    ours, theirs = first.settings(), second.settings()
    for section in ours:
        if section in theirs and section not in FREE:
            here, there = ours[section], theirs[section]
            pairs = (
                [(f"{section}.{key}", here[key], there[key]) for key in here if key in there]
                if isinstance(here, dict) and isinstance(there, dict)
                else [(section, here, there)]
            )
            for key, one, other in pairs:
                if one != other:
                    yield {"key": key, "first": one, "second": other}


def lines_of(found: dict[str, Any]) -> list[str]:
    """What differs, for people."""
    folders, steps = found["folders"], found["steps"]
    lines = [
        f"{place}   {folder}" + (f", step {step:,}" if step is not None else "")
        for place, folder, step in zip(("first ", "second"), folders, steps, strict=True)
    ]
    states = "weights and optimizer state" if found["optimizer_state"] else "weights"
    if found["equal"]:
        return [*lines, f"equal    {found['compared']:,} parameters ({states}), and the settings"]
    for place in ("first", "second"):
        lines += [f"only in the {place}: {name}" for name in found[f"only_in_{place}"]]
    lines += [f"setting  {row['key']}: {row['first']} | {row['second']}" for row in found["settings"]]
    rows = found["parameters"]
    names = {row["name"] for row in rows}
    lines.append(f"{len(names):,} of {found['compared']:,} parameters of both differ ({states})")
    if not rows:
        return lines
    width = max(len(_name(row)) for row in rows)
    lines.append(f"{'':<{width}}  largest difference  relative norm     cosine")
    for row in rows:
        if "shapes" in row:
            shapes = " | ".join(" x ".join(map(str, shape)) for shape in row["shapes"])
            lines.append(f"{_name(row):<{width}}  shapes {shapes}")
            continue
        figures = [
            _shown(row["largest"], ".3e"),
            _shown(row["relative"], ".3e"),
            _shown(row["cosine"], ".6f"),
        ]
        lines.append(f"{_name(row):<{width}}  {figures[0]:>18}  {figures[1]:>13}  {figures[2]:>9}")
    return lines


def _name(row: dict[str, Any]) -> str:
    return row["name"] if row["state"] == "weight" else f"{row['state']} of {row['name']}"


def _shown(figure: float | None, form: str) -> str:
    return "none" if figure is None else format(figure, form)
