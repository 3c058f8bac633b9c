"""grouped_linear: a dense layer over groups of channels. Its formulation is native on every device."""

from __future__ import annotations

import torch

from fastconv.ops import _onednn
from fastconv.reference.ops import get_activation
from fastconv.reference.ops.grouped_linear import check


def grouped_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, activation: str | None = None
) -> torch.Tensor:
    """activation(x[..., g, :] @ weight[g] + bias[g]) for each of G groups of channels.

    x: (..., G*I) float
    weight: (G, I, O), bias: (G*O,), dtype of x
    activation: a name of the transformers list, or None
    returns: (..., G*O), dtype of x

    Raises: TypeError for tensors that are not real floating point; ValueError for shapes, devices or an activation that
    don't fit. Source: Jiang et al., arXiv 2008.02496, section 4.3.
    """
    check(x, weight, bias)
    function = get_activation(activation)
    groups, size_in, size_out = weight.shape
    if _onednn.usable(x, weight, bias):
        fused = activation if _onednn.fuses(activation) else None
        parts = [
            _onednn.linear(x_g, weight_g.t(), bias_g, fused)
            for x_g, weight_g, bias_g in zip(x.split(size_in, -1), weight.unbind(0), bias.split(size_out), strict=True)
        ]
        y = torch.cat(parts, -1)
        return y if fused == activation else function(y)
    # One batched product over the groups; the bias goes in with it.
    split = x.reshape(-1, groups, size_in).transpose(0, 1)
    y = torch.baddbmm(bias.view(groups, 1, size_out), split, weight).transpose(0, 1)
    return function(y.reshape(*x.shape[:-1], groups * size_out))
