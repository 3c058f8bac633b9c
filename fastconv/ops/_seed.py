"""Seeds of the ops' dropout: tensors on the device, so that a captured graph draws a new mask at every replay."""

from __future__ import annotations

import torch


def check_seed(x: torch.Tensor, seed: torch.Tensor | None) -> None:
    """Raise TypeError or ValueError unless a seed that is given is a tensor, () int64, on x's device."""
    if seed is None:
        return
    if not isinstance(seed, torch.Tensor):
        raise TypeError(f"seed must be a () int64 tensor on {x.device} or None, got {type(seed).__name__}")
    if seed.dtype != torch.int64 or seed.dim() != 0 or seed.device != x.device:
        raise ValueError(
            f"seed must be a () int64 tensor on {x.device}, got {tuple(seed.shape)} {seed.dtype} on {seed.device}"
        )


def draw_seed(x: torch.Tensor) -> torch.Tensor:
    """A seed from torch's generator of x's device, without waiting for it."""
    return torch.randint(2**63 - 1, (), device=x.device)


def native_keep_mask(shape: tuple[int, ...], p: float, seed: torch.Tensor) -> torch.Tensor:
    """The native formulation's mask for a seed, bool, True where a value is kept.

    Reading the seed waits for the device. By bernoulli_ with a generator of its own, since F.dropout has no seed; the
    CPU's generator looks at 32 bits only.
    """
    number = int(seed)
    generator = torch.Generator(seed.device).manual_seed((number ^ (number >> 32)) & 0xFFFFFFFF)
    return torch.empty(shape, dtype=torch.bool, device=seed.device).bernoulli_(1.0 - p, generator=generator)
