"""The files of a fine-tuning's output.

result.json              figures of all runs; written last
model/                   the task model of the first seed, as transformers loads it
predictions-dev.jsonl    the examples with that model's predictions; predictions-test.jsonl likewise
quarantine.jsonl         rows that were left out, and why
runs/seed-0.json         what one run has found; a resumed fine-tuning does not make it again
checkpoints/  best/      to resume from; the weights that dev chose
metrics.jsonl  tensorboard/  config.yaml  logs/
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from bertscale.config import FinetuneConfig, UserError
from bertscale.config.table import Count, Table, check_table, read_object
from bertscale.convert.task_models import MODEL, task_shapes, write_task_model
from bertscale.files import file_digest, json_digest, whole_folder, write_bytes, write_json
from bertscale.finetune.by_label import Tables
from bertscale.finetune.card import model_card
from bertscale.finetune.loop import Job, Run, best_folder, forget_worse
from bertscale.finetune.pictures import draw_tables, labels_as_markdown
from bertscale.run_folder import BEST, CHECKPOINTS, CONFIG, METRICS, RESULT, TENSORBOARD, checkpoints
from bertscale.tasks.saved import columns_to_keep
from bertscale.tasks.task import Example, Task, TaskData
from bertscale.train.checkpoint import open_checkpoint
from bertscale.train.metrics import add_outcome

DIGEST = "digest"  # in result.json, of all the rest of it
RUNS = "runs"
QUARANTINE = "quarantine.jsonl"
WRITTEN = ("predictions-*.jsonl", QUARANTINE, f"{RUNS}/seed-*.json")  # beside what every run folder has


def make_folder(output: Path) -> None:
    """Makes the output's folder. Raises UserError where that cannot be."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise UserError(f"cannot make the folder {output}: {error.strerror}") from error


# ------------------------------------------------------------------------------------------- writing


def write_predictions(
    output: Path, name: str, examples: Sequence[Example], predictions: Sequence[dict[str, Any]]
) -> None:
    """Writes predictions-NAME.jsonl: each example's own columns, and what the model says of it."""
    lines = [
        json.dumps({**example.row, "prediction": said}, ensure_ascii=False) + "\n"
        for example, said in zip(examples, predictions, strict=True)
    ]
    write_bytes(output / f"predictions-{name}.jsonl", "".join(lines).encode("utf-8", "surrogatepass"))


def write_quarantine(output: Path, broken: Sequence[dict[str, Any]]) -> None:
    """Writes the rows that were left out, or removes the file of an earlier run where there are none."""
    path = output / QUARANTINE
    if not broken:
        path.unlink(missing_ok=True)
        return
    lines = [json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in broken]
    write_bytes(path, "".join(lines).encode("utf-8", "surrogatepass"))


def write_outcome(job: Job, run: Run, record: dict[str, Any], tables: dict[str, Tables]) -> None:
    """Shows in TensorBoard what has become of a run: figures of its best weights, tables of the labels."""
    figures = {
        f"result/{name}_{key}": value
        for name in ("dev", "test")
        for key, value in record.get(name, {}).items()
    }
    pictures = {
        f"{name}/{title}": picture
        for name, of_labels in tables.items()
        for title, picture in draw_tables(of_labels).items()
    }
    texts = {
        f"{name}/labels": labels_as_markdown(of_labels["per_label"])
        for name, of_labels in tables.items()
        if "per_label" in of_labels
    }
    folder = job.output / TENSORBOARD / run.name
    add_outcome(folder, record["best_step"], figures, pictures, texts)


def write_model(job: Job, run: Run, record: dict[str, Any], data: TaskData[Any], task: Task[Any]) -> None:
    """Writes the task model of a run from the weights of its best step; the folder is whole or absent.

    `task` decides as dev says is best.
    """
    config, source = job.config, job.source
    head, sizes = source.head(config, task), job.engine.sizes
    best = open_checkpoint(best_folder(job, run, record["best_step"]))
    first = source.first_values(task, run)  # of what was not trained
    shapes = task_shapes(sizes, source.vocab_size, head)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, shape in shapes.items():
            yield name, best.tensor(name) if name in best.parameters else first(name, list(shape))

    facts = {
        **task.facts(),
        "long_texts": config.samples.long_texts,
        "overlap": config.samples.overlap,
        "data": columns_to_keep(config.data) or None,
    }
    with whole_folder(job.output / MODEL) as partial:
        write_task_model(
            partial,
            sizes,
            source.vocab_size,
            head,
            task.labels,
            tensors(),
            job.tokenizer,
            config.samples.max_length,
            {key: value for key, value in facts.items() if value is not None},
        )
        card = model_card(job, run, record, data, task)
        (partial / "README.md").write_text(card, encoding="utf-8")


def write_run(job: Job, run: Run, record: dict[str, Any]) -> None:
    """Writes what a run has found, which makes it a finished one; then its best weights are of no more
    use."""
    folder = job.output / RUNS
    folder.mkdir(exist_ok=True)
    write_json(folder / f"{run.name}.json", {"made_of": job.made_of, **record})
    forget_worse(job, run, ())


def write_config(output: Path, config: FinetuneConfig) -> None:
    """Writes the settings, with which `bertscale finetune` goes on."""
    settings = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    write_bytes(output / CONFIG, settings.encode())


def write_result(output: Path, result: dict[str, Any]) -> None:
    """Writes, last of all, result.json with digests of the other files."""
    files = [CONFIG, *(path.name for path in sorted(output.glob("predictions-*.jsonl")))]
    files += sorted(f"{MODEL}/{path.name}" for path in (output / MODEL).iterdir())
    result["files"] = {name: file_digest(output / name) for name in files}
    result[DIGEST] = json_digest(result)
    write_json(output / RESULT, result)
    for folder in (CHECKPOINTS, BEST):  # nothing will be resumed
        shutil.rmtree(output / folder, ignore_errors=True)


# ------------------------------------------------------------------------------------------- reading


class _Result(Table):
    made_of: dict[str, str]
    files: dict[str, str]
    task: str
    metric: str
    labels: list[str]
    examples: dict[str, Count]
    majority: dict[str, dict[str, float]]
    pretrained: dict[str, Any]
    random: dict[str, Any] | None = None


class _RunRecord(Table):
    made_of: dict[str, str]
    seed: Count
    start: str
    steps: Count
    best_step: Count


def finished_result(output: Path, made_of: dict[str, str]) -> dict[str, Any] | None:
    """Returns the result of an output with the same digests whose files are all as they were written."""
    try:
        result = read_object(output / RESULT, "")
        rest = {key: value for key, value in result.items() if key != DIGEST}
        if result.get(DIGEST) != json_digest(rest):
            return None
        files = check_table(_Result, result, output / RESULT, "").files
        whole = all(file_digest(output / name) == digest for name, digest in files.items())
    except (OSError, UserError):
        return None
    return result if whole and result["made_of"] == made_of else None


def finished_runs(output: Path, made_of: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Returns the records of runs of these settings, encoder and examples that have ended, by name."""
    found = {}
    for path in sorted((output / RUNS).glob("seed-*.json")):
        try:
            record = read_object(path, "")
            check_table(_RunRecord, record, path, "")
        except (OSError, UserError):
            continue  # it is made again
        if record["made_of"] == made_of:
            found[path.stem] = {key: value for key, value in record.items() if key != "made_of"}
    first = output / MODEL
    return found if first.is_dir() else {}


def remove_other_work(output: Path, made_of: dict[str, str]) -> None:
    """Removes a finished fine-tuning, which is of other settings or damaged; keeps an unfinished one of
    these.

    Raises UserError where an unfinished one of others is there, which a person may want to go on with.
    """
    if (output / RESULT).is_file():
        (output / RESULT).unlink()  # first: it describes files that are now replaced
        (output / METRICS).unlink(missing_ok=True)
        for folder in (RUNS, BEST, CHECKPOINTS, TENSORBOARD):
            shutil.rmtree(output / folder, ignore_errors=True)
        return
    for before in _begun(output):
        if before != made_of:
            what = [name for name in sorted({*before, *made_of}) if before.get(name) != made_of.get(name)]
            raise UserError(
                f"{output} holds an unfinished fine-tuning of other {' and '.join(what)}; go on with it by "
                "its own command, choose another output, or remove the folder"
            )


def _begun(output: Path) -> Iterator[dict[str, Any]]:
    """Of what the runs and checkpoints of an unfinished fine-tuning were made."""
    for folder in checkpoints(output):
        with contextlib.suppress(UserError, KeyError, TypeError):
            yield open_checkpoint(folder).table["finetune"]["made_of"]
    for path in sorted((output / RUNS).glob("seed-*.json")):
        with contextlib.suppress(OSError, UserError, KeyError):
            yield read_object(path, "")["made_of"]
