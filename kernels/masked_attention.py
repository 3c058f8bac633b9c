"""Scaled dot-product attention with every mask that BERT's family knows, without the scores in memory.

    s[i, j] = q[i] . k[j] * scale + mask[i, j]          the lowest number of fp32 where a key is forbidden
    y[i] = sum_j dropout(softmax(s[i, :]))[j] v[j]

Forward: one program owns BLOCK_Q queries of one head and walks the keys BLOCK_K at a time, with the largest score so
far, the sum of the exponentials and the weighted sum of the values in registers (Milakov and Gimelshein, arXiv
1805.02867; Dao, arXiv 2307.08691). Blocks of keys that no query of the block may see are not visited. Reads q and, as
often as there are blocks of queries, k and v, mostly from the L2 cache; writes y, and for a backward the largest score
and the sum, 8 bytes a query. Not their logarithm: next to a score of 1e4 it has no digits left for the sum.

Backward: two kernels, without atomics, that compute the probabilities P again from q, k and the two statistics:

    dP = dy v^T          delta = sum over D of dy * y          dS = P * (dP - delta)
    dq = dS k * scale                  one program owns BLOCK_Q queries; it makes delta, and dmask = dS if asked for
    dv = P^T dy, dk = dS^T q * scale   one program owns BLOCK_K keys and walks the queries

7 matrix products where one kernel with atomics would need 5: the price of sums in a fixed order.

A query that may not see any key is no special case: its scores are all the lowest number, so the softmax is uniform, as
long as all keys are visited. So blocks are left out (SKIP) only where no query can be without a key, but for sequences
of length 0, whose programs visit everything. Keys that don't exist, past the end or of another sequence, have the score
-inf. In a packed batch a block of queries may belong to several sequences; it walks the keys of them all.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from . import _launch
from ._attention import (
    LOG2E,
    NO_MASK,
    Masks,
    head_tile,
    key_range,
    known_length,
    launch_cases,
    mask_strides,
    mask_tile,
    masked_scores,
    strides,
)
from ._dropout import keep_mask

# Masks are read in the order of the scores that the matrix instructions leave, a mask of keys once a program; AMD's
# leave a thread 4 neighbouring values of a result, 8 bytes of half precision, and its compiler stores them so.
NARROW = {
    "_masked_attention_fwd_kernel": dict.fromkeys(("mask_ptr", "y_ptr"), "the order of a product's result"),
}


@triton.jit
def _attend(
    acc,
    largest,
    total,
    q,
    k_ptr,
    v_ptr,
    mask_ptr,
    seed_ptr,
    rows,
    i,
    begin,
    end,
    first,
    last,
    length,
    Sq,
    Sk,
    stride_kt,
    stride_vt,
    stride_mq,
    stride_mk,
    scale,
    dropout_p,
    D: tl.constexpr,
    CAST: tl.constexpr,
    MASK: tl.constexpr,
    KEY_MASK: tl.constexpr,
    MASK_LOWEST: tl.constexpr,
    LOWEST: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    BOUNDED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The running softmax after the keys from begin to end."""
    for start in range(begin, end, BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        j = offs_k[None, :]
        mask = mask_tile(mask_ptr, i[:, None], j, stride_mq, stride_mk, Sq, Sk, MASK, KEY_MASK, BOUNDED)
        k = head_tile(k_ptr, offs_k, Sk, stride_kt, D, BLOCK_D, BOUNDED, CAST)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=acc.dtype) * scale
        s = masked_scores(
            s, mask, i[:, None], j, Sq, Sk, length, j, first, last,
            MASK, MASK_LOWEST, LOWEST, CAUSAL, HAS_LENGTHS, BOUNDED,
        )  # fmt: skip
        larger = tl.maximum(largest, tl.max(s, axis=1))
        p = tl.exp2(s - larger[:, None])
        rescale = tl.exp2(largest - larger)
        total = total * rescale + tl.sum(p, axis=1)
        acc = acc * rescale[:, None]
        largest = larger
        if HAS_DROPOUT:
            p = tl.where(keep_mask(seed_ptr, rows, start, dropout_p, BLOCK_Q, BLOCK_K), p, 0.0)
        v = head_tile(v_ptr, offs_k, Sk, stride_vt, D, BLOCK_D, BOUNDED, CAST)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION, out_dtype=acc.dtype)
    return acc, largest, total


@triton.jit(do_not_specialize=["B", "Sq", "Sk"])
def _masked_attention_fwd_kernel(
    q_ptr,  # (B, Sq, H, D)
    k_ptr,  # (B, Sk, H, D)
    v_ptr,  # (B, Sk, H, D)
    lengths_ptr,  # (B,) int32 or int64
    mask_ptr,  # (B, H, Sq, Sk)
    first_ptr,  # (Sq,) int32, with a packing: the first key that each query may see
    last_ptr,  # (Sq,) int32: one past the last
    seed_ptr,  # () int64
    y_ptr,  # (B, Sq, H, D)
    stats_ptr,  # (2, B, H, Sq) contiguous, fp32: largest score times log2(e), 1 / sum of exponentials
    B,
    Sq,
    Sk,
    H,
    stride_qb, stride_qt, stride_qh,
    stride_kb, stride_kt, stride_kh,
    stride_vb, stride_vt, stride_vh,
    stride_mb, stride_mh, stride_mq, stride_mk,
    stride_yb, stride_yt, stride_yh,
    scale,
    dropout_p,
    dropout_scale,
    ACC: tl.constexpr,
    D: tl.constexpr,
    CAST: tl.constexpr,
    MASK: tl.constexpr,
    KEY_MASK: tl.constexpr,
    MASK_LOWEST: tl.constexpr,
    LOWEST: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    HAS_PACKING: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    SKIP: tl.constexpr,
    SAVE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    # One program: queries [first_q, +BLOCK_Q) of head h of row b. Neighbours share the head's keys and values.
    pid = tl.program_id(0)
    blocks_q = tl.cdiv(Sq, BLOCK_Q)
    first_q = pid % blocks_q * BLOCK_Q
    bh = (pid // blocks_q).to(tl.int64)
    b, h = bh // H, bh % H
    i = first_q + tl.arange(0, BLOCK_Q)
    rows = bh * Sq + i
    if MASK != NO_MASK:
        mask_ptr += b * stride_mb + h * stride_mh
    length = known_length(lengths_ptr, mask_ptr, stride_mk, b, Sk, MASK, MASK_LOWEST, HAS_LENGTHS, KEY_MASK)
    begin, full, end, first, last = key_range(
        first_ptr, last_ptr, first_q, i, Sq, Sk, length,
        CAUSAL, HAS_LENGTHS or KEY_MASK, HAS_PACKING, HAS_DROPOUT, SKIP, BLOCK_Q, BLOCK_K,
    )  # fmt: skip
    if HAS_PACKING:
        first, last = first[:, None], last[:, None]

    q = head_tile(q_ptr + b * stride_qb + h * stride_qh, i, Sq, stride_qt, D, BLOCK_D, True, CAST)
    k_ptr += b * stride_kb + h * stride_kh
    v_ptr += b * stride_vb + h * stride_vh
    acc = tl.zeros((BLOCK_Q, BLOCK_D), ACC)
    largest = tl.full((BLOCK_Q,), LOWEST, ACC)
    total = tl.zeros((BLOCK_Q,), ACC)
    acc, largest, total = _attend(
        acc, largest, total, q, k_ptr, v_ptr, mask_ptr, seed_ptr, rows, i, begin, full, first, last, length, Sq, Sk,
        stride_kt, stride_vt, stride_mq, stride_mk, scale, dropout_p,
        D, CAST, MASK, KEY_MASK, MASK_LOWEST, LOWEST, CAUSAL and not HAS_PACKING, HAS_LENGTHS, HAS_DROPOUT, False,
        PRECISION, BLOCK_Q, BLOCK_K, BLOCK_D,
    )  # fmt: skip
    acc, largest, total = _attend(
        acc, largest, total, q, k_ptr, v_ptr, mask_ptr, seed_ptr, rows, i, full, end, first, last, length, Sq, Sk,
        stride_kt, stride_vt, stride_mq, stride_mk, scale, dropout_p,
        D, CAST, MASK, KEY_MASK, MASK_LOWEST, LOWEST, CAUSAL and not HAS_PACKING, HAS_LENGTHS, HAS_DROPOUT, True,
        PRECISION, BLOCK_Q, BLOCK_K, BLOCK_D,
    )  # fmt: skip

    # Without any key, in an empty sequence of a packing, the sum is 0, and so is y. Elsewhere it is for scores that are
    # all -inf only, whose softmax is not a number.
    some = total if not HAS_PACKING else tl.where(total == 0.0, float("inf"), total)
    inverse = 1.0 / some
    y = acc * (inverse * dropout_scale)[:, None]
    offs_d = tl.arange(0, BLOCK_D)
    offs_y = b * stride_yb + h * stride_yh + i.to(tl.int64)[:, None] * stride_yt + offs_d[None, :]
    tl.store(y_ptr + offs_y, y.to(y_ptr.dtype.element_ty), mask=(i < Sq)[:, None] & (offs_d < D)[None, :])
    if SAVE:
        tl.store(stats_ptr + rows, largest, mask=i < Sq)
        tl.store(stats_ptr + tl.cast(B, tl.int64) * H * Sq + rows, inverse, mask=i < Sq)


def masked_attention_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    masks: Masks,
    dropout_p: float,
    seed: torch.Tensor | None,
    scale: float,
    out: torch.Tensor | None,
    save: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """y (B, Sq, H, D), and with `save` the statistics (2, B, H, Sq) fp32 (fp64 for fp64).

    q (B, Sq, H, D), k and v (B, Sk, H, D) of one dtype and any strides with a contiguous last dimension; with a packing
    B is 1. y is `out`, of such strides too, or new and contiguous.
    """
    B, Sq, H, _ = q.shape
    Sk = k.shape[1]
    y = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    stats = torch.empty(2, B, H, Sq, dtype=_launch.acc_torch(q.dtype), device=q.device) if save else None
    if y.numel() == 0:
        return y, stats
    config = masks.config("masked_attention_fwd", q, dropout_p)
    with _launch.device_of(q):
        _masked_attention_fwd_kernel[(triton.cdiv(Sq, config.block_q) * B * H,)](
            q,
            k,
            v,
            *masks.pointers(of_keys=False),
            seed,
            y,
            stats,
            B,
            Sq,
            Sk,
            H,
            *strides(q, k, v),
            *mask_strides(masks.mask),
            *strides(y),
            scale * LOG2E.value,
            dropout_p,
            1.0 / (1.0 - dropout_p),
            HAS_DROPOUT=dropout_p > 0.0,
            SAVE=save,
            BLOCK_Q=config.block_q,
            BLOCK_K=config.block_k,
            **masks.constants(q, Sk),
            num_stages=config.num_stages,
            **_launch.options(config.num_warps, config.registers),
        )
    return y, stats


def launches(dtype: torch.dtype, device: torch.device) -> Iterator[str]:
    """Make every launch that `pick_config` can choose, on empty tensors; yields a name after each."""
    for name, q, k, masks, dropout_p, seed in launch_cases(dtype, device):
        for save in (False, True) if " dense " in name or " lengths " in name else (True,):
            masked_attention_fwd(q, k, k, masks, dropout_p, seed, 0.125, None, save)
            yield f"masked_attention_fwd {name} save={save}"
