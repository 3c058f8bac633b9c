"""span_dynamic_conv: every token of every head has its own softmax-normalized kernel. Native on every device."""

from __future__ import annotations

import torch

from fastconv.reference.ops.span_dynamic_conv import check


def span_dynamic_conv(
    value: torch.Tensor, kernel_logits: torch.Tensor, kernel_size: int, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """sum_k softmax(kernel_logits[b, s, h, :])[k] * value[b, s + k - K//2, h, :].

    value: (B, S, H*D) float, zero outside the sequence
    kernel_logits: (B, S, H*K), dtype of value
    kernel_size: K, odd
    out: (B, S, H*D), written and returned if given: a slice of a wider tensor, say; not with a gradient
    returns: (B, S, H*D), dtype of value; softmax and sum are fp32 at least

    Raises: TypeError for tensors that are not real floating point; ValueError for an even K, shapes or devices that
    don't fit, an `out` unlike value, and an `out` where a gradient is needed. Source: Jiang et al., arXiv
    2008.02496, section 4.2.
    """
    heads = check(value, kernel_logits, kernel_size)
    if out is not None:
        _check_out(out, value, kernel_logits)
    B, S, C = value.shape
    # Sums of half-precision products in half precision would lose a bit a tap.
    wide = torch.promote_types(value.dtype, torch.float32)
    kernel = torch.softmax(kernel_logits.view(B, S, heads, kernel_size), -1, dtype=wide).unsqueeze(-1)
    x = value.reshape(B, S, heads, C // heads).to(wide)
    y = x * kernel[:, :, :, kernel_size // 2]
    # Shift-and-add, the central tap first: K passes, where windows in memory would be K times as large.
    for k in range(kernel_size):
        shift = k - kernel_size // 2
        if 0 < abs(shift) < S:
            to, source = (
                (slice(-shift, None), slice(None, shift)) if shift < 0 else (slice(None, -shift), slice(shift, None))
            )
            y[:, to].addcmul_(x[:, source], kernel[:, to, :, k])
    y = y.view(B, S, C).to(value.dtype)
    return y if out is None else out.copy_(y)


def _check_out(out: torch.Tensor, value: torch.Tensor, kernel_logits: torch.Tensor) -> None:
    if out.shape != value.shape or out.dtype != value.dtype or out.device != value.device:
        raise ValueError(
            f"out must be {tuple(value.shape)} {value.dtype} on {value.device}, like value, got {tuple(out.shape)} "
            f"{out.dtype} on {out.device}"
        )
    if torch.is_grad_enabled() and (value.requires_grad or kernel_logits.requires_grad or out.requires_grad):
        raise ValueError("out can't be used where a gradient is needed: value, kernel_logits or out requires grad")
