"""Progress and the time left, on the screen or in a log; durations and sizes as text."""

from __future__ import annotations

import time
from datetime import timedelta
from types import TracebackType

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from weft.screen.console import VisibleConsole
from weft.screen.loudness import is_quiet

EVERY = 10.0  # seconds between two lines if the output is no terminal


class Countdown:
    """A progress bar with the time left, removed at the end; without a terminal, a line every ten seconds.

    Args:
        total: number of steps; None if it is not known.
        what: name of the operation.
        hidden: show nothing; for all but one of several processes.

    Example:
        >>> with Countdown(len(batches), "reading") as countdown:
        ...     for batch in batches:
        ...         model(**batch)
        ...         countdown.advance()
    """

    def __init__(self, total: int | None, what: str = "", *, hidden: bool = False) -> None:
        self.total, self.what, self.hidden = total, what, hidden or is_quiet()
        self.done = 0
        self._console = VisibleConsole(soft_wrap=True)
        self._bar: Progress | None = None
        self._start = self._last = 0.0

    def __enter__(self) -> Countdown:
        self._start = self._last = time.monotonic()
        if self._console.is_terminal and not self.hidden:
            columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=self._console, transient=True)
            self._bar.add_task(self.what, total=self.total)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, steps: int = 1, what: str | None = None) -> None:
        """Count `steps` more steps as done; `what` names the next operation."""
        self.done += steps
        self.what = self.what if what is None else what
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], advance=steps, description=self.what)
        elif not self.hidden and now - self._last >= EVERY:
            self._last = now
            self._console.print(f"{self.what}: {self._so_far(now)}", markup=False, highlight=False)

    def _so_far(self, now: float) -> str:
        if self.total is None:
            return f"{self.done:,}"
        left = (now - self._start) / self.done * (self.total - self.done) if self.done else None
        return f"{self.done:,}/{self.total:,}" + ("" if left is None else f", {clock(left)} left")


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    return str(timedelta(seconds=round(seconds)))


def about(seconds: int | float) -> str:
    """A duration in seconds, rounded: 40 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 1 else "1 s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def size(number: int | float) -> str:
    """A number of bytes with its unit: 64 kB, 340 MB, 1.9 GB."""
    for unit, least in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= least:
            return f"{number / least:.1f} {unit}" if number < 10 * least else f"{number / least:,.0f} {unit}"
    return f"{number:.0f} bytes"
