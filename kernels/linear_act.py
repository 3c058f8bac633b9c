"""Bias and activation after a dense layer's product: y = activation(z + bias), z = x @ weight^T as cuBLAS leaves it.

One program owns BLOCK_T tokens and BLOCK_C channels: an elementwise pass in fp32 that reads z and writes y, 2 * C
elements a token. What a backward needs is z, which is in memory already; it adds the bias again
(grouped_linear.grouped_linear_bwd).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from . import _launch
from ._activations import ONE_NAME_EACH, activate, function_name
from ._configs import Card, any_config, tuned
from .grouped_linear import grouped_linear_bwd


@triton.jit(do_not_specialize=["T"])
def _linear_act_fwd_kernel(
    z_ptr,  # (T, C)
    bias_ptr,  # (C,)
    y_ptr,  # (T, C) contiguous
    T,
    C,
    stride_zt,
    ACC: tl.constexpr,
    FUNCTION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # One program: tokens [pid_t * BLOCK_T, +BLOCK_T), channels [pid_c * BLOCK_C, +BLOCK_C).
    offs_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    mask = (offs_t < T)[:, None] & mask_c[None, :]
    z = tl.load(z_ptr + offs_t[:, None] * stride_zt + offs_c[None, :], mask=mask, other=0.0).to(ACC)
    if HAS_BIAS:
        z += tl.load(bias_ptr + offs_c, mask=mask_c, other=0.0).to(ACC)[None, :]
    y = activate(z, FUNCTION)
    tl.store(y_ptr + offs_t[:, None] * C + offs_c[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class Config:
    """Launch parameters of the elementwise kernel."""

    block_t: int
    block_c: int
    num_warps: int
    registers: int  # at most so many a thread


@tuned("linear_act_fwd", vary=("block_t", "block_c", "num_warps", "registers"), config=Config, check=any_config)
def pick_config(kernel: str, shape: tuple[int, int], dtype: torch.dtype, card: Card) -> Config:
    """Launch config for z (T, C): a warp reads 512 neighbouring bytes, a thread 16 values. Not tuned on a card yet."""
    _, channels = shape
    block_c = min(512 // dtype.itemsize, max(16, triton.next_power_of_2(channels)))
    return Config(2048 // block_c, block_c, 4, 128)


def linear_act_fwd(z: torch.Tensor, bias: torch.Tensor | None, activation: str) -> torch.Tensor:
    """activation(z + bias), contiguous with z's shape and dtype: z (..., C), bias (C,) of z's dtype or None."""
    y = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    z = _launch.rows(z)
    bias = None if bias is None else bias.contiguous()
    tokens, channels = z.shape
    if tokens == 0:
        return y
    config = pick_config("linear_act_fwd", (tokens, channels), z.dtype, _launch.card(z))
    with _launch.device_of(z):
        _linear_act_fwd_kernel[(triton.cdiv(tokens, config.block_t), triton.cdiv(channels, config.block_c))](
            z,
            bias,
            y,
            tokens,
            channels,
            z.stride(0),
            ACC=_launch.acc(z.dtype),
            FUNCTION=function_name(activation),
            HAS_BIAS=bias is not None,
            BLOCK_T=config.block_t,
            BLOCK_C=config.block_c,
            **_launch.options(config.num_warps, config.registers),
        )
    return y


def launches(dtype: torch.dtype, device: torch.device) -> Iterator[str]:
    """Make every launch that `pick_config` can choose, on empty tensors; yields a name after each.

    Every block size; every function on BERT's feed-forward network in one dtype; the backward with its bias.
    """
    for channels in (16, 64, 3072):
        z = torch.empty(8192, channels, dtype=dtype, device=device)
        bias = torch.empty(channels, dtype=dtype, device=device)
        for activation in ONE_NAME_EACH if channels == 3072 and dtype == torch.bfloat16 else ("gelu",):
            linear_act_fwd(z, bias, activation)
            yield f"linear_act_fwd {activation} C={channels}"
        grouped_linear_bwd(z, z, bias, "gelu")
        yield f"linear_act_bwd gelu C={channels}"
