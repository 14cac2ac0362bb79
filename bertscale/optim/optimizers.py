"""StableAdamW, LAMB and Muon, exact where the parameters lie in fragments on many ranks.

They need what a fragment cannot tell: the norm of a whole parameter, or the whole matrix. A `Layout` says
what lies where in a tensor. Sums of squares of all its parameters go over the ranks in one collective;
fragments of matrices travel to one rank each, are orthogonalised there, and travel back.

All keep their moments under AdamW's names: exp_avg is the mean of the gradients, exp_avg_sq of their squares.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.adamw import adamw

from bertscale.config import OptimizerConfig
from bertscale.optim.layout import Exchange, Layout

# Coefficients of the quintic iteration: steepest at zero among those that stay near one (Jordan, 2024).
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5

PART = 2**15  # values that a CPU updates at a time: all that a step needs of them stays in the cache
ROW = 512  # values whose squares a CPU sums in float32


class WholeOptimizer(torch.optim.Optimizer):
    """What the three have in common: layouts, moments, and sums over whole parameters.

    `lay_out` is called for each tensor that is to be updated, once DeepSpeed has made them. Groups carry
    `lr`, set before each step, `weight_decay`, `decays`, whether their kind of weights does, and
    `matrices`, whether they are orthogonalised. A step uses gradients up: it may leave its change in them.

    `grad_scale` and `found_inf`, float32 0-dim, are those of torch's fused optimizers: gradients are divided
    by the one, and where the other is 1, they are not finite and nothing changes. The host never reads them.
    """

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    def __init__(self, groups: list[dict[str, Any]], config: OptimizerConfig) -> None:
        super().__init__(groups, {"lr": config.learning_rate})
        self.config = config
        self.layouts: dict[Tensor, Layout] = {}
        self.counted: dict[Tensor, tuple[list[int], Tensor]] = {}  # fragments; their parameters' numbers
        self.sizes: dict[Tensor, Tensor] = {}  # values of each parameter, float64

    def lay_out(self, tensor: Tensor, layout: Layout) -> None:
        """Says what lies in `tensor`."""
        fragments = [i for i, fragment in enumerate(layout.mine) if layout.counts(fragment, layout.rank)]
        numbers = torch.tensor([layout.mine[i].parameter for i in fragments], device=tensor.device)
        self.layouts[tensor] = layout
        self.counted[tensor] = fragments, numbers
        self.sizes[tensor] = torch.tensor(
            [parameter.numel for parameter in layout.parameters], dtype=torch.float64, device=tensor.device
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of all tensors of `param_groups` that have a gradient."""
        if not self.layouts:  # DeepSpeed tries a step while it is set up
            return
        for group in self.param_groups:
            tensors = [tensor for tensor in group["params"] if tensor.grad is not None]
            if not tensors:
                continue
            applied = torch.ones((), device=tensors[0].device)
            if self.found_inf is not None and self.grad_scale is not None:
                applied = 1 - self.found_inf
                for tensor in tensors:  # what is left out becomes zero
                    gradient_of(tensor).mul_(applied / self.grad_scale).nan_to_num_(0.0, 0.0, 0.0)
            for tensor in tensors:
                first_moments(self.state[tensor], tensor, second=not group["matrices"])
            self.update(group, tensors, applied)

    def update(self, group: dict[str, Any], tensors: list[Tensor], applied: Tensor) -> None:
        """Where `applied`, float32 0-dim, is 0, gradients are, and nothing is to change; else it is 1."""
        raise NotImplementedError

    def advance(self, tensor: Tensor, applied: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Takes the gradient into both moments. Gives weight, gradient, and the moments without their bias
        towards zero, some values at a time; the gradient is the caller's to overwrite."""
        state, gradient = self.state[tensor], gradient_of(tensor)
        beta1, beta2 = self.config.beta1, self.config.beta2
        state["step"] += applied
        step = state["step"].double().clamp(min=1)  # in float32, 1 - beta2 ** 1 would have lost four digits
        bias, bias_sq = 1 - beta1**step, 1 - beta2**step
        keep, keep_sq = (torch.where(applied > 0, beta, 1.0) for beta in (beta1, beta2))
        for weight, part, mean, square in in_parts(tensor, gradient, state["exp_avg"], state["exp_avg_sq"]):
            mean.mul_(keep).add_(part, alpha=1 - beta1)
            square.mul_(keep_sq).addcmul_(part, part, value=1 - beta2)
            yield weight, part, mean / bias, square / bias_sq

    def norms(self, tensors: list[Tensor], values: Sequence[list[Tensor]]) -> list[Tensor]:
        """Norms of whole parameters, float64, for each list in `values` of tensors laid out as `tensors`.

        For each tensor a matrix [lists, parameters]; one collective for all.
        """
        found = []
        for number, tensor in enumerate(tensors):
            layout, (fragments, numbers) = self.layouts[tensor], self.counted[tensor]
            squares = tensor.new_zeros(len(values), len(layout.parameters), dtype=torch.float64)
            for row, part in enumerate(values):
                views = layout.views(part[number])
                if fragments:
                    squares[row, numbers] = sums_of_squares([views[i] for i in fragments])
            found.append(squares)
        sizes = [part.shape[1] for part in found]
        together = torch.cat(found, dim=1)
        layout = self.layouts[tensors[0]]
        if len(layout.fragments) > 1:
            dist.all_reduce(together, group=layout.group)
        return [part.sqrt() for part in torch.split(together, sizes, dim=1)]

    def scale(self, tensor: Tensor, values: Tensor, factors: Tensor) -> None:
        """Multiplies each parameter's part of `values`, laid out as `tensor`, by its factor [parameters]."""
        layout = self.layouts[tensor]
        if layout.mine:
            own = factors.to(values.dtype).unbind()
            torch._foreach_mul_(layout.views(values), [own[fragment.parameter] for fragment in layout.mine])


def gradient_of(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


def in_parts(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Flat views of the same values of each; on a GPU of all of them, on a CPU of PART at a time."""
    flat = [tensor.view(-1) for tensor in tensors]
    size = len(flat[0]) if flat[0].is_cuda else PART
    return zip(*(torch.split(values, max(1, size)) for values in flat), strict=True)


def sums_of_squares(views: Sequence[Tensor]) -> Tensor:
    """Of each flat view, float64 [views]."""
    if views[0].is_cuda:
        return torch.stack(torch._foreach_norm(list(views), 2, torch.float64)).square()
    found = []
    for view in views:  # 25 times as fast as in float64 throughout
        whole = len(view) // ROW * ROW
        rows = torch.linalg.vector_norm(view[:whole].view(-1, ROW), dim=1).double().square().sum()
        found.append(rows + view[whole:].double().square().sum())
    return torch.stack(found)


def first_moments(state: dict[str, Any], tensor: Tensor, *, second: bool) -> None:
    """Gives a tensor that has no state yet the one of step 0, as AdamW would have it."""
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=tensor.device)
        state["exp_avg"] = torch.zeros_like(tensor)
        if second:
            state["exp_avg_sq"] = torch.zeros_like(tensor)


class StableAdamW(WholeOptimizer):
    """AdamW whose learning rate falls, for one parameter and step, where the second moment lags behind.

    Algorithm 2 of Wortsman et al., 2023 ("Stable and low-precision training for large-scale
    vision-language models"): the rate is divided by max(1, RMS), RMS² the mean of g² / max(v, eps²) over the
    parameter, which is Adafactor's update clipping. As there the decay, too, is at that rate.
    """

    def update(self, group: dict[str, Any], tensors: list[Tensor], applied: Tensor) -> None:
        eps = self.config.eps
        changes, ratios = [], []
        for tensor in tensors:
            ratios.append(torch.empty_like(tensor))
            parts = zip(self.advance(tensor, applied), in_parts(ratios[-1]), strict=True)
            for (_, gradient, mean, square), (ratio,) in parts:
                root = square.sqrt_()
                torch.div(gradient, root.clamp(min=eps), out=ratio)
                torch.div(mean, root.add_(eps), out=gradient)
            changes.append(gradient_of(tensor))
        norms = self.norms(tensors, [ratios])
        for tensor, change, (norm,) in zip(tensors, changes, norms, strict=True):
            change.add_(tensor, alpha=group["weight_decay"])
            self.scale(tensor, change, 1 / (norm / self.sizes[tensor].sqrt()).clamp(min=1.0))
            tensor.addcmul_(change, applied, value=-group["lr"])


class Lamb(WholeOptimizer):
    """LAMB (You et al., 2020), Algorithm 2: Adam's update with decay, scaled to the weight's own norm.

    The rate of a parameter is multiplied by phi(|w|) / |u|, u the update with the decay in it, and by 1 where
    either norm is zero. phi keeps |w| within `weight_norm_bounds` if they are given and is the identity if
    not. As in the authors' code, biases and LayerNorms, which do not decay, take no such ratio.
    """

    def update(self, group: dict[str, Any], tensors: list[Tensor], applied: Tensor) -> None:
        changes = []
        for tensor in tensors:
            for weight, gradient, mean, square in self.advance(tensor, applied):
                torch.div(mean, square.sqrt_().add_(self.config.eps), out=gradient)
                gradient.add_(weight, alpha=group["weight_decay"])
            changes.append(gradient_of(tensor))
        if group["decays"]:
            norms = self.norms(tensors, [tensors, changes])
            for tensor, change, (weight, size) in zip(tensors, changes, norms, strict=True):
                bounded = weight.clamp(*self.config.weight_norm_bounds or (0.0, None))
                ratio = torch.where((weight > 0) & (size > 0), bounded / size, 1.0)
                self.scale(tensor, change, ratio)
        for tensor, change in zip(tensors, changes, strict=True):
            tensor.addcmul_(change, applied, value=-group["lr"])


class Muon(WholeOptimizer):
    """Muon (Jordan et al., 2024) for the matrices of the layers, AdamW for all else.

    The update is the matrix nearest to Nesterov's momentum that has all singular values near one, times
    0.2 sqrt(max(rows, columns)), which gives it the size of AdamW's, so that one learning rate and decay fit
    both (Liu et al., 2025, "Muon is scalable for LLM training"). The query, key and value projection is three
    matrices, and the gated one of the feed-forward part two, each orthogonalised by itself, as they would be
    if they were not laid side by side.

    `split` and `join` take a parameter (name, values) to its matrices [count, rows, columns] and back;
    `dtype` is that of the iteration.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        config: OptimizerConfig,
        split: Callable[[str, Tensor], Tensor],
        join: Callable[[str, Tensor], Tensor],
        dtype: torch.dtype,
    ) -> None:
        super().__init__(groups, config)
        self.split, self.join, self.dtype = split, join, dtype
        self.exchanges: dict[Tensor, Exchange] = {}

    def update(self, group: dict[str, Any], tensors: list[Tensor], applied: Tensor) -> None:
        config, rate = self.config, group["lr"]
        states = [self.state[tensor] for tensor in tensors]
        gradients = [gradient_of(tensor) for tensor in tensors]
        if not group["matrices"]:
            adamw(
                tensors,
                gradients,
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                [state["step"] for state in states],
                fused=True,
                found_inf=1 - applied,
                amsgrad=False,
                beta1=config.beta1,
                beta2=config.beta2,
                lr=rate,
                weight_decay=group["weight_decay"],
                eps=config.eps,
                maximize=False,
            )
            return
        for tensor, gradient, state in zip(tensors, gradients, states, strict=True):
            state["step"] += applied
            state["exp_avg"].lerp_(gradient, (1 - config.momentum) * applied)
            change = gradient.lerp(state["exp_avg"], config.momentum)
            if tensor not in self.exchanges:
                self.exchanges[tensor] = Exchange(self.layouts[tensor])
            self.exchanges[tensor].change_whole(change.view(-1), self.orthogonal)
            tensor.mul_(1 - rate * group["weight_decay"] * applied).addcmul_(change, applied, value=-rate)

    def orthogonal(self, name: str, momentum: Tensor) -> Tensor:
        """The update of the whole parameter `name` from its momentum, both [rows, columns]."""
        matrices = self.split(name, momentum)
        size = 0.2 * max(matrices.shape[-2:]) ** 0.5
        return self.join(name, orthogonalize(matrices, self.dtype).to(momentum.dtype) * size)


def orthogonalize(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """[count, rows, columns] -> the like, in `dtype`, with singular values of about 0.7 to 1.2.

    Newton-Schulz, five times x <- a x + (b x xᵀ + c (x xᵀ)²) x, on the smaller side's Gram matrix.
    """
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)).to(dtype)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
