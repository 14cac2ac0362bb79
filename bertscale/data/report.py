"""The report of a prepared folder: what was read, what was left out and why, lengths, pieces, examples.

    write_report(folder, manifest, tally)     # report.json, what only the input can tell; and report.html
    for line in source_lines(manifest, read_report(folder)):
        print(line)

The page needs nothing but itself: no script, no font, no picture of another place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from bertscale.config.table import Count, Table, check_table, read_object
from bertscale.data.quality import doubts
from bertscale.data.shards import Shard
from bertscale.files import write_bytes, write_json

REPORT_NAME, PAGE_NAME = "report.json", "report.html"
PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
EXAMPLE_SHOWN = 160  # characters, in a terminal
REASONS_SHOWN = 40  # in the page's plot
SOURCE_COLUMNS = ("source", "records", "kept", "dropped", "bad")

Counts = npt.NDArray[np.int64]


class _Source(Table):
    records: Count
    bad: dict[str, Count]
    dropped: dict[str, Count]


class _Report(Table):
    sources: dict[str, _Source]
    examples: dict[str, list[str]] = Field(default_factory=dict)


def read_report(folder: Path) -> dict[str, Any] | None:
    """What prep wrote of the input; None where an earlier version prepared the folder. Raises UserError for
    a damaged file."""
    path, remedy = folder / REPORT_NAME, "delete it, and the report is shorter"
    if not path.exists():
        return None
    report = read_object(path, remedy)
    check_table(_Report, report, path, remedy)
    return report


def write_report(folder: Path, manifest: dict[str, Any], tally: dict[str, Any], shards: list[Shard]) -> None:
    """Writes report.json and report.html beside the `shards` in `folder`; its `manifest` may come later."""
    write_json(folder / REPORT_NAME, tally)
    lengths = Lengths()
    for shard in shards:
        lengths.add(shard)
    write_bytes(folder / PAGE_NAME, page(manifest, tally, lengths).encode())


# --------------------------------------------------------------------------------------------- lengths


class Lengths:
    """How many documents and sentences have each length in tokens."""

    def __init__(self) -> None:
        self.documents: Counts = np.zeros(1, np.int64)
        self.sentences: Counts = np.zeros(1, np.int64)

    def add(self, shard: Shard) -> None:
        self.documents = _sum(self.documents, np.bincount(np.diff(shard.token_offsets)))
        self.sentences = _sum(self.sentences, np.bincount(shard.sentence_lengths))


def _sum(first: Counts, second: Counts) -> Counts:
    """The sum of two counts by length, as long as the longer."""
    longer, shorter = (first, second) if len(first) >= len(second) else (second, first)
    longer = longer.astype(np.int64)
    longer[: len(shorter)] += shorter
    return longer


def percentile(counts: Counts, percent: float) -> int:
    """The smallest length that at least `percent` of all do not exceed; counts[n] have the length n."""
    ends = np.cumsum(counts)
    return int(np.searchsorted(ends, ends[-1] * percent / 100))


def percentiles(counts: Counts) -> str:
    """The lengths in words: 1 %: 4, 5 %: 8, ..., longest: 3,210."""
    values = ", ".join(f"{percent} %: {percentile(counts, percent):,}" for percent in PERCENTILES)
    return f"{values}, longest: {len(np.trim_zeros(counts, 'b')) - 1:,}"


def histogram(counts: Counts) -> list[tuple[str, int]]:
    """Name and number of each power of two that some have: lengths 0, 1, 2 to 3, 4 to 7, ..."""
    edges = [0, 1]
    while edges[-1] < len(counts):
        edges.append(2 * edges[-1])
    sums = np.add.reduceat(np.append(counts, np.zeros(edges[-1] - len(counts) + 1, np.int64)), edges)
    ranges = [(begin, end, n) for begin, end, n in zip(edges, edges[1:], sums.tolist(), strict=False) if n]
    width = max((len(f"{end - 1:,}") for _, end, _ in ranges), default=1)
    return [(f"{begin:>{width},} to {end - 1:>{width},}", n) for begin, end, n in ranges]


# ---------------------------------------------------------------------------------------------- words


def rates(manifest: dict[str, Any]) -> list[tuple[str, str]]:
    """Name and value of what tells how well the tokenizer fits; [] where an older prep wrote the manifest."""
    counters = manifest["counters"]
    tokens, sentences = max(counters.get("tokens", 0), 1), max(counters.get("sentences", 0), 1)
    found = [("bytes a token", f"{counters.get('text_bytes', 0) / tokens:.2f}")]
    if words := counters.get("words"):
        found.append(("tokens a word", f"{counters['tokens'] / words:.2f}"))
    found.append(("tokens a sentence", f"{tokens / sentences:.1f}"))
    if "unknown" in counters:
        found.append(("unknown pieces", f"{counters['unknown'] / tokens:.2%}"))
        found.append(("single bytes", f"{counters['single_bytes'] / tokens:.2%}"))
    return found


def source_lines(report: dict[str, Any] | None) -> Iterator[str]:
    """A table of what became of the records of each source, where there are several or some were left out."""
    sources = report["sources"] if report else {}
    left_out = sum(sum(_left_out(source).values()) for source in sources.values())
    if len(sources) < 2 and not left_out:
        return
    yield from table_lines([SOURCE_COLUMNS, *_source_rows(sources)])
    if len(sources) > 1:
        for name, source in sources.items():
            for reason, count in _left_out(source).items():
                yield f"{count:>12,} {reason}, of {name}"


def example_lines(report: dict[str, Any] | None) -> Iterator[str]:
    """The begin of some documents that were kept, and of some that were dropped, by reason."""
    for reason, texts in (report["examples"] if report else {}).items():
        yield f"examples, {'' if reason == 'kept' else 'dropped: '}{reason}:"
        for text in texts:
            line = " ".join(text.split())
            yield f"  {line[:EXAMPLE_SHOWN]}{'...' if len(line) > EXAMPLE_SHOWN else ''}"


def table_lines(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """Lines of a table, in columns."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        yield "  ".join(word.rjust(width) for word, width in zip(row, widths, strict=True))


def _source_rows(sources: dict[str, Any]) -> list[tuple[str, ...]]:
    """What became of the records of each source, under `SOURCE_COLUMNS`."""
    rows = []
    for name, source in sources.items():
        dropped, bad = (sum(source[kind].values()) for kind in ("dropped", "bad"))
        numbers = (source["records"], source["records"] - dropped - bad, dropped, bad)
        rows.append((name, *(f"{number:,}" for number in numbers)))
    return rows


def _left_out(source: dict[str, Any]) -> dict[str, int]:
    return {f"{kind}: {reason}": n for kind in ("bad", "dropped") for reason, n in source[kind].items()}


# ----------------------------------------------------------------------------------------------- page

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2733; --soft: #5c6b7a; --line: #d9e0e7; --fill: #2f6f9f;
  --other: #b8732c; --paper: #fff; --card: #f4f7fa }
@media (prefers-color-scheme: dark) { :root { --ink: #e4eaf0; --soft: #9aa8b5; --line: #33404d;
  --fill: #6fb1e0; --other: #e0a765; --paper: #12181f; --card: #1b242d } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1rem; max-width: 60rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: .5rem }
.tiles div { background: var(--card); border-radius: .4rem; padding: .5rem .7rem }
.tiles b { display: block; font-size: 1.15rem } .soft, .tiles span { color: var(--soft); font-size: .85rem }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: .9rem }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap }
th:first-child, td:first-child { text-align: left }
svg { display: block; width: 100%; max-width: 34rem; height: auto }
svg text { fill: currentColor; font-size: 12px }
.warning { border-left: .25rem solid var(--other); padding: .3rem .7rem; background: var(--card) }
blockquote { margin: .4rem 0; padding: .4rem .7rem; background: var(--card); white-space: pre-wrap;
  overflow-wrap: anywhere; font-size: .9rem; border-radius: .4rem }
"""


def page(manifest: dict[str, Any], report: dict[str, Any], lengths: Lengths) -> str:
    """The report as one HTML page."""
    counters, settings = manifest["counters"], manifest["settings"]
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8"><title>Data report</title>',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<style>{_STYLE}</style></head><body>",
        "<h1>Data report</h1>",
        f'<p class="soft">from {escape(", ".join(settings["input"]))}; '
        f"language {escape(settings['language'])}; {manifest['vocab_size']:,} pieces</p>",
        *(f'<p class="warning">{escape(doubt)}</p>' for doubt in doubts(manifest)),
        _tiles(
            [(word, f"{counters[word]:,}") for word in ("documents", "sentences", "tokens")]
            + [("bytes of text", f"{counters['text_bytes']:,}"), *rates(manifest)]
        ),
        "<h2>What was read</h2>",
        _sources(report["sources"]),
    ]
    if left_out := _reasons(counters):
        parts += ["<h2>What was left out, and why</h2>", _bars(left_out[:REASONS_SHOWN], "var(--other)")]
        parts.append(_by_source(report["sources"]))
    if changes := counters.get("changes"):
        parts += ["<h2>What was changed</h2>", _bars(list(changes.items()), "var(--other)")]
    parts.append("<h2>Lengths</h2>")
    for what, counts in (("documents", lengths.documents), ("sentences", lengths.sentences)):
        parts.append(f'<p class="soft">{what}, in tokens: {percentiles(counts)}</p>')
        parts.append(_bars(histogram(counts)))
    parts += ["<h2>Splits</h2>", _splits(counters["splits"])]
    if letters := sorted(counters["letters"].items(), key=lambda item: -item[1]):
        parts += ["<h2>Letters by script, of some of the documents</h2>", _bars(letters)]
    parts.append("<h2>Examples</h2>")
    for reason, texts in report["examples"].items():
        parts.append(f"<h3>{escape(reason if reason == 'kept' else f'dropped: {reason}')}</h3>")
        parts += [f"<blockquote>{escape(text)}</blockquote>" for text in texts]
    return "\n".join([*parts, "</body></html>", ""])


def _tiles(facts: Sequence[tuple[str, str]]) -> str:
    tiles = "".join(f"<div><b>{escape(value)}</b><span>{escape(word)}</span></div>" for word, value in facts)
    return f'<div class="tiles">{tiles}</div>'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["".join(f"<th>{escape(word)}</th>" for word in head)]
    lines += ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    return f'<div class="wide"><table>{"".join(f"<tr>{line}</tr>" for line in lines)}</table></div>'


def _sources(sources: dict[str, Any]) -> str:
    note = '<p class="soft">The same text twice is found later, over all sources together.</p>'
    return _table(SOURCE_COLUMNS, _source_rows(sources)) + note


def _reasons(counters: dict[str, Any]) -> list[tuple[str, int]]:
    return sorted(_left_out(counters).items(), key=lambda item: (-item[1], item[0]))


def _by_source(sources: dict[str, Any]) -> str:
    if len(sources) < 2:
        return ""
    rows = [
        [name, reason, f"{n:,}"]
        for name, source in sources.items()
        for reason, n in _left_out(source).items()
    ]
    return _table(("source", "reason", "records"), rows)


def _splits(splits: dict[str, Any]) -> str:
    names = ("documents", "sentences", "tokens", "text_bytes")
    rows = [[split, *(f"{sums[name]:,}" for name in names)] for split, sums in splits.items()]
    return _table(("split", "documents", "sentences", "tokens", "bytes of text"), rows)


def _bars(rows: Sequence[tuple[str, int]], color: str = "var(--fill)") -> str:
    """Bars one below the other, each under its name: room for long ones on a phone."""
    width, height = 360, 34  # as wide as a phone: there its text has the size of the page's
    most = max((n for _, n in rows), default=1)
    total = max(sum(n for _, n in rows), 1)
    parts = [f'<svg viewBox="0 0 {width} {height * len(rows) or 1}" role="img">']
    for place, (name, n) in enumerate(rows):
        y, size = place * height, max(1.0, round((width - 2) * n / most, 1))
        parts.append(
            f'<text x="0" y="{y + 13}">{escape(" ".join(name.split()))}</text>'
            f'<text x="{width}" y="{y + 13}" text-anchor="end">{n:,} ({n / total:.1%})</text>'
            f'<rect x="0" y="{y + 18}" width="{size:g}" height="9" rx="2" fill="{color}"/>'
        )
    return "".join([*parts, "</svg>"])
