"""An encoder and labelled text -> a classifier: the fine-tuning loop, one process.

    bertscale finetune configs/finetune/quickstart.yaml

Each seed is one run from the pretrained weights and, with `compare_random`, one of the same architecture
from random weights with the same examples in the same order: what pretraining is worth, side by side.
The output folder gets
    result.json         mean and spread over the seeds; written last
    predictions.jsonl   the test set as the classifier of the first seed sees it
    model/              that classifier, for `load_classifier`
    config.yaml         every setting
A finished output of the same settings, encoder and examples is used again.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from bertscale.checkpoint import save_tensors
from bertscale.config import FinetuneConfig, ModelConfig, OptimizerConfig, UserError, check_config
from bertscale.convert import Weights, open_weights
from bertscale.device import choose_precision, describe, local_device
from bertscale.files import file_digest, fresh_folder, put_in_place, write_bytes, write_json
from bertscale.model import ClassificationModel, initial_value
from bertscale.optim import adamw
from bertscale.progress import Progress
from bertscale.run_folder import CONFIG, RESULT, TABLE
from bertscale.schedule import learning_rate
from bertscale.tasks import (
    Batch,
    Label,
    all_batches,
    encode,
    find_classes,
    majority_accuracy,
    number_of_batches,
    read_examples,
    score,
    training_batches,
)
from bertscale.tokenizer import Tokenizer, find_tokenizer, load_tokenizer

EVERY = 10  # steps between two looks at the loss, each of which waits for the device


def finetune(config: FinetuneConfig) -> dict[str, Any]:
    """Trains and tests a classifier for each seed; returns what result.json holds.

    Raises UserError for what the person can mend: encoder, examples and config that do not fit
    together, a loss that is not finite.
    """
    began = time.monotonic()
    weights = open_weights(Path(config.encoder))
    tokenizer = load_tokenizer(find_tokenizer(weights.folder))
    check_fit(config, weights, tokenizer)
    train = read_examples(config.train, config.text_field, config.label_field)
    test = read_examples(config.test, config.text_field, config.label_field)
    classes = find_classes(train, test)

    output = Path(config.output)
    made_of = fingerprint(config, weights)
    if (finished := finished_result(output, made_of)) is not None:
        print(f"already fine-tuned: {output} holds the result of these settings, encoder and examples")
        print(table(finished))
        return finished
    make_folder(output)

    device = local_device()
    dtype, reason = choose_precision("auto", device)
    samples = encode([example.text for example in train], tokenizer, config.max_length)
    test_samples = encode([example.text for example in test], tokenizer, config.max_length)
    targets = torch.tensor([classes.index(example.label) for example in train])
    test_targets = np.array([classes.index(example.label) for example in test])
    pretrained = encoder_tensors(weights)
    starts = ["pretrained", "random"] if config.compare_random else ["pretrained"]
    steps = config.epochs * number_of_batches(len(samples), config.batch)
    runs = len(config.seeds) * len(starts)
    print(f"data      {len(train):,} training and {len(test):,} test examples of {len(classes)} classes")
    print(
        f"runs      {runs} of {steps:,} steps, {f'{dtype}'.removeprefix('torch.')} ({reason}), "
        f"on {describe(device)}",
        flush=True,
    )

    scores: dict[str, list[dict[str, float]]] = {start: [] for start in starts}
    classifier: dict[str, Tensor] = {}  # of the first seed, and its probabilities on the test set
    probabilities: npt.NDArray[np.float32] = np.empty(0, np.float32)
    with Progress("fine-tune", runs * steps, "steps") as progress:
        for seed in config.seeds:
            for start in starts:
                model = make_model(config, weights, len(classes), seed).to(device)
                if start == "pretrained":
                    model.load_state_dict(pretrained, strict=False)
                optimizer_config = optimizer_settings(config, start)
                optimizer = adamw(model, optimizer_config)
                torch.manual_seed(seed)  # dropout
                model.train()
                fixed = freeze(model, samples, device, dtype) if config.freeze_encoder else None
                step = 0
                for epoch in range(config.epochs):
                    for batch in training_batches(samples, config.batch, seed, epoch):
                        for group in optimizer.param_groups:
                            group["lr"] = learning_rate(step, step + 1, steps, optimizer_config)
                        if fixed is None:
                            logits = forward(model, batch, device, dtype)
                        else:
                            logits = model.classify(fixed[batch.rows])
                        loss = F.cross_entropy(logits, targets[batch.rows].to(device))
                        loss.backward()  # type: ignore[no-untyped-call]
                        torch.nn.utils.clip_grad_norm_(model.parameters(), optimizer_config.gradient_clipping)
                        optimizer.step()
                        optimizer.zero_grad()
                        step += 1
                        if step % EVERY == 0 or step == steps:
                            value = loss.item()  # waits for the device
                            check_finite(value, start, seed, step)
                            done = EVERY if step % EVERY == 0 else step % EVERY
                            progress.advance(done, run=f"{start}, seed {seed}", loss=f"{value:.3f}")

                predicted = predict(model, test_samples, device, dtype)
                scores[start].append({"seed": seed, **score(test_targets, predicted.argmax(axis=1))})
                accuracy, macro_f1 = (scores[start][-1][key] for key in ("accuracy", "macro_f1"))
                progress.say(f"{start}, seed {seed}: accuracy {accuracy:.3f}, macro-F1 {macro_f1:.3f}")
                if start == "pretrained" and not classifier:
                    classifier = {n: value.cpu() for n, value in model.state_dict().items()}
                    probabilities = predicted

    result = {
        "classes": classes,
        "train_examples": len(train),
        "test_examples": len(test),
        "majority_accuracy": majority_accuracy(train, test),
        **{start: summarize(scores[start]) for start in starts},
        "seconds": round(time.monotonic() - began, 1),
        "made_of": made_of,
    }
    (output / RESULT).unlink(missing_ok=True)  # it would speak of files that are now replaced
    facts = {
        "labels": classes,
        "model": model_config(config, weights).model_dump(),
        "pooling": config.pooling,
        "vocab_size": weights.vocab_size,
        "max_length": config.max_length,
        "tokenizer_sha256": tokenizer.sha256,
    }
    write_model(output / "model", facts, classifier, tokenizer)
    rows = [
        {
            "text": example.text,
            "label": example.label,
            "predicted": classes[int(chances.argmax())],
            "probability": round(float(chances.max()), 6),
        }
        for example, chances in zip(test, probabilities, strict=True)
    ]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_bytes(output / "predictions.jsonl", lines.encode("utf-8", "surrogatepass"))
    settings = yaml.safe_dump(config.model_dump(), sort_keys=False)
    write_bytes(output / CONFIG, settings.encode())
    result["files"] = {name: file_digest(output / name) for name in written_files(output)}
    write_json(output / RESULT, result)
    print(table(result))
    return result


# --------------------------------------------------------------------------------------- the pieces


def check_fit(config: FinetuneConfig, weights: Weights, tokenizer: Tokenizer) -> None:
    """Refuses examples longer than the encoder's positions, and another encoder's tokenizer."""
    longest = weights.model.max_position_embeddings
    if config.max_length > longest:
        raise UserError(
            f"max_length={config.max_length} is longer than the encoder {config.encoder} takes: "
            f"{longest} tokens (its max_position_embeddings)"
        )
    if tokenizer.vocab_size != weights.vocab_size:
        raise UserError(
            f"the tokenizer {tokenizer.path} has {tokenizer.vocab_size:,} pieces, the encoder beside it "
            f"{weights.vocab_size:,}: they do not belong together"
        )


def model_config(config: FinetuneConfig, weights: Weights) -> ModelConfig:
    """The encoder's own shape, with the dropout of fine-tuning."""
    dropout = {"hidden_dropout_prob": config.dropout, "attention_probs_dropout_prob": 0.0}
    return weights.model.model_copy(update=dropout)


def make_model(config: FinetuneConfig, weights: Weights, classes: int, seed: int) -> ClassificationModel:
    """A classifier with the random weights of `seed`."""
    shape = model_config(config, weights)
    model = ClassificationModel(shape, weights.vocab_size, classes, config.pooling)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = initial_value(name, list(parameter.shape), shape, weights.vocab_size, seed)
            parameter.copy_(value)
    return model


def encoder_tensors(weights: Weights) -> dict[str, Tensor]:
    """The encoder's part of the pretrained weights, for `load_state_dict`. Raises UserError if one lacks.

    A pooler that the encoder was trained without stays at its first values.
    """
    with torch.device("meta"):
        wanted = ClassificationModel(weights.model, weights.vocab_size, classes=2).encoder
    tensors = {}
    for name, parameter in wanted.named_parameters(prefix="encoder"):
        if name.startswith("encoder.pooler.") and not weights.model.sentence_head:
            continue
        if name not in weights.parameters:
            raise UserError(f"the encoder {weights.folder} has no parameter {name}")
        tensors[name] = weights.tensor(name)
        if tensors[name].shape != parameter.shape:
            raise UserError(
                f"{name} of the encoder {weights.folder} has the shape {list(tensors[name].shape)}, "
                f"its config asks for {list(parameter.shape)}"
            )
    return tensors


def optimizer_settings(config: FinetuneConfig, start: str) -> OptimizerConfig:
    """AdamW as BERT was fine-tuned (beta2 0.999), with the learning rate of `start`."""
    highest = config.learning_rate
    if start == "random" and config.random_learning_rate is not None:
        highest = config.random_learning_rate
    return OptimizerConfig(
        learning_rate=highest,
        warmup_fraction=config.warmup_fraction,
        weight_decay=config.weight_decay,
        beta2=0.999,
    )


def forward(model: ClassificationModel, batch: Batch, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Logits, float32 [S, C]. Weights stay float32; matrix products are in `dtype`."""
    batch = batch.to(device)
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        logits: Tensor = model(batch.tokens, batch.token_types, batch.positions, batch.lengths)
    return logits


@torch.no_grad()
def freeze(
    model: ClassificationModel, samples: Sequence[list[int]], device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Fixes the encoder, without dropout; returns its features of all samples [N, H], computed once."""
    model.encoder.requires_grad_(False).eval()
    features = torch.empty(len(samples), model.config.hidden_size, device=device)
    for batch in all_batches(samples, 128):
        there = batch.to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            values = model.features(there.tokens, there.token_types, there.positions, there.lengths)
        features[batch.rows] = values.float()
    return features


@torch.no_grad()
def predict(
    model: ClassificationModel, samples: Sequence[list[int]], device: torch.device, dtype: torch.dtype
) -> npt.NDArray[np.float32]:
    """Probability of each class for each sample, [N, C]. Leaves the model in evaluation mode."""
    model.eval()
    probabilities = torch.empty(len(samples), model.classifier.out_features, device=device)
    for batch in all_batches(samples, 128):
        probabilities[batch.rows] = forward(model, batch, device, dtype).softmax(dim=-1)
    array: npt.NDArray[np.float32] = probabilities.cpu().numpy()
    return array


def check_finite(loss: float, start: str, seed: int, step: int) -> None:
    if not np.isfinite(loss):
        key = "random_learning_rate" if start == "random" else "learning_rate"
        raise UserError(f"the loss is {loss} at step {step} ({start}, seed {seed}); take a lower {key}")


def summarize(runs: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Mean and sample standard deviation (None of one run) of each figure over the seeds."""
    summary: dict[str, Any] = {}
    for key in ("accuracy", "macro_f1"):
        values = [run[key] for run in runs]
        summary[key] = statistics.mean(values)
        summary[f"{key}_std"] = statistics.stdev(values) if len(values) > 1 else None
    return {**summary, "per_seed": list(runs)}


def table(result: dict[str, Any]) -> str:
    """The figures for the screen."""

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
    """What a result follows from: settings, encoder and examples, as digests."""
    settings = config.model_dump(exclude={"encoder", "train", "test", "output"})
    table_file = weights.folder / TABLE  # it holds the digests of a checkpoint's shards
    files = [table_file] if table_file.exists() else sorted(weights.folder.glob("*.safetensors"))
    others = [weights.folder / "config.json", find_tokenizer(weights.folder)]
    digests = [file_digest(file) for file in (*files, *others) if file.exists()]
    return {
        "settings": hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32],
        "encoder": hashlib.sha256(" ".join(digests).encode()).hexdigest()[:32],
        "train": file_digest(config.train),
        "test": file_digest(config.test),
    }


def finished_result(output: Path, made_of: dict[str, str]) -> dict[str, Any] | None:
    """The result of an output made of the same things whose files are all as they were written."""
    try:
        result: dict[str, Any] = json.loads((output / RESULT).read_text(encoding="utf-8"))
        whole = all(file_digest(output / name) == digest for name, digest in result["files"].items())
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return result if whole and result["made_of"] == made_of else None


def written_files(output: Path) -> list[str]:
    model = sorted(f"model/{path.name}" for path in (output / "model").iterdir())
    return ["predictions.jsonl", CONFIG, *model]


def write_model(
    folder: Path, facts: dict[str, Any], tensors: dict[str, Tensor], tokenizer: Tokenizer
) -> None:
    """Writes model.safetensors, config.json and the tokenizer: `folder` is whole or not there."""
    partial = fresh_folder(folder)
    save_tensors(partial / "model.safetensors", tensors)
    write_json(partial / "config.json", facts)
    tokenizer.save(partial)
    put_in_place(partial, folder)


class Classifier:
    """A fine-tuned model, on this machine's device.

    classifier = load_classifier("runs/quickstart/finetune/model")
    classifier(["Adds two matrices."])        # [("numpy", 0.91)]
    """

    def __init__(self, model: ClassificationModel, tokenizer: Tokenizer, facts: dict[str, Any]) -> None:
        self.device = local_device()
        self.dtype, _ = choose_precision("auto", self.device)
        self.model = model.to(self.device)
        self.tokenizer = tokenizer
        self.labels: list[Label] = facts["labels"]
        self.max_length: int = facts["max_length"]  # tokens

    def __call__(self, texts: Sequence[str]) -> list[tuple[Label, float]]:
        """The most probable label of each text and its probability."""
        samples = encode(texts, self.tokenizer, self.max_length)
        probabilities = predict(self.model, samples, self.device, self.dtype)
        return [(self.labels[int(chances.argmax())], float(chances.max())) for chances in probabilities]


def load_classifier(folder: str | Path) -> Classifier:
    """The classifier that `finetune` wrote into `folder`. Raises UserError where there is none."""
    folder = Path(folder)
    try:
        facts = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} holds no classifier: {error}") from error
    tokenizer = load_tokenizer(find_tokenizer(folder))
    if tokenizer.sha256 != facts["tokenizer_sha256"]:
        raise UserError(f"{tokenizer.path} is not the tokenizer that the classifier learnt with")
    shape = check_config(ModelConfig, facts["model"], str(folder / "config.json"))
    model = ClassificationModel(shape, facts["vocab_size"], len(facts["labels"]), facts["pooling"])
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return Classifier(model, tokenizer, facts)
