"""The door to DeepSpeed: the layout that it is read with, and gradients of a module that is used twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dist import run_ranks
from tiny import pretrain_config

pytestmark = pytest.mark.slow


# ---------------------------------------------------------------------------------------- a strange layout


def read_strange_layouts() -> list[Any]:
    """Runs on each of two ranks: what is said of a DeepSpeed whose attributes mean something else."""
    from bertscale.config import UserError
    from bertscale.train.device import local_device
    from bertscale.train.engine import pretraining_engine
    from bertscale.train.parallel import start_ranks
    from bertscale.train.zero import Zero

    tensors, places, ranks = Zero._tensors, Zero._addresses, start_ranks(1, local_device())

    def lost(zero: Any) -> Any:  # the first rank's part of a parameter
        found = places(zero)
        return {name: place for name, place in found.items() if ranks.rank or name != min(found)}

    def shorter(zero: Any) -> Any:
        return {name: place._replace(length=place.length - 1) for name, place in places(zero).items()}

    def further(zero: Any) -> Any:
        return {name: place._replace(offset=place.offset + 10**6) for name, place in places(zero).items()}

    def twice(zero: Any) -> Any:
        return [(tensor, [*names, *names[:1]]) for tensor, names in tensors(zero)]

    def renamed(zero: Any) -> Any:
        return zero.wrapper.no_such_attribute

    told = []
    for stage in (1, 2, 3):
        config = pretrain_config("d", "r", parallel={"zero_stage": stage})
        for change in (lost, shorter, further, twice, renamed):
            Zero._addresses = places if change is twice else change  # type: ignore[assignment,method-assign]
            Zero._tensors = twice if change is twice else tensors  # type: ignore[assignment,method-assign]
            try:
                pretraining_engine(config, 330, ranks, torch.float32)
            except UserError as error:
                told.append(f"{change.__name__}: {error}")
    return told


def test_a_layout_that_is_not_known_is_refused_on_every_rank() -> None:
    first, second = run_ranks(__file__, "read_strange_layouts", world=2)
    for rank in (first, second):
        assert len(rank) == 15
        for line in rank:
            assert "lays out its tensors in a way that bertscale does not know (" in line
            assert line.count("\n") == 0
    assert first[0] == second[0]
    assert "values instead of" in first[0]
    assert "outside of their tensors" in first[2]
    assert "other parameters than the model" in first[3]
    assert "no_such_attribute" in first[4]


def follow_wrong_gradients() -> str:
    """Runs on each of two ranks: a step in which DeepSpeed's gradients belong to other parameters."""
    from tiny import pair_batch

    from bertscale.config import UserError
    from bertscale.train.device import local_device
    from bertscale.train.engine import pretraining_engine
    from bertscale.train.parallel import start_ranks

    config = pretrain_config("d", "r", parallel={"zero_stage": 2})
    engine = pretraining_engine(config, 330, start_ranks(1, local_device()), torch.float32)
    engine.start(0)
    engine.backward(engine(pair_batch()).mlm, last=True)
    for parameters in engine.zero.wrapper.params_in_partition:
        parameters.reverse()
    try:
        engine.step(0.1)
    except UserError as error:
        return str(error)
    return ""


def test_gradients_of_another_length_than_their_parameter_are_refused() -> None:
    for told in run_ranks(__file__, "follow_wrong_gradients", world=2):
        assert "(the gradient of" in told


# ----------------------------------------------------------------------------------- modules used twice


def gradients(cases: list[list[Any]]) -> list[Any]:
    """Runs on each rank: for each case the gradient of each parameter, whole, after two micro-batches.

    The ranks and micro-batches take the same sequences in turns, so that the global batch is always the same.
    """
    from bertscale.config import ModelConfig
    from bertscale.data.micro_batch import MicroBatch
    from bertscale.train.device import local_device
    from bertscale.train.engine import pretraining_engine
    from bertscale.train.parallel import leave_subgroups, start_ranks

    draw = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(4):
        tokens = torch.randint(5, 330, (12,), generator=draw)
        places = torch.tensor([1, 4, 8])
        batches.append(
            MicroBatch(
                tokens=tokens.index_fill(0, places, 4),
                token_types=torch.zeros(12, dtype=torch.int64),
                positions=torch.arange(12) % 6,
                lengths=(6, 6),
                target_positions=places,
                targets=tokens[places],
                num_targets=3,
                next_sentence_label=torch.tensor([0, 1]),
                uniforms=torch.full((3,), 0.5, dtype=torch.float64),
            )
        )
    results = []
    for stage, precision in cases:
        config = pretrain_config(
            "d",
            "r",
            model={"generator_size": 0.5, "initializer_range": 0.2},
            parallel={"zero_stage": stage},
            train={"global_batch": 8, "micro_batch": 2},
        )
        assert isinstance(config.model, ModelConfig)
        ranks = start_ranks(1, local_device())
        engine = pretraining_engine(config, 330, ranks, getattr(torch, precision))
        engine.start(0)
        mine = batches[ranks.data_rank :: ranks.data]
        for batch in mine:
            sums = engine(batch)
            loss = (sums.mlm / 12 + sums.pairs / 8 + sums.rtd / 48) * ranks.data
            engine.backward(loss, last=batch is mine[-1])
        whole = {name: torch.zeros(parameter.numel()) for name, parameter in engine.parameters.items()}
        for name, part in engine.zero.gradients():
            start = engine.zero.addresses[name].start
            whole[name][start : start + part.numel()] += part.detach().float().flatten()
        parts = ranks.gather({name: value.tolist() for name, value in whole.items()})
        if stage == 0:
            parts = parts[:1]
        results.append({name: torch.tensor([p[name] for p in parts]).sum(0).tolist() for name in whole})
        leave_subgroups(ranks)
    return results


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-5), ("bfloat16", 1e-2)])
def test_gradients_of_shared_embeddings_are_those_of_one_rank(precision: str, tolerance: float) -> None:
    """ELECTRA's word embeddings are read by two encoders and a decoder in each step (deepspeed#8224: up to
    0.19.3 such gradients were wrong under ZeRO-2 in bfloat16 on several ranks)."""
    ((alone,),) = run_ranks(__file__, "gradients", world=1, cases=[[1, precision]])
    sharded, _ = run_ranks(__file__, "gradients", world=2, cases=[[1, precision], [2, precision]])
    for found in sharded:
        for name, values in alone.items():
            wanted, got = torch.tensor(values), torch.tensor(found[name])
            assert float(wanted.norm()) > 1e-3
            # Measured: up to 7e-3 in bfloat16, the rounding of sums in another order.
            assert float((got - wanted).norm() / wanted.norm()) < tolerance, name
