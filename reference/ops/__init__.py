"""The reference ops: plain PyTorch formulas that every kernel is checked against, in any dtype, fp64 included."""

from .activations import ACTIVATIONS, get_activation
from .embedding_norm import embedding_norm
from .grouped_linear import grouped_linear
from .layer_norm import layer_norm
from .linear_act import linear_act
from .masked_attention import RelativePositions, attention_probabilities, masked_attention, relative_scores
from .masked_lm_loss import masked_lm_loss
from .separable_conv import separable_conv
from .span_dynamic_conv import span_dynamic_conv
from .span_kernel_logits import span_kernel_logits

__all__ = [
    "ACTIVATIONS",
    "RelativePositions",
    "attention_probabilities",
    "embedding_norm",
    "get_activation",
    "grouped_linear",
    "layer_norm",
    "linear_act",
    "masked_attention",
    "masked_lm_loss",
    "relative_scores",
    "separable_conv",
    "span_dynamic_conv",
    "span_kernel_logits",
]
