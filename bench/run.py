"""Measures cases: each checked, then timed with its rivals in one process, interleaved.

A case is checked before it is timed: where a result doesn't keep the 2x rule against the reference in fp64, or the case
raises, its record has no figures; one that is too large for the device has no record. On a CPU the ops run their native
formulation, never Triton's interpreter. Ratios are of the rounds (rival's time / fastconv's time) and hold on any
machine; times mean something on an idle one only. "copy" is a plain copy that moves as many bytes as the op has to, in
the same run.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
import torch._functorch.config

from fastconv import backend
from fastconv.bench import timing
from fastconv.bench.case import Case
from fastconv.bench.energy import joules
from fastconv.bench.provenance import now
from fastconv.bench.records import ROOFS, is_own
from fastconv.bench.results import Record
from fastconv.bench.roofs import Roofs, product
from fastconv.bench.timing import Run
from fastconv.parity.measure import peak_bytes
from fastconv.recorder import Recorder
from fastconv.tolerance import exact_convolutions

# Ways of our own that need more than fastconv: a compiler, a model that can be recorded.
_MAY_FAIL = ("fastconv compile", "fastconv graphs")


class Progress(Protocol):
    """What a run tells."""

    def start(self, case: Case, done: int, total: int, seconds_left: float | None) -> None:
        """A case begins; so many of all are done, and the rest takes about so long (None: nobody knows yet)."""

    def finish(self, record: Record) -> None:
        """It is measured, or too large."""


def _is_op(case: Case) -> bool:
    return case.subject.op != "model"


def run(
    cases: Sequence[Case],
    device: torch.device,
    roofs: Roofs,
    progress: Progress,
    *,
    rounds: int | None = None,
    compiled: bool,
    deadline: float | None = None,
) -> Iterator[Record]:
    """Measure the cases in the order given; yields each one's record.

    Of a case that is too large for the device's memory it says why, "too_large", and nothing else.

    rounds: None is enough for a steady median
    compiled: with torch.compile of the first rivals
    deadline: by time.monotonic(); a case that wouldn't be done by then, as far as one can tell, is left out
    """
    took: dict[tuple, list[float]] = {}  # seconds of the cases so far, by what they are of
    for done, case in enumerate(cases):
        if deadline is not None and time.monotonic() + _expected(case, took) > deadline:
            continue
        rest = sum(_expected(other, took) for other in cases[done:]) if took else None
        if rest is not None and deadline is not None:
            rest = min(rest, deadline - time.monotonic())
        progress.start(case, done, len(cases), rest)
        start = time.monotonic()
        record = _record(case, device, roofs, rounds=rounds, compiled=compiled)
        took.setdefault(_alike(case), []).append(time.monotonic() - start)
        progress.finish(record)
        yield record


def _alike(case: Case) -> tuple:
    return case.subject.op, case.subject.model, case.dtype


def _expected(case: Case, took: dict[tuple, list[float]]) -> float:
    """Seconds: as long as the longest of its kind, or as long as the average case."""
    if own := took.get(_alike(case)):
        return max(own)
    every = [seconds for of_kind in took.values() for seconds in of_kind]
    return sum(every) / len(every) if every else 0.0


def _record(case: Case, device: torch.device, roofs: Roofs, *, rounds: int | None, compiled: bool) -> Record:
    try:
        record = run_case(case, device, roofs, rounds=rounds, compiled=compiled)
    except torch.OutOfMemoryError as error:
        record = {"case": case.name, "too_large": _told(error)}
    except Exception as error:  # of hundreds of cases one that fails is no reason to lose the others
        record = _identity(case) | {"red": {"raised": _told(error)}}
    if not _is_op(case):  # models are full of cycles; for each op's tensors looking for them would take too long
        gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return record | {"date": now()}


def run_case(case: Case, device: torch.device, roofs: Roofs, *, rounds: int | None, compiled: bool) -> Record:
    """The case's record: parity, and if that is green its times, ratios and rates."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(backend("auto" if device.type == "cuda" else "native"))
        # A compiled backward that reuses its inputs' memory could run only once.
        stack.enter_context(torch._functorch.config.patch(donated_buffer=False))
        with exact_convolutions(device):
            red = {name: str(result) for name, result in case.parity(device).items() if not result.ok}
        if red:
            return _identity(case) | {"red": red}
        recorder = None
        if device.type == "cuda":
            # All on the stream that captures: a backward runs on its forward's stream.
            recorder = _recorder(torch.empty(0, device=device).device)
            recorder.stream.wait_stream(torch.cuda.current_stream(device))
            stack.enter_context(torch.cuda.stream(recorder.stream))
        return _identity(case) | _figures(case, device, roofs, recorder, rounds=rounds, compiled=compiled)


@functools.cache
def _recorder(device: torch.device) -> Recorder:
    # One for all cases: cuBLAS keeps a workspace for every stream.
    return Recorder(device)


def _identity(case: Case) -> Record:
    subject = case.subject
    return {
        "case": case.name,
        "kind": "op" if _is_op(case) else "model",
        "op": subject.op,
        "direction": case.direction,
        "model": subject.model,
        "batch": subject.batch,
        "length": subject.length,
        "tokens": subject.tokens,
        "lengths": subject.lengths,
        "dtype": str(case.dtype).removeprefix("torch."),
        "bytes": case.bytes(),
        "flops": case.flops(),
    }


def _figures(
    case: Case, device: torch.device, roofs: Roofs, recorder: Recorder | None, *, rounds: int | None, compiled: bool
) -> Record:
    runs = case.runs(device, compiled=compiled)
    runs, broken = _working(runs)
    dtype = str(case.dtype).removeprefix("torch.")
    if device.type == "cpu" and dtype in roofs.matmul:
        runs[_PRODUCT] = product(_SIZE, case.dtype, device)
    if _is_op(case):
        runs["copy"] = _copy(case.bytes(), device)
    # Each has run once. torch.compile's mode for latency records at its second call.
    # Of a model eager latency is meant, with what Python takes where it is slower than the GPU.
    warmup = 2 if device.type == "cuda" else 1
    times = timing.interleaved(runs, device, rounds=rounds, warmup=warmup, hides_host=_is_op(case))
    if runs.pop(_PRODUCT, None):
        roofs = _of_these_rounds(roofs, case, times)
    own = timing.spread(times["fastconv"])
    measurable = [label for label in runs if label != "copy" and not case.replays(label, device)]
    peaks = {label: peak_bytes(runs[label], device) for label in measurable}
    targets = case.targets if device.type == "cuda" else case.cpu_targets
    roof, seconds = roofs.nearer(case.bytes(), case.flops(), dtype)
    record: Record = {
        "seconds": _spreads(times),
        "ratios": _ratios(targets, times, peaks),
        "bytes_per_s": case.bytes() / own["median"],
        "flops_per_s": case.flops() / own["median"],
        "roof": roof,
        "of_roof": seconds / own["median"],
        "peak_bytes": peaks,
        "targets": targets,
        "rounds": len(times["fastconv"]),
    }
    if broken:
        record["broken"] = broken
    if not _is_op(case):
        record |= _of_a_model(case, runs, record["seconds"], device)
    if recorder is not None:
        # Last: whoever can't be captured may leave more behind than anybody knows of.
        record |= _of_a_gpu(runs, device, recorder, rounds)
    return record


def _of_a_gpu(runs: dict[str, Run], device: torch.device, recorder: Recorder, rounds: int | None) -> Record:
    """What a call costs the CPU, replays of CUDA graphs, and why there are none of some runs."""
    queued = timing.host_seconds(runs, device)
    replays, refused = timing.graphs({k: run for k, run in runs.items() if not k.endswith("graphs")}, recorder)
    replayed = timing.interleaved(replays, device, rounds=rounds, warmup=1) if replays else {}
    return {
        "host_seconds": _spreads(queued),
        "host_ratios": timing.ratios(queued),
        "graph_seconds": _spreads(replayed),
        "graph_ratios": timing.ratios(replayed),
        "uncaptured": {label: _told(error) for label, error in refused.items()},
    }


def _spreads(times: dict[str, list[float]]) -> dict[str, timing.Spread]:
    return {label: timing.spread(of) for label, of in times.items()}


# Beside a case's runs on a CPU: a product large enough for the full rate of a few cores, in half precision too.
_PRODUCT, _SIZE = "product", 1024


def _of_these_rounds(roofs: Roofs, case: Case, times: dict[str, list[float]]) -> Roofs:
    """The roofs as they were meanwhile: a shared CPU is now fast, now slow, and a small copy stays in its caches."""
    rate = 2 * _SIZE**3 / statistics.median(times.pop(_PRODUCT))
    copy = case.bytes() / statistics.median(times["copy"]) if "copy" in times else roofs.copy
    return Roofs(copy, {str(case.dtype).removeprefix("torch."): rate})


def _ratios(
    targets: dict[str, float], times: dict[str, list[float]], peaks: dict[str, int | None]
) -> dict[str, timing.Spread]:
    """Every label's time over fastconv's, and what else the targets name, where it was measured."""
    ratios = timing.ratios(times)
    for name in targets:
        slow, _, fast = name.partition(" / ")
        rival = name.removesuffix(" memory")
        own, other = peaks["fastconv"], peaks.get(rival)
        if slow in times and fast in times:
            ratios[name] = timing.ratio(times[slow], times[fast])
        elif name != rival and own and other:
            ratios[name] = timing.spread([other / own])
    return ratios


def _of_a_model(case: Case, runs: dict[str, Run], seconds: dict[str, timing.Spread], device: torch.device) -> Record:
    tokens = case.subject.tokens
    if not tokens:
        raise ValueError(f"{case.name}: a whole model's case says how many tokens it computes, got {tokens}")
    rates = {label: tokens / of["median"] for label, of in seconds.items() if label not in ROOFS}
    found: dict[str, Any] = {"tokens_per_s": rates}
    # A second each: of fastconv, without padding where there is some, and of the first rival alone.
    rival = next((label for label in rates if not is_own(label)), None)
    own = ("fastconv", "fastconv remove") if case.subject.lengths == "text" else ("fastconv",)
    asked = [label for label in runs if label == rival or label in own]
    energy = {label: joules(runs[label], device) for label in asked}
    if None not in energy.values():
        found["joules_per_token"] = {label: each / tokens for label, each in energy.items() if each is not None}
    return found


def _working(runs: dict[str, Run]) -> tuple[dict[str, Run], dict[str, str]]:
    """The runs without those of rivals and of _MAY_FAIL that raise (torch.compile without a compiler), and why."""
    broken = {}
    for label, run in runs.items():
        try:
            run()
        except Exception as error:  # a rival's failure is a result, fastconv's is a bug
            if is_own(label) and label not in _MAY_FAIL:
                raise
            broken[label] = _told(error)
    return {label: run for label, run in runs.items() if label not in broken}, broken


def _told(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def _copy(size: int, device: torch.device) -> Run:
    source = torch.randint(256, (size // 2,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)
