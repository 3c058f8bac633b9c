"""The cases of masked_attention's kernels. Calls with many kinds of masks share an entry there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from fastconv import Packing, ops
from fastconv.kernels import masked_attention as kernels
from fastconv.kernels import masked_attention_bwd as kernels_bwd
from fastconv.kernels._attention import Masks
from fastconv.ops.masked_attention import attention_dropout_mask
from fastconv.reference import ops as reference
from fastconv.tuning import case
from fastconv.tuning.case import Case, Normal, rows

# Scores of attention that the reference may hold in a check: 1 GB in fp64.
_MOST_SCORES = 2**27
_HEADS, _DROPOUT = 16, 0.1


def masked_attention(kernel: str, shape: tuple[int, ...], normal: Normal) -> Case:
    """The case of a kernel for `shape` (B * H, Sq, D, busy); busy: see `Masks.busy`."""
    all_heads, length, size, busy = shape
    heads = max(n for n in range(1, _HEADS + 1) if all_heads % n == 0)
    batch = all_heads // heads
    # A few queries are a decoder's, whose keys are those of all its tokens.
    keys = length if length > 16 else max(length, case.LENGTH)
    q, k, v = normal(batch, length, heads, size), normal(batch, keys, heads, size), normal(batch, keys, heads, size)
    kept = max(1, min(batch, _MOST_SCORES // (heads * length * keys)))
    options: dict[str, Any] = {}
    expected: dict[str, Any] = {}
    masks, dropout_p, seed = Masks(None, None, False, ()), 0.0, None
    if busy == 2:
        mask = normal(1, 1, length, keys).float()
        masks = Masks(None, mask.expand(batch, heads, length, keys), False, ())
        options = expected = {"mask": mask}
    elif busy and batch == 1 and keys == length:
        # A packed batch has all its tokens in one row.
        packing = _packing(q)
        masks = Masks(None, None, False, (packing.first, packing.last))
        options = expected = {"packing": packing}
    elif busy:
        dropout_p, seed = _DROPOUT, _seed(q)
        keep = attention_dropout_mask(kept, heads, length, keys, dropout_p, seed, by_kernels=True)
        options = {"dropout_p": dropout_p, "seed": seed}
        expected = {"dropout_p": dropout_p, "dropout_mask": keep}
    tensors = {"q": q[:kept], "k": k[:kept], "v": v[:kept]}
    if "packing" in options:
        tensors = {name: t[0] for name, t in tensors.items()}

    launch: Callable[..., object] = partial(
        kernels.masked_attention_fwd, q, k, v, scale=size**-0.5, out=None, save=False
    )
    if kernel != "masked_attention_fwd":
        y, stats = kernels.masked_attention_fwd(q, k, v, masks, dropout_p, seed, size**-0.5, None, True)
        assert stats is not None
        launch = partial(kernels_bwd.masked_attention_bwd, q, q, k, v, y, stats, scale=size**-0.5, need_dmask=False)
    return Case(
        partial(launch, masks=masks, dropout_p=dropout_p, seed=seed),
        lambda **t: ops.masked_attention(**t, **options),
        lambda **t: reference.masked_attention(**t, **expected),
        tensors,
        others=[partial(launch, **given) for given in _others(kernel, q, k, busy)],
    )


def _others(kernel: str, q: torch.Tensor, k: torch.Tensor, busy: int) -> Iterator[dict[str, Any]]:
    """The arguments of launches with everything that may come together, for each kind of mask and of packing.

    What is in shared memory beside keys and values depends on them. As the compiler of triton 3.7.1 has it for sm_90, a
    backward for dq in bf16, of 128 queries and 256 keys in 2 stages, has 164 KB there without a mask, and 296 KB with a
    mask of keys that gets a gradient.
    """
    B, Sq, H, _ = q.shape
    shape = B, H, Sq, k.shape[1]
    dropout = {"dropout_p": _DROPOUT if busy else 0.0, "seed": _seed(q) if busy else None}
    lengths = torch.full((B,), k.shape[1], dtype=torch.int32, device=q.device)
    for dtype in (torch.bool, q.dtype, torch.float32):
        mask = torch.zeros(1, 1, Sq if busy == 2 else 1, k.shape[1], dtype=dtype, device=q.device).expand(shape)
        more = {"need_dmask": dtype != torch.bool} if kernel != "masked_attention_fwd" else {}
        yield {"masks": Masks(lengths, mask, True, ()), **dropout, **more}
    if busy == 1 and B == 1 and k.shape[1] == Sq:
        packing = _packing(q)
        yield {"masks": Masks(None, None, True, (packing.first, packing.last)), **dropout}


def _packing(q: torch.Tensor) -> Packing:
    """Of the tokens of (1, T, H, D)."""
    batch, length = rows(q.shape[1])
    return Packing.from_lengths(torch.full((batch,), length, device=q.device))


def _seed(q: torch.Tensor) -> torch.Tensor:
    return torch.zeros((), dtype=torch.int64, device=q.device)
