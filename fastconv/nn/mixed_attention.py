"""Mixed attention of ConvBERT: attention heads and span-based dynamic convolution heads side by side."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastconv.dispatch import use_triton
from fastconv.nn._plain import bare, original_class
from fastconv.nn.attention import FastForward, attend
from fastconv.nn.packed_linear import linear, packed_linear
from fastconv.nn.separable_conv import plain_layers
from fastconv.ops import separable_conv, span_dynamic_conv
from fastconv.ops._register import needs_grad


class MixedAttention(FastForward):
    """The fused forward of ConvBertSelfAttention, for this library's class and those of transformers 4.57 and 5.x."""

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, S, C) -> ((B, S, C), None); other calls go to the original, probabilities included."""
        conv = self.key_conv_attn_layer  # type: ignore[attr-defined]
        if not (self.fits(hidden_states, attention_mask, args, kwargs) and _plain_separable(conv)):
            return super().forward(hidden_states, attention_mask, *args, **kwargs)  # type: ignore[misc]
        q, k, v, conv_out = packed_linear(hidden_states, self.fastconv_packed())
        span = separable_conv(hidden_states, conv.depthwise.weight, conv.pointwise.weight, conv.bias, gate=q)
        logits = linear(span, self.conv_kernel_layer)  # type: ignore[attr-defined]
        attended = attend(self, q, k, v, attention_mask)
        return _beside(attended, conv_out, logits, self.conv_kernel_size), None  # type: ignore[attr-defined]

    def fastconv_packed(self) -> tuple[nn.Module, ...]:
        """The layers whose parameters are packed."""
        return self.query, self.key, self.value, self.conv_out_layer  # type: ignore[attr-defined]


def _beside(attended: torch.Tensor, conv_out: torch.Tensor, logits: torch.Tensor, kernel_size: int) -> torch.Tensor:
    """attended (B, S, C/2) and the dynamic convolution (B, S, C/2), side by side: (B, S, C)."""
    if needs_grad(attended, conv_out, logits) or not use_triton(conv_out) or attended.dtype != conv_out.dtype:
        return torch.cat((attended, span_dynamic_conv(conv_out, logits, kernel_size)), -1)
    half = attended.shape[-1]
    context = attended.new_empty(*attended.shape[:-1], half + conv_out.shape[-1])
    context[..., :half] = attended
    # The kernel writes straight into its half.
    span_dynamic_conv(conv_out, logits, kernel_size, out=context[..., half:])
    return context


_SEPARABLE = (
    "fastconv.reference.layers.SeparableConv1D",
    "transformers.models.convbert.modeling_convbert.SeparableConv1D",
)


def _plain_separable(module: nn.Module) -> bool:
    """Whether the module is nothing but a separable convolution, so that its three parameters say all."""
    cls = original_class(module) or type(module)
    return f"{cls.__module__}.{cls.__qualname__}" in _SEPARABLE and bare(module) and plain_layers(module)
