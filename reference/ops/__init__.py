"""The reference ops: plain PyTorch formulas that every kernel is checked against, in any dtype, fp64 included."""

from .activations import ACTIVATIONS, get_activation
from .grouped_linear import grouped_linear
from .layer_norm import layer_norm
from .linear_act import linear_act
from .masked_attention import RelativePositions, attention_probabilities, masked_attention, relative_scores
from .separable_conv import separable_conv
from .span_dynamic_conv import span_dynamic_conv

__all__ = [
    "ACTIVATIONS",
    "RelativePositions",
    "attention_probabilities",
    "get_activation",
    "grouped_linear",
    "layer_norm",
    "linear_act",
    "masked_attention",
    "relative_scores",
    "separable_conv",
    "span_dynamic_conv",
]
