"""Scaled dot-product attention with every mask that BERT's family knows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..packing import Packing
from ._checks import can_look_at, check_float, check_packing, check_probability

Packings = Packing | tuple[Packing, Packing]


class RelativePositions(NamedTuple):
    """What relative positions add to the scores: q_i . t_(i - j), and k_j . t_(i - j) `with_keys`.

    table: (2 P - 1, D), row P - 1 + i - j for query i and key j; for at most P queries and P keys.

    Source: Shaw et al., "Self-Attention with Relative Position Representations" (2018); Huang et al., "Improve
    Transformer Models with Better Relative Position Embeddings" (2020), method 4 with `with_keys`.
    """

    table: Tensor
    with_keys: bool = False


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
    relative: RelativePositions | None = None,
    head_mask: Tensor | None = None,
    dropout_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    packing: Packings | None = None,
) -> Tensor:
    """y = (dropout(softmax((q @ k.T + relative) * scale + mask)) * head_mask) @ v for every batch row and head.

    The last query is at the last key. A query that may not attend to any key attends equally to all Sk of them: a
    forbidden key's score is the lowest number of fp32 (of fp64 for fp64 inputs), whatever else it would be.

    Args:
        q: (B, Sq, H, D), floating point.
        k: (B, Sk, H, D), dtype of `q`.
        v: (B, Sk, H, D), dtype of `q`.
        lengths: (B,), int32 or int64: the keys from this one on are forbidden.
        mask: broadcastable to (B, H, Sq, Sk): bool, True where a key may be attended to, or floating point, added to
            the scores, where -inf and the lowest number of its dtype forbid a key.
        causal: no query may attend to a later key.
        relative: see `RelativePositions`.
        head_mask: broadcastable to (B, H, Sq, Sk), floating point: multiplies the probabilities after the dropout.
        dropout_mask: broadcastable to (B, H, Sq, Sk), bool, True where a probability is kept.
        dropout_p: the probability that one is dropped; kept ones are scaled by 1 / (1 - p).
        scale: 1 / sqrt(D) if None.
        packing: where the sequences of T tokens begin and end; then q, k and v are (T, H, D), and B, Sq and Sk those of
            each sequence alone: 1, and its length. Two packings of as many sequences: of the queries and of the keys;
            queries of a sequence without keys give 0. There is no mask and there are no lengths then; head_mask is
            broadcastable to (1, H, 1, 1), dropout_mask to (1, H, Tq, Tk).

    Returns:
        (B, Sq, H, D), with a packing (T, H, D), dtype of `q`.

    Raises:
        TypeError: an integer or complex tensor, or a bool one where a floating one is needed, lengths that are no
            integers.
        ValueError: shapes that don't fit, tensors on different devices, `dropout_p` outside [0, 1) or without a mask,
            lengths that are negative or above Sk, a packing with lengths, with a mask or of other tokens, causal with
            two packings.

    Source: Vaswani et al., "Attention Is All You Need" (2017), section 3.2.1; head_mask: Michel et al., "Are Sixteen
    Heads Really Better than One?" (2019, arXiv 1905.10650).
    """
    check(q, k, v, lengths, mask, causal, relative, head_mask, dropout_p, packing)
    check_dropout_mask(q, k, dropout_mask, dropout_p, packing)
    relative = None if relative is None else RelativePositions(*relative)
    if packing is not None:
        return _each_sequence(q, k, v, causal, relative, head_mask, dropout_mask, dropout_p, scale, packing)
    bias = None if relative is None else relative_scores(q, k, relative.table, with_keys=relative.with_keys)
    mask = combined_mask(q, k, mask, lengths, causal)
    probabilities = attention_probabilities(q, k, mask=mask, bias=bias, scale=scale)
    if dropout_mask is not None:
        probabilities = probabilities * dropout_mask / (1.0 - dropout_p)
    if head_mask is not None:
        probabilities = probabilities * head_mask.to(probabilities.dtype)
    return torch.einsum("bhqk,bkhd->bqhd", probabilities, v)


def _each_sequence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    relative: RelativePositions | None,
    head_mask: Tensor | None,
    dropout_mask: Tensor | None,
    dropout_p: float,
    scale: float | None,
    packing: Packings,
) -> Tensor:
    of_queries, of_keys = both_packings(packing)
    if dropout_mask is not None:
        dropout_mask = dropout_mask.expand(1, q.shape[1], q.shape[0], k.shape[0])
    results, first_q, first_k = [q[:0] + k[:0] + v[:0]], 0, 0
    for Sq, Sk in zip(of_queries.lengths, of_keys.lengths, strict=True):
        queries, keys = slice(first_q, first_q + Sq), slice(first_k, first_k + Sk)
        first_q, first_k = queries.stop, keys.stop
        if Sq == 0 or Sk == 0:
            results.append(q[queries] * 0.0)
            continue
        y = masked_attention(
            q[queries][None],
            k[keys][None],
            v[keys][None],
            causal=causal,
            relative=relative,
            head_mask=head_mask,
            dropout_mask=None if dropout_mask is None else dropout_mask[:, :, queries, keys],
            dropout_p=dropout_p,
            scale=scale,
        )
        results.append(y[0])
    return torch.cat(results)


def both_packings(packing: Packings) -> tuple[Packing, Packing]:
    """The packings of the queries and of the keys."""
    return (packing, packing) if isinstance(packing, Packing) else packing


def combined_mask(q: Tensor, k: Tensor, mask: Tensor | None, lengths: Tensor | None, causal: bool) -> Tensor | None:
    """mask, lengths and causal as one mask broadcastable to (B, H, Sq, Sk): bool, or additive in fp32 or fp64."""
    Sq, Sk = q.shape[1], k.shape[1]
    allowed = None
    if lengths is not None:
        allowed = (torch.arange(Sk, device=q.device) < lengths[:, None])[:, None, None]
    if causal:
        past = torch.ones(Sq, Sk, dtype=torch.bool, device=q.device).tril(Sk - Sq)
        allowed = past if allowed is None else allowed & past
    if mask is None or allowed is None:
        return allowed if mask is None else mask
    if mask.dtype == torch.bool:
        return mask & allowed
    dtype = torch.promote_types(q.dtype, torch.float32)
    return torch.where(allowed, _additive(mask, dtype), torch.finfo(dtype).min)


def attention_probabilities(
    q: Tensor, k: Tensor, *, mask: Tensor | None = None, bias: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """softmax((q @ k.T + bias) * scale + mask): (B, Sq, H, D), (B, Sk, H, D) -> (B, H, Sq, Sk), dtype of `q`.

    Scores and softmax are computed in fp32, or in fp64 for fp64 inputs. bias: broadcastable to (B, H, Sq, Sk), as from
    `relative_scores`. The other arguments are those of `masked_attention`.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("bqhd,bkhd->bhqk", q.to(dtype), k.to(dtype))
    if bias is not None:
        scores = scores + bias.to(dtype)
    scores = scores * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        scores = scores + _additive(mask, dtype)
    return scores.softmax(dim=-1).to(q.dtype)


def relative_scores(q: Tensor, k: Tensor, table: Tensor, *, with_keys: bool) -> Tensor:
    """What `RelativePositions` add to the scores, (B, H, Sq, Sk) in fp32, or in fp64 for fp64 inputs.

    q: (B, Sq, H, D); k: (B, Sk, H, D); table: (2 P - 1, D). The last query is at the last key, and Sk is at most P.
    """
    Sq, Sk, P = q.shape[1], k.shape[1], (table.shape[0] + 1) // 2
    dtype = torch.promote_types(q.dtype, torch.float32)
    distance = torch.arange(Sk - Sq, Sk, device=q.device)[:, None] - torch.arange(Sk, device=q.device)
    rows = table[distance + P - 1].to(dtype)
    scores = torch.einsum("bqhd,qkd->bhqk", q.to(dtype), rows)
    if with_keys:
        scores = scores + torch.einsum("bkhd,qkd->bhqk", k.to(dtype), rows)
    return scores


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What `mask` adds to scores of `dtype`: forbidden keys (False, -inf, the lowest number of the dtype of `mask`) get
    the lowest number of `dtype`. Finite, and no score changes it, so a fully masked row is uniform in every dtype.
    """
    lowest = torch.finfo(dtype).min
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, lowest)
    return mask.to(dtype).masked_fill(mask <= torch.finfo(mask.dtype).min, lowest)


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None,
    mask: Tensor | None,
    causal: bool,
    relative: RelativePositions | None,
    head_mask: Tensor | None,
    dropout_p: float,
    packing: Packings | None,
) -> None:
    """Raise what `masked_attention` says for arguments that don't fit."""
    bool_mask = isinstance(mask, Tensor) and mask.dtype == torch.bool
    check_float(q=q, k=k, v=v, mask=None if bool_mask else mask, head_mask=head_mask)
    check_probability("dropout_p", dropout_p)
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if packing is not None:
        _check_packed(q, k, v, shapes, lengths, mask, causal, packing)
        scores = (1, q.shape[1], 1, 1)
        of_queries, of_keys = both_packings(packing)
        longest = 0 if relative is None else max([0, *of_queries.lengths, *of_keys.lengths])
    else:
        if {q.dim(), k.dim()} != {4} or k.shape != v.shape or q.shape[::2] != k.shape[::2] or q.shape[3] != k.shape[3]:
            raise ValueError(f"q must have shape (B, Sq, H, D), k and v (B, Sk, H, D), got {shapes}")
        if 0 in (k.shape[1], q.shape[3]):
            raise ValueError(f"attention needs at least one key and D >= 1, got {shapes}")
        scores = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
        longest = max(q.shape[1], k.shape[1])
        _check_lengths(lengths, q, k.shape[1])
    for name, tensor in (("mask", mask), ("head_mask", head_mask)):
        _check_broadcast(name, tensor, q, scores)
    if relative is not None:
        _check_relative(relative, q, longest)


def _check_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shapes: str,
    lengths: Tensor | None,
    mask: Tensor | None,
    causal: bool,
    packing: Packings,
) -> None:
    for name, other in (("lengths", lengths), ("mask", mask)):
        if other is not None:
            raise ValueError(f"give packing or {name}, not both: a packing says which keys a query may attend to")
    if not isinstance(packing, Packing) and not (isinstance(packing, tuple) and len(packing) == 2):
        raise TypeError(f"packing must be a Packing, or two of them: of queries and of keys; got {packing!r:.100}")
    if q.dim() != 3 or k.shape != v.shape or k.dim() != 3 or q.shape[1:] != k.shape[1:] or q.shape[2] == 0:
        raise ValueError(f"with a packing q must have shape (T, H, D), k and v (T, H, D), D >= 1, got {shapes}")
    of_queries, of_keys = both_packings(packing)
    check_packing(of_queries, q)
    check_packing(of_keys, k)
    if of_queries is not of_keys and len(of_queries.lengths) != len(of_keys.lengths):
        raise ValueError(
            "the packings of queries and keys must have as many sequences, got "
            f"{len(of_queries.lengths)} and {len(of_keys.lengths)}"
        )
    if causal and of_queries is not of_keys:
        raise ValueError("causal needs queries and keys of one packing, got two: which keys are later is not defined")


def _check_lengths(lengths: Tensor | None, q: Tensor, Sk: int) -> None:
    if lengths is None:
        return
    if not isinstance(lengths, Tensor):
        raise TypeError(f"lengths must be a torch.Tensor, got {type(lengths).__name__}")
    if lengths.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"lengths must be an int32 or int64 tensor, got {lengths.dtype}")
    if tuple(lengths.shape) != (q.shape[0],):
        raise ValueError(f"lengths must have shape (B,) = {(q.shape[0],)}, got {tuple(lengths.shape)}")
    if lengths.device != q.device:
        raise ValueError(f"q is on {q.device} but lengths is on {lengths.device}; move them to one device")
    if can_look_at(lengths) and (int(lengths.min()) < 0 or int(lengths.max()) > Sk):
        raise ValueError(
            f"lengths must be from 0 to Sk = {Sk}, got values from {int(lengths.min())} to {int(lengths.max())}"
        )


def _check_relative(relative: RelativePositions, q: Tensor, longest: int) -> None:
    if not isinstance(relative, tuple) or len(relative) not in (1, 2):
        raise TypeError(f"relative must be RelativePositions(table, with_keys), got {type(relative).__name__}")
    table = relative[0]
    check_float(q=q, table=table)
    if table.dim() != 2 or table.shape[0] % 2 == 0 or table.shape[1] != q.shape[-1]:
        raise ValueError(
            f"the table of relative must have shape (2 P - 1, D) with D = {q.shape[-1]}, got {tuple(table.shape)}"
        )
    if longest > (table.shape[0] + 1) // 2:
        raise ValueError(f"relative knows P = {(table.shape[0] + 1) // 2} queries and keys at most, got {longest}")


def check_dropout_mask(
    q: Tensor, k: Tensor, dropout_mask: Tensor | None, dropout_p: float, packing: Packings | None = None
) -> None:
    """Raise ValueError or TypeError unless there is a bool mask where there is dropout."""
    if dropout_mask is None and dropout_p > 0.0:
        raise ValueError(f"dropout_p = {dropout_p} needs dropout_mask, a bool tensor of shape (B, H, Sq, Sk)")
    if dropout_mask is not None and dropout_mask.dtype != torch.bool:
        raise TypeError(f"dropout_mask must be a bool tensor, got {dropout_mask.dtype}")
    scores = (
        (1, q.shape[1], q.shape[0], k.shape[0])
        if packing is not None
        else (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    )
    _check_broadcast("dropout_mask", dropout_mask, q, scores)


def _check_broadcast(name: str, tensor: Tensor | None, q: Tensor, scores: tuple[int, ...]) -> None:
    if tensor is None:
        return
    if tensor.device != q.device:
        raise ValueError(f"q is on {q.device} but {name} is on {tensor.device}; move them to one device")
    given = tuple(tensor.shape)
    if len(given) > 4 or any(n not in (1, size) for n, size in zip(given[::-1], scores[::-1], strict=False)):
        raise ValueError(f"{name} must be broadcastable to (B, H, Sq, Sk) = {scores}, got {given}")
