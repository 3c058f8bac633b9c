"""Several linear layers of one input as one product, with parameters that stay the layers' own."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastconv.nn._plain import plain_linear
from fastconv.ops import linear_act
from fastconv.ops._eager import autocasting, plain, unobserved, use_kernels
from fastconv.ops._register import needs_grad, once_differentiable

# First of the layers -> weight and bias of all, in whose memory the layers' parameters lie. Not an attribute of a
# module: a copy or a pickle of one has memory of its own.
_packs: weakref.WeakKeyDictionary[nn.Module, list[torch.Tensor]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def linear(x: torch.Tensor, layer: Any) -> torch.Tensor:
    """layer(x), by linear_act where the layer is a plain nn.Linear."""
    return linear_act(x, layer.weight, layer.bias, None) if plain_linear(layer) else layer(x)


def packed_linear(x: torch.Tensor, layers: Sequence[Any]) -> list[torch.Tensor]:
    """[layer(x) for layer in layers], by one matrix product where the layers are plain nn.Linear.

    x: (..., I); each result (..., O_i), a slice of one tensor where there was one product

    For inference, and by kernels for training, the layers' parameters become neighbours in memory, so that the packed
    weight is that memory and can't be stale: whatever writes to a parameter writes to it. The Parameter objects stay
    the same, and each has a storage of its own size. Parameters whose memory something else uses too are left where
    they are. Those are concatenated for training, as all are without kernels, and autograd splits it. A CUDA graph
    captured before the first call reads memory that the parameters have left: make that call first, as a warm-up.
    """
    if not all(plain_linear(layer) for layer in layers) or len({layer.bias is None for layer in layers}) != 1:
        return [linear(x, layer) for layer in layers]
    kinds = [[layer.weight for layer in layers]]
    if layers[0].bias is not None:
        kinds.append([layer.bias for layer in layers])
    parameters = [p for kind in kinds for p in kind]
    if not all(plain(p) for p in parameters):
        return [linear(x, layer) for layer in layers]
    sizes = [layer.out_features for layer in layers]
    training = needs_grad(*parameters)
    packed: list[torch.Tensor] = []
    if unobserved() and (not training or _by_function(x, parameters)):
        packed = _packed(layers[0], kinds)
        if packed and training:
            return list(_PackedLinear.apply(x, packed, sizes, *parameters))
        if not packed and not training:
            return [linear(x, layer) for layer in layers]
    elif unobserved() and not _hold(_packs.get(layers[0], []), kinds):
        _forget(layers[0])  # memory that .to(), say, left behind
    packed = packed or [torch.cat(kind) for kind in kinds]
    y = linear_act(x, packed[0], packed[1] if len(packed) > 1 else None, None)
    return list(y.split(sizes, -1))


def _by_function(x: torch.Tensor, parameters: list[torch.Tensor]) -> bool:
    """Whether a product that needs a gradient may be _PackedLinear's, which autocast and second derivatives don't know.

    Attention by kernels, which follows it, has no second derivative either.
    """
    return use_kernels(x, *parameters) and not autocasting(x) and x.dtype == parameters[0].dtype


class _PackedLinear(torch.autograd.Function):
    """The product with the packed memory of parameters, which get the gradients."""

    @staticmethod
    def forward(ctx, x, packed, sizes, *parameters):
        needs_x, _, _, *needed = ctx.needs_input_grad
        number = len(sizes)
        # What the layers would save. The weights, so that a write to one before the backward, which changes the packed
        # memory, is an error.
        ctx.save_for_backward(x if any(needed[:number]) else None, *(parameters[:number] if needs_x else ()))
        ctx.weight, ctx.sizes = packed[0], sizes
        return F.linear(x, *packed).split(sizes, -1)

    @staticmethod
    @once_differentiable("linear_act")
    def backward(ctx, *dys):
        x, *weights = ctx.saved_tensors
        needs_x, _, _, *needed = ctx.needs_input_grad
        dy = torch.cat(dys, -1)
        rows, number = dy.flatten(0, -2), len(dys)
        found: list[torch.Tensor | None] = [None] * len(needed)
        if any(needed[:number]):
            found[:number] = (rows.t() @ x.flatten(0, -2)).split(ctx.sizes)
        if any(needed[number:]):
            found[number:] = rows.sum(0).split(ctx.sizes)
        found = [d if needs else None for d, needs in zip(found, needed, strict=True)]
        if not needs_x:
            return None, None, None, *found
        return dy @ whole_weight(ctx.weight, weights), None, None, *found


def whole_weight(packed: torch.Tensor, weights: list[torch.Tensor]) -> torch.Tensor:
    """The weight (O, I) of a product in its backward: the packed memory of the saved weights, unless they are others.

    Hooks on saved tensors may give back copies instead of the parameters: of before a write, if there was one.
    """
    kept = _hold([packed], [weights]) or all(type(w) is nn.Parameter for w in weights)
    return packed if kept else torch.cat(weights)


def packed_parameters(layers: Sequence[Any]) -> list[torch.Tensor]:
    """The weight and the bias that plain linear layers with biases share the memory of, moved there unless they are.

    Empty if they can't move.
    """
    return _packed(layers[0], [[layer.weight for layer in layers], [layer.bias for layer in layers]])


def _packed(owner: nn.Module, kinds: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    """The memory that the parameters of each kind share, moved there unless they are; empty if they can't move."""
    packed = _packs.get(owner, [])
    if _hold(packed, kinds):
        return packed
    # Two threads' first calls must not pack twice: each would take the parameters out of the other's memory.
    with _lock:
        packed = _packs.get(owner, [])
        if not _hold(packed, kinds):
            # In a capture nothing is computed: the parameters would have no values until the graph runs.
            capturing = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
            movable = not capturing and all(_movable(kind, owner) for kind in kinds)
            packed = [_pack(kind) for kind in kinds] if movable else []
            if packed:
                _packs[owner] = packed
            else:
                _packs.pop(owner, None)
    return packed


def _hold(packed: list[torch.Tensor], kinds: list[list[torch.Tensor]]) -> bool:
    """Whether each packed tensor is the memory of the parameters of its kind, in their order."""
    if len(packed) != len(kinds):
        return False
    for whole, kind in zip(packed, kinds, strict=True):
        start = whole.data_ptr()
        for p in kind:
            if p.data_ptr() != start or p.dtype != whole.dtype or not p.is_contiguous():
                return False
            start += p.numel() * p.element_size()
        if start != whole.data_ptr() + whole.numel() * whole.element_size():
            return False
    return True


def _movable(parameters: list[torch.Tensor], owner: nn.Module) -> bool:
    """Whether the parameters may move in memory: nothing but they may look into that which they have.

    Something else may: a tied or a flat parameter, an alias that somebody writes through, another process, the packed
    weight of another owner's layers.
    """
    first = parameters[0]
    others = [whole for other, packed in _packs.items() if other is not owner for whole in packed]
    return len({id(p) for p in parameters}) == len(parameters) and all(
        type(p) is nn.Parameter
        and p.layout == torch.strided
        and p.device.type != "meta"
        and p.device == first.device
        and p.dtype == first.dtype
        and p.shape[1:] == first.shape[1:]
        and p.is_contiguous()
        and not p.is_inference()
        and p.untyped_storage().nbytes() == p.numel() * p.element_size() > 0
        and _users(p) == _LONE
        and not (p.device.type == "cpu" and p.is_shared())
        and not any(_inside(p, whole) for whole in others)
        for p in parameters
    )


def _inside(p: torch.Tensor, whole: torch.Tensor) -> bool:
    offset = p.data_ptr() - whole.data_ptr()
    return p.device == whole.device and 0 <= offset < whole.numel() * whole.element_size()


def _users(p: torch.Tensor) -> int:
    return torch._C._storage_Use_Count(p.untyped_storage()._cdata)


# What a lone tensor counts: itself, and the Python object that asks.
_LONE = _users(torch.empty(1, device="cpu"))


def _pack(parameters: list[torch.Tensor]) -> torch.Tensor:
    # Not as inference tensors, even under inference_mode: the parameters may be trained later.
    with torch.inference_mode(False), torch.no_grad():
        packed = torch.cat([p.detach() for p in parameters])
        if packed.is_cuda:
            # From here on other streams may read the new memory, and get the old for something else.
            torch.cuda.current_stream(packed.device).synchronize()
        storage, start = packed.untyped_storage(), 0
        for p in parameters:
            end = start + p.numel() * p.element_size()
            # A storage of the parameter's size: files and pickles of a slice of a larger one hold the larger one.
            p.data = torch.empty(0, dtype=p.dtype, device=p.device).set_(storage[start:end], 0, p.shape, p.stride())
            start = end
    return packed


def _forget(owner: nn.Module) -> list[torch.Tensor]:
    with _lock:
        return _packs.pop(owner, [])


def unpack(layers: Sequence[nn.Module]) -> None:
    """Give the parameters that `packed_linear` moved together memory of their own again."""
    for whole in _forget(layers[0]):
        for p in (p for layer in layers for p in layer.parameters()):
            if _inside(p, whole):
                p.data = p.detach().clone()
