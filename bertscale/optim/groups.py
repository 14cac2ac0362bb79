"""Parameter groups and the optimizer of a config.

AdamW (Loshchilov and Hutter, 2019) is torch's own, fused; the others are in `optimizers`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from bertscale.config import ModelConfig, OptimizerConfig
from bertscale.model.model import join_fused, split_fused
from bertscale.optim.optimizers import Lamb, Muon, StableAdamW


def decays(name: str) -> bool:
    """Whether weight decay applies: not to biases and not to LayerNorms."""
    return not (name.endswith("bias") or "LayerNorm" in name)


def is_matrix(name: str) -> bool:
    """Whether the parameter is a matrix of a layer, which Muon updates: no embedding, norm, bias or head."""
    return ".layers." in name and decays(name)


def parameter_groups(
    model: nn.Module,
    weight_decay: float,
    *,
    matrices: bool = False,
    scale: Callable[[str], float] | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups with and without weight decay; with `matrices`, those are the first, apart.

    `scale(name)` is the factor of a parameter's learning rate: groups of one factor stand together, and
    parameters of factor 0 are in none. Empty groups are left out. Each carries the keys that `WholeOptimizer`
    reads, and its `scale`.
    """
    groups: dict[tuple[bool, bool, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        factor = 1.0 if scale is None else scale(name)
        if factor == 0:
            continue
        key = matrices and is_matrix(name), decays(name), factor
        if key not in groups:
            decay = weight_decay if key[1] else 0.0
            groups[key] = {"matrices": key[0], "decays": key[1], "weight_decay": decay, "scale": factor}
            groups[key]["params"] = []
        groups[key]["params"].append(parameter)
    return [groups[key] for key in sorted(groups, key=lambda key: (not key[0], not key[1], key[2]))]


def adamw(
    model: nn.Module, config: OptimizerConfig, scale: Callable[[str], float] | None = None
) -> torch.optim.AdamW:
    """Fused AdamW; its learning rate is set before each step from `schedule.learning_rate`."""
    return torch.optim.AdamW(
        parameter_groups(model, config.weight_decay, scale=scale),
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )


def make_optimizer(
    model: nn.Module,
    config: OptimizerConfig,
    sizes: ModelConfig,
    dtype: torch.dtype,
    scale: Callable[[str], float] | None = None,
) -> torch.optim.Optimizer:
    """Makes the optimizer of the config; all but AdamW need `lay_out` before their first step.

    `dtype` is that of the run's matrix products, in which Muon iterates; `scale` as of `parameter_groups`.
    """
    if config.name == "adamw":
        return adamw(model, config, scale)
    groups = parameter_groups(model, config.weight_decay, matrices=config.name == "muon", scale=scale)
    if config.name == "stable-adamw":
        return StableAdamW(groups, config)
    if config.name == "lamb":
        return Lamb(groups, config)
    return Muon(groups, config, partial(split_fused, config=sizes), partial(join_fused, config=sizes), dtype)
