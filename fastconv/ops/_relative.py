"""What relative positions add to the scores of masked_attention, from two matrix products and no gathered rows."""

from __future__ import annotations

import torch

from fastconv.reference.ops.masked_attention import RelativePositions


def relative_bias(q: torch.Tensor, k: torch.Tensor, relative: RelativePositions) -> torch.Tensor:
    """(B, Sq, H, D), (B, Sk, H, D) -> (B, H, Sq, Sk), in fp32 at least: see `RelativePositions`.

    Each query is multiplied with the Sq + Sk - 1 rows of the table that its distances can ask for; what belongs to key
    j then lies one place further on in each query's row, which is a view of the same memory.
    """
    Sq, Sk, P = q.shape[1], k.shape[1], (relative[0].shape[0] + 1) // 2
    wide = torch.promote_types(q.dtype, torch.float32)
    # Row r of the band is for the distance i - j = r + 1 - Sk, of the query at the end for the last.
    band = relative[0].narrow(0, P - 1 + (Sk - Sq) + 1 - Sk, Sq + Sk - 1).to(wide)
    bias = _shifted(torch.einsum("bqhd,rd->bhqr", q.to(wide), band.flip(0)), Sq - 1, Sk)
    if not relative[1]:
        return bias
    return bias + _shifted(torch.einsum("bkhd,rd->bhkr", k.to(wide), band), Sk - 1, Sq).transpose(-1, -2)


def _shifted(x: torch.Tensor, start: int, size: int) -> torch.Tensor:
    """y[..., i, j] = x[..., i, start - i + j], for x (..., N, W) with W = N + size - 1 and start = N - 1."""
    *lead, N, W = x.shape
    if N == 1:
        return x
    return x.reshape(*lead, N * W).narrow(-1, start, N * (W - 1)).unflatten(-1, (N, W - 1))[..., :size]
