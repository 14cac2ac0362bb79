"""Fine-tuning by transformers' Trainer, with the samples and the settings of ours; for finetune_quality.py.

Samples are those of `Task.encode`, padded to the longest of a batch; what the model says becomes predictions
and figures by the rules of our task. Losses and schedule are transformers' own. They are ours but for two
things: the softmax over the tokens of a question takes in the padding of its batch, and the learning rate
rises from 0, where the first step of ours has the first part of the rise.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from bertscale.config import FinetuneConfig, UserError
from bertscale.model.heads import OF_TOKENS
from bertscale.tasks.task import NO_TARGET, Example, Floats, Samples, Task, TaskData
from bertscale.tokenizer import load_tokenizer

CLASSES = {
    "classification": "AutoModelForSequenceClassification",
    "regression": "AutoModelForSequenceClassification",
    "tokens": "AutoModelForTokenClassification",
    "question_answering": "AutoModelForQuestionAnswering",
}
PROBLEMS = {"classification": "single_label_classification", "regression": "regression"}
EVAL_BATCH = 64  # samples
Row = dict[str, Any]


def check_comparable(config: FinetuneConfig) -> None:
    """Raises UserError for settings that the Trainer's side does not follow."""
    if config.task not in CLASSES:
        raise UserError(f"task={config.task}: compared are {', '.join(CLASSES)}")
    if config.init is not None:
        raise UserError(f"init={config.init}: both sides start from an encoder; give one as encoder=")
    model, optimizer = config.model, config.optimizer
    expected = {
        "model.freeze_layers": (model.freeze_layers, 0),
        "model.class_weights": (model.class_weights, None),
        "model.label_smoothing": (model.label_smoothing, 0.0),
        "optimizer.name": (optimizer.name, "adamw"),
        "optimizer.schedule": (optimizer.schedule, "linear"),
        "optimizer.final_fraction": (optimizer.final_fraction, 0.0),
        "optimizer.head_learning_rate": (optimizer.head_learning_rate, None),
        "optimizer.layer_decay": (optimizer.layer_decay, 1.0),
    }
    for key, (given, wanted) in expected.items():
        if given != wanted:
            text = "null" if wanted is None else wanted
            raise UserError(f"{key}={given} is not compared with the Trainer; take {key}={text}")


def train(
    config: FinetuneConfig, exported: Path, data: TaskData[Any], seed: int, steps: int
) -> dict[str, float]:
    """Fine-tunes the encoder in the folder `exported`; returns the figures of dev after the last step."""
    task, optimizer = data.task, config.optimizer
    tokenizer = load_tokenizer(exported)
    train_samples = task.encode(data.train, tokenizer, config.samples)
    dev_samples = task.encode(data.dev, tokenizer, config.samples)
    dev_rows = rows_of(dev_samples, task)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    transformers.set_seed(seed)
    settings = settings_of(config, exported, task)
    model = getattr(transformers, CLASSES[task.kind]).from_pretrained(exported, config=settings)
    with tempfile.TemporaryDirectory() as place:
        arguments = transformers.TrainingArguments(
            output_dir=place,
            max_steps=steps,
            per_device_train_batch_size=config.train.global_batch,
            per_device_eval_batch_size=EVAL_BATCH,
            learning_rate=optimizer.learning_rate,
            warmup_steps=round(steps * optimizer.warmup_fraction),
            lr_scheduler_type="linear",
            weight_decay=optimizer.weight_decay,
            adam_beta1=optimizer.beta1,
            adam_beta2=optimizer.beta2,
            adam_epsilon=optimizer.eps,
            max_grad_norm=optimizer.gradient_clipping,
            seed=seed,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            logging_strategy="no",
            remove_unused_columns=False,
            use_cpu=True,
        )
        trainer = transformers.Trainer(
            model,
            arguments,
            data_collator=collator(task, tokenizer.pad_id, takes_types=settings.model_type != "modernbert"),
            train_dataset=rows_of(train_samples, task),
            eval_dataset=dev_rows,
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
        outputs = trainer.predict(dev_rows).predictions
    return figures_of(task, data.dev, dev_samples, without_padding(outputs, dev_samples, task))


def settings_of(config: FinetuneConfig, exported: Path, task: Task[Any]) -> Any:
    """The config of transformers' class, with the dropout and the pooling of ours."""
    settings = transformers.AutoConfig.from_pretrained(exported, num_labels=task.outputs)
    dropout = config.model.hidden_dropout_prob
    of_head = config.model.classifier_dropout
    values: dict[str, Any] = {
        **dict.fromkeys(("hidden_dropout_prob", "embedding_dropout", "mlp_dropout"), dropout),
        "classifier_dropout": dropout if of_head is None else of_head,
        **dict.fromkeys(
            ("attention_probs_dropout_prob", "attention_dropout"), config.model.attention_probs_dropout_prob
        ),
        "classifier_pooling": config.model.pooling or "cls",
    }
    for key, value in values.items():
        if hasattr(settings, key):
            setattr(settings, key, value)
    if task.kind in PROBLEMS:
        settings.problem_type = PROBLEMS[task.kind]
    return settings


def rows_of(samples: Samples, task: Task[Any]) -> list[Row]:
    """The samples as lists, for Trainer."""
    assert samples.targets is not None
    rows = []
    for number in range(len(samples)):
        begin, end = samples.starts[number], samples.starts[number + 1]
        length, second = int(end - begin), int(samples.second[number])
        target = samples.targets[begin:end] if task.kind == "tokens" else samples.targets[number]
        rows.append(
            {
                "ids": samples.tokens[begin:end].tolist(),
                "ones": [1] * length,
                "types": [int(place >= second) for place in range(length)],
                "target": target.tolist(),
            }
        )
    return rows


def collator(
    task: Task[Any], pad: int, *, takes_types: bool
) -> Callable[[Sequence[Row]], dict[str, torch.Tensor]]:
    """Makes what pads the rows of a batch to the longest and names them as transformers does."""

    def collate(rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        longest = max(len(row["ids"]) for row in rows)

        def padded(key: str, fill: int) -> torch.Tensor:
            return torch.tensor([[*row[key], *[fill] * (longest - len(row[key]))] for row in rows])

        batch = {"input_ids": padded("ids", pad), "attention_mask": padded("ones", 0)}
        if takes_types:
            batch["token_type_ids"] = padded("types", 0)
        if task.kind == "tokens":
            return {**batch, "labels": padded("target", NO_TARGET)}
        targets = torch.tensor([row["target"] for row in rows])
        if task.kind == "question_answering":
            return {**batch, "start_positions": targets[:, 0], "end_positions": targets[:, 1]}
        return {**batch, "labels": targets}

    return collate


def without_padding(outputs: Any, samples: Samples, task: Task[Any]) -> Floats:
    """What Trainer predicts, as logits of our tasks: [N, C] of samples, or [T, C] of tokens."""
    if task.kind not in OF_TOKENS:
        return np.asarray(outputs, np.float32).reshape(len(samples), task.outputs)
    padded = np.stack(outputs, axis=-1) if task.kind == "question_answering" else outputs  # [N, longest, C]
    parts = [row[:length] for row, length in zip(padded, samples.lengths, strict=True)]
    return np.concatenate(parts).astype(np.float32)


def figures_of(
    task: Task[Any], examples: Sequence[Example], samples: Samples, logits: Floats
) -> dict[str, float]:
    """The figures of dev as `bertscale finetune` has them: where dev chooses a threshold, with that."""
    figures = task.score(examples, task.predict(examples, samples, logits))
    tuned = task.tuned(figures)
    if tuned is task:
        return figures
    return tuned.score(examples, tuned.predict(examples, samples, logits))
