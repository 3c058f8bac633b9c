"""From TensorFlow's names and layouts of parameters to PyTorch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fastconv.checkpoints.stored_tensors import StoredTensor

_LEAVES = {
    "kernel": "weight",
    "gamma": "weight",
    "beta": "bias",
    "embeddings": "weight",
    "depthwise_kernel": "depthwise.weight",
    "pointwise_kernel": "pointwise.weight",
}
# PyTorch's axes in TensorFlow's: a depthwise kernel is (K, I, 1) there and (I, 1, K) here, a pointwise one (1, I, O)
# and (O, I, 1), a dense one (I, O) and (O, I).
_AXES = {"depthwise_kernel": (1, 2, 0), "pointwise_kernel": (2, 1, 0), "kernel": (1, 0)}


def from_tensorflow(
    name: str, shape: tuple[int, ...], dtype: str, read: Callable[[], Any], grouped: tuple[int, int, int]
) -> tuple[str, StoredTensor]:
    """The name and the tensor in PyTorch for a variable of ConvBERT in TensorFlow.

    name: without the scope of the model; its last part is TensorFlow's: "encoder/layer/0/output/dense/kernel"
    read: gives the variable as an array of NumPy
    grouped: PyTorch's axes (G, I, O) of a grouped kernel in the variable's
    """
    *path, leaf = name.split("/")
    axes = _AXES.get(leaf)
    if leaf == "kernel" and len(shape) == 3:
        axes = grouped
    if axes is not None and len(axes) != len(shape):
        axes = None  # no shape of PyTorch's; the comparison with the config's tells it
    # The bias of the separable convolution is a column, as transformers has it.
    column = leaf == "bias" and path[-1:] == ["key_conv_attn_layer"]

    def as_torch() -> torch.Tensor:
        tensor = torch.from_numpy(read())
        if axes is not None:
            tensor = tensor.permute(axes)
        return tensor[:, None] if column else tensor

    if axes is not None:
        shape = tuple(shape[axis] for axis in axes)
    return ".".join((*path, _LEAVES.get(leaf, leaf))), StoredTensor((*shape, 1) if column else shape, dtype, as_torch)
