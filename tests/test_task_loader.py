"""The micro-batches of fine-tuning: every sample where it belongs, on whichever rank."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bertscale.config import TaskKind, UserError
from bertscale.finetune.loader import TaskLoader
from bertscale.tasks.task import Samples


def make_samples(
    lengths: list[int], example: list[int] | None = None, kind: TaskKind = "classification"
) -> Samples:
    """Samples of these lengths; each token is the number of its sample."""
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    numbers = np.arange(len(lengths))
    tokens = np.repeat(numbers, lengths).astype(np.int32)
    of = np.array(example if example is not None else numbers, np.int64)
    targets: Any = numbers.astype(np.int64)
    if kind == "tokens":
        targets = np.arange(len(tokens))
    if kind == "multiple_choice":
        targets = np.arange(of.max() + 1)
    return Samples(tokens, starts, np.array(lengths, np.int64) // 2, of, targets)


def make_loader(samples: Samples, kind: TaskKind = "classification", **changes: Any) -> TaskLoader:
    return TaskLoader(samples, kind, **{"global_batch": 4, "micro_tokens": 24, "seed": 0, **changes})


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(3, 12), min_size=1, max_size=30),
    batch=st.integers(1, 9),
    world=st.integers(1, 4),
    seed=st.integers(0, 3),
)
def test_an_epoch_has_each_sample_once(lengths: list[int], batch: int, world: int, seed: int) -> None:
    samples = make_samples(lengths)
    ranks = [
        make_loader(samples, global_batch=batch, seed=seed, rank=rank, world=world) for rank in range(world)
    ]
    seen: Counter[int] = Counter()
    for step in range(ranks[0].epoch_steps):
        steps = [loader.step(step) for loader in ranks]
        assert len({len(parts) for parts in steps}) == 1, "ranks take their micro-batches together"
        for part in (part for parts in steps for part in parts):
            seen.update(part.samples.tolist())
            assert len(part.batch.tokens) <= 24
            assert part.divisor == len(part.samples)
            assert part.batch.weight == (1.0 if len(part.samples) else 0.0)
            if len(part.samples):
                assert part.batch.targets is not None
                assert part.batch.targets.tolist() == part.samples.tolist()
                assert part.batch.lengths == tuple(lengths[number] for number in part.samples)
                expected = [number for number in part.samples for _ in range(lengths[number])]
                assert part.batch.tokens.tolist() == expected
    assert seen == Counter(range(len(lengths)))


def test_a_batch_is_that_of_its_seed_and_step_alone() -> None:
    samples = make_samples([4, 5, 6, 7, 8, 9, 3])
    forwards = [make_loader(samples).step(k) for k in range(6)]
    loader = make_loader(samples)
    backwards = [loader.step(k) for k in reversed(range(6))][::-1]
    for one, other in zip(forwards, backwards, strict=True):
        assert [part.samples.tolist() for part in one] == [part.samples.tolist() for part in other]
    orders = {
        tuple(
            number
            for k in range(2)
            for part in make_loader(samples, seed=seed).step(k)
            for number in part.samples
        )
        for seed in range(4)
    }
    assert len(orders) > 1
    first, second = (
        [n for k in range(2 * epoch, 2 * epoch + 2) for part in loader.step(k) for n in part.samples.tolist()]
        for epoch in (0, 1)
    )
    assert sorted(first) == sorted(second)
    assert first != second


def test_token_types_and_positions() -> None:
    (part,) = make_loader(make_samples([6, 4]), global_batch=2).step(0)
    assert part.batch.positions.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5]
    assert part.batch.token_types.tolist() == [0, 0, 1, 1, 0, 0, 0, 1, 1, 1]


def test_targets_of_tokens() -> None:
    (part,) = make_loader(make_samples([6, 4], kind="tokens"), "tokens", global_batch=2).step(0)
    assert part.batch.targets is not None
    assert part.batch.targets.tolist() == [6, 7, 8, 9, 0, 1, 2, 3, 4, 5]
    assert part.divisor == 10


def test_options_of_a_question_stay_together() -> None:
    samples = make_samples([3, 4, 5, 3, 3, 3], [0, 0, 0, 1, 1, 2], "multiple_choice")
    loader = make_loader(samples, "multiple_choice", global_batch=3)
    (part,) = loader.step(0)
    assert part.batch.groups is not None
    assert part.batch.groups == (1, 2, 3)  # the shorter first
    assert part.samples.tolist() == [5, 3, 4, 0, 1, 2]
    assert part.batch.targets is not None
    assert part.batch.targets.tolist() == [2, 1, 0]
    assert part.divisor == 3
    with pytest.raises(UserError, match=r"train.micro_tokens=8 is less than the 12 tokens of one example"):
        make_loader(samples, "multiple_choice", micro_tokens=8)


def test_a_file_of_weight_two_and_a_half() -> None:
    samples = make_samples([4] * 8)
    loader = make_loader(samples, repeats=np.array([2.5] * 4 + [1.0] * 4), global_batch=5)
    for epoch in range(3):
        steps = range(epoch * loader.epoch_steps, (epoch + 1) * loader.epoch_steps)
        seen = Counter(n for k in steps for part in loader.step(k) for n in part.samples.tolist())
        assert sum(seen[n] for n in range(4)) == 10
        assert {seen[n] for n in range(4)} == {2, 3}
        assert all(seen[n] == 1 for n in range(4, 8))
    assert loader.epoch(loader.epoch_steps) == 1.0
    with pytest.raises(UserError, match="leave no example in an epoch"):
        make_loader(samples, repeats=np.array([0.01] * 8))


def test_class_weights_count() -> None:
    samples = make_samples([4, 4, 4])
    weights = torch.tensor([1.0, 2.0, 4.0])
    parts = make_loader(samples, class_weights=weights).step(0)
    assert sum(part.divisor for part in parts) == 7.0
