"""Times of several functions in interleaved rounds: what disturbs the machine disturbs all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

Run = Callable[[], object]


def interleaved(runs: dict[str, Run], device: torch.device, *, rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of every run in every round, after `warmup` calls of each.

    On a GPU: CUDA events around one call, with the L2 cache flushed before it. The flush also keeps the card busy
    while Python queues the call, so that the launches' cost on the CPU doesn't count.
    """
    for run in runs.values():
        for _ in range(warmup):
            run()
    times: dict[str, list[float]] = {label: [] for label in runs}
    if device.type != "cuda":
        for _ in range(rounds):
            for label, run in runs.items():
                start = time.perf_counter()
                run()
                times[label].append(time.perf_counter() - start)
        return times

    flush = _flush_buffer(device)
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {label: [] for label in runs}
    for _ in range(rounds):
        for label, run in runs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            start.record()
            run()
            end.record()
            events[label].append((start, end))
        # Not to queue more than a round: the outputs of the runs stay allocated until they have run.
        torch.cuda.synchronize(device)
    return {label: [start.elapsed_time(end) / 1e3 for start, end in pairs] for label, pairs in events.items()}


def _flush_buffer(device: torch.device) -> torch.Tensor:
    """Several times any L2 (the largest are 256 MB), and about 0.3 ms of writing on the fastest cards."""
    size = min(2**30, torch.cuda.get_device_properties(device).total_memory // 16)
    return torch.empty(size, dtype=torch.uint8, device=device)


def median_ratio(rival: list[float], own: list[float]) -> float:
    """How many times faster `own` is: the median of the ratios of each round."""
    return statistics.median(r / o for r, o in zip(rival, own, strict=True))
