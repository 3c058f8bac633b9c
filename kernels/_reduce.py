"""The second stage of sums over tokens: partial sums of programs, added in a fixed order and without atomics."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from . import _launch

# 32 channels are one 128-byte line of fp32.
_BLOCK_P, _BLOCK_C, _NUM_WARPS, _REGISTERS = 32, 32, 4, 128


@triton.jit
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
    partial_ptr += pid_s * P * C
    offs_c = pid_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    acc = tl.zeros((BLOCK_P, BLOCK_C), partial_ptr.dtype.element_ty)
    for p in range(0, P, BLOCK_P):
        offs_p = p + tl.arange(0, BLOCK_P)
        mask = (offs_p < P)[:, None] & mask_c[None, :]
        acc += tl.load(partial_ptr + offs_p[:, None].to(tl.int64) * C + offs_c[None, :], mask=mask, other=0.0)
    total = tl.sum(acc, axis=0).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + pid_s * stride_os + offs_c * stride_oc, total, mask=mask_c)


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


def launches(dtype: torch.dtype, device: torch.device) -> Iterator[str]:
    """Make every launch of the callers' kinds: sums of one dtype as rows, or as columns of a gradient."""
    partial = torch.empty(9, 264, 768, dtype=torch.float32, device=device)
    sum_partials(partial, torch.empty(9, 768, dtype=dtype, device=device))
    yield "sum_partials rows"
    sum_partials(partial, torch.empty(768, 9, dtype=dtype, device=device).t())
    yield "sum_partials columns"
