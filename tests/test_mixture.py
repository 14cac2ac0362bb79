"""Corpora mixed by weight, and phases of growing length."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bertscale.config import Corpus, SamplesConfig, UserError
from bertscale.data.batch_phases import FOREVER
from bertscale.data.mixture import PERIOD, Mixture, Quotas, data_digest, limited, weights_of
from bertscale.data.shards import Dataset, open_dataset, write_manifest, write_shard

WEIGHTS = st.lists(st.floats(0.001, 1000), min_size=1, max_size=8)


def make_dataset(folder: Path, documents: int, first: int = 0, model: bytes = b"no model") -> Dataset:
    """One shard of documents of three sentences of five tokens; tokens are first, first + 1, ..."""
    rows = [
        (number, [list(range(first + 15 * number + at, first + 15 * number + at + 5)) for at in (0, 5, 10)])
        for number in range(documents)
    ]
    folder.mkdir()
    entry = write_shard(folder / "train-00000.arrow", rows, np.uint16, "train")
    (folder / "tokenizer.model").write_bytes(model)
    digest = hashlib.sha256(model).hexdigest()
    write_manifest(
        folder, tokenizer_sha256=digest, vocab_size=65_000, settings={}, counters={}, shards=[entry]
    )
    return open_dataset(folder, "train")


def mix(
    datasets: Sequence[Dataset],
    weights: Sequence[float],
    *,
    global_batch: int = 8,
    batch_warmup: Sequence[tuple[float, int]] | None = None,
    **samples: object,
) -> Mixture:
    config = SamplesConfig.model_validate({"kind": "document", "max_length": 32, **samples})
    return Mixture(datasets, weights, config, global_batch=global_batch, seed=0, batch_warmup=batch_warmup)


@settings(deadline=None)
@given(WEIGHTS, st.integers(0, 2**64 - 1), st.integers(0, 5000))
def test_each_corpus_is_numbered_without_gap_or_repetition(
    weights: list[float], seed: int, first_period: int
) -> None:
    quotas = Quotas(weights)
    numbers = np.arange(first_period * PERIOD, (first_period + 4) * PERIOD)
    corpus, own = quotas.assign(numbers, seed)
    begun = np.array([quotas.counts(first_period * PERIOD), quotas.counts((first_period + 4) * PERIOD)])
    for number in range(len(weights)):
        mine = own[corpus == number]
        np.testing.assert_array_equal(np.sort(mine), np.arange(*begun[:, number]))
        for at in range(4):  # and period by period, so that what is read stays together
            part = slice(at * PERIOD, (at + 1) * PERIOD)
            inside = own[part][corpus[part] == number]
            assert len(inside) == 0 or inside.max() - inside.min() == len(inside) - 1
    share = np.array(weights) / sum(weights)
    counts = np.bincount(corpus[:PERIOD], minlength=len(weights))
    assert np.abs(counts - PERIOD * share).max() <= 1 + len(weights) / PERIOD


@given(WEIGHTS)
def test_the_weights_are_kept_to_a_millionth(weights: list[float]) -> None:
    taken = Quotas(weights).counts(PERIOD**2)
    assert taken.sum() == PERIOD**2
    share = np.array(weights) / sum(weights)
    assert np.abs(taken / PERIOD**2 - share).max() <= len(weights) / PERIOD**2
    assert taken.min() >= 1
    for samples in (1, 1000, 10**7, 10**12):
        assert abs(int(Quotas(weights).counts(samples).sum()) - samples) <= len(weights)


def test_the_corpus_of_a_sample_depends_on_its_number_alone() -> None:
    quotas = Quotas([5, 2, 1])
    numbers = np.arange(5000)
    corpus, own = quotas.assign(numbers, 3)
    some = np.random.default_rng(0).permutation(numbers)[:100]
    for found, whole in zip(quotas.assign(some, 3), (corpus, own), strict=True):
        np.testing.assert_array_equal(found, whole[some])
    other, _ = quotas.assign(numbers, 4)
    assert (other != corpus).any()


def test_tokens_come_from_the_corpora_by_weight(tmp_path: Path) -> None:
    datasets = [make_dataset(tmp_path / "a", 40), make_dataset(tmp_path / "b", 10)]
    mixture = mix(datasets, [3, 1])
    segments = mixture.segments(mixture.phases[0], np.arange(4 * PERIOD))
    assert (np.diff(segments.sample) >= 0).all()
    second = segments.start >= 40 * 15
    assert second.sum() == PERIOD
    assert segments.start.max() < 50 * 15
    # Each corpus goes through its own epochs.
    counts = np.bincount(segments.start[second] // 15 - 40)
    assert counts.max() - counts.min() <= 1
    counts = np.bincount(segments.start[~second] // 15)
    assert counts.max() - counts.min() <= 1
    np.testing.assert_allclose(mixture.epochs(4 * PERIOD // 8), [3 * PERIOD / 40, PERIOD / 10])


def test_half_of_every_batch_of_a_mixture_are_other_pairs(tmp_path: Path) -> None:
    datasets = [make_dataset(tmp_path / "a", 40), make_dataset(tmp_path / "b", 10)]
    mixture = mix(datasets, [0.8, 0.2], kind="nsp")
    for step in range(50):
        segments = mixture.segments(mixture.phases[0], np.arange(8 * step, 8 * step + 8))
        assert segments.label is not None
        assert segments.label.tolist() == [0, 1] * 4
        same = segments.start[::2] // 15 == segments.start[1::2] // 15
        np.testing.assert_array_equal(same, segments.label == 0)
        assert ((segments.start[::2] < 600) == (segments.start[1::2] < 600)).all()  # of one corpus


def test_stages_follow_the_steps(tmp_path: Path) -> None:
    mixture = mix([make_dataset(tmp_path / "a", 40)], [1], warmup=[[3, 8], [2, 16]])
    lengths = [mixture.phase_of(step).max_length for step in range(7)]
    assert lengths == [8, 8, 8, 16, 16, 32, 32]
    assert [mixture.end_of(step) for step in range(6)] == [3, 3, 3, 5, 5, FOREVER]
    for step in range(7):
        phase = mixture.phase_of(step)
        segments = mixture.segments(phase, np.arange(8 * step, 8 * step + 8))
        assert 0 < segments.length.max() <= phase.max_length - 2
    # A document of 15 tokens is three samples of at most 8 tokens, two of 16, one of 32.
    assert [phase.samplers[0].num_samples for phase in mixture.phases] == [120, 80, 40]
    np.testing.assert_allclose(mixture.epochs(4), [24 / 120 + 8 / 80])
    np.testing.assert_allclose(mixture.epochs(10), [24 / 120 + 16 / 80 + 40 / 40])


def test_batches_and_lengths_grow_together(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "a", 40)
    mixture = mix([dataset], [1], warmup=[[3, 8], [2, 16]])
    # Documents of 15 tokens and [CLS], [SEP]: three samples of at most 8, two of 16, one of 32.
    lengths = mixture.mean_sample_tokens()
    assert [step for step, _ in lengths] == [0, 3, 5]
    np.testing.assert_allclose([mean for _, mean in lengths], [15 / 3 + 2, 15 / 2 + 2, 17], rtol=0.01)
    assert mixture.mean_sample_tokens() == lengths
    mixture = mix([dataset], [1], warmup=[[3, 8], [2, 16]], batch_warmup=[(27, 2), (120, 4)])
    # 7 tokens a sample: two steps of 2 are 28 tokens; of 4, one is 28, then two of some 38 each.
    sizes = [2, 2, 4, 4, 4, 8, 8, 8]
    assert [mixture.batch(step)[1] for step in range(8)] == sizes
    assert [mixture.batch(step)[0] for step in range(9)] == np.cumsum([0, *sizes]).tolist()
    assert [mixture.end_of(step) for step in range(6)] == [2, 2, 3, 5, 5, FOREVER]
    assert [phase.first_sample for phase in mixture.phases] == [0, 8, 16]
    assert mixture.mean_sample_tokens() == lengths  # whatever the batches
    np.testing.assert_allclose(mixture.epochs(2), [4 / 120])
    np.testing.assert_allclose(mixture.epochs(4), [8 / 120 + 4 / 80])
    np.testing.assert_allclose(mixture.epochs(7), [8 / 120 + 8 / 80 + 16 / 40])
    # Each phase counts from its own first sample: an epoch has every sample once.
    last = mixture.phases[-1]
    starts = mixture.segments(last, last.first_sample + np.arange(40)).start
    assert np.sort(starts).tolist() == list(range(0, 600, 15))


def test_the_first_stage_does_not_give_its_order_to_the_next(tmp_path: Path) -> None:
    mixture = mix([make_dataset(tmp_path / "a", 400)], [1], warmup=[[50, 32]])
    first, second = (
        mixture.segments(phase, phase.first_sample + np.arange(400)).start for phase in mixture.phases
    )
    assert (first == second).sum() < 12
    np.testing.assert_array_equal(np.sort(first), np.sort(second))


def test_corpora_of_two_tokenizers_are_refused(tmp_path: Path) -> None:
    datasets = [make_dataset(tmp_path / "a", 4), make_dataset(tmp_path / "b", 4, model=b"another")]
    with pytest.raises(UserError, match=r"b was made with another tokenizer than .*a; run `bertscale prep`"):
        mix(datasets, [1, 1])


def test_the_digest_of_a_mixture_is_of_its_parts_and_weights(tmp_path: Path) -> None:
    datasets = [make_dataset(tmp_path / "a", 4), make_dataset(tmp_path / "b", 5)]

    def digest(numbers: Sequence[int], weights: Sequence[float]) -> str:
        corpora = [
            Corpus(path=str(datasets[n].folder), weight=w) for n, w in zip(numbers, weights, strict=True)
        ]
        return data_digest([datasets[n] for n in numbers], corpora)

    assert digest([0], [7.0]) == datasets[0].manifest_digest
    found = {digest([0, 1], [1, 1]), digest([1, 0], [1, 1]), digest([0, 1], [1, 2]), digest([0], [1])}
    assert len(found) == 4


def test_weights_follow_the_sizes_by_an_exponent(tmp_path: Path) -> None:
    datasets = [make_dataset(tmp_path / "a", 64), make_dataset(tmp_path / "b", 4)]
    corpora = [Corpus(path="a"), Corpus(path="b", weight=3)]
    for exponent, ratio in ((None, 3), (0.0, 3), (0.5, 3 / 4), (1.0, 3 / 16)):
        samples = SamplesConfig(size_exponent=exponent)
        first, second = weights_of(datasets, corpora, samples)
        assert second / first == pytest.approx(ratio)
    # The held-out samples are mixed by the sizes of the training splits.
    held = [open_dataset(data.folder, "validation") for data in datasets]
    assert weights_of(held, corpora, samples) == [first, second]


def test_what_a_limit_cuts_goes_to_the_others_in_proportion() -> None:
    shares = np.array([0.5, 0.3, 0.15, 0.05])
    endless = np.full(4, np.inf)
    assert limited(shares, endless).tolist() == pytest.approx(shares.tolist())
    first = np.array([0.2, np.inf, np.inf, np.inf])
    assert limited(shares, first).tolist() == pytest.approx([0.2, 0.48, 0.24, 0.08])
    # What goes to the second brings it above its own limit.
    both = np.array([0.2, 0.4, np.inf, np.inf])
    assert limited(shares, both).tolist() == pytest.approx([0.2, 0.4, 0.3, 0.1])
    assert limited(shares, shares / 2).tolist() == pytest.approx((shares / 2).tolist())


@pytest.mark.parametrize("budget", [{"steps": 100}, {"tokens": 100 * 8 * 17.0}])
def test_a_corpus_is_used_at_most_so_often(budget: dict[str, float], tmp_path: Path) -> None:
    datasets = [make_dataset(tmp_path / "a", 40), make_dataset(tmp_path / "b", 300)]
    mixture = mix(datasets, [1, 1], batch_warmup=[])  # documents make a sample of 17 tokens each
    steps, tokens = budget.get("steps"), budget.get("tokens")
    assert mixture.epochs(100) == pytest.approx([10, 400 / 300], rel=0.01)
    mixture.limit_epochs([20, None], steps, tokens)  # type: ignore[arg-type]
    assert mixture.epochs(100) == pytest.approx([10, 400 / 300], rel=0.01)
    assert mixture.cut == {}
    mixture.limit_epochs([3, None], steps, tokens)  # type: ignore[arg-type]
    assert mixture.epochs(100) == pytest.approx([3, 680 / 300], rel=0.01)
    assert mixture.cut == {0: 0.5}
    segments = mixture.segments(mixture.phases[0], np.arange(800))
    assert (segments.start < 600).sum() <= 120 + 1
    with pytest.raises(
        UserError, match=r"^data: max_epochs .* give 90\.0% of the samples that 100 steps need"
    ):
        mixture.limit_epochs([3, 2], steps, tokens)  # type: ignore[arg-type]


def test_the_digest_knows_the_limits(tmp_path: Path) -> None:
    datasets = [make_dataset(tmp_path / "a", 4), make_dataset(tmp_path / "b", 5)]
    free = [Corpus(path="a"), Corpus(path="b")]
    assert data_digest(datasets, free) != data_digest(datasets, [free[0], Corpus(path="b", max_epochs=2)])
