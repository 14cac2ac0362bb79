"""Raw text -> tokenizer and Arrow token shards, on all cores, resumable.

bertscale prep configs/data/quickstart.yaml workers=2

The input is cut, between documents, into splits; each split is one unit of work for one process, which writes
its shards and then a done record. A rerun keeps the splits whose record and shards are whole, so the bytes
depend on the input and the settings alone: not on the number of workers, nor on where a run was killed.

    OUTPUT/tokenizer.model, train-00000.arrow, validation-00000.arrow, ...
    OUTPUT/.prep/plan.json           settings and inputs; when they differ, everything is made anew
    OUTPUT/.prep/tokenizer.json      its digest; written when tokenizer.model is whole
    OUTPUT/.prep/split-00000.json    done record: shard entries and counters
    OUTPUT/manifest.json             last
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import xxhash

from bertscale.config import PrepConfig, UserError
from bertscale.progress import Progress
from bertscale.shards import (
    MANIFEST_NAME,
    TOKENIZER_NAME,
    Shard,
    ShardBuilder,
    ShardEntry,
    open_dataset,
    token_dtype,
    write_bytes,
    write_json,
    write_manifest,
)
from bertscale.tokenizer import Tokenizer
from data_prep.clean import clean
from data_prep.read import Bad, Part, cut_into_splits, find_files, read_records
from data_prep.segment import split_sentences
from data_prep.train_tokenizer import draw_sample, train_tokenizer
from data_prep.workers import number_of_cores, worker_pool

PLAN_VERSION = 1  # raise it when the same settings begin to give other bytes
DOCUMENTS_AT_ONCE = 256  # encoded in one call
PLACES_SHOWN = 3  # of each kind of bad record


@dataclass(frozen=True)
class Task:
    """One split, with all that its worker needs to know."""

    number: int
    parts: list[Part]
    config: PrepConfig
    output: Path

    @property
    def bytes(self) -> int:
        return sum(part.end - part.start for part in self.parts)

    @property
    def record(self) -> Path:
        return self.output / ".prep" / f"split-{self.number:05d}.json"

    @property
    def sample(self) -> Path:
        return self.output / ".prep" / f"sample-{self.number:05d}.txt"


def prep(config: PrepConfig) -> dict[str, Any]:
    """Makes `config.output` a data set, or finds that it is one; returns a summary of it.

    The summary: documents, sentences, tokens, text_bytes, records, bad and dropped (counts by reason),
    shards, seconds of this call, and whether it was `reused`. Raises UserError for input that cannot be used,
    more bad records than max_bad_fraction, a dead worker, a full disk. Stopped in any way, the same call
    later continues.
    """
    try:
        return _prep(config)
    except KeyboardInterrupt:
        print("\nprep: stopped; the same command continues, finished splits are kept", file=sys.stderr)
        raise
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"the disk is full at {config.output} ({error.strerror}): free some space and run the same "
            "command again; finished splits are kept"
        ) from error


def _prep(config: PrepConfig) -> dict[str, Any]:
    began = time.monotonic()
    output = Path(config.output)
    files = find_files(config.input)
    plan: dict[str, Any] = {
        "version": PLAN_VERSION,
        "settings": config.model_dump(exclude={"output", "workers", "max_bad_fraction"}),
        "tokenizer": Tokenizer.load(config.tokenizer).sha256 if config.tokenizer else None,
        "files": [dataclasses.asdict(file) for file in files],
    }
    try:
        (output / ".prep").mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise UserError(f"output: cannot make the folder {output}: {error.strerror}") from error
    if config.tokenizer and Path(config.tokenizer).resolve() == (output / TOKENIZER_NAME).resolve():
        raise UserError(f"tokenizer: {config.tokenizer} is prep's own output; copy it to another place first")
    _start_over_if_changed(output, plan)
    if (manifest := _finished(output)) is not None:
        print(f"already prepared: {output}")
        return _summary(manifest, began, reused=True)
    (output / MANIFEST_NAME).unlink(missing_ok=True)

    splits = cut_into_splits(files, config.split_bytes)
    tasks = [Task(number, parts, config, output) for number, parts in enumerate(splits)]
    with worker_pool(min(config.workers or number_of_cores(), len(tasks))) as pool:
        tokenizer = _make_tokenizer(pool, tasks, config, output)
        _encode(pool, tasks, tokenizer)

    records = [json.loads(task.record.read_bytes()) for task in tasks]
    counters = _add_up(records)
    _judge(counters, [record["places"] for record in records], config)
    if [dataclasses.asdict(file) for file in find_files(config.input)] != plan["files"]:
        raise UserError("input: a file changed while it was read; run the same command again")
    manifest = write_manifest(
        output,
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        settings=plan["settings"],
        counters=counters,
        shards=[ShardEntry(**entry) for record in records for entry in record["shards"]],
    )
    return _summary(manifest, began, reused=False)


# ------------------------------------------------------------------------------------- what is there


def _start_over_if_changed(output: Path, plan: dict[str, Any]) -> None:
    """Removes the pieces of an earlier run with another plan, and what a killed run left half-written."""
    path = output / ".prep" / "plan.json"
    old = _read_json(path)
    for leftover in [*output.glob("*.tmp-*"), *(output / ".prep").glob("*.tmp-*")]:
        leftover.unlink(missing_ok=True)
    if old == json.loads(json.dumps(plan)):
        return
    stale = [output / MANIFEST_NAME, output / TOKENIZER_NAME]  # the manifest goes first: it vouches for all
    stale += [*output.glob("train-*.arrow"), *output.glob("validation-*.arrow")]
    if old is not None:
        print(f"prep: {_first_difference(old, plan)} changed since the last run into {output}: starting over")
    elif foreign := [file.name for file in stale if file.exists()]:
        raise UserError(
            f"output: {output} holds {foreign[0]}, which this prep did not write and would replace; "
            "choose another folder, or empty this one"
        )
    for file in [*stale, *path.parent.iterdir()]:
        file.unlink(missing_ok=True)
    write_json(path, plan)


def _first_difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    for key, value in new["settings"].items():
        if old.get("settings", {}).get(key) != value:
            return f"the setting {key}"
    return "the input" if old.get("files") != new["files"] else "the tokenizer or bertscale"


def _finished(output: Path) -> dict[str, Any] | None:
    """The manifest, if every file it names is there in full size."""
    try:
        open_dataset(output, "validation")
        return open_dataset(output, "train").manifest
    except UserError:
        return None


def _is_done(task: Task, tokenizer: Tokenizer) -> bool:
    record = _read_json(task.record)
    if record is None or record["tokenizer_sha256"] != tokenizer.sha256:
        return False
    try:
        for entry in record["shards"]:
            Shard(task.output / entry["name"], ShardEntry(**entry))
    except UserError:
        return False
    return True


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None


# ------------------------------------------------------------------------------------------ tokenizer


def _make_tokenizer(
    pool: ProcessPoolExecutor, tasks: list[Task], config: PrepConfig, output: Path
) -> Tokenizer:
    """The tokenizer in the output folder: kept, copied there, or trained."""
    path, record = output / TOKENIZER_NAME, output / ".prep" / "tokenizer.json"
    made = _read_json(record)
    if made and path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == made["sha256"]:
        return Tokenizer.load(path)
    record.unlink(missing_ok=True)
    if config.tokenizer:
        write_bytes(path, Path(config.tokenizer).read_bytes())
    else:
        documents = 0
        with Progress("sample", sum(task.bytes for task in tasks), "bytes") as progress:
            sizes = _share(config.train_tokenizer.sample_documents, [task.bytes for task in tasks])
            futures = {
                pool.submit(_sample_split, task, size): task for task, size in zip(tasks, sizes, strict=True)
            }
            for future in as_completed(futures):
                documents += future.result()
                progress.advance(futures[future].bytes)
        if not documents:
            raise UserError(f"input: {', '.join(config.input)}: no readable document in it")
        size = config.train_tokenizer.vocab_size
        print(f"tokenizer: training {size:,} pieces on {documents:,} documents", flush=True)
        began = time.monotonic()
        samples = [task.sample for task in tasks]
        pool.submit(train_tokenizer, samples, size, path).result()
        print(f"tokenizer: trained in {time.monotonic() - began:.1f} s", flush=True)
        for sample in samples:
            sample.unlink()
    tokenizer = Tokenizer.load(path)
    write_json(record, {"sha256": tokenizer.sha256})
    return tokenizer


def _share(total: int, weights: list[int]) -> list[int]:
    """`total` cut into whole numbers in proportion to `weights`; they add up to `total`."""
    everything, ends, so_far = sum(weights), [0], 0
    for weight in weights:
        so_far += weight
        ends.append(total * so_far // everything)
    return [end - start for start, end in pairwise(ends)]


def _sample_split(task: Task, size: int) -> int:
    """Writes the sentences of `size` random training documents of one split; returns how many there were."""
    config = task.config
    texts = (clean(r, config.min_characters)[0] for r in _records(task) if isinstance(r, str))
    kept = (text for text in texts if text and not _held_out(text, config.validation_fraction))
    sample = draw_sample(kept, size, f"{config.seed}-{task.number}")
    lines = [f"{sentence}\n" for text in sample for sentence in split_sentences(text)]
    task.sample.write_text("".join(lines), encoding="utf-8", newline="\n")
    return len(sample)


# --------------------------------------------------------------------------------------------- encode


def _encode(pool: ProcessPoolExecutor, tasks: list[Task], tokenizer: Tokenizer) -> None:
    remaining = [task for task in tasks if not _is_done(task, tokenizer)]
    total, left = (sum(task.bytes for task in some) for some in (tasks, remaining))
    with Progress("encode", total, "bytes", start=total - left) as progress:
        if len(remaining) < len(tasks):
            kept = len(tasks) - len(remaining)
            progress.say(f"encode: {kept:,} of {len(tasks):,} splits are finished and kept")
        futures = {pool.submit(_encode_split, task, tokenizer.path): task for task in remaining}
        for future in as_completed(futures):
            future.result()
            progress.advance(futures[future].bytes)


def _encode_split(task: Task, tokenizer_path: Path) -> None:
    """Writes the shards of one split, then its done record."""
    config, tokenizer = task.config, Tokenizer.load(tokenizer_path)
    new_shard = partial(ShardBuilder, token_dtype(tokenizer.vocab_size))
    shards = {"train": new_shard(), "validation": new_shard()}
    counters, bad, dropped = Counter[str](), Counter[str](), Counter[str]()
    places: dict[str, list[str]] = {}
    batch: list[tuple[str, int, list[str]]] = []

    def flush() -> None:
        ids = iter(tokenizer.encode([sentence for _, _, some in batch for sentence in some]))
        for split, document, some in batch:
            sentences = [one for one in (next(ids) for _ in some) if one]
            shards[split].add(document, sentences)
            counters["sentences"] += len(sentences)
        batch.clear()

    for number, record in enumerate(_records(task)):
        counters["records"] += 1
        if isinstance(record, Bad):
            bad[record.reason] += 1
            if bad[record.reason] <= PLACES_SHOWN:
                places.setdefault(record.reason, []).append(record.place)
            continue
        text, reason = clean(record, config.min_characters)
        if reason:
            dropped[reason] += 1
            continue
        counters["documents"] += 1
        counters["text_bytes"] += len(text.encode())
        split = "validation" if _held_out(text, config.validation_fraction) else "train"
        batch.append((split, task.number << 32 | number, split_sentences(text)))
        if len(batch) == DOCUMENTS_AT_ONCE:
            flush()
    flush()
    entries = []
    for split, shard in shards.items():
        if shard.numbers:
            entry = shard.write(task.output / f"{split}-{task.number:05d}.arrow", split)
            counters["tokens"] += entry.tokens
            entries.append(dataclasses.asdict(entry))
    done = {
        "tokenizer_sha256": tokenizer.sha256,
        "shards": entries,
        "counters": counters,
        "bad": bad,
        "dropped": dropped,
        "places": places,
    }
    write_json(task.record, done)


def _records(task: Task) -> Iterator[str | Bad]:
    for part in task.parts:
        yield from read_records(part, task.config.text_field)


def _held_out(text: str, fraction: float) -> bool:
    """Whether `text` is for validation: the same text always is, wherever it stands."""
    return xxhash.xxh3_64_intdigest(text.encode()) < fraction * 2**64


# -------------------------------------------------------------------------------------------- the end


def _add_up(records: list[dict[str, Any]]) -> dict[str, Any]:
    sums = {key: Counter[str]() for key in ("counters", "bad", "dropped")}
    for record in records:
        for key, counter in sums.items():
            counter.update(record[key])
    names = ("records", "documents", "sentences", "tokens", "text_bytes")
    return {
        **{name: sums["counters"][name] for name in names},
        "bad": dict(sorted(sums["bad"].items())),
        "dropped": dict(sorted(sums["dropped"].items())),
    }


def _judge(counters: dict[str, Any], places: list[dict[str, list[str]]], config: PrepConfig) -> None:
    """Shows what was left out; raises UserError if that is too much or everything."""
    lines = []
    for reason, count in counters["bad"].items():
        some = [place for split in places for place in split.get(reason, [])][:PLACES_SHOWN]
        lines.append(f"{count:,} bad: {reason} ({'; '.join(some)}{'; ...' if count > len(some) else ''})")
    lines += [f"{count:,} dropped: {reason}" for reason, count in counters["dropped"].items()]
    for line in lines:
        print(f"prep: {line}")
    bad = sum(counters["bad"].values())
    if bad > config.max_bad_fraction * counters["records"]:
        raise UserError(
            f"{bad:,} of {counters['records']:,} records cannot be read, more than "
            f"max_bad_fraction={config.max_bad_fraction} allows: {'; '.join(lines[: len(counters['bad'])])}. "
            "Mend them, or raise max_bad_fraction: finished splits are kept"
        )
    if not counters["documents"]:
        raise UserError(f"input: {', '.join(config.input)}: no document is left of it; {'; '.join(lines)}")


def _summary(manifest: dict[str, Any], began: float, *, reused: bool) -> dict[str, Any]:
    summary = {
        **manifest["counters"],
        "shards": len(manifest["shards"]),
        "seconds": round(time.monotonic() - began, 2),
        "reused": reused,
    }
    print(
        "prep: {documents:,} documents, {sentences:,} sentences, {tokens:,} tokens from {text_bytes:,} bytes "
        "of text in {shards:,} shards, {seconds} s".format(**summary)
    )
    return summary
