"""linear_act: y = activation(x @ weight.T + bias), through every layer from checks to gradient."""

from __future__ import annotations

import functools
from types import ModuleType

import torch
import torch.nn.functional as F

from fastconv.ops import _onednn
from fastconv.ops._dense import check_dtypes
from fastconv.ops._eager import autocast, autocasting, use_kernels
from fastconv.ops._register import distinct, needs_grad, once_differentiable, register
from fastconv.ops.grouped_linear import activation_backward, dense
from fastconv.reference.ops import get_activation
from fastconv.reference.ops.linear_act import check


def linear_act(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str | None
) -> torch.Tensor:
    """A dense layer with its bias and activation.

    x: (..., I) float
    weight: (O, I), bias: (O,) or None, dtype of x; under autocast any of autocast's dtypes
    activation: a name of the transformers list ("gelu" is the erf form on every device), or None
    returns: (..., O), dtype of x; of autocast under it

    Raises: TypeError for tensors that are not real floating point, or of several dtypes; ValueError for shapes, devices
    or an activation that don't fit. Source: Devlin et al., arXiv 1810.04805, appendix A.2 (GELU: Hendrycks, Gimpel,
    arXiv 1606.08415).
    """
    check(x, weight, bias)
    function = get_activation(activation)
    if not autocasting(x):
        check_dtypes(x=x, weight=weight, bias=bias)
    linear = activation is None or function is get_activation(None)
    if linear or weight.numel() == 0 or not use_kernels(x, weight, bias):
        return _native(x, weight, bias, activation)
    x, weight, bias = autocast(x), autocast(weight), None if bias is None else autocast(bias)
    check_dtypes(x=x, weight=weight, bias=bias)
    training = needs_grad(x, weight, bias)
    if fuses(x.shape[-1], x.dtype, training=training):
        return dense(x, weight.t()[None], bias, activation)
    if training:
        x, weight, bias = distinct(x, weight, bias)
        return _LinearAct.apply(x, weight, bias, activation)
    return _forward(F.linear(x, weight), bias, activation)


def fuses(size_in: int, dtype: torch.dtype, *, training: bool) -> bool:
    """Whether bias and activation go into the epilogue of a product of this library's, instead of cuBLAS and a kernel.

    The epilogue saves a value's way to memory and back, 4 bytes an output in half precision: 0.9 ps at 4.3 TB/s. The
    product itself takes 2 ps at 790 TFLOP/s for 768 inputs, and a fifth more by Triton (published: 0.8 to 1.0 of
    cuBLAS): it pays up to twice as many inputs. In training the value is written for the backward anyway, and what is
    left, one read, pays for nothing. In fp32 cuBLAS is far ahead. From published rates; a measured table is owed.
    """
    return not training and dtype.itemsize == 2 and size_in <= 1536


# The op: fastconv::linear_act_fwd; its backward is fastconv::grouped_linear_bwd.


@functools.cache
def _kernels() -> ModuleType:
    # At the first launch: importing triton takes a while, and it may not be there.
    from fastconv.kernels import linear_act as kernels

    return kernels


def _fwd(z, bias, activation):
    return _kernels().linear_act_fwd(z, bias, activation)


def _fwd_fake(z, bias, activation):
    return z.new_empty(z.shape)


_forward = register("linear_act_fwd(Tensor z, Tensor? bias, str activation) -> Tensor", _fwd, _fwd_fake)


class _LinearAct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, activation):
        z = F.linear(x, weight)
        ctx.save_for_backward(x, weight, z, bias)
        ctx.activation = activation
        return _forward(z, bias, activation)

    @staticmethod
    @once_differentiable("linear_act")
    def backward(ctx, dy):
        x, weight, z, bias = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        dz, dbias = activation_backward(dy, z, bias, ctx.activation)
        dx = dz @ weight if needs_x else None
        dweight = None
        if needs_weight:
            dweight = dz.reshape(-1, dz.shape[-1]).t() @ x.reshape(-1, x.shape[-1])
        return dx, dweight, dbias if needs_bias else None, None


def _native(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str | None) -> torch.Tensor:
    function = get_activation(activation)
    if _onednn.usable(x, weight, bias):
        if _onednn.fuses(activation):
            return _onednn.linear(x, weight, bias, activation)
        return function(_onednn.linear(x, weight, bias))
    return function(F.linear(x, weight, bias))
