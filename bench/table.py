"""Results as a table on the terminal: by rich where it is installed, else as plain text."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastconv.bench.records import ROOFS
from fastconv.bench.results import Record, Results, same_state
from fastconv.parity.table import aligned

_OTHER_STATE = "*"


@dataclass(frozen=True)
class _Table:
    title: str
    header: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def show(results: Results, names: Iterable[str] | None = None) -> None:
    """Print results: what they are of, a table of the whole models and one of each op, and the targets.

    names: of the cases to show; None: all
    """
    if sys.stdout.isatty():
        try:
            import rich  # noqa: F401  (asked here, used below)
        except ImportError:
            pass
        else:
            _by_rich(results, names)
            return
    print(plain(results, names))


def plain(results: Results, names: Iterable[str] | None = None) -> str:
    """What `show` prints where there is no terminal."""
    parts = ["\n".join(head(results))]
    for table in _tables(results, names):
        parts.append("\n".join([table.title, *aligned([table.header, *table.rows]), *table.notes]))
    return "\n\n".join([*parts, "\n".join(_foot(results, names))])


def _by_rich(results: Results, names: Iterable[str] | None) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False)
    for text in head(results):
        console.print(text)
    for made in _tables(results, names):
        console.print()
        console.print(made.title, style="bold")
        table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
        for index, name in enumerate(made.header):
            table.add_column(name, justify="right" if index else "left", no_wrap=True)
        for row in made.rows:
            table.add_row(*row, style=_style(row))
        # A space more between the columns than those of plain text have.
        if len(aligned([made.header, *made.rows])[0]) + len(made.header) < console.width:
            console.print(table)
        else:  # the names on lines of their own
            header, *figures = aligned([made.header[1:], *(row[1:] for row in made.rows)])
            console.print(f"  {header}", style="bold")
            for row, line in zip(made.rows, figures, strict=True):
                if row[0]:
                    console.print(row[0], style=_style(row) or "cyan")
                console.print(f"  {line}", style=_style(row))
        for note in made.notes:
            console.print(note, style="red" if note.startswith("RED") else "dim")
    console.print()
    for text in _foot(results, names):
        console.print(text)


def _style(row: Sequence[str]) -> str | None:
    return "bold red" if "RED" in row else None


def summary(results: Results, names: Iterable[str] | None = None) -> str:
    """Without the tables: what the figures are of, how many cases are right, which targets are missed."""
    return "\n".join([*head(results), *_foot(results, names)])


def head(results: Results) -> list[str]:
    """What the figures are of: the device, the versions, the code, the roofs."""
    versions = ", ".join(f"{name} {results.get(name) or '-'}" for name in ("torch", "triton", "transformers", "python"))
    commit = str(results.get("commit") or "no git")[:12] + (" with changes" if results.get("dirty") else "")
    lines = [f"{results['device']}; {versions}; {commit}, code {results['code']}"]
    if "roofs" in results:
        matmul = ", ".join(f"{rate / 1e12:.2f} TFLOP/s {dtype}" for dtype, rate in results["roofs"]["matmul"].items())
        lines.append(f"roofs, measured in this run: copy {results['roofs']['copy'] / 1e9:,.1f} GB/s; matmul {matmul}")
    if "tests" in results:
        lines.append(f"tests {results['tests']}")
    return lines


def line(record: Record) -> str:
    """One case in one line."""
    if "too_large" in record:
        return f"{record['case']}: left out, too large for this device: {record['too_large']}"
    if "red" in record:
        return f"{record['case']}: {_red(record)}"
    time = f"{_significant(1e3 * record['seconds']['fastconv']['median'])} ms"
    ratios = "".join(f", {name} {_times(ratio)}" for name, ratio in record["ratios"].items())
    broken = "".join(f", {name} failed" for name in record.get("broken", {}))
    return f"{record['case']}: {time}, {_percent(record['of_roof'])} of {record['roof']}{ratios}{broken}"


def _red(record: Record) -> str:
    return "RED, no figures: " + "; ".join(f"{name}: {why}" for name, why in record["red"].items())


def _chosen(results: Results, names: Iterable[str] | None) -> list[Record]:
    records = results["records"]
    return list(records.values()) if names is None else [records[name] for name in names if name in records]


def _tables(results: Results, names: Iterable[str] | None) -> list[_Table]:
    by_op: dict[str, list[Record]] = {}
    for record in _chosen(results, names):
        by_op.setdefault("" if record["kind"] == "model" else record["op"], []).append(record)
    models = by_op.pop("", [])
    tables = [_of_models(models, results)] if models else []
    return tables + [_of_op(op, records, results) for op, records in by_op.items()]


def _of_op(op: str, records: list[Record], results: Results) -> _Table:
    rivals = _labels(records, "ratios", "broken")
    optional = [key for key in ("graph_seconds", "host_seconds") if any(record.get(key) for record in records)]
    titles = {"graph_seconds": "graph ms", "host_seconds": "host us"}
    header = ["case", "ms", "spread", "GB/s", "TFLOP/s", "of roof", *(titles[key] for key in optional)]
    table = _Table(
        f"{op}; under a rival's name its time over fastconv's", [*header, *rivals], notes=_notes(records, results)
    )
    for record in records:
        name = record["case"].removeprefix(f"{op} ") + _mark(record, results)
        if "red" in record:
            table.rows.append([name, "RED", *[""] * (len(table.header) - 2)])
            continue
        own = record["seconds"]["fastconv"]
        cells = [name, _significant(1e3 * own["median"]), _spread(own)]
        cells += [_significant(record["bytes_per_s"] / 1e9), _significant(record["flops_per_s"] / 1e12)]
        cells += [f"{_percent(record['of_roof'])} {record['roof']}"]
        cells += [_optional(record, key, "fastconv") for key in optional]
        table.rows.append(cells + [_ratio(record, rival) for rival in rivals])
    return table


def _of_models(records: list[Record], results: Results) -> _Table:
    optional = {
        "graph_seconds": "graph ms",
        "host_seconds": "host us",
        "peak_bytes": "peak MB",
        "joules_per_token": "mJ/token",
    }
    shown = [key for key in optional if any(record.get(key) for record in records)]
    header = ["case", "path", "ms", "spread", "tokens/s", "of roof", "time ratio"]
    title = "whole models; the ratio is of a path's time to fastconv's"
    table = _Table(title, [*header, *(optional[key] for key in shown)], notes=_notes(records, results))
    for record in records:
        name = record["case"] + _mark(record, results)
        if "red" in record:
            table.rows.append([name, "fastconv", "RED", *[""] * (len(table.header) - 3)])
            continue
        timed = {label: seconds for label, seconds in record["seconds"].items() if label not in ROOFS}
        for label, seconds in timed.items():
            own = label == "fastconv"
            cells = [name if own else "", label, _significant(1e3 * seconds["median"]), _spread(seconds)]
            rate = record["tokens_per_s"].get(label)
            cells += ["" if rate is None else f"{rate:,.0f}"]
            cells += [f"{_percent(record['of_roof'])} {record['roof']}" if own else ""]
            cells += ["" if own else _times(record["ratios"][label])]
            table.rows.append(cells + [_optional(record, key, label) for key in shown])
        table.rows.extend(["", label, "failed", *[""] * (len(table.header) - 3)] for label in record.get("broken", {}))
    return table


def _labels(records: list[Record], *keys: str) -> list[str]:
    """The labels under the keys of any record, in the order of their first appearance."""
    return list(dict.fromkeys(label for record in records for key in keys for label in record.get(key, {})))


def _mark(record: Record, results: Results) -> str:
    return "" if same_state(record, results) else _OTHER_STATE


def _notes(records: list[Record], results: Results) -> list[str]:
    notes = [f"{_red(record)} ({record['case']})" for record in records if "red" in record]
    failures: dict[tuple[str, str], list[str]] = {}
    for record in records:
        for key, words in (("broken", "failed"), ("uncaptured", "has no CUDA graph")):
            for label, why in record.get(key, {}).items():
                failures.setdefault((f"{label} {words}", why), []).append(record["case"])
    for (what, why), cases in failures.items():
        where = cases[0] if len(cases) == 1 else f"{len(cases)} cases"
        notes.append(f"{what} in {where}: {why}")
    if any(_mark(record, results) for record in records):
        notes.append(f"{_OTHER_STATE} measured with other code or versions")
    return notes


def _ratio(record: Record, rival: str) -> str:
    if rival in record.get("broken", {}):
        return "failed"
    return _times(record["ratios"][rival]) if rival in record["ratios"] else ""


def _optional(record: Record, key: str, label: str) -> str:
    value: Any = record.get(key, {}).get(label)
    if value is None:
        return ""
    scale = {"graph_seconds": 1e3, "host_seconds": 1e6, "peak_bytes": 1e-6, "joules_per_token": 1e3}[key]
    return _significant(scale * (value["median"] if isinstance(value, dict) else value))


def _foot(results: Results, names: Iterable[str] | None) -> list[str]:
    """How many cases are right, and which targets are missed."""
    records = _chosen(results, names)
    red = sum("red" in record for record in records)
    lines = [f"{len(records)} cases, {red} red" if red else f"{len(records)} cases, all right"]
    reached = missed = unknown = 0
    for record in records:
        for name, least in record.get("targets", {}).items():
            ratio = record.get("ratios", {}).get(name)
            if ratio is None:
                unknown += 1
            elif ratio["median"] >= least:
                reached += 1
            else:
                missed += 1
                lines.append(f"missed: {record['case']}: {name} {_times(ratio)}, want {least:.2f}x")
    if reached or missed:
        rest = f", {unknown} not measured" if unknown else ""
        lines.append(f"{reached} of {reached + missed} targets reached{rest}")
    return lines


def _significant(value: float) -> str:
    """Three or four digits that say something."""
    for limit, digits in ((0.1, 5), (1, 4), (10, 3), (100, 2), (1000, 1)):
        if abs(value) < limit:
            return f"{value:.{digits}f}"
    return f"{value:,.0f}"


def _spread(seconds: dict[str, float]) -> str:
    """How far the quartiles are from the median, at most."""
    median = seconds["median"]
    return f"±{100 * max(seconds['high'] - median, median - seconds['low']) / median:.0f} %"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _times(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.2f}x"
