"""Speed-up over a rival by batch and length."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING

from fastconv.bench.plots.look import on_white
from fastconv.bench.plots.plot import DIRECTIONS, KINDS, Marks, Panel, Plot, left_out, listed, slug, subjects
from fastconv.bench.records import rivals, variant
from fastconv.bench.results import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_ON_DARK, _ON_LIGHT = "#ffffff", "#101418"  # numbers in cells, whose colours are the same on white and black


def heat_maps(records: list[Record], missing: list[str]) -> Iterator[Plot]:
    """One plot for each subject, direction, dtype, lengths and rival; adds to `missing` what has none.

    Of a subject with targets over the first rivals and those that a target of the map's cases names.
    """
    without = []
    others: dict[str, None] = {}
    for name, of_subject in subjects(records).items():
        aims = any(record.get("targets") for record in of_subject)
        maps: dict[tuple[str, ...], dict[tuple[str, str], dict[tuple[int, int], Record]]] = {}
        for record in of_subject:
            for rival in rivals(record) if record.get("batch") and record.get("length") else ():
                if rival in record["ratios"]:
                    kind = record["direction"], record["dtype"], record.get("lengths", "full"), rival
                    cells = maps.setdefault(kind, {}).setdefault((record["model"] or name, variant(record)), {})
                    cells[record["batch"], record["length"]] = record
        drawn = False
        for (direction, dtype, lengths, rival), models in maps.items():
            # One or two cells are better read in the table.
            models = {model: cells for model, cells in models.items() if len(cells) > 2}
            wanted = {model: cells for model, cells in models.items() if not aims or _tells(rival, cells)}
            if len(wanted) < len(models):
                others[rival] = None
            text = ", real lengths" if lengths == "text" else ""
            panels = []
            for model, cells in wanted.items():
                rows = len({batch for batch, _ in cells})
                draw = functools.partial(_heat_map, cells=cells, rival=rival)
                panels.append(Panel(listed(*model, besides=name), draw, 0.95 + 0.34 * rows))
            if panels:
                drawn = True
                yield Plot(
                    "heat",
                    name,
                    slug("heat", name, direction, dtype, "" if lengths == "full" else lengths, "vs", rival),
                    f"{name}: {DIRECTIONS[direction]}, {dtype}{text}\nspeed-up over {rival}",
                    tuple(panels),
                )
        if not drawn:
            without.append(name)
    missing += left_out("heat", without, "no rival was timed on three shapes of one model")
    if others:
        missing.append(
            f"{KINDS['heat']}: some over {', '.join(others)}, which are no case's first rival there and in no target; "
            "the tables have them"
        )


def _tells(rival: str, cells: dict[tuple[int, int], Record]) -> bool:
    """Whether the rival is one of these cases' first, or in a target of theirs."""
    return any(rival in rivals(record)[:1] or rival in record.get("targets", {}) for record in cells.values())


def _heat_map(axes: Axes, marks: Marks, cells: dict[tuple[int, int], Record], rival: str) -> None:
    from matplotlib.colors import LinearSegmentedColormap, LogNorm, to_rgb
    from matplotlib.patches import Rectangle

    colors = LinearSegmentedColormap.from_list("", ["#8c3d04", "#f0a35e", "#f3f3f1", "#74add6", "#0a4a86"])
    norm = LogNorm(1 / 8, 8, clip=True)  # the same in all maps; beyond 8x the number says more than a colour
    batches, lengths = (sorted({shape[axis] for shape in cells}) for axis in (0, 1))
    for y, batch in enumerate(batches):
        for x, length in enumerate(lengths):
            record = cells.get((batch, length))
            if record is None:
                axes.text(x, y, "-", ha="center", va="center", color=on_white("faint"), fontsize=8)
                continue
            ratio = record["ratios"][rival]
            color = colors(norm(ratio["median"]))
            patch = Rectangle((x - 0.48, y - 0.47), 0.96, 0.94, facecolor=color, edgecolor="none", clip_on=False)
            cell = axes.add_patch(patch)
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
