"""The seam between the model and its parallelism: the dense layers, and what a parallel set must offer.

The model asks a `Layers` object for every layer that may be sharded and never asks for a rank.
`Layers` is the dense set; `tensor_parallel.TensorParallelLayers` overrides each method with megatron-core's.

Dimensions: T tokens, P masked positions, V vocabulary on this rank (all of it when dense).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from bertscale.model.kernels import cross_entropy, place_of, running_sums


def derive_seed(*parts: int | str) -> int:
    """A seed of 63 bits, the same on every machine, that differs wherever any part does."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class Embedding(nn.Embedding):
    """`nn.Embedding` whose values wait for `model.initial_value` (no random draw when it is made)."""

    def reset_parameters(self) -> None:
        pass


class Linear(nn.Linear):
    """`nn.Linear` whose values wait for `model.initial_value`."""

    def reset_parameters(self) -> None:
        pass


class Layers:
    """The dense set of layers."""

    degree = 1  # ranks that share a layer
    rank = 0  # this rank's place among them
    token_multiple = 1  # of the tokens in a forward pass

    def column(self, inputs: int, outputs: int, bias: bool = True) -> nn.Module:
        """[.., inputs] -> [.., outputs / degree]: each rank holds a share of the output features."""
        return Linear(inputs, outputs, bias)

    def row(self, inputs: int, outputs: int, bias: bool = True) -> nn.Module:
        """[.., inputs / degree] -> [.., outputs]: each rank holds a share of the input features."""
        return Linear(inputs, outputs, bias)

    def norm(self, width: int, eps: float, bias: bool = True) -> nn.Module:
        """LayerNorm of hidden states, between the layers that are shared out."""
        return nn.LayerNorm(width, eps, bias=bias)

    def word_embedding(self, vocab_size: int, width: int) -> nn.Module:
        """Ids [T] -> [T, width]: each rank holds a share of the rows."""
        return Embedding(vocab_size, width)

    def copy_to_tensor_parallel(self, hidden: Tensor) -> Tensor:
        """Hidden states for a projection whose outputs are shared out: the ranks' gradients are summed."""
        return hidden

    def cross_entropy(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Loss of each position, float32 [P], and its gradient [P, V], from logits [P, V], which may be
        overwritten, and ids [P]."""
        return cross_entropy(logits, targets), logits

    def correct(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Whether each of the targets [P] has the highest logit (ties count), bool [P].

        By the maximum, which a CPU finds 17 times as fast as its place.
        """
        return logits.gather(1, targets[:, None])[:, 0] >= logits.amax(dim=-1)

    @torch.no_grad()
    def sample(self, logits: Tensor, uniforms: Tensor) -> Tensor:
        """An id for each position, int64 [P], drawn from the softmax of its logits [P, V].

        By the inverse of the cumulated softmax at `uniforms` [P], float64, at least 0 and below 1.
        """
        highest, sums = running_sums(logits)
        return place_of(logits, highest, sums, uniforms * sums[:, -1])

    def seed(self, shared: int, own: int) -> None:
        """Starts the random draws anew: from `shared`, equal on all ranks of a layer, those that they share,
        from `own`, which differs, those inside `sharded_random`."""
        torch.manual_seed(shared)

    def sharded_random(self) -> AbstractContextManager[None]:
        """Random draws inside are this rank's own; outside, all ranks of a layer draw the same."""
        return nullcontext()

    def residual_random(self) -> AbstractContextManager[None]:
        """For dropout of hidden states between layers: draws are shared unless the tokens are shared out."""
        return nullcontext()

    def scatter(self, hidden: Tensor) -> Tensor:
        """[T, H], on every rank -> what this rank holds of it between layers: all, or a share of tokens."""
        return hidden

    def gather(self, hidden: Tensor) -> Tensor:
        """The inverse of `scatter`."""
        return hidden

    def checkpoint(self, function: Callable[..., Tensor], *inputs: Any) -> Tensor:
        """`function(*inputs)`, computed once more in the backward pass instead of kept (Chen et al., 2016).

        Random draws are repeated, both those that all ranks share and this rank's own.
        """
        return checkpoint_of(function, inputs, nullcontext)


def checkpoint_of(
    function: Callable[..., Tensor],
    inputs: tuple[Any, ...],
    again: Callable[[], AbstractContextManager[None]],
) -> Tensor:
    """torch's activation checkpoint; the recomputation runs inside `again()`."""
    if not torch.is_grad_enabled():
        return function(*inputs)
    recomputing = False

    def run(*inputs: Any) -> Tensor:
        nonlocal recomputing
        with again() if recomputing else nullcontext():
            recomputing = True
            return function(*inputs)

    # Reentrant: the recomputation has a graph and hooks of its own. Under ZeRO-3 the other kind lets go of
    # the weights that it has gathered before their gradients are there.
    output: Tensor = torch.utils.checkpoint.checkpoint(run, *inputs, use_reentrant=True)
    return output
