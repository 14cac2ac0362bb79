"""Held-out masked-token loss after equal training time: `bertscale pretrain` with AdamW and with LAMB, and
transformers' Trainer.

    python benchmarks/convergence.py --text FILES [FILES]    # prepared into runs/convergence/data first
    python benchmarks/convergence.py --data FOLDER [FOLDER]  # output folders of `bertscale prep`

Each contestant trains a `bert` and a `modern` of the shipped size mini for --minutes of wall clock, from
random weights, on masked tokens alone: samples of 128 tokens, as many a step for all. Ours is the command
itself on the shipped config (packed samples, a budget in hours). Theirs (`pip install accelerate`) is Trainer
with its own collator, fused AdamW and bf16 on BertForMaskedLM and ModernBertForMaskedLM of the same size:
rows of exactly 128 tokens out of one stream, as run_mlm makes them, without any padding; they are the same
rows that ours takes, whose documents they let attend to each other. ModernBert predicts masked tokens alone
(its `sparse_prediction`, off by default). Dropout is off on both sides: nobody sees a text twice.

The clock and the learning rate are the same code for all: up over a tenth of the time, then in a line to
zero at its end. It begins with the first step; loading, saving and evaluation are outside.

Then all weights come into the native model in float32, and the same held-out documents with the same masks
go through it: samples of one document each, 15 % masked, whatever the rate in training. `unigram` is the
loss of the training text's token frequencies.

What is finished stays in --output and is not run again; a run that broke off resumes there.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import yaml
from torch.utils.data import Dataset as TorchDataset

from bertscale.bench.machine import processor
from bertscale.config import Corpus, PretrainConfig, SamplesConfig, UserError, load_config
from bertscale.convert.hf_names import hugging_face_config
from bertscale.convert.weights import load_model
from bertscale.data.batch_phases import batch_phases
from bertscale.data.loader import Loader
from bertscale.data.manifest import Split
from bertscale.data.masking import Ints
from bertscale.data.micro_batch import MicroBatch
from bertscale.data.mixture import Mixture
from bertscale.data.shards import Dataset, open_dataset
from bertscale.files import write_json
from bertscale.run_folder import CONFIG, RESULT, checkpoints
from bertscale.tokenizer import Tokenizer, load_tokenizer
from bertscale.train.device import choose_precision, local_device
from bertscale.train.schedule import Clock, TrainingSchedule

CONFIGS = Path(__file__).resolve().parents[1] / "configs/pretrain"
LENGTH = 128  # tokens of a sample
HELDOUT = 1024  # samples, some 17,000 masked tokens
CHUNK = 64  # of them at a time
CONTESTANTS = {  # and their peak learning rates; --rates says how many of them are tried
    "bert-adamw": (1e-3, 5e-4),
    "bert-lamb": (5e-3, 1e-2),
    "bert-trainer": (1e-3, 5e-4),
    "modern-adamw": (2e-3, 1e-3),
    "modern-lamb": (2e-2, 1e-2),
    "modern-trainer": (2e-3, 1e-3),
}
SIDES = {"adamw": "ours, AdamW", "lamb": "ours, LAMB", "trainer": "Trainer, AdamW"}


@dataclass(frozen=True)
class Run:
    """One contestant with one learning rate, and its folder."""

    name: str
    rate: float
    folder: Path

    def weights(self) -> Path | None:
        """Where the trained weights are, if they are there."""
        if self.name.endswith("trainer"):
            return self.folder / "theirs" if (self.folder / "theirs").is_dir() else None
        return next(reversed(checkpoints(self.folder / "run")), None)

    def start(self) -> subprocess.Popen[bytes]:
        command = ["-m", "bertscale", "pretrain", str(self.folder / CONFIG)]
        if self.name.endswith("trainer"):
            command = [__file__, "--trainer", str(self.folder)]
        with open(self.folder / "log.txt", "ab") as log:
            return subprocess.Popen([sys.executable, *command], stdout=log, stderr=log)

    def last_line(self) -> str:
        lines = (self.folder / "log.txt").read_text(encoding="utf-8", errors="replace").split("\n")
        return lines[-2] if len(lines) > 1 else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--data", type=Path, nargs="+", help="Output folders of `bertscale prep`.")
    source.add_argument("--text", nargs="+", help="Files, folders or globs of raw text, prepared first.")
    source.add_argument("--trainer", type=Path, help=argparse.SUPPRESS)  # a process of theirs
    parser.add_argument("--pieces", type=int, default=32_768, help="Vocabulary where text is prepared.")
    parser.add_argument("--minutes", type=float, default=12.0, help="Training time of each contestant.")
    parser.add_argument("--batch", type=int, default=16, help="Samples of 128 tokens in a step.")
    parser.add_argument("--rates", type=int, default=1, help="Learning rates of each contestant, 1 or 2.")
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, help="Some contestants.", metavar="NAME")
    parser.add_argument("--size", default="mini", help="Of the shipped configs, such as tiny.")
    parser.add_argument("--together", action="store_true", help="One contestant on each core, at a time.")
    parser.add_argument("--output", type=Path, default=Path("runs/convergence"), help="Folder for all.")
    parser.add_argument("--json", type=Path, help="File for the results.")
    options = parser.parse_args()
    try:
        if options.trainer:
            train_theirs(options.trainer)
        else:
            compare(options)
    except UserError as error:
        raise SystemExit(f"error: {error}") from error
    return 0


def compare(options: argparse.Namespace) -> None:
    train = [open_dataset(folder, "train") for folder in options.data or [prepared(options)]]
    corpora = [Corpus(path=str(data.folder.resolve()), weight=data.num_tokens) for data in train]
    names = options.only or list(CONTESTANTS)
    if not importlib.util.find_spec("accelerate") and any(name.endswith("trainer") for name in names):
        print("transformers' Trainer: left out; `pip install accelerate` brings what it needs")
        names = [name for name in names if not name.endswith("trainer")]
    cores: Sequence[int | None] = [None]
    if options.together:
        cores = sorted(os.sched_getaffinity(0))
        os.environ["OMP_NUM_THREADS"] = "1"
    threads = 1 if options.together else torch.get_num_threads()
    machine = {"processor": processor(), "threads": threads, "torch": torch.__version__}
    print(
        f"{machine['processor']}, {threads} thread(s) each, torch {torch.__version__}\n"
        f"{', '.join(str(data.folder) for data in train)}: {sum(d.num_tokens for d in train):,} tokens\n"
        f"{options.minutes:g} minutes each, {options.batch} x {LENGTH} tokens a step"
    )
    runs = [
        begun(name, rate, options, corpora, f"{[data.manifest_digest for data in train]}, {threads} threads")
        for name in names
        for rate in CONTESTANTS[name][: options.rates]
    ]
    samples = SamplesConfig(kind="document", max_length=LENGTH)
    loader = make_loader(corpora, samples, "validation", CHUNK, CHUNK)
    steps = max(1, min(HELDOUT, epoch(loader)) // CHUNK)
    heldout = [batch for step in range(steps) for batch in loader.step(step)]
    packed = samples.model_copy(update={"kind": "packed"})
    mean = make_loader(corpora, packed, "train", 1, 1).mixture.mean_sample_tokens()[0][1]
    best: dict[str, dict[str, Any]] = {}  # by name, of the learning rate with the lowest loss
    for first in range(0, len(runs), len(cores)):
        group = runs[first : first + len(cores)]
        train_together(group, cores)
        for run in group:
            trainer = run.name.endswith("trainer")
            figures = measured(run, heldout, options.batch * (LENGTH if trainer else mean), options.minutes)
            candidates = best.get(run.name, figures), figures
            best[run.name] = min(candidates, key=lambda figures: figures["heldout_mlm_loss"])
    results = report(best, unigram(train, heldout), options.size)
    if options.json:
        write_json(options.json, {"machine": machine, "results": results, "contestants": best})


def begun(name: str, rate: float, options: argparse.Namespace, corpora: list[Corpus], facts: str) -> Run:
    """The run with its config in its folder; what is there of another config or other `facts` goes."""
    preset, side = name.split("-")
    run, batch = Run(name, rate, options.output / f"{name}-{rate:g}"), options.batch
    overrides = [
        f"run={json.dumps(str((run.folder / 'run').resolve()))}",
        f"data={json.dumps([corpus.model_dump() for corpus in corpora])}",
        *("model.sentence_head=false", "model.hidden_dropout_prob=0", "model.attention_probs_dropout_prob=0"),
        *("samples.kind=packed", f"samples.max_length={LENGTH}"),
        *(f"optimizer.name={'lamb' if side == 'lamb' else 'adamw'}", f"optimizer.learning_rate={rate}"),
        *("optimizer.warmup_fraction=0.1", "optimizer.beta2=0.98", "optimizer.eps=0.000001"),
        *("train.steps=null", f"train.hours={options.minutes / 60}"),
        *(f"train.global_batch={batch}", f"train.micro_batch={batch}", f"train.eval_samples={batch}"),
        *("train.log_every=20", f"train.eval_every={10**9}", f"train.save_every={10**9}"),
    ]
    config = load_config(PretrainConfig, CONFIGS / f"{preset}-{options.size}.yaml", overrides)
    text = f"# {facts}\n{yaml.safe_dump(config.model_dump(mode='json'), sort_keys=False)}"
    path = run.folder / CONFIG
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        shutil.rmtree(run.folder, ignore_errors=True)
        run.folder.mkdir(parents=True)
        path.write_text(text, encoding="utf-8")
    return run


def train_together(runs: Sequence[Run], cores: Sequence[int | None]) -> None:
    """Trains what is not trained yet, each run on a core of its own, if cores are given, at the same time.
    Shows the last lines of their logs as they come."""
    children, before = [], os.sched_getaffinity(0) if cores[0] is not None else None
    for run, core in zip(runs, cores, strict=False):
        if run.weights():
            print(f"{run.name} {run.rate:g}: trained already", flush=True)
            continue
        if core is not None:
            os.sched_setaffinity(0, {core})  # which the child inherits
        children.append((run, run.start()))
    if before is not None:
        os.sched_setaffinity(0, before)
    shown: dict[Path, str] = {}
    while any(child.poll() is None for _, child in children):
        time.sleep(0.5)
        for run, _ in children:
            if shown.get(run.folder, "") != (line := run.last_line()):
                shown[run.folder] = line
                print(f"{run.name} {run.rate:g}: {line}", flush=True)
    for run, child in children:
        if child.returncode:
            raise SystemExit(f"{run.name} ended with code {child.returncode}; see {run.folder / 'log.txt'}")


def make_loader(
    corpora: Sequence[Corpus], samples: SamplesConfig, split: Split, batch: int, micro_batch: int
) -> Loader:
    data = [open_dataset(corpus.path, split) for corpus in corpora]
    mixture = Mixture(data, [corpus.weight for corpus in corpora], samples, global_batch=batch, seed=0)
    tokenizer = load_tokenizer(data[0].tokenizer_path)
    return Loader(mixture, tokenizer, micro_batch=micro_batch, rank=0, world=1)


def epoch(loader: Loader) -> int:
    """Samples of all corpora together."""
    return sum(sampler.num_samples for sampler in loader.mixture.phases[0].samplers)


# ---------------------------------------------------------------------------------------- the measure


def measured(run: Run, heldout: list[MicroBatch], step_tokens: float, minutes: float) -> dict[str, Any]:
    """What the table says of the run; kept in its folder."""
    path = run.folder / RESULT
    if not path.is_file():
        weights = run.weights()
        assert weights is not None
        steps = json.loads((run.folder / "run" / RESULT).read_text(encoding="utf-8"))["steps"]
        loss, accuracy = heldout_loss(weights, heldout)
        figures = {
            "learning_rate": run.rate,
            "steps": steps,
            "tokens": round(steps * step_tokens),
            "tokens_per_second": round(steps * step_tokens / (60 * minutes)),
            "heldout_mlm_loss": loss,
            "heldout_mlm_accuracy": accuracy,
        }
        write_json(path, figures)
        print(f"{run.name} {run.rate:g}: {steps:,} steps, held-out MLM loss {loss:.4f}", flush=True)
    kept_figures: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return kept_figures


@torch.no_grad()
def heldout_loss(weights: Path, heldout: list[MicroBatch]) -> tuple[float, float]:
    """Returns mean loss and accuracy at the masked positions, in float32, of our or their weights."""
    model = load_model(weights)
    loss = right = 0.0
    for b in heldout:
        sums = model(b)
        loss, right = loss + float(sums.mlm), right + float(sums.mlm_correct)
    masked = sum(len(batch.targets) for batch in heldout)
    return loss / masked, right / masked


def unigram(train: list[Dataset], heldout: list[MicroBatch]) -> float:
    """Returns the loss of the training text's token frequencies at the same masked positions."""
    vocab_size = load_tokenizer(train[0].tokenizer_path).vocab_size
    counts = np.ones(vocab_size)
    for shard in (shard for data in train for shard in data.shards):
        counts += np.bincount(shard.tokens, minlength=vocab_size)
    return float(-np.log(counts / counts.sum())[torch.cat([batch.targets for batch in heldout])].mean())


def report(by_name: dict[str, dict[str, Any]], plain: float, size: str) -> list[dict[str, Any]]:
    """Prints the table; returns the comparisons: theirs over ours, of the losses."""
    print(f"\n{'':<24}{'rate':>8}{'steps':>8}{'tokens':>12}{'tokens/s':>10}{'held-out loss':>15}{'right':>8}")
    results = []
    for name, figures in by_name.items():
        preset, side = name.split("-")
        rate, steps, tokens, speed, loss, accuracy = figures.values()
        print(
            f"{preset:<8}{SIDES[side]:<16}{rate:>8g}{steps:>8,}{tokens:>12,}{speed:>10,}{loss:>15.4f}"
            f"{accuracy:>8.1%}"
        )
        if side != "trainer" and f"{preset}-trainer" in by_name:
            peer = by_name[f"{preset}-trainer"]["heldout_mlm_loss"]
            figures_of_case = {"ours": round(loss, 4), "peer": round(peer, 4), "ratio": round(peer / loss, 4)}
            case = {"case": f"{preset} {size}, {SIDES[side]}", "unit": "nats of held-out loss", "goal": 1.0}
            results.append(case | figures_of_case)
    print(f"{'unigram':<62}{plain:>15.4f}")
    return results


# -------------------------------------------------------------------------------------------- theirs


class Rows(TorchDataset[dict[str, Any]]):
    """Rows of 128 ids, as a tokenized data set gives them."""

    def __init__(self, rows: Ints, tokenizer: Tokenizer) -> None:
        self.rows = rows
        self.special = np.zeros(tokenizer.vocab_size, np.int64)
        self.special[list(tokenizer.special_ids)] = 1

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        row = self.rows[number]
        return {"input_ids": row.tolist(), "special_tokens_mask": self.special[row].tolist()}


class ByTheClock(transformers.TrainerCallback):  # type: ignore[misc]
    """The clock and the learning rates of `bertscale pretrain`, for Trainer."""

    def __init__(self, schedule: TrainingSchedule) -> None:
        self.schedule = schedule
        self.last = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.clock = Clock(0.0)

    def on_step_begin(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        now, after = self.clock.step()
        self.last = self.schedule.over(state.global_step + 1, after)
        for group in parts["optimizer"].param_groups:
            group["lr"] = self.schedule.learning_rate(state.global_step, now)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.clock.stepped()
        control.should_training_stop = self.last


def train_theirs(folder: Path) -> None:
    """One run of transformers' Trainer, in a process of its own; weights go to FOLDER/theirs."""
    config = load_config(PretrainConfig, folder / CONFIG, [])
    train, optimizer = config.train, config.optimizer
    loader = make_loader(config.corpora, config.samples, "train", 1024, 1)
    tokenizer = load_tokenizer(loader.mixture.datasets[0].tokenizer_path)
    tokenizer.export_hugging_face(folder / "tokenizer", LENGTH)
    fast = transformers.AutoTokenizer.from_pretrained(folder / "tokenizer")
    sizes = hugging_face_config(config.model, tokenizer.vocab_size, tokenizer.pad_id)
    if config.model.preset == "modern":
        sizes["sparse_prediction"] = True
    transformers.set_seed(train.seed)
    kind = getattr(transformers, sizes.pop("architectures")[0])
    model = kind(transformers.AutoConfig.for_model(**sizes))
    device = local_device()
    arguments = transformers.TrainingArguments(
        output_dir=str(folder / "trainer"),
        max_steps=10**9,  # the clock ends it
        per_device_train_batch_size=train.global_batch,
        learning_rate=optimizer.learning_rate,
        lr_scheduler_type="constant",  # the clock sets it
        adam_beta1=optimizer.beta1,
        adam_beta2=optimizer.beta2,
        adam_epsilon=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        max_grad_norm=optimizer.gradient_clipping,
        bf16=choose_precision(train.precision, device)[0] == torch.bfloat16,
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type == "cuda",
        remove_unused_columns=False,  # the collator wants the mask of special tokens
        logging_steps=train.log_every,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=train.seed,
    )
    phases = batch_phases([], train.global_batch, [(0, float(LENGTH))])
    trainer = transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=Rows(whole_rows(loader), tokenizer),
        data_collator=transformers.DataCollatorForLanguageModeling(
            fast, mlm_probability=config.samples.mask_rate
        ),
        callbacks=[ByTheClock(TrainingSchedule(config, phases))],
    )
    trainer.train()
    partial = folder / "theirs.partial"
    trainer.save_model(str(partial))
    (folder / "run").mkdir(exist_ok=True)
    write_json(folder / "run" / RESULT, {"steps": trainer.state.global_step})
    partial.rename(folder / "theirs")


def whole_rows(loader: Loader) -> Ints:
    """The samples of one epoch that fill a row, unmasked, [rows, LENGTH]."""
    rows = []
    for _, batches in loader.iterate(0, max(1, epoch(loader) // loader.global_batch)):
        for batch in batches:
            if len(batch.tokens) == LENGTH:
                row = batch.tokens.numpy().astype(np.int32)
                row[batch.target_positions.numpy()] = batch.targets.numpy()
                rows.append(row)
    return np.stack(rows)


# --------------------------------------------------------------------------------------------- data


def prepared(options: argparse.Namespace) -> Path:
    """The text as one data set with one tokenizer, in OUTPUT/data; without text that of the quickstart."""
    text = options.text or [str(options.output / "corpus")]
    if not options.text:
        subprocess.run([sys.executable, "-m", "data_prep.docstrings", str(options.output)], check=True)
    folder: Path = options.output / "data"
    overrides = [
        *(f"input={json.dumps(text)}", f"output={json.dumps(str(folder))}"),
        "validation_fraction=0.03",  # of books there are few
        f"train_tokenizer.vocab_size={options.pieces}",
    ]
    command = [sys.executable, "-m", "bertscale", "prep", str(CONFIGS.parent / "prep/quickstart.yaml")]
    if subprocess.run([*command, *overrides]).returncode:
        raise SystemExit("the text could not be prepared")
    return folder


if __name__ == "__main__":
    sys.exit(main())
