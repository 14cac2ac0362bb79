"""What the native model answers to a few samples, its layers in memory one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from bertscale.config import ModelConfig
from bertscale.model.layers import Layers
from bertscale.model.model import PretrainingModel


class Output(NamedTuple):
    """Of one sample of T tokens; float32, None where the model has no such part."""

    hidden: Tensor  # [T, H] of the encoder; of the generator where there is one and it alone is asked
    pooled: Tensor | None  # [H]
    logits: Tensor | None  # [T, V] of masked tokens
    pairs: Tensor | None  # [2]
    replaced: Tensor | None  # [T]


class Source(Protocol):
    """Gives native tensors by their names."""

    model: ModelConfig
    vocab_size: int

    def tensor(self, name: str) -> Tensor: ...  # whole, float32, CPU


@torch.no_grad()
def native_outputs(
    source: Source,
    names: set[str],
    samples: Sequence[tuple[Tensor, Tensor]],
    change: Callable[[Tensor], Tensor] = lambda value: value,
) -> list[Output]:
    """The outputs for each sample, ids and token types, of the parts whose parameters are all in `names`.

    `change` is done to each tensor that is read.
    """
    pools = {"encoder.pooler.weight", "encoder.pooler.bias"} <= names
    shape = source.model.model_copy(update={"sentence_head": pools})
    with torch.device("meta"):
        model = PretrainingModel(shape, source.vocab_size, Layers()).eval()

    def fill(module: nn.Module, prefix: str) -> None:
        """Reads the parameters of a module that the source has."""
        for name, parameter in list(module.named_parameters()):
            if prefix + name in names and parameter.is_meta:
                _put(module, name, change(source.tensor(prefix + name)))

    lists = {"encoder.layers": model.encoder.layers}
    if model.generator is not None:
        lists["generator.layers"] = model.generator.layers
    for where, layers in lists.items():
        for number, layer in enumerate(layers):
            _in_turn(layer, f"{where}.{number}.", fill)
    for name, _ in list(model.named_parameters()):
        if name in names and ".layers." not in name:
            _put(model, name, change(source.tensor(name)))
    model.predictions.decoder.weight = model.encoder.embeddings.word_embeddings.weight  # type: ignore[assignment]

    def has(part: str) -> bool:
        found = [name for name, _ in model.named_parameters() if name.startswith(part)]
        return bool(found) and all(name in names for name in found)

    lengths = tuple(len(ids) for ids, _ in samples)
    packed = (
        torch.cat([ids for ids, _ in samples]),
        torch.cat([types for _, types in samples]),
        torch.cat([torch.arange(length) for length in lengths]),
        lengths,
    )
    encoded = has("encoder.layers.")
    hidden, pooled = model.encoder(*packed) if encoded else (None, None)
    pairs = replaced = logits = None
    if model.seq_relationship is not None and pooled is not None and has("seq_relationship."):
        pairs = model.seq_relationship(pooled)
    if model.detector is not None and encoded and has("detector."):
        replaced = model.detector(hidden)
    guessing = hidden
    if model.generator is not None:
        guessing = None
        if has("generator."):
            guessing, _ = model.generator(*packed, model.encoder.embeddings)
    if guessing is not None and has("predictions."):
        logits = model.predictions.logits(guessing)[:, : source.vocab_size]
    states = guessing if hidden is None else hidden

    def split(values: Any) -> list[Any]:
        return [None] * len(lengths) if values is None else list(values.split(lengths))

    def rows(values: Any) -> list[Any]:
        return [None] * len(lengths) if values is None or not pools else list(values)

    return [
        Output(*each)
        for each in zip(split(states), rows(pooled), split(logits), rows(pairs), split(replaced), strict=True)
    ]


def _in_turn(layer: nn.Module, prefix: str, fill: Callable[[nn.Module, str], None]) -> None:
    """Gives a layer its weights when it is run, and takes them away after that."""

    def before(module: nn.Module, _: Any) -> None:
        fill(module, prefix)

    def after(module: nn.Module, *_: Any) -> None:
        for name, parameter in list(module.named_parameters()):
            _put(module, name, parameter.to("meta"))

    layer.register_forward_pre_hook(before)
    layer.register_forward_hook(after)


def _put(module: nn.Module, name: str, value: Tensor) -> None:
    owner, _, last = name.rpartition(".")
    setattr(module.get_submodule(owner), last, nn.Parameter(value, requires_grad=False))
