"""The results file: JSON that is written after every case, read again to go on, compared and drawn."""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SCHEMA = 1
# What a figure holds for; a record of others is measured again.
VERSIONS = ("code", "torch", "triton", "transformers")

Record = dict[str, Any]
Results = dict[str, Any]

_EXPECTED = "expected a file that `fastconv bench` wrote"
_COLUMNS = (
    *("case", "kind", "op", "model", "direction", "batch", "length", "tokens", "lengths", "dtype", "bytes", "flops"),
    *("label", "seconds", "seconds_low", "seconds_high", "ratio", "ratio_low", "ratio_high"),
    *("bytes_per_s", "flops_per_s", "roof", "of_roof", "host_seconds", "graph_seconds", "peak_bytes"),
    *("tokens_per_s", "joules_per_token", "rounds", "date", "code", "failed"),
)


class ResultsError(ValueError):
    """A file that holds no results, or not those that are wanted."""


def load(path: str | os.PathLike) -> Results:
    """The results in a file.

    Raises: ResultsError, with what was found, for a file that can't be read or holds something else.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ResultsError(f"can't read {str(path)!r}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ResultsError(f"{str(path)!r} is not JSON ({error}); {_EXPECTED}") from error
    if not isinstance(found, dict) or not {"schema", "records"} & set(found):
        raise ResultsError(f"{str(path)!r} holds no results; {_EXPECTED}")
    if found.get("schema") != SCHEMA:
        raise ResultsError(
            f"{str(path)!r} has schema {found.get('schema')!r}, expected {SCHEMA}: another version of fastconv wrote "
            "it; measure again, into another file"
        )
    wrong = _wrong(found)
    if wrong:
        raise ResultsError(f"{str(path)!r} is damaged: {wrong}")
    return found


def _wrong(results: Results) -> str | None:
    records = results.get("records")
    if not isinstance(records, dict):
        return f"records must be an object by case, got {type(records).__name__}"
    for key in ("device", "torch", "code"):
        if not isinstance(results.get(key), str):
            return f"{key} must be a string, got {results.get(key)!r}"
    roofs = results.get("roofs", {"copy": 0.0, "matmul": {}})
    if not isinstance(roofs, dict) or not _number(roofs.get("copy")) or not _each(roofs.get("matmul"), _number):
        return f"roofs must be rates of copy and, by dtype, of matmul, got {str(roofs)[:100]}"
    for name, record in records.items():
        if not isinstance(record, dict) or record.get("case") != name:
            return f"the record of {name!r} must be an object of that case"
        if "red" not in record and "fastconv" not in _part(record, "seconds"):
            return f"the record of {name!r} has neither seconds of fastconv nor why there are none"
        wrong = next((field for field, right in _fields(record) if not right), None)
        if wrong is not None:
            return f"the record of {name!r} has {wrong} {str(record.get(wrong))[:100]}"
    return None


def _fields(record: Record) -> Iterator[tuple[str, bool]]:
    """What those who show a record read of it, and whether it is there as they expect it."""
    for key in ("kind", "op", "direction", "dtype"):
        yield key, isinstance(record.get(key), str)
    yield "model", isinstance(record.get("model", 0), str | None)
    for key in ("red", "broken", "uncaptured"):
        yield key, isinstance(record.get(key, {}), dict)
    if "red" in record:
        return
    for key in ("bytes", "flops", "bytes_per_s", "flops_per_s", "of_roof"):
        yield key, _number(record.get(key))
    yield "roof", isinstance(record.get("roof"), str)
    for key in ("seconds", "ratios"):
        yield key, _each(record.get(key), _spread)
    for key in ("graph_seconds", "graph_ratios", "host_seconds", "host_ratios"):
        yield key, _each(record.get(key, {}), _spread)
    for key in ("targets", "joules_per_token"):
        yield key, _each(record.get(key, {}), _number)
    yield "peak_bytes", _each(record.get("peak_bytes", {}), lambda value: value is None or _number(value))
    if record["kind"] == "model":
        # Every other way's ratio is shown beside its time.
        yield "ratios", record["seconds"].keys() <= {"fastconv", *record["ratios"]}
        yield "tokens_per_s", _each(record.get("tokens_per_s"), _number)


def _each(value: Any, right: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and all(map(right, value.values()))


def _number(value: Any) -> bool:
    return isinstance(value, int | float)


def _spread(value: Any) -> bool:
    return isinstance(value, dict) and all(_number(value.get(key)) for key in ("median", "low", "high"))


def _part(record: Record, key: str) -> dict[str, Any]:
    value = record.get(key)
    return value if isinstance(value, dict) else {}


def digest(results: Results) -> str:
    """A hash of the records: the same figures, the same hash."""
    return hashlib.sha256(json.dumps(results["records"], sort_keys=True).encode()).hexdigest()[:16]


def save(path: str | os.PathLike, results: Results) -> None:
    """Write the results. Whoever is killed meanwhile leaves the old file or the new one, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    part.replace(path)


def same_state(record: Record, origin: Results) -> bool:
    """Whether a record is of the code and the versions of `origin`."""
    return all(record.get(key) == origin.get(key) for key in VERSIONS)


def measured(record: Record, origin: Results) -> bool:
    """Whether it needn't be measured again."""
    return "red" not in record and same_state(record, origin)


def new(origin: Results) -> Results:
    """Results without records; origin: what `provenance` says."""
    return {"schema": SCHEMA, **origin, "records": {}}


def resume(path: str | os.PathLike, origin: Results) -> Results:
    """The results to go on with: of the file if there is one, under the present origin.

    Records of other code and versions stay until they are measured again.

    origin: what `provenance` says

    Raises: ResultsError for a file that holds something else, or the results of another device.
    """
    empty = new(origin)
    if not os.path.exists(path):
        return empty
    found = load(path)
    if found["device"] != origin["device"]:
        raise ResultsError(
            f"{str(path)!r} holds results of {found['device']}, and this is {origin['device']}: name another file"
        )
    return {**found, **empty, "records": found["records"]}


def write_csv(results: Results, path: str | os.PathLike) -> None:
    """A row for each case and label: "fastconv" and every rival, those that failed too."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        rows = csv.DictWriter(file, _COLUMNS, extrasaction="ignore", lineterminator="\n")
        rows.writeheader()
        for record in results["records"].values():
            rows.writerows(_rows(record))


def _rows(record: Record) -> list[dict[str, Any]]:
    if "red" in record:
        return [{**record, "label": "fastconv", "failed": "; ".join(f"{k}: {why}" for k, why in record["red"].items())}]
    of_fastconv = ("bytes_per_s", "flops_per_s", "roof", "of_roof")
    shared = {key: value for key, value in record.items() if key not in of_fastconv and not isinstance(value, dict)}
    rows = []
    for label, seconds in record["seconds"].items():
        row = {**shared, "label": label, **_columns("seconds", seconds)}
        row |= _columns("ratio", _part(record, "ratios").get(label))
        if label == "fastconv":
            row |= {key: record.get(key) for key in of_fastconv}
        for key in ("graph_seconds", "host_seconds"):
            row[key] = _part(record, key).get(label, {}).get("median")
        for key in ("peak_bytes", "tokens_per_s", "joules_per_token"):
            row[key] = _part(record, key).get(label)
        rows.append(row)
    return rows + [{**shared, "label": label, "failed": why} for label, why in _part(record, "broken").items()]


def _columns(name: str, spread: dict[str, float] | None) -> dict[str, float]:
    if spread is None:
        return {}
    return {name: spread["median"], f"{name}_low": spread["low"], f"{name}_high": spread["high"]}
