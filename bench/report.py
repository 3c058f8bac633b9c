"""Prints measured results against what there is to beat.

    python bench/report.py [FILE ...]        (default: bench/results/*.json)

A ratio is the rival's time over fastconv's in the same run: at least the target, or it is marked.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from fastconv.bench.provenance import code_state

RESULTS = Path(__file__).parent / "results"


def report(results: dict, code: str) -> str:
    """The table of one device's results; `code` is the present state of the sources."""
    records = results["records"].values()
    lines = [
        f"{results['device']}: tests {results['tests']}",
        f"{'case':<58}{'ms':>10}{'GB/s':>9}{'of roof':>9}  targets",
    ]
    reached = wanted = 0
    for record in records:
        stale = "" if record["code"] == code else "  (of other sources)"
        if "red" in record:
            lines.append(f"{record['case']:<58}  RED, no figures{stale}")
            continue
        goals = []
        for rival, goal in record["targets"].items():
            ratio = record["ratios"].get(rival)
            met = ratio is not None and ratio >= goal
            wanted, reached = wanted + 1, reached + met
            value = "not measured" if ratio is None else f"{ratio:.2f}x"
            goals.append(f"{rival} {value}, want {goal:.2f}x{'' if met else ' MISSED'}")
        lines.append(
            f"{record['case']:<58}{record['ms']['fastconv']:>10.4f}{record['bytes_per_s'] / 1e9:>9.1f}"
            f"{100 * record['of_roof']:>8.0f}%  {'; '.join(goals)}{stale}"
        )
    return "\n".join([*lines, f"{reached} of {wanted} targets reached"])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE")
    files = parser.parse_args(argv).files or sorted(RESULTS.glob("*.json"))
    if not files:
        print(f"no results in {RESULTS}: `make gpu` on a machine with a CUDA GPU writes them", file=sys.stderr)
        return 1
    print("\n\n".join(report(json.loads(file.read_text()), code_state()) for file in files))
    return 0


if __name__ == "__main__":
    sys.exit(main())
