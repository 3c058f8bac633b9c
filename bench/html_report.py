"""The report of one device's results: a single HTML file that asks for nothing else, with plots and every figure.

Not named html.py: scripts in this folder would import it in the place of the standard library's.
"""

from __future__ import annotations

import base64
import hashlib
import os
import statistics
from collections.abc import Callable, Iterable
from html import escape
from pathlib import Path
from typing import Any

from fastconv.bench import plots
from fastconv.bench.plots import COLORS, Plot
from fastconv.bench.records import goals, is_model, is_own, peaks, rivals, si, subject
from fastconv.bench.results import Record, Results, same_state

Cell = tuple[float | None, str]  # what to sort by, and the HTML


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
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{_sha256(_SCRIPT)}'"
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
{_theme()}
{_STYLE}
</style>
</head>
<body>
<main>
{"".join(main)}
</main>
<script>{_SCRIPT}</script>
</body>
</html>
"""


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _reached(records: Iterable[Record]) -> tuple[int, int]:
    """How many targets were reached, of how many. A red case reaches none."""
    found = [ratio is not None and ratio >= goal for record in records for _, goal, ratio in goals(record)]
    return sum(found), len(found)


# The top of the page


def _summary(results: Results, records: list[Record]) -> str:
    red, broken = [r for r in records if "red" in r], [r for r in records if r.get("broken")]
    reached, wanted = _reached(records)
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
        reached, wanted = _reached(records)
        roof = statistics.median(r["of_roof"] for r in green) if green and all("of_roof" in r for r in green) else None
        firsts = [
            (rival, r["ratios"][rival]["median"]) for r in green for rival in rivals(r)[:1] if rival in r["ratios"]
        ]
        ratios = [ratio for _, ratio in firsts]
        against = ", ".join(dict.fromkeys(rival for rival, _ in firsts))
        middle = statistics.median(ratios) if ratios else None
        over = "-"
        if middle is not None:
            span = f"{_ratio(min(ratios))} to {_ratio(max(ratios))}"
            over = f"<b>{_ratio(middle)}</b><small>{span}, over {escape(against)}</small>"
        wrong = f' <span class="bad">+ {len(records) - len(green)} red</span>' if len(green) < len(records) else ""
        cells: list[Cell] = [
            (None, f'<a href="#{_anchor(name)}">{_breakable(name)}</a>'),
            (middle, over),
            (roof, "-" if roof is None else f"{100 * roof:.0f} %"),
            (reached / wanted if wanted else None, f"{reached} of {wanted}" if wanted else "-"),
            (len(green), f"{len(green)}{wrong}"),
        ]
        rows.append(f"<tr>{_row(cells)}</tr>")
    head = _head(["", "over the first rival", "% of roof", "targets reached", "cases"])
    table = f"<table><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table>"
    return f'<section><h2>Overview</h2><div class="scroll">{table}</div></section>\n{_FILTER}'


_FILTER = """<form class="filter" role="search">
<input type="search" placeholder="filter cases: attention 8x512" aria-label="filter cases by words">
<select aria-label="which cases"><option value="">all cases</option><option value="missed">targets missed</option>
<option value="red">red</option><option value="broken">rivals that failed</option></select><output></output>
</form>
"""


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


def _breakable(text: str) -> str:
    """Escaped, and where it has to break it breaks between words."""
    return escape(text).replace("_", "_<wbr>")


def _anchor(name: str) -> str:
    return "of-" + "".join(c if c.isalnum() else "-" for c in name)


# One op or model


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
    return f'<section id="{_anchor(name)}"><h2>{escape(name)}</h2>{pictures}{_table(records, results)}</section>\n'


def _table(records: list[Record], results: Results) -> str:
    green = [r for r in records if "red" not in r]
    columns = [(head, make) for head, make in _columns(green) if any(make(r)[1] for r in green)]
    rows = []
    for record in records:
        reached, wanted = _reached([record])
        marks = [
            *(["red"] if "red" in record else []),
            *(["missed"] if reached < wanted and "red" not in record else []),
            *(["broken"] if record.get("broken") else []),
        ]
        # The heading has named it.
        shown = record["case"].removeprefix(f"{record['op']} ")
        case = f"<th scope=row>{_breakable(shown)} {_badges(record, marks, results)}</th>"
        if "red" in record:
            why = "; ".join(f"{output}: {reason}" for output, reason in record["red"].items())
            rest = f"<td colspan={max(1, len(columns))} class=why><b>No speed.</b> {escape(why)}</td>"
        else:
            rest = _row([make(record) for _, make in columns])
        rows.append(
            f'<tr data-case="{escape(record["case"].lower())}" class="case {" ".join(marks)}">{case}{rest}</tr>'
        )
    head = _head(["case", *(head for head, _ in columns)])
    return f'<div class="scroll"><table><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table></div>'


def _head(names: list[str]) -> str:
    return (
        "<tr>" + "".join(f"<th scope=col><button type=button>{escape(name)}</button></th>" for name in names) + "</tr>"
    )


def _row(cells: list[Cell]) -> str:
    return "".join(
        f"<td>{html}</td>" if value is None else f'<td data-v="{value:.6g}">{html}</td>' for value, html in cells
    )


def _badges(record: Record, marks: list[str], results: Results) -> str:
    words = {"red": "red", "missed": "target missed"}
    found = [f'<span class="badge bad">{words[mark]}</span>' for mark in marks if mark in words]
    if not same_state(record, results):
        found.append('<span class="badge">other code or versions</span>')
    for rival, why in record.get("broken", {}).items():
        found.append(f'<span class="failed">{escape(rival)} failed: {escape(str(why))}</span>')
    return "".join(found)


def _columns(records: list[Record]) -> list[tuple[str, Callable[[Record], Cell]]]:
    """The table's columns after the case, each with what makes its cell; "" where a record has no such figure."""
    timed = dict.fromkeys(label for r in records for label in r["seconds"] if label != "fastconv")
    other = dict.fromkeys(label for r in records for label in r["ratios"] if label not in timed)
    own = [label for label in timed if is_own(label)]
    theirs = [label for label in timed if not is_own(label)]
    return [
        ("tokens/s", lambda r: _labelled(r, "tokens_per_s", 1)),
        ("ms", _milliseconds),
        *((label, lambda r, label=label: _variant(r, label)) for label in own),
        *((f"over {label}", lambda r, label=label: _against(r, label)) for label in theirs),
        *((label, lambda r, label=label: _against(r, label)) for label in other),
        ("% of roof", _of_roof),
        ("GB/s", lambda r: _number(r.get("bytes_per_s"), 1e-9)),
        ("TFLOP/s", lambda r: _number(r.get("flops_per_s"), 1e-12)),
        ("targets", _targets),
        ("graph replay, ms", lambda r: _labelled({"x": _medians(r.get("graph_seconds"))}, "x", 1e3)),
        ("host, us a call", lambda r: _labelled(r, "host_seconds", 1e6)),
        ("peak memory, MB", lambda r: _labelled({"x": peaks(r)}, "x", 1e-6)),
        ("mJ a token", lambda r: _labelled(r, "joules_per_token", 1e3)),
    ]


def _medians(spreads: dict[str, dict[str, float]] | None) -> dict[str, float]:
    return {label: spread["median"] for label, spread in (spreads or {}).items()}


def _digits(value: float) -> str:
    """Three digits that count, and no exponent."""
    if value >= 999.5:
        return f"{value:,.0f}"
    decimals = 2 if value <= 0 else max(0, min(6, 2 - int(f"{value:e}".partition("e")[2])))
    return f"{value:.{decimals}f}"


def _ratio(value: float) -> str:
    return f"{value:.2f}x" if value < 100 else f"{value:,.0f}x"


def _number(value: float | None, scale: float) -> Cell:
    return (None, "") if value is None else (scale * value, _digits(scale * value))


def _spread(spread: dict[str, float], scale: float) -> str:
    return f"{_digits(scale * spread['low'])} to {_digits(scale * spread['high'])}"


def _milliseconds(record: Record) -> Cell:
    spread = record["seconds"]["fastconv"]
    title = escape(f"{record.get('rounds', '?')} rounds, {record.get('date', '')}")
    return (
        1e3 * spread["median"],
        f'<b title="{title}">{_digits(1e3 * spread["median"])}</b><small>{_spread(spread, 1e3)}</small>',
    )


def _variant(record: Record, label: str) -> Cell:
    """Another way of this library's: its time."""
    spread = record["seconds"].get(label)
    if spread is None:
        return None, ""
    return 1e3 * spread["median"], f"{_digits(1e3 * spread['median'])} ms<small>{_spread(spread, 1e3)}</small>"


def _against(record: Record, label: str) -> Cell:
    ratio, seconds = record["ratios"].get(label), record["seconds"].get(label)
    if ratio is None:
        return None, "<span class=failed>failed</span>" if label in record.get("broken", {}) else ""
    text = f"<b>{_ratio(ratio['median'])}</b><small>{ratio['low']:.2f} to {ratio['high']:.2f}</small>"
    if seconds is not None:
        text += f"<small>{_digits(1e3 * seconds['median'])} ms</small>"
    return ratio["median"], text


def _of_roof(record: Record) -> Cell:
    if "of_roof" not in record:
        return None, ""
    return record["of_roof"], f"{100 * record['of_roof']:.0f} %<small>{escape(str(record.get('roof', '')))}</small>"


def _targets(record: Record) -> Cell:
    lines, least = [], None
    for name, goal, ratio in goals(record):
        met = ratio is not None and ratio >= goal
        found = "not measured" if ratio is None else f"{ratio:.2f}x"
        verdict = "reached" if met else "<b class=bad>missed</b>"
        lines.append(f"<div>{escape(name)} {goal:g}x: {found}, {verdict}</div>")
        part = 0.0 if ratio is None else ratio / goal
        least = part if least is None else min(part, least)
    return least, "".join(lines)


def _labelled(record: Record, key: str, scale: float) -> Cell:
    """fastconv's figure, and the others' below."""
    found = record.get(key) or {}
    if not found:
        return None, ""
    own = found.get("fastconv")
    first = "-" if own is None else f"<b>{_digits(scale * own)}</b>"
    rest = "".join(
        f"<small>{escape(label)} {_digits(scale * value)}</small>"
        for label, value in found.items()
        if label != "fastconv"
    )
    return (None if own is None else scale * own), first + rest


# Looks and filters


def _theme() -> str:
    def variables(index: int) -> str:
        return "".join(f"--{name}:{colors[index]};" for name, colors in COLORS.items())

    return f":root{{{variables(0)}}}\n@media (prefers-color-scheme: dark){{:root{{{variables(1)}}}}}"


_STYLE = """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:76rem;margin:0 auto;padding:1.5rem 1rem 4rem}
h1{margin:0;font-size:1.7rem;letter-spacing:-.02em}
h2{margin:2.6rem 0 .8rem;font-size:1.2rem;letter-spacing:-.01em}
a{color:var(--own)}
.device{margin:.1rem 0 1.2rem;color:var(--faint);font-size:1.05rem}
.hint{color:var(--faint);font-size:.85rem;max-width:48rem}
.bad{color:var(--bad)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,9.5rem),1fr));gap:.6rem}
.tile{border:1px solid var(--line);border-radius:.6rem;padding:.7rem .9rem}
.tile b{display:block;font-size:1.5rem;line-height:1.2;font-variant-numeric:tabular-nums}
.tile span{color:var(--faint);font-size:.8rem;line-height:1.3;display:block}
.tile.bad{border-color:var(--bad)}
.tile.bad b{color:var(--bad)}
dl{margin:1.2rem 0;display:grid;gap:.35rem;font-size:.88rem}
dl div{display:grid;grid-template-columns:11rem 1fr;gap:.2rem .8rem}
dt{color:var(--faint)}
dd{margin:0;overflow-wrap:anywhere}
.plots{columns:2 28rem;column-gap:1rem}
figure{margin:0 0 1rem;border:1px solid var(--line);border-radius:.6rem;padding:.5rem;break-inside:avoid;
max-width:44rem}
figure svg{display:block;width:100%;height:auto;overflow:hidden}
details{margin-bottom:1rem}
summary{cursor:pointer;color:var(--own);padding:.3rem 0;font-size:.9rem}
.filter{position:sticky;top:0;z-index:3;display:flex;flex-wrap:wrap;gap:.5rem;align-items:center;padding:.6rem 0;
background:var(--paper);border-bottom:1px solid var(--line);margin-top:1.5rem}
.filter input{flex:1 1 9rem;min-width:0}
.filter input,.filter select{font:inherit;font-size:16px;color:inherit;background:transparent;
border:1px solid var(--line);border-radius:.4rem;padding:.35rem .6rem;max-width:100%}
.filter select option{color:var(--ink);background:var(--paper)}
.filter output{color:var(--faint);font-size:.85rem}
.scroll{overflow:auto;max-height:85vh;border:1px solid var(--line);border-radius:.6rem;
overscroll-behavior-x:contain;isolation:isolate;scroll-margin-top:4rem}
section{scroll-margin-top:3rem}
table{border-collapse:collapse;font-size:.83rem;font-variant-numeric:tabular-nums;width:100%}
th,td{padding:.45rem .7rem;text-align:right;vertical-align:top;border-bottom:1px solid var(--line);white-space:nowrap}
tbody tr:last-child>*{border-bottom:0}
tr>:first-child{text-align:left;position:sticky;left:0;background:var(--paper);white-space:normal;min-width:9.5rem;
max-width:17rem;overflow-wrap:anywhere;font-weight:normal;border-right:1px solid var(--line)}
thead th{color:var(--faint);font-weight:normal;vertical-align:bottom;position:sticky;top:0;
background:var(--paper);z-index:1;border-bottom:0;box-shadow:inset 0 -1px var(--line)}
thead th:first-child{z-index:2}
thead button{font:inherit;color:inherit;background:none;border:0;padding:0;cursor:pointer;text-align:inherit}
th[aria-sort] button{color:var(--ink);font-weight:bold}
th[aria-sort=descending] button::after{content:" \\2193"}
th[aria-sort=ascending] button::after{content:" \\2191"}
small{display:block;color:var(--faint);font-size:.92em;line-height:1.35}
.badge{display:inline-block;border:1px solid currentColor;border-radius:.3rem;padding:0 .35rem;margin-right:.3rem;
font-size:.75rem;white-space:nowrap;color:var(--faint)}
.badge.bad{color:var(--bad)}
.failed{display:block;color:var(--faint);font-size:.78rem;white-space:normal}
tr.red th{border-left:3px solid var(--bad)}
td.why{color:var(--bad);text-align:left;white-space:normal;min-width:14rem;overflow-wrap:anywhere}
@media (max-width:40rem){
main{padding:1rem .75rem 3rem}
dl div{grid-template-columns:1fr;gap:0}
figure{padding:.25rem}
tr>:first-child{min-width:7.5rem;max-width:9rem}
th,td{padding:.4rem .5rem}
}
@media print{.filter{display:none}.scroll{overflow:visible;max-height:none}}
"""

_SCRIPT = """
"use strict";
for (const button of document.querySelectorAll("thead button")) {
  button.addEventListener("click", () => {
    const head = button.parentElement, column = head.cellIndex, table = head.closest("table");
    const down = head.getAttribute("aria-sort") !== "descending";
    for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const rows = [...table.tBodies[0].rows].map((row) => {
      const cell = row.cells[column], value = cell && cell.dataset.v;
      return { row, number: value === undefined ? NaN : Number(value), text: column === 0 ? cell.textContent : "" };
    });
    rows.sort((a, b) => {
      if (column === 0) return (down ? -1 : 1) * a.text.localeCompare(b.text, undefined, { numeric: true });
      if (isNaN(a.number) || isNaN(b.number)) return isNaN(a.number) - isNaN(b.number);
      return (down ? -1 : 1) * (a.number - b.number);
    });
    table.tBodies[0].append(...rows.map((found) => found.row));
  });
}
const form = document.querySelector("form.filter"), cases = document.querySelectorAll("tr.case");
const choose = () => {
  const words = form.querySelector("input").value.toLowerCase().split(/\\s+/).filter(Boolean);
  const kind = form.querySelector("select").value;
  let shown = 0;
  for (const row of cases) {
    const fits = words.every((word) => row.dataset.case.includes(word)) && (!kind || row.classList.contains(kind));
    row.hidden = !fits;
    shown += fits;
  }
  form.querySelector("output").textContent = shown === cases.length ? "" : shown + " of " + cases.length + " cases";
};
form.addEventListener("input", choose);
form.addEventListener("submit", (event) => event.preventDefault());
"""
