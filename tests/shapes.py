"""Shapes and memory layouts that every op is tested on."""

from __future__ import annotations

import torch

# Around powers of two and around the tiles of the kernels.
ODD = (1, 2, 3, 63, 65, 127)

LAYOUTS = ("contiguous", "slice", "transposed")


def with_layout(x: torch.Tensor, layout: str) -> torch.Tensor:
    """x's values in another memory layout.

    "slice": the last dimension is cut out of a wider tensor, as a packed projection leaves it;
    "transposed": the last two dimensions are swapped in memory, so the last one is not contiguous.
    """
    if layout == "contiguous":
        return x.contiguous()
    if layout == "slice":
        wide = x.new_full((*x.shape[:-1], 3 * x.shape[-1]), float("nan"))
        wide[..., x.shape[-1] : 2 * x.shape[-1]] = x
        return wide[..., x.shape[-1] : 2 * x.shape[-1]]
    if layout == "transposed":
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    raise ValueError(f"unknown layout {layout!r}: expected one of {LAYOUTS}")
