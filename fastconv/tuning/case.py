"""What a search runs for one kernel and shape."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Tensors = dict[str, torch.Tensor]
Function = Callable[..., torch.Tensor]
# Makes a tensor of a shape, of normal numbers with a standard deviation `scale`.
Normal = Callable[..., torch.Tensor]

# Of BERT's vocabulary, and of sequences where a shape says tokens only.
VOCABULARY, LENGTH = 30522, 512


@dataclass(frozen=True)
class Case:
    """A kernel on tensors of one shape.

    launch: what is timed
    op, reference: with the same tensors; the op runs the kernel
    tensors: floating point, of the kernel's dtype; those of the op
    gradients: whether the kernel is part of a forward or backward that a gradient needs, and not of inference alone
    others: launches of other variants that get the kernel's config too, and may need more of what a block has
    """

    launch: Callable[[], object]
    op: Function
    reference: Function
    tensors: Tensors
    gradients: bool = True
    others: Sequence[Callable[[], object]] = ()


def rows(tokens: int) -> tuple[int, int]:
    """A batch and a length of so many tokens."""
    length = math.gcd(tokens, LENGTH)
    return (tokens // length, length) if length >= 32 else (1, tokens)
