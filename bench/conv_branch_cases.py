"""Cases of ConvBERT's whole convolution branch: separable_conv, the kernel's logits and span_dynamic_conv."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fastconv.bench.case import BenchCase, Op, Tensors
from fastconv.ops import span_dynamic_conv, span_kernel_logits
from fastconv.reference.ops import separable_conv as reference_separable_conv
from fastconv.reference.ops import span_dynamic_conv as reference_span_dynamic_conv


@dataclass(frozen=True)
class ConvBranchCase(BenchCase):
    """The branch on hidden states (batch, length, 2 * heads * size), its query and the value to convolve given."""

    batch: int
    length: int
    heads: int
    size: int
    dtype: torch.dtype
    direction: str
    taps: int = 9
    roundings = 3
    whole = True

    @property
    def name(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"conv_branch {self.direction} {self.batch}x{self.length}x{self.heads}x{self.size} k{self.taps} {dtype}"

    @property
    def targets(self) -> dict[str, float]:
        forward, step = (3.5, 2.8) if self.dtype == torch.float32 else (2.0, 2.5)
        if self.direction == "infer":
            return {"HF": forward, "HF / compiled": 5.0, "HF memory": 3.0}
        return {"HF": step, "HF memory": 3.0}

    @property
    def _half(self) -> int:
        return self.heads * self.size

    def bytes(self) -> int:
        tokens, half = self.batch * self.length, self._half
        inputs = tokens * (2 * half + half + half)  # hidden states, query, the convolution's input
        weights = 2 * half * self.taps + 2 * half * half + half + (half + 1) * self.heads * self.taps
        once = inputs + weights + tokens * half  # and the output
        if self.direction == "infer":
            return once * self.dtype.itemsize
        return (2 * once + inputs + weights) * self.dtype.itemsize  # again with dy, and every gradient

    def flops(self) -> int:
        half, logits = self._half, self.heads * self.taps
        each = 2 * (2 * half * self.taps + 2 * half * half + half * logits + half * self.taps) + half + 4 * logits
        return self.batch * self.length * each * (1 if self.direction == "infer" else 3)

    def tensors(self, normal: Callable[..., torch.Tensor]) -> Tensors:
        lead, half, logits = (self.batch, self.length), self._half, self.heads * self.taps
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

    def op(self, **t: torch.Tensor) -> torch.Tensor:
        separable = t["depthwise"], t["pointwise"], t["bias"]
        logits = span_kernel_logits(t["hidden"], *separable, t["query"], t["weight"], t["kernel_bias"])
        return span_dynamic_conv(t["value"], logits, self.taps)

    def reference(self, **t: torch.Tensor) -> torch.Tensor:
        span = reference_separable_conv(t["hidden"], t["depthwise"], t["pointwise"], t["bias"], gate=t["query"])
        return reference_span_dynamic_conv(t["value"], F.linear(span, t["weight"], t["kernel_bias"]), self.taps)

    def rivals(self, device: torch.device) -> dict[str, Op]:
        def unfolded(hidden, query, value, depthwise, pointwise, bias, weight, kernel_bias):
            # As ConvBertSelfAttention of transformers computes it.
            x = F.conv1d(hidden.transpose(1, 2), depthwise, padding=self.taps // 2, groups=depthwise.shape[0])
            key = (F.conv1d(x, pointwise) + bias).transpose(1, 2)
            kernel = F.linear(key * query, weight, kernel_bias).reshape(-1, self.taps, 1).softmax(1)
            image = value.transpose(1, 2).contiguous().unsqueeze(-1)
            columns = F.unfold(image, [self.taps, 1], padding=[self.taps // 2, 0])
            windows = columns.transpose(1, 2).reshape(-1, self.size, self.taps)
            return torch.matmul(windows, kernel).reshape(value.shape)

        return {"HF": unfolded}


def cases(device: torch.device, *, quick: bool = False) -> list[BenchCase]:
    """ConvBERT base."""
    half, single = torch.bfloat16, torch.float32
    if quick:
        return [ConvBranchCase(2, 16, 2, 8, single, direction) for direction in ("infer", "step")]
    sizes = [(8, 512), (64, 512)] if device.type == "cuda" else [(8, 512)]
    return [ConvBranchCase(*s, 6, 64, dt, way) for s in sizes for dt in (single, half) for way in ("infer", "step")]
