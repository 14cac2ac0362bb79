"""What TensorBoard shows of runs: their names, their configs, and what differs between them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata
from tiny import pretrain_config

from bertscale.config.pretrain import Corpus
from bertscale.train.metrics import MetricsWriter, hyperparameters


def write_run(run: Path, first: int = 0, end: bool = True, **changes: dict[str, Any]) -> EventAccumulator:
    run.mkdir(exist_ok=True)
    writer = MetricsWriter(run, first)
    writer.introduce(pretrain_config("data", run, **changes))
    for step in range(first + 1, 4):
        writer.write(step, {"train/loss": 8.0 - step})
    if end:
        writer.close()
    else:
        writer.events.close()
    events = EventAccumulator(str(run / "tensorboard" / run.name))
    events.Reload()
    return events


def test_a_run_has_its_name_and_its_config(tmp_path: Path) -> None:
    events = write_run(tmp_path / "base")
    [entry] = events.Tensors("config/text_summary")
    text = entry.tensor_proto.string_val[0].decode()
    assert text.startswith("```yaml\n")
    assert f"run: {tmp_path}/base\n" in text
    assert "optimizer:\n  name: adamw\n" in text
    assert [scalar.step for scalar in events.Scalars("train/loss")] == [1, 2, 3]


def test_runs_of_different_configs_can_be_compared(tmp_path: Path) -> None:
    hours = {"steps": None, "hours": 2.0}
    first = write_run(tmp_path / "first")
    second = write_run(tmp_path / "second", train=hours, optimizer={"learning_rate": 0.01})
    values = []
    for events in (first, second):
        content = events.PluginTagToContent(metadata.PLUGIN_NAME)
        # A list of columns would be taken for those of all runs.
        assert set(content) == {metadata.SESSION_START_INFO_TAG, metadata.SESSION_END_INFO_TAG}
        start = metadata.parse_session_start_info_plugin_data(content[metadata.SESSION_START_INFO_TAG])
        values.append({key: value.number_value or value.string_value for key, value in start.hparams.items()})
    one, two = values
    assert (one["optimizer.learning_rate"], two["optimizer.learning_rate"]) == (0.003, 0.01)
    assert (one["train.steps"], two["train.hours"]) == (10, 2)
    assert not {"train.hours", "run", "launch.restarts"} & set(one)
    assert one["model.preset"] == "bert"


@pytest.mark.parametrize("end", [False, True])
def test_only_a_run_to_the_end_counts_as_finished(tmp_path: Path, end: bool) -> None:
    events = write_run(tmp_path / "base", end=end)
    assert (metadata.SESSION_END_INFO_TAG in events.PluginTagToContent(metadata.PLUGIN_NAME)) == end


def test_steps_done_again_are_there_once(tmp_path: Path) -> None:
    write_run(tmp_path / "base", end=False)
    events = write_run(tmp_path / "base", first=2)
    assert [scalar.step for scalar in events.Scalars("train/loss")] == [1, 2, 3]


def test_every_hyperparameter_is_a_number_or_a_text(tmp_path: Path) -> None:
    config = pretrain_config("data", tmp_path)
    two = [Corpus(path="a", weight=1.0), Corpus(path="b", weight=2.0)]
    values = hyperparameters(config.model_copy(update={"data": two}))
    assert values["data"] == '[{"path": "a", "weight": 1.0}, {"path": "b", "weight": 2.0}]'
    assert values["parallel.sequence"] == "false"
    assert all(type(value) in (int, float, str) for value in values.values())
