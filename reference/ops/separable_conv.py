"""A depthwise convolution along the sequence followed by a pointwise one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..packing import Packing
from ._checks import check_float, check_packing, check_shape


def separable_conv(
    x: Tensor,
    depthwise: Tensor,
    pointwise: Tensor,
    bias: Tensor,
    *,
    gate: Tensor | None = None,
    packing: Packing | None = None,
) -> Tensor:
    """y[b, s] = (pointwise @ d[b, s] + bias) * gate[b, s], d[b, s, c] = sum_k depthwise[c, k] x[b, s + k - K//2, c].

    x is zero outside the sequence. In ConvBERT the gate is the query, and the product makes the span-based kernels.

    Args:
        x: (B, S, C), floating point.
        depthwise: (C, 1, K), K odd, dtype of `x`.
        pointwise: (O, C, 1), dtype of `x`.
        bias: (O, 1), dtype of `x`.
        gate: (B, S, O), dtype of `x`.
        packing: where sequences begin and end; then x is (T, C) and gate (T, O).

    Returns:
        (B, S, O), with a packing (T, O), dtype of `x`.

    Raises:
        TypeError: an integer, bool or complex tensor.
        ValueError: an even K, shapes that don't fit, tensors on different devices, a packing of other tokens.

    Source: Jiang et al., "ConvBERT" (2020, arXiv 2008.02496), the kernel generator of the span-based dynamic
    convolution; the convolution itself: Chollet, "Xception" (2016, arXiv 1610.02357).
    """
    check(x, depthwise, pointwise, bias, gate, packing)
    if packing is not None and x.shape[0] > 0:
        gates = [None] * len(packing.lengths) if gate is None else gate.split(packing.lengths)
        parts = [
            separable_conv(part[None], depthwise, pointwise, bias, gate=None if g is None else g[None])[0]
            for part, g in zip(x.split(packing.lengths), gates, strict=True)
        ]
        return torch.cat(parts)
    if packing is not None:
        return x.new_zeros(0, pointwise.shape[0])
    (B, S, C), kernel_size, size_out = x.shape, depthwise.shape[-1], pointwise.shape[0]
    if B * S == 0:
        return x.new_zeros(B, S, size_out)
    spread = F.conv1d(x.transpose(1, 2), depthwise, padding=kernel_size // 2, groups=C)
    y = (F.conv1d(spread, pointwise) + bias).transpose(1, 2)
    return y if gate is None else y * gate


def check(
    x: Tensor, depthwise: Tensor, pointwise: Tensor, bias: Tensor, gate: Tensor | None, packing: Packing | None = None
) -> None:
    """Raise what `separable_conv` says for tensors that don't fit."""
    check_float(x=x, depthwise=depthwise, pointwise=pointwise, bias=bias, gate=gate)
    dims, lead = (3, "B, S") if packing is None else (2, "T")
    if x.dim() != dims or x.shape[-1] == 0:
        raise ValueError(f"x must have shape ({lead}, C), C at least 1, got {tuple(x.shape)}")
    check_packing(packing, x)
    C = x.shape[-1]
    if depthwise.dim() != 3 or pointwise.dim() != 3 or pointwise.shape[0] == 0:
        raise ValueError(
            f"depthwise and pointwise must have shapes (C, 1, K) and (O, C, 1), O at least 1, got "
            f"{tuple(depthwise.shape)} and {tuple(pointwise.shape)}"
        )
    kernel_size, size_out = depthwise.shape[-1], pointwise.shape[0]
    if kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd, got {kernel_size} (the last dimension of depthwise)")
    check_shape("depthwise", depthwise, (C, 1, kernel_size), "(C, 1, K)")
    check_shape("pointwise", pointwise, (size_out, C, 1), "(O, C, 1)")
    check_shape("bias", bias, (size_out, 1), "(O, 1)")
    if gate is not None:
        check_shape("gate", gate, (*x.shape[:-1], size_out), f"({lead}, O)")
