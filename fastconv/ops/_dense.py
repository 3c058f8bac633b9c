"""What the dense layers' ops share: which dtype they compute in, and whether their kernels may run."""

from __future__ import annotations

import torch

from fastconv.dispatch import use_triton
from fastconv.ops._eager import autocasting, plain, transformed


def check_dtypes(**tensors: torch.Tensor | None) -> None:
    """Raise TypeError unless all the tensors have one dtype."""
    dtypes = {name: t.dtype for name, t in tensors.items() if t is not None}
    if len(set(dtypes.values())) > 1:
        given = ", ".join(f"{name} {dtype}" for name, dtype in dtypes.items())
        raise TypeError(f"a dense layer's tensors must have one dtype outside of autocast, got {given}; convert them")


def autocast(t: torch.Tensor) -> torch.Tensor:
    """The tensor in autocast's dtype where that applies, as torch's own products take it; fp64 stays fp64."""
    return t.to(torch.get_autocast_dtype(t.device.type)) if autocasting(t) else t


def use_kernels(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether the kernels run.

    Not on a tensor subclass, which may know torch's products only; not where a trace or a transform follows, which a
    kernel without a gradient of its own would be lost in; not without channels.
    """
    return (
        use_triton(x)
        and not transformed()
        and not torch.jit.is_tracing()
        and plain(x)
        and plain(weight)
        and (bias is None or plain(bias))
        and weight.numel() > 0
    )
