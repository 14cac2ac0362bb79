"""Shows the progress of long work: a bar on a terminal, a plain line every ten seconds in a log.

with Progress("encode", total=120_000, unit="documents") as progress:
    progress.advance(512, loss="7.31")
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import textwrap
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

if TYPE_CHECKING:
    from rich.table import Table

LINE_SECONDS = 10.0  # between two plain lines in a log
REFRESHES = 4  # of the bar, in a second
BAR_COLUMNS = (8, 24)  # narrowest and widest bar
MAIN = 4  # amount, time left and two facts are worth more than the rest, where there is no room for all


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


class CopiedStream:
    """What is written to `screen`, and the same in `log`; a progress bar is drawn on `screen` alone."""

    def __init__(self, screen: TextIO, log: TextIO) -> None:
        self.screen, self.log = screen, log

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):  # a full disk ends a run at its next checkpoint, not here
            self.log.write(text)
        return self.screen.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self.log.flush()
        self.screen.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.screen, name)


class TimeBudget(NamedTuple):
    """Seconds of work that ends by the clock, and those that are over when it begins."""

    seconds: float
    spent: float


def fold(line: str) -> str:
    """Folds a line `name      text` at words to the width of a terminal, the text in its column.

    Without a terminal the line stays as it is.
    """
    if not sys.stdout.isatty():
        return line
    width = shutil.get_terminal_size().columns
    column = " " * 10
    return textwrap.fill(
        line, width, subsequent_indent=column, break_long_words=False, break_on_hyphens=False
    )


class Progress:
    """Counts units of work done and shows rate and time left.

    `total` may be None where the amount is not known. `start` counts units finished by an
    earlier run: shown as done, left out of the rate. Work that ends by the clock has a `budget`; its
    number of units is then estimated. `advance(n, key=text)` adds `n` units and replaces the facts shown
    behind the rate, the most important first: what a terminal is too narrow for is left out from the end.
    `hidden` shows nothing (all ranks but the first).
    """

    def __init__(
        self,
        label: str,
        total: int | None,
        unit: str,
        *,
        start: int = 0,
        budget: TimeBudget | None = None,
        hidden: bool = False,
        file: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.label, self.total, self.unit, self.start, self.hidden = label, total, unit, start, hidden
        self.budget = budget
        self.done = start
        self.facts: dict[str, str] = {}
        self.file = file or sys.stdout
        # The stream of the bar, and that of plain lines; of a terminal in a `CopiedStream` there are both.
        self.screen: TextIO | None = None
        self.lines: TextIO | None = None
        if not hidden and not self.file.isatty():
            self.lines = self.file
        elif not hidden:
            self.screen = getattr(self.file, "screen", self.file)
            self.lines = getattr(self.file, "log", None)
        self.clock = clock
        self.began = self.advanced = self.last_facts = self.last_line = clock()
        self.printed: tuple[int, dict[str, str]] | None = None  # what the last plain line has shown
        self.live: Any = None
        self.over = False

    def __enter__(self) -> Progress:
        self.began = self.advanced = self.last_facts = self.last_line = self.clock()
        if self.screen is not None:
            from rich.console import Console
            from rich.live import Live
            from rich.spinner import Spinner

            console = Console(file=self.screen)
            self.spinner = Spinner("line" if console.options.ascii_only else "dots")
            self.live = Live(
                get_renderable=lambda: self._bar(console.width),
                console=console,
                refresh_per_second=REFRESHES,
                redirect_stderr=sys.stderr.isatty(),  # else warnings go to the screen, not the log file
            )
            self.live.start()
        return self

    def advance(self, amount: int, **facts: str) -> None:
        """Adds `amount` units; `facts` are short texts such as `loss="7.31"`."""
        now = self.clock()
        self.done += amount
        self.advanced = now
        if facts:
            self.facts.update(facts)
            self.last_facts = now
        fresh = bool(facts) or not self.facts  # a line does not show the figures of an earlier one again
        if now - self.last_line >= LINE_SECONDS and fresh and self._left(now) != 0:
            self._print_state(now)

    def wants_facts(self) -> bool:
        """Tells whether it is time for new facts, also where their turn by number has not come."""
        return not self.hidden and self.clock() - self.last_facts >= LINE_SECONDS

    def say(self, text: str) -> None:
        """Prints one line above the bar."""
        if self.live is not None:
            self.live.console.print(text, markup=False, highlight=False, soft_wrap=True)
        self._print(text)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.over = True
        if self.live is not None:
            self.live.stop()
        if kind is None and self.printed != (self.done, self.facts):
            self._print_state(self.clock())

    # ------------------------------------------------------------------------------------- plain lines

    def _print_state(self, now: float) -> None:
        self.last_line, self.printed = now, (self.done, dict(self.facts))
        self._print(f"{self.label}: {', '.join(filter(None, self._parts(now)))}")

    def _print(self, text: str) -> None:
        if self.lines is not None:
            with contextlib.suppress(OSError) if self.live is not None else contextlib.nullcontext():
                print(f"{time.strftime('%d %b %H:%M:%S')}  {text}", file=self.lines, flush=True)

    # ----------------------------------------------------------------------------------------- the bar

    def _bar(self, width: int) -> Table:
        """One line of at most `width` columns: what it is too narrow for is left out, nothing is cut."""
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        now = self.clock()
        parts, room = self._parts(now), width - len("* ")
        cells: list[Any] = [Text(" ") if self.over else self.spinner]
        if len(", ".join(by_importance(parts)[:MAIN])) + len(self.label) < room:
            cells.append(Text(self.label))
            room -= len(self.label) + 1
        text, share = fitting(parts, room), self._share(now)
        columns = min(room - len(text) - 1, BAR_COLUMNS[1])
        if share is not None and columns >= BAR_COLUMNS[0]:
            cells.append(ProgressBar(total=1.0, completed=share, width=columns))
        line = Table.grid(padding=(0, 1, 0, 0))
        line.add_row(*cells, Text(text, no_wrap=True, overflow="ellipsis"))
        return line

    # --------------------------------------------------------------------------------------- the parts

    def _parts(self, now: float) -> list[str]:
        """Amount, rate, time left or taken, and the facts, each a short text."""
        rate, left = self._rate(), self._left(now)
        amount = f"{self.done:,}"
        if self.total is not None:
            amount += f"/{self.total:,}"
        elif self.budget is not None and rate > 0 and left:
            estimate = self.done + rate * (self._left(self.advanced) or 0.0)
            amount += f"/~{float(f'{estimate:.3g}'):,.0f}"
        if left:
            moment = f"{show_duration(left)} left"
        else:
            taken = show_duration(now - self.began)
            moment = f"in {taken}" if left == 0 or self.over else f"{taken} so far"
        facts = [f"{key} {value}" for key, value in self.facts.items()]
        return [f"{amount} {self.unit}", f"{show_count(rate)}/s" if rate else "", moment, *facts]

    def _rate(self) -> float:
        """Units a second until the last `advance`: between two of them a rate would only fall."""
        return (self.done - self.start) / max(self.advanced - self.began, 1e-9)

    def _left(self, now: float) -> float | None:
        """Seconds left; 0 at the end, None where they cannot be told."""
        if self.budget is not None:
            left = self.budget.seconds - self.budget.spent - (now - self.began)
            return left if left >= 0.5 else 0.0  # the last step ends when it is likely to reach the end
        if self.total is None:
            return None
        if self.done >= self.total:
            return 0.0
        rate = self._rate()
        # Until the next `advance` the time that passes is taken off.
        return max((self.total - self.done) / rate - (now - self.advanced), 0.5) if rate > 0 else None

    def _share(self, now: float) -> float | None:
        """The part of the work that is done, from 0 to 1; None where it cannot be told."""
        if self.budget is not None:
            return 1 - (self._left(now) or 0.0) / self.budget.seconds
        return None if self.total is None else self.done / max(self.total, 1)


def by_importance(parts: list[str]) -> list[str]:
    """Amount, rate, time and facts, those first that matter most; the first `MAIN` are always to be seen."""
    amount, rate, moment, *facts = parts
    return [amount, moment, *facts[: MAIN - 2], rate, *facts[MAIN - 2 :]]


def fitting(parts: list[str], width: int) -> str:
    """The parts in one line; of what is too long for `width` the least important is left out."""
    order = by_importance(parts)
    for count in range(len(order), 0, -1):
        text = ", ".join(part for part in parts if part and part in order[:count])
        if len(text) <= width:
            break
    return text
