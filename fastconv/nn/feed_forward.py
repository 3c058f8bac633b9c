"""The dense layers of an encoder layer, each with what follows it: activation, or dropout, residual and LayerNorm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fastconv.dispatch import use_triton
from fastconv.nn._plain import bare, dropout_p, original_class, plain_dropout, plain_layer_norm, plain_linear
from fastconv.nn.grouped_linear import GroupedLinear
from fastconv.nn.packed_linear import linear
from fastconv.ops import _onednn, grouped_linear, layer_norm, linear_act
from fastconv.reference.ops import get_activation

# Class of an activation module of transformers or torch -> the activation's name, where the two are one function.
_ACTIVATION_CLASSES = {
    "GELUActivation": "gelu",
    "NewGELUActivation": "gelu_new",
    "GELUTanh": "gelu_pytorch_tanh",
    "PytorchGELUTanh": "gelu_pytorch_tanh",
    "ReLU": "relu",
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "Tanh": "tanh",
    "Sigmoid": "sigmoid",
}


def activation_name(module: Any) -> str | None:
    """Name of a module's activation, None if it has one that is known by its function only.

    This library's modules say it in `activation`; those of transformers hold it as `intermediate_act_fn` or
    `transform_act_fn`, a module or a function.
    """
    if hasattr(module, "activation"):
        return module.activation
    function = _activation_function(module)
    if isinstance(function, nn.Module) and not bare(function):
        return None
    if not type(function).__module__.startswith(("transformers.activations", "torch.nn.")):
        return None
    return _ACTIVATION_CLASSES.get(type(function).__name__)


def _activation_function(module: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    return module.intermediate_act_fn if hasattr(module, "intermediate_act_fn") else module.transform_act_fn


def dense_act(module: Any, x: torch.Tensor) -> torch.Tensor:
    """activation(module.dense(x)): (..., I) -> (..., O)."""
    name, dense = activation_name(module), module.dense
    if name is not None and plain_linear(dense):
        return linear_act(x, dense.weight, dense.bias, name)
    if name is not None and plain_grouped_linear(dense):
        return grouped_linear(x, dense.weight, dense.bias, activation=name)
    y = linear(x, dense)
    if name is not None:
        return get_activation(name)(y)
    return _activation_function(module)(y)


def plain_grouped_linear(module: nn.Module) -> bool:
    """Whether the module is nothing but a grouped linear layer of ours, by itself or under an accelerated one."""
    ours = type(module) is GroupedLinear or (isinstance(module, GroupedLinear) and original_class(module) is not None)
    return ours and bare(module)


class Intermediate:
    """The fused forward of the first half of a feed-forward network."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """activation(dense(hidden)): (B, S, C) -> (B, S, I)."""
        return dense_act(self, hidden_states)


class PredictionTransform:
    """The fused forward of what a masked language model does before its decoder."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """LayerNorm(activation(dense(hidden))): (B, S, C) -> (B, S, E)."""
        return self.LayerNorm(dense_act(self, hidden_states))  # type: ignore[attr-defined]


class ResidualOutput:
    """The fused forward of the end of attention and feed-forward network."""

    def forward(self, hidden_states: torch.Tensor, input_tensor: torch.Tensor) -> torch.Tensor:
        """LayerNorm(dropout(dense(hidden)) + input): (B, S, I), (B, S, C) -> (B, S, C)."""
        dense, norm, dropout = self.dense, self.LayerNorm, self.dropout  # type: ignore[attr-defined]
        if not (plain_layer_norm(norm) and plain_dropout(dropout)):
            return super().forward(hidden_states, input_tensor)  # type: ignore[misc]
        p, x_bias = dropout_p(dropout), None
        residual: torch.Tensor | None = input_tensor
        if not plain_linear(dense):
            x = dense(hidden_states)
        elif use_triton(hidden_states):
            # The bias goes into the norm's kernel, which passes over x anyway.
            x, x_bias = linear_act(hidden_states, dense.weight, None, None), dense.bias
        elif p == 0.0 and _onednn.usable(hidden_states, dense.weight, dense.bias, residual):
            x, residual = _onednn.linear_binary(hidden_states, input_tensor, dense.weight, dense.bias, "add"), None
        else:
            x = linear_act(hidden_states, dense.weight, dense.bias, None)
        return layer_norm(x, norm.weight, norm.bias, norm.eps, x_bias=x_bias, residual=residual, dropout_p=p)
