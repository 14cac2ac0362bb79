"""What a run writes of itself beside its steps: an evaluation with its fills, and the result at the end."""

from __future__ import annotations

from pathlib import Path

from bertscale.config import PretrainConfig
from bertscale.data.loader import Loader
from bertscale.data.micro_batch import MicroBatch
from bertscale.files import write_json
from bertscale.pretrain.fills import Sentence, fill, show_fills
from bertscale.pretrain.heldout import evaluate, in_words
from bertscale.run_folder import RESULT
from bertscale.tokenizer import Tokenizer
from bertscale.train.engine import Engine
from bertscale.train.metrics import MetricsWriter, Rate, result
from bertscale.train.stop import StopSignal


def look(
    engine: Engine[PretrainConfig],
    heldout: dict[str, Loader],
    unmasked: dict[str, MicroBatch],
    stop: StopSignal,
    sentences: list[Sentence],
    tokenizer: Tokenizer,
    writer: MetricsWriter | None,
    step: int,
) -> str:
    """Evaluates the weights after `step`; the line with the figures. Raises CutShortError after a signal."""
    figures = evaluate(engine, heldout, unmasked, engine.config.train.eval_samples, step, stop)
    if writer:
        writer.write(step, figures)
    if sentences:
        fills = fill(engine, sentences, tokenizer)
        if writer:
            show_fills(writer, Path(engine.config.run), step, sentences, fills)
    return f"step {step}: {in_words(figures)}"


def write_result(engine: Engine[PretrainConfig], rate: Rate, precision: str, peak: float) -> None:
    """Writes what the run comes to, by the first rank."""
    if engine.ranks.rank == 0:
        run = Path(engine.config.run)
        size = {"parameters": engine.num_parameters(), "precision": precision}
        write_json(run / RESULT, {**result(run), **rate.overall(), **size, "peak_flops": peak})
