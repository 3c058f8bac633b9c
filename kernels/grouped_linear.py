"""Grouped linear layer, y = activation(x[..., g, :] @ weight[g] + bias[g]), and the products of any dense layer.

Forward: one program owns BLOCK_T tokens and BLOCK_N output channels of one group and walks its K input channels; the
groups are addressed in place, as slices of the channels, and bias and activation are applied to the product in
registers. Reads x and weight, writes y: G * (K + N) elements a token. For a backward it writes the pre-activation too,
2 bytes an output value in half precision, read once more later: to compute it again instead costs 2 K operations,
which at ConvBERT's K of 192 to 768 take as long or longer, and reading x and weight again.

Backward: with dpre = dy * activation'(pre),

    dx[:, g] = dpre[:, g] @ weight[g]^T        the forward's kernel, with the weight's strides exchanged
    dweight[g] = x[:, g]^T @ dpre[:, g]        torch.bmm: a sum over all tokens, for which cuBLAS splits K, on views
    dbias = sum over the tokens of dpre

One kernel makes dpre and the programs' partial sums for dbias, which a second adds; it can add a bias to pre first.
Reads dy and pre, writes dpre: 3 * G * N elements a token.

Jiang et al., arXiv 2008.02496, section 4.3.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from . import _launch
from ._activations import ONE_NAME_EACH, activate, derivative, function_name
from ._configs import Card, any_config, matrix_problem, tuned
from ._reduce import sum_partials

# AMD's matrix instructions leave a thread 4 neighbouring values, 8 bytes of half precision, and its compiler stores
# them so rather than pass them through shared memory. NVIDIA's code stores 16 bytes.
NARROW = {"_grouped_linear_fwd_kernel": dict.fromkeys(("y_ptr", "pre_ptr"), "AMD's accumulators are stored in place")}


@triton.jit(do_not_specialize=["T"])
def _grouped_linear_fwd_kernel(
    x_ptr,  # (T, G*K)
    weight_ptr,  # (G, K, N)
    bias_ptr,  # (G*N,)
    y_ptr,  # (T, G*N) contiguous
    pre_ptr,  # (T, G*N) contiguous
    T,
    K,
    N,
    stride_xt,
    stride_wg,
    stride_wk,
    stride_wn,
    stride_yt,
    ACC: tl.constexpr,
    FUNCTION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SAVE: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_T: tl.constexpr,
):
    # One program: tokens [pid_t * BLOCK_T, +BLOCK_T), output channels [pid_n * BLOCK_N, +BLOCK_N) of group g.
    # Neighbouring programs share GROUP_T blocks of tokens, and walk the outputs' blocks: both stay in the L2 cache.
    pid = tl.program_id(0)
    g = tl.program_id(1).to(tl.int64)
    blocks_t, blocks_n = tl.cdiv(T, BLOCK_T), tl.cdiv(N, BLOCK_N)
    first = pid // (GROUP_T * blocks_n) * GROUP_T
    height = tl.minimum(blocks_t - first, GROUP_T)
    pid_t = first + pid % (GROUP_T * blocks_n) % height
    pid_n = pid % (GROUP_T * blocks_n) // height

    offs_t = pid_t.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_t, mask_n = offs_t < T, offs_n < N
    x_tile = x_ptr + g * K + offs_t[:, None] * stride_xt + offs_k[None, :]
    weight_tile = weight_ptr + g * stride_wg + offs_k.to(tl.int64)[:, None] * stride_wk
    weight_tile += offs_n.to(tl.int64)[None, :] * stride_wn

    acc = tl.zeros((BLOCK_T, BLOCK_N), ACC)
    for k in range(0, K, BLOCK_K):
        mask_k = offs_k < K - k
        x = tl.load(x_tile, mask=mask_t[:, None] & mask_k[None, :], other=0.0)
        weight = tl.load(weight_tile, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
        if UPCAST:
            x, weight = x.to(ACC), weight.to(ACC)
        acc = tl.dot(x, weight, acc, input_precision=PRECISION, out_dtype=ACC)
        x_tile += BLOCK_K
        weight_tile += BLOCK_K * tl.cast(stride_wk, tl.int64)

    if HAS_BIAS:
        acc += tl.load(bias_ptr + g * N + offs_n, mask=mask_n, other=0.0).to(ACC)[None, :]
    offs_y = offs_t[:, None] * stride_yt + g * N + offs_n[None, :]
    mask = mask_t[:, None] & mask_n[None, :]
    if SAVE:
        tl.store(pre_ptr + offs_y, acc.to(pre_ptr.dtype.element_ty), mask=mask)
    tl.store(y_ptr + offs_y, activate(acc, FUNCTION).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T"])
def _grouped_linear_bwd_pre_kernel(
    dy_ptr,  # (T, C)
    pre_ptr,  # (T, C)
    bias_ptr,  # (C,)
    dpre_ptr,  # (T, C) contiguous
    partial_ptr,  # (programs, C) fp32
    T,
    C,
    stride_dyt,
    stride_pt,
    ACC: tl.constexpr,
    FUNCTION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # One program: token blocks pid_t, pid_t + programs, pid_t + 2 * programs, ..., BLOCK_C channels.
    pid_t = tl.program_id(0)
    programs = tl.num_programs(0)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    dbias = tl.zeros((BLOCK_C,), ACC)
    for block in range(pid_t, tl.cdiv(T, BLOCK_T), programs):
        offs_t = tl.cast(block, tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
        mask = (offs_t < T)[:, None] & mask_c[None, :]
        pre = tl.load(pre_ptr + offs_t[:, None] * stride_pt + offs_c[None, :], mask=mask, other=0.0).to(ACC)
        if HAS_BIAS:
            pre += tl.load(bias_ptr + offs_c, mask=mask_c, other=0.0).to(ACC)[None, :]
        # dy is 0 outside the mask, and the derivative of anything finite is.
        dy = tl.load(dy_ptr + offs_t[:, None] * stride_dyt + offs_c[None, :], mask=mask, other=0.0).to(ACC)
        dpre = dy * derivative(pre, FUNCTION)
        dbias += tl.sum(dpre, axis=0)
        offs_d = offs_t[:, None] * C + offs_c[None, :]
        tl.store(dpre_ptr + offs_d, dpre.to(dpre_ptr.dtype.element_ty), mask=mask)
    tl.store(partial_ptr + pid_t.to(tl.int64) * C + offs_c, dbias, mask=mask_c)


@dataclass(frozen=True)
class Config:
    """Launch parameters of the matrix product."""

    block_t: int
    block_n: int
    block_k: int
    group_t: int
    num_warps: int
    num_stages: int
    registers: int  # at most so many a thread


@dataclass(frozen=True)
class PreConfig:
    """Launch parameters of the backward's elementwise kernel."""

    block_t: int
    block_c: int
    num_warps: int
    registers: int


# Fewer tiles than a large card has multiprocessors (132 on an H200) leave some idle.
_FEW_TILES = 132

# The bfloat16 arithmetic of Triton's interpreter is wrong without an error.
_INTERPRETED = not isinstance(_grouped_linear_fwd_kernel, triton.JITFunction)


def _check(kernel: str, shape: tuple[int, ...], dtype: torch.dtype, card: Card, config: Config) -> str | None:
    t, n, k = config.block_t, config.block_n, config.block_k
    return matrix_problem(card, dtype, config, (t, n, k), t * n, (t + n) * k)


@tuned(
    "grouped_linear_fwd",
    vary=("block_t", "block_n", "block_k", "num_warps", "num_stages"),
    config=Config,
    check=_check,
)
def pick_config(kernel: str, shape: tuple[int, int, int, int], dtype: torch.dtype, card: Card) -> Config:
    """Launch config for the product of `shape` (T, G, K, N). Not tuned on a card yet.

    Half precision: wgmma wants 64 rows a group of 4 warps; 3 or 4 stages of 64 channels are in flight, two blocks of
    them in a multiprocessor of Hopper. fp32 runs on the ordinary arithmetic units unless tf32 is allowed, and sizes
    that are no multiples of 16 need an address for every value: there a larger tile would spill.
    """
    tokens, groups, size_in, size_out = shape
    if size_in % 16 or size_out % 16:
        return Config(64, 32, 16, 8, 4, 2, 255)
    if dtype.itemsize > 2:
        return Config(64, 64, 16, 8, 4, 3, 255)
    # No more than an eighth of the products may be for channels past the end, unless they are few.
    block_n = 128 if triton.cdiv(size_out, 128) * 112 <= size_out else 64
    tiles = triton.cdiv(tokens, 128) * triton.cdiv(size_out, block_n) * groups
    block_t = 64 if tiles < _FEW_TILES else 128
    large = block_t * block_n == 128 * 128
    return Config(block_t, block_n, 64, 8, 8 if large else 4, 3 if large else 4, 255)


@tuned(
    "grouped_linear_bwd_pre", vary=("block_t", "block_c", "num_warps", "registers"), config=PreConfig, check=any_config
)
def pick_pre_config(kernel: str, shape: tuple[int, int], dtype: torch.dtype, card: Card) -> PreConfig:
    """Launch config for pre (T, C): a warp reads 512 neighbouring bytes, a thread 16 values. Not tuned on a card."""
    _, channels = shape
    block_c = min(512 // dtype.itemsize, max(16, triton.next_power_of_2(channels)))
    return PreConfig(2048 // block_c, block_c, 4, 255)


def precision(dtype: torch.dtype) -> str:
    """How products of fp32 round their inputs: as torch.backends.cuda.matmul says, not at all by default."""
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


def grouped_linear_fwd(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None,
    save: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """y, and with `save` the pre-activation, both (..., G*N) contiguous with x's dtype.

    x (..., G*K), weight (G, K, N) of any strides, bias (G*N,) or None, of one dtype; activation a name of the
    transformers list, or None.
    """
    groups, size_in, size_out = weight.shape
    rows = _launch.rows(x)
    bias = None if bias is None else bias.contiguous()
    y = torch.empty(*x.shape[:-1], groups * size_out, dtype=x.dtype, device=x.device)
    pre = torch.empty_like(y) if save else None
    tokens = rows.shape[0]
    if tokens == 0:
        return y, pre
    shape = (tokens, groups, size_in, size_out)
    config = pick_config("grouped_linear_fwd", shape, x.dtype, _launch.card(x))
    # AMD's compiler keeps all stages but one in shared memory, of which a block has 64 KiB.
    stages = 2 if _launch.is_amd() else config.num_stages
    with _launch.device_of(x):
        _grouped_linear_fwd_kernel[
            (triton.cdiv(tokens, config.block_t) * triton.cdiv(size_out, config.block_n), groups)
        ](
            rows,
            weight,
            bias,
            y,
            pre,
            tokens,
            size_in,
            size_out,
            rows.stride(0),
            weight.stride(0),
            weight.stride(1),
            weight.stride(2),
            groups * size_out,
            ACC=_launch.acc(x.dtype),
            FUNCTION=function_name(activation),
            HAS_BIAS=bias is not None,
            SAVE=save,
            PRECISION=precision(x.dtype),
            UPCAST=_INTERPRETED,
            BLOCK_T=config.block_t,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            GROUP_T=config.group_t,
            num_stages=stages,
            **_launch.options(config.num_warps, config.registers),
        )
    return y, pre


def grouped_linear_bwd(
    dy: torch.Tensor, pre: torch.Tensor, bias: torch.Tensor | None, activation: str, *, add_up: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """dpre, contiguous with pre's shape and dtype, and its sum over the tokens, (C,) of that dtype.

    dy and pre (..., C) of one dtype; bias (C,), which pre is without, or None. add_up=False: the sums of the programs,
    (1, programs, C) fp32 (fp64 for fp64), instead of theirs.
    """
    shape, dtype = pre.shape, pre.dtype
    dpre = torch.empty(shape, dtype=dtype, device=pre.device)
    dy, pre = _launch.rows(dy), _launch.rows(pre)
    bias = None if bias is None else bias.contiguous()
    tokens, channels = pre.shape
    if tokens == 0:
        return dpre, torch.zeros(channels, dtype=dtype, device=pre.device)
    config = pick_pre_config("grouped_linear_bwd_pre", (tokens, channels), dtype, _launch.card(pre))
    blocks_c = triton.cdiv(channels, config.block_c)
    # 8 blocks of 4 warps to a multiprocessor: enough loads in flight, few enough partial sums.
    programs = min(triton.cdiv(tokens, config.block_t), triton.cdiv(8 * _launch.sm_count(pre), blocks_c))
    partial = torch.empty(1, programs, channels, dtype=_launch.acc_torch(dtype), device=pre.device)
    with _launch.device_of(pre):
        _grouped_linear_bwd_pre_kernel[(programs, blocks_c)](
            dy,
            pre,
            bias,
            dpre,
            partial,
            tokens,
            channels,
            dy.stride(0),
            pre.stride(0),
            ACC=_launch.acc(dtype),
            FUNCTION=function_name(activation),
            HAS_BIAS=bias is not None,
            BLOCK_T=config.block_t,
            BLOCK_C=config.block_c,
            **_launch.options(config.num_warps, config.registers),
        )
    if not add_up:
        return dpre, partial
    dbias = torch.empty(channels, dtype=dtype, device=pre.device)
    sum_partials(partial, dbias[None])
    return dpre, dbias


def launches(dtype: torch.dtype, device: torch.device) -> Iterator[str]:
    """Make every launch that `pick_config` can choose, on empty tensors; yields a name after each.

    Products: every tile, with the GELU and what a backward needs, plain, and with the weight's strides exchanged; of
    sizes that are multiples of 16, as those of all models: others can't be read so.
    The elementwise kernel, which is nothing but its function: every function, in one dtype.
    """

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    # ConvBERT medium-small's layers on many tokens and few.
    for tokens, size_in, size_out in ((8192, 192, 768), (8192, 768, 192), (256, 192, 768), (256, 768, 192)):
        x, weight, bias = empty(tokens, 2 * size_in), empty(2, size_in, size_out), empty(2 * size_out)
        name = f"T={tokens} K={size_in} N={size_out}"
        grouped_linear_fwd(x, weight, bias, "gelu", True)
        yield f"grouped_linear_fwd gelu {name}"
        if tokens == 8192:
            grouped_linear_fwd(x, weight, bias, "gelu", False)
            grouped_linear_fwd(x, weight, bias, None, False)
            yield f"grouped_linear_fwd inference {name}"
        grouped_linear_fwd(x, empty(2, size_out, size_in).transpose(1, 2), None, None, False)
        yield f"grouped_linear_fwd dx {name}"
    for channels in (16, 64, 1536):
        y = empty(8192, channels)
        for activation in ONE_NAME_EACH if channels == 1536 and dtype == torch.bfloat16 else ("gelu",):
            grouped_linear_bwd(y, y, None, activation)
            yield f"grouped_linear_bwd {activation} C={channels}"
