"""Several linear layers of one input as one product, with parameters that stay the layers' own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from fastconv.nn._plain import plain_linear
from fastconv.ops import linear_act


def packed_linear(x: torch.Tensor, layers: Sequence[nn.Module]) -> list[torch.Tensor]:
    """[layer(x) for layer in layers], by one matrix product where the layers are plain nn.Linear.

    x: (..., I); each result (..., O_i), a slice of one tensor

    For inference the layers' parameters become neighbours in one storage, so that the packed weight is a view of them
    and can't be stale: whatever writes to a parameter writes to it. The Parameter objects stay the same. With a
    gradient the parameters are concatenated, and autograd splits it.
    """
    if not all(plain_linear(layer) for layer in layers) or len({layer.bias is None for layer in layers}) != 1:
        return [layer(x) for layer in layers]
    sizes = [layer.out_features for layer in layers]
    weight = _packed([layer.weight for layer in layers])
    bias = None if layers[0].bias is None else _packed([layer.bias for layer in layers])
    return list(linear_act(x, weight, bias, None).split(sizes, -1))


def _packed(parameters: list[torch.Tensor]) -> torch.Tensor:
    """The parameters (O_i, ...) as one tensor (sum O_i, ...)."""
    first = parameters[0]
    differentiable = torch.is_grad_enabled() and any(p.requires_grad for p in parameters)
    if differentiable or torch.compiler.is_compiling() or not all(_own_storage(p, first) for p in parameters):
        return torch.cat(parameters)
    if not _neighbours(parameters):
        _pack(parameters)
    rows = sum(p.shape[0] for p in parameters)
    return first.detach().as_strided((rows, *first.shape[1:]), first.stride())


def _own_storage(p: torch.Tensor, first: torch.Tensor) -> bool:
    # Not a subclass (quantized, distributed), not a functional call's stand-in, not a shape without memory.
    return (
        type(p) is nn.Parameter
        and p.layout == torch.strided
        and p.device.type != "meta"
        and p.device == first.device
        and p.dtype == first.dtype
        and p.is_contiguous()
        and not p.is_inference()
    )


def _neighbours(parameters: list[torch.Tensor]) -> bool:
    storage = parameters[0].untyped_storage().data_ptr()
    end = parameters[0].data_ptr()
    for p in parameters:
        # Two allocations can lie side by side: one storage must hold them all.
        if p.data_ptr() != end or p.untyped_storage().data_ptr() != storage:
            return False
        end += p.numel() * p.element_size()
    return True


def _pack(parameters: list[torch.Tensor]) -> None:
    # Not as inference tensors, even under inference_mode: the parameters may be trained later.
    with torch.inference_mode(False), torch.no_grad():
        packed = torch.cat([p.detach() for p in parameters])
        for p, part in zip(parameters, packed.split([p.shape[0] for p in parameters]), strict=True):
            p.data = part


def unpack(layers: Sequence[nn.Module]) -> None:
    """Give each plain linear layer's parameters a storage of their own again."""
    for layer in layers:
        for p in layer.parameters(recurse=False):
            if p.untyped_storage().nbytes() > p.numel() * p.element_size():
                p.data = p.detach().clone()
