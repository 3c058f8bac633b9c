"""Cases of masked_attention: full batches, batches with padding, packed batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastconv import Packing
from fastconv.bench.case import BenchCase, Op, Tensors
from fastconv.ops import masked_attention
from fastconv.reference.ops import masked_attention as reference_masked_attention

# How much of a padded row is tokens: 60 % on average.
_FILLED = (1.0, 0.85, 0.75, 0.7, 0.6, 0.45, 0.3, 0.15)

_BACKENDS = {
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
}


@dataclass(frozen=True)
class MaskedAttentionCase(BenchCase):
    """Self-attention of (batch, length, heads, size).

    kind: "dense", "lengths" (40 % of a batch is padding) or "packing" (the same without the padding)
    """

    kind: str
    batch: int
    length: int
    heads: int
    size: int
    dtype: torch.dtype
    direction: str

    @property
    def roundings(self) -> int:  # type: ignore[override]
        # In fp32 PyTorch's CPU exponentials are right to 20 ulp (pytorch #115151), and its backward takes the
        # probabilities from the rounded logsumexp of the scores: as in tests/test_masked_attention.py.
        return 20 if self.dtype == torch.float32 else 1

    @property
    def name(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"masked_attention {self.kind} {self.direction} {self.batch}x{self.length}x{self.heads}x{self.size} {dtype}"
        )

    @property
    def targets(self) -> dict[str, float]:
        if self.batch * self.length < 4096 or self.size != 64 or self.dtype.itemsize > 2:
            return {}
        if self.kind == "lengths":
            return {"SDPA": 1.5}
        if self.kind == "packing":
            return {"varlen_attn": 1.0}
        if self.direction == "bwd":
            return {"SDPA flash": 1.2, "SDPA cuDNN": 0.9}
        return dict.fromkeys(_BACKENDS, 1.0)

    @cached_property
    def _lengths(self) -> list[int]:
        """Tokens of each row."""
        if self.kind == "dense":
            return [self.length] * self.batch
        return [max(1, round(self.length * _FILLED[row % len(_FILLED)])) for row in range(self.batch)]

    @property
    def _queries(self) -> int:
        return sum(self._lengths) if self.kind == "packing" else self.batch * self.length

    def bytes(self) -> int:
        row = self.heads * self.size * self.dtype.itemsize
        queries, keys = self._queries * row, sum(self._lengths) * row
        stats = 2 * self._queries * self.heads * 4  # the largest score and the sum of a query
        if self.direction == "bwd":
            read = 3 * queries + 2 * keys + stats  # q, y, dy; k, v; what the forward saved
            return read + queries + 2 * keys  # write dq; dk, dv
        return 2 * queries + 2 * keys + (stats if self.direction == "fwd" else 0)  # read q, k, v, write y

    def flops(self) -> int:
        queries = self._lengths if self.kind == "packing" else [self.length] * self.batch
        pairs = sum(q * k for q, k in zip(queries, self._lengths, strict=True))
        products = 5 if self.direction == "bwd" else 2  # scores again, dP, dq, dk and dv; scores and y
        return 2 * products * pairs * self.heads * self.size

    def tensors(self, normal: Callable[..., torch.Tensor]) -> Tensors:
        lead = (self._queries,) if self.kind == "packing" else (self.batch, self.length)
        return {name: normal(*lead, self.heads, self.size) for name in "qkv"}

    def _options(self, device: torch.device) -> dict:
        if self.kind == "lengths":
            return {"lengths": torch.tensor(self._lengths, dtype=torch.int32, device=device)}
        return {"packing": Packing.from_lengths(self._lengths, device=device)} if self.kind == "packing" else {}

    @cached_property
    def _made(self) -> dict[torch.device, dict]:
        return {}

    def op(self, **tensors: torch.Tensor) -> torch.Tensor:
        # Made once: what says where the padding is, is not what is timed.
        device = tensors["q"].device
        return masked_attention(**tensors, **self._made.setdefault(device, self._options(device)))

    def reference(self, **tensors: torch.Tensor) -> torch.Tensor:
        return reference_masked_attention(**tensors, **self._options(tensors["q"].device))

    def rivals(self, device: torch.device) -> dict[str, Op]:
        if self.kind == "packing":
            return self._packed_rivals(device)
        keep = torch.arange(self.length, device=device) < torch.tensor(self._lengths, device=device)[:, None]
        mask = None if self.kind == "dense" else keep[:, None, None]

        def eager(q, k, v):
            # As transformers computes it where it has no fused attention.
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            scores = torch.matmul(q, k.transpose(2, 3)) * self.size**-0.5
            if mask is not None:
                scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
            return torch.matmul(scores.softmax(-1), v).transpose(1, 2).contiguous()

        def sdpa(q, k, v):
            return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), mask).transpose(1, 2)

        found: dict[str, Op] = {"HF": eager, "SDPA": sdpa}
        if device.type == "cuda" and mask is None:
            found |= {name: sdpa_kernel(backend)(sdpa) for name, backend in _BACKENDS.items() if self._runs(backend)}
        if device.type == "cuda" and mask is not None:
            found["FlexAttention"] = self._flex(device)
        return found

    def _runs(self, backend: SDPBackend) -> bool:
        return self.dtype.itemsize == 2 or backend == SDPBackend.EFFICIENT_ATTENTION

    def _flex(self, device: torch.device) -> Op:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        lengths = torch.tensor(self._lengths, device=device)
        mask = create_block_mask(
            lambda b, h, i, j: j < lengths[b], self.batch, None, self.length, self.length, device=str(device)
        )
        compiled = torch.compile(flex_attention, dynamic=False)
        return lambda q, k, v: compiled(*(t.transpose(1, 2) for t in (q, k, v)), block_mask=mask).transpose(1, 2)

    def _packed_rivals(self, device: torch.device) -> dict[str, Op]:
        def each(q, k, v):
            parts = zip(*(t.split(self._lengths) for t in (q, k, v)), strict=True)
            rows = [F.scaled_dot_product_attention(*(t.transpose(0, 1)[None] for t in part))[0] for part in parts]
            return torch.cat(rows, 1).transpose(0, 1)

        found: dict[str, Op] = {"SDPA of each": each}
        if device.type == "cuda" and self.dtype.itemsize == 2:
            from torch.nn.attention.varlen import varlen_attn

            ends = Packing.from_lengths(self._lengths, device=device).cu_seqlens.int()
            longest = max(self._lengths)
            found["varlen_attn"] = lambda q, k, v: varlen_attn(q, k, v, ends, ends, longest, longest)
        return found


def cases(device: torch.device, *, quick: bool = False) -> list[BenchCase]:
    """BERT base, ConvBERT base and medium-small with its heads of 48; on a GPU long sequences too."""
    half, single = torch.bfloat16, torch.float32
    kinds = ("dense", "lengths", "packing")
    if quick:
        shapes = [(kind, 2, 64, 2, 48, single) for kind in kinds]
    elif device.type == "cuda":
        shapes = [(kind, 32, 512, 12, 64, half) for kind in kinds]
        shapes += [(kind, 8, 512, 6, 64, half) for kind in kinds] + [("dense", 1, 128, 12, 64, half)]
        shapes += [("dense", 32, 512, 4, 48, half), ("lengths", 4, 4096, 12, 64, half)]
        shapes += [("dense", 32, 512, 12, 64, torch.float16), ("dense", 8, 512, 12, 64, single)]
    else:
        shapes = [(kind, 8, 512, 12, 64, single) for kind in kinds]
    return [MaskedAttentionCase(*shape, direction) for shape in shapes for direction in ("infer", "fwd", "bwd")]
