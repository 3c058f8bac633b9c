"""Scaled dot-product attention with a mask."""

from __future__ import annotations

import torch
from torch import Tensor

from ._checks import check_float, check_probability


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    head_mask: Tensor | None = None,
    dropout_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """y = (dropout(softmax(q @ k.T * scale + mask)) * head_mask) @ v for every batch row and head.

    Args:
        q: (B, Sq, H, D), floating point.
        k: (B, Sk, H, D), dtype of `q`.
        v: (B, Sk, H, D), dtype of `q`.
        mask: broadcastable to (B, H, Sq, Sk): bool, True where a key may be attended to, or floating point, added to
            the scores. Where it forbids every key of a row, that row of y is nearly the average of `v`: finite.
        head_mask: broadcastable to (B, H, Sq, Sk), floating point: multiplies the probabilities after the dropout.
        dropout_mask: broadcastable to (B, H, Sq, Sk), bool, True where a probability is kept.
        dropout_p: the probability that one is dropped; kept ones are scaled by 1 / (1 - p).
        scale: 1 / sqrt(D) if None.

    Returns:
        (B, Sq, H, D), dtype of `q`.

    Raises:
        TypeError: an integer or complex tensor, or a bool one where a floating one is needed.
        ValueError: shapes that don't fit, tensors on different devices, `dropout_p` outside [0, 1) or without a mask.

    Source: Vaswani et al., "Attention Is All You Need" (2017), section 3.2.1; head_mask: Michel et al., "Are Sixteen
    Heads Really Better than One?" (2019, arXiv 1905.10650).
    """
    check(q, k, v, mask, head_mask, dropout_p)
    check_dropout_mask(q, k, dropout_mask, dropout_p)
    probabilities = attention_probabilities(q, k, mask=mask, scale=scale)
    if dropout_mask is not None:
        probabilities = probabilities * dropout_mask / (1.0 - dropout_p)
    if head_mask is not None:
        probabilities = probabilities * head_mask.to(probabilities.dtype)
    return torch.einsum("bhqk,bkhd->bqhd", probabilities, v)


def attention_probabilities(
    q: Tensor, k: Tensor, *, mask: Tensor | None = None, bias: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """softmax((q @ k.T + bias) * scale + mask): (B, Sq, H, D), (B, Sk, H, D) -> (B, H, Sq, Sk), dtype of `q`.

    Scores and softmax are computed in fp32, or in fp64 for fp64 inputs. bias: broadcastable to (B, H, Sq, Sk), as from
    `relative_scores`. The other arguments are those of `masked_attention`.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("bqhd,bkhd->bhqk", q.to(dtype), k.to(dtype))
    if bias is not None:
        scores = scores + bias.to(dtype)
    scores = scores * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        scores = scores + _additive(mask, dtype)
    return scores.softmax(dim=-1).to(q.dtype)


def relative_scores(q: Tensor, k: Tensor, table: Tensor, *, with_keys: bool) -> Tensor:
    """What relative positions add to the scores: q_i . t_(i - j), and k_j . t_(i - j) if `with_keys`.

    q: (B, Sq, H, D); k: (B, Sk, H, D); table: (2 P - 1, D), row P - 1 + i - j for query i and key j. The last query is
    at the last key, and Sk is at most P. Returns (B, H, Sq, Sk) in fp32, or in fp64 for fp64 inputs.

    Source: Shaw et al., "Self-Attention with Relative Position Representations" (2018); Huang et al., "Improve
    Transformer Models with Better Relative Position Embeddings" (2020), method 4 with `with_keys`.
    """
    Sq, Sk, P = q.shape[1], k.shape[1], (table.shape[0] + 1) // 2
    dtype = torch.promote_types(q.dtype, torch.float32)
    distance = torch.arange(Sk - Sq, Sk, device=q.device)[:, None] - torch.arange(Sk, device=q.device)
    rows = table[distance + P - 1].to(dtype)
    scores = torch.einsum("bqhd,qkd->bhqk", q.to(dtype), rows)
    if with_keys:
        scores = scores + torch.einsum("bkhd,qkd->bhqk", k.to(dtype), rows)
    return scores


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What `mask` adds to scores of `dtype`: forbidden keys (False, -inf, the lowest number of the dtype of `mask`) get
    the lowest number of `dtype`. Finite, and no score changes it, so a fully masked row is uniform in every dtype.
    """
    lowest = torch.finfo(dtype).min
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, lowest)
    return mask.to(dtype).masked_fill(mask <= torch.finfo(mask.dtype).min, lowest)


def check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, head_mask: Tensor | None, dropout_p: float) -> None:
    """Raise what `masked_attention` says for arguments that don't fit."""
    bool_mask = mask is not None and mask.dtype == torch.bool
    check_float(q=q, k=k, v=v, mask=None if bool_mask else mask, head_mask=head_mask)
    check_probability("dropout_p", dropout_p)
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q.dim() != 4 or k.shape != v.shape or k.dim() != 4 or q.shape[::2] != k.shape[::2] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q must have shape (B, Sq, H, D), k and v (B, Sk, H, D), got {shapes}")
    if 0 in (k.shape[1], q.shape[3]):
        raise ValueError(f"attention needs at least one key and D >= 1, got {shapes}")
    for name, tensor in (("mask", mask), ("head_mask", head_mask)):
        _check_broadcast(name, tensor, q, k)


def check_dropout_mask(q: Tensor, k: Tensor, dropout_mask: Tensor | None, dropout_p: float) -> None:
    """Raise ValueError or TypeError unless there is a bool mask where there is dropout."""
    if dropout_mask is None and dropout_p > 0.0:
        raise ValueError(f"dropout_p = {dropout_p} needs dropout_mask, a bool tensor of shape (B, H, Sq, Sk)")
    if dropout_mask is not None and dropout_mask.dtype != torch.bool:
        raise TypeError(f"dropout_mask must be a bool tensor, got {dropout_mask.dtype}")
    _check_broadcast("dropout_mask", dropout_mask, q, k)


def _check_broadcast(name: str, tensor: Tensor | None, q: Tensor, k: Tensor) -> None:
    if tensor is None:
        return
    if tensor.device != q.device:
        raise ValueError(f"q is on {q.device} but {name} is on {tensor.device}; move them to one device")
    scores, given = (q.shape[0], q.shape[2], q.shape[1], k.shape[1]), tuple(tensor.shape)
    if len(given) > 4 or any(n not in (1, size) for n, size in zip(given[::-1], scores[::-1], strict=False)):
        raise ValueError(f"{name} must be broadcastable to (B, H, Sq, Sk) = {scores}, got {given}")
