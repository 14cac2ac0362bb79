"""The batches of a pretraining config, for training, for `bertscale bench`, and to look at.

    for step, micro_batches in iterate_batches("configs/pretrain/quickstart.yaml", "samples.max_length=64"):
        print(step, [batch.tokens.shape for batch in micro_batches])
        break

T: tokens, P: predicted positions, S: samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch

from bertscale.config import PretrainConfig, UserError, load_config
from bertscale.data.batch_phases import FOREVER
from bertscale.data.contents import check_contents
from bertscale.data.index import Peers
from bertscale.data.loader import Loader
from bertscale.data.manifest import Split
from bertscale.data.micro_batch import MicroBatch
from bertscale.data.mixture import Mixture, weights_of
from bertscale.data.samples import check_batches
from bertscale.data.shards import Dataset, open_dataset
from bertscale.tokenizer import Tokenizer, load_tokenizer


class JobRanks(Peers, Protocol):
    """What a loader asks of the ranks of a job; `parallel.Ranks` has it."""

    @property
    def data_rank(self) -> int: ...
    @property
    def data(self) -> int: ...  # ranks that see disjoint samples
    @property
    def device(self) -> torch.device: ...


def make_loader(
    config: PretrainConfig,
    tokenizer: Tokenizer,
    split: Split,
    datasets: list[Dataset] | None = None,
    ranks: JobRanks | None = None,
    *,
    whole: bool = False,
) -> Loader:
    """Makes the loader of this rank of `ranks`; without them, of one process alone on a CPU. `whole`: each
    rank has all samples of a batch.

    `split` is `train`, or `validation` for the batches of the held-out loss: the same ones each time, of the
    full length, whatever the run's seed. `datasets` are those of `config.data` where they are open already.
    Raises UserError where a batch does not divide (`check_batches`) or a data set is damaged or too small.
    """
    rank, world, device = (0, 1, "cpu") if ranks is None else (ranks.data_rank, ranks.data, ranks.device.type)
    rank, world = (0, 1) if whole else (rank, world)
    check_batches(config, world)
    samples, training = config.samples, split == "train"
    datasets = datasets or [open_dataset(corpus.path, split) for corpus in config.corpora]
    check_contents(datasets, tokenizer.vocab_size, ranks)
    mixture = Mixture(
        datasets,
        weights_of(datasets, config.corpora, samples),
        samples if training else samples.model_copy(update={"warmup": []}),
        global_batch=config.train.global_batch,
        batch_warmup=config.train.batch_warmup if training else None,
        seed=config.train.seed if training else 0,
        peers=ranks,
    )
    if training and config.is_limited:
        most = [corpus.max_epochs for corpus in config.corpora]
        mixture.limit_epochs(most, config.train.steps, config.train.tokens)
    return Loader(
        mixture,
        tokenizer,
        micro_batch=config.train.micro_batch,
        micro_tokens=config.train.micro_tokens,
        masks=config.objectives.mlm > 0,
        causal=config.objectives.clm > 0,
        draws=config.model.generator_size is not None,
        static_targets=config.has_static_targets(device),
        rank=rank,
        world=world,
    )


def iterate_batches(
    config: PretrainConfig | str | Path, *overrides: str, split: Split = "train", start_step: int = 0
) -> Iterator[tuple[int, list[MicroBatch]]]:
    """Yields (step, micro-batches) as pretraining with one rank would see them, without end.

    `config` is a config file, with `overrides` such as "samples.max_length=64", or one that is loaded. The
    batch of a step depends on data, seed and step alone, so `start_step` costs nothing; ranks of a larger run
    divide the same samples among them. `split="validation"` gives the batches of the held-out loss.

    A micro-batch holds S samples laid end to end, without padding: `tokens`, `token_types` and `positions`
    are int64 [T], `lengths` tells where sequences end, `target_positions` and `targets` are int64 [P], and
    `next_sentence_label` is int64 [S], or None for samples without pairs; `causal` says that each token
    predicts the next one (see `MicroBatch`).

    Raises UserError, at the call, for a config or a data set that is missing, wrong or damaged.

        step, micro_batches = next(iterate_batches("configs/pretrain/quickstart.yaml"))
    """
    if not isinstance(config, PretrainConfig):
        config = load_config(PretrainConfig, config, list(overrides))
    elif overrides:
        raise UserError(f"{overrides[0]!r}: overrides are for a config file, not for a loaded config")
    if start_step < 0:
        raise UserError(f"start_step={start_step}: the first step is 0")
    datasets = [open_dataset(corpus.path, split) for corpus in config.corpora]
    tokenizer = load_tokenizer(datasets[0].tokenizer_path)
    return make_loader(config, tokenizer, split, datasets).iterate(start_step, FOREVER)
