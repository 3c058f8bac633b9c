"""What a verification found, as data."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from fastconv.parity import paths
from fastconv.tolerance import Comparison


@dataclass(frozen=True)
class Row:
    """What was found of one path.

    ours: whether it is this library's, so that it decides
    comparison: with the reference in fp64, over all batches
    seconds: for the timed batches, of each round
    peak_bytes: of tensors during one forward of the largest timed batch, without the model; None where it can't be told
    replaced: how many modules of each class run a fused forward
    """

    path: str
    ours: bool
    comparison: Comparison
    seconds: Sequence[float]
    peak_bytes: int | None
    replaced: Mapping[str, int]

    @property
    def share(self) -> float:
        """The part of what the rule allows that the errors take up; above 1 it is broken."""
        c = self.comparison
        return max(_part(c.max_error, c.max_allowed), _part(c.rms_error, c.rms_allowed)) if c.finite else math.inf

    @property
    def median_seconds(self) -> float:
        """The median round."""
        return statistics.median(self.seconds)

    def speedup(self, other: Row) -> float:
        """How many times faster this is than `other`: the median of the ratios of each round."""
        return statistics.median(theirs / own for own, theirs in zip(self.seconds, other.seconds, strict=True))


@dataclass(frozen=True)
class Verification:
    """The result of `verify`.

    model, class_name, source, parameters: what was run
    dtype: of the weights and activations; device, device_name, ops, threads: on what and how
    shapes: (sequences, tokens of each with padding) of every batch; lengths: without padding; timed: how many of the
        batches, the first, are timed
    notes: what isn't as one might expect
    versions: of what it was made with; date: when, in ISO 8601
    padding_removed: whether the tokens alone are compared, and paths without padding are among the rows
    """

    model: str
    class_name: str
    source: str
    parameters: int
    dtype: str
    device: str
    device_name: str
    ops: str
    threads: int
    shapes: Sequence[tuple[int, ...]]
    lengths: Sequence[Sequence[int]]
    timed: int
    rows: Sequence[Row]
    notes: Sequence[str]
    versions: Mapping[str, str | None]
    date: str
    padding_removed: bool = False

    @property
    def ok(self) -> bool:
        """Whether every path of this library keeps the 2x rule."""
        return all(row.comparison.ok for row in self.rows if row.ours)

    @property
    def reference(self) -> Row:
        """The row that the others are measured by."""
        return self.rows[0]

    @property
    def transformers(self) -> Row | None:
        """The row of transformers as it is; None if it did not run."""
        return next((row for row in self.rows[1:] if not row.ours), None)

    def kept(self, row: Row) -> Row | None:
        """The row of the same path with its padding; None for one that has it."""
        return next((other for other in self.rows if other.path + paths.REMOVED == row.path), None)

    @property
    def tokens(self) -> int:
        """Tokens in the timed batches that are not padding."""
        return sum(map(sum, self.lengths[: self.timed]))

    @property
    def padding(self) -> float:
        """The part of the positions in the timed batches that is padding."""
        return 1 - self.tokens / sum(batch * length for batch, length in self.shapes[: self.timed])

    def tokens_per_second(self, row: Row) -> float:
        """Real tokens, by the median round."""
        return self.tokens / row.median_seconds

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON can hold it: what isn't finite is None."""
        found = {**asdict(self), "ok": self.ok, "tokens": self.tokens, "padding": self.padding}
        found["rows"] = [
            {
                **asdict(row),
                "ok": row.comparison.ok,
                "share_of_allowed": row.share,
                "median_seconds": row.median_seconds,
                "tokens_per_second": self.tokens_per_second(row),
                "vs_reference": row.speedup(self.reference),
                "vs_transformers": None if self.transformers is None else row.speedup(self.transformers),
                "vs_keep": None if (kept := self.kept(row)) is None else row.speedup(kept),
            }
            for row in self.rows
        ]
        return _finite(found)

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Verification:
        """What `to_dict` made of a result, of one in which every number was finite. Raises KeyError for another."""
        rows = [
            Row(**{**_fields(Row, row), "comparison": Comparison(**_fields(Comparison, row["comparison"]))})
            for row in found["rows"]
        ]
        return cls(**{**_fields(cls, found), "rows": rows})


def _fields(cls: Any, found: Mapping[str, Any]) -> dict[str, Any]:
    return {field.name: found[field.name] for field in fields(cls) if field.name in found}


def _part(error: float, allowed: float) -> float:
    return error / allowed if allowed else 0.0 if error == 0 else math.inf


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
