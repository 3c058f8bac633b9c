"""What the dense layers' ops share: the check of their dtypes."""

from __future__ import annotations

import torch


def check_dtypes(**tensors: torch.Tensor | None) -> None:
    """Raise TypeError unless all the tensors have one dtype."""
    dtypes = {name: t.dtype for name, t in tensors.items() if t is not None}
    if len(set(dtypes.values())) > 1:
        given = ", ".join(f"{name} {dtype}" for name, dtype in dtypes.items())
        raise TypeError(f"a dense layer's tensors must have one dtype outside of autocast, got {given}; convert them")
