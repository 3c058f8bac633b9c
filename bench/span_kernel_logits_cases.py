"""Cases of span_kernel_logits: what ConvBERT computes a token's kernels from, without a gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from fastconv.bench.case import BenchCase, Op, Tensors
from fastconv.ops import linear_act, separable_conv, span_kernel_logits
from fastconv.reference.ops import span_kernel_logits as reference_span_kernel_logits


@dataclass(frozen=True)
class SpanKernelLogitsCase(BenchCase):
    """span_kernel_logits of (batch, length, channels), by half as many channels in between, to heads * taps logits."""

    batch: int
    length: int
    channels: int
    heads: int
    dtype: torch.dtype
    taps: int = 9
    direction: str = "infer"
    roundings = 2

    @property
    def name(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        shape = f"{self.batch}x{self.length}x{self.channels}->{self._half}->{self._logits}"
        return f"span_kernel_logits {shape} k{self.taps} {dtype}"

    @property
    def targets(self) -> dict[str, float]:
        # Where the kernel runs: below 1.0 the choice of it is wrong.
        return {"separable_conv, linear_act": 1.0} if self.dtype.itemsize == 2 else {}

    @property
    def _half(self) -> int:
        return self.channels // 2

    @property
    def _logits(self) -> int:
        return self.heads * self.taps

    def bytes(self) -> int:
        tokens = self.batch * self.length * (self.channels + self._half + self._logits)  # x and gate; y
        separable = self.channels * self.taps + self._half * self.channels + self._half
        dense = self._logits * self._half + self._logits
        return (tokens + separable + dense) * self.dtype.itemsize

    def flops(self) -> int:
        convolution, product = self.channels * self.taps * 2, self.channels * self._half * 2
        gate, logits = 2 * self._half, self._half * self._logits * 2 + self._logits  # + bias, * gate; + kernel_bias
        return self.batch * self.length * (convolution + product + gate + logits)

    def tensors(self, normal: Callable[..., torch.Tensor]) -> Tensors:
        return {
            "x": normal(self.batch, self.length, self.channels),
            "depthwise": normal(self.channels, 1, self.taps) / self.taps**0.5,
            "pointwise": normal(self._half, self.channels, 1) / self.channels**0.5,
            "bias": normal(self._half, 1),
            "gate": normal(self.batch, self.length, self._half),
            "weight": normal(self._logits, self._half) / self._half**0.5,
            "kernel_bias": normal(self._logits),
        }

    def op(self, **tensors: torch.Tensor) -> torch.Tensor:
        return span_kernel_logits(**tensors)

    def reference(self, **tensors: torch.Tensor) -> torch.Tensor:
        return reference_span_kernel_logits(**tensors)

    def rivals(self, device: torch.device) -> dict[str, Op]:
        # As ConvBertSelfAttention of transformers computes it: that is the reference too.
        found: dict[str, Op] = {"HF": reference_span_kernel_logits}
        # On a CPU the op is nothing else.
        return found | ({"separable_conv, linear_act": _two_ops} if device.type == "cuda" else {})


def _two_ops(*, weight: torch.Tensor, kernel_bias: torch.Tensor, **separable: torch.Tensor) -> torch.Tensor:
    return linear_act(separable_conv(**separable), weight, kernel_bias, None)


def cases(device: torch.device, *, quick: bool = False) -> list[BenchCase]:
    """ConvBERT base, on a GPU medium-small, small and a hidden size of 1024 too."""
    half, single = torch.bfloat16, torch.float32
    if quick:
        return [SpanKernelLogitsCase(2, 16, 32, 2, single)]
    if device.type != "cuda":
        return [SpanKernelLogitsCase(8, 512, 768, 6, single)]
    sizes = [(1, 128), (1, 512), (8, 512), (64, 512)]
    found = [SpanKernelLogitsCase(*size, 768, 6, half) for size in sizes]
    found += [
        SpanKernelLogitsCase(64, 512, channels, heads, half) for channels, heads in ((384, 4), (256, 2), (1024, 8))
    ]
    return [*found, SpanKernelLogitsCase(8, 512, 768, 6, torch.float16), SpanKernelLogitsCase(8, 512, 768, 6, single)]
