"""The HTML report's tables: every figure of a case in a row, with what to sort it by."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from html import escape

from fastconv.bench.records import goals, is_own, peaks
from fastconv.bench.results import Record, Results, same_state

Cell = tuple[float | None, str]  # what to sort by, and the HTML


def case_table(records: list[Record], results: Results) -> str:
    """A row for each case; columns that none has a figure for are left out."""
    green = [r for r in records if "red" not in r]
    columns = [(head, make) for head, make in _columns(green) if any(make(r)[1] for r in green)]
    rows = []
    for record in records:
        reached, wanted = targets_reached([record])
        marks = [
            *(["red"] if "red" in record else []),
            *(["missed"] if reached < wanted and "red" not in record else []),
            *(["broken"] if record.get("broken") else []),
        ]
        # The heading has named it.
        shown = record["case"].removeprefix(f"{record['op']} ")
        case = f"<th scope=row>{breakable(shown)} {_badges(record, marks, results)}</th>"
        if "red" in record:
            why = "; ".join(f"{output}: {reason}" for output, reason in record["red"].items())
            rest = f"<td colspan={max(1, len(columns))} class=why><b>No speed.</b> {escape(why)}</td>"
        else:
            rest = row_of([make(record) for _, make in columns])
        rows.append(
            f'<tr data-case="{escape(record["case"].lower())}" class="{" ".join(["case", *marks])}">{case}{rest}</tr>'
        )
    head = heading(["case", *(head for head, _ in columns)])
    return f'<div class="scroll"><table><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table></div>'


def heading(names: list[str]) -> str:
    """A row of headings, each a button to sort by."""
    return (
        "<tr>" + "".join(f"<th scope=col><button type=button>{escape(name)}</button></th>" for name in names) + "</tr>"
    )


def row_of(cells: list[Cell]) -> str:
    """The cells of a row."""
    return "".join(
        f"<td>{html}</td>" if value is None else f'<td data-v="{value:.6g}">{html}</td>' for value, html in cells
    )


def _badges(record: Record, marks: list[str], results: Results) -> str:
    told = {"red": "red", "missed": "target missed"}
    found = [f'<span class="badge bad">{told[mark]}</span>' for mark in marks if mark in told]
    if not same_state(record, results):
        found.append('<span class="badge">other code or versions</span>')
    for key, words in (("broken", "failed"), ("uncaptured", "has no CUDA graph")):
        for label, why in record.get(key, {}).items():
            found.append(f'<span class="failed">{escape(label)} {words}: {escape(str(why))}</span>')
    return "".join(found)


def _columns(records: list[Record]) -> list[tuple[str, Callable[[Record], Cell]]]:
    """The table's columns after the case, each with what makes its cell; "" where a record has no such figure."""
    timed = dict.fromkeys(label for r in records for label in r["seconds"] if label != "fastconv")
    other = dict.fromkeys(label for r in records for label in r["ratios"] if label not in timed)
    own = [label for label in timed if is_own(label)]
    theirs = [label for label in timed if not is_own(label)]
    return [
        ("tokens/s", lambda r: _labelled(r.get("tokens_per_s"), 1)),
        ("ms", _milliseconds),
        *((label, lambda r, label=label: _variant(r, label)) for label in own),
        *((f"over {label}", lambda r, label=label: _against(r, label)) for label in theirs),
        *((label, lambda r, label=label: _against(r, label)) for label in other),
        ("% of roof", _of_roof),
        ("GB/s", lambda r: _number(r.get("bytes_per_s"), 1e-9)),
        ("TFLOP/s", lambda r: _number(r.get("flops_per_s"), 1e-12)),
        ("targets", _targets),
        ("graph replay, ms", lambda r: _labelled(_medians(r.get("graph_seconds")), 1e3)),
        ("host, us a call", lambda r: _labelled(_medians(r.get("host_seconds")), 1e6)),
        ("peak memory, MB", lambda r: _labelled(peaks(r), 1e-6)),
        ("mJ a token", lambda r: _labelled(r.get("joules_per_token"), 1e3)),
    ]


def _medians(spreads: dict[str, dict[str, float]] | None) -> dict[str, float]:
    return {label: spread["median"] for label, spread in (spreads or {}).items()}


def _digits(value: float) -> str:
    """Three digits that count, and no exponent."""
    if value >= 999.5:
        return f"{value:,.0f}"
    decimals = 2 if value <= 0 else max(0, min(6, 2 - int(f"{value:e}".partition("e")[2])))
    return f"{value:.{decimals}f}"


def ratio_text(value: float) -> str:
    """1.23x, say."""
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
        f'<b title="{title}">{_digits(1e3 * spread["median"])}</b>{_below([_spread(spread, 1e3)])}',
    )


def _variant(record: Record, label: str) -> Cell:
    """Another way of this library's: its time."""
    spread = record["seconds"].get(label)
    if spread is None:
        return None, ""
    return 1e3 * spread["median"], f"{_digits(1e3 * spread['median'])} ms{_below([_spread(spread, 1e3)])}"


def _against(record: Record, label: str) -> Cell:
    ratio, seconds = record["ratios"].get(label), record["seconds"].get(label)
    if ratio is None:
        return None, "<span class=failed>failed</span>" if label in record.get("broken", {}) else ""
    lines = [f"{ratio['low']:.2f} to {ratio['high']:.2f}"]
    if seconds is not None:
        lines.append(f"{_digits(1e3 * seconds['median'])} ms")
    return ratio["median"], f"<b>{ratio_text(ratio['median'])}</b>{_below(lines)}"


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


def _labelled(found: Mapping[str, float] | None, scale: float) -> Cell:
    """fastconv's figure, and the others' below."""
    if not found:
        return None, ""
    own = found.get("fastconv")
    first = "-" if own is None else f"<b>{_digits(scale * own)}</b>"
    rest = [f"{escape(label)} {_digits(scale * value)}" for label, value in found.items() if label != "fastconv"]
    return (None if own is None else scale * own), first + _below(rest)


def _below(lines: list[str]) -> str:
    """Small lines of HTML below a cell's figure; one element, since a report has tens of thousands of cells."""
    return f"<small>{'<br>'.join(lines)}</small>" if lines else ""


def targets_reached(records: Iterable[Record]) -> tuple[int, int]:
    """How many targets were reached, of how many. A red case reaches none."""
    found = [ratio is not None and ratio >= goal for record in records for _, goal, ratio in goals(record)]
    return sum(found), len(found)


def breakable(text: str) -> str:
    """Escaped, and where it has to break it breaks between words."""
    return escape(text).replace("_", "_<wbr>")
