"""Presets under TP x DP x ZeRO against their dense runs; activations recomputed, tokens shared out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from dist import run_ranks
from tiny import pretrain_config

pytestmark = pytest.mark.slow

MODELS: dict[str, dict[str, Any]] = {
    "bert": {},
    "megatron-bert": {"num_hidden_layers": 3},
    # Samples are up to 48 tokens long: the window of 4 to each side leaves most of them out.
    "modern": {"num_hidden_layers": 4, "local_attention": 8, "layer_norm_eps": 1e-5},
}
# preset, tensor, data, ZeRO stage, activation checkpointing, tokens shared out, dropout
Case = tuple[str, int, int, int, str, bool, float]
DENSE: list[Case] = [(preset, 1, 1, 0, "none", False, 0.0) for preset in MODELS]
SHARDED: list[Case] = [
    ("modern", 1, 1, 0, "full", False, 0.0),
    ("megatron-bert", 1, 2, 2, "selective", False, 0.0),
    ("modern", 2, 1, 1, "selective", False, 0.0),
    ("bert", 2, 1, 1, "none", True, 0.0),
    ("megatron-bert", 2, 1, 3, "full", True, 0.0),
    ("megatron-bert", 4, 1, 1, "none", False, 0.0),
    ("modern", 4, 1, 3, "none", True, 0.0),
    ("modern", 2, 2, 3, "full", False, 0.0),
]
DROPOUT: list[Case] = [
    (preset, 2, 1, 3, recompute, sequence, 0.2)
    for preset, sequence in (("bert", False), ("modern", True))
    for recompute in ("none", "selective", "full")
]


def train_each(data: str, folder: str, cases: list[Any]) -> list[Any]:
    """Runs on each rank: one short training for each case; loss and gradient norm of its steps."""
    from bertscale.pretrain.pretrain import train
    from bertscale.run_folder import read_metrics
    from bertscale.train.device import local_device
    from bertscale.train.parallel import leave_subgroups, start_ranks
    from bertscale.train.stop import StopSignal

    results = []
    for preset, tensor, size, stage, recompute, sequence, dropout in cases:
        run = Path(folder) / f"{preset}-t{tensor}-d{size}-z{stage}-{recompute}-{sequence}-{dropout}"
        run.mkdir(exist_ok=True)
        rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
        config = pretrain_config(
            data,
            run,
            model={"preset": preset, **rates, **MODELS[preset]},
            parallel={"tensor": tensor, "zero_stage": stage, "sequence": sequence},
            samples={"kind": "document" if preset == "modern" else "nsp"},
            train={"steps": 3, "activation_checkpointing": recompute, "eval_samples": 8},
        )
        ranks = start_ranks(tensor, local_device())
        assert ranks.data == size
        assert train(config, ranks, StopSignal()) == 0
        leave_subgroups(ranks)
        steps = [e for e in read_metrics(run) if "train/loss" in e]
        assert ("train/nsp_loss" in steps[0]) == (preset != "modern")
        results.append([[e["train/loss"], e["train/gradient_norm"]] for e in steps])
    return results


@pytest.fixture(scope="module")
def figures(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Case, torch.Tensor]:
    folder = tmp_path_factory.mktemp("presets")
    found: dict[Case, torch.Tensor] = {}
    for world in (1, 2, 4):
        here = [case for case in DENSE + SHARDED + DROPOUT if case[1] * case[2] == world]
        results = run_ranks(
            __file__, "train_each", world=world, data=str(tiny_data), folder=str(folder), cases=here
        )
        for case, each in zip(here, results[0], strict=True):
            found[case] = torch.tensor(each, dtype=torch.float64)
    return found


@pytest.mark.parametrize("case", SHARDED, ids=str)
def test_losses_and_gradient_norms_are_those_of_the_dense_run(
    figures: dict[Case, torch.Tensor], case: Case
) -> None:
    dense = figures[case[0], 1, 1, 0, "none", False, 0.0]
    assert dense.shape == (3, 2)
    assert dense[0, 0] > dense[-1, 0]
    torch.testing.assert_close(figures[case], dense, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", [case for case in DROPOUT if case[4] != "none"], ids=str)
def test_recomputed_dropout_is_the_one_of_the_forward_pass(
    figures: dict[Case, torch.Tensor], case: Case
) -> None:
    kept = figures[(*case[:4], "none", *case[5:])]
    torch.testing.assert_close(figures[case], kept, rtol=1e-6, atol=1e-6)
