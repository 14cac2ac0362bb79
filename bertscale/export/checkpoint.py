"""Writes a checkpoint of ours, at any topology, with what moments the source has.

bertscale convert roberta-base runs/imported                       # whole weights, one rank
bertscale convert runs/a runs/b --as checkpoint --tensor-parallel 2 --data-parallel 4 --zero-stage 3
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from bertscale.config import UserError
from bertscale.convert.weights import SourceWeights, Weights
from bertscale.export.options import ConvertOptions
from bertscale.export.output import Written
from bertscale.export.tensors import run_through
from bertscale.export.topology import Topology, write_shards
from bertscale.export.verify import compare_checkpoint, compare_import
from bertscale.tokenizer import load_tokenizer
from bertscale.train.checkpoint import AveragedCheckpoint, Checkpoint, open_checkpoint

# Keys of a table that `write_shards` gives itself.
WRITTEN = ("format", "topology", "parameters", "files")


def write_checkpoint(weights: Weights, output: Path, options: ConvertOptions) -> Written:
    """Writes a checkpoint into the empty folder `output`, compares it with the source, and says what it
    lacks.

    Raises UserError where no run of the model has the topology, or where the outcome is another one.
    """
    topology = _topology(weights, options)
    topology.check(weights.model)
    states, moments = kept_states(weights)
    _copy_tokenizer(weights, output)
    table = _table(weights, topology, moments)
    amount = sum(len(each) for each in states.values())
    run_through("written", amount, write_shards(output, weights, states, topology, table))
    written = open_checkpoint(output)
    run_through("compared", amount, compare_checkpoint(weights, written, states))
    ranks = (
        f"{topology.tensor} tensor-parallel x {topology.data} data-parallel ranks, ZeRO {topology.zero_stage}"
    )
    said = [
        f"{'written' if isinstance(weights, Checkpoint) else 'imported':<10}a checkpoint of {ranks}, "
        f"{'with' if moments else 'without'} optimizer state",
        f"verified  {amount} tensors are those of the source, bit for bit",
    ]
    if isinstance(weights, SourceWeights):
        said += compare_import(weights, written)
        if weights.left_out:
            said.append(
                f"left out  {', '.join(weights.left_out)}: no parameter of preset {weights.model.preset}"
            )
        if weights.missing:
            said.append(f"missing   {', '.join(weights.missing)}: not in the source, set to initial values")
    return Written(said, {file["name"]: file["digest"] for file in written.table["files"]})


def kept_states(weights: Weights) -> tuple[dict[str, tuple[str, ...]], bool]:
    """Which states of which parameters are written, and whether these are all moments that a run needs."""
    states = {name: weights.states(name) for name in weights.parameters}
    if all("exp_avg" in each for each in states.values()):
        return states, True
    return dict.fromkeys(states, ("weight",)), False


def _topology(weights: Weights, options: ConvertOptions) -> Topology:
    """What is asked for; what is not, is as in the source, or one rank."""
    before = weights.table["topology"] if isinstance(weights, Checkpoint) else {"tensor": 1, "data": 1}
    there = (before["tensor"], before["data"], before.get("zero_stage", 0))
    return Topology(
        *(new if new is not None else old for new, old in zip(options.topology, there, strict=True))
    )


def _copy_tokenizer(weights: Weights, output: Path) -> None:
    """Puts the tokenizer there: that of a checkpoint as it is, by whose digest it is known."""
    if isinstance(weights, Checkpoint):
        shutil.copyfile(weights.tokenizer, output / weights.tokenizer.name)
    else:
        load_tokenizer(weights.tokenizer).save(output)


def _table(weights: Weights, topology: Topology, moments: bool) -> dict[str, Any]:
    """What the table says of the run; the config of a run is changed to the topology."""
    if isinstance(weights, Checkpoint):
        table = {key: value for key, value in weights.table.items() if key not in WRITTEN}
        config = table.get("config")
        if config and "parallel" in config:
            parallel = {**config["parallel"], "tensor": topology.tensor, "zero_stage": topology.zero_stage}
            parallel["sequence"] = topology.tensor > 1 and parallel.get("sequence", False)
            table["config"] = {**config, "parallel": parallel}
        return {**table, "has_moments": moments}
    updates = weights.updates if isinstance(weights, SourceWeights) and moments else 0
    return {
        "has_moments": moments,
        "model": weights.model.model_dump(),
        "vocab_size": weights.vocab_size,
        "step": 0,
        "samples_consumed": 0,
        "updates_before": updates,
        "tokenizer_sha256": load_tokenizer(weights.tokenizer).sha256,
        "data_digest": None,
        "config": None,
    }


def open_for_checkpoint(weights: Weights, options: ConvertOptions) -> Weights:
    """Returns the weights. Raises UserError where they are a checkpoint and no other is asked for."""
    itself = isinstance(weights, Checkpoint) and not isinstance(weights, AveragedCheckpoint)
    if itself and options.topology == (None, None, None):
        raise UserError(
            f"--as checkpoint: {weights.folder} is a checkpoint already; give another topology by "
            "--tensor-parallel, --data-parallel or --zero-stage"
        )
    return weights
