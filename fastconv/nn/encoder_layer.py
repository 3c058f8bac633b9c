"""A whole encoder layer in training by kernels, where nobody looks at or changes what is in it."""

from __future__ import annotations

from typing import Any

import torch

from fastconv.nn._plain import bare, dropout_p, original_class, plain_dropout, plain_layer_norm, plain_linear
from fastconv.nn.attention import Call, CrossAttention, SelfAttention, StandIn
from fastconv.nn.feed_forward import Intermediate, ResidualOutput, activation_name, plain_grouped_linear
from fastconv.nn.mixed_attention import MixedAttention
from fastconv.nn.packed_linear import packed_parameters
from fastconv.ops._eager import autocasting, unobserved, use_kernels
from fastconv.ops._register import needs_grad
from fastconv.reference.ops import get_activation

# The modules between a layer and its self-attention.
_ATTENTIONS = (
    "fastconv.reference.layers.Attention",
    "transformers.models.bert.modeling_bert.BertAttention",
    "transformers.models.convbert.modeling_convbert.ConvBertAttention",
    "transformers.models.roc_bert.modeling_roc_bert.RoCBertAttention",
)


class EncoderLayer(StandIn):
    """The fused forward of a layer of this library's encoders, and of those of transformers 4.57 and 5.x.

    In training by kernels it is one autograd function, which launches fewer of them than the modules do. All else goes
    to the original's forward, which calls the modules: inference, traces, autocast, cross-attention, caches, masks of
    heads, relative positions, chunks, and hooks, adapters or modules that the table doesn't know inside of it.
    """

    fastconv_backend: str
    attention: Any
    intermediate: Any
    output: Any
    training: bool

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """The original's arguments and results: (B, S, C) -> (B, S, C), in a tuple where the original makes one."""
        # In training mode under no_grad too: a checkpoint's first run must draw its seeds as the second does.
        wanted = (torch.is_grad_enabled() or self.training) and unobserved()
        y = self._at_once(hidden_states, args, kwargs) if wanted else None
        if y is None:
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        if self.fastconv_original.__module__.startswith("fastconv.reference."):
            return y, None, None
        # That of transformers 4 can give probabilities.
        return (y, None) if "output_attentions" in self.fastconv_arguments else y

    def _at_once(self, x: torch.Tensor, args: tuple, kwargs: dict) -> torch.Tensor | None:
        """The layer's result by one function; None if that doesn't do exactly what the call asks for."""
        if not isinstance(x, torch.Tensor) or x.dim() != 3 or autocasting(x) or not use_kernels(x):
            return None
        call = self._call(x, args, kwargs) if x.numel() > 0 and self._plain_modules() else None
        if call is None:
            return None
        # Imported here, since it imports Triton.
        from fastconv.nn._encoder_layer import Layer, Parameters, encoder_layer, fit

        attention, first, inner, last = self.attention.self, self.attention.output, self.intermediate, self.output
        layers = attention.fastconv_packed()[0]
        dense = (first.dense, first.LayerNorm, inner.dense, last.dense, last.LayerNorm)
        parameters = Parameters(*(p for module in dense for p in (module.weight, module.bias)))
        mixed = isinstance(attention, MixedAttention)
        if mixed:
            span, kernel = attention.key_conv_attn_layer, attention.conv_kernel_layer
            parameters = parameters._replace(
                depthwise=span.depthwise.weight,
                pointwise=span.pointwise.weight,
                span_bias=span.bias,
                kernel_weight=kernel.weight,
                kernel_bias=kernel.bias,
            )
        layer = Layer(
            attention.num_attention_heads,
            attention.attention_head_size,
            getattr(attention, "scaling", None) or attention.attention_head_size**-0.5,
            call.causal,
            call.packing,
            attention.conv_kernel_size if mixed else 0,
            activation_name(inner),  # type: ignore[arg-type]
            (first.LayerNorm.eps, last.LayerNorm.eps),
            (dropout_p(attention.dropout), dropout_p(first.dropout), dropout_p(last.dropout)),
        )
        projections = [*(each.weight for each in layers), *(each.bias for each in layers)]
        tensors = [*projections, *(parameters if mixed else parameters[: -len(parameters._field_defaults)])]
        if not (needs_grad(x, *tensors) or any(layer.dropouts)) or not fit(x, layer, projections, parameters):
            return None
        # Of a mask that gets a gradient the modules know, in the first run of a checkpoint too, which has none.
        if not use_kernels(x, call.mask, *tensors) or (call.mask is not None and call.mask.requires_grad):
            return None
        packed = packed_parameters(layers)
        if not packed:
            return None
        get_activation(layer.activation)  # raises for one that there isn't
        mask = call.mask
        if mask is not None and mask.stride(2) == 0:
            mask = mask[:, :, :1]  # expanded over the queries: one row says it all
        return encoder_layer(x, mask, layer, packed, projections, parameters)

    def _call(self, x: torch.Tensor, args: tuple, kwargs: dict) -> Call | None:
        """What the call asks of self-attention, None if that is more than masks."""
        given = dict(zip(self.fastconv_arguments, args, strict=False))
        if len(given) < len(args) or any(name in given for name in kwargs):
            return None
        given.update(kwargs)
        if given.pop("encoder_hidden_states", None) is not None:
            return None
        given.pop("encoder_attention_mask", None)
        attention = self.attention.self
        call = attention.call(x, (), {name: value for name, value in given.items() if value is not None})
        plain = call is not None and call.head_mask is None and call.states is None and call.cache is None
        return call if plain and not attention._relative() else None

    def _plain_modules(self) -> bool:
        """Whether the modules are those of the table, of one backend, and their calls seen by nobody."""
        attention, inner, last = self.attention, self.intermediate, self.output
        cls = type(attention)
        if getattr(self, "chunk_size_feed_forward", 0) or "feed_forward_chunk" in vars(self):
            return False
        if f"{cls.__module__}.{cls.__qualname__}" not in _ATTENTIONS or not bare(attention):
            return False
        core, first = attention.self, attention.output
        swapped: list[tuple[Any, Any]] = [(core, (SelfAttention, MixedAttention)), (inner, Intermediate)]
        for module, forward in (*swapped, (first, ResidualOutput), (last, ResidualOutput)):
            if not isinstance(module, forward) or original_class(module) is None:
                return False
            if module.fastconv_backend != self.fastconv_backend or not bare(module, but_for_collectors=module is core):
                return False
        mixed = isinstance(core, MixedAttention)
        return (
            not isinstance(core, CrossAttention)
            and (not mixed or (core._plain_convolutions() and plain_linear(core.conv_kernel_layer)))
            and all(map(plain_linear, (*core.fastconv_packed()[0], first.dense)))
            and all(plain_linear(module) or plain_grouped_linear(module) for module in (inner.dense, last.dense))
            and all(plain_layer_norm(module.LayerNorm) and plain_dropout(module.dropout) for module in (first, last))
            and activation_name(inner) is not None
        )
