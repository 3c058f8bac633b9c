"""grouped_linear: a dense layer over groups of channels, with its bias and activation; from checks to gradient."""

from __future__ import annotations

import functools
from types import ModuleType

import torch

from fastconv.ops import _onednn
from fastconv.ops._dense import check_dtypes
from fastconv.ops._eager import autocast, autocasting, use_kernels
from fastconv.ops._register import needs_grad, once_differentiable, register
from fastconv.reference.ops import get_activation
from fastconv.reference.ops.grouped_linear import check


def grouped_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, activation: str | None = None
) -> torch.Tensor:
    """activation(x[..., g, :] @ weight[g] + bias[g]) for each of G groups of channels.

    x: (..., G*I) float
    weight: (G, I, O), bias: (G*O,), dtype of x; under autocast any of autocast's dtypes
    activation: a name of the transformers list, or None
    returns: (..., G*O), dtype of x; of autocast under it

    The kernel sums in fp32; inputs in fp32 it rounds to TF32 if torch.backends.cuda.matmul says so, which by default it
    doesn't. Raises: TypeError for tensors that are not real floating point, or of several dtypes; ValueError for
    shapes, devices or an activation that don't fit. Source: Jiang et al., arXiv 2008.02496, section 4.3.
    """
    check(x, weight, bias)
    function = get_activation(activation)
    if weight.numel() == 0 or not use_kernels(x, weight, bias):
        if not autocasting(x):
            check_dtypes(x=x, weight=weight, bias=bias)
        return _native(x, weight, bias, activation)
    x, weight, bias = autocast(x), autocast(weight), autocast(bias)
    check_dtypes(x=x, weight=weight, bias=bias)
    if function is get_activation(None):
        activation = None
    return dense(x, weight, bias, activation)


def dense(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str | None) -> torch.Tensor:
    """grouped_linear by its kernel, of tensors that fit; the bias may be None."""
    if needs_grad(x, weight, bias):
        return _GroupedLinear.apply(x, weight, bias, activation)
    return _forward(x, weight, bias, activation, False)[0]


# The ops: fastconv::grouped_linear_fwd and fastconv::grouped_linear_bwd.


@functools.cache
def _kernels() -> ModuleType:
    # At the first launch: importing triton takes a while, and it may not be there.
    from fastconv.kernels import grouped_linear as kernels

    return kernels


def _fwd(x, weight, bias, activation, save):
    y, pre = _kernels().grouped_linear_fwd(x, weight, bias, activation, save)
    return y, x.new_empty(0) if pre is None else pre


def _fwd_fake(x, weight, bias, activation, save):
    shape = (*x.shape[:-1], weight.shape[0] * weight.shape[2])
    return x.new_empty(shape), x.new_empty(shape if save else 0)


def _bwd(dy, pre, bias, activation):
    return _kernels().grouped_linear_bwd(dy, pre, bias, activation)


def _bwd_fake(dy, pre, bias, activation):
    return pre.new_empty(pre.shape), pre.new_empty(pre.shape[-1])


_forward = register(
    "grouped_linear_fwd(Tensor x, Tensor weight, Tensor? bias, str? activation, bool save) -> (Tensor, Tensor)",
    _fwd,
    _fwd_fake,
)
# The gradient of the pre-activation, which linear_act needs as well, and its sum.
activation_backward = register(
    "grouped_linear_bwd(Tensor dy, Tensor pre, Tensor? bias, str activation) -> (Tensor, Tensor)", _bwd, _bwd_fake
)


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, activation):
        y, pre = _forward(x, weight, bias, activation, activation is not None)
        ctx.save_for_backward(x, weight, pre)
        ctx.activation = activation
        return y

    @staticmethod
    @once_differentiable("grouped_linear")
    def backward(ctx, dy):
        x, weight, pre = ctx.saved_tensors
        groups, size_in, size_out = weight.shape
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        dx = dweight = dbias = None
        if ctx.activation is not None:
            dpre, dbias = activation_backward(dy, pre, None, ctx.activation)
        else:
            dpre = dy
            if needs_bias:
                dbias = dy.reshape(-1, groups * size_out).sum(0)
        if needs_x:
            dx = _forward(dpre, weight.transpose(1, 2), None, None, False)[0]
        if needs_weight:
            x_groups = x.reshape(-1, groups, size_in).permute(1, 2, 0)
            dweight = torch.bmm(x_groups, dpre.reshape(-1, groups, size_out).transpose(0, 1))
        return dx, dweight, dbias if needs_bias else None, None


def _native(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, activation: str | None) -> torch.Tensor:
    function = get_activation(activation)
    groups, size_in, size_out = weight.shape
    if _onednn.usable(x, weight, bias):
        fused = activation if _onednn.fuses(activation) else None
        parts = [
            _onednn.linear(x_g, weight_g.t(), bias_g, fused)
            for x_g, weight_g, bias_g in zip(x.split(size_in, -1), weight.unbind(0), bias.split(size_out), strict=True)
        ]
        y = torch.cat(parts, -1)
        return y if fused == activation else function(y)
    # One batched product over the groups; the bias goes in with it.
    split = x[None].unflatten(-1, (groups, size_in)).flatten(0, -3).transpose(0, 1)
    y = torch.baddbmm(bias.view(groups, 1, size_out), split, weight).transpose(0, 1)
    return function(y.reshape(*x.shape[:-1], groups * size_out))
