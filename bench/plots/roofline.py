"""Operations a second over operations a byte, under the roofs of the same run."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from fastconv.bench.plots.look import MARKERS, OF_SUBJECTS, on_white
from fastconv.bench.plots.plot import DIRECTIONS, KINDS, Marks, Panel, Plot, slug, subjects
from fastconv.bench.records import rivals, si, subject
from fastconv.bench.results import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def rooflines(records: list[Record], missing: list[str], roofs: dict[str, Any] | None) -> Iterator[Plot]:
    """One plot for each dtype, one panel a direction, of each subject's largest case; adds to `missing` why not."""
    if not roofs or not roofs.get("copy"):
        missing.append(f"{KINDS['roofline']}: left out, the results have no roofs")
        return
    order = list(subjects(records))
    for dtype in dict.fromkeys(r["dtype"] for r in records):
        largest: dict[tuple[str, str], Record] = {}
        for record in records:
            key = record["direction"], subject(record)
            if record["dtype"] == dtype and record["flops"] and record["bytes"]:
                largest[key] = max(record, largest.get(key, record), key=lambda r: r["bytes"])
        directions = [d for d in DIRECTIONS if any(key[0] == d for key in largest)]
        panels = []
        for direction in directions:
            points = [(s, r) for (d, s), r in largest.items() if d == direction]
            panels.append(
                Panel(
                    f"{DIRECTIONS[direction]}, {dtype}",
                    functools.partial(_roofline, points=points, order=order, roofs=roofs, dtype=dtype),
                    3.6,
                )
            )
        if panels:
            title = f"Roofline, {dtype}: filled fastconv, hollow its first rival"
            yield Plot("roofline", "", slug("roofline", dtype), title, tuple(panels))


def _roofline(
    axes: Axes, marks: Marks, points: list[tuple[str, Record]], order: list[str], roofs: dict[str, Any], dtype: str
) -> None:
    copy, matmul = roofs["copy"], roofs.get("matmul", {}).get(dtype)
    xs = [r["flops"] / r["bytes"] for _, r in points]
    ridge = [matmul / copy] if matmul else []
    low, high = min(xs + ridge) / 3, max(xs + ridge) * 4
    top = matmul / copy if matmul else high
    (line,) = axes.plot([low, top], [low * copy / 1e12, top * copy / 1e12], color=on_white("faint"), linewidth=1.4)
    marks.add(line, f"roof: copy {si(copy, 'B/s')}")
    middle = (low * top) ** 0.5
    axes.text(
        middle, 1.15 * middle * copy / 1e12, f"copy {si(copy, 'B/s')}",
        ha="center", fontsize=7.5, color=on_white("faint"),
        rotation=math.degrees(math.atan(copy / 1e12)), rotation_mode="anchor", transform_rotates_text=True,
    )  # fmt: skip
    if matmul:
        (line,) = axes.plot([top, high], [matmul / 1e12] * 2, color=on_white("faint"), linewidth=1.4)
        marks.add(line, f"roof: matmul {si(matmul, 'FLOP/s')}")
        axes.annotate(
            f"matmul {si(matmul, 'FLOP/s')}", (high, matmul / 1e12), (-2, 5), textcoords="offset points",
            ha="right", fontsize=7.5, color=on_white("faint"),
        )  # fmt: skip
    for (name, record), x in zip(points, xs, strict=True):
        index = order.index(name)
        style: dict[str, Any] = {"marker": MARKERS[index % len(MARKERS)], "linestyle": "none", "markersize": 6.5}
        color = on_white(OF_SUBJECTS[index % len(OF_SUBJECTS)])
        own = record["flops"] / record["seconds"]["fastconv"]["median"] / 1e12
        for rival in rivals(record)[:1]:
            theirs = record["flops"] / record["seconds"][rival]["median"] / 1e12
            axes.plot([x, x], [theirs, own], color=color, linewidth=0.8, alpha=0.6, zorder=1)
            (point,) = axes.plot([x], [theirs], color=color, markerfacecolor=on_white("paper"), **style)
            marks.add(point, f"{rival}: {record['case']}: {si(theirs * 1e12, 'FLOP/s')}, {x:.3g} FLOP/byte")
        (point,) = axes.plot([x], [own], color=color, label=name, **style)
        roof = f", {100 * record['of_roof']:.0f} % of {record['roof']}" if "of_roof" in record else ""
        marks.add(point, f"fastconv: {record['case']}: {si(own * 1e12, 'FLOP/s')}, {x:.3g} FLOP/byte{roof}")
    axes.set(xscale="log", yscale="log", xlim=(low, high))
    axes.margins(y=0.15)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_minor_formatter(lambda value, _: "")
    axes.set_xlabel("arithmetic intensity (FLOP/byte)")
    axes.set_ylabel("TFLOP/s")
