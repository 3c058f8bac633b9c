"""A dense layer followed by an activation."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ._checks import check_float, check_shape
from .activations import get_activation


def linear_act(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    """y = activation(x @ weight.T + bias).

    Args:
        x: (..., I), floating point.
        weight: (O, I), dtype of `x`.
        bias: (O,), dtype of `x`, or None.
        activation: a name of the transformers list, or None for none.

    Returns:
        (..., O), dtype of `x`.

    Raises:
        TypeError: an integer, bool or complex tensor.
        ValueError: shapes that don't fit, tensors on different devices, an unknown activation.

    Source: Vaswani et al., "Attention Is All You Need" (2017), section 3.3; its GELU: Devlin et al., "BERT" (2018),
    appendix A.2.
    """
    check(x, weight, bias)
    return get_activation(activation)(F.linear(x, weight, bias))


def check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise what `linear_act` says for tensors that don't fit."""
    check_float(x=x, weight=weight, bias=bias)
    if x.dim() == 0 or weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"x and weight must have shapes (..., I) and (O, I), got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if bias is not None:
        check_shape("bias", bias, (weight.shape[0],), "(O,)")
