"""The projection to the vocabulary at the predicted positions, with its loss.

Logits of all positions never exist at once: some positions at a time go through the projection, the loss and
both gradients, and the gradients alone are kept. Nothing is computed twice.

Dimensions: P predicted positions, p of them at a time, H width of a hidden state, V vocabulary on this rank.
Rows are those of the word embedding [V, H].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bertscale.config import GPU_POSITIONS as GPU_POSITIONS
from bertscale.config import POSITIONS as POSITIONS  # at a time; names of this module, which tests set
from bertscale.model.layers import Layers


class TiedDecoder(nn.Module):
    """Hidden states -> predictions over the vocabulary, by the word embedding's own weight and a bias.

    `weight` [V, H] is the embedding's Parameter itself, set by the model, so that ZeRO-3
    gathers it for this module as well and both uses add to one gradient (Press and Wolf, 2017).
    """

    def __init__(self, layers: Layers, vocab_size: int, rows: int) -> None:
        """Makes a decoder on a word embedding of `rows` rows, of which those from `vocab_size` on pad it and
        are never predicted."""
        super().__init__()
        self.layers = layers
        here = rows // layers.degree  # V
        self.real = max(0, min(vocab_size - layers.rank * here, here))  # rows here that are pieces
        self.weight: nn.Parameter
        self.bias = nn.Parameter(torch.empty(here))

    def forward(
        self, hidden: Tensor, targets: Tensor, uniforms: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Predicts at hidden states [P, H] the `targets` [P], ids or -1 where nothing is predicted.

        Returns the sum of the losses and the number of right predictions, float32 scalars, and an id for each
        position [P]: drawn from the prediction by `uniforms` [P], float64 in (0, 1), or else the target.
        """
        shared = self.layers.copy_to_tensor_parallel(hidden)
        learns = torch.is_grad_enabled() and (hidden.requires_grad or self.weight.requires_grad)
        outputs: tuple[Tensor, Tensor, Tensor] = _Predict.apply(  # type: ignore[no-untyped-call]
            shared, self.weight, self.bias, self.layers, self.real, targets, uniforms, learns
        )
        return outputs

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of all positions at once: [P, H] -> [P, V]."""
        return _project(self.layers.copy_to_tensor_parallel(hidden), self.weight, self.bias, self.real)


def _project(hidden: Tensor, weight: Tensor, bias: Tensor, real: int) -> Tensor:
    """Logits [p, V] of [p, H]; columns from `real` on are never predicted."""
    logits = F.linear(hidden, weight, bias)
    logits[:, real:].fill_(torch.finfo(logits.dtype).min)  # not -inf, whose differences would be NaN
    return logits


class _Predict(torch.autograd.Function):
    """The loss and, in the same forward pass, its gradients; the backward pass only scales them.

    Nothing but a sum follows this loss in the forward pass, so its gradients are known but for a factor.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor,
        layers: Layers,
        real: int,
        targets: Tensor,
        uniforms: Tensor | None,
        learns: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        valid = targets >= 0  # [P]
        targets = targets.clamp(min=0)  # what fills up has some id, and weighs 0
        drawn = targets if uniforms is None else torch.empty_like(targets)
        loss, right = hidden.new_zeros(2, dtype=torch.float32).unbind()
        of_hidden = torch.empty_like(hidden)  # gradients: [P, H], [V, H], [V]
        of_weight, of_bias = weight.new_zeros(()), bias.new_zeros(())
        for rows in _parts(hidden):
            logits = _project(hidden[rows], weight, bias, real)  # [p, V]
            right = right + (layers.correct(logits, targets[rows]) & valid[rows]).sum()
            if uniforms is not None:
                drawn[rows] = layers.sample(logits, uniforms[rows])
            losses, gradient = layers.cross_entropy(logits, targets[rows])  # [p], [p, V]
            loss = loss + (losses * valid[rows]).sum()
            if not learns:
                continue
            # The 0s of what fills up go into the narrow factors, [p, H] and [p, 1], not into [p, V].
            counts = valid[rows, None].to(hidden.dtype)  # [p, 1]
            of_hidden[rows] = (gradient @ weight).mul_(counts)
            part = gradient.t() @ (hidden[rows] * counts), (gradient.t() @ counts)[:, 0]  # [V, H], [V]
            if rows.start == 0:
                of_weight, of_bias = part
            else:  # summed in float32: in bfloat16 each part would round the sum
                of_weight, of_bias = of_weight.float().add_(part[0]), of_bias.float().add_(part[1])
        ctx.mark_non_differentiable(right, drawn)
        if learns:
            # expand: without any position they are still the 0-dim zeros of the begin.
            weights = of_weight.to(weight.dtype).expand_as(weight), of_bias.to(bias.dtype).expand_as(bias)
            ctx.save_for_backward(of_hidden, *weights)
        return loss, right, drawn

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        return (*(gradient * grad for gradient in ctx.saved_tensors), None, None, None, None, None)


def _parts(hidden: Tensor) -> list[slice]:
    """The positions of [P, H] in parts of about equal size, at most POSITIONS or GPU_POSITIONS each."""
    positions = len(hidden)
    number = -(-positions // (GPU_POSITIONS if hidden.is_cuda else POSITIONS))
    size = -(-positions // max(1, number))
    return [slice(size * part, min(size * (part + 1), positions)) for part in range(number)]
