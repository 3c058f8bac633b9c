"""The embeddings of a token: y = dropout(LayerNorm(embeds + sum_i tables[i][ids[i]])).

    z = embeds + sum_i tables[i][ids[i]]        mean, rstd over the C channels of a token, in fp32
    y = dropout((z - mean) * rstd * weight + bias)

Forward: one program owns BLOCK_T tokens with all their channels. Reads a row of every table for a token (those of
positions and types come out of the cache) and embeds, writes y, and z when a backward will need it:
(2..4) * T * C elements.

Backward: LayerNorm's kernel (`layer_norm_bwd`) makes dz, which is the gradient of embeds and of every row that was
added. A row's gradient is the sum of dz over the tokens that have it. Tokens are sorted by their row, and summed in
that order, without atomics, in two stages, so that a row that every token has is not one program's work: chunks of
CHUNK sorted tokens that all have one row; then for each row of the table the sum of its chunks and of the tokens at
the two ends of its segment. Reads dz, writes the table's gradient: T * C + V * C elements.

Devlin et al., arXiv 1810.04805, section 3.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from . import _launch, layer_norm
from ._configs import KERNELS, Card, any_config, tuned
from ._dropout import keep_mask

MAX_CHANNELS = layer_norm.MAX_CHANNELS


@triton.jit(do_not_specialize=["T", "S"])
def _embedding_norm_fwd_kernel(
    ids_ptr,  # for each table (B, S) or (1, S) int, contiguous, not read for the table POSITIONS
    table_ptr,  # for each table (V, C)
    embeds_ptr,  # (T, C)
    weight_ptr,  # (C,)
    bias_ptr,  # (C,)
    seed_ptr,  # ()
    y_ptr,  # (T, C) contiguous
    z_ptr,  # (T, C) contiguous
    mean_ptr,  # (T,) fp32
    rstd_ptr,  # (T,) fp32
    T,
    S,
    C,
    V,  # for each table
    own_ids,  # for each table: 1 if every sequence has a row of ids of its own, 0 if there is one for all
    stride_vr,  # for each table
    stride_et,
    eps,
    dropout_p,
    dropout_scale,
    ACC: tl.constexpr,
    TABLES: tl.constexpr,
    POSITIONS: tl.constexpr,  # the table whose row is the token's place in its sequence, or -1
    HAS_EMBEDS: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SAVE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # One program: tokens [pid_t * BLOCK_T, +BLOCK_T), all channels.
    pid_t = tl.program_id(0).to(tl.int64)
    offs_t = pid_t * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_c = tl.arange(0, BLOCK_C)
    mask_t = offs_t < T
    mask_c = offs_c < C
    mask = mask_t[:, None] & mask_c[None, :]
    offs_b = offs_t // S
    offs_s = offs_t - offs_b * S

    z = tl.zeros((BLOCK_T, BLOCK_C), ACC)
    if HAS_EMBEDS:
        z += tl.load(embeds_ptr + offs_t[:, None] * stride_et + offs_c[None, :], mask=mask, other=0.0).to(ACC)
    for i in tl.static_range(TABLES):
        if i == POSITIONS:
            row = offs_s
        else:
            offs_i = offs_b * S * own_ids[i] + offs_s
            row = tl.load(ids_ptr[i] + offs_i, mask=mask_t, other=0).to(tl.int64)
        # An id outside of its table reads nothing.
        mask_r = mask_t & (row >= 0) & (row < V[i])
        offs_r = row[:, None] * stride_vr[i] + offs_c[None, :]
        z += tl.load(table_ptr[i] + offs_r, mask=mask_r[:, None] & mask_c[None, :], other=0.0).to(ACC)
    # The backward reads z as it is stored: statistics of that z, or xhat would not be centred.
    z = z.to(y_ptr.dtype.element_ty).to(ACC)

    # Two passes over registers: no cancellation when the mean is large against the deviation.
    mean = tl.sum(z, axis=1) / C
    centred = tl.where(mask_c[None, :], z - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / C + eps)

    y = centred * rstd[:, None] * tl.load(weight_ptr + offs_c, mask=mask_c, other=0.0).to(ACC)[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + offs_c, mask=mask_c, other=0.0).to(ACC)[None, :]
    if HAS_DROPOUT:
        keep = keep_mask(seed_ptr, offs_t, 0, dropout_p, BLOCK_T, BLOCK_C)
        y = tl.where(keep, y * dropout_scale, 0.0)
    offs_y = offs_t[:, None] * C + offs_c[None, :]
    tl.store(y_ptr + offs_y, y.to(y_ptr.dtype.element_ty), mask=mask)
    if SAVE:
        tl.store(z_ptr + offs_y, z.to(z_ptr.dtype.element_ty), mask=mask)
        tl.store(mean_ptr + offs_t, mean, mask=mask_t)
        tl.store(rstd_ptr + offs_t, rstd, mask=mask_t)


@triton.jit
def _add_tokens(
    acc,  # (BLOCK_T, BLOCK_C)
    dz_ptr,  # (T, C) contiguous
    order_ptr,  # (T,) int64
    first,
    last,
    offs_c,
    C,
    BLOCK_T: tl.constexpr,
):
    """acc, and dz of the tokens that are sorted to [first, last): one of BLOCK_T tokens to each row of acc."""
    for begin in range(first, last, BLOCK_T):
        offs_o = begin + tl.arange(0, BLOCK_T)
        mask_o = offs_o < last
        offs_t = tl.load(order_ptr + offs_o, mask=mask_o, other=0)
        mask = mask_o[:, None] & (offs_c < C)[None, :]
        acc += tl.load(dz_ptr + offs_t[:, None] * C + offs_c[None, :], mask=mask, other=0.0).to(acc.dtype)
    return acc


@triton.jit(do_not_specialize=["padding_idx"])
def _embedding_norm_bwd_chunk_kernel(
    dz_ptr,  # (T, C) contiguous
    rows_ptr,  # (T,) int, sorted
    order_ptr,  # (T,) int64: the token of each
    partial_ptr,  # (T // CHUNK, C) contiguous, fp32
    C,
    padding_idx,
    CHUNK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # One program: CHUNK sorted tokens, BLOCK_C channels. Where they have more than one row, nobody asks for the sum.
    pid_k = tl.program_id(0).to(tl.int64)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    first = pid_k * CHUNK
    row = tl.load(rows_ptr + first)
    if (row == tl.load(rows_ptr + first + CHUNK - 1)) & (row != padding_idx):
        acc = tl.zeros((BLOCK_T, BLOCK_C), partial_ptr.dtype.element_ty)
        acc = _add_tokens(acc, dz_ptr, order_ptr, first, first + CHUNK, offs_c, C, BLOCK_T)
        tl.store(partial_ptr + pid_k * C + offs_c, tl.sum(acc, axis=0), mask=offs_c < C)


@triton.jit(do_not_specialize=["padding_idx"])
def _embedding_norm_bwd_row_kernel(
    dz_ptr,  # (T, C) contiguous
    order_ptr,  # (T,) int64
    starts_ptr,  # (V + 1,) int64: where the row's tokens begin
    partial_ptr,  # (T // CHUNK, C) contiguous, fp32
    dtable_ptr,  # (V, C) contiguous
    C,
    padding_idx,
    CHUNK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # One program: one row of the table, BLOCK_C channels.
    row = tl.program_id(0).to(tl.int64)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    start = tl.load(starts_ptr + row)
    end = tl.load(starts_ptr + row + 1)
    end = tl.where(row == padding_idx, start, end)
    # Chunks [head, tail) lie within the row's tokens; [start, left) and [right, end) are beside them.
    head = tl.cdiv(start, CHUNK)
    tail = end // CHUNK
    left = tl.where(head < tail, head * CHUNK, end)
    right = tl.where(head < tail, tail * CHUNK, end)
    acc = tl.zeros((BLOCK_T, BLOCK_C), partial_ptr.dtype.element_ty)
    acc = _add_tokens(acc, dz_ptr, order_ptr, start, left, offs_c, C, BLOCK_T)
    for begin in range(head, tail, BLOCK_T):
        offs_k = begin + tl.arange(0, BLOCK_T)
        mask = (offs_k < tail)[:, None] & (offs_c < C)[None, :]
        acc += tl.load(partial_ptr + offs_k[:, None] * C + offs_c[None, :], mask=mask, other=0.0)
    acc = _add_tokens(acc, dz_ptr, order_ptr, right, end, offs_c, C, BLOCK_T)
    total = tl.sum(acc, axis=0).to(dtable_ptr.dtype.element_ty)
    tl.store(dtable_ptr + row * C + offs_c, total, mask=offs_c < C)


@dataclass(frozen=True)
class TableConfig:
    """Launch parameters of the two kernels that make a table's gradient."""

    chunk: int  # sorted tokens that are summed in the first stage
    block_t: int
    block_c: int
    num_warps: int


# The most registers that any launch of them needs, by the gate on triton 3.6 to 3.9.
_FWD_REGISTERS, _TABLE_REGISTERS = 128, 128


@tuned(
    "embedding_norm_fwd", vary=("block_t", "num_warps", "registers"), config=layer_norm.Config, check=layer_norm.check
)
def pick_config(kernel: str, shape: tuple[int, int], dtype: torch.dtype, card: Card) -> layer_norm.Config:
    """Launch config of the forward for y of `shape` (T, C): a LayerNorm's, with registers for rows of five tables."""
    config = KERNELS["layer_norm_fwd"].rule("layer_norm_fwd", shape, dtype, card)
    return replace(config, registers=_FWD_REGISTERS)


@tuned(
    "embedding_norm_bwd_table", vary=("chunk", "block_t", "block_c", "num_warps"), config=TableConfig, check=any_config
)
def pick_table_config(kernel: str, shape: tuple[int, int], dtype: torch.dtype, card: Card) -> TableConfig:
    """Launch config for dz of `shape` (T, C). Not tuned on a card yet.

    A program of a row that many tokens have reads T / chunk partial sums and up to 2 * chunk tokens: chunk is about
    the root of T. 256 channels: most rows have no token, or few, and a program costs more than its row.
    """
    tokens, channels = shape
    chunk = min(512, max(64, triton.next_power_of_2(int(tokens**0.5))))
    return TableConfig(chunk, 8, min(256, max(4, triton.next_power_of_2(channels))), 2)


def embedding_norm_fwd(
    ids: Sequence[torch.Tensor | None],
    tables: Sequence[torch.Tensor],
    embeds: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    dropout_p: float,
    seed: torch.Tensor | None,
    lead: Sequence[int],
    out_dtype: torch.dtype,
    save: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """y, and with `save` z, mean and rstd for the backward.

    ids: for each table (B, S), (1, S) or (S,) int, one of them None for positions; tables (V, C) any float dtype;
    embeds (*lead, C); weight, bias (C,); seed () int64; lead: (B, S) or (T,); y and z (*lead, C) have `out_dtype`; mean
    and rstd (T,) fp32 (fp64 for fp64).
    """
    channels = tables[0].shape[1]
    y = torch.empty((*lead, channels), dtype=out_dtype, device=weight.device)
    z = torch.empty_like(y) if save else None
    tokens = y.numel() // channels
    stats = _launch.acc_torch(out_dtype)
    mean = torch.empty(tokens, dtype=stats, device=y.device) if save else None
    rstd = torch.empty(tokens, dtype=stats, device=y.device) if save else None
    if tokens == 0:
        return y, z, mean, rstd
    # What stands for positions is not read.
    rows = [weight[:1, None] if i is None else _rows_of_ids(i) for i in ids]
    # One sequence's are its own: one variant of the kernel less, or two.
    alone = tokens == lead[-1]
    own_ids = tuple(int(i is None or alone or row.shape[0] > 1) for i, row in zip(ids, rows, strict=True))
    tables = [_launch.rows(table) for table in tables]
    embeds = None if embeds is None else _launch.rows(embeds)
    config = pick_config("embedding_norm_fwd", (tokens, channels), out_dtype, _launch.card(y))
    with _launch.device_of(y):
        _embedding_norm_fwd_kernel[(triton.cdiv(tokens, config.block_t),)](
            tuple(rows),
            tuple(tables),
            embeds,
            weight.contiguous(),
            None if bias is None else bias.contiguous(),
            seed,
            y,
            z,
            mean,
            rstd,
            tokens,
            lead[-1],
            channels,
            tuple(table.shape[0] for table in tables),
            own_ids,
            tuple(table.stride(0) for table in tables),
            0 if embeds is None else embeds.stride(0),
            eps,
            dropout_p,
            1.0 / (1.0 - dropout_p),
            ACC=_launch.acc(out_dtype),
            TABLES=len(tables),
            POSITIONS=next((i for i, given in enumerate(ids) if given is None), -1),
            HAS_EMBEDS=embeds is not None,
            HAS_DROPOUT=dropout_p > 0.0,
            HAS_BIAS=bias is not None,
            SAVE=save,
            BLOCK_T=config.block_t,
            BLOCK_C=config.block_c,
            **_launch.options(config.num_warps, config.registers),
        )
    return y, z, mean, rstd


def _rows_of_ids(ids: torch.Tensor) -> torch.Tensor:
    """(B, S), (1, S) or (S,) as (B, S) or, where all rows are the same one in memory, (1, S), contiguous.

    At multiples of 16 bytes, where a slice of one row needn't lie: the kernel would be compiled for each mixture.
    """
    ids = ids if ids.dim() > 1 else ids[None]
    ids = (ids[:1] if ids.stride(0) == 0 else ids).contiguous()
    return ids if ids.data_ptr() % 16 == 0 else ids.clone()


def embedding_norm_bwd(
    dy: torch.Tensor,
    z: torch.Tensor,
    weight: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    dropout_p: float,
    seed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """dz (..., C), contiguous, in z's dtype, and the sums (2, C), fp32 (fp64 for fp64): dweight and dbias."""
    dz, _, sums = layer_norm.layer_norm_bwd(
        dy, z, weight, mean, rstd, dropout_p, seed, False, z.dtype, None, dropout_last=True
    )
    return dz, sums


def embedding_norm_bwd_table(
    dz: torch.Tensor, ids: torch.Tensor | None, rows: int, padding_idx: int, dtype: torch.dtype
) -> torch.Tensor:
    """The gradient (rows, C) of a table, in `dtype`.

    dz (B, S, C) or (T, C), contiguous; ids (B, S), (1, S), (S,) or (T,) int, None for positions; padding_idx: the row
    that gets none, or -1.
    """
    channels = dz.shape[-1]
    if dz.numel() == 0:
        return torch.zeros(rows, channels, dtype=dtype, device=dz.device)
    wide = _launch.acc_torch(dz.dtype)
    if dz.dim() == 3 and (ids is None or ids.numel() == dz.shape[1]):
        # Every sequence has the same rows. (S, C), in fp32.
        dz = dz.sum(0, dtype=wide)
    dz = dz.reshape(-1, channels)
    tokens = dz.shape[0]
    if ids is None:
        ordered = order = torch.arange(tokens, device=dz.device)
    else:
        ordered, order = ids.reshape(-1).sort(stable=True)
    starts = torch.searchsorted(ordered, torch.arange(rows + 1, dtype=ordered.dtype, device=dz.device))
    config = pick_table_config("embedding_norm_bwd_table", (tokens, channels), dz.dtype, _launch.card(dz))
    chunks, blocks = tokens // config.chunk, triton.cdiv(channels, config.block_c)
    partial = torch.empty(chunks, channels, dtype=wide, device=dz.device)
    dtable = torch.empty(rows, channels, dtype=dtype, device=dz.device)
    blocked = {"CHUNK": config.chunk, "BLOCK_T": config.block_t, "BLOCK_C": config.block_c}
    options = _launch.options(config.num_warps, _TABLE_REGISTERS)
    with _launch.device_of(dz):
        if chunks:
            _embedding_norm_bwd_chunk_kernel[(chunks, blocks)](
                dz, ordered, order, partial, channels, padding_idx, **blocked, **options
            )
        _embedding_norm_bwd_row_kernel[(rows, blocks)](
            dz, order, starts, partial, dtable, channels, padding_idx, **blocked, **options
        )
    return dtable


def launches(dtype: torch.dtype, device: torch.device) -> Iterator[str]:
    """Make every launch that the configs can choose, on empty tensors; yields a name after each.

    C runs over every block size, T over both of the forward's branches; the forward's flags over what models have:
    words, positions and types in training, and two tables beside vectors in inference.
    """

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    seed = torch.empty((), dtype=torch.int64, device=device)
    for channels in (16, 32, 64, 128, 256, 384, 768, 2048, 4096, MAX_CHANNELS):
        weight, bias = empty(channels), empty(channels)
        tables = [empty(rows, channels) for rows in (30528, 512, 2)]
        for tokens in (128, 4096):
            ids = torch.empty(tokens // 128, 128, dtype=torch.int64, device=device)
            name, lead = f"C={channels} T={tokens}", tuple(ids.shape)
            made = embedding_norm_fwd([ids, None, ids], tables, None, weight, bias, 1e-12, 0.1, seed, lead, dtype, True)
            yield f"embedding_norm_fwd {name} p=0.1"
            y, z, mean, rstd = made
            assert z is not None and mean is not None and rstd is not None
            embedding_norm_bwd(y, z, weight, mean, rstd, 0.1, seed)
            yield f"embedding_norm_bwd {name} p=0.1"
            places = [ids[:1], ids]
            embedding_norm_fwd(places, tables[1:], y, weight, bias, 1e-12, 0.0, None, lead, dtype, False)
            yield f"embedding_norm_fwd {name} embeds"
        for tokens in (4096, 65536, 2**20):
            ids = torch.empty(tokens, dtype=torch.int64, device=device)
            embedding_norm_bwd_table(empty(tokens, channels), ids, 30528, 0, dtype)
            yield f"embedding_norm_bwd_table C={channels} T={tokens}"
