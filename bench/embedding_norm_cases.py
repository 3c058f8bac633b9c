"""Cases of embedding_norm: words, positions and token types of a batch, with and without its padding."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from fastconv.bench import shapes
from fastconv.bench.case import BenchCase, Op, Tensors, ends, kept_share
from fastconv.bench.op_case import OpCase
from fastconv.bench.shapes import Place, Point
from fastconv.ops import embedding_norm
from fastconv.reference import RoCBertConfig
from fastconv.reference.ops import embedding_norm as reference_embedding_norm
from fastconv.tolerance import Comparison, compare

_TYPES, _PADDING = 2, 0


@functools.lru_cache(maxsize=4)
def words(tokens: int, vocabulary: int, device: torch.device) -> torch.Tensor:
    """(tokens,) ids. As in text few words make up most of it: the first is every fifteenth token."""
    generator = torch.Generator().manual_seed(0)
    rank = torch.rand(tokens, generator=generator, dtype=torch.float64)
    return (vocabulary**rank - 1).long().clamp(0, vocabulary - 1).to(device)


@functools.lru_cache(maxsize=4)
def _ids_of_types(place: Place, device: torch.device) -> torch.Tensor:
    """As transformers' buffer, one row for all sequences of a batch; of a packed batch, one of each token."""
    shape = (1, place.length) if place.lengths == "full" else place.lead
    return torch.zeros(shape, dtype=torch.int64, device=device)


@functools.lru_cache(maxsize=4)
def _positions(length: int, device: torch.device) -> torch.Tensor:
    """(1, length), as transformers' buffer."""
    return torch.arange(length, device=device)[None]


@dataclass(frozen=True)
class EmbeddingNormCase(OpCase):
    """embedding_norm of a batch's ids of a vocabulary, with dropout in training; of text, without its padding."""

    channels: int
    vocabulary: int
    positions: int = 512

    title = "embedding_norm"

    @property
    def shape(self) -> str:
        return f"{self.vocabulary}x{self.channels}"

    @property
    def dropout_p(self) -> float:
        return 0.1 if self.training else 0.0

    def _given(self, device: torch.device) -> dict:
        """ids, and the packing if there is one."""
        ids = words(self.place.tokens, self.vocabulary, device).view(self.place.lead)
        return {"ids": [ids, None, _ids_of_types(self.place, device)], "packing": self.place.packing(device)}

    def _gathered(self) -> int:
        """Bytes of the rows that are read, each once: of words, positions and the one type."""
        rows = words(self.place.tokens, self.vocabulary, torch.device("cpu")).unique().numel()
        return (rows + max(self.place.rows) + 1) * self.channels * self.dtype.itemsize

    def bytes_of(self, direction: str) -> int:
        size, tokens = self.dtype.itemsize, self.place.tokens
        tensor, vector, stats = tokens * self.channels * size, self.channels * size, tokens * 4
        # Of words, and of types: of all tokens, or of one row of them.
        ids = 8 * (tokens + (self.place.length if self.place.lengths == "full" else tokens))
        seed = 8 if self.dropout_p else 0
        if direction == "bwd":
            tables = (self.vocabulary + self.positions + _TYPES) * vector
            return (
                2 * tensor  # read dy and z
                + 2 * stats  # read mean and rstd
                + vector  # read weight
                + seed
                + 2 * vector  # write the gradients of weight and bias
                + ids
                + tables  # write the tables' gradients, which are dense
            )  # dz, sorted ids and partial sums are the kernels' own affair
        return (
            ids
            + self._gathered()  # read the tables
            + 2 * vector  # read weight and bias
            + seed
            + tensor  # write y
            + (tensor + 2 * stats if direction == "fwd" else 0)  # write z, mean and rstd for the backward
        )

    def flops_of(self, direction: str) -> int:
        if direction == "bwd":
            # scale of the dropout, xhat 2, sums of dy and dy * xhat 3, g 1, its sums 3, dz 4, sums of three tables 3
            return self.place.tokens * self.channels * 17
        # two additions, mean 1, deviation 1, squares 2, normalization 3, dropout 1
        return self.place.tokens * self.channels * (10 if self.dropout_p else 9)

    def tensors(self, normal: Callable[..., torch.Tensor]) -> Tensors:
        rows = {"words": self.vocabulary, "positions": self.positions, "types": _TYPES}
        tables = {name: normal(number, self.channels) for name, number in rows.items()}
        return {**tables, "weight": normal(self.channels), "bias": normal(self.channels)}

    def _arguments(self, words, positions, types, weight, bias) -> dict[str, Any]:
        tables = {"tables": [words, positions, types], "padding_idx": [_PADDING, None, None]}
        return {**tables, "weight": weight, "bias": bias, **self._given(weight.device)}

    def op(self, **tensors: Any) -> torch.Tensor:
        seed = shapes.seed(tensors["weight"].device) if self.dropout_p else None
        return embedding_norm(**self._arguments(**tensors), dropout_p=self.dropout_p, seed=seed)

    def reference(self, **tensors: Any) -> torch.Tensor:
        return reference_embedding_norm(**self._arguments(**tensors))

    def parity(self, device: torch.device) -> dict[str, Comparison]:
        tensors, dy = self.inputs(device)
        out = self.with_gradients(self.op, tensors, dy)
        # What was dropped is 0; elsewhere 0 is as good as impossible.
        dropout: dict[str, Any] = {}
        found: dict[str, Comparison] = {}
        if self.dropout_p:
            dropout = {"dropout_p": self.dropout_p, "dropout_mask": out["y"] != 0}
            found["kept"] = kept_share(dropout["dropout_mask"], self.dropout_p)

        def reference(**t: Any) -> torch.Tensor:
            return reference_embedding_norm(**self._arguments(**t), **dropout)

        own = self.with_gradients(reference, tensors, dy)
        truth = self.with_gradients(reference, {k: t.double() for k, t in tensors.items()}, dy.double())
        return found | {k: compare(ends(out[k]), ends(own[k]), ends(truth[k])) for k in out}

    def rivals(self, device: torch.device) -> dict[str, Op]:
        def eager(words, positions, types, weight, bias):
            # As transformers computes it.
            given = self._given(weight.device)
            ids, _, kinds = given["ids"]
            packing = given["packing"]
            places = packing.before if packing is not None else _positions(self.place.length, weight.device)
            z = F.embedding(ids, words, _PADDING) + F.embedding(kinds, types)
            z = F.layer_norm(z + F.embedding(places, positions), z.shape[-1:], weight, bias, 1e-12)
            return F.dropout(z, self.dropout_p)

        return {"HF": eager}


def at(point: Point) -> list[BenchCase]:
    """BERT's and ConvBERT's: RoCBert projects what it has looked up before it adds positions and types."""
    config = shapes.config(point.place.model)
    if isinstance(config, RoCBertConfig):
        return []
    sizes = shapes.embedding_size(config), config.vocab_size, config.max_position_embeddings
    return [EmbeddingNormCase(point.place, point.dtype, way, *sizes) for way in point.directions]


def quick(places: list[Place]) -> list[BenchCase]:
    """Tiny ones."""
    full, text = places
    kinds = [(full, "infer"), (full, "fwd"), (full, "bwd"), (text, "infer"), (text, "bwd")]
    return [EmbeddingNormCase(place, torch.float32, way, 128, 100, 16) for place, way in kinds]
