"""The commands of `fastconv`, one module each, with `add_parser`; here what they share: how bad input is told."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator


class InputError(Exception):
    """Bad input: `fastconv.cli.main` tells it in one line and exits with 2."""


def check_writable(option: str, path: str | os.PathLike[str]) -> None:
    """See that a file can be written, before anything is computed. Raises InputError."""
    existed = os.path.lexists(path)
    try:
        with open(path, "ab"):
            pass
    except OSError as error:
        raise InputError(f"--{option}: can't write {os.fspath(path)!r}: {error.strerror}") from error
    if not existed:
        os.remove(path)


@contextlib.contextmanager
def telling_bad_input() -> Iterator[None]:
    """Turns what a bad argument, file or folder raises into an InputError."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError) as error:
        raise InputError(" ".join(str(error).split())) from error


@contextlib.contextmanager
def telling_memory(options: str) -> Iterator[None]:
    """Turns running out of memory into an InputError: it is the input that is too large.

    options: those to make smaller, for the message
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        why = str(error).partition("\n")[0]
        # What the CPU's allocator raises is a plain RuntimeError.
        if isinstance(error, MemoryError) or "out of memory" in why or "allocate memory" in why:
            raise InputError(f"out of memory, try a smaller {options}: {why}") from error
        raise
