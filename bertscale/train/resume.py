"""Which checkpoint a run resumes from, and whether it may."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bertscale.config import ObjectivesConfig, PretrainConfig, SamplesConfig, UserError
from bertscale.data.mixture import data_digest
from bertscale.data.shards import Dataset
from bertscale.run_folder import BEST, CHECKPOINTS, CONFIG, METRICS, RESULT, checkpoints
from bertscale.train.checkpoint import Checkpoint, open_checkpoint
from bertscale.train.parallel import Ranks
from bertscale.train.schedule import TrainingSchedule


def remove_leftovers(run: Path, others: Sequence[str] = ()) -> None:
    """Removes what a killed attempt has left half-written; only where the run's lock is held.

    `others` are names of further files that the run writes, as patterns of a glob.
    """
    for parent in (CHECKPOINTS, BEST):
        for folder in (run / parent).glob(".*step-*.partial"):
            if re.fullmatch(r"\.([\w-]+-)?step-[0-9]+\.partial", folder.name):
                shutil.rmtree(folder, ignore_errors=True)
    for name in (CONFIG, METRICS, RESULT, *others):
        for file in run.glob(f"{name}.tmp-*"):
            if file.name.rpartition(".tmp-")[2].isdigit():
                file.unlink(missing_ok=True)


def newest_sound(run: Path, ranks: Ranks) -> Checkpoint | None:
    """The newest checkpoint whose digests are right, or None; names each damaged one and skips it.

    Raises UserError where all are damaged. All ranks must call: each verifies its part of the files.
    """
    folders = ranks.broadcast([str(folder) for folder in checkpoints(run)])
    for folder in reversed(folders):
        found = open_sound(Path(folder), ranks)
        if isinstance(found, Checkpoint):
            return found
        ranks.say(f"{found} (trying the one before it)")
    if folders:
        raise UserError(f"every checkpoint of {run} is damaged; remove {run} to start again")
    return None


def open_sound(folder: Path, ranks: Ranks) -> Checkpoint | str:
    """Returns the checkpoint of `folder` if its digests are right, else what is wrong with it.

    All ranks must call: each looks for its part of the files and verifies it.
    """
    failure: str | None = None
    try:
        checkpoint = open_checkpoint(folder, ranks.rank, ranks.world)
        checkpoint.verify(ranks.rank, ranks.world)
    except UserError as error:
        failure = str(error)
    failures = [text for text in ranks.gather(failure) if text]
    return failures[0] if failures else checkpoint


def check_same_run(
    checkpoint: Checkpoint, config: PretrainConfig, data: list[Dataset], schedule: TrainingSchedule
) -> None:
    """Raises UserError where the data is another, or a setting that gives the steps so far their meaning."""
    if checkpoint.table["data_digest"] != data_digest(data, config.corpora):
        raise UserError(
            f"{', '.join(corpus.path for corpus in config.corpora)} is not the data that "
            f"{checkpoint.folder} was trained on (the digest of manifests and weights differs); choose "
            "another run folder"
        )
    before, now = checkpoint.table["config"], config.model_dump(mode="json")
    # The config of an older version lacks newer keys.
    before = {**before, "model": checkpoint.model.model_dump(mode="json")}
    before["train"] = {"batch_warmup": [], **before["train"]}
    if before.get("init") != now["init"]:
        raise UserError(
            f"init={now['init']}, but {checkpoint.folder} is of a run that was started with "
            f"{before.get('init')}; choose another run folder or give the old value"
        )
    before["samples"] = SamplesConfig.model_validate(before["samples"]).model_dump(mode="json")
    before["objectives"] = ObjectivesConfig.model_validate(before.get("objectives", {})).model_dump()
    for section, key in [
        *(("model", key) for key in now["model"] if "dropout" not in key),
        *(("samples", key) for key in now["samples"]),
        *(("objectives", key) for key in now["objectives"]),
        ("train", "global_batch"),
        ("train", "batch_warmup"),
        ("train", "seed"),
        *(("train", budget) for budget in ("steps", "tokens") if config.is_limited),
    ]:
        if before[section].get(key) != now[section][key]:
            raise UserError(
                f"{section}.{key}={now[section][key]!r}, but {checkpoint.folder} was trained with "
                f"{before[section].get(key)!r}; choose another run folder or give the old value"
            )
    expected = schedule.batch(checkpoint.step)[0]
    if checkpoint.samples_consumed != expected:
        raise UserError(
            f"{checkpoint.folder} consumed {checkpoint.samples_consumed:,} samples in {checkpoint.step:,} "
            f"steps, this config consumes {expected:,} (train.batch_warmup); choose another run folder"
        )


def changed_settings(checkpoint: Checkpoint, config: PretrainConfig) -> list[str]:
    """Lists the settings of the network, the optimizer, the training and the ranks that a resume changes."""
    sections = ("model", "optimizer", "train", "parallel")
    rows = settings_that_differ(checkpoint.table["config"], config.model_dump(mode="json"), sections)
    return [f"changed   {key}: {there} -> {here}" for key, there, here in rows]


def settings_that_differ(
    before: dict[str, Any], now: dict[str, Any], sections: Iterable[str]
) -> list[tuple[str, Any, Any]]:
    """The (key, value before, value now) of settings in these sections that two dumped configs have
    otherwise; the config of an older version lacks newer keys, which do not count."""
    rows = []
    for section in sections:
        there, here = before[section], now[section]
        if isinstance(there, dict) and isinstance(here, dict):
            rows += [
                (f"{section}.{key}", there[key], value)
                for key, value in here.items()
                if there.get(key, value) != value
            ]
        elif there != here:
            rows.append((section, there, here))
    return rows
