"""Cases of separable_conv, and of its depthwise part alone."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from fastconv.bench import shapes
from fastconv.bench.case import BenchCase, Op, Tensors
from fastconv.bench.op_case import ConvolutionCase, OpCase
from fastconv.bench.shapes import Place, Point
from fastconv.ops import separable_conv
from fastconv.ops._eager import use_kernels
from fastconv.reference import ConvBertConfig
from fastconv.reference.ops import separable_conv as reference_separable_conv


@dataclass(frozen=True)
class SeparableConvCase(ConvolutionCase):
    """separable_conv of (batch, length, channels) to `out` channels, times a gate; of text, without its padding."""

    channels: int
    out: int
    taps: int = 9

    title = "separable_conv"
    of_tokens = ("x", "gate")

    @property
    def shape(self) -> str:
        return f"{self.channels}->{self.out} k{self.taps}"

    def bytes_of(self, direction: str) -> int:
        tokens, size = self.place.tokens, self.dtype.itemsize
        wide, narrow = tokens * self.channels * size, tokens * self.out * size
        weights = (self.channels * self.taps + self.out * self.channels) * size
        bias = self.out * size
        if direction == "bwd":
            return (
                2 * narrow  # read dy and gate
                + narrow  # read the product, for the gate's gradient
                + 2 * wide  # read x and the depthwise part, for the weights' gradients
                + weights
                + wide  # write dx
                + narrow  # write the gate's gradient
                + weights  # write the weights' gradients
                + bias
            )  # what goes from one step to the next is the op's own affair
        # For the backward, the depthwise part and the product.
        saved = wide + narrow if direction == "fwd" else 0
        return wide + weights + bias + narrow + narrow + saved  # read x, weights, bias and gate, write y

    def flops_of(self, direction: str) -> int:
        convolution = self.channels * self.taps * 2
        product = self.channels * self.out * 2
        # Each gradient of a product of two is as much again.
        each = 2 * (convolution + product) + 3 * self.out if direction == "bwd" else convolution + product
        gate = 0 if direction == "bwd" else 2 * self.out  # + bias, * gate
        return self.place.tokens * (each + gate)

    def tensors(self, normal: Callable[..., torch.Tensor]) -> Tensors:
        return {
            "x": normal(*self.place.lead, self.channels),
            "depthwise": normal(self.channels, 1, self.taps) / self.taps**0.5,
            "pointwise": normal(self.out, self.channels, 1) / self.channels**0.5,
            "bias": normal(self.out, 1),
            "gate": normal(*self.place.lead, self.out),
        }

    def op(self, **tensors: Any) -> torch.Tensor:
        return separable_conv(**tensors, packing=self.place.packing(tensors["x"].device))

    def reference(self, **tensors: Any) -> torch.Tensor:
        return reference_separable_conv(**tensors, packing=self.place.packing(tensors["x"].device))

    def hf(self, **tensors: Any) -> torch.Tensor:
        return reference_separable_conv(**tensors)  # which is written as transformers' is


@dataclass(frozen=True)
class DepthwiseCase(OpCase):
    """The depthwise part of separable_conv, (batch, length, channels), without a gradient: it has none by itself."""

    channels: int
    taps: int = 9

    title, variant = "separable_conv", "depthwise of "

    @property
    def shape(self) -> str:
        return f"{self.channels} k{self.taps}"

    @property
    def targets(self) -> dict[str, float]:
        return {} if self.place.tokens < 4096 else {"HF": 5.0, "copy": 0.8}

    def bytes_of(self, direction: str) -> int:
        tensor = self.place.tokens * self.channels * self.dtype.itemsize
        return 2 * tensor + self.channels * self.taps * self.dtype.itemsize  # read x and depthwise, write y

    def flops_of(self, direction: str) -> int:
        return self.place.tokens * self.channels * self.taps * 2

    def tensors(self, normal: Callable[..., torch.Tensor]) -> Tensors:
        return {
            "x": normal(*self.place.lead, self.channels),
            "depthwise": normal(self.channels, 1, self.taps) / self.taps**0.5,
        }

    def op(self, **tensors: Any) -> torch.Tensor:
        x, depthwise = tensors["x"], tensors["depthwise"]
        module = importlib.import_module("fastconv.ops.separable_conv")  # the package's name is the function's
        if use_kernels(x, depthwise):
            return module.depthwise_op(x, depthwise, None, None, False)
        return module._depthwise(x, depthwise)

    def reference(self, **tensors: Any) -> torch.Tensor:
        x, depthwise = tensors["x"].transpose(1, 2), tensors["depthwise"]
        return F.conv1d(x, depthwise, padding=self.taps // 2, groups=self.channels).transpose(1, 2)

    def rivals(self, device: torch.device) -> dict[str, Op]:
        return {"HF": self.reference}


def at(point: Point) -> list[BenchCase]:
    """ConvBERT's."""
    config, place = shapes.config(point.place.model), point.place
    if not isinstance(config, ConvBertConfig):
        return []
    half, taps = config.attention_heads * config.attention_head_size, config.conv_kernel_size
    found: list[BenchCase] = [
        SeparableConvCase(place, point.dtype, way, config.hidden_size, half, taps) for way in point.directions
    ]
    if place.lengths == "full":
        found.append(DepthwiseCase(place, point.dtype, "infer", config.hidden_size, taps))
    return found


def quick(places: list[Place]) -> list[BenchCase]:
    """Tiny ones."""
    full, text = places
    single, kinds = torch.float32, [(full, way) for way in ("infer", "fwd", "bwd")]
    return [
        DepthwiseCase(full, single, "infer", 96),
        *(SeparableConvCase(place, single, way, 96, 48) for place, way in [*kinds, (text, "infer"), (text, "step")]),
    ]
