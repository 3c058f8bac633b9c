"""Cases of grouped_linear and linear_act: the feed-forward networks, with their GELU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fastconv.bench.case import BenchCase, Op, Tensors
from fastconv.ops import grouped_linear, linear_act
from fastconv.reference.ops import grouped_linear as reference_grouped_linear
from fastconv.reference.ops import linear_act as reference_linear_act


@dataclass(frozen=True)
class GroupedLinearCase(BenchCase):
    """grouped_linear of (tokens, groups * size_in) to (tokens, groups * size_out), with a GELU or without."""

    tokens: int
    groups: int
    size_in: int
    size_out: int
    activation: str | None
    dtype: torch.dtype
    direction: str

    @property
    def name(self) -> str:
        return f"grouped_linear {_label(self)} {self.groups}x{self.size_in}x{self.size_out} {_dtype(self)}"

    @property
    def targets(self) -> dict[str, float]:
        return {"bmm": 1.2} if self.tokens >= 4096 and self.dtype.itemsize == 2 else {}

    def bytes(self) -> int:
        values = self.tokens * self.groups * self.size_out
        weight, bias = self.groups * self.size_in * self.size_out, self.groups * self.size_out
        return _bytes(self, self.tokens * self.groups * self.size_in, values, weight, bias)

    def flops(self) -> int:
        return _flops(self, self.tokens * self.groups, self.size_in, self.size_out)

    def tensors(self, normal: Callable[..., torch.Tensor]) -> Tensors:
        return {
            "x": normal(self.tokens, self.groups * self.size_in),
            "weight": normal(self.groups, self.size_in, self.size_out) / self.size_in**0.5,
            "bias": normal(self.groups * self.size_out),
        }

    def op(self, **tensors: torch.Tensor) -> torch.Tensor:
        return grouped_linear(**tensors, activation=self.activation)

    def reference(self, **tensors: torch.Tensor) -> torch.Tensor:
        return reference_grouped_linear(**tensors, activation=self.activation)

    def rivals(self, device: torch.device) -> dict[str, Op]:
        def batched(x, weight, bias):
            # As GroupedLinearLayer of transformers computes it.
            groups, size_in, _ = weight.shape
            y = torch.bmm(x.reshape(-1, groups, size_in).permute(1, 0, 2), weight).permute(1, 0, 2)
            y = y.reshape(len(x), -1) + bias
            return y if self.activation is None else F.gelu(y)

        return {"bmm": batched}


@dataclass(frozen=True)
class LinearActCase(BenchCase):
    """linear_act of (tokens, size_in) to (tokens, size_out), with a GELU."""

    tokens: int
    size_in: int
    size_out: int
    dtype: torch.dtype
    direction: str
    activation = "gelu"

    @property
    def name(self) -> str:
        return f"linear_act {_label(self)} {self.size_in}x{self.size_out} {_dtype(self)}"

    @property
    def targets(self) -> dict[str, float]:
        return {"torch": 1.1} if self.tokens >= 4096 and self.dtype.itemsize == 2 else {}

    def bytes(self) -> int:
        return _bytes(
            self,
            self.tokens * self.size_in,
            self.tokens * self.size_out,
            self.size_in * self.size_out,
            self.size_out,
        )

    def flops(self) -> int:
        return _flops(self, self.tokens, self.size_in, self.size_out)

    def tensors(self, normal: Callable[..., torch.Tensor]) -> Tensors:
        return {
            "x": normal(self.tokens, self.size_in),
            "weight": normal(self.size_out, self.size_in) / self.size_in**0.5,
            "bias": normal(self.size_out),
        }

    def op(self, **tensors: torch.Tensor) -> torch.Tensor:
        return linear_act(**tensors, activation=self.activation)

    def reference(self, **tensors: torch.Tensor) -> torch.Tensor:
        return reference_linear_act(**tensors, activation=self.activation)

    def rivals(self, device: torch.device) -> dict[str, Op]:
        return {"torch": lambda x, weight, bias: F.gelu(F.linear(x, weight, bias))}


Case = GroupedLinearCase | LinearActCase


def _dtype(case: Case) -> str:
    return str(case.dtype).removeprefix("torch.")


def _label(case: Case) -> str:
    return f"{'gelu ' if case.activation else ''}{case.direction} {case.tokens}"


def _bytes(case: Case, inputs: int, outputs: int, weight: int, bias: int) -> int:
    saved = outputs if case.activation else 0  # the pre-activation
    if case.direction == "bwd":
        read = outputs + saved + inputs + weight  # dy, pre-activation, x and weight
        return case.dtype.itemsize * (read + inputs + weight + bias)  # write dx, dweight and dbias
    written = outputs + (saved if case.direction == "fwd" else 0)  # y, and what the backward needs
    return case.dtype.itemsize * (inputs + weight + bias + written)


def _flops(case: Case, rows: int, size_in: int, size_out: int) -> int:
    products = 2 if case.direction == "bwd" else 1  # dx and dweight
    # A GELU is counted as 10 operations, its derivative as as many; the bias, or its gradient, as one.
    return rows * size_out * (2 * size_in * products + 1 + (10 if case.activation else 0))


def cases(device: torch.device, *, quick: bool = False) -> list[BenchCase]:
    """ConvBERT medium-small's grouped feed-forward network and base's dense one."""
    half, single = torch.bfloat16, torch.float32
    grouped = [(2, 192, 768, "gelu"), (2, 768, 192, None)]
    if quick:
        return [
            GroupedLinearCase(64, 2, 32, 48, "gelu", single, "infer"),
            LinearActCase(64, 32, 48, single, "bwd"),
        ]
    if device.type == "cuda":
        sizes = [(tokens, half) for tokens in (128, 4096, 32768)] + [(4096, torch.float16), (4096, single)]
    else:
        sizes = [(4096, single), (4096, half)]
    every = ("infer", "fwd", "bwd")
    found: list[BenchCase] = [
        GroupedLinearCase(tokens, *layer, dtype, direction)
        for tokens, dtype in sizes
        for layer in grouped
        for direction in every
    ]
    found += [LinearActCase(tokens, 768, 3072, dtype, direction) for tokens, dtype in sizes for direction in every]
    return found
