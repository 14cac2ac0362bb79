"""Longer sequences than the source has seen: more rows for learned positions.

Two rules, from a table of n rows to one of N:

| rule          | row i                                               | texts of at most n tokens            |
| ------------- | --------------------------------------------------- | ------------------------------------ |
| `copy`        | row i mod n: the table again and again              | give the same outputs, bit for bit   |
| `interpolate` | between the two rows around i (n - 1) / (N - 1)     | give others until training mends it  |

`copy` is Longformer's (Beltagy et al., 2020, section 5): attention has learnt to look at near tokens, and
copies keep that everywhere but where two of them meet. `interpolate` squeezes the new positions into the
range that was trained, the first and the last row staying where they are, as vision transformers do for
larger pictures (Dosovitskiy et al., 2021, section 3.2) and Chen et al., 2023 ("Extending Context Window of
Large Language Models via Positional Interpolation"), do for rotary positions. Rotary presets have no rows:
their positions go on without end, best with larger bases (`global_rope_theta`).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from bertscale.convert.sources import InitSource
from bertscale.pretrain.reshaped import Reshaped

POSITIONS = "encoder.embeddings.position_embeddings.weight"


def extended_positions(rows: Tensor, length: int, rule: Literal["copy", "interpolate"]) -> Tensor:
    """The table of positions [n, H] as one of `length` rows, by a rule of the module's table.

    A table that is not longer than the old one is its begin, by either rule.
    """
    old = len(rows)
    if length <= old:
        return rows[:length].clone()
    if rule == "copy":
        return rows[torch.arange(length) % old]
    places = torch.arange(length, dtype=torch.float64) * (old - 1) / (length - 1)  # [length], in old rows
    before = places.long().clamp(max=max(old - 2, 0))
    after = (before + 1).clamp(max=old - 1)
    return torch.lerp(rows[before], rows[after], (places - before).to(rows.dtype)[:, None])


def longer(source: InitSource, length: int, rule: Literal["copy", "interpolate"]) -> InitSource:
    """`source` for sequences of at most `length` tokens."""

    def tensor(name: str) -> Tensor:
        value = source.tensor(name)
        return extended_positions(value, length, rule) if name == POSITIONS else value

    return Reshaped(source, tensor, max_position_embeddings=length)
