"""Networks as ONNX graphs: the outputs of onnxruntime equal those of the native networks, at any shape."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from test_heads import random_model
from torch import nn

from bertscale.config import ModelConfig, UserError
from bertscale.model.heads import HeadConfig, TaskModel
from bertscale.model.model import PretrainingModel
from bertscale.onnx import write
from bertscale.onnx.write import (
    GRAPH,
    Network,
    compared,
    encoder_network,
    masked_network,
    task_network,
    write_graph,
)

PIECES = 61
SIZES = {
    "num_hidden_layers": 1,
    "hidden_size": 24,
    "num_attention_heads": 3,
    "intermediate_size": 42,
    "max_position_embeddings": 64,
}
MODERN = {"preset": "modern", "num_hidden_layers": 2, "local_attention": 8, "global_attn_every_n_layers": 2}


def shape(**values: Any) -> ModelConfig:
    return ModelConfig.model_validate({**SIZES, **values})


def filled(model: nn.Module) -> Any:
    """The model with random values, away from the ones and zeros of new norms."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.normal_(1.0 if "LayerNorm.weight" in name else 0.0, 0.3, generator=draw)
    return model.eval()


def pretraining(**values: Any) -> PretrainingModel:
    model: PretrainingModel = filled(PretrainingModel(shape(**values), PIECES))
    return model


def task(kind: Any, outputs: int, pooling: Any = "cls", **values: Any) -> Network:
    model: TaskModel = random_model(shape(**values), HeadConfig(kind, outputs, pooling), PIECES)
    return task_network(model.eval())


def names_of(path: Path) -> tuple[list[str], list[str]]:
    graph = onnx.load(path, load_external_data=False).graph
    return [each.name for each in graph.input], [each.name for each in graph.output]


CASES = {
    "bert": lambda: encoder_network(pretraining().encoder, PIECES, "mean", normalize=True),
    "electra, masked": lambda: masked_network(pretraining(generator_size=1 / 3)),
    "text, modern": lambda: task("classification", 3, "mean", **MODERN),
    "tokens, electra": lambda: task("tokens", 3, generator_size=1 / 3),
    "questions, megatron-bert": lambda: task("question_answering", 2, preset="megatron-bert"),
    "choice, bert": lambda: task("multiple_choice", 1),
}
OUTPUTS = {
    "bert": ["last_hidden_state", "sentence_embedding"],
    "questions, megatron-bert": ["start_logits", "end_logits"],
}


@pytest.mark.parametrize("case", CASES)
def test_graphs_equal_the_native_networks(case: str, tmp_path: Path) -> None:
    """`compared` compares them; here it is shown that it does, and at which shapes."""
    network = CASES[case]()
    asked: list[tuple[int, ...]] = []

    def ask(batch: Any) -> Any:
        asked.append(batch.lengths)
        return network.ask(batch)

    write_graph(network, tmp_path)
    assert 0 < compared(Network(**{**vars(network), "ask": ask}), tmp_path / GRAPH) < 1e-5
    assert {len(lengths) for lengths in asked} == ({2, 6} if network.chooses else {1, 3})
    assert {max(lengths) for lengths in asked} == {7, 33, 64}
    assert len({min(lengths) for lengths in asked}) > 3
    inputs, outputs = names_of(tmp_path / GRAPH)
    assert inputs == ["input_ids", "attention_mask", "token_type_ids"][: 2 if network.model.rotary else 3]
    assert outputs == OUTPUTS.get(case, ["logits"])
    content = (tmp_path / GRAPH).read_bytes()
    assert str(Path.cwd()).encode() not in content
    assert b".py" not in content


@pytest.fixture(scope="module")
def modern(tmp_path_factory: pytest.TempPathFactory) -> tuple[Network, Path]:
    """A network, and the folder of its graph, whose weights lie beside it as those of a large one do."""
    network = encoder_network(pretraining(**MODERN).encoder, PIECES, "first")
    folder = tmp_path_factory.mktemp("modern")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(write, "ONE_FILE", 0)
        write_graph(network, folder)
    assert compared(network, folder / GRAPH) < 1e-5
    return network, folder


def test_what_is_padding_is_not_looked_at(modern: tuple[Network, Path]) -> None:
    session = onnxruntime.InferenceSession(modern[1] / GRAPH, providers=["CPUExecutionProvider"])
    ids = np.arange(1, 4, dtype=np.int64)[None]
    alone = session.run(None, {"input_ids": ids, "attention_mask": np.ones_like(ids)})
    padded = np.full((2, 40), 9, np.int64)
    padded[0, :3] = ids
    mask = np.zeros_like(padded)
    mask[0, :3], mask[1, :40] = 1, 1
    hidden, vectors = session.run(None, {"input_ids": padded, "attention_mask": mask})
    np.testing.assert_allclose(hidden[0, :3], alone[0][0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(vectors[0], alone[1][0], rtol=1e-5, atol=1e-5)
    assert np.isfinite(hidden).all()
    longer = np.ones((1, 200), np.int64)  # rotary positions have no end
    assert np.isfinite(session.run(None, {"input_ids": longer, "attention_mask": longer})[0]).all()


def test_large_weights_lie_beside_the_graph(modern: tuple[Network, Path]) -> None:
    _, folder = modern
    assert sorted(path.name for path in folder.rglob("*.*")) == ["model.onnx", "model.onnx_data"]
    weights = sum(value.numel() for value in modern[0].graph.parameters())
    assert (folder / "onnx/model.onnx_data").stat().st_size >= 4 * weights * 0.9


@pytest.mark.parametrize("change", [2.0, float("nan")])
def test_what_differs_or_is_not_finite_is_refused(modern: tuple[Network, Path], change: float) -> None:
    network, folder = modern

    def ask(batch: Any) -> Any:
        return tuple(values * change for values in network.ask(batch))

    with pytest.raises(UserError, match="differ from those of the native model"):
        compared(Network(**{**vars(network), "ask": ask}), folder / GRAPH)


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write, "PACKAGES", ("onnx", "no_such_package"))
    with pytest.raises(UserError, match=r"package no_such_package: pip install 'bertscale\[onnx\]'"):
        write.check_installed()
