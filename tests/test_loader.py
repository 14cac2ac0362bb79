"""Batches against the documents: the same samples for any number of ranks and after any stop."""

from __future__ import annotations

import hashlib
import threading
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast
from unittest import mock

import numpy as np
import numpy.typing as npt
import pytest
import torch
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bertscale.config import SamplesConfig, UserError
from bertscale.data import index
from bertscale.data.batch_phases import batch_of
from bertscale.data.loader import Loader, balance
from bertscale.data.masking import mask_rules, mask_tokens, target_capacity
from bertscale.data.micro_batch import MicroBatch
from bertscale.data.mixture import LengthPhase, Mixture
from bertscale.data.shards import Dataset, open_dataset, write_manifest, write_shard
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

    @cached_property
    def starts_word(self) -> npt.NDArray[np.bool_]:
        starts: npt.NDArray[np.bool_] = np.arange(self.vocab_size) % 3 == 0
        return starts


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
    micro_tokens: int | None = None,
    static_targets: bool = False,
    masks: bool = True,
    batch_warmup: list[tuple[float, int]] | None = None,
    **samples: object,
) -> Loader:
    config = SamplesConfig.model_validate({"max_length": 64, **samples})
    mixture = Mixture(
        [dataset], [1.0], config, global_batch=global_batch, seed=seed, batch_warmup=batch_warmup
    )
    return Loader(
        mixture,
        cast(Tokenizer, Special()),
        micro_batch=micro_batch,
        micro_tokens=micro_tokens,
        static_targets=static_targets,
        masks=masks,
        rank=rank,
        world=world,
    )


def samples_of(batches: list[MicroBatch]) -> list[Sample]:
    """Sequence by sequence, each with its sample's label, if that has one."""
    found: list[Sample] = []
    for batch in batches:
        start = 0
        label = batch.next_sentence_label
        assert label is None or len(label) == len(batch.lengths)
        for row, length in enumerate(batch.lengths):
            inside = (batch.target_positions >= start) & (batch.target_positions < start + length)
            inside[batch.num_targets :] = False
            found.append(
                (
                    tuple(batch.tokens[start : start + length].tolist()),
                    tuple(batch.token_types[start : start + length].tolist()),
                    tuple(batch.positions[start : start + length].tolist()),
                    tuple((batch.target_positions[inside] - start).tolist()),
                    tuple(batch.targets[inside].tolist()),
                    () if label is None else (int(label[row]),),
                )
            )
            start += length
        assert start == len(batch.tokens)
    return found


def originals(sample: Sample) -> np.ndarray:
    """The tokens before they were masked."""
    tokens = np.array(sample[0])
    tokens[list(sample[3])] = sample[4]
    return tokens


def same(one: list[MicroBatch], other: list[MicroBatch]) -> bool:
    def equal(a: MicroBatch, b: MicroBatch) -> bool:
        values = [(getattr(a, name), getattr(b, name)) for name in MicroBatch._fields]
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
        for name in MicroBatch._fields:
            value = getattr(batch, name)
            if name == "num_targets":
                assert value == len(batch.targets)
                continue
            if name == "causal":
                assert value is False
                continue
            if name == "uniforms":  # of a generator's draws, which this run has none of
                assert value is None
                continue
            assert name == "lengths" or (value.dtype == torch.int64 and value.is_contiguous())
        assert same([batch.to("cpu")], [batch])
        assert batch.to("meta").tokens.device.type == "meta"


@pytest.mark.parametrize("kind", ["document", "packed"])
def test_sequences_of_other_kinds_are_runs_of_one_document(dataset: Dataset, kind: str) -> None:
    ends = np.concatenate([s.token_offsets[1:] + (s is dataset.shards[1]) * len(dataset.shards[0].tokens)
                           for s in dataset.shards])  # fmt: skip
    loader = make_loader(dataset, kind=kind)
    sampler = loader.mixture.phases[0].samplers[0]
    epoch = -(-sampler.num_samples // 32)
    seen = np.zeros(dataset.num_tokens, np.int64)
    for step in range(epoch):
        batches = loader.step(step)
        assert all(batch.next_sentence_label is None for batch in batches)
        for sample in samples_of(batches):
            tokens = originals(sample)
            assert tokens[0] == CLS
            assert tokens[-1] == SEP
            inner = tokens[1:-1] - FIRST
            assert (inner >= 0).all()
            assert (np.diff(inner) == 1).all()
            owner = np.searchsorted(ends, inner, side="right")
            assert (owner == owner[0]).all()
            seen[inner] += 1
            assert sample[1] == (0,) * len(tokens)
            assert sample[2] == tuple(range(len(tokens)))
        rows = [sum(batch.lengths) for batch in batches]
        assert max(rows) <= 4 * 64
        if kind == "packed":
            assert sum(rows) >= 0.97 * 32 * 64  # a small corpus: the last bin is a good part of it
    assert seen.min() == 1  # all of the corpus, and the beginning of the next epoch
    assert seen.sum() - dataset.num_tokens < 32 * 64


@pytest.mark.parametrize("unit", ["word", "span"])
def test_whole_words_are_masked(dataset: Dataset, unit: str) -> None:
    """A word of the corpus begins with each token that 3 divides, and with each sequence."""
    chosen = total = 0
    for sample in samples_of(make_loader(dataset, kind="packed", mask_unit=unit).step(0)):
        tokens, places = originals(sample), set(sample[3])
        words = np.cumsum(
            np.append(True, (tokens[1:] % 3 == 0) | (tokens[1:] < FIRST) | (tokens[:-1] < FIRST))
        )
        for word in np.unique(words):
            where = np.flatnonzero(words == word).tolist()
            assert len(places & set(where)) in (0, len(where))
        chosen, total = chosen + len(places), total + len(tokens) - 2
    assert 0.1 < chosen / total < 0.2


KINDS = st.sampled_from(["nsp", "sop", "document", "packed"])


@pytest.mark.parametrize("kind", ["nsp", "sop", "document", "packed"])
def test_a_step_is_the_same_for_any_number_of_ranks(dataset: Dataset, kind: str) -> None:
    for step in (0, 7, 1000):
        unions = []
        for world, micro_batch in ((1, 32), (1, 2), (2, 4), (4, 8)):
            ranks = [
                make_loader(dataset, rank=rank, world=world, micro_batch=micro_batch, kind=kind).step(step)
                for rank in range(world)
            ]
            assert all(len(batches) * micro_batch == 32 // world for batches in ranks)
            unions.append(sorted(sample for batches in ranks for sample in samples_of(batches)))
        assert all(union == unions[0] for union in unions)


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=KINDS,
    seed=st.integers(0, 2**64 - 1),
    first=st.integers(0, 2000),
    stops=st.lists(
        st.tuples(st.integers(1, 5), st.sampled_from([1, 8, 3, 4, 2, 24])), min_size=1, max_size=4
    ),
    warmup=st.sampled_from([[], [(1004, 16)], [(3, 8), (1500, 32)]]),
)
def test_any_ranks_and_stops_give_the_stream_of_one_rank(
    dataset: Dataset,
    kind: str,
    seed: int,
    first: int,
    stops: list[tuple[int, int]],
    warmup: list[tuple[int, int]],
) -> None:
    """1 -> 8 -> 3 -> 4 ranks and any other way: each step as one rank alone makes it, in one go."""
    settings: dict[str, Any] = {
        "global_batch": 48,
        "seed": seed,
        "kind": kind,
        "warmup": warmup,
        "window_blocks": 2,
    }
    with mock.patch.object(index, "BLOCK_TOKENS", 1000):
        alone = make_loader(dataset, micro_batch=48, **settings)
        step = first
        for steps, world in [(2, 1), (2, 8), (2, 3), (2, 4), *stops]:
            ranks = [
                make_loader(dataset, rank=rank, world=world, micro_batch=2, **settings)
                for rank in range(world)
            ]
            streams = [dict(loader.iterate(step, step + steps)) for loader in ranks]
            for k in range(step, step + steps):
                union = sorted(sample for stream in streams for sample in samples_of(stream[k]))
                assert union == sorted(samples_of(alone.step(k)))
            step += steps


@pytest.mark.parametrize("micro_tokens", [None, 256])
@pytest.mark.parametrize("kind", ["nsp", "packed"])
def test_batches_that_grow_are_the_same_for_any_ranks_and_after_any_stop(
    dataset: Dataset, kind: str, micro_tokens: int | None
) -> None:
    """Sizes 8, 16, 24 while samples grow to 16, 32, 64 tokens, all at steps of their own."""
    settings: dict[str, Any] = {
        "global_batch": 24,
        "kind": kind,
        "warmup": [(5, 16), (4, 32)],
        "micro_batch": 2,
        "micro_tokens": micro_tokens,
    }

    (_, short), (_, middle), _ = make_loader(dataset, **settings).mixture.mean_sample_tokens()
    until = 8 * 2.5 * short, 8 * 3 * short + 16 * (2 * short + 2.5 * middle)  # tokens, in mid-step

    def growing(rank: int = 0, world: int = 1) -> Loader:
        warmup = [(until[0], 8), (until[1], 16)]
        return make_loader(dataset, rank=rank, world=world, batch_warmup=warmup, **settings)

    phases = growing().mixture.batches
    assert [phase[:3] for phase in phases] == [
        (0, 0, 8),
        (3, 24, 16),
        (5, 56, 16),
        (8, 104, 24),
        (9, 128, 24),
    ]

    alone = [growing().step(k) for k in range(14)]
    for k, batches in enumerate(alone):
        first, size = batch_of(k, phases)
        found = samples_of(batches)
        length = 16 if k < 5 else 32 if k < 9 else 64
        if kind == "nsp":
            assert len(found) == size
            assert sum(sample[-1][0] for sample in found) == size // 2
            assert 8 < max(len(sample[0]) for sample in found) <= length
        else:
            assert sum(len(sample[0]) for sample in found) in range(size * (length - 2), size * length + 1)
        # They are the samples of these numbers, as one step of the phase's own sampler would take them.
        mixture = growing().mixture
        phase = mixture.phase_of(k)
        segments = mixture.segments(phase, np.arange(first, first + size))
        same = phase.samplers[0].segments(
            np.arange(first, first + size) - {0: 0, 5: 56, 9: 128}[phase.first_step],
            np.arange(first, first + size),
        )
        np.testing.assert_array_equal(segments.start, same.start)
        total = segments.length.sum() + len(segments.length) + (segments.kind == 0).sum()
        assert sum(len(batch.tokens) for batch in batches) == total
    for start, world in ((0, 1), (0, 2), (2, 4), (4, 2), (6, 1), (8, 4), (11, 2)):
        streams = [dict(growing(rank, world).iterate(start, 14)) for rank in range(world)]
        for k in range(start, 14):
            assert len({len(stream[k]) for stream in streams}) == 1
            union = sorted(sample for stream in streams for sample in samples_of(stream[k]))
            assert union == sorted(samples_of(alone[k]))


@pytest.mark.parametrize("kind", ["nsp", "document", "packed"])
def test_a_budget_of_tokens_is_kept_and_filled_and_changes_no_batch(dataset: Dataset, kind: str) -> None:
    batch, budget = 240, 1024
    for step in (0, 3):
        expected = sorted(samples_of(make_loader(dataset, global_batch=batch, kind=kind).step(step)))
        for world in (1, 2, 4):
            settings: dict[str, Any] = {
                "global_batch": batch,
                "kind": kind,
                "world": world,
                "micro_tokens": budget,
            }
            loaders = [make_loader(dataset, rank=rank, **settings) for rank in range(world)]
            ranks = [loader.step(step) for loader in loaders]
            assert len({len(batches) for batches in ranks}) == 1
            sizes = [sum(b.lengths) for batches in ranks for b in batches]
            assert max(sizes) <= budget
            # No fewer would do; beyond that the ranks' equal number of micro-batches leaves room.
            assert len(sizes) <= world * (sum(sizes) // (0.95 * budget * world) + 1)
            assert sorted(sample for batches in ranks for sample in samples_of(batches)) == expected
            assert all(loader.steps(loader.mixture.phases[0], step, step + 2) for loader in loaders)


@given(
    st.lists(st.integers(5, 128), min_size=1, max_size=300),
    st.integers(128, 5000),
    st.sampled_from([1, 2, 3]),
)
def test_micro_batches_stay_within_the_budget(sizes: list[int], budget: int, world: int) -> None:
    sizes = sizes * world  # a batch that the ranks share
    micro_batch = balance(np.array(sizes), budget, world)
    sums = np.bincount(micro_batch, sizes)
    assert sums.max() <= budget
    assert np.bincount(micro_batch).min() > 0  # none is empty
    assert len(np.bincount(micro_batch)) % world == 0


def test_many_samples_of_mixed_lengths_fill_their_budget() -> None:
    sizes = np.random.default_rng(0).integers(5, 129, 4096)
    for world, number in ((1, 68), (8, 72)):  # their tokens would fill 66.96
        sums = np.bincount(balance(sizes, 4096, world), sizes)
        assert len(sums) == number
        assert sums.mean() >= (0.98 if world == 1 else 0.93) * 4096
        assert sums.max() - sums.min() <= 16


def test_another_step_or_seed_is_another_batch(dataset: Dataset) -> None:
    first = samples_of(make_loader(dataset).step(0))
    assert not set(first) & set(samples_of(make_loader(dataset).step(1)))
    assert not set(first) & set(samples_of(make_loader(dataset, seed=1).step(0)))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("nsp", "a2c2c39a109594b4f9cea25b61873a56"),
        ("sop", "0d1a4cf79fa76048ad2f64cc0fe649f1"),
        ("document", "a75affcff4b6471d15366f9a21d25634"),
        ("packed", "a9fc523f2133165eacc81a009572e93b"),
    ],
)
def test_the_stream_is_the_one_that_earlier_versions_gave(dataset: Dataset, kind: str, expected: str) -> None:
    """A change of a digest means that no run resumes into the samples it began with: say so in the
    CHANGELOG."""
    digest = xxhash.xxh3_128()
    loader = make_loader(dataset, seed=2**40 + 1, kind=kind)
    for step in (0, 1, 2**33):
        for batch in loader.step(step):
            for name in MicroBatch._fields:
                value = getattr(batch, name)
                if value is not None and name not in ("num_targets", "causal"):
                    digest.update(np.asarray(value, np.int64).tobytes())
    assert digest.hexdigest() == expected


def test_a_chunk_gets_other_masks_in_another_epoch(dataset: Dataset) -> None:
    loader = make_loader(dataset, global_batch=2, micro_batch=2)
    n = loader.mixture.phases[0].samplers[0].num_samples
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
    loader = make_loader(dataset, global_batch=2048, micro_batch=64)  # one step at a time
    plain = loader.steps

    def steps_of(phase: LengthPhase, first: int, last: int) -> list[list[MicroBatch]]:
        if first == 3:
            raise OSError("the disk went away")
        return plain(phase, first, last)

    monkeypatch.setattr(loader, "steps", steps_of)
    steps = loader.iterate(0, 100)
    assert [next(steps)[0] for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match="the disk went away"):
        next(steps)
    assert loader_threads() == []


def test_a_batch_that_does_not_divide_is_refused(dataset: Dataset) -> None:
    with pytest.raises(UserError, match=r"train\.global_batch=24 or 36 would do"):
        make_loader(dataset, world=3)


@pytest.mark.parametrize("mask_unit", ["token", "word", "span"])
@pytest.mark.parametrize("micro_tokens", [None, 300])
def test_static_targets_are_the_same_ones_in_a_fixed_number(
    dataset: Dataset, mask_unit: str, micro_tokens: int | None
) -> None:
    options: dict[str, Any] = {
        "micro_tokens": micro_tokens,
        "kind": "packed",
        "mask_unit": mask_unit,
        "mask_rate": 0.3,
    }
    one = make_loader(dataset, **options)
    other = make_loader(dataset, static_targets=True, **options)
    sizes, filled = set(), False
    for step in range(3):
        usual, static = one.step(step), other.step(step)
        assert samples_of(static) == samples_of(usual)
        for batch in static:
            sizes.add(len(batch.targets))
            assert len(batch.target_positions) == len(batch.targets)
            filled |= batch.num_targets < len(batch.targets)
            assert (batch.targets[: batch.num_targets] >= 0).all()
            assert (batch.targets[batch.num_targets :] == -1).all()
            assert (batch.target_positions[batch.num_targets :] == 0).all()
    assert sizes == {target_capacity(micro_tokens or 4 * 64, other.rules)}
    assert filled


def test_more_targets_than_the_fixed_number_take_it_twice(dataset: Dataset) -> None:
    options: dict[str, Any] = {"mask_rate": 0.5, "kind": "packed"}
    other = make_loader(dataset, static_targets=True, **options)
    with mock.patch("bertscale.data.loader.target_capacity", return_value=120):  # of 256 tokens
        static = [batch for step in range(4) for batch in other.step(step)]
    assert {len(batch.targets) for batch in static} == {120, 240}
    one = make_loader(dataset, **options)
    assert samples_of(static) == samples_of([batch for step in range(4) for batch in one.step(step)])


def test_nothing_is_filled_up_where_nothing_is_masked(dataset: Dataset) -> None:
    for batch in make_loader(dataset, static_targets=True, masks=False).step(0):
        assert len(batch.targets) == len(batch.target_positions) == batch.num_targets == 0


def test_the_fixed_number_of_targets_is_not_passed_by_chance() -> None:
    draw = np.random.default_rng(1)
    tokens = draw.integers(FIRST, 65_000, 20_000 * 512)
    lengths, samples = np.full(20_000, 512), np.arange(20_000)
    for unit in ("token", "word", "span"):
        loader_rules = mask_rules(
            vocab_size=65_000,
            mask_id=MASK,
            special_ids=Special.special_ids,
            mask_rate=0.15,
            mask_token_rate=0.8,
            random_token_rate=0.1,
            unit=unit,
            starts_word=Special().starts_word,  # words of three segments in the mean
        )
        places = mask_tokens(tokens, lengths, samples, loader_rules, 0)[1]
        most = np.bincount(places // 512, minlength=20_000).max()
        assert most <= target_capacity(512, loader_rules)
