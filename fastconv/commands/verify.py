"""`fastconv verify`: check and time a model by every path."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from fastconv.commands import check_writable, telling_bad_input, telling_memory

_DESCRIPTION = (
    "Run a model by every path (plain reference, transformers if installed, fastconv) on the same real text and "
    "compare errors, speed and memory. Ends with PASS (exit code 0) if every path of fastconv keeps the 2x rule: its "
    "error against the reference in fp64 is at most twice that of the reference in the same dtype, plus one rounding, "
    "in maximum and root mean square. Else with FAIL (exit code 1)."
)


def add_parser(commands: Any) -> None:
    """Add this command to the subparsers of `fastconv`."""
    parser = commands.add_parser("verify", help="check and time a model by every path", description=_DESCRIPTION)
    parser.set_defaults(run=_run)
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a checkpoint folder, or convbert-base, convbert-medium-small, convbert-small or bert-base: published "
        "shapes with random weights",
    )
    parser.add_argument(
        "--text", metavar="FILE", help="UTF-8 text, - for stdin; default: the prose of Python's own help topics"
    )
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16", "fp16"), help="default: %(default)s")
    parser.add_argument("--batch", type=int, metavar="N", help="sequences at a time; default: 8")
    parser.add_argument(
        "--length",
        type=int,
        metavar="N",
        help="join sentences to sequences of exactly N tokens; default: a sequence is a sentence, with padding",
    )
    parser.add_argument(
        "--padding",
        default="keep",
        choices=("keep", "remove"),
        help='"remove": run fastconv\'s paths with accelerate(padding="remove") too, and compare the tokens with what '
        "that promises: for BERT and RoCBert the results of the padded batch, for ConvBERT those of each sequence "
        "alone; default: %(default)s",
    )
    parser.add_argument("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, ...; default: cuda if there is a GPU")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads; default: PyTorch's choice")
    parser.add_argument(
        "--rounds", type=int, metavar="N", help="times that each path is timed; default: for 20 s, >= 5"
    )
    parser.add_argument("--json", metavar="FILE", help="write everything that was found, with all times, as JSON")
    parser.add_argument("--plot", metavar="FILE", help="draw the table as a PNG (needs matplotlib)")


def _run(args: argparse.Namespace, command: str) -> int:
    from fastconv.progress import ProgressBar

    with telling_bad_input():
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
            padding=args.padding,
            device=args.device,
            rounds=args.rounds,
        )
    with ProgressBar() as progress, telling_memory("--batch or --length"):
        result = job.run(progress)
    print(table.render(result))
    if args.json is not None:
        record = {"command": command, **result.to_dict()}
        Path(args.json).write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    if args.plot is not None:
        from fastconv.parity import plot

        plot.draw(result, args.plot)
    return 0 if result.ok else 1


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
        if file is not None:
            check_writable(option, file)


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
