"""How far a long command is, on stderr: a line that is written again and again on a terminal, one a stage elsewhere."""

from __future__ import annotations

import shutil
import sys
from typing import TypeVar

_WIDTH = 20
_Self = TypeVar("_Self", bound="StatusLine")


class StatusLine:
    """A line of the terminal that each text replaces; nothing where stderr is no terminal.

    A context that takes the line away at its end.
    """

    def __init__(self) -> None:
        self.on_terminal = sys.stderr.isatty()
        self._shown = False

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.clear()

    def show(self, text: str) -> None:
        """Write it in the place of the last one, cut to the terminal's width."""
        if self.on_terminal:
            # Of a text on two lines only the second could be taken away.
            sys.stderr.write(f"\r\x1b[K{text[: shutil.get_terminal_size().columns - 1]}")
            sys.stderr.flush()
            self._shown = True

    def clear(self) -> None:
        """Take it away, so that something else can be written."""
        if self._shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
            self._shown = False


def bar(share: float) -> str:
    """A bar that is full where the share is 1."""
    return f"|{'#' * int(_WIDTH * min(share, 1.0)):<{_WIDTH}}|"


class ProgressBar(StatusLine):
    """A callable for `fastconv.parity.Progress`: a bar on a terminal.

    Where stderr is no terminal a line when the stage changes: what stands before the colon of what is done.
    """

    def __init__(self) -> None:
        super().__init__()
        self._stage = ""

    def __call__(self, what: str, done: int, total: int) -> None:
        if self.on_terminal:
            self.show(f"{bar(done / total)} {done}/{total} {what}")
        elif done < total and (stage := what.partition(":")[0]) != self._stage:
            self._stage = stage
            print(f"{stage} ...", file=sys.stderr, flush=True)
