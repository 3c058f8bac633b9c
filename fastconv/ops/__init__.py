"""The ops: functional, differentiable, dispatched to a Triton kernel or to a native formulation in PyTorch ops."""

from fastconv.ops.embedding_norm import embedding_norm
from fastconv.ops.grouped_linear import grouped_linear
from fastconv.ops.layer_norm import layer_norm
from fastconv.ops.linear_act import linear_act
from fastconv.ops.masked_attention import RelativePositions, masked_attention
from fastconv.ops.masked_lm_loss import masked_lm_loss
from fastconv.ops.separable_conv import separable_conv
from fastconv.ops.span_dynamic_conv import span_dynamic_conv
from fastconv.ops.span_kernel_logits import span_kernel_logits

__all__ = [
    "RelativePositions",
    "embedding_norm",
    "grouped_linear",
    "layer_norm",
    "linear_act",
    "masked_attention",
    "masked_lm_loss",
    "separable_conv",
    "span_dynamic_conv",
    "span_kernel_logits",
]
