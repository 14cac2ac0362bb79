"""What fine-tuned models score on dev: ours, from pretrained and random weights, and transformers' Trainer's.

    python benchmarks/finetune_quality.py configs/finetune/trec.yaml configs/finetune/rte.yaml --steps 150 \
        encoder=runs/english/pretrain

Each config is fine-tuned by `bertscale finetune` and by transformers' Trainer (`pip install accelerate`),
which starts from the encoder as `bertscale convert` exports it, with the same examples, samples, batches a
step, steps, optimizer, schedule, dropout and float32, for each of the seeds; the order of examples and the
first weights of the head are each side's own. The figure is that of the last step. Words of the form
`key=value` change all configs. For tasks of one text or a pair: classification and regression.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from bertscale.bench.machine import processor
from bertscale.config import FinetuneConfig, UserError, load_config
from bertscale.examples.read import read_task_data
from bertscale.files import write_json
from bertscale.tasks.task import Samples, TaskData
from bertscale.tokenizer import load_tokenizer


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("configs", nargs="+", help="Fine-tuning configs, and key=value for all of them.")
    parser.add_argument("--steps", type=int, default=150, help="Training steps of each run (%(default)s).")
    parser.add_argument("--seeds", type=int, default=3, help="Runs of each side (%(default)s).")
    parser.add_argument("--json", type=Path, help="File for the results.")
    options = parser.parse_intermixed_args()
    if not importlib.util.find_spec("accelerate"):
        raise SystemExit("error: transformers' Trainer needs accelerate: pip install accelerate")
    overrides = [word for word in options.configs if "=" in word]
    configs = [word for word in options.configs if "=" not in word]
    print(
        f"{processor()}, {torch.get_num_threads()} thread(s); {options.steps} steps, "
        f"{options.seeds} seeds; mean ± standard deviation of dev"
    )
    print(f"{'':<20}{'figure':<18}{'most frequent':<15}{'random':<17}{'pretrained':<17}{'Trainer':<17}")
    results = []
    try:
        for path in configs:
            results.append(compare(path, overrides, options.steps, range(options.seeds)))
            print(line(results[-1]), flush=True)
    except UserError as error:
        raise SystemExit(f"error: {error}") from error
    if options.json:
        write_json(options.json, {"machine": processor(), "steps": options.steps, "results": results})
    return 0


def compare(path: str, overrides: Sequence[str], steps: int, seeds: Sequence[int]) -> dict[str, Any]:
    """Fine-tunes one config on both sides; returns the figures of each seed."""
    with tempfile.TemporaryDirectory() as place:
        words = [
            *overrides,
            f"output={place}/ours",
            *("train.epochs=null", f"train.steps={steps}", f"train.eval_every={steps}"),
            *(f"train.seeds={list(seeds)}", "train.compare_random=true", "train.precision=float32"),
            *("train.patience=null", f"train.log_every={steps}"),
        ]
        config = load_config(FinetuneConfig, path, words)
        if config.task not in ("classification", "regression"):
            raise UserError(f"{path}: task={config.task}; only classification and regression are compared")
        command = [sys.executable, "-m", "bertscale", "finetune", path, *words]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"{path}: {done.stderr.strip().splitlines()[-1]}")
        result = json.loads(Path(place, "ours", "result.json").read_text(encoding="utf-8"))
        exported = Path(place, "exported")
        convert = [sys.executable, "-m", "bertscale", "convert", config.source, str(exported), "--no-show"]
        subprocess.run(convert, check=True, capture_output=True)
        data = read_task_data(config.task, config.data, config.samples)
        metric = result["metric"]
        return {
            "config": Path(path).stem,
            "metric": metric,
            "majority": result["majority"]["dev"].get(metric, 0.0),
            "random": [run["dev"][metric] for run in result["random"]["runs"]],
            "pretrained": [run["dev"][metric] for run in result["pretrained"]["runs"]],
            "trainer": [train(config, exported, data, seed, steps)[metric] for seed in seeds],
        }


def train(
    config: FinetuneConfig, exported: Path, data: TaskData[Any], seed: int, steps: int
) -> dict[str, float]:
    """Fine-tunes the exported encoder by Trainer; returns the figures of dev."""
    task, optimizer = data.task, config.optimizer
    tokenizer = load_tokenizer(exported)
    train_rows, dev_rows = (
        rows_of(task.encode(examples, tokenizer, config.samples)) for examples in (data.train, data.dev)
    )
    settings = transformers.AutoConfig.from_pretrained(
        exported,
        num_labels=task.outputs,
        problem_type="regression" if config.task == "regression" else "single_label_classification",
    )
    dropout = config.model.hidden_dropout_prob
    for key in ("hidden_dropout_prob", "embedding_dropout", "mlp_dropout", "classifier_dropout"):
        if hasattr(settings, key):
            setattr(settings, key, dropout)
    for key in ("attention_probs_dropout_prob", "attention_dropout"):
        if hasattr(settings, key):
            setattr(settings, key, config.model.attention_probs_dropout_prob)
    if config.model.pooling and hasattr(settings, "classifier_pooling"):
        settings.classifier_pooling = config.model.pooling
    transformers.set_seed(seed)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(exported, config=settings)
    takes_types = settings.model_type != "modernbert"

    def collate(rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        longest = max(len(row["ids"]) for row in rows)

        def padded(key: str, fill: int) -> torch.Tensor:
            return torch.tensor([[*row[key], *[fill] * (longest - len(row[key]))] for row in rows])

        batch = {"input_ids": padded("ids", tokenizer.pad_id), "attention_mask": padded("ones", 0)}
        if takes_types:
            batch["token_type_ids"] = padded("types", 0)
        return {**batch, "labels": torch.tensor([row["target"] for row in rows])}

    with tempfile.TemporaryDirectory() as place:
        arguments = transformers.TrainingArguments(
            output_dir=place,
            max_steps=steps,
            per_device_train_batch_size=config.train.global_batch,
            per_device_eval_batch_size=64,
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
            model, arguments, data_collator=collate, train_dataset=train_rows, eval_dataset=dev_rows
        )
        trainer.train()
        logits = trainer.predict(dev_rows).predictions
    samples = task.encode(data.dev, tokenizer, config.samples)
    predictions = task.predict(data.dev, samples, logits.reshape(len(samples), -1))
    return task.score(data.dev, predictions)


def rows_of(samples: Samples) -> list[dict[str, Any]]:
    """The samples as lists, for Trainer."""
    assert samples.targets is not None
    rows = []
    for number in range(len(samples)):
        begin, end = samples.starts[number], samples.starts[number + 1]
        length, second = int(end - begin), int(samples.second[number])
        rows.append(
            {
                "ids": samples.tokens[begin:end].tolist(),
                "ones": [1] * length,
                "types": [int(place >= second) for place in range(length)],
                "target": samples.targets[number].item(),
            }
        )
    return rows


def line(result: dict[str, Any]) -> str:
    cells = [f"{result['config']:<20}{result['metric']:<18}{result['majority']:<15.3f}"]
    for side in ("random", "pretrained", "trainer"):
        values = result[side]
        spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
        cells.append(f"{statistics.mean(values):.3f}{spread}".ljust(17))
    return "".join(cells).rstrip()


if __name__ == "__main__":
    raise SystemExit(main())
