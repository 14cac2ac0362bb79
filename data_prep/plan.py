"""What a prep is about to make, and what of it is already there.

The plan (settings, tokenizer and input files with size and digest) lies in OUTPUT/.prep/plan.json. Work of
another plan is never removed unless it is said (`replace`): a finished data set then stays until the new one,
made in OUTPUT/.replacement, takes its place; unfinished work is removed at once. Only who prepares the whole
(`bertscale prep`, or its first part, `--tokenizer-only`) may do so; a task that builds some of the work units
only compares. Each record names the plan that it was made for, so that what a task of an earlier plan still
writes while others start over is never taken for a part of the new one.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from bertscale.config import WORK_FOLDER, PrepConfig, UserError, is_utf8
from bertscale.data.shards import MANIFEST_NAME, Shard, ShardEntry, open_dataset
from bertscale.files import HeldError, alone, file_digest, sync, whole_file, write_json
from bertscale.tokenizer import TOKENIZER_NAMES, Tokenizer, load_tokenizer
from data_prep.readers.compressed import COMPRESSIONS
from data_prep.readers.encodings import other_encoding
from data_prep.readers.read import UNPACKED, InputFile, Part, cut_into_units, find_files, read_records
from data_prep.readers.records import Record, printable
from data_prep.words import segmenter_version

PLAN_VERSION = 3  # raise it when the same settings begin to give other bytes
NEAR_NAME = "near-duplicates"  # numbers of documents, uint64
QUARANTINE_NAME = "quarantine.jsonl"
LOCK_NAME = "lock"
DIGESTS_NAME = "inputs.json"  # the digest of each input file, and the size and time that it had then
REPLACEMENT = ".replacement"  # in the output folder: the data set that will take its place
DIFFERENCES_SHOWN = 8
# Settings that earlier versions did not have: where they are the default, none is kept.
LATER_KEYS = ("csv", "wrapped", "quality", "mask", "near_duplicates", "decontaminate", "decontaminate_words")
FILES_LOOKED_AT = 1000  # for another encoding
DIGEST_THREADS = 8
SAID_FROM = 2**30  # bytes of input whose digests take so long that a line says so
_OLD = "time "  # instead of a digest, of a file in the plan of an earlier version
_SAME_AGAIN = "run the same command again with --replace: it begins with the input as it then is"


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

    @property
    def signatures(self) -> Path:
        return self.inner / f"unit-{self.number:05d}.signatures"

    def spill(self, split: str, number: int) -> Path:
        return self.inner / f"unit-{self.number:05d}-{split}-{number:03d}.spill"

    def records(self) -> Iterator[Record]:
        for part in self.parts:
            yield from read_records(part, self.config)

    def check_input(self) -> None:
        """Raises UserError if a file of this unit is not what it was when it was planned."""
        for file in self.files:
            try:
                same = _is_unchanged(file)
            except OSError as error:
                raise UserError(f"input: {file.name} is gone ({error.strerror}); {_SAME_AGAIN}") from error
            if not same:
                raise UserError(f"input: {file.name} changed while it was read; {_SAME_AGAIN}")

    def done(self, tokenizer: Tokenizer) -> bool:
        """Whether done record and spills are there, whole, and made for this plan and tokenizer."""
        record = self._record(self.record, tokenizer)
        if record is None or "letters" not in record:  # of an earlier version
            return False
        sizes = {spill["name"]: spill["bytes"] for spill in record["spills"]}
        sizes[self.bad_records.name] = record["quarantine_bytes"]
        if self.config.near_duplicates:
            sizes[self.signatures.name] = record["signature_bytes"]
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
    def near_duplicates(self) -> Path:
        return self.inner / NEAR_NAME

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
    """The settings and the input as they are now; raises UserError for input that cannot be used.

    `begin` or `join` decides where the work is done: `output` is the folder `final` that the user named, or
    the one in it that is to take its place.
    """

    def __init__(self, config: PrepConfig) -> None:
        self.final = Path(config.output)
        self._work_in(self.final, config)
        self.unread = Counter[str]()  # files of the input, by what they are
        self.files: list[InputFile] = find_files(config.input, config.text_field, self.unread)
        settings = PrepConfig.model_validate(config.model_dump())  # a default of 0 is 0.0, as if it was given
        given = load_tokenizer(config.tokenizer, config.lowercase).sha256 if config.tokenizer else None
        self.content: dict[str, Any] = {
            "version": PLAN_VERSION,
            "settings": _that_matter(settings),
            "tokenizer": given,
        }
        folders = (self.final, self.final / REPLACEMENT)
        there = [plan for folder in folders if (plan := _read_plan(folder))]
        known = [_known_digests(folder) for folder in folders]
        self._known = known[0] | known[1]
        self._describe_files(self._known | dict(entry for plan in there for entry in _old_times(plan)))

    def _work_in(self, folder: Path, config: PrepConfig) -> None:
        self.config, self.output = config.model_copy(update={"output": str(folder)}), folder
        self.inner = folder / WORK_FOLDER
        self.path, self.spills = self.inner / "plan.json", self.inner / "spills.json"
        self.tokenizer_record = self.inner / "tokenizer.json"
        self.trainer_log = self.inner / "tokenizer.log"

    def _describe_files(self, known: dict[tuple[str, int, int], str]) -> None:
        """Gives the files their digests, `known` by name, size and time, or else read."""
        keys = [(os.path.realpath(file.name), file.size, file.mtime_ns) for file in self.files]
        unknown = [file for file, key in zip(self.files, keys, strict=True) if key not in known]
        if (size := sum(file.size for file in unknown)) > SAID_FROM:
            print(f"prep: reading {size / 1e9:,.1f} GB of input once, for its digests", flush=True)
        with ThreadPoolExecutor(DIGEST_THREADS) as pool:
            read = dict(zip([file.name for file in unknown], pool.map(_digest_of, unknown), strict=True))
        pairs = zip(self.files, keys, strict=True)
        self.files = [replace(file, digest=known.get(key) or read[file.name]) for file, key in pairs]
        self.content["files"] = [
            {"name": key[0], "size": file.size, "kind": file.kind, "digest": file.digest}
            for file, key in zip(self.files, keys, strict=True)
        ]
        self.digest = _digest(self.content)

    def _is_same(self, other: dict[str, Any]) -> bool:
        return _that_decides(other) == _that_decides(self.content)

    def _adopt(self, old: dict[str, Any]) -> None:
        """Goes on with the plan that lies in `output`, which is the same; names may be written otherwise."""
        self.content, self.digest = old, _digest(old)

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
        inner = self.final / WORK_FOLDER
        try:
            inner.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise UserError(f"output: cannot make the folder {self.final}: {error.strerror}") from error
        with ExitStack() as stack:
            try:
                me = f"process {os.getpid()} on {platform.node()}\n"
                stack.enter_context(alone(inner / LOCK_NAME, me))
            except HeldError as error:
                raise UserError(
                    f"output: another bertscale prep ({str(error) or 'just begun'}) is at work in "
                    f"{self.final}; wait until it has ended, or choose another folder"
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
        return sum(file.size * (UNPACKED if file.name.endswith(COMPRESSIONS) else 1) for file in self.files)

    def begin(self, replace: bool = False) -> None:
        """Makes this the plan of the output folder; with `replace`, of what will take its place.

        Raises UserError where work of another plan lies there and is not to be replaced.
        """
        given = self.config.tokenizer
        if given and Path(given).resolve() in [
            (self.output / name).resolve() for name in ("", *TOKENIZER_NAMES)
        ]:
            raise UserError(f"tokenizer: {given} is prep's own output; copy it to another place first")
        print(f"prep: {self._said_of_files()}", flush=True)
        if (self.final / REPLACEMENT / MANIFEST_NAME).is_file():
            take_place(self.final)  # what a kill left half-done
        old = _read_plan(self.output)
        if old is not None and not self._is_same(old):
            finished = (self.final / MANIFEST_NAME).is_file()
            if finished and not replace and self._is_same({**old, "version": PLAN_VERSION}):
                print(
                    f"prep: an earlier version of bertscale made {self.final}; this one may give other "
                    "bytes, which it makes with --replace",
                    flush=True,
                )
                self._adopt(old)
                return
            if finished or self._is_work_done(old):
                self._check_replace(old, finished, replace)
            if finished:
                self._work_in(self.final / REPLACEMENT, self.config)
                self.inner.mkdir(parents=True, exist_ok=True)
                old = _read_plan(self.output)
        elif (inner := self.final / REPLACEMENT / WORK_FOLDER).exists():
            print(
                f"prep: {inner.parent} is the unfinished work of --replace with other settings or input: "
                "that command goes on with it; delete it if nobody wants it",
                flush=True,
            )
        if old is not None and self._is_same(old):
            self._adopt(old)
        else:
            self._start(old)
        self._write_digests()

    def files_by_kind(self) -> dict[str, dict[str, int]]:
        """How many files of which kinds are read, and how many are not."""
        read = Counter(file.kind for file in self.files)
        return {"read": dict(sorted(read.items())), "not_read": dict(sorted(self.unread.items()))}

    def _said_of_files(self) -> str:
        by_kind = self.files_by_kind()
        counts = {key: sum(kinds.values()) for key, kinds in by_kind.items()}
        shown = {
            key: ", ".join(f"{number:,} {kind}" for kind, number in kinds.items())
            for key, kinds in by_kind.items()
        }
        read = f"reading {counts['read']:,} files ({shown['read']})"
        return read if not counts["not_read"] else f"{read}, not {counts['not_read']:,} ({shown['not_read']})"

    def _is_work_done(self, old: dict[str, Any]) -> bool:
        """Whether there is more in the output folder than `old`, its plan, and a copied tokenizer."""
        trained = old["tokenizer"] is None and self.tokenizer_record.is_file()
        return trained or any(self.inner.glob("unit-*.json"))

    def _check_replace(self, old: dict[str, Any], finished: bool, replace: bool) -> None:
        """Says what `old`, the plan that lies there, has otherwise; raises UserError unless `replace`."""
        said = "; ".join(_differences(old, self.content))
        if not replace:
            what = "a finished data set" if finished else "the unfinished work of a prep"
            until = "takes its place when it is finished" if finished else "begins anew there"
            raise UserError(
                f"output: {self.final} holds {what} of other settings or input ({said}), and nothing was "
                f"changed: with --replace the new one {until}; or choose another output"
            )
        how = (
            f"the data set in {self.final} stays until the new one is finished"
            if finished
            else "starting over"
        )
        print(f"prep: {said}: {how}", flush=True)

    def _start(self, old: dict[str, Any] | None) -> None:
        """Writes this plan, and removes what `old`, another one, left in the folder."""
        outputs = (MANIFEST_NAME, *TOKENIZER_NAMES, QUARANTINE_NAME)
        stale = [*(self.output / name for name in outputs), *_shards(self.output)]
        if old is None and (foreign := [file.name for file in stale if file.exists()]):
            raise UserError(
                f"output: {self.output} holds {foreign[0]}, which this prep did not write and would replace; "
                "choose another folder, or empty this one"
            )
        # The new plan first: a task of the old one, which may still live, sees it before it misses a file and
        # ends with a sentence. All records name their plan, so nothing that a kill leaves here is believed;
        # what is half-written stays, to be removed at the end.
        (self.output / MANIFEST_NAME).unlink(missing_ok=True)
        if any(file.digest.startswith(_OLD) for file in self.files):
            self._describe_files(self._known)
        write_json(self.path, self.content)
        to_stay = (self.path.name, LOCK_NAME)
        records = [f for f in self.inner.iterdir() if f.name not in to_stay and ".tmp-" not in f.name]
        for file in [*stale, *records]:
            file.unlink(missing_ok=True)

    def _write_digests(self) -> None:
        """Keeps the digests of the input: a file with the same size and time is not read for it again."""
        known = [
            [os.path.realpath(file.name), file.size, file.mtime_ns, file.digest]
            for file in self.files
            if not file.digest.startswith(_OLD)
        ]
        if (read_json(self.inner / DIGESTS_NAME) or {}).get("files") != known:
            write_json(self.inner / DIGESTS_NAME, {"files": known})

    def join(self) -> None:
        """Raises UserError unless the output folder, or what will take its place, is being prepared by this
        same plan; changes nothing."""
        old = _read_plan(self.output)
        if old is None:
            raise UserError(no_tokenizer(self.output))
        if self._is_same(old):
            self._adopt(old)
            return
        inner = _read_plan(self.final / REPLACEMENT)
        if inner is None or not self._is_same(inner):
            raise UserError(
                f"output: {self.output} is being prepared by another plan, and here "
                f"{'; '.join(_differences(inner or old, self.content))}. Use the same settings and input, or "
                "end its other tasks and begin again with --tokenizer-only --replace"
            )
        self._work_in(self.final / REPLACEMENT, self.config)
        self._adopt(inner)

    def check_input(self) -> None:
        """Raises UserError if an input file is not what it was when this plan was made."""
        now = [file.name for file in find_files(self.config.input, self.config.text_field)]
        if now != [file.name for file in self.files] or not all(map(_is_unchanged, self.files)):
            raise UserError(f"input: a file changed while it was read; {_SAME_AGAIN}")

    def finished(self) -> dict[str, Any] | None:
        """The manifest, if every file it names is there in full size."""
        try:
            open_dataset(self.output, "validation")
            return open_dataset(self.output, "train").manifest
        except UserError:
            return None

    def write_quarantine(self) -> Path:
        """Puts the bad records that were found in the work units into one file; returns its path."""
        path = self.output / QUARANTINE_NAME
        with whole_file(path) as file:
            for unit in self.units:
                if unit.bad_records.exists():
                    with open(unit.bad_records, "rb") as bad_records:
                        shutil.copyfileobj(bad_records, file)
        return path

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
        for pattern in ("unit-*.spill", "unit-*.bad.jsonl", "unit-*.signatures", NEAR_NAME):
            for file in self.inner.glob(pattern):
                file.unlink(missing_ok=True)


def take_place(final: Path) -> None:
    """Puts the finished data set in the REPLACEMENT folder of `final` into the place of the one in `final`.

    Files of others stay. The new manifest moves last: a second call finishes what a kill left half-done.
    """
    new = final / REPLACEMENT
    manifest = read_json(new / MANIFEST_NAME)
    assert manifest is not None
    for file in new.iterdir():
        sync(file)
    (final / MANIFEST_NAME).unlink(missing_ok=True)
    if (new / WORK_FOLDER).exists():
        shutil.rmtree(final / WORK_FOLDER, ignore_errors=True)
        os.rename(new / WORK_FOLDER, final / WORK_FOLDER)
    for file in new.iterdir():
        if file.name != MANIFEST_NAME:
            os.replace(file, final / file.name)
    kept = {manifest["tokenizer"], *(shard["name"] for shard in manifest["shards"])}
    if manifest["counters"]["bad"]:
        kept.add(QUARANTINE_NAME)
    others = (final / name for name in (*TOKENIZER_NAMES, QUARANTINE_NAME))
    for file in [*others, *_shards(final)]:
        if file.name not in kept:
            file.unlink(missing_ok=True)
    os.replace(new / MANIFEST_NAME, final / MANIFEST_NAME)
    sync(final)
    new.rmdir()


# -------------------------------------------------------------------------------- what makes two plans one


def _read_plan(folder: Path) -> dict[str, Any] | None:
    """The plan that is worked on, or was, in `folder`; None where there is no whole one."""
    plan = read_json(folder / WORK_FOLDER / "plan.json") or {}
    return plan if plan.keys() >= {"version", "settings", "tokenizer", "files"} else None


def _that_decides(plan: dict[str, Any]) -> dict[str, Any]:
    """What of a plan the bytes depend on; files by resolved names and digests, however they were named."""
    settings = {key: value for key, value in plan["settings"].items() if key not in ("input", "tokenizer")}
    return {**plan, "settings": settings, "files": [_file_key(entry) for entry in plan["files"]]}


def _file_key(entry: dict[str, Any]) -> tuple[str, int, str]:
    digest = entry["digest"] if "digest" in entry else f"{_OLD}{entry['mtime_ns']}"
    return os.path.realpath(entry["name"]), entry["size"], digest


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """A few words for each thing that is not the same in two plans."""
    before, now = (_flat(_that_decides(plan)["settings"]) for plan in (old, new))
    words = [
        f"{key}: {json.dumps(before.get(key))} -> {json.dumps(now.get(key))}"
        for key in {**before, **now}
        if before.get(key) != now.get(key)
    ]
    if old["tokenizer"] != new["tokenizer"]:
        shown = [plan["settings"].get("tokenizer") or "trained" for plan in (old, new)]
        words.append(f"tokenizer: {shown[0]} -> {shown[1]}, another one")
    if old["version"] != new["version"]:
        words.append("another version of bertscale, which gives other bytes")
    files = [{(key := _file_key(entry))[0]: key for entry in plan["files"]} for plan in (old, new)]
    words += _differing_files(*files)
    if len(words) > DIFFERENCES_SHOWN:
        words[DIFFERENCES_SHOWN:] = [f"{len(words) - DIFFERENCES_SHOWN} more"]
    return words or ["the order of the input files"]


def _differing_files(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    kinds = {
        "new": [name for name in now if name not in before],
        "gone": [name for name in before if name not in now],
        "changed": [name for name in now if name in before and now[name] != before[name]],
    }
    return [
        f"input: {len(names):,} file{'s' if len(names) > 1 else ''} {kind} ({printable(names[0])}"
        f"{', ...' if len(names) > 1 else ''})"
        for kind, names in kinds.items()
        if names
    ]


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of sections under names such as train_tokenizer.vocab_size."""
    flat = {}
    for key, value in settings.items():
        inner = _flat(value) if isinstance(value, dict) else {"": value}
        flat.update({f"{key}.{name}" if name else key: of_name for name, of_name in inner.items()})
    return flat


def _known_digests(folder: Path) -> dict[tuple[str, int, int], str]:
    """The digests of input files that an earlier run into `folder` read, by name, size and time."""
    files = (read_json(folder / WORK_FOLDER / DIGESTS_NAME) or {}).get("files", [])
    return {(name, size, time): digest for name, size, time, digest in files}


def _old_times(plan: dict[str, Any]) -> Iterator[tuple[tuple[str, int, int], str]]:
    """What the plan of an earlier version knows of files instead of digests: the time alone."""
    for entry in plan["files"]:
        if "mtime_ns" in entry:
            yield (os.path.realpath(entry["name"]), entry["size"], entry["mtime_ns"]), _file_key(entry)[2]


def _digest_of(file: InputFile) -> str:
    try:
        return file_digest(file.name)
    except OSError as error:
        raise UserError(f"input: cannot read {printable(file.name)}: {error.strerror}") from error


def _is_unchanged(file: InputFile) -> bool:
    """Whether a file has the content that it had when the plan was made. Raises OSError if it is gone."""
    status = os.stat(file.name)
    if status.st_size != file.size:
        return False
    return status.st_mtime_ns == file.mtime_ns or file_digest(file.name) == file.digest


def _that_matter(settings: PrepConfig) -> dict[str, Any]:
    """The settings on which the bytes depend; one without a new key is that of an earlier version."""
    values = settings.model_dump(exclude={"output", "workers", "max_bad_fraction", "max_lost_fraction"})
    if is_utf8(values["encoding"]):
        del values["encoding"]
    values["train_tokenizer"]["model"] = settings.tokenizer_model
    if settings.train_tokenizer.extend_to is None:
        del values["train_tokenizer"]["extend_to"]
    for key in LATER_KEYS:
        if getattr(settings, key) == type(settings).model_fields[key].default:
            del values[key]
    if settings.decontaminate:
        values["decontaminate"] = list(map(_evaluation_digest, settings.decontaminate))
    if not settings.is_spaced:
        values["train_tokenizer"]["space_before_text"] = False
    if values.pop("words"):
        values["words"] = segmenter_version()
    return values


def _evaluation_digest(name: str) -> str:
    """The digest of a file, whatever its name. Raises UserError."""
    try:
        return file_digest(name)
    except OSError as error:
        raise UserError(f"decontaminate: cannot read {name}: {error.strerror}") from error


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
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _shards(output: Path) -> list[Path]:
    return [*output.glob("train-*.arrow"), *output.glob("validation-*.arrow")]


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
