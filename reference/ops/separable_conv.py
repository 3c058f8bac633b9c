"""A depthwise convolution along the sequence followed by a pointwise one."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ._checks import check_float, check_shape


def separable_conv(
    x: Tensor, depthwise: Tensor, pointwise: Tensor, bias: Tensor, *, gate: Tensor | None = None
) -> Tensor:
    """y[b, s] = (pointwise @ d[b, s] + bias) * gate[b, s], d[b, s, c] = sum_k depthwise[c, k] x[b, s + k - K//2, c].

    x is zero outside the sequence. In ConvBERT the gate is the query, and the product makes the span-based kernels.

    Args:
        x: (B, S, C), floating point.
        depthwise: (C, 1, K), K odd, dtype of `x`.
        pointwise: (O, C, 1), dtype of `x`.
        bias: (O, 1), dtype of `x`.
        gate: (B, S, O), dtype of `x`.

    Returns:
        (B, S, O), dtype of `x`.

    Raises:
        TypeError: an integer, bool or complex tensor.
        ValueError: an even K, shapes that don't fit, tensors on different devices.

    Source: Jiang et al., "ConvBERT" (2020, arXiv 2008.02496), the kernel generator of the span-based dynamic
    convolution; the convolution itself: Chollet, "Xception" (2016, arXiv 1610.02357).
    """
    check(x, depthwise, pointwise, bias, gate)
    (B, S, C), kernel_size, size_out = x.shape, depthwise.shape[-1], pointwise.shape[0]
    if B * S == 0:
        return x.new_zeros(B, S, size_out)
    spread = F.conv1d(x.transpose(1, 2), depthwise, padding=kernel_size // 2, groups=C)
    y = (F.conv1d(spread, pointwise) + bias).transpose(1, 2)
    return y if gate is None else y * gate


def check(x: Tensor, depthwise: Tensor, pointwise: Tensor, bias: Tensor, gate: Tensor | None) -> None:
    """Raise what `separable_conv` says for tensors that don't fit."""
    check_float(x=x, depthwise=depthwise, pointwise=pointwise, bias=bias, gate=gate)
    if x.dim() != 3:
        raise ValueError(f"x must have shape (B, S, C), got {tuple(x.shape)}")
    B, S, C = x.shape
    if depthwise.dim() != 3 or pointwise.dim() != 3:
        raise ValueError(
            f"depthwise and pointwise must have shapes (C, 1, K) and (O, C, 1), got {tuple(depthwise.shape)} and "
            f"{tuple(pointwise.shape)}"
        )
    kernel_size, size_out = depthwise.shape[-1], pointwise.shape[0]
    if kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd, got {kernel_size} (the last dimension of depthwise)")
    check_shape("depthwise", depthwise, (C, 1, kernel_size), "(C, 1, K)")
    check_shape("pointwise", pointwise, (size_out, C, 1), "(O, C, 1)")
    check_shape("bias", bias, (size_out, 1), "(O, 1)")
    if gate is not None:
        check_shape("gate", gate, (B, S, size_out), "(B, S, O)")
