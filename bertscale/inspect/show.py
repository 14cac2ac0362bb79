"""The facts of a folder as one table for people."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bertscale.progress import show_duration

DIGITS = 12  # of a digest that are shown
SHAPE = {  # key of the model -> how it is shown
    "num_hidden_layers": "{} layers",
    "hidden_size": "{} wide",
    "num_attention_heads": "{} heads",
    "intermediate_size": "feed-forward {}",
    "max_position_embeddings": "{} positions",
}


def lines_of(facts: dict[str, Any]) -> list[str]:
    """The lines of the table."""
    rows = list(_rows(facts))
    width = max(len(name) for name, _ in rows) + 2
    # What a damaged file has for a name must not end the command.
    return [f"{name:<{width}}{text}".encode(errors="backslashreplace").decode() for name, text in rows]


def _rows(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield facts["kind"], facts["path"]
    if "steps" in facts:
        steps = facts["steps"]
        others = f", and of {len(steps) - 1} earlier steps" if len(steps) > 1 else ""
        yield "checkpoint", f"{facts['checkpoint']}{others}; the run is {_done(facts['finished'])}"
    if "class" in facts:
        yield "class", facts["class"]
    yield from _network(facts)
    if "topology" in facts:
        topology = facts["topology"]
        stage = f" x ZeRO {topology['zero_stage']}" if "zero_stage" in topology else ""
        yield "topology", f"tensor {topology['tensor']} x data {topology['data']}{stage}"
        yield "progress", _progress(facts)
        yield "average", "of the weights, kept" if facts["average"] else "none"
    if "optimizer_state" in facts:
        yield "optimizer", _optimizer(facts)
    for ancestor in facts.get("lineage", []):
        step = f", step {ancestor['step']:,}" if ancestor["step"] is not None else ""
        yield "started from", f"{ancestor['folder']}{step} ({ancestor['digest'][:DIGITS]})"
    if "losses" in facts:
        losses = facts["losses"]
        yield (
            "losses",
            ", ".join(f"{key} {value:.4f}" for key, value in losses.items() if not key.endswith("_step")),
        )
    if "result" in facts:
        yield from _result(facts["result"])
    for name, digest in facts["digests"].items():
        if digest:
            yield f"digest of {name}", digest if name == "source" else digest[:DIGITS]
    files = facts.get("files", {})
    of_run = f"; the run {facts['bytes_of_run']:,}" if "bytes_of_run" in facts else ""
    yield (
        "bytes",
        f"{facts['bytes']:,}, of which weights {sum(files.values()):,} in {len(files)} files{of_run}",
    )


def _done(finished: bool) -> str:
    return "finished" if finished else "not finished"


def _network(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    model = facts["model"]
    words = [form.format(f"{model[key]:,}") for key, form in SHAPE.items() if key in model]
    if model.get("preset") == "modern" and "local_attention" in model:
        words.append(f"window {model['local_attention']}")
    if model.get("generator_size"):
        words.append(f"generator {model['generator_size']:g}")
    if "vocab_size" in facts:
        words.append(f"{facts['vocab_size']:,} pieces")
    kind = model.get("preset") or f"none; {model.get('model_type')}"
    yield "preset", f"{kind}: {', '.join(words)}"
    if "parameters" in facts:
        amount = f"{facts['parameters']:,} in {facts['tensors']:,} tensors"
        yield "parameters", f"{amount}, {facts.get('dtype', '')}".rstrip(", ")
    if "labels" in facts:
        yield "labels", f"{len(facts['labels']):,}: {', '.join(facts['labels'][:10])}"


def _progress(facts: dict[str, Any]) -> str:
    words = [f"step {facts['step']:,}", f"{facts['samples']:,} samples"]
    if "tokens_at_most" in facts:
        words.append(f"at most {facts['tokens_at_most']:,} tokens")
    if facts["skipped_steps"]:
        words.append(f"{facts['skipped_steps']:,} steps skipped")
    if facts["training_seconds"]:
        words.append(f"{show_duration(facts['training_seconds'])} of training")
    return ", ".join(words)


def _optimizer(facts: dict[str, Any]) -> str:
    states = facts["optimizer_state"]
    return f"{facts.get('optimizer', '')}: {', '.join(states)}".lstrip(": ") if states else "no state"


def _result(result: dict[str, Any]) -> Iterator[tuple[str, str]]:
    if "task" in result:
        yield "task", f"{result['task']}, by {result.get('metric')}"
    if isinstance(examples := result.get("examples"), dict):
        yield "examples", ", ".join(f"{name} {count:,}" for name, count in examples.items())
