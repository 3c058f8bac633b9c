"""Cases of ConvBERT's whole convolution branch: separable_conv, the kernel's logits and span_dynamic_conv."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from fastconv.bench import shapes
from fastconv.bench.case import BenchCase, Op, Tensors
from fastconv.bench.op_case import ConvolutionCase
from fastconv.bench.shapes import Place, Point
from fastconv.bench.span_dynamic_conv_cases import hf_span_dynamic_conv
from fastconv.ops import span_dynamic_conv, span_kernel_logits
from fastconv.reference import ConvBertConfig
from fastconv.reference.ops import span_dynamic_conv as reference_span_dynamic_conv
from fastconv.reference.ops import span_kernel_logits as reference_span_kernel_logits


@dataclass(frozen=True)
class ConvBranchCase(ConvolutionCase):
    """The branch on hidden states (batch, length, 2 * heads * size), its query and the value to convolve given; of
    text, without its padding."""

    heads: int
    size: int
    taps: int = 9

    title = "conv_branch"
    of_tokens = ("hidden", "query", "value")
    roundings = 3
    whole = True

    @property
    def shape(self) -> str:
        return f"{self.heads}x{self.size} k{self.taps}"

    @property
    def targets(self) -> dict[str, float]:
        if self.place.tokens < 4096 or self.place.lengths != "full":
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

    def op(self, **tensors: Any) -> torch.Tensor:
        return self._branch(span_kernel_logits, span_dynamic_conv, tensors)

    def reference(self, **tensors: Any) -> torch.Tensor:
        return self._branch(reference_span_kernel_logits, reference_span_dynamic_conv, tensors)

    def _branch(self, kernel_logits: Op, convolution: Op, t: Tensors) -> torch.Tensor:
        packing = self.place.packing(t["value"].device)
        separable = t["depthwise"], t["pointwise"], t["bias"]
        logits = kernel_logits(t["hidden"], *separable, t["query"], t["weight"], t["kernel_bias"], packing=packing)
        return convolution(t["value"], logits, self.taps, packing=packing)

    def hf(self, **t: Any) -> torch.Tensor:
        groups = t["depthwise"].shape[0]
        x = F.conv1d(t["hidden"].transpose(1, 2), t["depthwise"], padding=self.taps // 2, groups=groups)
        key = (F.conv1d(x, t["pointwise"]) + t["bias"]).transpose(1, 2)
        return hf_span_dynamic_conv(t["value"], F.linear(key * t["query"], t["weight"], t["kernel_bias"]), self.taps)


def at(point: Point) -> list[BenchCase]:
    """ConvBERT's."""
    config = shapes.config(point.place.model)
    if not isinstance(config, ConvBertConfig):
        return []
    sizes = config.attention_heads, config.attention_head_size, config.conv_kernel_size
    return [ConvBranchCase(point.place, point.dtype, way, *sizes) for way in point.directions]


def quick(places: list[Place]) -> list[BenchCase]:
    """Tiny ones."""
    full, text = places
    kinds = [(full, "infer"), (full, "fwd"), (text, "infer"), (text, "bwd")]
    return [ConvBranchCase(place, torch.float32, way, 2, 8) for place, way in kinds]
