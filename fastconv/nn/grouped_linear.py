"""GroupedLinear: ConvBERT's module with the fused op behind it."""

from __future__ import annotations

import torch

from fastconv.ops import grouped_linear
from fastconv.reference.layers import GroupedLinear as ReferenceGroupedLinear


class GroupedLinear(ReferenceGroupedLinear):
    """A linear layer over groups of channels, with the parameters of ConvBERT's checkpoints.

    GroupedLinear(size_in, size_out, num_groups); forward: (..., size_in) -> (..., size_out)
    """

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """See fastconv.ops.grouped_linear."""
        return grouped_linear(hidden_states, self.weight, self.bias)
