"""span_dynamic_conv: every token of every head has its own softmax-normalised kernel; from checks to gradient."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import ModuleType

import torch
import torch.nn.functional as F

from fastconv.ops._eager import autocast, unobserved, use_kernels
from fastconv.ops._out import check_out, takes_rows
from fastconv.ops._register import distinct, needs_grad, once_differentiable, register
from fastconv.ops._windows import check_kernel_size, each_alone
from fastconv.reference import Packing
from fastconv.reference.ops.span_dynamic_conv import check


def span_dynamic_conv(
    value: torch.Tensor,
    kernel_logits: torch.Tensor,
    kernel_size: int,
    *,
    packing: Packing | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """sum_k softmax(kernel_logits[b, s, h, :])[k] * value[b, s + k - K//2, h, :].

    value: (B, S, H*D) float, zero outside the sequence; with a packing (T, H*D)
    kernel_logits: (B, S, H*K), dtype of value; with a packing (T, H*K)
    kernel_size: K, odd and at most 31
    packing: where the sequences of T tokens begin and end; no window crosses that
    out: like the result, written and returned if given, not with a gradient: a slice of a wider tensor, say. Where its
        tokens aren't one stride apart, or an input is in its memory, the result is copied into it
    returns: shape and dtype of value; softmax and sum are fp32 at least. value and kernel_logits are cast to autocast's
        dtype where that applies

    Raises: TypeError for tensors that are not real floating point or not of one dtype; ValueError for a K that is even
    or too large, for shapes, devices or a packing that don't fit, and for an `out` unlike the result, one whose
    elements share memory, or one where a gradient is needed. Source: Jiang et al., arXiv 2008.02496, section 4.2.
    """
    check(value, kernel_logits, kernel_size, packing)
    check_kernel_size(kernel_size)
    value, kernel_logits = autocast(value), autocast(kernel_logits)
    if value.dtype != kernel_logits.dtype:
        raise TypeError(f"value and kernel_logits must have one dtype, got {value.dtype} and {kernel_logits.dtype}")
    if out is not None:
        check_out(out, value, kernel_logits)
    if not use_kernels(value, kernel_logits, out):
        y = _native(value, kernel_logits, kernel_size, packing)
        return y if out is None else out.copy_(y)
    before, after = (None, None) if packing is None else (packing.before, packing.after)
    if needs_grad(value, kernel_logits):
        value, kernel_logits = distinct(value, kernel_logits)
        return _SpanDynamicConv.apply(value, kernel_logits, kernel_size, before, after)
    if out is not None and takes_rows(out, value, kernel_logits):
        _forward_out(value, kernel_logits, kernel_size, before, after, out)
        return out
    y = _forward(value, kernel_logits, kernel_size, before, after, False)[0]
    return y if out is None else out.copy_(y)


# The ops: fastconv::span_dynamic_conv_fwd, _fwd_out and _bwd.


@functools.cache
def _kernels() -> ModuleType:
    # At the first launch: importing triton takes a while, and it may not be there.
    from fastconv.kernels import span_dynamic_conv as kernels

    return kernels


def _fwd(value, kernel_logits, kernel_size, before, after, save):
    y, stats = _kernels().span_dynamic_conv_fwd(value, kernel_logits, kernel_size, before, after, None, save)
    return y, value.new_empty(0) if stats is None else stats


def _fwd_fake(value, kernel_logits, kernel_size, before, after, save):
    wide = torch.promote_types(value.dtype, torch.float32)
    tokens, heads = value.numel() // value.shape[-1], kernel_logits.shape[-1] // kernel_size
    stats = value.new_empty(2, tokens, heads, dtype=wide) if save else value.new_empty(0)
    return value.new_empty(value.shape), stats


def _fwd_out(value, kernel_logits, kernel_size, before, after, out):
    _kernels().span_dynamic_conv_fwd(value, kernel_logits, kernel_size, before, after, out, False)


def _fwd_out_fake(value, kernel_logits, kernel_size, before, after, out):
    pass


def _bwd(dy, value, kernel_logits, stats, kernel_size, before, after):
    return _kernels().span_dynamic_conv_bwd(dy, value, kernel_logits, stats, kernel_size, before, after)


def _bwd_fake(dy, value, kernel_logits, stats, kernel_size, before, after):
    return value.new_empty(value.shape), value.new_empty(kernel_logits.shape)


_forward = register(
    "span_dynamic_conv_fwd(Tensor value, Tensor kernel_logits, int kernel_size, Tensor? before, Tensor? after, "
    "bool save) -> (Tensor, Tensor)",
    _fwd,
    _fwd_fake,
)
_forward_out = register(
    "span_dynamic_conv_fwd_out(Tensor value, Tensor kernel_logits, int kernel_size, Tensor? before, Tensor? after, "
    "Tensor(a!) out) -> ()",
    _fwd_out,
    _fwd_out_fake,
)
_backward = register(
    "span_dynamic_conv_bwd(Tensor dy, Tensor value, Tensor kernel_logits, Tensor stats, int kernel_size, "
    "Tensor? before, Tensor? after) -> (Tensor, Tensor)",
    _bwd,
    _bwd_fake,
)


class _SpanDynamicConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, kernel_logits, kernel_size, before, after):
        y, stats = _forward(value, kernel_logits, kernel_size, before, after, True)
        ctx.save_for_backward(value, kernel_logits, stats, before, after)
        ctx.kernel_size = kernel_size
        return y

    @staticmethod
    @once_differentiable("span_dynamic_conv")
    def backward(ctx, dy):
        value, kernel_logits, stats, before, after = ctx.saved_tensors
        dvalue, dlogits = _backward(dy, value, kernel_logits, stats, ctx.kernel_size, before, after)
        return dvalue, dlogits, None, None, None


# The native formulation: shift-and-add. K passes, where windows in memory would be K times as large.


def _native(
    value: torch.Tensor, kernel_logits: torch.Tensor, kernel_size: int, packing: Packing | None
) -> torch.Tensor:
    def convolve(value: torch.Tensor, kernel_logits: torch.Tensor) -> torch.Tensor:
        wide = torch.promote_types(kernel_logits.dtype, torch.float32)
        kernel = torch.softmax(kernel_logits.unflatten(-1, (-1, kernel_size)), -1, dtype=wide)
        if not unobserved():
            return _traced(value, kernel)
        if needs_grad(value, kernel):
            return _NativeSpanDynamicConv.apply(value, kernel)
        return _shift_and_add(value, kernel)

    if packing is None:
        return convolve(value, kernel_logits)
    return each_alone(convolve, packing, kernel_size, value, kernel_logits)


def _traced(value: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """As _shift_and_add, without writes in place: torch.compile fuses it into one pass, and torch.func follows it."""
    half, S = kernel.shape[-1] // 2, value.shape[1]
    x = F.pad(value.unflatten(-1, (kernel.shape[2], -1)).to(kernel.dtype), (0, 0, 0, 0, half, half))
    y = x[:, :S] * kernel[..., :1]
    for k in range(1, kernel.shape[-1]):
        y = torch.addcmul(y, x[:, k : k + S], kernel[..., k : k + 1])
    return y.flatten(2).to(value.dtype)


def _shift_and_add(value: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """(B, S, H*D), (B, S, H, K) -> (B, S, H*D), summed in the kernel's dtype.

    Half precision goes row by row: so there is one row at a time in fp32.
    """
    if value.dtype != kernel.dtype and len(value) > 1:
        return torch.cat([_shift_and_add(*row) for row in zip(value.split(1), kernel.split(1), strict=True)])
    x = value.unflatten(-1, (kernel.shape[2], -1)).to(kernel.dtype)
    y = x * _tap(kernel, kernel.shape[-1] // 2)
    for k, to, source in _shifts(kernel):
        y[:, to].addcmul_(x[:, source], _tap(kernel, k)[:, to])
    return y.flatten(2).to(value.dtype)


class _NativeSpanDynamicConv(torch.autograd.Function):
    # By autograd, the writes in place would be copies of the whole tensor, one a tap.
    @staticmethod
    def forward(ctx, value, kernel):
        ctx.save_for_backward(value, kernel)
        return _shift_and_add(value, kernel)

    @staticmethod
    @once_differentiable("span_dynamic_conv")
    def backward(ctx, dy):
        value, kernel = ctx.saved_tensors
        if value.dtype == kernel.dtype or len(value) <= 1:
            return _native_gradients(dy, value, kernel)
        rows = zip(dy.split(1), value.split(1), kernel.split(1), strict=True)
        dvalue, dkernel = zip(*(_native_gradients(*row) for row in rows), strict=True)
        return torch.cat(dvalue), torch.cat(dkernel)


def _native_gradients(dy: torch.Tensor, value: torch.Tensor, kernel: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    heads, centre = kernel.shape[2], kernel.shape[-1] // 2
    x, dy = (t.unflatten(-1, (heads, -1)).to(kernel.dtype) for t in (value, dy))
    dvalue, dkernel = dy * _tap(kernel, centre), torch.zeros_like(kernel)
    dkernel[..., centre] = (dy * x).sum(-1)
    for k, to, source in _shifts(kernel):
        dvalue[:, source].addcmul_(dy[:, to], _tap(kernel, k)[:, to])
        dkernel[:, to, :, k] = (dy[:, to] * x[:, source]).sum(-1)
    return dvalue.flatten(2).to(value.dtype), dkernel


def _tap(kernel: torch.Tensor, k: int) -> torch.Tensor:
    return kernel[..., k : k + 1]


def _shifts(kernel: torch.Tensor) -> Iterator[tuple[int, slice, slice]]:
    """Every tap but the central one, with the tokens that it adds to, and those that it takes."""
    for k in range(kernel.shape[-1]):
        shift = k - kernel.shape[-1] // 2
        if 0 < abs(shift) < kernel.shape[1]:
            later, earlier = slice(abs(shift), None), slice(None, -abs(shift))
            yield (k, later, earlier) if shift < 0 else (k, earlier, later)
