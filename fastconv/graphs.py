"""CUDA graphs of a model's forward without padding: one for a number of tokens, whatever sequences they make.

Where the sequences of a packed batch begin and end stands in tensors (T,). A graph has them, and the ids, in buffers of
its own, which every call fills anew. T is rounded up to a bucket; the tokens that are too many are sequences of one
token each, which nobody sees. Results are copies: no later call writes to them.

A graph reads the weights where they lie, so changes in place are seen. When a parameter or buffer lies elsewhere than
before, a module is another one, or a module that is not of torch, transformers or this library has another value in an
attribute (an adapter was switched, say), the model's graphs are dropped, and recorded again when they are needed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import nn

from fastconv import dispatch
from fastconv.nn._modules import SIMPLE, Modules, RunsEagerly
from fastconv.recorder import recorder_of
from fastconv.reference import Packing

_MIN_BUCKET = 64
# A packed forward: of its arguments by name, and of their packing.
_Forward = Callable[[dict[str, Any], Packing], Any]


def bucket(tokens: int) -> int:
    """The number of tokens of the graph for so many: at least 64, then eight from a power of two to the next."""
    step = 2 ** max(0, (tokens - 1).bit_length() - 4)
    return max(_MIN_BUCKET, -(-tokens // step) * step)


class StaticPacking(Packing):
    """The packing of a graph, of `size` tokens: the same tensors for every batch."""

    def __init__(self, size: int, device: torch.device) -> None:
        token = torch.arange(size, dtype=torch.int32, device=device)
        zero = torch.zeros_like(token)
        self._alone = torch.stack((zero, zero, token, token + 1))  # of tokens that are sequences of their own
        self._spans = self._alone.clone()
        self.before, self.after, self.first, self.last = self._spans
        # For its device, and for how many sequences there may be: no kernel reads it.
        self.cu_seqlens = torch.arange(size + 1, device=device)
        self.tokens = size
        self.indices, self.padded_shape = None, None

    @property
    def lengths(self) -> list[int]:  # type: ignore[override]
        """None may be in a graph: they are those of one batch."""
        raise RuntimeError("a native formulation asks for the sequences' lengths, which a graph doesn't know")

    def fill(self, packing: Packing) -> None:
        """Become a packing of at most `size` tokens."""
        T = packing.tokens
        self._spans[:, :T] = torch.stack((packing.before, packing.after, packing.first, packing.last))
        if self.tokens > T:
            self._spans[:, T:] = self._alone[:, T:]


class _Graph:
    """Buffers for what goes into a forward, and what replays its launches."""

    replay: Callable[[], Any] | None = None

    def __init__(self, size: int, inputs: dict[str, torch.Tensor], options: dict[str, Any], recorder: Any) -> None:
        self.recorder = recorder
        with torch.inference_mode(False):  # so that calls outside of it may fill them too
            self.packing = StaticPacking(size, next(iter(inputs.values())).device)
            self.inputs = {name: t.new_zeros(1, size, *t.shape[2:]) for name, t in inputs.items()}
            self.options = {
                name: torch.empty_like(value) if isinstance(value, torch.Tensor) else value
                for name, value in options.items()
            }

    def fill(self, inputs: dict[str, torch.Tensor], options: dict[str, Any], packing: Packing) -> None:
        """Take in a call's arguments."""
        self.packing.fill(packing)
        T = packing.tokens
        for name, value in inputs.items():
            self.inputs[name][:, :T] = value
            # A NaN of an earlier call could reach the tokens of this one (see masked_attention).
            if self.packing.tokens > T:
                self.inputs[name][:, T:] = 0
        for name, value in options.items():
            if isinstance(value, torch.Tensor):
                self.options[name].copy_(value)

    def run(self, forward: _Forward) -> Any:
        """The forward's output for the buffers, in modes that suit all callers, but autocast, which is one call's.

        Without autocast's cache: the graph would keep the weights' casts that are in it.
        """
        kind = self.packing.cu_seqlens.device.type
        dtype, enabled = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(kind, dtype, enabled, cache_enabled=False):
            return forward(self.inputs | self.options, self.packing)


class Graphs:
    """The graphs of one model. A copy or a pickle of them is empty."""

    # With more tokens the GPU takes longer than Python, and a graph gains nothing (published: 1.01x for BERT base with
    # 4,096; a smaller model has less to do for each). To be measured.
    max_tokens = 8192
    # How many are kept, those used last. Each has its inputs and outputs; the memory between is for all of them.
    max_graphs = 32

    def __init__(self) -> None:
        self._graphs: dict[tuple, _Graph] = {}  # by what they are of; the one used last is the last
        self._refused: set[tuple] = set()
        self._why: str | None = None  # of all calls
        self._modules: Modules | None = None
        self._state: list[Any] = []

    def __reduce__(self) -> tuple[type[Graphs], tuple]:
        return Graphs, ()

    def __len__(self) -> int:
        return len(self._graphs)

    def clear(self) -> None:
        """Drop them, once none of them runs any more."""
        while self._graphs:
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        key = next(iter(self._graphs))
        self._graphs[key].recorder.wait()
        del self._graphs[key]

    def check(self, model: Any, given: dict[str, Any]) -> None:
        """Raise RunsEagerly for a call that is none for a graph: of the model, with the arguments given."""
        if self._why is not None:
            raise RunsEagerly(self._why)
        tensors = [value for value in given.values() if isinstance(value, torch.Tensor)]
        if tensors and recorder_of(tensors[0]) is None:
            where = f"{tensors[0].device}, with backend {dispatch.current()!r}"
            raise RunsEagerly(f"they need a GPU and the kernels, got tensors on {where}")
        if getattr(model, "_is_replica", False):
            raise RunsEagerly("it is a replica of DataParallel, with weights that lie elsewhere in every call")
        if model.training:
            raise RunsEagerly("it is in training mode")
        if torch.is_grad_enabled() and any(t.requires_grad for t in chain(tensors, model.parameters())):
            raise RunsEagerly("gradients are recorded: call it under torch.no_grad() or torch.inference_mode()")
        self._modules_of(model).check()

    def run(
        self,
        model: Any,
        forward: _Forward,
        inputs: dict[str, torch.Tensor],
        options: dict[str, Any],
        packing: Packing,
    ) -> Any:
        """forward(inputs | options, packing) by a graph, recorded now if there is none; None if there is to be none.

        model: whose forward it is; inputs: (1, T, ...) each, at least one; options: the other arguments

        Raises: RunsEagerly if recording fails, after which calls like this one, or all, are none for a graph.
        """
        size, x = bucket(packing.tokens), next(iter(inputs.values()))
        recorder, kind = recorder_of(x), x.device.type
        key = (
            size,
            dispatch.current(),
            torch.backends.cuda.matmul.fp32_precision,
            torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None,
            *(_comparable(name, getattr(model.config, name, None)) for name in ("output_hidden_states", "return_dict")),
            *((name, t.dtype, t.device, t.shape[2:]) for name, t in inputs.items()),
            *((name, _comparable(name, value)) for name, value in options.items()),
        )
        if size > self.max_tokens or key in self._refused or recorder is None:
            return None
        assert self._modules is not None  # check has just looked
        with recorder.turn():
            self._refresh(self._modules.state())
            graph = self._graphs.pop(key, None) or _Graph(size, inputs, options, recorder)
            graph.fill(inputs, options, packing)
            if graph.replay is None:
                while len(self._graphs) >= self.max_graphs:
                    self._drop_oldest()
                try:
                    # Once as every call runs: kernels are compiled, and weights take their place (see packed_linear).
                    graph.run(forward)
                except Exception as error:
                    return self._refuse(key, error, functools.partial(forward, inputs | options, packing))
                self._record(graph, key, model, forward)
            self._graphs[key] = graph
            assert graph.replay is not None
            T = packing.tokens
            return _each(graph.replay(), lambda t: t[:, :T].clone() if t.dim() == 3 else t.clone())

    def _refuse(self, key: tuple, error: Exception, call: Callable[[], Any]) -> None:
        """Raise RunsEagerly, unless it is the call that is wrong: that one fails eagerly, where its caller sees it."""
        try:
            call()
        except Exception:
            return
        self._refused.add(key)
        raise RunsEagerly(str(error)) from error

    def _record(self, graph: _Graph, key: tuple, model: nn.Module, forward: _Forward) -> None:
        state = self._modules_of(model).state()
        self._refresh(state)
        try:
            graph.replay = graph.recorder.record(functools.partial(graph.run, forward))
        except torch.OutOfMemoryError as error:
            self._refused.add(key)
            raise RunsEagerly(f"no memory is left for one of {graph.packing.tokens} tokens") from error
        except Exception as error:
            self._why = f"something in it can't be recorded: {error}"
            raise RunsEagerly(self._why) from error
        if self._modules_of(model).state() != state:
            self._why = "its forward changes its modules, which no graph would do"
            raise RunsEagerly(self._why)

    def _refresh(self, state: list[Any]) -> None:
        """Drop the graphs of a model that is another one now."""
        if state != self._state:
            self.clear()
            self._state = state

    def _modules_of(self, model: nn.Module) -> Modules:
        modules = self._modules
        if modules is None or modules.changed():
            modules = self._modules = Modules.of(model)
        return modules


def _comparable(name: str, value: Any) -> Any:
    """What a graph is for, of an argument."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.device, value.shape
    if isinstance(value, SIMPLE):
        return value
    raise RunsEagerly(f"{name} is a {type(value).__name__}")


def _each(output: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A model's output, an object or a tuple, with function(t) in the place of every tensor t."""
    if output is None:
        return None
    if isinstance(output, torch.Tensor):
        return function(output)
    if isinstance(output, tuple):
        return tuple(_each(part, function) for part in output)
    return type(output)(**{name: _each(value, function) for name, value in output.items()})
