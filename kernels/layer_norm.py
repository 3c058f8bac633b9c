"""LayerNorm with what stands before it in an encoder layer: y = LayerNorm(dropout(x + x_bias) + residual).

    z = dropout(x + x_bias) + residual          mean, rstd over the C channels of a token, in fp32
    y = (z - mean) * rstd * weight + bias

Forward: one program owns BLOCK_T tokens with all their channels, so a token is read once and its statistics never
leave the registers. Reads x and residual, writes y, and z when a backward will need it: (2..4) * T * C elements.

Backward: a program owns a strided set of token blocks and keeps its sums for weight, bias and x_bias in registers
(past 4096 channels those of half of the channels, and two programs share a token); a second kernel adds the programs'
partial sums in a fixed order. Reads dy and z, writes dx (and the residual's gradient where dropout or its dtype makes
it another): (3..4) * T * C elements.

    g = dy * weight;  dz = rstd * (g - mean(g) - xhat * mean(g * xhat));  dx = dropout'(dz);  dresidual = dz

Layer normalization: Ba, Kiros, Hinton, arXiv 1607.06450, section 3.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from . import _launch
from ._configs import Card, tuned
from ._dropout import keep_mask
from ._reduce import sum_partials

MAX_CHANNELS = 8192  # the forward holds a whole token in registers: 16 values a thread at 512 threads


@triton.jit(do_not_specialize=["T"])
def _layer_norm_fwd_kernel(
    x_ptr,  # (T, C)
    x_bias_ptr,  # (C,)
    residual_ptr,  # (T, C)
    weight_ptr,  # (C,)
    bias_ptr,  # (C,)
    seed_ptr,  # ()
    y_ptr,  # (T, C) contiguous
    z_ptr,  # (T, C) contiguous
    mean_ptr,  # (T,) fp32
    rstd_ptr,  # (T,) fp32
    T,
    C,
    stride_xt,
    stride_rt,
    eps,
    dropout_p,
    dropout_scale,
    ACC: tl.constexpr,
    HAS_X_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SAVE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # One program: tokens [pid_t * BLOCK_T, +BLOCK_T), all channels.
    pid_t = tl.program_id(0).to(tl.int64)
    offs_t = pid_t * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_c = tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    mask = (offs_t < T)[:, None] & mask_c[None, :]

    z = tl.load(x_ptr + offs_t[:, None] * stride_xt + offs_c[None, :], mask=mask, other=0.0).to(ACC)
    if HAS_X_BIAS:
        z += tl.load(x_bias_ptr + offs_c, mask=mask_c, other=0.0).to(ACC)[None, :]
    if HAS_DROPOUT:
        keep = keep_mask(seed_ptr, offs_t, 0, dropout_p, BLOCK_T, BLOCK_C)
        z = tl.where(keep, z * dropout_scale, 0.0)
    if HAS_RESIDUAL:
        z += tl.load(residual_ptr + offs_t[:, None] * stride_rt + offs_c[None, :], mask=mask, other=0.0).to(ACC)

    if HAS_X_BIAS or HAS_DROPOUT or HAS_RESIDUAL:
        # The backward reads z as it is stored: statistics of that z, or xhat would not be centred.
        z = z.to(y_ptr.dtype.element_ty).to(ACC)

    # Two passes over registers: no cancellation when the mean is large against the deviation.
    mean = tl.sum(z, axis=1) / C
    centred = tl.where(mask_c[None, :], z - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / C + eps)

    y = centred * rstd[:, None] * tl.load(weight_ptr + offs_c, mask=mask_c, other=0.0).to(ACC)[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + offs_c, mask=mask_c, other=0.0).to(ACC)[None, :]
    offs_y = offs_t[:, None] * C + offs_c[None, :]
    tl.store(y_ptr + offs_y, y.to(y_ptr.dtype.element_ty), mask=mask)
    if SAVE:
        if HAS_X_BIAS or HAS_DROPOUT or HAS_RESIDUAL:
            tl.store(z_ptr + offs_y, z.to(z_ptr.dtype.element_ty), mask=mask)
        tl.store(mean_ptr + offs_t, mean, mask=offs_t < T)
        tl.store(rstd_ptr + offs_t, rstd, mask=offs_t < T)


@triton.jit(do_not_specialize=["T"])
def _layer_norm_bwd_kernel(
    dy_ptr,  # (T, C)
    z_ptr,  # (T, C)
    weight_ptr,  # (C,)
    mean_ptr,  # (T,) fp32
    rstd_ptr,  # (T,) fp32
    seed_ptr,  # ()
    dx_ptr,  # (T, C) contiguous
    dresidual_ptr,  # (T, C) contiguous
    partial_ptr,  # (2 or 3, programs, C) fp32: sums for weight, bias and x_bias
    T,
    C,
    stride_dyt,
    stride_zt,
    dropout_p,
    dropout_scale,
    ACC: tl.constexpr,
    HAS_X_BIAS: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    HAS_Y_DROPOUT: tl.constexpr,
    HAS_DRESIDUAL: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # One program: token blocks pid, pid + programs, pid + 2 * programs, ..., BLOCK_C channels: one of PARTS parts.
    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    part = tl.program_id(1)
    offs_c = part * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    weight = tl.load(weight_ptr + offs_c, mask=mask_c, other=0.0).to(ACC)[None, :]
    dweight = tl.zeros((BLOCK_C,), ACC)
    dbias = tl.zeros((BLOCK_C,), ACC)
    dx_bias = tl.zeros((BLOCK_C,), ACC)

    for block in range(pid, tl.cdiv(T, BLOCK_T), programs):
        offs_t = tl.cast(block, tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
        mask_t = offs_t < T
        mask = mask_t[:, None] & mask_c[None, :]
        dy = tl.load(dy_ptr + offs_t[:, None] * stride_dyt + offs_c[None, :], mask=mask, other=0.0).to(ACC)
        z = tl.load(z_ptr + offs_t[:, None] * stride_zt + offs_c[None, :], mask=mask, other=0.0).to(ACC)
        mean = tl.load(mean_ptr + offs_t, mask=mask_t, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + offs_t, mask=mask_t, other=0.0)[:, None]
        if HAS_Y_DROPOUT:
            keep_y = keep_mask(seed_ptr, offs_t, part * BLOCK_C, dropout_p, BLOCK_T, BLOCK_C)
            dy = tl.where(keep_y, dy * dropout_scale, 0.0)
        # dy is 0 outside the mask, so xhat may be anything finite there.
        xhat = (z - mean) * rstd
        dweight += tl.sum(dy * xhat, axis=0)
        dbias += tl.sum(dy, axis=0)

        g = dy * weight
        sum_g = tl.sum(g, axis=1)
        sum_gx = tl.sum(g * xhat, axis=1)
        # The other parts' channels count in the means; the programs that own them have just brought them into L2.
        for other in tl.static_range(1, PARTS):
            offs_o = (part + other) % PARTS * BLOCK_C + tl.arange(0, BLOCK_C)
            mask_o = mask_t[:, None] & (offs_o < C)[None, :]
            dy_o = tl.load(dy_ptr + offs_t[:, None] * stride_dyt + offs_o[None, :], mask=mask_o, other=0.0).to(ACC)
            z_o = tl.load(z_ptr + offs_t[:, None] * stride_zt + offs_o[None, :], mask=mask_o, other=0.0).to(ACC)
            if HAS_Y_DROPOUT:
                first_o = (part + other) % PARTS * BLOCK_C
                keep_o = keep_mask(seed_ptr, offs_t, first_o, dropout_p, BLOCK_T, BLOCK_C)
                dy_o = tl.where(keep_o, dy_o * dropout_scale, 0.0)
            g_o = dy_o * tl.load(weight_ptr + offs_o, mask=offs_o < C, other=0.0).to(ACC)[None, :]
            sum_g += tl.sum(g_o, axis=1)
            sum_gx += tl.sum(g_o * (z_o - mean) * rstd, axis=1)
        mean_g = (sum_g / C)[:, None]
        mean_gx = (sum_gx / C)[:, None]
        dz = (g - mean_g - xhat * mean_gx) * rstd
        offs_dx = offs_t[:, None] * C + offs_c[None, :]
        if HAS_DRESIDUAL:
            tl.store(dresidual_ptr + offs_dx, dz.to(dresidual_ptr.dtype.element_ty), mask=mask)
        if HAS_DROPOUT:
            keep = keep_mask(seed_ptr, offs_t, part * BLOCK_C, dropout_p, BLOCK_T, BLOCK_C)
            dz = tl.where(keep, dz * dropout_scale, 0.0)
        if HAS_X_BIAS:
            dx_bias += tl.sum(tl.where(mask, dz, 0.0), axis=0)
        tl.store(dx_ptr + offs_dx, dz.to(dx_ptr.dtype.element_ty), mask=mask)

    offs_p = pid.to(tl.int64) * C + offs_c
    size_p = programs.to(tl.int64) * C
    tl.store(partial_ptr + offs_p, dweight, mask=mask_c)
    tl.store(partial_ptr + size_p + offs_p, dbias, mask=mask_c)
    if HAS_X_BIAS:
        tl.store(partial_ptr + 2 * size_p + offs_p, dx_bias, mask=mask_c)


@dataclass(frozen=True)
class Config:
    """Launch parameters of the forward and of the backward kernel."""

    block_t: int
    block_c: int
    num_warps: int
    registers: int  # at most so many a thread
    parts: int = 1  # programs that share a token's channels


# The values of one tile that a thread holds: enough independent 16-byte loads in flight, few enough registers that the
# backward, with its running sums, doesn't spill on any target (the ahead-of-time gate checks it).
_FWD_TILE, _BWD_TILE, _PER_THREAD = 4096, 2048, 16

# The most registers that any launch of them needs: 80 (forward), 222 (backward), by the gate on triton 3.6 to 3.9.
_FWD_REGISTERS, _BWD_REGISTERS = 80, 255

# A backward program with 8192 channels needs more registers than a block of its threads has.
_BWD_MAX_BLOCK_C = 4096


def whole_token(channels: int) -> int:
    """The width of a tile with all channels of a token."""
    return max(4, triton.next_power_of_2(channels))


def check(kernel: str, shape: tuple[int, ...], dtype: torch.dtype, card: Card, config: Config) -> str | None:
    """Why a config can't be: a token's statistics need all its channels, of which a forward has no parts."""
    whole, parts = whole_token(shape[1]), config.parts if kernel == "layer_norm_bwd" else 1
    if config.block_c * parts != whole or config.parts != parts:
        return f"{parts} parts of block_c must be {whole} channels, got {config.parts} of {config.block_c}"
    return None


@tuned("layer_norm_fwd", "layer_norm_bwd", vary=("block_t", "num_warps", "registers"), config=Config, check=check)
def pick_config(kernel: str, shape: tuple[int, int], dtype: torch.dtype, card: Card) -> Config:
    """Launch config of a kernel for x of `shape` (T, C). Not tuned on a card yet: a thread has 16 values."""
    tokens, channels = shape
    backward = kernel == "layer_norm_bwd"
    block_c = whole_token(channels)
    parts = max(1, block_c // _BWD_MAX_BLOCK_C) if backward else 1
    block_c //= parts
    block_t = max(1, min(64, (_BWD_TILE if backward else _FWD_TILE) // block_c))
    # Few tokens: one program each, so that they spread over the card.
    if tokens < 1024 and not backward:
        block_t = min(block_t, 1 if block_c >= 512 else 512 // block_c)
    threads = block_t * block_c // _PER_THREAD
    registers = _BWD_REGISTERS if backward else _FWD_REGISTERS
    return Config(block_t, block_c, max(1, min(16, threads // 32)), registers, parts)


def layer_norm_fwd(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    x_bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    dropout_p: float,
    seed: torch.Tensor | None,
    out_dtype: torch.dtype,
    save: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """y, and with `save` z, mean and rstd for the backward (z is None where x itself is z).

    x (..., C) any float dtype; weight, bias, x_bias (C,); residual like x; seed () int64 on x's device;
    y and z have x's shape and `out_dtype`; mean and rstd (T,) fp32 (fp64 for fp64).
    """
    shape, x = x.shape, _launch.rows(x)
    tokens, channels = x.shape
    residual_2d = None if residual is None else _launch.rows(residual)
    weight = weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    x_bias = None if x_bias is None else x_bias.contiguous()
    fused = x_bias is not None or residual is not None or dropout_p > 0.0
    y = torch.empty(shape, dtype=out_dtype, device=x.device)
    z = torch.empty(shape, dtype=out_dtype, device=x.device) if save and fused else None
    stats = _launch.acc_torch(out_dtype)
    mean = torch.empty(tokens, dtype=stats, device=x.device) if save else None
    rstd = torch.empty(tokens, dtype=stats, device=x.device) if save else None
    if tokens == 0:
        return y, z, mean, rstd
    config = pick_config("layer_norm_fwd", (tokens, channels), x.dtype, _launch.card(x))
    with _launch.device_of(x):
        _layer_norm_fwd_kernel[(triton.cdiv(tokens, config.block_t),)](
            x,
            x_bias,
            residual_2d,
            weight,
            bias,
            seed,
            y,
            z,
            mean,
            rstd,
            tokens,
            channels,
            x.stride(0),
            0 if residual_2d is None else residual_2d.stride(0),
            eps,
            dropout_p,
            1.0 / (1.0 - dropout_p),
            ACC=_launch.acc(out_dtype),
            HAS_X_BIAS=x_bias is not None,
            HAS_RESIDUAL=residual is not None,
            HAS_DROPOUT=dropout_p > 0.0,
            HAS_BIAS=bias is not None,
            SAVE=save,
            BLOCK_T=config.block_t,
            BLOCK_C=config.block_c,
            **_launch.options(config.num_warps, config.registers),
        )
    return y, z, mean, rstd


def layer_norm_bwd(
    dy: torch.Tensor,
    z: torch.Tensor,
    weight: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    dropout_p: float,
    seed: torch.Tensor | None,
    has_x_bias: bool,
    dx_dtype: torch.dtype,
    dresidual_dtype: torch.dtype | None,
    *,
    dropout_last: bool = False,
    add_up: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """dx, dresidual and the sums (2 or 3, C): dweight, dbias and, if asked, dx_bias.

    dy and z (..., C); dx has `dx_dtype`; dresidual is written if it has a dtype: without dropout it equals dx, so that
    only another dtype is a reason to ask for it. The sums are fp32 (fp64 for fp64). dropout_last: it came after the
    norm, of y (another op's forward), not of x. add_up=False: the sums are (2 or 3, programs, C), of each program.
    """
    shape, dy, z2 = dy.shape, _launch.rows(dy), _launch.rows(z)
    weight = weight.contiguous()
    tokens, channels = dy.shape
    dx = torch.empty(shape, dtype=dx_dtype, device=dy.device)
    dresidual = None if dresidual_dtype is None else torch.empty(shape, dtype=dresidual_dtype, device=dy.device)
    sums = 3 if has_x_bias else 2
    if tokens == 0:
        return dx, dresidual, torch.zeros(sums, channels, dtype=mean.dtype, device=dy.device)
    config = pick_config("layer_norm_bwd", (tokens, channels), dy.dtype, _launch.card(dy))
    programs = min(triton.cdiv(tokens, config.block_t), 2 * _launch.sm_count(dy))
    partial = torch.empty(sums, programs, channels, dtype=mean.dtype, device=dy.device)
    with _launch.device_of(dy):
        _layer_norm_bwd_kernel[(programs, config.parts)](
            dy,
            z2,
            weight,
            mean,
            rstd,
            seed,
            dx,
            dresidual,
            partial,
            tokens,
            channels,
            dy.stride(0),
            z2.stride(0),
            dropout_p,
            1.0 / (1.0 - dropout_p),
            ACC=_launch.acc(mean.dtype),
            HAS_X_BIAS=has_x_bias,
            HAS_DROPOUT=dropout_p > 0.0 and not dropout_last,
            HAS_Y_DROPOUT=dropout_p > 0.0 and dropout_last,
            HAS_DRESIDUAL=dresidual is not None,
            PARTS=config.parts,
            BLOCK_T=config.block_t,
            BLOCK_C=config.block_c,
            **_launch.options(config.num_warps, config.registers),
        )
    if not add_up:
        return dx, dresidual, partial
    out = torch.empty(sums, channels, dtype=mean.dtype, device=dy.device)
    sum_partials(partial, out)
    return dx, dresidual, out


def launches(dtype: torch.dtype, device: torch.device) -> Iterator[str]:
    """Make every launch that `pick_config` can choose, on empty tensors; yields a name after each.

    C runs over every block size, T over both of the forward's branches; the flags over the two cases that models have
    (a norm alone; bias, dropout and residual before it), the second with and without dropout.
    """

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    seed = torch.empty((), dtype=torch.int64, device=device)
    # 384 and 768 are the models' sizes that are no power of two.
    for channels in (16, 32, 64, 128, 256, 384, 512, 768, 1024, 2048, 4096, MAX_CHANNELS):
        weight, bias = empty(channels), empty(channels)
        for tokens in (128, 4096):
            x, r = empty(tokens, channels), empty(tokens, channels)
            for x_bias, residual, p in ((None, None, 0.0), (bias, r, 0.0), (bias, r, 0.1)):
                name = f"C={channels} T={tokens} fused={residual is not None} p={p}"
                _, z, mean, rstd = layer_norm_fwd(x, weight, bias, 1e-12, x_bias, residual, p, seed, dtype, True)
                assert mean is not None and rstd is not None
                if p == 0.0:  # inference has no dropout
                    layer_norm_fwd(x, weight, bias, 1e-12, x_bias, residual, p, seed, dtype, False)
                yield f"layer_norm_fwd {name}"
                split = dtype if p > 0.0 else None
                z = x if z is None else z
                layer_norm_bwd(x, z, weight, mean, rstd, p, seed, x_bias is not None, dtype, split)
                yield f"layer_norm_bwd {name}"
