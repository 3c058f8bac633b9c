"""How far a long command is, on stderr: a bar on a terminal, one line a stage elsewhere."""

from __future__ import annotations

import sys
from typing import Any

_WIDTH = 30


class ProgressBar:
    """A callable for `fastconv.parity.Progress`, and a context that clears the line at its end.

    On a terminal tqdm's bar if tqdm is installed, else a plain one; where stderr is no terminal, a line when the stage
    changes (what stands before the colon of what is done).
    """

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._stage = ""
        self._tqdm: Any = None
        if self._terminal:
            try:
                from tqdm import tqdm
            except ImportError:
                return
            self._tqdm = tqdm(
                bar_format="{desc} |{bar}| {n}/{total} [{elapsed}]", leave=False, file=sys.stderr, total=1
            )

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._tqdm is not None:
            self._tqdm.close()
        elif self._terminal:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()

    def __call__(self, what: str, done: int, total: int) -> None:
        if self._tqdm is not None:
            self._tqdm.total, self._tqdm.n = total, done
            self._tqdm.set_description_str(f"{what:<42}")
        elif self._terminal:
            bar = "#" * (_WIDTH * done // total)
            sys.stderr.write(f"\r\x1b[K{what:<42} |{bar:<{_WIDTH}}| {done}/{total}")
            sys.stderr.flush()
        elif done < total and (stage := what.partition(":")[0]) != self._stage:
            self._stage = stage
            print(f"{stage} ...", file=sys.stderr, flush=True)
