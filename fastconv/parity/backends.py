"""Which implementation each op takes on a device, and why, by the predicates that the ops themselves ask."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fastconv import dispatch
from fastconv.kernels import MAX_FP32_HEAD_SIZE, MAX_HEAD_SIZE, MAX_KERNEL_SIZE
from fastconv.ops import _onednn
from fastconv.ops._eager import use_kernels
from fastconv.ops.embedding_norm import MAX_CHANNELS as EMBEDDING_CHANNELS
from fastconv.ops.layer_norm import MAX_CHANNELS as NORM_CHANNELS
from fastconv.ops.linear_act import fuses as fuses_activation
from fastconv.ops.masked_attention import sdpa_is_faster
from fastconv.ops.span_kernel_logits import fuses as fuses_logits
from fastconv.parity.environment import DTYPES

# Base models' sizes: channels, logits of a token, a head, queries.
_CHANNELS, _LOGITS, _HEAD, _LENGTH = 768, 54, 64, 512


def why(device: torch.device) -> str:
    """How ops run on a device, and the reason."""
    try:
        by_kernels = dispatch.use_triton(torch.empty(0, device=device))
    except RuntimeError as error:  # "triton" was asked for
        return str(error)
    if by_kernels and device.type == "cpu":
        return "Triton's interpreter, for tests, very slow: TRITON_INTERPRET is set"
    if by_kernels:
        return "Triton kernels: Triton supports this GPU"
    if dispatch.current() == "native":
        return "native PyTorch ops: the backend is 'native'"
    return f"native PyTorch ops: {dispatch.unsupported(device)}"


def choices(device: torch.device) -> dict[str, dict[str, str]]:
    """Op -> dtype -> what it runs on plain tensors of this device, in words."""
    return {op: {name: _choice(op, device, dtype) for name, dtype in DTYPES.items()} for op in _KERNELS}


def _choice(op: str, device: torch.device, dtype: torch.dtype) -> str:
    x = torch.empty(0, dtype=dtype, device=device)
    try:
        by_kernels = use_kernels(x)
    except RuntimeError as error:  # "triton" was asked for
        return f"raises: {error}"
    return _KERNELS[op](x) if by_kernels else _native(op, device, dtype)


def _native(op: str, device: torch.device, dtype: torch.dtype) -> str:
    if op == "masked_attention":
        return "native: PyTorch's scaled_dot_product_attention"
    if op in ("linear_act", "grouped_linear"):
        ones = torch.ones(16, 16, dtype=dtype, device=device)
        with torch.no_grad():
            usable = _onednn.usable(ones, ones, None)
        epilogue = ", with GELU in its epilogue" if _onednn.fuses("gelu") else ""
        return (
            f"native: oneDNN in inference{epilogue}; PyTorch's in training" if usable else "native: PyTorch's products"
        )
    return "native: PyTorch ops"


def _kernel(limit: str) -> Callable[[torch.Tensor], str]:
    return lambda x: f"Triton kernel, {limit}" if limit else "Triton kernel"


def _linear_act(x: torch.Tensor) -> str:
    apart = f"{_products(x)}, then a Triton kernel for bias and activation"
    if fuses_activation(_CHANNELS, x.dtype, training=False):
        return f"inference of {_CHANNELS} inputs: Triton kernel, activation in its epilogue; training: {apart}"
    return apart


def _span_kernel_logits(x: torch.Tensor) -> str:
    apart = f"separable_conv and {_products(x)}"
    return f"inference: Triton kernel; training: {apart}" if fuses_logits(_CHANNELS, _LOGITS, x.dtype) else apart


def _masked_attention(x: torch.Tensor) -> str:
    most = MAX_HEAD_SIZE if x.dtype.itemsize == 2 else MAX_FP32_HEAD_SIZE
    kernel = f"Triton kernel, heads of at most {most} channels"
    if x.is_cuda and dispatch.current() == "auto":
        rest = [
            name
            for name, queries, size in (
                (f"heads of {_HEAD}", _LENGTH, _HEAD),
                (f"heads of {2 * _HEAD}", _LENGTH, 2 * _HEAD),
                ("few queries", 1, _HEAD),
            )
            if sdpa_is_faster(queries, size, x.dtype, False)
        ]
        if rest:
            kernel += f"; PyTorch's attention in inference without a mask for {', '.join(rest)}"
    return kernel


def _products(x: torch.Tensor) -> str:
    return "cuBLAS" if x.is_cuda and torch.version.hip is None else "PyTorch's products"


_KERNELS: dict[str, Callable[[torch.Tensor], str]] = {
    "layer_norm": _kernel(f"at most {NORM_CHANNELS} channels"),
    "embedding_norm": _kernel(f"at most {EMBEDDING_CHANNELS} channels"),
    "linear_act": _linear_act,
    "grouped_linear": _kernel(""),
    "separable_conv": lambda x: f"Triton kernel, at most {MAX_KERNEL_SIZE} taps; its product by {_products(x)}",
    "span_kernel_logits": _span_kernel_logits,
    "span_dynamic_conv": _kernel(f"at most {MAX_KERNEL_SIZE} taps"),
    "masked_attention": _masked_attention,
    "masked_lm_loss": _kernel(""),
}
