"""Thin modules over the ops, with the parameter names of the checkpoints."""

from fastconv.nn.grouped_linear import GroupedLinear
from fastconv.nn.layer_norm import LayerNorm
from fastconv.nn.separable_conv import SeparableConv1D
from fastconv.nn.span_dynamic_conv import SpanDynamicConv

__all__ = ["GroupedLinear", "LayerNorm", "SeparableConv1D", "SpanDynamicConv"]
