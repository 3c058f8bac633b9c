"""The embeddings of a token, added and normalized: what every model begins with."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

import torch
import torch.nn.functional as F
from torch import Tensor

from ..packing import Packing
from ._checks import can_look_at, check_float, check_packing, check_probability, check_shape

MAX_TABLES = 5


def embedding_norm(
    ids: Sequence[Tensor | None],
    tables: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    eps: float = 1e-12,
    *,
    embeds: Tensor | None = None,
    padding_idx: Sequence[int | None] | None = None,
    dropout_p: float = 0.0,
    dropout_mask: Tensor | None = None,
    packing: Packing | None = None,
) -> Tensor:
    """y = dropout(LayerNorm(embeds + sum_i tables[i][ids[i]])), over the last dimension.

    Everything is computed in fp32, or in fp64 if a table is fp64, and rounded once.

    Args:
        ids: for each table integers (B, S), or (1, S) or (S,), the same in every sequence; with a packing (T,). One of
            them may be None: the positions 0, 1, 2, ... of the tokens in their sequence.
        tables: 1 to 5 tensors (V_i, C), floating point.
        weight: (C,), any floating dtype.
        bias: (C,), any floating dtype, or None.
        eps: added to the variance.
        embeds: (B, S, C), with a packing (T, C): vectors that no table has, or None.
        padding_idx: for each table a row that gets no gradient, or None; None for no table at all.
        dropout_p: the probability that a value is dropped; kept values are scaled by 1 / (1 - p).
        dropout_mask: (B, S, C), with a packing (T, C), bool, True where a value is kept. Explicit, so that the mask of
            any other implementation can be replayed.
        packing: where the sequences of T tokens begin and end.

    Returns:
        (B, S, C), with a packing (T, C): (S, C) if nothing has a B. The dtype that the tables and embeds promote to.

    Raises:
        TypeError: tables that are not real floating point; ids that are not int64 or int32; a mask that is not bool.
        ValueError: a shape, device, number, packing or `padding_idx` that doesn't fit, more positions than their table
            has; `dropout_p` outside [0, 1) or without a mask.
        IndexError: ids outside their table (looked at on the CPU only).

    Source: Devlin et al., "BERT" (2019), section 3 and figure 2.
    """
    lead = check(ids, tables, weight, bias, embeds, padding_idx, dropout_p, packing)
    check_values(ids, tables)
    shape = (*lead, tables[0].shape[1])
    _check_dropout_mask(shape, dropout_p, dropout_mask)
    out_dtype = sum_dtype(tables, embeds)
    dtype = torch.promote_types(out_dtype, torch.float32)
    z = torch.zeros(shape, dtype=dtype, device=weight.device) if embeds is None else embeds.to(dtype)
    for rows, table, padding in zip_longest(ids, tables, padding_idx or ()):
        if rows is None:
            rows = torch.arange(lead[-1], device=table.device) if packing is None else packing.before
        z = z + F.embedding(rows, table.to(dtype), padding)
    y = F.layer_norm(z, z.shape[-1:], weight.to(dtype), None if bias is None else bias.to(dtype), eps)
    if dropout_mask is not None:
        y = y * dropout_mask / (1.0 - dropout_p)
    return y.to(out_dtype)


def sum_dtype(tables: Sequence[Tensor], embeds: Tensor | None) -> torch.dtype:
    """The dtype that the tables and embeds promote to."""
    dtype = tables[0].dtype if embeds is None else embeds.dtype
    for table in tables:
        dtype = torch.promote_types(dtype, table.dtype)
    return dtype


def check(
    ids: Sequence[Tensor | None],
    tables: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    embeds: Tensor | None,
    padding_idx: Sequence[int | None] | None,
    dropout_p: float,
    packing: Packing | None,
) -> tuple[int, ...]:
    """Raise what `embedding_norm` says for arguments that don't fit; the result's shape without its channels.

    The values of ids are not looked at: see `check_values`.
    """
    if isinstance(ids, Tensor) or isinstance(tables, Tensor):
        raise TypeError("ids and tables must be tuples or lists of tensors, one for each table, got a tensor")
    if not 1 <= len(tables) <= MAX_TABLES or len(ids) != len(tables):
        raise ValueError(
            f"ids and tables must be as many, 1 to {MAX_TABLES}, got {len(ids)} ids and {len(tables)} tables"
        )
    named = {f"tables[{i}]": table for i, table in enumerate(tables)}
    check_float(**named, weight=weight, bias=bias, embeds=embeds)
    check_probability("dropout_p", dropout_p)
    if tables[0].dim() != 2 or tables[0].shape[1] == 0:
        raise ValueError(f"tables[0] must have shape (V, C) with C >= 1, got {tuple(tables[0].shape)}")
    C = tables[0].shape[1]
    for name, table in named.items():
        if table.dim() != 2 or table.shape[1] != C:
            raise ValueError(f"{name} must have shape (V, C) with the C = {C} of the first, got {tuple(table.shape)}")
    check_shape("weight", weight, (C,), "(C,)")
    if bias is not None:
        check_shape("bias", bias, (C,), "(C,)")
    _check_padding(padding_idx, tables)
    _check_ids(ids, weight.device)
    lead = _lead(ids, embeds, packing)
    shapes = [lead] if packing is not None else [lead, (1, lead[-1]), lead[-1:]]
    for i, rows in enumerate(ids):
        if rows is None:
            longest = lead[-1] if packing is None else packing.longest
            if longest > tables[i].shape[0]:
                raise ValueError(
                    f"ids[{i}] None means positions, for which tables[{i}] has {tables[i].shape[0]} rows, got a "
                    f"sequence of {longest} tokens; truncate it or give ids"
                )
        elif tuple(rows.shape) not in shapes:
            meaning = "(T,)" if packing is not None else "(B, S), (1, S) or (S,)"
            raise ValueError(f"ids[{i}] must have shape {meaning}, of a result of {lead}, got {tuple(rows.shape)}")
    if embeds is not None:
        check_shape("embeds", embeds, (*lead, C), "(B, S, C)" if packing is None else "(T, C)")
    return lead


def check_values(ids: Sequence[Tensor | None], tables: Sequence[Tensor]) -> None:
    """Raise IndexError for ids outside their table, where looking at them costs nothing."""
    for i, (rows, table) in enumerate(zip(ids, tables, strict=True)):
        if rows is None or not can_look_at(rows):
            continue
        low, high = (int(value) for value in rows.aminmax())
        if low < 0 or high >= table.shape[0]:
            raise IndexError(
                f"ids[{i}] must be from 0 to {table.shape[0] - 1} (tables[{i}] has {table.shape[0]} rows), got values "
                f"from {low} to {high}"
            )


def _check_padding(padding_idx: Sequence[int | None] | None, tables: Sequence[Tensor]) -> None:
    if padding_idx is None:
        return
    if isinstance(padding_idx, int) or len(padding_idx) != len(tables):
        raise ValueError(f"padding_idx must have an int or None for each of {len(tables)} tables, got {padding_idx}")
    for i, (row, table) in enumerate(zip(padding_idx, tables, strict=True)):
        if row is not None and not 0 <= row < table.shape[0]:
            raise ValueError(f"padding_idx[{i}] must be from 0 to {table.shape[0] - 1} or None, got {row}")


def _check_ids(ids: Sequence[Tensor | None], device: torch.device) -> None:
    for i, rows in enumerate(ids):
        if rows is None:
            continue
        if not isinstance(rows, Tensor):
            raise TypeError(f"ids[{i}] must be a torch.Tensor or None, got {type(rows).__name__}")
        if rows.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"ids[{i}] must be an int64 or int32 tensor, got {rows.dtype}")
        if rows.device != device:
            raise ValueError(f"ids[{i}] is on {rows.device} but weight is on {device}; move them to one device")
    if sum(rows is None for rows in ids) > 1:
        raise ValueError("one of the ids may be None, which means positions, got more of them")


def _lead(ids: Sequence[Tensor | None], embeds: Tensor | None, packing: Packing | None) -> tuple[int, ...]:
    """The result's shape without its channels: that of embeds or of the ids with the most sequences."""
    given = [rows for rows in ids if rows is not None]
    if embeds is None and not given:
        raise ValueError("ids is None for every table: give ids of another table, or embeds, to say how many tokens")
    if packing is not None:
        check_packing(packing, given[0] if embeds is None else embeds)
        return (packing.tokens,)
    if embeds is not None:
        if embeds.dim() not in (2, 3):
            raise ValueError(f"embeds must have shape (B, S, C) or (S, C), got {tuple(embeds.shape)}")
        return tuple(embeds.shape[:-1])
    shapes = [tuple(rows.shape) for rows in given]
    wide = [shape for shape in shapes if len(shape) == 2]
    many = [shape for shape in wide if shape[0] != 1]
    lead = (many or wide or shapes)[0]
    if len(lead) not in (1, 2):
        raise ValueError(f"ids must have shape (B, S), (1, S) or (S,), got {lead}")
    return lead


def _check_dropout_mask(shape: tuple[int, ...], dropout_p: float, dropout_mask: Tensor | None) -> None:
    if dropout_mask is None:
        if dropout_p > 0.0:
            raise ValueError(f"dropout_p = {dropout_p} needs dropout_mask, a bool tensor of the shape of the result")
        return
    if dropout_mask.dtype != torch.bool:
        raise TypeError(f"dropout_mask must be a bool tensor, got {dropout_mask.dtype}")
    check_shape("dropout_mask", dropout_mask, shape, "that of the result")
