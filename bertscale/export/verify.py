"""Compares what was written with its source: tensor by tensor, and by the outputs of transformers' class.

Tensors of checkpoints are compared two at a time. Of a folder of transformers the outputs are: of three
sentences in the model's own language, and of two samples of random ids (`reference.samples_of`).

Both sides have the same weights, rounded to the data type of the file, and calculate in float32. So all that
may differ is the order in which they add up: `LARGEST_DIFFERENCE`, times the size of the outputs where these
are more than about 1. What the rounding itself changes is told beside it, and has a limit of its own
(`rounding_limit`).

One of the two models is in memory at a time; of weights in half precision, one layer as float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from bertscale.config import ModelConfig, UserError
from bertscale.config.table import damaged
from bertscale.convert.electra import GENERATOR
from bertscale.convert.folders import FolderSource
from bertscale.convert.hf_names import first_position, masked_class, read_config, takes_token_types
from bertscale.convert.model_shape import native_shapes
from bertscale.convert.native_files import NativeFiles
from bertscale.convert.sources import InitSource
from bertscale.convert.tensor_files import TensorFiles, open_tensors
from bertscale.convert.weights import SourceWeights, Weights
from bertscale.export.native import Output, Source, native_outputs
from bertscale.export.reference import Sample, samples_of, sentences
from bertscale.export.tensors import Rounding
from bertscale.tokenizer import Tokenizer, load_tokenizer

LARGEST_DIFFERENCE = 1e-3  # of outputs in float32, computed in another order
TOO_LARGE = "logits, for which the model would have to be in memory: it has more than 2 GiB"
FEASIBLE = 2 * 2**30  # bytes of a model in float32 of which the logits of a source are compared


class Difference(NamedTuple):
    """Between two models, over all outputs and samples."""

    largest: float  # NaN where an output is
    scale: float  # the largest root mean square of any output

    @property
    def small(self) -> bool:
        """Whether it is one of the order of sums alone; not of NaN."""
        return self.largest < LARGEST_DIFFERENCE * max(1.0, self.scale)


def largest_difference(weights: Weights, folder: Path) -> float:
    """Returns the largest absolute difference of any output, native against what transformers loads."""
    tokenizer = load_tokenizer(weights.tokenizer)
    samples = samples_of(sentences(tokenizer), tokenizer, weights.model, weights.vocab_size)
    ours = native_outputs(weights, set(weights.parameters), samples)
    return compare(ours, their_outputs(folder, samples)).largest


def check_folder(
    source: Source,
    folder: Path,
    names: set[str],
    samples: list[Sample],
    ours: list[Output],
    rounding: Rounding,
) -> list[str]:
    """Compares an export with `ours`, the outputs of the native model with the same rounding; says how it
    went. Raises UserError where they differ, or transformers finds other weights than its class has."""
    found = compare(ours, their_outputs(folder, samples, strict=True))
    if not math.isfinite(found.largest):
        raise UserError(
            "the logits of the source are not finite, so its export cannot be verified; take an earlier "
            "checkpoint"
        )
    if not found.small:
        raise UserError(
            f"the exported model differs from the native one by up to {found.largest:.1e}, more than by the "
            f"order of sums ({LARGEST_DIFFERENCE:g} times {max(1.0, found.scale):.1e}); report this, or give "
            "--no-verify to have it all the same"
        )
    said = [
        f"verified  logits of the native and the exported model differ by at most {found.largest:.1e}",
    ]
    if rounding.dtype != torch.float32:
        exact = native_outputs(source, names, samples)
        moved = _between(exact, ours)
        limit = rounding_limit(source.model, rounding.dtype) * moved.scale
        said.append(
            f"rounding  to {rounding.precision} moves them by at most {moved.largest:.1e}, of values around "
            f"{moved.scale:.1e}"
        )
        if not moved.largest < limit:
            raise UserError(
                f"--dtype {rounding.precision} moves the logits by up to {moved.largest:.1e}, of values "
                f"around {moved.scale:.1e}, and rounding should by less than {limit:.1e}; take float32, or "
                "give --no-verify to have it all the same"
            )
    return said


def rounding_limit(model: ModelConfig, dtype: torch.dtype) -> float:
    """How far rounded weights may move an output, as a share of the outputs' root mean square.

    Each weight is off by at most half an eps, at random, so the output of a matrix is off by about that share
    of itself. A layer has four matrices and adds their outputs to what it was given: over L layers the errors
    add like a random walk, sqrt(4 L + 2) with embeddings and head. The largest of some 1e6 outputs is about 5
    times the typical one; layers that make a few values much larger than the rest are allowed 4 times more.
    """
    steps = 4 * model.num_hidden_layers + 2
    eps: float = torch.finfo(dtype).eps
    return eps / 2 * math.sqrt(steps) * 5 * 4


# ------------------------------------------------------------------------------------ into a checkpoint


class States(Protocol):
    """Gives whole tensors by the names of their parameters."""

    def tensor(self, name: str, state: str = "weight") -> Tensor: ...


def compare_checkpoint(
    weights: States, written: States, states: Mapping[str, Sequence[str]]
) -> Iterator[str]:
    """Compares the `states` of all parameters, bit for bit, and gives the name of each.

    Raises UserError where one differs.
    """
    for name, kept in states.items():
        for state in kept:
            if not _bits(weights.tensor(name, state)).equal(_bits(written.tensor(name, state))):
                raise UserError(f"{state} of {name} is another one in what was written than in the source")
            yield name


def compare_import(weights: SourceWeights, written: Weights) -> list[str]:
    """Compares what transformers' class says with the model of the checkpoint; says how it went.

    Raises UserError where they differ: then the source is another network than its config.json tells.
    """
    if isinstance(weights.source, NativeFiles):
        return []
    if isinstance(weights.source, FolderSource) and weights.source.file:
        return [f"not run   logits: transformers reads no {weights.source.file.name}"]
    if not is_feasible(weights):
        return [f"not run   {TOO_LARGE}"]
    difference = largest_difference(written, weights.folder)
    what = "logits" if _has_logits(_class_in(weights.folder)) else "hidden states"
    if not difference < LARGEST_DIFFERENCE:  # NaN too
        raise UserError(
            f"{weights.folder} is a model that this version does not build: its {what} in transformers "
            f"differ by up to {difference:.1e} from those of the imported weights"
        )
    return [f"verified  {what} of the given and the imported model differ by at most {difference:.1e}"]


def compare_tensor(files: TensorFiles, name: str, value: Tensor) -> None:
    """Raises UserError where a tensor of what was written differs from `value` in any bit."""
    written = files.tensor(name)
    same = written.dtype == value.dtype and _bits(written).equal(_bits(value.contiguous()))
    if not same:
        raise UserError(f"{files.path_of(name)}: {name} is another one than in the source; write it anew")


def is_feasible(weights: Weights | InitSource) -> bool:
    """Whether logits are compared: the model is small enough to be in memory."""
    shapes = native_shapes(weights.model, weights.vocab_size)
    return sum(4 * shape.numel() for shape in shapes.values()) <= FEASIBLE


def _class_in(folder: Path) -> str:
    """The name of the class that config.json tells; some published ones tell none."""
    config = read_config(folder / "config.json")
    (kind, *_) = config.get("architectures") or [masked_class(config)]
    return str(kind)


def _has_logits(kind: str) -> bool:
    """Whether the class is one for pretraining or masked language modelling, whose logits are compared."""
    return kind.endswith(("ForPreTraining", "ForMaskedLM"))


def _bits(value: Tensor) -> Tensor:
    """The values as integers: NaN equals itself, and -0 is another than 0."""
    return value.view(torch.int32 if value.dtype.itemsize == 4 else torch.int16)


# ---------------------------------------------------------------------------------------- their outputs


def their_outputs(folder: Path, samples: list[Sample], *, strict: bool = False) -> list[dict[str, Tensor]]:
    """What transformers' class in `folder` answers, by our names (`Output`), and its generator inside.

    `strict`: the file holds the weights of its class, no more and no less, else UserError is raised.
    """
    outputs = _ask(folder, samples, strict)
    if (folder / GENERATOR / "config.json").is_file():
        guesses = _ask(folder / GENERATOR, samples, strict)
        outputs = [
            {**first, "logits": guess["logits"]} for first, guess in zip(outputs, guesses, strict=True)
        ]
    return outputs


@torch.no_grad()
def _ask(folder: Path, samples: list[Sample], strict: bool) -> list[dict[str, Tensor]]:
    """The answers of one class, whose model is gone afterwards."""
    config = read_config(folder / "config.json")
    model, kind = _load(folder, config, strict)
    outputs = []
    for ids, types in samples:
        inputs = {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None]}
        if takes_token_types(config):
            inputs["token_type_ids"] = types[None]
        if first := first_position(config):  # by itself the class counts no position for a pad token
            inputs["position_ids"] = torch.arange(len(ids))[None] + first
        found = dict(model(**inputs))
        ours = {
            "logits": found.get("prediction_logits", found.get("logits")),
            "pairs": found.get("seq_relationship_logits"),
            "hidden": found.get("last_hidden_state"),
            "pooled": found.get("pooler_output") if strict else None,  # which may be new
        }
        if kind == "ElectraForPreTraining":
            ours["replaced"] = ours.pop("logits")
        outputs.append({name: value[0] for name, value in ours.items() if value is not None})
    return outputs


def _load(folder: Path, config: dict[str, Any], strict: bool) -> tuple[Any, str]:
    import transformers

    _quiet()
    kind = _class_in(folder)
    if not hasattr(transformers, kind):
        raise UserError(
            f"{folder / 'config.json'} names the class {kind!r}, which transformers does not have; save the "
            "model there anew with model.save_pretrained(folder)"
        )
    loader = getattr(transformers, kind) if strict or _has_logits(kind) else transformers.AutoModel
    extra: dict[str, Any] = {}
    stored = torch.float32
    if strict:
        files = open_tensors(folder)
        stored = files.tensor(min(files.names)).dtype
        if kind in ("BertModel", "MegatronBertModel") and "pooler.dense.weight" not in files.names:
            extra["add_pooling_layer"] = False
    try:
        model, report = loader.from_pretrained(folder, dtype=stored, output_loading_info=True, **extra)
    except Exception as error:  # the library raises errors of many classes for what it cannot read
        raise damaged(folder, f"transformers cannot load it: {error}", "save the model anew") from error
    if strict:
        for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if report[what]:
                keys = ", ".join(map(str, sorted(report[what])))
                raise UserError(f"{kind} of transformers finds {what.replace('_', ' ')}: {keys}; report this")
    if stored != torch.float32:
        _float_in_turn(model, config["num_hidden_layers"])
    return model.eval(), kind


def _float_in_turn(model: nn.Module, layers: int) -> None:
    """Makes the weights of each layer float32 while it is run, and all others for good."""
    (stack,) = (each for each in model.modules() if isinstance(each, nn.ModuleList) and len(each) == layers)
    inside = {id(parameter) for parameter in stack.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in inside:
            parameter.data = parameter.data.float()
    for layer in stack:
        stored = [parameter.data for parameter in layer.parameters()]

        def before(module: nn.Module, _: Any) -> None:
            for parameter in module.parameters():
                parameter.data = parameter.data.float()

        def after(module: nn.Module, *_: Any, stored: list[Tensor] = stored) -> None:
            for parameter, value in zip(module.parameters(), stored, strict=True):
                parameter.data = value

        layer.register_forward_pre_hook(before)
        layer.register_forward_hook(after)


def _quiet() -> None:
    """Silences progress bars and lists of unused heads in transformers."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


# ------------------------------------------------------------------------------------------ comparison


def compare(ours: list[Output], theirs: list[dict[str, Tensor]]) -> Difference:
    """The largest difference in what both sides have."""
    pairs = []
    for mine, found in zip(ours, theirs, strict=True):
        for name, value in found.items():
            if (own := getattr(mine, name)) is not None:
                pairs.append((own, value.float()))
    return _largest(pairs)


def _between(ours: list[Output], others: list[Output]) -> Difference:
    return _largest(
        (mine, other)
        for first, second in zip(ours, others, strict=True)
        for mine, other in zip(first, second, strict=True)
        if mine is not None and other is not None
    )


def _largest(pairs: Iterable[tuple[Tensor, Tensor]]) -> Difference:
    """Of outputs side by side, ours first."""
    differences, scales = [], []
    for mine, other in pairs:
        differences.append((mine - other).abs().max())
        scales.append(mine.square().mean().sqrt())
    largest = torch.stack(differences).max()  # NaN where one is
    return Difference(float(largest), float(torch.stack(scales).max()))


def agreement(tokenizer: Tokenizer, folder: Path, texts: list[str]) -> list[str]:
    """A line where the exported tokenizer gives other ids for some of the texts; none where it does not."""
    share = tokenizer.agreement(folder, texts)
    if share == 1:
        return []
    return [f"tokenizer the exported one gives other ids for {1 - share:.0%} of {len(texts)} sentences"]
