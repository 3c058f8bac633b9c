"""Tokens a second of whole models, as bars with their targets."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING

from fastconv.bench.plots.look import color_of, on_white
from fastconv.bench.plots.plot import DIRECTIONS, KINDS, Marks, Panel, Plot, left_out, slug, subjects
from fastconv.bench.records import ROOFS, goals, is_model, si, variant
from fastconv.bench.results import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes


_MOST = 10  # cases of a panel: it is about as high as a phone
_CHOSEN = "of many cases those with targets, then of each length the largest and the smallest batch"


def tokens(records: list[Record], missing: list[str]) -> Iterator[Plot]:
    """One plot for each model, one panel a direction and dtype; adds to `missing` why there is none."""
    models = subjects(r for r in records if is_model(r))
    if not models:
        missing.append(f"{KINDS['tokens']}: no whole model was measured")
    for model, of_model in models.items():
        by_direction: dict[tuple[str, str], list[Record]] = {}
        for record in of_model:
            if record.get("tokens_per_s"):
                by_direction.setdefault((record["direction"], record["dtype"]), []).append(record)
        panels = []
        for (direction, dtype), found in by_direction.items():
            chosen = _telling(found)
            share = f": {len(chosen)} of {len(found)} cases" if len(chosen) < len(found) else ""
            panels.append(
                Panel(
                    f"{DIRECTIONS[direction]}, {dtype}{share}",
                    functools.partial(_bars, records=chosen),
                    0.75 + sum(0.19 * len(r["tokens_per_s"].keys() - ROOFS) + 0.12 for r in chosen),
                )
            )
        if panels:
            some = f"\n{_CHOSEN}" if any(len(found) > _MOST for found in by_direction.values()) else ""
            yield Plot("tokens", model, slug("tokens", model), f"{model}: tokens a second{some}", tuple(panels))
        else:
            missing += left_out("tokens", [model], "no case has tokens a second")


def _telling(records: list[Record]) -> list[Record]:
    """At most _MOST of them, as _CHOSEN says, in their order."""
    if len(records) <= _MOST:
        return records
    by_length: dict[tuple[str, int], list[int]] = {}
    for index in sorted(range(len(records)), key=lambda i: -(records[i].get("batch") or 0)):
        record = records[index]
        length = record.get("length") or 0
        by_length.setdefault((record.get("lengths", "full"), -length), []).append(index)
    groups = [by_length[key] for key in sorted(by_length)]
    ranked = [index for index, record in enumerate(records) if record.get("targets")]
    ranked += [*(group[0] for group in groups), *(group[-1] for group in groups)]
    kept = list(dict.fromkeys(ranked))[:_MOST]
    return [records[index] for index in sorted(kept)]


def _bars(axes: Axes, marks: Marks, records: list[Record]) -> None:
    y, ticks, most = 0.0, [], 0.0
    for record in records:
        rates, top = record["tokens_per_s"], y
        strokes = []  # of targets: whose bar, where, of which colour, what it is
        for name, goal, ratio in goals(record):
            slow, _, fast = name.partition(" / ")
            if slow in rates and (fast or "fastconv") in rates:
                met = ratio is not None and ratio >= goal
                what = f"{record['case']}: target {goal:g}x {name}, {'reached' if met else 'missed'}"
                strokes.append((fast or "fastconv", goal * rates[slow], on_white("ink" if met else "bad"), what))
        bars = {label: rate for label, rate in rates.items() if label not in ROOFS}
        widest = max(bars.values())
        for label, rate in bars.items():
            (bar,) = axes.barh(y, rate, height=0.82, color=color_of(label), label=label)
            marks.add(bar, f"{record['case']}, {label}: {rate:,.0f} tokens/s")
            end = rate
            for _, at, color, what in (stroke for stroke in strokes if stroke[0] == label):
                (drawn,) = axes.plot([at, at], [y - 0.62, y + 0.62], color=color, linewidth=2.2, solid_capstyle="butt")
                marks.add(drawn, what)
                if rate < at < rate + widest / 4:  # it would stand in the number
                    end = max(end, at)
            weight = "bold" if label == "fastconv" else "normal"
            axes.annotate(
                si(rate, "").strip(), (end, y), (4, 0), textcoords="offset points", va="center",
                fontsize=7.5, weight=weight,
            )  # fmt: skip
            y += 1
        most = max(most, widest, *(at for _, at, _, _ in strokes))
        ticks.append(((top + y - 1) / 2, _shape(record)))
        y += 0.65
    axes.set_yticks([at for at, _ in ticks], [name for _, name in ticks])
    axes.set_ylim(y - 0.4, -0.8)
    axes.set_xlim(0, 1.17 * most)
    axes.xaxis.set_major_formatter(lambda value, _: si(value, "").strip() if value else "0")
    axes.set_xlabel("tokens/s (upright stroke: the target, red if missed)")
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)


def _shape(record: Record) -> str:
    text = "\nreal lengths" if record.get("lengths") == "text" else ""
    head = f"\n{variant(record)}" if variant(record) else ""
    return f"{record.get('batch')} x {record.get('length')}{text}{head}"
