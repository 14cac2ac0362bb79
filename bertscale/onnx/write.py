"""Writes a network as an ONNX graph, and compares it in onnxruntime with the native network.

    network = encoder_network(model.encoder, 30_522, "mean")
    write_graph(network, folder)
    compared(network, folder / GRAPH)                                      # the largest difference

The graph is made of the native network in its padded form (`graph`), not of transformers' class: that one
looks at its inputs and its version at each trace. The comparison is with the native network as it is, which
pads nothing. Batch and length are inputs' own; weights beyond what one file can hold lie beside the graph.
"""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from bertscale.config import ModelConfig, UserError
from bertscale.model.heads import OF_TOKENS, TaskBatch, TaskModel
from bertscale.model.model import Encoder, PretrainingModel
from bertscale.onnx.graph import EncoderGraph, MaskedGraph, PaddedEncoder, Pooling, TaskGraph

GRAPH = Path("onnx/model.onnx")  # where transformers.js, optimum and sentence-transformers look
WEIGHTS = "model.onnx_data"  # beside it; the name that transformers.js asks for
OPSET = 18
ONE_FILE = 1_500_000_000  # bytes of weights; protobuf holds no more than 2 GiB
PACKAGES = ("onnx", "onnx_ir", "onnxscript", "onnxruntime")
LARGEST_DIFFERENCE = 1e-3  # of an output in float32, computed in another order
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
CHOICES = 2  # options of an example of multiple choice, where the graph is traced and compared


@dataclass(frozen=True)
class Network:
    """What becomes a graph, and the native outputs that its own are compared with.

    `ask` takes S samples laid end to end and gives each output of the graph: of every token [T, ..], or one
    for each sample [S, ..], as `of_tokens` tells.
    """

    graph: nn.Module
    outputs: tuple[str, ...]
    of_tokens: tuple[bool, ...]
    ask: Callable[[TaskBatch], tuple[Tensor, ...]]
    model: ModelConfig
    vocab_size: int
    chooses: bool = False  # whether inputs have a dimension of options between batch and length


def encoder_network(
    encoder: Encoder, vocab_size: int, pooling: Pooling | None = None, *, normalize: bool = False
) -> Network:
    """The encoder: last_hidden_state and, with `pooling`, sentence_embedding."""

    def ask(batch: TaskBatch) -> tuple[Tensor, ...]:
        hidden, _ = encoder(batch.tokens, batch.token_types, batch.positions, batch.lengths)
        if pooling is None:
            return (hidden,)
        samples = hidden.split(batch.lengths)
        vectors = torch.stack([each[0] if pooling == "first" else each.mean(0) for each in samples])
        return hidden, nn.functional.normalize(vectors, dim=-1) if normalize else vectors

    count = 2 if pooling else 1
    names, of_tokens = ("last_hidden_state", "sentence_embedding"), (True, False)
    graph = EncoderGraph(encoder, pooling, normalize=normalize)
    return Network(graph, names[:count], of_tokens[:count], ask, encoder.config, vocab_size)


def masked_network(model: PretrainingModel) -> Network:
    """The model for masked tokens, of an ELECTRA its generator: logits."""
    encoder, embeddings = model.generator or model.encoder, model.encoder.embeddings

    def ask(batch: TaskBatch) -> tuple[Tensor, ...]:
        sample = batch.tokens, batch.token_types, batch.positions, batch.lengths
        hidden, _ = encoder(*sample, embeddings)
        return (model.predictions.logits(hidden)[:, : model.vocab_size],)

    graph = MaskedGraph(PaddedEncoder(encoder, embeddings), model.predictions, model.vocab_size)
    return Network(graph, ("logits",), (True,), ask, model.config, model.vocab_size)


def task_network(model: TaskModel) -> Network:
    """A task model: logits; of questions start_logits and end_logits."""
    kind = model.head_config.kind
    answers, chooses = kind == "question_answering", kind == "multiple_choice"

    def ask(batch: TaskBatch) -> tuple[Tensor, ...]:
        logits = model(batch)
        if answers:
            return tuple(logits.unbind(-1))
        return (logits.view(-1, CHOICES) if chooses else logits,)

    names = ("start_logits", "end_logits") if answers else ("logits",)
    of_tokens = (kind in OF_TOKENS,) * len(names)
    return Network(TaskGraph(model), names, of_tokens, ask, model.config, model.vocab_size, chooses)


# ------------------------------------------------------------------------------------------- writing


def check_installed() -> None:
    """Raises UserError where a package that an export needs is not there."""
    missing = next((name for name in PACKAGES if importlib.util.find_spec(name) is None), None)
    if missing:
        raise UserError(f"a graph of ONNX needs the package {missing}: pip install 'bertscale[onnx]'")


@torch.no_grad()
def write_graph(network: Network, folder: Path) -> None:
    """Writes the graph into `folder`, which is there. Raises OSError where the disk fails."""
    import onnx_ir
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    graph = network.graph.eval()
    inputs = tuple(torch.from_numpy(each) for each in _padded(network, 2, 7))
    axes = {0: "batch", 1: "choices", 2: "length"} if network.chooses else {0: "batch", 1: "length"}
    dynamic = {axis: torch.export.Dim(name) for axis, name in axes.items()}
    with _quiet():
        program = torch.onnx.export(
            graph,
            inputs,
            dynamo=True,
            opset_version=OPSET,
            input_names=INPUTS[: len(inputs)],
            output_names=network.outputs,
            dynamic_shapes=(dynamic,) * len(inputs),
            verbose=False,
        )
        assert program is not None
        # It would tell every reader where the code lay on the disk.
        ClearMetadataAndDocStringPass()(program.model)
    path = folder / GRAPH
    path.parent.mkdir()
    size = sum(parameter.numel() * parameter.element_size() for parameter in graph.parameters())
    onnx_ir.save(program.model, path, external_data=WEIGHTS if size > ONE_FILE else None)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences what torch says of its own exporter: deprecations inside, packages that it could do with."""
    loggers = [logging.getLogger(name) for name in ("torch", "torch.__trace", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


# ---------------------------------------------------------------------------------------- comparing


@torch.no_grad()
def compared(network: Network, path: Path) -> float:
    """The largest difference of any output of a real token or sample, native against onnxruntime's, at three
    lengths and two sizes of batches, the larger of them padded. Raises UserError where it is too large."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    # Long enough that a local layer does not see the whole sample.
    window = 2 * (network.model.half_window or 0) + 7
    longest = network.model.max_position_embeddings
    differences = []
    for length in sorted({min(length, longest) for length in (7, 33, max(64, window))}):
        for batch in (1, 3):
            inputs = _padded(network, batch, length)
            outputs = session.run(list(network.outputs), dict(zip(INPUTS, inputs, strict=False)))
            differences.append(_difference(network, inputs, outputs))
    largest = float(torch.stack(differences).max())  # NaN where one is
    if not largest <= LARGEST_DIFFERENCE:
        raise UserError(
            f"the graph's outputs differ from those of the native model by up to {largest:.1e}, more than "
            f"{LARGEST_DIFFERENCE:g}; are the weights finite and of usual size? Nothing is written"
        )
    return largest


def _padded(network: Network, batch: int, length: int) -> tuple[np.ndarray, ...]:
    """Random ids of samples of decreasing lengths, their mask and, where they are told apart, token types."""
    draw = np.random.default_rng(length)
    rows = batch * (CHOICES if network.chooses else 1)
    lengths = [max(1, length - row * length // (rows + 1)) for row in range(rows)]
    mask = (np.arange(length) < np.array(lengths)[:, None]).astype(np.int64)  # [rows, L]
    ids = draw.integers(network.vocab_size, size=mask.shape) * mask
    types = (np.arange(length) > length // 2) * mask
    shape = (batch, CHOICES, length) if network.chooses else (batch, length)
    inputs = (ids, mask) if network.model.rotary else (ids, mask, types)
    return tuple(each.reshape(shape) for each in inputs)


def _difference(network: Network, inputs: tuple[np.ndarray, ...], outputs: list[np.ndarray]) -> Tensor:
    rows = [torch.from_numpy(each.reshape(-1, each.shape[-1])) for each in inputs]
    real = rows[1] > 0
    lengths = tuple(real.sum(1).tolist())
    positions = torch.cat([torch.arange(length) for length in lengths])
    types = rows[2][real] if len(rows) > 2 else torch.zeros_like(positions)
    native = network.ask(TaskBatch(rows[0][real], types, positions, lengths))
    differences = []
    for ours, theirs, of_tokens in zip(
        native, map(torch.from_numpy, outputs), network.of_tokens, strict=True
    ):
        given = theirs[real] if of_tokens else theirs
        assert ours.shape == given.shape
        differences.append((ours - given).abs().max())
    return torch.stack(differences).max()
