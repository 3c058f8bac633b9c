"""Whether a computation runs as written: eagerly, on plain tensors, with nothing that follows it; or by kernels."""

from __future__ import annotations

import torch

from fastconv.dispatch import use_triton

_PLAIN = (torch.Tensor, torch.nn.Parameter)
# Asked once, here: in a trace torch 2.11 has no answer.
_AUTOCASTS = {
    device for device in ("cpu", "cuda", "xpu", "mps", "hpu", "xla") if torch.amp.is_autocast_available(device)
}


def unobserved() -> bool:
    """Whether no trace, torch.func transform, forward-mode AD or dispatch mode follows the calls of this thread.

    Those see operators only: what goes around an operator, or has no gradient of theirs, would be lost in them.
    """
    return (
        not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not transformed()
        and torch._C._len_torch_dispatch_stack() == 0
    )


def transformed() -> bool:
    """Whether torch.func or forward-mode AD follows the calls of this thread, for which kernels have no rules."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor is no subclass: not quantized, distributed or fake."""
    return type(tensor) in _PLAIN


def autocasting(x: torch.Tensor) -> bool:
    """Whether autocast applies to x now. Not every device knows of it (meta)."""
    device = x.device.type
    return device in _AUTOCASTS and torch.is_autocast_enabled(device) and x.dtype != torch.float64


def autocast(t: torch.Tensor) -> torch.Tensor:
    """The tensor in autocast's dtype where that applies, as torch's own products take it; fp64 stays fp64."""
    return t.to(torch.get_autocast_dtype(t.device.type)) if autocasting(t) else t


def use_kernels(x: torch.Tensor, *others: torch.Tensor | None) -> bool:
    """Whether an op on these tensors runs its Triton kernels; raises what `use_triton` does.

    Not where a trace of torch.jit or a transform follows, which may want gradients later that the kernels don't have in
    it. Not on a tensor subclass, which may know torch's own ops only. Not in fp64 on a GPU: kernels in it are made for
    the interpreter, to check gradients.
    """
    return (
        use_triton(x)
        and not torch.jit.is_tracing()
        and not transformed()
        and (x.dtype != torch.float64 or x.device.type == "cpu")
        and all(t is None or plain(t) for t in (x, *others))
    )
