"""Cases of layer_norm."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from fastconv.bench import shapes
from fastconv.bench.case import BenchCase, Op, Tensors, ends, kept_share
from fastconv.bench.op_case import OpCase
from fastconv.bench.shapes import Place, Point
from fastconv.ops import layer_norm
from fastconv.reference.ops import layer_norm as reference_layer_norm
from fastconv.tolerance import Comparison, compare


@dataclass(frozen=True)
class LayerNormCase(OpCase):
    """layer_norm of (tokens, channels), alone or with bias, dropout and residual before it.

    "infer" is without dropout.
    """

    channels: int
    fused: bool

    title = "layer_norm"

    @property
    def variant(self) -> str:  # type: ignore[override]
        return "bias+dropout+residual+" if self.dropout_p else "bias+residual+" if self.fused else ""

    @property
    def shape(self) -> str:
        return str(self.channels)

    @property
    def dropout_p(self) -> float:
        return 0.1 if self.fused and self.training else 0.0

    @property
    def targets(self) -> dict[str, float]:
        # From 16k tokens on launches and tails no longer show.
        if self.place.tokens < 16384 or self.direction == "step":
            return {}
        if self.direction == "bwd":
            return {"torch": 1.4} if self.fused else {}
        compiled = {"torch compile": 1.0} if self.place.compiled else {}
        return compiled if self.fused else {"copy": 0.90, **compiled}

    def bytes_of(self, direction: str) -> int:
        size, tokens = self.dtype.itemsize, self.place.tokens
        tensor, vector, stats = tokens * self.channels * size, self.channels * size, tokens * 4
        seed = 8 if self.dropout_p else 0
        if direction == "bwd":
            return (
                2 * tensor  # read dy and z
                + 2 * stats  # read mean and rstd
                + vector  # read weight
                + seed
                + tensor  # write dx
                + (tensor if self.dropout_p else 0)  # write the residual's gradient: with dropout it isn't dx
                + (3 if self.fused else 2) * vector  # write the gradients of weight, bias and x_bias
            )  # the partial sums of these are the kernel's own affair
        training = direction == "fwd"
        return (
            tensor  # read x
            + (tensor + vector if self.fused else 0)  # read residual and x_bias
            + 2 * vector  # read weight and bias
            + seed
            + tensor  # write y
            + (tensor if training and self.fused else 0)  # write z for the backward; alone, x is z
            + (2 * stats if training else 0)  # write mean and rstd
        )

    def flops_of(self, direction: str) -> int:
        if direction == "bwd":
            each = (
                2  # xhat = (z - mean) * rstd
                + 3  # sums of dy * xhat and of dy
                + 1  # g = dy * weight
                + 3  # sums of g and of g * xhat
                + 4  # (g - mean(g) - xhat * mean(g * xhat)) * rstd
                + (1 if self.dropout_p else 0)  # the scale of what was kept
                + (1 if self.fused else 0)  # sum for x_bias
            )
        else:
            each = (
                (2 if self.fused else 0)  # + x_bias, + residual
                + (1 if self.dropout_p else 0)  # the scale of what is kept
                + 1  # sum for the mean
                + 1  # - mean
                + 2  # sum of squares
                + 3  # * rstd * weight + bias
            )
        return self.place.tokens * self.channels * each

    def tensors(self, normal: Callable[..., torch.Tensor]) -> Tensors:
        shape = (self.place.tokens, self.channels)
        tensors = {"x": normal(*shape), "weight": normal(self.channels), "bias": normal(self.channels)}
        if self.fused:
            tensors |= {"x_bias": normal(self.channels), "residual": normal(*shape)}
        return tensors

    def op(self, **tensors: Any) -> torch.Tensor:
        seed = shapes.seed(tensors["x"].device) if self.dropout_p else None
        return layer_norm(**tensors, dropout_p=self.dropout_p, seed=seed)

    def reference(self, **tensors: Any) -> torch.Tensor:
        return reference_layer_norm(**tensors)

    def parity(self, device: torch.device) -> dict[str, Comparison]:
        tensors, dy = self.inputs(device)
        out = self.with_gradients(self.op, tensors, dy)
        # What was dropped has gradient 0; elsewhere 0 is as good as impossible.
        kept = out["dx"] != 0 if self.dropout_p else None
        found = {} if kept is None else {"kept": kept_share(kept, self.dropout_p)}

        def reference(**t):
            return reference_layer_norm(**t, dropout_p=self.dropout_p, dropout_mask=kept)

        own = self.with_gradients(reference, tensors, dy)
        truth = self.with_gradients(reference, {k: t.double() for k, t in tensors.items()}, dy.double())
        return found | {k: compare(ends(out[k]), ends(own[k]), ends(truth[k])) for k in out}

    def rivals(self, device: torch.device) -> dict[str, Op]:
        def chain(x, weight, bias, x_bias=None, residual=None):
            if self.fused:
                x = F.dropout(x + x_bias, self.dropout_p) + residual
            return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-12)

        found: dict[str, Op] = {"torch": chain}
        if device.type == "cuda" and not self.fused and importlib.util.find_spec("liger_kernel") is not None:
            found["Liger"] = _liger
        return found


def _liger(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    from liger_kernel.transformers.functional import liger_layer_norm

    return liger_layer_norm(x, weight, bias, 1e-12)


def at(point: Point) -> list[BenchCase]:
    """After a sublayer, and where every direction is measured by itself too."""
    kinds = (True, False) if len(point.directions) > 2 else (True,)
    channels = shapes.config(point.place.model).hidden_size
    return [
        LayerNormCase(point.place, point.dtype, way, channels, fused) for fused in kinds for way in point.directions
    ]


def quick(places: list[Place]) -> list[BenchCase]:
    """A tiny one of each kind."""
    kinds = [("infer", False), ("bwd", False), ("infer", True), ("fwd", True), ("bwd", True), ("step", True)]
    return [LayerNormCase(places[0], torch.float32, way, 96, fused) for way, fused in kinds]
