"""What a call costs in joules, by the counter that NVIDIA's driver keeps for the whole card."""

from __future__ import annotations

import ctypes
import time

import torch

from fastconv.bench.timing import Run
from fastconv.parity.measure import synchronize

# The driver updates its counter up to ten times a second: so long the error is small beside the spread of power.
_SECONDS = 0.8
_BEFORE = 0.2  # so that what the counter lags behind is of the same load


class Counter:
    """Of one GPU. Raises OSError where the driver keeps none, or can't be asked."""

    def __init__(self, device: torch.device) -> None:
        self._nvml = ctypes.CDLL("libnvidia-ml.so.1")
        self._handle = ctypes.c_void_p()
        uuid = str(torch.cuda.get_device_properties(device).uuid).removeprefix("GPU-")
        self._ask("nvmlInit_v2")
        self._ask("nvmlDeviceGetHandleByUUID", f"GPU-{uuid}".encode(), ctypes.byref(self._handle))
        self.joules()

    def joules(self) -> float:
        """Since the driver was loaded."""
        millijoules = ctypes.c_ulonglong()
        self._ask("nvmlDeviceGetTotalEnergyConsumption", self._handle, ctypes.byref(millijoules))
        return millijoules.value / 1e3

    def _ask(self, name: str, *args: object) -> None:
        status = getattr(self._nvml, name)(*args)
        if status != 0:
            raise OSError(f"{name} returned {status}")


def joules(run: Run, device: torch.device) -> float | None:
    """Joules of one call, of many in a row for most of a second; None where nobody tells."""
    if device.type != "cuda":
        return None
    try:
        counter = Counter(device)
    except (OSError, AttributeError):  # no driver of NVIDIA's, an old one, or a part of a card
        return None
    _repeat(run, device, _BEFORE)
    before = counter.joules()
    calls = _repeat(run, device, _SECONDS)
    return (counter.joules() - before) / calls


def _repeat(run: Run, device: torch.device, seconds: float) -> int:
    calls, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        run()
        synchronize(device)
        calls += 1
    return calls
