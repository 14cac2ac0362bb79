"""TP x DP x ZeRO against the dense run: losses, gradient norms, weights; dropout under tensor parallel."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from dist import run_ranks
from tiny import pretrain_config

pytestmark = pytest.mark.slow

FILLED = ["The cat [MASK] the [MASK].", "[MASK]"]
TOPOLOGIES = [(1, 1, 0), (1, 2, 1), (1, 2, 2), (1, 2, 3), (2, 1, 3), (2, 2, 3), (2, 2, 1), (4, 1, 3)]


def train_each(data: str, folder: str, topologies: list[list[int]], bucket: int | None = None) -> list[Any]:
    """Runs on each rank: one short training for each topology; the figures of its steps, and its fills."""
    from bertscale.pretrain.pretrain import train
    from bertscale.run_folder import FILLS, read_metrics, read_steps
    from bertscale.train import zero
    from bertscale.train.device import local_device
    from bertscale.train.parallel import leave_subgroups, start_ranks
    from bertscale.train.stop import StopSignal

    results = []
    for tensor, size, stage in topologies:
        run = Path(folder) / f"t{tensor}-d{size}-z{stage}-{bucket}"
        run.mkdir(exist_ok=True)
        zero.BUCKET = bucket or zero.BUCKET
        config = pretrain_config(
            data,
            run,
            parallel={"tensor": tensor, "zero_stage": stage},
            # Neither of them moves anything.
            train={"static_targets": size == 2, "fills": FILLED, "pseudo_perplexity": 4},
        )
        ranks = start_ranks(tensor, local_device())
        assert ranks.data == size
        assert train(config, ranks, StopSignal()) == 0
        leave_subgroups(ranks)
        steps = [e for e in read_metrics(run) if "train/loss" in e]
        losses = [[e["train/loss"], e["train/mlm_loss"], e["train/gradient_norm"]] for e in steps]
        (pseudo,) = (e["heldout/pseudo_perplexity"] for e in read_metrics(run) if "heldout/loss" in e)
        results.append([losses, read_steps(run / FILLS), pseudo])
    return results


@pytest.fixture(scope="module")
def trained(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int, int], Any]:
    folder = tmp_path_factory.mktemp("topologies")
    found: dict[tuple[int, int, int], Any] = {}
    for world in (1, 2, 4):
        here = [t for t in TOPOLOGIES if t[0] * t[1] == world]
        results = run_ranks(
            __file__, "train_each", world=world, data=str(tiny_data), folder=str(folder), topologies=here
        )
        found |= dict(zip(here, results[0], strict=True))
    return found


@pytest.fixture(scope="module")
def figures(trained: dict[tuple[int, int, int], Any]) -> dict[tuple[int, int, int], Any]:
    return {topology: losses for topology, (losses, *_) in trained.items()}


def test_fills_are_those_of_the_dense_run(trained: dict[tuple[int, int, int], Any]) -> None:
    """Tensor-parallel ranks have the logits of a part of the vocabulary each, and ZeRO-3 gathers weights for
    the forward pass alone."""
    ((_, [expected], _), *others) = (trained[topology] for topology in TOPOLOGIES)
    assert expected["step"] == 10
    for _, [found], _ in others:
        for one, other in zip(expected["fills"], found["fills"], strict=True):
            assert one["text"] == other["text"]
            shares = [[[share for _, share in mask] for mask in each["masks"]] for each in (one, other)]
            torch.testing.assert_close(*map(torch.tensor, shares), rtol=1e-3, atol=1e-6)
            best = [[mask[0][0] for mask in each["masks"]] for each in (one, other)]
            assert best[0] == best[1]


def test_pseudo_perplexities_are_those_of_the_dense_run(trained: dict[tuple[int, int, int], Any]) -> None:
    """Data ranks share the passes, and under ZeRO-3 all of them make as many."""
    dense = trained[1, 1, 0][2]
    assert [trained[topology][2] for topology in TOPOLOGIES[1:]] == pytest.approx([dense] * 7, rel=1e-5)


def test_losses_are_the_recorded_ones(figures: dict[tuple[int, int, int], Any]) -> None:
    """A change that moves them says why in CHANGELOG.md and records them again."""
    golden = json.loads((Path(__file__).parent / "golden" / "tiny-losses.json").read_text())
    dense = torch.tensor(figures[1, 1, 0], dtype=torch.float64)
    torch.testing.assert_close(dense, torch.tensor(golden, dtype=torch.float64), rtol=1e-4, atol=0)


@pytest.mark.parametrize("topology", TOPOLOGIES[1:])
def test_losses_and_gradient_norms_are_those_of_the_dense_run(
    figures: dict[tuple[int, int, int], Any], topology: tuple[int, int, int]
) -> None:
    dense = torch.tensor(figures[1, 1, 0], dtype=torch.float64)
    assert dense.shape == (10, 3)
    assert dense[0, 0] - dense[-1, 0] > 0.3  # it learns: the ten steps are not ten times the same
    assert dense[:, 2].min() > 0.4  # the clipping, at 0.4, takes part
    sharded = torch.tensor(figures[topology], dtype=torch.float64)
    torch.testing.assert_close(sharded, dense, rtol=1e-5, atol=1e-5)


def test_gradients_that_travel_while_others_are_computed(
    figures: dict[tuple[int, int, int], Any], tiny_data: Path, tmp_path: Path
) -> None:
    """In more than one part, and parameters larger than a part: of 3,000 gradients, a layer has 8,500."""
    topologies = [(1, 4, 1), (1, 4, 2), (2, 2, 1), (2, 2, 2), (1, 4, 3)]
    arguments: dict[str, Any] = {"data": str(tiny_data), "folder": str(tmp_path), "topologies": topologies}
    results = run_ranks(__file__, "train_each", world=4, bucket=3000, **arguments)
    dense = torch.tensor(figures[1, 1, 0], dtype=torch.float64)
    for found, *_ in results[0]:
        torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), dense, rtol=1e-5, atol=1e-5)


def dropout_draws() -> dict[str, Any]:
    """Runs on each of two tensor ranks: states of a model with dropout, every head the same."""
    from bertscale.config import ModelConfig
    from bertscale.model.model import PretrainingModel
    from bertscale.train.device import local_device
    from bertscale.train.parallel import seed_dropout, start_ranks

    ranks = start_ranks(2, local_device())
    config = ModelConfig(
        num_hidden_layers=2,
        hidden_size=16,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        hidden_dropout_prob=0.5,
        attention_probs_dropout_prob=0.5,
    )
    model = PretrainingModel(config, 100, ranks.layers())
    torch.manual_seed(0)  # equal shares on both ranks: only dropout can make their heads differ
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
    seen: dict[str, Any] = {"attended": [], "hidden": [], "embedded": []}
    layer: Any = model.encoder.layers[0]
    layer.attention.dense.register_forward_pre_hook(
        lambda _, inputs: seen["attended"].append(inputs[0].tolist())
    )
    layer.register_forward_hook(lambda _, __, output: seen["hidden"].append(output.tolist()))
    model.encoder.embeddings.register_forward_hook(
        lambda _, __, output: seen["embedded"].append(output.tolist())
    )
    tokens = torch.arange(12) % 50
    for step in (3, 4, 3):
        seed_dropout(model.parallel, 7, step, 0, ranks)
        model.encoder(tokens, torch.zeros_like(tokens), torch.arange(12) % 6, (6, 6))
    return seen


def test_dropout_agrees_where_activations_are_whole_and_differs_where_they_are_shared() -> None:
    first, second = run_ranks(__file__, "dropout_draws", world=2)
    for whole in ("embedded", "hidden"):
        assert first[whole] == second[whole]
    for one, other in zip(first["attended"], second["attended"], strict=True):
        assert one != other
    for draws in first.values():
        assert draws[0] != draws[1]  # another step, another draw
        assert draws[0] == draws[2]  # the same step again: a resumed run draws the same
