"""Two results of one device: what the second is slower at, beyond the spread of both.

What counts differs by device. On a CPU, which others use as well, the times of two runs say nothing, but a ratio to a
rival in the same rounds does: fastconv is slower where more than half of the rivals that both runs have say so, the
copy among them, and none says the opposite. On a GPU its time has to say so too. To say so is to have changed by more
than the threshold, with quartiles that don't overlap. Between versions of torch, triton or transformers the rivals are
others, and only the copy counts. Peak memory has no spread: more than the threshold is more.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastconv.bench.records import ROOFS, is_own, origin, peaks
from fastconv.bench.results import Record, Results
from fastconv.parity.table import aligned

THRESHOLD = 0.05
_VERSIONS = ("torch", "triton", "transformers")  # what rivals are made of
_SHAPE = ("kind", "op", "direction", "model", "batch", "length", "tokens", "lengths", "dtype")
_PAGE = 4096  # bytes: less is no growth of a peak, but a scalar or two
_ORDER = ("slower", "more memory", "wrong", "not judged", "faster", "less memory", "right again", "same")
_BAD = ("slower", "more memory", "wrong")

Spread = Mapping[str, float]


@dataclass(frozen=True)
class Finding:
    """What became of one case under one of fastconv's labels.

    verdict: one of _ORDER
    change: of its time or peak, 0.1 for 10 % more; None where nothing was judged
    by: what was judged by, or why nothing was
    """

    case: str
    label: str
    verdict: str
    change: float | None
    by: str


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
    findings = [found for case in common for found in _case(records_a[case], records_b[case], a, b, threshold)]
    return Comparison(
        origin(a),
        origin(b),
        threshold,
        sorted(findings, key=lambda f: (_ORDER.index(f.verdict), -abs(f.change or 0))),
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


def _case(record_a: Record, record_b: Record, a: Results, b: Results, threshold: float) -> Iterator[Finding]:
    case = record_b["case"]
    if "red" in record_b:
        why = "; ".join(f"{output}: {reason}" for output, reason in record_b["red"].items())
        verdict = "not judged" if "red" in record_a else "wrong"
        yield Finding(case, "fastconv", verdict, None, f"{'wrong in both, ' if 'red' in record_a else ''}{why}")
        return
    if "red" in record_a:
        yield Finding(case, "fastconv", "right again", None, "wrong in the first")
        return
    changed = [key for key in _SHAPE if record_a.get(key) != record_b.get(key)]
    if changed:
        what = ", ".join(f"{key} {record_a.get(key)} and {record_b.get(key)}" for key in changed)
        yield Finding(case, "fastconv", "not judged", None, f"the case is another: {what}")
        return
    for label in record_a["seconds"]:
        if not is_own(label):
            continue
        if label not in record_b["seconds"]:
            why = record_b.get("broken", {}).get(label)
            verdict = "not judged" if why is None else "wrong"
            yield Finding(case, label, verdict, None, "not in the second" if why is None else f"failed: {why}")
        else:
            yield _time(label, record_a, record_b, a, b, threshold)
            yield from _memory(label, record_a, record_b, threshold)


def _time(label: str, record_a: Record, record_b: Record, a: Results, b: Results, threshold: float) -> Finding:
    case, gpu = record_b["case"], a.get("capability") is not None
    others_changed = bool(_differing(record_a, record_b, a, b))
    changes, verdicts = {}, {}
    for rival in record_b["seconds"]:
        if is_own(rival) or (others_changed and rival not in ROOFS):
            continue
        if rival in ROOFS and any(record_a.get(key) != record_b.get(key) for key in ("bytes", "flops")):
            continue  # it does another work
        ratios = _ratio(record_a, label, rival), _ratio(record_b, label, rival)
        if ratios[0] is not None and ratios[1] is not None:
            # A rival's time over fastconv's: less of it is slower.
            changes[rival] = ratios[0]["median"] / ratios[1]["median"] - 1
            verdicts[rival] = _verdict(ratios[1], ratios[0], threshold)
    by = ", ".join(f"{rival} {100 * change:+.0f} %" for rival, change in changes.items())
    if not gpu:
        if not changes:
            why = (
                "neither a copy nor a product to judge by, and other versions"
                if others_changed
                else "no rival is in both"
            )
            return Finding(case, label, "not judged", None, f"{why}; times of two runs on a CPU say nothing")
        change = statistics.median(changes.values())
        return Finding(case, label, _majority(list(verdicts.values())), change, f"against {by}")
    times = record_a["seconds"][label], record_b["seconds"][label]
    verdict = _verdict(*times, threshold)
    change = times[1]["median"] / times[0]["median"] - 1
    if changes and _majority(list(verdicts.values())) != verdict:
        verdict = "same"  # the card is slower, or the rivals are
    return Finding(case, label, verdict, change, f"time, and against {by}" if by else "time alone, no rival is in both")


def _ratio(record: Record, label: str, rival: str) -> Spread | None:
    """The rival's time over that of fastconv under a label."""
    over = record["ratios"].get(rival)
    if label == "fastconv" or over is None:
        return over
    own = record["ratios"].get(label)  # its time over that of plain fastconv
    if own is None:
        return None
    # Of both spreads the widest that there can be: the rounds themselves aren't stored.
    return {
        "median": over["median"] / own["median"],
        "low": over["low"] / own["high"],
        "high": over["high"] / own["low"],
    }


def _verdict(before: Spread, after: Spread, threshold: float) -> str:
    """Of a quantity that is better when it is less."""
    if after["median"] > before["median"] * (1 + threshold) and after["low"] > before["high"]:
        return "slower"
    if before["median"] > after["median"] * (1 + threshold) and before["low"] > after["high"]:
        return "faster"
    return "same"


def _majority(verdicts: list[str]) -> str:
    for verdict, opposite in (("slower", "faster"), ("faster", "slower")):
        if 2 * verdicts.count(verdict) > len(verdicts) and opposite not in verdicts:
            return verdict
    return "same"


def _memory(label: str, record_a: Record, record_b: Record, threshold: float) -> Iterator[Finding]:
    before, after = (peaks(record).get(label) for record in (record_a, record_b))
    if before is None or after is None or abs(after - before) <= _PAGE:
        return
    if max(before, after) > min(before, after) * (1 + threshold):
        verdict = "more memory" if after > before else "less memory"
        change = after / before - 1 if before else None
        yield Finding(
            record_b["case"], label, verdict, change, f"peak {before / 1e6:.3g} MB, then {after / 1e6:.3g} MB"
        )


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
    counts = {verdict: sum(f.verdict == verdict for f in found.findings) for verdict in _ORDER}
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
