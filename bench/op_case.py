"""What the cases of all ops share: an op on a batch of a model, with its counts by pass."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch

from fastconv.bench.case import BenchCase, Run, Subject
from fastconv.bench.shapes import Place


@dataclass(frozen=True)
class OpCase(BenchCase):
    """An op on a batch of a model; what it is of, its name says: two models may ask the same of an op."""

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
