"""How far a run is, on stderr: a bar with the time left on a terminal, elsewhere a line for each case."""

from __future__ import annotations

import sys

from fastconv.bench.case import Case
from fastconv.bench.results import Record
from fastconv.bench.table import line
from fastconv.progress import StatusLine, bar


class Progress(StatusLine):
    """What `fastconv.bench.run.run` tells, for whoever waits."""

    def __init__(self) -> None:
        super().__init__()
        self._place = ""

    def start(self, case: Case, done: int, total: int, seconds_left: float | None) -> None:
        """A case begins."""
        left = "" if seconds_left is None else f", {_duration(seconds_left)} left"
        self._place = f"[{done + 1}/{total}{left}]"
        self.show(f"{bar(done / total)} {self._place} {case.name}")

    def finish(self, record: Record) -> None:
        """It is measured, or too large. On a terminal only what isn't in the table or is wrong is told at once."""
        if not self.on_terminal or "red" in record or "too_large" in record:
            self.clear()
            print(f"{self._place} {line(record)}", file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 100 else f"{max(0.0, seconds):.0f} s"
