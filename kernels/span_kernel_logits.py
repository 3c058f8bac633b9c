"""The kernel logits of ConvBERT's spans: from the depthwise convolution's result to span_dynamic_conv's logits.

    gated[t] = (pointwise @ spread[t] + bias) * gate[t]           spread (T, C), gate (T, O)
    logits[t] = weight @ gated[t] + kernel_bias                   (T, N), N = H*K

One program owns BLOCK_T tokens and walks the O channels in between, BLOCK_O at a time: their product with pointwise
over all C channels, bias and gate in registers, and their part of the second product, whose sums stay in registers too.
So the O channels never are in memory. Reads C + O elements a token, writes N; as two products and a multiplication it
would be 4 O more. Every program reads both weights, from the L2 cache.

Jiang et al., arXiv 2008.02496, section 4.2.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from . import _launch
from ._configs import Card, matrix_problem, tuned

NARROW = {"_span_kernel_logits_fwd_kernel": {"logits_ptr": "rows of H*K values don't begin at multiples of 16 bytes"}}


@triton.jit(do_not_specialize=["T"])
def _span_kernel_logits_fwd_kernel(
    spread_ptr,  # (T, C)
    pointwise_ptr,  # (O, C)
    bias_ptr,  # (O,)
    gate_ptr,  # (T, O)
    weight_ptr,  # (N, O)
    kernel_bias_ptr,  # (N,)
    logits_ptr,  # (T, N) contiguous
    T,
    C,
    O,  # noqa: E741 (the op's name of it)
    N,
    stride_xt,
    stride_po,
    stride_gt,
    stride_wn,
    ACC: tl.constexpr,
    HAS_KERNEL_BIAS: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # One program: tokens [pid_t * BLOCK_T, +BLOCK_T), all N logits of each.
    offs_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_c, offs_n = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_N)
    mask_t, mask_n = offs_t < T, offs_n < N
    spread_rows = spread_ptr + offs_t[:, None] * stride_xt + offs_c[None, :]

    logits = tl.zeros((BLOCK_T, BLOCK_N), ACC)
    for o in range(0, O, BLOCK_O):
        offs_o = o + tl.arange(0, BLOCK_O)
        mask_o = offs_o < O
        spread_tile = spread_rows
        pointwise_tile = pointwise_ptr + offs_o.to(tl.int64)[None, :] * stride_po + offs_c[:, None]
        acc = tl.zeros((BLOCK_T, BLOCK_O), ACC)
        for c in range(0, C, BLOCK_C):
            mask_c = offs_c < C - c
            spread = tl.load(spread_tile, mask=mask_t[:, None] & mask_c[None, :], other=0.0)
            pointwise = tl.load(pointwise_tile, mask=mask_c[:, None] & mask_o[None, :], other=0.0)
            if UPCAST:
                spread, pointwise = spread.to(ACC), pointwise.to(ACC)
            acc = tl.dot(spread, pointwise, acc, input_precision="ieee", out_dtype=ACC)
            spread_tile += BLOCK_C
            pointwise_tile += BLOCK_C
        acc += tl.load(bias_ptr + offs_o, mask=mask_o, other=0.0).to(ACC)[None, :]
        gate_tile = gate_ptr + offs_t[:, None] * stride_gt + offs_o[None, :]
        acc *= tl.load(gate_tile, mask=mask_t[:, None] & mask_o[None, :], other=0.0).to(ACC)
        # In the tensors' dtype, as a product of its own would get them.
        gated = acc.to(weight_ptr.dtype.element_ty)
        weight_tile = weight_ptr + offs_n.to(tl.int64)[None, :] * stride_wn + offs_o[:, None]
        weight = tl.load(weight_tile, mask=mask_o[:, None] & mask_n[None, :], other=0.0)
        if UPCAST:
            gated, weight = gated.to(ACC), weight.to(ACC)
        logits = tl.dot(gated, weight, logits, input_precision="ieee", out_dtype=ACC)

    if HAS_KERNEL_BIAS:
        logits += tl.load(kernel_bias_ptr + offs_n, mask=mask_n, other=0.0).to(ACC)[None, :]
    offs_l = offs_t[:, None] * N + offs_n[None, :]
    tl.store(logits_ptr + offs_l, logits.to(logits_ptr.dtype.element_ty), mask=mask_t[:, None] & mask_n[None, :])


@dataclass(frozen=True)
class Config:
    """Launch parameters."""

    block_t: int
    block_o: int
    block_c: int
    num_warps: int
    num_stages: int
    registers: int  # at most so many a thread


# The bfloat16 arithmetic of Triton's interpreter is wrong without an error.
_INTERPRETED = not isinstance(_span_kernel_logits_fwd_kernel, triton.JITFunction)


def _logits_block(size_out: int) -> int:
    return max(16, triton.next_power_of_2(size_out))


def _check(kernel: str, shape: tuple[int, ...], dtype: torch.dtype, card: Card, config: Config) -> str | None:
    t, o, c = config.block_t, config.block_o, config.block_c
    return matrix_problem(card, dtype, config, (t, o, c), t * (o + _logits_block(shape[3])), (t + o) * c)


@tuned(
    "span_kernel_logits_fwd",
    vary=("block_t", "block_o", "block_c", "num_warps", "num_stages"),
    config=Config,
    check=_check,
)
def pick_config(kernel: str, shape: tuple[int, int, int, int], dtype: torch.dtype, card: Card) -> Config:
    """Launch config for `shape` (T, C, O, N), in half precision. Not tuned on a card yet.

    wgmma wants 64 rows a group of 4 warps. Each program reads all of the weights, which takes a multiprocessor as long
    for 16 tokens as for 64: so few only where there are too few for a large card (132 multiprocessors in an H200), and
    as many as registers hold the sums of once that leaves none idle.
    """
    tokens, size_in, size_between, size_out = shape
    if size_in % 16 or size_between % 16:
        return Config(64, 32, 32, 8, 2, 255)
    if tokens <= 1024:
        return Config(16, 128 if size_out <= 64 else 64, 64, 4, 4, 255)
    # 128 tokens' sums of more logits don't fit in registers.
    if tokens < 128 * 132 or size_out > 64:
        return Config(64, 128, 64, 8, 4, 255)
    return Config(128, 128, 64, 8, 3, 255)


def span_kernel_logits_fwd(
    spread: torch.Tensor,
    pointwise: torch.Tensor,
    bias: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor,
    kernel_bias: torch.Tensor | None,
) -> torch.Tensor:
    """The logits (..., N), contiguous, of the depthwise convolution's result, spread (..., C).

    pointwise (O, C, 1), bias (O, 1), gate (..., O), weight (N, O), kernel_bias (N,) or None, of one dtype.
    """
    size_out = weight.shape[0]
    logits = torch.empty(*spread.shape[:-1], size_out, dtype=spread.dtype, device=spread.device)
    spread, gate = _launch.rows(spread), _launch.rows(gate)
    pointwise, weight = _launch.rows(pointwise.squeeze(-1)), _launch.rows(weight)
    bias, kernel_bias = bias.contiguous(), None if kernel_bias is None else kernel_bias.contiguous()
    (tokens, size_in), size_between = spread.shape, gate.shape[1]
    if tokens == 0:
        return logits
    shape = (tokens, size_in, size_between, size_out)
    config = pick_config("span_kernel_logits_fwd", shape, spread.dtype, _launch.card(spread))
    # AMD's compiler keeps all stages but one in shared memory, of which a block has 64 KiB.
    stages = 2 if _launch.is_amd() else config.num_stages
    with _launch.device_of(spread):
        _span_kernel_logits_fwd_kernel[(triton.cdiv(tokens, config.block_t),)](
            spread,
            pointwise,
            bias,
            gate,
            weight,
            kernel_bias,
            logits,
            tokens,
            size_in,
            size_between,
            size_out,
            spread.stride(0),
            pointwise.stride(0),
            gate.stride(0),
            weight.stride(0),
            ACC=_launch.acc(spread.dtype),
            HAS_KERNEL_BIAS=kernel_bias is not None,
            UPCAST=_INTERPRETED,
            BLOCK_T=config.block_t,
            BLOCK_O=config.block_o,
            BLOCK_C=config.block_c,
            BLOCK_N=_logits_block(size_out),
            num_stages=stages,
            **_launch.options(config.num_warps, config.registers),
        )
    return logits


def launches(dtype: torch.dtype, device: torch.device) -> Iterator[str]:
    """Make every launch that `pick_config` can choose, on empty tensors; yields a name after each.

    In half precision, for which the kernel is: ConvBERT's sizes, which are multiples of 16, as those of all models
    (others can't be read in 16 bytes), on few tokens and many. The gate is a slice of a wider tensor, as the model's.
    """
    if dtype.itemsize > 2:
        return

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    # Small, medium-small, base, and a hidden size of 1024.
    for size_in, size_out in ((256, 18), (384, 36), (768, 54), (1024, 72)):
        half = size_in // 2
        weights = empty(half, size_in, 1), empty(half, 1)
        for tokens in (128, 4096, 32768):
            gate = empty(tokens, 4 * half)[:, :half]
            span_kernel_logits_fwd(empty(tokens, size_in), *weights, gate, empty(size_out, half), empty(size_out))
            yield f"span_kernel_logits_fwd T={tokens} C={size_in} N={size_out}"
