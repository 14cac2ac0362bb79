"""Learning rates against their formulas; batches, budgets and their phases as pure functions of the step."""

from __future__ import annotations

import math
from typing import Any

import pytest
from tiny import pretrain_config

from bertscale.config import OptimizerConfig
from bertscale.data.batch_phases import BatchPhase, batch_of, batch_phases, steps_until, tokens_until
from bertscale.train.schedule import TrainingSchedule, learning_rate


def rates(total: int, **changes: Any) -> list[float]:
    config = OptimizerConfig.model_validate({"learning_rate": 2.0, **changes})
    return [learning_rate(step, step + 1, total, config) for step in range(total)]


def test_linear() -> None:
    found = rates(20, warmup_fraction=0.1)
    assert found[:2] == [1.0, 2.0]
    for step in range(2, 20):
        assert found[step] == pytest.approx(2.0 * (20 - step) / 18)


def test_cosine() -> None:
    found = rates(20, schedule="cosine", warmup_fraction=0.1)
    assert found[:3] == [1.0, 2.0, 2.0]
    for step in range(2, 20):
        assert found[step] == pytest.approx(2.0 * 0.5 * (1 + math.cos(math.pi * (step - 2) / 18)))


def test_warmup_stable_decay() -> None:
    found = rates(20, schedule="wsd", warmup_fraction=0.1, decay_fraction=0.25)
    assert found[0] == 1.0
    assert set(found[1:16]) == {2.0}  # one of warm-up, the stable ones, and the first of the way down
    for step in range(15, 20):
        assert found[step] == pytest.approx(2.0 * (1 - math.sqrt((step - 15) / 5)))


def test_a_decay_alone() -> None:
    """The recipe of docs/pretrain.md: from the highest rate in the first step, whatever the budget is in."""
    changes = {"schedule": "wsd", "warmup_fraction": 0.0, "decay_fraction": 1.0}
    found = rates(7, **changes)
    assert found[0] == 2.0
    assert found == pytest.approx([2.0 * (1 - math.sqrt(step / 7)) for step in range(7)])
    config = OptimizerConfig.model_validate({"learning_rate": 2.0, **changes})
    for begin, end, total in ((0.0, 0.0, 3600.0), (900.0, 900.0, 3600.0), (640.0, 704.0, 6400.0)):
        expected = 2.0 * (1 - math.sqrt(begin / total))
        assert learning_rate(begin, end, total, config) == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "wsd"])
def test_the_way_down_ends_at_the_final_fraction(schedule: str) -> None:
    config = OptimizerConfig.model_validate({"schedule": schedule, "final_fraction": 0.1})
    assert learning_rate(0.1, 0.1, 1e6, config) < 1e-9  # from zero
    assert learning_rate(1e5, 1e5, 1e6, config) == pytest.approx(config.learning_rate)
    assert learning_rate(1e6, 1e6, 1e6, config) == pytest.approx(config.learning_rate / 10)
    assert learning_rate(2e6, 2e6, 1e6, config) == pytest.approx(config.learning_rate / 10)  # and stays


@pytest.mark.parametrize("changes", [{"warmup_fraction": 0.0}, {"warmup_fraction": 1.0}])
def test_schedules_of_one_part(changes: dict[str, float]) -> None:
    found = rates(4, **changes)
    assert found == ([2.0, 1.5, 1.0, 0.5] if changes["warmup_fraction"] == 0 else [0.5, 1.0, 1.5, 2.0])


def test_batches_grow_with_the_tokens_seen() -> None:
    """50 tokens a sample: 4 samples until 1,000 tokens (5 steps), 8 until 2,500 (4 steps), then 16."""
    phases = batch_phases([(1000, 4), (2500, 8)], 16, [(0, 50.0)])
    assert [phase[:3] for phase in phases] == [(0, 0, 4), (5, 20, 8), (9, 52, 16)]
    assert [batch_of(step, phases) for step in (0, 4, 5, 8, 9, 100)] == [
        (0, 4),
        (16, 4),
        (20, 8),
        (44, 8),
        (52, 16),
        (52 + 91 * 16, 16),
    ]
    sample = 0
    for step in range(30):  # nothing is left out, nothing taken twice
        first, size = batch_of(step, phases)
        assert first == sample
        sample += size


def test_every_stage_has_a_step() -> None:
    phases = batch_phases([(1, 4), (2, 8)], 16, [(0, 50.0)])
    assert [phase[:3] for phase in phases] == [(0, 0, 4), (1, 4, 8), (2, 12, 16)]


def test_batches_grow_by_tokens_while_samples_do() -> None:
    """10 tokens a sample for 8 steps, 20 for 2, then 50: 4 samples until 200 tokens, 8 until 700."""
    phases = batch_phases([(200, 4), (700, 8)], 16, [(0, 10.0), (8, 20.0), (10, 50.0)])
    assert phases == [
        BatchPhase(0, 0, 4, 0.0, 10.0),
        BatchPhase(5, 20, 8, 200.0, 10.0),
        BatchPhase(8, 44, 8, 440.0, 20.0),
        BatchPhase(10, 60, 16, 760.0, 50.0),
    ]
    sample, tokens = 0, 0.0
    for step in range(15):
        first, size = batch_of(step, phases)
        assert (first, tokens_until(step, phases)) == (sample, tokens)
        for wanted in (tokens + 1, tokens + 100):
            steps = steps_until(wanted, phases)
            assert tokens_until(steps, phases) >= wanted > tokens_until(steps - 1, phases)
        sample += size
        tokens += size * (10 if step < 8 else 20 if step < 10 else 50)


def test_a_stage_over_several_lengths_is_cut_where_they_change() -> None:
    phases = batch_phases([], 8, [(0, 10.0), (3, 20.0), (5, 40.0)])
    assert [phase[:3] for phase in phases] == [(0, 0, 8), (3, 24, 8), (5, 40, 8)]
    phases = batch_phases([(1e9, 4)], 8, [(0, 10.0), (3, 20.0)])
    assert [phase[:3] for phase in phases[:2]] == [(0, 0, 4), (3, 12, 4)]
    assert phases[2].size == 8
    assert phases[2].first_token >= 1e9


def test_steps_until_a_number_of_tokens() -> None:
    phases = batch_phases([(1000, 4), (2500, 8)], 16, [(0, 50.0)])
    for samples in (1, 4, 5, 20, 21, 52, 53, 500):
        steps = steps_until(50.0 * samples, phases)
        assert batch_of(steps, phases)[0] >= samples > batch_of(steps - 1, phases)[0]


def schedule(train: dict[str, Any], **optimizer: Any) -> TrainingSchedule:
    values = {"steps": None, "global_batch": 16, **train}
    config = pretrain_config("d", "r", train=values, optimizer={"learning_rate": 1.0, **optimizer})
    return TrainingSchedule(config, batch_phases(config.train.batch_warmup, 16, [(0, 50.0)]))


def test_a_budget_in_steps() -> None:
    found = schedule({"steps": 10})
    assert (found.steps, found.over(9, 1e9), found.over(10, 0.0)) == (10, False, True)
    half = schedule({"steps": 5, "schedule_steps": 10})
    assert [half.learning_rate(k, 0.0) for k in range(5)] == [found.learning_rate(k, 0.0) for k in range(5)]


def test_a_budget_in_tokens_is_one_in_steps_and_the_rate_follows_the_tokens() -> None:
    found = schedule({"tokens": 8000, "batch_warmup": [[1600, 8]]}, warmup_fraction=0.0)  # 32 samples, 128
    assert found.steps == 4 + 8
    assert "12 steps (8000 tokens, 50.0 a sample)" in found.text
    assert [found.learning_rate(k, 0.0) for k in (0, 4, 8)] == [1.0, 1 - 32 / 160, 1 - 96 / 160]
    assert found.over(12, 0.0)
    assert not found.over(11, 1e9)


def test_a_budget_in_hours_follows_the_clock() -> None:
    found = schedule({"hours": 2.0}, warmup_fraction=0.1)
    assert found.steps is None
    assert found.learning_rate(10**9, 360.0) == pytest.approx(0.5)
    assert found.learning_rate(0, 720 + 0.75 * 6480) == pytest.approx(0.25)
    assert not found.over(10**9, 7199.0)
    assert found.over(1, 7200.0)
