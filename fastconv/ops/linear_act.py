"""linear_act: y = activation(x @ weight.T + bias). Its formulation is native on every device."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastconv.ops import _onednn
from fastconv.reference.ops import get_activation
from fastconv.reference.ops.linear_act import check


def linear_act(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str | None
) -> torch.Tensor:
    """A dense layer with its bias and activation.

    x: (..., I) float
    weight: (O, I), bias: (O,) or None, dtype of x
    activation: a name of the transformers list ("gelu" is the erf form on every device), or None
    returns: (..., O), dtype of x

    Raises: TypeError for tensors that are not real floating point; ValueError for shapes, devices or an activation that
    don't fit. Source: Devlin et al., arXiv 1810.04805, appendix A.2 (GELU: Hendrycks, Gimpel, arXiv 1606.08415).
    """
    check(x, weight, bias)
    function = get_activation(activation)
    if _onednn.usable(x, weight, bias):
        if _onednn.fuses(activation):
            return _onednn.linear(x, weight, bias, activation)
        return function(_onednn.linear(x, weight, bias))
    return function(F.linear(x, weight, bias))
