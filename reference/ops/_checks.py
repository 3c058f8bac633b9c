"""Checks that the reference ops share: real floating-point tensors on one device."""

from __future__ import annotations

import torch
from torch import Tensor

from ..packing import Packing


def check_float(**tensors: Tensor | None) -> None:
    """Check that every given tensor is a real floating-point tensor and that all lie on one device.

    Raises:
        TypeError: a value is not a tensor, or its dtype is an integer, bool or complex one.
        ValueError: the tensors lie on different devices.
    """
    first: tuple[str, Tensor] | None = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be a real floating-point tensor, got {tensor.dtype}; convert it first")
        if first is None:
            first = (name, tensor)
        elif tensor.device != first[1].device:
            raise ValueError(
                f"{first[0]} is on {first[1].device} but {name} is on {tensor.device}; move them to one device"
            )


def check_shape(name: str, tensor: Tensor, expected: tuple[int, ...], meaning: str) -> None:
    """Raise ValueError if `tensor` does not have the shape `expected`, which `meaning` spells out."""
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{name} must have shape {meaning} = {expected}, got {tuple(tensor.shape)}")


def check_probability(name: str, p: float) -> None:
    """Raise ValueError unless 0 <= p < 1, TypeError for no number."""
    if not isinstance(p, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(p).__name__}")
    if not 0.0 <= p < 1.0:
        raise ValueError(f"{name} must be at least 0 and less than 1, got {p}")


def check_packing(packing: Packing | None, x: Tensor) -> None:
    """Raise ValueError unless a packing, if there is one, covers the tokens of x (T, ...) and lies on its device."""
    if packing is None:
        return
    if not isinstance(packing, Packing):
        raise TypeError(f"packing must be a fastconv.Packing or None, got {type(packing).__name__}")
    packing.check(x.shape[0])
    if packing.cu_seqlens.device != x.device:
        raise ValueError(f"packing is on {packing.cu_seqlens.device} but the tensors are on {x.device}; make it there")


def can_look_at(tensor: Tensor) -> bool:
    """Whether a tensor's values can be looked at for nothing: on a GPU that would wait for it, in a trace break it."""
    tracing = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return tensor.device.type == "cpu" and tensor.numel() > 0 and not tracing
