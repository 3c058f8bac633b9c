"""masked_lm_loss: the loss of masked language modelling without its logits in memory; from checks to gradient."""

from __future__ import annotations

import functools
from types import ModuleType

import torch
import torch.nn.functional as F

from fastconv.ops import _onednn
from fastconv.ops._dense import check_dtypes
from fastconv.ops._eager import autocast, autocasting, plain, transformed, use_kernels
from fastconv.ops._register import needs_grad, once_differentiable, register
from fastconv.reference.ops._checks import can_look_at
from fastconv.reference.ops.masked_lm_loss import check, check_range
from fastconv.reference.ops.masked_lm_loss import masked_lm_loss as composed


def masked_lm_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> torch.Tensor:
    """The mean of cross_entropy(hidden @ weight.T + bias, labels) over the tokens that have a label.

    With logits l and their logsumexp Z, a token's loss is

        Z - (1 - label_smoothing) * l[label] - label_smoothing * mean(l) + z_loss * Z**2

    Nothing is computed for the other tokens, and their hidden states are not looked at. Neither direction holds the
    labelled tokens' logits: the kernels hold a tile of them and in the backward their gradient for an eighth of the
    vocabulary, the native formulation those of a sixth of the tokens. Where torch.func, forward-mode AD, torch.jit or a
    tensor subclass follows the calls, which the op has no rules for, the plain formula runs, and holds them all.

    hidden: (..., C) float
    weight: (V, C), bias: (V,) or None, dtype of hidden; under autocast any of autocast's dtypes
    labels: (...) int64 or int32, from 0 to V - 1, or ignore_index
    ignore_index: the label of tokens that don't count; any integer
    label_smoothing: from 0 to 1, the share of the target that is spread evenly over the vocabulary
    z_loss: the weight of Z**2
    returns: () fp32, fp64 for fp64, whatever hidden's dtype: what CrossEntropyLoss gives for logits.float(). NaN where
        no token has a label, as torch's mean; the gradients are 0 then

    Raises: TypeError for tensors that are not real floating point, or of several dtypes, and labels that are no
    integers; ValueError for shapes, devices or options that don't fit; IndexError for labels outside the vocabulary on
    a CPU. On a GPU, where to look would wait for the device, such a label makes the loss NaN, and every gradient that
    it is part of; the native formulation, which waits for the number of labels there, raises. Source: Devlin et al.,
    arXiv 1810.04805, section 3.1; label smoothing: Szegedy et al., arXiv 1512.00567, section 7; z-loss: Chowdhery et
    al., arXiv 2204.02311, section 5.
    """
    check(hidden, weight, bias, labels, label_smoothing, z_loss)
    if not autocasting(hidden):
        check_dtypes(hidden=hidden, weight=weight, bias=bias)
    options = (ignore_index, label_smoothing, z_loss)
    if (
        transformed()
        or torch.jit.is_tracing()
        or not all(t is None or plain(t) for t in (hidden, weight, bias, labels))
    ):
        return composed(
            hidden, weight, bias, labels, ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss=z_loss
        )
    hidden, weight, bias = autocast(hidden), autocast(weight), None if bias is None else autocast(bias)
    check_dtypes(hidden=hidden, weight=weight, bias=bias)
    hidden, labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    training = needs_grad(hidden, weight, bias)
    if labels.numel() == 0 or not use_kernels(hidden, weight, bias):
        if training:
            needs = [t is not None and t.requires_grad for t in (hidden, weight, bias)]
            return _Native.apply(hidden, weight, bias, labels, options, needs)
        return _native(hidden, weight, bias, labels, *options, False, False, False)[0]
    if can_look_at(labels):
        check_range(labels, weight.shape[0], ignore_index)
    if training:
        return _MaskedLMLoss.apply(hidden, weight, bias, labels, options)
    return _forward(hidden, weight, bias, labels, *options, False)[0]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


# The kernels' ops: fastconv::masked_lm_loss_fwd and _bwd. An output that a call doesn't make is an empty tensor.


@functools.cache
def _kernels() -> tuple[ModuleType, ModuleType]:
    # At the first launch: importing triton takes a while, and it may not be there.
    from fastconv.kernels import masked_lm_loss, masked_lm_loss_bwd

    return masked_lm_loss, masked_lm_loss_bwd


def _fwd(hidden, weight, bias, labels, ignore_index, label_smoothing, z_loss, save):
    made = _kernels()[0].masked_lm_loss_fwd(hidden, weight, bias, labels, ignore_index, label_smoothing, z_loss)
    return made if save else (made[0], *(hidden.new_empty(0) for _ in made[1:]))


def _fwd_fake(hidden, weight, bias, labels, ignore_index, label_smoothing, z_loss, save):
    wide = _wide(hidden.dtype)
    loss = hidden.new_empty((), dtype=wide)
    if not save:
        return loss, *(hidden.new_empty(0) for _ in range(5))
    T = hidden.shape[0]
    indices = (hidden.new_empty(T, dtype=torch.int32) for _ in range(3))
    return loss, hidden.new_empty(hidden.shape), *indices, hidden.new_empty(T, dtype=wide)


def _bwd(dy, packed, weight, bias, labels, tokens, numbers, lse, label_smoothing, z_loss, need_hidden, need_weight):
    dhidden, dweight, dbias = _kernels()[1].masked_lm_loss_bwd(
        dy, packed, weight, bias, labels, tokens, numbers, lse, label_smoothing, z_loss, need_hidden, need_weight
    )
    return *(packed.new_empty(0) if t is None else t for t in (dhidden, dweight)), dbias


def _bwd_fake(
    dy, packed, weight, bias, labels, tokens, numbers, lse, label_smoothing, z_loss, need_hidden, need_weight
):
    dhidden = packed.new_empty(packed.shape if need_hidden else 0)
    return dhidden, packed.new_empty(weight.shape if need_weight else 0), packed.new_empty(weight.shape[0])


_forward = register(
    "masked_lm_loss_fwd(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, int ignore_index, "
    "float label_smoothing, float z_loss, bool save) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fwd,
    _fwd_fake,
)
_backward = register(
    "masked_lm_loss_bwd(Tensor dy, Tensor packed, Tensor weight, Tensor? bias, Tensor packed_labels, Tensor tokens, "
    "Tensor numbers, Tensor lse, float label_smoothing, float z_loss, bool need_hidden, bool need_weight) "
    "-> (Tensor, Tensor, Tensor)",
    _bwd,
    _bwd_fake,
)


class _MaskedLMLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, options):
        loss, *saved = _forward(hidden, weight, bias, labels, *options, True)
        ctx.save_for_backward(weight, bias, *saved)
        ctx.options = options
        return loss

    @staticmethod
    @once_differentiable("masked_lm_loss")
    def backward(ctx, dy):
        weight, bias, packed, *saved = ctx.saved_tensors
        need_hidden, need_weight, need_bias, *_ = ctx.needs_input_grad
        _, label_smoothing, z_loss = ctx.options
        dhidden, dweight, dbias = _backward(
            dy, packed, weight, bias, *saved, label_smoothing, z_loss, need_hidden, need_weight
        )
        return (
            dhidden if need_hidden else None,
            dweight if need_weight else None,
            dbias if need_bias else None,
            None,
            None,
        )


# The native formulation: the op fastconv::masked_lm_loss_native, since how many tokens have a label is data, which no
# graph of torch.compile holds. It makes the gradients along with the loss, of the tokens' sum: three products, where a
# backward that makes the logits again takes four. The weight's, V * C values, is kept until then; for a loss, not long.

# The logits of so many tokens at least are held at a time, or of a sixth of all: at 15 % labels, of all that have one.
_PIECE, _SHARE = 256, 6

# Values that the softmax works on at a time: 16 MB in fp32, which stay in a processor's last cache. With fewer, threads
# wait for one another too often: at 2**19 on a busy machine it took longer than the products.
_SLICE = 2**22


def _work_dtype(dtype: torch.dtype) -> torch.dtype:
    """In what the native formulation multiplies: a sum over many labels is too large for fp16, as is a CPU's time."""
    return torch.float32 if dtype == torch.float16 else dtype


def _native_op(hidden, weight, bias, labels, ignore_index, label_smoothing, z_loss, *needs):
    index = (labels != ignore_index).nonzero().squeeze(1)
    labels, number = labels[index].long(), len(index)
    check_range(labels, weight.shape[0], ignore_index)
    dtype, wide = _work_dtype(hidden.dtype), _wide(hidden.dtype)
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    need_hidden, need_weight, need_bias = needs
    dhidden = hidden.new_zeros(hidden.shape if need_hidden else 0, dtype=dtype)
    dweight = hidden.new_zeros(weight.shape if need_weight and number == 0 else 0, dtype=dtype)
    dbias = hidden.new_zeros(weight.shape[0] if need_bias else 0, dtype=wide)
    losses = hidden.new_empty(number, dtype=wide)
    step = max(_PIECE, hidden.shape[0] // _SHARE)
    with torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, number, step):
            at, piece = index[start : start + step], slice(start, start + step)
            rows, label = hidden[at].to(dtype), labels[piece]
            dlogits = _linear(rows, weight, bias)
            of_label = _softmax(dlogits, label[:, None], losses[piece, None], label_smoothing, z_loss, any(needs))
            if need_hidden:
                # The label's term by itself: amid thousands of small ones, a long sum would lose their digits.
                sums = _linear(dlogits, weight.t()) + of_label * weight[label]
                dhidden.index_copy_(0, at, sums.to(dtype))
            if need_weight or need_bias:
                dlogits[torch.arange(len(label), device=label.device), label] = of_label.to(dtype).squeeze(1)
            if need_weight:
                part = _linear(dlogits.t(), rows.t())
                # A sum of several is kept in fp32.
                dweight = part if start == 0 else dweight.to(wide).add_(part)
            if need_bias:
                dbias += dlogits.sum(0)
    return losses.sum() / number, losses.new_full((), 1.0 / max(1, number)), dhidden, dweight.to(dtype), dbias


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    # torch's products of bf16 are oneDNN's, and spare transposed inputs a copy.
    if x.dtype == torch.float32 and _onednn.usable(x, weight, bias):
        return _onednn.linear(x, weight, bias)
    return F.linear(x, weight, bias)


def _softmax(logits, labels, losses, label_smoothing, z_loss, gradient):
    """Write the tokens' losses (R, 1), and with `gradient` that of their sum over logits, but for the labels' (R, 1),
    which are returned, unrounded, and 0 there.
    """
    of_labels = torch.empty_like(losses)
    size = max(1, _SLICE // logits.shape[1])
    pieces = zip(*(t.split(size) for t in (logits, labels, losses, of_labels)), strict=True)
    for part, label, loss, of_label in pieces:
        log_p = F.log_softmax(part, 1, dtype=loss.dtype)
        chosen = log_p.gather(1, label)
        lse = part.gather(1, label) - chosen
        loss.copy_((label_smoothing - 1.0) * chosen)
        if label_smoothing > 0.0:
            loss -= label_smoothing * log_p.mean(1, keepdim=True)
        if z_loss > 0.0:
            loss += z_loss * lse.square()
        if not gradient:
            continue
        p = torch.exp(log_p, out=part if part.dtype == log_p.dtype else log_p)
        if z_loss > 0.0:
            p *= 1.0 + 2.0 * z_loss * lse
        if label_smoothing > 0.0:
            p -= label_smoothing / p.shape[1]
        of_label.copy_(p.gather(1, label) - (1.0 - label_smoothing))
        p.scatter_(1, label, 0.0)
        if p is not part:
            part.copy_(p)
    return of_labels


def _native_fake(hidden, weight, bias, labels, ignore_index, label_smoothing, z_loss, *needs):
    dtype, wide = _work_dtype(hidden.dtype), _wide(hidden.dtype)
    need_hidden, need_weight, need_bias = needs
    dhidden = hidden.new_empty(hidden.shape if need_hidden else 0, dtype=dtype)
    dweight = hidden.new_empty(weight.shape if need_weight else 0, dtype=dtype)
    dbias = hidden.new_empty(weight.shape[0] if need_bias else 0, dtype=wide)
    return hidden.new_empty((), dtype=wide), hidden.new_empty((), dtype=wide), dhidden, dweight, dbias


_native = register(
    "masked_lm_loss_native(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, int ignore_index, "
    "float label_smoothing, float z_loss, bool need_hidden, bool need_weight, bool need_bias) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _native_op,
    _native_fake,
)


class _Native(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, options, needs):
        loss, *saved = _native(hidden, weight, bias, labels, *options, *needs)
        ctx.save_for_backward(*saved)
        ctx.needs = needs
        ctx.dtype = hidden.dtype
        return loss

    @staticmethod
    @once_differentiable("masked_lm_loss")
    def backward(ctx, dy):
        scale, *gradients = ctx.saved_tensors
        scale = scale * dy
        gradients = ((scale * t).to(ctx.dtype) if need else None for t, need in zip(gradients, ctx.needs, strict=True))
        return *gradients, None, None, None
