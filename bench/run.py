"""Times the ops against their rivals in one process, interleaved.

    python bench/run.py [--device cpu|cuda] [--filter NAME] [--quick] [--compile] [--json FILE]

A case is checked before it is timed: where the op doesn't keep the 2x rule against the reference in fp64, its figures
are refused and the command fails. On a CPU the op runs its native formulation. Ratios are medians over the rounds of
(rival's time / fastconv's time) and hold on any machine; times mean something on an idle one only. "copy" is a plain
copy that moves as many bytes as the op has to, in the same run; "of roof" is bytes/s over those of a large copy.
A whole piece of a model has two more ratios: its first rival's time over that of fastconv under torch.compile (where
that runs: --compile), and the rival's peak memory beyond the tensors given over fastconv's.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch._functorch.config

from fastconv import backend
from fastconv.bench.case import BenchCase
from fastconv.bench.cases import cases
from fastconv.bench.provenance import provenance
from fastconv.bench.roofs import Roofs, measure
from fastconv.bench.timing import Run, interleaved, median_ratio
from fastconv.parity.measure import peak_bytes

RIVALS = ("copy", "torch", "HF", "bmm", "torch.compile")


def run_case(case: BenchCase, device: torch.device, roofs: Roofs, *, rounds: int, compiled: bool) -> dict[str, object]:
    """The case's record: parity, and if that is green its times, ratios and rates."""
    with backend("auto" if device.type == "cuda" else "native"):
        record: dict[str, object] = {"case": case.name, "bytes": case.bytes(), "flops": case.flops()}
        red = {name: str(result) for name, result in case.parity(device).items() if not result.ok}
        if red:
            return record | {"red": red}
        # A compiled backward that reuses its inputs' memory could run only once.
        with torch._functorch.config.patch(donated_buffer=False):
            runs = {**case.runs(device, compiled=compiled), "copy": _copy(case.bytes(), device)}
            runs, broken = _working(runs)
            times = interleaved(runs, device, rounds=rounds)
            own = times["fastconv"]
            ratios = {label: median_ratio(t, own) for label, t in times.items() if not label.startswith("fastconv")}
            if case.whole:
                ratios |= _of_a_whole(next(iter(case.rivals(device))), runs, times, device)
    rate = case.bytes() / statistics.median(own)
    return record | {
        "ms": {label: 1e3 * statistics.median(t) for label, t in times.items()},
        "ratios": ratios,
        "bytes_per_s": rate,
        "of_roof": rate / roofs.copy,
        "flops_per_s": case.flops() / statistics.median(own),
        "targets": case.targets,
        "rounds": rounds,
        **({"broken": broken} if broken else {}),
    }


def _of_a_whole(
    rival: str, runs: dict[str, Run], times: dict[str, list[float]], device: torch.device
) -> dict[str, float]:
    """The ratios that only a whole piece of a model has: of its compiled self, and of peak memory."""
    found = {}
    if rival in times and "fastconv compiled" in times:
        found[f"{rival} / compiled"] = median_ratio(times[rival], times["fastconv compiled"])
    if rival in runs:
        peaks = [peak_bytes(runs[label], device) for label in (rival, "fastconv")]
        found[f"{rival} memory"] = peaks[0] / peaks[1]
    return found


def _working(runs: dict[str, Run]) -> tuple[dict[str, Run], dict[str, str]]:
    """The runs without the rivals that raise (torch.compile without a compiler, say), and why those raise."""
    broken = {}
    for label, run in runs.items():
        try:
            run()
        except Exception as error:  # a rival's failure is a result, fastconv's is a bug
            if label == "fastconv":
                raise
            broken[label] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return {label: run for label, run in runs.items() if label not in broken}, broken


def _copy(size: int, device: torch.device) -> Run:
    source = torch.randint(256, (size // 2,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def line(record: dict) -> str:
    """One row of the table."""
    if "red" in record:
        what = "; ".join(f"{name}: {why}" for name, why in record["red"].items())
        return f"{record['case']:<58}  RED, no figures: {what}"
    ratios = "".join(f"{_ratio(record, rival):>18}" for rival in RIVALS)
    other = "".join(f"  {name} {ratio:.2f}x" for name, ratio in record["ratios"].items() if name not in RIVALS)
    broken = "".join(f"  ({rival} failed: {why})" for rival, why in record.get("broken", {}).items())
    return (
        f"{record['case']:<58}{record['ms']['fastconv']:>10.4f}{record['bytes_per_s'] / 1e9:>9.1f}"
        f"{100 * record['of_roof']:>8.0f}%{ratios}{other}{broken}"
    )


def _ratio(record: dict, rival: str) -> str:
    return f"{record['ratios'][rival]:.2f}x" if rival in record["ratios"] else "-"


def header() -> str:
    """The table's first row."""
    return f"{'case':<58}{'ms':>10}{'GB/s':>9}{'of roof':>9}" + "".join(f"{'vs ' + r:>18}" for r in RIVALS)


def run(
    chosen: list[BenchCase], device: torch.device, roofs: Roofs, *, rounds: int, compiled: bool
) -> Iterator[dict[str, object]]:
    """Run the cases one by one, printing the table as it grows; yields each one's record, with its date."""
    matmul = ", ".join(f"{rate / 1e12:.2f} TFLOP/s {dtype}" for dtype, rate in roofs.matmul.items())
    print(f"roofs: copy {roofs.copy / 1e9:.1f} GB/s, matmul {matmul}\n{header()}", flush=True)
    for case in chosen:
        record = run_case(case, device, roofs, rounds=rounds, compiled=compiled)
        print(line(record), flush=True)
        yield record | {"date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, choices=("cpu", "cuda"), help="default here: %(default)s")
    parser.add_argument("--filter", default="", metavar="NAME", help="only cases whose name contains it")
    parser.add_argument("--quick", action="store_true", help="a small shape and few rounds: does everything run?")
    parser.add_argument("--compile", action="store_true", help="time torch.compile on a CPU too")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write device, versions, roofs and every record")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no CUDA GPU found")
    device = torch.device(args.device)
    chosen = [case for case in cases(device, quick=args.quick) if args.filter in case.name]
    if not chosen:
        parser.error(f"--filter {args.filter!r}: no case of this name; the names are\n" + _names(device, args.quick))
    # On a CPU torch.compile's minute a case would be most of the run.
    compiled = args.compile or (args.device == "cuda" and not args.quick)
    roofs = measure(device, quick=args.quick)
    records = list(run(chosen, device, roofs, rounds=rounds(device, args.quick), compiled=compiled))
    if args.json:
        record = {**provenance(device), "roofs": vars(roofs), "records": records}
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    red = sum("red" in record for record in records)
    print(f"{len(records)} cases, {red} red" if red else f"{len(records)} cases, all right")
    return 1 if red else 0


def rounds(device: torch.device, quick: bool) -> int:
    """Enough for a steady median: a GPU's rounds are short."""
    return 3 if quick else 50 if device.type == "cuda" else 15


def _names(device: torch.device, quick: bool) -> str:
    return "\n".join(case.name for case in cases(device, quick=quick))


if __name__ == "__main__":
    # In the interpreter a kernel's time means nothing; the native formulation is what a CPU runs.
    os.environ.pop("TRITON_INTERPRET", None)
    sys.exit(main())
