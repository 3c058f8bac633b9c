"""Cases of masked_attention: full batches, batches with padding, packed batches."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastconv.bench import shapes
from fastconv.bench.case import BenchCase, Op, Tensors
from fastconv.bench.op_case import OpCase
from fastconv.bench.shapes import Place, Point
from fastconv.ops import masked_attention
from fastconv.reference.ops import masked_attention as reference_masked_attention

_BACKENDS = {
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
}

# The padding that the targets are for is 40 %, within this.
_ABOUT = 0.05


@dataclass(frozen=True)
class MaskedAttentionCase(OpCase):
    """Self-attention of (batch, length, heads, size).

    kind: "dense"; of text "lengths", with the padding, or "packing", without
    """

    kind: str
    heads: int
    size: int

    title = "masked_attention"

    @property
    def roundings(self) -> int:  # type: ignore[override]
        # In fp32 PyTorch's CPU exponentials are right to 20 ulp (pytorch #115151), and its backward takes the
        # probabilities from the rounded logsumexp of the scores: as in tests/test_masked_attention.py.
        return 20 if self.dtype == torch.float32 else 1

    @property
    def variant(self) -> str:  # type: ignore[override]
        return "" if self.kind == "dense" else f"{self.kind} of "

    @property
    def shape(self) -> str:
        return f"{self.heads}x{self.size}"

    @property
    def targets(self) -> dict[str, float]:
        place = self.place
        if place.size < 4096 or place.length < 512 or self.size != 64 or self.dtype.itemsize > 2:
            return {}
        if self.direction == "step":
            return {}
        if self.kind == "dense":
            return {"SDPA flash": 1.2, "SDPA cuDNN": 0.9} if self.direction == "bwd" else dict.fromkeys(_BACKENDS, 1.0)
        if place.padding < 0.4 - _ABOUT:
            return {}
        return {"SDPA": 1.5} if self.kind == "lengths" else {"varlen_attn": 1.0}

    @property
    def _packed(self) -> bool:
        return self.kind == "packing"

    @property
    def _queries(self) -> int:
        return self.place.tokens if self._packed else self.place.size

    def bytes_of(self, direction: str) -> int:
        row = self.heads * self.size * self.dtype.itemsize
        # What stands in the padding of k and v nobody has to read; queries and gradients there are as any other.
        queries, keys = self._queries * row, self.place.tokens * row
        stats = 2 * self._queries * self.heads * 4  # the largest score and the sum of a query
        if direction == "bwd":
            read = 3 * queries + 2 * keys + stats  # q, y, dy; k, v; what the forward saved
            return read + 3 * queries  # write dq, dk, dv
        return 2 * queries + 2 * keys + (stats if direction == "fwd" else 0)  # read q, k, v, write y

    def flops_of(self, direction: str) -> int:
        place = self.place
        pairs = sum(keys * (keys if self._packed else place.length) for keys in place.rows)
        products = 5 if direction == "bwd" else 2  # scores again, dP, dq, dk and dv; scores and y
        return 2 * products * pairs * self.heads * self.size

    def tensors(self, normal: Callable[..., torch.Tensor]) -> Tensors:
        lead = (self._queries,) if self._packed else (self.place.batch, self.place.length)
        return {name: normal(*lead, self.heads, self.size) for name in "qkv"}

    def _options(self, device: torch.device) -> dict:
        if self.kind == "lengths":
            return {"lengths": shapes.lengths(self.place.rows, device)}
        return {"packing": shapes.packing(self.place.rows, device)} if self._packed else {}

    def op(self, **tensors: Any) -> torch.Tensor:
        return masked_attention(**tensors, **self._options(tensors["q"].device))

    def reference(self, **tensors: Any) -> torch.Tensor:
        return reference_masked_attention(**tensors, **self._options(tensors["q"].device))

    def rivals(self, device: torch.device) -> dict[str, Op]:
        half_on_gpu = device.type == "cuda" and self.dtype.itemsize == 2
        if self._packed:
            return {"SDPA of each": self._sdpa_of_each} | (self._packed_rivals() if half_on_gpu else {})
        found: dict[str, Op] = {"HF": self._hf, "SDPA": self._sdpa}
        if device.type == "cuda":
            if self.kind == "dense":
                fitting = _BACKENDS if half_on_gpu else ["SDPA efficient"]
                found |= {name: sdpa_kernel(_BACKENDS[name])(self._sdpa) for name in fitting}
            else:
                found["FlexAttention"] = self._flex
        if half_on_gpu and self.kind == "dense" and importlib.util.find_spec("flash_attn") is not None:
            found["flash-attn"] = self._flash_attn
        return found

    def _mask(self, device: torch.device) -> torch.Tensor | None:
        return None if self.kind == "dense" else _key_mask(self.place, device)

    def _hf(self, q, k, v):
        # As transformers computes it where it has no fused attention.
        mask = self._mask(q.device)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        scores = torch.matmul(q, k.transpose(2, 3)) * self.size**-0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        return torch.matmul(scores.softmax(-1), v).transpose(1, 2).contiguous()

    def _sdpa(self, q, k, v):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, self._mask(q.device)).transpose(1, 2)

    def _flex(self, q, k, v):
        compiled, mask = _flex_attention(self.place, q.device)
        return compiled(*(t.transpose(1, 2) for t in (q, k, v)), block_mask=mask).transpose(1, 2)

    def _flash_attn(self, q, k, v):
        from flash_attn import flash_attn_func

        return flash_attn_func(q, k, v)

    def _sdpa_of_each(self, q, k, v):
        parts = zip(*(t.split(list(self.place.rows)) for t in (q, k, v)), strict=True)
        rows = [F.scaled_dot_product_attention(*(t.transpose(0, 1)[None] for t in part))[0] for part in parts]
        return torch.cat(rows, 1).transpose(0, 1)

    def _packed_rivals(self) -> dict[str, Op]:
        longest, found = max(self.place.rows), {}

        def ends(x: torch.Tensor) -> torch.Tensor:
            return _ends(self.place, x.device)

        if importlib.util.find_spec("torch.nn.attention.varlen") is not None:

            def varlen(q, k, v):
                from torch.nn.attention.varlen import varlen_attn

                return varlen_attn(q, k, v, ends(q), ends(q), longest, longest)

            found["varlen_attn"] = varlen
        if importlib.util.find_spec("flash_attn") is not None:

            def flash_attn(q, k, v):
                from flash_attn import flash_attn_varlen_func

                return flash_attn_varlen_func(q, k, v, ends(q), ends(q), longest, longest)

            found["flash-attn"] = flash_attn
        return found


# Made once for all cases of a batch, as shapes.packing.


@functools.lru_cache(maxsize=4)
def _key_mask(place: Place, device: torch.device) -> torch.Tensor:
    """(B, 1, 1, S) bool."""
    return (torch.arange(place.length, device=device) < shapes.lengths(place.rows, device)[:, None])[:, None, None]


@functools.lru_cache(maxsize=4)
def _ends(place: Place, device: torch.device) -> torch.Tensor:
    return shapes.packing(place.rows, device).cu_seqlens.int()


@functools.lru_cache(maxsize=4)
def _flex_attention(place: Place, device: torch.device):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    lengths = shapes.lengths(place.rows, device)
    mask = create_block_mask(
        lambda b, h, i, j: j < lengths[b], place.batch, None, place.length, place.length, device=str(device)
    )
    # What was compiled for other batches counts against the limit of recompilations, past which it runs eagerly.
    torch.compiler.reset()
    return torch.compile(flex_attention, dynamic=False), mask


def at(point: Point) -> list[BenchCase]:
    """The heads that attend."""
    kinds = ("dense",) if point.place.lengths == "full" else ("lengths", "packing")
    sizes = shapes.attention_heads(shapes.config(point.place.model))
    return [
        MaskedAttentionCase(point.place, point.dtype, way, kind, *sizes) for kind in kinds for way in point.directions
    ]


def quick(places: list[Place]) -> list[BenchCase]:
    """Tiny ones of every kind, with heads of 48 channels."""
    full, text = places
    kinds = [(full, "dense"), (text, "lengths"), (text, "packing")]
    return [
        MaskedAttentionCase(place, torch.float32, way, kind, 2, 48)
        for place, kind in kinds
        for way in ("infer", "fwd", "bwd")
    ]
