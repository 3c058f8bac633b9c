"""The result of `verify` as text."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

from fastconv.parity.results import Row, Verification

HEADER = (
    "path",
    "max error",
    "rms error",
    "of allowed",
    "tokens/s",
    "vs reference",
    "vs transformers",
    "peak MB",
)
# Of the path of a folder that is longer only the end is shown.
_LONGEST_NAME = 45


def cells(result: Verification) -> list[tuple[str, ...]]:
    """The rows of the table, in the columns of HEADER."""
    return [
        (
            row.path,
            f"{row.comparison.max_error:.1e}",
            f"{row.comparison.rms_error:.1e}",
            "-" if row is result.reference else share(row),
            f"{result.tokens_per_second(row):,.0f}",
            f"{row.speedup(result.reference):.2f}x",
            "-" if result.transformers is None else f"{row.speedup(result.transformers):.2f}x",
            "-" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:,.1f}",
        )
        for row in result.rows
    ]


def share(row: Row) -> str:
    """How much of the allowed error a row has, in words that stand out where it is too much."""
    if math.isinf(row.share) or math.isnan(row.share):
        return "not finite" if not row.comparison.finite else "exceeded"
    return f"{100 * row.share:.0f} %" + ("" if row.comparison.ok else " !")


def title(result: Verification) -> str:
    """What was run, in one line."""
    name = result.model
    if len(name) > _LONGEST_NAME:
        name = os.path.join("...", *Path(name).parts[-2:])
    return f"{name}: {result.class_name}, {result.source}, {result.parameters / 1e6:.2f} M parameters, {result.dtype}"


def context(result: Verification) -> list[str]:
    """On what it ran, and how it was measured, in a few lines."""
    timed = result.shapes[: result.timed]
    sequences = timed[0][0]
    longest, lengths = max(length for _, length in timed), [n for row in result.lengths[: result.timed] for n in row]
    across = f"{longest}" if min(lengths) == longest else f"{min(lengths)} to {longest}"
    padding = f"{100 * result.padding:.0f} % padding, not counted as tokens" if result.padding else "no padding"
    versions = ", ".join(f"{name} {result.versions[name]}" for name in ("torch", "transformers", "triton"))
    threads = f", {result.threads} threads" if result.device == "cpu" else ""
    measured = "PyTorch's allocator" if result.device.startswith("cuda") else "PyTorch's profiler"
    of_what = "of tokens, " if result.padding_removed else ""
    return [
        f"{result.device_name}{threads}; {result.ops}; {versions.replace('None', '-')}",
        f"speed: {_times(result.timed, 'batch', 'batches')} of {sequences} x {across} tokens, "
        f"{padding}; medians of {_times(len(result.rows[0].seconds), 'interleaved round', 'interleaved rounds')}, "
        "ratios too",
        f"errors: {of_what}against the reference in float64, over {_times(len(result.shapes), 'batch', 'batches')}; "
        "allowed: twice the reference's own + one rounding",
        f"peak MB: tensors of the largest batch's forward without the weights, by {measured}",
    ]


def replaced(row: Row) -> str:
    """What runs a fused forward, in one line; "" if nothing does."""
    return ", ".join(f"{number} {name}" for name, number in row.replaced.items())


def verdict(result: Verification) -> str:
    """PASS or FAIL, and of what."""
    if result.ok:
        return "PASS: every path of fastconv keeps the 2x rule"
    wrong = [row for row in result.rows if row.ours and not row.comparison.ok]
    return "FAIL: " + "; ".join(f"{row.path}: {row.comparison}" for row in wrong)


def render(result: Verification) -> str:
    """The whole report."""
    lines = [title(result), *context(result), ""]
    lines += aligned([HEADER, *cells(result)])
    lines += [
        f"{row.path}: {row.speedup(kept):.2f}x of {kept.path}"
        for row in result.rows
        if (kept := result.kept(row)) is not None
    ]
    lines += [""] + [f"{row.path} replaced {replaced(row)}" for row in result.rows if row.replaced]
    lines += [f"note: {note}" for note in result.notes]
    return "\n".join([*lines, verdict(result)])


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The rows as lines, in columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def _times(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"
