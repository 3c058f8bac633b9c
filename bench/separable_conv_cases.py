"""Cases of separable_conv, and of its depthwise part alone."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fastconv.bench.case import BenchCase, Op, Tensors
from fastconv.ops import separable_conv
from fastconv.reference.ops import separable_conv as reference_separable_conv


@dataclass(frozen=True)
class SeparableConvCase(BenchCase):
    """separable_conv of (batch, length, channels) to `out` channels with `taps`, times a gate."""

    batch: int
    length: int
    channels: int
    out: int
    dtype: torch.dtype
    direction: str
    taps: int = 9

    @property
    def name(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        shape = f"{self.batch}x{self.length}x{self.channels}->{self.out}"
        return f"separable_conv {self.direction} {shape} k{self.taps} {dtype}"

    def bytes(self) -> int:
        tokens, size = self.batch * self.length, self.dtype.itemsize
        wide, narrow = tokens * self.channels * size, tokens * self.out * size
        weights = (self.channels * self.taps + self.out * self.channels) * size
        bias = self.out * size
        if self.direction == "bwd":
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
        saved = wide + narrow if self.direction == "fwd" else 0
        return wide + weights + bias + narrow + narrow + saved  # read x, weights, bias and gate, write y

    def flops(self) -> int:
        convolution = self.channels * self.taps * 2
        product = self.channels * self.out * 2
        # Each gradient of a product of two is as much again.
        each = 2 * (convolution + product) + 3 * self.out if self.direction == "bwd" else convolution + product
        gate = 0 if self.direction == "bwd" else 2 * self.out  # + bias, * gate
        return self.batch * self.length * (each + gate)

    def tensors(self, normal: Callable[..., torch.Tensor]) -> Tensors:
        return {
            "x": normal(self.batch, self.length, self.channels),
            "depthwise": normal(self.channels, 1, self.taps) / self.taps**0.5,
            "pointwise": normal(self.out, self.channels, 1) / self.channels**0.5,
            "bias": normal(self.out, 1),
            "gate": normal(self.batch, self.length, self.out),
        }

    def op(self, **tensors: torch.Tensor) -> torch.Tensor:
        return separable_conv(**tensors)

    def reference(self, **tensors: torch.Tensor) -> torch.Tensor:
        return reference_separable_conv(**tensors)

    def rivals(self, device: torch.device) -> dict[str, Op]:
        # As ConvBertSelfAttention of transformers computes it: that is the reference too.
        return {"HF": reference_separable_conv}


@dataclass(frozen=True)
class DepthwiseCase(BenchCase):
    """The depthwise part of separable_conv, (batch, length, channels) with `taps`, without a gradient."""

    batch: int
    length: int
    channels: int
    dtype: torch.dtype
    taps: int = 9
    direction: str = "infer"

    @property
    def name(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"separable_conv depthwise {self.batch}x{self.length}x{self.channels} k{self.taps} {dtype}"

    @property
    def targets(self) -> dict[str, float]:
        return {} if self.batch * self.length < 4096 else {"HF": 5.0, "copy": 0.8}

    def bytes(self) -> int:
        tensor = self.batch * self.length * self.channels * self.dtype.itemsize
        return 2 * tensor + self.channels * self.taps * self.dtype.itemsize  # read x and depthwise, write y

    def flops(self) -> int:
        return self.batch * self.length * self.channels * self.taps * 2

    def tensors(self, normal: Callable[..., torch.Tensor]) -> Tensors:
        return {
            "x": normal(self.batch, self.length, self.channels),
            "depthwise": normal(self.channels, 1, self.taps) / self.taps**0.5,
        }

    def op(self, **tensors: torch.Tensor) -> torch.Tensor:
        x, depthwise = tensors["x"], tensors["depthwise"]
        module = importlib.import_module("fastconv.ops.separable_conv")  # the package's name is the function's
        if x.is_cuda:
            return torch.ops.fastconv.separable_conv_depthwise(x, depthwise, None, None, False)
        return module._depthwise(x, depthwise)

    def reference(self, **tensors: torch.Tensor) -> torch.Tensor:
        x, depthwise = tensors["x"].transpose(1, 2), tensors["depthwise"]
        return F.conv1d(x, depthwise, padding=self.taps // 2, groups=self.channels).transpose(1, 2)

    def rivals(self, device: torch.device) -> dict[str, Op]:
        return {"HF": self.reference}


def cases(device: torch.device, *, quick: bool = False) -> list[BenchCase]:
    """ConvBERT base, and medium-small, whose channels are half as many."""
    half, single = torch.bfloat16, torch.float32
    if quick:
        shapes = [(2, 64, 96, 48, single)]
    elif device.type == "cuda":
        shapes = [(batch, length, 768, 384, half) for batch, length in ((1, 128), (8, 512), (64, 512))]
        shapes += [(64, 512, 384, 192, half), (8, 512, 768, 384, torch.float16), (8, 512, 768, 384, single)]
    else:
        shapes = [(8, 512, 768, 384, single), (8, 512, 768, 384, half)]
    depthwise = [DepthwiseCase(batch, length, channels, dtype) for batch, length, channels, _, dtype in shapes]
    return depthwise + [
        SeparableConvCase(*shape, direction) for shape in shapes for direction in ("infer", "fwd", "bwd")
    ]
