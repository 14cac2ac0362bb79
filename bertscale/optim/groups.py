"""Parameter groups and the optimizer of a config.

AdamW (Loshchilov and Hutter, 2019) is torch's own, fused; the others are in `optimizers`.
"""

from __future__ import annotations

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
    model: nn.Module, weight_decay: float, *, matrices: bool = False
) -> list[dict[str, Any]]:
    """Two parameter groups, with and without weight decay, or three: with `matrices` those are the first.

    Empty groups are left out. Each carries the keys that `WholeOptimizer` reads.
    """
    groups: dict[tuple[bool, bool], dict[str, Any]] = {}
    for matrix, decay in ((True, True), (False, True), (False, False)):
        group = {"matrices": matrix, "decays": decay, "weight_decay": weight_decay if decay else 0.0}
        groups[matrix, decay] = {"params": [], **group}
    for name, parameter in model.named_parameters():
        groups[matrices and is_matrix(name), decays(name)]["params"].append(parameter)
    return [group for group in groups.values() if group["params"]]


def adamw(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Fused AdamW; its learning rate is set before each step from `schedule.learning_rate`."""
    return torch.optim.AdamW(
        parameter_groups(model, config.weight_decay),
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )


def make_optimizer(
    model: nn.Module, config: OptimizerConfig, sizes: ModelConfig, dtype: torch.dtype
) -> torch.optim.Optimizer:
    """Makes the optimizer of the config; all but AdamW need `lay_out` before their first step.

    `dtype` is that of the run's matrix products, in which Muon iterates.
    """
    if config.name == "adamw":
        return adamw(model, config)
    groups = parameter_groups(model, config.weight_decay, matrices=config.name == "muon")
    if config.name == "stable-adamw":
        return StableAdamW(groups, config)
    if config.name == "lamb":
        return Lamb(groups, config)
    return Muon(groups, config, partial(split_fused, config=sizes), partial(join_fused, config=sizes), dtype)
