"""The phases of a pretraining: one config, several runs, each started from the one before.

    run: runs/mine
    phases:
      stable: {train: {tokens: 1.0e+9}}
      long: {samples: {max_length: 1024}, train: {tokens: 1.0e+8}}

are the runs runs/mine/stable and runs/mine/long. What a phase changes stays so in the phases after it, but
for its seed: if it names none, it is the config's and one more for each phase before it, so that phases on
the same data take other samples.
"""

from __future__ import annotations

import os
import re
from typing import Any

from bertscale.config.section import merged

BUDGETS = ("steps", "tokens", "hours")


def phase_names(values: dict[str, Any]) -> list[str]:
    """The names of the phases, in their order; raises ValueError where they are no mapping of changes."""
    phases = values.get("phases")
    if not phases:
        return []
    if not isinstance(phases, dict) or not all(isinstance(changes, dict) for changes in phases.values()):
        raise ValueError("phases is not a mapping of names to changes, such as {long: {train: {steps: 100}}}")
    for name in phases:
        if not re.fullmatch(r"[\w.-]+", str(name)):
            raise ValueError(f"phases: the name {name!r} has other characters than letters, digits, - and _")
    return list(map(str, phases))


def values_of_phase(values: dict[str, Any]) -> dict[str, Any]:
    """The config of the phase `phase` of `values`; raises ValueError where none is named, or a wrong one."""
    names, wanted = phase_names(values), values.get("phase")
    if not names:
        raise ValueError(f"phase={wanted}: this config has no phases")
    if wanted is None:
        others = f", or {', '.join(names[1:])}" if names[1:] else ""
        raise ValueError(f"this config has phases: name one with phase={names[0]}{others}")
    if str(wanted) not in names:  # names may be numbers, which YAML reads as such
        raise ValueError(f"phase={wanted}: the phases are {', '.join(names)}")
    run, current = str(values.get("run", "")), {**values}
    del current["phases"], current["phase"]
    for number, (name, changes) in enumerate(values["phases"].items()):
        for key in ("run", "phases", "phase", "base"):
            if key in changes:
                raise ValueError(f"phases.{name}.{key}: a phase cannot change that")
        current = merged(_without_budget(current, changes), changes)
        current["run"] = os.path.join(run, str(name))
        current["train"] = _seeded(current.get("train", {}), changes.get("train", {}), values, number)
        if number:
            init = changes.get("init", {})
            if not isinstance(init, dict) or "from" in init:
                raise ValueError(f"phases.{name}.init.from: it starts from the phase before it")
            before = os.path.join(run, names[number - 1])
            current["init"] = {"from": before, **init}
        if str(name) == str(wanted):
            break
    return current


def _seeded(train: Any, changes: Any, values: dict[str, Any], number: int) -> Any:
    """The section `train` with the seed of phase `number`; as it is where a part of it is no section."""
    sections = train, changes, values.get("train", {})
    if not all(isinstance(section, dict) for section in sections):
        return train
    seed = sections[2].get("seed", 0)
    return train if "seed" in changes or not isinstance(seed, int) else {**train, "seed": seed + number}


def _without_budget(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`values` without the budget and the schedule of the phase before, where `changes` have one."""
    train, new = values.get("train"), changes.get("train")
    if not (isinstance(train, dict) and isinstance(new, dict) and any(key in new for key in BUDGETS)):
        return values
    left = {key: value for key, value in train.items() if key not in (*BUDGETS, "schedule_steps")}
    return {**values, "train": left}
