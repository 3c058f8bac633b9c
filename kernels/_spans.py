"""Where a token stands in its sequence, and where that ends, for kernels whose windows must not leave it."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def token_span(before_ptr, after_ptr, first_t, mask_t, S, HAS_PACKING: tl.constexpr, BLOCK_T: tl.constexpr):
    """How many tokens of its sequence stand before and after each of BLOCK_T tokens from first_t (int64) on.

    Of a packed batch, as its (T,) int32 tensors say, or of rows of S tokens.
    """
    offs = tl.arange(0, BLOCK_T)
    if HAS_PACKING:
        before = tl.load(before_ptr + first_t + offs, mask=mask_t, other=0)
        after = tl.load(after_ptr + first_t + offs, mask=mask_t, other=0)
    else:
        # The long division once, for the first token.
        before = ((first_t % S).to(tl.int32) + offs) % S
        after = S - 1 - before
    return before, after


@triton.jit
def sequence_ends(before_ptr, after_ptr, t, S, HAS_PACKING: tl.constexpr):
    """The first and the last token, int64, of the sequence that token t (int64) is of."""
    if HAS_PACKING:
        first = t - tl.load(before_ptr + t)
        last = t + tl.load(after_ptr + t)
    else:
        first = t // S * S
        last = first + S - 1
    return first, last


@triton.jit
def tap_inside(shift: tl.constexpr, before, after):
    """Whether the token `shift` places on is of the same sequence."""
    return (before + shift >= 0) & (after >= shift)
