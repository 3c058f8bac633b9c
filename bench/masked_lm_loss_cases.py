"""Cases of masked_lm_loss: the layer to the vocabulary and the loss, with 15 % of the tokens labelled."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from fastconv.bench import shapes
from fastconv.bench.case import BenchCase, Op, Tensors
from fastconv.bench.op_case import OpCase
from fastconv.bench.shapes import Place, Point
from fastconv.ops import masked_lm_loss
from fastconv.reference.ops import masked_lm_loss as reference_masked_lm_loss


@functools.lru_cache(maxsize=4)
def labels_of(tokens: int, vocabulary: int, device: torch.device) -> torch.Tensor:
    """Labels of 15 % of the tokens, (tokens,) int64, -100 for the others."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.full((tokens,), -100)
    chosen = torch.randperm(tokens, generator=generator)[: _labelled(tokens)]
    labels[chosen] = torch.randint(vocabulary, (len(chosen),), generator=generator)
    return labels.to(device)


def _labelled(tokens: int) -> int:
    return max(1, round(0.15 * tokens))


@dataclass(frozen=True)
class MaskedLMLossCase(OpCase):
    """The loss of hidden states (tokens, channels), in their dtype as a model returns it."""

    channels: int
    vocabulary: int

    title = "masked_lm_loss"
    whole = True

    @property
    def shape(self) -> str:
        return f"{self.channels}->{self.vocabulary}"

    @property
    def targets(self) -> dict[str, float]:
        return {"HF": 5.0, "HF memory": 6.0} if self._large and self.dtype.itemsize == 2 else self.cpu_targets

    @property
    def cpu_targets(self) -> dict[str, float]:
        return {"HF": 4.0, "HF memory": 5.0} if self._large else {}

    @property
    def _large(self) -> bool:
        # A thousand labels; with few the weight's way through memory is all there is.
        return self.place.tokens >= 4096 and self.direction in ("infer", "step")

    def bytes_of(self, direction: str) -> int:
        tokens, labelled = self.place.tokens, _labelled(self.place.tokens)
        size, layer = self.dtype.itemsize, self.vocabulary * (self.channels + 1) * self.dtype.itemsize
        # For the backward: the labelled tokens, which they are, their labels, and the logsumexp of their logits.
        rows = labelled * self.channels * size
        saved = rows + 3 * labelled * 4
        if direction == "bwd":
            return (
                size  # read dy
                + saved
                + 4  # read how many they are
                + layer  # read weight and bias
                + tokens * self.channels * size  # write the gradient of hidden, of the unlabelled tokens too
                + layer  # write those of weight and bias
            )
        return (
            8 * tokens  # read labels
            + rows  # read the labelled tokens
            + layer  # read weight and bias
            + size  # write the loss
            + (saved + 4 * tokens if direction == "fwd" else 0)  # and every token's number among the labelled
        )

    def flops_of(self, direction: str) -> int:
        logits = _labelled(self.place.tokens) * self.vocabulary
        if direction == "bwd":
            # The two products; exp, the probability and dbias. That the logits are made again doesn't count.
            return logits * (4 * self.channels + 3)
        return logits * (2 * self.channels + 3)  # the bias, exp and its sum

    def tensors(self, normal: Callable[..., torch.Tensor]) -> Tensors:
        return {
            "hidden": normal(self.place.tokens, self.channels),
            "weight": normal(self.vocabulary, self.channels) / self.channels**0.5,
            "bias": normal(self.vocabulary),
        }

    def _labels(self, device: torch.device) -> torch.Tensor:
        return labels_of(self.place.tokens, self.vocabulary, device)

    def op(self, **t: Any) -> torch.Tensor:
        labels = self._labels(t["hidden"].device)
        return masked_lm_loss(t["hidden"], t["weight"], t["bias"], labels).to(t["hidden"].dtype)

    def reference(self, **t: Any) -> torch.Tensor:
        # Of the labelled tokens alone, which is the same and takes an eighth of the memory in fp64.
        labels = self._labels(t["hidden"].device)
        kept = labels != -100
        loss = reference_masked_lm_loss(t["hidden"][kept], t["weight"], t["bias"], labels[kept])
        return loss.to(t["hidden"].dtype)

    def rivals(self, device: torch.device) -> dict[str, Op]:
        def head(hidden, weight, bias):
            # As the models of transformers: all tokens' logits, then CrossEntropyLoss.
            return F.cross_entropy(F.linear(hidden, weight, bias), self._labels(device))

        found: dict[str, Op] = {"HF": head}
        if device.type == "cuda" and importlib.util.find_spec("liger_kernel") is not None:

            def liger(hidden, weight, bias):
                from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

                loss = liger_fused_linear_cross_entropy(hidden, weight, self._labels(device), bias)
                return (loss[0] if isinstance(loss, tuple) else loss).to(hidden.dtype)

            found["Liger"] = liger
        return found


def at(point: Point) -> list[BenchCase]:
    """On what the model's embeddings have channels: what comes before is another layer."""
    config = shapes.config(point.place.model)
    sizes = shapes.embedding_size(config), config.vocab_size
    return [MaskedLMLossCase(point.place, point.dtype, way, *sizes) for way in point.directions]


def quick(places: list[Place]) -> list[BenchCase]:
    """Tiny ones."""
    return [MaskedLMLossCase(places[0], torch.float32, way, 32, 200) for way in ("infer", "fwd", "bwd")]
