"""Averages the weights of several checkpoints, runs or Hugging Face folders of one shape into a checkpoint.

    bertscale average runs/a runs/b runs/c --output runs/mean
    bertscale average runs/a runs/b --method ties --base runs/start --output runs/merged

Two methods: the weighted mean (Wortsman et al., 2022, "Model soups"), and TIES (Yadav et al., 2023), which
adds to a base what is left of the sources' differences to it when small and contradicting ones are gone.
One tensor of one source is in memory at a time. Sums are in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from bertscale.config import UserError
from bertscale.convert.hf_folder import tokenizer_of
from bertscale.convert.model_shape import native_shapes
from bertscale.convert.weights import Weights, open_weights
from bertscale.export.output import check_output
from bertscale.files import whole_folder
from bertscale.progress import Progress
from bertscale.tokenizer import load_tokenizer
from bertscale.train.checkpoint import Checkpoint, write_whole

Method = Literal["mean", "ties"]
# Keys of the model that no output depends on: they may differ.
FREE = {
    *("hidden_dropout_prob", "attention_probs_dropout_prob"),
    *("initializer_range", "matrix_initializer_range", "initializer_cutoff_factor"),
}
HALF = 16  # bits of a float32 that one pass of `threshold` counts by


@dataclass(frozen=True)
class Options:
    """How sources are averaged; the last three are for `ties` alone. Raises UserError where they are wrong.

    `weights`: one for each source, in any unit; equal ones if empty. `density`: the share of the values of
    a source's difference to `base` that is kept, the largest ones; `scale`: what the merged one is times.
    """

    weights: Sequence[float] = ()
    method: Method = "mean"
    base: Path | None = None
    density: float | None = None
    scale: float | None = None

    def check(self, sources: int) -> None:
        """Raises UserError where the options are no ones for that number of sources."""
        if sources < 2:
            raise UserError("one folder has no average; give two or more")
        if self.weights and len(self.weights) != sources:
            raise UserError(f"--weights are {len(self.weights)}, the folders {sources}; give one for each")
        if not all(0 <= weight < math.inf for weight in self.weights):
            raise UserError(f"--weights {_shown(self.weights)}: each must be a number of 0 or more")
        if self.weights and not 0 < sum(self.weights) < math.inf:
            raise UserError(f"--weights {_shown(self.weights)}: their sum is {sum(self.weights):g}")
        given = {"--base": self.base, "--density": self.density, "--scale": self.scale}
        if self.method == "mean" and (names := [name for name, value in given.items() if value is not None]):
            raise UserError(f"{' and '.join(names)} go with --method ties, not with mean")
        if self.method == "ties" and self.base is None:
            raise UserError("--method ties needs --base FOLDER, what the folders were trained from")
        if self.density is not None and not 0 < self.density <= 1:
            raise UserError(f"--density must be more than 0 and at most 1, not {self.density:g}")
        if self.scale is not None and not 0 < self.scale < math.inf:
            raise UserError(f"--scale must be more than 0, not {self.scale:g}")


def average(sources: Sequence[Path], output: Path, options: Options) -> None:
    """Writes the average of `sources` as the checkpoint `output`, whole or not at all.

    Raises UserError where a source is damaged or of another shape or vocabulary, or `output` is there.
    """
    options.check(len(sources))
    if output.exists():
        raise UserError(f"{output} is there already; choose another output, or remove it")
    check_output(output, sources[0], replace=False)
    weights = [float(weight) for weight in options.weights] or [1.0] * len(sources)
    opened: list[Weights] = [open_weights(path) for path in sources]
    base = open_weights(options.base) if options.base is not None else None
    read = [*opened, *([base] if base else [])]
    for other in read[1:]:
        _check_same(read[0], other)
    digests = []
    with Progress("digests", len(read), "folders") as progress:
        for each in read:
            digests.append(each.digest())
            progress.advance(1)
    roles: list[dict[str, Any]] = [
        *({"averaged": weight} for weight in weights),
        *([{"base": True}] if base else []),
    ]
    lineage = [_ancestor(each, digest, role) for each, digest, role in zip(read, digests, roles, strict=True)]
    first, shapes = read[0], native_shapes(read[0].model, read[0].vocab_size)
    tokenizer = tokenizer_of(first.folder)
    table: dict[str, Any] = {
        "model": first.model.model_dump(),
        "vocab_size": first.vocab_size,
        "tokenizer_sha256": load_tokenizer(tokenizer).sha256,
        "data_digest": None,
        "config": None,
        "lineage": lineage,
        "average": {"method": options.method},
        "causal": any(isinstance(each, Checkpoint) and each.causal for each in read),
    }
    passes = 1
    if base is not None:
        density, scale = options.density or 0.2, options.scale or 1.0
        table["average"] |= {"density": density, "scale": scale}
        passes += 2 * len(opened)
    try:
        with (
            whole_folder(output) as folder,
            Progress("average", passes * len(shapes), "tensors") as progress,
        ):
            if base is None:
                merge = _mean(opened, weights)
            else:
                merge = _ties(opened, weights, base, density, scale, list(shapes), progress)

            def tensors() -> Iterator[tuple[str, Tensor]]:
                for name in shapes:
                    yield name, merge(name)
                    progress.advance(1)

            write_whole(folder, table, tensors(), tokenizer, shapes)
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror or error}") from error
    print(
        f"averaged  {options.method} -> {output}: a checkpoint without optimizer state",
        *_lines(lineage),
        sep="\n",
    )


def _check_same(first: Weights, other: Weights) -> None:
    """Raises UserError where the two are not of one network, vocabulary and tokenizer."""
    ours, theirs = first.model.model_dump(), other.model.model_dump()
    for key in ours:
        if key not in FREE and ours[key] != theirs[key]:
            raise UserError(
                f"{first.folder} has model.{key}={ours[key]}, {other.folder} has {theirs[key]}: only weights "
                "of one shape have an average"
            )
    if first.vocab_size != other.vocab_size:
        raise UserError(
            f"{first.folder} has a vocabulary of {first.vocab_size:,}, {other.folder} one of "
            f"{other.vocab_size:,}: only weights of one vocabulary have an average"
        )
    if _tokenizer(first) != _tokenizer(other):
        raise UserError(
            f"{first.folder} and {other.folder} have different tokenizers: only weights of one vocabulary "
            "have an average"
        )
    missing: list[set[str]] = [set(getattr(each, "missing", ())) for each in (first, other)]
    if alone := sorted(missing[0] ^ missing[1]):
        lacks, has = (first, other) if alone[0] in missing[0] else (other, first)
        raise UserError(f"{lacks.folder} lacks {alone[0]}, which {has.folder} has: it has no average")


def _tokenizer(weights: Weights) -> str:
    return load_tokenizer(tokenizer_of(weights.folder)).sha256


def _ancestor(weights: Weights, digest: str, role: dict[str, Any]) -> dict[str, Any]:
    """The entry of a source in `lineage`, with its own lineage in it."""
    checkpoint = weights if isinstance(weights, Checkpoint) else None
    return {
        "folder": str(weights.folder),
        "step": checkpoint.step if checkpoint else None,
        "digest": digest,
        **role,
        "lineage": checkpoint.lineage if checkpoint else [],
    }


def _lines(lineage: list[dict[str, Any]]) -> list[str]:
    total = sum(each.get("averaged", 0.0) for each in lineage)
    return [
        f"{'base' if 'base' in each else format(each['averaged'] / total, '.4f'):<10}"
        f"{each['folder']} ({each['digest'][:12]})"
        for each in lineage
    ]


def _shown(weights: Sequence[float]) -> str:
    return " ".join(f"{weight:g}" for weight in weights)


# ----------------------------------------------------------------------------------------- the methods


def _finite(weights: Weights, name: str) -> Tensor:
    """The tensor `name`; raises UserError where it has values that are not finite."""
    value = weights.tensor(name)
    if not bool(value.isfinite().all()):
        raise UserError(f"{weights.folder}: {name} has values that are not finite; use another checkpoint")
    return value


def _mean(sources: list[Weights], weights: list[float]) -> Callable[[str], Tensor]:
    """The weighted mean, by the name of a tensor."""

    def mean(name: str) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for source, weight in zip(sources, weights, strict=True):
            total = total + weight * _finite(source, name).double()
        return (total / sum(weights)).float()

    return mean


def _ties(
    sources: list[Weights],
    weights: list[float],
    base: Weights,
    density: float,
    scale: float,
    names: list[str],
    progress: Progress,
) -> Callable[[str], Tensor]:
    """TIES, by the name of a tensor: trim the differences to the base, elect a sign for each value, and add
    the mean of the differences of that sign.

    What is trimmed is a share of all values of a source together, so each is read twice before (`threshold`).
    """

    def difference(source: Weights, name: str) -> Tensor:
        return _finite(source, name) - _finite(base, name)

    def differences(source: Weights) -> Iterator[Tensor]:
        for name in names:
            yield difference(source, name)
            progress.advance(1)

    size = sum(shape.numel() for shape in native_shapes(base.model, base.vocab_size).values())
    keep = max(1, round(density * size))
    thresholds = [threshold(partial(differences, source), keep) for source in sources]

    def merged(name: str) -> Tensor:
        start = _finite(base, name).double()
        signs = (1, -1)
        sums = {sign: torch.zeros_like(start) for sign in signs}
        votes = {sign: torch.zeros_like(start) for sign in signs}
        for source, weight, least in zip(sources, weights, thresholds, strict=True):
            value = difference(source, name).double()
            for sign in signs:
                kept = (value * sign > 0) & (value.abs() >= least)
                sums[sign] += weight * value * kept
                votes[sign] += weight * kept
        elected = (sums[1] + sums[-1]).sign()  # 0 where there are none, or they cancel: the base's value
        for sign in signs:
            mean = torch.where(votes[sign] > 0, sums[sign] / votes[sign], 0.0)
            start += scale * mean * (elected == sign)
        return start.float()

    return merged


def threshold(tensors: Callable[[], Iterator[Tensor]], keep: int) -> float:
    """The `keep`-th largest magnitude of all values of float32 `tensors`, which are gone through twice.

    Magnitudes are in the order of their bits: the first pass counts the upper half of these, the second one
    the lower half of those whose upper half is that of the value sought.
    """
    found, left = 0, keep
    for shift in (HALF, 0):
        counts = torch.zeros(2**HALF, dtype=torch.int64)
        for value in tensors():
            bits = value.abs().flatten().view(torch.int32)
            if shift == 0:
                bits = bits[bits >> HALF == found]
            counts += torch.bincount(bits >> shift & 2**HALF - 1, minlength=2**HALF)
        from_top = counts.flip(0).cumsum(0)
        place = int((from_top < left).sum())
        left -= int(from_top[place - 1]) if place else 0
        found = found << HALF | 2**HALF - 1 - place
    return float(torch.tensor(found, dtype=torch.int32).view(torch.float32))
