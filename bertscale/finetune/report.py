"""The figures of a fine-tuning: their means over the seeds, and the tables for the screen."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from bertscale.config import FinetuneConfig
from bertscale.finetune.by_label import show_tables
from bertscale.tasks.task import Task, TaskData

# Figures for the screen, of each kind of task; result.json has all.
SHOWN = {
    "classification": ("accuracy", "macro_f1", "f1", "matthews"),
    "multi_label": ("micro_f1", "macro_f1", "average_precision"),
    "regression": ("pearson", "spearman", "pearson_spearman"),
    "tokens": (
        *("entity_f1", "entity_precision", "entity_recall", "token_accuracy"),
        *("macro_f1", "weighted_f1"),
    ),
    "question_answering": ("exact_match", "f1", "has_answer_f1", "no_answer_f1"),
    "multiple_choice": ("accuracy",),
}
NAMES = {"pretrained": "pretrained", "random": "random weights"}


def make_result(
    config: FinetuneConfig,
    task: Task[Any],
    data: TaskData[Any],
    records: dict[str, dict[str, Any]],
    made_of: dict[str, str],
    seconds: float,
) -> dict[str, Any]:
    """Returns what result.json holds: facts, by start the figures of dev and test over the seeds, and tables
    of the labels for the predictions that are written, those of the first run."""
    sets = {"dev": data.dev, "test": data.test}
    result: dict[str, Any] = {
        "task": task.kind,
        "labels": task.labels,
        "metric": config.train.metric or task.metric,
        "examples": {"train": len(data.train), "dev": len(data.dev), "test": len(data.test)},
        "broken_rows": len(data.broken),
        "majority": {name: task.majority(data.train, held) for name, held in sets.items() if held},
        "seconds": round(seconds, 1),
        "made_of": made_of,
    }
    tables = [record["by_label"] for record in records.values() if record.get("by_label")]
    if tables:
        result["by_label"] = tables[0]
    for start in NAMES:
        runs = [
            {key: value for key, value in record.items() if key != "by_label"}
            for record in records.values()
            if record["start"] == start
        ]
        if runs:
            result[start] = {
                **{name: summarize([run[name] for run in runs]) for name, held in sets.items() if held},
                "runs": runs,
            }
    return result


def summarize(runs: Sequence[dict[str, float]]) -> dict[str, dict[str, float | None]]:
    """Returns mean, sample standard deviation (None for one run), least and largest value of each figure."""
    summary: dict[str, dict[str, float | None]] = {}
    for key in runs[0]:
        values = [run[key] for run in runs]
        summary[key] = {
            "mean": statistics.mean(values),
            "std": statistics.stdev(values) if len(values) > 1 else None,
            "min": min(values),
            "max": max(values),
        }
    return summary


def run_line(name: str, record: dict[str, Any], metric: str) -> str:
    """Says in one line what a run has found."""
    parts = [f"{which} {metric} {record[which][metric]:.4f}" for which in ("dev", "test") if which in record]
    where = f"best of {len(record['evaluations'])} evaluations, step {record['best_step']:,}"
    if not record["evaluations"]:
        where = f"step {record['steps']:,}"
    return f"{name}: {', '.join(parts) or 'trained'} ({where})"


def table(result: dict[str, Any]) -> str:
    """Formats the figures for the screen: a table for dev and one for test, as far as they are there, and
    those of the labels for test, or for dev where there is no test."""
    lines: list[str] = []
    for which in ("dev", "test"):
        if which in result["pretrained"]:
            lines += [*([""] if lines else []), *_table_of(result, which)]
    runs = len(result["pretrained"]["runs"])
    lines.append(
        f"(mean ± standard deviation of {runs} seeds, the least and the largest below it)"
        if runs > 1
        else "(one seed)"
    )
    by_label = result.get("by_label", {})
    name = "test" if "test" in by_label else "dev"
    if name in by_label:
        of_seed = result["pretrained"]["runs"][0]["seed"]
        shown = show_tables(name, by_label[name])
        lines += ["", *shown, *([f"(seed {of_seed})"] if runs > 1 else [])]
    return "\n".join(lines)


def _table_of(result: dict[str, Any], which: str) -> list[str]:
    figures = result["pretrained"][which]
    shown = [name for name in SHOWN[result["task"]] if name in figures]
    title = f"{which}, {result['examples'][which]:,}"
    rows = [[title, *(name.replace("_", " ") for name in shown)]]
    for start, name in NAMES.items():
        if result.get(start):
            values = result[start][which]
            rows.append([name, *(_cell(values[key]) for key in shown)])
            if len(result[start]["runs"]) > 1:
                rows.append(["", *(f"{values[key]['min']:.3f} to {values[key]['max']:.3f}" for key in shown)])
    if majority := result["majority"].get(which):
        cells = [f"{majority[key]:.3f}" if key in majority else "" for key in shown]
        rows.append(["most frequent", *cells])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["   ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def _cell(figure: dict[str, float | None]) -> str:
    spread = figure["std"]
    return f"{figure['mean']:.3f}" + ("" if spread is None else f" ± {spread:.3f}")
