"""Cases of span_dynamic_conv."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from fastconv.bench import shapes
from fastconv.bench.case import BenchCase, Tensors
from fastconv.bench.op_case import ConvolutionCase
from fastconv.bench.shapes import Place, Point
from fastconv.ops import span_dynamic_conv
from fastconv.reference import ConvBertConfig
from fastconv.reference.ops import span_dynamic_conv as reference_span_dynamic_conv


@dataclass(frozen=True)
class SpanDynamicConvCase(ConvolutionCase):
    """span_dynamic_conv of (batch, length, heads * size) with a kernel of `taps`; of text, without its padding."""

    heads: int
    size: int
    taps: int = 9

    title = "span_dynamic_conv"
    of_tokens = ("value", "kernel_logits")

    @property
    def shape(self) -> str:
        return f"{self.heads}x{self.size} k{self.taps}"

    @property
    def targets(self) -> dict[str, float]:
        if self.place.tokens < 4096 or self.place.lengths != "full" or self.direction == "step":
            return {}
        compiled = {"HF compile": 2.0} if self.place.compiled else {}
        return {"HF": 8.0} if self.direction == "bwd" else {"HF": 8.0, **compiled, "copy": 0.7}

    def bytes_of(self, direction: str) -> int:
        size, tokens = self.dtype.itemsize, self.place.tokens
        values = tokens * self.heads * self.size * size
        logits = tokens * self.heads * self.taps * size
        stats = 2 * tokens * self.heads * 4
        if direction == "bwd":
            read = 2 * values + logits + stats  # dy, value, logits and what the forward saved
            return read + values + logits  # write both gradients
        saved = stats if direction == "fwd" else 0  # the largest logits and the sums, for the backward
        return values + logits + values + saved  # read value and logits, write y

    def flops_of(self, direction: str) -> int:
        softmax = 4 * self.taps  # - largest, exp, sum, / sum
        each = self.size * self.taps * 2  # a product and a sum for each tap of a channel
        if direction == "bwd":
            each = 2 * each + 4 * self.taps  # dvalue and the dot products; the softmax's derivative
        return self.place.tokens * self.heads * (each + softmax)

    def tensors(self, normal: Callable[..., torch.Tensor]) -> Tensors:
        lead = self.place.lead
        return {
            "value": normal(*lead, self.heads * self.size),
            "kernel_logits": normal(*lead, self.heads * self.taps),
        }

    def op(self, **tensors: Any) -> torch.Tensor:
        return span_dynamic_conv(**tensors, kernel_size=self.taps, packing=self.place.packing(tensors["value"].device))

    def reference(self, **tensors: Any) -> torch.Tensor:
        packing = self.place.packing(tensors["value"].device)
        return reference_span_dynamic_conv(**tensors, kernel_size=self.taps, packing=packing)

    def hf(self, **tensors: Any) -> torch.Tensor:
        return hf_span_dynamic_conv(**tensors, taps=self.taps)


def hf_span_dynamic_conv(value: torch.Tensor, kernel_logits: torch.Tensor, taps: int) -> torch.Tensor:
    """As ConvBertSelfAttention of transformers computes it, (B, S, H*D), (B, S, H*K) -> (B, S, H*D)."""
    heads = kernel_logits.shape[-1] // taps
    kernel = kernel_logits.reshape(-1, taps, 1).softmax(1)
    image = value.transpose(1, 2).contiguous().unsqueeze(-1)
    columns = F.unfold(image, (taps, 1), padding=(taps // 2, 0))
    windows = columns.transpose(1, 2).reshape(-1, value.shape[-1] // heads, taps)
    return torch.matmul(windows, kernel).reshape(value.shape)


def at(point: Point) -> list[BenchCase]:
    """ConvBERT's."""
    config = shapes.config(point.place.model)
    if not isinstance(config, ConvBertConfig):
        return []
    sizes = config.attention_heads, config.attention_head_size, config.conv_kernel_size
    return [SpanDynamicConvCase(point.place, point.dtype, way, *sizes) for way in point.directions]


def quick(places: list[Place]) -> list[BenchCase]:
    """Tiny ones, with heads of 48 channels."""
    full, text = places
    kinds = [(full, way) for way in ("infer", "fwd", "bwd", "step")] + [(text, way) for way in ("infer", "bwd")]
    return [SpanDynamicConvCase(place, torch.float32, way, 2, 48) for place, way in kinds]
