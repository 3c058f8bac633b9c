"""Dropout masks that a backward kernel can draw again: a pure function of (seed, token, channel)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from . import _launch


@triton.jit
def keep_mask(
    seed_ptr,  # () int64, on the device: a captured graph draws a new mask at every replay
    offs_t,  # (BLOCK_T,) int64 token numbers
    first_c,  # the first of the BLOCK_C channels, a multiple of 4
    p,  # probability of dropping, float
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,  # at least 4
):
    """(BLOCK_T, BLOCK_C) booleans, true where the value is kept.

    Philox-4x32-10 (Salmon et al., SC'11, section 4) with the token as the counter's high words: one call gives
    the four numbers of four neighbouring channels, so the mask costs a quarter of a call a value.
    """
    seed = tl.load(seed_ptr)
    offs_q = first_c // 4 + tl.arange(0, BLOCK_C // 4)
    zero = tl.zeros((BLOCK_T, BLOCK_C // 4), tl.uint32)
    quad = zero + offs_q[None, :].to(tl.uint32)
    token_lo = zero + (offs_t & 0xFFFFFFFF).to(tl.uint32)[:, None]
    token_hi = zero + (offs_t >> 32).to(tl.uint32)[:, None]
    r0, r1, r2, r3 = tl.philox(seed, quad, token_lo, token_hi, zero)
    # join() interleaves: channel 4q + i gets r_i.
    bits = tl.join(tl.join(r0, r2), tl.join(r1, r3)).reshape(BLOCK_T, BLOCK_C)
    return tl.uint_to_uniform_float(bits) >= p


@triton.jit
def _dropout_mask_kernel(
    seed_ptr,  # () int64
    keep_ptr,  # (T, C) contiguous, uint8
    T,
    C,
    p,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # One program: BLOCK_T tokens, all channels, BLOCK_C at a time.
    offs_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    for first_c in range(0, C, BLOCK_C):
        offs_c = first_c + tl.arange(0, BLOCK_C)
        keep = keep_mask(seed_ptr, offs_t, first_c, p, BLOCK_T, BLOCK_C)
        mask = (offs_t < T)[:, None] & (offs_c < C)[None, :]
        tl.store(keep_ptr + offs_t[:, None] * C + offs_c[None, :], keep.to(tl.uint8), mask=mask)


_BLOCK_T, _BLOCK_C, _NUM_WARPS, _REGISTERS = 8, 128, 4, 128


def dropout_mask(tokens: int, channels: int, p: float, seed: torch.Tensor) -> torch.Tensor:
    """(tokens, channels) bool, on seed's device: what the kernels keep for a seed, () int64."""
    keep = torch.empty(tokens, channels, dtype=torch.uint8, device=seed.device)
    if keep.numel():
        with _launch.device_of(seed):
            _dropout_mask_kernel[(triton.cdiv(tokens, _BLOCK_T),)](
                seed,
                keep,
                tokens,
                channels,
                p,
                BLOCK_T=_BLOCK_T,
                BLOCK_C=_BLOCK_C,
                **_launch.options(_NUM_WARPS, _REGISTERS),
            )
    return keep.view(torch.bool)


def launches(dtype: torch.dtype, device: torch.device) -> Iterator[str]:
    """Make its one launch."""
    dropout_mask(4096, 512, 0.1, torch.empty((), dtype=torch.int64, device=device))
    yield "dropout_mask"
