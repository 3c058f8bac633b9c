"""The second stage of sums over tokens: partial sums of programs, added in a fixed order and without atomics."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl

from . import _launch

# 32 channels are one 128-byte line of fp32.
_BLOCK_P, _BLOCK_C, _NUM_WARPS, _REGISTERS = 32, 32, 4, 128


@triton.jit
def _partial_sum(
    partial_ptr,  # (P, C) contiguous, fp32
    offs_c,
    mask_c,
    P,
    C,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The sums over all P, in order, for BLOCK_C channels."""
    acc = tl.zeros((BLOCK_P, BLOCK_C), partial_ptr.dtype.element_ty)
    for p in range(0, P, BLOCK_P):
        offs_p = p + tl.arange(0, BLOCK_P)
        mask = (offs_p < P)[:, None] & mask_c[None, :]
        acc += tl.load(partial_ptr + offs_p[:, None].to(tl.int64) * C + offs_c[None, :], mask=mask, other=0.0)
    return tl.sum(acc, axis=0)


@triton.jit(do_not_specialize=["P"])
def _sum_partials_kernel(
    partial_ptr,  # (sums, P, C) contiguous, fp32
    out_ptr,  # (sums, C)
    P,
    C,
    stride_os,
    stride_oc,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # One program: one of the sums for BLOCK_C channels, all P partial sums in order.
    pid_c = tl.program_id(0)
    pid_s = tl.program_id(1).to(tl.int64)
    offs_c = pid_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    total = _partial_sum(partial_ptr + pid_s * P * C, offs_c, mask_c, P, C, BLOCK_P, BLOCK_C)
    tl.store(out_ptr + pid_s * stride_os + offs_c * stride_oc, total.to(out_ptr.dtype.element_ty), mask=mask_c)


@triton.jit
def _sum_segment(
    block,  # of those of all segments that are not before this one
    partial_ptr,  # (sums, P, C) contiguous, fp32, or None
    out_ptr,  # (sums, C), or with COLUMNS (C, sums), contiguous
    sums,
    P,
    C,
    COLUMNS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The block's sums if it is one of this segment; the block's number among the next segments', where these begin."""
    if partial_ptr is not None:
        blocks_c = tl.cdiv(C, BLOCK_C)
        if (block >= 0) & (block < sums * blocks_c):
            s = (block // blocks_c).to(tl.int64)
            offs_c = block % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
            mask_c = offs_c < C
            total = _partial_sum(partial_ptr + s * P * C, offs_c, mask_c, P, C, BLOCK_P, BLOCK_C)
            offs = s + offs_c * sums if COLUMNS else s * C + offs_c
            tl.store(out_ptr + offs, total.to(out_ptr.dtype.element_ty), mask=mask_c)
        block -= sums * blocks_c
        out_ptr += sums * C
    return block, out_ptr


@triton.jit(do_not_specialize=["P_0", "P_1", "P_2", "P_3", "P_4"])
def _sum_segments_kernel(
    partial_0_ptr,  # each (sums, P, C) contiguous, fp32, or None
    partial_1_ptr,
    partial_2_ptr,
    partial_3_ptr,
    partial_4_ptr,
    out_ptr,  # (sums, C) of each, one after the other; of the last (C, sums)
    sums_0, P_0, C_0,
    sums_1, P_1, C_1,
    sums_2, P_2, C_2,
    sums_3, P_3, C_3,
    sums_4, P_4, C_4,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    # One program: one of the sums of one segment for BLOCK_C channels, all P partial sums in order.
    block = tl.program_id(0)
    block, out_ptr = _sum_segment(block, partial_0_ptr, out_ptr, sums_0, P_0, C_0, False, BLOCK_P, BLOCK_C)
    block, out_ptr = _sum_segment(block, partial_1_ptr, out_ptr, sums_1, P_1, C_1, False, BLOCK_P, BLOCK_C)
    block, out_ptr = _sum_segment(block, partial_2_ptr, out_ptr, sums_2, P_2, C_2, False, BLOCK_P, BLOCK_C)
    block, out_ptr = _sum_segment(block, partial_3_ptr, out_ptr, sums_3, P_3, C_3, False, BLOCK_P, BLOCK_C)
    _sum_segment(block, partial_4_ptr, out_ptr, sums_4, P_4, C_4, True, BLOCK_P, BLOCK_C)


def sum_partials(partial: torch.Tensor, out: torch.Tensor) -> None:
    """Write the sums over P of partial (sums, P, C), fp32 or fp64, to out (sums, C) of any strides and float dtype."""
    sums, programs, channels = partial.shape
    with _launch.device_of(partial):
        _sum_partials_kernel[(triton.cdiv(channels, _BLOCK_C), sums)](
            partial,
            out,
            programs,
            channels,
            out.stride(0),
            out.stride(1),
            BLOCK_P=_BLOCK_P,
            BLOCK_C=_BLOCK_C,
            **_launch.options(_NUM_WARPS, _REGISTERS),
        )


def sum_segments(
    partials: Sequence[torch.Tensor], dtype: torch.dtype, columns: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """The sums over P of up to four partials (sums, P, C), fp32 or fp64, in one launch: (sums, C) of `dtype` each.

    columns: one more, whose result, the list's last, is (C, sums).
    """
    segments = [*partials, *(None,) * (4 - len(partials)), columns]
    shapes = [(0, 0, 0) if segment is None else tuple(segment.shape) for segment in segments]
    out = torch.empty(sum(sums * C for sums, _, C in shapes), dtype=dtype, device=partials[0].device)
    with _launch.device_of(out):
        _sum_segments_kernel[(sum(sums * triton.cdiv(C, _BLOCK_C) for sums, _, C in shapes),)](
            *segments,
            out,
            *(size for shape in shapes for size in shape),
            BLOCK_P=_BLOCK_P,
            BLOCK_C=_BLOCK_C,
            **_launch.options(_NUM_WARPS, _REGISTERS),
        )
    pieces = out.split([sums * C for sums, _, C in shapes])
    made = [piece.view(sums, C) for piece, (sums, _, C) in zip(pieces, shapes[: len(partials)], strict=False)]
    return made if columns is None else [*made, pieces[-1].view(columns.shape[2], columns.shape[0])]


def launches(dtype: torch.dtype, device: torch.device) -> Iterator[str]:
    """Make every launch of the callers' kinds: sums of one dtype as rows, or as columns of a gradient."""
    partial = torch.empty(9, 264, 768, dtype=torch.float32, device=device)
    sum_partials(partial, torch.empty(9, 768, dtype=dtype, device=device))
    yield "sum_partials rows"
    sum_partials(partial, torch.empty(768, 9, dtype=dtype, device=device).t())
    yield "sum_partials columns"
    norm, wide, half, taps = (
        torch.empty(sums, 264, channels, dtype=torch.float32, device=device)
        for sums, channels in ((3, 768), (1, 3072), (1, 384), (9, 768))
    )
    sum_segments([norm, wide, norm], dtype)
    yield "sum_segments of BERT"
    sum_segments([norm, wide, norm, half], dtype, taps)
    yield "sum_segments of ConvBERT"
