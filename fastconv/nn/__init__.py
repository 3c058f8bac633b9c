"""Thin modules over the ops, with the parameter names of the checkpoints."""

from fastconv.nn.grouped_linear import GroupedLinear
from fastconv.nn.layer_norm import LayerNorm
from fastconv.nn.masked_attention import MaskedAttention
from fastconv.nn.separable_conv import SeparableConv1D
from fastconv.nn.span_dynamic_conv import SpanDynamicConv

__all__ = ["GroupedLinear", "LayerNorm", "MaskedAttention", "SeparableConv1D", "SpanDynamicConv"]
