"""The kernel logits of ConvBERT's spans: a gated separable convolution followed by a dense layer."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..packing import Packing
from ._checks import check_float, check_shape
from .separable_conv import check as check_separable_conv
from .separable_conv import separable_conv


def span_kernel_logits(
    x: Tensor,
    depthwise: Tensor,
    pointwise: Tensor,
    bias: Tensor,
    gate: Tensor,
    weight: Tensor,
    kernel_bias: Tensor | None,
    *,
    packing: Packing | None = None,
) -> Tensor:
    """y = separable_conv(x, depthwise, pointwise, bias, gate=gate) @ weight.T + kernel_bias.

    In ConvBERT the gate is the query, and y's softmax over the taps is the dynamic kernel (span_dynamic_conv).

    Args:
        x: (B, S, C), floating point.
        depthwise: (C, 1, K), K odd, dtype of `x`.
        pointwise: (O, C, 1), dtype of `x`.
        bias: (O, 1), dtype of `x`.
        gate: (B, S, O), dtype of `x`.
        weight: (N, O), N = H*K for H heads' kernels of K taps, dtype of `x`.
        kernel_bias: (N,), dtype of `x`, or None.
        packing: where sequences begin and end; then x is (T, C) and gate (T, O).

    Returns:
        (B, S, N), with a packing (T, N), dtype of `x`.

    Raises:
        TypeError: an integer, bool or complex tensor, no gate.
        ValueError: an even K, shapes that don't fit, tensors on different devices, a packing of other tokens.

    Source: Jiang et al., "ConvBERT" (2020, arXiv 2008.02496), the kernel generator of the span-based dynamic
    convolution.
    """
    check(x, depthwise, pointwise, bias, gate, weight, kernel_bias, packing)
    spans = separable_conv(x, depthwise, pointwise, bias, gate=gate, packing=packing)
    return F.linear(spans, weight, kernel_bias)


def check(
    x: Tensor,
    depthwise: Tensor,
    pointwise: Tensor,
    bias: Tensor,
    gate: Tensor,
    weight: Tensor,
    kernel_bias: Tensor | None,
    packing: Packing | None = None,
) -> None:
    """Raise what `span_kernel_logits` says for tensors that don't fit."""
    if not isinstance(gate, Tensor):
        raise TypeError(f"gate must be a torch.Tensor, got {type(gate).__name__}")
    check_float(
        x=x, depthwise=depthwise, pointwise=pointwise, bias=bias, gate=gate, weight=weight, kernel_bias=kernel_bias
    )
    check_separable_conv(x, depthwise, pointwise, bias, gate, packing)
    size_between = pointwise.shape[0]
    if weight.dim() != 2 or weight.shape[0] == 0:
        raise ValueError(f"weight must have shape (N, O), N at least 1, got {tuple(weight.shape)}")
    check_shape("weight", weight, (weight.shape[0], size_between), "(N, O)")
    if kernel_bias is not None:
        check_shape("kernel_bias", kernel_bias, (weight.shape[0],), "(N,)")
