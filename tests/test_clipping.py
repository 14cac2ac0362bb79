"""Gradients that are not finite, and what the host waits for in a step."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from dist import run_ranks
from tiny import pair_batch, pretrain_config
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from bertscale.model.layers import derive_seed
from bertscale.run_folder import checkpoints, read_metrics
from bertscale.train.checkpoint import open_checkpoint

pytestmark = pytest.mark.slow

OPTIMIZERS = ["adamw", "stable-adamw", "lamb", "muon"]
PRECISIONS = ["float32", "bfloat16"]
SOUND = ["first", "second"]
WITH_BAD = ["bad", "first", "bad", "second"]
# Operations that read a value of the device.
READS = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "bincount", "_unique2"}


def engine_of(data: str, optimizer: str, precision: str, tensor: int, stage: int) -> tuple[Any, Any, Any]:
    from bertscale.train.device import local_device
    from bertscale.train.engine import pretraining_engine
    from bertscale.train.parallel import start_ranks

    config = pretrain_config(
        data,
        "unused",
        optimizer={"name": optimizer, "weight_decay": 0.1, "gradient_clipping": 0.4},
        parallel={"tensor": tensor, "zero_stage": stage},
        train={"precision": precision},
    )
    ranks = start_ranks(tensor, local_device())
    engine = pretraining_engine(config, 330, ranks, getattr(torch, precision))
    engine.start(0)
    return config, ranks, engine


# ------------------------------------------------------------------------------- gradients not finite


def follow(data: str, cases: list[list[Any]]) -> list[Any]:
    """On each rank, for each case: the digests of the state after sound steps, with and without bad ones
    between them; whether each step was applied; whether bad ones left the state as it was."""
    from bertscale.train.parallel import leave_subgroups

    results, kind = [], [""]
    for optimizer, precision, tensor, stage in cases:
        ends, applied, kept = [], [], []
        for steps in (SOUND, WITH_BAD):
            _, ranks, engine = engine_of(data, optimizer, precision, tensor, stage)
            for name, parameter in engine.parameters.items():
                parameter.register_hook(prescribe(name, engine._global_shape(name), kind, ranks))
            for kind[0] in steps:
                before = state_of(engine)
                sums = engine(pair_batch())
                engine.backward(sums.mlm + sums.pairs, last=True)
                engine.step(0.01)
                if steps == WITH_BAD:
                    applied.append(float(engine.step_applied))
                    if kind == ["bad"]:
                        kept.append(state_of(engine) == before)
                    else:
                        assert state_of(engine) != before
            ends.append(state_of(engine))
            leave_subgroups(ranks)
        results.append([ends, applied, kept])
    return results


def prescribe(name: str, shape: list[int], kind: list[str], ranks: Any) -> Any:
    """A hook that replaces the gradient of the parameter by one of the `kind` that the list then holds."""
    from bertscale.train.parallel import take_share

    def replace(found: Tensor) -> Tensor:
        draw = torch.Generator().manual_seed(derive_seed(name, kind[0]))
        whole = torch.randn(*shape, generator=draw) * 0.01
        # One value of one parameter on one rank, which tensor ranks hold whole.
        if kind == ["bad"] and ranks.rank == 1 and name.endswith("1.feed_forward.dense.bias"):
            whole.view(-1)[-1] = math.inf
        return take_share(whole, name, ranks.tensor, ranks.tensor_rank).to(found.dtype)

    return replace


def state_of(engine: Any) -> list[int]:
    """A number for each fragment of this rank's weights and moments, and for each weight that trains."""
    tensors = [tensor for fragment in engine.fragments() for tensor in fragment.states.values()]
    if engine.stage < 3:
        tensors += [parameter.data for parameter in engine.parameters.values()]
    return [hash(tensor.detach().float().numpy().tobytes()) for tensor in tensors]


TOPOLOGIES = [(1, 0), (1, 1), (1, 2), (1, 3), (2, 1)]  # (tensor, ZeRO stage), on two ranks
CASES = [
    (optimizer, precision, tensor, stage)
    for optimizer in OPTIMIZERS
    for precision in PRECISIONS
    for tensor, stage in TOPOLOGIES
    if precision == "float32" or optimizer in ("adamw", "lamb")
]


@pytest.fixture(scope="module")
def followed(tiny_data: Path) -> dict[Any, Any]:
    ranks = run_ranks(__file__, "follow", world=2, data=str(tiny_data), cases=CASES)
    return {case: [found[number] for found in ranks] for number, case in enumerate(CASES)}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_gradient_that_is_not_finite_changes_nothing(followed: dict[Any, Any], case: Any) -> None:
    for ends, applied, kept in followed[case]:
        assert applied == [0.0, 1.0, 0.0, 1.0]
        assert kept == [True, True]
        assert ends[0] == ends[1]


# -------------------------------------------------------------------------------- waiting for the device


class Reads(TorchDispatchMode):
    """Counts operations for whose result the host would wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if name in READS or by_mask:
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


class Copies(TorchFunctionMode):
    """Counts tensors made of the host's values, whose copy to a GPU waits for it unless they are pinned."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen += func in (torch.tensor, torch.as_tensor, torch.asarray)
        return func(*args, **(kwargs or {}))


def watch(data: str, cases: list[list[Any]]) -> list[Any]:
    """On each rank, for each case, of the third of three steps: reads, copies, number of micro-batches."""
    from bertscale.data.batches import make_loader
    from bertscale.data.shards import open_dataset
    from bertscale.tokenizer import load_tokenizer
    from bertscale.train.metrics import LossAccumulator
    from bertscale.train.objectives import Counts
    from bertscale.train.parallel import leave_subgroups
    from bertscale.train.step import train_step

    results = []
    for optimizer, precision, tensor, stage in cases:
        config, ranks, engine = engine_of(data, optimizer, precision, tensor, stage)
        tokenizer = load_tokenizer(open_dataset(config.data, "train").tokenizer_path)
        loader = make_loader(config, tokenizer, "train", ranks=ranks)
        losses = LossAccumulator(ranks.device, 0)
        counts = Counts(9.0, 8.0, 99.0)
        for step in range(3):
            batches = loader.step(step)
            with Reads() as reads, Copies() as copies:
                sums = train_step(engine, batches, counts, step=step, learning_rate=0.001)
                losses.add(sums, counts, engine.step_applied)
        leave_subgroups(ranks)
        results.append([reads.seen, copies.seen, len(batches)])
    return results


WATCHED = [
    *((optimizer, "bfloat16", 1, stage) for optimizer in OPTIMIZERS for stage in (1, 2)),
    *(("adamw", "float32", tensor, stage) for tensor, stage in ((1, 0), (1, 1), (2, 2))),
    ("lamb", "bfloat16", 2, 1),
]


@pytest.fixture(scope="module")
def watched(tiny_data: Path) -> dict[Any, Any]:
    ranks = run_ranks(__file__, "watch", world=2, data=str(tiny_data), cases=WATCHED)
    return {case: [found[number] for found in ranks] for number, case in enumerate(WATCHED)}


@pytest.mark.parametrize("case", WATCHED, ids=str)
def test_the_host_waits_for_nothing_in_a_step(watched: dict[Any, Any], case: Any) -> None:
    for reads, copies, micro_batches in watched[case]:
        assert reads == {}
        assert copies == micro_batches  # of the lengths of its samples, pinned where there is a GPU


def test_reads_and_copies_are_seen() -> None:
    values = torch.arange(4.0)
    with Reads() as reads, Copies() as copies:
        values.sum().item()
        bool(values[0] > 0)
        values[values > 1]
        torch.tensor([1.0])
    assert reads.seen == {"_local_scalar_dense": 2, "index": 1}
    assert copies.seen == 1


# ------------------------------------------------------------------------------------------ the loop


def train_with_bad_steps(data: str, run: str, bad: list[int], parallel: dict[str, int], stop: int) -> Any:
    """On each rank: trains, the losses of steps `bad` being NaN; until `stop` signals a stop. Exit code, or
    what the person is told."""
    from bertscale.config import UserError
    from bertscale.model.model import LossSums
    from bertscale.pretrain.pretrain import train
    from bertscale.train.device import local_device
    from bertscale.train.engine import Engine
    from bertscale.train.parallel import start_ranks
    from bertscale.train.resume import newest_sound

    config = pretrain_config(
        data, run, parallel=parallel, train={"steps": 16, "log_every": 4, "save_every": 5, "eval_every": 16}
    )
    ranks = start_ranks(config.parallel.tensor, local_device())
    forward, each = Engine.__call__, 8 // 2 // ranks.data
    checkpoint = newest_sound(Path(run), ranks)
    calls = [each * (checkpoint.step if checkpoint else 0)]

    def poisoned(engine: Engine[Any], batch: Any) -> LossSums:
        sums: LossSums = forward(engine, batch)
        if not torch.is_grad_enabled():
            return sums
        calls[0] += 1
        return LossSums(*(value * math.nan for value in sums)) if (calls[0] - 1) // each in bad else sums

    class Stop:
        @property
        def asked(self) -> bool:
            return calls[0] >= each * stop

    Engine.__call__ = poisoned  # type: ignore[assignment,method-assign]
    try:
        return train(config, ranks, Stop())  # type: ignore[arg-type]
    except UserError as error:
        return str(error)


@pytest.mark.parametrize("parallel", [{"zero_stage": 1}, {"tensor": 2, "zero_stage": 3}])
def test_a_bad_step_is_skipped_said_and_counted(
    tiny_data: Path, tmp_path: Path, parallel: dict[str, int], capfd: pytest.CaptureFixture[str]
) -> None:
    def train(run: Path, stop: int = 99) -> list[Any]:
        arguments: dict[str, Any] = {"data": str(tiny_data), "run": str(run), "bad": [1, 5, 6]}
        return run_ranks(__file__, "train_with_bad_steps", world=2, parallel=parallel, stop=stop, **arguments)

    for run in (tmp_path / "whole", tmp_path / "parts"):
        run.mkdir()
    assert train(tmp_path / "whole") == [0, 0]
    entries = [e for e in read_metrics(tmp_path / "whole") if "train/loss" in e]
    assert [(e["step"], e["train/skipped_steps"]) for e in entries] == [
        (1, 0),
        (4, 1),
        (8, 3),
        (12, 3),
        (16, 3),
    ]
    assert all(3 < e["train/loss"] < 8 for e in entries)  # a mean over the others
    assert train(tmp_path / "parts", stop=9) == [75, 75]
    assert open_checkpoint(tmp_path / "parts").skipped_steps == 3
    assert train(tmp_path / "parts") == [0, 0]
    one, other = open_checkpoint(tmp_path / "whole"), open_checkpoint(tmp_path / "parts")
    assert one.skipped_steps == other.skipped_steps == 3
    for name in one.parameters:
        for state in ("weight", "exp_avg", "exp_avg_sq"):
            assert one.tensor(name, state).equal(other.tensor(name, state)), (name, state)


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        (
            [0],
            "step 1: the gradient was not finite; nothing is saved before: start again with a lower ",
        ),
        (
            range(6, 16),
            "step 16: the gradient was not finite, 10 times in a row; delete the checkpoints after that of "
            "step 5, then resume from the checkpoint of step 5 with a lower optimizer.learning_rate",
        ),
    ],
)
def test_many_bad_steps_in_a_row_end_the_run(
    tiny_data: Path, tmp_path: Path, bad: list[int], told: str
) -> None:
    arguments: dict[str, Any] = {"data": str(tiny_data), "run": str(tmp_path), "bad": list(bad), "stop": 99}
    (found,) = run_ranks(__file__, "train_with_bad_steps", world=1, parallel={"zero_stage": 1}, **arguments)
    assert told in found
    # Two are kept, but none is deleted among skipped steps.
    assert [folder.name for folder in checkpoints(tmp_path)] == (
        ["step-0000005", "step-0000010", "step-0000015"] if len(bad) > 1 else []
    )
