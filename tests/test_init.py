"""A run that starts from another: whose weights and moments it takes, what it says and keeps of that."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from dist import run_ranks
from test_checkpoint import StopAfter
from test_reshape import Source as RandomSource
from tiny import pretrain_config

from bertscale.config import PretrainConfig, UserError, with_model_of
from bertscale.convert.model_shape import native_shapes
from bertscale.files import file_digest
from bertscale.model.model import initial_value
from bertscale.pretrain.init import Source, check_source, differences, in_shape_of
from bertscale.run_folder import TABLE, checkpoints, read_metrics
from bertscale.tokenizer import load_tokenizer
from bertscale.train.checkpoint import open_checkpoint
from bertscale.train.checkpoint_table import STATES
from launcher.submit.freeze import config_text

pytestmark = pytest.mark.slow

OTHER: dict[str, dict[str, Any]] = {  # what a second run may change
    "samples": {"kind": "packed", "max_length": 32, "mask_rate": 0.3},
    "optimizer": {"learning_rate": 0.001},
    "train": {"steps": 5, "global_batch": 4, "save_every": 1, "keep_checkpoints": 9, "seed": 3},
}


def others(folder: Path, *, init: dict[str, Any] | None = None, **train: Any) -> dict[str, Any]:
    """OTHER, from the run in `folder`."""
    return {**OTHER, "train": {**OTHER["train"], **train}, "init": {"from": str(folder), **(init or {})}}


def train_all(data: str, folder: str) -> dict[str, Any]:
    """On each of two ranks: a first run, and those that start from it; what they said."""
    import contextlib

    from bertscale.pretrain.init import open_source, start_from
    from bertscale.pretrain.pretrain import train
    from bertscale.tokenizer import load_tokenizer
    from bertscale.train.device import local_device
    from bertscale.train.engine import pretraining_engine
    from bertscale.train.parallel import leave_subgroups, start_ranks

    place = Path(folder)
    said: dict[str, Any] = {}
    keep = {"optimizer": "keep"}

    def run(name: str, tensor: int = 1, stage: int = 1, stop: int = 99, **changes: Any) -> None:
        parallel = {"tensor": tensor, "zero_stage": stage}
        config = pretrain_config(data, place / name, parallel=parallel, **changes)
        ranks, printed = start_ranks(tensor, local_device()), io.StringIO()
        Path(config.run).mkdir(exist_ok=True)
        try:
            with contextlib.redirect_stdout(printed):
                train(config, ranks, StopAfter(stop))  # type: ignore[arg-type]
        except UserError as error:
            print(error, file=printed)
        leave_subgroups(ranks)
        said[name] = printed.getvalue()

    run("first", train={"steps": 4, "save_every": 2})
    run("same", **others(place / "first"))
    run("sharded", tensor=2, stage=3, **others(place / "first"))
    run("third", **others(place / "same", init=keep, steps=2))
    run("earlier", **others(place / "first", init={"step": 2}, steps=1))

    # Another one that stops in between; when it resumes, what it started from is gone.
    ranks = start_ranks(1, local_device())
    if ranks.rank == 0:
        shutil.copytree(place / "first", place / "lost")
    ranks.barrier()
    run("stopped", stop=3, **others(place / "lost"))
    if ranks.rank == 0:
        shutil.rmtree(place / "lost")
    ranks.barrier()
    run("stopped", **others(place / "lost"))
    run("same", **others(place / "first", init=keep))

    # Next tokens first, masked ones afterwards.
    run("causal", objectives={"clm": 1.0}, samples={"kind": "packed"}, train={"steps": 4, "save_every": 4})
    run("masked", **others(place / "causal", init=keep, steps=1))

    # Heads of other sizes: a generator comes and goes.
    run("detector", **others(place / "first", steps=1), model={"generator_size": 0.5})
    run("alone", **others(place / "detector", steps=1), model={"generator_size": None})

    # What is in memory before the first step.
    config = pretrain_config(data, place / "new", **others(place / "third", init=keep))
    source = open_source(config.init, place / "new", ranks)  # type: ignore[arg-type]
    engine = pretraining_engine(config, source.weights.vocab_size, ranks, torch.float32)
    start = start_from(engine, source, load_tokenizer(data))
    assert source.checkpoint is not None
    for fragment in engine.fragments():
        for state, value in fragment.states.items():
            whole = source.checkpoint.tensor(fragment.name, state).flatten()
            assert torch.equal(value, whole[fragment.start : fragment.start + len(value)])
    said["updates"] = [float(state["step"]) for state in engine.optimizer.state.values()]
    said["facts"] = start.facts
    return said


@pytest.fixture(scope="module")
def runs(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("runs")
    return folder, run_ranks(__file__, "train_all", world=2, data=str(tiny_data), folder=str(folder))[0]


def losses(run: Path) -> list[float]:
    return [row["train/loss"] for row in read_metrics(run) if "train/loss" in row]


def test_the_first_loss_is_the_source_s_on_any_topology(runs: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = runs
    first, same, sharded = (losses(folder / name) for name in ("first", "same", "sharded"))
    assert same[0] < first[0] - 0.2  # what the source has learnt, at a higher rate of masking
    torch.testing.assert_close(sharded, same, rtol=1e-5, atol=1e-5)


def test_resumed_without_its_source_it_is_the_undisturbed_run(runs: tuple[Path, dict[str, Any]]) -> None:
    folder, said = runs
    whole, stopped = (open_checkpoint(checkpoints(folder / name)[-1]) for name in ("same", "stopped"))
    assert whole.step == stopped.step == 5
    for name in whole.parameters:
        for state in STATES:
            assert torch.equal(whole.tensor(name, state), stopped.tensor(name, state)), name
    assert "started   from" not in said["stopped"]  # it was resumed


def test_masked_tokens_go_on_from_next_ones(runs: tuple[Path, dict[str, Any]]) -> None:
    folder, said = runs
    causal, masked = (open_checkpoint(folder / name) for name in ("causal", "masked"))
    assert (causal.causal, masked.causal) == (True, False)
    assert {"train/clm_loss", "heldout/clm_loss"} < {
        key for row in read_metrics(folder / "causal") for key in row
    }
    assert ["objectives.clm", "1.0", "0.0"] in masked.lineage[0]["changed"]
    assert "new " not in said["masked"]  # the head is the same
    assert (
        losses(folder / "masked")[0] < losses(folder / "first")[0] - 0.1
    )  # it has learnt the frequent pieces


def test_a_head_of_another_size_gets_first_values(runs: tuple[Path, dict[str, Any]]) -> None:
    folder, said = runs
    for name, width in (("detector", 16), ("alone", 32)):
        (new,) = [line for line in said[name].splitlines() if line.startswith("new ")]
        assert "predictions.dense.weight" in new
        assert "predictions.LayerNorm.weight" not in new
        found = open_checkpoint(checkpoints(folder / name)[-1])
        head = found.tensor("predictions.dense.weight")
        assert head.shape == (32, width)
        first = initial_value("predictions.dense.weight", head.shape, found.model, found.vocab_size, seed=3)
        torch.testing.assert_close(head, first, rtol=0, atol=2e-3)  # after one step at 0.001
    assert open_checkpoint(folder / "alone").model.generator is None
    assert "generator.layers.0" in said["alone"].partition("left out")[2]


def test_moments_and_their_count_are_taken_over(runs: tuple[Path, dict[str, Any]]) -> None:
    _, said = runs
    assert set(said["updates"]) == {7.0}  # 5 of `same`, which began with empty moments, and 2 of `third`
    assert said["facts"]["updates_before"] == 7


def test_a_checkpoint_knows_where_its_run_came_from(runs: tuple[Path, dict[str, Any]]) -> None:
    folder, said = runs
    third = open_checkpoint(checkpoints(folder / "third")[-1])
    assert [(Path(each["folder"]).parent.parent.name, each["step"]) for each in third.lineage] == [
        ("first", 4),
        ("same", 5),
    ]
    assert [each["optimizer"] for each in third.lineage] == ["fresh", "keep"]
    for each in third.lineage:
        assert each["digest"] == file_digest(Path(each["folder"]) / TABLE)
    assert ["samples.max_length", "48", "32"] in third.lineage[0]["changed"]
    assert third.lineage[1]["changed"] == [["train.steps", "5", "2"]]
    (earlier,) = open_checkpoint(checkpoints(folder / "earlier")[-1]).lineage
    assert earlier["step"] == 2
    assert said["facts"]["lineage"][:2] == third.lineage


def test_the_start_says_from_what_and_what_differs(runs: tuple[Path, dict[str, Any]]) -> None:
    _, said = runs
    lines = said["third"].splitlines()
    assert any(line.startswith("started   from the weights and moments of ") for line in lines)
    assert "differs   setting      there  here" in lines
    assert "          train.steps  5      2" in lines


def test_another_start_of_the_same_run_is_refused(runs: tuple[Path, dict[str, Any]]) -> None:
    _, said = runs
    assert "choose another run folder or give the old value" in said["same"]
    assert "'optimizer': 'keep'" in said["same"]


# ------------------------------------------------------------------------------------- without a run


def test_keys_of_the_model_that_are_not_given_are_the_source_s(tiny_data: Path) -> None:
    source = pretrain_config(tiny_data, "run").model
    values = {"run": "new", "data": "data", "train": {"steps": 1}, "samples": {"max_length": 40}}
    config = with_model_of(PretrainConfig.model_validate({**values, "init": "run"}), source)
    assert config.model == source
    given = {**values, "init": "run", "model": {"hidden_dropout_prob": 0.3}}
    config = with_model_of(PretrainConfig.model_validate(given), source)
    assert config.model == source.model_copy(update={"hidden_dropout_prob": 0.3})
    given["samples"] = {"max_length": 64}
    with pytest.raises(UserError, match=r"init\.from=run: samples\.max_length=64 is longer than"):
        with_model_of(PretrainConfig.model_validate(given), source)
    given = {**values, "init": "run", "model": {"preset": "modern"}, "samples": {"kind": "packed"}}
    with pytest.raises(UserError, match=r"model\.preset=modern, but init\.from=run is of preset bert"):
        with_model_of(PretrainConfig.model_validate(given), source)


def test_settings_that_differ_are_rows(tiny_data: Path) -> None:
    before = pretrain_config(tiny_data, "run")
    now = pretrain_config(tiny_data, "new", train={"seed": 1}, model={"hidden_dropout_prob": 0.1})
    known = before.model_dump(mode="json")
    del known["objectives"], known["train"]["batch_warmup"]  # of an older version
    assert differences(known, now, before.model) == [
        ["model.hidden_dropout_prob", "0.0", "0.1"],
        ["train.seed", "0", "1"],
    ]
    assert differences(None, now, before.model) == [["model.hidden_dropout_prob", "0.0", "0.1"]]


def test_a_job_keeps_open_what_the_source_decides(tiny_data: Path) -> None:
    """The config of a job is written when the source may not be there yet."""
    values = {"run": "new", "data": "data", "train": {"steps": 1}, "init": "run"}
    config = PretrainConfig.model_validate({**values, "model": {"hidden_dropout_prob": 0.0}})
    text = yaml.safe_load(config_text(config))
    assert text["model"] == {"hidden_dropout_prob": 0.0}
    assert PretrainConfig.model_validate(text) == config


@pytest.mark.parametrize(
    ("init", "model", "message"),
    [
        ({}, {"hidden_size": 48}, r"model\.hidden_size=48, but .* has 32: leave .* init\.tile=true"),
        ({}, {"max_position_embeddings": 96}, r"model\.max_position_embeddings=96.*init\.positions=copy"),
        ({"tile": True}, {"layer_norm_eps": 0.1}, r"model\.layer_norm_eps=0\.1.*leave that key out$"),
        ({"optimizer": "keep"}, {}, r"init\.optimizer=keep: .* has no moments of an optimizer"),
    ],
)
def test_another_network_is_refused_unless_init_makes_it(
    init: dict[str, Any], model: dict[str, Any], message: str, tiny_data: Path
) -> None:
    source = pretrain_config(tiny_data, "run").model
    config = pretrain_config(tiny_data, "new", model=model, init={"from": "run", **init})
    weights: Any = SimpleNamespace(folder=Path("run"), model=source)
    with pytest.raises(UserError, match=message):
        check_source(config, Source(weights, ""))


def test_moments_do_not_go_with_another_shape(tiny_data: Path) -> None:
    with pytest.raises(ValueError, match="optimizer=keep does not go with tile=true"):
        pretrain_config(tiny_data, "new", init={"from": "run", "optimizer": "keep", "tile": True})


def test_the_shape_is_the_one_that_init_asks_for(tiny_data: Path) -> None:
    tokenizer = load_tokenizer(tiny_data)
    model = {"max_position_embeddings": 96, "num_hidden_layers": 3}
    init = {"from": "run", "positions": "copy", "tile": True}
    config = pretrain_config(tiny_data, "new", model=model, init=init)
    small = RandomSource(pretrain_config(tiny_data, "run").model, tokenizer.vocab_size)
    small.tokenizer = tokenizer.path
    large, said = in_shape_of(config, small, tokenizer)
    assert not said
    for name, shape in native_shapes(config.model, tokenizer.vocab_size).items():
        assert large.tensor(name).shape == shape, name
