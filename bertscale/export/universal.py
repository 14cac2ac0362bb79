"""Writes DeepSpeed's universal checkpoint: weights, moments and their steps, whole, for any of its
topologies.

    bertscale convert runs/quickstart/pretrain runs/universal --as universal

    OUTPUT/latest_universal                                 the name of the folder beside it
    OUTPUT/config.yaml, tokenizer.model                     what this project reads of it beside
    OUTPUT/global_step600/zero/PARAMETER/fp32.pt            {"param": whole tensor, "cat_dim": dimension}
                               .../exp_avg.pt, exp_avg_sq.pt, step.pt
    OUTPUT/global_step600/zero/optimizer_state.pt           no hyperparameters: those of the run stay
    OUTPUT/global_step600/mp_rank_00_model_states.pt        counters; for ZeRO 3 once more, with
                                                            zero_pp_rank_0_ before

A run loads it with `{"checkpoint": {"load_universal": true}}` in its DeepSpeed config, by
`engine.load_checkpoint(OUTPUT)`. One tensor is in memory at a time.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from bertscale.convert.deepspeed_files import WEIGHT, ZERO, find_deepspeed, open_deepspeed
from bertscale.convert.model_shape import native_shapes
from bertscale.convert.weights import SourceWeights, Weights
from bertscale.export.checkpoint import kept_states
from bertscale.export.options import ConvertOptions
from bertscale.export.output import Written
from bertscale.export.tensors import run_through
from bertscale.export.verify import compare_checkpoint
from bertscale.run_folder import CONFIG
from bertscale.tokenizer import load_tokenizer
from bertscale.train.checkpoint import Checkpoint
from bertscale.train.checkpoint_table import AVERAGE
from bertscale.train.parallel import tensor_parallel_dimension

DEEPSPEED = "0.19.8"  # the version whose files these are


def write_universal(weights: Weights, output: Path, options: ConvertOptions) -> Written:
    """Writes a universal checkpoint into the empty folder `output`, reads it back, and says what it holds."""
    states, moments = kept_states(weights)
    states = {name: tuple(state for state in each if state != AVERAGE) for name, each in states.items()}
    load_tokenizer(weights.tokenizer).save(output)
    steps = weights.step if isinstance(weights, Checkpoint) else 0
    updates = weights.updates if moments and isinstance(weights, Checkpoint | SourceWeights) else 0
    amount = sum(len(each) for each in states.values())
    files = write_universal_files(output, weights, states, max(steps, updates), updates)
    run_through("written", amount, files)
    inside = find_deepspeed(output)
    assert inside is not None
    run_through("compared", amount, compare_checkpoint(weights, open_deepspeed(inside), states))
    said = [
        f"written   {inside.name} {'with' if moments else 'without'} optimizer state: load it in DeepSpeed "
        "by "
        '{"checkpoint": {"load_universal": true}}',
        f"verified  {amount} tensors are those of the source, bit for bit",
    ]
    return Written(said, {})


def write_universal_files(
    folder: Path, weights: Weights, states: Mapping[str, Sequence[str]], steps: int, updates: int
) -> Iterator[int]:
    """Writes all but the tokenizer into `folder`; gives the bytes of each tensor that is written.

    `states`: which states of which parameters; `updates`: steps that the moments have seen. Raises OSError.
    """
    inside, shapes = folder / f"global_step{steps}", native_shapes(weights.model, weights.vocab_size)
    step = torch.tensor(float(updates))
    for name in shapes:
        place = inside / ZERO / name
        place.mkdir(parents=True)
        for state in states[name]:
            value = weights.tensor(name, state)
            dimension = tensor_parallel_dimension(name) or 0
            _save(
                {"param": value, "cat_dim": dimension},
                place / f"{WEIGHT if state == 'weight' else state}.pt",
            )
            yield value.nbytes
        if len(states[name]) > 1:
            _save(step, place / "step.pt")
    # A group of the run gets the keys of the one here: none. There are as many as a run can have.
    groups: list[dict[str, Any]] = [{} for _ in shapes]
    _save(
        {
            "ds_version": DEEPSPEED,
            "param_groups": groups,
            "optimizer_state_dict": {"state": {0: {"step": step}}, "param_groups": groups},
        },
        inside / ZERO / "optimizer_state.pt",
    )
    counters: dict[str, Any] = {
        "module": {},
        "buffer_names": [],
        "param_shapes": [shapes],
        "frozen_param_shapes": None,
        "frozen_param_fragments": None,
        "shared_params": {},
        "lr_scheduler": None,
        "data_sampler": None,
        "random_ltd": None,
        "global_steps": steps,
        "global_samples": 0,
        "skipped_steps": steps - updates,
        "dp_world_size": 1,
        "mp_world_size": 1,
        "ds_config": {},
        "ds_version": DEEPSPEED,
    }
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"):
        _save(counters, inside / name)
    config = {"model": weights.model.model_dump(mode="json")}
    (folder / CONFIG).write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    (folder / "latest_universal").write_text(inside.name, encoding="utf-8")


def _save(value: Any, path: Path) -> None:
    """As torch.save, which makes a RuntimeError without a reason of a disk that is full. Raises OSError."""
    content = io.BytesIO()
    torch.save(value, content)
    path.write_bytes(content.getbuffer())
