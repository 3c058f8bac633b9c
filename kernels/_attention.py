"""What the kernels of masked_attention share: masks, the keys that a block of queries sees, launch configs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from . import MAX_FP32_HEAD_SIZE, _launch
from ._configs import Card, matrix_problem, tuned
from .grouped_linear import precision

LOG2E = tl.constexpr(1.4426950408889634)
INT32_MAX = tl.constexpr(2**31 - 1)
_SCAN = tl.constexpr(1024)

# How a mask says which keys are forbidden.
NO_MASK, BOOL_MASK, ADDITIVE_MASK = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def head_tile(
    ptr, offs_t, end, stride_t, D: tl.constexpr, BLOCK_D: tl.constexpr, CHECK: tl.constexpr, CAST: tl.constexpr
):
    """Rows offs_t (n,) of a head, (n, BLOCK_D), 0 past D; with CHECK row end - 1 in place of later ones.

    CAST: to that dtype.
    """
    offs_d = tl.arange(0, BLOCK_D)
    if CHECK:
        # Not 0: a condition for each row, which is the same when results are stored, took registers throughout.
        offs_t = tl.minimum(offs_t, end - 1)
    rows = ptr + offs_t.to(tl.int64)[:, None] * stride_t + offs_d[None, :]
    x = tl.load(rows, mask=(offs_d < D)[None, :], other=0.0) if D < BLOCK_D else tl.load(rows)
    return x if CAST is None else x.to(CAST)


@triton.jit
def mask_tile(
    mask_ptr,  # (Sq, Sk) of this head
    i,  # queries, int32, along their dimension of the tile
    j,  # keys
    stride_mq,
    stride_mk,
    end_q,
    Sk,
    MASK: tl.constexpr,
    KEY_MASK: tl.constexpr,
    CHECK: tl.constexpr,
):
    """What the mask says of queries i and keys j, with KEY_MASK of keys alone; query end_q - 1 in place of later ones.

    CHECK: some keys may be Sk or later, of which it says 0. To be called ahead of the product that makes the scores:
    Triton gives what comes of them the layout of the last of the two, and the softmax is slow in that of a load.
    """
    mask = 0.0
    if MASK != NO_MASK:
        offs = j.to(tl.int64) * stride_mk
        if not KEY_MASK:
            offs = tl.minimum(i, end_q - 1).to(tl.int64) * stride_mq + offs
        if CHECK:
            mask = tl.load(mask_ptr + offs, mask=tl.broadcast_to(j < Sk, offs.shape), other=0)
        else:
            mask = tl.load(mask_ptr + offs)
    return mask


@triton.jit
def masked_scores(
    s,  # scores times log2(e), queries and keys in either order
    mask,  # of `mask_tile`
    i,  # the queries' numbers, int32, along their dimension of s
    j,  # the keys'
    Sq,
    Sk,
    length,
    number,  # i or j: exists from first on, below last
    first,
    last,
    MASK: tl.constexpr,
    MASK_LOWEST: tl.constexpr,
    LOWEST: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    BOUNDED: tl.constexpr,
):
    """The scores after the masks."""
    forbidden = tl.zeros(s.shape, tl.int1)
    if MASK == BOOL_MASK:
        forbidden = tl.broadcast_to(mask == 0, s.shape)
    elif MASK == ADDITIVE_MASK:
        forbidden = tl.broadcast_to(mask <= MASK_LOWEST, s.shape)
        term = mask.to(s.dtype) * LOG2E
        s += tl.where(term < LOWEST, LOWEST, term)  # not maximum(), which hides a NaN
    if BOUNDED:
        if CAUSAL:
            forbidden = forbidden | (j > i + (Sk - Sq))
        if HAS_LENGTHS:
            forbidden = forbidden | (j >= length)
    if MASK != NO_MASK or (BOUNDED and (CAUSAL or HAS_LENGTHS)):
        s = tl.where(forbidden, LOWEST, s)
    if BOUNDED:
        s = tl.where((number >= first) & (number < last), s, float("-inf"))
    return s


@triton.jit
def key_range(
    first_ptr,  # (Sq,) int32
    last_ptr,  # (Sq,) int32
    first_q,
    i,
    Sq,
    Sk,
    length,
    CAUSAL: tl.constexpr,
    HAS_LENGTH: tl.constexpr,
    HAS_PACKING: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    SKIP: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """What BLOCK_Q queries i see: keys from `begin` to `end`, up to `full` all of them all; each from first to last.

    full - begin is a multiple of BLOCK_K. `last` is one past the last key, as are the others.
    """
    if HAS_PACKING:
        exists = i < Sq
        first = tl.load(first_ptr + i, mask=exists, other=INT32_MAX)
        last = tl.load(last_ptr + i, mask=exists, other=0)
        if CAUSAL:
            last = tl.minimum(last, i + 1)
        begin, end = tl.min(first), tl.max(last)
        if HAS_DROPOUT:
            begin = begin // 4 * 4  # as the dropout's numbers are drawn
        # No key is common to queries of different sequences.
        common = tl.max(tl.where(exists, first, 0)) <= begin
        full = tl.where(common, begin + (tl.min(tl.where(exists, last, INT32_MAX)) - begin) // BLOCK_K * BLOCK_K, begin)
    else:
        first, last = 0, Sk
        begin, end, full = 0, Sk, Sk
        if HAS_LENGTH:
            full = tl.minimum(full, length)
        if CAUSAL:
            full = tl.minimum(full, tl.maximum(first_q + 1 + Sk - Sq, 0))
        full = full // BLOCK_K * BLOCK_K
        if SKIP:
            seen = Sk
            if HAS_LENGTH:
                seen = tl.minimum(seen, length)
            if CAUSAL:
                seen = tl.minimum(seen, first_q + BLOCK_Q + Sk - Sq)
            end = tl.where(length > 0, seen, Sk)
    return begin, full, end, first, last


@triton.jit
def known_length(
    lengths_ptr,  # (B,) int32 or int64
    mask_ptr,  # (Sk,) of this head, if it is the same for all queries
    stride_mk,
    b,
    Sk,
    MASK: tl.constexpr,
    MASK_LOWEST: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    KEY_MASK: tl.constexpr,
):
    """One past the last key that any query may see, 0 if there is none, as far as lengths and a mask of keys say it."""
    length = Sk
    if HAS_LENGTHS:
        length = tl.maximum(tl.minimum(tl.load(lengths_ptr + b), Sk), 0).to(tl.int32)
    if KEY_MASK:
        seen = 0
        for start in range(0, length, _SCAN):
            j = start + tl.arange(0, _SCAN)
            mask = tl.load(mask_ptr + j.to(tl.int64) * stride_mk, mask=j < length, other=0)
            # What is not a number shows: its key is not forbidden.
            allowed = mask != 0 if MASK == BOOL_MASK else (mask > MASK_LOWEST) | (mask != mask)
            seen = tl.maximum(seen, tl.max(tl.where(allowed & (j < length), j + 1, 0)))
        length = seen
    return length


@dataclass(frozen=True)
class Config:
    """Launch parameters of one of the kernels."""

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int
    registers: int  # at most so many a thread


# By the size of a head's tile: a config for each value of `Masks.busy`, the last one for the rest. "few" is the forward
# in smaller programs.
_HALF = {
    ("fwd", 64): (Config(128, 64, 8, 3, 255), Config(64, 64, 4, 3, 255), Config(64, 32, 4, 3, 255)),
    ("fwd", 128): (Config(128, 64, 8, 2, 255), Config(128, 32, 8, 2, 255)),
    ("fwd", 256): (Config(64, 32, 8, 2, 255),),
    ("few", 64): (Config(64, 64, 4, 3, 255), Config(64, 64, 4, 3, 255), Config(64, 32, 4, 3, 255)),
    ("few", 128): (Config(64, 64, 4, 2, 255), Config(64, 32, 4, 2, 255), Config(64, 16, 4, 2, 255)),
    ("few", 256): (Config(64, 32, 8, 2, 255),),
    ("dq", 64): (Config(128, 64, 8, 2, 255), Config(64, 32, 4, 2, 255)),
    ("dq", 128): (Config(64, 64, 4, 2, 255), Config(128, 32, 8, 2, 255)),
    ("dq", 256): (Config(32, 32, 4, 1, 255), Config(32, 32, 8, 1, 255)),
    ("dkv", 64): (Config(64, 128, 8, 2, 255), Config(32, 64, 4, 2, 255)),
    ("dkv", 128): (Config(32, 64, 4, 2, 255), Config(16, 128, 8, 2, 255)),
    ("dkv", 256): (Config(16, 32, 8, 1, 255), Config(16, 16, 8, 1, 255)),
}
# Before Hopper, and on AMD's GPUs, the matrix instructions read operands from registers.
_HALF_REGISTERS = _HALF | {
    ("fwd", 64): (Config(128, 32, 8, 3, 255), Config(64, 32, 4, 3, 255)),
    ("fwd", 128): (Config(64, 64, 8, 2, 255), Config(64, 32, 4, 2, 255), Config(64, 16, 4, 2, 255)),
    ("few", 64): (Config(64, 32, 4, 3, 255),),
    ("few", 128): (Config(64, 32, 4, 2, 255), Config(64, 32, 4, 2, 255), Config(64, 16, 4, 2, 255)),
    ("dq", 64): (Config(128, 32, 8, 2, 255), Config(32, 32, 4, 2, 255)),
    ("dq", 128): (Config(64, 32, 4, 2, 255), Config(64, 32, 4, 2, 255), Config(32, 32, 4, 2, 255)),
    ("dkv", 64): (Config(32, 64, 8, 2, 255), Config(32, 32, 4, 2, 255)),
    ("dkv", 128): (Config(32, 64, 8, 1, 255), Config(32, 32, 4, 1, 255)),
}
_FP32 = {
    ("fwd", 64): (Config(32, 32, 4, 1, 255), Config(32, 16, 4, 1, 255)),
    ("fwd", 128): (Config(16, 16, 4, 1, 255),),
    ("dq", 64): (Config(32, 16, 4, 1, 255),),
    ("dq", 128): (Config(16, 16, 8, 1, 255),),
    ("dkv", 64): (Config(16, 32, 4, 1, 255),),
    ("dkv", 128): (Config(16, 16, 8, 1, 255),),
}

# Fewer programs than a large card has multiprocessors (132 on an H200) leave some idle.
_FEW_PROGRAMS = 132


def _for_busy(configs: tuple[Config, ...], busy: int) -> Config:
    return configs[min(busy, len(configs) - 1)]


def _check(kernel: str, shape: tuple[int, ...], dtype: torch.dtype, card: Card, config: Config) -> str | None:
    # A program has its queries, or keys, with sums for all channels of a head, of two gradients for keys, and walks the
    # others, of which it reads two tensors.
    block_d, q, k = head_block(shape[2]), config.block_q, config.block_k
    sums, staged = (2 * k, 2 * q) if kernel == "masked_attention_bwd_dkv" else (q, 2 * k)
    return matrix_problem(card, dtype, config, (q, k), sums * block_d, staged * block_d)


@tuned(
    "masked_attention_fwd",
    "masked_attention_bwd_dq",
    "masked_attention_bwd_dkv",
    vary=("block_q", "block_k", "num_warps", "num_stages"),
    config=Config,
    check=_check,
    rounded=2,
)
def pick_config(kernel: str, shape: tuple[int, int, int, int], dtype: torch.dtype, card: Card) -> Config:
    """Launch config of a kernel for `shape` (B * H, Sq, D, busy). Not tuned on a card yet.

    Half precision: wgmma wants 64 rows a group of 4 warps. fp32 runs on the ordinary arithmetic units, which need a
    register for every operand. busy, 0, 1 or 2: what each score costs beside: see `Masks.busy`.
    """
    heads, Sq, D, busy = shape
    kernel = kernel.rpartition("_")[2]
    block_d = max(64, head_block(D))
    if dtype.itemsize > 2:
        config = _for_busy(_FP32[kernel, block_d], busy)
    elif kernel == "fwd" and Sq <= 16:
        config = Config(16, 64 if block_d <= 128 else 32, 4, 2, 255)
    else:
        table = _HALF if card.capability >= 90 and not _launch.is_amd() else _HALF_REGISTERS
        if kernel == "fwd" and heads * triton.cdiv(Sq, table[kernel, block_d][0].block_q) < _FEW_PROGRAMS:
            kernel = "few"
        config = _for_busy(table[kernel, block_d], busy)
    if _launch.is_amd():
        # Its waves have 64 lanes: as many threads as elsewhere with twice the warps. Reading ahead takes registers.
        config = replace(config, num_warps=4, num_stages=1 if kernel == "dkv" or busy or block_d == 256 else 2)
        if kernel == "dkv" and busy == 2:
            config = replace(config, block_q=16)
    return config


def head_block(D: int) -> int:
    """The width of a tile for heads of size D."""
    return max(16, triton.next_power_of_2(D))


@dataclass(frozen=True)
class Masks:
    """What says which keys a query may see.

    lengths: (B,) int32 or int64, or None; mask: (B, H, Sq, Sk), bool or floating, any strides, or None
    packed: of a packing, empty without one: (Sq,) and (Sq,) int32, the first key that each query sees and one past the
        last; then, unless they are the same, (Sk,) and (Sk,) int32, the first query that sees each key and one past the
        last
    """

    lengths: torch.Tensor | None
    mask: torch.Tensor | None
    causal: bool
    packed: tuple[torch.Tensor, ...] | list[torch.Tensor]

    @property
    def of_pairs(self) -> bool:
        """Whether there is a mask that says something else for each query."""
        return self.mask is not None and not self.of_keys

    @property
    def of_keys(self) -> bool:
        """Whether there is a mask that is the same for all queries."""
        return self.mask is not None and (self.mask.stride(2) == 0 or self.mask.shape[2] == 1)

    def busy(self, dropout_p: float, dtype: torch.dtype) -> int:
        """What each score costs beside, for q of a dtype: 2 for a mask of pairs, which takes shared memory too, 1 for
        registers alone, of a packing's bounds, dropout or a mask of keys wider than q, or 0."""
        if self.of_pairs:
            return 2
        wide = self.mask is not None and self.mask.dtype.itemsize > dtype.itemsize
        return int(bool(self.packed) or dropout_p > 0.0 or wide)

    def config(self, kernel: str, q: torch.Tensor, dropout_p: float) -> Config:
        """The launch config of a kernel for q (B, Sq, H, D)."""
        B, Sq, H, D = q.shape
        return pick_config(kernel, (B * H, Sq, D, self.busy(dropout_p, q.dtype)), q.dtype, _launch.card(q))

    def pointers(self, *, of_keys: bool) -> tuple[torch.Tensor | None, ...]:
        """lengths, mask, first and last as the kernels take them."""
        mask = self.mask
        if mask is not None and mask.dtype == torch.bool:
            mask = mask.view(torch.uint8)
        first, last = (self.packed[-2:] if of_keys else self.packed[:2]) or (None, None)
        return self.lengths, mask, first, last

    def constants(self, q: torch.Tensor, Sk: int) -> dict[str, object]:
        """The kernels' constexprs that say it.

        SKIP: whether blocks of keys that no query of a block sees may be left out: no query is without a key then,
        unless all of its sequence are.
        """
        kind, lowest = NO_MASK.value, 0.0
        if self.mask is not None:
            kind = BOOL_MASK.value if self.mask.dtype == torch.bool else ADDITIVE_MASK.value
            lowest = 0.0 if self.mask.dtype == torch.bool else torch.finfo(self.mask.dtype).min
        return {
            "ACC": _launch.acc(q.dtype),
            "D": q.shape[-1],
            "CAST": _launch.acc(q.dtype) if _INTERPRETED and q.dtype == torch.bfloat16 else None,
            "MASK": kind,
            "KEY_MASK": self.of_keys,
            "MASK_LOWEST": lowest,
            "LOWEST": torch.finfo(_launch.acc_torch(q.dtype)).min,
            "CAUSAL": self.causal,
            "HAS_LENGTHS": self.lengths is not None,
            "HAS_PACKING": bool(self.packed),
            "SKIP": not self.of_pairs and not (self.causal and (self.of_keys or q.shape[1] > Sk)),
            "PRECISION": precision(q.dtype),
            "BLOCK_D": head_block(q.shape[-1]),
        }


# The bfloat16 arithmetic of Triton's interpreter is wrong without an error.
_INTERPRETED = not isinstance(head_tile, triton.JITFunction)


def strides(*tensors: torch.Tensor) -> list[int]:
    """Of (B, S, H, D) tensors, one after the other, without that of D: 1."""
    return [stride for t in tensors for stride in t.stride()[:3]]


def mask_strides(mask: torch.Tensor | None) -> tuple[int, ...]:
    """Of a mask (B, H, Sq, Sk), or zeros."""
    return (0, 0, 0, 0) if mask is None else mask.stride()


def launch_cases(
    dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor, Masks, float, torch.Tensor | None]]:
    """Name, q, k, masks, dropout_p and seed of every kind of launch that `pick_config` can choose, on empty tensors.

    D over every block size; for heads of 64 also every kind of mask, for which the kernels have other code, and other
    code again where its rows are not aligned: at 500 keys.
    """

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    def kinds(S: int) -> dict[str, Masks]:
        lengths = empty(B, dtype=torch.int32)
        keys, pairs = (B, 1, 1, S), (B, 1, S, S)
        return {
            "dense": Masks(None, None, False, ()),
            "lengths": Masks(lengths, None, False, ()),
            "lengths causal": Masks(lengths, None, True, ()),
            "bool keys": Masks(None, empty(*keys, dtype=torch.bool).expand(B, H, S, S), False, ()),
            "additive keys": Masks(lengths, empty(*keys).expand(B, H, S, S), False, ()),
            "fp32 keys": Masks(None, empty(*keys, dtype=torch.float32).expand(B, H, S, S), True, ()),
            "bool": Masks(None, empty(*pairs, dtype=torch.bool).expand(B, H, S, S), False, ()),
            "half": Masks(lengths, empty(*pairs).expand(B, H, S, S), True, ()),
            "additive": Masks(None, empty(B, H, S, S, dtype=torch.float32), False, ()),
            "packing": Masks(None, None, False, (empty(S, dtype=torch.int32),) * 2),
            "packing causal": Masks(None, None, True, (empty(S, dtype=torch.int32),) * 2),
        }

    B, H, S, other = 8, 12, 512, 500
    every = tuple(kinds(S))
    cases = [(64, S, S, H, kind, 0.0) for kind in every if kind != "half"]
    cases += [
        (64, other, other, H, kind, 0.1) for kind in every if kind not in ("dense", "lengths causal", "packing causal")
    ]
    cases += [(64, other, other, H, "fp32 keys", 0.0)]
    cases += [(16, other, other, H, "half", 0.1)]
    cases += [(80, other, other, H, kind, 0.1) for kind in ("bool", "additive", "packing")]
    cases += [(80, other, other, H, "fp32 keys", 0.0), (256, other, other, H, "fp32 keys", 0.0)]
    cases += [(256, other, other, H, "half", 0.1)]
    cases += [(D, S, S, H, "lengths", 0.0) for D in (16, 48, 80, 128, 256)]
    cases += [(D, S, S, 2, "dense", 0.0) for D in (64, 128)]
    cases += [(128, other, other, 2, "additive", 0.1)]
    cases += [(D, 1, S, H, "dense", 0.0) for D in (64, 256)]
    for D, Sq, Sk, heads, kind, dropout_p in cases:
        if dtype.itemsize > 2 and D > MAX_FP32_HEAD_SIZE:
            continue
        masks = kinds(Sk)[kind]
        if masks.mask is not None:
            masks = replace(masks, mask=masks.mask[:, :heads])
        rows = 1 if masks.packed else B
        seed = empty(dtype=torch.int64) if dropout_p else None
        name = f"D={D} Sq={Sq} Sk={Sk} H={heads} {kind} dropout={dropout_p}"
        yield name, empty(rows, Sq, heads, D), empty(rows, Sk, heads, D), masks, dropout_p, seed
