"""The backward of masked_attention: see kernels/masked_attention.py."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from . import _launch
from ._attention import (
    INT32_MAX,
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
_NARROW = "the order of a product's result"
NARROW = {
    "_masked_attention_bwd_dq_kernel": dict.fromkeys(("mask_ptr", "dq_ptr"), _NARROW),
    "_masked_attention_bwd_dkv_kernel": dict.fromkeys(("mask_ptr", "dk_ptr", "dv_ptr"), _NARROW),
}


@triton.jit
def _add_dq(
    dq,
    q,
    dy,
    largest,
    inverse,
    delta,
    k_ptr,
    v_ptr,
    mask_ptr,
    dmask_ptr,
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
    stride_dm,
    scale,
    dropout_p,
    dropout_scale,
    D: tl.constexpr,
    CAST: tl.constexpr,
    MASK: tl.constexpr,
    KEY_MASK: tl.constexpr,
    MASK_LOWEST: tl.constexpr,
    LOWEST: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    DMASK: tl.constexpr,
    BOUNDED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dq / scale with what the keys from begin to end add; writes their dmask."""
    for start in range(begin, end, BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        j = offs_k[None, :]
        mask = mask_tile(mask_ptr, i[:, None], j, stride_mq, stride_mk, Sq, Sk, MASK, KEY_MASK, BOUNDED)
        k = head_tile(k_ptr, offs_k, Sk, stride_kt, D, BLOCK_D, BOUNDED, CAST)
        v = head_tile(v_ptr, offs_k, Sk, stride_vt, D, BLOCK_D, BOUNDED, CAST)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=dq.dtype) * scale
        s = masked_scores(
            s, mask, i[:, None], j, Sq, Sk, length, j, first, last,
            MASK, MASK_LOWEST, LOWEST, CAUSAL, HAS_LENGTHS, BOUNDED,
        )  # fmt: skip
        p = tl.exp2(s - largest[:, None]) * inverse[:, None]
        dp = tl.dot(dy, tl.trans(v), input_precision=PRECISION, out_dtype=dq.dtype)
        if HAS_DROPOUT:
            keep = keep_mask(seed_ptr, rows, start, dropout_p, BLOCK_Q, BLOCK_K)
            dp = tl.where(keep, dp * dropout_scale, 0.0)
        ds = p * (dp - delta[:, None])
        if DMASK:
            offs_m = rows[:, None] * stride_dm + j
            exists = (i < Sq)[:, None] & (j < stride_dm)
            tl.store(dmask_ptr + offs_m, ds.to(dmask_ptr.dtype.element_ty), mask=exists)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION, out_dtype=dq.dtype)
    return dq


@triton.jit(do_not_specialize=["B", "Sq", "Sk"])
def _masked_attention_bwd_dq_kernel(
    dy_ptr,  # (B, Sq, H, D)
    q_ptr,  # (B, Sq, H, D)
    k_ptr,  # (B, Sk, H, D)
    v_ptr,  # (B, Sk, H, D)
    y_ptr,  # (B, Sq, H, D)
    stats_ptr,  # (2, B, H, Sq) contiguous, fp32
    lengths_ptr,  # (B,)
    mask_ptr,  # (B, H, Sq, Sk)
    first_ptr,  # (Sq,) int32
    last_ptr,  # (Sq,) int32
    seed_ptr,  # () int64
    dq_ptr,  # (B, Sq, H, D)
    delta_ptr,  # (B, H, Sq) contiguous, fp32
    dmask_ptr,  # (B, H, Sq, stride_dm) contiguous
    B,
    Sq,
    Sk,
    H,
    stride_dyb, stride_dyt, stride_dyh,
    stride_qb, stride_qt, stride_qh,
    stride_kb, stride_kt, stride_kh,
    stride_vb, stride_vt, stride_vh,
    stride_yb, stride_yt, stride_yh,
    stride_dqb, stride_dqt, stride_dqh,
    stride_mb, stride_mh, stride_mq, stride_mk,
    stride_dm,
    scale,
    dq_scale,
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
    DMASK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    # One program: queries [first_q, +BLOCK_Q) of head h of row b, as in the forward.
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
    dy = head_tile(dy_ptr + b * stride_dyb + h * stride_dyh, i, Sq, stride_dyt, D, BLOCK_D, True, CAST)
    y = head_tile(y_ptr + b * stride_yb + h * stride_yh, i, Sq, stride_yt, D, BLOCK_D, True, CAST)
    delta = tl.sum(dy.to(ACC) * y.to(ACC), axis=1)
    tl.store(delta_ptr + rows, delta, mask=i < Sq)
    largest = tl.load(stats_ptr + rows, mask=i < Sq, other=float("inf"))
    inverse = tl.load(stats_ptr + tl.cast(B, tl.int64) * H * Sq + rows, mask=i < Sq, other=0.0)
    k_ptr += b * stride_kb + h * stride_kh
    v_ptr += b * stride_vb + h * stride_vh
    dq = tl.zeros((BLOCK_Q, BLOCK_D), ACC)
    dq = _add_dq(
        dq, q, dy, largest, inverse, delta, k_ptr, v_ptr, mask_ptr, dmask_ptr, seed_ptr, rows, i, begin, full,
        first, last, length, Sq, Sk, stride_kt, stride_vt, stride_mq, stride_mk, stride_dm,
        scale, dropout_p, dropout_scale,
        D, CAST, MASK, KEY_MASK, MASK_LOWEST, LOWEST, CAUSAL and not HAS_PACKING, HAS_LENGTHS, HAS_DROPOUT, DMASK,
        False, PRECISION, BLOCK_Q, BLOCK_K, BLOCK_D,
    )  # fmt: skip
    dq = _add_dq(
        dq, q, dy, largest, inverse, delta, k_ptr, v_ptr, mask_ptr, dmask_ptr, seed_ptr, rows, i, full, end,
        first, last, length, Sq, Sk, stride_kt, stride_vt, stride_mq, stride_mk, stride_dm,
        scale, dropout_p, dropout_scale,
        D, CAST, MASK, KEY_MASK, MASK_LOWEST, LOWEST, CAUSAL and not HAS_PACKING, HAS_LENGTHS, HAS_DROPOUT, DMASK,
        True, PRECISION, BLOCK_Q, BLOCK_K, BLOCK_D,
    )  # fmt: skip
    offs_d = tl.arange(0, BLOCK_D)
    offs_dq = b * stride_dqb + h * stride_dqh + i.to(tl.int64)[:, None] * stride_dqt + offs_d[None, :]
    dq = (dq * dq_scale).to(dq_ptr.dtype.element_ty)
    tl.store(dq_ptr + offs_dq, dq, mask=(i < Sq)[:, None] & (offs_d < D)[None, :])


@triton.jit
def _add_dkv(
    dk,
    dv,
    k,
    v,
    q_ptr,
    dy_ptr,
    stats_ptr,
    inverse_ptr,
    delta_ptr,
    mask_ptr,
    key_mask,
    seed_ptr,
    first_row,
    j,
    first_k,
    begin,
    end,
    first,
    last,
    length,
    Sq,
    Sk,
    stride_qt,
    stride_dyt,
    stride_mq,
    stride_mk,
    scale,
    dropout_p,
    dropout_scale,
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
    """dk / scale and dv with what the queries from begin to end add."""
    for start in range(begin, end, BLOCK_Q):
        offs_q = start + tl.arange(0, BLOCK_Q)
        rows = first_row + offs_q
        exists = offs_q < end
        i = offs_q[None, :]
        mask = key_mask if KEY_MASK else mask_tile(mask_ptr, i, j, stride_mq, stride_mk, end, Sk, MASK, False, BOUNDED)
        q = head_tile(q_ptr, offs_q, end, stride_qt, D, BLOCK_D, True, CAST)
        dy = head_tile(dy_ptr, offs_q, end, stride_dyt, D, BLOCK_D, True, CAST)
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION, out_dtype=dk.dtype) * scale
        s = masked_scores(
            s, mask, i, j, Sq, Sk, length, i, first, last,
            MASK, MASK_LOWEST, LOWEST, CAUSAL, HAS_LENGTHS, BOUNDED,
        )  # fmt: skip
        # A thread has numbers of many queries: each is read when it is needed. Past the end are the scores of the last
        # query, and the probability 0.
        largest = tl.load(stats_ptr + tl.minimum(rows, first_row + end - 1))
        p = tl.exp2(s - largest[None, :])
        inverse = tl.load(inverse_ptr + rows, mask=exists, other=0.0)
        p *= inverse[None, :]
        dp = tl.dot(v, tl.trans(dy), input_precision=PRECISION, out_dtype=dk.dtype)
        if HAS_DROPOUT:
            keep = tl.trans(keep_mask(seed_ptr, rows, first_k, dropout_p, BLOCK_Q, BLOCK_K))
            dp = tl.where(keep, dp * dropout_scale, 0.0)
            dropped = tl.where(keep, p * dropout_scale, 0.0).to(dy.dtype)
        else:
            dropped = p.to(dy.dtype)
        dv = tl.dot(dropped, dy, dv, input_precision=PRECISION, out_dtype=dv.dtype)
        delta = tl.load(delta_ptr + rows, mask=exists, other=0.0)
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION, out_dtype=dk.dtype)
    return dk, dv


# Not Sq: where it is a multiple of 16, nothing spills on sm_90 with lengths (triton 3.6.0; else 8 bytes a thread).
@triton.jit(do_not_specialize=["B", "Sk"])
def _masked_attention_bwd_dkv_kernel(
    dy_ptr,  # (B, Sq, H, D)
    q_ptr,  # (B, Sq, H, D)
    k_ptr,  # (B, Sk, H, D)
    v_ptr,  # (B, Sk, H, D)
    stats_ptr,  # (2, B, H, Sq) contiguous, fp32
    delta_ptr,  # (B, H, Sq) contiguous, fp32
    lengths_ptr,  # (B,)
    mask_ptr,  # (B, H, Sq, Sk)
    first_ptr,  # (Sk,) int32, with a packing: the first query that may see each key
    last_ptr,  # (Sk,) int32: one past the last
    seed_ptr,  # () int64
    dk_ptr,  # (B, Sk, H, D)
    dv_ptr,  # (B, Sk, H, D), strides of dk
    B,
    Sq,
    Sk,
    H,
    stride_dyb, stride_dyt, stride_dyh,
    stride_qb, stride_qt, stride_qh,
    stride_kb, stride_kt, stride_kh,
    stride_vb, stride_vt, stride_vh,
    stride_dkb, stride_dkt, stride_dkh,
    stride_mb, stride_mh, stride_mq, stride_mk,
    scale,
    dk_scale,
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
    PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    # One program: keys [first_k, +BLOCK_K) of head h of row b. Neighbours share the head's queries.
    pid = tl.program_id(0)
    blocks_k = tl.cdiv(Sk, BLOCK_K)
    first_k = pid % blocks_k * BLOCK_K
    bh = (pid // blocks_k).to(tl.int64)
    b, h = bh // H, bh % H
    offs_k = first_k + tl.arange(0, BLOCK_K)
    if MASK != NO_MASK:
        mask_ptr += b * stride_mb + h * stride_mh
    length = known_length(lengths_ptr, mask_ptr, stride_mk, b, Sk, MASK, MASK_LOWEST, HAS_LENGTHS, KEY_MASK)
    # Queries from `begin` to `end`, from `free` on without a look at any bound.
    begin, free, end = 0, 0, Sq
    first, last = 0, Sq
    if HAS_PACKING:
        inside = offs_k < Sk
        first = tl.load(first_ptr + offs_k, mask=inside, other=INT32_MAX)
        last = tl.load(last_ptr + offs_k, mask=inside, other=0)
        if CAUSAL:
            first = tl.maximum(first, offs_k)
        begin, end = tl.min(first), tl.max(last)
        common = (tl.max(tl.where(inside, first, 0)) == begin) & (tl.min(tl.where(inside, last, INT32_MAX)) == end)
        free = tl.where(common, begin, end)
        first, last = first[:, None], last[:, None]
    else:
        if CAUSAL:
            if SKIP:
                begin = tl.where(length > 0, tl.maximum(first_k - (Sk - Sq), 0), 0)
            # The first query that sees the block's last key, or the next that a block begins with.
            sees = tl.maximum(first_k + BLOCK_K - 1 - (Sk - Sq), begin)
            free = tl.minimum(begin + tl.cdiv(sees - begin, BLOCK_Q) * BLOCK_Q, Sq)
        if HAS_LENGTHS or KEY_MASK:
            if SKIP:
                end = tl.where((length > 0) & (first_k >= length), begin, Sq)
            free = tl.where(first_k + BLOCK_K > length, end, free)
    if MASK != NO_MASK and not KEY_MASK:
        free = tl.where(first_k + BLOCK_K > Sk, end, free)  # where it is read without a look

    k = head_tile(k_ptr + b * stride_kb + h * stride_kh, offs_k, Sk, stride_kt, D, BLOCK_D, True, CAST)
    v = head_tile(v_ptr + b * stride_vb + h * stride_vh, offs_k, Sk, stride_vt, D, BLOCK_D, True, CAST)
    q_ptr += b * stride_qb + h * stride_qh
    dy_ptr += b * stride_dyb + h * stride_dyh
    inverse_ptr = stats_ptr + tl.cast(B, tl.int64) * H * Sq
    key_mask = 0.0
    if KEY_MASK:
        key_mask = mask_tile(mask_ptr, 0, offs_k[:, None], stride_mq, stride_mk, Sq, Sk, MASK, True, True)
    dk = tl.zeros((BLOCK_K, BLOCK_D), ACC)
    dv = tl.zeros((BLOCK_K, BLOCK_D), ACC)
    dk, dv = _add_dkv(
        dk, dv, k, v, q_ptr, dy_ptr, stats_ptr, inverse_ptr, delta_ptr, mask_ptr, key_mask, seed_ptr, bh * Sq,
        offs_k[:, None], first_k, begin, free, first, last, length, Sq, Sk, stride_qt, stride_dyt, stride_mq, stride_mk,
        scale, dropout_p, dropout_scale,
        D, CAST, MASK, KEY_MASK, MASK_LOWEST, LOWEST, CAUSAL and not HAS_PACKING, HAS_LENGTHS,
        HAS_DROPOUT, True, PRECISION, BLOCK_Q, BLOCK_K, BLOCK_D,
    )  # fmt: skip
    dk, dv = _add_dkv(
        dk, dv, k, v, q_ptr, dy_ptr, stats_ptr, inverse_ptr, delta_ptr, mask_ptr, key_mask, seed_ptr, bh * Sq,
        offs_k[:, None], first_k, free, end, first, last, length, Sq, Sk, stride_qt, stride_dyt, stride_mq, stride_mk,
        scale, dropout_p, dropout_scale,
        D, CAST, MASK, KEY_MASK, MASK_LOWEST, LOWEST, CAUSAL and not HAS_PACKING, HAS_LENGTHS,
        HAS_DROPOUT, False, PRECISION, BLOCK_Q, BLOCK_K, BLOCK_D,
    )  # fmt: skip
    offs_d = tl.arange(0, BLOCK_D)
    offs = b * stride_dkb + h * stride_dkh + offs_k.to(tl.int64)[:, None] * stride_dkt + offs_d[None, :]
    mask = (offs_k < Sk)[:, None] & (offs_d < D)[None, :]
    tl.store(dk_ptr + offs, (dk * dk_scale).to(dk_ptr.dtype.element_ty), mask=mask)
    tl.store(dv_ptr + offs, dv.to(dv_ptr.dtype.element_ty), mask=mask)


def masked_attention_bwd(
    dy: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    y: torch.Tensor,
    stats: torch.Tensor,
    masks: Masks,
    dropout_p: float,
    seed: torch.Tensor | None,
    scale: float,
    need_dmask: bool,
    out: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """dq, dk and dv, with the shapes and the dtype of q, k and v, and with need_dmask dmask (B, H, Sq, Sk or more).

    The first three are `out`, of any strides with a contiguous last dimension, dk's and dv's the same, or new and
    contiguous. dmask has the dtype of the statistics, and as many keys as the next multiple of 16, so that all rows are
    written 16 bytes at a time.
    """
    B, Sq, H, _ = q.shape
    Sk = k.shape[1]
    dq, dk, dv = out or [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v)]
    stride_dm = triton.cdiv(Sk, 16) * 16
    dmask = torch.zeros(B, H, Sq, stride_dm, dtype=stats.dtype, device=q.device) if need_dmask else None
    if 0 in (dq.numel(), dk.numel()):
        return dq.zero_(), dk.zero_(), dv.zero_(), dmask
    delta = torch.empty(B, H, Sq, dtype=stats.dtype, device=q.device)
    dropout = (dropout_p, 1.0 / (1.0 - dropout_p))
    sizes = (B, Sq, Sk, H)
    constants = {"HAS_DROPOUT": dropout_p > 0.0, **masks.constants(q, Sk)}
    config = masks.config("masked_attention_bwd_dq", q, dropout_p)
    with _launch.device_of(q):
        _masked_attention_bwd_dq_kernel[(triton.cdiv(Sq, config.block_q) * B * H,)](
            dy,
            q,
            k,
            v,
            y,
            stats,
            *masks.pointers(of_keys=False),
            seed,
            dq,
            delta,
            dmask,
            *sizes,
            *strides(dy, q, k, v, y, dq),
            *mask_strides(masks.mask),
            stride_dm,
            scale * LOG2E.value,
            scale,
            *dropout,
            DMASK=need_dmask,
            BLOCK_Q=config.block_q,
            BLOCK_K=config.block_k,
            **constants,
            num_stages=config.num_stages,
            **_launch.options(config.num_warps, config.registers),
        )
    config = masks.config("masked_attention_bwd_dkv", q, dropout_p)
    with _launch.device_of(q):
        _masked_attention_bwd_dkv_kernel[(triton.cdiv(Sk, config.block_k) * B * H,)](
            dy,
            q,
            k,
            v,
            stats,
            delta,
            *masks.pointers(of_keys=True),
            seed,
            dk,
            dv,
            *sizes,
            *strides(dy, q, k, v, dk),
            *mask_strides(masks.mask),
            scale * LOG2E.value,
            scale,
            *dropout,
            BLOCK_Q=config.block_q,
            BLOCK_K=config.block_k,
            **constants,
            num_stages=config.num_stages,
            **_launch.options(config.num_warps, config.registers),
        )
    return dq, dk, dv, dmask


def launches(dtype: torch.dtype, device: torch.device) -> Iterator[str]:
    """Make every launch that `pick_config` can choose, on empty tensors; yields a name after each."""
    for name, q, k, masks, dropout_p, seed in launch_cases(dtype, device):
        stats = torch.empty(2, *q.shape[:1], q.shape[2], q.shape[1], dtype=torch.float32, device=device)
        dmask = masks.mask is not None and masks.mask.dtype == torch.float32
        masked_attention_bwd(q, q, k, k, q, stats, masks, dropout_p, seed, 0.125, dmask)
        yield f"masked_attention_bwd {name}"
