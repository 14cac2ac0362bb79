"""The figures of a run: TensorBoard events, metrics.jsonl, tokens/s, MFU, the wait for data.

tensorboard --logdir RUN/tensorboard
"""

from __future__ import annotations

import json
import operator
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import yaml
from torch import Tensor

from bertscale.config import PAIRS, ModelConfig, Section
from bertscale.files import write_bytes
from bertscale.model.model import LossSums, attended_pairs, model_flops_per_token
from bertscale.progress import show_count
from bertscale.run_folder import FILLS, METRICS, TENSORBOARD, append_line, read_metrics, read_steps
from bertscale.train.parallel import Ranks


class Rate:
    """Counts the tokens between two log points, their seconds, and the FLOPs that they need."""

    def __init__(self, model: ModelConfig, vocab_size: int, peak: float, *, causal: bool = False) -> None:
        self.model, self.vocab_size, self.peak = model, vocab_size, peak  # peak: FLOP/s of all devices
        self.causal = causal
        self.all_tokens, self.all_seconds, self.all_flops = 0.0, 0.0, 0.0
        self.restart()

    def restart(self) -> None:
        """Begins a new interval; time before it (a checkpoint, a held-out loss) does not count."""
        self.tokens, self.pairs, self.local_pairs, self.masked = 0, 0, 0, 0
        self.began = time.perf_counter()

    def add(self, lengths: Sequence[int], masked: int) -> None:
        """Adds one micro-batch of this rank: its sequence lengths and its number of predicted tokens."""
        self.tokens += sum(lengths)
        self.pairs += sum(attended_pairs(length, None, self.causal) for length in lengths)
        if half := self.model.half_window:
            self.local_pairs += sum(attended_pairs(length, half, self.causal) for length in lengths)
        self.masked += masked

    def close(self, ranks: Ranks, *, warming_up: bool = False) -> dict[str, float]:
        """Rates of the interval over all ranks; one that warms up is left out of `overall`."""
        tokens, seconds, flops = self._interval(ranks)
        if not warming_up:
            self.all_tokens += tokens
            self.all_seconds += seconds
            self.all_flops += flops
        self.restart()
        return self._rates(tokens, seconds, flops)

    def so_far(self, ranks: Ranks) -> dict[str, float]:
        """Rates of the interval until now, which goes on."""
        return self._rates(*self._interval(ranks))

    def _interval(self, ranks: Ranks) -> tuple[float, float, float]:
        """Tokens, seconds and FLOPs of the interval, over all ranks."""
        tokens, pairs, local, masked = ranks.sum_over_data(
            self.tokens, self.pairs, self.local_pairs, self.masked
        )
        seconds = time.perf_counter() - self.began
        # Means over the tokens: a sample of L tokens has L * L pairs, so long samples count for more.
        flops = tokens * model_flops_per_token(
            self.model, self.vocab_size, pairs / tokens, masked / tokens, local / tokens
        )
        return tokens, seconds, flops

    def _rates(self, tokens: float, seconds: float, flops: float) -> dict[str, float]:
        return {"speed/tokens_per_second": tokens / seconds, "speed/mfu": flops / seconds / self.peak}

    def overall(self) -> dict[str, float]:
        """Rates of all intervals together."""
        seconds = max(self.all_seconds, 1e-9)
        return {"tokens_per_second": self.all_tokens / seconds, "mfu": self.all_flops / seconds / self.peak}


class LossAccumulator:
    """Sums of the losses of the steps since the last log point, left on the device until then: so many
    `fields`, and their `divisors`.

    A step that was skipped, because its gradient was not finite, is not among them. `skipped` counts such
    steps of the whole run, `newly_skipped` those between the last two calls of `close`, `in_a_row` those
    since the last step that was applied.
    """

    def __init__(
        self, device: torch.device, skipped: int, fields: int = len(LossSums._fields), divisors: int = 3
    ) -> None:
        self.sums, self.counts = torch.zeros(fields, device=device), (0.0,) * divisors
        self.unread: list[tuple[Sequence[float], Tensor]] = []
        self.skipped, self.newly_skipped, self.in_a_row = skipped, 0, 0
        self.skipped_at_close = skipped

    def add(self, sums: Sequence[Tensor], counts: Sequence[float], step_applied: Tensor) -> None:
        """Adds a step: this rank's sums, their divisors, and `Engine.step_applied`. Does not wait."""
        # where, not a product: the sums of a skipped step may be NaN, and 0 times NaN is NaN.
        self.sums += torch.where(step_applied > 0, torch.stack(list(sums)), 0.0)
        self.unread.append((counts, step_applied))

    def read(self) -> None:
        """Brings `skipped` and `in_a_row` up to date. Waits for the device."""
        if not self.unread:
            return
        flags = torch.stack([applied for _, applied in self.unread]).tolist()  # one copy for all steps
        for (counts, _), applied in zip(self.unread, flags, strict=True):
            if applied:
                self.counts = tuple(map(operator.add, self.counts, counts))
                self.in_a_row = 0
            else:
                self.skipped += 1
                self.in_a_row += 1
        self.unread.clear()

    def so_far(self) -> tuple[Tensor, tuple[float, ...]]:
        """Returns the sums and the counts since the last call of `close`. Waits for the device."""
        self.read()
        return self.sums, self.counts

    def close(self) -> tuple[Tensor, tuple[float, ...]]:
        """As `so_far`, and starts again from zero."""
        sums, counts = self.so_far()
        self.newly_skipped, self.skipped_at_close = self.skipped - self.skipped_at_close, self.skipped
        self.sums, self.counts = torch.zeros_like(sums), (0.0,) * len(counts)
        return sums, counts


class MetricsWriter:
    """Writes one run's figures to metrics.jsonl and TensorBoard; rank 0 only.

    What an earlier attempt wrote past `first_step`, the step that this attempt begins at, is dropped: those
    steps are done again. TensorBoard shows the run under `name`, by default that of its folder; of several
    runs in one folder it counts the steps of each from its own `begin`. `planned` is the step at which the
    last of them will end, if that is known.
    """

    def __init__(
        self,
        run: Path,
        first_step: int,
        name: str | None = None,
        begin: int = 0,
        planned: int | None = None,
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.first_step, self.begin = first_step, begin
        self.path = run / METRICS
        _keep_until(self.path, first_step)
        if (run / FILLS).exists():
            _keep_until(run / FILLS, first_step)
        folder = run / TENSORBOARD / (name or run.resolve().name)
        self.events = SummaryWriter(str(folder), purge_step=first_step - begin + 1)
        self.facts: dict[str, Any] = {"run": name} if name else {}
        if planned is not None:
            self.facts["steps"] = planned
        self.end: Any = None  # the summary that marks the run as finished

    def introduce(self, config: Section) -> None:
        """Shows the config in TensorBoard, as a text and by its keys in the tab HPARAMS."""
        from torch.utils.tensorboard.summary import hparams

        settings = yaml.safe_dump(config.model_dump(), sort_keys=False)
        self.events.add_text("config", f"```yaml\n{settings}```", self.first_step - self.begin)
        # Without the list of columns: TensorBoard would take that of one run for all of them, whatever their
        # keys, and makes it of all runs where there is none.
        _, begin, self.end = hparams(hyperparameters(config), {})  # type: ignore[no-untyped-call]
        self.events._get_file_writer().add_summary(begin)  # type: ignore[no-untyped-call]

    def write(self, step: int, figures: dict[str, float]) -> None:
        """Writes the figures after `step` steps; keys such as `train/mlm_loss` become TensorBoard's tags."""
        append_line(self.path, {"step": step, **self.facts, **figures})
        for key, value in figures.items():
            self.events.add_scalar(key, value, step - self.begin)
        self.events.flush()

    def write_text(self, step: int, key: str, text: str) -> None:
        """Shows a text in Markdown in TensorBoard, alone."""
        self.events.add_text(key, text, step - self.begin)
        self.events.flush()

    def close(self) -> None:
        """Ends a run that is finished."""
        if self.end is not None:
            self.events._get_file_writer().add_summary(self.end)  # type: ignore[no-untyped-call]
        self.events.close()


def _keep_until(path: Path, step: int) -> None:
    """Drops the lines of a file of JSON that are of later steps."""
    valid = [entry for entry in read_steps(path) if entry["step"] <= step]
    write_bytes(path, "".join(json.dumps(entry) + "\n" for entry in valid).encode())


def add_outcome(
    folder: Path,
    step: int,
    figures: dict[str, float],
    pictures: dict[str, npt.NDArray[np.uint8]],
    texts: dict[str, str],
) -> None:
    """Adds to the events of a run that has ended what has come out of it: figures, which the tab HPARAMS
    compares, pictures [height, width, 3], and texts in Markdown."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder), filename_suffix=".outcome") as events:
        for key, value in figures.items():
            events.add_scalar(key, value, step)
        for key, picture in pictures.items():
            events.add_image(key, picture, step, dataformats="HWC")
        for key, text in texts.items():
            events.add_text(key, text, step)


def hyperparameters(config: Section) -> dict[str, float | str]:
    """The keys of a config and their values, numbers or texts; without the folder of the run, the section
    `launch`, and keys that have no value."""
    flat: dict[str, float | str] = {}

    def add(prefix: str, values: dict[str, Any]) -> None:
        for key, value in values.items():
            if isinstance(value, dict):
                add(f"{prefix}{key}.", value)
            elif isinstance(value, int | float) and not isinstance(value, bool):
                flat[prefix + key] = value
            else:
                flat[prefix + key] = value if isinstance(value, str) else json.dumps(value)

    add("", config.model_dump(mode="json", exclude={"run", "output", "launch"}, exclude_none=True))
    return flat


def write_overview(
    folder: Path, name: str, scalars: dict[int, dict[str, float]], texts: dict[str, str]
) -> None:
    """Writes the figures of several steps, and texts, as TensorBoard's run `name` in `folder`, anew."""
    from torch.utils.tensorboard import SummaryWriter

    shutil.rmtree(folder / name, ignore_errors=True)
    with SummaryWriter(str(folder / name)) as events:
        for step, figures in scalars.items():
            for key, value in figures.items():
                events.add_scalar(key, value, step)
        for key, text in texts.items():
            events.add_text(key, text)


BY_LOSS = ("mlm", "clm")  # objectives of which a run has one at most
BY_ACCURACY = (*PAIRS, "rtd")  # objectives whose accuracy says more than their loss
RATES = {f"{kind}_accuracy": f"{kind.upper()} accuracy" for kind in BY_ACCURACY} | {"rtd_recall": "recall"}


def brief(figures: dict[str, float]) -> dict[str, str]:
    """The figures for a progress line, the most important first: a narrow terminal shows only these."""
    return {
        "loss": f"{figures['train/loss']:.3f}",
        "tokens/s": show_count(figures["speed/tokens_per_second"]),
        **{
            kind.upper(): f"{figures[f'train/{kind}_loss']:.3f}"
            for kind in BY_LOSS
            if f"train/{kind}_loss" in figures
        },
        **_rates(figures, "train", ".0%"),
        "MFU": show_mfu(figures["speed/mfu"]),
    }


def show_mfu(mfu: float) -> str:
    """MFU in words: above 1, the peak was measured while something else used the processor."""
    return f"{mfu:.0%}" + (" of the peak measured at the start" if mfu > 1 else "")


def heldout_brief(figures: dict[str, float]) -> str:
    """The held-out figures in words, such as `MLM loss 6.1234, NSP accuracy 51.2%; of wiki 6.0151`."""
    words = []
    for kind in BY_LOSS:
        if f"heldout/{kind}_loss" in figures:
            words.append(f"{kind.upper()} loss {figures[f'heldout/{kind}_loss']:.4f}")
    words += [f"{name} {rate}" for name, rate in _rates(figures, "heldout", ".1%").items()]
    losses = tuple(f"/{kind}_loss" for kind in BY_LOSS)
    named = [key for key in figures if key.endswith(losses) and key.count("/") == 2]
    of_each = ", ".join(f"{key.split('/')[1]} {figures[key]:.4f}" for key in named)
    return ", ".join(words) + (f"; of {of_each}" if of_each else "")


def _rates(figures: dict[str, float], prefix: str, form: str) -> dict[str, str]:
    named = {name: figures.get(f"{prefix}/{key}") for key, name in RATES.items()}
    return {name: format(rate, form) for name, rate in named.items() if rate is not None}


def result(run: Path) -> dict[str, Any]:
    """The first and the last losses of the run, from its metrics.jsonl; of held-out sets with names all
    figures, by the name."""
    entries = read_metrics(run)
    trained = [entry for entry in entries if "train/loss" in entry]
    heldout = [entry for entry in entries if "heldout/loss" in entry]
    return {
        "steps": trained[-1]["step"],
        "first_loss": trained[0]["train/loss"],
        "last_loss": trained[-1]["train/loss"],
        **{
            f"heldout_{figure}": heldout[-1][f"heldout/{figure}"]
            for figure in (
                *(f"{kind}_{figure}" for kind in BY_LOSS for figure in ("loss", "accuracy")),
                *(f"{kind}_accuracy" for kind in BY_ACCURACY),
                "pseudo_perplexity",
            )
            if f"heldout/{figure}" in heldout[-1]
        },
        **({"heldout": named} if (named := _named_sets(heldout[-1])) else {}),
    }


def _named_sets(figures: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The figures `heldout/NAME/FIGURE` by name and figure."""
    found: dict[str, dict[str, float]] = {}
    for key, value in figures.items():
        prefix, _, rest = key.partition("/")
        name, _, figure = rest.rpartition("/")
        if prefix == "heldout" and name:
            found.setdefault(name, {})[figure] = value
    return found
