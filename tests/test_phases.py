"""A config of several phases: which runs it makes, and that they end in the same weights when killed."""

from __future__ import annotations

import os
import random
import shlex
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from dist import run_ranks
from tiny import pretrain_config

from bertscale import cli
from bertscale.config import PipelineStage, PretrainConfig, UserError, load_config, load_phases
from bertscale.run_folder import checkpoints
from bertscale.train.checkpoint import open_checkpoint
from bertscale.train.checkpoint_table import STATES
from launcher.submit.pipeline import stage_jobs

PHASES: dict[str, dict[str, Any]] = {
    "short": {"train": {"steps": 4}},
    "long": {"samples": {"max_length": 48}, "train": {"tokens": 1500}, "init": {"optimizer": "keep"}},
    "decay": {"samples": {"mask_rate": 0.05}, "train": {"steps": 3}, "optimizer": {"schedule": "cosine"}},
}


def write_config(data: Path, folder: Path, **changes: Any) -> Path:
    """A config of three phases in FOLDER/mine, as FOLDER/phases.yaml."""
    values = pretrain_config(data, folder / "mine", samples={"kind": "packed", "max_length": 24}).model_dump()
    del values["init"]
    values["train"] |= {"save_every": 2, "keep_checkpoints": 1, "eval_every": 100, "eval_samples": 8}
    path = folder / "phases.yaml"
    path.write_text(yaml.safe_dump({**values, "phases": PHASES, **changes}, sort_keys=False))
    return path


@pytest.fixture
def config(tiny_data: Path, tmp_path: Path) -> Path:
    return write_config(tiny_data, tmp_path)


def test_a_phase_keeps_what_the_ones_before_changed(config: Path) -> None:
    mine = config.parent / "mine"
    short, long, decay = load_phases(config, ["train.global_batch=4", "phases.decay.train.steps=5"]).values()
    assert [Path(each.run) for each in (short, long, decay)] == [mine / name for name in PHASES]
    assert short.init is None
    assert long.init is not None
    assert decay.init is not None
    assert (long.init.source, long.init.optimizer) == (str(mine / "short"), "keep")
    assert (decay.init.source, decay.init.optimizer) == (str(mine / "long"), "fresh")
    assert [each.samples.max_length for each in (short, long, decay)] == [24, 48, 48]
    assert [(each.train.steps, each.train.tokens) for each in (short, long, decay)] == [
        (4, None),
        (None, 1500),
        (5, None),
    ]
    assert {each.train.global_batch for each in (short, long, decay)} == {4}
    assert [each.train.seed for each in (short, long, decay)] == [0, 1, 2]
    seeds = load_phases(config, ["train.seed=7", "phases.long.train.seed=3"]).values()
    assert [each.train.seed for each in seeds] == [7, 3, 9]
    assert load_config(PretrainConfig, config, ["phase=long"]).run == long.run


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["phase=lang"], "phase=lang: the phases are short, long, decay"),
        (["phases.long.samples.max_lenght=3"], "phase long: unknown key samples.max_lenght; did you mean"),
        (["phases.long.run=elsewhere"], "phases.long.run: a phase cannot change that"),
        (["phases.long.init.from=there"], "phases.long.init.from: it starts from the phase before it"),
        (["phases=[short, long]"], "phases is not a mapping of names to changes"),
        (["phases={a/b: {}}"], "phases: the name 'a/b' has other characters"),
    ],
)
def test_mistakes_are_told_before_anything_starts(config: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message.replace("[", r"\[")):
        load_phases(config, overrides)


def test_a_phase_may_be_named_by_a_number(config: Path) -> None:
    """As YAML reads it, in the file and on the command line."""
    two = "phases={1: {train: {steps: 1}}, 2: {train: {steps: 2}}}"
    assert [each.train.steps for each in load_phases(config, [two]).values()] == [1, 2]
    first = load_config(PretrainConfig, config, [two, "phase=1"])
    assert (Path(first.run).name, first.train.steps, first.init) == ("1", 1, None)
    with pytest.raises(UserError, match=r"name one with phase=1$"):
        load_config(PretrainConfig, config, ["phases={1: {train: {steps: 1}}}"])


def test_a_command_for_one_run_asks_which_phase(config: Path) -> None:
    with pytest.raises(UserError, match="this config has phases: name one with phase=short, or long, decay"):
        load_config(PretrainConfig, config, [])


def test_phases_run_one_after_another_from_the_last_that_has_begun(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[list[str]] = []
    codes = {"phase=decay": 75}

    def supervised(words: list[str], *_: Any) -> int:
        started.append(words)
        return codes.get(words[-1], 0)

    monkeypatch.setattr(cli, "_supervised", supervised)
    assert cli.main(["pretrain", str(config), "train.seed=3"]) == 75
    assert [words[-2:] for words in started] == [["train.seed=3", f"phase={name}"] for name in PHASES]
    for name in ("short", "long"):
        (config.parent / "mine" / name / "checkpoints" / "step-0000001").mkdir(parents=True)
        (config.parent / "mine" / name / "checkpoints" / "step-0000001" / "bertscale.json").touch()
    started.clear()
    assert cli.main(["pretrain", str(config)]) == 75
    assert [words[-1] for words in started] == ["phase=long", "phase=decay"]
    assert f"phase short is done: {config.parent / 'mine/short'}" in capsys.readouterr().out


def test_a_submit_queues_a_job_for_each(config: Path) -> None:
    site = config.with_name("site.yaml")
    site.write_text(yaml.safe_dump({"partition": "main", "tasks_per_node": 1}))
    jobs, mistakes = stage_jobs([PipelineStage(pretrain=str(config))], str(site))
    assert not mistakes
    assert [job.spec.name for job in jobs] == ["pretrain-short", "pretrain-long", "pretrain-decay"]
    assert [Path(job.spec.target).name for job in jobs] == list(PHASES)
    jobs, _ = stage_jobs([PipelineStage(pretrain=str(config))], str(site), "night")
    assert len({job.spec.name for job in jobs}) == 3


# ------------------------------------------------------------------------------------- trained


class KillAfter:
    """Kills its own process at the `steps`-th step, as a node does that loses power."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    @property
    def asked(self) -> bool:
        self.left -= 1
        if self.left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return False


def train_chain(path: str, steps: int) -> None:
    """All phases in one process, which kills itself after so many steps of its own."""
    from bertscale.pretrain.pretrain import train
    from bertscale.train.device import local_device
    from bertscale.train.parallel import start_ranks

    ranks, stop = start_ranks(1, local_device()), KillAfter(steps)
    for config in load_phases(path, []).values():
        Path(config.run).mkdir(parents=True, exist_ok=True)
        assert train(config, ranks, stop) == 0  # type: ignore[arg-type]


@pytest.mark.slow
def test_killed_at_random_they_end_in_the_weights_of_the_undisturbed_chain(
    tiny_data: Path, tmp_path: Path
) -> None:
    chains = []
    for name in ("calm", "night"):
        (tmp_path / name).mkdir()
        chains.append(write_config(tiny_data, tmp_path / name))
    run_ranks(__file__, "train_chain", world=1, path=str(chains[0]), steps=1000)
    draw = random.Random(5)
    for _ in range(3):
        with pytest.raises(AssertionError, match=r"ranks \[0\] of 1 failed"):
            run_ranks(__file__, "train_chain", world=1, path=str(chains[1]), steps=draw.randint(2, 5))
    run_ranks(__file__, "train_chain", world=1, path=str(chains[1]), steps=1000)
    calm, night = (open_checkpoint(checkpoints(path.parent / "mine/decay")[-1]) for path in chains)
    assert calm.step == night.step == 3
    for name in calm.parameters:
        for state in STATES:
            assert torch.equal(calm.tensor(name, state), night.tensor(name, state)), name
    assert [Path(each["folder"]).parts[-3] for each in night.lineage] == ["short", "long"]
    assert night.lineage[1]["optimizer"] == "fresh"
    said = shlex.join(f"{key}={there}->{here}" for key, there, here in night.lineage[1]["changed"])
    assert "samples.mask_rate=0.15->0.05" in said
