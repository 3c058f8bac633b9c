"""`fastconv tune`: search launch configs for this machine's GPU."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastconv.commands import InputError, telling_bad_input, telling_memory

if TYPE_CHECKING:
    import torch

    from fastconv.kernels._configs import Asked
    from fastconv.tuning import Search, Searched

_DESCRIPTION = (
    "Search launch configs of the kernels for this machine's GPU and your shapes, and write those that are faster into "
    "a table, which every later process reads. Each candidate is first checked against the reference in fp64; one wins "
    "that is more than 2 % faster, beyond the spread, and that calls with other masks can launch too. The table is "
    "saved after every shape: stop when you like, the same command goes on. Measured with one minor version of triton, "
    "an entry doesn't count with another."
)


def add_parser(commands: Any) -> None:
    """Add this command to the subparsers of `fastconv`."""
    parser = commands.add_parser("tune", help="search launch configs for this GPU", description=_DESCRIPTION)
    parser.set_defaults(run=_run)
    parser.add_argument(
        "models",
        nargs="*",
        metavar="MODEL",
        help="checkpoint folders, or convbert-base, convbert-medium-small, convbert-small or bert-base; default: "
        "convbert-base",
    )
    parser.add_argument(
        "--op", action="append", metavar="NAME", help="only kernels whose names begin so; may be given several times"
    )
    parser.add_argument("--batch", type=int, nargs="+", metavar="N", help="sequences at a time; default: 1 8")
    parser.add_argument("--length", type=int, nargs="+", metavar="N", help="tokens of a sequence; default: 128 512")
    parser.add_argument("--dtype", default="bf16", choices=("fp32", "bf16", "fp16"), help="default: %(default)s")
    parser.add_argument(
        "--direction",
        default="infer",
        choices=("infer", "train", "both"),
        help="what the model runs: inference, or forward and backward with dropout; default: %(default)s",
    )
    parser.add_argument(
        "--padding",
        default="keep",
        choices=("keep", "remove"),
        help='as accelerate\'s; with "remove" batch times length is the number of tokens; default: %(default)s',
    )
    parser.add_argument("--minutes", type=float, metavar="N", help="take no longer; default: until all is searched")
    parser.add_argument(
        "--out", metavar="FILE", help="the table; default: the one that is read, ~/.config/fastconv/configs.json"
    )
    parser.add_argument("--again", action="store_true", help="search again what the table has an entry for")
    parser.add_argument("--list", action="store_true", help="print what would be searched, and search nothing")


def _run(args: argparse.Namespace, command: str) -> int:
    _check(args)
    with telling_bad_input():
        device, path = _device(), _path(args.out)
        from fastconv import tuning
        from fastconv.progress import ProgressBar
    try:
        with telling_bad_input(), telling_memory("--batch or --length"):
            search = tuning.Search(_asked(args, device), path, device, command=command, again=args.again)
        if not args.list:
            tuning.check_writable(path)
    except tuning.TuningError as error:
        raise InputError(str(error)) from error
    if args.list:
        _print_list(search)
        return 0
    found: list[Searched] = []
    try:
        with ProgressBar() as progress, telling_memory("--batch or --length"):
            seconds = None if args.minutes is None else 60 * args.minutes
            for each in search.run(seconds=seconds, progress=progress):
                found.append(each)
    except tuning.TuningError as error:
        raise InputError(str(error)) from error
    finally:
        print("\n".join(report(found, len(search.todo) - len(found), len(search.done), path)))
    return 1 if any(each.red is not None for each in found) else 0


def _check(args: argparse.Namespace) -> None:
    for option in ("batch", "length"):
        for number in getattr(args, option) or []:
            if number < 1:
                raise InputError(f"--{option} must be at least 1, got {number}")
    if args.minutes is not None and not args.minutes > 0:
        raise InputError(f"--minutes must be more than 0, got {args.minutes}")


def _device() -> torch.device:
    import torch

    from fastconv import dispatch

    if not torch.cuda.is_available():
        raise InputError(
            f"tuning needs the GPU that it is for: torch {torch.__version__} finds no CUDA GPU on this machine"
        )
    device = torch.device("cuda", torch.cuda.current_device())
    reason = dispatch.unsupported(device)
    if reason is not None:
        raise InputError(f"the kernels can't run: {reason}")
    return device


def _path(out: str | None) -> Path:
    from fastconv.kernels._configs import user_table

    path = user_table() if out is None else Path(out)
    if path is None:
        raise InputError("there is no home folder for the table; give --out FILE")
    return path


def _asked(args: argparse.Namespace, device: torch.device) -> list[Asked]:
    """What the models ask for, each once."""
    from fastconv import tuning
    from fastconv.kernels import _configs
    from fastconv.parity.environment import usable_dtype

    known = _configs.all_kernels()
    for name in args.op or []:
        if not any(kernel.startswith(name) for kernel in known):
            raise InputError(
                f"--op: no kernel's name begins with {name!r}; expected some of {', '.join(sorted(known))}"
            )
    dtype = usable_dtype(args.dtype, device)
    found: dict[Any, Asked] = {}
    for name in args.models or ["convbert-base"]:
        for batch in args.batch or (1, 8):
            for length in args.length or (128, 512):
                model = tuning.model_of(name, length).to(device, dtype)
                given = {"batch": batch, "length": length, "direction": args.direction, "padding": args.padding}
                for identity, asked in tuning.asked_for(model, **given).items():
                    if asked.kernel.startswith(tuple(args.op or [""])):
                        found.setdefault(identity, asked)
    return list(found.values())


def _print_list(search: Search) -> None:
    from fastconv.parity.table import aligned

    rows = [("kernel", "shape", "dtype", "candidates")]
    rows += [(*_words(asked), str(len(search.candidates(asked)))) for asked in search.todo]
    rows += [(*_words(asked), "done") for asked in search.done]
    print("\n".join(aligned(rows)))


def report(found: Sequence[Searched], left: int, done: int, path: Path) -> list[str]:
    """What a search found, in lines.

    left, done: how many shapes were not searched in time, and before
    """
    from fastconv.parity.table import aligned

    lines: list[str] = []
    rows = [("kernel", "shape", "dtype", "before", "after", "gain", "wins")]
    for each in found:
        if each.seconds is None:
            lines.append(f"RED {' '.join(_words(each.asked))}: the config that is in use is wrong here: {each.red}")
            continue
        before, after = each.seconds
        changed = [] if each.after is None else _changes(each.before, each.after)
        gain = f"{before / after:.2f}x" if changed else "-"
        cells = (f"{before * 1e6:.1f} us", f"{after * 1e6:.1f} us", gain, ", ".join(changed) or "as before")
        rows.append((*_words(each.asked), *cells))
    lines = [*(aligned(rows) if len(rows) > 1 else []), *lines]
    rejected: Counter[tuple[str, str]] = Counter()
    for each in found:
        for why, number in each.rejected.items():
            rejected[each.asked.kernel, why] += number
    lines += [f"{kernel}: left out {number} candidates: {why}" for (kernel, why), number in rejected.items()]
    won = sum(each.after is not None for each in found)
    lines.append(f"{len(found)} shapes searched, {won} faster; {done} had an entry, {left} are left; table: {path}")
    return lines


def _words(asked: Asked) -> tuple[str, str, str]:
    return asked.kernel, "x".join(map(str, asked.shape)), str(asked.dtype).removeprefix("torch.")


def _changes(before: Any, after: Any) -> list[str]:
    return [f"{name} {value}" for name, value in vars(after).items() if value != getattr(before, name)]
