"""Raw text -> tokenizer and Arrow token shards, on all cores, resumable.

bertscale prep configs/data/quickstart.yaml workers=2

The input is cut, between documents, into splits; each split is one unit of work for one process, which writes
its shards and then a done record. A rerun keeps the splits whose record and shards are whole, so the bytes
depend on the input and the settings alone: not on the number of workers, nor on where a run was killed, nor
on how many hosts shared the splits:

bertscale prep CONFIG --tokenizer-only                     # once, first
bertscale prep CONFIG --task-index 0 --task-count 4        # 0, 1, 2, 3: at the same time, on any hosts
bertscale prep CONFIG --finish --task-count 4              # once, last

    OUTPUT/tokenizer.model, train-00000.arrow, validation-00000.arrow, ...
    OUTPUT/.prep/plan.json           settings and inputs; when they differ, everything is made anew
    OUTPUT/.prep/tokenizer.json      its digest; written when tokenizer.model is whole
    OUTPUT/.prep/split-00000.json    done record: shard entries and counters
    OUTPUT/manifest.json             last
"""

from __future__ import annotations

import dataclasses
import errno
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from bertscale.config import PrepConfig, UserError
from bertscale.progress import Progress
from bertscale.shards import MANIFEST_NAME, ShardBuilder, ShardEntry, token_dtype, write_json, write_manifest
from bertscale.tokenizer import Tokenizer
from data_prep.clean import clean
from data_prep.plan import Plan, Unit, no_tokenizer
from data_prep.read import Bad
from data_prep.segment import split_sentences
from data_prep.train_tokenizer import finished_tokenizer, held_out, make_tokenizer
from data_prep.workers import number_of_cores, worker_pool

DOCUMENTS_AT_ONCE = 256  # encoded in one call
PLACES_SHOWN = 3  # of each kind of bad record
MISSING_SHOWN = 20  # splits


def prep(config: PrepConfig) -> dict[str, Any]:
    """Makes `config.output` a data set, or finds that it is one; returns a summary of it.

    The summary: documents, sentences, tokens, text_bytes, records, bad and dropped (counts by reason),
    shards, seconds of this call, and whether it was `reused`. Raises UserError for input that cannot be used,
    more bad records than max_bad_fraction, a dead worker, a full disk. Stopped in any way, the same call
    later continues.
    """
    began = time.monotonic()
    with _stops_explained(config):
        plan = Plan(config)
        plan.begin()
        if (manifest := plan.finished()) is not None:
            print(f"already prepared: {plan.output}")
            return _summary(manifest, began, reused=True)
        (plan.output / MANIFEST_NAME).unlink(missing_ok=True)
        with worker_pool(_workers(config, plan.units)) as pool:
            tokenizer = make_tokenizer(pool, plan)
            _encode(pool, plan, plan.units, tokenizer)
        manifest = _finish(plan, tokenizer)
    return _summary(manifest, began, reused=False)


# ----------------------------------------------------------------------------- the same in three parts


def prep_tokenizer(config: PrepConfig) -> None:
    """The first part of `prep`: the plan and the tokenizer. It alone may start over, as `prep` may."""
    with _stops_explained(config):
        plan = Plan(config)
        plan.begin()
        if plan.finished() is not None:
            print(f"already prepared: {plan.output}")
            return
        (plan.output / MANIFEST_NAME).unlink(missing_ok=True)
        with worker_pool(_workers(config, plan.units)) as pool:
            tokenizer = make_tokenizer(pool, plan)
        print(f"tokenizer: ready with {tokenizer.vocab_size:,} pieces; {len(plan.units):,} splits to build")


def prep_share(config: PrepConfig, index: int, count: int) -> None:
    """The second part, in `count` tasks on any hosts: builds the splits whose number % count is `index`.

    Touches no file of another split. Raises UserError when there is no tokenizer yet, and when the output
    folder belongs to another plan.
    """
    with _stops_explained(config):
        plan, tokenizer = _join(config)
        units = plan.units[index::count]
        print(
            f"prep: task {index} of {count} builds {len(units):,} of {len(plan.units):,} splits", flush=True
        )
        if units:
            with worker_pool(_workers(config, units)) as pool:
                _encode(pool, plan, units, tokenizer)
        plan.check_input()


def prep_finish(config: PrepConfig, count: int | None = None) -> dict[str, Any]:
    """The last part: writes the manifest and returns the summary of `prep`.

    Raises UserError that names the splits that are missing and, where `count` is known, their tasks.
    """
    began = time.monotonic()
    with _stops_explained(config):
        plan, tokenizer = _join(config)
        if (manifest := plan.finished()) is not None:
            print(f"already prepared: {plan.output}")
            return _summary(manifest, began, reused=True)
        if missing := [unit.number for unit in plan.units if not unit.is_done(tokenizer)]:
            raise UserError(
                f"{len(missing):,} of {len(plan.units):,} splits of {plan.output} are not built: "
                f"{_whose(missing, count)}. Run those tasks again: finished splits are kept"
            )
        manifest = _finish(plan, tokenizer)
    return _summary(manifest, began, reused=False)


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
        return f"{numbers}{more} (split number % task count is the task index)"
    tasks: dict[int, list[int]] = {}
    for number in shown:
        tasks.setdefault(number % count, []).append(number)
    words = [f"task {task}: {', '.join(map(str, numbers))}" for task, numbers in sorted(tasks.items())]
    return f"{'; '.join(words)}{more}"


def _workers(config: PrepConfig, units: list[Unit]) -> int:
    return min(config.workers or number_of_cores(), len(units))


@contextmanager
def _stops_explained(config: PrepConfig) -> Iterator[None]:
    """Says what Ctrl-C leaves behind, and makes a full disk a UserError."""
    try:
        yield
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


# --------------------------------------------------------------------------------------------- encode


def _encode(pool: ProcessPoolExecutor, plan: Plan, units: list[Unit], tokenizer: Tokenizer) -> None:
    remaining = [unit for unit in units if not unit.is_done(tokenizer)]
    plan.remove_leftovers(remaining)
    total, left = (sum(unit.bytes for unit in some) for some in (units, remaining))
    with Progress("encode", total, "bytes", start=total - left) as progress:
        if len(remaining) < len(units):
            kept = len(units) - len(remaining)
            progress.say(f"encode: {kept:,} of {len(units):,} splits are finished and kept")
        futures = {pool.submit(_encode_split, unit, tokenizer.path): unit for unit in remaining}
        for future in as_completed(futures):
            future.result()
            progress.advance(futures[future].bytes)


def _encode_split(unit: Unit, tokenizer_path: Path) -> None:
    """Writes the shards of one split, then its done record."""
    config = unit.config
    try:
        tokenizer = Tokenizer.load(tokenizer_path)
    finally:
        unit.check_plan()  # the better reason where the tokenizer is gone
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

    for number, record in enumerate(unit.records()):
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
        split = "validation" if held_out(text, config.validation_fraction) else "train"
        batch.append((split, unit.number << 32 | number, split_sentences(text)))
        if len(batch) == DOCUMENTS_AT_ONCE:
            flush()
    flush()
    unit.check_plan()
    entries = []
    for split, shard in shards.items():
        if shard.numbers:
            entry = shard.write(unit.shard(split), split)
            counters["tokens"] += entry.tokens
            entries.append(dataclasses.asdict(entry))
    done = {
        "plan": unit.plan,
        "tokenizer_sha256": tokenizer.sha256,
        "shards": entries,
        "counters": counters,
        "bad": bad,
        "dropped": dropped,
        "places": places,
    }
    write_json(unit.record, done)


# -------------------------------------------------------------------------------------------- the end


def _finish(plan: Plan, tokenizer: Tokenizer) -> dict[str, Any]:
    """Adds the done records up, judges them and writes the manifest."""
    records = [json.loads(unit.record.read_bytes()) for unit in plan.units]
    counters = _add_up(records)
    _judge(counters, [record["places"] for record in records], plan.config)
    plan.check_input()
    shards = [ShardEntry(**entry) for record in records for entry in record["shards"]]
    plan.remove_all_but({shard.name for shard in shards})
    return write_manifest(
        plan.output,
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        settings=plan.content["settings"],
        counters=counters,
        shards=shards,
    )


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
