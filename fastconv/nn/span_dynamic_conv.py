"""SpanDynamicConv: the fused op as a module."""

from __future__ import annotations

import torch
from torch import nn

from fastconv.ops import span_dynamic_conv
from fastconv.ops._windows import check_kernel_size
from fastconv.reference import Packing


class SpanDynamicConv(nn.Module):
    """Span-based dynamic convolution with kernels of `kernel_size` taps, odd and at most 31. It has no parameters.

    forward: value (B, S, H*D), kernel_logits (B, S, H*kernel_size) -> (B, S, H*D)
    """

    def __init__(self, kernel_size: int) -> None:
        super().__init__()
        if isinstance(kernel_size, bool) or not isinstance(kernel_size, int):
            raise ValueError(f"kernel_size must be an odd int, got {kernel_size!r}")
        check_kernel_size(kernel_size)
        self.kernel_size = kernel_size

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}"

    def forward(
        self, value: torch.Tensor, kernel_logits: torch.Tensor, *, packing: Packing | None = None
    ) -> torch.Tensor:
        """See fastconv.ops.span_dynamic_conv; with a packing (T, ...)."""
        return span_dynamic_conv(value, kernel_logits, self.kernel_size, packing=packing)
