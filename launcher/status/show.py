"""The state of runs for a person: a table of many, all that is known of one, JSON for a machine."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from typing import Any

from bertscale.progress import show_count, show_duration
from launcher import history, queue_jobs
from launcher.job import TRAINING
from launcher.queue_jobs import show_time
from launcher.runs import Facts, Place
from launcher.status.state import State

EVENTS_SHOWN = 6


def describe(place: Place, facts: Facts, state: State, silence: str | None, now: float) -> list[str]:
    """All that is known of one run, a line or a few for each thing."""
    source = state.source + (f" ({silence})" if silence and place.job else "")
    rows = [("state", state.sentence), ("source", source)]
    if state.job and state.job.dependency:
        rows.append(("after", state.job.dependency))
    for i, text in enumerate(attempt_lines(facts, state, now)):
        rows.append(("attempts" if i == 0 else "", text))
    progress = [step_text(facts), loss_text(facts), speed_text(facts)]
    if any(progress):
        rows.append(("progress", ", ".join(text for text in progress if text)))
    if facts.checkpoint_step is not None and facts.checkpoint_time is not None:
        age = show_duration(max(0.0, now - facts.checkpoint_time))
        rows.append(("checkpoint", f"step {facts.checkpoint_step:,}, {age} ago"))
    ends = end_text(facts, state, now)
    if ends:
        rows.append(("ends", ends))
    for i, event in enumerate(facts.events[-EVENTS_SHOWN:]):
        moment = time.strftime("%d %b %H:%M:%S", time.localtime(event["time"]))
        rows.append(("events" if i == 0 else "", f"{moment}  {history.tell(event)}"))
    newest = next((attempt.folder for attempt in reversed(facts.attempts) if attempt.folder), None)
    rows.append(("logs", str(newest or facts.logs)))
    if state.next:
        rows.append(("next", state.next))
    return [f"{place.shown}: {facts.stage}, {state.word}", *(f"  {label:<12}{text}" for label, text in rows)]


def attempt_lines(facts: Facts, state: State, now: float) -> list[str]:
    lines = []
    for i, attempt in enumerate(facts.attempts):
        took = ""
        if attempt.started:
            took = f", {show_time(attempt.started, now).removeprefix('at ').removeprefix('on ')}"
            if attempt.ended:
                took += f" for {show_duration(attempt.ended - attempt.started)}"
        where = f" on {attempt.nodes}" if attempt.nodes else ""
        job = f" (job {attempt.job})" if attempt.job else ""
        at_work = state.word in ("running", "ending") and i == len(facts.attempts) - 1 and not attempt.ended
        outcome = attempt.outcome or ("at work" if at_work else "")
        lines.append(f"{attempt.number}{job}{where}{took}{f': {outcome}' if outcome else ''}")
    hidden = len(lines) - 10
    return [f"({hidden} earlier ones)", *lines[-10:]] if hidden > 0 else lines


def step_text(facts: Facts) -> str:
    if facts.tasks:
        return f"{facts.tasks_done}/{facts.tasks} tasks"
    if facts.step is None:
        return ""
    return f"step {facts.step:,}" + (f" of {facts.steps:,}" if facts.steps else "")


def loss_text(facts: Facts) -> str:
    return "" if facts.loss is None else f"loss {facts.loss:.3f}"


def speed_text(facts: Facts) -> str:
    return "" if facts.tokens_per_second is None else f"{show_count(facts.tokens_per_second)} tokens/s"


def end_text(facts: Facts, state: State, now: float) -> str:
    """When the run will be done, and whether the time limit comes first."""
    if state.word != "running":
        return ""
    parts, limit = [], state.job.end if state.job else None
    if facts.expected_end and facts.expected_end > now:
        parts.append(f"{show_time(facts.expected_end, now)}, in {show_duration(facts.expected_end - now)}")
    if limit and limit > now:
        text = f"time limit {show_time(limit, now)}, in {show_duration(limit - now)}"
        if facts.expected_end and facts.expected_end > limit and facts.stage in TRAINING:
            text += ": it saves before, is requeued and resumes"
        parts.append(text)
    return "; ".join(parts)


COLUMNS = ("run", "stage", "job", "state", "step", "loss", "tokens/s", "saved", "ends", "")
COLOURS = {"running": "green", "waiting": "yellow", "done": "dim"}
COLOURS |= dict.fromkeys(("gave up", "failed", "lost"), "red")


def row(place: Place, facts: Facts, state: State, now: float) -> list[str]:
    """The cells of one run, as COLUMNS names them."""
    saved = "" if facts.checkpoint_step is None else f"{facts.checkpoint_step:,}"
    ends = ""
    if state.word == "running" and facts.expected_end and facts.expected_end > now:
        ends = f"in {show_duration(facts.expected_end - now)}"
    note = state.sentence
    if state.job and state.word == "waiting":
        note = queue_jobs.why(state.job)[0]
        if state.job.start and state.job.start > now:
            note += f"; expected to start {show_time(state.job.start, now)}"
    elif state.job and state.word == "running":
        note = f"on {queue_jobs.show_nodes(state.job)}"
    return [
        place.shown,
        facts.stage,
        state.job.number if state.job else "",
        state.word,
        step_text(facts).removeprefix("step ").replace(" of ", "/"),
        "" if facts.loss is None else f"{facts.loss:.3f}",
        "" if facts.tokens_per_second is None else show_count(facts.tokens_per_second),
        saved,
        ends,
        "" if note == state.word else note,
    ]


def show_table(rows: list[list[str]]) -> None:
    """Columns that no run fills are left out; colours on a terminal alone."""
    filled = [i for i in range(len(COLUMNS)) if any(cells[i] for cells in rows)]
    table = [[COLUMNS[i] for i in filled], *([cells[i] for i in filled] for cells in rows)]
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        shown = Table(box=None, pad_edge=False)
        for heading in table[0]:
            shown.add_column(heading, overflow="fold")
        for cells, (_, _, _, word, *_) in zip(table[1:], rows, strict=True):
            shown.add_row(*cells, style=COLOURS.get(word))
        Console(markup=False, highlight=False).print(shown)
        return
    widths = [max(len(cells[i]) for cells in table) for i in range(len(filled))]
    for cells in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())


def as_values(place: Place, facts: Facts, state: State) -> dict[str, Any]:
    """The same as JSON values; times are seconds since 1970."""
    job = state.job
    values = dataclasses.asdict(facts)
    values["events"] = facts.events[-EVENTS_SHOWN:]
    values |= {
        "run": str(place.run),
        "job_folder": str(place.job) if place.job else None,
        "state": state.word,
        "sentence": state.sentence,
        "source": state.source,
        "job": job.id if job else None,
        "reason": job.reason if job else None,
        "why": queue_jobs.why(job)[0] if job and job.waits else None,
        "expected_start": job.start if job and job.waits else None,
        "time_limit": job.end if job and not job.waits else None,
        "next": state.next,
    }
    return json.loads(json.dumps(values, default=str))  # type: ignore[no-any-return]
