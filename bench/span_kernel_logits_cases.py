"""Cases of span_kernel_logits: what ConvBERT computes a token's kernels from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fastconv.bench import shapes
from fastconv.bench.case import BenchCase, Op, Tensors
from fastconv.bench.op_case import ConvolutionCase
from fastconv.bench.shapes import Place, Point
from fastconv.ops import linear_act, separable_conv, span_kernel_logits
from fastconv.reference import ConvBertConfig
from fastconv.reference.ops import span_kernel_logits as reference_span_kernel_logits


@dataclass(frozen=True)
class SpanKernelLogitsCase(ConvolutionCase):
    """span_kernel_logits of (batch, length, channels), by half as many channels in between, to heads * taps logits.

    Without a gradient it has a kernel; with one it is separable_conv and linear_act, which keep what is in between.
    """

    channels: int
    heads: int
    taps: int = 9

    title = "span_kernel_logits"
    roundings = 2
    of_tokens = ("x", "gate")

    @property
    def shape(self) -> str:
        return f"{self.channels}->{self._half}->{self._logits} k{self.taps}"

    @property
    def targets(self) -> dict[str, float]:
        # Where the kernel runs: below 1.0 the choice of it is wrong.
        fused = self.dtype.itemsize == 2 and self.direction == "infer"
        return {"separable_conv, linear_act": 1.0} if fused else {}

    @property
    def _half(self) -> int:
        return self.channels // 2

    @property
    def _logits(self) -> int:
        return self.heads * self.taps

    def bytes_of(self, direction: str) -> int:
        tokens, half, logits = self.place.tokens, self._half, self._logits
        inputs, output = tokens * (self.channels + half), tokens * logits  # x and gate; y
        weights = self.channels * self.taps + half * self.channels + logits * half
        biases = half + logits
        saved = tokens * (self.channels + half + half)  # the depthwise part, the product, and that times the gate
        if direction == "bwd":
            # Read dy, what was kept, inputs and weights; write every gradient.
            return (output + saved + 2 * (inputs + weights) + biases) * self.dtype.itemsize
        return (inputs + weights + biases + output + (saved if direction == "fwd" else 0)) * self.dtype.itemsize

    def flops_of(self, direction: str) -> int:
        convolution, product = self.channels * self.taps * 2, self.channels * self._half * 2
        logits = self._half * self._logits * 2
        # + bias, * gate, + kernel_bias; of the gradients: the gate's and the product's, and both biases'.
        others = (3 if direction == "bwd" else 2) * self._half + self._logits
        return self.place.tokens * ((2 if direction == "bwd" else 1) * (convolution + product + logits) + others)

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

    def hf(self, **tensors: Any) -> torch.Tensor:
        return reference_span_kernel_logits(**tensors)  # which is written as transformers' is

    def rivals(self, device: torch.device) -> dict[str, Op]:
        # On a CPU, and with a gradient, the op is nothing else.
        fused = device.type == "cuda" and self.direction == "infer"
        return super().rivals(device) | ({"separable_conv, linear_act": self._two_ops} if fused else {})

    def _two_ops(self, *, weight: torch.Tensor, kernel_bias: torch.Tensor, **separable: torch.Tensor) -> torch.Tensor:
        span = separable_conv(**separable, packing=self.place.packing(weight.device))
        return linear_act(span, weight, kernel_bias, None)


def at(point: Point) -> list[BenchCase]:
    """ConvBERT's."""
    config = shapes.config(point.place.model)
    if not isinstance(config, ConvBertConfig):
        return []
    sizes = config.hidden_size, config.attention_heads, config.conv_kernel_size
    return [SpanKernelLogitsCase(point.place, point.dtype, way, *sizes) for way in point.directions]


def quick(places: list[Place]) -> list[BenchCase]:
    """Tiny ones."""
    full, text = places
    kinds = [(full, "infer"), (full, "fwd"), (text, "infer"), (text, "bwd")]
    return [SpanKernelLogitsCase(place, torch.float32, way, 32, 2) for place, way in kinds]
