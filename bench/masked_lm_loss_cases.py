"""Cases of masked_lm_loss: the layer to the vocabulary and the loss, with 15 % of the tokens labelled."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fastconv.bench.case import BenchCase, Op, Tensors
from fastconv.ops import masked_lm_loss
from fastconv.reference.ops import masked_lm_loss as reference_masked_lm_loss


@functools.cache
def _labels(tokens: int, vocabulary: int, device: torch.device) -> torch.Tensor:
    """Labels of 15 % of the tokens, drawn once."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.full((tokens,), -100)
    chosen = torch.randperm(tokens, generator=generator)[: round(0.15 * tokens)]
    labels[chosen] = torch.randint(vocabulary, (len(chosen),), generator=generator)
    return labels.to(device)


@dataclass(frozen=True)
class MaskedLMLossCase(BenchCase):
    """The loss of hidden states (tokens, channels), in their dtype as a model returns it."""

    tokens: int
    channels: int
    vocabulary: int
    dtype: torch.dtype
    direction: str
    faster: float  # than HF, at least
    smaller: float  # than HF in memory, at least
    whole = True

    @property
    def name(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"masked_lm_loss {self.direction} {self.tokens}x{self.channels}x{self.vocabulary} {dtype}"

    @property
    def targets(self) -> dict[str, float]:
        return {"HF": self.faster, "HF memory": self.smaller}

    @property
    def _labelled(self) -> int:
        return round(0.15 * self.tokens)

    def bytes(self) -> int:
        size, layer = self.dtype.itemsize, self.vocabulary * (self.channels + 1)
        once = (
            8 * self.tokens  # read labels
            + self._labelled * self.channels * size  # read the labelled tokens
            + layer * size  # read weight and bias
            + size  # write the loss
        )
        if self.direction == "infer":
            return once
        # Again with dy, and write every gradient, that of the unlabelled tokens too.
        return 2 * once + (self.tokens * self.channels + layer) * size

    def flops(self) -> int:
        logits = self._labelled * self.vocabulary
        if self.direction == "infer":
            return logits * (2 * self.channels + 3)  # the bias, exp and its sum
        # The backward's two products; exp, the probability and dbias. That the logits are made again doesn't count.
        return logits * (6 * self.channels + 6)

    def tensors(self, normal: Callable[..., torch.Tensor]) -> Tensors:
        return {
            "hidden": normal(self.tokens, self.channels),
            "weight": normal(self.vocabulary, self.channels) / self.channels**0.5,
            "bias": normal(self.vocabulary),
        }

    def op(self, **t: torch.Tensor) -> torch.Tensor:
        labels = _labels(self.tokens, self.vocabulary, t["hidden"].device)
        return masked_lm_loss(t["hidden"], t["weight"], t["bias"], labels).to(t["hidden"].dtype)

    def reference(self, **t: torch.Tensor) -> torch.Tensor:
        # Of the labelled tokens alone, which is the same and takes an eighth of the memory in fp64.
        labels = _labels(self.tokens, self.vocabulary, t["hidden"].device)
        kept = labels != -100
        loss = reference_masked_lm_loss(t["hidden"][kept], t["weight"], t["bias"], labels[kept])
        return loss.to(t["hidden"].dtype)

    def rivals(self, device: torch.device) -> dict[str, Op]:
        labels = _labels(self.tokens, self.vocabulary, device)

        def head(hidden, weight, bias):
            # As the models of transformers: all tokens' logits, then CrossEntropyLoss.
            return F.cross_entropy(F.linear(hidden, weight, bias), labels)

        return {"HF": head}


def cases(device: torch.device, *, quick: bool = False) -> list[BenchCase]:
    """Base's vocabulary: 8 sequences of 512, and on a GPU 64."""
    half, single = torch.bfloat16, torch.float32
    ways = ("infer", "step")
    if quick:
        return [MaskedLMLossCase(64, 32, 200, single, way, 4.0, 5.0) for way in ways]
    if device.type == "cuda":
        sizes = [(4096, half), (32768, half), (4096, single)]
        return [MaskedLMLossCase(tokens, 768, 30522, dt, way, 5.0, 6.0) for tokens, dt in sizes for way in ways]
    return [MaskedLMLossCase(4096, 768, 30522, dt, way, 4.0, 5.0) for dt in (single, half) for way in ways]
