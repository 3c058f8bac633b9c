"""Linear layers by oneDNN on a CPU, with what follows them in the product's epilogue; for inference.

torch.nn.functional.linear hands fp32 to MKL, which on AMD processors reaches half of oneDNN's rate: 4096 x 768 x 3072
in fp32 took 101 ms by MKL and 54 ms by oneDNN, 55 ms with the GELU (AMD EPYC with AVX-512, 2 cores, torch 2.13.0,
2026-11-20). The op is the one that Inductor calls; it has no gradient.
"""

from __future__ import annotations

import torch

# Activation name -> (attribute, algorithm) of oneDNN; the erf and the tanh GELU are distinct there.
_EPILOGUE: dict[str | None, tuple[str, str]] = {
    None: ("none", ""),
    "linear": ("none", ""),
    "gelu": ("gelu", "none"),
    "gelu_python": ("gelu", "none"),
    "gelu_new": ("gelu", "tanh"),
    "gelu_fast": ("gelu", "tanh"),
    "gelu_accurate": ("gelu", "tanh"),
    "gelu_python_tanh": ("gelu", "tanh"),
    "gelu_pytorch_tanh": ("gelu", "tanh"),
    "relu": ("relu", ""),
    "silu": ("swish", ""),
    "swish": ("swish", ""),
    "tanh": ("tanh", ""),
    "sigmoid": ("sigmoid", ""),
}


def _available() -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    try:
        return hasattr(torch.ops.mkldnn._linear_pointwise, "binary")
    except AttributeError:
        return False


_AVAILABLE = _available()
_DTYPES = {torch.float32}
if _AVAILABLE and torch.ops.mkldnn._is_mkldnn_bf16_supported():
    _DTYPES.add(torch.bfloat16)
_PLAIN = (torch.Tensor, torch.nn.Parameter)


def usable(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> bool:
    """Whether `linear` may stand in for torch's: nothing but plain eager inference on the CPU must be going on.

    A gradient (reverse, forward mode or torch.func's), a trace, autocast or a tensor subclass would be lost in it.
    """
    return (
        _AVAILABLE
        and x.device.type == "cpu"
        and x.dtype in _DTYPES
        and weight.dtype == x.dtype
        and (bias is None or bias.dtype == x.dtype)
        and type(x) is torch.Tensor
        and type(weight) in _PLAIN
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch.is_autocast_enabled("cpu")
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
        and torch.backends.mkldnn.enabled
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch.autograd.forward_ad._current_level < 0
        and torch._C._len_torch_dispatch_stack() == 0
        and x.numel() > 0
        and weight.numel() > 0
    )


def fuses(activation: str | None) -> bool:
    """Whether the activation can be computed in the product's epilogue."""
    return activation in _EPILOGUE


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str | None = None
) -> torch.Tensor:
    """activation(x @ weight.T + bias): x (..., I), weight (O, I) of any strides, bias (O,) or None -> (..., O)."""
    attribute, algorithm = _EPILOGUE[activation]
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, attribute, [], algorithm)


def linear_binary(
    x: torch.Tensor, other: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, operation: str
) -> torch.Tensor:
    """(x @ weight.T + bias) op other, op "add" or "mul": other (..., O) contiguous -> (..., O)."""
    return torch.ops.mkldnn._linear_pointwise.binary(x, other, weight, bias, operation)
