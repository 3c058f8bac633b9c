"""Two results of one device: what the second is slower at, beyond the spread of both.

What counts differs by device. On a CPU, which others use as well, the times of two runs say nothing, but a ratio to a
rival in the same rounds does: fastconv is slower where more than half of the rivals that both runs have say so, the
copy among them, and none says the opposite. On a GPU its time has to say so too. To say so is to have changed by more
than the threshold, with quartiles that don't overlap. Between versions of torch, triton or transformers the rivals are
others, and only the copy counts. On a GPU replays of CUDA graphs and what a call costs the CPU are judged in the same
way, and a call that can't be captured any more is wrong. Peak memory has no spread: more than the threshold is more.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastconv.bench.compare_case import VERDICTS, Finding, Pair
from fastconv.bench.records import origin
from fastconv.bench.results import Record, Results
from fastconv.parity.table import aligned

THRESHOLD = 0.05
_VERSIONS = ("torch", "triton", "transformers")  # what rivals are made of
_BAD = ("slower", "more memory", "wrong")


@dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    warnings: what makes the verdicts weaker
    new, gone: cases of the second results alone, of the first alone
    red: cases that are wrong in the second
    """

    a: str
    b: str
    threshold: float
    findings: list[Finding]
    warnings: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)
    red: list[str] = field(default_factory=list)

    @property
    def regressions(self) -> list[Finding]:
        """What is slower, takes more memory, or was right before."""
        return [finding for finding in self.findings if finding.verdict in _BAD]


def compare(a: Results, b: Results, *, threshold: float = THRESHOLD) -> Comparison:
    """What `b` is slower at than `a`.

    threshold: a smaller change of a time or of a peak is none; 0.05 is 5 %

    Raises: ValueError for a negative threshold, and where nothing can be judged: results of different devices, or
        without a case in common.
    """
    if not 0 <= threshold < float("inf"):
        raise ValueError(f"the threshold must be 0 or more, got {threshold}")
    if (a["device"], a.get("capability")) != (b["device"], b.get("capability")):
        raise ValueError(
            f"results of different devices can't be compared: {a['device']!r} and {b['device']!r}. Neither times nor "
            "ratios carry over: measure both on one machine"
        )
    records_a, records_b = a["records"], b["records"]
    common = [case for case in records_a if case in records_b]
    if not common:
        raise ValueError(
            f"the results have no case in common: {_kinds(records_a)} in the first, {_kinds(records_b)} in the second"
        )
    findings: list[Finding] = []
    for case in common:
        pair = records_a[case], records_b[case]
        judged = Pair(*pair, bool(_differing(*pair, a, b)), a.get("capability") is not None, threshold)
        findings += judged.findings()
    return Comparison(
        origin(a),
        origin(b),
        threshold,
        sorted(findings, key=lambda f: (VERDICTS.index(f.verdict), -abs(f.change or 0))),
        _warnings([(records_a[case], records_b[case]) for case in common], a, b),
        [case for case in records_b if case not in records_a],
        [case for case in records_a if case not in records_b],
        [case for case, record in records_b.items() if "red" in record],
    )


def _kinds(records: Mapping[str, Record]) -> str:
    ops = dict.fromkeys(f"{record.get('op')} {record.get('dtype')}" for record in records.values())
    return f"{len(records)} ({', '.join(ops)})" if ops else "none"


def _version(record: Record, results: Results, name: str) -> Any:
    # A file that was gone on with holds records of several versions.
    return record.get(name, results.get(name))


def _differing(record_a: Record, record_b: Record, a: Results, b: Results) -> list[tuple[str, Any, Any]]:
    pairs = ((name, _version(record_a, a, name), _version(record_b, b, name)) for name in _VERSIONS)
    return [(name, one, other) for name, one, other in pairs if one != other]


def _warnings(pairs: list[tuple[Record, Record]], a: Results, b: Results) -> list[str]:
    counts: dict[tuple[str, Any, Any], int] = {}
    for record_a, record_b in pairs:
        for difference in _differing(record_a, record_b, a, b):
            counts[difference] = counts.get(difference, 0) + 1
    found = [
        f"{name} {one} in the first, {other} in the second ({count} of {len(pairs)} cases): rivals other than a copy "
        "or a product don't count there, and a change may be another's than fastconv's"
        for (name, one, other), count in counts.items()
    ]
    if a.get("code") == b.get("code") and not counts:
        found.append("both are of the same sources and versions: what differs is noise")
    return found


def show(found: Comparison) -> None:
    """Print what changed, by rich on a terminal if it is installed, and the rest in numbers."""
    print(f"first:  {found.a}\nsecond: {found.b}")
    for warning in found.warnings:
        print(f"WARNING: {warning}")
    told = [finding for finding in found.findings if finding.verdict != "same"]
    header = ("verdict", "change", "case", "path", "by")
    rows = [
        (f.verdict, "" if f.change is None else f"{100 * f.change:+.0f} %", f.case, f.label, f.by)
        for f in told
    ]  # fmt: skip
    if rows:
        print()
        if not (sys.stdout.isatty() and _by_rich(header, rows)):
            widths = aligned([[row[0], row[1]] for row in (header, *rows)])
            print("\n".join(f"{left}  {'  '.join(row[2:])}" for left, row in zip(widths, (header, *rows), strict=True)))
    print()
    for what, cases in (("new", found.new), ("gone", found.gone), ("red in the second", found.red)):
        if cases:
            print(f"{what}: {len(cases)} cases\n" + "\n".join(f"  {case}" for case in cases))
    counts = {verdict: sum(f.verdict == verdict for f in found.findings) for verdict in VERDICTS}
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count), end="")
    print(f" (threshold {100 * found.threshold:g} %)")


def _by_rich(header: Sequence[str], rows: Sequence[Sequence[str]]) -> bool:
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        return False
    table = Table(header_style="bold", pad_edge=False)
    for name in header:
        table.add_column(name, justify="right" if name == "change" else "left", overflow="fold")
    for row in rows:
        # As Text: a case's name is no markup.
        table.add_row(
            *map(Text, row), style="bold red" if row[0] in _BAD else "dim" if row[0] == "not judged" else "green"
        )
    Console(highlight=False).print(table)
    return True
