"""Progress of long work: a live rich display on a terminal, plain lines in a pipe, both with an estimate of the end."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

__all__ = ["Progress", "Task", "duration", "quiet"]


def duration(seconds: float) -> str:
    """Write a number of seconds as people say it: ``"8 s"``, ``"2 min 05 s"``, ``"1 h 04 min"``."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class Task:
    """One counted piece of work; `advance` it as it proceeds."""

    def __init__(self, label: str, total: float, report: Callable[[Task], None]) -> None:
        self.label = label
        self.total = total
        self.done = 0.0
        self.note = ""
        self.started = time.monotonic()
        self._report = report

    @property
    def eta(self) -> float | None:
        """Seconds to the end at the present rate, or None before anything is done."""
        if self.done <= 0 or self.total <= 0:
            return None
        return (time.monotonic() - self.started) * (self.total - self.done) / self.done

    def advance(self, amount: float = 1.0, note: str = "") -> None:
        """Count `amount` more as done; `note` is a short text such as the present loss."""
        self.update(self.done + amount, note)

    def update(self, done: float, note: str = "") -> None:
        """Set what is done; `note` is a short text such as the present loss."""
        self.done = min(done, self.total)
        self.note = note or self.note
        self._report(self)


class Progress:
    """Shows tasks one after the other.

    Parameters
    ----------
    stream : file, default ``sys.stderr``
        Where to write. A terminal gets a live line, anything else a plain line at most every `every` seconds.
    every : float, default 5.0
        Seconds between two plain lines of one task.
    enabled : bool, default True
        False shows nothing.
    """

    def __init__(self, stream: TextIO | None = None, *, every: float = 5.0, enabled: bool = True) -> None:
        self.stream = stream if stream is not None else sys.stderr
        self.every = every
        self.enabled = enabled
        self.live = enabled and self.stream.isatty()
        self._last = 0.0

    def say(self, text: str) -> None:
        """Write one line."""
        if self.enabled:
            print(text, file=self.stream, flush=True)

    @contextmanager
    def task(self, label: str, total: float) -> Iterator[Task]:
        """Show one piece of work of `total` units while the block runs."""
        if self.live:
            with self._rich_task(label, total) as task:
                yield task
            return
        self._last = time.monotonic()
        task = Task(label, total, self._plain)
        yield task
        if self.enabled:
            took = duration(time.monotonic() - task.started)
            self.say(f"{label}: done in {took}" + (f"  {task.note}" if task.note else ""))

    def _plain(self, task: Task) -> None:
        now = time.monotonic()
        if not self.enabled or now - self._last < self.every or task.done >= task.total:
            return
        self._last = now
        left = "" if task.eta is None else f", {duration(task.eta)} left"
        share = 100 * task.done / task.total if task.total else 100.0
        self.say(f"{task.label}: {share:.0f} %{left}" + (f"  {task.note}" if task.note else ""))

    @contextmanager
    def _rich_task(self, label: str, total: float) -> Iterator[Task]:
        from rich.console import Console
        from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with RichProgress(*columns, console=Console(file=self.stream)) as bar:
            row = bar.add_task(label, total=total, note="")
            yield Task(label, total, lambda task: bar.update(row, completed=task.done, note=task.note))


def quiet() -> Progress:
    """Return a progress that shows nothing; the default of library functions."""
    return Progress(enabled=False)
