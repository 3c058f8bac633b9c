"""A batch without its padding: the tokens of all sequences one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor


class Packing:
    """Where the sequences of a packed batch of T tokens begin and end; an op that is given one works on (T, ...).

    cu_seqlens: (N + 1,), int32 or int64: 0, then the number of tokens up to the end of each of the N sequences, on the
        device of the tensors. A sequence may be empty.
    indices: (T,), int64, where the tokens stand in a padded batch, flat, and
    padded_shape: that batch's (B, S): both or None.

    `before` and `after`, (T,) int32, say how many tokens of its sequence stand before and after each token; `first` and
    `last`, (T,) int32, which token its sequence begins with, and one past the last.

    Raises:
        TypeError: cu_seqlens or indices that are no tensors of integers.
        ValueError: another shape; cu_seqlens that don't begin with 0 or that run backwards; indices without a
            padded_shape or the other way round, on another device, or outside of it (looked at on the CPU only).
    """

    def __init__(
        self, cu_seqlens: Tensor, *, indices: Tensor | None = None, padded_shape: tuple[int, int] | None = None
    ) -> None:
        _check_dtype("cu_seqlens", cu_seqlens, torch.int32, torch.int64)
        if cu_seqlens.dim() != 1 or cu_seqlens.numel() == 0:
            raise ValueError(f"cu_seqlens must have shape (N + 1,), got {tuple(cu_seqlens.shape)}")
        ends = cu_seqlens.tolist()  # the one look at the device
        backwards = next((i for i in range(1, len(ends)) if ends[i] < ends[i - 1]), None)
        if ends[0] != 0 or backwards is not None:
            where = f"{ends[backwards - 1]} before {ends[backwards]}" if backwards else f"{ends[0]} first"
            raise ValueError(f"cu_seqlens must begin with 0 and never fall, got {where}")
        _check_places(indices, padded_shape, ends[-1], cu_seqlens.device)
        self.cu_seqlens = cu_seqlens
        self.indices = indices
        self.padded_shape = padded_shape
        self.lengths = [end - start for start, end in pairwise(ends)]
        self.tokens: int = ends[-1]
        lengths = cu_seqlens.diff().long()
        # output_size: or repeat_interleave would wait for the device.
        start = cu_seqlens[:-1].long().repeat_interleave(lengths, output_size=self.tokens)
        end = cu_seqlens[1:].long().repeat_interleave(lengths, output_size=self.tokens)
        token = torch.arange(self.tokens, device=cu_seqlens.device)
        self.before = (token - start).int()
        self.after = (end - 1 - token).int()
        self.first, self.last = start.int(), end.int()

    @classmethod
    def from_lengths(cls, lengths: Sequence[int] | Tensor, *, device: torch.device | str | None = None) -> Packing:
        """The packing of sequences of these lengths, (N,) ints of at least 0, one after the other.

        Raises:
            TypeError: lengths that are no integers. ValueError: another shape, or a negative length.
        """
        given = torch.as_tensor(lengths)
        if given.numel() and (given.is_floating_point() or given.dtype == torch.bool or given.is_complex()):
            raise TypeError(f"lengths must be integers, got {given.dtype}")
        if given.dim() != 1 or (given.numel() and int(given.min()) < 0):
            raise ValueError(f"lengths must be (N,) integers of at least 0, got {given.tolist()}")
        cu_seqlens = torch.zeros(given.numel() + 1, dtype=torch.int64)
        torch.cumsum(given.cpu().long(), 0, out=cu_seqlens[1:])
        return cls(cu_seqlens.to(given.device if device is None else device))

    @classmethod
    def from_mask(cls, mask: Tensor) -> Packing:
        """The packing of a padded batch: mask (B, S), 1 for tokens, 0 for padding, which may stand on either side.

        Raises:
            TypeError: a mask that is no tensor.
            ValueError: another shape, other values, or padding between the tokens of a row.
        """
        if not isinstance(mask, Tensor):
            raise TypeError(f"mask must be a torch.Tensor, got {type(mask).__name__}")
        if mask.dim() != 2:
            raise ValueError(f"mask must have shape (B, S), got {tuple(mask.shape)}")
        tokens = mask != 0
        if not bool(((mask == 0) | (mask == 1)).all()):
            raise ValueError("mask must have values 1 and 0 only, got others")
        starts = tokens & ~torch.nn.functional.pad(tokens, (1, 0))[:, :-1]
        if bool((starts.sum(1) > 1).any()):
            rows = (starts.sum(1) > 1).nonzero().flatten().tolist()
            raise ValueError(f"the tokens of a row must stand together, got padding between them in rows {rows}")
        cu_seqlens = torch.nn.functional.pad(tokens.sum(1).cumsum(0), (1, 0))
        indices = tokens.flatten().nonzero().flatten()
        return cls(cu_seqlens, indices=indices, padded_shape=(mask.shape[0], mask.shape[1]))

    def pack(self, x: Tensor) -> Tensor:
        """(B, S, ...) -> (T, ...), for a packing made from a mask.

        Raises:
            ValueError: a packing that was made otherwise; another shape.
        """
        B, S = self._padded()
        if tuple(x.shape[:2]) != (B, S):
            raise ValueError(f"x must have shape (B, S, ...) = {(B, S, '...')}, got {tuple(x.shape)}")
        return x.flatten(0, 1).index_select(0, self.indices)  # type: ignore[arg-type]

    def unpack(self, x: Tensor) -> Tensor:
        """(T, ...) -> (B, S, ...), zeros where padding is, for a packing made from a mask.

        Raises:
            ValueError: a packing that was made otherwise; another shape.
        """
        B, S = self._padded()
        self.check(x.shape[0])
        padded = x.new_zeros(B * S, *x.shape[1:])
        return padded.index_copy(0, self.indices, x).unflatten(0, (B, S))  # type: ignore[arg-type]

    def check(self, tokens: int) -> None:
        """Raise ValueError unless it covers so many tokens."""
        if tokens != self.tokens:
            raise ValueError(f"packing covers {self.tokens} tokens, but the tensors have {tokens}")

    def _padded(self) -> tuple[int, int]:
        if self.padded_shape is None:
            raise ValueError("this packing has no padded batch: make it with Packing.from_mask")
        return self.padded_shape


def _check_dtype(name: str, tensor: Tensor, *dtypes: torch.dtype) -> None:
    if not isinstance(tensor, Tensor) or tensor.dtype not in dtypes:
        expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        given = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{name} must be an {expected} tensor, got {given}")


def _check_places(
    indices: Tensor | None, padded_shape: tuple[int, int] | None, tokens: int, device: torch.device
) -> None:
    if indices is None and padded_shape is None:
        return
    if indices is None or padded_shape is None:
        given, missing = ("padded_shape", "indices") if indices is None else ("indices", "padded_shape")
        raise ValueError(f"{given} needs {missing}, got None; Packing.from_mask makes both")
    _check_dtype("indices", indices, torch.int64)
    if tuple(indices.shape) != (tokens,):
        raise ValueError(f"indices must have shape (T,) = {(tokens,)}, got {tuple(indices.shape)}")
    if indices.device != device:
        raise ValueError(f"indices are on {indices.device} but cu_seqlens is on {device}; move them to one device")
    if device.type != "cpu" or tokens == 0:
        return
    (B, S), (low, high) = padded_shape, (int(value) for value in indices.aminmax())
    if low < 0 or high >= B * S:
        raise ValueError(f"indices must be from 0 to B * S - 1 = {B * S - 1}, got values from {low} to {high}")
