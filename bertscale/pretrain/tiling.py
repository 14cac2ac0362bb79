"""A larger encoder that starts from a smaller one, by center tiling.

The rule is that by which ModernBERT-large started from ModernBERT-base (Warner et al., 2024, "Weight
Initialization and Tiling", and its published code), after the Phi models for widths and Gopher (Rae et al.,
2021, appendix G.3.3) for depth:

- *Widths.* Each matrix lies in the middle of the larger one, and the rest is filled by going around: along
  every dimension entry i of N comes from entry (i - (N - n) // 2) mod n of n. Query, key and value are tiled
  each alone, so are the two halves of a gated feed-forward part. Norms and biases are tiled as the features
  that they are of. Nothing is rescaled.
- *Depth.* Layer i of L comes from layer round(i l / L) of l.

Three things differ. Attention heads are tiled as whole heads; rows of ModernBERT's sizes come out the same,
but an odd number of new heads would begin with half a head there. Where layers are local and global by turns,
the nearest layer of the same kind is taken, where the source has one; ModernBERT took no notice of it. And
the last layer is taken where round gives one past it, as it does where the depth doubles or more.

The larger encoder does not compute what the smaller one does: it is a start from which the loss falls faster
than from random weights.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from bertscale.config import ModelConfig, UserError
from bertscale.convert.sources import InitSource
from bertscale.model.model import join_fused, split_fused
from bertscale.pretrain.reshaped import Reshaped

SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")

# What each dimension of a parameter counts; "" is no width of the encoder and stays as it is.
DIMENSIONS = {
    "embeddings.weight": ("", "hidden"),
    "LayerNorm.weight": ("hidden",),
    "LayerNorm.bias": ("hidden",),
    "attention.query_key_value.weight": ("heads", "hidden"),
    "attention.query_key_value.bias": ("heads",),
    "attention.dense.weight": ("hidden", "heads"),
    "attention.dense.bias": ("hidden",),
    "feed_forward.intermediate.weight": ("inside", "hidden"),
    "feed_forward.intermediate.bias": ("inside",),
    "feed_forward.dense.weight": ("hidden", "inside"),
    "feed_forward.dense.bias": ("hidden",),
    "pooler.weight": ("hidden", "hidden"),
    "pooler.bias": ("hidden",),
    "predictions.dense.weight": ("hidden", "hidden"),
    "predictions.dense.bias": ("hidden",),
    "predictions.decoder.bias": ("",),
    "seq_relationship.weight": ("", "hidden"),
    "seq_relationship.bias": ("",),
}
_layer = re.compile(r"encoder\.layers\.(\d+)\.")


def tiled(source: InitSource, model: ModelConfig) -> InitSource:
    """`source` in the depth and the widths of `model`.

    Raises UserError where `model` is smaller in any of them, has another preset or heads of another size, or
    where either has a generator.
    """
    old = source.model
    check_tiling(old, model)
    layers = source_layers(old, model)
    added = _norms_of_ones(old, layers)
    names = [name for name in source.names if not _layer.match(name)] + added
    for number, of in enumerate(layers):
        ours, theirs = f"encoder.layers.{number}.", f"encoder.layers.{of}."
        names += [ours + name.removeprefix(theirs) for name in source.names if name.startswith(theirs)]

    def tensor(name: str) -> Tensor:
        if name in added:
            return torch.ones(model.hidden_size)
        if found := _layer.match(name):
            theirs = f"encoder.layers.{layers[int(found[1])]}.{name[found.end() :]}"
        else:
            theirs = name
        return tiled_tensor(name, source.tensor(theirs), old, model)

    sizes = {key: getattr(model, key) for key in (*SIZES, "global_attn_every_n_layers")}
    return Reshaped(source, tensor, names=names, **sizes)


def check_tiling(old: ModelConfig, new: ModelConfig) -> None:
    """Raises UserError where an encoder of shape `new` cannot be tiled from one of shape `old`."""
    if old.preset != new.preset:
        raise UserError(
            f"init.tile: the source is a {old.preset} and model.preset={new.preset}; tiling keeps the preset"
        )
    if old.generator_size is not None or new.generator_size is not None:
        raise UserError(
            "init.tile: a model with a generator (model.generator_size) is not tiled, neither from nor to; "
            "train the larger one without a source"
        )
    for key in SIZES:
        before, now = getattr(old, key), getattr(new, key)
        if now < before:
            raise UserError(
                f"init.tile: model.{key}={now} is smaller than the source's {before}; tiling only enlarges"
            )
    size, new_size = (m.hidden_size // m.num_attention_heads for m in (old, new))
    if size != new_size:
        raise UserError(
            f"init.tile: model.hidden_size={new.hidden_size} / num_attention_heads={new.num_attention_heads} "
            f"gives heads of size {new_size}, but the source's have {size}; heads are tiled whole, so take "
            f"hidden_size = {size} x num_attention_heads"
        )


def source_layers(old: ModelConfig, new: ModelConfig) -> list[int]:
    """For each layer of `new` the layer of `old` that it comes from; see the module."""
    layers = []
    for number in range(new.num_hidden_layers):
        depth = number * old.num_hidden_layers / new.num_hidden_layers
        nearest = min(round(depth), old.num_hidden_layers - 1)
        local = new.is_local(number)
        if old.is_local(nearest) != local:
            alike = [layer for layer in range(old.num_hidden_layers) if old.is_local(layer) == local]
            nearest = min(alike, key=lambda layer: abs(layer - depth), default=nearest)
        layers.append(nearest)
    return layers


def _norms_of_ones(old: ModelConfig, layers: list[int]) -> list[str]:
    """The norms that a copy of the first layer needs and the first layer lacks: its input has been normed by
    the embeddings' norm, which after ones of its own it nearly is again."""
    if not (old.pre_norm and old.embedding_norm):
        return []
    assert not old.biases  # the norm is a weight alone
    copies = [number for number, of in enumerate(layers) if of == 0 and number > 0]
    return [f"encoder.layers.{number}.attention.LayerNorm.weight" for number in copies]


def tiled_tensor(name: str, value: Tensor, old: ModelConfig, new: ModelConfig) -> Tensor:
    """The whole parameter `name` of `new`, from that of `old` at the same place of its layer."""
    kinds = next(kinds for end, kinds in DIMENSIONS.items() if name.endswith(end))
    for dimension, kind in enumerate(kinds):
        if not kind:
            continue
        entries = _entries(kind, old, new)
        if dimension == 0:  # where several matrices lie in one
            value = join_fused(name, split_fused(name, value, old)[:, entries], new)
        else:
            value = value[:, entries]
    return value


def _entries(kind: str, old: ModelConfig, new: ModelConfig) -> Tensor:
    """The entries of the old dimension of this kind of which the new one consists."""
    if kind == "hidden":
        return from_middle(old.hidden_size, new.hidden_size)
    if kind == "inside":
        return from_middle(old.intermediate_size, new.intermediate_size)
    heads = from_middle(old.num_attention_heads, new.num_attention_heads)
    size = old.hidden_size // old.num_attention_heads
    return (heads[:, None] * size + torch.arange(size)).flatten()  # [A, D] -> [A D]


def from_middle(old: int, new: int) -> Tensor:
    """For each of `new` entries the one of `old`: these in the middle, and around them again, int64 [new]."""
    return (torch.arange(new) - (new - old) // 2) % old
