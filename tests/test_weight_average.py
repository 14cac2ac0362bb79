"""The moving average of the weights: against sums by hand, in any topology, resumed, evaluated, exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from dist import run_ranks
from test_checkpoint import StopAfter
from tiny import pretrain_config
from torch import Tensor

from bertscale.config import UserError
from bertscale.convert.model_shape import native_shapes
from bertscale.convert.weights import load_model
from bertscale.export.convert import convert
from bertscale.export.options import ConvertOptions
from bertscale.model.model import initial_value
from bertscale.run_folder import checkpoints, read_metrics
from bertscale.train.checkpoint import open_checkpoint

pytestmark = pytest.mark.slow

TRAIN = {"steps": 4, "save_every": 1, "keep_checkpoints": 9, "eval_every": 2}
DECAY = 0.75


def train_all(data: str, folder: str) -> dict[str, Any]:
    """On each rank: runs with and without an average, one stopped and moved to another topology; then the
    losses of each engine with its weights, its average and its weights again, and of the saved average."""
    from bertscale.data.batches import make_loader
    from bertscale.pretrain.heldout import evaluate
    from bertscale.pretrain.pretrain import train
    from bertscale.tokenizer import load_tokenizer
    from bertscale.train.device import local_device
    from bertscale.train.engine import pretraining_engine
    from bertscale.train.parallel import leave_subgroups, start_ranks

    ranks = start_ranks(1, local_device())
    world = ranks.world
    leave_subgroups(ranks)

    def run(name: str, decay: float, stage: int, tensor: int = 1, stop: int = 99) -> None:
        parallel = {"tensor": tensor, "zero_stage": stage}
        config = pretrain_config(
            data, Path(folder) / name, parallel=parallel, train={**TRAIN, "average": decay}
        )
        Path(config.run).mkdir(exist_ok=True)
        ranks = start_ranks(tensor, local_device())
        train(config, ranks, StopAfter(stop))  # type: ignore[arg-type]
        leave_subgroups(ranks)

    run("whole", DECAY, stage=min(1, world - 1))
    if world == 1:
        return {}
    run("plain", 0.0, stage=1)
    run("moved", DECAY, stage=1, stop=2)
    run("moved", DECAY, stage=3, tensor=2)
    run("late", 0.0, stage=2, stop=2)
    run("late", DECAY, stage=2)

    ranks = start_ranks(1, local_device())
    tokenizer = load_tokenizer(Path(data))
    said: dict[str, Any] = {}
    saved = open_checkpoint(Path(folder) / "whole")
    for stage in range(4):
        for dtype in (torch.float32, torch.bfloat16):
            config = pretrain_config(
                data, folder, parallel={"zero_stage": stage}, train={"average": DECAY, "micro_batch": 4}
            )
            heldout = make_loader(config, tokenizer, "validation", ranks=ranks)
            engine = pretraining_engine(config, tokenizer.vocab_size, ranks, dtype)
            engine.resume(saved)

            before, after = (evaluate(engine, {"heldout": heldout}, {}, 16, 0) for _ in range(2))
            losses = [before["heldout/loss"], before["heldout_average/loss"], after["heldout/loss"]]
            said[f"{stage} {dtype}"] = losses
    return said


@pytest.fixture(scope="module")
def two(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("two")
    return folder, run_ranks(__file__, "train_all", world=2, data=str(tiny_data), folder=str(folder))[0]


def by_hand(run: Path, begin: int = 0) -> dict[str, Tensor]:
    """The average after the last step, from the weights of each step."""
    opened = [open_checkpoint(folder) for folder in checkpoints(run)]
    assert [each.step for each in opened] == [1, 2, 3, 4]
    model, vocab_size = opened[0].model, opened[0].vocab_size
    averages = {}
    for name, shape in native_shapes(model, vocab_size).items():
        average = (
            opened[begin - 1].tensor(name) if begin else initial_value(name, shape, model, vocab_size, seed=0)
        )
        for each in opened[begin:]:
            average = DECAY * average + (1 - DECAY) * each.tensor(name)
        averages[name] = average
    return averages


def check_average(run: Path, expected: dict[str, Tensor]) -> None:
    found = open_checkpoint(run)
    assert found.has_average
    for name, value in expected.items():
        assert not torch.equal(found.tensor(name), value)
        torch.testing.assert_close(found.tensor(name, "average"), value, rtol=1e-5, atol=1e-6)


def test_it_is_the_one_by_hand_on_one_rank(tiny_data: Path, tmp_path: Path) -> None:
    run_ranks(__file__, "train_all", world=1, data=str(tiny_data), folder=str(tmp_path))
    check_average(tmp_path / "whole", by_hand(tmp_path / "whole"))


def test_it_is_the_one_by_hand_on_two_ranks_stopped_and_moved(two: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = two
    for name in ("whole", "moved"):
        check_average(folder / name, by_hand(folder / name))


def test_it_begins_from_the_weights_where_there_was_none(two: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = two
    assert not open_checkpoint(checkpoints(folder / "late")[1]).has_average
    check_average(folder / "late", by_hand(folder / "late", begin=2))


def test_training_does_not_notice_it(two: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = two
    whole, plain = (list(read_metrics(folder / name)) for name in ("whole", "plain"))
    for key in ("train/loss", "heldout/loss"):
        assert [row[key] for row in whole if key in row] == [row[key] for row in plain if key in row]
    ours, theirs = open_checkpoint(folder / "whole"), open_checkpoint(folder / "plain")
    assert not theirs.has_average
    for name in ours.parameters:
        for state in ("weight", "exp_avg", "exp_avg_sq"):
            assert torch.equal(ours.tensor(name, state), theirs.tensor(name, state)), name


def test_its_held_out_loss_is_that_of_a_model_with_its_weights(two: tuple[Path, dict[str, Any]]) -> None:
    folder, said = two
    last = [row for row in read_metrics(folder / "whole") if "heldout/loss" in row][-1]
    weights, average = last["heldout/loss"], last["heldout_average/loss"]
    assert average > weights + 0.01
    assert len(said) == 8
    for case, (before, inside, after) in said.items():
        tolerance = 1e-5 if "float32" in case else 0.01
        assert before == after, case
        assert (before, inside) == pytest.approx((weights, average), rel=tolerance), case


def test_it_is_exported_on_request(
    two: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = two
    convert(folder / "whole", tmp_path / "weights", ConvertOptions(show=False))
    convert(folder / "whole", tmp_path / "average", ConvertOptions(show=False, average=True))
    checkpoint = open_checkpoint(folder / "whole")
    for state, name in (("weight", "weights"), ("average", "average")):
        for key, value in load_model(tmp_path / name).named_parameters():
            if "decoder.bias" not in key and "word_embeddings" not in key:  # rows of no piece are left out
                assert torch.equal(value, checkpoint.tensor(key, state)), key
    capsys.readouterr()
    convert(folder / "whole", tmp_path / "average", ConvertOptions(show=False, average=True))
    assert capsys.readouterr().out.startswith("already converted")
    with pytest.raises(UserError, match=r"step-0000004 holds no average of the weights; a run with "):
        convert(folder / "plain", tmp_path / "none", ConvertOptions(show=False, average=True))
    with pytest.raises(UserError, match=r"--average: .* is no checkpoint of ours"):
        convert(tmp_path / "weights", tmp_path / "none", ConvertOptions(show=False, average=True))
