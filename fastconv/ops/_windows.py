"""What the two convolutions share: their longest kernel, and windows that end where a packed sequence does."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fastconv.kernels import MAX_KERNEL_SIZE
from fastconv.reference import Packing


def fits(kernel_size: int) -> bool:
    """Whether the convolutions take kernels of so many taps."""
    return kernel_size % 2 == 1 and 1 <= kernel_size <= MAX_KERNEL_SIZE


def check_kernel_size(kernel_size: int) -> None:
    """Raise ValueError unless the convolutions take kernels of so many taps."""
    if not fits(kernel_size):
        raise ValueError(f"kernel_size must be odd and at most {MAX_KERNEL_SIZE}, got {kernel_size}")


def each_alone(
    convolve: Callable[..., torch.Tensor], packing: Packing, kernel_size: int, *tensors: torch.Tensor
) -> torch.Tensor:
    """convolve(*tensors) of packed tensors (T, ...), by a function of (1, S, ...): -> (T, ...).

    As one sequence with so many zeros between the packed ones as a window reaches over. Weights of 0 would not do: what
    stands in another sequence may be infinite.
    """
    gap = kernel_size // 2
    number = (packing.before == 0).cumsum(0) - 1  # of each token's sequence
    place = torch.arange(packing.tokens, device=number.device) + gap * number
    # Of a list's length, a graph of torch.compile would be for so many sequences alone.
    sequences = packing.cu_seqlens.shape[0] - 1 if torch.compiler.is_compiling() else len(packing.lengths)
    size = packing.tokens + gap * sequences
    spaced = (t.new_zeros(size, *t.shape[1:]).index_copy(0, place, t)[None] for t in tensors)
    return convolve(*spaced)[0].index_select(0, place)
