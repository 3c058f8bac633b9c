"""Cases of span_dynamic_conv."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fastconv.bench.case import BenchCase, Op, Tensors
from fastconv.ops import span_dynamic_conv
from fastconv.reference.ops import span_dynamic_conv as reference_span_dynamic_conv


@dataclass(frozen=True)
class SpanDynamicConvCase(BenchCase):
    """span_dynamic_conv of (batch, length, heads * size) with a kernel of `taps`."""

    batch: int
    length: int
    heads: int
    size: int
    dtype: torch.dtype
    direction: str
    taps: int = 9

    @property
    def name(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        shape = f"{self.batch}x{self.length}x{self.heads}x{self.size}"
        return f"span_dynamic_conv {self.direction} {shape} k{self.taps} {dtype}"

    @property
    def targets(self) -> dict[str, float]:
        if self.batch * self.length < 4096:
            return {}
        return {"HF": 8.0} if self.direction == "bwd" else {"HF": 8.0, "torch.compile": 2.0, "copy": 0.7}

    @property
    def _tokens(self) -> int:
        return self.batch * self.length

    def bytes(self) -> int:
        size = self.dtype.itemsize
        values = self._tokens * self.heads * self.size * size
        logits = self._tokens * self.heads * self.taps * size
        stats = 2 * self._tokens * self.heads * 4
        if self.direction == "bwd":
            read = 2 * values + logits + stats  # dy, value, logits and what the forward saved
            return read + values + logits  # write both gradients
        saved = stats if self.direction == "fwd" else 0  # the largest logits and the sums, for the backward
        return values + logits + values + saved  # read value and logits, write y

    def flops(self) -> int:
        softmax = 4 * self.taps  # - largest, exp, sum, / sum
        each = self.size * self.taps * 2  # a product and a sum for each tap of a channel
        if self.direction == "bwd":
            each = 2 * each + 4 * self.taps  # dvalue and the dot products; the softmax's derivative
        return self._tokens * self.heads * (each + softmax)

    def tensors(self, normal: Callable[..., torch.Tensor]) -> Tensors:
        lead = (self.batch, self.length)
        return {
            "value": normal(*lead, self.heads * self.size),
            "kernel_logits": normal(*lead, self.heads * self.taps),
        }

    def op(self, **tensors: torch.Tensor) -> torch.Tensor:
        return span_dynamic_conv(**tensors, kernel_size=self.taps)

    def reference(self, **tensors: torch.Tensor) -> torch.Tensor:
        return reference_span_dynamic_conv(**tensors, kernel_size=self.taps)

    def rivals(self, device: torch.device) -> dict[str, Op]:
        def unfolded(value, kernel_logits):
            # As ConvBertSelfAttention of transformers computes it.
            kernel = kernel_logits.reshape(-1, self.taps, 1).softmax(1)
            columns = F.unfold(
                value.transpose(1, 2).contiguous().unsqueeze(-1), [self.taps, 1], padding=[self.taps // 2, 0]
            )
            windows = columns.transpose(1, 2).reshape(-1, self.size, self.taps)
            return torch.matmul(windows, kernel).reshape(value.shape)

        return {"HF": unfolded}


def cases(device: torch.device, *, quick: bool = False) -> list[BenchCase]:
    """ConvBERT base, and medium-small with its heads of 48."""
    half, single = torch.bfloat16, torch.float32
    if quick:
        shapes = [(2, 64, 2, 48, single)]
    elif device.type == "cuda":
        shapes = [(batch, length, 6, 64, half) for batch, length in ((1, 128), (8, 512), (64, 512))]
        shapes += [(64, 512, 4, 48, half), (8, 512, 6, 64, torch.float16), (8, 512, 6, 64, single)]
    else:
        shapes = [(8, 512, 6, 64, single), (8, 512, 6, 64, half)]
    return [SpanDynamicConvCase(*shape, direction) for shape in shapes for direction in ("infer", "fwd", "bwd")]
