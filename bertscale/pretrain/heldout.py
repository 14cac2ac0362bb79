"""Held-out losses: of the data's own validation split, and of sets with names.

    heldout/mlm_loss         the validation split, mixed and masked as the run's own samples
    heldout/NAME/mlm_loss    a data set of `heldout`, or the validation split of one of several corpora
    heldout/.../pseudo_perplexity    each token masked alone, with `train.pseudo_perplexity`

Sets with names are masked alike in every run (`MASKING`), so that phases and runs which mask otherwise, or
use longer documents only, are compared by them. With `objectives.clm` nothing is masked in any set: each
figure is of next tokens, called `clm_loss`, and compares with those of other such runs only.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from bertscale.config import PretrainConfig
from bertscale.data.batches import make_loader
from bertscale.data.loader import Loader
from bertscale.data.micro_batch import MicroBatch
from bertscale.data.shards import Dataset, check_tokenizers, open_dataset
from bertscale.model.model import LossSums
from bertscale.pretrain.pseudo_perplexity import mean_loss_alone
from bertscale.tokenizer import Tokenizer
from bertscale.train.engine import Engine
from bertscale.train.heartbeat import beat
from bertscale.train.metrics import heldout_brief
from bertscale.train.objectives import Counts, mean_losses
from bertscale.train.parallel import Ranks
from bertscale.train.stop import StopSignal, heed

AVERAGE = "heldout_average"  # begins the names of figures with the average of the weights
PERPLEXITIES = {"mlm_loss": "masked_perplexity", "clm_loss": "perplexity"}
MASKING = {  # as BERT was published
    "mask_unit": "token",
    "mask_rate": 0.15,
    "mask_token_rate": 0.8,
    "random_token_rate": 0.1,
}


def heldout_sets(config: PretrainConfig) -> dict[str, str]:
    """The folders of the sets with names: those of `heldout`, and of several corpora each one.

    A corpus has the name of its folder, with that of the folder above where two would be the same, and so on.
    """
    paths = [corpus.path for corpus in config.corpora] if len(config.corpora) > 1 else []
    return {**dict(zip(_names(paths, config.heldout), paths, strict=True)), **config.heldout}


def _names(paths: Sequence[str], taken: dict[str, str]) -> list[str]:
    parts = [Path(os.path.abspath(path)).parts[1:] for path in paths]
    for depth in range(1, max(map(len, parts), default=0) + 1):
        names = ["-".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names) and not set(names) & taken.keys():
            return names
    return [f"corpus-{number}" for number in range(1, len(paths) + 1)]


def heldout_loaders(
    config: PretrainConfig, tokenizer: Tokenizer, data: Sequence[Dataset], ranks: Ranks
) -> dict[str, Loader]:
    """The batches of each held-out loss, by what its figures are called. All ranks must call.

    Raises UserError where a set is missing, damaged, or of another tokenizer than the run's `data`.
    """
    return {
        prefix: make_loader(alone, tokenizer, "validation", held, ranks)
        for prefix, alone, held in _sets(config, data)
    }


def _sets(
    config: PretrainConfig, data: Sequence[Dataset]
) -> Iterator[tuple[str, PretrainConfig, list[Dataset] | None]]:
    """Of each set what its figures are called, the config of its batches, and its data, if it is another."""
    yield "heldout", config, None
    samples = config.samples.model_copy(update={**MASKING, "min_document_tokens": 1})
    for name, folder in heldout_sets(config).items():
        held = open_dataset(folder, "validation")
        check_tokenizers([data[0], held], f"heldout.{name}")
        yield f"heldout/{name}", config.model_copy(update={"data": folder, "samples": samples}), [held]


def unmasked_samples(
    config: PretrainConfig,
    tokenizer: Tokenizer,
    data: Sequence[Dataset],
    loaders: dict[str, Loader],
    ranks: Ranks,
) -> dict[str, MicroBatch]:
    """The first `train.pseudo_perplexity` samples of each of the `loaders`' sets, or all where there are
    fewer, in one micro-batch that each rank has; {} without that key. All ranks must call."""
    found = {}
    least = 2 if config.samples.has_pairs else 1  # half of the pairs have one label, half the other
    for prefix, alone, held in _sets(config, data) if config.train.pseudo_perplexity else ():
        there = sum(sampler.num_samples for sampler in loaders[prefix].mixture.phases[-1].samplers)
        size = min(config.train.pseudo_perplexity, max(least, there // least * least))
        train = config.train.model_copy(update={"global_batch": size, "micro_batch": size})
        changes = {
            "train": train.model_copy(update={"micro_tokens": None, "batch_warmup": []}),
            "objectives": config.objectives.model_copy(update={"mlm": 0.0}),
        }
        plain = alone.model_copy(update=changes)
        [found[prefix]] = make_loader(plain, tokenizer, "validation", held, ranks, whole=True).step(0)
    return found


@torch.no_grad()
def evaluate(
    engine: Engine[PretrainConfig],
    loaders: dict[str, Loader],
    unmasked: dict[str, MicroBatch],
    samples: int,
    done: int,
    stop: StopSignal | None = None,
) -> dict[str, float]:
    """Mean losses and accuracies of held-out documents, always over the same samples and masks, and the
    pseudo-perplexities of the `unmasked_samples`.

    Where the run keeps an average of its weights, its figures are there too, as `heldout_average/...`.
    Raises CutShortError after a signal: what is there of the time before a limit is for saving.
    """
    figures = _evaluate_sets(engine, loaders, unmasked, samples, done, stop)
    if engine.config.train.average:
        with engine.averaged():
            again = _evaluate_sets(engine, loaders, unmasked, samples, done, stop)
        figures |= {key.replace("heldout", AVERAGE, 1): value for key, value in again.items()}
    return figures


def in_words(figures: dict[str, float]) -> str:
    """The figures of `evaluate` for the screen."""
    average = {
        key.replace(AVERAGE, "heldout", 1): value for key, value in figures.items() if key.startswith(AVERAGE)
    }
    weights = {key: value for key, value in figures.items() if not key.startswith(AVERAGE)}
    words = f"held-out {heldout_brief(weights)}"
    return f"{words}; with the average {heldout_brief(average)}" if average else words


def _evaluate_sets(
    engine: Engine[PretrainConfig],
    loaders: dict[str, Loader],
    unmasked: dict[str, MicroBatch],
    samples: int,
    done: int,
    stop: StopSignal | None,
) -> dict[str, float]:
    engine.model.eval()
    figures: dict[str, float] = {}
    try:
        for prefix, loader in loaders.items():
            found = _evaluate(engine, prefix, loader, samples, done, stop)
            for loss, name in PERPLEXITIES.items():
                if prefix != "heldout" and f"{prefix}/{loss}" in found:
                    found[f"{prefix}/{name}"] = perplexity(found[f"{prefix}/{loss}"])
            if prefix in unmasked:
                alone = mean_loss_alone(engine, unmasked[prefix], loader.rules, done, stop)
                found[f"{prefix}/pseudo_perplexity"] = perplexity(alone)
            figures |= found
    finally:
        engine.model.train()
    return figures


def perplexity(loss: float) -> float:
    """The exponential of a mean loss: as if the model chose among so many equally likely pieces.

    Of masked tokens all masks of a sample are predicted at once. That is not the pseudo-perplexity of Salazar
    et al. (2020), which masks one token at a time and sees all others, and is lower.
    """
    return math.exp(min(loss, 700.0))  # beyond that lies no float64


def _evaluate(
    engine: Engine[PretrainConfig],
    prefix: str,
    loader: Loader,
    samples: int,
    done: int,
    stop: StopSignal | None,
) -> dict[str, float]:
    """The figures of one held-out set, in evaluation mode."""
    ranks = engine.ranks
    totals = torch.zeros(len(LossSums._fields), device=ranks.device)
    predicted = tokens = 0
    steps = max(1, samples // loader.global_batch)
    for step in range(steps):
        heed(stop, ranks)
        for batch in loader.step(step):
            totals += torch.stack(engine(batch.to(ranks.device)))
            predicted += batch.num_targets
            tokens += len(batch.tokens)
            beat(done)
    all_predicted, all_tokens = ranks.sum_over_data(predicted, tokens)
    counts = Counts(all_predicted, steps * loader.global_batch, all_tokens)
    return mean_losses(prefix, engine.config, totals, counts, ranks)
