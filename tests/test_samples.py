"""The samplers of every kind against the documents. Every token of the corpus is its own number, so a range
of tokens says where it comes from."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from math import sqrt
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import pretrain_config

from bertscale.config import UserError
from bertscale.data import index
from bertscale.data.samples import Sampler, Segments, _cuts, _heads, check_batch, check_batches
from bertscale.data.shards import Dataset, open_dataset, write_manifest, write_shard

Sizes = list[list[int]]  # documents as the lengths of their sentences
MAX_LENGTH = 48
BUDGET = MAX_LENGTH - 3
KINDS = ("nsp", "sop", "document", "packed")

SENTENCES = st.lists(st.integers(1, 30) | st.integers(1, 200), max_size=12)
CORPORA = st.lists(st.lists(SENTENCES, max_size=12), min_size=1, max_size=4).filter(
    lambda shards: sum(sum(d) >= 2 for sizes in shards for d in sizes) >= 2
)
SETTINGS = st.tuples(
    CORPORA,
    st.integers(8, 64),  # max_length
    st.integers(1, 4),  # window_blocks
    st.sampled_from([32, 256, 2**19]),  # tokens of a block
    st.integers(0, 2**64 - 1),  # seed
)


def make_dataset(folder: Path, shards: list[Sizes], split: str = "train") -> Dataset:
    """Real shards whose tokens are 0, 1, 2, ... through all of them."""
    entries, token, document = [], 0, 0
    for number, sizes in enumerate(shards):
        documents = []
        for sentences in sizes:
            ids = []
            for size in sentences:
                ids.append(list(range(token, token + size)))
                token += size
            documents.append((document, ids))
            document += 1
        entries.append(write_shard(folder / f"{split}-{number:05d}.arrow", documents, np.uint16, split))
    (folder / "tokenizer.model").write_bytes(b"no model")
    digest = hashlib.sha256(b"no model").hexdigest()
    write_manifest(
        folder, tokenizer_sha256=digest, vocab_size=65_000, settings={}, counters={}, shards=entries
    )
    return open_dataset(folder, "train")


@contextmanager
def dataset_of(shards: list[Sizes], block_tokens: int) -> Iterator[Dataset]:
    """For hypothesis, which makes many corpora in one test; nothing is waited for on the disk."""
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(index, "BLOCK_TOKENS", block_tokens),
        mock.patch.object(os, "fsync"),
    ):
        yield make_dataset(Path(folder), shards)


def make_sampler(
    dataset: Dataset, kind: str = "nsp", max_length: int = MAX_LENGTH, window_blocks: int = 64, seed: int = 0
) -> Sampler:
    return Sampler(dataset, kind, max_length, window_blocks, seed)


def segments_of(sampler: Sampler, numbers: np.ndarray) -> Segments:
    return sampler.segments(numbers, numbers)


def random_sizes(documents: int, seed: int) -> Sizes:
    rng = np.random.default_rng(seed)
    counts = np.where(
        rng.random(documents) < 0.1, rng.integers(0, 2, documents), rng.integers(2, 14, documents)
    )
    sizes = [rng.integers(1, 20, count).tolist() for count in counts]
    sizes[3] = [5, 200, 7, 90, 3]  # sentences far beyond the budget
    sizes[4] = [1]
    return sizes


SHARDS = [random_sizes(100, 1), random_sizes(37, 2), [], random_sizes(120, 3)]
DOCUMENTS: Sizes = [sentences for sizes in SHARDS for sentences in sizes]


def document_starts(shards: list[Sizes]) -> np.ndarray:
    """First token of each document, empty ones too, [D + 1]."""
    return np.cumsum([0] + [sum(sentences) for sizes in shards for sentences in sizes])


def owners(shards: list[Sizes], tokens: np.ndarray) -> np.ndarray:
    return np.searchsorted(document_starts(shards), tokens, side="right") - 1


def units_of(sentences: list[int], budget: int) -> list[int]:
    """The sentences, those beyond the budget in parts that are as even as can be."""
    units = []
    for size in sentences:
        parts = -(-size // budget)
        units += [size // parts + (part < size % parts) for part in range(parts)]
    return units


def reference_chunks(shards: list[Sizes], budget: int, *, fill: bool) -> list[tuple[int, int]]:
    """(first token, tokens) of each chunk: with `fill` as the loop of the published data creation, which
    takes sentences until the budget is reached; else as many as stay within it."""
    chunks, token = [], 0
    for sizes in shards:
        for sentences in sizes:
            held = 0
            for size in units_of(sentences, budget):
                if not fill and held + size > budget:
                    chunks.append((token - held, held))
                    held = 0
                token, held = token + size, held + size
                if fill and held >= budget:
                    chunks.append((token - held, held))
                    held = 0
            if held:
                chunks.append((token - held, held))
    return chunks


@settings(deadline=None, max_examples=60)
@given(SETTINGS, st.sampled_from(["document", "packed"]))
def test_every_token_is_used_once_an_epoch(
    setting: tuple[list[Sizes], int, int, int, int], kind: str
) -> None:
    shards, max_length, window_blocks, block_tokens, seed = setting
    with dataset_of(shards, block_tokens) as dataset:
        sampler = make_sampler(dataset, kind, max_length, window_blocks, seed)
        n = sampler.num_samples
        for epoch in range(2):
            segments = segments_of(sampler, epoch * n + np.arange(n))
            ranges = sorted(zip(segments.start.tolist(), segments.length.tolist(), strict=True))
            at = 0
            for start, length in ranges:
                assert start == at
                at += length
            assert at == dataset.num_tokens
            np.testing.assert_array_equal(
                owners(shards, segments.start), owners(shards, segments.start + segments.length - 1)
            )
            assert segments.label is None
            assert not segments.kind.any()
            sizes = np.bincount(segments.sample, segments.length + 2, n)
            assert sizes.max() <= max_length
            if kind == "document":
                assert ranges == reference_chunks(shards, max_length - 2, fill=False)
                assert segments.sample.tolist() == list(range(n))
            else:  # all but the last of a block are full, up to a cut inside [SEP] [CLS] at either end
                assert (sizes < max_length - 4).sum() <= len(sampler.index.shard)


@settings(deadline=None, max_examples=60)
@given(SETTINGS, st.sampled_from(["nsp", "sop"]))
def test_an_epoch_of_pairs_takes_every_chunk_of_every_document_once(
    setting: tuple[list[Sizes], int, int, int, int], kind: str
) -> None:
    shards, max_length, window_blocks, block_tokens, seed = setting
    budget = max_length - 3
    with dataset_of(shards, block_tokens) as dataset:
        sampler = make_sampler(dataset, kind, max_length, window_blocks, seed)
        n = sampler.num_samples
        chunks = [c for c in reference_chunks(shards, budget, fill=True) if c[1] >= 2]
        assert len(chunks) == n
        documents = [sum(sentences) for sizes in shards for sentences in sizes]
        assert sampler.num_documents == sum(size > 0 for size in documents)
        assert sampler.left_out == documents.count(1)
        chunk_starts = np.array([start for start, _ in chunks])
        chunk_ends = np.array([start + size for start, size in chunks])
        assert set(owners(shards, chunk_starts).tolist()) == {d for d, s in enumerate(documents) if s > 1}
        for epoch in range(2):  # even numbers: no pair is changed
            segments = sampler.segments(epoch * n + np.arange(n), 2 * np.arange(n))
            a, b = segments.start[::2], segments.start[1::2]
            of_a, of_b = segments.length[::2], segments.length[1::2]
            chunk = np.searchsorted(chunk_starts, a, side="right") - 1
            np.testing.assert_array_equal(np.sort(chunk), np.arange(n))
            assert (a + of_a <= b).all()
            assert (b + of_b <= chunk_ends[chunk]).all()
            np.testing.assert_array_equal(of_a + of_b, np.minimum(chunk_ends - chunk_starts, budget)[chunk])


@settings(deadline=None, max_examples=60)
@given(SETTINGS, st.integers(0, 2**40))
def test_next_sentence_pairs_are_labelled_right(
    setting: tuple[list[Sizes], int, int, int, int], first: int
) -> None:
    shards, max_length, window_blocks, block_tokens, seed = setting
    starts = document_starts(shards)
    with dataset_of(shards, block_tokens) as dataset:
        sampler = make_sampler(dataset, "nsp", max_length, window_blocks, seed)
        numbers = first + np.arange(2 * sampler.num_samples)
        segments = segments_of(sampler, numbers)
        assert segments.label is not None
        np.testing.assert_array_equal(segments.label, numbers % 2)
        np.testing.assert_array_equal(segments.sample, np.repeat(np.arange(len(numbers)), 2))
        np.testing.assert_array_equal(segments.kind, np.tile([0, 1], len(numbers)))
        assert segments.length.min() >= 1
        owner = owners(shards, segments.start)
        assert (segments.start + segments.length <= starts[owner + 1]).all()  # no segment leaves its document
        a, b = owner[::2], owner[1::2]
        np.testing.assert_array_equal(a != b, segments.label == 1)
        assert (segments.length[::2] + segments.length[1::2]).max() <= max_length - 3
        for part in sampler.order.find(numbers):  # partners are of one window, so that reads stay there
            documents = set()
            for block in part.blocks.tolist():
                rows = sampler.index.row[block] + np.arange(sampler.index.rows[block])
                before = sum(len(sizes) for sizes in shards[: sampler.index.shard[block]])
                documents |= set((before + rows).tolist())
            assert set(b[part.asked].tolist()) <= documents
            assert set(a[part.asked].tolist()) <= documents


@settings(deadline=None, max_examples=60)
@given(SETTINGS)
def test_sentence_order_pairs_are_the_same_in_order_and_swapped(
    setting: tuple[list[Sizes], int, int, int, int],
) -> None:
    shards, max_length, window_blocks, block_tokens, seed = setting
    with dataset_of(shards, block_tokens) as dataset:
        sampler = make_sampler(dataset, "sop", max_length, window_blocks, seed)
        numbers = np.arange(2 * sampler.num_samples)
        segments = segments_of(sampler, numbers)
        assert segments.label is not None
        np.testing.assert_array_equal(segments.label, numbers % 2)
        a, b = segments.start[::2], segments.start[1::2]
        np.testing.assert_array_equal(owners(shards, a), owners(shards, b))
        np.testing.assert_array_equal(a > b, segments.label == 1)
        first, second = np.minimum(a, b), np.maximum(a, b)
        size = np.where(a < b, segments.length[::2], segments.length[1::2])
        assert (first + size <= second).all()
        whole = segments.length[::2] + segments.length[1::2] < max_length - 3  # nothing was cut
        np.testing.assert_array_equal((first + size)[whole], second[whole])  # side by side


def test_uncut_segments_are_of_whole_sentences_and_partners_of_all_documents(tmp_path: Path) -> None:
    sampler = make_sampler(make_dataset(tmp_path, SHARDS))
    documents = document_starts(SHARDS)
    sentences = np.cumsum([0] + [size for sizes in DOCUMENTS for size in units_of(sizes, BUDGET)])
    segments = segments_of(sampler, np.arange(40 * sampler.num_samples))
    a, b = segments.start[::2], segments.start[1::2]
    a_end, b_end = a + segments.length[::2], b + segments.length[1::2]
    real = segments.label == 0
    full = a_end - a + b_end - b < BUDGET  # nothing was cut
    split = np.isin(a_end, sentences) | ~real  # a lone sentence is split between two tokens
    assert full.any()
    assert 0.8 < split[full].mean() < 1
    for ends in (a, b, b_end):
        assert np.isin(ends[full & split], sentences).all()
    # A random partner that fills no room ended with its document.
    assert np.isin(b_end[full & ~real], documents).all()
    owner_b = owners(SHARDS, b)
    assert set(owner_b[~real]) == {n for n, sizes in enumerate(DOCUMENTS) if sizes}  # every document serves


def test_a_chunk_is_left_alone_about_half_of_the_time(tmp_path: Path) -> None:
    sampler = make_sampler(make_dataset(tmp_path, SHARDS), "sop")
    n = sampler.num_samples
    real = np.zeros(document_starts(SHARDS)[-1])
    for epoch in range(100):
        numbers = epoch * n + np.arange(n)
        segments = sampler.segments(numbers, numbers)
        first = np.minimum(segments.start[::2], segments.start[1::2])
        np.add.at(real, owners(SHARDS, first[segments.label == 0]), 1)
    chunks = np.bincount(
        owners(SHARDS, np.array([s for s, size in reference_chunks(SHARDS, BUDGET, fill=True) if size > 1])),
        minlength=len(DOCUMENTS),
    )
    used = np.flatnonzero(chunks)
    deviation = np.abs(real[used] - 50 * chunks[used]) / np.sqrt(25 * chunks[used])
    assert deviation.max() <= 5  # sigmas


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_depends_on_its_number_alone(tmp_path: Path, kind: str) -> None:
    with mock.patch.object(index, "BLOCK_TOKENS", 700):
        sampler = make_sampler(make_dataset(tmp_path, SHARDS), kind, window_blocks=3)
    assert sampler.order.num_windows > 3
    numbers = np.arange(3 * sampler.num_samples)
    together = segments_of(sampler, numbers)
    shuffled = np.random.default_rng(0).permutation(numbers)
    for some in (shuffled[:200], shuffled[200:201]):
        found = segments_of(sampler, some)
        expected = [np.flatnonzero(together.sample == number) for number in some]
        rows = np.concatenate(expected)
        np.testing.assert_array_equal(found.start, together.start[rows])
        np.testing.assert_array_equal(found.length, together.length[rows])
        np.testing.assert_array_equal(found.kind, together.kind[rows])
        np.testing.assert_array_equal(found.sample, np.repeat(np.arange(len(some)), list(map(len, expected))))
        if together.label is not None:
            np.testing.assert_array_equal(found.label, together.label[some])


@pytest.mark.parametrize("kind", KINDS)
def test_another_seed_gives_another_order(tmp_path: Path, kind: str) -> None:
    dataset = make_dataset(tmp_path, SHARDS)
    one, two = (segments_of(make_sampler(dataset, kind, seed=seed), np.arange(300)) for seed in (0, 1))
    size = min(len(one.start), len(two.start))
    assert (one.start[:size] == two.start[:size]).mean() < 0.05


def test_packed_samples_of_long_documents_are_dense(tmp_path: Path) -> None:
    sampler = make_sampler(make_dataset(tmp_path, [[[20] * 5] * 300] * 2), "packed", max_length=128)
    segments = segments_of(sampler, np.arange(sampler.num_samples))
    tokens = int((segments.length + 2).sum())
    assert tokens >= 0.99 * 128 * sampler.num_samples


def test_cuts_are_those_of_the_published_loop() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(1, 60, 500), rng.integers(1, 60, 500)
    cut_a, cut_b = _cuts(a, b, BUDGET)
    for length_a, length_b, left_a, left_b in zip(a, b, a - cut_a, b - cut_b, strict=True):
        while length_a + length_b > BUDGET:
            if length_a > length_b:
                length_a -= 1
            else:
                length_b -= 1
        assert (left_a, left_b) == (length_a, length_b)


@pytest.mark.parametrize("flips", [0, 1, 31, 32, 33, 127, 128, 129, 1000])
def test_front_and_back_are_cut_by_fair_coins(flips: int) -> None:
    trials = 4000
    number = np.arange(trials)
    heads = _heads(np.full(trials, flips), 0, number, number * 0, seed=0)
    assert heads.min() >= 0
    assert heads.max() <= flips
    assert abs(heads.mean() - flips / 2) <= 5 * sqrt(flips / 4 / trials)  # five sigmas
    assert abs(heads.var() - flips / 4) <= 5 * (flips / 4) * sqrt(2 / trials) + 1e-3


@pytest.mark.parametrize(
    ("shards", "kind", "message"),
    [
        ([], "nsp", "holds 0 document"),
        ([], "packed", "holds 0 document"),
        ([[[], []]], "document", "holds 0 document"),
        ([[[4, 5, 6]]], "nsp", "holds 1 document.* needs at least two"),
        ([[[4, 5, 6], []]], "nsp", "holds 1 document"),
        ([[[1], [1], [1]]], "nsp", "the 3 documents .* one token each"),
        ([[[1], [1], [1]]], "sop", "the 3 documents .* one token each"),
    ],
)
def test_data_without_samples_is_refused(
    tmp_path: Path, shards: list[Sizes], kind: str, message: str
) -> None:
    dataset = make_dataset(tmp_path, shards)
    with pytest.raises(UserError, match=message) as error:
        make_sampler(dataset, kind)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("kind", ["sop", "document", "packed"])
def test_one_document_is_enough_for_other_kinds(tmp_path: Path, kind: str) -> None:
    sampler = make_sampler(make_dataset(tmp_path, [[[4, 5, 6]]]), kind)
    assert sampler.num_samples == 1
    assert segments_of(sampler, np.arange(4)).length.sum() == 4 * 15


def test_a_shard_that_does_not_add_up_is_refused_by_name(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, SHARDS)
    path = tmp_path / "train-00001.arrow"
    content = path.read_bytes()
    lengths = dataset.shards[1].sentence_lengths.tobytes()
    at = content.index(lengths)
    path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    with pytest.raises(UserError, match=r"train-00001\.arrow is damaged"):
        make_sampler(open_dataset(tmp_path, "train"))


# --------------------------------------------------------------------------------------------- index


def test_samples_are_counted_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = make_dataset(tmp_path, SHARDS)
    first = make_sampler(dataset, "nsp")
    kept = list((tmp_path / ".index").iterdir())
    assert len(kept) == 1
    with monkeypatch.context() as patch:
        patch.setattr(index, "cut_blocks", lambda dataset: pytest.fail("counted again"))
        for kind in ("nsp", "sop"):  # both are of the same chunks
            again = make_sampler(open_dataset(tmp_path, "train"), kind)
            for one, other in zip(first.index, again.index, strict=True):
                np.testing.assert_array_equal(one, other)
        with pytest.raises(BaseException, match="counted again"):
            make_sampler(dataset, "nsp", max_length=MAX_LENGTH + 1)

    content = kept[0].read_bytes()
    for damaged in (b"", content[:-1], content[:40] + bytes([content[40] ^ 1]) + content[41:]):
        kept[0].write_bytes(damaged)
        assert make_sampler(dataset).num_samples == first.num_samples
        assert kept[0].read_bytes() == content  # mended


def test_other_shards_are_counted_anew(tmp_path: Path) -> None:
    before = make_sampler(make_dataset(tmp_path, SHARDS)).num_samples
    dataset = make_dataset(tmp_path, SHARDS[:1])
    assert make_sampler(dataset).num_samples < before
    assert len(list((tmp_path / ".index").iterdir())) == 2


def test_a_folder_that_cannot_be_written_does(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, SHARDS)
    (tmp_path / ".index").write_text("a file where the folder would be")  # root writes to any folder
    assert make_sampler(dataset).num_samples > 0


def test_ranks_count_together(tmp_path: Path) -> None:
    class Peer:
        """One of three ranks; what the others gather is known beforehand."""

        world = 3

        def __init__(self, rank: int, shares: list[object]) -> None:
            self.rank, self.shares = rank, shares

        def broadcast(self, value: object) -> object:
            return None

        def gather(self, value: object) -> list[object]:
            self.shares[self.rank] = value
            return self.shares

    with mock.patch.object(index, "BLOCK_TOKENS", 500):
        alone = index.load_index(make_dataset(tmp_path, SHARDS), "pairs", MAX_LENGTH)
        (name,) = (tmp_path / ".index").iterdir()
        name.unlink()
        dataset = open_dataset(tmp_path, "train")
        count = index._count(
            dataset, index.cut_blocks(dataset), "pairs", MAX_LENGTH, np.arange(len(alone.shard)), 0
        )
        for rank in (2, 1, 0):
            shares: list[object] = [count[:, one::3] for one in range(3)]
            together = index.load_index(dataset, "pairs", MAX_LENGTH, Peer(rank, shares))
            assert name.exists() == (rank == 0)  # the first rank writes
            for one, other in zip(alone, together, strict=True):
                np.testing.assert_array_equal(one, other)


def test_damage_that_one_rank_meets_is_told_by_all(tmp_path: Path) -> None:
    error = UserError("a shard is damaged")
    peers = mock.Mock(rank=0, world=2)
    peers.broadcast.return_value = None
    peers.gather = lambda mine: [mine, error]
    with pytest.raises(UserError, match="a shard is damaged"):
        index.load_index(make_dataset(tmp_path, SHARDS), "pairs", MAX_LENGTH, peers)
    assert not (tmp_path / ".index").exists()


@settings(deadline=None, max_examples=60)
@given(SETTINGS)
def test_blocks_are_runs_of_whole_documents_that_cover_the_shards(
    setting: tuple[list[Sizes], int, int, int, int],
) -> None:
    shards, _, _, block_tokens, _ = setting
    with dataset_of(shards, block_tokens) as dataset:
        blocks = index.cut_blocks(dataset)
        for number, sizes in enumerate(shards):
            mine = blocks.shard == number
            rows = [
                row
                for first, count in zip(blocks.row[mine], blocks.rows[mine], strict=True)
                for row in range(first, first + count)
            ]
            assert len(set(rows)) == len(rows)
            assert {row for row, sentences in enumerate(sizes) if sentences} <= set(rows)
            tokens = [
                sum(sum(sizes[row]) for row in range(first, first + count))
                for first, count in zip(blocks.row[mine], blocks.rows[mine], strict=True)
            ]
            longest = max((sum(sentences) for sentences in sizes), default=0)
            assert all(0 < size < 1.5 * block_tokens + longest + 1 for size in tokens)


# --------------------------------------------------------------------------------------------- batch


def test_a_batch_that_divides_gives_the_micro_batches_of_a_rank() -> None:
    assert check_batch(256, 32, 1) == 8
    assert check_batch(256, 32, 4) == 2
    assert check_batch(6, 3, 1) == 2
    assert check_batch(15, 5, 1, pairs=False) == 3


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (
            (100, 32, 2),
            r"=100 .* 64 \(2 .*=32\); train\.global_batch=64 or 128 would do, or .*micro_batch=25$",
        ),
        ((16, 32, 1), r"; train\.global_batch=32 would do, or train\.micro_batch=16$"),
        ((256, 32, 3), r"train\.global_batch=192 or 288 would do$"),
        ((10, 3, 1), r"train\.global_batch=6 or 12 would do, or train\.micro_batch=2$"),
        ((10, 3, 1, False), r"train\.global_batch=9 or 12 would do, or train\.micro_batch=2$"),
        ((15, 5, 1), "is odd"),
    ],
)
def test_a_batch_that_does_not_divide_is_refused_with_sizes(
    batch: tuple[int, int, int], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        check_batch(*batch)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_warmup": [[1e3, 8]]}, None),
        ({"batch_warmup": [[1e3, 6], [2e3, 8]]}, r"^a batch of train\.batch_warmup=6 is not a multiple of 8"),
        ({"batch_warmup": [[1e3, 6]], "micro_tokens": 64}, None),
        ({"batch_warmup": [[1e3, 6]], "micro_tokens": 64, "global_batch": 15}, "global_batch=15 .* of 2 "),
    ],
)
def test_each_batch_of_a_warmup_is_checked(changes: dict[str, Any], message: str | None) -> None:
    train = {"global_batch": 16, "micro_batch": 4, **changes}
    config = pretrain_config("d", "r", train=train, samples={"kind": "packed", "max_length": 48})
    if message is None:
        assert check_batches(config, 2) == (8 if "micro_tokens" in changes else 2)
    else:
        with pytest.raises(UserError, match=message):
            check_batches(config, 2)


def test_the_check_loads_no_torch() -> None:
    code = "import sys, bertscale.data.samples; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("kind", ["nsp", "document", "packed"])
def test_short_documents_are_as_if_they_were_not_there(kind: str, tmp_path: Path) -> None:
    long = [[sentences for sentences in sizes if sum(sentences) >= 40] for sizes in SHARDS]
    for name in ("all", "long"):
        (tmp_path / name).mkdir()
    chosen = Sampler(make_dataset(tmp_path / "all", SHARDS), kind, MAX_LENGTH, 64, 0, min_tokens=40)
    only = make_sampler(make_dataset(tmp_path / "long", long), kind)
    assert chosen.num_documents == only.num_documents == sum(map(len, long)) < len(DOCUMENTS)
    assert chosen.num_samples == only.num_samples
    numbers = np.arange(2 * only.num_samples)
    found, expected = segments_of(chosen, numbers), segments_of(only, numbers)
    # The numbers in the data set of the tokens of long documents, one after another.
    sizes = [sum(sentences) for sentences in DOCUMENTS]
    places = np.flatnonzero(np.repeat(np.array(sizes) >= 40, sizes))
    np.testing.assert_array_equal(found.start, places[expected.start])
    np.testing.assert_array_equal(found.length, expected.length)
    np.testing.assert_array_equal(found.sample, expected.sample)


def test_blocks_without_long_documents_are_left_out(tmp_path: Path) -> None:
    sizes: list[Sizes] = [[[5, 5]] * 50 + [[30, 30]] * 2 + [[5, 5]] * 50 + [[30, 30]]]
    with mock.patch.object(index, "BLOCK_TOKENS", 100):
        dataset = make_dataset(tmp_path, sizes)
        sampler = Sampler(dataset, "nsp", MAX_LENGTH, 1, 0, min_tokens=20)
        assert sampler.num_documents == 3
        assert (sampler.index.documents > 0).all()
        assert len(sampler.index.documents) < len(index.cut_blocks(dataset).shard)
        again = Sampler(dataset, "nsp", MAX_LENGTH, 1, 0, min_tokens=20)  # from the stored index
        np.testing.assert_array_equal(again.index.row, sampler.index.row)
        assert Sampler(dataset, "nsp", MAX_LENGTH, 1, 0).num_documents == 103
        with pytest.raises(UserError, match=r"0 document\(s\) of samples\.min_document_tokens=99 .* lower"):
            Sampler(dataset, "nsp", MAX_LENGTH, 1, 0, min_tokens=99)
