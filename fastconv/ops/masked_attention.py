"""masked_attention: scaled dot-product attention over (B, S, H, D). Native on every device."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastconv.reference.ops.masked_attention import check


def masked_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
) -> torch.Tensor:
    """softmax(q @ k.T * scale + mask) @ v for every batch row and head, with dropout on the probabilities.

    q: (B, Sq, H, D) float; k, v: (B, Sk, H, D), dtype of q; any strides with a contiguous last dimension are taken as
        they are, so a packed projection needs no copy
    mask: broadcastable to (B, H, Sq, Sk): bool, True where a key may be attended to, or floating point, added to the
        scores; a row whose keys are all forbidden gives a finite result, nearly the average of v
    dropout_p: probability, below 1, of dropping a probability, drawn from torch's generator
    scale: 1 / sqrt(D) if None
    returns: (B, Sq, H, D), dtype of q, contiguous on a CPU

    Raises: TypeError for tensors that are not real floating point (a mask may be bool); ValueError for shapes, devices
    or a dropout_p that don't fit. Source: Vaswani et al., arXiv 1706.03762, section 3.2.1.
    """
    check(q, k, v, mask, None, dropout_p)
    if mask is not None:
        mask = _additive(mask, q.dtype)
        mask = mask.expand(*(-1,) * (mask.dim() - 1), k.shape[1])
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, dropout_p, scale=scale).transpose(1, 2)


def _additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The mask as what is added to scores of `dtype`: the lowest number where a key is forbidden, never -inf.

    With -inf, or a boolean mask, a row without any key would be NaN or 0, by backend.
    """
    lowest = torch.finfo(dtype).min
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, lowest)
    return mask.to(dtype).clamp_min(lowest)
