"""Thin modules over the ops, with the parameter names of the checkpoints."""

from fastconv.nn.layer_norm import LayerNorm

__all__ = ["LayerNorm"]
