"""Several corpora mixed by weight, phases of growing length and growing batches: which sample is whose, in
O(1) memory.

Every 1,024 samples each corpus has its quota of them, in an order permuted by key; quotas change by one
from period to period, so that after 2**20 samples the shares are the weights to 2**-20.

    mixture = Mixture([dataset, other], [0.7, 0.3], config.samples, global_batch=256, seed=0)
    segments = mixture.segments(mixture.phase_of(step), samples)

S: samples, C: corpora.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xxhash

from bertscale.config import Corpus, SamplesConfig
from bertscale.data.batch_phases import FOREVER, batch_of, batch_phases
from bertscale.data.index import Peers
from bertscale.data.masking import Ints
from bertscale.data.order import permute, round_keys
from bertscale.data.samples import Sampler, Segments
from bertscale.data.shards import Dataset, check_tokenizers

PERIOD = 1024  # samples; a superperiod is PERIOD periods
MEASURED = 16_384  # samples whose mean length stands for all
SLOTS = 2**32 - 2  # in the place of a window, in the key of a period's permutation


class LengthPhase:
    """Steps of one sample length; `samplers` has one for each corpus, `first_sample` is where it begins."""

    def __init__(self, first_step: int, max_length: int, samplers: list[Sampler]) -> None:
        self.first_step, self.max_length, self.samplers = first_step, max_length, samplers
        self.first_sample = 0


class Mixture:
    """The samples of a run: of each phase, and of each corpus in it.

    Steps have `global_batch` samples. With `batch_warmup`, that of the config's `train`, the first ones may
    have fewer, and the mean tokens of a sample, which `batches` then tell, are measured: [] is enough.
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
        self.quotas = Quotas(weights)
        sizes = [sum(shard.entry.tokens for shard in dataset.shards) for dataset in datasets]
        self.first_token = np.cumsum([0, *sizes[:-1]])
        self.phases: list[LengthPhase] = []
        step = 0
        for number, (steps, length) in enumerate([*samples.warmup, (0, samples.max_length)]):
            samplers = [
                Sampler(data, samples.kind, length, samples.window_blocks, seed, phase=number, peers=peers)
                for data in datasets
            ]
            self.phases.append(LengthPhase(step, length, samplers))
            step += steps
        lengths = [(phase.first_step, 1.0) for phase in self.phases]
        if batch_warmup is not None:
            lengths = self.tokens_a_sample()
        self.batches = batch_phases(batch_warmup or [], global_batch, lengths)
        for phase in self.phases:
            phase.first_sample = self.batch(phase.first_step)[0]

    def batch(self, step: int) -> tuple[int, int]:
        """First sample and number of samples of global step `step`."""
        return batch_of(step, self.batches)

    def phase_of(self, step: int) -> LengthPhase:
        """The phase that global step `step` belongs to."""
        return next(phase for phase in reversed(self.phases) if phase.first_step <= step)

    def end_of(self, step: int) -> int:
        """The first step behind `step` whose samples are of another number or length."""
        return next((batch.first_step for batch in self.batches if batch.first_step > step), FOREVER)

    def tokens_a_sample(self) -> list[tuple[int, float]]:
        """First step of each phase, and the mean tokens of its first samples, as if the run began with them:
        a fact of the data, the seed and the `samples` section alone."""
        numbers = np.arange(MEASURED)
        found = []
        for phase in self.phases:
            segments = self._segments(phase, numbers, numbers)
            tokens = int(segments.length.sum()) + len(segments.length) + int((segments.kind == 0).sum())
            found.append((phase.first_step, tokens / MEASURED))
        return found

    def segments(self, phase: LengthPhase, samples: Ints) -> Segments:
        """The samples of these numbers [S], all of one phase; tokens are numbered through all corpora."""
        return self._segments(phase, samples - phase.first_sample, samples)

    def _segments(self, phase: LengthPhase, numbers: Ints, samples: Ints) -> Segments:
        if len(phase.samplers) == 1:
            return phase.samplers[0].segments(numbers, samples)
        corpus, own = self.quotas.share_out(numbers, self.seed)
        parts = []
        for number in np.unique(corpus).tolist():
            rows = np.flatnonzero(corpus == number)
            part = phase.samplers[number].segments(own[rows], samples[rows])
            parts.append((part.start + self.first_token[number], part.length, part.kind, rows[part.row]))
        start, length, kind, row = (np.concatenate(column) for column in zip(*parts, strict=True))
        order = np.argsort(row, kind="stable")
        label = None if part.label is None else samples & 1
        return Segments(start[order], length[order], kind[order], row[order], label)

    def epochs(self, step: int) -> list[float]:
        """How often each corpus has been gone through when `step` global steps are done."""
        done = np.zeros(len(self.datasets))
        ends = [*(phase.first_step for phase in self.phases[1:]), step]
        for phase, end in zip(self.phases, ends, strict=True):
            samples = max(0, self.batch(min(step, end))[0] - phase.first_sample)
            sizes = np.array([sampler.num_samples for sampler in phase.samplers])
            done += self.quotas.taken(samples) / sizes
        return [float(value) for value in done]


class Quotas:
    """Shares C corpora in periods of 1,024 samples by weights, which are rounded to 2**-20.

    What a corpus gets beyond its even share, r of 1,024 periods one sample more, is laid out on a line;
    period j takes the points j, j + 1024, ... of it (systematic sampling), so that every period is full.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        share = np.asarray(weights, np.float64) / sum(weights)
        whole = np.maximum(np.round(share * PERIOD**2), 1).astype(np.int64)
        whole[np.argmax(whole)] += PERIOD**2 - whole.sum()
        self.weights = whole  # [C] samples of 2**20
        self.bounds = np.concatenate([[0], np.cumsum(whole)])  # [C + 1]
        self.even = np.concatenate([[0], np.cumsum(whole // PERIOD)])  # of a period
        self.line = np.concatenate([[0], np.cumsum(whole % PERIOD)])

    def _begun(self, period: Ints) -> Ints:
        """Samples of the corpora 0 .. c - 1 in all periods before `period` [N], as [N, C + 1]."""
        above, here = np.divmod(period[:, None], PERIOD)
        turns, rest = np.divmod(self.line, PERIOD)
        extra = turns * here + np.minimum(rest, here)  # points of the line that those periods took
        begun: Ints = above * self.bounds + here * self.even + extra
        return begun

    def taken(self, samples: int) -> Ints:
        """How many of the first `samples` are of each corpus, [C], to a period."""
        begun: Ints = np.diff(self._begun(np.array([samples // PERIOD]))[0])
        begun += self.weights * (samples % PERIOD) // PERIOD**2
        return begun

    def share_out(self, numbers: Ints, seed: int) -> tuple[Ints, Ints]:
        """The corpus of each sample [S], and its number in that corpus: 0, 1, ... for each, none twice."""
        period, place = np.divmod(numbers, PERIOD)
        slot = np.empty_like(place)
        for one in np.unique(period).tolist():
            rows = period == one
            slot[rows] = permute(place[rows], PERIOD, round_keys(seed, 0, one, SLOTS))
        begun = self._begun(period)  # [S, C + 1]
        bounds = self._begun(period + 1) - begun
        corpus = (slot[:, None] >= bounds[:, 1:]).sum(axis=1)  # corpora whose slots are all before it
        rows = np.arange(len(numbers))
        before = begun[rows, corpus + 1] - begun[rows, corpus]
        return corpus, before + slot - bounds[rows, corpus]


def data_digest(datasets: Sequence[Dataset], corpora: Sequence[Corpus]) -> str:
    """What a checkpoint keeps of the data: the manifest's digest, or one of all digests and weights."""
    if len(datasets) == 1:
        return datasets[0].manifest_digest
    parts = [
        f"{data.manifest_digest} {corpus.weight!r}" for data, corpus in zip(datasets, corpora, strict=True)
    ]
    return xxhash.xxh3_128_hexdigest("\n".join(parts).encode())
