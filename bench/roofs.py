"""What the device can do at best, measured on it: bytes copied and matrix operations a second."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from fastconv.bench.timing import Run, interleaved
from fastconv.ops import _onednn


@dataclass(frozen=True)
class Roofs:
    """Rates of one device."""

    copy: float  # bytes read plus bytes written a second, of a copy far larger than the caches
    matmul: dict[str, float]  # FLOP/s of a large product of random matrices, by dtype: the best library's

    def nearer(self, size: int, flops: int, dtype: str) -> tuple[str, float]:
        """The roof that bounds so many bytes and operations, "copy" or "matmul", and the seconds that it allows."""
        seconds = {"copy": size / self.copy}
        if dtype in self.matmul:
            seconds["matmul"] = flops / self.matmul[dtype]
        roof = max(seconds, key=lambda name: seconds[name])
        return roof, seconds[roof]


def product(n: int, dtype: torch.dtype, device: torch.device) -> Run:
    """A product of two matrices (n, n), by the best library there is."""
    # Random: zeros draw less power and run faster than real data.
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    if _onednn.usable(a, b, None):  # on AMD's processors twice as fast as MKL, which matmul asks
        return functools.partial(_onednn.linear, a, b, None)
    return functools.partial(torch.matmul, a, b)


def measure(device: torch.device, *, quick: bool = False) -> Roofs:
    """Measure the roofs in one go; a second on a GPU. The fastest round counts: what slows a roof is not its own."""
    gpu, rounds = device.type == "cuda", 3 if quick else 11
    size = 2**31 if gpu else 2**26 if quick else 2**28
    if gpu:
        size = min(size, torch.cuda.get_device_properties(device).total_memory // 8)
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copies = interleaved({"copy": lambda: target.copy_(source)}, device, rounds=rounds)["copy"]
    # 8192: large enough for the full rate of the matrix units; 1024 is so for a few CPU cores.
    n = 8192 if gpu else 512 if quick else 1024
    rates = {}
    # fp16 on a GPU alone: without instructions for it, as most CPUs are, nobody computes in it.
    for dtype in (torch.bfloat16, torch.float32, *((torch.float16,) if gpu else ())):
        seconds = interleaved({"matmul": product(n, dtype, device)}, device, rounds=rounds)["matmul"]
        rates[str(dtype).removeprefix("torch.")] = 2 * n**3 / min(seconds)
    return Roofs(2 * size / min(copies), rates)
