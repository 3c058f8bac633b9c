"""Cases of ConvBERT's whole convolution branch: separable_conv, the kernel's logits and span_dynamic_conv."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from fastconv.bench import shapes
from fastconv.bench.case import BenchCase, Op, Tensors
from fastconv.bench.op_case import OpCase
from fastconv.bench.shapes import Place, Point
from fastconv.bench.span_dynamic_conv_cases import hf_span_dynamic_conv
from fastconv.ops import span_dynamic_conv, span_kernel_logits
from fastconv.reference import ConvBertConfig
from fastconv.reference.ops import separable_conv as reference_separable_conv
from fastconv.reference.ops import span_dynamic_conv as reference_span_dynamic_conv


@dataclass(frozen=True)
class ConvBranchCase(OpCase):
    """The branch on hidden states (batch, length, 2 * heads * size), its query and the value to convolve given."""

    heads: int
    size: int
    taps: int = 9

    title = "conv_branch"
    roundings = 3
    whole = True

    @property
    def shape(self) -> str:
        return f"{self.heads}x{self.size} k{self.taps}"

    @property
    def targets(self) -> dict[str, float]:
        if self.place.tokens < 4096:
            return {}
        forward, step = (3.5, 2.8) if self.dtype == torch.float32 else (2.0, 2.5)
        if self.direction == "infer":
            return {"HF": forward, **({"HF / fastconv compile": 5.0} if self.place.compiled else {}), "HF memory": 3.0}
        return {"HF": step, "HF memory": 3.0} if self.direction == "step" else {}

    @property
    def cpu_targets(self) -> dict[str, float]:
        return self.targets

    @property
    def _half(self) -> int:
        return self.heads * self.size

    @property
    def _logits(self) -> int:
        return self.heads * self.taps

    def bytes_of(self, direction: str) -> int:
        tokens, half, logits = self.place.tokens, self._half, self._logits
        inputs = tokens * (2 * half + half + half)  # hidden states, query, the convolution's input
        weights = 2 * half * self.taps + 2 * half * half + logits * half
        biases = half + logits
        once = inputs + weights + biases + tokens * half  # and the output
        if direction == "infer":
            return once * self.dtype.itemsize
        # For the backward: the depthwise part, the product, that times the query, and the logits; of those the largest
        # and the sum, in fp32.
        saved = tokens * (2 * half + half + half + logits) * self.dtype.itemsize + 2 * tokens * self.heads * 4
        if direction == "fwd":
            return once * self.dtype.itemsize + saved
        read = inputs + weights + tokens * half  # and dy
        return (read + inputs + weights + biases) * self.dtype.itemsize + saved  # write every gradient

    def flops_of(self, direction: str) -> int:
        half, logits = self._half, self._logits
        each = 2 * (2 * half * self.taps + 2 * half * half + half * logits + half * self.taps) + half + 4 * logits
        return self.place.tokens * each * (2 if direction == "bwd" else 1)

    def tensors(self, normal: Callable[..., torch.Tensor]) -> Tensors:
        lead, half, logits = self.place.lead, self._half, self._logits
        return {
            "hidden": normal(*lead, 2 * half),
            "query": normal(*lead, half),
            "value": normal(*lead, half),
            "depthwise": normal(2 * half, 1, self.taps) / self.taps**0.5,
            "pointwise": normal(half, 2 * half, 1) / (2 * half) ** 0.5,
            "bias": normal(half, 1),
            "weight": normal(logits, half) / half**0.5,
            "kernel_bias": normal(logits),
        }

    def op(self, **t: Any) -> torch.Tensor:
        separable = t["depthwise"], t["pointwise"], t["bias"]
        logits = span_kernel_logits(t["hidden"], *separable, t["query"], t["weight"], t["kernel_bias"])
        return span_dynamic_conv(t["value"], logits, self.taps)

    def reference(self, **t: Any) -> torch.Tensor:
        span = reference_separable_conv(t["hidden"], t["depthwise"], t["pointwise"], t["bias"], gate=t["query"])
        return reference_span_dynamic_conv(t["value"], F.linear(span, t["weight"], t["kernel_bias"]), self.taps)

    def rivals(self, device: torch.device) -> dict[str, Op]:
        def unfolded(hidden, query, value, depthwise, pointwise, bias, weight, kernel_bias):
            # As ConvBertSelfAttention of transformers computes it.
            x = F.conv1d(hidden.transpose(1, 2), depthwise, padding=self.taps // 2, groups=depthwise.shape[0])
            key = (F.conv1d(x, pointwise) + bias).transpose(1, 2)
            return hf_span_dynamic_conv(value, F.linear(key * query, weight, kernel_bias), self.taps)

        return {"HF": unfolded}


def at(point: Point) -> list[BenchCase]:
    """ConvBERT's, forward and both passes: its halves are those of its ops."""
    config, place = shapes.config(point.place.model), point.place
    if not isinstance(config, ConvBertConfig) or place.lengths != "full":
        return []
    sizes = config.attention_heads, config.attention_head_size, config.conv_kernel_size
    ways = [way for way in point.directions if way in ("infer", "step")]
    return [ConvBranchCase(place, point.dtype, way, *sizes) for way in ways]


def quick(places: list[Place]) -> list[BenchCase]:
    """Tiny ones."""
    return [ConvBranchCase(places[0], torch.float32, way, 2, 8) for way in ("infer", "step")]
