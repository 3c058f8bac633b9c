"""MaskedAttention: the fused op as a module."""

from __future__ import annotations

import torch
from torch import nn

from fastconv.ops import masked_attention
from fastconv.reference import Packing
from fastconv.reference.ops import RelativePositions
from fastconv.reference.ops._checks import check_probability


class MaskedAttention(nn.Module):
    """Scaled dot-product attention of heads of at most 256 channels by the kernels. It has no parameters.

    causal: no query attends to a later key; the last query is at the last key
    dropout_p: probability, below 1, of dropping an attention probability in training
    scale: of the scores; 1 / sqrt(D) if None

    forward: q (B, Sq, H, D), k and v (B, Sk, H, D) -> (B, Sq, H, D)

    Raises: ValueError for a dropout_p outside [0, 1).
    """

    def __init__(self, *, causal: bool = False, dropout_p: float = 0.0, scale: float | None = None) -> None:
        super().__init__()
        check_probability("dropout_p", dropout_p)
        self.causal = causal
        self.dropout_p = dropout_p
        self.scale = scale

    def extra_repr(self) -> str:
        return f"causal={self.causal}, dropout_p={self.dropout_p}, scale={self.scale}"

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        lengths: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        relative: RelativePositions | None = None,
        head_mask: torch.Tensor | None = None,
        packing: Packing | tuple[Packing, Packing] | None = None,
    ) -> torch.Tensor:
        """See fastconv.ops.masked_attention; with a packing (T, H, D)."""
        return masked_attention(
            q,
            k,
            v,
            lengths=lengths,
            mask=mask,
            causal=self.causal,
            relative=relative,
            head_mask=head_mask,
            dropout_p=self.dropout_p if self.training else 0.0,
            scale=self.scale,
            packing=packing,
        )
