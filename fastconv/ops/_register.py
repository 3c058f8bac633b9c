"""Registration of ops with torch.library, and what their gradients share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

_library = torch.library.Library("fastconv", "DEF")


def register(schema: str, impl: Callable, fake: Callable) -> Callable:
    """Define `fastconv::<schema>` with one implementation for every device and its fake; returns the overload to call.

    define/impl instead of custom_op: a quarter of the time per call. The gradient is an autograd.Function outside of
    the op, which must get tensors without one.
    """
    name = schema.split("(", 1)[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastconv::{name}", fake, lib=_library)
    return getattr(torch.ops.fastconv, name).default


def needs_grad(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd will ask for a gradient with respect to one of the tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def distinct(*tensors: torch.Tensor | None) -> tuple[Any, ...]:
    """The tensors as an autograd.Function may get them in a trace: none of them in two slots.

    For one that is, Dynamo gives half the gradient in torch 2.11 (pytorch #183604), and refuses in later ones.
    """
    if not torch.compiler.is_compiling():
        return tensors
    return tuple(
        t.view_as(t) if t is not None and any(t is other for other in tensors[:i]) else t for i, t in enumerate(tensors)
    )


def once_differentiable(op: str) -> Callable[[Callable], Callable]:
    """Decorator for the backward of an autograd.Function of the op: it has no derivative of its own, and says so.

    torch's decorator of this name raises only if the engine comes to its node, which lies on no path to the op's
    inputs: in a gradient with respect to them the second-order terms would be missing without a word. This one raises
    as soon as somebody asks for a graph of the gradient. torch.compile's graphs have no second derivative either, and
    say so themselves.
    """

    def decorate(backward: Callable) -> Callable:
        @functools.wraps(backward)
        def checked(ctx: Any, *gradients: torch.Tensor) -> Any:
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                raise NotImplementedError(
                    f"fastconv's {op} has no second derivative (create_graph=True); use fastconv.restore(model) or "
                    f"fastconv.reference.ops.{op}"
                )
            with torch.no_grad():
                return backward(ctx, *gradients)

        return checked

    return decorate
