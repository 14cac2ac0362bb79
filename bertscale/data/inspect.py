"""What a prepared folder holds: counts, lengths, digests, and samples as the model will see them.

bertscale inspect runs/quickstart/data
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.text import Text

from bertscale.config import SamplesConfig, UserError
from bertscale.data.contents import check_shard
from bertscale.data.quality import count_pieces, doubts
from bertscale.data.report import (
    Counts,
    Lengths,
    example_lines,
    histogram,
    percentiles,
    read_report,
    source_lines,
    table_lines,
)
from bertscale.data.shards import Dataset, open_dataset
from bertscale.progress import Progress
from bertscale.tokenizer import Tokenizer, load_tokenizer

BAR = 40  # characters of the longest bar of a histogram
SHOWN = {"nsp": 4, "packed": 2}  # samples of each kind
MAX_LENGTH = 128


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
    yield from table_lines(table)
    yield f"records read: {counters.get('records', 0):,}"
    if cut := counters.get("cut", 0):
        yield f"{cut:,} of them continue the record before: their document was too long and was cut"
    for word in ("bad", "dropped"):
        for reason, count in counters.get(word, {}).items():
            yield f"{count:>12,} {word}: {reason}"
    for what, count in counters.get("changes", {}).items():
        yield f"{count:>12,} {what}"
    report = read_report(dataset.folder)
    yield from source_lines(report)
    yield from example_lines(report)
    yield from (f"warning: {doubt}" for doubt in doubts(dataset.manifest))


# ---------------------------------------------------------------------------------------------- lengths


class _Measures:
    """Lengths of documents and sentences and the pieces of one data split; reads every byte of it.

    Raises UserError for a shard whose digest is not its own, or whose rows or ids are not sound.
    """

    def __init__(self, dataset: Dataset, tokenizer: Tokenizer, progress: Progress) -> None:
        self.dataset, self.tokenizer = dataset, tokenizer
        self.lengths = Lengths()
        self.pieces: Counts = np.zeros(tokenizer.vocab_size, np.int64)
        for shard in dataset.shards:
            shard.verify()
            check_shard(shard, tokenizer.vocab_size)
            self.lengths.add(shard)
            self.pieces += count_pieces(shard.tokens, len(self.pieces))
            progress.advance(shard.entry.bytes)

    def lines(self) -> Iterator[str]:
        """The lines to print of the split."""
        both = (("documents", self.lengths.documents), ("sentences", self.lengths.sentences))
        for what, counts in both:
            yield f"{self.dataset.split} {what}, lengths in tokens"
            yield f"  {percentiles(counts)}"
            yield from _histogram(counts)
        total = max(int(self.pieces.sum()), 1)
        in_bytes = int(self.pieces[self.tokenizer.byte_ids].sum())
        used = int((self.pieces > 0).sum())
        yield (
            f"{self.dataset.split} pieces: {self.pieces[self.tokenizer.unk_id] / total:.3%} unknown, "
            f"{in_bytes / total:.3%} single bytes of characters without a piece, "
            f"{used:,} of {len(self.pieces):,} used"
        )
        if words := int(self.pieces[self.tokenizer.starts_word].sum()):
            yield f"{self.dataset.split}: {total / words:.2f} tokens a word"


def _histogram(counts: Counts) -> Iterator[str]:
    """A line for each power of two that some have."""
    ranges = histogram(counts)
    most = max((n for _, n in ranges), default=1)
    for name, n in ranges:
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
