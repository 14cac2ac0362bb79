"""Predictions of a task model: for a program's texts, and for files of any size.

    model = load_task_model("runs/sst2")
    model(["A fine film.", "Dull."])        # [{"label": "1", "probability": 0.99, ...}, ...]

Samples are packed without padding, those of like length together; a prediction does not depend on what else
is predicted with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor

from bertscale.config import Device
from bertscale.config.examples import EncodingConfig
from bertscale.convert.hf_folder import tokenizer_of
from bertscale.convert.task_models import find_task_model, native_task_model, open_task_model
from bertscale.examples.inputs import examples_of
from bertscale.finetune.loader import by_length, join
from bertscale.finetune.start import check_tokenizer
from bertscale.model.heads import TaskModel
from bertscale.tasks.saved import columns_of, encoding_of, task_of
from bertscale.tasks.task import Example, Floats, Samples, Task
from bertscale.tokenizer import Tokenizer, load_tokenizer
from bertscale.train.device import choose_precision, local_device

Precision = Literal["auto", "bfloat16", "float32"]
Prediction = dict[str, Any]

CHUNK = 4096  # examples whose samples and outputs are in memory at a time
MICRO_TOKENS = 8192  # of a forward pass


class TaskPredictor:
    """A task model that predicts; `load_task_model` makes it.

    `kind` is its task, `labels` are the names of its outputs, `max_length` is its longest sample in tokens.
    """

    def __init__(
        self,
        task: Task[Any],
        model: TaskModel,
        tokenizer: Tokenizer,
        encoding: EncodingConfig,
        columns: dict[str, Any],
    ) -> None:
        self.task, self.model, self.tokenizer, self.encoding = task, model, tokenizer, encoding
        self.columns = columns  # keys of `data`, of files like those that it was fine-tuned on
        self.kind, self.labels, self.max_length = task.kind, task.labels, encoding.max_length
        self.device = next(model.parameters()).device

    @overload
    def __call__(self, inputs: list[Any]) -> list[Prediction]: ...
    @overload
    def __call__(self, inputs: str | tuple[str, str] | dict[str, Any]) -> Prediction: ...
    def __call__(self, inputs: Any) -> Any:
        """Predicts for each input of a list, in order; for one input alone, its prediction alone.

        An input is a text, or for pairs a tuple of two; for tokens also a list of words; for
        question_answering {"question", "context"}; for multiple_choice {"text", "options"}. Raises UserError
        for an input that is none, or blank, and tells which.
        """
        if isinstance(inputs, str | tuple | dict):
            (prediction,) = self.predict(examples_of(self.kind, [inputs]))
            return prediction
        examples = examples_of(self.kind, list(inputs))
        return [
            prediction
            for begin in range(0, len(examples), CHUNK)
            for prediction in self.predict(examples[begin : begin + CHUNK])
        ]

    def predict(self, examples: Sequence[Example]) -> list[Prediction]:
        """Predicts for each example of the task, all at once; one at least."""
        samples = self.task.encode(examples, self.tokenizer, self.encoding)
        return self.task.predict(examples, samples, self.logits(samples))

    @torch.inference_mode()
    def logits(self, samples: Samples) -> Floats:
        """Returns the outputs of the model, in the order of the samples: [N, C], or [T, C] of tokens."""
        outputs: list[tuple[Any, Tensor]] = []
        for rows, batch in by_length(samples, self.kind, MICRO_TOKENS):
            outputs.append((rows, self.model(batch.to(self.device))))
        return join([(rows, values.cpu().numpy()) for rows, values in outputs], samples, self.task)


def load_task_model(
    folder: str | Path, device: Device = "auto", precision: Precision = "float32"
) -> TaskPredictor:
    """Loads a fine-tuned model, onto this machine's GPU or CPU, for predictions.

    `folder` is the output of `bertscale finetune`, the folder `model` in it, or one that transformers has
    saved; `device` auto, cpu or cuda; `precision` float32, bfloat16, or auto: bfloat16 where the device has
    it, which is quicker and moves the third digit of a score. Call the model with a list of texts, see
    `TaskPredictor`.

    Raises UserError where `folder` holds no task model or a damaged one, or the device cannot be used.

        load_task_model("runs/quickstart/finetune")(["Adds two matrices."])   # [{"label": "numpy", ...}]
    """
    weights = open_task_model(find_task_model(Path(folder)))
    tokenizer = load_tokenizer(tokenizer_of(weights.folder))
    check_tokenizer(weights.vocab_size, tokenizer)
    task = task_of(weights.head.kind, weights.labels, weights.facts, weights.origin)
    encoding = encoding_of(weights.facts, weights.max_length, weights.origin)
    columns = columns_of(weights.facts, weights.origin)
    place = local_device(device)
    dtype, _ = choose_precision(precision, place)
    model = native_task_model(weights).to(place, dtype)
    return TaskPredictor(task, model, tokenizer, encoding, columns)
