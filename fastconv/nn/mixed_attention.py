"""Mixed attention of ConvBERT: attention heads and span-based dynamic convolution heads side by side."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastconv.kernels import MAX_KERNEL_SIZE
from fastconv.nn._plain import bare, original_class, plain_linear
from fastconv.nn.attention import Call, FastForward, attend
from fastconv.nn.packed_linear import packed_linear
from fastconv.nn.separable_conv import plain_layers
from fastconv.ops import separable_conv, span_dynamic_conv, span_kernel_logits
from fastconv.ops._eager import autocast, use_kernels
from fastconv.ops._register import needs_grad
from fastconv.reference import Packing


class MixedAttention(FastForward):
    """The fused forward of ConvBertSelfAttention, for this library's class and those of transformers 4.57 and 5.x.

    The convolution heads see the hidden states only, with an encoder's states too.
    """

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, Any]:
        """(B, S, C) -> ((B, S, C), None); other calls go to the original, those for probabilities among them."""
        call = self.call(hidden_states, args, kwargs) if self._plain_convolutions() else None
        if call is None:
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        of_both, of_encoder = self.fastconv_packed()
        if call.states is None:
            q, k, v, conv_out = packed_linear(hidden_states, of_both)
        else:
            q, conv_out = packed_linear(hidden_states, (of_both[0], of_both[-1]))
            k, v = packed_linear(call.states, of_encoder)
        return self._side_by_side(q, k, v, conv_out, self._kernel_logits(hidden_states, q, call.packing), call), None

    def _kernel_logits(self, hidden_states: torch.Tensor, q: torch.Tensor, packing: Packing | None) -> torch.Tensor:
        """The logits of every token's kernels: (B, S, C), (B, S, C/2) -> (B, S, H*K), of a packed batch (T, H*K)."""
        conv, layer = self.key_conv_attn_layer, self.conv_kernel_layer  # type: ignore[attr-defined]
        x, gate = _rows(hidden_states, packing), _rows(q, packing)
        weights = conv.depthwise.weight, conv.pointwise.weight, conv.bias
        if plain_linear(layer):
            return span_kernel_logits(x, *weights, gate, layer.weight, layer.bias, packing=packing)
        return layer(separable_conv(x, *weights, gate=gate, packing=packing))

    def takes_packing(self) -> bool:
        """Whether a call with a `Packing` as the mask, and nothing else, gets the fused forward."""
        return super().takes_packing() and self._plain_convolutions()

    def _plain_convolutions(self) -> bool:
        fits = self.conv_kernel_size <= MAX_KERNEL_SIZE  # type: ignore[attr-defined]
        return fits and _plain_separable(self.key_conv_attn_layer)  # type: ignore[attr-defined]

    def _side_by_side(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        conv_out: torch.Tensor,
        logits: torch.Tensor,
        call: Call,
    ) -> torch.Tensor:
        """Attention and dynamic convolution, (B, S, C/2) each, as (B, S, C)."""
        heads = (self.num_attention_heads, self.attention_head_size)  # type: ignore[attr-defined]
        taps, half, packing = self.conv_kernel_size, q.shape[-1], call.packing  # type: ignore[attr-defined]
        value = _rows(conv_out, packing)
        shared = _can_share(q, k, v, conv_out, logits, call)
        q, k, v = (t.unflatten(-1, heads) for t in (q, k, v))
        if not shared:
            attended = attend(self, q, k, v, call).flatten(2)
            convolved = span_dynamic_conv(value, logits, taps, packing=packing)
            return torch.cat((attended, convolved.view(conv_out.shape)), -1)
        # Each kernel writes straight into its half.
        context = q.new_empty(*conv_out.shape[:-1], half + conv_out.shape[-1])
        attend(self, q, k, v, call, out=context[..., :half].unflatten(-1, heads))
        span_dynamic_conv(value, logits, taps, packing=packing, out=_rows(context, packing)[..., half:])
        return context

    def fastconv_packed(self) -> tuple[tuple[nn.Module, ...], ...]:
        """The layers whose parameters are packed, of self-attention and, of the encoder's states, cross-attention."""
        q, k, v = self.query, self.key, self.value  # type: ignore[attr-defined]
        return (q, k, v, self.conv_out_layer), (k, v)  # type: ignore[attr-defined]


def _rows(x: torch.Tensor, packing: Packing | None) -> torch.Tensor:
    """(B, S, ...) as it is, and (1, T, ...) of a packed batch as (T, ...)."""
    return x if packing is None else x[0]


def _can_share(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, conv_out: torch.Tensor, logits: torch.Tensor, call: Call
) -> bool:
    """Whether the results of attention and convolution may be written into one tensor: by kernels, in one dtype."""
    return (
        not needs_grad(q, k, v, conv_out, logits, call.mask, call.head_mask)
        and use_kernels(q, k, v, conv_out, logits, call.mask, call.head_mask)
        and q.dtype == conv_out.dtype
        and autocast(q) is q
    )


_SEPARABLE = (
    "fastconv.reference.layers.SeparableConv1D",
    "transformers.models.convbert.modeling_convbert.SeparableConv1D",
)


def _plain_separable(module: nn.Module) -> bool:
    """Whether the module is nothing but a separable convolution, so that its three parameters say all."""
    cls = original_class(module) or type(module)
    return f"{cls.__module__}.{cls.__qualname__}" in _SEPARABLE and bare(module) and plain_layers(module)
