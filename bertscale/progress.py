"""Shows the progress of long work: a bar on a terminal, a plain line every ten seconds in a log.

with Progress("encode", total=120_000, unit="documents") as progress:
    progress.advance(512, loss="7.31")
"""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, TextIO

LINE_SECONDS = 10.0  # between two plain lines in a log


def show_duration(seconds: float) -> str:
    """Formats seconds: `75` -> "1:15", `4000` -> "1:06:40"."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def show_count(number: float) -> str:
    """Formats a number: `1234` -> "1,234", `2_500_000` -> "2.50 M"; below 10 it keeps two digits."""
    if number >= 1e9:
        return f"{number / 1e9:.2f} G"
    if number >= 1e6:
        return f"{number / 1e6:.2f} M"
    return f"{number:,.0f}" if number >= 10 else f"{number:.2f}"


class Progress:
    """Counts units of work done and shows rate and time left.

    `total` may be None where the amount is not known. `start` counts units finished by an
    earlier run: shown as done, left out of the rate. `advance(n, key=text)` adds `n` units and
    replaces the facts shown behind the rate. `hidden` shows nothing (all ranks but the first).
    """

    def __init__(
        self,
        label: str,
        total: int | None,
        unit: str,
        *,
        start: int = 0,
        hidden: bool = False,
        file: TextIO | None = None,
    ) -> None:
        self.label, self.total, self.unit, self.start, self.hidden = label, total, unit, start, hidden
        self.done = start
        self.facts: dict[str, str] = {}
        self.file = file or sys.stdout
        self.began = time.monotonic()
        self.last_line = self.began
        self.bar: Any = None
        self.task: Any = None

    def __enter__(self) -> Progress:
        self.began = self.last_line = time.monotonic()
        if self.file.isatty() and not self.hidden:
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as Bar

            self.bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[text]}"),
                redirect_stderr=sys.stderr.isatty(),  # else warnings go to the screen, not the log file
            )
            self.bar.start()
            self.task = self.bar.add_task(self.label, total=self.total, completed=self.start, text="")
        return self

    def advance(self, amount: int, **facts: str) -> None:
        """Adds `amount` units; `facts` are short texts such as `loss="7.31"`."""
        self.done += amount
        self.facts.update(facts)
        now = time.monotonic()
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done, text=self._text(now))
        elif now - self.last_line >= LINE_SECONDS:
            self.last_line = now
            self._print(f"{self.label}: {self._text(now)}")

    def say(self, text: str) -> None:
        """Prints one line above the bar."""
        if self.bar is not None:
            self.bar.console.print(text, markup=False, highlight=False)
        else:
            self._print(text)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        now = time.monotonic()
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done, text=self._text(now))
            self.bar.stop()
        elif kind is None:
            self._print(f"{self.label}: {self._text(now)}")

    def _print(self, text: str) -> None:
        if not self.hidden:
            print(text, file=self.file, flush=True)

    def _text(self, now: float) -> str:
        seconds = max(now - self.began, 1e-9)
        rate = (self.done - self.start) / seconds
        amount = f"{self.done:,}" + (f"/{self.total:,}" if self.total is not None else "")
        parts = [f"{amount} {self.unit}", f"{show_count(rate)}/s"]
        if self.total is not None and self.done < self.total and rate > 0:
            parts.append(f"{show_duration((self.total - self.done) / rate)} left")
        else:
            parts.append(f"in {show_duration(seconds)}")
        return ", ".join(parts + [f"{key} {value}" for key, value in self.facts.items()])
