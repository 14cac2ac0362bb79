"""A run whose ranks have each written a shard, made by one process: weights and moments by the names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from test_convert import SIZES
from tiny import pretrain_config

from bertscale.config import ModelConfig
from bertscale.convert.model_shape import native_shapes
from bertscale.model.layers import derive_seed
from bertscale.run_folder import append_line, checkpoint_folder
from bertscale.tokenizer import load_tokenizer
from bertscale.train.checkpoint import StateFragment, shard_name, write_shard, write_table
from bertscale.train.checkpoint_table import FORMAT, STATES
from bertscale.train.parallel import take_share, tensor_parallel_dimension

PIECES = 330


def write_run(
    run: Path,
    data: Path,
    values: dict[str, Any],
    topology: tuple[int, int, int] = (1, 1, 0),
    *,
    step: int = 7,
    seed: int = 1,
    average: bool = False,
) -> Path:
    """A run with one checkpoint, of random values by name, state and `seed`; returns its folder."""
    tensor_ranks, data_ranks, stage = topology
    model = ModelConfig.model_validate({**SIZES, "num_attention_heads": 4, "hidden_size": 32, **values})
    shapes = native_shapes(model, PIECES)
    states = (*STATES, "average") if average else STATES
    tokenizer = load_tokenizer(data / "tokenizer.model")
    folder = checkpoint_folder(run, step)
    folder.mkdir(parents=True)
    tokenizer.save(folder)

    def fragments(tensor: int, rank: int) -> Iterator[StateFragment]:
        for name, shape in shapes.items():
            if tensor_parallel_dimension(name) is None and tensor > 0:
                continue
            whole = {state: value_of(name, state, shape, seed) for state in states}
            shares = {
                state: take_share(value, name, tensor_ranks, tensor).reshape(-1)
                for state, value in whole.items()
            }
            size = -(-shares["weight"].numel() // data_ranks)
            parts = {state: share[rank * size : (rank + 1) * size] for state, share in shares.items()}
            yield StateFragment(name, rank * size, parts)

    files = []
    for tensor in range(tensor_ranks):
        for rank in range(data_ranks):
            entry = write_shard(folder, shard_name(tensor, rank), fragments(tensor, rank))
            files.append({**entry, "tensor_rank": tensor, "data_rank": rank})
    config = pretrain_config(data, run, parallel={"tensor": tensor_ranks, "zero_stage": stage})
    table = {
        "format": FORMAT,
        "has_moments": True,
        "step": step,
        "samples_consumed": 8 * step,
        "elapsed_seconds": 12.0,
        "lineage": [{"folder": "runs/parent", "step": 3, "digest": "0123456789abcdef"}],
        "tokenizer_sha256": tokenizer.sha256,
        "data_digest": "d" * 32,
        "model": model.model_dump(),
        "vocab_size": PIECES,
        "config": {**config.model_dump(mode="json"), "model": model.model_dump()},
        "topology": {"tensor": tensor_ranks, "data": data_ranks, "zero_stage": stage},
        "parameters": {
            name: {
                "shape": list(shape),
                "tensor_parallel_dimension": tensor_parallel_dimension(name),
                "states": list(states),
            }
            for name, shape in shapes.items()
        },
        "files": files,
    }
    write_table(folder, table)
    append_line(run / "metrics.jsonl", {"step": step - 1, "train/loss": 6.5})
    append_line(run / "metrics.jsonl", {"step": step, "train/loss": 6.25, "heldout/mlm_loss": 5.5})
    append_line(run / "metrics.jsonl", {"step": step + 1, "train/loss": 6.0})
    return folder


def value_of(name: str, state: str, shape: torch.Size, seed: int) -> torch.Tensor:
    """Values of which padded rows of the vocabulary are zero."""
    draw = torch.Generator().manual_seed(derive_seed(seed, state, name))
    value = torch.randn(shape, generator=draw) * 0.1 + (1.0 if "LayerNorm.weight" in name else 0.0)
    if name in ("encoder.embeddings.word_embeddings.weight", "predictions.decoder.bias"):
        value[PIECES:] = 0.0
    return value
