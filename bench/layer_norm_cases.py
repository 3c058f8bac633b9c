"""Cases of layer_norm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fastconv.bench.case import BenchCase, Op, Tensors, ends
from fastconv.ops import layer_norm
from fastconv.reference.ops import layer_norm as reference_layer_norm
from fastconv.tolerance import Comparison, compare


@dataclass(frozen=True)
class LayerNormCase(BenchCase):
    """layer_norm of (tokens, channels), alone or with bias, dropout and residual before it.

    "infer" is without dropout.
    """

    tokens: int
    channels: int
    dtype: torch.dtype
    direction: str
    fused: bool

    @property
    def name(self) -> str:
        kind = "bias+dropout+residual+" if self.dropout_p else "bias+residual+" if self.fused else ""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{kind}layer_norm {self.direction} {self.tokens}x{self.channels} {dtype}"

    @property
    def dropout_p(self) -> float:
        return 0.1 if self.fused and self.direction != "infer" else 0.0

    @property
    def targets(self) -> dict[str, float]:
        # From 16k tokens on launches and tails no longer show.
        if self.tokens < 16384:
            return {}
        if self.direction == "bwd":
            return {"torch": 1.4} if self.fused else {}
        return {"torch.compile": 1.0} if self.fused else {"copy": 0.90, "torch.compile": 1.0}

    def bytes(self) -> int:
        size = self.dtype.itemsize
        tensor, vector, stats = self.tokens * self.channels * size, self.channels * size, self.tokens * 4
        seed = 8 if self.dropout_p else 0
        if self.direction == "bwd":
            return (
                2 * tensor  # read dy and z
                + 2 * stats  # read mean and rstd
                + vector  # read weight
                + seed
                + tensor  # write dx
                + (tensor if self.dropout_p else 0)  # write the residual's gradient: with dropout it isn't dx
                + (3 if self.fused else 2) * vector  # write the gradients of weight, bias and x_bias
            )  # the partial sums of these are the kernel's own affair
        training = self.direction == "fwd"
        return (
            tensor  # read x
            + (tensor + vector if self.fused else 0)  # read residual and x_bias
            + 2 * vector  # read weight and bias
            + seed
            + tensor  # write y
            + (tensor if training and self.fused else 0)  # write z for the backward; alone, x is z
            + (2 * stats if training else 0)  # write mean and rstd
        )

    def flops(self) -> int:
        if self.direction == "bwd":
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
        return self.tokens * self.channels * each

    def tensors(self, normal: Callable[..., torch.Tensor]) -> Tensors:
        shape = (self.tokens, self.channels)
        tensors = {"x": normal(*shape), "weight": normal(self.channels), "bias": normal(self.channels)}
        if self.fused:
            tensors |= {"x_bias": normal(self.channels), "residual": normal(*shape)}
        return tensors

    def op(self, **tensors: torch.Tensor) -> torch.Tensor:
        seed = torch.ones((), dtype=torch.int64, device=tensors["x"].device) if self.dropout_p else None
        return layer_norm(**tensors, dropout_p=self.dropout_p, seed=seed)

    def reference(self, **tensors: torch.Tensor) -> torch.Tensor:
        return reference_layer_norm(**tensors)

    def parity(self, device: torch.device) -> dict[str, Comparison]:
        tensors, dy = self.inputs(device)
        out = self.with_gradients(self.op, tensors, dy)
        # What was dropped has gradient 0; elsewhere 0 is as good as impossible.
        kept = out["dx"] != 0 if self.dropout_p else None

        def reference(**t):
            return reference_layer_norm(**t, dropout_p=self.dropout_p, dropout_mask=kept)

        own = self.with_gradients(reference, tensors, dy)
        truth = self.with_gradients(reference, {k: t.double() for k, t in tensors.items()}, dy.double())
        return {k: compare(ends(out[k]), ends(own[k]), ends(truth[k])) for k in out}

    def rivals(self, device: torch.device) -> dict[str, Op]:
        def chain(x, weight, bias, x_bias=None, residual=None):
            if self.fused:
                x = F.dropout(x + x_bias, self.dropout_p) + residual
            return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-12)

        return {"torch": chain}


def cases(device: torch.device, *, quick: bool = False) -> list[BenchCase]:
    """Every case for a device: the shapes of the published models, and on a GPU enough tokens to fill it."""
    half, single = torch.bfloat16, torch.float32
    if quick:
        shapes = [(256, 384, single)]
    elif device.type == "cuda":
        # 128 tokens: the latency of a single sentence. 65536: eight times the largest L2.
        shapes = [(t, c, half) for t in (128, 16384, 65536) for c in (384, 768)]
        shapes += [(16384, 768, torch.float16), (16384, 768, single), (16384, 4096, half)]
    else:
        shapes = [(4096, 768, single), (4096, 768, half), (128, 768, single)]
    kinds = [("infer", False), ("bwd", False), ("infer", True), ("fwd", True), ("bwd", True)]
    return [LayerNormCase(t, c, dtype, direction, fused) for t, c, dtype in shapes for direction, fused in kinds]
