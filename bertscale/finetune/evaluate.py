"""What a model says of held-out examples, on all ranks together, and how right it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bertscale.config import FinetuneConfig
from bertscale.finetune.loader import Part, TaskLoader, join
from bertscale.model.heads import task_loss
from bertscale.tasks.task import Example, Floats, Samples, Task
from bertscale.train.engine import Engine
from bertscale.train.heartbeat import beat
from bertscale.train.parallel import Ranks
from bertscale.train.stop import StopSignal, heed


@dataclass(frozen=True)
class HeldOut:
    """Examples to be predicted: their samples, and this rank's micro-batches of them."""

    task: Task[Any]
    examples: Sequence[Example]
    samples: Samples
    parts: Sequence[Part]


@dataclass(frozen=True)
class Found:
    """What was found: figures, on all ranks; the outputs and the predictions on the first, else none."""

    figures: dict[str, float]
    predictions: list[dict[str, Any]]
    logits: Floats | None  # [N, C], or [T, C] of tokens


def hold_out(
    task: Task[Any], examples: Sequence[Example], samples: Samples, micro_tokens: int, ranks: Ranks
) -> HeldOut:
    """Divides samples among the ranks, for `evaluate`."""
    loader = TaskLoader(
        samples,
        task.kind,
        global_batch=len(samples),
        micro_tokens=micro_tokens,
        seed=0,
        rank=ranks.data_rank,
        world=ranks.data,
    )
    return HeldOut(task, examples, samples, loader.all())


@torch.no_grad()
def evaluate(
    engine: Engine[FinetuneConfig], held_out: HeldOut, step: int, stop: StopSignal | None = None
) -> Found:
    """Predicts all examples and scores the predictions; leaves the model in evaluation mode.

    The figures are those of the task and `loss`. All ranks must call; `step` is for the sign of life. Raises
    CutShortError where `stop` is given and a signal came.
    """
    ranks, task, samples = engine.ranks, held_out.task, held_out.samples
    engine.model.eval()
    total = torch.zeros((), device=ranks.device)
    outputs = []
    for part in held_out.parts:
        heed(stop, ranks)
        batch = part.batch.to(ranks.device)
        logits = engine(batch)
        if batch.targets is not None:
            total += batch.weight * task_loss(task.kind, logits, batch)
        outputs.append(logits.float())
        beat(step)
    loss, count = ranks.sum_over_data(float(total), sum(part.divisor for part in held_out.parts))
    mine = [
        (part.samples, values.cpu().numpy())
        for part, values in zip(held_out.parts, outputs, strict=True)
        if len(part.samples)
    ]
    everyone = ranks.gather(mine if ranks.tensor_rank == 0 else [])
    whole = None
    if ranks.rank == 0:
        whole = join([piece for pieces in everyone for piece in pieces], samples, task)
    return judge(held_out, whole, loss / (count or 1.0), ranks)


def judge(held_out: HeldOut, logits: Floats | None, loss: float, ranks: Ranks) -> Found:
    """What the outputs of the first rank say by the rules of the task, and how right that is. All ranks must
    call."""
    figures: dict[str, float] = {}
    predictions: list[dict[str, Any]] = []
    if logits is not None:
        predictions = held_out.task.predict(held_out.examples, held_out.samples, logits)
        figures = {**held_out.task.score(held_out.examples, predictions), "loss": loss}
    return Found(ranks.broadcast(figures), predictions, logits)
