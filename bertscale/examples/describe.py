"""What the start of a run says of its examples: counts, labels, what is cut, and texts on two sides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bertscale.examples.read import plain_content
from bertscale.tasks.task import Example, Samples, Task, TaskData

SHOWN = 8  # labels of a set, the most frequent ones


def describe(data: TaskData[Any], samples: Mapping[str, Samples], max_length: int) -> list[str]:
    """Returns lines of text; `samples` are those of "train", "dev" and "test", as far as they are made."""
    sets: dict[str, list[Any]] = {"train": data.train, "dev": data.dev, "test": data.test}
    lines = list(data.notes)
    for name, examples in sets.items():
        if examples:
            lines.append(f"{name}: {_examples(data.task, examples)}")
            if name in samples:
                lines.append(f"{name}: {_samples(samples[name], len(examples), max_length)}")
    lines += [
        f"warning: no training example has the label {label!r}; the model will not learn it"
        for label, count in data.task.label_counts(data.train).items()
        if not count and data.task.labels
    ]
    train = {plain_content(example) for example in data.train}
    for name in ("dev", "test"):
        alike = sum(plain_content(example) in train for example in sets[name])
        if alike:
            lines.append(
                f"warning: {_count(alike, len(sets[name]))} of the {name} examples have the texts of a "
                "training example: figures on them flatter"
            )
    return lines


def _examples(task: Task[Any], examples: Sequence[Example]) -> str:
    counts = task.label_counts(examples)
    if not counts:
        return f"{len(examples):,} examples"
    frequent = sorted(counts, key=lambda label: -counts[label])[:SHOWN]
    shown = ", ".join(f"{label} {counts[label]:,}" for label in frequent)
    more = f", and {len(counts) - SHOWN:,} more" if len(counts) > SHOWN else ""
    return f"{len(examples):,} examples; {shown}{more}"


def _samples(samples: Samples, examples: int, max_length: int) -> str:
    tokens = len(samples.tokens)
    parts = [f"{tokens / len(samples):.1f} tokens in a sample"]
    if len(samples) != examples:
        parts.insert(0, f"{len(samples):,} samples")
    parts.append(f"{_count(samples.cut, examples)} of the examples are cut at max_length={max_length}")
    parts.append(f"{_count(samples.unknown, tokens)} of the tokens are unknown pieces")
    return ", ".join(parts)


def _count(part: int, whole: int) -> str:
    return f"{part:,} ({part / whole:.1%})" if part else "none"
