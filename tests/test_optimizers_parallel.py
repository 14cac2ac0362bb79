"""Each optimizer x TP x DP x ZeRO against the dense run, and the dense run against the papers' formulas.

Two kinds of runs. In one the gradients are prescribed (random, the same on every rank and in every topology),
so that what differs is the optimizer's own doing. The other trains on text.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from dist import run_ranks
from tiny import pair_batch, pretrain_config
from torch import Tensor

from bertscale.model.layers import derive_seed
from bertscale.train.checkpoint import Checkpoint, open_checkpoint

pytestmark = pytest.mark.slow

TOPOLOGIES = [(1, 1, 0), (1, 2, 0), (1, 2, 1), (1, 2, 2), (1, 2, 3)]  # (tensor, data, ZeRO stage)
TOPOLOGIES += [(2, 1, 0), (2, 1, 3), (2, 2, 3), (2, 2, 1), (4, 1, 3)]
TRAINED = [(1, 1, 0), (1, 2, 2), (1, 2, 3), (2, 1, 3), (2, 2, 1)]  # on text as well
OPTIMIZERS = ["adamw", "stable-adamw", "lamb", "muon"]
RATE, DECAY, CLIP, STEPS = 0.003, 0.1, 0.4, 5


def gradient(name: str, shape: list[int], step: int) -> Tensor:
    """A prescribed gradient; step 3 brings one that is far larger, for which StableAdamW is made."""
    generator = torch.Generator().manual_seed(derive_seed(name, step))
    return torch.randn(*shape, generator=generator) * (0.05 if step == 3 else 0.001)


def settings(data: str, run: Path, optimizer: str, tensor: int, stage: int, precision: str) -> Any:
    return pretrain_config(
        data,
        run,
        optimizer={
            "name": optimizer,
            "learning_rate": 0.02 if optimizer == "lamb" else RATE,
            "weight_decay": DECAY,
            "gradient_clipping": CLIP,
        },
        parallel={"tensor": tensor, "zero_stage": stage},
        train={"steps": 6, "precision": precision, "eval_every": 6, "save_every": 3, "global_batch": 8},
    )


def follow_prescribed(config: Any, ranks: Any, folder: Path) -> list[float]:
    """Five steps of prescribed gradients through DeepSpeed; a checkpoint of the end; the norms."""
    from bertscale.data.shards import open_dataset
    from bertscale.train.checkpoint import save_checkpoint
    from bertscale.train.engine import pretraining_engine
    from bertscale.train.parallel import take_share

    data = open_dataset(config.data, "train")
    engine = pretraining_engine(config, 330, ranks, getattr(torch, config.train.precision))
    engine.start(0)
    norms: list[float] = []

    def prescribe(name: str, shape: list[int]) -> Any:
        def replace(found: Tensor) -> Tensor:
            whole = gradient(name, shape, len(norms)) / 2  # two micro-batches
            return take_share(whole, name, ranks.tensor, ranks.tensor_rank).to(found.dtype)

        return replace

    for name, parameter in engine.parameters.items():
        hook = prescribe(name, engine._global_shape(name))
        parameter.register_hook(hook)
    for _ in range(STEPS):
        for last in (False, True):
            sums = engine(pair_batch())
            engine.backward(sums.mlm + sums.pairs, last=last)
            engine.step(RATE)
        norms.append(engine.gradient_norm())
    table = {"step": STEPS, "samples_consumed": 0, "tokenizer_sha256": "", **engine.table()}
    save_checkpoint(folder, engine.fragments_to_save(), table, data.tokenizer_path, ranks)
    return norms


def run_each(data: str, folder: str, cases: list[list[Any]]) -> list[Any]:
    """Runs on each rank: for each case the norms of prescribed steps, and the figures of a training."""
    from bertscale.pretrain.pretrain import train
    from bertscale.run_folder import read_metrics
    from bertscale.train.device import local_device
    from bertscale.train.parallel import leave_subgroups, start_ranks
    from bertscale.train.stop import StopSignal

    results: list[Any] = []
    for optimizer, precision, (tensor, size, stage) in cases:
        run = Path(folder) / f"{optimizer}-{precision}-t{tensor}-d{size}-z{stage}"
        run.mkdir(exist_ok=True)
        config = settings(data, run, optimizer, tensor, stage, precision)
        ranks = start_ranks(tensor, local_device())
        assert ranks.data == size
        norms = follow_prescribed(config, ranks, run / "prescribed")
        if precision == "bfloat16" or (tensor, size, stage) not in TRAINED:
            leave_subgroups(ranks)
            results.append([norms, []])
            continue
        assert train(config, ranks, StopSignal()) == 0
        leave_subgroups(ranks)
        steps = [e for e in read_metrics(run) if "train/loss" in e]
        results.append([norms, [[e["train/loss"], e["train/gradient_norm"]] for e in steps]])
    return results


class StopAfter:
    """Asks the loop to stop after `steps` steps, as a signal would."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    @property
    def asked(self) -> bool:
        self.left -= 1
        return self.left < 0


def train_in_stretches(data: str, folder: str, cases: list[list[Any]]) -> list[Any]:
    """Runs on each rank: for each case three steps in each of two topologies; the losses and norms."""
    from bertscale.pretrain.pretrain import train
    from bertscale.run_folder import read_metrics
    from bertscale.train.device import local_device
    from bertscale.train.parallel import leave_subgroups, start_ranks

    results = []
    for number, (optimizer, precision, *stretches) in enumerate(cases):
        run = Path(folder) / f"stretches-{number}"
        run.mkdir(exist_ok=True)
        for code, (tensor, stage) in zip((75, 0), stretches, strict=True):
            config = settings(data, run, optimizer, tensor, stage, precision)
            ranks = start_ranks(tensor, local_device())
            assert train(config, ranks, StopAfter(3 if code else 9)) == code  # type: ignore[arg-type]
            leave_subgroups(ranks)
        steps = [e for e in read_metrics(run) if "train/loss" in e]
        results.append([[e["train/loss"], e["train/gradient_norm"]] for e in steps])
    return results


Cases = dict[tuple[str, tuple[int, int, int]], Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("optimizers")


def run_cases(data: Path, folder: Path, precision: str, topologies: list[tuple[int, int, int]]) -> Cases:
    found: Cases = {}
    for world in (1, 2, 4):
        here = [t for t in topologies if t[0] * t[1] == world]
        cases = [(optimizer, precision, t) for optimizer, t in itertools.product(OPTIMIZERS, here)]
        if cases:
            arguments = {"data": str(data), "folder": str(folder), "cases": cases}
            results = run_ranks(__file__, "run_each", world=world, **arguments)
            found |= {(o, t): result for (o, _, t), result in zip(cases, results[0], strict=True)}
    return found


@pytest.fixture(scope="module")
def figures(tiny_data: Path, folder: Path) -> Cases:
    return run_cases(tiny_data, folder, "float32", TOPOLOGIES)


def prescribed(
    folder: Path, optimizer: str, topology: tuple[int, int, int], precision: str = "float32"
) -> Checkpoint:
    tensor, size, stage = topology
    return open_checkpoint(folder / f"{optimizer}-{precision}-t{tensor}-d{size}-z{stage}" / "prescribed")


def apart(one: Tensor, other: Tensor) -> float:
    """Distance as a share of the length: the relative error of a tensor as a whole."""
    return float((one.double() - other.double()).norm() / other.double().norm().clamp(min=1e-12))


@pytest.mark.parametrize("topology", TOPOLOGIES[1:], ids=lambda t: "t{}-d{}-z{}".format(*t))
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_prescribed_gradients_give_the_dense_weights_and_moments(
    figures: Cases, folder: Path, optimizer: str, topology: tuple[int, int, int]
) -> None:
    dense, sharded = (prescribed(folder, optimizer, t) for t in (TOPOLOGIES[0], topology))
    norms = [figures[optimizer, t][0] for t in (TOPOLOGIES[0], topology)]
    torch.testing.assert_close(*map(torch.tensor, norms), rtol=1e-6, atol=0)
    assert min(norms[0]) < CLIP < max(norms[0])  # clipping takes part, and does not always
    for name, entry in dense.parameters.items():
        for state in entry["states"]:
            a, b = sharded.tensor(name, state), dense.tensor(name, state)
            assert apart(a, b) < 1e-6, (name, state)


@pytest.mark.parametrize("topology", TRAINED[1:], ids=lambda t: "t{}-d{}-z{}".format(*t))
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_gives_the_dense_losses_and_norms(
    figures: Cases, folder: Path, optimizer: str, topology: tuple[int, int, int]
) -> None:
    dense, sharded = (torch.tensor(figures[optimizer, t][1]) for t in (TOPOLOGIES[0], topology))
    assert dense.shape == (6, 2)
    assert dense[-1, 0] < dense[0, 0] - 0.1
    torch.testing.assert_close(sharded, dense, rtol=1e-6, atol=0)


def test_a_resumed_run_is_the_uninterrupted_one(
    figures: Cases, tiny_data: Path, folder: Path, tmp_path: Path
) -> None:
    """Bit for bit in the same topology, to rounding in another one."""
    same = [[optimizer, "float32", (1, 3), (1, 3)] for optimizer in OPTIMIZERS]
    other = [[optimizer, "float32", (1, 2), (2, 3)] for optimizer in OPTIMIZERS[2:]]
    arguments = {"data": str(tiny_data), "folder": str(tmp_path), "cases": same + other}
    found = run_ranks(__file__, "train_in_stretches", world=2, **arguments)[0]
    for number, optimizer in enumerate(OPTIMIZERS):
        whole = figures[optimizer, (1, 2, 3)][1]
        assert found[number] == whole
        if number >= 2:
            torch.testing.assert_close(found[number + 2], whole, rtol=1e-5, atol=1e-5)
        one = open_checkpoint(tmp_path / f"stretches-{number}")
        two = open_checkpoint(folder / f"{optimizer}-float32-t1-d2-z3")
        assert one.step == two.step == 6
        for name, entry in one.parameters.items():
            for state in entry["states"]:
                assert one.tensor(name, state).equal(two.tensor(name, state)), (optimizer, name, state)


def test_bfloat16_keeps_float32_weights(tiny_data: Path, tmp_path: Path) -> None:
    """Whatever the stage, the weights that are updated are the dense run's, in float32.

    Muon iterates in bfloat16, where a last bit that differs comes to a hundredth of an update.
    """
    topologies = [(1, 1, 0), (1, 2, 2), (1, 2, 3), (2, 1, 3)]
    found = run_cases(tiny_data, tmp_path, "bfloat16", topologies)
    for optimizer, topology in itertools.product(OPTIMIZERS, topologies[1:]):
        dense, sharded = (prescribed(tmp_path, optimizer, t, "bfloat16") for t in (topologies[0], topology))
        norms = [found[optimizer, t][0] for t in (topologies[0], topology)]
        torch.testing.assert_close(*map(torch.tensor, norms), rtol=1e-5, atol=0)
        for name in dense.parameters:
            a, b = sharded.tensor(name), dense.tensor(name)
            assert not b.equal(b.bfloat16().float()), name
            assert apart(a, b) < (2e-3 if optimizer == "muon" and ".layers." in name else 1e-5), (
                name,
                topology,
            )
