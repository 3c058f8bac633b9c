"""A linear layer whose input and output channels are split into groups that don't mix."""

from __future__ import annotations

import torch
from torch import Tensor

from ._checks import check_float, check_shape
from .activations import get_activation


def grouped_linear(x: Tensor, weight: Tensor, bias: Tensor, *, activation: str | None = None) -> Tensor:
    """y[..., g, :] = activation(x[..., g, :] @ weight[g] + bias[g]) for each of G groups of channels.

    Args:
        x: (..., G*I), floating point.
        weight: (G, I, O), dtype of `x`.
        bias: (G*O,), dtype of `x`.
        activation: a name of the transformers list, or None for none.

    Returns:
        (..., G*O), dtype of `x`.

    Raises:
        TypeError: an integer, bool or complex tensor.
        ValueError: shapes that don't fit, tensors on different devices, an unknown activation.

    Source: Jiang et al., "ConvBERT" (2020, arXiv 2008.02496), the grouped linear operator.
    """
    check(x, weight, bias)
    groups, size_in, _ = weight.shape
    split = x.reshape(*x.shape[:-1], groups, size_in)
    y = torch.einsum("...gi,gio->...go", split, weight)
    return get_activation(activation)(y.flatten(-2) + bias)


def check(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    """Raise what `grouped_linear` says for tensors that don't fit."""
    check_float(x=x, weight=weight, bias=bias)
    if weight.dim() != 3:
        raise ValueError(f"weight must have shape (G, I, O), got {tuple(weight.shape)}")
    groups, size_in, size_out = weight.shape
    if x.dim() == 0 or x.shape[-1] != groups * size_in:
        raise ValueError(
            f"x must have shape (..., G*I) = (..., {groups * size_in}) for a weight (G, I, O) = {tuple(weight.shape)}, "
            f"got {tuple(x.shape)}"
        )
    check_shape("bias", bias, (groups * size_out,), "(G*O,)")
