"""`fastconv bench`: every op and whole models against their rivals, on this machine."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastconv.commands import InputError, check_writable, telling_bad_input

if TYPE_CHECKING:
    import torch

    from fastconv.bench.case import Case
    from fastconv.bench.session import Session

_DTYPES = ("fp32", "bf16", "fp16")
_DESCRIPTION = (
    "Measure every op and whole models against their rivals in one interleaved run, with the roofs of this machine: "
    "the kernels on a GPU, the native path on a CPU. A case is checked first: where a result doesn't keep the 2x rule "
    "against the reference in fp64, there are no figures, and the exit code is 1. With --json or --out every case is "
    "saved as soon as it is measured, and the same command goes on where it was stopped."
)
_EPILOG = """\
Ratios are a rival's time over fastconv's in the same rounds: 2.00x is twice as fast as that rival. The spread is how
far the quartiles of the rounds are from the median. "of roof" is the time that the nearer roof allows, a copy of the
op's bytes or a matrix product of its operations at the rates measured in the run, over the time it took."""


def add_parser(commands: Any) -> None:
    """Add this command to the subparsers of `fastconv`."""
    parser = commands.add_parser(
        "bench", help="measure every op and whole models", description=_DESCRIPTION, epilog=_EPILOG
    )
    parser.set_defaults(run=_run)
    parser.add_argument("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, ...; default: cuda if there is a GPU")
    parser.add_argument(
        "--dtype", action="append", choices=_DTYPES, help="only cases of this dtype; may be given several times"
    )
    parser.add_argument(
        "--filter",
        action="append",
        metavar="NAME",
        help="only cases whose name contains it; may be given several times, for those of either name",
    )
    parser.add_argument("--list", action="store_true", help="print the names of the cases, and measure nothing")
    parser.add_argument("--quick", action="store_true", help="small shapes and few rounds: does everything run?")
    parser.add_argument(
        "--minutes", type=float, metavar="N", help="take no longer: the most informative cases first, the rest left out"
    )
    parser.add_argument(
        "--rounds", type=int, metavar="N", help="times that each case is timed; default: for a second, >= 5"
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile of the rivals on a CPU too")
    parser.add_argument("--again", action="store_true", help="measure again what the file has already")
    parser.add_argument(
        "--out",
        metavar="FOLDER",
        help="write results.json, results.csv, report.html and PNGs of its plots there (needs matplotlib)",
    )
    parser.add_argument("--json", metavar="FILE", help="write, or go on with, the results as JSON")
    parser.add_argument("--csv", metavar="FILE", help="write them as a table")
    parser.add_argument("--html", metavar="FILE", help="write a report; with plots if matplotlib is installed")
    parser.add_argument(
        "--report",
        metavar="FILE",
        help="measure nothing: print, and write with --csv, --html or --out, a file's results",
    )
    parser.add_argument(
        "--compare",
        nargs=2,
        metavar=("A.json", "B.json"),
        help="measure nothing: say what B is slower at than A, beyond the spread of both; exit code 1 if anything",
    )
    parser.add_argument(
        "--threshold", type=float, metavar="PERCENT", help="with --compare: less than this is no regression; default: 5"
    )


def _run(args: argparse.Namespace, command: str) -> int:
    _check(args)
    if args.compare is not None:
        return _compare(args)
    if args.report is not None:
        return _report(args)
    with telling_bad_input():
        device, cases = _cases(args)
    if args.list:
        print("\n".join(case.name for case in cases))
        return 0
    with telling_bad_input():
        session = _session(args, device, cases, command)
    return _measure(args, device, session)


def _check(args: argparse.Namespace) -> None:
    """Bad combinations of options, and outputs that couldn't be written, before anything is measured."""
    if args.threshold is not None and args.compare is None:
        raise InputError("--threshold goes with --compare")
    for option in ("minutes", "rounds"):
        value = getattr(args, option)
        if value is not None and not value > 0:
            raise InputError(f"--{option} must be more than 0, got {value}")
    _check_alone(args)
    if args.out is not None:
        with telling_bad_input():
            from fastconv.bench import plots

            plots.check_installed()
        try:
            os.makedirs(args.out, exist_ok=True)
        except OSError as error:
            raise InputError(f"--out: can't make the folder {args.out!r}: {error.strerror}") from error
    for option, path in _files(args).items():
        check_writable(option, path)


def _check_alone(args: argparse.Namespace) -> None:
    """Options that would do nothing beside --report or --compare."""
    measuring = ("device", "dtype", "filter", "list", "quick", "minutes", "rounds", "compile", "again")
    for option, others in (("compare", (*measuring, "out", "json", "csv", "html", "report")), ("report", measuring)):
        given = [other for other in others if getattr(args, other) not in (None, False)]
        if getattr(args, option) is not None and given:
            raise InputError(f"--{option} measures nothing and doesn't go with --{given[0]}")


def _files(args: argparse.Namespace) -> dict[str, Path]:
    """Option -> the file to write; --out stands for one of each kind."""
    files = {option: Path(path) for option in ("json", "csv", "html") if (path := getattr(args, option)) is not None}
    if args.out is not None:
        folder = Path(args.out)
        beside = {"json": "results.json", "csv": "results.csv", "html": "report.html"}
        files = {option: folder / name for option, name in beside.items()} | files
    return files


def _cases(args: argparse.Namespace) -> tuple[torch.device, list[Case]]:
    from fastconv.bench.cases import cases
    from fastconv.parity.environment import DTYPES, usable_device

    device = usable_device(args.device)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu or cuda, got {args.device!r}")
    if device.type == "cuda" and os.environ.get("TRITON_INTERPRET", "0") != "0":
        raise ValueError("TRITON_INTERPRET is set: a kernel's time in the interpreter says nothing; unset it")
    every = cases(device, quick=args.quick)
    dtypes = [DTYPES[name] for name in args.dtype or _DTYPES]
    chosen = [
        case
        for case in every
        if case.dtype in dtypes and (not args.filter or any(name in case.name for name in args.filter))
    ]
    if not chosen:
        asked = " ".join(f"--{key} {value}" for key in ("filter", "dtype") for value in getattr(args, key) or ())
        raise ValueError(
            f"{asked}: there is no such case among the {len(every)} for {device.type}; "
            "`fastconv bench --list` prints their names"
        )
    return device, chosen


def _session(args: argparse.Namespace, device: torch.device, cases: list[Case], command: str) -> Session:
    from fastconv.bench import results
    from fastconv.bench.provenance import provenance
    from fastconv.bench.session import Session

    origin = provenance(device, command)
    path = _files(args).get("json")
    found = results.resume(path, origin) if path is not None else results.new(origin)
    return Session(found, cases, again=args.again)


def _measure(args: argparse.Namespace, device: torch.device, session: Session) -> int:
    from fastconv.bench import results, table
    from fastconv.bench.progress import Progress

    path = _files(args).get("json")
    known = len(session.chosen) - len(session.todo)
    if known:
        print(f"{known} of {len(session.chosen)} cases are in {str(path)!r}, of this code (--again measures once more)")
    if path is not None and not session.todo:
        # With the date, the command and the roofs of what was measured.
        found = results.load(path)
        table.show(found, session.names)
        _write(args, found)
        return 0

    def save() -> None:
        if path is not None:
            results.save(path, session.results)

    # On a CPU torch.compile's minute a case would be most of the run.
    compiled = args.compile or (device.type == "cuda" and not args.quick)
    rounds = 3 if args.quick and args.rounds is None else args.rounds
    try:
        with Progress() as progress:
            session.measure(
                device, progress, save, rounds=rounds, compiled=compiled, quick=args.quick, minutes=args.minutes
            )
    except KeyboardInterrupt:
        table.show(session.results, session.names)
        if path is not None:
            print(f"interrupted: what was measured is in {str(path)!r}; the same command goes on")
        raise
    save()
    table.show(session.results, session.names)
    if session.left_out:
        _tell_left_out(session.left_out, args, path)
    _write(args, session.results)
    return 1 if session.red else 0


def _tell_left_out(names: list[str], args: argparse.Namespace, path: Path | None) -> None:
    on = "" if path is None else "; the same command goes on with them"
    print(f"{len(names)} cases didn't fit into {args.minutes:g} minutes and were left out{on}:")
    shown = names if len(names) <= 10 else [*names[:9], f"and {len(names) - 9} more"]
    print("\n".join(f"  {name}" for name in shown))


def _write(args: argparse.Namespace, found: dict[str, Any]) -> None:
    """What is asked for besides the JSON."""
    from fastconv.bench import results

    files = _files(args)
    if "csv" in files:
        results.write_csv(found, files["csv"])
    if "html" in files:
        from fastconv.bench import html_report

        html_report.write(found, files["html"])
    if args.out is not None:
        from fastconv.bench import plots

        plots.png(found, args.out)
    if files:
        print(f"written: {', '.join(map(str, files.values()))}")


def _report(args: argparse.Namespace) -> int:
    with telling_bad_input():
        from fastconv.bench import results, table

        found = results.load(args.report)
    table.show(found)
    if "json" in _files(args):
        results.save(_files(args)["json"], found)
    _write(args, found)
    return 1 if any("red" in record for record in found["records"].values()) else 0


def _compare(args: argparse.Namespace) -> int:
    with telling_bad_input():
        from fastconv.bench import compare, results

        threshold = compare.THRESHOLD if args.threshold is None else args.threshold / 100
        found = compare.compare(*map(results.load, args.compare), threshold=threshold)
    compare.show(found)
    return 1 if found.regressions else 0
