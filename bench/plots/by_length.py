"""Curves by length: the latency of batch 1, and peak memory."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from fastconv.bench.plots.look import MARKERS, color_of
from fastconv.bench.plots.plot import DIRECTIONS, KINDS, Marks, Panel, Plot, left_out, listed, slug, subjects
from fastconv.bench.records import ROOFS, is_own, peaks, variant
from fastconv.bench.results import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_Curves = Callable[[Record], dict[str, dict[str, float]]]


def latency(records: list[Record], missing: list[str]) -> Iterator[Plot]:
    """One plot for each subject that was measured at batch 1; adds to `missing` what has none."""

    def curves(record: Record) -> dict[str, dict[str, float]]:
        found = {label: t for label, t in record["seconds"].items() if label not in ROOFS}
        replayed = {label: t for label, t in record.get("graph_seconds", {}).items() if label not in ROOFS}
        return found | {f"{label}, graph replay": t for label, t in replayed.items()}

    single = [r for r in records if r.get("batch") == 1]
    yield from _by_length("latency", records, single, curves, missing, 1e3, "ms")


def memory(records: list[Record], missing: list[str]) -> Iterator[Plot]:
    """One plot for each subject whose peaks are known; adds to `missing` what has none."""

    def curves(record: Record) -> dict[str, dict[str, float]]:
        found = {label: size for label, size in peaks(record).items() if size > 0 and label not in ROOFS}
        return {label: dict.fromkeys(("median", "low", "high"), size) for label, size in found.items()}

    yield from _by_length("memory", records, records, curves, missing, 1e-6, "MB")


def _by_length(
    kind: str, every: list[Record], records: list[Record], curves: _Curves, missing: list[str], scale: float, unit: str
) -> Iterator[Plot]:
    """One plot a subject, one panel a direction: of its model, dtype and batch with the most lengths."""
    without = []
    chosen = subjects(records)
    for name in subjects(every):
        groups: dict[str, dict[tuple[Any, ...], dict[int, Record]]] = {}
        for record in chosen.get(name, []):
            if record.get("batch") and record.get("length") and curves(record):
                # Between equally many lengths: full batches, and the largest.
                key = (
                    record.get("lengths") != "text",
                    record["batch"],
                    record["model"] or name,
                    variant(record),
                    record["dtype"],
                )
                groups.setdefault(record["direction"], {}).setdefault(key, {})[record["length"]] = record
        panels = []
        for direction in DIRECTIONS:
            found = groups.get(direction, {})
            best = max(found, key=lambda k: (len(found[k]), *k[:2]), default=None)
            if best is None or len(found[best]) < 2:
                continue
            full, batch, model, kept, dtype = best
            what = listed(model, kept, dtype, f"batch {batch}", "" if full else "real lengths", besides=name)
            line = [found[best][length] for length in sorted(found[best])]
            draw = functools.partial(_lines, records=line, curves=curves, scale=scale, unit=unit)
            panels.append(Panel(f"{DIRECTIONS[direction]}: {what}", draw))
        if panels:
            yield Plot(kind, name, slug(kind, name), f"{name}: {KINDS[kind].lower()}", tuple(panels))
        else:
            without.append(name)
    why = {
        "latency": "batch 1 was not measured at two lengths",
        "memory": "peaks are not known at two lengths of one batch",
    }
    missing += left_out(kind, without, why[kind])


def _lines(axes: Axes, marks: Marks, records: list[Record], curves: _Curves, scale: float, unit: str) -> None:
    from matplotlib.ticker import LogLocator, MaxNLocator

    labels = dict.fromkeys(label for record in records for label in curves(record))
    if scale * max(point["median"] for record in records for point in curves(record).values()) < 0.2:
        scale, unit = 1e3 * scale, {"ms": "us", "MB": "kB"}[unit]
    for index, label in enumerate(labels):
        found = [(r["length"], curves(r)[label]) for r in records if label in curves(r)]
        xs = [length for length, _ in found]
        low, middle, high = ([scale * point[k] for _, point in found] for k in ("low", "median", "high"))
        base, replayed = label.removesuffix(", graph replay"), label.endswith(", graph replay")
        color, width = color_of(base), 2.2 if base == "fastconv" else 1.3
        (line,) = axes.plot(
            xs, middle, color=color, linewidth=width, label=label,
            markersize=4.5, marker=MARKERS[index % len(MARKERS)],
            linestyle=":" if replayed else "-" if is_own(label) else "--", zorder=3 if is_own(label) else 2,
        )  # fmt: skip
        points = ", ".join(f"{x}: {value:.3g} {unit}" for x, value in zip(xs, middle, strict=True))
        marks.add(line, f"{label}, by length: {points}")
        axes.fill_between(xs, low, high, color=color, alpha=0.18, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    lengths = sorted({r["length"] for r in records})
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.minorticks_off()
    low_end, high_end = axes.get_ylim()
    decades = high_end / low_end
    if decades < 100:  # powers of ten alone are too few
        axes.yaxis.set_major_locator(
            MaxNLocator(5) if decades < 4 else LogLocator(subs=(1, 2, 3, 5) if decades < 12 else (1, 2, 5))
        )
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("length (tokens)")
    axes.set_ylabel(unit)
