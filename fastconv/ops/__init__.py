"""The ops: functional, differentiable, dispatched to a Triton kernel or to a native formulation in PyTorch ops."""

from fastconv.ops.layer_norm import layer_norm

__all__ = ["layer_norm"]
