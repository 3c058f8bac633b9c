"""Cases of span_kernel_logits: what ConvBERT computes a token's kernels from, without a gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fastconv.bench import shapes
from fastconv.bench.case import BenchCase, Op, Tensors
from fastconv.bench.op_case import OpCase
from fastconv.bench.shapes import Place, Point
from fastconv.ops import linear_act, separable_conv, span_kernel_logits
from fastconv.reference import ConvBertConfig
from fastconv.reference.ops import span_kernel_logits as reference_span_kernel_logits


@dataclass(frozen=True)
class SpanKernelLogitsCase(OpCase):
    """span_kernel_logits of (batch, length, channels), by half as many channels in between, to heads * taps logits."""

    channels: int
    heads: int
    taps: int = 9

    title = "span_kernel_logits"
    roundings = 2

    @property
    def shape(self) -> str:
        return f"{self.channels}->{self._half}->{self._logits} k{self.taps}"

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

    def bytes_of(self, direction: str) -> int:
        tokens = self.place.tokens * (self.channels + self._half + self._logits)  # x and gate; y
        separable = self.channels * self.taps + self._half * self.channels + self._half
        dense = self._logits * self._half + self._logits
        return (tokens + separable + dense) * self.dtype.itemsize

    def flops_of(self, direction: str) -> int:
        convolution, product = self.channels * self.taps * 2, self.channels * self._half * 2
        gate, logits = 2 * self._half, self._half * self._logits * 2 + self._logits  # + bias, * gate; + kernel_bias
        return self.place.tokens * (convolution + product + gate + logits)

    def tensors(self, normal: Callable[..., torch.Tensor]) -> Tensors:
        return {
            "x": normal(*self.place.lead, self.channels),
            "depthwise": normal(self.channels, 1, self.taps) / self.taps**0.5,
            "pointwise": normal(self._half, self.channels, 1) / self.channels**0.5,
            "bias": normal(self._half, 1),
            "gate": normal(*self.place.lead, self._half),
            "weight": normal(self._logits, self._half) / self._half**0.5,
            "kernel_bias": normal(self._logits),
        }

    def op(self, **tensors: Any) -> torch.Tensor:
        return span_kernel_logits(**tensors, packing=self.place.packing(tensors["x"].device))

    def reference(self, **tensors: Any) -> torch.Tensor:
        return reference_span_kernel_logits(**tensors, packing=self.place.packing(tensors["x"].device))

    def rivals(self, device: torch.device) -> dict[str, Op]:
        # As ConvBertSelfAttention of transformers computes it: that is the reference too.
        found: dict[str, Op] = {"HF" if self.place.lengths == "full" else "HF of each": self.reference}
        # On a CPU the op is nothing else.
        return found | ({"separable_conv, linear_act": self._two_ops} if device.type == "cuda" else {})

    def _two_ops(self, *, weight: torch.Tensor, kernel_bias: torch.Tensor, **separable: torch.Tensor) -> torch.Tensor:
        span = separable_conv(**separable, packing=self.place.packing(weight.device))
        return linear_act(span, weight, kernel_bias, None)


def at(point: Point) -> list[BenchCase]:
    """ConvBERT's."""
    config = shapes.config(point.place.model)
    if not isinstance(config, ConvBertConfig) or "infer" not in point.directions:
        return []
    sizes = config.hidden_size, config.attention_heads, config.conv_kernel_size
    return [SpanKernelLogitsCase(point.place, point.dtype, "infer", *sizes)]


def quick(places: list[Place]) -> list[BenchCase]:
    """Tiny ones."""
    return [SpanKernelLogitsCase(place, torch.float32, "infer", 32, 2) for place in places]
