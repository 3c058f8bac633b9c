"""The activation functions, by the names that the transformers configs use for `hidden_act`."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def gelu(x: Tensor) -> Tensor:
    """x * Phi(x), with the error function. Hendrycks, Gimpel, "Gaussian Error Linear Units" (2016)."""
    return F.gelu(x)


def gelu_tanh(x: Tensor) -> Tensor:
    """The tanh approximation of GELU, section 2 of the same paper."""
    return F.gelu(x, approximate="tanh")


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), the sigmoid approximation of GELU, section 2 of the same paper."""
    return x * torch.sigmoid(1.702 * x)


def gelu_10(x: Tensor) -> Tensor:
    """GELU clipped to [-10, 10]. Wu et al., "Integer Quantization for Deep Learning Inference" (2020)."""
    return F.gelu(x).clamp(-10.0, 10.0)


def linear(x: Tensor) -> Tensor:
    """x itself."""
    return x


def laplace(x: Tensor) -> Tensor:
    """0.5 (1 + erf((x - mu) / (sigma sqrt 2))). Ma et al., "Mega" (2022, arXiv 2209.10655), the Laplace function."""
    # sqrt(1/2) and 1 / (2 sqrt(pi)), with the digits that transformers gives them
    mu, sigma = 0.707107, 0.282095
    return 0.5 * (1.0 + torch.erf((x - mu) / (sigma * math.sqrt(2.0))))


def relu2(x: Tensor) -> Tensor:
    """relu(x)^2. So et al., "Primer" (2021, arXiv 2109.08668)."""
    return F.relu(x).square()


def sqrtsoftplus(x: Tensor) -> Tensor:
    """sqrt(log(1 + exp(x)))."""
    return F.softplus(x).sqrt()


# prelu and xielu are not here: they carry parameters, so they are modules, not functions.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": gelu,
    "gelu_10": gelu_10,
    "gelu_accurate": gelu_tanh,
    "gelu_fast": gelu_tanh,
    "gelu_new": gelu_tanh,
    "gelu_python": gelu,
    "gelu_python_tanh": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "hardswish": F.hardswish,
    "laplace": laplace,
    "leaky_relu": F.leaky_relu,
    "linear": linear,
    "mish": F.mish,
    "quick_gelu": quick_gelu,
    "relu": F.relu,
    "relu2": relu2,
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "sqrtsoftplus": sqrtsoftplus,
    "swish": F.silu,
    "tanh": torch.tanh,
}


def get_activation(name: str | None) -> Callable[[Tensor], Tensor]:
    """The function called `name`; None means the identity.

    Raises:
        ValueError: there is no activation of that name.
    """
    if name is None:
        return linear
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)} or None, got {name!r}")
    return ACTIVATIONS[name]
