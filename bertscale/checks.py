"""Checks that a command makes before its work begins: its place in a prep array, digests, a fair comparison.

Used by `bertscale.cli` alone.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bertscale.errors import UserError

if TYPE_CHECKING:
    import argparse

    from bertscale.config import FinetuneConfig, GlueConfig, PretrainConfig


def array_task(index: int | None, count: int | None) -> tuple[int, int] | None:
    """Returns (task index, number of tasks), from the options or else from the Slurm array of this process.

    None where there is neither: one process then does all the work. Raises UserError for half of an answer.
    """
    env = os.environ
    where = "--task-index"
    if index is None and "SLURM_ARRAY_TASK_ID" in env and "SLURM_ARRAY_TASK_MIN" in env:
        index, where = int(env["SLURM_ARRAY_TASK_ID"]), "SLURM_ARRAY_TASK_ID"
        if count is None:  # with a count, only some of its tasks may have been queued again
            index, where = index - int(env["SLURM_ARRAY_TASK_MIN"]), f"{where} - SLURM_ARRAY_TASK_MIN"
    if count is None and "SLURM_ARRAY_TASK_COUNT" in env:
        count = int(env["SLURM_ARRAY_TASK_COUNT"])
    if index is None and count is None:
        return None
    if index is None or count is None:
        missing = "--task-index" if index is None else "--task-count"
        raise UserError(f"one task of several needs --task-index and --task-count: {missing} is missing")
    if not 0 <= index < count:
        raise UserError(
            f"{where} is {index} of {count} tasks: they are numbered from 0 to {count - 1}, without gaps"
        )
    return index, count


def verify_digests(folder: str) -> None:
    """Compares all files of a prepared folder with the sizes and digests of its manifest."""
    from bertscale.data.manifest import Split
    from bertscale.data.shards import open_dataset

    splits: tuple[Split, ...] = ("train", "validation")
    for split in splits:
        data = open_dataset(folder, split, verify=True)
        size = sum(shard.entry.bytes for shard in data.shards)
        print(
            f"{folder}: {split}: {len(data.shards)} shards, {size:,} bytes, "
            f"{data.num_documents:,} documents, {data.num_tokens:,} tokens: sizes and digests match"
        )


def check_comparison(config: PretrainConfig, count: int) -> None:
    """Refuses a config that the class of transformers, which runs on one rank, cannot be compared with."""
    if count > 1:
        raise UserError(
            f"--against transformers compares on one rank, but this config starts {count}; add "
            "parallel.tensor=1 parallel.ranks=1"
        )
    if config.model.generator or not config.objectives.mlm:
        raise UserError(
            "--against transformers compares masked tokens and sentence pairs, nothing else; add "
            "model.generator_size=null objectives.mlm=1 objectives.clm=0"
        )


def check_init(config: PretrainConfig, made: Sequence[Path]) -> None:
    """Refuses a source that is missing, unless it is one of the runs `made` before, or the run has a
    checkpoint that it goes on from."""
    from bertscale.run_folder import checkpoints

    if config.init is None or Path(config.init.source) in made or checkpoints(Path(config.run)):
        return
    if not os.path.isdir(config.init.source):
        raise UserError(
            f"init.from={config.init.source}: there is no such folder; give a run, a checkpoint, or a "
            "Hugging Face folder; nothing is downloaded"
        )


def check_tasks(config: PretrainConfig) -> None:
    """Refuses tasks whose configs are wrong, whose files are missing, or that do not fit the encoder."""
    from bertscale.config import load_tasks

    for name, task in load_tasks(config).items():
        try:
            _check_files(task)
            if config.init is None:  # else the encoder is not known yet
                task.check_encoder(config.model)
        except UserError as error:
            raise UserError(f"train.tasks: {name}: {error}") from error


def check_examples(config: FinetuneConfig) -> None:
    """Refuses a fine-tuning whose files or encoder are missing, before anything is imported for it."""
    _check_files(config)
    if not os.path.isdir(config.source):
        key = "encoder" if config.encoder else "init"
        raise UserError(
            f"{key}={config.source}: there is no such folder; give a run, a checkpoint, or a model's folder"
        )


def check_glue(config: GlueConfig) -> None:
    """Refuses a model or a folder of tasks that is missing, before anything is imported for it."""
    for key, path in (("MODEL", config.model), ("FOLDER", config.folder)):
        if not os.path.isdir(path):
            raise UserError(f"{key} {path}: there is no such folder")


def check_predictions(options: argparse.Namespace) -> None:
    """Refuses options of `bertscale predict` that do not go together, and files and folders that are missing,
    before anything is imported."""
    if (options.text is None) == (options.input is None):
        both = "both were given" if options.input else "neither was given"
        raise UserError(f"give --input FILE or --text TEXT, one of the two; {both}")
    if options.text is None and options.text_pair is not None:
        raise UserError("--text-pair goes with --text; for a file, text_pair=COLUMN names its column")
    if options.text is not None:
        given = {"--output": options.output, "--score": options.score, "key=value": options.overrides}
        if names := [name for name, value in given.items() if value]:
            raise UserError(f"{' and '.join(names)} go with --input FILE, not with --text")
    if not os.path.isdir(options.model):
        raise UserError(f"MODEL {options.model}: there is no such folder; nothing is downloaded")
    if options.input is not None and not os.path.isfile(options.input):
        raise UserError(f"--input {options.input}: there is no such file")
    if options.output is not None:
        _check_output(options.output, options.input)


def _check_output(output: Path, given: str) -> None:
    if output.is_dir():
        raise UserError(f"--output {output} is a folder; give the name of a file")
    if not output.parent.is_dir():
        raise UserError(f"--output {output}: there is no folder {output.parent}")
    if output.exists() and os.path.samefile(output, given):
        raise UserError(f"--output {output} would take the place of the input; give another name")


def _check_files(config: FinetuneConfig) -> None:
    data = config.data
    files = [("data.train", file.path) for file in data.training_files]
    files += [(f"data.{name}", path) for name in ("dev", "test") if (path := getattr(data, name)) is not None]
    for key, path in files:
        if not os.path.isfile(path):
            raise UserError(f"{key}={path}: there is no such file")
