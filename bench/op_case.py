"""What the cases of all ops share: an op on a batch of a model, with its counts by pass."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.utils.rnn import pad_sequence

from fastconv.bench.case import BenchCase, Op, Run, Subject, Tensors
from fastconv.bench.shapes import Place


@dataclass(frozen=True)
class OpCase(BenchCase):
    """An op on a batch of a model; what it is of, its name says: two models may ask the same of an op.

    Of text an op that knows no neighbours gets the tokens alone. So do its rivals, which is in their favour: in
    transformers the padding goes through them too.
    """

    place: Place
    dtype: torch.dtype
    direction: str

    title = ""  # the op's name
    variant = ""  # what is said before it: what else is fused into it

    @property
    def name(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.variant}{self.title} {self.direction} {self.place} {self.shape} {dtype}"

    @property
    @abstractmethod
    def shape(self) -> str:
        """The sizes beside those of the batch, in words."""

    @property
    def subject(self) -> Subject:
        place = self.place
        return Subject(self.title, place.model, place.batch, place.length, place.tokens, place.lengths)

    @property
    def training(self) -> bool:
        """Whether gradients are taken, and values dropped."""
        return self.direction != "infer"

    def bytes(self) -> int:
        """Of each pass: what it reads that was there before, and what it writes that is there after, each byte once.

        What a forward keeps for its backward is written by the one and read by the other. What a pass makes and gives
        up again (partial sums, values between two kernels) doesn't count: another implementation may do without.
        """
        return sum(self.bytes_of(each) for each in self._passes)

    def flops(self) -> int:
        return sum(self.flops_of(each) for each in self._passes)

    @property
    def _passes(self) -> tuple[str, ...]:
        return ("fwd", "bwd") if self.direction == "step" else (self.direction,)

    @abstractmethod
    def bytes_of(self, direction: str) -> int:
        """Bytes of one pass, "infer", "fwd" or "bwd"."""

    @abstractmethod
    def flops_of(self, direction: str) -> int:
        """Operations of one pass."""

    def runs(self, device: torch.device, *, compiled: bool) -> dict[str, Run]:
        return super().runs(device, compiled=compiled and self.place.compiled)


class ConvolutionCase(OpCase):
    """An op whose windows end where a sequence does: on a full batch, (B, S, ...), or on text packed, (T, ...).

    Of text "HF" has what transformers has, the padded batch. Its padding is zeros here, so that the result is the same;
    in a model it isn't. "HF of each" runs one sequence after the other: how to get without this library what a model
    without padding computes.
    """

    of_tokens: ClassVar[tuple[str, ...]]  # names of the tensors with a row for each token

    @abstractmethod
    def hf(self, **tensors: torch.Tensor) -> torch.Tensor:
        """As ConvBertSelfAttention of transformers computes it, of (B, S, ...)."""

    def rivals(self, device: torch.device) -> dict[str, Op]:
        return {"HF": self.hf} if self.place.lengths == "full" else {"HF": self.hf, "HF of each": self._hf_of_each}

    def given(self, label: str, tensors: Tensors, dy: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        if self.place.lengths == "full" or label != "HF":
            return tensors, dy
        rows = list(self.place.rows)  # the longest fills the batch's length

        def padded(t: torch.Tensor) -> torch.Tensor:
            return pad_sequence(t.split(rows), batch_first=True)

        return tensors | {name: padded(tensors[name]) for name in self.of_tokens}, padded(dy)

    def _hf_of_each(self, **tensors: torch.Tensor) -> torch.Tensor:
        rows = list(self.place.rows)
        parts = zip(*(tensors[name].split(rows) for name in self.of_tokens), strict=True)
        alone = ({name: t[None] for name, t in zip(self.of_tokens, part, strict=True)} for part in parts)
        return torch.cat([self.hf(**tensors | each)[0] for each in alone])
