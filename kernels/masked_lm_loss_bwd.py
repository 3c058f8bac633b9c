"""The backward of masked_lm_loss: see kernels/masked_lm_loss.py.

    dlogits = softmax(l) * (1 + 2 * z_loss * Z) - (1 - smoothing) * onehot(label) - smoothing / V
    dhidden = dlogits @ weight * s;  dweight = dlogits^T @ hidden * s;  dbias = sum of dlogits * s,  s = dy / number

over the labelled tokens. A token has too many channels for a program to keep the sum of its gradient, or of a row of
the weight: a kernel that made dlogits on the way would make them C / BLOCK_N times. So they are written, for an eighth
of the vocabulary at a time, in the model's dtype: the logits are computed again, which makes four products with the
forward's where three are the least; three would need all logits in memory, unrounded: 4 * L * V bytes written and
read again, which take an H200 as long as the product (2 * C operations a value) does.

Per part of the vocabulary three kernels, whose programs walk tiles of their result: dlogits with the sums of its
columns for dbias; rows of dweight, which no other part touches; and what the part adds to dhidden, in fp32, which the
last part scatters to the tokens' places. No atomics: two runs give the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from . import _launch
from ._reduce import sum_partials
from .grouped_linear import precision
from .masked_lm_loss import (
    BLOCK,
    GROUP_M,
    INTERPRETED,
    bias_tile,
    launch_cases,
    launch_options,
    pick_config,
    product_tile,
    programs,
    tile_of,
)

# AMD's matrix instructions leave a thread 4 neighbouring values, 8 bytes of half precision, and its compiler stores
# them so rather than pass them through shared memory. NVIDIA's code stores 16 bytes.
_NARROW = "AMD's accumulators are stored in place"
NARROW = {
    "_masked_lm_loss_bwd_logits_kernel": {"dlogits_ptr": _NARROW},
    "_masked_lm_loss_bwd_hidden_kernel": dict.fromkeys(("acc_ptr", "dhidden_ptr"), _NARROW),
    "_masked_lm_loss_bwd_weight_kernel": {"dweight_ptr": _NARROW},
}


@triton.jit(do_not_specialize=["T"])
def _masked_lm_loss_bwd_logits_kernel(
    hidden_ptr,  # (T, C) contiguous: of the labelled tokens, as all that follows
    weight_ptr,  # (V, C)
    bias_ptr,  # (V,)
    labels_ptr,  # (T,) int32
    numbers_ptr,  # (T,) int32
    lse_ptr,  # (T,) fp32
    dy_ptr,  # () fp32
    dlogits_ptr,  # (T rounded up, part of V)
    partial_ptr,  # (blocks of T, V and more) fp32
    T,
    C,
    V,
    start,
    size,
    stride_wv,
    stride_pt,
    smoothing,
    z_loss,
    ACC: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    # One program: tiles pid, pid + programs, ... of BLOCK_M labelled tokens and BLOCK_N rows of the weight's part.
    count = tl.load(numbers_ptr + T - 1)
    scale = tl.load(dy_ptr).to(ACC) / tl.maximum(count, 1)
    blocks_m, blocks_n = tl.cdiv(count, BLOCK_M), tl.cdiv(size, BLOCK_N)
    for number in range(tl.program_id(0), blocks_m * blocks_n, tl.num_programs(0)):
        pid_t, pid_v = tile_of(number, blocks_m, blocks_n, GROUP_M)
        offs_t = pid_t.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        offs_n = pid_v * BLOCK_N + tl.arange(0, BLOCK_N)
        offs_v = start + offs_n
        mask_t, mask_v = offs_t < count, offs_v < V
        acc = product_tile(
            hidden_ptr, weight_ptr, offs_t, mask_t, offs_v, mask_v, C, stride_wv, ACC, PRECISION, UPCAST, BLOCK_K
        )
        acc += bias_tile(bias_ptr, offs_v, mask_v, ACC, HAS_BIAS)[None, :]
        # Past the labelled tokens every value is 0, past the vocabulary finite: whole tiles of them are read, and
        # multiplied by zeros.
        label = tl.load(labels_ptr + offs_t, mask=mask_t, other=-1)
        lse = tl.load(lse_ptr + offs_t, mask=mask_t, other=float("inf"))
        factor = tl.where(mask_t, 1.0 + 2.0 * z_loss * lse, 0.0)
        spread = tl.where(mask_t, smoothing / V, 0.0)
        d = tl.exp(acc - lse[:, None]) * factor[:, None] - spread[:, None]
        d -= tl.where(offs_v[None, :] == label[:, None], 1.0 - smoothing, 0.0)
        tl.store(partial_ptr + pid_t.to(tl.int64) * stride_pt + offs_v, tl.sum(d, axis=0) * scale, mask=mask_v)
        tl.store(dlogits_ptr + offs_t[:, None] * size + offs_n[None, :], d.to(dlogits_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["T"])
def _masked_lm_loss_bwd_hidden_kernel(
    dlogits_ptr,  # (T rounded up, part of V)
    weight_ptr,  # (V, C)
    numbers_ptr,  # (T,) int32
    tokens_ptr,  # (T,) int32
    dy_ptr,  # () fp32
    acc_ptr,  # (T, C) contiguous, fp32
    dhidden_ptr,  # (all tokens, C) contiguous
    T,
    C,
    V,
    start,
    size,
    stride_wv,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    # One program: tiles pid, pid + programs, ... of BLOCK_M labelled tokens and BLOCK_N channels, the part of V.
    count = tl.load(numbers_ptr + T - 1)
    scale = tl.load(dy_ptr).to(ACC) / tl.maximum(count, 1)
    blocks_m, blocks_n = tl.cdiv(count, BLOCK_M), tl.cdiv(C, BLOCK_N)
    for number in range(tl.program_id(0), blocks_m * blocks_n, tl.num_programs(0)):
        pid_t, pid_c = tile_of(number, blocks_m, blocks_n, GROUP_M)
        offs_t = pid_t.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        offs_c = pid_c * BLOCK_N + tl.arange(0, BLOCK_N)
        offs_k = tl.arange(0, BLOCK_K)
        mask_c = offs_c < C
        dlogits_tile = dlogits_ptr + offs_t[:, None] * size + offs_k[None, :]
        weight_tile = weight_ptr + (start + offs_k).to(tl.int64)[:, None] * stride_wv + offs_c[None, :]
        mask = (offs_t < count)[:, None] & mask_c[None, :]
        offs_a = offs_t[:, None] * C + offs_c[None, :]
        acc = tl.load(acc_ptr + offs_a, mask=mask & (start > 0), other=0.0).to(ACC)
        for v in range(0, size, BLOCK_K):
            mask_v = offs_k < V - start - v
            dlogits = tl.load(dlogits_tile)
            weight = tl.load(weight_tile, mask=mask_v[:, None] & mask_c[None, :], other=0.0)
            if UPCAST:
                dlogits, weight = dlogits.to(ACC), weight.to(ACC)
            acc = tl.dot(dlogits, weight, acc, input_precision=PRECISION, out_dtype=ACC)
            dlogits_tile += BLOCK_K
            weight_tile += BLOCK_K * tl.cast(stride_wv, tl.int64)
        if start + size < V:
            tl.store(acc_ptr + offs_a, acc, mask=mask)
        else:
            token = tl.load(tokens_ptr + offs_t, mask=offs_t < count, other=0).to(tl.int64)
            offs_d = token[:, None] * C + offs_c[None, :]
            tl.store(dhidden_ptr + offs_d, (acc * scale).to(dhidden_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T"])
def _masked_lm_loss_bwd_weight_kernel(
    dlogits_ptr,  # (T rounded up, part of V)
    hidden_ptr,  # (T, C) contiguous
    numbers_ptr,  # (T,) int32
    dy_ptr,  # () fp32
    dweight_ptr,  # (V, C) contiguous
    T,
    C,
    V,
    start,
    size,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    # One program: tiles pid, pid + programs, ... of BLOCK_M rows of the weight's part and BLOCK_N channels, all tokens.
    count = tl.load(numbers_ptr + T - 1)
    scale = tl.load(dy_ptr).to(ACC) / tl.maximum(count, 1)
    blocks_m, blocks_n = tl.cdiv(size, BLOCK_M), tl.cdiv(C, BLOCK_N)
    for number in range(tl.program_id(0), blocks_m * blocks_n, tl.num_programs(0)):
        pid_v, pid_c = tile_of(number, blocks_m, blocks_n, GROUP_M)
        offs_n = pid_v * BLOCK_M + tl.arange(0, BLOCK_M)
        offs_c = pid_c * BLOCK_N + tl.arange(0, BLOCK_N)
        offs_k = tl.arange(0, BLOCK_K)
        mask_c = offs_c < C
        dlogits_tile = dlogits_ptr + offs_k.to(tl.int64)[:, None] * size + offs_n[None, :]
        hidden_tile = hidden_ptr + offs_k.to(tl.int64)[:, None] * C + offs_c[None, :]
        acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
        for t in range(0, count, BLOCK_K):
            dlogits = tl.load(dlogits_tile)
            hidden = tl.load(hidden_tile, mask=(offs_k < count - t)[:, None] & mask_c[None, :], other=0.0)
            if UPCAST:
                dlogits, hidden = dlogits.to(ACC), hidden.to(ACC)
            acc = tl.dot(tl.trans(dlogits), hidden, acc, input_precision=PRECISION, out_dtype=ACC)
            dlogits_tile += BLOCK_K * tl.cast(size, tl.int64)
            hidden_tile += BLOCK_K * tl.cast(C, tl.int64)
        offs_v = start + offs_n
        offs_d = offs_v.to(tl.int64)[:, None] * C + offs_c[None, :]
        mask = (offs_v < V)[:, None] & mask_c[None, :]
        tl.store(dweight_ptr + offs_d, (acc * scale).to(dweight_ptr.dtype.element_ty), mask=mask)


# Parts of the vocabulary: dlogits are held for an eighth of it, or for more if they take no more than so many values.
_PARTS, _FEW = 8, 2**23


def part_size(rows: int, V: int) -> int:
    """Size of the vocabulary's parts for so many rows of dlogits."""
    size = max(triton.cdiv(V, _PARTS), _FEW // rows)
    return min(triton.cdiv(size, BLOCK), triton.cdiv(V, BLOCK)) * BLOCK


def masked_lm_loss_bwd(
    dy: torch.Tensor,
    packed: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    packed_labels: torch.Tensor,
    tokens: torch.Tensor,
    numbers: torch.Tensor,
    lse: torch.Tensor,
    smoothing: float,
    z_loss: float,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor]:
    """dhidden (T, C) and dweight (V, C), if needed, and dbias (V,), contiguous with packed's dtype.

    dy () fp32; weight and bias as the forward had them; the others as `masked_lm_loss_fwd` returned them.
    """
    weight = _launch.rows(weight)
    bias = None if bias is None else bias.contiguous()
    (T, C), V = packed.shape, weight.shape[0]
    dtype, device = packed.dtype, packed.device
    card = _launch.card(packed)
    config = pick_config("masked_lm_loss_bwd_logits", (T, C), dtype, card)
    of_hidden = pick_config("masked_lm_loss_bwd_hidden", (T, C), dtype, card)
    of_weight = pick_config("masked_lm_loss_bwd_weight", (V, C), dtype, card)
    blocks_t = triton.cdiv(T, config.block_m)
    rows = triton.cdiv(T, BLOCK) * BLOCK
    size = part_size(rows, V)
    dlogits = torch.empty(rows, size, dtype=dtype, device=device)
    dhidden = torch.zeros(T, C, dtype=dtype, device=device) if need_hidden else None
    acc = torch.empty(T, C, dtype=lse.dtype, device=device) if need_hidden else None
    dweight = torch.empty(V, C, dtype=dtype, device=device) if need_weight else None
    partial = torch.zeros(1, blocks_t, triton.cdiv(V, BLOCK) * BLOCK, dtype=lse.dtype, device=device)
    dbias = torch.empty(1, partial.shape[-1], dtype=dtype, device=device)
    common = {"ACC": _launch.acc(dtype), "PRECISION": precision(dtype), "UPCAST": INTERPRETED, "GROUP_M": GROUP_M}
    with _launch.device_of(packed):
        for start in range(0, V, size):
            _masked_lm_loss_bwd_logits_kernel[programs(blocks_t * triton.cdiv(size, config.block_n), packed)](
                packed,
                weight,
                bias,
                packed_labels,
                numbers,
                lse,
                dy,
                dlogits,
                partial,
                T,
                C,
                V,
                start,
                size,
                weight.stride(0),
                partial.stride(1),
                smoothing,
                z_loss,
                HAS_BIAS=bias is not None,
                BLOCK_M=config.block_m,
                BLOCK_N=config.block_n,
                BLOCK_K=config.block_k,
                **common,
                **launch_options(config),
            )
            if dweight is not None:
                tiles = triton.cdiv(size, of_weight.block_m) * triton.cdiv(C, of_weight.block_n)
                _masked_lm_loss_bwd_weight_kernel[programs(tiles, packed)](
                    dlogits,
                    packed,
                    numbers,
                    dy,
                    dweight,
                    T,
                    C,
                    V,
                    start,
                    size,
                    BLOCK_M=of_weight.block_m,
                    BLOCK_N=of_weight.block_n,
                    BLOCK_K=of_weight.block_k,
                    **common,
                    **launch_options(of_weight),
                )
            if dhidden is not None:
                tiles = triton.cdiv(T, of_hidden.block_m) * triton.cdiv(C, of_hidden.block_n)
                _masked_lm_loss_bwd_hidden_kernel[programs(tiles, packed)](
                    dlogits,
                    weight,
                    numbers,
                    tokens,
                    dy,
                    acc,
                    dhidden,
                    T,
                    C,
                    V,
                    start,
                    size,
                    weight.stride(0),
                    BLOCK_M=of_hidden.block_m,
                    BLOCK_N=of_hidden.block_n,
                    BLOCK_K=of_hidden.block_k,
                    **common,
                    **launch_options(of_hidden),
                )
    sum_partials(partial, dbias)
    return dhidden, dweight, dbias[0, :V]


def launches(dtype: torch.dtype, device: torch.device) -> Iterator[str]:
    """Make every launch that `pick_config` can choose for the models' channels, on empty tensors."""
    acc = torch.float32
    for T, C, has_bias in launch_cases(dtype):
        weight = torch.empty(30522, C, dtype=dtype, device=device)
        bias = torch.empty(30522, dtype=dtype, device=device) if has_bias else None
        hidden = torch.empty(T, C, dtype=dtype, device=device)
        labels, tokens, numbers = (torch.empty(T, dtype=torch.int32, device=device) for _ in range(3))
        lse, dy = torch.empty(T, dtype=acc, device=device), torch.empty((), dtype=acc, device=device)
        masked_lm_loss_bwd(dy, hidden, weight, bias, labels, tokens, numbers, lse, 0.1, 1e-4, True, True)
        yield f"masked_lm_loss_bwd T={T} C={C}"
