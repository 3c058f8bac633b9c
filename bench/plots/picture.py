"""Plots as pictures: SVGs for the HTML report, whose colours follow its theme, and PNGs for the README."""

from __future__ import annotations

import io
import re
from collections.abc import Collection
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from fastconv.bench.plots.every import plots
from fastconv.bench.plots.look import COLORS, STYLE, on_white
from fastconv.bench.plots.plot import MARK, Marks, Plot
from fastconv.bench.results import Results, digest

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FONTS = "DejaVu Sans, Verdana, sans-serif"  # of an SVG: the one that it was laid out with, and one as wide
_WIDTH = 5.4  # inches of a column: at 72 a point each about a phone's screen


def check_installed() -> None:
    """Raises ImportError if matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        raise ImportError('plots need matplotlib, which is not installed: pip install "fastconv[bench]"')


def _figure(plot: Plot, columns: int) -> tuple[Figure, Marks]:
    """The picture with its panels in so many columns, a title, a legend below and a footer."""
    import textwrap

    from matplotlib.figure import Figure  # without pyplot: no window system, no global state

    columns = min(columns, len(plot.panels))
    rows = [plot.panels[start : start + columns] for start in range(0, len(plot.panels), columns)]
    heights = [max(panel.height for panel in row) for row in rows]
    width, marks = columns * _WIDTH, Marks()
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
            axes.set_title("\n".join(textwrap.wrap(panel.title, int(_WIDTH * 11))))
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
            0.08 / width, (0.08 + 0.13 * index) / height, line, fontsize=6.5, color=on_white("faint"), va="center"
        )
    return figure, marks


def svg(plot: Plot) -> str:
    """The picture as an <svg> element: its colours are the page's variables --NAME of COLORS, its ids are its own.

    Raises: ImportError without matplotlib.
    """
    check_installed()
    import matplotlib

    file = io.StringIO()
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": plot.name}):
        figure, marks = _figure(plot, columns=1)
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = _smaller(re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL))
    text = re.sub(
        r'<svg [^>]*?viewBox="([^"]*)"[^>]*>',
        rf'<svg viewBox="\1" role="img" aria-label="{escape(plot.title)}" font-family="{_FONTS}">',
        text,
        count=1,
    )
    for name, (light, _) in COLORS.items():
        text = text.replace(light, f"var(--{name})")
    for index, title in enumerate(marks.titles):
        group = f'<g id="{MARK}{index}">'
        text = text.replace(group, f'<g class="mark"><title>{escape(title)}</title>')
    return text


def _smaller(text: str) -> str:
    """The same picture with less markup: in a report of thousands of cases it is most of the file.

    Without ids that nothing refers to, groups that say nothing, rotations by nothing, and the font, which is the same
    everywhere; with two decimals.
    """
    used = set(re.findall(r'(?:url\(#|href="#)([^")]*)', text))
    groups: list[bool] = []  # those that are open: whether they are kept

    def shorter(found: re.Match[str]) -> str:
        tag = re.sub(r' id="([^"]*)"', lambda m: m[0] if m[1] in used or m[1].startswith(MARK) else "", found[0])
        tag = re.sub(r' font-family: [^;"]*;?| transform="rotate\(-0 [^"]*"', "", tag)
        tag = re.sub(r"-?\d+\.\d{3,}", lambda m: f"{float(m[0]):.2f}".rstrip("0").rstrip("."), tag)
        tag = re.sub(r"([:;]) ", r"\1", " ".join(tag.split()))
        if tag == "</g>":
            return tag if groups.pop() else ""
        if tag.startswith("<g") and not tag.endswith("/>"):
            groups.append(tag != "<g>")
        return "" if tag in ("<g>", "<g/>") else tag

    return re.sub(r">\s+<", "><", re.sub(r"<[^>]*>", shorter, text))


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
        with matplotlib.rc_context(STYLE):
            figure, _ = _figure(plot, columns=2)
            figure.savefig(path, dpi=160, metadata={"Software": None, "Source": digest(results)})
        written.append(path)
    return written
