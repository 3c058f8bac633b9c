"""The loss of masked language modelling: cross-entropy of hidden @ weight^T + bias over labelled tokens; its forward.

    l = hidden[t] @ weight^T + bias;  Z = logsumexp(l)          for every token t that has a label, in fp32
    loss[t] = Z - (1 - smoothing) * l[label] - smoothing * mean(l) + z_loss * Z^2;  loss = mean over these tokens

How many tokens have a label is known to the device only. One kernel copies their hidden states and labels to the front
of buffers with room for all T tokens; all that follow read the number from memory and do no work past it.

Forward: a program walks tiles of BLOCK_M labelled tokens and BLOCK_N rows of the weight, one product over the C
channels each, and leaves of a tile's logits their maximum and the sum of their exponentials, 2 (with smoothing 3) fp32
values a token; a second kernel combines the tiles. Reads hidden once and the weight once (for every GROUP_M tiles of
tokens): C * (L + V) elements and 2 * L * C * V operations for L labelled tokens. Neither (T, V) nor (L, V) is held.
Backward: kernels/masked_lm_loss_bwd.py.

Devlin et al., arXiv 1810.04805, section 3.1; without logits in memory: Wijmans et al., arXiv 2411.09009, section 4.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from . import _launch
from ._configs import Card, matrix_problem, tuned
from .grouped_linear import precision


@triton.jit
def tile_of(number, blocks_m, blocks_n, GROUP_M: tl.constexpr):
    """The place of a tile: GROUP_M tiles of rows stay in the L2 cache while the columns' tiles are walked."""
    first = number // (GROUP_M * blocks_n) * GROUP_M
    height = tl.minimum(blocks_m - first, GROUP_M)
    return first + number % (GROUP_M * blocks_n) % height, number % (GROUP_M * blocks_n) // height


@triton.jit
def product_tile(
    hidden_ptr,  # (T, C) contiguous
    weight_ptr,  # (V, C)
    offs_t,
    mask_t,
    offs_v,
    mask_v,
    C,
    stride_wv,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The logits of some tokens for some rows of the weight, without the bias."""
    offs_c = tl.arange(0, BLOCK_K)
    hidden_tile = hidden_ptr + offs_t[:, None] * C + offs_c[None, :]
    weight_tile = weight_ptr + offs_v.to(tl.int64)[None, :] * stride_wv + offs_c[:, None]
    acc = tl.zeros((offs_t.shape[0], offs_v.shape[0]), ACC)
    for c in range(0, C, BLOCK_K):
        mask_c = offs_c < C - c
        hidden = tl.load(hidden_tile, mask=mask_t[:, None] & mask_c[None, :], other=0.0)
        weight = tl.load(weight_tile, mask=mask_c[:, None] & mask_v[None, :], other=0.0)
        if UPCAST:
            hidden, weight = hidden.to(ACC), weight.to(ACC)
        acc = tl.dot(hidden, weight, acc, input_precision=PRECISION, out_dtype=ACC)
        hidden_tile += BLOCK_K
        weight_tile += BLOCK_K
    return acc


@triton.jit
def bias_tile(bias_ptr, offs_v, mask_v, ACC: tl.constexpr, HAS_BIAS: tl.constexpr):
    """The bias of some rows of the weight; -inf past the last, so that they have no probability."""
    if HAS_BIAS:
        return tl.load(bias_ptr + offs_v, mask=mask_v, other=float("-inf")).to(ACC)
    else:
        return tl.where(mask_v, 0.0, float("-inf")).to(ACC)


@triton.jit(do_not_specialize=["T"])
def _masked_lm_loss_gather_kernel(
    hidden_ptr,  # (T, C)
    labels_ptr,  # (T,)
    numbers_ptr,  # (T,) int32: how many tokens up to this one have a label
    packed_ptr,  # (T, C) contiguous
    packed_labels_ptr,  # (T,) int32
    tokens_ptr,  # (T,) int32
    T,
    C,
    V,
    stride_ht,
    ignore_index,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # One program: tokens [pid_t * BLOCK_T, +BLOCK_T): those with a label go to the row that their number says.
    offs_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = offs_t < T
    label = tl.load(labels_ptr + offs_t, mask=mask_t, other=0)
    mask_t &= label != ignore_index
    row = tl.load(numbers_ptr + offs_t, mask=mask_t, other=1).to(tl.int64) - 1
    # -1: outside the vocabulary. Nobody can be told without waiting for the device: the loss will be NaN.
    label = tl.where((label >= 0) & (label < V), label, -1)
    tl.store(packed_labels_ptr + row, label.to(tl.int32), mask=mask_t)
    tl.store(tokens_ptr + row, offs_t.to(tl.int32), mask=mask_t)
    for c in range(0, C, BLOCK_C):
        offs_c = c + tl.arange(0, BLOCK_C)
        mask = mask_t[:, None] & (offs_c < C)[None, :]
        hidden = tl.load(hidden_ptr + offs_t[:, None] * stride_ht + offs_c[None, :], mask=mask, other=0.0)
        tl.store(packed_ptr + row[:, None] * C + offs_c[None, :], hidden, mask=mask)


@triton.jit(do_not_specialize=["T"])
def _masked_lm_loss_fwd_kernel(
    hidden_ptr,  # (T, C) contiguous
    weight_ptr,  # (V, C)
    bias_ptr,  # (V,)
    labels_ptr,  # (T,) int32
    numbers_ptr,  # (T,) int32
    partial_ptr,  # (2 or 3, blocks of V, T and more) fp32: maximum, sum of exponentials, sum
    chosen_ptr,  # (T,) fp32: the label's logit
    T,
    C,
    V,
    stride_wv,
    stride_pp,
    ACC: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SMOOTH: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    # One program: tiles pid, pid + programs, ... of BLOCK_M labelled tokens and BLOCK_N rows of the weight.
    count = tl.load(numbers_ptr + T - 1)
    blocks_m, blocks_n = tl.cdiv(count, BLOCK_M), tl.cdiv(V, BLOCK_N)
    for number in range(tl.program_id(0), blocks_m * blocks_n, tl.num_programs(0)):
        pid_t, pid_v = tile_of(number, blocks_m, blocks_n, GROUP_M)
        offs_t = pid_t.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        offs_v = pid_v * BLOCK_N + tl.arange(0, BLOCK_N)
        mask_t, mask_v = offs_t < count, offs_v < V
        acc = product_tile(
            hidden_ptr, weight_ptr, offs_t, mask_t, offs_v, mask_v, C, stride_wv, ACC, PRECISION, UPCAST, BLOCK_K
        )
        bias = bias_tile(bias_ptr, offs_v, mask_v, ACC, HAS_BIAS)
        offs_p = pid_v.to(tl.int64) * stride_pp + offs_t
        size_p = blocks_n.to(tl.int64) * stride_pp
        if SMOOTH:
            # The products past the last row are 0.
            total = tl.sum(acc, axis=1) + tl.sum(tl.where(mask_v, bias, 0.0), axis=0)
            tl.store(partial_ptr + 2 * size_p + offs_p, total, mask=mask_t)
        acc += bias[None, :]
        label = tl.load(labels_ptr + offs_t, mask=mask_t, other=-1)
        mine = (label >= 0) & (label // BLOCK_N == pid_v)
        chosen = tl.sum(tl.where(offs_v[None, :] == label[:, None], acc, 0.0), axis=1)
        tl.store(chosen_ptr + offs_t, chosen, mask=mask_t & mine)
        largest = tl.max(acc, axis=1)
        # A tile of nothing but -inf, which a bias may make, adds 0 and not NaN.
        shift = tl.where(largest == float("-inf"), 0.0, largest)
        tl.store(partial_ptr + offs_p, largest, mask=mask_t)
        tl.store(partial_ptr + size_p + offs_p, tl.sum(tl.exp(acc - shift[:, None]), axis=1), mask=mask_t)


@triton.jit(do_not_specialize=["T"])
def _masked_lm_loss_combine_kernel(
    partial_ptr,  # (2 or 3, P, T and more) fp32
    chosen_ptr,  # (T,) fp32
    labels_ptr,  # (T,) int32
    numbers_ptr,  # (T,) int32
    lse_ptr,  # (T,) fp32
    loss_ptr,  # (T,) fp32
    T,
    P,
    V,
    stride_pp,
    smoothing,
    z_loss,
    SMOOTH: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    # One program: the loss of BLOCK_T labelled tokens, 0 past their number.
    offs_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = offs_t < tl.load(numbers_ptr + T - 1)
    acc_dtype: tl.constexpr = partial_ptr.dtype.element_ty
    largest = tl.full((BLOCK_T,), float("-inf"), acc_dtype)
    exponentials = tl.zeros((BLOCK_T,), acc_dtype)
    total = tl.zeros((BLOCK_T,), acc_dtype)
    size_p = tl.cast(P, tl.int64) * stride_pp
    for p in range(0, P, BLOCK_P):
        offs_p = p + tl.arange(0, BLOCK_P)
        # Past the labelled tokens stands anything: their number as a bound would make every load a value's.
        mask = (offs_p < P)[:, None] & (offs_t < stride_pp)[None, :]
        tile = partial_ptr + offs_p[:, None].to(tl.int64) * stride_pp + offs_t[None, :]
        maxima = tl.load(tile, mask=mask, other=float("-inf"))
        new = tl.maximum(largest, tl.max(maxima, axis=0))
        shift = tl.where(new == float("-inf"), 0.0, new)
        sums = tl.load(tile + size_p, mask=mask, other=0.0) * tl.exp(maxima - shift[None, :])
        exponentials = exponentials * tl.exp(largest - shift) + tl.sum(sums, axis=0)
        largest = new
        if SMOOTH:
            total += tl.sum(tl.load(tile + 2 * size_p, mask=mask, other=0.0), axis=0)
    label = tl.load(labels_ptr + offs_t, mask=mask_t, other=0)
    lse = tl.where(label >= 0, largest + tl.log(exponentials), float("nan"))
    loss = lse - (1.0 - smoothing) * tl.load(chosen_ptr + offs_t, mask=mask_t, other=0.0) + z_loss * lse * lse
    if SMOOTH:
        loss -= smoothing / V * total
    tl.store(lse_ptr + offs_t, lse, mask=mask_t)
    tl.store(loss_ptr + offs_t, tl.where(mask_t, loss, 0.0), mask=offs_t < T)


@dataclass(frozen=True)
class Config:
    """Launch parameters of a matrix product."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    registers: int  # at most so many a thread


# Of the tiles of rows that stay in the L2 cache: 64 of 128 rows with 768 channels of half precision are 13 MB.
GROUP_M = 64

# Programs of a product for each multiprocessor: as one is at a tile's start or end, the other multiplies.
PROGRAMS = 2

# The bfloat16 arithmetic of Triton's interpreter is wrong without an error.
INTERPRETED = not isinstance(_masked_lm_loss_fwd_kernel, triton.JITFunction)

# A token's channels are copied in blocks of so many bytes, 32 tokens a program.
_GATHER_BYTES, _GATHER_TOKENS = 512, 32

_COMBINE = {"BLOCK_P": 32, "BLOCK_T": 32}


# The backward's gradients of logits are in memory in tiles that end at multiples of this, in both directions.
BLOCK = 128

# What the gradient of the weight reads of them must have been written: so many tokens at least by a program.
_WRITTEN = 64


def _check(kernel: str, shape: tuple[int, ...], dtype: torch.dtype, card: Card, config: Config) -> str | None:
    tile = config.block_m, config.block_n, config.block_k
    of_logits, of_weight = kernel == "masked_lm_loss_bwd_logits", kernel == "masked_lm_loss_bwd_weight"
    if kernel != "masked_lm_loss_fwd" and max(tile) > BLOCK:
        return f"no block may be larger than {BLOCK}, got {tile}"
    if (of_logits and config.block_m < _WRITTEN) or (of_weight and config.block_k > _WRITTEN):
        return f"{'block_m must be at least' if of_logits else 'block_k must be at most'} {_WRITTEN}, got {tile}"
    m, n, k = tile
    return matrix_problem(card, dtype, config, tile, m * n, (m + n) * k)


@tuned(
    "masked_lm_loss_fwd",
    "masked_lm_loss_bwd_logits",
    "masked_lm_loss_bwd_hidden",
    "masked_lm_loss_bwd_weight",
    vary=("block_m", "block_n", "block_k", "num_warps", "num_stages"),
    config=Config,
    check=_check,
)
def pick_config(kernel: str, shape: tuple[int, int], dtype: torch.dtype, card: Card) -> Config:
    """Launch config for products of at most M rows in a model of C channels, `shape` (M, C). Not tuned on a card yet.

    Half precision: wgmma wants 64 rows a group of 4 warps; 3 or 4 stages of 64 are in flight, two blocks of them in a
    multiprocessor of Hopper. fp32 runs on the ordinary arithmetic units unless tf32 is allowed, and channels that are
    no multiple of 16 need an address for every value: there a larger tile would spill.
    """
    rows, channels = shape
    if channels % 16:
        return Config(64, 32, 16, 4, 2, 255)
    if dtype.itemsize > 2:
        return Config(64, 64, 16, 8, 3, 255)
    # A labelled token has so few tiles of channels that smaller ones fill the card better.
    if rows <= 64 or kernel == "masked_lm_loss_bwd_hidden":
        return Config(64, 128, 64, 8, 4, 255)
    return Config(128, 128, 64, 8, 3, 255)


def launch_options(config: Config) -> dict[str, object]:
    """Triton's options for a product; AMD's compiler keeps all stages but one in the 64 KiB of shared memory."""
    stages = 2 if _launch.is_amd() else config.num_stages
    return {"num_stages": stages, **_launch.options(config.num_warps, config.registers)}


def programs(tiles: int, x: torch.Tensor) -> tuple[int]:
    """The grid of a product of at most so many tiles on x's card."""
    return (min(tiles, PROGRAMS * _launch.sm_count(x)),)


def masked_lm_loss_fwd(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    ignore_index: int,
    smoothing: float,
    z_loss: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss, () fp32 (fp64 for fp64), and what a backward needs: packed, packed_labels, tokens, numbers and lse.

    hidden (T, C), weight (V, C), bias (V,) or None of one dtype; labels (T,) int64 or int32; T >= 1. packed (T, C),
    contiguous, of hidden's dtype: the hidden states of the tokens with a label; packed_labels, tokens (T,) int32: their
    labels and where they stand; lse (T,) of the loss's dtype. Behind the last of them nothing is written. numbers (T,)
    int32: how many tokens up to each one have a label. A label outside the vocabulary becomes -1, its lse NaN.
    """
    hidden, weight = _launch.rows(hidden), _launch.rows(weight)
    labels = labels.contiguous()
    bias = None if bias is None else bias.contiguous()
    (T, C), V = hidden.shape, weight.shape[0]
    acc = _launch.acc_torch(hidden.dtype)
    numbers = torch.cumsum(labels != ignore_index, 0, dtype=torch.int32)
    packed = torch.empty(T, C, dtype=hidden.dtype, device=hidden.device)
    packed_labels, tokens = (torch.empty(T, dtype=torch.int32, device=hidden.device) for _ in range(2))
    chosen, lse, losses = (torch.empty(T, dtype=acc, device=hidden.device) for _ in range(3))
    config = pick_config("masked_lm_loss_fwd", (T, C), hidden.dtype, _launch.card(hidden))
    blocks_v = triton.cdiv(V, config.block_n)
    smooth = smoothing > 0.0
    stride_pp = triton.cdiv(T, _COMBINE["BLOCK_T"]) * _COMBINE["BLOCK_T"]
    partial = torch.empty(3 if smooth else 2, blocks_v, stride_pp, dtype=acc, device=hidden.device)
    block_c = min(triton.next_power_of_2(C), _GATHER_BYTES // hidden.dtype.itemsize)
    with _launch.device_of(hidden):
        _masked_lm_loss_gather_kernel[(triton.cdiv(T, _GATHER_TOKENS),)](
            hidden,
            labels,
            numbers,
            packed,
            packed_labels,
            tokens,
            T,
            C,
            V,
            hidden.stride(0),
            ignore_index,
            BLOCK_T=_GATHER_TOKENS,
            BLOCK_C=block_c,
            **_launch.options(4, 255),
        )
        _masked_lm_loss_fwd_kernel[programs(triton.cdiv(T, config.block_m) * blocks_v, hidden)](
            packed,
            weight,
            bias,
            packed_labels,
            numbers,
            partial,
            chosen,
            T,
            C,
            V,
            weight.stride(0),
            stride_pp,
            ACC=_launch.acc(hidden.dtype),
            HAS_BIAS=bias is not None,
            SMOOTH=smooth,
            PRECISION=precision(hidden.dtype),
            UPCAST=INTERPRETED,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            GROUP_M=GROUP_M,
            **launch_options(config),
        )
        _masked_lm_loss_combine_kernel[(triton.cdiv(T, _COMBINE["BLOCK_T"]),)](
            partial,
            chosen,
            packed_labels,
            numbers,
            lse,
            losses,
            T,
            blocks_v,
            V,
            stride_pp,
            smoothing,
            z_loss,
            SMOOTH=smooth,
            **_COMBINE,
            **_launch.options(4, 255),
        )
    return losses.sum() / numbers[-1], packed, packed_labels, tokens, numbers, lse


def launch_cases(dtype: torch.dtype) -> list[tuple[int, int, bool]]:
    """Numbers of tokens and channels, and whether there is a bias: every config, with sizes that models have."""
    cases = [(8192, 768, True)]
    return [*cases, (64, 256, False)] if dtype.itemsize == 2 else cases


def launches(dtype: torch.dtype, device: torch.device) -> Iterator[str]:
    """Make every launch that `pick_config` can choose for the models' channels, on empty tensors."""
    for T, C, has_bias in launch_cases(dtype):
        weight = torch.empty(30522, C, dtype=dtype, device=device)
        bias = torch.empty(30522, dtype=dtype, device=device) if has_bias else None
        hidden = torch.empty(T, C, dtype=dtype, device=device)
        labels = torch.empty(T, dtype=torch.int64, device=device)
        for smoothing in (0.0, 0.1):
            masked_lm_loss_fwd(hidden, weight, bias, labels, -100, smoothing, 0.0)
            yield f"masked_lm_loss_fwd T={T} C={C} smoothing={smoothing}"
