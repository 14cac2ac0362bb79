"""What a prep is about to make, and what of it is already there.

The plan (settings, tokenizer and input files with size and modification time) lies in OUTPUT/.prep/plan.json.
Whoever prepares the whole (`bertscale prep`, or its first part, `--tokenizer-only`) may replace it and start
over; a task that builds some of the work units only compares. Each record names the plan that it was made
for, so that what a task of an earlier plan still writes while others start over is never taken for a part of
the new one.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from bertscale.config import WORK_FOLDER, PrepConfig, UserError, is_utf8
from bertscale.data.shards import MANIFEST_NAME, Shard, ShardEntry, open_dataset
from bertscale.files import HeldError, alone, write_json
from bertscale.tokenizer import TOKENIZER_NAMES, Tokenizer, load_tokenizer
from data_prep.readers.compressed import COMPRESSIONS
from data_prep.readers.encodings import other_encoding
from data_prep.readers.read import InputFile, Part, cut_into_units, find_files, read_records
from data_prep.readers.records import Record
from data_prep.words import segmenter_version

PLAN_VERSION = 2  # raise it when the same settings begin to give other bytes
QUARANTINE_NAME = "quarantine.jsonl"
LOCK_NAME = "lock"
FILES_LOOKED_AT = 1000  # for another encoding
_SAME_AGAIN = "run the same command again: it begins with the input as it then is"


@dataclass(frozen=True)
class Work:
    """Work for one process, with all it needs to know: a unit of the input, or a shard of the output."""

    config: PrepConfig
    plan: str  # digest of the plan that it belongs to

    @property
    def output(self) -> Path:
        return Path(self.config.output)

    @property
    def inner(self) -> Path:
        return self.output / WORK_FOLDER

    def check_plan(self) -> None:
        """Raises UserError if somebody has started over in the output folder since this was planned."""
        present = read_json(self.inner / "plan.json")
        if present is None or _digest(present) != self.plan:
            raise UserError(
                f"output: {self.output} was started again with other settings or input while this ran; "
                "nothing was overwritten by it. Let only one prep work there at a time"
            )

    def _record(self, path: Path, tokenizer: Tokenizer) -> dict[str, Any] | None:
        """The done record `path`, if it was written for this plan with this tokenizer."""
        record: dict[str, Any] = read_json(path) or {}
        made_for = (record.get("plan"), record.get("tokenizer_sha256"))
        return record if made_for == (self.plan, tokenizer.sha256) else None


@dataclass(frozen=True)
class Unit(Work):
    """A work unit of the first pass: some of the input."""

    number: int
    parts: list[Part]
    files: list[InputFile]  # those of the parts

    @property
    def bytes(self) -> int:
        return sum(part.bytes for part in self.parts)

    @property
    def record(self) -> Path:
        return self.inner / f"unit-{self.number:05d}.json"

    @property
    def sample(self) -> Path:
        return self.inner / f"sample-{self.number:05d}.txt"

    @property
    def bad_records(self) -> Path:
        return self.inner / f"unit-{self.number:05d}.bad.jsonl"

    def spill(self, split: str, number: int) -> Path:
        return self.inner / f"unit-{self.number:05d}-{split}-{number:03d}.spill"

    def records(self) -> Iterator[Record]:
        for part in self.parts:
            yield from read_records(part, self.config)

    def check_input(self) -> None:
        """Raises UserError if a file of this unit is not what it was when it was planned."""
        for file in self.files:
            try:
                status = os.stat(file.name)
            except OSError as error:
                raise UserError(f"input: {file.name} is gone ({error.strerror}); {_SAME_AGAIN}") from error
            if (status.st_size, status.st_mtime_ns) != (file.size, file.mtime_ns):
                raise UserError(f"input: {file.name} changed while it was read; {_SAME_AGAIN}")

    def done(self, tokenizer: Tokenizer) -> bool:
        """Whether done record and spills are there, whole, and made for this plan and tokenizer."""
        record = self._record(self.record, tokenizer)
        if record is None or "letters" not in record:  # of an earlier version
            return False
        sizes = {spill["name"]: spill["bytes"] for spill in record["spills"]}
        sizes[self.bad_records.name] = record["quarantine_bytes"]
        try:
            return all((self.inner / name).stat().st_size == size for name, size in sizes.items())
        except FileNotFoundError:
            return False


@dataclass(frozen=True)
class ShardUnit(Work):
    """Work of the second pass: shard `number` of the `count` of a split."""

    split: str
    number: int
    count: int

    @property
    def path(self) -> Path:
        return self.output / f"{self.split}-{self.number:05d}.arrow"

    @property
    def spills(self) -> Path:
        return self.inner / "spills.json"

    @property
    def record(self) -> Path:
        return self.inner / f"shard-{self.split}-{self.number:05d}.json"

    def done(self, tokenizer: Tokenizer) -> bool:
        """Whether done record and shard are there, whole, and made for this plan and tokenizer."""
        record = self._record(self.record, tokenizer)
        if record is None or record["count"] != self.count or "unknown" not in record:
            return False
        try:
            if record["shard"]:
                Shard(self.path, ShardEntry(**record["shard"]))
        except UserError:
            return False
        return True


class Plan:
    """The settings and the input as they are now; raises UserError for input that cannot be used."""

    def __init__(self, config: PrepConfig) -> None:
        self.config, self.output = config, Path(config.output)
        self.inner = self.output / WORK_FOLDER
        self.path, self.spills = self.inner / "plan.json", self.inner / "spills.json"
        self.tokenizer_record = self.inner / "tokenizer.json"
        self.trainer_log = self.inner / "tokenizer.log"
        self.files: list[InputFile] = find_files(config.input)
        settings = PrepConfig.model_validate(config.model_dump())  # a default of 0 is 0.0, as if it was given
        given = load_tokenizer(config.tokenizer, config.lowercase).sha256 if config.tokenizer else None
        self.content: dict[str, Any] = {
            "version": PLAN_VERSION,
            "settings": _that_matter(settings),
            "tokenizer": given,
            "files": [
                {"name": file.name, "size": file.size, "mtime_ns": file.mtime_ns, "named": file.named}
                for file in self.files
            ],
        }
        self.digest = _digest(self.content)

    @cached_property
    def units(self) -> list[Unit]:
        files = {file.name: file for file in self.files}
        return [
            Unit(self.config, self.digest, number, parts, [files[n] for n in {p.name: None for p in parts}])
            for number, parts in enumerate(cut_into_units(self.files, self.config))
        ]

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Raises UserError while another process prepares the whole of the output folder."""
        try:
            self.inner.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError, PermissionError) as error:
            raise UserError(f"output: cannot make the folder {self.output}: {error.strerror}") from error
        with ExitStack() as stack:
            try:
                me = f"process {os.getpid()} on {platform.node()}\n"
                stack.enter_context(alone(self.inner / LOCK_NAME, me))
            except HeldError as error:
                raise UserError(
                    f"output: another bertscale prep ({str(error) or 'just begun'}) is at work in "
                    f"{self.output}; wait until it has ended, or choose another folder"
                ) from error
            yield

    def check_space(self, needed: float, what: str) -> None:
        """Raises UserError if fewer than `needed` bytes are free in the output folder."""
        free = shutil.disk_usage(self.output).free
        if free < needed:
            raise UserError(
                f"output: {self.output} has {free / 1e9:.1f} GB free, and {what} of this input take about "
                f"{needed / 1e9:.1f} GB: free some space, or choose another folder"
            )

    def check_encoding(self, undecoded: int, records: int) -> None:
        """Raises UserError if too many of the records are no text in `encoding`: it must be another one."""
        if undecoded <= self.config.max_bad_fraction * records:
            return
        texts = [file.name for file in self.files if file.kind not in (".parquet", ".arrow")]
        found = (other_encoding(name, self.config.encoding) for name in texts[:FILES_LOOKED_AT])
        advice = next(filter(None, found), "give the encoding that they are in, such as encoding=gb18030")
        raise UserError(
            f"input: {undecoded:,} of {records:,} records are not {self.config.encoding} text; {advice}"
        )

    def text_bytes(self) -> int:
        """The input's size, compressed files counted as what is in them, roughly."""
        return sum(file.size * (3 if file.name.endswith(COMPRESSIONS) else 1) for file in self.files)

    def begin(self) -> None:
        """Makes this the output folder's plan, and removes what an earlier run with another one left."""
        given = self.config.tokenizer
        if given and Path(given).resolve() in [
            (self.output / name).resolve() for name in ("", *TOKENIZER_NAMES)
        ]:
            raise UserError(f"tokenizer: {given} is prep's own output; copy it to another place first")
        old = read_json(self.path)
        if old is not None and _digest(old) == self.digest:
            return
        outputs = (MANIFEST_NAME, *TOKENIZER_NAMES, QUARANTINE_NAME)
        stale = [*(self.output / name for name in outputs), *_shards(self.output)]
        if old is not None:
            change = f"{self._difference(old)} changed since the last run into {self.output}"
            print(f"prep: {change}: starting over")
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
        to_stay = (self.path.name, LOCK_NAME)
        records = [f for f in self.inner.iterdir() if f.name not in to_stay and ".tmp-" not in f.name]
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
        before, now = old.get("settings", {}), self.content["settings"]
        for key in {**now, **before}:
            if before.get(key) != now.get(key):
                return f"the setting {key}"
        return "the input" if old.get("files") != self.content["files"] else "the tokenizer or bertscale"

    def check_input(self) -> None:
        """Raises UserError if an input file is not what it was when this plan was made."""
        if find_files(self.config.input) != self.files:
            raise UserError(f"input: a file changed while it was read; {_SAME_AGAIN}")

    def finished(self) -> dict[str, Any] | None:
        """The manifest, if every file it names is there in full size."""
        try:
            open_dataset(self.output, "validation")
            return open_dataset(self.output, "train").manifest
        except UserError:
            return None

    def remove_leftovers(self, units: list[Unit]) -> None:
        """Removes what killed workers left half-written of `units`; what belongs to others may be alive."""
        stems = {unit.record.stem for unit in units}
        for leftover in self.inner.glob("unit-*.tmp-*"):
            if re.split(r"[.-]\D", leftover.name)[0] in stems:
                leftover.unlink(missing_ok=True)

    def remove_all_but(self, names: set[str]) -> None:
        """Removes all half-written files, and shards that are not in `names`: nobody has more to write."""
        half_written = [*self.output.glob("*.tmp-*"), *self.inner.glob("*.tmp-*")]
        for file in [*half_written, *_shards(self.output)]:
            if file.name not in names:
                file.unlink(missing_ok=True)

    def remove_spills(self) -> None:
        """Removes the first pass's files, when the manifest says that nobody needs them any more."""
        for pattern in ("unit-*.spill", "unit-*.bad.jsonl"):
            for file in self.inner.glob(pattern):
                file.unlink(missing_ok=True)


def _that_matter(settings: PrepConfig) -> dict[str, Any]:
    """The settings on which the bytes depend; one without a new key is that of an earlier version."""
    values = settings.model_dump(exclude={"output", "workers", "max_bad_fraction"})
    if is_utf8(values["encoding"]):
        del values["encoding"]
    values["train_tokenizer"]["model"] = settings.tokenizer_model
    if settings.train_tokenizer.extend_to is None:
        del values["train_tokenizer"]["extend_to"]
    if not settings.is_spaced:
        values["train_tokenizer"]["space_before_text"] = False
    if values.pop("words"):
        values["words"] = segmenter_version()
    return values


def no_tokenizer(output: Path) -> str:
    """What to tell a person who asks for some of the work units too early."""
    return (
        f"output: {output} has no finished tokenizer, which every task needs: "
        "run `bertscale prep CONFIG --tokenizer-only` first, with the same settings"
    )


def read_json(path: Path) -> Any:
    """The object in `path`; None where there is no whole one."""
    try:
        content = json.loads(path.read_bytes())
    except (FileNotFoundError, IsADirectoryError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _shards(output: Path) -> list[Path]:
    return [*output.glob("train-*.arrow"), *output.glob("validation-*.arrow")]


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
