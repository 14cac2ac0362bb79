"""Compiled layers: the losses and gradients of eager ones, under the same names, for any lengths."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from dist import run_ranks
from tiny import pretrain_config
from torch import Tensor
from torch._dynamo.utils import counters

from bertscale.bench.timed_steps import RandomBatches
from bertscale.config import PretrainConfig, UserError, load_config
from bertscale.data.micro_batch import MicroBatch
from bertscale.model.kernels import Packing, attend, rotate, rotation
from bertscale.model.model import PretrainingModel, initial_value
from bertscale.train.engine import _graph_tokens
from bertscale.train.parallel import Ranks

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's compiler gives some of its own

MODELS: dict[str, dict[str, Any]] = {
    "bert": {},
    "megatron-bert": {"preset": "megatron-bert"},
    # Of six layers four are alike but for the norm of the first: three kinds of layers.
    "modern": {"preset": "modern", "num_hidden_layers": 6, "local_attention": 8},
}


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def model_of(config: PretrainConfig) -> PretrainingModel:
    model = PretrainingModel(config.model, 330)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial_value(name, parameter.shape, config.model, 330, 0))
    return model


def random_batches(config: PretrainConfig) -> list[MicroBatch]:
    made = RandomBatches(config, 330, Ranks(0, 1, 1, torch.device("cpu"))).steps
    return [batch for step in made for batch in step]


def losses_and_gradients(model: PretrainingModel, batches: list[MicroBatch]) -> list[Tensor]:
    found = []
    for batch in batches:
        model.zero_grad()
        masked, relation, *_ = model(batch)
        (masked + relation).backward()
        found += [masked.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
    return found


@pytest.mark.parametrize("name", MODELS)
def test_layers_are_traced_once_for_all_lengths(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a C++ compiler: torch's graphs, run by its own kernels."""
    kind = "document" if name == "modern" else "nsp"
    config = pretrain_config("d", "r", model=MODELS[name], samples={"kind": kind}, train={"micro_batch": 4})
    batches = random_batches(config)
    eager = model_of(config)
    wanted = losses_and_gradients(eager, batches)
    model = model_of(config)
    names = list(model.state_dict())
    compile_of_layer = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda layer, **how: compile_of_layer(layer, backend="aot_eager", **how)
    )
    model.encoder.compile_layers(fused=False)
    assert list(model.state_dict()) == names
    found = losses_and_gradients(model, batches[:4])
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0
    found += losses_and_gradients(model, batches[4:])
    assert counters["stats"]["unique_graphs"] == graphs, "other lengths were traced again"
    assert len({len(batch.tokens) for batch in batches}) > 4
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def attention_shares(query: Tensor, key: Tensor, starts: Tensor) -> Tensor:
    """[T, A, D] twice -> [A, T, T]."""
    sample = torch.bucketize(torch.arange(len(query)), starts[1:-1].long(), right=True)
    scores = query.transpose(0, 1) @ key.permute(1, 2, 0) * query.shape[-1] ** -0.5
    return torch.softmax(scores.masked_fill(sample[:, None] != sample, -torch.inf), dim=-1)


@torch.library.custom_op("bertscale_test::varlen", mutates_args=())
def varlen(query: Tensor, key: Tensor, value: Tensor, starts: Tensor, longest: int) -> Tensor:
    shares = attention_shares(query, key, starts)
    return (shares @ value.transpose(0, 1)).transpose(0, 1).contiguous()


@torch.library.custom_op("bertscale_test::varlen_backward", mutates_args=())
def varlen_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, starts: Tensor, longest: int
) -> tuple[Tensor, Tensor, Tensor]:
    shares = attention_shares(query, key, starts)
    by_head = grad.transpose(0, 1)  # [A, T, D]
    of_value = shares.transpose(1, 2) @ by_head
    of_shares = by_head @ value.permute(1, 2, 0)
    of_scores = shares * (of_shares - (of_shares * shares).sum(-1, keepdim=True)) * query.shape[-1] ** -0.5
    of_query, of_key = of_scores @ key.transpose(0, 1), of_scores.transpose(1, 2) @ query.transpose(0, 1)
    found = [x.transpose(0, 1).contiguous() for x in (of_query, of_key, of_value)]
    return found[0], found[1], found[2]


varlen.register_fake(lambda query, *_: torch.empty_like(query, memory_format=torch.contiguous_format))
varlen_backward.register_fake(
    lambda grad, *_: tuple(torch.empty_like(grad, memory_format=torch.contiguous_format) for _ in range(3))
)


def remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.longest = inputs
    ctx.save_for_backward(*tensors)


varlen.register_autograd(
    lambda ctx, grad: (*varlen_backward(grad, *ctx.saved_tensors, ctx.longest), None, None),
    setup_context=remember,
)


def test_attention_by_a_kernel_is_in_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU traces, with a dense stand-in for its kernel: one graph a kind of layer, for all lengths."""

    def kernel(query: Tensor, key: Tensor, value: Tensor, starts: Tensor, *more: Any, **_: Any) -> Tensor:
        attended: Tensor = varlen(query, key, value, starts, more[1])
        return attended

    monkeypatch.setattr("bertscale.model.kernels.varlen_attn", kernel, raising=False)
    monkeypatch.setattr("bertscale.model.kernels.uses_varlen", lambda query_key_value, dropout: True)
    config = pretrain_config("d", "r", model=MODELS["modern"], samples={"kind": "document"})
    batches = random_batches(config)
    model = model_of(config)
    wanted = losses_and_gradients(model, batches)
    compile_of_layer = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module,
        "compile",
        lambda layer, **how: compile_of_layer(layer, backend="aot_eager", fullgraph=True, **how),
    )
    model.encoder.compile_layers(fused=True)
    found = losses_and_gradients(model, batches)
    assert len({max(batch.lengths) for batch in batches}) > 4
    assert counters["stats"]["unique_graphs"] == 3  # the first layer, local ones, the other global one
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_turning_compiled_is_turning() -> None:
    positions = torch.arange(11)
    rotary = rotation(positions, 16, 8, 10_000.0)
    values = torch.randn(11, 3, 3, 8, requires_grad=True)
    wanted = rotate(values, rotary)
    gradient = torch.randn_like(wanted)
    (of_eager,) = torch.autograd.grad(wanted, values, gradient)
    found = torch.compile(rotate, backend="aot_eager", dynamic=True)(values, rotary)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(torch.autograd.grad(found, values, gradient)[0], of_eager)


def test_the_longest_is_one_of_few_values() -> None:
    for lengths, longest in (([1], 1), ([2, 3], 4), ([128, 7], 128), ([129], 256)):
        packing = Packing.of(lengths, torch.device("cpu"))
        assert packing.longest == longest
        tokens = torch.randn(sum(lengths), 2, 3, 8)
        assert attend(tokens, packing, 0.0).shape == (sum(lengths), 2, 8)


@pytest.mark.parametrize("name", MODELS)
def test_for_graphs_passes_are_filled_up_to_few_sizes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = "document" if name == "modern" else "nsp"
    config = pretrain_config("d", "r", model=MODELS[name], samples={"kind": kind}, train={"micro_batch": 4})
    batches = random_batches(config)
    assert len({len(batch.tokens) for batch in batches}) > 8
    model = model_of(config)
    wanted = losses_and_gradients(model, batches)

    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda layer, **how: asked.append(how))
    model.encoder.compile_layers(fused=True, graph_tokens=4 * 48)
    assert asked == [{"dynamic": True, "mode": "reduce-overhead"}] * len(model.encoder.layers)
    seen: list[tuple[int, Packing]] = []
    model.encoder.layers[0].register_forward_pre_hook(lambda _, given: seen.append((len(given[0]), given[1])))
    found = losses_and_gradients(model, batches)
    for (tokens, packing), batch in zip(seen, batches, strict=True):
        assert tokens - 12 < len(batch.tokens) <= tokens
        assert tokens % 12 == 0  # one of sixteen
        assert packing.starts[-1] == tokens
        assert packing.longest < 2 * max(batch.lengths)
        assert len(packing.starts) - 1 in (4, 8)  # the batch's samples, those that fill it up, empty ones
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_graphs_want_gradients_out_of_the_way() -> None:
    def tokens(stage: int, ranks: int, **train: Any) -> int | None:
        config = pretrain_config(
            "d", "r", parallel={"zero_stage": stage}, train={"compile": "graphs", **train}
        )
        return _graph_tokens(config, Ranks(0, ranks, 1, torch.device("cpu")))

    assert tokens(2, 1) == 2 * 48
    assert tokens(2, 1, micro_tokens=100) == 100
    assert tokens(1, 4) == 2 * 48
    assert tokens(1, 1, micro_batch=8) == 8 * 48
    for given in ({"micro_batch": 2}, {"micro_tokens": 1000}):
        with pytest.raises(UserError, match="zero_stage=1 needs each rank's part of a step in one"):
            tokens(1, 1, **given)


# --------------------------------------------------------------------------------------------- in training


def train_each(folder: str) -> list[Any]:
    """Runs on a rank: losses of three steps and the parameters' names, eager, compiled and with graphs, which
    a CPU replays as it runs any compiled layer."""
    from bertscale.bench.timed_steps import Stopwatch, our_step
    from bertscale.train.device import local_device
    from bertscale.train.engine import pretraining_engine
    from bertscale.train.parallel import leave_subgroups, start_ranks

    results: list[Any] = []
    for compiled in (False, True, "graphs"):
        ranks = start_ranks(1, local_device())
        config = pretrain_config(
            "d",
            folder,
            model={"num_hidden_layers": 1},
            train={"compile": compiled, "micro_batch": 4},
            parallel={"zero_stage": 2},
        )
        engine = pretraining_engine(config, 330, ranks, torch.float32)
        engine.start(0)
        step = our_step(engine, Stopwatch(ranks.device))
        losses = [float(step(batches)) for batches in RandomBatches(config, 330, ranks).steps[:3]]
        results.append([*losses, *engine.parameters])
        leave_subgroups(ranks)
    return results


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="no C++ compiler")
def test_training_compiled_gives_the_eager_losses(tmp_path: Path) -> None:
    ((eager, *others),) = run_ranks(__file__, "train_each", world=1, folder=str(tmp_path))
    for compiled in others:
        assert compiled[:3] == pytest.approx(eager[:3], rel=1e-5)
        assert compiled[3:] == eager[3:]


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("parallel.tensor=2", "parallel.tensor=2"),
        ("parallel.zero_stage=3", "parallel.zero_stage=3"),
        ("train.activation_checkpointing=full", "train.activation_checkpointing=full"),
    ],
)
def test_what_cannot_be_compiled_is_refused(override: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(pretrain_config("d", "r").model_dump()))
    for value in ("true", "graphs"):
        with pytest.raises(UserError, match=f"train.compile={value} does not go with {words} "):
            load_config(PretrainConfig, path, [f"train.compile={value}", override])
    config = load_config(PretrainConfig, path, [override])
    assert config.train.compile == "auto"
    assert not config.compiles("cuda")


def test_by_itself_on_gpus_alone() -> None:
    config = pretrain_config("d", "r")
    assert config.compiles("cuda")
    assert not config.compiles("cpu")
    assert pretrain_config("d", "r", train={"compile": True}).compiles("cpu")
    assert not pretrain_config("d", "r", train={"compile": False}).compiles("cuda")


def test_predicted_positions_are_fixed_by_themselves_on_gpus_and_even_batches_alone() -> None:
    packed = pretrain_config("d", "r", samples={"kind": "packed"}, model={"sentence_head": False})
    budget = pretrain_config("d", "r", train={"micro_tokens": 96})
    assert packed.has_static_targets("cuda")
    assert budget.has_static_targets("cuda")
    assert not pretrain_config("d", "r").has_static_targets("cuda")
    assert not packed.has_static_targets("cpu")
    assert pretrain_config("d", "r", train={"static_targets": True}).has_static_targets("cpu")
