"""The native formulation of masked_attention: PyTorch's scaled_dot_product_attention, made to keep its promises."""

from __future__ import annotations

import contextlib

import torch
import torch.nn.attention
import torch.nn.functional as F

from fastconv.ops._eager import unobserved
from fastconv.ops._register import needs_grad
from fastconv.reference import Packing
from fastconv.reference.ops.masked_attention import combined_mask


def native(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: torch.Tensor | None,
    mask: torch.Tensor | None,
    causal: bool,
    dropout_p: float,
    scale: float,
) -> torch.Tensor:
    """masked_attention of a batch by SDPA."""
    if causal and lengths is None and mask is None and q.shape[1] == k.shape[1]:
        return attention(q, k, v, None, dropout_p, scale, causal=True)
    mask = combined_mask(q, k, mask, lengths, causal)
    if mask is None:
        return attention(q, k, v, None, dropout_p, scale)
    mask = additive(mask, q.dtype)
    return attention(
        q, k, v, mask.reshape(*(1,) * (4 - mask.dim()), *mask.shape).expand(-1, -1, -1, k.shape[1]), dropout_p, scale
    )


def native_packed(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    of_queries: Packing,
    of_keys: Packing,
    causal: bool,
    dropout_p: float,
    scale: float,
) -> torch.Tensor:
    """masked_attention of a packed batch, (T, H, D) each: SDPA of every sequence, without a copy of its tensors."""
    if len(k) == 0:
        return torch.cat([q * 0.0, k, v])  # which has gradients
    if torch.compiler.is_compiling():
        return _padded(q, k, v, of_queries, of_keys, causal, dropout_p, scale)
    parts = zip(q.split(of_queries.lengths), k.split(of_keys.lengths), v.split(of_keys.lengths), strict=True)
    rows = [
        attention(qs[None], ks[None], vs[None], None, dropout_p, scale, causal=causal)[0] if len(ks) else qs * 0.0
        for qs, ks, vs in parts
    ]
    return torch.cat(rows)


def _padded(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    of_queries: Packing,
    of_keys: Packing,
    causal: bool,
    dropout_p: float,
    scale: float,
) -> torch.Tensor:
    """native_packed by SDPA of a padded batch, for graphs: one of slices would be for these lengths alone."""
    rows = of_queries.cu_seqlens.shape[0] - 1

    def places(packing: Packing) -> torch.Tensor:
        token = torch.arange(packing.tokens, device=packing.cu_seqlens.device)
        row = torch.bucketize(token, packing.cu_seqlens[1:].long(), right=True)
        return row * packing.longest + packing.before

    def padded(x: torch.Tensor, packing: Packing, index: torch.Tensor) -> torch.Tensor:
        empty = x.new_zeros(rows * packing.longest, *x.shape[1:])
        return empty.index_copy(0, index, x).unflatten(0, (rows, packing.longest))

    at_queries = places(of_queries)
    at_keys = at_queries if of_keys is of_queries else places(of_keys)
    y = native(
        padded(q, of_queries, at_queries),
        padded(k, of_keys, at_keys),
        padded(v, of_keys, at_keys),
        of_keys.cu_seqlens.diff(),
        None,
        causal,
        dropout_p,
        scale,
    )
    return y.flatten(0, 1).index_select(0, at_queries)


def additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The mask as what is added to scores of `dtype`: the lowest number where a key is forbidden, never -inf.

    With -inf, or a boolean mask, a row without any key would be NaN or 0, by backend.
    """
    lowest = torch.finfo(dtype).min
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, lowest)
    lowest_of_mask = torch.finfo(mask.dtype).min
    if lowest_of_mask > lowest:
        return mask.to(dtype).masked_fill(mask <= lowest_of_mask, lowest)
    return mask.to(dtype).clamp_min(lowest)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    dropout_p: float,
    scale: float | None,
    *,
    causal: bool = False,
) -> torch.Tensor:
    """masked_attention of a mask that needs no conversion, (B, Sq, H, D) and (B, Sk, H, D) each, without its checks.

    mask: four-dimensional: additive in q's dtype without -inf; or bool, with which a row without any key is what
        scaled_dot_product_attention makes of it
    causal: only without a mask, and of as many queries as keys
    """
    with _differentiable():
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask, dropout_p, causal, scale=scale
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
