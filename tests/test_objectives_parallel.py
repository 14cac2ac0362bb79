"""Objectives under TP x DP x ZeRO: losses and gradient norms are those of the dense run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from dist import run_ranks
from tiny import pretrain_config

pytestmark = pytest.mark.slow

KINDS: dict[str, dict[str, Any]] = {
    "bert": {"model": {"generator_size": 0.5}},
    "bert by muon": {"model": {"generator_size": 0.5}, "optimizer": {"name": "muon"}},
    "bert in bfloat16": {"model": {"generator_size": 0.5}},
    "megatron-bert": {"model": {"preset": "megatron-bert", "generator_size": 1.0}},
    "modern": {
        "model": {
            "preset": "modern",
            "generator_size": 0.5,
            "num_hidden_layers": 3,
            "local_attention": 8,
            "layer_norm_eps": 1e-5,
        },
        "samples": {"kind": "packed"},
    },
    "pairs alone": {"objectives": {"mlm": 0}},
    "causal bert": {"objectives": {"clm": 1}, "samples": {"kind": "document"}},
    "causal modern": {
        "objectives": {"clm": 1},
        "model": {
            "preset": "modern",
            "num_hidden_layers": 3,
            "local_attention": 8,
            "layer_norm_eps": 1e-5,
        },
        "samples": {"kind": "packed"},
    },
}
# kind, tensor, data, ZeRO stage, activation checkpointing, tokens shared out
Case = tuple[str, int, int, int, str, bool]
DENSE: list[Case] = [(kind, 1, 1, 0, "none", False) for kind in KINDS if "bfloat16" not in kind]
BFLOAT16: list[Case] = [("bert in bfloat16", 2, 1, 3, "none", False)]
SHARDED: list[Case] = [
    ("bert", 1, 2, 1, "none", False),
    ("bert", 1, 2, 3, "none", False),
    ("bert", 2, 1, 1, "none", True),
    ("bert", 2, 1, 3, "selective", False),
    ("bert", 2, 2, 1, "none", False),
    ("bert", 2, 2, 3, "full", True),
    ("bert by muon", 2, 1, 3, "none", False),
    ("megatron-bert", 2, 1, 3, "full", True),
    ("modern", 2, 1, 1, "none", False),
    ("modern", 1, 2, 3, "full", False),
    ("pairs alone", 2, 1, 1, "none", False),
    ("causal bert", 2, 1, 3, "none", True),
    ("causal modern", 1, 2, 1, "none", False),
    ("causal modern", 2, 2, 3, "full", True),
]


def train_each(data: str, folder: str, cases: list[Any]) -> list[Any]:
    """Runs on each rank: one short training for each case; the figures of its steps."""
    from bertscale.pretrain.pretrain import train
    from bertscale.run_folder import read_metrics
    from bertscale.train.device import local_device
    from bertscale.train.parallel import leave_subgroups, start_ranks
    from bertscale.train.stop import StopSignal

    results = []
    for kind, tensor, size, stage, recompute, sequence in cases:
        run = Path(folder) / f"{kind}-t{tensor}-d{size}-z{stage}-{recompute}-{sequence}"
        run.mkdir(exist_ok=True)
        config = pretrain_config(
            data,
            run,
            **{"parallel": {"tensor": tensor, "zero_stage": stage, "sequence": sequence}, **KINDS[kind]},
            train={
                "steps": 3,
                "activation_checkpointing": recompute,
                "eval_samples": 8,
                "precision": "bfloat16" if "bfloat16" in kind else "float32",
            },
        )
        ranks = start_ranks(tensor, local_device())
        assert ranks.data == size
        assert train(config, ranks, StopSignal()) == 0
        leave_subgroups(ranks)
        figures = {}
        for entry in read_metrics(run):
            chosen = ("loss", "accuracy", "gradient_norm")
            figures[f"{entry['step']}{'held-out' if 'heldout/loss' in entry else ''}"] = {
                key: value for key, value in entry.items() if key.endswith(chosen)
            }
        results.append(figures)
    return results


@pytest.fixture(scope="module")
def figures(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Case, Any]:
    folder = tmp_path_factory.mktemp("objectives")
    found: dict[Case, Any] = {}
    for world in (1, 2, 4):
        here = [case for case in DENSE + SHARDED + BFLOAT16 if case[1] * case[2] == world]
        results = run_ranks(
            __file__, "train_each", world=world, data=str(tiny_data), folder=str(folder), cases=here
        )
        found |= dict(zip(here, results[0], strict=True))
    return found


@pytest.mark.parametrize("case", SHARDED, ids=str)
def test_losses_and_gradient_norms_are_those_of_the_dense_run(figures: dict[Case, Any], case: Case) -> None:
    dense, sharded = figures[case[0], 1, 1, 0, "none", False], figures[case]
    assert sorted(dense) == sorted(sharded) == ["1", "2", "3", "3held-out"]
    for step, expected in dense.items():
        assert sharded[step] == pytest.approx(expected, rel=1e-5, abs=1e-5), step


def test_the_runs_are_what_they_claim(figures: dict[Case, Any]) -> None:
    for case in DENSE + BFLOAT16:
        kind, steps = case[0], figures[case]
        assert steps["1"]["train/loss"] != steps["3"]["train/loss"]
        if kind != "pairs alone":  # which takes more than three steps
            assert steps["1"]["train/loss"] > steps["3"]["train/loss"]
        assert ("train/rtd_loss" in steps["1"]) == ("heldout/rtd_loss" in steps["3held-out"])
        assert ("train/rtd_loss" in steps["1"]) == ("mlm_loss" in str(steps))
        assert ("mlm_loss" in str(steps)) == (kind != "pairs alone" and "causal" not in kind)
        assert ("train/clm_loss" in steps["1"]) == ("heldout/clm_loss" in steps["3held-out"])
        assert ("train/clm_loss" in steps["1"]) == ("causal" in kind)
        assert ("train/nsp_loss" in steps["1"]) == ("modern" not in kind and "causal" not in kind)
    rtd = figures["bert", 1, 1, 0, "none", False]["1"]
    total = rtd["train/mlm_loss"] + rtd["train/nsp_loss"] + 50 * rtd["train/rtd_loss"]
    assert rtd["train/loss"] == pytest.approx(total)
