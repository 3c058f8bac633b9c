"""separable_conv: a depthwise and a pointwise convolution along the sequence, times a gate; from checks to gradient."""

from __future__ import annotations

import functools
from types import ModuleType

import torch
import torch.nn.functional as F

from fastconv.ops import _onednn
from fastconv.ops._eager import autocast, unobserved, use_kernels
from fastconv.ops._register import distinct, needs_grad, once_differentiable, register
from fastconv.ops._windows import check_kernel_size, each_alone
from fastconv.reference import Packing
from fastconv.reference.ops.separable_conv import check

_MAX_BF16_TAPS = 13  # of a convolution by oneDNN


def separable_conv(
    x: torch.Tensor,
    depthwise: torch.Tensor,
    pointwise: torch.Tensor,
    bias: torch.Tensor,
    *,
    gate: torch.Tensor | None = None,
    packing: Packing | None = None,
) -> torch.Tensor:
    """(pointwise @ d[b, s] + bias) * gate[b, s], where d[b, s, c] = sum_k depthwise[c, k] * x[b, s + k - K//2, c].

    x: (B, S, C) float, zero outside the sequence; with a packing (T, C)
    depthwise: (C, 1, K), K odd and at most 31, dtype of x
    pointwise: (O, C, 1); bias: (O, 1); dtype of x
    gate: (B, S, O), with a packing (T, O), dtype of x, or None
    packing: where the sequences of T tokens begin and end; no window crosses that
    returns: (B, S, O), with a packing (T, O), dtype of x; all is cast to autocast's dtype where that applies

    The product and its gradients are cuBLAS's, with the bias in its epilogue. The gate is torch's multiplication: a
    kernel that adds the bias too would read and write as much, 3 O elements a token. A backward has d and the product,
    which the forward writes anyway, C + O elements a token of memory: to compute them again would cost a
    convolution and a matrix product.

    Raises: TypeError for tensors that are not real floating point or not of one dtype; ValueError for a K that is
    even or too large, shapes, devices or a packing that don't fit. Source: Jiang et al., arXiv 2008.02496, section 4.2;
    Chollet, arXiv 1610.02357.
    """
    check(x, depthwise, pointwise, bias, gate, packing)
    check_kernel_size(depthwise.shape[-1])
    x, depthwise, pointwise, bias = (autocast(t) for t in (x, depthwise, pointwise, bias))
    gate = None if gate is None else autocast(gate)
    for name, t in (("depthwise", depthwise), ("pointwise", pointwise), ("bias", bias), ("gate", gate)):
        if t is not None and t.dtype != x.dtype:
            raise TypeError(f"x and {name} must have one dtype, got {x.dtype} and {t.dtype}")
    if not use_kernels(x, depthwise, pointwise, bias, gate):
        return _native(x, depthwise, pointwise, bias, gate, packing)
    before, after = (None, None) if packing is None else (packing.before, packing.after)
    if needs_grad(x, depthwise, pointwise, bias, gate):
        x, gate = distinct(x, gate)
        return _SeparableConv.apply(x, depthwise, pointwise, bias, gate, before, after)
    y = F.linear(depthwise_op(x, depthwise, before, after, False), pointwise.squeeze(-1), bias.squeeze(-1))
    return y if gate is None else y * gate


# The ops: fastconv::separable_conv_depthwise, _bwd_depthwise and _bwd_gate.


@functools.cache
def _kernels() -> ModuleType:
    # At the first launch: importing triton takes a while, and it may not be there.
    from fastconv.kernels import separable_conv as kernels

    return kernels


def _depthwise_impl(x, depthwise, before, after, flip):
    return _kernels().separable_conv_depthwise(x, depthwise, before, after, flip)


def _depthwise_fake(x, depthwise, before, after, flip):
    return x.new_empty(x.shape)


def _bwd_depthwise(dy, x, kernel_size, before, after):
    return _kernels().separable_conv_bwd_depthwise(dy, x, kernel_size, before, after)


def _bwd_depthwise_fake(dy, x, kernel_size, before, after):
    return x.new_empty(x.shape[-1], 1, kernel_size)


def _bwd_gate(dy, gate, product):
    return _kernels().separable_conv_bwd_gate(dy, gate, product)


def _bwd_gate_fake(dy, gate, product):
    return product.new_empty(product.shape), gate.new_empty(gate.shape), product.new_empty(product.shape[-1], 1)


depthwise_op = register(
    "separable_conv_depthwise(Tensor x, Tensor depthwise, Tensor? before, Tensor? after, bool flip) -> Tensor",
    _depthwise_impl,
    _depthwise_fake,
)
_backward_depthwise = register(
    "separable_conv_bwd_depthwise(Tensor dy, Tensor x, int kernel_size, Tensor? before, Tensor? after) -> Tensor",
    _bwd_depthwise,
    _bwd_depthwise_fake,
)
_backward_gate = register(
    "separable_conv_bwd_gate(Tensor dy, Tensor gate, Tensor product) -> (Tensor, Tensor, Tensor)",
    _bwd_gate,
    _bwd_gate_fake,
)


class _SeparableConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, depthwise, pointwise, bias, gate, before, after):
        spread = depthwise_op(x, depthwise, before, after, False)
        product = F.linear(spread, pointwise.squeeze(-1), bias.squeeze(-1))
        saved = None if gate is None else product
        ctx.save_for_backward(x, depthwise, pointwise, gate, spread, saved, before, after)
        return product if gate is None else product * gate

    @staticmethod
    @once_differentiable("separable_conv")
    def backward(ctx, dy):
        x, depthwise, pointwise, gate, spread, product, before, after = ctx.saved_tensors
        need_x, need_depthwise, need_pointwise, need_bias = ctx.needs_input_grad[:4]
        dx = ddepthwise = dpointwise = dbias = dgate = None
        if gate is not None:
            dproduct, dgate, dbias = _backward_gate(dy, gate, product)
        else:
            dproduct = dy
            dbias = dy.flatten(0, -2).sum(0).unsqueeze(-1) if need_bias else None
        rows = dproduct.flatten(0, -2)
        if need_pointwise:
            dpointwise = (rows.t() @ spread.flatten(0, -2)).unsqueeze(-1)
        if need_x or need_depthwise:
            dspread = (rows @ pointwise.squeeze(-1)).view(x.shape)
            dx = depthwise_op(dspread, depthwise, before, after, True) if need_x else None
            if need_depthwise:
                ddepthwise = _backward_depthwise(dspread, x, depthwise.shape[-1], before, after)
        return dx, ddepthwise, dpointwise, dbias, dgate, None, None


# The native formulation.


def _native(
    x: torch.Tensor,
    depthwise: torch.Tensor,
    pointwise: torch.Tensor,
    bias: torch.Tensor,
    gate: torch.Tensor | None,
    packing: Packing | None,
) -> torch.Tensor:
    if packing is None:
        spread = _depthwise(x, depthwise)
    else:
        spread = each_alone(lambda x: _depthwise(x, depthwise), packing, depthwise.shape[-1], x)
    weight, bias = pointwise.squeeze(-1), bias.squeeze(-1)
    factor = gate if gate is not None and gate.is_contiguous() else None
    if not _onednn.usable(spread, weight, bias, factor):
        y = F.linear(spread, weight, bias)
    elif factor is not None:
        return _onednn.linear_binary(spread, factor, weight, bias, "mul")
    else:
        y = _onednn.linear(spread, weight, bias)
    return y if gate is None else y * gate


def _depthwise(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """(B, S, C) -> (B, S, C), without a transpose in memory."""
    if x.device.type != "cpu" or x.dtype == torch.float64 or x.numel() == 0:
        return _shift_and_add(x, weight)
    if x.dtype != torch.float32 and unobserved() and needs_grad(x, weight):
        return _NativeDepthwise.apply(x, weight)
    return _channels_last(x, weight)


def _channels_last(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """As an image of height 1, x is channels-last as it lies, which oneDNN convolves directly: 1.0 ms for 8 x 512 x 768
    in fp32, against 10.3 ms for conv1d and 3.7 ms for shift-and-add (AMD EPYC, 2 cores, torch 2.13.0, 2026-11-20).
    """
    size = weight.shape[-1]
    # In bf16 oneDNN never returns from 15 taps or more over 31 tokens or more (the same machine and version).
    dtype = torch.float32 if x.dtype == torch.bfloat16 and size > _MAX_BF16_TAPS else x.dtype
    image = x.to(dtype).transpose(1, 2).unsqueeze(2)
    y = F.conv2d(image, weight.to(dtype).unsqueeze(2), padding=(0, size // 2), groups=weight.shape[0])
    return y.squeeze(2).transpose(1, 2).to(x.dtype)


class _NativeDepthwise(torch.autograd.Function):
    # Of the taps' gradient in half precision oneDNN makes copies of all of x and dy; here one row at a time is in fp32.
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return _channels_last(x, weight)

    @staticmethod
    @once_differentiable("separable_conv")
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        need_x, need_weight = ctx.needs_input_grad
        size = weight.shape[-1]
        dx = _channels_last(dy, weight.flip(-1)) if need_x else None
        if not need_weight:
            return dx, None
        dweight = torch.zeros(size, x.shape[-1], dtype=torch.float32, device=x.device)
        for row, drow in zip(x, dy, strict=True):
            padded, drow = F.pad(row.float(), (0, 0, size // 2, size // 2)), drow.float()
            for k in range(size):
                dweight[k] += (drow * padded[k : k + len(row)]).sum(0)
        return dx, dweight.t().unsqueeze(1).to(weight.dtype)


def _shift_and_add(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The depthwise convolution by pointwise operations, which torch.compile fuses into one pass.

    In fp32 at least: sums rounded to half precision would lose a bit every few taps.
    """
    size = weight.shape[-1]
    wide = torch.promote_types(x.dtype, torch.float32)
    padded = F.pad(x.to(wide), (0, 0, size // 2, size // 2))
    taps = weight.squeeze(1).to(wide).unbind(-1)
    y = padded[:, : x.shape[1]] * taps[0]
    for k in range(1, size):
        y = torch.addcmul(y, padded[:, k : k + x.shape[1]], taps[k])
    return y.to(x.dtype)
