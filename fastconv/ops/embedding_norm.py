"""embedding_norm: y = dropout(LayerNorm(embeds + sum_i tables[i][ids[i]])), from checks to gradient."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import ModuleType

import torch
import torch.nn.functional as F

from fastconv.ops._eager import autocasting, unobserved, use_kernels
from fastconv.ops._register import distinct, needs_grad, once_differentiable, register
from fastconv.ops._seed import check_seed, draw_seed, native_keep_mask
from fastconv.ops.layer_norm import layer_norm
from fastconv.reference import Packing
from fastconv.reference.ops.embedding_norm import check, check_values, sum_dtype

MAX_CHANNELS = 8192  # fastconv.kernels.embedding_norm.MAX_CHANNELS, known here without importing triton


def embedding_norm(
    ids: Sequence[torch.Tensor | None],
    tables: Sequence[torch.Tensor],
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float = 1e-12,
    *,
    embeds: torch.Tensor | None = None,
    padding_idx: Sequence[int | None] | None = None,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    packing: Packing | None = None,
) -> torch.Tensor:
    """dropout(LayerNorm(embeds + the sum of a row of every table)) over the last dimension, in one pass over memory.

    ids: for each table int64 or int32 (B, S), or (1, S) or (S,), the same in every sequence; with a packing (T,). One
        may be None: the positions 0, 1, 2, ... of the tokens in their sequence. On a GPU, where nobody waits to look,
        an id outside of its table adds nothing
    tables: 1 to 5 tensors (V, C) fp16, bf16, fp32 or fp64; C up to 8192 by the kernel, any by the native formulation
    weight, bias: (C,), any of these dtypes; bias may be None
    embeds: (B, S, C), with a packing (T, C): vectors that no table has, or None
    padding_idx: for each table the row that gets no gradient, or None; None for no table at all
    dropout_p: probability, below 1, of zeroing a value; the others are scaled by 1 / (1 - dropout_p)
    seed: () int64 on the tables' device: the mask is a function of it and of the position, per backend. None draws one
        from torch's generator of that device. The native formulation reads its value, which torch.compile can't trace
    packing: where the sequences of T tokens begin and end, for positions
    returns: (B, S, C), with a packing (T, C); (S, C) if nothing has a B. The dtype that the tables and embeds promote
        to; fp32 under autocast, as torch's layer_norm

    Raises: TypeError for tables that are not real floating point and ids that are not int64 or int32; ValueError for
    shapes, devices, numbers, a packing, a padding_idx or a dropout_p that don't fit, and for more positions than their
    table has; on a CPU IndexError for ids outside of their table. Statistics and the sums of gradients are fp32 at
    least; two runs give the same bits. Source: Devlin et al., arXiv 1810.04805, section 3.
    """
    lead = check(ids, tables, weight, bias, embeds, padding_idx, dropout_p, packing)
    check_seed(weight, seed)
    if unobserved():
        check_values(ids, tables)
    paddings = [-1 if row is None else row for row in padding_idx or [None] * len(tables)]
    if packing is not None:
        ids = [packing.before if rows is None else rows for rows in ids]
    out_dtype = sum_dtype(tables, embeds)
    # Of the dtype that the others promote to, if there is such a one: it decides what fp64 does.
    x = [*(t for t in (*tables, embeds) if t is not None and t.dtype == out_dtype), weight][0]
    if autocasting(x):
        out_dtype = torch.float32
    if weight.shape[0] > MAX_CHANNELS or not use_kernels(x, *ids, *tables, embeds, weight, bias):
        return _native(ids, tables, weight, bias, eps, embeds, paddings, dropout_p, seed, lead, out_dtype)
    if dropout_p > 0.0 and seed is None:
        seed = draw_seed(weight)
    if needs_grad(*tables, embeds, weight, bias):
        weight, bias, embeds, *rest = distinct(weight, bias, embeds, *tables, *ids)
        return _EmbeddingNorm.apply(
            weight, bias, embeds, eps, paddings, dropout_p, seed, lead, out_dtype, len(tables), *rest
        )
    return _forward(ids, tables, embeds, weight, bias, eps, dropout_p, seed, lead, out_dtype, False)[0]


# The ops: fastconv::embedding_norm_fwd, _bwd and, for each table, _bwd_table. An output that a call doesn't make is an
# empty tensor.


@functools.cache
def _kernels() -> ModuleType:
    # At the first launch: importing triton takes a while, and it may not be there.
    from fastconv.kernels import embedding_norm as kernels

    return kernels


def _fwd(ids, tables, embeds, weight, bias, eps, dropout_p, seed, lead, out_dtype, save):
    made = _kernels().embedding_norm_fwd(ids, tables, embeds, weight, bias, eps, dropout_p, seed, lead, out_dtype, save)
    return tuple(weight.new_empty(0) if t is None else t for t in made)


def _fwd_fake(ids, tables, embeds, weight, bias, eps, dropout_p, seed, lead, out_dtype, save):
    y = weight.new_empty((*lead, weight.shape[0]), dtype=out_dtype)
    if not save:
        return y, *(weight.new_empty(0) for _ in range(3))
    stats = torch.promote_types(out_dtype, torch.float32)
    mean, rstd = (weight.new_empty(y.numel() // y.shape[-1], dtype=stats) for _ in range(2))
    return y, torch.empty_like(y), mean, rstd


def _bwd(dy, z, weight, mean, rstd, dropout_p, seed):
    return _kernels().embedding_norm_bwd(dy, z, weight, mean, rstd, dropout_p, seed)


def _bwd_fake(dy, z, weight, mean, rstd, dropout_p, seed):
    return z.new_empty(z.shape), mean.new_empty(2, z.shape[-1])


def _bwd_table(dz, ids, rows, padding_idx, dtype):
    return _kernels().embedding_norm_bwd_table(dz, ids, rows, padding_idx, dtype)


def _bwd_table_fake(dz, ids, rows, padding_idx, dtype):
    return dz.new_empty(rows, dz.shape[-1], dtype=dtype)


_forward = register(
    "embedding_norm_fwd(Tensor?[] ids, Tensor[] tables, Tensor? embeds, Tensor weight, Tensor? bias, float eps, "
    "float dropout_p, Tensor? seed, SymInt[] lead, ScalarType out_dtype, bool save) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _fwd,
    _fwd_fake,
)
_backward = register(
    "embedding_norm_bwd(Tensor dy, Tensor z, Tensor weight, Tensor mean, Tensor rstd, float dropout_p, Tensor? seed) "
    "-> (Tensor, Tensor)",
    _bwd,
    _bwd_fake,
)
_backward_table = register(
    "embedding_norm_bwd_table(Tensor dz, Tensor? ids, SymInt rows, int padding_idx, ScalarType dtype) -> Tensor",
    _bwd_table,
    _bwd_table_fake,
)


class _EmbeddingNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, bias, embeds, eps, paddings, dropout_p, seed, lead, out_dtype, count, *tables_and_ids):
        tables, ids = list(tables_and_ids[:count]), list(tables_and_ids[count:])
        y, z, mean, rstd = _forward(ids, tables, embeds, weight, bias, eps, dropout_p, seed, lead, out_dtype, True)
        ctx.save_for_backward(z, weight, mean, rstd, seed, *ids)
        ctx.dropout_p = dropout_p
        ctx.paddings = paddings
        ctx.dtypes = [None if t is None else t.dtype for t in (bias, embeds)]
        ctx.tables = [(t.shape[0], t.dtype) for t in tables]  # not themselves: a step may change them before
        return y

    @staticmethod
    @once_differentiable("embedding_norm")
    def backward(ctx, dy):
        z, weight, mean, rstd, seed, *ids = ctx.saved_tensors
        bias_dtype, embeds_dtype = ctx.dtypes
        dz, sums = _backward(dy, z, weight, mean, rstd, ctx.dropout_p, seed)
        # Of a table that is frozen nobody wants the sums.
        wanted = ctx.needs_input_grad[-2 * len(ids) : -len(ids)]
        dtables = [
            _backward_table(dz, rows, size, padding, dtype) if want else None
            for rows, (size, dtype), padding, want in zip(ids, ctx.tables, ctx.paddings, wanted, strict=True)
        ]
        dbias = None if bias_dtype is None else sums[1].to(bias_dtype)
        dembeds = None if embeds_dtype is None else dz.to(embeds_dtype)
        return sums[0].to(weight.dtype), dbias, dembeds, *[None] * 7, *dtables, *[None] * len(ids)


def _native(ids, tables, weight, bias, eps, embeds, paddings, dropout_p, seed, lead, out_dtype):
    # In fp32 at least, so that the sum is rounded once.
    wide = torch.promote_types(sum_dtype(tables, embeds), torch.float32)
    z = None if embeds is None else embeds.to(wide)
    ours = False
    for rows, table, padding in zip(ids, tables, paddings, strict=True):
        if rows is None:
            rows = torch.arange(lead[-1], device=table.device)
        # ATen's backward on a CPU adds the rows' gradients in the dtype of the table, where a sum in half precision
        # stops growing at a few hundred tokens.
        table = table.to(wide) if table.device.type == "cpu" and needs_grad(table) else table
        found = F.embedding(rows, table, None if padding < 0 else padding).to(wide)
        if z is None:
            z = found
        elif ours and z.shape == (*lead, table.shape[1]):
            z = z.add_(found)  # new memory costs more than the sum
        else:
            z = z + found
        ours = unobserved()
    assert z is not None  # there is a table at least
    y = layer_norm(z, weight.to(wide), None if bias is None else bias.to(wide), eps).to(out_dtype)
    if dropout_p == 0.0:
        return y
    if seed is None:
        return F.dropout(y, dropout_p)
    return torch.where(native_keep_mask(y.shape, dropout_p, seed), y * (1.0 / (1.0 - dropout_p)), 0.0)
