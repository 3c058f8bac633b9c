"""span_kernel_logits: a gated separable_conv and the dense layer after it; from checks to the choice of the kernel."""

from __future__ import annotations

import functools
from types import ModuleType

import torch

from fastconv.ops._dense import check_dtypes
from fastconv.ops._eager import autocast, use_kernels
from fastconv.ops._register import needs_grad, register
from fastconv.ops._windows import check_kernel_size
from fastconv.ops.linear_act import linear_act
from fastconv.ops.separable_conv import depthwise_op, separable_conv
from fastconv.reference import Packing
from fastconv.reference.ops.span_kernel_logits import check


def span_kernel_logits(
    x: torch.Tensor,
    depthwise: torch.Tensor,
    pointwise: torch.Tensor,
    bias: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor,
    kernel_bias: torch.Tensor | None,
    *,
    packing: Packing | None = None,
) -> torch.Tensor:
    """separable_conv(x, depthwise, pointwise, bias, gate=gate) @ weight.T + kernel_bias.

    x: (B, S, C) float, zero outside the sequence; with a packing (T, C)
    depthwise: (C, 1, K), K odd and at most 31, dtype of x
    pointwise: (O, C, 1); bias: (O, 1); gate: (B, S, O), with a packing (T, O); dtype of x
    weight: (N, O), N = H*K; kernel_bias: (N,) or None; dtype of x
    packing: where the sequences of T tokens begin and end; no window crosses that
    returns: (B, S, N), with a packing (T, N), dtype of x; all is cast to autocast's dtype where that applies

    For inference in half precision a kernel makes the logits out of the depthwise convolution's result. Elsewhere, and
    where a gradient is needed, this is separable_conv and linear_act, which have their own backward.

    Raises: TypeError for tensors that are not real floating point or not of one dtype; ValueError for a K that is
    even or too large, shapes, devices or a packing that don't fit. Source: Jiang et al., arXiv 2008.02496, section 4.2.
    """
    check(x, depthwise, pointwise, bias, gate, weight, kernel_bias, packing)
    check_kernel_size(depthwise.shape[-1])
    x, depthwise, pointwise, bias, gate, weight = (autocast(t) for t in (x, depthwise, pointwise, bias, gate, weight))
    kernel_bias = None if kernel_bias is None else autocast(kernel_bias)
    check_dtypes(
        x=x, depthwise=depthwise, pointwise=pointwise, bias=bias, gate=gate, weight=weight, kernel_bias=kernel_bias
    )
    tensors = (x, depthwise, pointwise, bias, gate, weight, kernel_bias)
    if not fuses(x.shape[-1], weight.shape[0], x.dtype) or needs_grad(*tensors) or not use_kernels(*tensors):
        return linear_act(
            separable_conv(x, depthwise, pointwise, bias, gate=gate, packing=packing), weight, kernel_bias, None
        )
    before, after = (None, None) if packing is None else (packing.before, packing.after)
    return _forward(depthwise_op(x, depthwise, before, after, False), pointwise, bias, gate, weight, kernel_bias)


def fuses(size_in: int, size_out: int, dtype: torch.dtype) -> bool:
    """Whether a kernel makes (..., size_out) logits of (..., size_in) channels, without a gradient.

    For each of the O channels in between it saves 8 bytes a token of memory traffic in half precision: 1.9 ps at 4.3
    TB/s, and two launches. Their product takes as long at 790 TFLOP/s for 768 inputs; by Triton, at a tile that leaves
    registers for the second product, two thirds of cuBLAS's rate are a careful guess (published: 0.8 to 1.0 for a
    product alone): 1 ps more, so it pays up to 1,500 inputs. In fp32 cuBLAS is far ahead. More logits than 128 have no
    room in registers; no ConvBERT has. From published rates; a measured table is owed.
    """
    return dtype.itemsize == 2 and size_in <= 1536 and size_out <= 128


# The op: fastconv::span_kernel_logits_fwd.


@functools.cache
def _kernels() -> ModuleType:
    # At the first launch: importing triton takes a while, and it may not be there.
    from fastconv.kernels import span_kernel_logits as kernels

    return kernels


def _fwd(spread, pointwise, bias, gate, weight, kernel_bias):
    return _kernels().span_kernel_logits_fwd(spread, pointwise, bias, gate, weight, kernel_bias)


def _fwd_fake(spread, pointwise, bias, gate, weight, kernel_bias):
    return spread.new_empty(*spread.shape[:-1], weight.shape[0])


_forward = register(
    "span_kernel_logits_fwd(Tensor spread, Tensor pointwise, Tensor bias, Tensor gate, Tensor weight, "
    "Tensor? kernel_bias) -> Tensor",
    _fwd,
    _fwd_fake,
)
