"""Span-based dynamic convolution: every token of every head has its own softmax-normalised kernel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..packing import Packing
from ._checks import check_float, check_packing


def span_dynamic_conv(
    value: Tensor, kernel_logits: Tensor, kernel_size: int, *, packing: Packing | None = None
) -> Tensor:
    """y[b, s, h, :] = sum_k softmax(kernel_logits[b, s, h, :])[k] * value[b, s + k - K//2, h, :].

    value is zero outside the sequence. The softmax is computed in fp32, or in fp64 for fp64 inputs.

    Args:
        value: (B, S, H*D), floating point.
        kernel_logits: (B, S, H*K), dtype of `value`.
        kernel_size: K, odd.
        packing: where sequences begin and end; then value is (T, H*D) and kernel_logits (T, H*K).

    Returns:
        The shape and the dtype of `value`.

    Raises:
        TypeError: an integer, bool or complex tensor.
        ValueError: an even K, shapes that don't fit, tensors on different devices, a packing of other tokens.

    Source: Jiang et al., "ConvBERT" (2020, arXiv 2008.02496), span-based dynamic convolution; Wu et al., "Pay Less
    Attention with Lightweight and Dynamic Convolutions" (2019, arXiv 1901.10430), sections 3 and 4.
    """
    heads = check(value, kernel_logits, kernel_size, packing)
    if value.numel() == 0:
        return value.clone()
    if packing is not None:
        parts = zip(value.split(packing.lengths), kernel_logits.split(packing.lengths), strict=True)
        return torch.cat([span_dynamic_conv(v[None], logits[None], kernel_size)[0] for v, logits in parts])
    B, S, C = value.shape
    dtype = torch.promote_types(value.dtype, torch.float32)
    kernel = kernel_logits.to(dtype).reshape(B, S, heads, 1, kernel_size).softmax(dim=-1)
    padded = F.pad(value.to(dtype), (0, 0, kernel_size // 2, kernel_size // 2))
    windows = padded.unfold(1, kernel_size, 1).reshape(B, S, heads, C // heads, kernel_size)
    return (windows * kernel).sum(dim=-1).reshape(B, S, C).to(value.dtype)


def check(value: Tensor, kernel_logits: Tensor, kernel_size: int, packing: Packing | None = None) -> int:
    """Raise what `span_dynamic_conv` says for arguments that don't fit; return the number of heads."""
    check_float(value=value, kernel_logits=kernel_logits)
    if isinstance(kernel_size, bool) or not isinstance(kernel_size, int):
        raise TypeError(f"kernel_size must be an int, got {type(kernel_size).__name__}")
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd, got {kernel_size}")
    dims, lead = (3, "B, S") if packing is None else (2, "T")
    if value.dim() != dims or kernel_logits.dim() != dims or value.shape[:-1] != kernel_logits.shape[:-1]:
        raise ValueError(
            f"value and kernel_logits must have shapes ({lead}, H*D) and ({lead}, H*K), got {tuple(value.shape)} and "
            f"{tuple(kernel_logits.shape)}"
        )
    check_packing(packing, value)
    heads = kernel_logits.shape[-1] // kernel_size  # not divmod: a trace's sizes are tensors
    if heads * kernel_size != kernel_logits.shape[-1] or heads == 0 or value.shape[-1] % heads or value.shape[-1] == 0:
        raise ValueError(
            f"kernel_logits ({lead}, H*K) must have H*K divisible by kernel_size {kernel_size}, and value "
            f"({lead}, H*D) H*D divisible by H, got {tuple(kernel_logits.shape)} and {tuple(value.shape)}"
        )
    return heads
