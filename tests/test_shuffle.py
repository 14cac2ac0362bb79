"""The two passes lose nothing, repeat nothing, and their order depends on texts and seed alone."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bertscale.config import UserError
from bertscale.data.shards import token_dtype
from data_prep import shuffle
from data_prep.shuffle import ROW, Digest, Merged, Spill, SpillBuilder, merge, number_of_shards

Text = list[list[int]]  # sentences of tokens
Found = tuple[int, Text]  # document, sentences


def digest_of(text: Text) -> bytes:
    return repr(text).encode()


def spills_of(
    folder: Path, texts: list[Text], spill_sizes: list[int], digest: Digest, dtype: Any = np.uint16
) -> tuple[list[Spill], int]:
    """Writes spills of so many documents each, the last size again and again; also counts duplicates."""
    builder, spills, start = SpillBuilder(dtype, digest.deduplicate), list[Spill](), 0
    while start < len(texts):
        size = spill_sizes[min(len(spills), len(spill_sizes) - 1)]
        some = texts[start : start + size]
        middle = len(some) // 2  # in two batches
        for first, batch in ((start, some[:middle]), (start + middle, some[middle:])):
            rows = np.zeros(len(batch), ROW)
            for row, (number, text) in zip(rows, enumerate(batch, first), strict=True):
                row["document"], row["text_bytes"] = number, len(digest_of(text))
                row["key"], row["check"] = digest(digest_of(text), number)
                row["sentences"], row["tokens"] = len(text), sum(map(len, text))
            sentences = [sentence for text in batch for sentence in text]
            builder.add(
                rows,
                np.array([len(sentence) for sentence in sentences], np.uint32),
                np.array([token for sentence in sentences for token in sentence], dtype),
            )
        spills.append(builder.write(folder / f"{len(spills)}.spill", "train"))
        assert (folder / spills[-1].name).stat().st_size == spills[-1].bytes
        start += size
    return spills, builder.duplicates


def documents_of(merged: Merged) -> list[Found]:
    columns, found = merged.columns, list[Found]()
    for row, number in enumerate(columns["documents"].tolist()):
        tokens, lengths = (
            columns[values][columns[offsets][row] : columns[offsets][row + 1]]
            for values, offsets in (("tokens", "token_offsets"), ("sentence_lengths", "sentence_offsets"))
        )
        assert lengths.sum() == len(tokens)
        found.append((number, [part.tolist() for part in np.split(tokens, np.cumsum(lengths)[:-1])]))
    return found


def shuffled(
    folder: Path,
    texts: list[Text],
    spill_sizes: list[int],
    digest: Digest,
    count: int,
    dtype: Any = np.uint16,
) -> tuple[list[list[Found]], int, int]:
    """The documents of each shard, the number of duplicates, and the bytes of text."""
    spills, duplicates = spills_of(folder, texts, spill_sizes, digest, dtype)
    shards = [merge(folder, spills, dtype, number, count, digest.deduplicate) for number in range(count)]
    return (
        [documents_of(shard) for shard in shards],
        duplicates + sum(shard.duplicates for shard in shards),
        sum(shard.text_bytes for shard in shards),
    )


texts_of_few = st.lists(
    st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=4), min_size=1, max_size=3), max_size=40
)
sizes = st.lists(st.integers(1, 15), min_size=1, max_size=5)


@settings(max_examples=150, deadline=None)
@given(
    texts=texts_of_few,
    spill_sizes=sizes,
    count=st.integers(1, 9),
    seed=st.integers(0, 2**70),
    deduplicate=st.booleans(),
    chunk=st.integers(1, 30),
)
def test_nothing_is_lost_and_nothing_repeated(
    texts: list[Text], spill_sizes: list[int], count: int, seed: int, deduplicate: bool, chunk: int
) -> None:
    digest = Digest(seed, deduplicate)
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(shuffle, "CHUNK", chunk)
        shards, duplicates, text_bytes = shuffled(Path(name), texts, spill_sizes, digest, count)
    found = [document for shard in shards for document in shard]
    first = {repr(text): number for number, text in reversed(list(enumerate(texts)))}
    expected = set(first.values()) if deduplicate else set(range(len(texts)))
    assert sorted(number for number, _ in found) == sorted(expected)
    assert all(texts[number] == text for number, text in found)
    assert duplicates == len(texts) - len(expected)
    assert text_bytes == sum(len(digest_of(text)) for _, text in found)
    keys = [digest(digest_of(text), number) for number, text in found]
    assert keys == sorted(keys)  # one order through all shards
    for number, shard in enumerate(shards):
        assert all(digest(digest_of(t), n)[0] * count >> 64 == number for n, t in shard)


@settings(max_examples=50, deadline=None)
@given(texts=texts_of_few, one=sizes, other=sizes, counts=st.tuples(st.integers(1, 9), st.integers(1, 9)))
def test_the_order_does_not_depend_on_pieces_and_shards(
    texts: list[Text], one: list[int], other: list[int], counts: tuple[int, int]
) -> None:
    orders = []
    for spill_sizes, count in zip((one, other), counts, strict=True):
        with tempfile.TemporaryDirectory() as name:
            shards, _, _ = shuffled(Path(name), texts, spill_sizes, Digest(3, True), count)
        orders.append([document for shard in shards for document in shard])
    assert orders[0] == orders[1]


def test_the_seed_decides_the_order(tmp_path: Path) -> None:
    texts = [[[number]] for number in range(2000)]
    orders = []
    for seed in (0, 1):
        (tmp_path / str(seed)).mkdir()
        shards, _, _ = shuffled(tmp_path / str(seed), texts, [100], Digest(seed, True), 4)
        assert all(400 < len(shard) < 600 for shard in shards)  # 500 expected, standard deviation 19
        orders.append([number for shard in shards for number, _ in shard])
    for order in (*orders, [orders[1].index(number) for number in orders[0]]):
        # Uniform order: no correlation with where the documents stood, nor with the other seed's.
        assert abs(np.corrcoef(order, np.arange(2000))[0, 1]) < 0.1  # standard deviation 0.022


def test_two_texts_that_share_half_of_a_digest_are_both_kept(tmp_path: Path) -> None:
    class Half(Digest):
        def __call__(self, text: bytes, document: int) -> tuple[int, int]:
            return 5, super().__call__(text, document)[1]

    texts = [[[1]], [[2]], [[1]], [[3]]]
    [shard], duplicates, _ = shuffled(tmp_path, texts, [2], Half(0, True), 1)
    assert (sorted(number for number, _ in shard), duplicates) == ([0, 1, 3], 1)


def test_one_text_without_deduplication_spreads_over_all_shards(tmp_path: Path) -> None:
    shards, duplicates, _ = shuffled(tmp_path, [[[1, 2]]] * 400, [400], Digest(0, False), 4)
    assert all(60 < len(shard) < 140 for shard in shards)  # 100 expected, standard deviation 8.7
    assert duplicates == 0


def test_large_vocabularies_and_long_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shuffle, "SPILL_BYTES", 4_000)
    long = [list(range(60_000 + n, 70_000 + n)) for n in range(3)]  # longer than a spill
    texts = [[[n]] * 3 for n in range(50)] + [[sentence, [1]] for sentence in long]
    [shard], _, _ = shuffled(tmp_path, texts, [20], Digest(0, True), 1, token_dtype(100_000))
    assert sorted(shard) == list(enumerate(texts))


def test_the_number_of_shards() -> None:
    spill = Spill("p", "train", rows=1000, sentences=10_000, tokens=300_000, bytes=0)
    assert number_of_shards([], 2, 10**6) == 0
    assert number_of_shards([spill], 2, 10**9) == 1
    assert number_of_shards([spill] * 10, 2, 10**6) == 8  # 600 + 40 + 96 bytes for each of 10,000 rows
    huge = Spill("p", "train", rows=1, sentences=1, tokens=2**33, bytes=0)
    assert number_of_shards([huge], 2, 2**62) == 9  # list offsets are int32


def test_a_shard_that_cannot_hold_its_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shuffle, "LARGEST_SHARD", 100)
    with pytest.raises(UserError, match="would hold 150 tokens, more than 100: lower shard_bytes"):
        shuffled(tmp_path, [[[n] * 50] for n in range(3)], [3], Digest(0, True), 1)
