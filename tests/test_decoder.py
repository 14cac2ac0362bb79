"""The projection to the vocabulary, part by part and with positions that count for nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dist import run_ranks
from torch import Tensor, nn
from torch.nn import functional as F

from bertscale.model import decoder
from bertscale.model.decoder import TiedDecoder
from bertscale.model.layers import Layers

VOCAB, ROWS, WIDTH, POSITIONS = 330, 384, 24, 37


def values(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weight [V, H], bias [V], hidden states [P, H], targets [P]."""
    draw = torch.Generator().manual_seed(3)
    weight, bias, hidden = (
        torch.randn(*shape, generator=draw).to(dtype)
        for shape in ((ROWS, WIDTH), (ROWS,), (POSITIONS, WIDTH))
    )
    return weight, bias, hidden, torch.randint(VOCAB, (POSITIONS,), generator=draw)


def make_decoder(layers: Layers, weight: Tensor, bias: Tensor) -> TiedDecoder:
    made = TiedDecoder(layers, VOCAB, ROWS)
    made.weight = nn.Parameter(weight.chunk(layers.degree)[layers.rank].clone())
    made.bias = nn.Parameter(bias.chunk(layers.degree)[layers.rank].clone())
    return made


def loss_and_gradients(
    made: TiedDecoder, hidden: Tensor, targets: Tensor, factor: float
) -> tuple[Tensor, ...]:
    """Loss, number of right ones, and the gradients of hidden states, weight and bias, `factor` times."""
    hidden = hidden.clone().requires_grad_()
    loss, right, ids = made(hidden, targets)
    assert ids.equal(targets.clamp(min=0))
    torch.autograd.backward(loss * factor)
    assert hidden.grad is not None
    assert made.weight.grad is not None
    assert made.bias.grad is not None
    return loss.detach(), right, hidden.grad, made.weight.grad, made.bias.grad


def reference(factor: float) -> tuple[Tensor, ...]:
    """Likewise by torch, in float64, on the real part of the vocabulary."""
    weight, bias, hidden, targets = values(torch.float32)
    leaves = [tensor.double().requires_grad_() for tensor in (hidden, weight, bias)]
    logits = F.linear(*leaves)[:, :VOCAB]
    loss = F.cross_entropy(logits, targets, reduction="sum")
    torch.autograd.backward(loss * factor)
    right = (logits.argmax(dim=-1) == targets).sum()
    return loss.detach(), right, *(leaf.grad for leaf in leaves if leaf.grad is not None)


def assert_same(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    assert int(found[1]) == int(wanted[1])
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("at_a_time", [1, 5, 37, 1024])
def test_any_number_of_positions_at_a_time_is_the_dense_cross_entropy(
    at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder, "POSITIONS", at_a_time)
    weight, bias, hidden, targets = values(torch.float32)
    wanted = reference(0.125)
    found = loss_and_gradients(make_decoder(Layers(), weight, bias), hidden, targets, 0.125)
    assert_same(found, wanted)
    assert not found[3][VOCAB:].any()  # rows that are no pieces
    assert not found[4][VOCAB:].any()


@pytest.mark.parametrize("at_a_time", [5, 1024])
def test_positions_without_a_target_count_for_nothing(
    at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder, "POSITIONS", at_a_time)
    weight, bias, hidden, targets = values(torch.float32)
    more = torch.cat([hidden, hidden[:1].expand(8, -1)]), F.pad(targets, (0, 8), value=-1)
    found = loss_and_gradients(make_decoder(Layers(), weight, bias), *more, 1.0)
    assert not found[2][POSITIONS:].any()
    assert_same((*found[:2], found[2][:POSITIONS], *found[3:]), reference(1.0))


def test_in_bfloat16_parts_add_up_as_well_as_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, bias, hidden, targets = values(torch.bfloat16)
    wanted = reference(1.0)[3]  # of the values before they were rounded
    errors = []
    for at_a_time in (1024, 4):
        monkeypatch.setattr(decoder, "POSITIONS", at_a_time)
        found = loss_and_gradients(make_decoder(Layers(), weight, bias), hidden, targets, 1.0)[3]
        assert found.dtype == torch.bfloat16
        errors.append(float((found.double() - wanted).norm() / wanted.norm()))
    assert errors[1] < 1.2 * errors[0]


def test_no_position_gives_gradients_of_zero() -> None:
    weight, bias, hidden, targets = values(torch.float32)
    loss, right, *gradients = loss_and_gradients(
        make_decoder(Layers(), weight, bias), hidden[:0], targets[:0], 1.0
    )
    assert float(loss) == float(right) == 0
    assert [gradient.shape for gradient in gradients] == [(0, WIDTH), (ROWS, WIDTH), (ROWS,)]
    assert not any(gradient.any() for gradient in gradients)


def test_without_gradients_the_loss_is_the_same() -> None:
    weight, bias, hidden, targets = values(torch.float32)
    made = make_decoder(Layers(), weight, bias)
    with torch.no_grad():
        loss, right, _ = made(hidden, targets)
    assert_same((loss, right), reference(1.0)[:2])


def shares_of_a_rank() -> list[Any]:
    """Runs on each of four ranks: what it finds with its share of the vocabulary, parts of five positions."""
    from bertscale.train.device import local_device
    from bertscale.train.parallel import start_ranks

    decoder.POSITIONS = 5
    weight, bias, hidden, targets = values(torch.float32)
    made = make_decoder(start_ranks(4, local_device()).layers(), weight, bias)
    targets = F.pad(targets[:-2], (0, 2), value=-1)
    return [tensor.tolist() for tensor in loss_and_gradients(made, hidden, targets, 0.5)]


def test_ranks_that_share_the_vocabulary_find_what_one_finds() -> None:
    weight, bias, hidden, targets = values(torch.float32)
    targets = F.pad(targets[:-2], (0, 2), value=-1)
    wanted = loss_and_gradients(make_decoder(Layers(), weight, bias), hidden, targets, 0.5)
    ranks = [
        [torch.tensor(value) for value in found] for found in run_ranks(__file__, "shares_of_a_rank", world=4)
    ]
    for found in ranks:
        assert_same(tuple(found[:3]), wanted[:3])  # on every rank the whole gradient of the hidden states
    whole = (torch.cat([found[number] for found in ranks]) for number in (3, 4))
    assert_same((*wanted[:2], *whole), (*wanted[:2], *wanted[3:]))
