"""Results of a card that doesn't exist, in the form that the benchmarks write: for tests of what reads them."""

from __future__ import annotations

from typing import Any

import torch

from fastconv.bench.cases import cases
from fastconv.bench.run import _identity

COPY, MATMUL = 3.0e12, {"bfloat16": 6.0e14, "float32": 4.0e13}
# op -> bytes and operations a token and channel of its forward, and how many times slower its rivals are
_OPS = {
    "layer_norm": (4, 9, {"torch": 1.9, "torch compile": 1.05}),
    "masked_attention": (8, 900, {"HF": 3.1, "SDPA flash": 0.94}),
    "span_dynamic_conv": (5, 70, {"HF": 11.0, "torch compile": 3.0}),
}
_CHANNELS = {"ConvBERT base": 768, "BERT base": 768}
SHAPES = ((1, 32), (1, 128), (1, 512), (8, 128), (8, 512), (64, 32), (64, 512))
_ORIGIN = {"code": "0123456789abcdef", "torch": "2.13.0", "triton": "3.7.1", "commit": "c0ffee" * 6 + "beef",
           "dirty": False, "transformers": "5.23.0", "command": "fastconv bench"}  # fmt: skip


def _spread(seconds: float) -> dict[str, float]:
    return {"median": seconds, "low": 0.98 * seconds, "high": 1.03 * seconds}


def _timed(own: float, rivals: dict[str, float], cuda: bool) -> dict[str, Any]:
    seconds = {"fastconv": own, **{label: own * slower for label, slower in rivals.items()}}
    found: dict[str, Any] = {
        "seconds": {label: _spread(t) for label, t in seconds.items()},
        "ratios": {label: _spread(t / own) for label, t in seconds.items() if label != "fastconv"},
        "rounds": 25,
        "date": "2026-11-20T12:00:00+00:00",
        **_ORIGIN,
    }
    if cuda:
        for kind, times in (
            ("host", {label: 11e-6 * (1 if label == "fastconv" else 2.5) for label in seconds}),
            ("graph", {label: 0.8 * t for label, t in seconds.items()}),
        ):
            found[f"{kind}_seconds"] = {label: _spread(t) for label, t in times.items()}
            found[f"{kind}_ratios"] = {
                label: _spread(t / times["fastconv"]) for label, t in times.items() if label != "fastconv"
            }
        found["uncaptured"] = {}
    return found


def _roofs(bytes_: float, flops: float, dtype: str, seconds: float) -> dict[str, Any]:
    least = {"copy": bytes_ / COPY, "matmul": flops / MATMUL[dtype]}
    roof = max(least, key=lambda name: least[name])
    return {
        "bytes": int(bytes_),
        "flops": int(flops),
        "bytes_per_s": bytes_ / seconds,
        "flops_per_s": flops / seconds,
        "roof": roof,
        "of_roof": least[roof] / seconds,
    }


def op_record(op: str, model: str, direction: str, batch: int, length: int, dtype: str = "bfloat16", cuda: bool = True):
    """A record of an op, as measured on the card."""
    bytes_, flops, rivals = _OPS[op]
    size = batch * length * _CHANNELS[model] * (2.2 if direction == "step" else 1)
    least = max(size * bytes_ / COPY, size * flops / MATMUL[dtype])
    own = 3e-6 + least / 0.85
    slower = {label: 1 + (times - 1) * min(1.0, 0.3 + batch * length / 4096) for label, times in rivals.items()}
    return {
        "case": f"{op} {direction} {model} {batch}x{length} {dtype}",
        "kind": "op", "op": op, "direction": direction, "model": model, "batch": batch, "length": length,
        "tokens": batch * length, "lengths": "full", "dtype": dtype,
        **_timed(own, {**slower, "copy": 0.9}, cuda),
        **_roofs(size * bytes_, size * flops, dtype, own),
        "peak_bytes": {"fastconv": int(2 * size), **{label: int(2 * size * t) for label, t in slower.items()}},
        "targets": {next(iter(rivals)): 1.5, "copy": 0.85},
    }  # fmt: skip


def model_record(model: str, direction: str, batch: int, length: int, lengths: str = "full", cuda: bool = True):
    """A record of a whole model, as measured on the card."""
    dtype, tokens = "bfloat16", batch * length if lengths == "full" else int(0.6 * batch * length)
    flops = 3.4e8 * tokens * (3 if direction == "step" else 1)
    own = 4e-4 + flops / MATMUL[dtype] / 0.6
    rivals = {
        "fastconv remove": 0.66 if lengths == "text" else 1.0,
        "HF": 2.4,
        "HF compile": 1.25,
        "reference": 2.5,
        "matmul": 0.6,
    }
    if cuda:
        rivals = {"fastconv graphs": 0.7, **rivals}
    timed = _timed(own, rivals, False)
    timed["ratios"]["HF / fastconv remove"] = _spread(rivals["HF"] / rivals["fastconv remove"])
    timed["ratios"]["HF memory"] = {"median": 3.33, "low": 3.33, "high": 3.33}
    energy = {"joules_per_token": {"fastconv": 4.1e-4, "HF": 9.3e-4}} if cuda else {}
    return {
        "case": f"model {direction} {model} {batch}x{length}{' text' if lengths == 'text' else ''} {dtype}",
        "kind": "model", "op": "model", "direction": direction, "model": model, "batch": batch, "length": length,
        "tokens": tokens, "lengths": lengths, "dtype": dtype,
        **timed,
        **_roofs(45e3 * 12 * tokens, flops, dtype, own),
        "tokens_per_s": {label: tokens / t["median"] for label, t in timed["seconds"].items()},
        "peak_bytes": {"fastconv": 9000 * tokens, "HF": 30000 * tokens},
        "targets": {"HF": 1.8, "HF compile": 1.3, "HF / fastconv remove": 3.0, "HF memory": 2.5},
        **energy,
    }  # fmt: skip


def full_plan() -> dict[str, Any]:
    """Every case that is measured on a GPU; each rival twice as slow as fastconv."""
    device = torch.device("cuda")
    found = {}
    for case in cases(device):
        rivals = dict.fromkeys(case.labels(device)[1:], 2.0)
        identity = _identity(case)
        record = {
            **identity,
            **_timed(1e-4, rivals, True),
            "bytes_per_s": 1e12, "flops_per_s": 1e14, "roof": "copy", "of_roof": 0.5,
            "peak_bytes": dict.fromkeys(("fastconv", *rivals), identity["bytes"]),
            "targets": case.targets,
        }  # fmt: skip
        if record["kind"] == "model":
            record["tokens_per_s"] = dict.fromkeys(("fastconv", *rivals), record["tokens"] / 1e-4)
        found[case.name] = record
    return {**made_results(), "records": found}


def made_results(*, cuda: bool = True) -> dict[str, Any]:
    """Ops and models on the shapes of SHAPES; one case red, one rival broken, rivals that are not everywhere."""
    records = [
        op_record(op, model, direction, batch, length, cuda=cuda)
        for op in _OPS
        for direction in ("infer", "step")
        for model in _CHANNELS
        for batch, length in SHAPES
        if op != "span_dynamic_conv" or model.startswith("ConvBERT")
    ]
    records += [op_record("layer_norm", "BERT base", "infer", 8, 512, "float32", cuda)]
    records += [
        model_record("ConvBERT base", direction, batch, length, lengths, cuda)
        for direction in ("infer", "step")
        for batch, length, lengths in ((1, 128, "full"), (1, 512, "full"), (32, 512, "full"), (32, 512, "text"))
    ]
    found = {record["case"]: record for record in records}
    wrong = found["masked_attention step BERT base 8x512 bfloat16"]
    timed = ("seconds", "ratios", "host_seconds", "host_ratios", "graph_seconds", "graph_ratios")
    for key in (*timed, "bytes_per_s", "flops_per_s", "of_roof", "peak_bytes", "uncaptured"):
        wrong.pop(key, None)
    wrong["red"] = {"dq": "max error 3.1e-01, allowed 2.0e-03", "dk": "max error nan, allowed 2.0e-03"}
    broken = found["layer_norm infer BERT base 8x512 bfloat16"]
    for key in (*timed, "peak_bytes"):
        broken.get(key, {}).pop("torch compile", None)
    broken["broken"] = {"torch compile": "RuntimeError: no compiler"}
    return {
        "schema": 1,
        "device": "Made-up GPU" if cuda else "Made-up CPU, 2 threads",
        "capability": "9.0" if cuda else None,
        "python": "3.11.2",
        "cuda": "12.9" if cuda else None,
        **_ORIGIN,
        "date": "2026-11-20T12:00:00+00:00",
        "roofs": {"copy": COPY, "matmul": MATMUL},
        "records": found,
    }
