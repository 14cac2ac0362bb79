"""StableAdamW, LAMB and Muon, exact where the parameters lie in fragments on many ranks.

They need what a fragment cannot tell: the norm of a whole parameter, or the whole matrix. A `Layout` says
what lies where in a tensor. Sums of squares of all its parameters are summed over the ranks in one
collective; fragments of matrices travel to one rank each, are orthogonalised there, and travel back.

All keep their moments under AdamW's names: exp_avg is the mean of the gradients, exp_avg_sq of their squares.
A tensor holds fragments of several parameters; a part is some of its values, which a CPU updates together.
The numbers of `parameters` are their indices in the tensor's layout.
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

PART = 2**15  # values that a CPU updates at a time: all that an update needs of them stays in the cache
ROW = 512  # values whose squares a CPU sums in float32: few enough that rounding does not add up


class WholeOptimizer(torch.optim.Optimizer):
    """The base of the three: layouts, moments, and sums over whole parameters.

    `lay_out` is called for each tensor that is to be updated, once DeepSpeed has made them. Groups carry
    `lr`, set before each step, `weight_decay`, `decays`, whether their kind of weights does, and
    `matrices`, whether they are orthogonalised. A step overwrites gradients: it may leave its change in them,
    which saves a tensor of the same size.

    `grad_scale` and `found_inf`, float32 0-dim, are those of torch's fused optimizers: gradients are divided
    by `grad_scale`, and where `found_inf` is 1, they are not finite and nothing changes. The host never reads
    them, so that it does not wait for the device.
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
        """Registers the layout of `tensor`, one of those that are updated."""
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
        if not self.layouts:  # DeepSpeed makes a trial step during its set-up
            return
        for group in self.param_groups:
            tensors = [tensor for tensor in group["params"] if tensor.grad is not None]
            if not tensors:
                continue
            applied = torch.ones((), device=tensors[0].device)
            if self.found_inf is not None and self.grad_scale is not None:
                applied = 1 - self.found_inf
                # In a skipped step they become 0, by nan_to_num, for 0 times NaN is NaN.
                for tensor in tensors:
                    gradient_of(tensor).mul_(applied / self.grad_scale).nan_to_num_(0.0, 0.0, 0.0)
            for tensor in tensors:
                first_moments(self.state[tensor], tensor, second=not group["matrices"])
            self.update(group, tensors, applied)

    def update(self, group: dict[str, Any], tensors: list[Tensor], applied: Tensor) -> None:
        """Updates the tensors of a group. `applied`, float32 0-dim, is 1, or 0 for a step that is skipped:
        then gradients are 0 and nothing may change."""
        raise NotImplementedError

    def advance(self, tensor: Tensor, applied: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Updates both moments by the gradient. Yields weight, gradient, and the moments without their bias
        towards zero, one part at a time; the caller may overwrite the gradient."""
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

        Returns for each tensor a matrix [lists, parameters]. One collective for all of them.
        """
        squares_of = []
        for number, tensor in enumerate(tensors):
            layout, (fragments, numbers) = self.layouts[tensor], self.counted[tensor]
            squares = tensor.new_zeros(len(values), len(layout.parameters), dtype=torch.float64)
            for row, part in enumerate(values):
                views = layout.views(part[number])
                if fragments:
                    squares[row, numbers] = sums_of_squares([views[i] for i in fragments])
            squares_of.append(squares)
        sizes = [squares.shape[1] for squares in squares_of]
        together = torch.cat(squares_of, dim=1)  # [lists, parameters of all tensors]
        layout = self.layouts[tensors[0]]  # all of them have one group
        if len(layout.fragments) > 1:
            dist.all_reduce(together, group=layout.group)
        return [squares.sqrt() for squares in torch.split(together, sizes, dim=1)]

    def scale(self, tensor: Tensor, values: Tensor, factors: Tensor) -> None:
        """Multiplies each parameter's part of `values`, laid out as `tensor`, by its factor [parameters]."""
        layout = self.layouts[tensor]
        if layout.mine:
            factor_of = factors.to(values.dtype).unbind()
            torch._foreach_mul_(layout.views(values), [factor_of[f.parameter] for f in layout.mine])


def gradient_of(tensor: Tensor) -> Tensor:
    """The gradient of a tensor that has one."""
    assert tensor.grad is not None
    return tensor.grad


def in_parts(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Flat views of the same values of each tensor: on a GPU all of them, on a CPU PART at a time."""
    flat = [tensor.view(-1) for tensor in tensors]
    size = len(flat[0]) if flat[0].is_cuda else PART
    return zip(*(torch.split(values, max(1, size)) for values in flat), strict=True)


def sums_of_squares(views: Sequence[Tensor]) -> Tensor:
    """Sums of the squares of each flat view, float64 [views]."""
    if views[0].is_cuda:
        return torch.stack(torch._foreach_norm(list(views), 2, torch.float64)).square()
    sums = []
    for view in views:  # 25 times as fast as in float64 throughout
        whole = len(view) // ROW * ROW
        rows = torch.linalg.vector_norm(view[:whole].view(-1, ROW), dim=1).double().square().sum()
        sums.append(rows + view[whole:].double().square().sum())
    return torch.stack(sums)


def first_moments(state: dict[str, Any], tensor: Tensor, *, second: bool) -> None:
    """Gives a tensor that has no state yet that of step 0, under the names and types of torch's AdamW."""
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
            ratios.append(torch.empty_like(tensor))  # g / max(sqrt(v), eps)
            parts = zip(self.advance(tensor, applied), in_parts(ratios[-1]), strict=True)
            for (_, gradient, mean, square), (ratio,) in parts:
                # The update overwrites the gradient: one tensor more, for the ratios, is enough.
                root = square.sqrt_()
                torch.div(gradient, root.clamp(min=eps), out=ratio)
                torch.div(mean, root.add_(eps), out=gradient)
            changes.append(gradient_of(tensor))
        norms = self.norms(tensors, [ratios])
        for tensor, change, (norm,) in zip(tensors, changes, norms, strict=True):
            change.add_(tensor, alpha=group["weight_decay"])
            # RMS over the whole parameter, not over this rank's fragment of it.
            self.scale(tensor, change, 1 / (norm / self.sizes[tensor].sqrt()).clamp(min=1.0))
            tensor.addcmul_(change, applied, value=-group["lr"])


class Lamb(WholeOptimizer):
    """LAMB (You et al., 2020), Algorithm 2: Adam's update with decay, scaled to the weight's own norm.

    The rate of a parameter is multiplied by phi(|w|) / |u|, u the update with the decay in it, and by 1 where
    either norm is zero. phi keeps |w| within `weight_norm_bounds` if they are given and is the identity if
    not. As in the authors' code, biases and LayerNorms, which do not decay, have no such ratio.
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
    matrices, and the gated one of the feed-forward part two, each orthogonalised alone, as they would be if
    they were not fused.

    `split` and `join` turn a parameter (name, values) into its matrices [count, rows, columns] and back;
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
            # `applied` is a factor of each change: with 0 nothing changes, and the host need not know.
            state["step"] += applied
            state["exp_avg"].lerp_(gradient, (1 - config.momentum) * applied)
            change = gradient.lerp(state["exp_avg"], config.momentum)  # Nesterov's momentum
            if tensor not in self.exchanges:
                self.exchanges[tensor] = Exchange(self.layouts[tensor])
            self.exchanges[tensor].change_whole(change.view(-1), self.orthogonal)
            tensor.mul_(1 - rate * group["weight_decay"] * applied).addcmul_(change, applied, value=-rate)

    def orthogonal(self, name: str, momentum: Tensor) -> Tensor:
        """The update of the whole parameter `name` from its momentum, both [rows, columns]."""
        matrices = self.split(name, momentum)  # [rows, columns] -> [count, rows, columns]
        size = 0.2 * max(matrices.shape[-2:]) ** 0.5
        return self.join(name, orthogonalize(matrices, self.dtype).to(momentum.dtype) * size)


def orthogonalize(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """Matrices [count, rows, columns] with singular values of about 0.7 to 1.2, in `dtype`.

    Newton-Schulz (Jordan et al., 2024), five times x <- a x + (b x xᵀ + c (x xᵀ)²) x.
    """
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices  # the Gram matrix is then of the smaller side, and cheap
    # The iteration converges from singular values below 1; the norm of a matrix is at least the largest one.
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)).to(dtype)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT  # [count, smaller, smaller]
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
