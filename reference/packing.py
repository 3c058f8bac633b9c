"""A batch without its padding: the tokens of all sequences one after the other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Packing:
    """Where the sequences of a packed batch of T tokens begin and end; an op that is given one works on (T, ...).

    cu_seqlens: (N + 1,), int32 or int64: 0, then the number of tokens up to the end of each of the N sequences, on the
        device of the tensors. A sequence may be empty.
    indices: (T,), int64, where the tokens stand in a padded batch, flat, and
    padded_shape: that batch's (B, S): both or None.

    `lengths`, `tokens` and `longest` are ints: of each sequence, of all, and of the longest.
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
        ends = cu_seqlens.cpu().tolist()  # the one look at the device
        backwards = next((i for i in range(1, len(ends)) if ends[i] < ends[i - 1]), None)
        if ends[0] != 0 or backwards is not None:
            where = f"{ends[backwards - 1]} before {ends[backwards]}" if backwards else f"{ends[0]} first"
            raise ValueError(f"cu_seqlens must begin with 0 and never fall, got {where}")
        _check_places(indices, padded_shape, ends[-1], cu_seqlens.device)
        self._fill(cu_seqlens, torch.tensor(ends, device="cpu"), indices, padded_shape)

    def _fill(
        self, cu_seqlens: Tensor, ends: Tensor, indices: Tensor | None, padded_shape: tuple[int, int] | None
    ) -> None:
        """Everything that follows from `ends`, cu_seqlens on the host, sent to the device without waiting for it."""
        self.cu_seqlens = cu_seqlens
        self.indices = indices
        self.padded_shape = padded_shape
        lengths = ends.diff()
        self.lengths: list[int] = lengths.tolist()
        self.tokens: int = int(ends[-1])
        self.longest = max(self.lengths, default=0)
        first, last = (part.repeat_interleave(lengths) for part in (ends[:-1], ends[1:]))
        token = torch.arange(self.tokens, device="cpu")
        spans = torch.stack((token - first, last - 1 - token, first, last)).int()
        # One copy, whose rows begin at multiples of 16 bytes: kernels read them by so many.
        spans = send(torch.nn.functional.pad(spans, (0, -self.tokens % 4)), cu_seqlens.device)
        self.before, self.after, self.first, self.last = spans[:, : self.tokens]

    @classmethod
    def _made(
        cls,
        lengths: Tensor,
        device: torch.device,
        starts: Tensor | None = None,
        padded_shape: tuple[int, int] | None = None,
    ) -> Packing:
        """The packing of lengths (N,), which in rows of a padded batch begin at starts (N,): int64, on the host."""
        ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        indices = None
        if starts is not None and padded_shape is not None:
            # A token's place in the padded batch is that in the packed one, and by so much further on as its row is.
            further = torch.arange(len(lengths), device="cpu") * padded_shape[1] + starts - ends[:-1]
            indices = torch.arange(int(ends[-1]), device="cpu") + further.repeat_interleave(lengths)
            indices = send(indices, device)
        packing = cls.__new__(cls)
        packing._fill(send(ends, device), ends, indices, padded_shape)
        return packing

    @classmethod
    def from_lengths(
        cls,
        lengths: Sequence[int] | Tensor,
        *,
        padded_shape: tuple[int, int] | None = None,
        side: str = "right",
        device: torch.device | str | None = None,
    ) -> Packing:
        """The packing of sequences of these lengths, (N,) ints of at least 0, one after the other.

        padded_shape: the (B, S) of a padded batch with these sequences in its rows, for `pack`, `unpack` and, in the
            place of an attention_mask, models without padding
        side: where the padding of that batch stands, "right" or "left"
        device: of the packing's tensors; None: that of the lengths, or the CPU

        Lengths on the host go to the device without waiting for it; those on a device are looked at once.

        Raises:
            TypeError: lengths that are no integers.
            ValueError: another shape, or a negative length; lengths that disagree with padded_shape; another side.
        """
        given = lengths if isinstance(lengths, Tensor) else torch.as_tensor(lengths, device="cpu")
        if given.numel() and (given.is_floating_point() or given.dtype == torch.bool or given.is_complex()):
            raise TypeError(f"lengths must be integers, got {given.dtype}")
        device = given.device if device is None else torch.device(device)
        given = given.long().cpu()  # the one look at the device
        if given.dim() != 1 or (given.numel() and int(given.min()) < 0):
            raise ValueError(f"lengths must be (N,) integers of at least 0, got {given.tolist()}")
        if side not in ("right", "left"):
            raise ValueError(f'side must be "right" or "left", got {side!r}')
        if padded_shape is None:
            if side != "right":
                raise ValueError(f"side {side!r} needs padded_shape, got None")
            return cls._made(given, device)
        B, S = padded_shape
        if len(given) != B or (B and int(given.max()) > S):
            raise ValueError(f"lengths must be B of at most S for padded_shape (B, S) = {(B, S)}, got {given.tolist()}")
        return cls._made(given, device, torch.zeros_like(given) if side == "right" else S - given, (B, S))

    @classmethod
    def from_mask(cls, mask: Tensor) -> Packing:
        """The packing of a padded batch: mask (B, S), 1 for tokens, 0 for padding, which may stand on either side.

        A mask on a device is copied to the host, which is the one wait for the device.

        Raises:
            TypeError: a mask that is no tensor.
            ValueError: another shape, other values, or padding between the tokens of a row.
        """
        if not isinstance(mask, Tensor):
            raise TypeError(f"mask must be a torch.Tensor, got {type(mask).__name__}")
        if mask.dim() != 2:
            raise ValueError(f"mask must have shape (B, S), got {tuple(mask.shape)}")
        given = mask.cpu()
        tokens = given != 0
        if given.dtype != torch.bool and not bool(((given == 1) | ~tokens).all()):
            raise ValueError("mask must have values 1 and 0 only, got others")
        begins = tokens & ~torch.nn.functional.pad(tokens, (1, 0))[:, :-1]
        torn = begins.sum(1) > 1
        if bool(torn.any()):
            rows = torn.nonzero().flatten().tolist()
            raise ValueError(f"the tokens of a row must stand together, got padding between them in rows {rows}")
        B, S = mask.shape
        # Without places there is none to begin at.
        starts = begins.int().argmax(1) if S else tokens.sum(1)
        return cls._made(tokens.sum(1), mask.device, starts, (B, S))

    def pack(self, x: Tensor) -> Tensor:
        """(B, S, ...) -> (T, ...), for a packing with a padded_shape.

        Raises:
            ValueError: a packing that was made otherwise; another shape or device.
        """
        B, S = self._padded()
        if tuple(x.shape[:2]) != (B, S):
            raise ValueError(f"x must have shape (B, S, ...) = {(B, S, '...')}, got {tuple(x.shape)}")
        if x.device != self.cu_seqlens.device:
            raise ValueError(f"packing is on {self.cu_seqlens.device} but x is on {x.device}; make it there")
        return x.flatten(0, 1).index_select(0, self.indices)  # type: ignore[arg-type]

    def unpack(self, x: Tensor) -> Tensor:
        """(T, ...) -> (B, S, ...), zeros where padding is, for a packing with a padded_shape.

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
            raise ValueError(
                "this packing has no padded batch: make it with Packing.from_mask, or from_lengths with padded_shape"
            )
        return self.padded_shape


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor, of the host, on a device, which isn't waited for."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


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
