"""Whether a run may resume from a checkpoint: what its config says, and what it is silent about."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny import pretrain_config

from bertscale.config import PretrainConfig, UserError
from bertscale.data.mixture import data_digest
from bertscale.data.shards import open_dataset
from bertscale.train.resume import changed_settings, check_same_run

STEP = 3


def check(config: PretrainConfig, before: dict[str, Any], data: Path, consumed: int = STEP * 8) -> None:
    """`before` is the config that the checkpoint holds, as JSON."""
    datasets = [open_dataset(data)]
    checkpoint: Any = SimpleNamespace(
        folder=Path("run/checkpoints/step-0000003"),
        step=STEP,
        samples_consumed=consumed,
        model=pretrain_config(data, "run").model,
        table={"config": before, "data_digest": data_digest(datasets, config.corpora)},
    )
    course: Any = SimpleNamespace(batch=lambda step: (step * config.train.global_batch, None))
    check_same_run(checkpoint, config, datasets, course)


def test_a_checkpoint_of_an_older_version_lacks_keys(tiny_data: Path) -> None:
    config = pretrain_config(tiny_data, "run")
    before = config.model_dump(mode="json")
    check(config, before, tiny_data)
    del before["samples"]["min_document_tokens"], before["samples"]["size_exponent"]
    del before["objectives"], before["train"]["batch_warmup"], before["train"]["static_targets"]
    check(config, before, tiny_data)
    changed = pretrain_config(tiny_data, "run", objectives={"pairs": 0.5})
    with pytest.raises(UserError, match=r"objectives\.pairs=0\.5, but .*step-0000003 was trained with 1\.0"):
        check(changed, before, tiny_data)


@pytest.mark.parametrize(
    ("section", "change"),
    [
        ("samples", {"max_length": 32}),
        ("samples", {"size_exponent": 0.5}),
        ("samples", {"min_document_tokens": 20}),
        ("model", {"intermediate_size": 128}),
        ("train", {"global_batch": 16}),
        ("train", {"batch_warmup": [[100.0, 4]]}),
    ],
)
def test_what_would_change_the_steps_before_is_refused(
    section: str, change: dict[str, Any], tiny_data: Path
) -> None:
    before = pretrain_config(tiny_data, "run").model_dump(mode="json")
    key = next(iter(change))
    with pytest.raises(UserError, match=rf"{section}\.{key}=.*give the old value"):
        check(pretrain_config(tiny_data, "run", **{section: change}), before, tiny_data)


def test_a_limit_of_epochs_fixes_the_budget(tiny_data: Path) -> None:
    values = {
        **pretrain_config(tiny_data, "run").model_dump(),
        "data": [{"path": str(tiny_data), "max_epochs": 9}],
    }
    before = PretrainConfig.model_validate(values).model_dump(mode="json")
    values["train"]["steps"] = 11
    with pytest.raises(UserError, match=r"train\.steps=11, but .* was trained with 10"):
        check(PretrainConfig.model_validate(values), before, tiny_data)


@pytest.mark.parametrize(
    ("section", "change"),
    [
        ("model", {"hidden_dropout_prob": 0.2}),
        ("train", {"micro_batch": 1, "static_targets": True, "save_every": 2}),
        ("parallel", {"zero_stage": 3}),
        ("optimizer", {"learning_rate": 0.001}),
    ],
)
def test_what_leaves_them_as_they_were_is_not(section: str, change: dict[str, Any], tiny_data: Path) -> None:
    before = pretrain_config(tiny_data, "run").model_dump(mode="json")
    check(pretrain_config(tiny_data, "run", **{section: change}), before, tiny_data)


def test_other_places_in_the_data_are_refused(tiny_data: Path) -> None:
    config = pretrain_config(tiny_data, "run")
    with pytest.raises(UserError, match="consumed 20 samples in 3 steps, this config consumes 24"):
        check(config, config.model_dump(mode="json"), tiny_data, consumed=20)


def test_settings_that_a_resume_changes_are_listed(tiny_data: Path) -> None:
    before = pretrain_config(tiny_data, "run").model_dump(mode="json")
    checkpoint: Any = SimpleNamespace(table={"config": before})
    assert changed_settings(checkpoint, pretrain_config(tiny_data, "run")) == []
    config = pretrain_config(
        tiny_data,
        "run",
        optimizer={"learning_rate": 0.001, "name": "lamb"},
        train={"precision": "bfloat16"},
        model={"hidden_dropout_prob": 0.1},
        parallel={"zero_stage": 2},
    )
    del before["parallel"]["sequence"]  # of an older version
    assert sorted(changed_settings(checkpoint, config)) == [
        "changed   model.hidden_dropout_prob: 0.0 -> 0.1",
        "changed   optimizer.learning_rate: 0.003 -> 0.001",
        "changed   optimizer.name: adamw -> lamb",
        "changed   parallel.zero_stage: 1 -> 2",
        "changed   train.precision: float32 -> bfloat16",
    ]
