"""masked_attention: scaled dot-product attention over (B, S, H, D) with every mask; from checks to gradient."""

from __future__ import annotations

import functools
from types import ModuleType

import torch
import torch.nn.functional as F

from fastconv import dispatch
from fastconv.kernels import MAX_FP32_HEAD_SIZE, MAX_HEAD_SIZE
from fastconv.ops import _sdpa
from fastconv.ops._eager import autocast, use_kernels
from fastconv.ops._out import check_out, shares_memory
from fastconv.ops._register import distinct, needs_grad, once_differentiable, register
from fastconv.ops._relative import relative_bias
from fastconv.ops._seed import check_seed, draw_seed, native_keep_mask
from fastconv.reference import Packing
from fastconv.reference.ops import masked_attention as composed
from fastconv.reference.ops.masked_attention import (
    Packings,
    RelativePositions,
    attention_probabilities,
    both_packings,
    check,
    combined_mask,
)


def masked_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    lengths: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    causal: bool = False,
    relative: RelativePositions | None = None,
    head_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    scale: float | None = None,
    packing: Packings | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """(dropout(softmax((q @ k.T + relative) * scale + mask)) * head_mask) @ v for every batch row and head.

    The last query is at the last key. A query that may not attend to any key attends equally to all Sk of them.

    q: (B, Sq, H, D) float; k, v: (B, Sk, H, D), dtype of q; any strides with a contiguous last dimension are taken as
        they are, so a packed projection needs no copy. D up to 256, in fp32 past 128 by the native
        formulation
    lengths: (B,) int32 or int64: the keys from this one on are forbidden; looked at on a CPU only
    mask: broadcastable to (B, H, Sq, Sk), never expanded in memory: bool, True where a key may be attended to, or
        floating point, added to the scores, where -inf and the lowest number of its dtype forbid a key
    causal: no query attends to a later key
    relative: a table (2 P - 1, D) of what distances add to the scores, and whether keys count too; see
        `RelativePositions`. The scores' sum with it is made in memory, (B, H, Sq, Sk) in fp32
    head_mask: broadcastable to (B, H, Sq, Sk), multiplies the probabilities after the dropout. One that differs from
        key to key is computed without a kernel
    dropout_p: probability, below 1, of dropping a probability; the others are scaled by 1 / (1 - dropout_p)
    seed: () int64 on q's device: what is dropped is a function of it and of the position, per backend. None draws one
        from torch's generator of that device. The native formulation reads its value, and makes the probabilities
    scale: 1 / sqrt(D) if None
    packing: where the sequences of T tokens begin and end; then q, k and v are (T, H, D), queries see the keys of their
        own sequence, and B, Sq and Sk are 1 and that sequence's length. Two packings: of the queries, and of the keys.
        By the kernels a NaN or an infinity reaches the sequences beside it too, whose probability for it is 0
    out: like the result, written and returned if given: a half of a wider tensor, say; not with a gradient
    returns: (B, Sq, H, D), with a packing (T, H, D), dtype of q; all is cast to autocast's dtype where that applies

    Raises: TypeError for tensors that are not real floating point or not of one dtype (a mask may be bool, lengths are
    integers); ValueError for shapes, devices, lengths, a packing or a dropout_p that don't fit, a packing with lengths
    or a mask, causal with two packings, an `out` unlike the result or where a gradient is needed. Source: Vaswani et
    al., arXiv 1706.03762, section 3.2.1; Dao, arXiv 2307.08691.
    """
    check(q, k, v, lengths, mask, causal, relative, head_mask, dropout_p, packing)
    if q.shape[-1] > MAX_HEAD_SIZE:
        raise ValueError(f"a head must have at most {MAX_HEAD_SIZE} channels, got D = {q.shape[-1]}")
    check_seed(q, seed)
    relative = None if relative is None else RelativePositions(*relative)
    q, k, v = autocast(q), autocast(k), autocast(v)
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    table = None if relative is None else relative.table
    if out is not None:
        check_out(out, q, k, v, mask, head_mask, table)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    factor = _of_queries(head_mask, packed=packing is not None)
    small = q.shape[-1] <= (MAX_HEAD_SIZE if q.dtype.itemsize == 2 else MAX_FP32_HEAD_SIZE)
    by_kernels = small and use_kernels(q, k, v, mask, table)
    if relative is not None and packing is not None:
        y = _each_sequence(q, k, v, causal, relative, dropout_p, seed, scale, *both_packings(packing))
    elif (head_mask is not None and factor is None) or (not by_kernels and (relative is not None or needs_grad(mask))):
        y = _composed(
            q, k, v, lengths, mask, causal, relative, None if factor is not None else head_mask, dropout_p, seed, scale
        )
    elif not by_kernels or _prefers_sdpa(q, k, v, causal, dropout_p, lengths, mask, packing, relative):
        y = _native(q, k, v, lengths, mask, causal, dropout_p, seed, scale, packing)
    else:
        if relative is not None:
            mask, lengths, causal = _biased(q, k, mask, lengths, causal, relative, scale), None, False
        elif mask is not None and needs_grad(mask):
            # One mask, whose forbidden keys get no gradient.
            mask, lengths, causal = _one_mask(q, k, mask, lengths, causal), None, False
        direct = out is not None and factor is None and out.stride(-1) == 1 and not shares_memory(out, q, k, v, mask)
        y = _by_kernels(q, k, v, lengths, mask, causal, dropout_p, seed, scale, packing, out if direct else None)
        if direct:
            return y
    if factor is not None:
        y = y * factor.to(y.dtype)
    return y if out is None else out.copy_(y)


def _of_queries(head_mask: torch.Tensor | None, *, packed: bool) -> torch.Tensor | None:
    """A head_mask that is the same for all keys as a factor of the result; None for another, or none."""
    if head_mask is None:
        return None
    head_mask = head_mask.reshape(*(1,) * (4 - head_mask.dim()), *head_mask.shape)
    if head_mask.shape[3] != 1:
        return None
    factor = head_mask.transpose(1, 2)
    return factor[0] if packed else factor


def _one_mask(
    q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor, lengths: torch.Tensor | None, causal: bool
) -> torch.Tensor:
    """An additive mask with lengths and causal in it, without a derivative where it forbids a key."""
    lowest = torch.finfo(mask.dtype).min
    allowed = combined_mask(q, k, None, lengths, causal)
    mask = mask.masked_fill(mask <= lowest, lowest)
    return mask if allowed is None else torch.where(allowed, mask, lowest)


def _biased(
    q: torch.Tensor,
    k: torch.Tensor,
    mask: torch.Tensor | None,
    lengths: torch.Tensor | None,
    causal: bool,
    relative: RelativePositions,
    scale: float,
) -> torch.Tensor:
    """Relative positions and all masks as one additive mask (B, H, Sq, Sk), in fp32 at least."""
    bias = relative_bias(q, k, relative) * scale
    mask = combined_mask(q, k, mask, lengths, causal)
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        forbidden = ~mask
    else:
        forbidden = mask <= torch.finfo(mask.dtype).min
        bias = bias + mask.masked_fill(forbidden, 0.0)
    # The lowest number, with the derivative of the sum that it stands for.
    return torch.where(forbidden, torch.finfo(bias.dtype).min + (bias - bias.detach()), bias)


def _composed(q, k, v, lengths, mask, causal, relative, head_mask, dropout_p, seed, scale):
    """By the formula, with the probabilities in memory."""
    bias = None if relative is None else relative_bias(q, k, relative)
    mask = combined_mask(q, k, mask, lengths, causal)
    probabilities = attention_probabilities(q, k, mask=mask, bias=bias, scale=scale)
    if dropout_p > 0.0 and seed is None:
        probabilities = F.dropout(probabilities, dropout_p)
    elif dropout_p > 0.0:
        keep = native_keep_mask(probabilities.shape, dropout_p, seed)
        probabilities = torch.where(keep, probabilities / (1.0 - dropout_p), 0.0)
    if head_mask is not None:
        probabilities = probabilities * head_mask.to(probabilities.dtype)
    return torch.einsum("bhqk,bkhd->bqhd", probabilities, v)


def _each_sequence(q, k, v, causal, relative, dropout_p, seed, scale, of_queries: Packing, of_keys: Packing):
    """A packed batch with relative positions: the op for each sequence, each with a seed of its own."""
    rows = [q[:0] + k[:0] + v[:0]]
    parts = zip(q.split(of_queries.lengths), k.split(of_keys.lengths), v.split(of_keys.lengths), strict=True)
    for number, (qs, ks, vs) in enumerate(parts):
        if len(qs) == 0 or len(ks) == 0:
            rows.append(qs * 0.0)
            continue
        own = None if seed is None else seed + number
        options = {"causal": causal, "relative": relative, "dropout_p": dropout_p, "seed": own, "scale": scale}
        rows.append(masked_attention(qs[None], ks[None], vs[None], **options)[0])
    return torch.cat(rows)


def _prefers_sdpa(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, dropout_p: float, *masks: object
) -> bool:
    """Whether `auto` leaves a call on a GPU to PyTorch's own kernels.

    In inference only: their backward adds in any order, which gives other bits in every run. With dropout never: of a
    checkpoint the first run has no gradients, and must drop what the second does.
    """
    if dropout_p > 0.0 or needs_grad(q, k, v):
        return False
    masked = any(mask is not None for mask in masks) or (causal and q.shape[1] != k.shape[1])
    return q.is_cuda and dispatch.current() == "auto" and sdpa_is_faster(q.shape[1], q.shape[-1], q.dtype, masked)


def sdpa_is_faster(Sq: int, D: int, dtype: torch.dtype, masked: bool) -> bool:
    """Whether scaled_dot_product_attention is the faster choice in inference, by the queries and the size of a head.

    Never with a mask, which its flash kernels refuse. Without one, forward in TFLOP/s on an H100 in fp16, not causal,
    512 keys, as published (Shah et al., arXiv 2407.08608, figure 5; to be measured on a card of this library's own):
    D 64: Triton 340, FlashAttention-2 282, cuDNN 335. D 128: Triton 323 or less, cuDNN 497. fp32 has matrix units there
    (3xTF32), not here. A few queries are split over the keys there, not here.
    """
    return not masked and (D > 64 or dtype == torch.float32 or Sq <= 16)


def _native(q, k, v, lengths, mask, causal, dropout_p, seed, scale, packing):
    if packing is not None:
        of_queries, of_keys = both_packings(packing)
        if dropout_p == 0.0 or seed is None:
            return _sdpa.native_packed(q, k, v, of_queries, of_keys, causal, dropout_p, scale)
        keep = native_keep_mask((1, q.shape[1], q.shape[0], k.shape[0]), dropout_p, seed)
        options = {"causal": causal, "dropout_mask": keep, "dropout_p": dropout_p, "scale": scale}
        return composed(q, k, v, packing=packing, **options)
    if dropout_p > 0.0 and seed is not None:
        return _composed(q, k, v, lengths, mask, causal, None, None, dropout_p, seed, scale)
    if mask is None or mask.dtype.itemsize <= q.dtype.itemsize or mask.dim() < 2 or mask.shape[-2] == 1:
        return _sdpa.native(q, k, v, lengths, mask, causal, dropout_p, scale)
    # SDPA wants a mask in q's dtype, which would round what is added to the scores of pairs.
    wide = mask.dtype
    with torch.autocast(q.device.type, enabled=False):
        y = _sdpa.native(q.to(wide), k.to(wide), v.to(wide), lengths, mask, causal, dropout_p, scale)
    return y.to(q.dtype)


def attention_dropout_mask(
    B: int, H: int, Sq: int, Sk: int, dropout_p: float, seed: torch.Tensor, *, by_kernels: bool
) -> torch.Tensor:
    """What masked_attention keeps for a seed, (B, H, Sq, Sk) bool: by the kernels, or by the native formulation.

    With a packing B is 1, and Sq and Sk are the numbers of tokens.
    """
    if not by_kernels:
        return native_keep_mask((B, H, Sq, Sk), dropout_p, seed)
    from fastconv.kernels._dropout import dropout_mask

    return dropout_mask(B * H * Sq, Sk, dropout_p, seed).view(B, H, Sq, Sk)


# The ops: fastconv::masked_attention_fwd, _fwd_out and _bwd. An output that a call doesn't make is an empty tensor.


@functools.cache
def _kernels() -> tuple[ModuleType, ModuleType, type]:
    # At the first launch: importing triton takes a while, and it may not be there.
    from fastconv.kernels import masked_attention, masked_attention_bwd
    from fastconv.kernels._attention import Masks

    return masked_attention, masked_attention_bwd, Masks


def _masks(q, k, lengths, mask, packed, causal):
    if mask is not None:
        mask = mask.expand(q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    return _kernels()[2](lengths, mask, causal, packed)


def _fwd(q, k, v, lengths, mask, packed, causal, dropout_p, seed, scale, save):
    masks = _masks(q, k, lengths, mask, packed, causal)
    y, stats = _kernels()[0].masked_attention_fwd(q, k, v, masks, dropout_p, seed, scale, None, save)
    return y, q.new_empty(0) if stats is None else stats


def _fwd_fake(q, k, v, lengths, mask, packed, causal, dropout_p, seed, scale, save):
    B, Sq, H, _ = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty(2, B, H, Sq, dtype=wide) if save else q.new_empty(0)


def _fwd_out(q, k, v, lengths, mask, packed, causal, dropout_p, seed, scale, out):
    masks = _masks(q, k, lengths, mask, packed, causal)
    _kernels()[0].masked_attention_fwd(q, k, v, masks, dropout_p, seed, scale, out, False)


def _fwd_out_fake(q, k, v, lengths, mask, packed, causal, dropout_p, seed, scale, out):
    pass


def _bwd(dy, q, k, v, y, stats, lengths, mask, packed, causal, dropout_p, seed, scale, need_dmask):
    masks = _masks(q, k, lengths, mask, packed, causal)
    dy = dy if dy.stride(-1) == 1 else dy.contiguous()
    dq, dk, dv, dmask = _kernels()[1].masked_attention_bwd(
        dy, q, k, v, y, stats, masks, dropout_p, seed, scale, need_dmask
    )
    return dq, dk, dv, q.new_empty(0) if dmask is None else dmask


def _bwd_fake(dy, q, k, v, y, stats, lengths, mask, packed, causal, dropout_p, seed, scale, need_dmask):
    B, Sq, H, _ = q.shape
    dmask = stats.new_empty(B, H, Sq, (k.shape[1] + 15) // 16 * 16) if need_dmask else q.new_empty(0)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dmask


_ARGUMENTS = "Tensor? lengths, Tensor? mask, Tensor[] packed, bool causal, float dropout_p, Tensor? seed, float scale"
_forward = register(
    f"masked_attention_fwd(Tensor q, Tensor k, Tensor v, {_ARGUMENTS}, bool save) -> (Tensor, Tensor)", _fwd, _fwd_fake
)
_forward_out = register(
    f"masked_attention_fwd_out(Tensor q, Tensor k, Tensor v, {_ARGUMENTS}, Tensor(a!) out) -> ()",
    _fwd_out,
    _fwd_out_fake,
)
_backward = register(
    f"masked_attention_bwd(Tensor dy, Tensor q, Tensor k, Tensor v, Tensor y, Tensor stats, {_ARGUMENTS}, "
    "bool need_dmask) -> (Tensor, Tensor, Tensor, Tensor)",
    _bwd,
    _bwd_fake,
)


def _by_kernels(q, k, v, lengths, mask, causal, dropout_p, seed, scale, packing, out):
    if packing is not None:
        q, k, v = q[None], k[None], v[None]
        out = None if out is None else out[None]
    packed = _packed(packing)
    lengths = None if lengths is None else lengths.contiguous()
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    if mask is not None:
        mask = mask.reshape(*(1,) * (4 - mask.dim()), *mask.shape)
    seed = draw_seed(q) if dropout_p > 0.0 and seed is None else seed
    if needs_grad(q, k, v, mask):
        q, k, v = distinct(q, k, v)
        y = _MaskedAttention.apply(q, k, v, mask, lengths, packed, causal, dropout_p, seed, scale)
    elif out is None:
        y = _forward(q, k, v, lengths, mask, packed, causal, dropout_p, seed, scale, False)[0]
    else:
        _forward_out(q, k, v, lengths, mask, packed, causal, dropout_p, seed, scale, out)
        y = out
    return y if packing is None else y[0]


def _packed(packing: Packings | None) -> list[torch.Tensor]:
    """The first key that each query sees, one past the last, and with two packings the queries that see each key."""
    if packing is None:
        return []
    of_queries, of_keys = both_packings(packing)
    if of_queries is of_keys:
        return [of_queries.first, of_queries.last]
    return [*_ends(of_queries, of_keys), *_ends(of_keys, of_queries)]


def _ends(tokens: Packing, others: Packing) -> list[torch.Tensor]:
    """For each token of one packing, where the same sequence begins and ends in another."""
    lengths, cu_seqlens = tokens.cu_seqlens.diff().long(), others.cu_seqlens.int()
    ends = (cu_seqlens[:-1], cu_seqlens[1:])
    # output_size: or repeat_interleave would wait for the device.
    return [end.repeat_interleave(lengths, output_size=tokens.tokens) for end in ends]


class _MaskedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, mask, lengths, packed, causal, dropout_p, seed, scale):
        y, stats = _forward(q, k, v, lengths, mask, packed, causal, dropout_p, seed, scale, True)
        ctx.save_for_backward(q, k, v, mask, lengths, seed, y, stats, *packed)
        ctx.options = causal, dropout_p, scale
        return y

    @staticmethod
    @once_differentiable("masked_attention")
    def backward(ctx, dy):
        q, k, v, mask, lengths, seed, y, stats, *packed = ctx.saved_tensors
        causal, dropout_p, scale = ctx.options
        need_dmask = ctx.needs_input_grad[3]
        dq, dk, dv, dmask = _backward(
            dy, q, k, v, y, stats, lengths, mask, packed, causal, dropout_p, seed, scale, need_dmask
        )
        dmask = dmask[..., : k.shape[1]].sum_to_size(mask.shape).to(mask.dtype) if need_dmask else None
        return dq, dk, dv, dmask, None, None, None, None, None, None
