"""LayerNorm: torch's module with the fused op behind it."""

from __future__ import annotations

import torch
from torch import nn

from fastconv.ops import layer_norm


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm over the last dimension, same parameters and arguments; only `forward` is another.

    forward: input (..., C) float -> (..., C). A shape of several dimensions or elementwise_affine=False stays torch's.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """LayerNorm of input (..., C); see fastconv.ops.layer_norm."""
        if len(self.normalized_shape) != 1 or self.weight is None:
            return super().forward(input)
        return layer_norm(input, self.weight, self.bias, self.eps)
