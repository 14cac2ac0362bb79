"""Each optimizer against the formulas of its paper, written out for one whole parameter at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bertscale.config import ModelConfig, OptimizerConfig
from bertscale.optim import optimizers
from bertscale.optim.groups import decays, is_matrix, make_optimizer, parameter_groups
from bertscale.optim.layout import Fragment, Layout, Parameter
from bertscale.optim.optimizers import Muon, WholeOptimizer, orthogonalize

SIZES = ModelConfig(hidden_size=6, num_attention_heads=2, intermediate_size=10, num_hidden_layers=1)
SHAPES = {
    "encoder.embeddings.word_embeddings.weight": (11, 6),
    "encoder.embeddings.LayerNorm.weight": (6,),
    "encoder.layers.0.attention.query_key_value.weight": (18, 6),
    "encoder.layers.0.attention.query_key_value.bias": (18,),
    "encoder.layers.0.feed_forward.intermediate.weight": (10, 6),
    "encoder.layers.0.feed_forward.dense.weight": (6, 10),
    "predictions.decoder.bias": (11,),
}
STEPS, RATE = 6, 0.01


class Model(nn.Module):
    """Parameters of some names, with random values."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.values = {
            name: nn.Parameter(torch.randn(*shape, generator=generator)) for name, shape in SHAPES.items()
        }

    def named_parameters(self, *_: Any, **__: Any) -> Any:
        return iter(self.values.items())


def gradients() -> list[dict[str, Tensor]]:
    """Of six steps, small at first and then a hundred times as large."""
    generator = torch.Generator().manual_seed(1)
    return [
        {
            name: torch.randn(*shape, generator=generator) * (1.0 if step == 3 else 0.01)
            for name, shape in SHAPES.items()
        }
        for step in range(STEPS)
    ]


# ---------------------------------------------------------------------------------- the formulas


def adam_moments(config: OptimizerConfig, g: Tensor, state: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """m and v of Adam, debiased."""
    t = state["t"] = state.get("t", 0) + 1
    m: Tensor = config.beta1 * state.get("m", 0) + (1 - config.beta1) * g
    state["m"] = m
    v: Tensor = config.beta2 * state.get("v", 0) + (1 - config.beta2) * g**2
    state["v"] = v
    return m / (1 - config.beta1**t), v / (1 - config.beta2**t)


def by_adamw(config: OptimizerConfig, name: str, w: Tensor, g: Tensor, state: dict[str, Any]) -> Tensor:
    m, v = adam_moments(config, g, state)
    decay = config.weight_decay if decays(name) else 0.0
    return w - RATE * (m / (v.sqrt() + config.eps) + decay * w)


def by_stable_adamw(
    config: OptimizerConfig, name: str, w: Tensor, g: Tensor, state: dict[str, Any]
) -> Tensor:
    """Algorithm 2 of Wortsman et al., with its own moments, debiased by a decay that changes with time."""
    t = state["t"] = state.get("t", 0) + 1
    beta1 = config.beta1 * (1 - config.beta1 ** (t - 1)) / (1 - config.beta1**t)
    beta2 = config.beta2 * (1 - config.beta2 ** (t - 1)) / (1 - config.beta2**t)
    v: Tensor = beta1 * state.get("v", 0) + (1 - beta1) * g
    state["v"] = v
    u: Tensor = beta2 * state.get("u", 0) + (1 - beta2) * g**2
    state["u"] = u
    rms = (g**2 / u.clamp(min=config.eps**2)).mean().sqrt()
    state["rms"] = [*state.get("rms", []), float(rms)]
    rate = RATE / max(1.0, float(rms))
    decay = config.weight_decay if decays(name) else 0.0
    return w - rate * decay * w - rate * v / (u.sqrt() + config.eps)


def by_lamb(config: OptimizerConfig, name: str, w: Tensor, g: Tensor, state: dict[str, Any]) -> Tensor:
    m, v = adam_moments(config, g, state)
    update = m / (v.sqrt() + config.eps)
    if not decays(name):
        return w - RATE * update
    update = update + config.weight_decay * w
    low, high = config.weight_norm_bounds or (0.0, float("inf"))
    return w - RATE * min(max(float(w.norm()), low), high) / float(update.norm()) * update


def by_muon(config: OptimizerConfig, name: str, w: Tensor, g: Tensor, state: dict[str, Any]) -> Tensor:
    if not is_matrix(name):
        return by_adamw(config, name, w, g, state)
    m: Tensor = config.momentum * state.get("m", 0) + (1 - config.momentum) * g
    state["m"] = m
    momentum = config.momentum * m + (1 - config.momentum) * g
    decayed = w - RATE * config.weight_decay * w
    if "query_key_value" not in name:
        return decayed - RATE * orthogonal(momentum)
    rows = torch.arange(18).view(2, 3, 3)  # head, (query, key, value), feature
    for part in range(3):
        chosen = rows[:, part].flatten()
        decayed[chosen] -= RATE * orthogonal(momentum[chosen])
    return decayed


def orthogonal(x: Tensor) -> Tensor:
    """Newton-Schulz as Jordan wrote it, on singular values: u f(f(f(f(f(s))))) vᵀ."""
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    s = s / (s.norm() + 1e-7)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    update: Tensor = 0.2 * max(x.shape) ** 0.5 * (u * s) @ v
    return update


FORMULAS = {"adamw": by_adamw, "stable-adamw": by_stable_adamw, "lamb": by_lamb, "muon": by_muon}


# ------------------------------------------------------------------------------------- the tests


def whole_layouts(optimizer: torch.optim.Optimizer, model: Model) -> None:
    """One rank that holds each parameter whole, in its own tensor."""
    if isinstance(optimizer, WholeOptimizer):
        for name, value in model.values.items():
            parameter = Parameter(name, tuple(value.shape), None, 1)
            fragments = ((Fragment(0, 0, 0, value.numel()),),)
            optimizer.lay_out(value, Layout((parameter,), fragments, (0,), 0, None))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        *((name, {"weight_decay": decay}) for name in FORMULAS for decay in (0.1, 0.0)),
        ("lamb", {"weight_norm_bounds": (0.5, 5.0)}),
        ("muon", {"momentum": 0.5}),
    ],
)
@pytest.mark.parametrize("part", [None, 8])
def test_an_optimizer_does_what_its_paper_says(
    name: str, changes: dict[str, Any], part: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if part:  # values that are updated at a time, and squares that are summed: the last of both are fewer
        monkeypatch.setattr(optimizers, "PART", part)
        monkeypatch.setattr(optimizers, "ROW", part // 2)
    config = OptimizerConfig.model_validate({"name": name, "weight_decay": 0.1, **changes})
    model = Model()
    expected = {key: value.detach().double() for key, value in model.values.items()}
    states: dict[str, dict[str, Any]] = {key: {} for key in expected}
    optimizer = make_optimizer(model, config, SIZES, torch.float32)
    whole_layouts(optimizer, model)
    for group in optimizer.param_groups:
        group["lr"] = RATE
    for step in gradients():
        for key, value in model.values.items():
            value.grad = step[key].clone()
            expected[key] = FORMULAS[name](config, key, expected[key], step[key].double(), states[key])
        optimizer.step()
    for key, value in model.values.items():
        torch.testing.assert_close(value.detach().double(), expected[key], rtol=2e-6, atol=2e-6, msg=key)
    if name == "stable-adamw":  # it clipped, and did not always
        found = [rms for state in states.values() for rms in state["rms"]]
        assert min(found) < 1 < 1.9 < max(found)


def test_nothing_changes_where_a_norm_is_zero() -> None:
    """The ratio of LAMB is then one: neither a weight of zeros nor a gradient of zeros divides by it."""
    config = OptimizerConfig(name="lamb", weight_decay=0.0)
    model = Model()
    optimizer = make_optimizer(model, config, SIZES, torch.float32)
    whole_layouts(optimizer, model)
    zeros, still = (model.values[name] for name in list(SHAPES)[:3:2])
    before = still.detach().clone()
    with torch.no_grad():
        zeros.zero_()
    for value in model.values.values():
        value.grad = torch.ones_like(value)
    still.grad = torch.zeros_like(still)
    optimizer.step()
    assert still.equal(before)
    torch.testing.assert_close(zeros.detach(), torch.full_like(zeros, -config.learning_rate))


@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 24, 8), (2, 8, 24)])
def test_singular_values_come_near_one(shape: tuple[int, ...]) -> None:
    matrices = torch.randn(*shape, generator=torch.Generator().manual_seed(2))
    for dtype in (torch.float32, torch.bfloat16):
        values = torch.linalg.svdvals(orthogonalize(matrices, dtype).float())
        assert values.min() > 0.3
        assert values.max() < 1.3
        u, _, v = torch.linalg.svd(matrices, full_matrices=False)
        along = (orthogonalize(matrices, dtype).float() * (u @ v)).sum(dim=(1, 2)) / min(shape[1:])
        assert along.min() > 0.7  # the directions are those of the nearest orthogonal matrix


def test_matrices_that_lie_side_by_side_are_orthogonalised_one_by_one() -> None:
    """Of a gated feed-forward part: rows in the order group, (input, gate), feature."""
    sizes = ModelConfig(
        preset="modern", hidden_size=24, num_attention_heads=6, intermediate_size=9, generator_size=1 / 3
    )
    optimizer = make_optimizer(Model(), OptimizerConfig(name="muon"), sizes, torch.float32)
    assert isinstance(optimizer, Muon)
    for owner, inside, groups in (("encoder", 9, 3), ("generator", 3, 1)):
        momentum = torch.randn(2 * inside, 24, generator=torch.Generator().manual_seed(3))
        found = optimizer.orthogonal(f"{owner}.layers.0.feed_forward.intermediate.weight", momentum)
        rows = torch.arange(2 * inside).view(groups, 2, inside // groups)
        for part in range(2):
            chosen = rows[:, part].flatten()
            torch.testing.assert_close(found[chosen], orthogonal(momentum[chosen]), rtol=1e-4, atol=1e-5)


def test_groups() -> None:
    groups = parameter_groups(Model(), 0.1, matrices=True)
    assert [(len(g["params"]), g["matrices"], g["decays"], g["weight_decay"]) for g in groups] == [
        (3, True, True, 0.1),
        (1, False, True, 0.1),
        (3, False, False, 0.0),
    ]
    assert [len(g["params"]) for g in parameter_groups(Model(), 0.1)] == [4, 3]


def test_muon_keeps_one_moment_of_matrices() -> None:
    model = Model()
    optimizer = make_optimizer(model, OptimizerConfig(name="muon"), SIZES, torch.float32)
    assert isinstance(optimizer, Muon)
    whole_layouts(optimizer, model)
    for value in model.values.values():
        value.grad = torch.ones_like(value)
    optimizer.step()
    for name, value in model.values.items():
        assert ("exp_avg_sq" in optimizer.state[value]) == (not is_matrix(name)), name
