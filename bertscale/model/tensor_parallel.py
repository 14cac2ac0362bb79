"""megatron-core's tensor-parallel layers behind the seam of `layers`, and the groups of their ranks.

Tensor-parallel ranks see identical batches and hold shares of each layer (Shoeybi et al., 2019). This is the
only module that imports megatron-core: half a second of a core in each rank, from which `parallel` saves
those that share no layer.

Dimensions: P masked positions, V vocabulary on this rank, R ranks that share a layer, T tokens, t = T / R of
them on this rank. The methods are documented in `layers`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bertscale.model.kernels import first_above, running_sums
from bertscale.model.layers import Layers, checkpoint_of

# It warns of each optional package that is not installed; and decorates functions that nobody calls here to
# be compiled, which would load torch's compiler, two seconds of a core.
with warnings.catch_warnings(), mock.patch.object(torch, "compile", lambda function: function):
    warnings.simplefilter("ignore")
    from megatron.core import parallel_state
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
    from megatron.core.tensor_parallel.layers import (
        ColumnParallelLinear,
        RowParallelLinear,
        VocabParallelEmbedding,
    )
    from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region


def make_groups(degree: int) -> tuple[Any, Any]:
    """Makes the (data-parallel group, tensor-parallel group) of this rank, with `degree` ranks to a layer.

    Every rank must call it, as for any new process group.
    """
    parallel_state.initialize_model_parallel(degree, create_gloo_process_groups=False)
    return parallel_state.get_data_parallel_group(), parallel_state.get_tensor_model_parallel_group()


def leave_groups() -> None:
    """Undoes `make_groups`."""
    parallel_state.destroy_model_parallel()


class TensorParallelLayers(Layers):
    """megatron-core's layers under the names of the seam, and the two streams of random numbers.

    Ranks draw alike where they hold the same hidden states, and differently inside their shares. torch has
    one generator for a device: `sharded_random` swaps its state (megatron-core's tracker: on CUDA alone).
    """

    def __init__(self, degree: int, rank: int, device: torch.device) -> None:
        self.degree, self.rank, self.device = degree, rank, device
        self.config = ModelParallelConfig(
            tensor_model_parallel_size=degree,
            use_cpu_initialization=True,  # the only branch that allocates on torch's current device
            perform_initialization=False,  # values come from model.initial_value
            params_dtype=torch.get_default_dtype(),
        )
        self._own_state = self._generator().get_state()

    def column(self, inputs: int, outputs: int, bias: bool = True) -> nn.Module:
        return _Column(inputs, outputs, config=self.config, init_method=_no_values, bias=bias)

    def row(self, inputs: int, outputs: int, bias: bool = True) -> nn.Module:
        return _Row(inputs, outputs, bias, self.config)

    def word_embedding(self, vocab_size: int, width: int) -> nn.Module:
        embedding: nn.Module = VocabParallelEmbedding(
            vocab_size, width, init_method=_no_values, config=self.config
        )
        return embedding

    def copy_to_tensor_parallel(self, hidden: Tensor) -> Tensor:
        same: Tensor = copy_to_tensor_model_parallel_region(hidden)
        return same

    @torch.enable_grad()
    def cross_entropy(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        share = logits.float().detach().requires_grad_()  # [P, V]
        losses = vocab_parallel_cross_entropy(share, targets)  # [P]; two all-reduces of [P]
        (gradient,) = torch.autograd.grad(losses.sum(), share)
        return losses.detach(), gradient.to(logits.dtype)

    def correct(self, logits: Tensor, targets: Tensor) -> Tensor:
        width = logits.shape[-1]
        column = targets - self.rank * width  # [P], the target's on this rank
        is_here = (column >= 0) & (column < width)
        wanted = logits.gather(1, column.clamp(0, width - 1)[:, None])[:, 0].float()
        wanted = wanted.masked_fill(~is_here, -torch.inf)
        # One collective for two questions: the highest logit, and the target's, which one rank alone knows.
        highest_and_wanted = torch.stack([logits.amax(dim=-1).float(), wanted])  # [2, P]
        group = parallel_state.get_tensor_model_parallel_group()
        dist.all_reduce(highest_and_wanted, dist.ReduceOp.MAX, group=group)
        return highest_and_wanted[1] >= highest_and_wanted[0]

    @torch.no_grad()
    def sample(self, logits: Tensor, uniforms: Tensor) -> Tensor:
        # The inverse of the cumulative softmax in two steps: which rank's share of the vocabulary the
        # threshold lies in, which all ranks compute from [2, P] of each; then the id, on that rank.
        highest, sums = running_sums(logits)  # [P], [P, K]
        of_share = torch.stack([highest.double(), sums[:, -1]])  # [2, P]
        all_highest, totals = _all_gather(of_share).view(self.degree, 2, -1).unbind(1)  # 2 x [R, P]
        scale = (all_highest - all_highest.amax(dim=0)).exp()  # each rank summed below a maximum of its own
        ends = (totals * scale).cumsum(dim=0)  # [R, P] where the ranks' shares of the whole sum end
        thresholds = uniforms * ends[-1]  # [P]
        here = (ends <= thresholds).sum(dim=0) == self.rank  # [P] whether this share holds the threshold
        begin = ends[self.rank - 1] if self.rank else torch.zeros_like(thresholds)
        within = torch.where(here, (thresholds - begin) / scale[self.rank], 0.0)
        ids = first_above(logits, highest, sums, within) + self.rank * logits.shape[1]
        ids = torch.where(here, ids, 0)  # so that the sum over the ranks is the one id that was found
        dist.all_reduce(ids, group=parallel_state.get_tensor_model_parallel_group())
        return ids

    @contextmanager
    def sharded_random(self) -> Iterator[None]:
        generator = self._generator()
        shared = generator.get_state()
        generator.set_state(self._own_state)
        try:
            yield
        finally:
            self._own_state = generator.get_state()
            generator.set_state(shared)

    def checkpoint(self, function: Callable[..., Tensor], *inputs: Any) -> Tensor:
        at_start = self._own_state  # the other stream, torch's generator, is restored by torch

        @contextmanager
        def again() -> Iterator[None]:
            now, self._own_state = self._own_state, at_start
            try:
                yield
            finally:
                self._own_state = now

        return checkpoint_of(function, inputs, again)

    def seed(self, shared: int, own: int) -> None:
        generator = self._generator()
        self._own_state = generator.manual_seed(own).get_state()
        generator.manual_seed(shared)

    def _generator(self) -> torch.Generator:
        if self.device.type == "cuda":
            return torch.cuda.default_generators[self.device.index or 0]
        return torch.default_generator


class SequenceParallelLayers(TensorParallelLayers):
    """Sequence parallel (Korthikanti et al., 2022): between the sharded layers each rank holds a share of the
    tokens, so that norms, dropout and residuals are computed, and their activations kept, by one rank each.

    The columns' input is gathered, the rows' output summed and scattered: together the traffic of the
    all-reduce that they replace. Weights that every rank holds whole see a share of the tokens only; their
    gradients are summed where they arise. megatron-core's own version runs on CUDA alone.
    """

    def __init__(self, degree: int, rank: int, device: torch.device) -> None:
        super().__init__(degree, rank, device)
        self.token_multiple = degree

    def column(self, inputs: int, outputs: int, bias: bool = True) -> nn.Module:
        return _TokenColumn(inputs, outputs, config=self.config, init_method=_no_values, bias=bias)

    def row(self, inputs: int, outputs: int, bias: bool = True) -> nn.Module:
        return _TokenRow(inputs, outputs, bias, self.config)

    def norm(self, width: int, eps: float, bias: bool = True) -> nn.Module:
        return _TokenNorm(width, eps, bias=bias)

    def residual_random(self) -> AbstractContextManager[None]:
        return self.sharded_random()

    def scatter(self, hidden: Tensor) -> Tensor:
        return _scatter(hidden)

    def gather(self, hidden: Tensor) -> Tensor:
        return _gather(hidden)


def _all_gather(share: Tensor) -> Tensor:
    """All ranks' shares [t, ..] as one tensor [T, ..], in the order of ranks."""
    group = parallel_state.get_tensor_model_parallel_group()
    whole = share.new_empty(len(share) * group.size(), *share.shape[1:])
    dist.all_gather_into_tensor(whole, share.contiguous(), group=group)
    return whole


def _reduce_scatter(partial: Tensor) -> Tensor:
    """Sums the ranks' [T, ..] and returns this rank's share [t, ..] of the sum."""
    group = parallel_state.get_tensor_model_parallel_group()
    share = partial.new_empty(len(partial) // group.size(), *partial.shape[1:])
    dist.reduce_scatter_tensor(share, partial.contiguous(), group=group)
    return share


def _own_share(whole: Tensor) -> Tensor:
    """This rank's share [t, ..] of [T, ..], a view."""
    group = parallel_state.get_tensor_model_parallel_group()
    share: Tensor = whole.chunk(group.size())[group.rank()]
    return share


def _collective(
    compute: Callable[[Tensor], Tensor], compute_gradient: Callable[[Tensor], Tensor]
) -> Callable[[Tensor], Tensor]:
    """A function of a tensor with another one for its gradient."""

    class Collective(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, value: Tensor) -> Tensor:
            return compute(value)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return compute_gradient(grad)

    return Collective.apply


# Shares [t, ..] of what all ranks hold alike [T, ..]; their gradients are gathered.
_scatter = _collective(lambda whole: _own_share(whole).clone(), _all_gather)
# All tokens [T, ..] of the ranks' shares [t, ..], for what all ranks then compute alike.
_gather = _collective(_all_gather, _own_share)
# Shares [t, ..] of the sum of the ranks' [T, ..].
_sum_and_scatter = _collective(_reduce_scatter, _all_gather)


class _GatherThenLinear(torch.autograd.Function):
    """A linear layer on the gathered tokens, [t, H] -> [T, outputs / R].

    Keeps this rank's share of the input and gathers it again in the backward pass: a collective more for
    activations that are R times smaller.
    """

    @staticmethod
    def forward(ctx: Any, share: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(share, weight)
        ctx.has_bias = bias is not None
        return nn.functional.linear(_all_gather(share), weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        share, weight = ctx.saved_tensors
        of_input = _reduce_scatter(grad @ weight)  # [T, H] -> [t, H]
        of_weight = grad.t() @ _all_gather(share)
        return of_input, of_weight, grad.sum(dim=0) if ctx.has_bias else None


class _Column(ColumnParallelLinear):  # type: ignore[misc]
    """megatron-core's layer without the second value of its result, a bias that is left to add."""

    def forward(self, inputs: Tensor) -> Tensor:
        output: Tensor = super().forward(inputs)[0]
        return output


class _Row(RowParallelLinear):  # type: ignore[misc]
    """megatron-core's layer without the second value of its result, a bias that is left to add."""

    def __init__(self, inputs: int, outputs: int, bias: bool, config: ModelParallelConfig) -> None:
        how = {"init_method": _no_values, "input_is_parallel": True, "skip_bias_add": False}
        super().__init__(inputs, outputs, config=config, bias=bias, **how)

    def forward(self, inputs: Tensor) -> Tensor:
        output: Tensor = super().forward(inputs)[0]
        return output


class _TokenColumn(_Column):
    """A column layer from a share of the tokens to a share of the features of all tokens."""

    def forward(self, inputs: Tensor) -> Tensor:
        output: Tensor = _GatherThenLinear.apply(inputs, self.weight, self.bias)  # type: ignore[no-untyped-call]
        return output


class _TokenRow(_Row):
    """A row layer from a share of the features of all tokens to a share of the tokens."""

    def forward(self, inputs: Tensor) -> Tensor:
        output = _sum_and_scatter(nn.functional.linear(inputs, self.weight))
        return output if self.bias is None else output + _summed(self.bias)


class _TokenNorm(nn.LayerNorm):
    """LayerNorm of a share of the tokens."""

    def forward(self, inputs: Tensor) -> Tensor:
        bias = None if self.bias is None else _summed(self.bias)
        return nn.functional.layer_norm(inputs, self.normalized_shape, _summed(self.weight), bias, self.eps)


def _summed(parameter: Tensor) -> Tensor:
    """The parameter itself; its gradient is summed over the ranks of a layer, which see different tokens."""
    same: Tensor = copy_to_tensor_model_parallel_region(parameter)
    return same


def _no_values(tensor: Tensor) -> Tensor:
    return tensor
