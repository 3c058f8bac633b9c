"""Capture and replay of CUDA graphs: all of `fastconv.graphs` that needs a GPU."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch

from fastconv import dispatch


class Recorder:
    """Records and replays on one CUDA device, for all models there, one call after the other.

    One after the other, since graphs share memory: between their inputs and outputs, and cuBLAS's workspace.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._lock = threading.RLock()  # a model may call another
        # Nothing else should run on it. torch hands out the same 32 streams of a priority again and again, and hardly
        # anybody asks for those of a high one.
        self._stream = torch.cuda.Stream(device, priority=-1)
        self._done = torch.cuda.Event()
        self._live: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """A call's turn, of any thread and stream: what it launches runs after all that earlier turns have launched."""
        with self._lock, torch.cuda.device(self._device):
            stream = torch.cuda.current_stream()
            stream.wait_event(self._done)
            try:
                yield
            finally:
                self._done.record(stream)

    @property
    def stream(self) -> torch.cuda.Stream:
        """What it captures on: a backward alone can be recorded where its forward ran on it."""
        return self._stream

    def wait(self) -> None:
        """Wait for what earlier turns have launched, which may be in memory that is to go."""
        self._done.synchronize()

    def record(self, function: Callable[[], Any]) -> Callable[[], Any]:
        """What launches the same as `function`, and returns what that returned: the same tensors every time."""
        graph, other = torch.cuda.CUDAGraph(), next(iter(self._live), None)
        pool = torch.cuda.graph_pool_handle() if other is None else other.pool()
        # torch.cuda.graph leaves its own stream the current one if CUDA refuses the capture.
        with torch.cuda.stream(torch.cuda.current_stream()):
            try:
                output = self._capture(graph, pool, function)
            except BaseException:
                self._clean_up(pool)
                raise
        self._live.add(graph)

        def replay() -> Any:
            graph.replay()
            return output

        return replay

    def _capture(self, graph: torch.cuda.CUDAGraph, pool: Any, function: Callable[[], Any]) -> Any:
        # On a stream of its own: cuBLAS then has its workspace there in the graphs' own memory.
        # thread_local: other threads may go on with what is forbidden here.
        with torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"):
            return function()

    def _clean_up(self, pool: Any) -> None:
        """Undo what torch leaves behind where CUDA refuses a capture."""
        # The allocator takes the capture to go on: it would refuse every other one in the pool, and free no memory that
        # several streams have used. It raises where the capture has ended after all.
        with contextlib.suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(self._device.index, pool)
        # So does the generator, and refuses to draw numbers, until a capture ends well.
        self._capture(torch.cuda.CUDAGraph(), None, lambda: torch.zeros(1, device=self._device))


_recorders: dict[torch.device, Recorder] = {}
_lock = threading.Lock()


def recorder_of(x: torch.Tensor) -> Recorder | None:
    """What records calls on x's device. None where there is nothing: native attention launches once a sequence."""
    if not (x.is_cuda and dispatch.use_triton(x)):
        return None
    with _lock:
        if x.device not in _recorders:
            _recorders[x.device] = Recorder(x.device)
        return _recorders[x.device]
