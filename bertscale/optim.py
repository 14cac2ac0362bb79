"""Parameter groups, the optimizer and its schedule.

AdamW (Loshchilov and Hutter, 2019) with linear warm-up and linear decay to zero, as BERT was trained.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from bertscale.config import OptimizerConfig


def decays(name: str) -> bool:
    """Whether weight decay applies: not to biases and not to LayerNorms."""
    return not (name.endswith("bias") or "LayerNorm" in name)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups, with and without weight decay; empty groups are left out."""
    groups: list[dict[str, Any]] = []
    for decay in (True, False):
        members = [p for name, p in model.named_parameters() if decays(name) == decay]
        if members:
            groups.append({"params": members, "weight_decay": weight_decay if decay else 0.0})
    return groups


def adamw(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """The optimizer; its learning rate is set before each step from `learning_rate`."""
    return torch.optim.AdamW(
        parameter_groups(model, config.weight_decay),
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )


def learning_rate(step: int, steps: int, config: OptimizerConfig) -> float:
    """Learning rate of `step` (0-based) of `steps`: up to the highest in warm-up, then down to zero."""
    warmup = round(steps * config.warmup_fraction)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    return config.learning_rate * (steps - step) / max(1, steps - warmup)
