"""Trains a classifier on an encoder and labelled text: the fine-tuning loop, in one process.

    bertscale finetune configs/finetune/quickstart.yaml

Each seed is one run from the pretrained weights and, with `train.compare_random`, one of the same
architecture from random weights, with the same examples in the same order, to show what pretraining is worth.
The output folder gets
    result.json         mean and spread over the seeds; written last
    predictions.jsonl   the test set with the predictions of the classifier of the first seed
    model/              that classifier, for `load_classifier`
    config.yaml         every setting
A finished output of the same settings, encoder and examples is reused.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from bertscale.config import Device, FinetuneConfig, ModelConfig, OptimizerConfig, UserError, check_config
from bertscale.convert.convert import Weights, open_weights
from bertscale.files import file_digest, whole_folder, write_bytes, write_json
from bertscale.finetune.tasks import (
    Batch,
    Example,
    Label,
    all_batches,
    encode,
    find_classes,
    majority_accuracy,
    read_examples,
    score,
    training_batches,
)
from bertscale.model.model import ClassificationModel, initial_value
from bertscale.optim.groups import adamw
from bertscale.progress import Progress
from bertscale.run_folder import CONFIG, RESULT, TABLE
from bertscale.tokenizer import Tokenizer, find_tokenizer, load_tokenizer
from bertscale.train.checkpoint import save_tensors
from bertscale.train.device import choose_precision, device_line, local_device
from bertscale.train.schedule import learning_rate

LOSS_EVERY = 10  # steps between two readings of the loss, each of which waits for the device


@dataclass(frozen=True)
class Task:
    """Holds what all runs of a fine-tuning share. N: examples; lists and arrays are in their order."""

    config: FinetuneConfig
    weights: Weights
    tokenizer: Tokenizer
    train: list[Example]
    test: list[Example]
    classes: list[Label]
    samples: list[list[int]]  # ids of the training examples
    test_samples: list[list[int]]
    device: torch.device
    dtype: torch.dtype

    @property
    def steps(self) -> int:
        """Counts the training steps of one run."""
        return self.config.train.epochs * math.ceil(len(self.samples) / self.config.train.global_batch)

    @property
    def starts(self) -> list[str]:
        return ["pretrained", "random"] if self.config.train.compare_random else ["pretrained"]

    def targets(self, examples: Sequence[Example]) -> Tensor:
        """Returns class numbers, int64 [N]."""
        return torch.tensor([self.classes.index(example.label) for example in examples])


@dataclass
class Findings:
    """Holds the scores of all runs by start, and of the first seed's pretrained run the weights and the
    probabilities [N, C] of the test examples."""

    scores: dict[str, list[dict[str, float]]]
    classifier: dict[str, Tensor] = field(default_factory=dict)
    probabilities: npt.NDArray[np.float32] = field(default_factory=lambda: np.empty(0, np.float32))


def finetune(config: FinetuneConfig) -> dict[str, Any]:
    """Trains and tests a classifier for each seed; returns what result.json holds.

    Raises UserError for what the user can mend: an encoder, examples and a config that do not fit
    together, a loss that is not finite.
    """
    began = time.monotonic()
    device = local_device(config.device)
    print(device_line(device, config.device), flush=True)
    weights = open_weights(Path(config.encoder))
    tokenizer = load_tokenizer(weights.folder)
    check_fit(config, weights, tokenizer)
    data = config.data
    train, test = (read_examples(path, data.text_field, data.label_field) for path in (data.train, data.test))
    classes = find_classes(train, test)

    output = Path(config.output)
    made_of = fingerprint(config, weights)
    if (finished := finished_result(output, made_of)) is not None:
        print(f"already fine-tuned: {output} holds the result of these settings, encoder and examples")
        print(table(finished))
        return finished

    samples, test_samples = (
        encode(
            [example.text for example in examples],
            tokenizer,
            config.samples.max_length,
            [f"{example.place}: {data.text_field!r}" for example in examples],
        )
        for examples in (train, test)
    )
    make_folder(output)
    dtype, reason = choose_precision("auto", device)
    task = Task(config, weights, tokenizer, train, test, classes, samples, test_samples, device, dtype)
    announce(task, reason)
    findings = train_all(task)
    result = {
        "classes": classes,
        "train_examples": len(train),
        "test_examples": len(test),
        "majority_accuracy": majority_accuracy(train, test),
        **{start: summarize(runs) for start, runs in findings.scores.items()},
        "seconds": round(time.monotonic() - began, 1),
        "made_of": made_of,
    }
    write_output(output, task, findings, result)
    print(table(result))
    return result


def announce(task: Task, reason: str) -> None:
    """Prints two lines on data and runs; `reason` tells why this precision was chosen."""
    runs = len(task.config.train.seeds) * len(task.starts)
    print(
        f"data      {len(task.train):,} training and {len(task.test):,} test examples "
        f"of {len(task.classes)} classes\n"
        f"runs      {runs} of {task.steps:,} steps, {f'{task.dtype}'.removeprefix('torch.')} ({reason})",
        flush=True,
    )


def train_all(task: Task) -> Findings:
    """Trains one run for each seed and start, and tests each after its last step."""
    seeds, findings = task.config.train.seeds, Findings({start: [] for start in task.starts})
    pretrained = encoder_tensors(task.weights)
    targets = task.targets(task.test).numpy()
    with Progress("fine-tune", len(seeds) * len(task.starts) * task.steps, "steps") as progress:
        for seed in seeds:
            for start in task.starts:
                model = make_model(task.config, task.weights, len(task.classes), seed).to(task.device)
                if start == "pretrained":
                    model.load_state_dict(pretrained, strict=False)
                train_one(task, model, start, seed, progress)
                predicted = predict(model, task.test_samples, task.device, task.dtype)
                scored = score(targets, predicted.argmax(axis=1))
                findings.scores[start].append({"seed": seed, **scored})
                accuracy, macro_f1 = scored["accuracy"], scored["macro_f1"]
                progress.say(f"{start}, seed {seed}: accuracy {accuracy:.3f}, macro-F1 {macro_f1:.3f}")
                if start == "pretrained" and not findings.classifier:
                    findings.classifier = {name: value.cpu() for name, value in model.state_dict().items()}
                    findings.probabilities = predicted
    return findings


def train_one(task: Task, model: ClassificationModel, start: str, seed: int, progress: Progress) -> None:
    """Runs the loop: all epochs of one run. Raises UserError for a loss that is not finite."""
    config, steps = task.config, task.steps
    settings = optimizer_settings(config, start)
    optimizer = adamw(model, settings)
    torch.manual_seed(seed)  # dropout
    model.train()
    frozen = config.model.freeze_encoder
    features = freeze(model, task.samples, task.device, task.dtype) if frozen else None
    targets, step = task.targets(task.train), 0
    for epoch in range(config.train.epochs):
        for batch in training_batches(task.samples, config.train.global_batch, seed, epoch):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, step + 1, steps, settings)
            if features is None:
                logits = forward(model, batch, task.device, task.dtype)
            else:
                logits = model.classify(features[batch.rows])
            loss = F.cross_entropy(logits, targets[batch.rows].to(task.device))
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.gradient_clipping)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if step % LOSS_EVERY == 0 or step == steps:
                value = loss.item()  # waits for the device
                check_finite(value, start, seed, step)
                done = LOSS_EVERY if step % LOSS_EVERY == 0 else step % LOSS_EVERY
                progress.advance(done, run=f"{start}, seed {seed}", loss=f"{value:.3f}")


def write_output(output: Path, task: Task, findings: Findings, result: dict[str, Any]) -> None:
    """Writes the files of the output folder; result.json comes last and gets the digests of the others."""
    (output / RESULT).unlink(missing_ok=True)  # it describes files that are now replaced
    facts = {
        "labels": task.classes,
        "model": model_config(task.config, task.weights).model_dump(),
        "pooling": task.config.model.pooling,
        "vocab_size": task.weights.vocab_size,
        "max_length": task.config.samples.max_length,
        "tokenizer_sha256": task.tokenizer.sha256,
    }
    model = output / "model"
    write_model(model, facts, findings.classifier, task.tokenizer)
    rows = [
        {
            "text": example.text,
            "label": example.label,
            "predicted": task.classes[int(probabilities.argmax())],
            "probability": round(float(probabilities.max()), 6),
        }
        for example, probabilities in zip(task.test, findings.probabilities, strict=True)
    ]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_bytes(output / "predictions.jsonl", lines.encode("utf-8", "surrogatepass"))
    settings = yaml.safe_dump(task.config.model_dump(), sort_keys=False)
    write_bytes(output / CONFIG, settings.encode())
    files = ["predictions.jsonl", CONFIG, *sorted(f"model/{path.name}" for path in model.iterdir())]
    result["files"] = {name: file_digest(output / name) for name in files}
    write_json(output / RESULT, result)


# --------------------------------------------------------------------------------------- the parts


def check_fit(config: FinetuneConfig, weights: Weights, tokenizer: Tokenizer) -> None:
    """Refuses examples longer than the encoder's positions, and the tokenizer of another encoder."""
    config.check_length(weights.model.max_position_embeddings)
    if tokenizer.vocab_size != weights.vocab_size:
        raise UserError(
            f"the tokenizer {tokenizer.path} has {tokenizer.vocab_size:,} pieces, the encoder beside it "
            f"{weights.vocab_size:,}; put the tokenizer of this encoder there"
        )


def model_config(config: FinetuneConfig, weights: Weights) -> ModelConfig:
    """Returns the shape of the encoder, with the dropout of fine-tuning."""
    dropout = {"hidden_dropout_prob": config.model.hidden_dropout_prob, "attention_probs_dropout_prob": 0.0}
    return weights.model.model_copy(update=dropout)


def make_model(config: FinetuneConfig, weights: Weights, classes: int, seed: int) -> ClassificationModel:
    """Makes a classifier with the random weights of `seed`."""
    shape = model_config(config, weights)
    model = ClassificationModel(shape, weights.vocab_size, classes, config.model.pooling)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = initial_value(name, list(parameter.shape), shape, weights.vocab_size, seed)
            parameter.copy_(value)
    return model


def encoder_tensors(weights: Weights) -> dict[str, Tensor]:
    """Returns the encoder's pretrained weights, for `load_state_dict`. Raises UserError if one is missing.

    A pooler that the encoder was trained without keeps its initial values.
    """
    with torch.device("meta"):
        encoder = ClassificationModel(weights.model, weights.vocab_size, classes=2).encoder
    tensors = {}
    for name, parameter in encoder.named_parameters(prefix="encoder"):
        if name.startswith("encoder.pooler.") and not weights.model.sentence_head:
            continue
        if name not in weights.parameters:
            raise UserError(f"the encoder {weights.folder} has no parameter {name}; convert it again")
        tensors[name] = weights.tensor(name)
        if tensors[name].shape != parameter.shape:
            raise UserError(
                f"{name} of the encoder {weights.folder} has the shape {list(tensors[name].shape)}, "
                f"its config asks for {list(parameter.shape)}; convert it again"
            )
    return tensors


def optimizer_settings(config: FinetuneConfig, start: str) -> OptimizerConfig:
    """Returns the settings of AdamW for BERT fine-tuning (beta2 0.999), with the learning rate of `start`."""
    settings = config.optimizer
    of_random = settings.random_learning_rate or settings.learning_rate
    return OptimizerConfig(
        learning_rate=of_random if start == "random" else settings.learning_rate,
        warmup_fraction=settings.warmup_fraction,
        weight_decay=settings.weight_decay,
        beta2=0.999,
    )


def forward(model: Callable[..., Tensor], batch: Batch, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Returns what the model, or a method of it, makes of a batch. Matrix products are in `dtype`, although
    weights are float32."""
    batch = batch.to(device)
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        return model(batch.tokens, batch.token_types, batch.positions, batch.lengths)


@torch.no_grad()
def freeze(
    model: ClassificationModel, samples: Sequence[list[int]], device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Fixes the encoder, without dropout; returns its features of all samples [N, H], computed once."""
    model.encoder.requires_grad_(False).eval()
    features = torch.empty(len(samples), model.config.hidden_size, device=device)
    for batch in all_batches(samples, 128):
        features[batch.rows] = forward(model.features, batch, device, dtype).float()
    return features


@torch.no_grad()
def predict(
    model: ClassificationModel, samples: Sequence[list[int]], device: torch.device, dtype: torch.dtype
) -> npt.NDArray[np.float32]:
    """Returns the probability of each class for each sample, [N, C]. Leaves the model in evaluation mode."""
    model.eval()
    probabilities = torch.empty(len(samples), model.classifier.out_features, device=device)
    for batch in all_batches(samples, 128):
        probabilities[batch.rows] = forward(model, batch, device, dtype).softmax(dim=-1)
    array: npt.NDArray[np.float32] = probabilities.cpu().numpy()
    return array


def check_finite(loss: float, start: str, seed: int, step: int) -> None:
    if not np.isfinite(loss):
        key = "optimizer.random_learning_rate" if start == "random" else "optimizer.learning_rate"
        raise UserError(f"the loss is {loss} at step {step} ({start}, seed {seed}); take a lower {key}")


def summarize(runs: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Returns mean and sample standard deviation (None for one run) of each figure over the seeds."""
    summary: dict[str, Any] = {}
    for key in ("accuracy", "macro_f1"):
        values = [run[key] for run in runs]
        summary[key] = statistics.mean(values)
        summary[f"{key}_std"] = statistics.stdev(values) if len(values) > 1 else None
    return {**summary, "per_seed": list(runs)}


def table(result: dict[str, Any]) -> str:
    """Formats the figures for the screen."""

    def cell(figures: dict[str, Any], key: str) -> str:
        spread = figures[f"{key}_std"]
        return f"{figures[key]:.3f}" + ("" if spread is None else f" ± {spread:.3f}")

    lines = [f"{'':<16}{'accuracy':<16}macro-F1"]
    for start, name in (("pretrained", "pretrained"), ("random", "random weights")):
        if start in result:
            figures = result[start]
            lines.append(f"{name:<16}{cell(figures, 'accuracy'):<16}{cell(figures, 'macro_f1')}")
    lines.append(f"{'majority class':<16}{result['majority_accuracy']:.3f}")
    seeds = len(result["pretrained"]["per_seed"])
    spread = f"mean ± standard deviation of {seeds} seeds" if seeds > 1 else "one seed"
    return "\n".join([*lines, f"({spread}; {result['test_examples']:,} test examples)"])


# ------------------------------------------------------------------------------------------- the files


def make_folder(output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise UserError(f"cannot make the folder {output}: {error.strerror}") from error


def fingerprint(config: FinetuneConfig, weights: Weights) -> dict[str, str]:
    """Returns digests of all that a result depends on: settings, encoder and examples."""
    elsewhere: dict[str, Any] = {"encoder": True, "output": True, "device": True, "data": {"train", "test"}}
    settings = config.model_dump(exclude=elsewhere)
    table_file = weights.folder / TABLE  # it holds the digests of a checkpoint's shards
    files = [table_file] if table_file.exists() else sorted(weights.folder.glob("*.safetensors"))
    others = [weights.folder / "config.json", find_tokenizer(weights.folder)]
    digests = [file_digest(file) for file in (*files, *others) if file.exists()]
    return {
        "settings": hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32],
        "encoder": hashlib.sha256(" ".join(digests).encode()).hexdigest()[:32],
        "train": file_digest(config.data.train),
        "test": file_digest(config.data.test),
    }


def finished_result(output: Path, made_of: dict[str, str]) -> dict[str, Any] | None:
    """Returns the result of an output with the same digests whose files are all as they were written."""
    try:
        result: dict[str, Any] = json.loads((output / RESULT).read_text(encoding="utf-8"))
        whole = all(file_digest(output / name) == digest for name, digest in result["files"].items())
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return result if whole and result["made_of"] == made_of else None


def write_model(
    folder: Path, facts: dict[str, Any], tensors: dict[str, Tensor], tokenizer: Tokenizer
) -> None:
    """Writes model.safetensors, config.json and the tokenizer; `folder` is complete or absent."""
    with whole_folder(folder) as partial:
        save_tensors(partial / "model.safetensors", tensors)
        write_json(partial / "config.json", facts)
        tokenizer.save(partial)


class Classifier:
    """Runs a fine-tuned model on this machine's device.

    classifier = load_classifier("runs/quickstart/finetune/model")
    classifier(["Adds two matrices."])        # [("numpy", 0.91)]
    """

    def __init__(
        self,
        model: ClassificationModel,
        tokenizer: Tokenizer,
        facts: dict[str, Any],
        device: Device = "auto",
    ) -> None:
        self.device = local_device(device)
        self.dtype, _ = choose_precision("auto", self.device)
        self.model = model.to(self.device)
        self.tokenizer = tokenizer
        self.labels: list[Label] = facts["labels"]
        self.max_length: int = facts["max_length"]  # tokens

    def __call__(self, texts: str | Sequence[str]) -> list[tuple[Label, float]]:
        """Returns the most probable label of each text and its probability; a text alone is a list of one.

        No texts give no answers. Raises UserError for a text that is blank, or that leaves no token.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        places = [f"text {number} of {len(texts)}" for number in range(1, len(texts) + 1)]
        samples = encode(texts, self.tokenizer, self.max_length, places)
        predicted = predict(self.model, samples, self.device, self.dtype)  # [N, C]
        return [(self.labels[int(row.argmax())], float(row.max())) for row in predicted]


def load_classifier(folder: str | Path, device: Device = "auto") -> Classifier:
    """Loads a classifier that `bertscale finetune` wrote, onto this machine's GPU or CPU.

    `folder` is the folder `model` of its output, `device` auto, cpu or cuda, as in a config. Called with S
    texts, of any length, the classifier returns S pairs (label, probability); one text alone is as a list of
    it. A text that is blank raises UserError.

    Raises UserError where `folder` holds no classifier, or another tokenizer than the classifier's, or the
    device cannot be used.

        load_classifier("runs/quickstart/finetune/model")(["Adds two matrices."])    # [("numpy", 0.91)]
    """
    folder = Path(folder)
    try:
        facts = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} holds no classifier: {error}") from error
    tokenizer = load_tokenizer(folder)
    if tokenizer.sha256 != facts["tokenizer_sha256"]:
        raise UserError(f"{tokenizer.path} is not the tokenizer that the classifier was trained with")
    shape = check_config(ModelConfig, facts["model"], str(folder / "config.json"))
    model = ClassificationModel(shape, facts["vocab_size"], len(facts["labels"]), facts["pooling"])
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return Classifier(model, tokenizer, facts, device)
