"""For each kernel with launch configs tensors of a shape, the op that it is for, and its launcher.

A candidate is checked through the op with its gradients, which reaches everything that its results go into, and timed
through the launcher alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from fastconv import ops
from fastconv.kernels import (
    embedding_norm,
    grouped_linear,
    layer_norm,
    linear_act,
    masked_lm_loss,
    masked_lm_loss_bwd,
    separable_conv,
    span_dynamic_conv,
    span_kernel_logits,
)
from fastconv.kernels._configs import Asked
from fastconv.reference import ops as reference
from fastconv.tuning import case
from fastconv.tuning.attention_cases import masked_attention
from fastconv.tuning.case import Case, Function, Normal, rows

# The share of tokens that masked language modelling labels.
_LABELLED = 0.15

# Channels of a product that an op has beside the kernel: few, so that a check is about the kernel.
_FEW = 16


def make(asked: Asked, device: torch.device) -> Case:
    """The case for what a launcher asked for, the same numbers every time."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, generator=generator, device=device) * scale).to(asked.dtype)

    return MAKERS[asked.kernel](asked.kernel, asked.shape, normal)


def _layer_norm(kernel: str, shape: tuple[int, ...], normal: Normal) -> Case:
    tokens, channels = shape
    tensors = {
        "x": normal(tokens, channels),
        "weight": normal(channels),
        "bias": normal(channels),
        "x_bias": normal(channels),
        "residual": normal(tokens, channels),
    }
    x, weight = tensors["x"], tensors["weight"]
    forward = (x, weight, tensors["bias"], 1e-12, tensors["x_bias"], tensors["residual"], 0.0, None, x.dtype)

    def launch() -> object:
        return layer_norm.layer_norm_fwd(*forward, False)

    if kernel == "layer_norm_bwd":
        _, z, mean, rstd = layer_norm.layer_norm_fwd(*forward, True)
        assert z is not None and mean is not None and rstd is not None
        backward = (z, weight, mean, rstd, 0.0, None, True, x.dtype, None)

        def launch() -> object:
            return layer_norm.layer_norm_bwd(x, *backward)

    return Case(launch, ops.layer_norm, reference.layer_norm, tensors)


def _embedding_norm(kernel: str, shape: tuple[int, ...], normal: Normal) -> Case:
    tokens, channels = shape
    batch, length = rows(tokens)
    tensors = {
        "words": normal(case.VOCABULARY, channels),
        "positions": normal(length, channels),
        "kinds": normal(2, channels),
        "weight": normal(channels),
        "bias": normal(channels),
    }
    words, weight = tensors["words"], tensors["weight"]
    # As in text: few words make up most of it.
    drawn = normal(batch, length).float().abs().neg().exp()
    ids = (drawn * (case.VOCABULARY - 1)).long()
    types = torch.zeros_like(ids)

    def by(op: Function) -> Function:
        return lambda words, positions, kinds, weight, bias: op(
            [ids, None, types], [words, positions, kinds], weight, bias
        )

    if kernel == "embedding_norm_fwd":
        given = ([ids, None, types], [words, tensors["positions"], tensors["kinds"]], None, weight, tensors["bias"])

        def launch() -> object:
            return embedding_norm.embedding_norm_fwd(*given, 1e-12, 0.0, None, ids.shape, words.dtype, False)
    else:
        dz = normal(tokens, channels)

        def launch() -> object:
            return embedding_norm.embedding_norm_bwd_table(dz, ids.flatten(), case.VOCABULARY, -1, words.dtype)

    return Case(launch, by(ops.embedding_norm), by(reference.embedding_norm), tensors)


def _activation(kernel: str, shape: tuple[int, ...], normal: Normal) -> Case:
    tokens, channels = shape
    tensors = {"x": normal(tokens, _FEW), "weight": normal(channels, _FEW, scale=0.25), "bias": normal(channels)}
    z, bias = normal(tokens, channels), tensors["bias"]

    def launch() -> object:
        if kernel == "linear_act_fwd":
            return linear_act.linear_act_fwd(z, bias, "gelu")
        return grouped_linear.grouped_linear_bwd(z, z, bias, "gelu")

    return Case(
        launch,
        lambda **t: ops.linear_act(**t, activation="gelu"),
        lambda **t: reference.linear_act(**t, activation="gelu"),
        tensors,
    )


def _grouped_linear(kernel: str, shape: tuple[int, ...], normal: Normal) -> Case:
    tokens, groups, size_in, size_out = shape
    # With one group it is a dense layer's weight, transposed.
    lies = (groups, size_out, size_in) if groups == 1 else (groups, size_in, size_out)
    stored = normal(*lies, scale=size_in**-0.5)
    tensors = {
        "x": normal(tokens, groups * size_in),
        "weight": stored.transpose(1, 2) if groups == 1 else stored,
        "bias": normal(groups * size_out),
    }
    return Case(
        lambda: grouped_linear.grouped_linear_fwd(**tensors, activation="gelu", save=False),
        lambda **t: ops.grouped_linear(**t, activation="gelu"),
        lambda **t: reference.grouped_linear(**t, activation="gelu"),
        tensors,
    )


def _separable_conv(kernel: str, shape: tuple[int, ...], normal: Normal) -> Case:
    tokens, channels, kernel_size = shape
    tensors = {
        "x": normal(*rows(tokens), channels),
        "depthwise": normal(channels, 1, kernel_size),
        "pointwise": normal(_FEW, channels, 1, scale=channels**-0.5),
        "bias": normal(_FEW, 1),
    }
    x, depthwise = tensors["x"], tensors["depthwise"]

    def launch() -> object:
        if kernel == "separable_conv_fwd":
            return separable_conv.separable_conv_depthwise(x, depthwise, None, None, False)
        return separable_conv.separable_conv_bwd_depthwise(x, x, kernel_size, None, None)

    return Case(launch, ops.separable_conv, reference.separable_conv, tensors)


def _gate(kernel: str, shape: tuple[int, ...], normal: Normal) -> Case:
    tokens, channels = shape
    lead = rows(tokens)
    tensors = {
        "x": normal(*lead, _FEW),
        "depthwise": normal(_FEW, 1, 3),
        "pointwise": normal(channels, _FEW, 1, scale=0.25),
        "bias": normal(channels, 1),
        "gate": normal(*lead, channels),
    }
    dy, gate, product = (normal(*lead, channels) for _ in range(3))
    return Case(
        lambda: separable_conv.separable_conv_bwd_gate(dy, gate, product),
        ops.separable_conv,
        reference.separable_conv,
        tensors,
    )


def _span_dynamic_conv(kernel: str, shape: tuple[int, ...], normal: Normal) -> Case:
    tokens, heads, size, kernel_size = shape
    lead = rows(tokens)
    tensors = {"value": normal(*lead, heads * size), "kernel_logits": normal(*lead, heads * kernel_size)}
    value, logits = tensors.values()
    _, stats = span_dynamic_conv.span_dynamic_conv_fwd(value, logits, kernel_size, None, None, None, True)
    assert stats is not None

    def launch() -> object:
        if kernel == "span_dynamic_conv_fwd":
            return span_dynamic_conv.span_dynamic_conv_fwd(value, logits, kernel_size, None, None, None, False)
        return span_dynamic_conv.span_dynamic_conv_bwd(value, value, logits, stats, kernel_size, None, None)

    return Case(
        launch,
        lambda **t: ops.span_dynamic_conv(**t, kernel_size=kernel_size),
        lambda **t: reference.span_dynamic_conv(**t, kernel_size=kernel_size),
        tensors,
    )


def _span_kernel_logits(kernel: str, shape: tuple[int, ...], normal: Normal) -> Case:
    tokens, size_in, size_between, size_out = shape
    lead = rows(tokens)
    tensors = {
        "x": normal(*lead, size_in),
        "depthwise": normal(size_in, 1, 9, scale=1 / 3),
        "pointwise": normal(size_between, size_in, 1, scale=size_in**-0.5),
        "bias": normal(size_between, 1),
        "gate": normal(*lead, size_between),
        "weight": normal(size_out, size_between, scale=size_between**-0.5),
        "kernel_bias": normal(size_out),
    }
    given = tuple(tensors[name] for name in ("x", "pointwise", "bias", "gate", "weight", "kernel_bias"))
    return Case(
        lambda: span_kernel_logits.span_kernel_logits_fwd(*given),
        ops.span_kernel_logits,
        reference.span_kernel_logits,
        tensors,
        gradients=False,
    )


def _masked_lm_loss(kernel: str, shape: tuple[int, ...], normal: Normal) -> Case:
    rows, channels = shape
    # The weight's gradient has a row for each of the vocabulary's; tokens are as many as in 8 sequences of 512.
    tokens, vocabulary = (8 * case.LENGTH, rows) if kernel == "masked_lm_loss_bwd_weight" else (rows, case.VOCABULARY)
    tensors = {
        "hidden": normal(tokens, channels),
        "weight": normal(vocabulary, channels, scale=channels**-0.5),
        "bias": normal(vocabulary),
    }
    hidden, weight, bias = tensors.values()
    labels = torch.full((tokens,), -100, dtype=torch.int64, device=hidden.device)
    labelled = torch.arange(0, tokens, round(1 / _LABELLED), device=hidden.device)
    labels[labelled] = labelled % vocabulary
    loss, packed, *rest = masked_lm_loss.masked_lm_loss_fwd(hidden, weight, bias, labels, -100, 0.0, 0.0)
    packed_labels, places, numbers, lse = rest
    saved = (packed_labels, places, numbers, lse)

    def launch() -> object:
        if kernel == "masked_lm_loss_fwd":
            return masked_lm_loss.masked_lm_loss_fwd(hidden, weight, bias, labels, -100, 0.0, 0.0)
        return masked_lm_loss_bwd.masked_lm_loss_bwd(loss, packed, weight, bias, *saved, 0.0, 0.0, True, True)

    return Case(
        launch,
        lambda **t: ops.masked_lm_loss(**t, labels=labels),
        lambda **t: reference.masked_lm_loss(**t, labels=labels),
        tensors,
    )


MAKERS: dict[str, Callable[[str, tuple[int, ...], Normal], Case]] = {
    "layer_norm_fwd": _layer_norm,
    "layer_norm_bwd": _layer_norm,
    "embedding_norm_fwd": _embedding_norm,
    "embedding_norm_bwd_table": _embedding_norm,
    "linear_act_fwd": _activation,
    "grouped_linear_fwd": _grouped_linear,
    "grouped_linear_bwd_pre": _activation,
    "separable_conv_fwd": _separable_conv,
    "separable_conv_bwd_depthwise": _separable_conv,
    "separable_conv_bwd_gate": _gate,
    "span_dynamic_conv_fwd": _span_dynamic_conv,
    "span_dynamic_conv_bwd": _span_dynamic_conv,
    "span_kernel_logits_fwd": _span_kernel_logits,
    "masked_attention_fwd": masked_attention,
    "masked_attention_bwd_dq": masked_attention,
    "masked_attention_bwd_dkv": masked_attention,
    "masked_lm_loss_fwd": _masked_lm_loss,
    "masked_lm_loss_bwd_logits": _masked_lm_loss,
    "masked_lm_loss_bwd_hidden": _masked_lm_loss,
    "masked_lm_loss_bwd_weight": _masked_lm_loss,
}
