"""Runs whose budget is in tokens or hours, and whose batches grow: ended, stopped, resumed, refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from dist import run_ranks
from tiny import pretrain_config

from bertscale.train.checkpoint import open_checkpoint

pytestmark = pytest.mark.slow

GROWING = {"steps": 7, "batch_warmup": [[100, 2], [500, 4]], "micro_batch": 1, "save_every": 2}
OPTIMIZER = {"learning_rate": 0.003, "warmup_fraction": 0.2, "schedule": "cosine"}


class StopAfter:
    """Asks the loop to stop after `steps` steps, as a signal would."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    @property
    def asked(self) -> bool:
        self.left -= 1
        return self.left < 0


def train_each(data: str, folder: str, runs: list[list[Any]]) -> list[Any]:
    """Runs on each rank, one after the other: [name, train section, steps until a stop, stage, optimizer].

    Of each the exit code, or what was wrong, and the journal's steps.
    """
    from bertscale.config import UserError
    from bertscale.pretrain.pretrain import train
    from bertscale.run_folder import read_metrics
    from bertscale.train.device import local_device
    from bertscale.train.parallel import leave_subgroups, start_ranks

    results = []
    for name, budget, stop, stage, optimizer in runs:
        run = Path(folder) / name
        run.mkdir(exist_ok=True)
        config = pretrain_config(
            data,
            run,
            train=budget,
            optimizer={**OPTIMIZER, "name": optimizer},
            parallel={"zero_stage": stage},
        )
        ranks = start_ranks(1, local_device())
        try:
            code: int | str = train(config, ranks, StopAfter(stop))  # type: ignore[arg-type]
        except UserError as error:
            code = str(error)
        leave_subgroups(ranks)
        entries = [e for e in read_metrics(run) if "train/loss" in e]
        kept = ("step", "train/loss", "train/gradient_norm", "train/learning_rate")
        results.append([code, [[entry[key] for key in kept] for entry in entries]])
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("budgets")


@pytest.fixture(scope="module")
def runs(tiny_data: Path, folder: Path) -> dict[str, Any]:
    tokens = {"steps": None, "tokens": 1000}
    hours = {"steps": None, "hours": 4 / 3600, "save_every": 1000, "eval_every": 1000}
    plan = [
        ["growing", GROWING, 10**6, 0, "adamw"],
        ["stopped", GROWING, 3, 0, "adamw"],
        ["stopped", GROWING, 10**6, 0, "adamw"],
        ["stopped", {**GROWING, "batch_warmup": [[100, 2]]}, 10**6, 0, "adamw"],
        ["tokens", tokens, 10**6, 1, "adamw"],
        ["tokens", tokens, 10**6, 1, "adamw"],
        ["hours", hours, 2, 1, "adamw"],
        ["hours", hours, 10**9, 1, "adamw"],
        ["hours", hours, 10**9, 1, "adamw"],
        ["change", {"steps": 4}, 1, 1, "adamw"],
        ["change", {"steps": 4}, 1, 1, "muon"],
        ["change", {"steps": 4}, 1, 1, "lamb"],
    ]
    arguments = {"data": str(tiny_data), "folder": str(folder)}
    results = run_ranks(__file__, "train_each", world=1, runs=plan, **arguments)[0]
    found = {
        f"{name}-{number}": result
        for number, ((name, *_), result) in enumerate(zip(plan, results, strict=True))
    }
    alone = [["two", GROWING, 10**6, 2, "adamw"]]
    two = run_ranks(__file__, "train_each", world=2, runs=alone, **arguments)[0]
    return {**found, "two": two[0]}


def test_batches_grow_and_the_samples_are_those_of_the_plan(runs: dict[str, Any], folder: Path) -> None:
    code, steps = runs["growing-0"]
    assert code == 0
    assert [step for step, *_ in steps] == list(range(1, 8))
    sizes = []
    for step, *_ in steps:
        for part in folder.glob(f"growing/checkpoints/step-{step:07d}"):
            sizes.append((step, open_checkpoint(part).samples_consumed))
    # About 27 tokens a sample: two steps of 2, four of 4, then 8.
    assert sizes[-1][0] == 7
    last = sizes[-1][1]
    assert 7 * 2 < last < 7 * 8


def test_growing_batches_on_two_ranks_are_those_of_one(runs: dict[str, Any]) -> None:
    import torch

    code, steps = runs["two"]
    assert code == 0
    torch.testing.assert_close(steps, runs["growing-0"][1], rtol=1e-5, atol=1e-5)


def test_growing_batches_resume_bit_for_bit(runs: dict[str, Any]) -> None:
    assert runs["stopped-1"][0] == 75
    assert runs["stopped-1"][1] == runs["growing-0"][1][:3]
    assert runs["stopped-2"] == runs["growing-0"]


def test_other_stages_are_refused(runs: dict[str, Any]) -> None:
    message = runs["stopped-3"][0]
    assert "train.batch_warmup=[[100.0, 2]], but" in message
    assert "choose another run folder" in message


def test_a_budget_in_tokens(runs: dict[str, Any], folder: Path) -> None:
    code, steps = runs["tokens-4"]
    assert code == 0
    samples = open_checkpoint(folder / "tokens").samples_consumed
    assert samples == 8 * len(steps)
    assert 10 < 1000 / samples < 48  # tokens a sample
    assert steps[-1][3] < steps[1][3]
    assert runs["tokens-5"] == [0, steps]  # finished: not run again


def test_a_budget_in_hours(runs: dict[str, Any], folder: Path) -> None:
    stopped, ended, again = (runs[f"hours-{number}"] for number in (6, 7, 8))
    assert (stopped[0], len(stopped[1])) == (75, 2)
    assert ended[0] == 0
    assert ended[1][:2] == stopped[1]
    rates = [rate for *_, rate in ended[1]]
    assert len(rates) > 3
    assert rates[-1] < max(rates) / 2  # the way down followed the clock to its end
    checkpoint = open_checkpoint(folder / "hours")
    assert checkpoint.step == len(rates)
    assert checkpoint.elapsed_seconds >= 4
    assert (folder / "hours" / "result.json").is_file()
    assert again == [0, ended[1]]


def test_another_optimizer_goes_on_where_its_moments_are_there(runs: dict[str, Any]) -> None:
    assert [runs[f"change-{number}"][0] for number in (9, 10)] == [75, 75]
    message = runs["change-11"][0]
    assert "has no exp_avg_sq of encoder.layers.0" in message
    assert "optimizer.name=lamb needs; resume with optimizer.name=muon" in message
