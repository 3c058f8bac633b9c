"""Linear layers by oneDNN on a CPU, with what follows them in the product's epilogue; for inference.

torch.nn.functional.linear hands fp32 to MKL, which on AMD processors reaches half of oneDNN's rate: 4096 x 768 x 3072
in fp32 took 101 ms by MKL and 54 ms by oneDNN, 55 ms with the GELU (AMD EPYC with AVX-512, 2 cores, torch 2.13.0,
2026-11-20). The op is the one that Inductor calls; it has no gradient.
"""

from __future__ import annotations

import torch

from fastconv.ops._eager import plain, unobserved

# Activation name -> (attribute, algorithm) of oneDNN; the erf and the tanh GELU are distinct there. Its relu is not
# here: it makes 0 of NaN.
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


def usable(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, other: torch.Tensor | None = None) -> bool:
    """Whether `linear`, or `linear_binary` with `other`, may stand in for torch's ops.

    Nothing but plain eager inference on the CPU must be going on: the ops have no gradient, and no rule for autocast.
    The bias must be contiguous, since oneDNN reads it as if it were, and so must `other`, since it is slow otherwise.
    """
    given = [t for t in (x, weight, bias, other) if t is not None]
    return (
        _AVAILABLE
        and x.device.type == "cpu"
        and x.dtype in _DTYPES
        and all(plain(t) and t.dtype == x.dtype for t in given)
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in given))
        and unobserved()
        and not torch.is_autocast_enabled("cpu")
        and bool(torch.backends.mkldnn.enabled)
        and (bias is None or bias.is_contiguous())
        and (other is None or (other.is_contiguous() and other.shape == (*x.shape[:-1], weight.shape[0])))
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
    """(x @ weight.T + bias) op other, op "add" or "mul": other (..., O) -> (..., O)."""
    return torch.ops.mkldnn._linear_pointwise.binary(x, other, weight, bias, operation)
