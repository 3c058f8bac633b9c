"""What a record of the results says, for those that show it: the report, the plots, the comparison."""

from __future__ import annotations

from fastconv.bench.results import Record, Results

ROOFS = ("copy", "matmul")  # timed as rivals are, but they compute something else: as many bytes, or operations


def is_model(record: Record) -> bool:
    """Whether it is of a whole model."""
    return record["kind"] == "model"


def subject(record: Record) -> str:
    """What a record is about: an op, or a whole model."""
    return str(record["model"] or "tiny model") if is_model(record) else str(record["op"])


def variant(record: Record) -> str:
    """What a case's name says beside its op, model, batch and dtype: what is fused into the op, its sizes, the head."""
    words = record["case"].split(" ")
    batch = f"{record.get('batch')}x{record.get('length')}"
    for told in (record["direction"], batch, "text" if record.get("lengths") == "text" else "", record["dtype"]):
        if told in words:
            words.remove(told)
    text = " ".join(words).removeprefix(f"{record['op']} ").replace(record["model"] or "\0", "")
    return " ".join(text.split())


def is_own(label: str) -> bool:
    """Whether this library runs under a label."""
    return label.startswith("fastconv")


def rivals(record: Record) -> list[str]:
    """Who else was timed, the first rival first, without ROOFS."""
    return [label for label in record["seconds"] if not is_own(label) and label not in ROOFS]


def peaks(record: Record) -> dict[str, int]:
    """Peak memory by label, where it is known."""
    return {label: size for label, size in record.get("peak_bytes", {}).items() if size is not None}


def goals(record: Record) -> list[tuple[str, float, float | None]]:
    """Name of each ratio that has a target, the target, and what was measured: None where it wasn't."""
    ratios = record.get("ratios", {})
    return [
        (name, goal, ratios[name]["median"] if name in ratios else None)
        for name, goal in record.get("targets", {}).items()
    ]


def origin(results: Results) -> str:
    """Device, versions, date and commit, in one line."""
    versions = [f"{k} {results[k]}" for k in ("torch", "triton", "transformers", "cuda") if results.get(k)]
    commit = f"commit {results['commit'][:10]}" if results.get("commit") else f"sources {results.get('code', '?')}"
    changed = " with changes" if results.get("dirty") else ""
    return " · ".join(
        [str(results["device"]), ", ".join(versions), str(results.get("date", ""))[:10], commit + changed]
    )


def si(value: float, unit: str) -> str:
    """1.23 TB/s, say."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"
