"""`fastconv run`: a task over lines of text."""

from __future__ import annotations

import argparse
import json
import os
import stat
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, BinaryIO

from fastconv.commands import InputError, telling_bad_input, telling_memory
from fastconv.progress import StatusLine, bar

if TYPE_CHECKING:
    from fastconv.tasks import Pipeline

# Those of fastconv.tasks, without importing torch for --help.
TASKS = (
    "fill-mask",
    "text-classification",
    "token-classification",
    "question-answering",
    "multiple-choice",
    "next-sentence",
    "text-generation",
    "feature-extraction",
)
_BREAKS = str.maketrans("\t\r\n", "   ")
_DESCRIPTION = """\
Run a task over texts: arguments, the lines of a file, or those of stdin. The results come in the
order of the texts, each as soon as it is there; memory does not grow with the input."""
_EPILOG = """\
TASK                  a line                   its result, TAB-separated
fill-mask             a text with [MASK]       score token token_str sequence, a line for each
                                               of 5 candidates (--top-k)
text-classification   a text                   label score; with --top-k a line for each label
token-classification  a text                   entity score index word start end, a line for
                                               each token that is not O
question-answering    question<TAB>context     score start end answer; with --top-k a line for
                                               each answer
multiple-choice       prompt<TAB>choice<TAB>...  index choice score; with --top-k a line for each
next-sentence         first<TAB>second         IsNext or NotNext, score
text-generation       a text                   the text and how it goes on; needs a decoder, with
                                               is_decoder in its config.json
feature-extraction    a text                   the numbers of a token, a line for each token,
                                               [CLS] and [SEP] included
An empty line ends a result that may have several lines. A TAB or a line break inside of a value
becomes a space. With --json a result is one line, the value that fastconv.pipeline gives.

With --input-format json a line is a JSON string, or an object with "text" ("text_pair" too, for
text-classification and next-sentence), "question" and "context", or "prompt" and "choices". Tasks
that take more than one text read a line that begins with { as JSON in any case but tsv.

A line that is empty, not UTF-8, or longer than the model is an error (exit code 2), told after the
results of the lines before it. question-answering cuts a long context into windows."""


def add_parser(commands: Any) -> None:
    """Add this command to the subparsers of `fastconv`."""
    parser = commands.add_parser(
        "run",
        help="run a task over lines of text",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=_run)
    parser.add_argument("--task", required=True, choices=TASKS, metavar="TASK", help="one of those below")
    parser.add_argument(
        "--model", required=True, metavar="DIR", help="a checkpoint folder with its tokenizer, or a hub id"
    )
    parser.add_argument("texts", nargs="*", metavar="TEXT", help="default: the lines of stdin, which - stands for too")
    parser.add_argument("--file", metavar="FILE", help="UTF-8 lines to read instead, - for stdin")
    parser.add_argument(
        "--input-format",
        choices=("text", "tsv", "json"),
        help="default: text; for tasks that take more than one, tsv and json; a pair for text-classification needs tsv "
        "or json",
    )
    parser.add_argument("--json", action="store_true", help="write one JSON value a line")
    parser.add_argument("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, ...; default: cuda if there is a GPU")
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16", "fp16"), help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="texts at a time; default: %(default)s")
    parser.add_argument(
        "--truncate", action="store_true", default=None, help="cut the end of a text that is longer than the model"
    )
    parser.add_argument("--skip-empty", action="store_true", help="leave out empty lines, and tell how many at the end")
    parser.add_argument("--top-k", type=int, metavar="N", help="how many results a text; of text-generation: tokens")
    parser.add_argument(
        "--aggregation-strategy", choices=("none", "simple"), help="of token-classification; simple joins neighbours"
    )
    parser.add_argument(
        "--doc-stride", type=int, metavar="N", help="of question-answering: tokens that windows share; default: 128"
    )
    parser.add_argument("--max-answer-len", type=int, metavar="N", help="of question-answering, in tokens; default: 15")
    parser.add_argument(
        "--no-special-tokens",
        dest="add_special_tokens",
        action="store_false",
        default=None,
        help="of text-generation: the model reads the bare text, without [CLS] and [SEP]",
    )
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="of text-generation; default: 20")
    parser.add_argument(
        "--sample", dest="do_sample", action="store_true", default=None, help="of text-generation; default: greedy"
    )
    parser.add_argument("--temperature", type=float, metavar="T", help="of sampling; default: 1")
    parser.add_argument("--top-p", type=float, metavar="P", help="of sampling; default: 1")
    parser.add_argument("--seed", type=int, metavar="N", help="of sampling, for each text anew")


_OPTIONS = (
    "device",
    "dtype",
    "batch_size",
    "truncate",
    "top_k",
    "aggregation_strategy",
    "doc_stride",
    "max_answer_len",
    "add_special_tokens",
    "max_new_tokens",
    "do_sample",
    "temperature",
    "top_p",
    "seed",
)


def _run(args: argparse.Namespace, command: str) -> int:
    from fastconv.commands import lines
    from fastconv.tasks import TASKS, ItemError, pipeline

    skipped = 0

    def skip() -> None:
        nonlocal skipped
        skipped += 1

    with telling_bad_input():
        if args.texts and args.file is not None:
            raise ValueError("give texts or --file, not both")
        parse = lines.parser(TASKS[args.task], args.input_format)
        from_stdin = args.file == "-" or (args.file is None and args.texts in ([], ["-"]))
        if sys.stdout is None or (from_stdin and sys.stdin is None):
            raise ValueError("stdin and stdout must be open, unless texts or --file are given instead of stdin")
        file = sys.stdin.buffer if from_stdin else None if args.file is None else open(args.file, "rb")  # noqa: SIM115
        pipe = pipeline(args.task, args.model, **{name: getattr(args, name) for name in _OPTIONS})
    if file is None:
        windows = lines.from_arguments(args.texts, parse, pipe.window)
    else:
        name = "stdin" if from_stdin else args.file
        windows = lines.from_file(file, name, parse, pipe.window, skip if args.skip_empty else None)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    counter = _Counter(file)
    both_on_terminal = sys.stdout.isatty()
    try:
        with telling_memory("--batch-size"):
            for result in _results(pipe, windows):
                line = _as_json(result) if args.json else _as_lines(result, pipe)
                if both_on_terminal:
                    counter.clear()
                print(line, flush=True)
                counter.count()
    except ItemError as error:
        raise InputError(str(error)) from error
    finally:
        counter.clear()
        if file is not None and not from_stdin:
            file.close()
    if skipped:
        print(f"fastconv run: {skipped} empty line{'s' * (skipped > 1)} left out", file=sys.stderr)
    return 0


def _results(pipe: Pipeline, windows: Iterator[list[tuple[str, Any]]]) -> Iterator[Any]:
    for window in windows:
        yield from pipe.run(window)


def _as_json(result: Any) -> str:
    try:
        return json.dumps(result, ensure_ascii=False, allow_nan=False)
    except ValueError:
        raise InputError("a result is not finite, which JSON can't say; try --dtype fp32 or bf16") from None


def _as_lines(result: Any, pipe: Pipeline) -> str:
    """A result as TAB-separated values; an empty line after it where results may have several lines."""
    lines = ["\t".join(map(_as_value, values)) for values in _leaves(result)]
    return "\n".join((*lines, "") if pipe.task.several_lines else lines)


def _leaves(result: Any) -> Iterator[list[Any]]:
    """The values of each dict, or each row of numbers, in nested lists."""
    if isinstance(result, dict):
        yield list(result.values())
    elif result and isinstance(result[0], float):
        yield result
    else:
        for each in result:
            yield from _leaves(each)


def _as_value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).translate(_BREAKS)


class _Counter(StatusLine):
    """How many texts are done and how much of the file is read, at most ten times a second."""

    def __init__(self, file: BinaryIO | None) -> None:
        super().__init__()
        self._file = file
        self._size = _size(file) if self.on_terminal else 0
        self._done = 0
        self._start = self._told = time.monotonic()

    def count(self) -> None:
        """One more text is done."""
        self._done += 1
        now = time.monotonic()
        if self.on_terminal and now - self._told > 0.1:
            read = ""
            if self._size and self._file is not None:
                share = min(self._file.tell() / self._size, 1.0)
                read = f"{bar(share)} {share:.0%} read, "
            self.show(f"{read}{self._done:,} texts, {self._done / (now - self._start):,.0f} a second")
            self._told = now


def _size(file: BinaryIO | None) -> int:
    """How many bytes a file has; 0 where that is not known, as of a pipe."""
    if file is None:
        return 0
    try:
        status = os.fstat(file.fileno())
    except OSError:
        return 0
    return status.st_size if stat.S_ISREG(status.st_mode) else 0
