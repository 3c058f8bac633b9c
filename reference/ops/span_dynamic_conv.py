"""Span-based dynamic convolution: every token of every head has its own softmax-normalised kernel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._checks import check_float


def span_dynamic_conv(value: Tensor, kernel_logits: Tensor, kernel_size: int) -> Tensor:
    """y[b, s, h, :] = sum_k softmax(kernel_logits[b, s, h, :])[k] * value[b, s + k - K//2, h, :].

    value is zero outside the sequence. The softmax is computed in fp32, or in fp64 for fp64 inputs.

    Args:
        value: (B, S, H*D), floating point.
        kernel_logits: (B, S, H*K), dtype of `value`.
        kernel_size: K, odd.

    Returns:
        (B, S, H*D), dtype of `value`.

    Raises:
        TypeError: an integer, bool or complex tensor.
        ValueError: an even K, shapes that don't fit, tensors on different devices.

    Source: Jiang et al., "ConvBERT" (2020, arXiv 2008.02496), span-based dynamic convolution; Wu et al., "Pay Less
    Attention with Lightweight and Dynamic Convolutions" (2019, arXiv 1901.10430), sections 3 and 4.
    """
    heads = check(value, kernel_logits, kernel_size)
    B, S, C = value.shape
    if B * S == 0:
        return value.clone()
    dtype = torch.promote_types(value.dtype, torch.float32)
    kernel = kernel_logits.to(dtype).reshape(B, S, heads, 1, kernel_size).softmax(dim=-1)
    padded = F.pad(value.to(dtype), (0, 0, kernel_size // 2, kernel_size // 2))
    windows = padded.unfold(1, kernel_size, 1).reshape(B, S, heads, C // heads, kernel_size)
    return (windows * kernel).sum(dim=-1).reshape(B, S, C).to(value.dtype)


def check(value: Tensor, kernel_logits: Tensor, kernel_size: int) -> int:
    """Raise what `span_dynamic_conv` says for arguments that don't fit; return the number of heads."""
    check_float(value=value, kernel_logits=kernel_logits)
    if isinstance(kernel_size, bool) or not isinstance(kernel_size, int):
        raise TypeError(f"kernel_size must be an int, got {type(kernel_size).__name__}")
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd, got {kernel_size}")
    if value.dim() != 3 or kernel_logits.dim() != 3 or value.shape[:2] != kernel_logits.shape[:2]:
        raise ValueError(
            f"value and kernel_logits must have shapes (B, S, H*D) and (B, S, H*K), got {tuple(value.shape)} and "
            f"{tuple(kernel_logits.shape)}"
        )
    heads = kernel_logits.shape[2] // kernel_size  # not divmod: a trace's sizes are tensors
    if heads * kernel_size != kernel_logits.shape[2] or heads == 0 or value.shape[2] % heads or value.shape[2] == 0:
        raise ValueError(
            f"kernel_logits (B, S, H*K) must have H*K divisible by kernel_size {kernel_size}, and value (B, S, H*D) "
            f"H*D divisible by H, got {tuple(kernel_logits.shape)} and {tuple(value.shape)}"
        )
    return heads
