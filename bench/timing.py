"""Times of several functions in interleaved rounds: what disturbs the machine disturbs all of them alike."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence

import torch

from fastconv.parity.measure import synchronize
from fastconv.recorder import Recorder

Run = Callable[[], object]
Spread = dict[str, float]

# Rounds of one case take about so long, where the caller doesn't say how many there are to be; less on a GPU, which
# nobody else uses.
_SECONDS, _SECONDS_ON_GPU = 1.0, 0.7
_FEWEST, _MOST = 5, 50
# How long a GPU is kept busy for Python at most, and about what it counts in a second: cards run at 1 to 3 GHz.
_MOST_SPINNING, _CYCLES = 0.02, 2e9
# Where so many rounds would take a minute, as of a large model on a CPU: the fewest that have quartiles.
_FEWEST_OF_SLOW, _SLOW_SECONDS = 3, 4.0


def interleaved(
    runs: dict[str, Run],
    device: torch.device,
    *,
    rounds: int | None = None,
    warmup: int = 2,
    hides_host: bool = False,
) -> dict[str, list[float]]:
    """Seconds of every run in every round, after `warmup` calls of each, at least one.

    On a CPU in another order in each round: who comes after a rival finds in the caches what that has read.
    On a GPU: CUDA events around one call, with the L2 cache flushed before it. The flush also keeps the card busy
    while Python queues the call: of a call that is queued by then the launches' cost on the CPU doesn't count.

    rounds: None is enough for a steady median, fewer of what takes long
    hides_host: on a GPU, keep it busy for twice as long as Python takes to queue the slowest of the calls, so that
        their cost on the CPU doesn't count
    """
    for _ in range(warmup):
        start = time.perf_counter()
        for run in runs.values():
            run()
        synchronize(device)
        last = time.perf_counter() - start
    rounds = enough(last, device) if rounds is None else rounds
    times: dict[str, list[float]] = {label: [] for label in runs}
    if device.type != "cuda":
        draw, labels = random.Random(0), list(runs)
        for _ in range(rounds):
            draw.shuffle(labels)
            for label in labels:
                start = time.perf_counter()
                runs[label]()
                times[label].append(time.perf_counter() - start)
        return times

    spinning = 0.0
    if hides_host:
        spinning = min(_MOST_SPINNING, 2 * max(map(max, host_seconds(runs, device, rounds=1).values())))
    flush = _flush_buffer(device)
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {label: [] for label in runs}
    for _ in range(rounds):
        for label, run in runs.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            if spinning:
                torch.cuda._sleep(int(spinning * _CYCLES))
            begin.record()
            run()
            end.record()
            events[label].append((begin, end))
        # Not to queue more than a round: the outputs of the runs stay allocated until they have run.
        synchronize(device)
    return {label: [begin.elapsed_time(end) / 1e3 for begin, end in pairs] for label, pairs in events.items()}


def enough(seconds: float, device: torch.device) -> int:
    """How many rounds of so many seconds each make a steady median in reasonable time."""
    fewest = _FEWEST_OF_SLOW if seconds > _SLOW_SECONDS else _FEWEST
    budget = _SECONDS_ON_GPU if device.type == "cuda" else _SECONDS
    return max(fewest, min(_MOST, int(budget / seconds) if seconds else _MOST))


def _flush_buffer(device: torch.device) -> torch.Tensor:
    """Several times any L2 (the largest are 256 MB), and about 0.3 ms of writing on the fastest cards."""
    size = min(2**30, torch.cuda.get_device_properties(device).total_memory // 16)
    return torch.empty(size, dtype=torch.uint8, device=device)


def host_seconds(runs: dict[str, Run], device: torch.device, *, rounds: int = 15) -> dict[str, list[float]]:
    """What an eager call of every run costs the CPU on a GPU in every round: the seconds until everything is queued.

    Nothing is queued before, so that no call waits for another; a call that waits for the GPU itself counts so.
    """
    times: dict[str, list[float]] = {label: [] for label in runs}
    for _ in range(rounds):
        for label, run in runs.items():
            synchronize(device)
            start = time.perf_counter()
            run()
            times[label].append(time.perf_counter() - start)
    synchronize(device)
    return times


def graphs(runs: dict[str, Run], recorder: Recorder) -> tuple[dict[str, Run], dict[str, Exception]]:
    """Replays of CUDA graphs of the runs, and why the others can't be captured (a copy to the host, say).

    Each must have run before, on the recorder's stream.
    """
    found, refused = {}, {}
    for label, run in runs.items():
        try:
            found[label] = recorder.record(run)
        except Exception as error:
            refused[label] = error.with_traceback(None)  # whose frames hold tensors
            torch.cuda.synchronize()
    return found, refused


def spread(values: Sequence[float]) -> Spread:
    """The median and the quartiles."""
    if len(values) == 1:
        return dict.fromkeys(("median", "low", "high"), values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high}


def ratios(times: dict[str, list[float]]) -> dict[str, Spread]:
    """How many times faster than every other label "fastconv" is; empty where it wasn't timed."""
    own = times.get("fastconv")
    return {label: ratio(of, own) for label, of in times.items() if label != "fastconv"} if own else {}


def ratio(rival: Sequence[float], own: Sequence[float]) -> Spread:
    """How many times faster `own` is: the ratios of each round."""
    return spread([r / o for r, o in zip(rival, own, strict=True)])
