"""layer_norm: y = LayerNorm(dropout(x + x_bias) + residual), through every layer from checks to gradient."""

from __future__ import annotations

import functools
from types import ModuleType

import torch
import torch.nn.functional as F

from fastconv.ops._eager import autocasting, use_kernels
from fastconv.ops._register import distinct, needs_grad, once_differentiable, register
from fastconv.ops._seed import check_seed, draw_seed, native_keep_mask
from fastconv.reference.ops.layer_norm import check

MAX_CHANNELS = 8192  # fastconv.kernels.layer_norm.MAX_CHANNELS, known here without importing triton


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float = 1e-12,
    *,
    x_bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
) -> torch.Tensor:
    """LayerNorm(dropout(x + x_bias) + residual) over the last dimension, in one pass over memory.

    x: (..., C) fp16, bf16, fp32 or fp64; C up to 8192 by the kernel, any by the native formulation
    weight, bias: (C,), any of these dtypes; bias may be None
    x_bias: (C,), the bias of the linear layer that made x, or None
    residual: (..., C) like x, or None; it may have another dtype
    dropout_p: probability, below 1, of zeroing a value of x + x_bias; the others are scaled by 1 / (1 - dropout_p)
    seed: () int64 on x's device: the mask is a function of it and of the position, per backend. None draws one from
        torch's generator of that device. The native formulation reads its value, which torch.compile can't trace
    returns: (..., C), dtype of x + residual; fp32 under autocast, as torch's layer_norm

    Raises: TypeError for tensors that are not real floating point; ValueError for shapes, devices or a dropout_p that
    don't fit. Statistics are fp32 at least. Source: Ba, Kiros, Hinton, arXiv 1607.06450, section 3.
    """
    check(x, weight, bias, x_bias, residual, dropout_p)
    check_seed(x, seed)
    if x.shape[-1] > MAX_CHANNELS or not use_kernels(x, weight, bias, x_bias, residual):
        return _native(x, weight, bias, eps, x_bias, residual, dropout_p, seed)
    if dropout_p > 0.0 and seed is None:
        seed = draw_seed(x)
    out_dtype = _out_dtype(x, residual)
    if needs_grad(x, weight, bias, x_bias, residual):
        x, weight, bias, x_bias, residual = distinct(x, weight, bias, x_bias, residual)
        return _LayerNorm.apply(x, weight, bias, eps, x_bias, residual, dropout_p, seed, out_dtype)
    return _forward(x, weight, bias, eps, x_bias, residual, dropout_p, seed, out_dtype, False)[0]


def _out_dtype(x: torch.Tensor, residual: torch.Tensor | None) -> torch.dtype:
    if autocasting(x):
        return torch.float32
    return x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)


# The op: fastconv::layer_norm_fwd and fastconv::layer_norm_bwd. An output that a call doesn't make is an empty tensor.


@functools.cache
def _kernels() -> ModuleType:
    # At the first launch: importing triton takes a while, and it may not be there.
    from fastconv.kernels import layer_norm as kernels

    return kernels


def _fwd(x, weight, bias, eps, x_bias, residual, dropout_p, seed, out_dtype, save):
    made = _kernels().layer_norm_fwd(x, weight, bias, eps, x_bias, residual, dropout_p, seed, out_dtype, save)
    return tuple(x.new_empty(0) if t is None else t for t in made)


def _fwd_fake(x, weight, bias, eps, x_bias, residual, dropout_p, seed, out_dtype, save):
    y = x.new_empty(x.shape, dtype=out_dtype)
    none = x.new_empty(0)
    if not save:
        return y, none, none.clone(), none.clone()
    fused = x_bias is not None or residual is not None or dropout_p > 0.0
    stats = torch.promote_types(out_dtype, torch.float32)
    tokens = x.numel() // x.shape[-1]
    z = x.new_empty(x.shape, dtype=out_dtype) if fused else none
    return y, z, x.new_empty(tokens, dtype=stats), x.new_empty(tokens, dtype=stats)


def _bwd(dy, z, weight, mean, rstd, dropout_p, seed, has_x_bias, dx_dtype, dresidual_dtype):
    dx, dresidual, sums = _kernels().layer_norm_bwd(
        dy, z, weight, mean, rstd, dropout_p, seed, has_x_bias, dx_dtype, dresidual_dtype
    )
    return dx, dy.new_empty(0) if dresidual is None else dresidual, sums


def _bwd_fake(dy, z, weight, mean, rstd, dropout_p, seed, has_x_bias, dx_dtype, dresidual_dtype):
    dx = dy.new_empty(dy.shape, dtype=dx_dtype)
    dresidual = dy.new_empty(0 if dresidual_dtype is None else dy.shape, dtype=dresidual_dtype)
    return dx, dresidual, mean.new_empty(3 if has_x_bias else 2, dy.shape[-1])


_forward = register(
    "layer_norm_fwd(Tensor x, Tensor weight, Tensor? bias, float eps, Tensor? x_bias, Tensor? residual, "
    "float dropout_p, Tensor? seed, ScalarType out_dtype, bool save) -> (Tensor, Tensor, Tensor, Tensor)",
    _fwd,
    _fwd_fake,
)
_backward = register(
    "layer_norm_bwd(Tensor dy, Tensor z, Tensor weight, Tensor mean, Tensor rstd, float dropout_p, Tensor? seed, "
    "bool has_x_bias, ScalarType dx_dtype, ScalarType? dresidual_dtype) -> (Tensor, Tensor, Tensor)",
    _bwd,
    _bwd_fake,
)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps, x_bias, residual, dropout_p, seed, out_dtype):
        y, z, mean, rstd = _forward(x, weight, bias, eps, x_bias, residual, dropout_p, seed, out_dtype, True)
        fused = x_bias is not None or residual is not None or dropout_p > 0.0
        ctx.save_for_backward(z if fused else x, weight, mean, rstd, seed)
        ctx.dropout_p = dropout_p
        ctx.x_dtype = x.dtype
        ctx.dtypes = [None if t is None else t.dtype for t in (bias, x_bias, residual)]
        return y

    @staticmethod
    @once_differentiable("layer_norm")
    def backward(ctx, dy):
        z, weight, mean, rstd, seed = ctx.saved_tensors
        bias_dtype, x_bias_dtype, residual_dtype = ctx.dtypes
        has_x_bias = x_bias_dtype is not None
        # Without dropout the residual's gradient is dx, unless it has another dtype.
        one = residual_dtype is None or (ctx.dropout_p == 0.0 and residual_dtype == ctx.x_dtype)
        dx, dresidual, sums = _backward(
            dy,
            z,
            weight,
            mean,
            rstd,
            ctx.dropout_p,
            seed,
            has_x_bias,
            ctx.x_dtype,
            None if one else residual_dtype,
        )
        dweight = sums[0].to(weight.dtype)
        dbias = None if bias_dtype is None else sums[1].to(bias_dtype)
        dx_bias = sums[2].to(x_bias_dtype) if has_x_bias else None
        if residual_dtype is None:
            dresidual = None
        elif one:
            dresidual = dx
        return dx, dweight, dbias, None, dx_bias, dresidual, None, None, None


def _native(x, weight, bias, eps, x_bias, residual, dropout_p, seed):
    z = x.to(_out_dtype(x, residual))
    if x_bias is not None:
        z = z + x_bias.to(z.dtype)
    if dropout_p > 0.0:
        z = _native_dropout(z, dropout_p, seed)
    if residual is not None:
        z = z + residual
    wide = torch.promote_types(weight.dtype, z.dtype)
    if z.device.type == "cpu" and needs_grad(z, weight, bias):
        # ATen's backward on a CPU sums dweight and dbias in the dtype of x: dweight is off by 7 % after
        # 4096 tokens in bf16 (torch 2.13.0).
        wide = torch.promote_types(wide, torch.float32)
    if wide == z.dtype == weight.dtype:
        return F.layer_norm(z, z.shape[-1:], weight, bias, eps)
    # torch's kernels don't take every mix of dtypes either: compute in the wider one.
    bias = None if bias is None else bias.to(wide)
    return F.layer_norm(z.to(wide), z.shape[-1:], weight.to(wide), bias, eps).to(z.dtype)


def _native_dropout(z: torch.Tensor, p: float, seed: torch.Tensor | None) -> torch.Tensor:
    if seed is None:
        return F.dropout(z, p)
    return torch.where(native_keep_mask(z.shape, p, seed), z * (1.0 / (1.0 - p)), 0.0)
