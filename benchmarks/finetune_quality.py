"""What fine-tuned models score on dev: ours, from random and pretrained weights, and transformers' Trainer's.

    python benchmarks/finetune_quality.py configs/finetune/*.yaml --json FILE.json --markdown FILE.md
    python benchmarks/finetune_quality.py configs/finetune/{sst2,imdb}.yaml --steps 100 --seeds 3 \
        --train-examples 4000 --dev-examples 500 encoder=runs/english/pretrain --json FILE.json

Each config is fine-tuned by `bertscale finetune` and by transformers' Trainer (`pip install accelerate`),
which starts from the encoder as `bertscale convert` exports it, with the same examples, samples, batches a
step, steps, optimizer, schedule, dropout and float32, for each of the seeds; the order of examples and the
first weights of the head are each side's own (see trainer.py for the losses). The figure is that of the last
step. Words of the form `key=value` change all configs. For classification, regression, tokens and questions.

`--train-examples` and `--dev-examples` take so many of a set's, by a draw that is the same on all sides and
for all seeds. The file of `--json` is written after each config; the same command goes on with those that it
lacks, and other configs or settings can be added to it. The table has all that are in the file.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from trainer import check_comparable, train

from bertscale.bench.machine import processor
from bertscale.config import FinetuneConfig, UserError, load_config
from bertscale.config.section import check_config
from bertscale.examples.read import read_task_data
from bertscale.files import write_bytes, write_json
from bertscale.finetune.finetune import fingerprint
from bertscale.finetune.start import open_source
from bertscale.run_folder import TABLE
from bertscale.tasks.task import QuestionExample, TaskData, TextExample, TokenExample
from bertscale.tasks.tokens import TokenTask

Result = dict[str, Any]
LEFT_OUT = "quickstart"  # its examples are made by `bertscale quickstart`
HEADER = ("set", "figure", "most frequent", "random weights", "pretrained", "Trainer, pretrained")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("configs", nargs="+", help="Fine-tuning configs, and key=value for all of them.")
    parser.add_argument("--steps", type=int, default=150, help="Training steps of each run (%(default)s).")
    parser.add_argument("--seeds", type=int, default=3, help="Runs of each side (%(default)s).")
    parser.add_argument("--train-examples", type=int, help="At most so many training examples of a set.")
    parser.add_argument("--dev-examples", type=int, help="At most so many dev examples of a set.")
    parser.add_argument("--json", type=Path, help="File for the results, and of those that are not repeated.")
    parser.add_argument("--markdown", type=Path, help="File for the table.")
    options = parser.parse_intermixed_args()
    if not importlib.util.find_spec("accelerate"):
        raise SystemExit("error: transformers' Trainer needs accelerate: pip install accelerate")
    for file in (options.json, options.markdown):
        if file and not file.parent.is_dir():
            raise SystemExit(f"error: {file}: there is no folder {file.parent}; make it")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leaves no files behind
    overrides = [word for word in options.configs if "=" in word]
    paths = [Path(word) for word in options.configs if "=" not in word and Path(word).stem != LEFT_OUT]
    machine = f"{processor()}, {torch.get_num_threads()} thread(s)"
    results: list[Result] = []
    if options.json and options.json.exists():
        results = json.loads(options.json.read_text(encoding="utf-8"))["results"]
    failed = []
    for path in paths:
        try:
            result = compare(path, overrides, options, results)
        except UserError as error:  # of one set: the others are compared all the same
            failed.append(f"error: {path}: {error}")
            print(failed[-1], flush=True)
            continue
        results = [other for other in results if other["set"] != result["set"]] + [result]
        if options.json:
            write_json(options.json, {"machine": machine, "results": results})
    table = markdown(results)
    print(f"\n{machine}; mean ± standard deviation of dev\n\n{table}")
    if options.markdown:
        write_bytes(options.markdown, table.encode())
    for line in failed:
        print(line, file=sys.stderr)
    return 1 if failed else 0


# ------------------------------------------------------------------------------------------- one config


def compare(
    path: Path, overrides: Sequence[str], options: argparse.Namespace, known: Sequence[Result]
) -> Result:
    """Fine-tunes one config on both sides, unless `known` has it; returns the figures of each seed."""
    name, steps, seeds = path.stem, options.steps, range(options.seeds)
    with tempfile.TemporaryDirectory() as place:
        words = [
            *overrides,
            f"output={place}/ours",
            *("train.epochs=null", f"train.steps={steps}", f"train.eval_every={steps}"),
            *(f"train.seeds={list(seeds)}", "train.compare_random=true", "train.precision=float32"),
            *("train.patience=null", f"train.log_every={steps}"),
        ]
        given = load_config(FinetuneConfig, path, words)
        check_comparable(given)
        source = open_source(given)
        if given.task == "question_answering" and source.model.preset != "modern":
            # Their class has no dropout in this head.
            given = load_config(FinetuneConfig, path, [*words, "model.classifier_dropout=0"])
        config = with_files(given, Path(place), options.train_examples, options.dev_examples)
        made_of = fingerprint(config, source)
        for other in known:
            if (other["set"], other["made_of"]) == (name, made_of):
                print(f"{name}: its figures are there", flush=True)
                return other
        data = read_task_data(config.task, config.data, config.samples)
        ours = train_ours(config, Path(place), name)
        metric = ours["metric"]
        exported = export(source.folder, Path(place))
        theirs = []
        for seed in seeds:
            began = time.monotonic()
            theirs.append(train(config, exported, data, seed, steps)[metric])
            seconds = time.monotonic() - began
            print(f"{name}: Trainer, seed {seed}: {metric} {theirs[-1]:.4f}, {seconds:.0f} s", flush=True)
        return {
            "set": name,
            "metric": metric,
            "majority": majority(data, metric),
            "random": [run["dev"][metric] for run in ours["random"]["runs"]],
            "pretrained": [run["dev"][metric] for run in ours["pretrained"]["runs"]],
            "trainer": theirs,
            "steps": steps,
            "batch": config.train.global_batch,
            "examples": {"train": len(data.train), "dev": len(data.dev)},
            "made_of": made_of,
        }


def train_ours(config: FinetuneConfig, place: Path, name: str) -> dict[str, Any]:
    """Runs `bertscale finetune` and says what each run has found; returns its result.json."""
    settings = place / "config.yaml"
    settings.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), encoding="utf-8")
    command = [sys.executable, "-m", "bertscale", "finetune", str(settings)]
    began = time.monotonic()
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if line.startswith("seed-"):
                    found = line.partition(" (")[0].strip()
                    print(f"{name}: ours, {found}, {time.monotonic() - began:.0f} s", flush=True)
                    began = time.monotonic()
        except BaseException:
            process.terminate()  # a signal stops it too
            raise
        if process.wait():
            errors.seek(0)
            said = errors.read().strip().splitlines() or [f"ended with code {process.returncode}"]
            raise UserError(f"bertscale finetune: {said[-1]}")
    result: dict[str, Any] = json.loads((place / "ours/result.json").read_text(encoding="utf-8"))
    return result


def export(folder: Path, place: Path) -> Path:
    """The encoder in `folder`, a checkpoint or already one of transformers, as a folder of transformers."""
    if not (folder / TABLE).exists():
        return folder
    exported = place / "exported"
    command = [sys.executable, "-m", "bertscale", "convert", str(folder), str(exported), "--no-show"]
    subprocess.run(command, check=True, capture_output=True)
    return exported


def majority(data: TaskData[Any], metric: str) -> float:
    """The figure of one answer for all dev examples: the most frequent; of questions, that there is none."""
    if data.task.kind == "question_answering":
        silence = {"answer": "", "no_answer_score": 0.0}
        return data.task.score(data.dev, [silence] * len(data.dev))[metric]
    return data.task.majority(data.train, data.dev).get(metric, 0.0)


# --------------------------------------------------------------------------------------------- examples


def with_files(
    config: FinetuneConfig, place: Path, train_examples: int | None, dev_examples: int | None
) -> FinetuneConfig:
    """Writes the training and dev examples anew, at most so many; returns the config that reads them.

    Labels are those of all training examples. Test examples are left out.
    """
    data = read_task_data(config.task, config.data, config.samples)
    if (data.repeats != 1).any():
        raise UserError("data.train has weights, which the Trainer does not know; take them out")
    if not data.dev:
        raise UserError("no dev examples; give data.dev or data.dev_share")
    sets = {"train": drawn(data.train, train_examples), "dev": drawn(data.dev, dev_examples)}
    values = config.model_dump(mode="json")
    values["data"] = {"labels": data.task.labels or None}
    if isinstance(data.task, TokenTask):
        values["samples"]["tag_scheme"] = data.task.scheme
    if isinstance(data.train[0], TextExample) and len(data.train[0].texts) == 2:
        values["data"]["text_pair"] = "text_pair"
    for name, examples in sets.items():
        file = place / f"{name}.jsonl"
        lines = [json.dumps(row_of(example), ensure_ascii=False) + "\n" for example in examples]
        file.write_text("".join(lines), encoding="utf-8")
        values["data"][name] = str(file)
    written = check_config(FinetuneConfig, values, "")
    again = read_task_data(written.task, written.data, written.samples)
    for name, examples in (("train", again.train), ("dev", again.dev)):
        if [(row_of(one), one.content) for one in examples] != [(row_of(o), o.content) for o in sets[name]]:
            raise UserError(f"the {name} examples are not the same when they are written as jsonl")
    return written


def drawn(examples: Sequence[Any], count: int | None) -> list[Any]:
    """At most `count` of the examples, in their order."""
    if count is None or count >= len(examples):
        return list(examples)
    chosen = np.random.default_rng(0).permutation(len(examples))[:count]
    return [examples[number] for number in sorted(chosen.tolist())]


def row_of(example: TextExample | TokenExample | QuestionExample) -> dict[str, Any]:
    """The example as a row of jsonl, under the names that a config has by default."""
    if isinstance(example, TokenExample):
        return {"tokens": [example.text[begin:end] for begin, end in example.words], "tags": example.tags}
    if isinstance(example, QuestionExample):
        answers = {
            "text": [text for text, _ in example.answers],
            "answer_start": [begin for _, begin in example.answers],
        }
        asked = {"id": example.identity, "question": example.question, "context": example.context}
        return {**asked, "answers": answers}
    return {**dict(zip(("text", "text_pair"), example.texts, strict=False)), "label": example.target}


# ------------------------------------------------------------------------------------------------ table


def markdown(results: Sequence[Result]) -> str:
    """The table, and below it how long the runs were and how many training examples each set had."""
    rows = [[*HEADER, "within the Trainer's spread?"], ["---"] * (len(HEADER) + 1)]
    for result in results:
        cells = [cell(result[side]) for side in ("random", "pretrained", "trainer")]
        verdict = within(result["pretrained"], result["trainer"])
        rows.append([result["set"], result["metric"], f"{result['majority']:.3f}", *cells, verdict])
    lines = [f"| {' | '.join(row)} |" for row in rows]
    lengths: dict[str, list[str]] = {}
    for result in results:
        of = f"Seeds: {len(result['trainer'])}; {result['steps']} steps of {result['batch']} samples"
        lengths.setdefault(of, []).append(f"{result['set']} {result['examples']['train']:,}")
    notes = [f"{of}; training examples: {', '.join(sets)}." for of, sets in lengths.items()]
    return "\n".join([*lines, "", *notes]) + "\n"


def cell(values: Sequence[float]) -> str:
    """Mean and sample standard deviation."""
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


def within(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Whether the mean of ours lies between the least and the largest figure of theirs.

    Where it does not, how far it is from the nearest of them, and t: the difference of the means by its
    standard error (Welch), which of two sides alike is above 2 or below -2 now and then.
    """
    mean, least, largest = statistics.mean(ours), min(theirs), max(theirs)
    if least - 1e-9 <= mean <= largest + 1e-9:
        return "yes"
    said = f"{mean - largest:.3f} above" if mean > largest else f"{least - mean:.3f} below"
    if len(ours) < 2 or len(theirs) < 2:
        return said
    error = (statistics.variance(ours) / len(ours) + statistics.variance(theirs) / len(theirs)) ** 0.5
    return f"{said} (t = {(mean - statistics.mean(theirs)) / error:.1f})" if error else said


if __name__ == "__main__":
    raise SystemExit(main())
