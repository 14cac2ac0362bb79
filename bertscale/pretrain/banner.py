"""The first lines of a run: the model, the data, the ranks."""

from __future__ import annotations

from bertscale.config import PretrainConfig
from bertscale.data.loader import Loader
from bertscale.data.quality import doubts
from bertscale.data.shards import Dataset
from bertscale.progress import show_count
from bertscale.run_folder import TENSORBOARD
from bertscale.train.device import describe
from bertscale.train.parallel import Ranks
from bertscale.train.schedule import TrainingSchedule


def banner(
    config: PretrainConfig,
    data: list[Dataset],
    loader: Loader,
    ranks: Ranks,
    precision: str,
    reason: str,
    peak: float,
    start: int,
    schedule: TrainingSchedule,
) -> list[str]:
    """The first lines of a run. `precision` and its `reason` in words; `peak`: FLOP/s of all ranks; `start`:
    steps that an earlier attempt has done."""
    sizes = config.model
    lines = [
        f"model     {sizes.preset}, {sizes.num_hidden_layers} layers of {sizes.hidden_size}; "
        f"{precision} ({reason})",
        *data_lines(config, data, loader, start, schedule),
        f"ranks     {ranks.world}: tensor parallel {ranks.tensor} x data parallel {ranks.data}, "
        f"ZeRO-{config.parallel.zero_stage}, on {describe(ranks.device)} each; "
        f"{show_count(peak)} FLOP/s peak of all ranks",
        f"watch     tensorboard --logdir {config.run}/{TENSORBOARD}",
    ]
    if start:
        lines.append(f"resumed   from step {start} of {schedule.text}")
    return lines


def data_lines(
    config: PretrainConfig, data: list[Dataset], loader: Loader, start: int, schedule: TrainingSchedule
) -> list[str]:
    """Lines on each corpus: its size, the epochs to come, and documents that make no sample."""
    mixture, kind = loader.mixture, config.samples.kind
    name = {"nsp": "NSP pairs", "sop": "SOP pairs", "document": "samples", "packed": "packed samples"}[kind]
    before, at_end = mixture.epochs(start), mixture.epochs(schedule.steps or start)
    lines = []
    for number, (corpus, sampler) in enumerate(zip(data, mixture.phases[-1].samplers, strict=True)):
        fraction, cut = mixture.quotas.fractions[number], mixture.cut.get(number)
        lines.append(
            f"{'' if number else 'data':<10}{show_count(corpus.num_tokens)} tokens, {corpus.num_documents:,} "
            f"documents, {sampler.num_samples:,} {name} of at most {config.samples.max_length} tokens; "
            + (f"{at_end[number] - before[number]:.1f} epochs" if schedule.steps else schedule.text)
            + " to go"
            + (f"; {corpus.folder}, {fraction:.1%} of the samples" if len(data) > 1 else "")
            + (f", not {cut:.1%}: max_epochs is {config.corpora[number].max_epochs:g}" if cut else "")
        )
        if (short := corpus.num_documents - sampler.num_documents) and sampler.min_tokens > 1:
            lines.append(f"{'':<10}{short:,} documents of fewer than {sampler.min_tokens:,} tokens left out")
        lines += [f"{'warning':<10}{corpus.folder}: {doubt}" for doubt in doubts(corpus.manifest)]
        if sampler.left_out:
            lines.append(f"{'':<10}{sampler.left_out:,} documents of a single token make no pair")
    for steps, length in config.samples.warmup:
        lines.append(f"{'':<10}before that, {steps:,} steps of at most {length} tokens")
    for tokens, size in config.train.batch_warmup:
        lines.append(f"{'':<10}{size:,} samples a step until {show_count(tokens)} tokens are done")
    return lines


def epochs(config: PretrainConfig, loader: Loader, done: int) -> dict[str, float]:
    """Epochs of the data, or of each of several corpora, after `done` steps, by their name in the metrics."""
    passed = loader.mixture.epochs(done)
    if len(passed) == 1:
        return {"data/epochs": passed[0]}
    return {f"data/epochs/{c.path}": value for c, value in zip(config.corpora, passed, strict=True)}
