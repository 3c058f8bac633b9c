"""Mixed attention of ConvBERT: attention heads and span-based dynamic convolution heads side by side."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastconv.nn._plain import bare
from fastconv.nn.attention import FastForward, attend
from fastconv.nn.packed_linear import linear, packed_linear
from fastconv.ops import separable_conv, span_dynamic_conv


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
        convolved = span_dynamic_conv(conv_out, logits, self.conv_kernel_size)  # type: ignore[attr-defined]
        attended = attend(self, q, k, v, attention_mask)
        return torch.cat((attended, convolved), -1), None

    def fastconv_packed(self) -> tuple[nn.Module, ...]:
        """The layers whose parameters are packed."""
        return self.query, self.key, self.value, self.conv_out_layer  # type: ignore[attr-defined]


_SEPARABLE = (
    "fastconv.reference.layers.SeparableConv1D",
    "transformers.models.convbert.modeling_convbert.SeparableConv1D",
)


def _plain_separable(module: nn.Module) -> bool:
    """Whether the module is nothing but a separable convolution, so that its three parameters say all."""
    cls = type(module)
    return (
        f"{cls.__module__}.{cls.__qualname__}" in _SEPARABLE
        and bare(module)
        and all(type(layer) is nn.Conv1d and bare(layer) for layer in (module.depthwise, module.pointwise))
    )
