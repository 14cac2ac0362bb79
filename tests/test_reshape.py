"""Weights in another shape: what a longer table of positions keeps, what a tiled encoder consists of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bertscale.config import ModelConfig, UserError
from bertscale.convert.model_shape import native_shapes
from bertscale.convert.sources import InitSource
from bertscale.data.micro_batch import MicroBatch
from bertscale.model.model import PretrainingModel, split_fused
from bertscale.pretrain.positions import POSITIONS, extended_positions, longer
from bertscale.pretrain.tiling import from_middle, source_layers, tiled, tiled_tensor

VOCAB = 101  # 27 padded rows
LENGTHS = (7, 13, 2, 11)
SMALL = {
    "num_hidden_layers": 3,
    "hidden_size": 24,
    "num_attention_heads": 3,
    "intermediate_size": 36,
    "max_position_embeddings": 13,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
LARGE = {
    **SMALL,
    "num_hidden_layers": 7,
    "hidden_size": 40,
    "num_attention_heads": 5,
    "intermediate_size": 50,
}
PRESETS: dict[str, dict[str, Any]] = {
    "bert": {},
    "megatron-bert": {},
    "modern": {"local_attention": 4},
}


def shape(preset: str, sizes: dict[str, Any] = SMALL, **more: Any) -> ModelConfig:
    return ModelConfig.model_validate({**sizes, "preset": preset, **PRESETS[preset], **more})


class Source:
    """A model's random weights, as a source."""

    def __init__(self, model: ModelConfig, vocab_size: int = VOCAB) -> None:
        self.folder = self.tokenizer = Path("source")
        self.model, self.vocab_size = model, vocab_size
        draw = torch.Generator().manual_seed(0)
        self.tensors = {
            name: torch.randn(shape, generator=draw) * 0.3
            for name, shape in native_shapes(model, vocab_size).items()
        }
        self.names = list(self.tensors)
        self.missing, self.left_out = list[str](), list[str]()

    def tensor(self, name: str) -> Tensor:
        return self.tensors[name]

    def digest(self) -> str:
        return "digest"


def model_of(source: InitSource) -> PretrainingModel:
    model = PretrainingModel(source.model, source.vocab_size).eval()
    model.load_state_dict({name: source.tensor(name) for name in source.names}, strict=False)
    named = {name for name, _ in model.named_parameters()}
    assert named == set(source.names)
    return model


def hidden_states(model: PretrainingModel, lengths: tuple[int, ...] = LENGTHS) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randint(VOCAB, (sum(lengths),), generator=draw)
    positions = torch.cat([torch.arange(length) for length in lengths])
    with torch.no_grad():
        hidden: Tensor = model.encoder(tokens, torch.zeros_like(tokens), positions, lengths)[0]
    return hidden


# ------------------------------------------------------------------------------------------ positions


@pytest.mark.parametrize("preset", PRESETS)
def test_copied_positions_change_no_text_of_the_old_length(preset: str) -> None:
    source = Source(shape(preset))
    long = longer(source, 40, "copy")
    assert long.model.max_position_embeddings == 40
    assert long.model.model_copy(update={"max_position_embeddings": 13}) == source.model
    before, after = model_of(source), model_of(long)
    assert torch.equal(hidden_states(before), hidden_states(after))
    assert hidden_states(after, (40, 17)).isfinite().all()


def test_rows_of_longer_positions() -> None:
    rows = torch.tensor([[0.0, 4.0], [1.0, 2.0], [2.0, 0.0]])
    assert extended_positions(rows, 7, "copy")[:, 0].tolist() == [0, 1, 2, 0, 1, 2, 0]
    between = extended_positions(rows, 5, "interpolate")
    assert between.tolist() == [[0, 4], [0.5, 3], [1, 2], [1.5, 1], [2, 0]]
    for rule in ("copy", "interpolate"):
        assert torch.equal(extended_positions(rows, 3, rule), rows)
        assert torch.equal(extended_positions(rows, 2, rule), rows[:2])
        assert torch.equal(extended_positions(rows[:1], 4, rule), rows[:1].expand(4, 2))


def test_interpolated_positions_keep_both_ends() -> None:
    source = Source(shape("bert"))
    old, new = source.tensor(POSITIONS), longer(source, 50, "interpolate").tensor(POSITIONS)
    assert new.shape == (50, 24)
    assert torch.equal(new[0], old[0])
    assert torch.allclose(new[-1], old[-1], atol=1e-6)


# --------------------------------------------------------------------------------------------- tiling


def test_the_middle_and_around_it() -> None:
    # The cases of the published code's own tests: 3 -> 5, 3 -> 8, 4 -> 7.
    assert (from_middle(3, 5) + 1).tolist() == [3, 1, 2, 3, 1]
    assert (from_middle(3, 8) + 1).tolist() == [2, 3, 1, 2, 3, 1, 2, 3]
    assert (from_middle(4, 7) + 1).tolist() == [4, 1, 2, 3, 4, 1, 2]


def test_tiles_of_a_small_matrix() -> None:
    old = shape("bert", {**SMALL, "hidden_size": 2, "num_attention_heads": 1, "intermediate_size": 3})
    new = shape("bert", {**SMALL, "hidden_size": 4, "num_attention_heads": 2, "intermediate_size": 5})
    matrix = torch.tensor([[1, 2, 3], [4, 5, 6]])  # [H, I]
    assert tiled_tensor("encoder.layers.0.feed_forward.dense.weight", matrix, old, new).tolist() == [
        [6, 4, 5, 6, 4],
        [3, 1, 2, 3, 1],
        [6, 4, 5, 6, 4],
        [3, 1, 2, 3, 1],
    ]
    # One head of two features becomes two, each with its query, key and value.
    fused = torch.tensor([1, 2, 11, 12, 21, 22])
    name = "encoder.layers.0.attention.query_key_value.bias"
    assert tiled_tensor(name, fused, old, new).tolist() == [1, 2, 11, 12, 21, 22] * 2
    words = torch.arange(6).reshape(3, 2)  # pieces are no width
    assert tiled_tensor("encoder.embeddings.word_embeddings.weight", words, old, new).tolist() == [
        [1, 0, 1, 0],
        [3, 2, 3, 2],
        [5, 4, 5, 4],
    ]


@pytest.mark.parametrize("preset", PRESETS)
def test_heads_and_halves_are_tiled_each_alone(preset: str) -> None:
    old, new = shape(preset), shape(preset, LARGE)
    source = Source(old)
    large = tiled(source, new)
    layers = source_layers(old, new)
    heads, hidden, inside = [2, 0, 1, 2, 0], from_middle(24, 40), from_middle(36, 50)
    for number, of in enumerate(layers):
        name = "attention.query_key_value.weight"
        theirs = source.tensor(f"encoder.layers.{of}.{name}").view(3, 3, 8, 24)  # [A, 3, D, H]
        ours = large.tensor(f"encoder.layers.{number}.{name}").view(5, 3, 8, 40)
        assert torch.equal(ours, theirs[heads][..., hidden])
        name = "feed_forward.intermediate.weight"
        halves = split_fused(name, source.tensor(f"encoder.layers.{of}.{name}"), old)  # [1 or 2, I, H]
        tiles = split_fused(name, large.tensor(f"encoder.layers.{number}.{name}"), new)
        assert torch.equal(tiles, halves[:, inside][..., hidden])
        name = "attention.dense.weight"
        theirs = source.tensor(f"encoder.layers.{of}.{name}").view(24, 3, 8)  # [H, A, D]
        ours = large.tensor(f"encoder.layers.{number}.{name}").view(40, 5, 8)
        assert torch.equal(ours, theirs[hidden][:, heads])


@pytest.mark.parametrize("preset", PRESETS)
def test_the_same_size_is_the_same_weights(preset: str) -> None:
    source = Source(shape(preset))
    same = tiled(source, source.model)
    assert sorted(same.names) == sorted(source.names)
    for name in source.names:
        assert torch.equal(same.tensor(name), source.tensor(name)), name


@pytest.mark.parametrize("preset", PRESETS)
def test_a_tiled_model_runs(preset: str) -> None:
    new = shape(preset, LARGE)
    large = tiled(Source(shape(preset)), new)
    assert {name: large.tensor(name).shape for name in large.names} == native_shapes(new, VOCAB)
    model = model_of(large)
    places = torch.arange(sum(LENGTHS))
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    batch = MicroBatch(places, torch.zeros_like(places), positions, LENGTHS, places[:5], places[:5], 5, None)
    sums = model(batch)
    assert sums.mlm.isfinite()
    sums.mlm.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_depth() -> None:
    def layers(preset: str, old: int, new: int, every: int = 3) -> list[int]:
        sizes = [{**SMALL, "num_hidden_layers": number} for number in (old, new)]
        more = {"global_attn_every_n_layers": every} if preset == "modern" else {}
        return source_layers(*(shape(preset, each, **more) for each in sizes))

    assert layers("bert", 3, 7) == [0, 0, 1, 1, 2, 2, 2]  # 0, .43, .86, 1.29, 1.71, 2.14, 2.57 -> not 3
    assert layers("bert", 2, 4) == [0, 0, 1, 1]
    # ModernBERT's own sizes: each global layer comes from one, and each local layer from a local one.
    found = layers("modern", 22, 28)
    assert [layer % 3 == 0 for layer in found] == [number % 3 == 0 for number in range(28)]
    assert [layer for layer in found if layer % 3 == 0] == [0, 3, 6, 6, 9, 12, 15, 15, 18, 21]
    assert layers("modern", 22, 28, every=1) == [round(number * 22 / 28) for number in range(28)]
    assert layers("modern", 1, 3) == [0, 0, 0]  # nothing else is there


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 16, "num_attention_heads": 2}, "hidden_size=16 is smaller than the source's 24"),
        ({"hidden_size": 48}, "heads of size 16, but the source's have 8"),
        ({"num_hidden_layers": 2}, "num_hidden_layers=2 is smaller"),
        ({"preset": "megatron-bert"}, "the source is a bert and model.preset=megatron-bert"),
        ({"generator_size": 1 / 3}, "generator"),
    ],
)
def test_what_is_not_tiled(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiled(Source(shape("bert")), ModelConfig.model_validate({**SMALL, **change}))
