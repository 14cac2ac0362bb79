"""Several corpora mixed by weight, phases of growing length and growing batches: which corpus a sample is
of, in O(1) memory.

In every period of 1,024 samples each corpus has its quota of them, in an order permuted by key; quotas change
by one from period to period, so that after 2**20 samples the fractions are the weights to 2**-20.

    mixture = Mixture([dataset, other], [0.7, 0.3], config.samples, global_batch=256, seed=0)
    segments = mixture.segments(mixture.phase_of(step), samples)

S: samples, N: segments, C: corpora. Slot: where a sample stands in its period after the permutation; each
corpus has a range of slots.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import xxhash

from bertscale.config import Corpus, SamplesConfig, UserError
from bertscale.data.batch_phases import FOREVER, batch_of, batch_phases, steps_until
from bertscale.data.index import Peers
from bertscale.data.masking import Ints
from bertscale.data.order import permute, round_keys
from bertscale.data.samples import Sampler, Segments
from bertscale.data.shards import Dataset, check_tokenizers

Floats = npt.NDArray[np.float64]

PERIOD = 1024  # samples
LIMIT_ROUNDS = 8  # with a budget in tokens, cut weights change the number of steps, and that the cut
MEASURED = 16_384  # samples whose mean length stands for all
SLOTS = 2**32 - 2  # instead of a window's number, in the key of a period's permutation


class LengthPhase:
    """Steps of one sample length, from the sample `first_sample` on, with a sampler for each corpus."""

    def __init__(self, first_step: int, max_length: int, samplers: list[Sampler]) -> None:
        self.first_step, self.max_length, self.samplers = first_step, max_length, samplers
        self.first_sample = 0


class Mixture:
    """The samples of a run: of each phase, and of each corpus in it.

    Steps have `global_batch` samples. With `batch_warmup`, that of the config's `train`, the first ones may
    have fewer, and the mean tokens of a sample are measured, for `batches` to tell: [] is enough for that.
    Raises UserError where the corpora were not made with one tokenizer.
    """

    def __init__(
        self,
        datasets: Sequence[Dataset],
        weights: Sequence[float],
        samples: SamplesConfig,
        *,
        global_batch: int,
        seed: int,
        batch_warmup: Sequence[tuple[float, int]] | None = None,
        peers: Peers | None = None,
    ) -> None:
        self.datasets, self.samples, self.global_batch, self.seed = datasets, samples, global_batch, seed
        check_tokenizers(datasets)
        sizes = [sum(shard.entry.tokens for shard in dataset.shards) for dataset in datasets]
        self.first_token = np.cumsum([0, *sizes[:-1]])
        self.phases: list[LengthPhase] = []
        step = 0
        for number, (steps, length) in enumerate([*samples.warmup, (0, samples.max_length)]):
            samplers = [
                Sampler(
                    data,
                    samples.kind,
                    length,
                    samples.window_blocks,
                    seed,
                    phase=number,
                    peers=peers,
                    min_tokens=samples.min_document_tokens,
                )
                for data in datasets
            ]
            self.phases.append(LengthPhase(step, length, samplers))
            step += steps
        self.batch_warmup = batch_warmup
        self.cut: dict[int, float] = {}  # the fraction of the samples that a corpus would have without limits
        self._divide(weights)

    def _divide(self, weights: Sequence[float]) -> None:
        """Sets the weights of the corpora, and with them what a step holds."""
        self.quotas = Quotas(weights)
        lengths = [(phase.first_step, 1.0) for phase in self.phases]
        if self.batch_warmup is not None:
            lengths = self.mean_sample_tokens()
        self.batches = batch_phases(self.batch_warmup or [], self.global_batch, lengths)
        for phase in self.phases:
            phase.first_sample = self.batch(phase.first_step)[0]

    def limit_epochs(self, most: Sequence[float | None], steps: int | None, tokens: float | None) -> None:
        """Cuts the weights of corpora that a budget, of `steps` or of `tokens`, would use more often than
        `most` [C] epochs.

        Raises UserError where all corpora together are too little.
        """
        wanted = share = self.quotas.fractions
        for _ in range(LIMIT_ROUNDS):
            whole = steps_until(tokens, self.batches) if tokens is not None else steps or 0
            alone = self._epochs(whole, share=False)
            limits = np.array([np.inf if m is None else m for m in most]) / np.maximum(alone, 1e-12)
            before, share = share, limited(wanted, limits)
            if share.sum() < 1 - 1e-9:
                raise UserError(
                    f"data: max_epochs of the corpora give {share.sum():.1%} of the samples that {whole:,} "
                    "steps need; lower the budget in `train`, or raise max_epochs"
                )
            if np.allclose(share, before, rtol=1e-6, atol=0):
                break
            self._divide(share.tolist())
        self.cut = {int(c): float(wanted[c]) for c in np.flatnonzero(share < wanted * (1 - 1e-9))}

    def batch(self, step: int) -> tuple[int, int]:
        """First sample and number of samples of global step `step`."""
        return batch_of(step, self.batches)

    def phase_of(self, step: int) -> LengthPhase:
        """The phase that global step `step` belongs to."""
        return next(phase for phase in reversed(self.phases) if phase.first_step <= step)

    def end_of(self, step: int) -> int:
        """The first step behind `step` whose samples are of another number or length."""
        return next((batch.first_step for batch in self.batches if batch.first_step > step), FOREVER)

    def mean_sample_tokens(self) -> list[tuple[int, float]]:
        """First step of each phase, and the mean tokens of its first samples, as if the run began with them:
        a fact of the data, the seed and the `samples` section alone."""
        numbers = np.arange(MEASURED)
        means = []
        for phase in self.phases:
            segments = self._segments(phase, numbers, numbers)
            # A [SEP] for each segment, a [CLS] for each sequence.
            tokens = int(segments.length.sum()) + len(segments.length) + int((segments.kind == 0).sum())
            means.append((phase.first_step, tokens / MEASURED))
        return means

    def segments(self, phase: LengthPhase, samples: Ints) -> Segments:
        """The samples of these numbers [S], all of one phase; tokens are numbered through all corpora."""
        return self._segments(phase, samples - phase.first_sample, samples)

    def _segments(self, phase: LengthPhase, numbers: Ints, samples: Ints) -> Segments:
        """The samples `numbers` [S] of a phase; draws depend on `samples` [S], their numbers in the run."""
        if len(phase.samplers) == 1:
            return phase.samplers[0].segments(numbers, samples)
        corpus, in_corpus = self.quotas.assign(numbers, self.seed)  # [S] each
        parts = []
        for number in np.unique(corpus).tolist():
            asked = np.flatnonzero(corpus == number)
            part = phase.samplers[number].segments(in_corpus[asked], samples[asked])
            parts.append((part.start + self.first_token[number], part.length, part.kind, asked[part.sample]))
        start, length, kind, sample = (np.concatenate(column) for column in zip(*parts, strict=True))  # [N]
        order = np.argsort(sample, kind="stable")  # stable: A stays before B
        label = None if part.label is None else samples & 1
        return Segments(start[order], length[order], kind[order], sample[order], label)

    def epochs(self, step: int) -> list[float]:
        """Epochs of each corpus that `step` global steps consume, as fractions."""
        return [float(value) for value in self._epochs(step)]

    def _epochs(self, step: int, *, share: bool = True) -> Floats:
        """As `epochs`, [C]; without `share` as if each corpus made all samples."""
        done = np.zeros(len(self.datasets))
        ends = [*(phase.first_step for phase in self.phases[1:]), step]
        for phase, end in zip(self.phases, ends, strict=True):
            samples = max(0, self.batch(min(step, end))[0] - phase.first_sample)
            sizes = np.array([sampler.num_samples for sampler in phase.samplers])
            done += (self.quotas.counts(samples) if share else samples) / sizes
        return done


class Quotas:
    """Divides samples among C corpora by weights, which are rounded to 2**-20, in periods of 1,024 samples.

    Of 2**20 samples a corpus gets its weight w = 1024 q + r: in each of 1,024 periods q of them, its even
    quota, and in r periods one more. Those extra samples of all corpora are laid end to end on a line; period
    j gets the points j, j + 1024, ... of it (systematic sampling), so that every period is full.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        fraction = np.asarray(weights, np.float64) / sum(weights)
        whole = np.maximum(np.round(fraction * PERIOD**2), 1).astype(np.int64)
        whole[np.argmax(whole)] += PERIOD**2 - whole.sum()  # what rounding left over
        self.weights = whole  # [C] samples of 2**20
        self.bounds = np.concatenate([[0], np.cumsum(whole)])  # [C + 1] samples of the corpora before c
        self.even = np.concatenate([[0], np.cumsum(whole // PERIOD)])  # [C + 1] of them in a period, at least
        self.line = np.concatenate([[0], np.cumsum(whole % PERIOD)])  # [C + 1] where extra samples begin

    @property
    def fractions(self) -> Floats:
        """The share of each corpus in the samples, [C]."""
        share: Floats = self.weights / PERIOD**2
        return share

    def _before(self, period: Ints) -> Ints:
        """Samples of the corpora 0 .. c - 1 in all periods before `period` [n], as [n, C + 1]."""
        full, here = np.divmod(period[:, None], PERIOD)  # [n, 1] rounds of 1,024 periods, and periods more
        rounds, rest = np.divmod(self.line, PERIOD)  # [C + 1]
        extra = rounds * here + np.minimum(rest, here)  # [n, C + 1] points of the line in those periods
        before: Ints = full * self.bounds + here * self.even + extra
        return before

    def counts(self, samples: int) -> Ints:
        """How many of the first `samples` are of each corpus, [C]; inside a period by the weights."""
        counts: Ints = np.diff(self._before(np.array([samples // PERIOD]))[0])
        counts += self.weights * (samples % PERIOD) // PERIOD**2
        return counts

    def assign(self, numbers: Ints, seed: int) -> tuple[Ints, Ints]:
        """The corpus of each sample [S], and its number in that corpus: 0, 1, ... for each, none twice."""
        period, position = np.divmod(numbers, PERIOD)  # [S] each
        slot = np.empty_like(position)
        for number in np.unique(period).tolist():
            inside = period == number
            slot[inside] = permute(position[inside], PERIOD, round_keys(seed, 0, number, SLOTS))
        before = self._before(period)  # [S, C + 1]
        bounds = self._before(period + 1) - before  # [S, C + 1] first slot of each corpus in the period
        corpus = (slot[:, None] >= bounds[:, 1:]).sum(axis=1)  # [S] corpora whose slots are all before it
        sample = np.arange(len(numbers))
        earlier = before[sample, corpus + 1] - before[sample, corpus]  # [S] of its corpus in earlier periods
        return corpus, earlier + slot - bounds[sample, corpus]


def weights_of(datasets: Sequence[Dataset], corpora: Sequence[Corpus], samples: SamplesConfig) -> list[float]:
    """The weight of each corpus: its own, times its tokens to the power of `samples.size_exponent` if given.

    The tokens are those of the training split, whichever split is open: both are mixed alike.
    """
    weights = [corpus.weight for corpus in corpora]
    if samples.size_exponent is None:
        return weights
    sizes = [
        sum(shard["tokens"] for shard in data.manifest["shards"] if shard["split"] == "train")
        for data in datasets
    ]
    return [
        weight * max(1, size) ** samples.size_exponent for weight, size in zip(weights, sizes, strict=True)
    ]


def limited(shares: Floats, limits: Floats) -> Floats:
    """The `shares` [C], which add up to 1, none above its limit [C]: what is cut goes to the others in
    proportion to their shares, again and again. They add up to less than 1 where the limits do."""
    full = np.zeros(len(shares), np.bool_)
    while True:
        others = shares[~full].sum()
        rest = 1 - limits[full].sum()
        result = np.where(full, limits, shares * (rest / others if others else 0.0))
        over = ~full & (result > limits)
        if not over.any():
            return result
        full |= over


def data_digest(datasets: Sequence[Dataset], corpora: Sequence[Corpus]) -> str:
    """The xxh3-128 (hex) that a checkpoint keeps of its data: the manifest's, or one of the digests, weights
    and limits of all corpora."""
    if len(datasets) == 1:
        return datasets[0].manifest_digest
    parts = [
        f"{data.manifest_digest} {corpus.weight!r}"
        + ("" if corpus.max_epochs is None else f" {corpus.max_epochs!r}")
        for data, corpus in zip(datasets, corpora, strict=True)
    ]
    return xxhash.xxh3_128_hexdigest("\n".join(parts).encode())
