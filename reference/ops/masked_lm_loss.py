"""The loss of masked language modelling: a dense layer to the vocabulary and the cross-entropy of labelled tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._checks import can_look_at, check_float, check_shape


def masked_lm_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """The mean of cross_entropy(hidden @ weight.T + bias, labels) over the tokens that have a label.

    With logits l and their logsumexp Z, a token's loss is

        Z - (1 - label_smoothing) * l[label] - label_smoothing * mean(l) + z_loss * Z**2

    The logits have the dtype of `hidden`, as a model's have; the loss is computed from them in fp32, or in fp64.

    Args:
        hidden: (..., C), floating point.
        weight: (V, C), dtype of `hidden`.
        bias: (V,), dtype of `hidden`, or None.
        labels: (...), int64 or int32, from 0 to V - 1, or `ignore_index`.
        ignore_index: the label of tokens that don't count.
        label_smoothing: the share of the target that is spread evenly over the vocabulary.
        z_loss: the weight of the squared logsumexp.

    Returns:
        (), fp32, or fp64 for an fp64 `hidden`; NaN if no token has a label.

    Raises:
        TypeError: a tensor that is not real floating point, labels that are not integers.
        ValueError: shapes that don't fit, tensors on different devices, label_smoothing outside [0, 1], a z_loss that
            is negative or not finite.
        IndexError: labels outside the vocabulary.

    Source: Devlin et al., "BERT" (2018), section 3.1; label smoothing: Szegedy et al., "Rethinking the Inception
    Architecture" (2015), section 7; z-loss: Chowdhery et al., "PaLM" (2022), section 5.
    """
    check(hidden, weight, bias, labels, label_smoothing, z_loss)
    # Labels that torch.func.vmap batches can't be looked at.
    if can_look_at(labels) and not torch._C._functorch.is_functorch_wrapped_tensor(labels):
        check_range(labels, weight.shape[0], ignore_index)
    logits = F.linear(hidden, weight, bias).flatten(0, -2)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    target = labels.flatten().long()
    loss = F.cross_entropy(logits, target, ignore_index=ignore_index, label_smoothing=label_smoothing)
    if z_loss > 0.0:
        labelled = target != ignore_index
        squares = torch.where(labelled, logits.logsumexp(-1).square(), 0.0)
        loss = loss + z_loss * squares.sum() / labelled.sum()
    return loss


def check(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    label_smoothing: float,
    z_loss: float,
) -> None:
    """Raise what `masked_lm_loss` says for arguments that don't fit; of the labels all but their values."""
    check_float(hidden=hidden, weight=weight, bias=bias)
    if hidden.dim() < 2 or weight.dim() != 2 or hidden.shape[-1] != weight.shape[1] or 0 in weight.shape:
        raise ValueError(
            "hidden and weight must have shapes (..., C) and (V, C) with C and V >= 1, got "
            f"{tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if bias is not None:
        check_shape("bias", bias, (weight.shape[0],), "(V,)")
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a torch.Tensor, got {type(labels).__name__}")
    if labels.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"labels must be an int64 or int32 tensor, got {labels.dtype}")
    check_shape("labels", labels, tuple(hidden.shape[:-1]), "that of hidden without its last dimension")
    if labels.device != hidden.device:
        raise ValueError(f"hidden is on {hidden.device} but labels is on {labels.device}; move them to one device")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be from 0 to 1, got {label_smoothing}")
    if not 0.0 <= z_loss < float("inf"):
        raise ValueError(f"z_loss must be at least 0 and finite, got {z_loss}")


def check_range(labels: Tensor, size: int, ignore_index: int) -> None:
    """Raise IndexError for a label that is neither from 0 to size - 1 nor ignore_index; waits for the device."""
    wrong = labels[((labels < 0) | (labels >= size)) & (labels != ignore_index)]
    if len(wrong):
        raise IndexError(
            f"labels must be from 0 to {size - 1} (the vocabulary has {size}) or ignore_index {ignore_index}, got "
            f"{int(wrong[0])}"
        )
