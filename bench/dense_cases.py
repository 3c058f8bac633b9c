"""Cases of grouped_linear and linear_act: the feed-forward networks, with their GELU."""

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
from fastconv.ops import grouped_linear, linear_act
from fastconv.reference import ConvBertConfig
from fastconv.reference.ops import grouped_linear as reference_grouped_linear
from fastconv.reference.ops import linear_act as reference_linear_act


@dataclass(frozen=True)
class _DenseCase(OpCase):
    """groups products of (tokens, size_in) and (size_in, size_out), with a GELU or without."""

    groups: int
    size_in: int
    size_out: int
    activation: str | None
    rival = ""  # what has to be beaten by `faster`
    faster = 1.0
    keeps_bias = False  # whether the backward reads the bias: the pre-activation is kept without it

    @property
    def targets(self) -> dict[str, float]:
        half = self.place.tokens >= 4096 and self.dtype.itemsize == 2
        return {self.rival: self.faster} if half and self.direction != "step" else {}

    def bytes_of(self, direction: str) -> int:
        inputs, outputs = (self.place.tokens * self.groups * size for size in (self.size_in, self.size_out))
        weight, bias = self.groups * self.size_in * self.size_out, self.groups * self.size_out
        saved = outputs if self.activation else 0  # the pre-activation
        if direction == "bwd":
            read = outputs + saved + inputs + weight + (bias if self.keeps_bias else 0)  # dy, x and what is kept
            return self.dtype.itemsize * (read + inputs + weight + bias)  # write dx, dweight and dbias
        written = outputs + (saved if direction == "fwd" else 0)  # y, and what the backward needs
        return self.dtype.itemsize * (inputs + weight + bias + written)

    def flops_of(self, direction: str) -> int:
        products = 2 if direction == "bwd" else 1  # dx and dweight
        # A GELU is counted as 10 operations, its derivative as as many; the bias, or its gradient, as one.
        each = 2 * self.size_in * products + 1 + (10 if self.activation else 0)
        return self.place.tokens * self.groups * self.size_out * each


@dataclass(frozen=True)
class GroupedLinearCase(_DenseCase):
    """grouped_linear of (tokens, groups * size_in) to (tokens, groups * size_out)."""

    title, rival, faster = "grouped_linear", "bmm", 1.2

    @property
    def variant(self) -> str:  # type: ignore[override]
        return "gelu+" if self.activation else ""

    @property
    def shape(self) -> str:
        return f"{self.groups}x{self.size_in}->{self.size_out}"

    def tensors(self, normal: Callable[..., torch.Tensor]) -> Tensors:
        return {
            "x": normal(self.place.tokens, self.groups * self.size_in),
            "weight": normal(self.groups, self.size_in, self.size_out) / self.size_in**0.5,
            "bias": normal(self.groups * self.size_out),
        }

    def op(self, **tensors: Any) -> torch.Tensor:
        return grouped_linear(**tensors, activation=self.activation)

    def reference(self, **tensors: Any) -> torch.Tensor:
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
class LinearActCase(_DenseCase):
    """linear_act of (tokens, size_in) to (tokens, size_out), with a GELU; groups is 1."""

    title, rival, faster, keeps_bias = "linear_act", "torch", 1.1, True

    @property
    def shape(self) -> str:
        return f"{self.size_in}->{self.size_out}"

    def tensors(self, normal: Callable[..., torch.Tensor]) -> Tensors:
        return {
            "x": normal(self.place.tokens, self.size_in),
            "weight": normal(self.size_out, self.size_in) / self.size_in**0.5,
            "bias": normal(self.size_out),
        }

    def op(self, **tensors: Any) -> torch.Tensor:
        return linear_act(**tensors, activation=self.activation)

    def reference(self, **tensors: Any) -> torch.Tensor:
        return reference_linear_act(**tensors, activation=self.activation)

    def rivals(self, device: torch.device) -> dict[str, Op]:
        return {"torch": lambda x, weight, bias: F.gelu(F.linear(x, weight, bias))}


def at(point: Point) -> list[BenchCase]:
    """A dense feed-forward network's first layer, or both layers of a grouped one."""
    config = shapes.config(point.place.model)
    wide, narrow = config.intermediate_size, config.hidden_size
    groups = config.num_groups if isinstance(config, ConvBertConfig) else 1
    found: list[BenchCase] = []
    for way in point.directions:
        where = point.place, point.dtype, way
        if groups == 1:
            found.append(LinearActCase(*where, 1, narrow, wide, "gelu"))
        else:
            found.append(GroupedLinearCase(*where, groups, narrow // groups, wide // groups, "gelu"))
            found.append(GroupedLinearCase(*where, groups, wide // groups, narrow // groups, None))
    return found


def quick(places: list[Place]) -> list[BenchCase]:
    """A tiny one of each kind."""
    single, place = torch.float32, places[0]
    return [
        *(GroupedLinearCase(place, single, way, 2, 32, 48, "gelu") for way in ("infer", "step")),
        GroupedLinearCase(place, single, "bwd", 2, 32, 48, None),
        *(LinearActCase(place, single, way, 1, 32, 48, "gelu") for way in ("infer", "fwd", "bwd")),
    ]
