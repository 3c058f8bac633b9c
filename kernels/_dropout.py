"""Dropout masks that a backward kernel can draw again: a pure function of (seed, token, channel)."""

from __future__ import annotations

import triton
import triton.language as tl


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
