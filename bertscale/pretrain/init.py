"""What a run starts from, with `init`: another run, a checkpoint, or a Hugging Face folder.

Weights are taken over by name, moments too if `init.optimizer` is `keep`; step, data and schedule begin anew.
The network must be the same, but for what has no weights (dropout, rotary bases), for heads, of which those
that the source lacks get first values, and for what `init` says: positions, tile, vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bertscale.config import InitConfig, ModelConfig, PretrainConfig, UserError
from bertscale.convert.hf_folder import CONFIG_FILE
from bertscale.convert.model_shape import PARTS, native_shapes
from bertscale.convert.sources import InitSource, open_source_weights
from bertscale.files import file_digest
from bertscale.model.model import initial_value
from bertscale.pretrain.positions import longer
from bertscale.pretrain.tiling import SIZES, tiled
from bertscale.pretrain.vocabulary import ROWS, check_same, extended, replaced, reworded
from bertscale.run_folder import CHECKPOINTS, TABLE, checkpoint_folder, checkpoints
from bertscale.tokenizer import Tokenizer, load_tokenizer
from bertscale.train.checkpoint import Checkpoint
from bertscale.train.engine import Engine
from bertscale.train.parallel import Ranks
from bertscale.train.resume import newest_sound, open_sound, settings_that_differ

# Keys of the model that may differ from the source's: no weight is shaped by them, nor means another thing.
FREE = {
    *("hidden_dropout_prob", "attention_probs_dropout_prob"),
    *("initializer_range", "matrix_initializer_range", "initializer_cutoff_factor"),
    *("global_rope_theta", "local_rope_theta"),
    *("sentence_head", "generator_size"),  # heads, beside the encoder
}
POSITIONS = "max_position_embeddings"


@dataclass(frozen=True)
class Source:
    """What a run starts from; `digest` is that of all that is read of it.

    `checkpoint` is the same where it is one of ours.
    """

    weights: InitSource
    digest: str
    checkpoint: Checkpoint | None = None


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
        weights = open_source_weights(path)
        digest, failure = ranks.broadcast(_digest(weights) if ranks.rank == 0 else None)
        if failure:
            raise UserError(failure)
        return Source(weights, digest)
    found: Checkpoint | str | None
    if init.step is None and (path / CHECKPOINTS).is_dir():
        found = newest_sound(path, ranks)
    else:
        found = open_sound(_folder(path, init.step), ranks)
    if found is None:
        raise UserError(f"init.from={path}: this run has no finished checkpoint yet")
    if isinstance(found, str):
        raise UserError(found)
    return Source(open_source_weights(found.folder), file_digest(found.folder / TABLE), found)


def _digest(weights: InitSource) -> tuple[str, str]:
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


def _from(config: PretrainConfig) -> str:
    assert config.init is not None
    return config.init.source


def check_source(config: PretrainConfig, source: Source) -> None:
    """Raises UserError where the network is another one that `init` says nothing of, or moments are to be
    kept and cannot be."""
    init = config.init
    assert init is not None
    here, there = config.model, source.weights.model
    free = FREE | (set(SIZES) if init.tile else set())
    free |= {POSITIONS} if here.rotary or init.positions else set()
    hints = dict.fromkeys(SIZES, ", or make a larger network of a smaller one by init.tile=true")
    hints[POSITIONS] = ", or get more rows by init.positions=copy or interpolate"
    for key in type(here).model_fields:
        if key not in free and getattr(here, key) != getattr(there, key):
            raise UserError(
                f"model.{key}={getattr(here, key)}, but the source {source.weights.folder} has "
                f"{getattr(there, key)}: leave that key out{hints.get(key, '')}"
            )
    if init.optimizer == "keep" and not (source.checkpoint and source.checkpoint.has_moments):
        raise UserError(
            f"init.optimizer=keep: {source.weights.folder} has no moments of an optimizer; take "
            "init.optimizer=fresh"
        )


def in_shape_of(config: PretrainConfig, source: InitSource, tokenizer: Tokenizer) -> tuple[InitSource, str]:
    """The source in the shape that the config asks for, and what to say of its vocabulary.

    `tokenizer` is that of the data. Raises UserError where `init` does not allow what differs.
    """
    init, model = config.init, config.model
    assert init is not None
    theirs, said = load_tokenizer(source.tokenizer), ""
    if not model.rotary and model.max_position_embeddings != source.model.max_position_embeddings:
        assert init.positions is not None
        source = longer(source, model.max_position_embeddings, init.positions)
    if init.tile:
        source = tiled(source, model)
    if init.vocabulary == "same":
        check_same(theirs, tokenizer)
    else:
        change = extended if init.vocabulary == "extend" else replaced
        vocabulary = change(theirs, tokenizer)
        shapes = native_shapes(model, tokenizer.vocab_size)

        def first(name: str) -> Tensor:
            return initial_value(name, list(shapes[name]), model, tokenizer.vocab_size, config.train.seed)

        source, said = reworded(source, vocabulary, tokenizer, first), str(vocabulary)
    return source, said


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


def start_from(engine: Engine[PretrainConfig], source: Source, tokenizer: Tokenizer) -> Start:
    """Gives the engine its first weights, those of the source, and its moments if `init.optimizer` says so.

    What the source lacks of the heads, or has in another size, gets first values. `tokenizer` is that of the
    data. Raises UserError where more than a head is missing, or the shape is another one than `init` allows.
    """
    config, before = engine.config, source.checkpoint
    assert config.init is not None
    weights, vocabulary = in_shape_of(config, source.weights, tokenizer)
    shapes = native_shapes(engine.sizes, engine.vocab_size)
    missing = [name for name in shapes if name not in weights.names]
    if engine.sizes.generator_size != weights.model.generator_size:
        # The head for masked tokens is then as wide as the generator; so are the layers of another generator.
        heads = [name for name in shapes if name in weights.names and name.startswith(PARTS)]
        missing += [name for name in heads if name not in ROWS and weights.tensor(name).shape != shapes[name]]
    if wrong := [name for name in missing if not name.startswith(PARTS)]:
        raise UserError(f"init.from={config.init.source}: {source.weights.folder} lacks {wrong[0]}")

    def first_value(name: str, shape: list[int]) -> Tensor:
        if name in missing:
            return initial_value(name, shape, engine.sizes, engine.vocab_size, config.train.seed)
        value = weights.tensor(name)
        if name in ROWS and list(value.shape) != shape:  # published models may have rows that no piece has
            rows = torch.zeros(shape)
            rows[: engine.vocab_size] = value[: engine.vocab_size]
            return rows
        return value

    updates = 0
    if config.init.optimizer == "keep":
        assert before is not None
        engine.resume(before)
        engine.begin_average()
        updates = before.updates
    else:
        engine.start_from(first_value)
    ancestor = {
        "folder": str(source.weights.folder),
        "step": before.step if before else None,
        "digest": source.digest,
        "optimizer": config.init.optimizer,
        "changed": differences(before.table["config"] if before else None, config, source.weights.model),
        "vocabulary": vocabulary,
        "first_values": missing,
        "left_out": [*source.weights.left_out, *(name for name in weights.names if name not in shapes)],
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
    sections = [key for key in now if key in known and key not in ("run", "init", "device", "launch")]
    rows = settings_that_differ(known, now, sections)
    return [[key, str(there), str(here)] for key, there, here in rows]


def _lines(lineage: tuple[dict[str, Any], ...], ancestor: dict[str, Any]) -> list[str]:
    links = sum("averaged" not in each and "base" not in each for each in lineage)  # not parts of an average
    earlier = "" if links == 1 else f", itself the {_ordinal(links)} of a chain"
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
    if ancestor["vocabulary"]:
        lines.append(f"pieces    {ancestor['vocabulary']}")
    if ancestor["first_values"]:
        new = ", ".join(ancestor["first_values"])
        lines.append(f"new       {new}: not in the source, or in another size; first values")
    if ancestor["left_out"]:
        lines.append(f"left out  {', '.join(ancestor['left_out'])}: this model has no place for them")
    return lines


def _ordinal(number: int) -> str:
    return {2: "second", 3: "third"}.get(number, f"{number}th")
