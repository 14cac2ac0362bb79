"""Examples a second of fine-tuning and of prediction: ours against transformers' Trainer and pipeline.

    python benchmarks/finetune.py                  # FOLDER/tasks/sst2 and imdb of $BERTSCALE_DATA
    python benchmarks/finetune.py --data FOLDER --only sst2 train float32 --json FILE
    python benchmarks/finetune.py --quick          # tiny models, to see that it runs

SST-2 (128 tokens at most) and IMDB (512), a `bert` and a `modern` of the shipped size mini with random
weights and the published WordPiece vocabulary, float32, and bfloat16 where the processor has it. Both sides
start from one folder of a task model and take the same examples in rounds, in turns, each in a process of its
own, so that memory and processor seconds are those of one side. Dropout is the same: 0.1 of hidden states,
none of attention.

Training: ours is the step of `bertscale finetune`, loading included; theirs (`pip install accelerate`) is
Trainer, its examples tokenized before, padded by its collator to the longest of a batch, with fused AdamW and
clipping at 1. Prediction: ours is `load_task_model(FOLDER)(texts)`, theirs pipeline("text-classification") in
batches; both begin with texts and end with dictionaries.
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import transformers
from torch import Tensor

from bertscale.bench.machine import processor
from bertscale.config import FinetuneConfig, ModelConfig, UserError
from bertscale.config.examples import EncodingConfig, ExamplesConfig
from bertscale.convert.task_models import task_shapes, write_task_model
from bertscale.examples.read import read_task_data
from bertscale.files import write_json
from bertscale.finetune.loop import Job, Run
from bertscale.finetune.predict import load_task_model
from bertscale.finetune.start import open_source
from bertscale.model.heads import HeadConfig, TaskBatch, head_initial_value, task_loss
from bertscale.model.model import initial_value
from bertscale.tasks.task import TextExample
from bertscale.tasks.texts import text_task
from bertscale.tokenizer import Tokenizer, load_tokenizer
from bertscale.train.device import choose_precision
from bertscale.train.parallel import start_ranks
from bertscale.train.step import global_step

VOCABULARY = "vocab/bert-base-uncased-vocab.txt"
RATE = 5e-5
GOAL = 2.0
BERT = {"num_hidden_layers": 4, "hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 1024}
MODERN = {
    "preset": "modern",
    "num_hidden_layers": 6,
    "hidden_size": 256,
    "num_attention_heads": 4,
    "intermediate_size": 384,
}
MODELS: dict[str, dict[str, Any]] = {"bert": BERT, "modern": MODERN}
DROPOUT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.0}
TINY = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}


@dataclass(frozen=True)
class Set:
    """A labelled file, and how much of it is a round."""

    file: str  # in the folder of the data
    columns: dict[str, str]
    max_length: int
    steps: int  # of training
    texts: int  # to predict


SETS = {
    "sst2": Set("tasks/sst2/train.tsv", {"text": "sentence"}, 128, 6, 512),
    "imdb": Set("tasks/imdb/train.jsonl", {}, 512, 2, 96),
}


@dataclass(frozen=True)
class Case:
    """One comparison; `examples` are those of all rounds, one after another, the first round to warm up."""

    what: str  # train or predict
    model: Path  # folder
    examples: list[dict[str, str]]  # text and label
    per_round: int
    batch: int
    max_length: int
    precision: Literal["float32", "bfloat16"]

    def round(self, number: int) -> list[dict[str, str]]:
        begin = number * self.per_round
        return self.examples[begin : begin + self.per_round]


Round = Callable[[list[dict[str, str]]], float]  # examples -> seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="Folder of tasks/ and vocab/; else $BERTSCALE_DATA.")
    parser.add_argument("--only", nargs="+", default=[], help="Some of sst2 bert train float32 ...")
    parser.add_argument("--rounds", type=int, default=7, help="Turns of each side (%(default)s).")
    parser.add_argument("--batch", type=int, default=32, help="Examples of a step (%(default)s).")
    parser.add_argument("--quick", action="store_true", help="Tiny models, to see that it runs.")
    parser.add_argument("--json", type=Path, help="File for the results.")
    options = parser.parse_args()
    folder = options.data or os.environ.get("BERTSCALE_DATA")
    if folder is None:
        raise SystemExit("error: where are the labelled files? give --data FOLDER, or set BERTSCALE_DATA")
    try:
        compare(options, Path(folder))
    except UserError as error:
        raise SystemExit(f"error: {error}") from error
    return 0


def compare(options: argparse.Namespace, data: Path) -> None:
    facts = {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "rounds": options.rounds,
        "batch": options.batch,
    }
    print(
        f"{facts['processor']}, {facts['threads']} thread(s), torch {facts['torch']}; medians of "
        f"{options.rounds} rounds, {options.batch} examples a step"
    )
    print(
        f"{'examples/s':<34}{'ours':>9}{'theirs':>9}{'ratio':>8}{'lowest':>8}{'highest':>8}{'CPU s':>8}"
        "   peak MB"
    )
    results = []
    with tempfile.TemporaryDirectory() as place:
        for name, case in cases(options, data, Path(place)):
            figures = measure(case, options.rounds)
            results.append({"case": name, "unit": "examples/s", "goal": GOAL, **figures})
            ours, peer, memory = figures["ours"], figures["peer"], figures["peak_mb"]
            low, high = figures["spread"]
            print(
                f"{name:<34}{ours:>9,.1f}{peer:>9,.1f}{figures['ratio']:>8.2f}{low:>8.2f}{high:>8.2f}"
                f"{figures['cpu_ratio']:>8.2f}   {memory[0]:,.0f} against {memory[1]:,.0f}",
                flush=True,
            )
    if options.json:
        write_json(options.json, {"machine": facts, "results": results})


def cases(options: argparse.Namespace, data: Path, place: Path) -> Iterator[tuple[str, Case]]:
    """All comparisons that --only leaves, by name; models are written into the folder `place`."""
    tokenizer = load_tokenizer(data / VOCABULARY)
    has_bfloat16 = choose_precision("auto", torch.device("cpu"))[0] == torch.bfloat16
    precisions: tuple[Literal["float32", "bfloat16"], ...]
    precisions = ("float32", "bfloat16") if has_bfloat16 or options.quick else ("float32",)
    kinds: tuple[str, ...] = ("train", "predict")
    if not importlib.util.find_spec("accelerate"):
        print("transformers' Trainer: left out; `pip install accelerate` brings what it needs")
        kinds = ("predict",)
    wanted = {*options.only}
    axes = [set(SETS), set(MODELS), set(kinds), {*precisions}]
    if unknown := wanted - set().union(*axes):
        raise UserError(f"--only {min(unknown)}: there are {', '.join(sorted(set().union(*axes)))}")
    chosen = [wanted & axis or axis for axis in axes]
    for set_name, labelled in SETS.items():
        if set_name not in chosen[0]:
            continue
        for preset in (preset for preset in MODELS if preset in chosen[1]):
            sizes = {**MODELS[preset], **DROPOUT, **(TINY if options.quick else {})}
            examples, labels = read_examples(data, labelled)
            model = place / f"{set_name}-{preset}"
            write_random_model(model, ModelConfig(**sizes), tokenizer, labels, labelled.max_length)
            for what in (kind for kind in kinds if kind in chosen[2]):
                per_round = labelled.steps * options.batch if what == "train" else labelled.texts
                if options.quick:
                    per_round = 2 * options.batch
                repeated = np.arange((options.rounds + 1) * per_round) % len(examples)
                for precision in (each for each in precisions if each in chosen[3]):
                    case = Case(
                        what,
                        model,
                        [examples[number] for number in repeated],
                        per_round,
                        options.batch,
                        labelled.max_length,
                        precision,
                    )
                    yield f"{set_name}, {preset}, {what}, {precision}", case


def read_examples(data: Path, labelled: Set) -> tuple[list[dict[str, str]], list[str]]:
    """The examples of a set in a random order, and the labels."""
    columns = ExamplesConfig(train=str(data / labelled.file), **labelled.columns)
    found = read_task_data("classification", columns, EncodingConfig(max_length=labelled.max_length))
    order = np.random.default_rng(0).permutation(len(found.train))
    rows = [{"text": found.train[n].texts[0], "label": found.train[n].target} for n in order]
    return rows, found.task.labels


def write_random_model(
    folder: Path, sizes: ModelConfig, tokenizer: Tokenizer, labels: list[str], max_length: int
) -> None:
    """A task model of random weights, which both sides read."""
    head = HeadConfig("classification", len(labels))
    vocab_size = tokenizer.vocab_size

    def first(name: str, shape: Sequence[int]) -> Tensor:
        if name.startswith(("head.", "encoder.pooler.")):
            return head_initial_value(name, shape, sizes, 0)
        return initial_value(name, shape, sizes, vocab_size, 0)

    shapes = task_shapes(sizes, vocab_size, head)
    tensors = ((name, first(name, shape)) for name, shape in shapes.items())
    folder.mkdir()
    write_task_model(folder, sizes, vocab_size, head, labels, tensors, tokenizer, max_length, {})


# -------------------------------------------------------------------------------------------- measuring


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """Both sides in turns, after a round of each to warm up; who begins changes."""
    context = multiprocessing.get_context("spawn")
    sides = []
    for side in ("ours", "theirs"):
        here, there = context.Pipe()
        process = context.Process(target=serve, args=(side, case, there), daemon=True)
        process.start()
        there.close()
        sides.append((process, here))
    found: list[list[tuple[float, float, int]]] = [[], []]
    for number in range(rounds + 1):
        for which in (0, 1) if number % 2 else (1, 0):
            process, connection = sides[which]
            connection.send(number)
            try:
                found[which].append(connection.recv())
            except EOFError:
                process.join()
                raise SystemExit(f"a side ended with code {process.exitcode}; see above") from None
    for process, connection in sides:
        connection.close()
        process.join()
    ours, theirs = (side[1:] for side in found)
    ratios = [b[0] / a[0] for a, b in zip(ours, theirs, strict=True)]
    cpu = [b[1] / a[1] for a, b in zip(ours, theirs, strict=True)]
    return {
        "ours": case.per_round / statistics.median(turn[0] for turn in ours),
        "peer": case.per_round / statistics.median(turn[0] for turn in theirs),
        "ratio": statistics.median(ratios),
        "spread": [min(ratios), max(ratios)],
        "cpu_ratio": statistics.median(cpu),
        "peak_mb": [ours[-1][2] / 1e6, theirs[-1][2] / 1e6],
    }


def serve(side: str, case: Case, connection: Connection) -> None:
    """One side, in its process: answers the number of a round with wall and processor seconds, and the
    largest resident set so far in bytes."""
    makers = {
        ("ours", "train"): our_training,
        ("theirs", "train"): their_training,
        ("ours", "predict"): our_prediction,
        ("theirs", "predict"): their_prediction,
    }
    run = makers[side, case.what](case)
    while True:
        try:
            number = connection.recv()
        except EOFError:
            return
        began = time.process_time()
        seconds = run(case.round(number))
        used = time.process_time() - began
        connection.send((seconds, used, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))


# ------------------------------------------------------------------------------------------------- ours


def our_training(case: Case) -> Round:
    """Steps of `bertscale finetune`."""
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    config = FinetuneConfig.model_validate(
        {
            "init": str(case.model),
            "output": "unused",
            "data": {"train": "unused"},
            "samples": {"max_length": case.max_length},
            "model": DROPOUT,
            "optimizer": {"learning_rate": RATE},
            "train": {"global_batch": case.batch, "precision": case.precision},
        }
    )
    ranks = start_ranks(1, torch.device("cpu"))
    source = open_source(config)
    tokenizer = load_tokenizer(source.folder)
    task = text_task("classification", label_names(case))
    samples = task.encode(text_examples(case.examples), tokenizer, config.samples)
    job = Job(
        config=config,
        source=source,
        tokenizer=tokenizer,
        task=task,
        train=samples,
        repeats=None,
        dev=None,
        test=None,
        ranks=ranks,
        dtype=choose_precision(case.precision, ranks.device)[0],
        made_of={},
        class_weights=None,
    )
    engine = job.engine
    engine.start_from(source.first_values(task, Run(0, "pretrained", 0, 0)))
    engine.model.train()

    def run(examples: list[dict[str, str]]) -> float:
        of_round = task.encode(text_examples(examples), tokenizer, config.samples)
        loader = replace(job, train=of_round).loader(0)
        began = time.perf_counter()
        for step in range(loader.epoch_steps):
            parts = loader.step(step)
            count, *_ = ranks.sum_over_data(sum(part.divisor for part in parts))

            def loss_of(logits: Tensor, batch: TaskBatch, count: float = count) -> tuple[Tensor, Tensor]:
                total = task_loss("classification", logits, batch)
                return total / count, total[None]

            batches = [part.batch for part in parts]
            global_step(engine, batches, loss_of, seed=0, step=step, learning_rate=RATE)
        return time.perf_counter() - began

    return run


def our_prediction(case: Case) -> Round:
    """`bertscale.load_task_model`."""
    predict = load_task_model(case.model, "cpu", case.precision)

    def run(examples: list[dict[str, str]]) -> float:
        texts = [example["text"] for example in examples]
        began = time.perf_counter()
        predict(texts)
        return time.perf_counter() - began

    return run


def text_examples(examples: list[dict[str, str]]) -> list[TextExample]:
    return [TextExample(place="", texts=(row["text"],), target=row["label"]) for row in examples]


def label_names(case: Case) -> list[str]:
    return sorted({example["label"] for example in case.examples})


# ----------------------------------------------------------------------------------------------- theirs


class Timed(transformers.TrainerCallback):  # type: ignore[misc]
    """Seconds from the begin of an epoch, before its first batch is loaded, to the end of its last step."""

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seconds = time.perf_counter() - self.began


def their_training(case: Case) -> Round:
    """Trainer, one epoch a round."""
    tokenizer, model = their_model(case)
    numbers = {label: number for number, label in enumerate(label_names(case))}
    watch = Timed()
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(
            output_dir=str(case.model / "unused"),
            num_train_epochs=1,
            per_device_train_batch_size=case.batch,
            learning_rate=RATE,
            lr_scheduler_type="constant",
            optim="adamw_torch_fused",
            adam_epsilon=1e-6,
            weight_decay=0.01,
            max_grad_norm=1.0,
            bf16=case.precision == "bfloat16",
            use_cpu=True,
            dataloader_pin_memory=False,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        data_collator=transformers.DataCollatorWithPadding(tokenizer),
        callbacks=[watch],
    )
    trainer.remove_callback(transformers.PrinterCallback)

    def run(examples: list[dict[str, str]]) -> float:
        texts = [example["text"] for example in examples]
        encoded = tokenizer(texts, truncation=True, max_length=case.max_length)
        trainer.train_dataset = [
            {**{name: values[row] for name, values in encoded.items()}, "label": numbers[example["label"]]}
            for row, example in enumerate(examples)
        ]
        trainer.train()
        return watch.seconds

    return run


def their_prediction(case: Case) -> Round:
    """A pipeline, in batches."""
    tokenizer, model = their_model(case)
    model = model.to(getattr(torch, case.precision))
    pipe = transformers.pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")

    def run(examples: list[dict[str, str]]) -> float:
        texts = [example["text"] for example in examples]
        began = time.perf_counter()
        pipe(texts, batch_size=case.batch, truncation=True, max_length=case.max_length, top_k=None)
        return time.perf_counter() - began

    return run


def their_model(case: Case) -> tuple[Any, Any]:
    transformers.utils.logging.disable_progress_bar()
    kind = transformers.AutoModelForSequenceClassification
    return transformers.AutoTokenizer.from_pretrained(case.model), kind.from_pretrained(case.model)


if __name__ == "__main__":
    raise SystemExit(main())
