"""Times of several functions in interleaved rounds, and the peak memory of one."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

Run = Callable[[], object]
# Above every level: the profiler's library logs each start and stop to stderr.
_QUIET = {"KINETO_LOG_LEVEL": "99"}


def synchronize(device: torch.device) -> None:
    """Wait until a device has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def seconds(run: Run, device: torch.device) -> float:
    """How long one call takes, until the device is done with it."""
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def interleaved(
    runs: Mapping[str, Run], device: torch.device, *, rounds: int, tell: Callable[[str], None] = lambda name: None
) -> dict[str, list[float]]:
    """Seconds of every run in every round: each round calls all of them, one after the other.

    What disturbs the machine for a while so disturbs all alike. Call each before: the first call compiles and
    allocates. `tell` is called with the name before each call, outside the time.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            tell(name)
            times[name].append(seconds(run, device))
    return times


def peak_bytes(run: Run, device: torch.device) -> int | None:
    """The most bytes of tensors that one call has alive at a time, beyond those that were alive before.

    On a GPU what PyTorch's allocator counts; on a CPU the allocations and frees that its profiler sees, including
    scratch memory inside an op, but not what libraries allocate for themselves. None on other devices.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    return _peak_bytes_cpu(run) if device.type == "cpu" else None


def _peak_bytes_cpu(run: Run) -> int:
    environment = {name: os.environ.get(name) for name in _QUIET}
    os.environ.update(_QUIET)
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            run()
    finally:
        for name, value in environment.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(file))
        events = json.loads(file.read_text(encoding="utf-8"))["traceEvents"]
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]")
    live = peak = 0
    for _, change in changes:
        live += change
        peak = max(peak, live)
    return peak
