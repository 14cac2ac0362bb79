"""What each rule would do to some documents of the input; nothing is written.

    bertscale prep CONFIG --dry-run 2000

Rules that are off are tried with the values that were published for them.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Iterator

from bertscale.config import RULES_OF_WORDS, PrepConfig
from bertscale.data.report import table_lines
from data_prep.clean import cleaned_text, why_drop
from data_prep.filters import personal, quality
from data_prep.readers.read import cut_into_units, find_files, read_records
from data_prep.readers.records import Bad, Record

EXAMPLE = 70  # characters


def dry_run(config: PrepConfig, count: int) -> None:
    """Prints what becomes of `count` documents, from all over the input, and how many each rule would drop if
    it were the only one. Raises UserError for input that cannot be used."""
    first, alone, changes = Counter[str](), Counter[str](), Counter[str]()
    examples: dict[str, str] = {}
    documents = kept = 0
    rules = _rules(config)
    for record in _some_records(config, count):
        documents += 1
        if not isinstance(record, str):
            first[f"{'bad' if isinstance(record, Bad) else 'dropped'}: {record.reason}"] += 1
            continue
        text, reason, _ = cleaned_text(record, config, changes)
        reason = reason or why_drop(text, config) or quality.why_drop(text, config.quality)
        if reason:
            first[f"dropped: {reason}"] += 1
            examples.setdefault(reason, text or record)
        else:
            kept += 1
        looks = quality.Looks(text, config.quality)
        for rule, limit in rules.items():
            if text and quality.breaks(looks, rule, limit):
                alone[rule] += 1
                examples.setdefault(f"quality.{rule}", text)
        for kind in personal.MARKS:
            before = changes[f"masked: {kind}"]
            personal.mask(text, [kind], changes)
            alone[kind] += changes[f"masked: {kind}"] > before
    print(f"of {documents:,} documents {kept:,} are kept; the first rule that drops each of the others:")
    for reason, number in sorted(first.items(), key=lambda item: (-item[1], item[0])):
        print(f"{number:>12,} {reason}{_example(examples.get(reason.removeprefix('dropped: ')))}")
    print("\ndocuments that each rule of quality would drop alone:")
    rows = [("rule", "value", "", "documents", "share")]
    for rule, limit in rules.items():
        is_off = "" if getattr(config.quality, rule) is not None else "off"
        rows.append(
            (rule, f"{limit:,}", is_off, f"{alone[rule]:,}", f"{alone[rule] / max(documents, 1):.1%}")
        )
    for row, line in zip(rows, table_lines(rows), strict=True):
        print(f"{line}{_example(examples.get(f'quality.{row[0]}'))}")
    print("\nlines that are left out, and personal data (`mask`):")
    for what, number in sorted(changes.items()):
        kind = what.removeprefix("masked: ")
        where = f" in {alone[kind]:,} documents" if kind != what else ""
        print(f"{number:>12,} {what}{where}{'' if kind == what or kind in config.mask else ' (off)'}")


def _rules(config: PrepConfig) -> dict[str, float]:
    """The rules with a limit, the published one where none is set; those of words where there are words."""
    found = {}
    for rule, published in quality.PUBLISHED.items():
        limit = getattr(config.quality, rule)
        if config.is_spaced or rule not in RULES_OF_WORDS:
            found[rule] = published if limit is None else limit
    return found


def _some_records(config: PrepConfig, count: int) -> Iterator[Record]:
    """The first ones of as many work units as it takes, in an order by the seed."""
    files = find_files(config.input, config.text_field)
    by_unit: dict[int, Iterator[Record]] = {}
    units = cut_into_units(files, config)
    order = random.Random(config.seed).sample(range(len(units)), len(units))
    share = -(-count // len(units))
    taken = defaultdict[int, int](int)
    left = count
    while left and order:
        for number in list(order):
            records = by_unit.setdefault(
                number, (record for part in units[number] for record in read_records(part, config))
            )
            for record in records:
                yield record
                left -= 1
                taken[number] += 1
                if not left:
                    return
                if taken[number] % share == 0:
                    break
            else:
                order.remove(number)


def _example(text: str | None) -> str:
    line = " ".join((text or "").split())
    return f"   {line[:EXAMPLE]}{'...' if len(line) > EXAMPLE else ''}" if line else ""
