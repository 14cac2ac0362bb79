"""The table of `bertscale glue`: dev figures of each task, beside those that others have published.

Figures are shown as a hundredfold, as the field does. The score of a task is the mean of its figures, the
average that of the scores, without WNLI.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from bertscale.config.glue_tasks import TASKS, GlueTask

Figure = dict[str, float | None]  # mean, std, min, max over the seeds
SHORT = {"matthews": "Matthews", "f1": "F1", "pearson": "Pearson", "spearman": "Spearman"}
SECOND = "mismatched"  # of MNLI: the accuracy on its second dev file


@dataclass(frozen=True)
class Reference:
    """A published model: figures of the same metrics on the same dev files, and where they stand."""

    model: str
    source: str
    figures: dict[str, dict[str, float]]


def _single(**figures: float) -> dict[str, dict[str, float]]:
    return {task: {TASKS[task].figures[0]: value} for task, value in figures.items()}


_TRANSFORMERS = "transformers, examples/pytorch/text-classification/README.md"
_MODERNBERT = (
    "ModernBERT paper (arXiv 2412.13663), table 5; its MRPC, STS-B and QQP are left out: it does not say "
    "which figures they are"
)
_DEBERTA = "microsoft/DeBERTa, README.md"
_ELECTRA = "google-research/electra, README.md (medians over many seeds)"


def _electra(model: str, *, mrpc: float, qqp: float, stsb: float, **figures: float) -> Reference:
    rest = {"mrpc": {"accuracy": mrpc}, "qqp": {"accuracy": qqp}, "stsb": {"spearman": stsb}}
    return Reference(model, _ELECTRA, _single(**figures) | rest)


def _deberta(model: str, *, mrpc: float, qqp: float, stsb: float, **figures: float) -> Reference:
    rest = {"mrpc": {"accuracy": mrpc}, "qqp": {"accuracy": qqp}, "stsb": {"pearson": stsb}}
    return Reference(model, _DEBERTA, _single(**figures) | rest)


REFERENCES = (
    Reference(
        "BERT-base-cased",
        _TRANSFORMERS,
        {
            **_single(cola=56.53, sst2=92.32, qnli=90.66, rte=65.70, wnli=56.34),
            "mrpc": {"f1": 88.85, "accuracy": 84.07},
            "stsb": {"pearson": 88.64, "spearman": 88.48},
            "qqp": {"accuracy": 90.71, "f1": 87.49},
            "mnli": {"accuracy": 83.91, SECOND: 84.10},
        },
    ),
    Reference(
        "BERT-base (MosaicBERT's)",
        _MODERNBERT,
        _single(cola=59.0, sst2=93.1, mnli=85.4, qnli=91.6, rte=78.2),
    ),
    Reference("RoBERTa-base", _MODERNBERT, _single(cola=63.6, sst2=94.8, mnli=87.6, qnli=92.8, rte=78.7)),
    Reference("DeBERTa-v3-base", _MODERNBERT, _single(cola=69.2, sst2=95.6, mnli=90.0, rte=83.8)),
    Reference("ModernBERT-base", _MODERNBERT, _single(sst2=96.0, mnli=89.1, qnli=93.9, rte=87.4)),
    _electra(
        "ELECTRA-small", cola=57.0, sst2=91.2, mrpc=88.0, stsb=87.5, qqp=89.0, mnli=81.3, qnli=88.4, rte=66.7
    ),
    _electra(
        "ELECTRA-small-OWT (4 days, one V100)",
        cola=56.8,
        sst2=88.3,
        mrpc=87.4,
        stsb=86.8,
        qqp=88.3,
        mnli=78.9,
        qnli=87.9,
        rte=68.5,
    ),
    _electra(
        "ELECTRA-base", cola=67.7, sst2=95.1, mrpc=89.5, stsb=91.2, qqp=91.5, mnli=88.8, qnli=93.2, rte=82.7
    ),
    _deberta(
        "BERT-large", cola=60.6, sst2=93.2, mrpc=88.0, stsb=90.0, qqp=91.3, mnli=86.6, qnli=92.3, rte=70.4
    ),
    _deberta(
        "RoBERTa-large", cola=68.0, sst2=96.4, mrpc=90.9, stsb=92.4, qqp=92.2, mnli=90.2, qnli=93.9, rte=86.6
    ),
    _deberta(
        "DeBERTa-v3-large",
        cola=75.3,
        sst2=96.9,
        mrpc=92.2,
        stsb=93.0,
        qqp=93.0,
        mnli=91.8,
        qnli=96.0,
        rte=92.7,
    ),
    Reference("ModernBERT-large", _MODERNBERT, _single(sst2=97.1, mnli=90.8, qnli=95.2, rte=92.1)),
    _electra(
        "ELECTRA-large", cola=69.1, sst2=96.9, mrpc=90.8, stsb=92.6, qqp=92.4, mnli=90.9, qnli=95.0, rte=88.0
    ),
    Reference(
        "BERT-base-chinese",
        "CLUEbenchmark/CLUE, README.md (their test sets, not dev)",
        _single(tnews=55.58, iflytek=60.29, cmnli=79.39),
    ),
    Reference(
        "RoBERTa-wwm-large",
        "CLUEbenchmark/CLUE, README.md (their test sets, not dev)",
        _single(tnews=58.61, iflytek=62.98, cmnli=83.4),
    ),
)


@dataclass
class Scores:
    """What a model, or one checkpoint of a run, has reached; `failed` says why a task has no figures."""

    name: str
    step: int | None = None
    tasks: dict[str, dict[str, Figure]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def score(self, task: str) -> float:
        """The mean of the task's figures, 0 to 1; MNLI's second dev file counts as one of them."""
        return statistics.mean(figure["mean"] or 0.0 for figure in self.tasks[task].values())

    def averages(self) -> dict[str, float]:
        """The mean score of each suite whose tasks have all ended well."""
        found: dict[str, float] = {}
        for suite in ("GLUE", "CLUE"):
            names = [name for name in self.tasks if TASKS[name].suite == suite and TASKS[name].averaged]
            if names and not any(TASKS[name].suite == suite for name in self.failed):
                found[suite] = statistics.mean(map(self.score, names))
        return found

    def as_json(self) -> dict[str, Any]:
        """What glue.json holds of it."""
        return {
            "name": self.name,
            "step": self.step,
            "tasks": {
                name: {"score": self.score(name), "figures": figures} for name, figures in self.tasks.items()
            },
            "failed": self.failed,
            "average": self.averages(),
        }


def figures_of(task: GlueTask, result: dict[str, Any]) -> dict[str, Figure]:
    """The figures that a task is known by, from result.json of its fine-tuning."""
    found = {name: result["pretrained"]["dev"][name] for name in task.figures}
    if "test" in result["pretrained"]:
        found[SECOND] = result["pretrained"]["test"][task.figures[0]]
    return found


def markdown(rows: Sequence[Scores], tasks: Sequence[str], notes: Sequence[str]) -> str:
    """Formats the table of each suite, with the sources of the references, as Markdown."""
    parts = []
    for suite in ("GLUE", "CLUE"):
        names = [name for name in tasks if TASKS[name].suite == suite]
        if names:
            parts.append(_table(suite, rows, names))
    failed = [f"- {row.name}, {name}: {why}" for row in rows for name, why in row.failed.items()]
    if failed:
        parts.append("\n".join(["Failed:", *failed]))
    if notes:
        parts.append("\n".join(f"- {note}" for note in notes))
    return "\n\n".join(parts) + "\n"


def _table(suite: str, rows: Sequence[Scores], names: Sequence[str]) -> str:
    references = [reference for reference in REFERENCES if set(reference.figures) & set(names)]
    sources = list(dict.fromkeys(reference.source for reference in references))
    letters = {source: chr(ord("a") + number) for number, source in enumerate(sources)}
    second = any(SECOND in row.tasks.get("mnli", {}) for row in rows)
    head = [f"{suite}, dev", *(_title(TASKS[name], second) for name in names), "average"]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        average = row.averages().get(suite)
        cells = [_ours(row, name) for name in names]
        lines.append([row.name, *cells, "" if average is None else f"{100 * average:.1f}"])
    for reference in references:
        cells = [_theirs(reference, TASKS[name], second) for name in names]
        average = average_of(reference, names, second)
        lines.append(
            [
                f"{reference.model} ({letters[reference.source]})",
                *cells,
                "" if average is None else f"{average:.1f}",
            ]
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    table = "\n".join(f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines)
    return "\n".join([table, "", *(f"{letters[source]}: {source}" for source in sources)])


def average_of(reference: Reference, names: Sequence[str], second: bool) -> float | None:
    """The average of a published model over these tasks; None if it lacks a figure of one of them."""
    scores = []
    for task in (TASKS[name] for name in names if TASKS[name].averaged):
        known = reference.figures.get(task.name, {})
        wanted = _figures(task, second)
        if not known.keys() >= set(wanted):
            return None
        scores.append(statistics.mean(known[name] for name in wanted))
    return statistics.mean(scores) if scores else None


def _figures(task: GlueTask, second: bool) -> list[str]:
    return [*task.figures, *([SECOND] if task.name == "mnli" and second else [])]


def _title(task: GlueTask, second: bool) -> str:
    names = [SHORT.get(name, name) for name in task.figures if name != "accuracy" or len(task.figures) > 1]
    if task.name == "mnli" and second:
        names = ["matched", SECOND]
    return f"{task.title} {'/'.join(names)}".rstrip()


def _ours(row: Scores, name: str) -> str:
    if name not in row.tasks:
        return "failed" if name in row.failed else ""
    return " / ".join(_figure(figure) for figure in row.tasks[name].values())


def _figure(figure: Figure) -> str:
    spread = figure["std"]
    return f"{100 * (figure['mean'] or 0.0):.1f}" + ("" if spread is None else f" ± {100 * spread:.1f}")


def _theirs(reference: Reference, task: GlueTask, second: bool) -> str:
    known = reference.figures.get(task.name, {})
    names = _figures(task, second)
    return " / ".join(f"{known[name]:.1f}" if name in known else "–" for name in names) if known else ""
