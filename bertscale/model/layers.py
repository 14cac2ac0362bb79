"""The seam between the model and its parallelism: the dense layers, and what a parallel set must offer.

The model asks a `Layers` object for every layer that may be sharded and never asks for a rank.
`Layers` is the dense set; `tensor_parallel.TensorParallelLayers` overrides each method with megatron-core's.
A share is what one tensor-parallel rank holds of a layer, a vocabulary or the tokens.

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

from bertscale.model.kernels import cross_entropy, first_above, running_sums


def derive_seed(*parts: int | str) -> int:
    """A seed of 63 bits, the same on every machine, that differs wherever any part does."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class Embedding(nn.Embedding):
    """`nn.Embedding` without first values, which `model.initial_value` gives."""

    def reset_parameters(self) -> None:
        pass


class Linear(nn.Linear):
    """`nn.Linear` without first values, which `model.initial_value` gives."""

    def reset_parameters(self) -> None:
        pass


class Layers:
    """The dense set of layers."""

    degree = 1  # ranks that share a layer
    rank = 0  # this rank's number among them
    token_multiple = 1  # the tokens of a forward pass are padded to a multiple of it

    def column(self, inputs: int, outputs: int, bias: bool = True) -> nn.Module:
        """A dense layer, [.., inputs] -> [.., outputs / degree]: each rank has a share of the outputs."""
        return Linear(inputs, outputs, bias)

    def row(self, inputs: int, outputs: int, bias: bool = True) -> nn.Module:
        """A dense layer, [.., inputs / degree] -> [.., outputs]: each rank has a share of the inputs."""
        return Linear(inputs, outputs, bias)

    def norm(self, width: int, eps: float, bias: bool = True) -> nn.Module:
        """LayerNorm of hidden states, between the layers that are sharded."""
        return nn.LayerNorm(width, eps, bias=bias)

    def word_embedding(self, vocab_size: int, width: int) -> nn.Module:
        """An embedding, ids [T] -> [T, width]: each rank has a share of the rows (pieces)."""
        return Embedding(vocab_size, width)

    def copy_to_tensor_parallel(self, hidden: Tensor) -> Tensor:
        """Hidden states for a projection whose outputs are sharded: the backward pass sums the ranks'
        gradients, each of which is of its own outputs."""
        return hidden

    def cross_entropy(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Loss of each position, float32 [P], and its gradient [P, V], from logits [P, V], which may be
        overwritten, and ids [P]."""
        return cross_entropy(logits, targets), logits

    def correct(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Whether each of the targets [P] has the highest logit (ties count), bool [P].

        By the maximum, which a CPU finds 17 times as fast as its index.
        """
        return logits.gather(1, targets[:, None])[:, 0] >= logits.amax(dim=-1)

    @torch.no_grad()
    def sample(self, logits: Tensor, uniforms: Tensor) -> Tensor:
        """An id for each position, int64 [P], drawn from the softmax of its logits [P, V].

        By the inverse of the cumulative softmax at `uniforms` [P], float64, at least 0 and below 1.
        """
        highest, sums = running_sums(logits)
        return first_above(logits, highest, sums, uniforms * sums[:, -1])

    def seed(self, shared: int, own: int) -> None:
        """Seeds the random draws: with `own`, which differs on the ranks of a layer, those inside
        `sharded_random`; with `shared`, which is equal on them, all others."""
        torch.manual_seed(shared)

    def sharded_random(self) -> AbstractContextManager[None]:
        """A context in which random draws are this rank's own; outside, all ranks of a layer draw alike."""
        return nullcontext()

    def residual_random(self) -> AbstractContextManager[None]:
        """The context of dropout between layers: all ranks draw the same unless the tokens are sharded."""
        return nullcontext()

    def scatter(self, hidden: Tensor) -> Tensor:
        """Hidden states [T, H] -> what this rank holds of them between layers: all, or a share of tokens."""
        return hidden

    def gather(self, hidden: Tensor) -> Tensor:
        """The inverse of `scatter`."""
        return hidden

    def checkpoint(self, function: Callable[..., Tensor], *inputs: Any) -> Tensor:
        """Returns `function(*inputs)` and recomputes it in the backward pass, so that nothing inside is kept
        (Chen et al., 2016).

        Random draws are repeated, both those that all ranks share and this rank's own.
        """
        return checkpoint_of(function, inputs, nullcontext)


def checkpoint_of(
    function: Callable[..., Tensor],
    inputs: tuple[Any, ...],
    again: Callable[[], AbstractContextManager[None]],
) -> Tensor:
    """Activation checkpointing by torch; the recomputation runs inside the context `again()`."""
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
