"""Raw text -> tokenizer and Arrow token shards, on all cores, resumable.

bertscale prep configs/prep/quickstart.yaml workers=2

There are two passes. In the first the input is cut, between documents, into work units. A process takes one,
writes its documents, sorted by their key, to spill files, and then a done record. Where there are fewer units
than processes, this one takes them, and others encode batches of their documents. In the second pass each
shard is the work of one process: it takes its range of keys from all spills (see data_prep/shuffle.py), so
that documents of the whole input are mixed and the same text meets itself. A rerun keeps what has a record
and is whole, so the bytes depend on the input and the settings alone: not on the number of workers, nor on
where a run was killed, nor on how many hosts did the first pass together:

bertscale prep CONFIG --tokenizer-only                     # once, first
bertscale prep CONFIG --task-index 0 --task-count 4        # 0, 1, 2, 3: at the same time, on any hosts
bertscale prep CONFIG --finish --task-count 4              # once, last: the second pass

    OUTPUT/tokenizer.model, train-00000.arrow, validation-00000.arrow, ...
    OUTPUT/quarantine.jsonl                records that cannot be read: place, reason, excerpt
    OUTPUT/manifest.json                   last
    OUTPUT/.prep/plan.json                 settings and inputs; where they differ, nothing is touched
    OUTPUT/.prep/inputs.json               digests of the input files, and the times that they had
    OUTPUT/.replacement/                   with --replace: the new data set, until it is finished
    OUTPUT/.prep/tokenizer.json            its digest; written when the tokenizer is whole
    OUTPUT/.prep/unit-00000.json           done record of a work unit: spills and counters
    OUTPUT/.prep/unit-00000-*.spill        and .bad.jsonl; removed after the manifest is written
    OUTPUT/.prep/spills.json               list of all spills, for the second pass
    OUTPUT/.prep/shard-train-00000.json    done record of a shard
"""

from __future__ import annotations

import dataclasses
import errno
import json
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bertscale.config import PrepConfig, UserError
from bertscale.data.quality import count_pieces, doubts, facts
from bertscale.data.report import PAGE_NAME, read_report, source_lines, write_report
from bertscale.data.shards import MANIFEST_NAME, Shard, ShardEntry, token_dtype, write_columns, write_manifest
from bertscale.files import write_bytes, write_json
from bertscale.progress import Progress
from bertscale.tokenizer import Tokenizer
from data_prep.encode import PLACES_SHOWN, SPLITS, encode_unit, load_once
from data_prep.filters.near import near_duplicates
from data_prep.filters.tally import combined
from data_prep.plan import (
    NEAR_NAME,
    QUARANTINE_NAME,
    Plan,
    ShardUnit,
    Unit,
    no_tokenizer,
    read_json,
    take_place,
)
from data_prep.readers.read import undecodable
from data_prep.shuffle import Spill, merge, number_of_shards
from data_prep.train_tokenizer import finished_tokenizer, make_tokenizer
from data_prep.words import spill_dtype, split_words
from data_prep.workers import map_in_order, number_of_cores, worker_pool

MISSING_SHOWN = 20  # work units
MANY_DOCUMENTS, SHORT_DOCUMENTS = 100, 1000  # of a .txt file; bytes of each: a book cut at its blank lines
# Tokens and sentence lengths take about 0.45 bytes for a byte of text; less is asked for, lest text with much
# else in its files be refused.
BYTES_OF_TEXT = 0.35
# Where work units are few: the start of a process costs as much as the work on so many bytes of text, and
# one process reads, cleans and writes as fast as so many others find sentences and encode.
BYTES_WORTH_A_PROCESS = 4 * 2**20
PROCESSES_FOR_A_READER = 3


def prep(config: PrepConfig, replace: bool = False) -> dict[str, Any]:
    """Makes `config.output` a data set, or finds that it is one; returns a summary of it.

    Where it is one of other settings or input, a UserError says what differs, and nothing is changed; with
    `replace` the new one takes its place when it is finished. Unfinished work is replaced at once.

    The summary: documents, sentences, tokens, text_bytes, records, bad and dropped (counts by reason),
    shards, seconds of this call, and whether it was `reused`. Raises UserError for input that cannot be used,
    more bad records than max_bad_fraction, a dead worker, a full disk. Stopped in any way, the same call
    later continues.
    """
    began = time.monotonic()
    plan = Plan(config)
    with _stops_explained(config), plan.alone():
        plan.begin(replace)
        if (manifest := plan.finished()) is not None:
            return _reused(plan, manifest, began)
        (plan.output / MANIFEST_NAME).unlink(missing_ok=True)
        with worker_pool(config.workers) as pool:
            tokenizer = make_tokenizer(pool, plan)
            _encode(pool, plan, plan.units, tokenizer)
            manifest = _finish(pool, plan, tokenizer)
    return _summary(plan, manifest, began, reused=False)


# ----------------------------------------------------------------------------- the same in three parts


def prep_tokenizer(config: PrepConfig, replace: bool = False) -> None:
    """The first part of `prep`: the plan and the tokenizer. It alone may `replace`, as `prep` may."""
    plan = Plan(config)
    with _stops_explained(config), plan.alone():
        plan.begin(replace)
        if plan.finished() is not None:
            print(f"already prepared: {plan.output}")
            return
        (plan.output / MANIFEST_NAME).unlink(missing_ok=True)
        with worker_pool(config.workers) as pool:
            tokenizer = make_tokenizer(pool, plan)
        units = f"{len(plan.units):,} work units"
        print(f"tokenizer: ready with {tokenizer.vocab_size:,} pieces; {units} to build")


def prep_share(config: PrepConfig, index: int, count: int) -> None:
    """The second part, in `count` tasks on any hosts: builds the work units whose number % count is `index`.

    It touches no file of another unit. Raises UserError when there is no tokenizer yet, and when the output
    folder belongs to another plan.
    """
    with _stops_explained(config):
        plan, tokenizer = _join(config)
        units = plan.units[index::count]
        share = f"{len(units):,} of {len(plan.units):,} work units"
        print(f"prep: task {index} of {count} builds {share}", flush=True)
        if units:
            with worker_pool(config.workers) as pool:
                _encode(pool, plan, units, tokenizer)
        plan.check_input()


def prep_finish(config: PrepConfig, count: int | None = None) -> dict[str, Any]:
    """The last part: the second pass and the manifest; returns the summary of `prep`.

    Raises UserError that names the work units that are missing and, where `count` is known, their tasks.
    """
    began = time.monotonic()
    with _stops_explained(config):
        plan, tokenizer = _join(config)
        with plan.alone():
            if (manifest := plan.finished()) is not None:
                return _reused(plan, manifest, began)
            if missing := [unit.number for unit in plan.units if not unit.done(tokenizer)]:
                raise UserError(
                    f"{len(missing):,} of {len(plan.units):,} work units of {plan.output} are not built: "
                    f"{_whose(missing, count)}. Run those tasks again: finished units are kept"
                )
            with worker_pool(config.workers) as pool:
                manifest = _finish(pool, plan, tokenizer)
    return _summary(plan, manifest, began, reused=False)


def _join(config: PrepConfig) -> tuple[Plan, Tokenizer]:
    plan = Plan(config)
    plan.join()
    if (tokenizer := finished_tokenizer(plan)) is None:
        raise UserError(no_tokenizer(plan.output))
    return plan, tokenizer


def _whose(missing: list[int], count: int | None) -> str:
    shown = missing[:MISSING_SHOWN]
    more = f" and {len(missing) - len(shown):,} more" if len(missing) > len(shown) else ""
    if count is None:
        numbers = ", ".join(map(str, shown))
        return f"{numbers}{more} (unit number % task count is the task index)"
    tasks = defaultdict[int, list[str]](list)
    for number in shown:
        tasks[number % count].append(str(number))
    words = [f"task {task}: {', '.join(numbers)}" for task, numbers in sorted(tasks.items())]
    return f"{'; '.join(words)}{more}"


@contextmanager
def _stops_explained(config: PrepConfig) -> Iterator[None]:
    """Says what Ctrl-C leaves behind, and makes a UserError of a full disk or a read-only folder."""
    try:
        yield
    except KeyboardInterrupt:
        print("\nprep: stopped; the same command continues, finished work is kept", file=sys.stderr)
        raise
    except OSError as error:
        of_output = str(error.filename or config.output).startswith(config.output)
        if of_output and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise UserError(
                f"output: cannot write in {config.output} ({error.strerror}: {error.filename}): get the "
                "right to write there, or choose another output"
            ) from error
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"the disk is full at {config.output} ({error.strerror}): free some space and run the same "
            "command again; finished work is kept"
        ) from error


# ------------------------------------------------------------------------------------------ first pass


def _encode(pool: ProcessPoolExecutor, plan: Plan, units: list[Unit], tokenizer: Tokenizer) -> None:
    remaining = [unit for unit in units if not unit.done(tokenizer)]
    plan.remove_leftovers(remaining)
    total, left = (sum(unit.bytes for unit in group) for group in (units, remaining))
    text = plan.text_bytes() / sum(file.size for file in plan.files)  # bytes for a byte of input
    spilled = 2 * left if plan.config.words else left
    plan.check_space(BYTES_OF_TEXT * text * (spilled + total), "the sorted spill files and the shards")
    with Progress("encode", total, "bytes", start=total - left) as progress:
        if len(remaining) < len(units):
            finished = len(units) - len(remaining)
            progress.say(f"encode: {finished:,} of {len(units):,} work units are finished and kept")
        if processes := _processes_for_batches(plan.config, len(remaining), left * text):
            map_batches = partial(map_in_order, pool, processes + 1)
            for unit in remaining:
                encode_unit(unit, tokenizer.path, map_batches)
                progress.advance(unit.bytes)
            return
        futures = {pool.submit(encode_unit, unit, tokenizer.path): unit for unit in remaining}
        for future in as_completed(futures):
            future.result()
            progress.advance(futures[future].bytes)


def _processes_for_batches(config: PrepConfig, units: int, text_bytes: float) -> int:
    """How many processes share the batches of each unit; 0 where a unit is better the work of one."""
    worth = int(text_bytes) // BYTES_WORTH_A_PROCESS
    processes = min(config.workers or number_of_cores(), worth, PROCESSES_FOR_A_READER)
    return processes if units < processes else 0


# ----------------------------------------------------------------------------------------- second pass


def _shuffle(
    pool: ProcessPoolExecutor, plan: Plan, spills: dict[str, list[Spill]], tokenizer: Tokenizer
) -> list[dict[str, Any]]:
    """Writes the shards that are missing; returns the done records of all of them, in order."""
    dtype, units = token_dtype(tokenizer.vocab_size), list[ShardUnit]()
    for split, of_split in spills.items():
        count = number_of_shards(of_split, dtype.itemsize, plan.config.shard_bytes)
        units += [ShardUnit(plan.config, plan.digest, split, number, count) for number in range(count)]
    remaining = [unit for unit in units if not unit.done(tokenizer)]
    size = sum(spill.bytes for of_split in spills.values() for spill in of_split)
    plan.check_space(size * len(remaining) / len(units), "the shards")
    write_json(plan.spills, {split: list(map(dataclasses.asdict, group)) for split, group in spills.items()})
    finished = len(units) - len(remaining)
    with Progress("shuffle", len(units), "shards", start=finished) as progress:
        if finished:
            progress.say(f"shuffle: {finished:,} of {len(units):,} shards are finished and kept")
        futures = [pool.submit(merge_shard, unit, dtype.str, tokenizer.path) for unit in remaining]
        for future in as_completed(futures):
            future.result()
            progress.advance(1)
    return [read_json(unit.record) for unit in units]


def merge_shard(unit: ShardUnit, dtype: str, tokenizer_path: Path) -> None:
    """Writes one shard, or nothing where no document has its keys, and then its done record."""
    tokenizer = load_once(tokenizer_path, unit.plan)
    spills = [spill for spill in _all_spills(unit.spills, unit.plan) if spill.split == unit.split]
    words = unit.config.words
    of_spills = spill_dtype(np.dtype(dtype), words)
    near = _near_duplicates(unit.near_duplicates, unit.plan) if unit.config.near_duplicates else None
    merged = merge(unit.inner, spills, of_spills, unit.number, unit.count, unit.config.deduplicate, near)
    columns = merged.columns
    if words:
        columns["tokens"], columns["word_starts"] = split_words(columns["tokens"], dtype)
    unit.check_plan()
    shard = write_columns(unit.path, unit.split, **columns) if merged.documents else None
    pieces = count_pieces(columns["tokens"], tokenizer.vocab_size)
    done = {
        "plan": unit.plan,
        "tokenizer_sha256": tokenizer.sha256,
        "count": unit.count,
        "shard": shard and dataclasses.asdict(shard),
        "text_bytes": merged.text_bytes,
        "duplicates": merged.duplicates,
        "near_duplicates": merged.near_duplicates,
        "words": int((columns["word_starts"] if words else pieces[tokenizer.starts_word]).sum()),
        "unknown": int(pieces[tokenizer.unk_id]),
        "single_bytes": int(pieces[tokenizer.byte_ids].sum()),
    }
    write_json(unit.record, done)


@lru_cache(maxsize=1)
def _near_duplicates(path: Path, plan: str) -> npt.NDArray[np.uint64]:
    """The numbers of the near-duplicates, read once by a process; `plan` because another one has others."""
    return np.fromfile(path, np.uint64)


@lru_cache(maxsize=1)
def _all_spills(path: Path, plan: str) -> list[Spill]:
    """The list of all spills, read once by a process; `plan` because another one has others."""
    return [Spill(**spill) for of_split in json.loads(path.read_bytes()).values() for spill in of_split]


# -------------------------------------------------------------------------------------------- the end


def _finish(pool: ProcessPoolExecutor, plan: Plan, tokenizer: Tokenizer) -> dict[str, Any]:
    """Judges the first pass, makes the second one, and writes the manifest."""
    records = [read_json(unit.record) for unit in plan.units]
    sums = {key: Counter[str]() for key in ("counters", "bad", "dropped", "letters", "changes")}
    for record in records:
        for key, counter in sums.items():
            counter.update(record.get(key, {}))
    _judge(plan, sums, [record["places"] for record in records])
    plan.check_input()
    spills: dict[str, list[Spill]] = {split: [] for split in SPLITS}
    for record in records:
        for spill in record["spills"]:
            spills[spill["split"]].append(Spill(**spill))
    if not any(spills.values()):
        names = ", ".join(plan.config.input)
        raise UserError(f"input: {names}: no document is left of it; {'; '.join(_dropped(sums))}")
    if (similarity := plan.config.near_duplicates) is not None:
        near = near_duplicates([unit.signatures for unit in plan.units], similarity)
        write_bytes(plan.inner / NEAR_NAME, near.tobytes())
    shard_records = _shuffle(pool, plan, spills, tokenizer)
    for key, reason in (("duplicates", "duplicate"), ("near_duplicates", "near-duplicate")):
        if left_out := sum(record.get(key, 0) for record in shard_records):
            sums["dropped"][reason] += left_out
    for line in (*_dropped(sums), *(f"{count:,} {what}" for what, count in sorted(sums["changes"].items()))):
        print(f"prep: {line}")
    if joined := sums["counters"]["joined_lines"]:
        where = f"{sums['counters']['joined_documents']:,} documents that look wrapped"
        remedy = "" if plan.config.wrapped == "yes" else " (wrapped=no keeps each line)"
        print(f"prep: {joined:,} line ends joined in {where}{remedy}")
    plan.check_input()
    shards = [ShardEntry(**record["shard"]) for record in shard_records if record["shard"]]
    plan.remove_all_but({shard.name for shard in shards})
    counters = _counters(sums, shard_records) | {"files": plan.files_by_kind()}
    _report(plan, records, shards, {"counters": counters, "vocab_size": tokenizer.vocab_size})
    manifest = write_manifest(
        plan.output,
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        settings=plan.content["settings"],
        counters=counters,
        shards=shards,
        words=plan.config.words is not None,
    )
    plan.remove_spills()
    if plan.output != plan.final:
        take_place(plan.final)
    return manifest


def _report(
    plan: Plan, records: list[dict[str, Any]], shards: list[ShardEntry], manifest: dict[str, Any]
) -> None:
    """Writes the report of what is in `manifest` so far, and of the done `records` of the first pass."""
    if not all("tally" in record for record in records):  # an earlier version began this
        return
    tally = combined([record["tally"] for record in records], plan.config.input)
    mapped = [Shard(plan.output / shard.name, shard) for shard in shards]
    manifest |= {"settings": {**plan.content["settings"], "input": plan.config.input}}
    write_report(plan.output, manifest, tally, mapped)


def _counters(sums: dict[str, Counter[str]], shard_records: list[dict[str, Any]]) -> dict[str, Any]:
    """What the manifest counts: what was read, what was left out and why, and what stands in the shards."""
    names = ("documents", "sentences", "tokens", "text_bytes", "unknown", "single_bytes", "words")
    splits = {split: Counter[str](dict.fromkeys(names, 0)) for split in SPLITS}
    for record in shard_records:
        if shard := record["shard"]:
            splits[shard["split"]].update(
                documents=shard["rows"],
                sentences=shard["sentences"],
                tokens=shard["tokens"],
                text_bytes=record["text_bytes"],
                unknown=record["unknown"],
                single_bytes=record["single_bytes"],
                words=record.get("words", 0),  # an earlier version counted none
            )
    return {
        **dict(sorted(sums["counters"].items())),
        **{name: sum(counter[name] for counter in splits.values()) for name in names},
        "splits": {split: dict(counter) for split, counter in splits.items()},
        "bad": dict(sorted(sums["bad"].items())),
        "dropped": dict(sorted(sums["dropped"].items())),
        "letters": dict(sorted(sums["letters"].items())),
        **({"changes": dict(sorted(sums["changes"].items()))} if sums["changes"] else {}),
    }


def _dropped(sums: dict[str, Counter[str]]) -> list[str]:
    return [f"{count:,} dropped: {reason}" for reason, count in sorted(sums["dropped"].items())]


def _judge(plan: Plan, sums: dict[str, Counter[str]], places: list[dict[str, list[str]]]) -> None:
    """Shows the bad records and writes the quarantine file; raises UserError if they are too many."""
    count, records = sums["bad"].total(), sums["counters"]["records"]
    if not count:
        (plan.output / QUARANTINE_NAME).unlink(missing_ok=True)
        return
    quarantine = plan.write_quarantine()
    lines = []
    for reason, number in sorted(sums["bad"].items()):
        few = [place for of_unit in places for place in of_unit.get(reason, [])][:PLACES_SHOWN]
        lines.append(f"{number:,} bad: {reason} ({'; '.join(few)}{'; ...' if number > len(few) else ''})")
        print(f"prep: {lines[-1]}")
    undecoded = sum(sums["bad"][reason] for reason in undecodable(plan.config.encoding))
    if undecoded > count / 2:  # else another fault is to be mended first
        plan.check_encoding(undecoded, records)
    if count > plan.config.max_bad_fraction * records:
        raise UserError(
            f"{count:,} of {records:,} records cannot be read, more than "
            f"max_bad_fraction={plan.config.max_bad_fraction} allows: {'; '.join(lines)}. They are listed in "
            f"{quarantine}. Mend them, or raise max_bad_fraction: finished work is kept"
        )
    lost, size = sums["counters"]["lost_bytes"], sum(file.size for file in plan.files)
    if lost > plan.config.max_lost_fraction * size:
        raise UserError(
            f"about {lost / size:.2%} of the input's {size:,} bytes are lost with bad records, more than "
            f"max_lost_fraction={plan.config.max_lost_fraction} allows: {'; '.join(lines)}. They are listed "
            f"in {quarantine}. Mend them, or raise max_lost_fraction: finished work is kept"
        )
    if lost:
        print(
            f"prep: warning: about {lost:,} bytes ({lost / size:.2%}) of the input are lost with bad records"
        )
    print(f"prep: all {count:,} bad records, with place and excerpt: {plan.final / QUARANTINE_NAME}")


def _reused(plan: Plan, manifest: dict[str, Any], began: float) -> dict[str, Any]:
    print(f"already prepared: {plan.output}")
    plan.remove_spills()  # a kill just after the manifest leaves them
    return _summary(plan, manifest, began, reused=True)


def _hints(manifest: dict[str, Any]) -> list[str]:
    """A line, with what to do, for settings that are possible but seldom meant."""
    counters, settings = manifest["counters"], manifest["settings"]
    lines, documents = [], counters["documents"]
    if settings.get("validation_fraction") and not counters["splits"]["validation"]["documents"]:
        lines.append(
            f"no document is held out, of {documents:,} and validation_fraction="
            f"{settings['validation_fraction']}: raise it, or pretraining has no held-out loss"
        )
    read = counters.get("files", {}).get("read", {})
    if settings.get("documents") == "blank_line" and read.keys() == {".txt"}:
        of_file, size = documents / read[".txt"], counters["text_bytes"] / documents
        if of_file > MANY_DOCUMENTS and size < SHORT_DOCUMENTS:
            lines.append(
                f"a .txt file has {of_file:,.0f} documents of {size:,.0f} bytes on average, as blank lines "
                "end one: if each file is one text, such as a novel, set documents=file"
            )
    return lines


def _summary(plan: Plan, manifest: dict[str, Any], began: float, *, reused: bool) -> dict[str, Any]:
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
    if line := facts(manifest):
        print(f"prep: {line}")
    for line in source_lines(read_report(plan.final)):
        print(f"prep: {line}")
    if (plan.final / PAGE_NAME).exists():
        print(f"prep: all of it, with plots and examples: {plan.final / PAGE_NAME}")
    for doubt in (*doubts(manifest), *_hints(manifest)):
        print(f"prep: warning: {doubt}")
    return summary
