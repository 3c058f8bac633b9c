"""What the device can do at best, measured on it: bytes copied and matrix operations a second."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch

from fastconv.bench.timing import interleaved


@dataclass(frozen=True)
class Roofs:
    """Rates of one device."""

    copy: float  # bytes read plus bytes written a second, of a copy far larger than the caches
    matmul: dict[str, float]  # FLOP/s of a large product of random matrices, by dtype


def measure(device: torch.device, *, quick: bool = False) -> Roofs:
    """Measure both roofs in one go; a second on a GPU."""
    gpu, rounds = device.type == "cuda", 3 if quick else 11
    size = 2**31 if gpu else 2**26 if quick else 2**28
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copies = interleaved({"copy": lambda: target.copy_(source)}, device, rounds=rounds)
    # 8192: large enough for the full rate of the matrix units; 1024 is so for a few CPU cores.
    n = 8192 if gpu else 512 if quick else 1024
    rates = {}
    for dtype in (torch.bfloat16, torch.float32):
        # Random: zeros draw less power and run faster than real data.
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        seconds = interleaved({"matmul": lambda a=a, b=b: a @ b}, device, rounds=rounds)["matmul"]
        rates[str(dtype).removeprefix("torch.")] = 2 * n**3 / statistics.median(seconds)
    return Roofs(2 * size / statistics.median(copies["copy"]), rates)
