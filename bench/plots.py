"""The plots of one device's results: roofline, speed-up by batch x length, memory, latency, tokens a second.

SVGs for the HTML report, whose colours follow its theme, and PNGs for the README. Needs matplotlib.
"""

from __future__ import annotations

import functools
import io
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastconv.bench.records import ROOFS, goals, is_model, is_own, origin, peaks, rivals, si, subject, variant
from fastconv.bench.results import Record, Results, digest

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Name -> on white, on black. Those of lines are Paul Tol's "muted" and Okabe and Ito's, which colour-blind people tell
# apart; markers and dashes say the same once more.
COLORS = {
    "ink": ("#1c2531", "#e7ebf0"),
    "faint": ("#5d6876", "#9aa5b1"),
    "line": ("#dde2e8", "#323b46"),
    "paper": ("#fffffe", "#14191f"),
    "bad": ("#b8321e", "#ff8a75"),
    "own": ("#0072b1", "#56b4e8"),
    "own-2": ("#44aa98", "#5cc9b6"),
    "own-3": ("#332287", "#a59df0"),
    "rival": ("#d55e01", "#f28e43"),
    "rival-2": ("#c98f00", "#e9bf4b"),
    "rival-3": ("#aa4498", "#dc8bcd"),
    "other": ("#7b8490", "#a3adb8"),
    "other-2": ("#117732", "#58bd7b"),
    "other-3": ("#882254", "#dd7fae"),
    "other-4": ("#8a8a2b", "#c5c55e"),
}
_LABELS = {  # what runs -> its colour in every plot
    "fastconv": "own",
    "fastconv remove": "own-2",
    "fastconv graphs": "own-3",
    "fastconv compile": "own-3",
    "HF": "rival",
    "HF compile": "rival-2",
    "torch": "rival-3",
    "torch compile": "rival-2",
    "reference": "other",
    "matmul": "faint",
}
_SPARE = ("other-2", "other-3", "other-4", "rival-3", "own-2", "rival-2", "own-3")  # of labels that are not in _LABELS
_SUBJECTS = ("own", "rival", "own-2", "rival-3", "rival-2", "own-3", "other-2", "other-3", "other-4", "other")
_MARKERS = "osD^vPX*hp<>d"
_ON_DARK, _ON_LIGHT = "#ffffff", "#101418"  # numbers in cells, whose colours are the same on white and black
_WIDTH = 5.4  # inches of a column: at 72 a point each about a phone's screen
_MARK = "mark-"

KINDS = {
    "tokens": "Tokens a second",
    "roofline": "Roofline",
    "heat": "Speed-up by batch and length",
    "latency": "Latency of batch 1",
    "memory": "Peak memory by length",
}


def check_installed() -> None:
    """Raises ImportError if matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        raise ImportError('plots need matplotlib, which is not installed: pip install "fastconv[bench]"')


class _Marks:
    """What a plot shows as data, and a sentence on each."""

    def __init__(self) -> None:
        self.titles: list[str] = []

    def add(self, artist: Artist, title: str) -> None:
        artist.set_gid(f"{_MARK}{len(self.titles)}")
        self.titles.append(title)


@dataclass(frozen=True)
class Panel:
    """One pair of axes. height: in inches"""

    title: str
    draw: Callable[[Axes, _Marks], None]
    height: float = 3.2


@dataclass(frozen=True)
class Plot:
    """One picture.

    kind: one of KINDS
    subject: the op or model that it is about; "" of all
    name: of its file, without an ending
    """

    kind: str
    subject: str
    name: str
    title: str
    panels: tuple[Panel, ...]
    footer: str = ""


def plots(results: Results) -> tuple[list[Plot], list[str]]:
    """Every plot that the results have data for, and what was left out, in words."""
    green = [r for r in results["records"].values() if "red" not in r]
    found: list[Plot] = []
    missing: list[str] = []
    makers: dict[str, Callable[[list[Record], list[str]], Iterator[Plot]]] = {
        "tokens": _tokens,
        "roofline": functools.partial(_rooflines, roofs=results.get("roofs")),
        "heat": _heat_maps,
        "latency": _latency,
        "memory": _memory,
    }
    for kind, make in makers.items():
        made = list(make(green, missing))
        if not made and not any(words.startswith(KINDS[kind]) for words in missing):
            missing.append(f"{KINDS[kind]}: no case was measured")
        found += made
    footer = origin(results)
    return [replace(plot, footer=footer) for plot in found], missing


def _subjects(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Whole models first, then the ops, in the order of the records."""
    found: dict[str, list[Record]] = {}
    for record in sorted(records, key=lambda r: not is_model(r)):
        found.setdefault(subject(record), []).append(record)
    return found


def _left_out(kind: str, subjects: list[str], why: str) -> list[str]:
    return [f"{KINDS[kind]}: left out for {', '.join(subjects)}: {why}"] if subjects else []


def _listed(*words: str, besides: str) -> str:
    return ", ".join(word for word in words if word not in ("", besides))


def _slug(*words: object) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", " ".join(map(str, words)).lower()).strip("-")


# Whole models


def _tokens(records: list[Record], missing: list[str]) -> Iterator[Plot]:
    models = _subjects(r for r in records if is_model(r))
    if not models:
        missing.append(f"{KINDS['tokens']}: no whole model was measured")
    for model, of_model in models.items():
        by_direction: dict[tuple[str, str], list[Record]] = {}
        for record in of_model:
            if record.get("tokens_per_s"):
                by_direction.setdefault((record["direction"], record["dtype"]), []).append(record)
        panels = [
            Panel(
                f"{_WORDS[direction]}, {dtype}",
                functools.partial(_bars, records=chosen),
                0.75 + sum(0.19 * len(r["tokens_per_s"].keys() - ROOFS) + 0.12 for r in chosen),
            )
            for (direction, dtype), chosen in by_direction.items()
        ]
        if panels:
            yield Plot("tokens", model, _slug("tokens", model), f"{model}: tokens a second", tuple(panels))
        else:
            missing += _left_out("tokens", [model], "no case has tokens a second")


_WORDS = {"infer": "inference", "fwd": "forward", "bwd": "backward", "step": "forward and backward"}


def _bars(axes: Axes, marks: _Marks, records: list[Record]) -> None:
    y, ticks, most = 0.0, [], 0.0
    for record in records:
        rates, top = record["tokens_per_s"], y
        strokes = []  # of targets: whose bar, where, of which colour, what it is
        for name, goal, ratio in goals(record):
            slow, _, fast = name.partition(" / ")
            if slow in rates and (fast or "fastconv") in rates:
                met = ratio is not None and ratio >= goal
                what = f"{record['case']}: target {goal:g}x {name}, {'reached' if met else 'missed'}"
                strokes.append((fast or "fastconv", goal * rates[slow], _light("ink" if met else "bad"), what))
        bars = {label: rate for label, rate in rates.items() if label not in ROOFS}
        widest = max(bars.values())
        for label, rate in bars.items():
            (bar,) = axes.barh(y, rate, height=0.82, color=_color(label), label=label)
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


# Roofline


def _rooflines(records: list[Record], missing: list[str], roofs: dict[str, Any] | None) -> Iterator[Plot]:
    if not roofs or not roofs.get("copy"):
        missing.append(f"{KINDS['roofline']}: left out, the results have no roofs")
        return
    order = list(_subjects(records))
    for dtype in dict.fromkeys(r["dtype"] for r in records):
        largest: dict[tuple[str, str], Record] = {}
        for record in records:
            key = record["direction"], subject(record)
            if record["dtype"] == dtype and record["flops"] and record["bytes"]:
                largest[key] = max(record, largest.get(key, record), key=lambda r: r["bytes"])
        directions = [d for d in _WORDS if any(key[0] == d for key in largest)]
        panels = []
        for direction in directions:
            points = [(s, r) for (d, s), r in largest.items() if d == direction]
            panels.append(
                Panel(
                    f"{_WORDS[direction]}, {dtype}",
                    functools.partial(_roofline, points=points, order=order, roofs=roofs, dtype=dtype),
                    3.6,
                )
            )
        if panels:
            title = f"Roofline, {dtype}: filled fastconv, hollow its first rival"
            yield Plot("roofline", "", _slug("roofline", dtype), title, tuple(panels))


def _roofline(
    axes: Axes, marks: _Marks, points: list[tuple[str, Record]], order: list[str], roofs: dict[str, Any], dtype: str
) -> None:
    copy, matmul = roofs["copy"], roofs.get("matmul", {}).get(dtype)
    xs = [r["flops"] / r["bytes"] for _, r in points]
    ridge = [matmul / copy] if matmul else []
    low, high = min(xs + ridge) / 3, max(xs + ridge) * 4
    top = matmul / copy if matmul else high
    (line,) = axes.plot([low, top], [low * copy / 1e12, top * copy / 1e12], color=_light("faint"), linewidth=1.4)
    marks.add(line, f"roof: copy {si(copy, 'B/s')}")
    middle = (low * top) ** 0.5
    axes.text(
        middle, 1.15 * middle * copy / 1e12, f"copy {si(copy, 'B/s')}",
        ha="center", fontsize=7.5, color=_light("faint"),
        rotation=math.degrees(math.atan(copy / 1e12)), rotation_mode="anchor", transform_rotates_text=True,
    )  # fmt: skip
    if matmul:
        (line,) = axes.plot([top, high], [matmul / 1e12] * 2, color=_light("faint"), linewidth=1.4)
        marks.add(line, f"roof: matmul {si(matmul, 'FLOP/s')}")
        axes.annotate(
            f"matmul {si(matmul, 'FLOP/s')}", (high, matmul / 1e12), (-2, 5), textcoords="offset points",
            ha="right", fontsize=7.5, color=_light("faint"),
        )  # fmt: skip
    for (name, record), x in zip(points, xs, strict=True):
        index = order.index(name)
        style: dict[str, Any] = {"marker": _MARKERS[index % len(_MARKERS)], "linestyle": "none", "markersize": 6.5}
        color = _light(_SUBJECTS[index % len(_SUBJECTS)])
        own = record["flops"] / record["seconds"]["fastconv"]["median"] / 1e12
        for rival in rivals(record)[:1]:
            theirs = record["flops"] / record["seconds"][rival]["median"] / 1e12
            axes.plot([x, x], [theirs, own], color=color, linewidth=0.8, alpha=0.6, zorder=1)
            (point,) = axes.plot([x], [theirs], color=color, markerfacecolor=_light("paper"), **style)
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


# Speed-up by batch x length


def _heat_maps(records: list[Record], missing: list[str]) -> Iterator[Plot]:
    without = []
    for name, of_subject in _subjects(records).items():
        maps: dict[tuple[str, ...], dict[tuple[str, str], dict[tuple[int, int], Record]]] = {}
        for record in of_subject:
            for rival in rivals(record) if record.get("batch") and record.get("length") else ():
                if rival in record["ratios"]:
                    kind = record["direction"], record["dtype"], record.get("lengths", "full"), rival
                    cells = maps.setdefault(kind, {}).setdefault((record["model"] or name, variant(record)), {})
                    cells[record["batch"], record["length"]] = record
        drawn = False
        for (direction, dtype, lengths, rival), models in maps.items():
            # One cell alone is better read in the table.
            models = {model: cells for model, cells in models.items() if len(cells) > 1}
            text = ", real lengths" if lengths == "text" else ""
            panels = []
            for model, cells in models.items():
                rows = len({batch for batch, _ in cells})
                draw = functools.partial(_heat_map, cells=cells, rival=rival)
                panels.append(Panel(_listed(*model, besides=name), draw, 0.95 + 0.34 * rows))
            if panels:
                drawn = True
                yield Plot(
                    "heat",
                    name,
                    _slug("heat", name, direction, dtype, "" if lengths == "full" else lengths, "vs", rival),
                    f"{name}: {_WORDS[direction]}, {dtype}{text}\nspeed-up over {rival}",
                    tuple(panels),
                )
        if not drawn:
            without.append(name)
    missing += _left_out("heat", without, "no rival was timed on two shapes of one model")


def _heat_map(axes: Axes, marks: _Marks, cells: dict[tuple[int, int], Record], rival: str) -> None:
    from matplotlib.colors import LinearSegmentedColormap, LogNorm, to_rgb
    from matplotlib.patches import Rectangle

    colors = LinearSegmentedColormap.from_list("", ["#8c3d04", "#f0a35e", "#f3f3f1", "#74add6", "#0a4a86"])
    norm = LogNorm(1 / 8, 8, clip=True)  # the same in all maps; beyond 8x the number says more than a colour
    batches, lengths = (sorted({shape[axis] for shape in cells}) for axis in (0, 1))
    for y, batch in enumerate(batches):
        for x, length in enumerate(lengths):
            record = cells.get((batch, length))
            if record is None:
                axes.text(x, y, "-", ha="center", va="center", color=_light("faint"), fontsize=8)
                continue
            ratio = record["ratios"][rival]
            color = colors(norm(ratio["median"]))
            cell = axes.add_patch(Rectangle((x - 0.48, y - 0.47), 0.96, 0.94, facecolor=color, edgecolor="none"))
            marks.add(
                cell,
                f"{record['case']}: {ratio['median']:.2f}x of {rival} ({ratio['low']:.2f} to {ratio['high']:.2f})",
            )
            red, green, blue = to_rgb(color)
            dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
            number = f"{ratio['median']:.2f}x" if ratio["median"] < 10 else f"{ratio['median']:.0f}x"
            axes.text(
                x, y, number, ha="center", va="center", fontsize=8.5, color=_ON_DARK if dark else _ON_LIGHT,
                weight="bold" if ratio["median"] >= 1 else "normal",
            )  # fmt: skip
    axes.set_xticks(range(len(lengths)), [str(length) for length in lengths])
    axes.set_yticks(range(len(batches)), [str(batch) for batch in batches])
    axes.set(xlim=(-0.5, len(lengths) - 0.5), ylim=(len(batches) - 0.5, -0.5))
    axes.set_xlabel("length (tokens); blue: fastconv is faster")
    axes.set_ylabel("batch")
    axes.grid(visible=False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


# Curves by length


def _latency(records: list[Record], missing: list[str]) -> Iterator[Plot]:
    def curves(record: Record) -> dict[str, dict[str, float]]:
        replayed = {f"{label}, graph replay": t for label, t in record.get("graph_seconds", {}).items()}
        return {**{label: t for label, t in record["seconds"].items() if label not in ROOFS}, **replayed}

    single = [r for r in records if r.get("batch") == 1]
    yield from _by_length("latency", records, single, curves, missing, 1e3, "ms")


def _memory(records: list[Record], missing: list[str]) -> Iterator[Plot]:
    def curves(record: Record) -> dict[str, dict[str, float]]:
        return {
            label: dict.fromkeys(("median", "low", "high"), size) for label, size in peaks(record).items() if size > 0
        }

    yield from _by_length("memory", records, records, curves, missing, 1e-6, "MB")


_Curves = Callable[[Record], dict[str, dict[str, float]]]


def _by_length(
    kind: str, every: list[Record], records: list[Record], curves: _Curves, missing: list[str], scale: float, unit: str
) -> Iterator[Plot]:
    """One plot a subject, one panel a direction: of its model, dtype and batch with the most lengths."""
    without = []
    chosen = _subjects(records)
    for name in _subjects(every):
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
        for direction in _WORDS:
            found = groups.get(direction, {})
            best = max(found, key=lambda k: (len(found[k]), *k[:2]), default=None)
            if best is None or len(found[best]) < 2:
                continue
            full, batch, model, kept, dtype = best
            what = _listed(model, kept, dtype, f"batch {batch}", "" if full else "real lengths", besides=name)
            line = [found[best][length] for length in sorted(found[best])]
            draw = functools.partial(_lines, records=line, curves=curves, scale=scale, unit=unit)
            panels.append(Panel(f"{_WORDS[direction]}: {what}", draw))
        if panels:
            yield Plot(kind, name, _slug(kind, name), f"{name}: {KINDS[kind].lower()}", tuple(panels))
        else:
            without.append(name)
    why = {
        "latency": "batch 1 was not measured at two lengths",
        "memory": "peaks are not known at two lengths of one batch",
    }
    missing += _left_out(kind, without, why[kind])


def _lines(axes: Axes, marks: _Marks, records: list[Record], curves: _Curves, scale: float, unit: str) -> None:
    from matplotlib.ticker import LogLocator, MaxNLocator

    labels = dict.fromkeys(label for record in records for label in curves(record))
    if scale * max(point["median"] for record in records for point in curves(record).values()) < 0.2:
        scale, unit = 1e3 * scale, {"ms": "us", "MB": "kB"}[unit]
    for index, label in enumerate(labels):
        found = [(r["length"], curves(r)[label]) for r in records if label in curves(r)]
        xs = [length for length, _ in found]
        low, middle, high = ([scale * point[k] for _, point in found] for k in ("low", "median", "high"))
        base, replayed = label.removesuffix(", graph replay"), label.endswith(", graph replay")
        color, width = _color(base), 2.2 if base == "fastconv" else 1.3
        (line,) = axes.plot(
            xs, middle, color=color, linewidth=width, label=label,
            markersize=4.5, marker=_MARKERS[index % len(_MARKERS)],
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


# Pictures


def _light(name: str) -> str:
    return COLORS[name][0]


def _color(label: str) -> str:
    return _light(_LABELS.get(label) or _SPARE[sum(label.encode()) % len(_SPARE)])


_STYLE: dict[Any, Any] = {
    "font.size": 8.5,
    "font.family": "sans-serif",
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": COLORS["faint"][0],
    "axes.labelcolor": COLORS["faint"][0],
    "axes.titlecolor": COLORS["ink"][0],
    "text.color": COLORS["ink"][0],
    "xtick.color": COLORS["faint"][0],
    "ytick.color": COLORS["faint"][0],
    "xtick.labelcolor": COLORS["ink"][0],
    "ytick.labelcolor": COLORS["ink"][0],
    "grid.color": COLORS["line"][0],
    "grid.linewidth": 0.7,
    "figure.facecolor": COLORS["paper"][0],
    "axes.facecolor": "none",
    "legend.frameon": False,
    "legend.fontsize": 8,
    "svg.fonttype": "none",  # text as text: small, and sharp on any screen
    "text.parse_math": False,  # names come from files
    "path.simplify": False,
}


def _figure(plot: Plot, columns: int) -> tuple[Figure, _Marks]:
    """The picture with its panels in so many columns, a title, a legend below and a footer."""
    import textwrap

    from matplotlib.figure import Figure  # without pyplot: no window system, no global state

    columns = min(columns, len(plot.panels))
    rows = [plot.panels[start : start + columns] for start in range(0, len(plot.panels), columns)]
    heights = [max(panel.height for panel in row) for row in rows]
    width, marks = columns * _WIDTH, _Marks()
    footer = textwrap.wrap(plot.footer, int(width * 21))
    title = [line for part in plot.title.split("\n") for line in textwrap.wrap(part, int(width * 11))]
    above, below = 0.1 + 0.2 * len(title), 0.06 + 0.13 * len(footer)

    # The height follows once the panels are drawn, and with them the legend's entries known.
    figure = Figure(figsize=(width, 1))
    grid = figure.subplots(len(rows), columns, squeeze=False, height_ratios=heights)
    for row, axes_of_row in zip(rows, grid, strict=True):
        for axes in axes_of_row[len(row) :]:
            axes.remove()
        for panel, axes in zip(row, axes_of_row, strict=False):
            axes.set_title(panel.title)
            panel.draw(axes, marks)
    entries = {
        label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    across = max(1, int(width / (0.55 + 0.075 * max(map(len, entries), default=0))))
    legend = 0.08 + 0.19 * -(-len(entries) // across) if entries else 0.0
    height = above + sum(heights) + legend + below
    figure.set_size_inches(width, height)
    if entries:
        drawn = figure.legend(
            entries.values(), entries, ncols=min(across, len(entries)), columnspacing=1.2,
            loc="lower center", bbox_to_anchor=(0.5, (below - 0.03) / height),
        )  # fmt: skip
        drawn.set_in_layout(False)
    low = (below + legend) / height
    figure.set_layout_engine("constrained", rect=(0, low, 1, 1 - low - above / height), h_pad=0.09, w_pad=0.05)
    for index, line in enumerate(title):
        figure.text(
            0.08 / width, 1 - (0.17 + 0.2 * index) / height, line, fontsize=10.5 if index == 0 else 9.5,
            weight="bold" if index == 0 else "normal", va="center",
        )  # fmt: skip
    for index, line in enumerate(reversed(footer)):
        figure.text(
            0.08 / width, (0.08 + 0.13 * index) / height, line, fontsize=6.5, color=_light("faint"), va="center"
        )
    return figure, marks


def svg(plot: Plot) -> str:
    """The picture as an <svg> element: its colours are the page's variables --NAME of COLORS, its ids are its own.

    Raises: ImportError without matplotlib.
    """
    check_installed()
    import matplotlib

    file = io.StringIO()
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": plot.name}):
        figure, marks = _figure(plot, columns=1)
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{plot.name}-", text)
    text = re.sub(
        r'<svg [^>]*?viewBox="([^"]*)"[^>]*>',
        rf'<svg viewBox="\1" role="img" aria-label="{escape(plot.title)}">',
        text,
        count=1,
    )
    for name, (light, _) in COLORS.items():
        text = text.replace(light, f"var(--{name})")
    for index, title in enumerate(marks.titles):
        group = f'<g id="{plot.name}-{_MARK}{index}">'
        text = text.replace(group, f'<g class="mark" id="{plot.name}-{_MARK}{index}"><title>{escape(title)}</title>')
    return text


def png(results: Results, folder: str | Path, *, names: Collection[str] | None = None) -> list[Path]:
    """Write plots as FOLDER/NAME.png, two panels wide; the same results give the same names.

    names: of those to write, as "roofline-bfloat16"; None: all

    Each says in its metadata, as "Source", which results it shows: their `digest`.

    Raises: ImportError without matplotlib, ValueError for a name that the results have no plot for, OSError.
    """
    check_installed()
    import matplotlib

    every = plots(results)[0]
    unknown = set(names or ()) - {plot.name for plot in every}
    if unknown:
        there_are = ", ".join(plot.name for plot in every)
        raise ValueError(f"no data for the plots {', '.join(sorted(unknown))}; there are {there_are}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for plot in every:
        if names is not None and plot.name not in names:
            continue
        path = folder / f"{plot.name}.png"
        with matplotlib.rc_context(_STYLE):
            figure, _ = _figure(plot, columns=2)
            figure.savefig(path, dpi=160, metadata={"Software": None, "Source": digest(results)})
        written.append(path)
    return written
