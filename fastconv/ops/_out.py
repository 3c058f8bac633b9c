"""What the ops with an `out` share: which tensors it may be, and whether a kernel may write straight into it."""

from __future__ import annotations

import torch


def check_out(out: torch.Tensor, like: torch.Tensor, *inputs: torch.Tensor | None) -> None:
    """Raise unless `out` can hold a result with the shape, dtype and device of `like`, and nothing needs a gradient.

    like: an input of that kind; inputs: the other tensors that the result depends on

    Raises: TypeError for no tensor; ValueError for another shape, dtype or device, where a gradient is needed, and for
    an `out` of which several elements are one place in memory.
    """
    if not isinstance(out, torch.Tensor):
        raise TypeError(f"out must be a torch.Tensor or None, got {type(out).__name__}")
    if out.shape != like.shape or out.dtype != like.dtype or out.device != like.device:
        raise ValueError(
            f"out must be {tuple(like.shape)} {like.dtype} on {like.device}, like the result, got {tuple(out.shape)} "
            f"{out.dtype} on {out.device}"
        )
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (out, like, *inputs)):
        raise ValueError("out can't be used where a gradient is needed: out or an input requires grad")
    if _overlaps_itself(out):
        raise ValueError(
            f"out's elements must not share memory, got strides {tuple(out.stride())} for shape {tuple(out.shape)}; "
            "expanded tensors can't be written to"
        )


def _overlaps_itself(t: torch.Tensor) -> bool:
    """Whether elements share memory. What slices and transposes make of a tensor doesn't; other strides may count.

    In a trace, where numbers without a value can't be sorted, only what `expand` makes counts.
    """
    dimensions = [(stride, size) for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1]
    if torch.compiler.is_compiling():
        return any(stride == 0 for stride, _ in dimensions)
    reach = 0  # of the dimensions with shorter strides
    for stride, size in sorted(dimensions):
        if stride <= reach and t.numel() > 0:
            return True
        reach += stride * (size - 1)
    return False


def takes_rows(out: torch.Tensor, *inputs: torch.Tensor | None) -> bool:
    """Whether a kernel that reads the inputs may write rows straight into `out` (..., C), one stride apart."""
    merged = all(
        out.stride(i) == out.shape[i + 1] * out.stride(i + 1) for i in range(out.dim() - 2) if out.shape[i] > 1
    )
    return merged and (out.stride(-1) == 1 or out.shape[-1] == 1) and not shares_memory(out, *inputs)


def shares_memory(out: torch.Tensor, *inputs: torch.Tensor | None) -> bool:
    """Whether `out` may lie, from its first element to its last, where one of the inputs does; on one device.

    True in a trace, whose tensors have no memory yet.
    """
    if torch.compiler.is_compiling():
        return True
    start, end = _extent(out)
    extents = [_extent(t) for t in inputs if t is not None]
    return any(start < other_end and other_start < end for other_start, other_end in extents)


def _extent(t: torch.Tensor) -> tuple[int, int]:
    """The first byte, and that after the last."""
    start = t.data_ptr()
    if t.numel() == 0:
        return start, start
    last = sum(stride * (size - 1) for stride, size in zip(t.stride(), t.shape, strict=True))
    return start, start + (last + 1) * t.element_size()
