"""What a recording of a model's forward goes by, beside what goes in and the values of its weights."""

from __future__ import annotations

from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from fastconv.nn._plain import collects_outputs
from fastconv.ops._eager import plain

# Whose modules go by their class, parameters, buffers and mode alone.
_KNOWN = ("torch.nn.", "transformers.", "fastconv.")
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
# Values that are what they say.
SIMPLE = (bool, int, float, str, type(None))


class RunsEagerly(Exception):  # noqa: N818 (not an error)
    """Why a call is none for a graph."""


class Modules(NamedTuple):
    """The modules under a model, remembered: to walk a tree of them takes longer than a short replay."""

    below: list[nn.Module]
    children: list[dict]  # the model's and theirs
    tensors: list[dict]
    found: list[Any]  # in `children`
    others: list[nn.Module]  # those below that may go by their attributes

    @classmethod
    def of(cls, model: nn.Module) -> Modules:
        every = list(model.modules())
        children = [module._modules for module in every]
        tensors = [kind for module in every for kind in (module._parameters, module._buffers)]
        others = [module for module in every[1:] if not type(module).__module__.startswith(_KNOWN)]
        return cls(every[1:], children, tensors, list(chain.from_iterable(map(dict.values, children))), others)

    def changed(self) -> bool:
        """Whether they are no longer those of the model."""
        return list(chain.from_iterable(map(dict.values, self.children))) != self.found

    def check(self) -> None:
        """Raise RunsEagerly if a replay is not what their calls would be."""
        if True in [module.training for module in self.below]:
            raise RunsEagerly("a part of it is in training mode")
        followed = [m for m in self.below if m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m)]
        hooked = [f"its {type(module).__name__}" for module in followed if _hooked(module)]
        if hooked or _has_any_global_hook():
            raise RunsEagerly(f"there are hooks on {hooked[0] if hooked else 'all modules'}")

    def state(self) -> list[Any]:
        """Something that is equal as long as graphs of the model stay right."""
        tensors = [t for t in chain.from_iterable(map(dict.values, self.tensors)) if t is not None]
        strange = {*map(type, tensors)} - {torch.Tensor, nn.Parameter}
        if strange:
            raise RunsEagerly(f"where the data of a {strange.pop().__name__} lies is not known")
        own = ({k: v for k, v in vars(module).items() if k not in _OF_EVERY_MODULE} for module in self.others)
        places = map(torch.Tensor.data_ptr, tensors)
        # With the dtype: a model that was away and is back in another one may lie where it lay.
        return [*self.found, *places, *(t.dtype for t in tensors), *map(_told, own)]


def _hooked(module: nn.Module) -> bool:
    """Whether something follows a module's calls, of which a replay makes none."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return "forward" in vars(module) or not all(map(collects_outputs, hooks))


class _Same:
    """A value that is equal to itself alone."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self._value is other._value


def _told(value: Any, depth: int = 2) -> Any:
    """A value as it can be compared later: itself, what it holds, or where it lies."""
    if isinstance(value, SIMPLE):
        return value
    if depth and isinstance(value, dict):
        return [(key, _told(part, depth - 1)) for key, part in value.items()]
    if depth and isinstance(value, (list, tuple, set)):
        return [_told(part, depth - 1) for part in value]
    return (_Same(value), value.data_ptr()) if isinstance(value, torch.Tensor) and plain(value) else _Same(value)
