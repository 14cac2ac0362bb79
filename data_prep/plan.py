"""What a prep is about to make, and what of it is already there.

The plan (settings, tokenizer and input files with size and modification time) lies in OUTPUT/.prep/plan.json.
Whoever prepares the whole (`bertscale prep`, or its first part, `--tokenizer-only`) may replace it and start
over; a task that builds a share of the splits only compares. Each record names the plan that it was made for,
so that what a task of an earlier plan still writes while others start over is never taken for a piece of the
new one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from bertscale.config import PrepConfig, UserError
from bertscale.shards import MANIFEST_NAME, TOKENIZER_NAME, Shard, ShardEntry, open_dataset, write_json
from bertscale.tokenizer import Tokenizer
from data_prep.read import Bad, InputFile, Part, cut_into_splits, find_files, read_records

PLAN_VERSION = 1  # raise it when the same settings begin to give other bytes


@dataclass(frozen=True)
class Unit:
    """One split: the unit of work, with all that its worker needs to know."""

    number: int
    parts: list[Part]
    config: PrepConfig
    plan: str  # digest of the plan that it belongs to

    @property
    def output(self) -> Path:
        return Path(self.config.output)

    @property
    def bytes(self) -> int:
        return sum(part.end - part.start for part in self.parts)

    @property
    def record(self) -> Path:
        return self.output / ".prep" / f"split-{self.number:05d}.json"

    @property
    def sample(self) -> Path:
        return self.output / ".prep" / f"sample-{self.number:05d}.txt"

    def shard(self, split: str) -> Path:
        return self.output / f"{split}-{self.number:05d}.arrow"

    def records(self) -> Iterator[str | Bad]:
        for part in self.parts:
            yield from read_records(part, self.config.text_field)

    def check_plan(self) -> None:
        """Raises UserError if somebody has started over in the output folder since this unit was planned."""
        found = read_json(self.output / ".prep" / "plan.json")
        if found is None or _digest(found) != self.plan:
            raise UserError(
                f"output: {self.output} was begun anew with other settings or input while this ran; "
                "nothing was overwritten by it. Let only one prep work there at a time"
            )

    def is_done(self, tokenizer: Tokenizer) -> bool:
        """Whether the record and the shards are there, whole, and made for this plan with this tokenizer."""
        record = read_json(self.record)
        if record is None or (record.get("plan"), record["tokenizer_sha256"]) != (
            self.plan,
            tokenizer.sha256,
        ):
            return False
        try:
            for entry in record["shards"]:
                Shard(self.output / entry["name"], ShardEntry(**entry))
        except UserError:
            return False
        return True


class Plan:
    """The settings and the input as they are now; raises UserError for input that cannot be used."""

    def __init__(self, config: PrepConfig) -> None:
        self.config, self.output = config, Path(config.output)
        self.files: list[InputFile] = find_files(config.input)
        self.content: dict[str, Any] = {
            "version": PLAN_VERSION,
            "settings": config.model_dump(exclude={"output", "workers", "max_bad_fraction"}),
            "tokenizer": Tokenizer.load(config.tokenizer).sha256 if config.tokenizer else None,
            "files": [dataclasses.asdict(file) for file in self.files],
        }
        self.digest = _digest(self.content)

    @cached_property
    def units(self) -> list[Unit]:
        splits = cut_into_splits(self.files, self.config.split_bytes)
        return [Unit(number, parts, self.config, self.digest) for number, parts in enumerate(splits)]

    @property
    def path(self) -> Path:
        return self.output / ".prep" / "plan.json"

    def begin(self) -> None:
        """Makes this the output folder's plan, and removes the pieces of an earlier run with another one."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError, PermissionError) as error:
            raise UserError(f"output: cannot make the folder {self.output}: {error.strerror}") from error
        given = self.config.tokenizer
        if given and Path(given).resolve() == (self.output / TOKENIZER_NAME).resolve():
            raise UserError(f"tokenizer: {given} is prep's own output; copy it to another place first")
        old = read_json(self.path)
        if old is not None and _digest(old) == self.digest:
            return
        stale = [self.output / MANIFEST_NAME, self.output / TOKENIZER_NAME, *_shards(self.output)]
        if old is not None:
            print(
                f"prep: {self._difference(old)} changed since the last run into {self.output}: starting over"
            )
        elif foreign := [file.name for file in stale if file.exists()]:
            raise UserError(
                f"output: {self.output} holds {foreign[0]}, which this prep did not write and would replace; "
                "choose another folder, or empty this one"
            )
        # The new plan first: a task of the old one, which may still live, sees it before it misses a file and
        # ends with a sentence. All records name their plan, so nothing that a kill leaves here is believed;
        # what is half-written stays, to be removed at the end.
        (self.output / MANIFEST_NAME).unlink(missing_ok=True)
        write_json(self.path, self.content)
        records = [f for f in self.path.parent.iterdir() if f != self.path and ".tmp-" not in f.name]
        for file in [*stale, *records]:
            file.unlink(missing_ok=True)

    def join(self) -> None:
        """Raises UserError unless the output folder is being prepared by this same plan; changes nothing."""
        old = read_json(self.path)
        if old is None:
            raise UserError(no_tokenizer(self.output))
        if _digest(old) != self.digest:
            raise UserError(
                f"output: {self.output} is being prepared by another plan: {self._difference(old)} is not "
                "the same here. Use the same settings and input, or end its other tasks and begin again with "
                "--tokenizer-only"
            )

    def _difference(self, old: dict[str, Any]) -> str:
        for key, value in self.content["settings"].items():
            if old.get("settings", {}).get(key) != value:
                return f"the setting {key}"
        return "the input" if old.get("files") != self.content["files"] else "the tokenizer or bertscale"

    def check_input(self) -> None:
        """Raises UserError if an input file is not what it was when this plan was made."""
        if find_files(self.config.input) != self.files:
            raise UserError("input: a file changed while it was read; run the same command again")

    def finished(self) -> dict[str, Any] | None:
        """The manifest, if every file it names is there in full size."""
        try:
            open_dataset(self.output, "validation")
            return open_dataset(self.output, "train").manifest
        except UserError:
            return None

    def remove_leftovers(self, units: list[Unit]) -> None:
        """Removes what killed workers left half-written of `units`; what belongs to others may be alive."""
        own = {path.name for u in units for path in (u.record, u.shard("train"), u.shard("validation"))}
        for leftover in self._half_written():
            if leftover.name.rpartition(".tmp-")[0] in own:
                leftover.unlink(missing_ok=True)

    def remove_all_but(self, names: set[str]) -> None:
        """Removes all half-written files, and shards that are not in `names`: nobody has more to write."""
        for file in [*self._half_written(), *_shards(self.output)]:
            if file.name not in names:
                file.unlink(missing_ok=True)

    def _half_written(self) -> list[Path]:
        return [*self.output.glob("*.tmp-*"), *self.path.parent.glob("*.tmp-*")]


def no_tokenizer(output: Path) -> str:
    """What to tell a person who asks for a share of the splits too early."""
    return (
        f"output: {output} has no finished tokenizer, which every share of the splits needs: "
        "run `bertscale prep CONFIG --tokenizer-only` first, with the same settings"
    )


def read_json(path: Path) -> Any:
    """The content of `path`; None where there is no whole file."""
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None


def _shards(output: Path) -> list[Path]:
    return [*output.glob("train-*.arrow"), *output.glob("validation-*.arrow")]


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
