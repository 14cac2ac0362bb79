"""The plan of pairs against the documents. Every token of the corpus is its own number, so a range of
tokens says where it comes from."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from math import sqrt
from pathlib import Path

import numpy as np
import pytest

from bertscale.config import UserError
from bertscale.samples import PairPlan, _cuts, _heads, check_batch, permute
from bertscale.shards import Dataset, open_dataset, write_manifest, write_shard

Sizes = list[list[int]]  # documents as the lengths of their sentences
MAX_LENGTH = 48
BUDGET = MAX_LENGTH - 3


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


def random_sizes(documents: int, seed: int) -> Sizes:
    rng = np.random.default_rng(seed)
    counts = np.where(
        rng.random(documents) < 0.1, rng.integers(0, 2, documents), rng.integers(2, 14, documents)
    )
    sizes = [rng.integers(1, 20, count).tolist() for count in counts]
    sizes[3] = [5, 200, 7, 90, 3]  # sentences far beyond the budget
    return sizes


SHARDS = [random_sizes(100, 1), random_sizes(37, 2), [], random_sizes(120, 3)]
DOCUMENTS: Sizes = [sentences for sizes in SHARDS for sentences in sizes]


@pytest.fixture
def plan(tmp_path: Path) -> PairPlan:
    return PairPlan(make_dataset(tmp_path, SHARDS), MAX_LENGTH, seed=0)


def boundaries() -> tuple[np.ndarray, np.ndarray]:
    """First token of each document [D + 1] and of each sentence [sentences + 1]."""
    documents = np.cumsum([0] + [sum(sentences) for sentences in DOCUMENTS])
    sentences = np.cumsum([0] + [size for sizes in DOCUMENTS for size in sizes])
    return documents, sentences


def reference_chunks() -> list[tuple[int, int]]:
    """(first sentence, sentences) by the loop of the published data creation."""
    chunks, number = [], 0
    for sentences in DOCUMENTS:
        count = tokens = 0
        for place, size in enumerate(sentences):
            count, tokens = count + 1, tokens + size
            if tokens >= BUDGET or place == len(sentences) - 1:
                if count >= 2:
                    chunks.append((number + place + 1 - count, count))
                count = tokens = 0
        number += len(sentences)
    return chunks


def test_chunks_are_those_of_the_published_loop(plan: PairPlan) -> None:
    found = list(zip(plan.chunk_first.tolist(), plan.chunk_sentences.tolist(), strict=True))
    assert found == reference_chunks()
    assert plan.single_sentence_documents == sum(len(sentences) == 1 for sentences in DOCUMENTS) > 0
    assert plan.num_documents == sum(len(sentences) > 0 for sentences in DOCUMENTS) < len(DOCUMENTS)
    assert plan.single_sentence_chunks > plan.single_sentence_documents


def test_a_real_pair_is_contiguous_and_a_random_one_has_another_document(plan: PairPlan) -> None:
    documents, sentences = boundaries()
    pairs = plan.pairs(np.arange(20 * plan.num_chunks))
    real = pairs.next_sentence_label == 0
    a_end, b_end = pairs.a_start + pairs.a_length, pairs.b_start + pairs.b_length
    owner_a = np.searchsorted(documents, pairs.a_start, side="right") - 1
    owner_b = np.searchsorted(documents, pairs.b_start, side="right") - 1

    assert pairs.a_length.min() >= 1
    assert pairs.b_length.min() >= 1
    assert (pairs.a_length + pairs.b_length).max() == BUDGET
    assert (a_end <= documents[owner_a + 1]).all()  # no segment leaves its document
    assert (b_end <= documents[owner_b + 1]).all()
    assert (owner_a == owner_b)[real].all()
    assert (owner_a != owner_b)[~real].all()
    assert set(owner_b[~real]) == {n for n, sizes in enumerate(DOCUMENTS) if sizes}  # every document serves

    full = pairs.a_length + pairs.b_length < BUDGET  # nothing was cut
    assert full.any()
    np.testing.assert_array_equal(a_end[real & full], pairs.b_start[real & full])
    for ends in (pairs.a_start, a_end, pairs.b_start, b_end):
        assert np.isin(ends[full], sentences).all()
    # A random partner that fills no room ended with its document.
    assert np.isin(b_end[full & ~real], documents).all()
    # What was cut from a real pair was cut around the seam or at the outer ends: still in order.
    assert (a_end <= pairs.b_start)[real].all()


def test_half_is_random_in_every_batch_across_epochs(tmp_path: Path) -> None:
    plan = PairPlan(make_dataset(tmp_path, [[[9, 8, 7, 30], [5, 6], [40, 10, 3]]]), MAX_LENGTH, seed=0)
    assert plan.num_chunks == 3
    for batch in (2, 6, 32):
        for step in range(40):
            pairs = plan.pairs(np.arange(step * batch, (step + 1) * batch))
            assert int(pairs.next_sentence_label.sum()) * 2 == batch


def test_an_epoch_takes_every_chunk_once_in_an_order_of_its_own(plan: PairPlan) -> None:
    n = plan.num_chunks
    orders = [permute(np.arange(n), n, seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(n))
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert (orders[one] == orders[other]).sum() < 10
    # The label alternates with the place, so a chunk must be real about half of the time.
    real = np.zeros(n)
    for epoch in range(100):
        order = permute(np.arange(n), n, 0, epoch)
        real[order[(np.arange(n) + epoch * n) % 2 == 0]] += 1
    assert abs(real - 50).max() <= 5 * sqrt(100 / 4)  # five sigmas
    assert abs(((real - 50) ** 2).mean() - 25) <= 5 * 25 * sqrt(2 / n)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 10, 97, 1000, 65_537])
def test_permutations_of_any_size(size: int) -> None:
    for epoch in range(3):
        np.testing.assert_array_equal(np.sort(permute(np.arange(size), size, 7, epoch)), np.arange(size))
    one = np.array([size - 1])
    np.testing.assert_array_equal(permute(one, size, 7, 0), permute(np.arange(size), size, 7, 0)[-1:])


def test_every_place_of_a_permutation_is_even() -> None:
    epochs, size = 3000, 5
    counts = np.zeros((size, size))
    for epoch in range(epochs):
        counts[np.arange(size), permute(np.arange(size), size, 0, epoch)] += 1
    assert abs(counts - epochs / size).max() <= 5 * sqrt(epochs * 0.2 * 0.8)  # five sigmas


def test_a_sample_depends_on_its_number_alone(plan: PairPlan) -> None:
    numbers = np.arange(3 * plan.num_chunks)
    together = plan.pairs(numbers)
    shuffled = np.random.default_rng(0).permutation(numbers)
    for some in (shuffled[:200], shuffled[200:201]):
        for one, other in zip(plan.pairs(some), together, strict=True):
            np.testing.assert_array_equal(one, other[some])


def test_another_seed_gives_other_pairs(tmp_path: Path, plan: PairPlan) -> None:
    other = PairPlan(make_dataset(tmp_path, SHARDS), MAX_LENGTH, seed=1)
    one, two = plan.pairs(np.arange(300)), other.pairs(np.arange(300))
    assert (one.a_start == two.a_start).mean() < 0.05


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


def test_any_length_works_without_new_shards(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, SHARDS)
    for max_length in (8, 9, 16, 512):
        pairs = PairPlan(dataset, max_length, seed=0).pairs(np.arange(500))
        assert min(pairs.a_length.min(), pairs.b_length.min()) >= 1
        assert (pairs.a_length + pairs.b_length).max() <= max_length - 3


@pytest.mark.parametrize(
    ("shards", "message"),
    [
        ([], "holds 0 document"),
        ([[[4, 5, 6]]], "holds 1 document"),
        ([[[4, 5, 6], []]], "holds 1 document"),
        ([[[4], [5], [6]]], "none of the 3 documents"),
        ([[[100, 4], [200, 100]]], "none of the 2 documents"),
    ],
)
def test_data_without_pairs_is_refused(tmp_path: Path, shards: list[Sizes], message: str) -> None:
    dataset = make_dataset(tmp_path, shards)
    with pytest.raises(UserError, match=message) as error:
        PairPlan(dataset, MAX_LENGTH, seed=0)
    assert str(tmp_path) in str(error.value)


def test_a_shard_that_does_not_add_up_is_refused_by_name(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, SHARDS)
    path = tmp_path / "train-00001.arrow"
    content = path.read_bytes()
    lengths = dataset.shards[1].sentence_lengths.tobytes()
    at = content.index(lengths)
    path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    with pytest.raises(UserError, match=r"train-00001\.arrow is damaged"):
        PairPlan(open_dataset(tmp_path, "train"), MAX_LENGTH, seed=0)


def test_a_batch_that_divides_gives_the_micro_batches_of_a_rank() -> None:
    assert check_batch(256, 32, 1) == 8
    assert check_batch(256, 32, 4) == 2
    assert check_batch(6, 3, 1) == 2


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
        ((15, 5, 1), "is odd"),
    ],
)
def test_a_batch_that_does_not_divide_is_refused_with_sizes(
    batch: tuple[int, int, int], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        check_batch(*batch)


def test_the_check_loads_no_torch() -> None:
    code = "import sys, bertscale.samples; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
