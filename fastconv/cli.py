"""The command line: `fastconv verify` and `fastconv env`."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

# What a bad argument, file or folder raises before anything is computed.
_BAD_INPUT = (ValueError, TypeError, OSError, ImportError)

_VERIFY = (
    "Run a model by every path (plain reference, transformers if installed, fastconv) on the same real text and "
    "compare errors, speed and memory. Ends with PASS (exit code 0) if every path of fastconv keeps the 2x rule: its "
    "error against the reference in fp64 is at most twice that of the reference in the same dtype, plus one rounding, "
    "in maximum and root mean square. Else with FAIL (exit code 1)."
)


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
    except _InputError as error:
        print(f"fastconv {args.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"fastconv {args.command}: interrupted", file=sys.stderr)
        return 130


class _InputError(Exception):
    pass


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="fastconv", description="Fast paths for ConvBERT and BERT, and proof that they are right.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    verify = commands.add_parser("verify", help="check and time a model by every path", description=_VERIFY)
    verify.set_defaults(run=_verify)
    verify.add_argument(
        "model",
        metavar="MODEL",
        help="a checkpoint folder, or convbert-base, convbert-medium-small, convbert-small or bert-base: published "
        "shapes with random weights",
    )
    verify.add_argument(
        "--text", metavar="FILE", help="UTF-8 text, - for stdin; default: the prose of Python's own help topics"
    )
    verify.add_argument("--dtype", default="fp32", choices=("fp32", "bf16", "fp16"), help="default: %(default)s")
    verify.add_argument("--batch", type=int, metavar="N", help="sequences at a time; default: 8")
    verify.add_argument(
        "--length",
        type=int,
        metavar="N",
        help="join sentences to sequences of exactly N tokens; default: a sequence is a sentence, with padding",
    )
    verify.add_argument("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, ...; default: cuda if there is a GPU")
    verify.add_argument("--threads", type=int, metavar="N", help="CPU threads; default: PyTorch's choice")
    verify.add_argument(
        "--rounds", type=int, metavar="N", help="times that each path is timed; default: for 20 s, >= 5"
    )
    verify.add_argument("--json", metavar="FILE", help="write everything that was found, with all times, as JSON")
    verify.add_argument("--plot", metavar="FILE", help="draw the table as a PNG (needs matplotlib)")

    env = commands.add_parser("env", help="print versions and devices", description="Print versions and devices.")
    env.set_defaults(run=_env)
    return parser


def _env(args: argparse.Namespace, command: str) -> int:
    from fastconv.parity import environment

    for name, value in environment.describe().items():
        print(f"{name:<16}{'-' if value is None else value}")
    return 0


def _verify(args: argparse.Namespace, command: str) -> int:
    from fastconv.parity.progress import ProgressBar

    try:
        _check_files(args)
        if args.threads is not None:
            _set_threads(args.threads)
        text = None if args.text is None else _read(args.text)
        from fastconv import parity
        from fastconv.parity import table

        job = parity.prepare(
            args.model,
            text=text,
            dtype=args.dtype,
            batch=args.batch,
            length=args.length,
            device=args.device,
            rounds=args.rounds,
        )
    except _BAD_INPUT as error:
        raise _InputError(" ".join(str(error).split())) from error
    with ProgressBar() as progress, _telling_memory():
        result = job.run(progress)
    print(table.render(result))
    if args.json is not None:
        record = {"command": command, **result.to_dict()}
        Path(args.json).write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    if args.plot is not None:
        from fastconv.parity import plot

        plot.draw(result, args.plot)
    return 0 if result.ok else 1


@contextlib.contextmanager
def _telling_memory() -> Iterator[None]:
    """Turns running out of memory into one line: it is the input that is too large."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        why = str(error).partition("\n")[0]
        # What the CPU's allocator raises is a plain RuntimeError.
        if isinstance(error, MemoryError) or "out of memory" in why or "allocate memory" in why:
            raise _InputError(f"out of memory, try a smaller --batch or --length: {why}") from error
        raise


def _set_threads(threads: int) -> None:
    import torch

    if threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    torch.set_num_threads(threads)


def _check_files(args: argparse.Namespace) -> None:
    """See that what will be written can be, before anything is computed."""
    if args.plot is not None:
        from fastconv.parity import plot

        plot.check_installed()
    for option in ("json", "plot"):
        file = getattr(args, option)
        if file is None:
            continue
        existed = os.path.lexists(file)
        try:
            with open(file, "ab"):
                pass
        except OSError as error:
            raise OSError(f"--{option}: can't write {file!r}: {error.strerror}") from error
        if not existed:
            os.remove(file)


def _read(file: str) -> str:
    """The text of a file, or of stdin for "-"."""
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"--text {file}: expected UTF-8 text, got the byte {error.object[error.start]:#04x}"
        ) from error
    except OSError as error:
        raise OSError(f"--text: can't read {file!r}: {error.strerror}") from error
    if not text.strip():
        raise ValueError(f"--text {file}: the text is empty; expected at least one sentence")
    return text


if __name__ == "__main__":
    sys.exit(main())
