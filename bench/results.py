"""The results file: JSON that is written after every case, read again to go on, compared and drawn."""

from __future__ import annotations

import csv
import hashlib
import json
import os
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
    for name, record in records.items():
        if not isinstance(record, dict) or record.get("case") != name:
            return f"the record of {name!r} must be an object of that case"
        if "red" not in record and "fastconv" not in _part(record, "seconds"):
            return f"the record of {name!r} has neither seconds of fastconv nor why there are none"
    return None


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


def resume(path: str | os.PathLike, origin: Results, *, keep_old: bool) -> Results:
    """The results to go on with: of the file if there is one, under the present origin.

    origin: what `provenance` says
    keep_old: with the records of other code and versions, until they are measured again

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
    if not keep_old:
        found["records"] = {name: r for name, r in found["records"].items() if same_state(r, origin)}
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
        row["graph_seconds"] = _part(record, "graph_seconds").get(label, {}).get("median")
        for key in ("host_seconds", "peak_bytes", "tokens_per_s", "joules_per_token"):
            row[key] = _part(record, key).get(label)
        rows.append(row)
    return rows + [{**shared, "label": label, "failed": why} for label, why in _part(record, "broken").items()]


def _columns(name: str, spread: dict[str, float] | None) -> dict[str, float]:
    if spread is None:
        return {}
    return {name: spread["median"], f"{name}_low": spread["low"], f"{name}_high": spread["high"]}
