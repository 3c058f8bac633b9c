"""The command line: `fastconv COMMAND`; the commands are in fastconv.commands."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from typing import NoReturn

from fastconv.commands import InputError, bench, convert, env, run, tune, verify, warmup

_COMMANDS = (run, verify, bench, convert, tune, warmup, env)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code: 0, 1 for FAIL, 2 for bad input."""
    parser = _parser()
    try:
        args = parser.parse_args(argv)
    except SystemExit as done:  # --help, or a usage error that has been told
        return int(done.code or 0)
    try:
        return args.run(args, shlex.join(["fastconv", *(sys.argv[1:] if argv is None else argv)]))
    except InputError as error:
        print(f"fastconv {args.command}: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        # The output can't be written. What is still buffered goes nowhere: else the interpreter complains at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # who reads has seen enough (head, less): end quietly, as by the signal
            return 141
        print(f"fastconv {args.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"fastconv {args.command}: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="fastconv", description="Fast paths for ConvBERT, BERT and RoCBert, and proof that they are right."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in _COMMANDS:
        command.add_parser(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
