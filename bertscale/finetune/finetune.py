"""Fine-tunes an encoder on labelled examples: one process of it for each rank.

    bertscale finetune configs/finetune/sst2.yaml                   # starts the ranks of this machine
    torchrun --nproc-per-node 2 -m bertscale finetune CONFIG.yaml   # or is one rank of torchrun, srun, ...

Each seed is one run from the pretrained weights and, with `train.compare_random`, one of the same
architecture from random weights, with the same examples in the same order, to show what pretraining is worth.
The engine is that of pretraining; `loop` is one run, `output` says what comes out.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bertscale.config import FinetuneConfig, UserError
from bertscale.convert.tensor_files import weight_files
from bertscale.errors import STOPPED_AND_SAVED
from bertscale.examples.read import describe, read_task_data
from bertscale.files import file_digest, json_digest
from bertscale.finetune.by_label import tables_of
from bertscale.finetune.evaluate import Found, HeldOut, evaluate, hold_out, judge
from bertscale.finetune.loop import Job, Run, Stopped, train_run
from bertscale.finetune.output import (
    WRITTEN,
    finished_result,
    finished_runs,
    make_folder,
    remove_other_work,
    write_config,
    write_model,
    write_outcome,
    write_predictions,
    write_quarantine,
    write_result,
    write_run,
)
from bertscale.finetune.report import make_result, run_line, table
from bertscale.finetune.start import Source, check_tokenizer, open_source
from bertscale.progress import fold
from bertscale.run_folder import TABLE, TENSORBOARD
from bertscale.tasks.task import Samples, Task, TaskData
from bertscale.tokenizer import Tokenizer, find_tokenizer, load_tokenizer
from bertscale.train.device import choose_precision, device_line, local_device
from bertscale.train.device import describe as describe_device
from bertscale.train.parallel import Ranks, start_ranks, stop_ranks
from bertscale.train.resume import remove_leftovers
from bertscale.train.stop import StopSignal, only_one


def finetune(config: FinetuneConfig) -> int:
    """Runs this rank of the fine-tuning to its end; returns 0, or STOPPED_AND_SAVED when a signal stopped it.

    Raises UserError for what the user can mend: an encoder, examples and a config that do not fit together, a
    full disk.
    """
    stop = StopSignal()
    device = local_device(config.device)
    ranks = start_ranks(config.parallel.tensor, device)
    ranks.say(device_line(device, config.device, ranks.world))
    try:
        make_folder(Path(config.output))
        with only_one(Path(config.output), ranks):
            train_all(config, ranks, stop)
        return 0
    except Stopped:
        return STOPPED_AND_SAVED
    finally:
        stop_ranks()


def train_all(config: FinetuneConfig, ranks: Ranks, stop: StopSignal) -> dict[str, Any]:
    """Trains and evaluates a model for each seed and start; returns what result.json holds.

    Finished runs of the same settings, encoder and examples are used again, an unfinished one goes on. Raises
    Stopped after a signal, UserError as `finetune`.
    """
    began, output = time.monotonic(), Path(config.output)
    source = open_source(config)
    config.check_encoder(source.model)
    tokenizer = load_tokenizer(source.folder)
    check_tokenizer(source.vocab_size, tokenizer)
    made_of = ranks.broadcast(fingerprint(config, source) if ranks.rank == 0 else None)
    finished = ranks.broadcast(finished_result(output, made_of) if ranks.rank == 0 else None)
    if finished is not None:
        ranks.say(f"already fine-tuned: {output} holds the result of these settings, encoder and examples")
        ranks.say(table(finished))
        return dict(finished)
    if ranks.rank == 0:
        remove_leftovers(output, WRITTEN)
        remove_other_work(output, made_of)
    ranks.barrier()

    job, data = prepare(config, source, tokenizer, made_of, ranks)
    records = ranks.broadcast(finished_runs(output, made_of) if ranks.rank == 0 else None)
    starts = ["pretrained", "random"] if config.train.compare_random else ["pretrained"]
    wanted = [(seed, start) for seed in config.train.seeds for start in starts]
    begin = 0
    for number, (seed, start) in enumerate(wanted):
        run = Run(seed, start, number, begin)
        if run.name not in records:
            record = train_run(job, run, len(wanted), stop)
            records[run.name] = conclude(job, data, run, record)
            ranks.say(run_line(run.name, records[run.name], job.metric))
        begin += records[run.name]["steps"]
    result = make_result(config, job.task, data, records, made_of, time.monotonic() - began)
    if ranks.rank == 0:
        write_result(output, result)
    ranks.say(table(result))
    return result


def prepare(
    config: FinetuneConfig, source: Source, tokenizer: Tokenizer, made_of: dict[str, str], ranks: Ranks
) -> tuple[Job, TaskData[Any]]:
    """Reads the examples and makes samples of them; says what there is, and what is wrong with it."""
    data = read_task_data(config.task, config.data, config.samples)
    task, encoding = data.task, config.samples
    samples: dict[str, Samples] = {
        name: task.encode(examples, tokenizer, encoding)
        for name, examples in (("train", data.train), ("dev", data.dev), ("test", data.test))
        if examples
    }
    if ranks.rank == 0:
        write_config(Path(config.output), config)
        write_quarantine(Path(config.output), data.broken)
    dtype, reason = choose_precision(config.train.precision, ranks.device)
    held: dict[str, HeldOut] = {
        name: hold_out(task, examples, samples[name], config.train.micro_tokens, ranks)
        for name, examples in (("dev", data.dev), ("test", data.test))
        if examples
    }
    job = Job(
        config=config,
        source=source,
        tokenizer=tokenizer,
        task=task,
        train=samples["train"],
        repeats=None if (data.repeats == 1).all() else data.repeats,
        dev=held.get("dev"),
        test=held.get("test"),
        ranks=ranks,
        dtype=dtype,
        made_of=made_of,
        class_weights=class_weights(config, task, samples["train"]),
    )
    for line in [*banner(job, reason), *describe(data, samples, encoding.max_length)]:
        ranks.say(fold(line))
    return job, data


def banner(job: Job, reason: str) -> Iterator[str]:
    """The first lines: the model, the task, the ranks."""
    config, ranks, sizes = job.config, job.ranks, job.source.model
    precision = f"{job.dtype}".removeprefix("torch.")
    kept = "its head is kept" if job.source.keeps_head(job.task) else "a new head"
    yield (
        f"model     {sizes.preset}, {sizes.num_hidden_layers} layers of {sizes.hidden_size}, from "
        f"{job.source.folder}; {kept}; {precision} ({reason})"
    )
    outputs = f", {len(job.task.labels)} labels" if job.task.labels else ""
    choice = f"dev chooses by {job.metric}" if job.dev else "no dev examples: the last weights are taken"
    yield f"task      {job.task.kind}{outputs}; {choice}"
    yield (
        f"ranks     {ranks.world}: tensor parallel {ranks.tensor} x data parallel {ranks.data}, "
        f"ZeRO-{config.parallel.zero_stage}, on {describe_device(ranks.device)} each"
    )
    yield f"watch     tensorboard --logdir {config.output}/{TENSORBOARD}"


def conclude(job: Job, data: TaskData[Any], run: Run, record: dict[str, Any]) -> dict[str, Any]:
    """Evaluates the run's weights, which are in the engine, on dev and, this once, on test; writes its files.

    What dev says is best for the task's decisions, such as a threshold, is used for both, and goes into the
    model. Those of the first run are the output's model and predictions.
    """
    steps, task = run.begin + record["steps"], job.task
    found: dict[str, tuple[HeldOut, Found]] = {}
    if job.dev:
        dev, of_dev = job.dev, evaluate(job.engine, job.dev, steps)
        task = job.task.tuned(of_dev.figures)
        if task is not job.task:  # the same outputs, read by what they have told
            dev = replace(dev, task=task)
            of_dev = judge(dev, of_dev.logits, of_dev.figures["loss"], job.ranks)
        found["dev"] = dev, of_dev
    if job.test:
        test = replace(job.test, task=task)
        found["test"] = test, evaluate(job.engine, test, steps)
    record |= {name: each.figures for name, (_, each) in found.items()}
    if job.ranks.rank == 0:
        tables = {
            name: of_labels
            for name, (held, each) in found.items()
            if (of_labels := tables_of(task, held.examples, each.predictions))
        }
        write_outcome(job, run, record, tables)
        if run.number == 0:
            record["by_label"] = tables
            for name, (held, each) in found.items():
                write_predictions(job.output, name, held.examples, each.predictions)
            write_model(job, run, record, data, task)
        write_run(job, run, record)
    job.ranks.barrier()
    return record


# ------------------------------------------------------------------------------------------- the parts


def class_weights(config: FinetuneConfig, task: Task[Any], train: Samples) -> Tensor | None:
    """Returns the weight of each label in the loss, float32 [C] on the CPU; None where all weigh 1.

    balanced: N / (C n) for a label that n of the N targets have, as scikit-learn's `class_weight`.
    """
    given = config.model.class_weights
    if given is None:
        return None
    if task.kind not in ("classification", "multi_label", "tokens"):
        raise UserError(f"model.class_weights is for tasks with labels, and task={task.kind} has none")
    if isinstance(given, dict):
        if unknown := [label for label in given if label not in task.labels]:
            known = ", ".join(task.labels[:10])
            raise UserError(f"model.class_weights names the label {unknown[0]!r}; the labels are {known}")
        return torch.tensor([given.get(label, 1.0) for label in task.labels])
    assert train.targets is not None
    targets = torch.from_numpy(train.targets)
    if task.kind == "multi_label":
        counts = targets.sum(dim=0)
        total = float(len(targets))
    else:
        counts = torch.bincount(targets[targets >= 0], minlength=len(task.labels)).float()
        total = float(counts.sum())
    return total / (len(task.labels) * counts.clamp(min=1.0))


def fingerprint(config: FinetuneConfig, source: Source) -> dict[str, str]:
    """Returns digests of all that a result depends on: settings, encoder and examples."""
    data = config.data
    elsewhere: dict[str, Any] = {
        **dict.fromkeys(("encoder", "init", "output", "device", "parallel", "launch"), True),
        "data": {"train", "dev", "test"},
        "train": {"log_every", "save_every", "keep_checkpoints", "micro_tokens", "compile"},
    }
    settings = config.model_dump(mode="json", exclude=elsewhere)
    settings["weights"] = [file.weight for file in data.training_files]
    files = {f"train-{number}": file.path for number, file in enumerate(data.training_files)}
    files |= {name: path for name in ("dev", "test") if (path := getattr(data, name)) is not None}
    return {
        "settings": json_digest(settings),
        "encoder": _digest_of(source.folder),
        **{name: _file_digest(name, path) for name, path in files.items()},
    }


def _digest_of(folder: Path) -> str:
    table_file = folder / TABLE  # it holds the digests of a checkpoint's shards
    files: Sequence[Path] = [table_file] if table_file.exists() else weight_files(folder)
    others = [folder / "config.json", find_tokenizer(folder)]
    digests = [file_digest(file) for file in (*files, *others) if file.exists()]
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()[:32]


def _file_digest(name: str, path: str) -> str:
    try:
        return file_digest(path)
    except OSError as error:
        key = name.partition("-")[0]
        raise UserError(f"cannot read data.{key}={path}: {error.strerror or error}") from error
