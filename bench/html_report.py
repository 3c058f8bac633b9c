"""The report of one device's results: a single HTML file that asks for nothing else, with plots and every figure.

Not named html.py: scripts in this folder would import it in the place of the standard library's.
"""

from __future__ import annotations

import base64
import hashlib
import os
import statistics
from html import escape
from pathlib import Path
from typing import Any

from fastconv.bench import plots
from fastconv.bench.html_look import FILTER, SCRIPT, STYLE, theme
from fastconv.bench.html_table import Cell, breakable, case_table, heading, ratio_text, row_of, targets_reached
from fastconv.bench.plots import Plot
from fastconv.bench.records import is_model, rivals, si, subject
from fastconv.bench.results import Record, Results

_LONG = 25  # cases of a table that is folded, until a filter finds some of them


def write(results: Results, path: str | os.PathLike[str]) -> None:
    """Write the report. Without matplotlib it has no plots, and says so.

    results: of one device, as `fastconv bench` stores them

    Raises: OSError.
    """
    Path(path).write_text(page(results), encoding="utf-8")


def page(results: Results) -> str:
    """The report as text."""
    try:
        plots.check_installed()
        drawn, missing = plots.plots(results)
    except ImportError as error:
        drawn, missing = [], [f"No plots: {error}"]
    records = list(results["records"].values())
    subjects: dict[str, list[Record]] = {}
    for record in sorted(records, key=lambda r: not is_model(r)):
        subjects.setdefault(subject(record), []).append(record)
    main = [
        _summary(results, records),
        _overview(subjects),
        _figures([plot for plot in drawn if not plot.subject]),
        *(_section(name, found, [p for p in drawn if p.subject == name], results) for name, found in subjects.items()),
        _notes(missing),
    ]
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{_sha256(SCRIPT)}'"
    title = f"fastconv bench: {results['device']}"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>
{theme()}
{STYLE}
</style>
</head>
<body>
<main>
{"".join(main)}
</main>
<script>{SCRIPT}</script>
</body>
</html>
"""


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _summary(results: Results, records: list[Record]) -> str:
    red, broken = [r for r in records if "red" in r], [r for r in records if r.get("broken")]
    reached, wanted = targets_reached(records)
    tiles = [
        _tile(str(len(records) - len(red)), "cases measured"),
        _tile(f"{reached} of {wanted}", "targets reached", bad=reached < wanted),
        _tile(str(len(red)), "cases red: wrong, so without speed", bad=bool(red)),
        _tile(str(len(broken)), "cases with a rival that failed"),
    ]
    commit = results.get("commit")
    changed = " with changes that are not in it" if results.get("dirty") else ""
    roofs = results.get("roofs") or {}
    rates = [f"copy {si(roofs['copy'], 'B/s')}"] if roofs.get("copy") else []
    rates += [f"matmul {dtype} {si(rate, 'FLOP/s')}" for dtype, rate in roofs.get("matmul", {}).items()]
    facts = {
        "Device": _words(results["device"], results.get("capability") and f"(capability {results['capability']})"),
        "Roofs, measured in the same run": ", ".join(rates),
        "Versions": ", ".join(
            f"{name} {results[name]}"
            for name in ("torch", "triton", "transformers", "python", "cuda")
            if results.get(name)
        ),
        "Date": str(results.get("date") or "").replace("T", " "),
        "Command": results.get("command"),
        "Commit": f"{commit}{changed}" if commit else None,
        "Sources": results.get("code"),
        "Tests": results.get("tests"),
    }
    listed = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(str(v))}</dd></div>" for k, v in facts.items() if v)
    return f"""<header>
<h1>fastconv bench</h1>
<p class="device">{escape(str(results["device"]))}</p>
<div class="tiles">{"".join(tiles)}</div>
<dl>{listed}</dl>
<p class="hint">Times are medians over interleaved rounds, with the quartiles below. A ratio is a rival's time over
fastconv's in the same round: above 1 fastconv is faster. "% of roof" is the time that the nearer roof (copying the
bytes or multiplying matrices) would take, over the measured time. Peak memory is beyond the inputs.</p>
</header>
"""


def _words(*words: Any) -> str:
    return " ".join(str(word) for word in words if word)


def _tile(number: str, what: str, *, bad: bool = False) -> str:
    return f'<div class="tile{" bad" if bad else ""}"><b>{escape(number)}</b><span>{escape(what)}</span></div>'


def _overview(subjects: dict[str, list[Record]]) -> str:
    rows = []
    for name, records in subjects.items():
        green = [r for r in records if "red" not in r]
        reached, wanted = targets_reached(records)
        roof = statistics.median(r["of_roof"] for r in green) if green and all("of_roof" in r for r in green) else None
        firsts = [
            (rival, r["ratios"][rival]["median"]) for r in green for rival in rivals(r)[:1] if rival in r["ratios"]
        ]
        ratios = [ratio for _, ratio in firsts]
        against = ", ".join(dict.fromkeys(rival for rival, _ in firsts))
        middle = statistics.median(ratios) if ratios else None
        over = "-"
        if middle is not None:
            span = f"{ratio_text(min(ratios))} to {ratio_text(max(ratios))}"
            over = f"<b>{ratio_text(middle)}</b><small>{span}, over {escape(against)}</small>"
        wrong = f' <span class="bad">+ {len(records) - len(green)} red</span>' if len(green) < len(records) else ""
        cells: list[Cell] = [
            (None, f'<a href="#{_anchor(name)}">{breakable(name)}</a>'),
            (middle, over),
            (roof, "-" if roof is None else f"{100 * roof:.0f} %"),
            (reached / wanted if wanted else None, f"{reached} of {wanted}" if wanted else "-"),
            (len(green), f"{len(green)}{wrong}"),
        ]
        rows.append(f"<tr>{row_of(cells)}</tr>")
    head = heading(["", "over the first rival", "% of roof", "targets reached", "cases"])
    table = f"<table><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table>"
    return f'<section><h2>Overview</h2><div class="scroll">{table}</div></section>\n{FILTER}'


def _figures(drawn: list[Plot]) -> str:
    if not drawn:
        return ""
    return f'<section><h2>Rooflines</h2><div class="plots">{"".join(map(_figure, drawn))}</div></section>\n'


def _figure(plot: Plot) -> str:
    return f'<figure id="plot-{escape(plot.name)}">{plots.svg(plot)}</figure>\n'


def _notes(missing: list[str]) -> str:
    if not missing:
        return ""
    listed = "".join(f"<li>{escape(words)}</li>" for words in missing)
    return f'<section><h2>Plots left out</h2><ul class="hint">{listed}</ul></section>\n'


def _anchor(name: str) -> str:
    return "of-" + "".join(c if c.isalnum() else "-" for c in name)


def _section(name: str, records: list[Record], drawn: list[Plot], results: Results) -> str:
    maps = [plot for plot in drawn if plot.kind == "heat"]
    # The first map of a direction is against the first rival.
    first: dict[str, Plot] = {}
    for plot in maps:
        first.setdefault(plot.title.split("\n")[0], plot)
    shown = [plot for plot in drawn if plot not in maps or plot in first.values()]
    folded = [plot for plot in drawn if plot not in shown]
    pictures = f'<div class="plots">{"".join(map(_figure, shown))}</div>' if shown else ""
    if folded:
        pictures += (
            f"<details><summary>{len(folded)} more maps, over other rivals</summary>"
            f'<div class="plots">{"".join(map(_figure, folded))}</div></details>'
        )
    table = case_table(records, results)
    if len(records) > _LONG:
        table = f'<details class="cases"><summary>{len(records)} cases</summary>{table}</details>'
    return f'<section id="{_anchor(name)}"><h2>{escape(name)}</h2>{pictures}{table}</section>\n'
