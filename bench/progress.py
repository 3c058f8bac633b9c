"""How far a run is, on stderr: a bar with the time left on a terminal, elsewhere a line for each case."""

from __future__ import annotations

import sys
from typing import Any

from fastconv.bench.case import Case
from fastconv.bench.results import Record
from fastconv.bench.table import line


class Progress:
    """What `fastconv.bench.run.run` tells, for whoever waits. A context that takes the bar away at its end."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._task: Any = None
        self._place = ""
        if sys.stderr.isatty():
            try:
                from rich import progress
                from rich.console import Console
            except ImportError:
                return
            self._bar = progress.Progress(
                progress.TextColumn("{task.description}", markup=False),
                progress.BarColumn(bar_width=30),
                progress.MofNCompleteColumn(),
                progress.TextColumn("{task.fields[left]}"),
                console=Console(stderr=True),
                transient=True,
            )

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def start(self, case: Case, done: int, total: int, seconds_left: float | None) -> None:
        """A case begins."""
        left = "" if seconds_left is None else f"{_duration(seconds_left)} left"
        self._place = f"[{done + 1}/{total}{', ' + left if left else ''}]"
        if self._bar is None:
            return
        if self._task is None:
            self._task = self._bar.add_task("", total=total, left="")
        self._bar.update(self._task, description=case.name, completed=done, total=total, left=left)

    def finish(self, record: Record) -> None:
        """It is measured, or too large. On a terminal only what isn't in the table or is wrong is told at once."""
        if self._bar is None:
            print(f"{self._place} {line(record)}", file=sys.stderr, flush=True)
        elif "red" in record or "too_large" in record:
            style = "bold red" if "red" in record else "yellow"
            self._bar.console.print(line(record), style=style, markup=False, highlight=False)


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 100 else f"{max(0.0, seconds):.0f} s"
