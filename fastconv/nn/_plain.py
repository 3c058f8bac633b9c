"""Which submodules a fused forward may look through, and which it must call because they do more than their class."""

from __future__ import annotations

from torch import nn

from fastconv.nn.layer_norm import LayerNorm


def bare(module: nn.Module) -> bool:
    # Hooks, adapters and parametrizations must see the call; the last two change the class or the instance.
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def plain_linear(module: nn.Module) -> bool:
    """Whether the module is nothing but nn.Linear, so that its weight and bias say all."""
    return type(module) is nn.Linear and bare(module)


def plain_layer_norm(module: nn.Module) -> bool:
    """Whether the module is nothing but a LayerNorm over one dimension with parameters."""
    return (
        type(module) in (nn.LayerNorm, LayerNorm)
        and len(module.normalized_shape) == 1
        and module.weight is not None
        and bare(module)
    )


def plain_dropout(module: nn.Module) -> bool:
    """Whether the module is nothing but nn.Dropout."""
    return type(module) is nn.Dropout and bare(module)


def dropout_p(module: nn.Dropout) -> float:
    """The probability that a plain dropout module applies now: 0 in eval mode."""
    return module.p if module.training else 0.0
