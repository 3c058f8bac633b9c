"""Cases of embedding_norm: words, positions and token types of a batch, with and without its padding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F

from fastconv import Packing
from fastconv.bench.case import BenchCase, Op, Tensors, ends
from fastconv.ops import embedding_norm
from fastconv.reference.ops import embedding_norm as reference_embedding_norm
from fastconv.tolerance import Comparison, compare

_POSITIONS, _TYPES, _PADDING = 512, 2, 0


@dataclass(frozen=True)
class EmbeddingNormCase(BenchCase):
    """embedding_norm of (batch, length) ids of a vocabulary, with dropout in training.

    packing: the sequences stand one after the other, and 40 % of the padded batch would be padding
    """

    batch: int
    length: int
    channels: int
    vocabulary: int
    dtype: torch.dtype
    direction: str
    packing: bool = False

    @property
    def name(self) -> str:
        dtype, kind = str(self.dtype).removeprefix("torch."), "packed " if self.packing else ""
        return f"{kind}embedding_norm {self.direction} {self.batch}x{self.length}x{self.channels} {dtype}"

    @property
    def dropout_p(self) -> float:
        return 0.0 if self.direction == "infer" else 0.1

    @cached_property
    def _lengths(self) -> list[int]:
        # 0.2 to 1 of the length, 0.6 on average.
        return [max(1, self.length * (2 + 8 * row // max(1, self.batch - 1)) // 10) for row in range(self.batch)]

    @property
    def _tokens(self) -> int:
        return sum(self._lengths) if self.packing else self.batch * self.length

    @cached_property
    def _words(self) -> torch.Tensor:
        """(T,) ids. As in text few words make up most of it: the first is every fifteenth token."""
        generator = torch.Generator().manual_seed(0)
        rank = torch.rand(self._tokens, generator=generator, dtype=torch.float64)
        return (self.vocabulary**rank - 1).long().clamp(0, self.vocabulary - 1)

    @cached_property
    def _made(self) -> dict[torch.device, dict]:
        return {}

    def _given(self, device: torch.device) -> dict:
        """ids, and the packing if there is one: made once, since they are not what is timed."""
        if device not in self._made:
            words = self._words.to(device)
            if self.packing:
                packing = Packing.from_lengths(self._lengths, device=device)
                self._made[device] = {"ids": [words, None, torch.zeros_like(words)], "packing": packing}
            else:
                types = torch.zeros(1, self.length, dtype=torch.int64, device=device)
                self._made[device] = {"ids": [words.view(self.batch, self.length), None, types]}
        return self._made[device]

    def _gathered(self) -> int:
        """Bytes of the rows that are read or whose gradient is written, each once."""
        rows = self._words.unique().numel() + self.length + 1  # of words, positions and the one type
        return rows * self.channels * self.dtype.itemsize

    def bytes(self) -> int:
        size = self.dtype.itemsize
        tensor, vector, stats = self._tokens * self.channels * size, self.channels * size, self._tokens * 4
        ids = self._tokens * 8  # of words; the others are a sequence's or a computed place
        if self.direction == "bwd":
            tables = (self.vocabulary + _POSITIONS + _TYPES) * vector
            return (
                2 * tensor  # read dy and z
                + 2 * stats  # read mean and rstd
                + vector  # read weight
                + 2 * vector  # write the gradients of weight and bias
                + ids
                + tables  # write the tables' gradients, which are dense
            )  # dz, sorted ids and partial sums are the kernels' own affair
        training = self.direction == "fwd"
        return (
            ids
            + self._gathered()  # read the tables
            + 2 * vector  # read weight and bias
            + tensor  # write y
            + (tensor + 2 * stats if training else 0)  # write z, mean and rstd for the backward
        )

    def flops(self) -> int:
        if self.direction == "bwd":
            # scale of the dropout, xhat 2, sums of dy and dy * xhat 3, g 1, its sums 3, dz 4, sums of three tables 3
            return self._tokens * self.channels * 17
        # two additions, mean 1, deviation 1, squares 2, normalization 3, dropout 1
        return self._tokens * self.channels * (10 if self.dropout_p else 9)

    def tensors(self, normal: Callable[..., torch.Tensor]) -> Tensors:
        rows = {"words": self.vocabulary, "positions": _POSITIONS, "types": _TYPES}
        tables = {name: normal(number, self.channels) for name, number in rows.items()}
        return {**tables, "weight": normal(self.channels), "bias": normal(self.channels)}

    def op(self, words, positions, types, weight, bias) -> torch.Tensor:
        seed = torch.ones((), dtype=torch.int64, device=weight.device) if self.dropout_p else None
        return embedding_norm(
            tables=[words, positions, types],
            weight=weight,
            bias=bias,
            padding_idx=[_PADDING, None, None],
            dropout_p=self.dropout_p,
            seed=seed,
            **self._given(weight.device),
        )

    def reference(self, words, positions, types, weight, bias, **dropout) -> torch.Tensor:
        return reference_embedding_norm(
            tables=[words, positions, types],
            weight=weight,
            bias=bias,
            padding_idx=[_PADDING, None, None],
            **dropout,
            **self._given(weight.device),
        )

    def parity(self, device: torch.device) -> dict[str, Comparison]:
        tensors, dy = self.inputs(device)
        out = self.with_gradients(self.op, tensors, dy)
        # What was dropped is 0; elsewhere 0 is as good as impossible.
        dropout = {"dropout_p": self.dropout_p, "dropout_mask": out["y"] != 0} if self.dropout_p else {}

        def reference(**t):
            return self.reference(**t, **dropout)

        own = self.with_gradients(reference, tensors, dy)
        truth = self.with_gradients(reference, {k: t.double() for k, t in tensors.items()}, dy.double())
        return {k: compare(ends(out[k]), ends(own[k]), ends(truth[k])) for k in out}

    def rivals(self, device: torch.device) -> dict[str, Op]:
        given = self._given(device)
        ids, _, kinds = given["ids"]
        places = given["packing"].before if self.packing else torch.arange(self.length, device=device)[None]

        def eager(words, positions, types, weight, bias):
            # As transformers computes it.
            z = F.embedding(ids, words, _PADDING) + F.embedding(kinds, types)
            z = F.layer_norm(z + F.embedding(places, positions), z.shape[-1:], weight, bias, 1e-12)
            return F.dropout(z, self.dropout_p)

        return {"HF": eager}


def cases(device: torch.device, *, quick: bool = False) -> list[BenchCase]:
    """Every case for a device: ConvBERT's and BERT's vocabulary at the sizes of base models and of one small one."""
    half, single = torch.bfloat16, torch.float32
    if quick:
        return [EmbeddingNormCase(2, 64, 128, 1000, single, direction) for direction in ("infer", "fwd", "bwd")]
    if device.type == "cuda":
        shapes = [(1, 128, 768, half), (32, 512, 768, half), (128, 512, 768, half), (32, 512, 128, half)]
        shapes += [(32, 512, 768, single)]
    else:
        shapes = [(8, 512, 768, single), (8, 512, 768, half)]
    made = [
        EmbeddingNormCase(batch, length, channels, 30522, dtype, direction)
        for batch, length, channels, dtype in shapes
        for direction in ("infer", "fwd", "bwd")
    ]
    batch, length, channels, dtype = shapes[1 if device.type == "cuda" else 0]
    return made + [
        EmbeddingNormCase(batch, length, channels, 30522, dtype, direction, packing=True)
        for direction in ("infer", "bwd")
    ]
