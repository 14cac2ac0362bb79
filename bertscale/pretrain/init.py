"""What a run starts from, with `init`: another run, a checkpoint, or a Hugging Face folder.

Weights are taken over by name, moments too if `init.optimizer` is `keep`; step, data and schedule begin anew.
The network must be the same, but for what has no weights (dropout, rotary bases) and for heads: those that
the source lacks get first values.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bertscale.config import InitConfig, ModelConfig, PretrainConfig, UserError, check_config
from bertscale.config.model import PRESET_DEFAULTS
from bertscale.convert.convert import Weights, native_shapes, open_weights
from bertscale.convert.hf_folder import CONFIG_FILE
from bertscale.data.shards import Dataset
from bertscale.files import file_digest
from bertscale.model.model import initial_value
from bertscale.run_folder import CHECKPOINTS, TABLE, checkpoint_folder, checkpoints
from bertscale.tokenizer import find_tokenizer, load_tokenizer
from bertscale.train.checkpoint import Checkpoint
from bertscale.train.engine import Engine
from bertscale.train.parallel import Ranks
from bertscale.train.resume import newest_sound, open_sound

# Keys of the model that may differ from the source's: no weight is shaped by them, nor means another thing.
FREE = {
    *("hidden_dropout_prob", "attention_probs_dropout_prob"),
    *("initializer_range", "matrix_initializer_range", "initializer_cutoff_factor"),
    *("global_rope_theta", "local_rope_theta"),
    *("sentence_head", "generator_size"),  # heads, beside the encoder
}
VOCABULARY = ("word_embeddings.weight", "decoder.bias")  # ends the names of tensors with a row for each piece
HEADS = ("predictions.", "encoder.pooler.", "seq_relationship.", "generator.", "detector.")


@dataclass(frozen=True)
class Source:
    """What a run starts from; `digest` is that of all that is read of it."""

    weights: Weights
    digest: str
    missing: frozenset[str]  # parameters that the folder lacks and `weights` would invent

    @property
    def folder(self) -> Path:
        return self.weights.folder

    @property
    def checkpoint(self) -> Checkpoint | None:
        """The source, where it is one of ours."""
        return self.weights if isinstance(self.weights, Checkpoint) else None

    @property
    def names(self) -> set[str]:
        """The parameters that it has."""
        return set(self.weights.parameters) - self.missing


def open_source(init: InitConfig, run: Path, ranks: Ranks) -> Source:
    """Opens what `init` names, for the run `run`; of a run the newest sound checkpoint, or that of the step.

    Raises UserError where it is missing or damaged. All ranks must call.
    """
    path = Path(init.source)
    if path.resolve() == run.resolve():
        raise UserError(f"init.from={path} is this run itself: it resumes without init")
    if (path / CONFIG_FILE).is_file():
        if init.step is not None:
            raise UserError(f"init.step={init.step}: {path} is a Hugging Face folder, which has no steps")
        weights = open_weights(path)
        digest, failure = ranks.broadcast(_digest(weights) if ranks.rank == 0 else None)
        if failure:
            raise UserError(failure)
        return Source(weights, digest, frozenset(getattr(weights, "missing", ())))
    found: Checkpoint | str | None
    if init.step is None and (path / CHECKPOINTS).is_dir():
        found = newest_sound(path, ranks)
    else:
        found = open_sound(_folder(path, init.step), ranks)
    if found is None:
        raise UserError(f"init.from={path}: this run has no finished checkpoint yet")
    if isinstance(found, str):
        raise UserError(found)
    weights = open_weights(found.folder)
    return Source(weights, file_digest(found.folder / TABLE), frozenset())


def _digest(weights: Weights) -> tuple[str, str]:
    """The digest of a source, or what keeps it from being read: one rank finds it out for all."""
    try:
        return weights.digest(), ""
    except UserError as error:
        return "", str(error)


def _folder(path: Path, step: int | None) -> Path:
    """The checkpoint at `step` of the run `path`, or `path` itself."""
    if step is None:
        return path
    folder = checkpoint_folder(path, step)
    if not folder.is_dir():
        steps = ", ".join(str(int(each.name.rpartition("-")[2])) for each in checkpoints(path)) or "none"
        raise UserError(f"init.step={step}: {path} has no checkpoint of that step; those it has: {steps}")
    return folder


def with_model_of(config: PretrainConfig, model: ModelConfig) -> PretrainConfig:
    """The config with the source's `model` for all keys of it that were not given.

    Raises UserError where the rest of the config does not go with them.
    """
    given = config.model.model_dump(exclude_unset=True)
    implied = PRESET_DEFAULTS.get(given.get("preset", ""), {})
    kept = {key: value for key, value in given.items() if implied.get(key) != value}
    if kept.get("preset", model.preset) != model.preset:
        raise UserError(
            f"model.preset={kept['preset']}, but init.from={_from(config)} is of preset {model.preset}"
        )
    values = {**config.model_dump(), "model": {**model.model_dump(), **kept}}
    return check_config(PretrainConfig, values, f"init.from={_from(config)}")


def _from(config: PretrainConfig) -> str:
    assert config.init is not None
    return config.init.source


def check_source(config: PretrainConfig, source: Source, data: list[Dataset]) -> None:
    """Raises UserError where the network or the tokenizer is another, or moments are to be kept and cannot
    be."""
    here, there = config.model.model_dump(), source.weights.model.model_dump()
    for key in here:
        if key not in FREE and here[key] != there[key]:
            raise UserError(
                f"model.{key}={here[key]}, but the source {source.folder} has {there[key]}: with init the "
                "network stays the same; leave that key out"
            )
    ours, theirs = load_tokenizer(data[0].tokenizer_path), load_tokenizer(find_tokenizer(source.folder))
    if ours.sha256 != theirs.sha256:
        raise UserError(
            f"the data {data[0].folder} was made with another tokenizer than the source {source.folder} has: "
            f"prepare the data with tokenizer={theirs.path}"
        )
    assert config.init is not None
    if config.init.optimizer == "keep" and not (source.checkpoint and source.checkpoint.has_moments):
        raise UserError(
            f"init.optimizer=keep: {source.folder} has no moments of an optimizer; take init.optimizer=fresh"
        )


@dataclass(frozen=True)
class Start:
    """How a run has started: what its checkpoints keep of that, and the lines that are said of it."""

    updates_before: int = 0
    lineage: tuple[dict[str, Any], ...] = ()
    lines: tuple[str, ...] = ()

    @property
    def facts(self) -> dict[str, Any]:
        """The entries of a checkpoint's table."""
        return {"updates_before": self.updates_before, "lineage": list(self.lineage)}


def start_from(engine: Engine[PretrainConfig], source: Source) -> Start:
    """Gives the engine its first weights, those of the source, and its moments if `init.optimizer` says so.

    What the source lacks of the heads gets first values. Raises UserError where it lacks more.
    """
    config, names = engine.config, source.names
    shapes = native_shapes(engine.sizes, engine.vocab_size)
    missing = [name for name in shapes if name not in names]
    left_out = sorted(names - shapes.keys())
    if wrong := [name for name in missing if not name.startswith(HEADS)]:
        raise UserError(f"init.from={_from(config)}: {source.folder} lacks {wrong[0]}, a part of the encoder")
    first = partial(initial_value, config=engine.sizes, vocab_size=engine.vocab_size, seed=config.train.seed)

    def first_value(name: str, shape: list[int]) -> Tensor:
        if name in missing:
            return first(name, shape)
        value = source.weights.tensor(name)
        if name.endswith(VOCABULARY):  # some published models have rows that no piece belongs to
            rows = torch.zeros(shape)
            rows[: engine.vocab_size] = value[: engine.vocab_size]
            return rows
        return value

    before, updates = source.checkpoint, 0
    assert config.init is not None
    if config.init.optimizer == "keep":
        assert before is not None
        engine.resume(before)
        updates = before.updates
    else:
        engine.start_from(first_value)
    changed = differences(before.table["config"] if before else None, config, source.weights.model)
    ancestor = {
        "folder": str(source.folder),
        "step": before.step if before else None,
        "digest": source.digest,
        "optimizer": config.init.optimizer,
        "changed": changed,
        "first_values": missing,
        "left_out": left_out,
    }
    lineage = (*(before.lineage if before else ()), ancestor)
    return Start(updates, lineage, tuple(_lines(lineage, ancestor)))


def resumed(checkpoint: Checkpoint) -> Start:
    """What the checkpoints of a run that resumes keep of its start."""
    return Start(checkpoint.updates_before, tuple(checkpoint.lineage))


def differences(before: dict[str, Any] | None, config: PretrainConfig, model: ModelConfig) -> list[list[str]]:
    """The settings that differ from those of the source, a row [key, there, here] each.

    `before` is the config that the source was trained with, None where nobody knows; `model` is its network.
    """
    now = config.model_dump(mode="json")
    known = {**(before or {}), "model": model.model_dump(mode="json")}
    rows: list[list[str]] = []
    for section, values in now.items():
        if section in ("run", "init", "device", "launch") or section not in known:
            continue
        there = known[section]
        if not (isinstance(values, dict) and isinstance(there, dict)):
            values, there = {"": values}, {"": there}
        for key, value in values.items():
            if there.get(key, value) != value:  # the config of an older version lacks newer keys
                rows.append([f"{section}.{key}".rstrip("."), str(there[key]), str(value)])
    return rows


def _lines(lineage: tuple[dict[str, Any], ...], ancestor: dict[str, Any]) -> list[str]:
    earlier = "" if len(lineage) == 1 else f", itself the {_ordinal(len(lineage))} of a chain"
    moments = "weights and moments" if ancestor["optimizer"] == "keep" else "weights"
    lines = [f"started   from the {moments} of {ancestor['folder']} ({ancestor['digest'][:12]}){earlier}"]
    rows = ancestor["changed"]
    if rows:
        wide = [max(len(row[column]) for row in rows) for column in (0, 1)]
        head = ["setting", "there", "here"]
        wide = [max(width, len(word)) for width, word in zip(wide, head, strict=False)]
        for number, row in enumerate([head, *rows]):
            cells = "  ".join(cell.ljust(width) for cell, width in zip(row, [*wide, 0], strict=True))
            lines.append(f"{'' if number else 'differs':<10}{cells}".rstrip())
    if ancestor["first_values"]:
        lines.append(f"new       {', '.join(ancestor['first_values'])}: not in the source, first values")
    if ancestor["left_out"]:
        lines.append(f"left out  {', '.join(ancestor['left_out'])}: this model has no place for them")
    return lines


def _ordinal(number: int) -> str:
    return {2: "second", 3: "third"}.get(number, f"{number}th")
