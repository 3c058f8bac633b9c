"""Span-based dynamic convolution: every token of every head has its own softmax-normalised kernel.

    w[t, h, :] = softmax(logits[t, h, :])                                      over the K taps, in fp32
    y[t, h, :] = sum_k w[t, h, k] * value[t + k - K // 2, h, :]                zero outside of the token's sequence

Forward: one program owns BLOCK_T tokens of one head with all its channels. Logits become weights in registers, the
window's rows come K times out of the L1 cache and once out of memory: reads value and logits, writes y, and
for a backward the largest logit and the sum of exponentials (not their logarithm, in which weights lose digits):
H * (2 D + K) elements a token.

Backward: the same tile in one kernel (past 15 taps in two launches), without atomics. A value's gradient is gathered
from the tokens that weighted it, whose weights are recomputed from the saved logits; a logit's needs the dot product
of dy with its tap's row:

    dw[t, k] = dy[t] . value[t + k - K // 2]        dlogits[t, k] = w[t, k] * (dw[t, k] - sum_j w[t, j] dw[t, j])
    dvalue[t] = sum_k w[t - k + K // 2, k] * dy[t - k + K // 2]

Reads dy, value and logits, writes dvalue and dlogits: H * (3 D + 2 K) elements a token.

Computing the logits in here too, from query and span key, would save in inference the span's and the logits' way
through memory, 1.8 of the layer's 45 kB a token in bf16 base, 4 %, and in training only the logits', 0.5 %, since their
input is needed for its own gradient. That doesn't pay for a matrix product in a kernel of gathers.

Jiang et al., arXiv 2008.02496, section 4.2.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from . import MAX_KERNEL_SIZE, _launch
from ._configs import Card, tuned
from ._spans import tap_inside, token_span


@triton.jit(do_not_specialize=["T", "S"])
def _span_dynamic_conv_fwd_kernel(
    value_ptr,  # (T, H*D)
    logits_ptr,  # (T, H*K)
    before_ptr,  # (T,) int32
    after_ptr,  # (T,) int32
    y_ptr,  # (T, H*D)
    stats_ptr,  # (2, T, H) contiguous, fp32: largest logit, sum of exponentials
    T,
    S,
    H,
    D,
    stride_vt,
    stride_lt,
    stride_yt,
    ACC: tl.constexpr,
    K: tl.constexpr,
    HAS_PACKING: tl.constexpr,
    SAVE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # One program: tokens [pid_t * BLOCK_T, +BLOCK_T) of head h, all its channels.
    pid = tl.program_id(0).to(tl.int64)
    h = pid % H
    first_t = pid // H * BLOCK_T
    offs_t = first_t + tl.arange(0, BLOCK_T)
    offs_d = tl.arange(0, BLOCK_D)
    mask_t = offs_t < T
    mask_d = offs_d < D
    before, after = token_span(before_ptr, after_ptr, first_t, mask_t, S, HAS_PACKING, BLOCK_T)

    logits = ()
    largest = tl.full((BLOCK_T,), float("-inf"), ACC)
    for k in tl.static_range(K):
        logit = tl.load(logits_ptr + offs_t * stride_lt + h * K + k, mask=mask_t, other=0.0).to(ACC)
        logits = logits + (logit,)  # noqa: RUF005 (Triton has no unpacking)
        largest = tl.maximum(largest, logit)
    total = tl.zeros((BLOCK_T,), ACC)
    lost = tl.zeros((BLOCK_T,), ACC)
    acc = tl.zeros((BLOCK_T, BLOCK_D), ACC)
    for k in tl.static_range(K):
        weight = tl.exp(logits[k] - largest)
        # Compensated: where one weight is nearly 1, its gradient is what the sum's rounding leaves of 1 - weight.
        term = weight - lost
        longer = total + term
        lost = (longer - total) - term
        total = longer
        inside = tap_inside(k - K // 2, before, after) & mask_t
        rows = value_ptr + (offs_t + (k - K // 2))[:, None] * stride_vt + h * D + offs_d[None, :]
        acc += weight[:, None] * tl.load(rows, mask=inside[:, None] & mask_d[None, :], other=0.0).to(ACC)
    y = acc / total[:, None]
    offs_y = offs_t[:, None] * stride_yt + h * D + offs_d[None, :]
    tl.store(y_ptr + offs_y, y.to(y_ptr.dtype.element_ty), mask=mask_t[:, None] & mask_d[None, :])
    if SAVE:
        tl.store(stats_ptr + offs_t * H + h, largest, mask=mask_t)
        tl.store(stats_ptr + (T + offs_t) * H + h, total, mask=mask_t)


@triton.jit(do_not_specialize=["T", "S"])
def _span_dynamic_conv_bwd_kernel(
    dy_ptr,  # (T, H*D)
    value_ptr,  # (T, H*D)
    logits_ptr,  # (T, H*K)
    stats_ptr,  # (2, T, H) contiguous, fp32
    before_ptr,  # (T,) int32
    after_ptr,  # (T,) int32
    dvalue_ptr,  # (T, H*D)
    dlogits_ptr,  # (T, H*K)
    T,
    S,
    H,
    D,
    stride_dyt,
    stride_vt,
    stride_lt,
    stride_dvt,
    stride_dlt,
    ACC: tl.constexpr,
    K: tl.constexpr,
    HAS_PACKING: tl.constexpr,
    DVALUE: tl.constexpr,
    DLOGITS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # One program: tokens [pid_t * BLOCK_T, +BLOCK_T) of head h, all its channels; both gradients, or one of them.
    pid = tl.program_id(0).to(tl.int64)
    h = pid % H
    first_t = pid // H * BLOCK_T
    offs_t = first_t + tl.arange(0, BLOCK_T)
    offs_d = tl.arange(0, BLOCK_D)
    mask_t = offs_t < T
    mask_d = (offs_d < D)[None, :]
    mask = mask_t[:, None] & mask_d
    before, after = token_span(before_ptr, after_ptr, first_t, mask_t, S, HAS_PACKING, BLOCK_T)
    offs_c = h * D + offs_d[None, :]

    if DVALUE:
        # Gathered from the tokens whose tap k was this one.
        dvalue = tl.zeros((BLOCK_T, BLOCK_D), ACC)
        for k in tl.static_range(K):
            inside = tap_inside(K // 2 - k, before, after) & mask_t
            offs_u = offs_t - (k - K // 2)
            logit = tl.load(logits_ptr + offs_u * stride_lt + h * K + k, mask=inside, other=0.0).to(ACC)
            largest = tl.load(stats_ptr + offs_u * H + h, mask=inside, other=float("inf"))
            weight = tl.exp(logit - largest) / tl.load(stats_ptr + (T + offs_u) * H + h, mask=inside, other=1.0)
            rows = dy_ptr + offs_u[:, None] * stride_dyt + offs_c
            dvalue += weight[:, None] * tl.load(rows, mask=inside[:, None] & mask_d, other=0.0).to(ACC)
        rows = dvalue_ptr + offs_t[:, None] * stride_dvt + offs_c
        tl.store(rows, dvalue.to(dvalue_ptr.dtype.element_ty), mask=mask)

    if DLOGITS:
        dy = tl.load(dy_ptr + offs_t[:, None] * stride_dyt + offs_c, mask=mask, other=0.0).to(ACC)
        largest = tl.load(stats_ptr + offs_t * H + h, mask=mask_t, other=0.0)
        total = tl.load(stats_ptr + (T + offs_t) * H + h, mask=mask_t, other=1.0)
        weights = ()
        dweights = ()
        mean = tl.zeros((BLOCK_T,), ACC)
        for k in tl.static_range(K):
            inside = tap_inside(k - K // 2, before, after) & mask_t
            rows = value_ptr + (offs_t + (k - K // 2))[:, None] * stride_vt + offs_c
            value = tl.load(rows, mask=inside[:, None] & mask_d, other=0.0).to(ACC)
            logit = tl.load(logits_ptr + offs_t * stride_lt + h * K + k, mask=mask_t, other=0.0).to(ACC)
            weight = tl.exp(logit - largest) / total
            dweight = tl.sum(dy * value, axis=1)
            mean += weight * dweight
            weights = weights + (weight,)  # noqa: RUF005 (Triton has no unpacking)
            dweights = dweights + (dweight,)  # noqa: RUF005
        for k in tl.static_range(K):
            dlogit = weights[k] * (dweights[k] - mean)
            offs_l = offs_t * stride_dlt + h * K + k
            tl.store(dlogits_ptr + offs_l, dlogit.to(dlogits_ptr.dtype.element_ty), mask=mask_t)


@dataclass(frozen=True)
class Config:
    """Launch parameters of the forward or of the backward kernel."""

    block_t: int
    block_d: int
    num_warps: int
    registers: int  # at most so many a thread


_REGISTERS = 255

# Past so many taps the two gradients together don't fit in a thread's registers.
_MAX_FUSED = 15


def _head_block(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


def _check(kernel: str, shape: tuple[int, ...], dtype: torch.dtype, card: Card, config: Config) -> str | None:
    block_d = _head_block(shape[2])
    return None if config.block_d == block_d else f"block_d must be {block_d}, a whole head, got {config.block_d}"


@tuned(
    "span_dynamic_conv_fwd",
    "span_dynamic_conv_bwd",
    vary=("block_t", "num_warps", "registers"),
    config=Config,
    check=_check,
)
def pick_config(kernel: str, shape: tuple[int, int, int, int], dtype: torch.dtype, card: Card) -> Config:
    """Launch config for value (T, H, D) and K taps, `shape` (T, H, D, K). Not tuned on a card yet.

    A thread has 16 bytes of one token, or of two in a forward of few taps: each of its tokens costs a register a tap,
    two in the backward.
    """
    tokens, _, size, kernel_size = shape
    block_d = _head_block(size)
    threads_a_token = max(1, block_d * dtype.itemsize // 16)
    tokens_a_thread = 2 if kernel == "span_dynamic_conv_fwd" and kernel_size <= 15 else 1
    # Few tokens: small programs, so that they spread over the card.
    num_warps = 8 if tokens > 4096 else 4
    block_t = max(1, 32 * num_warps * tokens_a_thread // threads_a_token)
    return Config(block_t, block_d, num_warps, _REGISTERS)


def span_dynamic_conv_fwd(
    value: torch.Tensor,
    kernel_logits: torch.Tensor,
    kernel_size: int,
    before: torch.Tensor | None,
    after: torch.Tensor | None,
    out: torch.Tensor | None,
    save: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """y, and with `save` the largest logits and the sums of exponentials, (2, T, H) fp32 (fp64 for fp64).

    value (B, S, H*D) and kernel_logits (B, S, H*K) of one dtype; or (T, ...) with before and after, (T,) int32, of a
    packing. y is `out`, (..., H*D) contiguous but for the tokens' one stride, or new.
    """
    y = torch.empty(value.shape, dtype=value.dtype, device=value.device) if out is None else out
    v, logits, y_rows = _launch.rows(value), _launch.rows(kernel_logits), y.view(-1, y.shape[-1])
    tokens, heads = v.shape[0], logits.shape[1] // kernel_size
    size = v.shape[1] // heads
    stats = torch.empty(2, tokens, heads, dtype=_launch.acc_torch(v.dtype), device=v.device) if save else None
    if tokens == 0:
        return y, stats
    shape = (tokens, heads, size, kernel_size)
    config = pick_config("span_dynamic_conv_fwd", shape, v.dtype, _launch.card(v))
    with _launch.device_of(v):
        _span_dynamic_conv_fwd_kernel[(triton.cdiv(tokens, config.block_t) * heads,)](
            v,
            logits,
            before,
            after,
            y_rows,
            stats,
            tokens,
            value.shape[-2],
            heads,
            size,
            v.stride(0),
            logits.stride(0),
            y_rows.stride(0),
            ACC=_launch.acc(v.dtype),
            K=kernel_size,
            HAS_PACKING=before is not None,
            SAVE=save,
            BLOCK_T=config.block_t,
            BLOCK_D=config.block_d,
            **_launch.options(config.num_warps, config.registers),
        )
    return y, stats


def span_dynamic_conv_bwd(
    dy: torch.Tensor,
    value: torch.Tensor,
    kernel_logits: torch.Tensor,
    stats: torch.Tensor,
    kernel_size: int,
    before: torch.Tensor | None,
    after: torch.Tensor | None,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """dvalue and dlogits, with the shapes and the dtype of value and kernel_logits.

    They are `out`, contiguous but for the tokens' one stride, or new.
    """
    made = out or [torch.empty(t.shape, dtype=value.dtype, device=value.device) for t in (value, kernel_logits)]
    dvalue, dlogits = (t.view(-1, t.shape[-1]) for t in made)
    dy, v, logits = _launch.rows(dy), _launch.rows(value), _launch.rows(kernel_logits)
    tokens, heads = v.shape[0], logits.shape[1] // kernel_size
    size = v.shape[1] // heads
    if tokens == 0:
        return made[0], made[1]
    shape = (tokens, heads, size, kernel_size)
    config = pick_config("span_dynamic_conv_bwd", shape, v.dtype, _launch.card(v))
    for dvalue_pass, dlogits_pass in ((True, True),) if kernel_size <= _MAX_FUSED else ((True, False), (False, True)):
        with _launch.device_of(v):
            _span_dynamic_conv_bwd_kernel[(triton.cdiv(tokens, config.block_t) * heads,)](
                dy,
                v,
                logits,
                stats,
                before,
                after,
                dvalue,
                dlogits,
                tokens,
                value.shape[-2],
                heads,
                size,
                dy.stride(0),
                v.stride(0),
                logits.stride(0),
                dvalue.stride(0),
                dlogits.stride(0),
                ACC=_launch.acc(v.dtype),
                K=kernel_size,
                HAS_PACKING=before is not None,
                DVALUE=dvalue_pass,
                DLOGITS=dlogits_pass,
                BLOCK_T=config.block_t,
                BLOCK_D=config.block_d,
                **_launch.options(config.num_warps, config.registers),
            )
    return made[0], made[1]


def launches(dtype: torch.dtype, device: torch.device) -> Iterator[str]:
    """Make every launch that `pick_config` can choose, on empty tensors; yields a name after each.

    D over every block size; for ConvBERT's 64 also T over both branches, K over the ends of its range, and a packing,
    for which the kernel has other code.
    """

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    cases = [(6, 64, tokens, 9, packed) for tokens in (512, 8192) for packed in (False, True)]
    cases += [(6, 64, 8192, 1, False), (6, 64, 8192, 15, False), (6, 64, 8192, MAX_KERNEL_SIZE, False)]
    cases += [(heads, size, 8192, 9, False) for heads, size in ((4, 48), (8, 16), (2, 128), (1, 256))]
    for heads, size, tokens, kernel_size, packed in cases:
        lead = (tokens,) if packed else (8, tokens // 8)
        value, logits = empty(*lead, heads * size), empty(*lead, heads * kernel_size)
        span = empty(tokens, dtype=torch.int32) if packed else None
        name = f"H={heads} D={size} K={kernel_size} T={tokens} packed={packed}"
        y, stats = span_dynamic_conv_fwd(value, logits, kernel_size, span, span, None, True)
        if kernel_size == 9 and size == 64:
            span_dynamic_conv_fwd(value, logits, kernel_size, span, span, None, False)
        yield f"span_dynamic_conv_fwd {name}"
        assert stats is not None
        span_dynamic_conv_bwd(y, value, logits, stats, kernel_size, span, span)
        yield f"span_dynamic_conv_bwd {name}"
