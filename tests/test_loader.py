"""Batches against the documents: the same samples for any number of ranks and after any stop."""

from __future__ import annotations

import hashlib
import threading
from dataclasses import dataclass, fields
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
import xxhash

from bertscale.config import SamplesConfig, UserError
from bertscale.loader import Loader, MicroBatch
from bertscale.shards import Dataset, open_dataset, write_manifest, write_shard
from bertscale.tokenizer import Tokenizer

CLS, SEP, MASK = 2, 3, 4
FIRST = 5  # the corpus's token n has the id FIRST + n
Sample = tuple[tuple[int, ...], ...]  # tokens, types, positions, (place, target)s, label


@dataclass
class Special:
    vocab_size: int = 65_000
    cls_id: int = CLS
    sep_id: int = SEP
    mask_id: int = MASK
    special_ids: tuple[int, ...] = (0, 1, CLS, SEP, MASK)


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    """Two shards of documents in which no two tokens are the same."""
    entries, token = [], FIRST
    for number, documents in enumerate((60, 41)):
        rows = []
        for document in range(documents):
            sentences = []
            for place in range(1 + document * 7 % 11):
                size = 1 + (document * 13 + place * 29 + number) % 19
                sentences.append(list(range(token, token + size)))
                token += size
            rows.append((document, sentences))
        entries.append(write_shard(tmp_path / f"train-{number:05d}.arrow", rows, np.uint16, "train"))
    (tmp_path / "tokenizer.model").write_bytes(b"no model")
    digest = hashlib.sha256(b"no model").hexdigest()
    write_manifest(
        tmp_path, tokenizer_sha256=digest, vocab_size=65_000, settings={}, counters={}, shards=entries
    )
    return open_dataset(tmp_path, "train")


def make_loader(
    dataset: Dataset,
    *,
    global_batch: int = 32,
    micro_batch: int = 4,
    seed: int = 0,
    rank: int = 0,
    world: int = 1,
) -> Loader:
    return Loader(
        dataset,
        cast(Tokenizer, Special()),
        SamplesConfig(max_length=64),
        global_batch=global_batch,
        micro_batch=micro_batch,
        seed=seed,
        rank=rank,
        world=world,
    )


def samples_of(batches: list[MicroBatch]) -> list[Sample]:
    found: list[Sample] = []
    for batch in batches:
        start = 0
        for row, length in enumerate(batch.lengths):
            inside = (batch.target_positions >= start) & (batch.target_positions < start + length)
            found.append(
                (
                    tuple(batch.tokens[start : start + length].tolist()),
                    tuple(batch.token_types[start : start + length].tolist()),
                    tuple(batch.positions[start : start + length].tolist()),
                    tuple((batch.target_positions[inside] - start).tolist()),
                    tuple(batch.targets[inside].tolist()),
                    (int(batch.next_sentence_label[row]),),
                )
            )
            start += length
        assert start == len(batch.tokens)
    return found


def same(one: list[MicroBatch], other: list[MicroBatch]) -> bool:
    def equal(a: MicroBatch, b: MicroBatch) -> bool:
        values = [(getattr(a, field.name), getattr(b, field.name)) for field in fields(MicroBatch)]
        return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in values)

    return len(one) == len(other) and all(equal(a, b) for a, b in zip(one, other, strict=True))


def test_samples_are_segments_of_documents_between_special_tokens(dataset: Dataset) -> None:
    loader = make_loader(dataset)
    owner = np.concatenate(
        [np.repeat(np.arange(len(s.documents)) + 1000 * n, np.diff(s.token_offsets))
         for n, s in enumerate(dataset.shards)]
    )  # fmt: skip
    masks = targets = 0
    for step in range(12):  # several epochs
        samples = samples_of(loader.step(step))
        assert sum(sample[-1][0] for sample in samples) == 16  # exactly half is random
        for masked, types, positions, places, originals, (label,) in samples:
            tokens = np.array(masked)
            tokens[list(places)] = originals
            seps = np.flatnonzero(tokens == SEP)
            assert tokens[0] == CLS
            assert len(seps) == 2
            assert seps[1] == len(tokens) - 1 <= 63
            a, b = tokens[1 : seps[0]] - FIRST, tokens[seps[0] + 1 : -1] - FIRST
            for segment in (a, b):
                assert len(segment) >= 1
                assert (segment >= 0).all()
                assert (np.diff(segment) == 1).all()  # consecutive tokens of one document
                assert owner[segment[0]] == owner[segment[-1]]
            assert (owner[a[0]] != owner[b[0]]) == bool(label)
            if not label and len(tokens) < 64:
                assert b[0] == a[-1] + 1
            assert types == (0,) * (len(a) + 2) + (1,) * (len(b) + 1)
            assert positions == tuple(range(len(tokens)))
            changed = [place for place, token in enumerate(masked) if token != tokens[place]]
            assert set(changed) <= set(places)
            masks += masked.count(MASK)
            targets += len(places)
    assert 0.7 < masks / targets < 0.9


def test_micro_batches_are_dense_int64_and_sorted_by_length(dataset: Dataset) -> None:
    batches = make_loader(dataset).step(0)
    assert [len(batch.lengths) for batch in batches] == [4] * 8
    lengths = [length for batch in batches for length in batch.lengths]
    assert lengths == sorted(lengths)
    for batch in batches:
        for field in fields(MicroBatch):
            value = getattr(batch, field.name)
            assert field.name == "lengths" or (value.dtype == torch.int64 and value.is_contiguous())
        assert same([batch.to("cpu")], [batch])
        assert batch.to("meta").tokens.device.type == "meta"


def test_a_step_is_the_same_for_any_number_of_ranks(dataset: Dataset) -> None:
    for step in (0, 7, 1000):
        unions = []
        for world, micro_batch in ((1, 32), (1, 2), (2, 4), (4, 8)):
            ranks = [
                samples_of(make_loader(dataset, rank=rank, world=world, micro_batch=micro_batch).step(step))
                for rank in range(world)
            ]
            assert all(len(samples) == 32 // world for samples in ranks)
            unions.append(sorted(sample for samples in ranks for sample in samples))
        assert all(union == unions[0] for union in unions)


def test_another_step_or_seed_is_another_batch(dataset: Dataset) -> None:
    first = samples_of(make_loader(dataset).step(0))
    assert not set(first) & set(samples_of(make_loader(dataset).step(1)))
    assert not set(first) & set(samples_of(make_loader(dataset, seed=1).step(0)))


def test_the_stream_is_the_one_that_earlier_versions_gave(dataset: Dataset) -> None:
    """A change of this digest means that no run resumes into the samples it began with: say so in the
    CHANGELOG."""
    digest = xxhash.xxh3_128()
    for step in (0, 1, 2**33):
        for batch in make_loader(dataset, seed=2**40 + 1).step(step):
            for field in fields(MicroBatch):
                value = getattr(batch, field.name)
                digest.update(np.asarray(value, np.int64).tobytes())
    assert digest.hexdigest() == "ae0e8d8b9ea1d360e743a991c9750022"


def test_a_chunk_gets_other_masks_in_another_epoch(dataset: Dataset) -> None:
    loader = make_loader(dataset, global_batch=2, micro_batch=2)
    n = loader.plan.num_chunks
    seen: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for step in range(10 * n // 2):
        for masked, _, _, places, originals, _ in samples_of(loader.step(step)):
            tokens = np.array(masked)
            tokens[list(places)] = originals
            seen.setdefault(tuple(tokens.tolist()), []).append(places)
    repeated = [masks for tokens, masks in seen.items() if len(masks) > 1 and len(tokens) > 40]
    assert repeated
    assert all(len(set(masks)) == len(masks) for masks in repeated)


def test_iterate_gives_the_steps_and_resumes_anywhere(dataset: Dataset) -> None:
    whole = list(make_loader(dataset).iterate(0, 12))
    assert [k for k, _ in whole] == list(range(12))
    loader = make_loader(dataset)
    assert all(same(batches, loader.step(k)) for k, batches in whole)
    resumed = list(make_loader(dataset).iterate(5, 12))
    assert [k for k, _ in resumed] == list(range(5, 12))
    assert all(same(one, other) for (_, one), (_, other) in zip(resumed, whole[5:], strict=True))
    assert list(loader.iterate(3, 3)) == []


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "loader"]


def test_leaving_the_loop_ends_the_thread(dataset: Dataset) -> None:
    loader = make_loader(dataset)
    for k, _ in loader.iterate(0, 1_000_000):
        assert len(loader_threads()) == 1
        if k == 2:
            break
    assert loader_threads() == []
    steps = loader.iterate(0, 1_000_000)
    next(steps)
    with pytest.raises(KeyboardInterrupt):
        steps.throw(KeyboardInterrupt)
    assert loader_threads() == []
    assert loader.data_wait > 0


def test_an_error_of_the_thread_is_raised_to_the_caller(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = make_loader(dataset)
    plain = loader.step

    def step(k: int) -> list[MicroBatch]:
        if k == 3:
            raise OSError("the disk went away")
        return plain(k)

    monkeypatch.setattr(loader, "step", step)
    steps = loader.iterate(0, 100)
    assert [next(steps)[0] for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match="the disk went away"):
        next(steps)
    assert loader_threads() == []


def test_a_batch_that_does_not_divide_is_refused(dataset: Dataset) -> None:
    with pytest.raises(UserError, match=r"train\.global_batch=24 or 36 would do"):
        make_loader(dataset, world=3)
