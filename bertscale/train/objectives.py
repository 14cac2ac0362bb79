"""The training loss, a weighted sum of those of the objectives, and the mean losses that are reported.

    loss = mlm * L_mlm + pairs * L_pairs + rtd * L_rtd,    or    loss = clm * L_clm

by the weights of the config's `objectives`, each L a mean over all of its predictions in the global batch
(Devlin et al., 2019; Clark et al., 2020).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

from torch import Tensor

from bertscale.config import ObjectivesConfig, PretrainConfig
from bertscale.train.parallel import Ranks

Number = TypeVar("Number", float, Tensor)


class Counts(NamedTuple):
    """The divisors of the sums of a global batch, or of several: its predictions on all data ranks."""

    predicted: float  # tokens that are predicted: masked ones, or next ones
    samples: float
    tokens: float  # those that may be replaced ones: all


def training_loss(objectives: ObjectivesConfig, sums: Sequence[Number], counts: Sequence[float]) -> Number:
    """The loss, of the type of the `sums`, which begin with those of the losses, as `LossSums` do.

    An objective without predictions adds 0.
    """
    tokens, pairs, rtd = (total / (count or 1.0) for total, count in zip(sums[:3], counts, strict=True))
    return (objectives.mlm or objectives.clm) * tokens + objectives.pairs * pairs + objectives.rtd * rtd


def mean_losses(
    prefix: str, config: PretrainConfig, sums: Tensor, counts: Sequence[float], ranks: Ranks
) -> dict[str, float]:
    """Mean losses and accuracies, named such as `PREFIX/mlm_loss`, from this rank's sums, a tensor of the
    `LossSums`; objectives that are not trained are missing. Waits for the device."""
    totals = ranks.sum_over_data(*sums.tolist())
    figures = {f"{prefix}/loss": training_loss(config.objectives, totals, counts)}
    for name, loss, correct, count in zip(config.trained, totals[:3], totals[3:6], counts, strict=True):
        if name is not None:
            figures |= {
                f"{prefix}/{name}_loss": loss / (count or 1.0),
                f"{prefix}/{name}_accuracy": correct / (count or 1.0),
            }
    if "rtd" in config.trained:
        replaced_found, replaced = totals[6:]
        figures[f"{prefix}/rtd_recall"] = replaced_found / (replaced or 1.0)
    return figures
