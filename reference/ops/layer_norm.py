"""LayerNorm with the additions that precede it in an encoder layer: bias, dropout, residual."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._checks import check_float, check_probability, check_shape


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float = 1e-12,
    *,
    x_bias: Tensor | None = None,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_mask: Tensor | None = None,
) -> Tensor:
    """y = LayerNorm(dropout(x + x_bias) + residual) over the last dimension.

    LayerNorm(z) = (z - mean(z)) / sqrt(var(z) + eps) * weight + bias, with the biased variance. Everything is computed
    in fp32, or in fp64 for an fp64 `x`, and rounded once, to the dtype of `x`.

    Args:
        x: (..., C), floating point.
        weight: (C,), any floating dtype.
        bias: (C,), any floating dtype, or None.
        eps: added to the variance.
        x_bias: (C,), any floating dtype: the bias of the linear layer that made `x`.
        residual: (..., C), the shape of `x`.
        dropout_p: the probability that a value is dropped; kept values are scaled by 1 / (1 - p).
        dropout_mask: (..., C), bool, True where a value is kept. Explicit, so that the mask of any other
            implementation can be replayed.

    Returns:
        (..., C), dtype of `x`.

    Raises:
        TypeError: an integer, bool or complex tensor where a floating one is needed; a mask that is not bool.
        ValueError: a shape that doesn't fit `x`, tensors on different devices, `dropout_p` outside [0, 1) or without
            a mask.

    Source: Ba, Kiros, Hinton, "Layer Normalization" (2016), section 3; the sum before it: Vaswani et al., "Attention
    Is All You Need" (2017), sections 3.1 and 5.4.
    """
    check(x, weight, bias, x_bias, residual, dropout_p)
    _check_dropout_mask(x, dropout_p, dropout_mask)
    dtype = torch.promote_types(x.dtype, torch.float32)
    z = x.to(dtype)
    if x_bias is not None:
        z = z + x_bias.to(dtype)
    if dropout_mask is not None:
        z = z * dropout_mask / (1.0 - dropout_p)
    if residual is not None:
        z = z + residual.to(dtype)
    y = F.layer_norm(z, z.shape[-1:], weight.to(dtype), None if bias is None else bias.to(dtype), eps)
    return y.to(x.dtype)


def check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x_bias: Tensor | None,
    residual: Tensor | None,
    dropout_p: float,
) -> None:
    """Raise what `layer_norm` says for arguments that don't fit."""
    check_float(x=x, weight=weight, bias=bias, x_bias=x_bias, residual=residual)
    check_probability("dropout_p", dropout_p)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must have shape (..., C) with C >= 1, got {tuple(x.shape)}")
    channels = (x.shape[-1],)
    check_shape("weight", weight, channels, "(C,)")
    if bias is not None:
        check_shape("bias", bias, channels, "(C,)")
    if x_bias is not None:
        check_shape("x_bias", x_bias, channels, "(C,)")
    if residual is not None:
        check_shape("residual", residual, tuple(x.shape), "that of x")


def _check_dropout_mask(x: Tensor, dropout_p: float, dropout_mask: Tensor | None) -> None:
    if dropout_mask is None:
        if dropout_p > 0.0:
            raise ValueError(f"dropout_p = {dropout_p} needs dropout_mask, a bool tensor of the shape of x")
        return
    if dropout_mask.dtype != torch.bool:
        raise TypeError(f"dropout_mask must be a bool tensor, got {dropout_mask.dtype}")
    check_shape("dropout_mask", dropout_mask, tuple(x.shape), "that of x")
