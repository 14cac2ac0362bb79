"""What a prepared folder holds: counts, lengths, digests, and samples as the model will see them.

bertscale inspect runs/quickstart/data
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.markup import escape
from rich.text import Text

from bertscale.config import SamplesConfig, UserError
from bertscale.data.contents import check_shard
from bertscale.data.quality import count_pieces, doubts
from bertscale.data.shards import Dataset, open_dataset
from bertscale.progress import Progress
from bertscale.tokenizer import Tokenizer, load_tokenizer

PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
BAR = 40  # characters of the longest bar of a histogram
SHOWN = {"nsp": 4, "packed": 2}  # samples of each kind
MAX_LENGTH = 128

Counts = npt.NDArray[np.int64]


def inspect(folder: str | Path, console: Console | None = None) -> None:
    """Prints what the prepared `folder` holds, and samples of it.

    Reads every byte. Raises UserError for a folder that is no data set, is incomplete or damaged.
    """
    console = console or Console(highlight=False)
    datasets = [open_dataset(folder, split) for split in ("train", "validation")]
    tokenizer = load_tokenizer(datasets[0].tokenizer_path)
    for line in _what_was_read(datasets[0], tokenizer):
        console.print(line, markup=False, soft_wrap=True)
    total = sum(shard.entry.bytes for dataset in datasets for shard in dataset.shards)
    with Progress("digests and lengths", total, "bytes") as progress:
        measures = [_Measures(dataset, tokenizer, progress) for dataset in datasets]
    files = sum(len(dataset.shards) for dataset in datasets)
    console.print(f"digests: {files:,} shards and the tokenizer are what the manifest says")
    for measure in measures:
        if measure.dataset.shards:
            console.print()
            for line in measure.lines():
                console.print(line, markup=False, soft_wrap=True)
    for kind, count in SHOWN.items():
        title = f"\n[bold]samples[/] of kind {kind}, at most {MAX_LENGTH} tokens: {LEGEND}"
        console.print(title, soft_wrap=True)
        try:
            for sample in samples(datasets[0], tokenizer, kind, count):
                console.print()
                console.print(sample, soft_wrap=True)
        except UserError as error:
            console.print(f"none: {escape(str(error))}")


def _what_was_read(dataset: Dataset, tokenizer: Tokenizer) -> Iterator[str]:
    counters, settings = dataset.manifest["counters"], dataset.manifest["settings"]
    yield f"{dataset.folder}: from {', '.join(settings.get('input', []))}"
    yield (
        f"tokenizer: {dataset.tokenizer_path.name}, {tokenizer.vocab_size:,} pieces, "
        f"sha256 {tokenizer.sha256[:12]}..."
    )
    if words := settings.get("words"):
        yield f"words: kept in the shards, found by {words}"
    table = [("split", "documents", "sentences", "tokens", "text bytes", "tokens per byte")]
    for split, sums in [*counters.get("splits", {}).items(), ("all", counters)]:
        if sums:
            rate = f"{sums['tokens'] / sums['text_bytes']:.4f}" if sums["text_bytes"] else ""
            names = ("documents", "sentences", "tokens", "text_bytes")
            table.append((split, *(f"{sums[name]:,}" for name in names), rate))
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    for row in table:
        yield "  ".join(word.rjust(width) for word, width in zip(row, widths, strict=True))
    yield f"records read: {counters.get('records', 0):,}"
    if cut := counters.get("cut", 0):
        yield f"{cut:,} of them continue the record before: their document was too long and was cut"
    for word in ("bad", "dropped"):
        for reason, count in counters.get(word, {}).items():
            yield f"{count:>12,} {word}: {reason}"
    yield from (f"warning: {doubt}" for doubt in doubts(dataset.manifest))


# ---------------------------------------------------------------------------------------------- lengths


class _Measures:
    """Lengths of documents and sentences and the pieces of one data split; reads every byte of it.

    Raises UserError for a shard whose digest is not its own, or whose rows or ids are not sound.
    """

    def __init__(self, dataset: Dataset, tokenizer: Tokenizer, progress: Progress) -> None:
        self.dataset, self.tokenizer = dataset, tokenizer
        self.documents = self.sentences = np.zeros(1, np.int64)  # how many have each length
        self.pieces: Counts = np.zeros(tokenizer.vocab_size, np.int64)
        for shard in dataset.shards:
            shard.verify()
            check_shard(shard, tokenizer.vocab_size)
            self.documents = _add(self.documents, np.bincount(np.diff(shard.token_offsets)))
            self.sentences = _add(self.sentences, np.bincount(shard.sentence_lengths))
            self.pieces += count_pieces(shard.tokens, len(self.pieces))
            progress.advance(shard.entry.bytes)

    def lines(self) -> Iterator[str]:
        """The lines to print of the split."""
        for what, counts in (("documents", self.documents), ("sentences", self.sentences)):
            yield f"{self.dataset.split} {what}, lengths in tokens"
            values = ", ".join(f"{percent} %: {percentile(counts, percent):,}" for percent in PERCENTILES)
            yield f"  {values}, longest: {len(np.trim_zeros(counts, 'b')) - 1:,}"
            yield from _histogram(counts)
        total = max(int(self.pieces.sum()), 1)
        in_bytes = int(self.pieces[self.tokenizer.byte_ids].sum())
        used = int((self.pieces > 0).sum())
        yield (
            f"{self.dataset.split} pieces: {self.pieces[self.tokenizer.unk_id] / total:.3%} unknown, "
            f"{in_bytes / total:.3%} single bytes of characters without a piece, "
            f"{used:,} of {len(self.pieces):,} used"
        )


def _add(first: Counts, second: Counts) -> Counts:
    """The sum of two counts by length, as long as the longer."""
    longer, shorter = (first, second) if len(first) >= len(second) else (second, first)
    longer = longer.astype(np.int64)
    longer[: len(shorter)] += shorter
    return longer


def percentile(counts: Counts, percent: float) -> int:
    """The smallest length that at least `percent` of all do not exceed; counts[n] have the length n."""
    ends = np.cumsum(counts)
    return int(np.searchsorted(ends, ends[-1] * percent / 100))


def _histogram(counts: Counts) -> Iterator[str]:
    """A line for each power of two that some have: lengths 0, 1, 2 to 3, 4 to 7, ..."""
    edges = [0, 1]
    while edges[-1] < len(counts):
        edges.append(2 * edges[-1])
    sums = np.add.reduceat(np.append(counts, np.zeros(edges[-1] - len(counts) + 1, np.int64)), edges)
    ranges = [(begin, end, n) for begin, end, n in zip(edges, edges[1:], sums.tolist(), strict=False) if n]
    most = max((n for _, _, n in ranges), default=1)
    width = max((len(f"{end - 1:,}") for _, end, _ in ranges), default=1)
    for begin, end, n in ranges:
        name = f"{begin:>{width},} to {end - 1:>{width},}"
        yield f"  {name} {n:>12,} {'#' * max(1, round(BAR * n / most))}"


# ---------------------------------------------------------------------------------------------- samples

LEGEND = "[cyan]<masked>[/], [magenta]<replaced=by another>[/], [green]<kept=>[/]"


def samples(dataset: Dataset, tokenizer: Tokenizer, kind: str, count: int) -> Iterator[Text]:
    """The first `count` samples of training with the default settings and seed 0, to be printed.

    Raises UserError where the text is too little for such samples.
    """
    from bertscale.data.loader import Loader  # with it comes torch
    from bertscale.data.mixture import Mixture

    config = SamplesConfig.model_validate({"kind": kind, "max_length": MAX_LENGTH})
    mixture = Mixture([dataset], [1.0], config, global_batch=count, seed=0)
    [batch] = Loader(mixture, tokenizer, micro_batch=count, rank=0, world=1).step(0)
    targets = dict(zip(batch.target_positions.tolist(), batch.targets.tolist(), strict=True))
    tokens, begin = batch.tokens.tolist(), 0
    label = batch.next_sentence_label
    for number, length in enumerate(batch.lengths):
        text = Text()
        if label is not None:
            text.append("B is of another document: " if label[number] else "B follows A: ", "bold")
        for index in range(begin, begin + length):
            _append(text, tokenizer, tokens[index], targets.get(index))
        begin += length
        yield text


def _append(text: Text, tokenizer: Tokenizer, token: int, target: int | None) -> None:
    """Appends a token to `text`, and with it the id that the model is to predict there."""
    piece, space = tokenizer.spelling(token)
    if target is None:
        special = token in tokenizer.special_ids
        text.append(f"{' ' if space else ''}{piece}{' ' if special else ''}", "dim" if special else "")
        return
    right, space = tokenizer.spelling(target)
    text.append(" " if space else "")
    if token == target:
        text.append(f"<{right}=>", "green")
    elif token == tokenizer.mask_id:
        text.append(f"<{right}>", "cyan")
    else:
        text.append(f"<{right}={piece}>", "magenta")
