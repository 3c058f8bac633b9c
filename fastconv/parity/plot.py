"""The result of `verify` as a picture: the table, with the speeds as bars."""

from __future__ import annotations

import os
import textwrap
from importlib.util import find_spec

from fastconv.parity import table
from fastconv.parity.paths import REMOVED
from fastconv.parity.results import Row, Verification

# By whose code runs: the yardsticks grey, fused forwards in another's model light, this library's model dark.
_YARDSTICK, _FUSED, _OWN = "#a9b1ba", "#86bcd9", "#1f6f9f"
_GOOD, _BAD, _INK, _FAINT = "#1d7f4e", "#b8321f", "#1c2530", "#5c6773"
# In inches.
_WIDTH, _ROW, _MARGIN = 12.0, 0.42, 0.3
# Right edges of the columns after the path, as parts of the width; the bars stand between the two.
_BARS = (0.225, 0.40)
_EDGES = {
    "tokens/s": 0.475,
    "vs reference": 0.565,
    "vs transformers": 0.675,
    "max error": 0.76,
    "rms error": 0.84,
    "of allowed": 0.925,
    "peak MB": 1.0,
}


def check_installed() -> None:
    """Raises ImportError if matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        raise ImportError('--plot needs matplotlib, which is not installed: pip install "fastconv[plot]"')


def draw(result: Verification, file: str | os.PathLike[str]) -> None:
    """Write the picture as a PNG. Raises: ImportError without matplotlib, OSError."""
    check_installed()
    from matplotlib.figure import Figure  # without pyplot: no window system, no global state

    texts = [*table.context(result), *(f"note: {note}" for note in result.notes)]
    notes = [line for text in texts for line in textwrap.wrap(text, 150)]
    rows = len(result.rows)
    height = 2 * _MARGIN + 0.75 + (rows + 1) * _ROW + 0.25 + 0.2 * len(notes)
    figure = Figure(figsize=(_WIDTH, height), facecolor="white")
    axes = figure.add_axes((_MARGIN / _WIDTH, _MARGIN / height, 1 - 2 * _MARGIN / _WIDTH, 1 - 2 * _MARGIN / height))
    axes.set_axis_off()
    axes.set_xlim(0, 1)
    axes.set_ylim(height - 2 * _MARGIN, 0)  # in inches, downwards

    axes.text(0, 0.15, table.title(result), fontsize=13, weight="bold", color=_INK, va="center")
    badge = {"boxstyle": "round,pad=0.35", "facecolor": _GOOD if result.ok else _BAD, "edgecolor": "none"}
    verdict = "PASS" if result.ok else "FAIL"
    axes.text(0.99, 0.15, verdict, fontsize=13, weight="bold", color="white", va="center", ha="right", bbox=badge)

    top = 0.75
    axes.text(0, top, "path", fontsize=10, color=_FAINT, va="center")
    for name, edge in _EDGES.items():
        axes.text(edge, top, name, fontsize=10, color=_FAINT, va="center", ha="right")
    axes.plot((0, 1), (top + _ROW / 2,) * 2, color=_FAINT, linewidth=0.8)
    fastest = max(map(result.tokens_per_second, result.rows))
    for index, (row, cells) in enumerate(zip(result.rows, table.cells(result), strict=True), 1):
        middle = top + index * _ROW
        weight = "bold" if row.ours else "normal"
        label = row.path if result.kept(row) is None else f"    {REMOVED.lstrip(', ')}"
        axes.text(0, middle, label, fontsize=11, color=_INK, va="center", weight=weight)
        length = (_BARS[1] - _BARS[0]) * result.tokens_per_second(row) / fastest
        axes.barh(middle, length, left=_BARS[0], height=0.55 * _ROW, color=_color(row, result))
        for name, cell in zip(table.HEADER[1:], cells[1:], strict=True):
            broken = name == "of allowed" and not row.comparison.ok
            axes.text(
                _EDGES[name], middle, cell, fontsize=11, va="center", ha="right", weight=weight,
                color=_BAD if broken else _INK,
            )  # fmt: skip
        axes.plot((0, 1), (middle + _ROW / 2,) * 2, color="#e3e6ea", linewidth=0.8)

    below = top + (rows + 1) * _ROW + 0.05
    for index, note in enumerate(notes):
        axes.text(0, below + 0.2 * index, note, fontsize=8.5, color=_FAINT, va="center")
    figure.savefig(file, format="png", dpi=160)


def _color(row: Row, result: Verification) -> str:
    if row is result.rows[-1]:
        return _OWN
    return _FUSED if row.ours else _YARDSTICK
