"""masked_attention: scaled dot-product attention over (B, S, H, D). Native on every device."""

from __future__ import annotations

import contextlib

import torch
import torch.nn.attention
import torch.nn.functional as F

from fastconv.ops._eager import autocasting, unobserved
from fastconv.ops._register import needs_grad
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
        mask = _additive(mask.reshape(*(1,) * (4 - mask.dim()), *mask.shape), _compute_dtype(q))
        mask = mask.expand(-1, -1, -1, k.shape[1])
    return attention(q, k, v, mask, dropout_p, scale)


def _compute_dtype(q: torch.Tensor) -> torch.dtype:
    return torch.get_autocast_dtype(q.device.type) if autocasting(q) else q.dtype


def _additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The mask as what is added to scores of `dtype`: the lowest number where a key is forbidden, never -inf.

    With -inf, or a boolean mask, a row without any key would be NaN or 0, by backend.
    """
    lowest = torch.finfo(dtype).min
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, lowest)
    return mask.to(dtype).clamp_min(lowest)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    dropout_p: float = 0.0,
    scale: float | None = None,
) -> torch.Tensor:
    """masked_attention of a mask that needs no conversion, without its checks.

    mask: four-dimensional: additive in q's dtype without -inf; or bool, with which a row without any key is what
        scaled_dot_product_attention makes of it
    """
    with _differentiable():
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask, dropout_p, scale=scale
        ).transpose(1, 2)
    if mask is None or mask.dtype == torch.bool or not (y.dtype == torch.float16 or needs_grad(q, k, v)):
        return y
    return _average_without_keys(y, q, k, v, mask, q.shape[-1] ** -0.5 if scale is None else scale)


def _differentiable() -> contextlib.AbstractContextManager:
    """The context in which SDPA has the derivative that is asked for: its fused kernels have none of forward mode."""
    if torch.autograd.forward_ad._current_level < 0:
        return contextlib.nullcontext()
    return torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)


def _average_without_keys(
    y: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float
) -> torch.Tensor:
    """y with the average of v in every row without a key, and with the reference's gradient there.

    SDPA errs in such rows: the lowest number of fp16 is not low enough to hide the scores, and its backward takes the
    probabilities from the scores' logsumexp, in which the number of keys is lost next to the lowest number of a dtype.
    """
    empty = (mask <= torch.finfo(mask.dtype).min).all(-1)
    if empty.device.type == "cpu" and unobserved() and not empty.any():
        return y
    average = v.mean(1, keepdim=True).to(y.dtype)
    if needs_grad(q, k):
        # What equal scores give is constant, but the reference differentiates the softmax that makes it. Around equal
        # scores that is linear in them, so its derivative costs no (Sq, Sk) matrix; the value of the term is 0.
        wide = torch.promote_types(q.dtype, torch.float32)
        centred = v.detach().to(wide)
        centred = centred - centred.mean(1, keepdim=True)
        moment = torch.einsum("bkhd,bkhe->bhde", k.to(wide), centred) * (scale / k.shape[1])
        term = torch.einsum("bqhd,bhde->bqhe", q.to(wide), moment)
        average = average + (term - term.detach()).to(y.dtype)
    return torch.where(empty.transpose(1, 2).unsqueeze(-1), average, y)
