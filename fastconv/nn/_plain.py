"""Which submodules a fused forward may look through, and which it must call because they do more than their class."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from fastconv.nn.layer_norm import LayerNorm


def bare(module: nn.Module, *, but_for_collectors: bool = False) -> bool:
    """Whether a call of the module is its class's forward and nothing else, or but_for_collectors hooks that collect.

    Hooks, adapters and parametrizations must see the call; the last two change the class or the instance.
    """
    hooks = module._forward_hooks  # not its values, which Dynamo takes for true
    return not (
        (hooks and not (but_for_collectors and all(map(collects_outputs, hooks.values()))))
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or _has_any_global_hook()
    )


def collects_outputs(hook: Any) -> bool:
    """Whether a hook is one of those that transformers 5.x leaves on modules for good, to collect outputs."""
    return getattr(hook, "__module__", "") == "transformers.utils.output_capturing"


def plain_linear(module: nn.Module) -> bool:
    """Whether the module is nothing but nn.Linear, so that its weight and bias say all."""
    return type(module) is nn.Linear and bare(module)


def original_class(module: Any) -> type[nn.Module] | None:
    """The class that a module had before `accelerate`, None if its class is none of those that accelerate makes.

    A class that somebody made from one of those is none of them.
    """
    return module.fastconv_original if getattr(module, "fastconv_class", None) is type(module) else None


def plain_layer_norm(module: Any) -> bool:
    """Whether the module is nothing but a LayerNorm over one dimension with parameters."""
    return (
        (type(module) in (nn.LayerNorm, LayerNorm) or original_class(module) is nn.LayerNorm)
        and len(module.normalized_shape) == 1
        and module.weight is not None
        and bare(module)
    )


def plain_dropout(module: nn.Module) -> bool:
    """Whether the module is nothing but nn.Dropout, of less than everything: the ops divide by what is kept."""
    return type(module) is nn.Dropout and module.p < 1.0 and bare(module)


def dropout_p(module: nn.Dropout) -> float:
    """The probability that a plain dropout module applies now: 0 in eval mode."""
    return module.p if module.training else 0.0
