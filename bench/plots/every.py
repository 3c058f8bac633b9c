"""Every plot that results have data for."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace

from fastconv.bench.plots.by_length import latency, memory
from fastconv.bench.plots.heat_map import heat_maps
from fastconv.bench.plots.plot import KINDS, Plot
from fastconv.bench.plots.roofline import rooflines
from fastconv.bench.plots.tokens import tokens
from fastconv.bench.records import origin
from fastconv.bench.results import Record, Results


def plots(results: Results) -> tuple[list[Plot], list[str]]:
    """Every plot that the results have data for, and what was left out, in words."""
    green = [r for r in results["records"].values() if "red" not in r]
    found: list[Plot] = []
    missing: list[str] = []
    makers: dict[str, Callable[[list[Record], list[str]], Iterator[Plot]]] = {
        "tokens": tokens,
        "roofline": functools.partial(rooflines, roofs=results.get("roofs")),
        "heat": heat_maps,
        "latency": latency,
        "memory": memory,
    }
    for kind, make in makers.items():
        made = list(make(green, missing))
        if not made and not any(words.startswith(KINDS[kind]) for words in missing):
            missing.append(f"{KINDS[kind]}: no case was measured")
        found += made
    footer = origin(results)
    return [replace(plot, footer=footer) for plot in found], missing
