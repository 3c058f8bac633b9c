"""What a case of the benchmark is: one op on one shape in one direction, with its rivals."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch

from fastconv.bench.timing import Run
from fastconv.tolerance import Comparison, compare

Op = Callable[..., torch.Tensor]
Tensors = dict[str, torch.Tensor]


class BenchCase(ABC):
    """One op on one shape.

    direction: "infer", forward without a gradient; "step", forward and backward; "fwd" or "bwd", its halves
    """

    dtype: torch.dtype
    direction: str
    roundings = 1  # that the 2x rule allows beside: one for each op in a row
    # Whether it is a piece of a model by itself: then its memory against the first rival's, and itself under
    # torch.compile are of interest too.
    whole = False

    @property
    @abstractmethod
    def name(self) -> str:
        """Identifies the case in results."""

    @property
    def targets(self) -> dict[str, float]:
        """Name of a ratio -> what it has to be at least: for a rival, how many times faster than it the op is."""
        return {}

    @abstractmethod
    def bytes(self) -> int:
        """Bytes that must cross the memory bus: every input read once, every output written once."""

    @abstractmethod
    def flops(self) -> int:
        """Floating point operations of the formula."""

    @abstractmethod
    def tensors(self, normal: Callable[..., torch.Tensor]) -> Tensors:
        """The op's tensors by name; normal(*shape) draws one."""

    @abstractmethod
    def op(self, **tensors: torch.Tensor) -> torch.Tensor:
        """What is timed."""

    @abstractmethod
    def reference(self, **tensors: torch.Tensor) -> torch.Tensor:
        """What it is checked against."""

    @abstractmethod
    def rivals(self, device: torch.device) -> dict[str, Op]:
        """Name -> what else computes the same. The first is what torch.compile compiles."""

    def inputs(self, device: torch.device) -> tuple[Tensors, torch.Tensor]:
        """The op's tensors by name, and a gradient for its output."""
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=device).to(self.dtype)

        tensors = self.tensors(normal)
        with torch.no_grad():
            shape = self.op(**tensors).shape
        return tensors, normal(*shape)

    def parity(self, device: torch.device) -> dict[str, Comparison]:
        """The op's result on this shape, judged by the 2x rule: one comparison for each output and gradient."""
        tensors, dy = self.inputs(device)
        out = self.with_gradients(self.op, tensors, dy)
        own = self.with_gradients(self.reference, tensors, dy)
        truth = self.with_gradients(self.reference, {k: t.double() for k, t in tensors.items()}, dy.double())
        rounding = self.roundings * torch.finfo(self.dtype).eps
        return {k: compare(ends(out[k]), ends(own[k]), ends(truth[k]), rounding=rounding) for k in out}

    def with_gradients(self, op: Op, tensors: Tensors, dy: torch.Tensor) -> Tensors:
        """The output, "y", and unless the direction is "infer" the gradient of every tensor, "d" + its name."""
        if self.direction == "infer":
            with torch.no_grad():
                return {"y": op(**tensors)}
        leaves = {k: t.detach().requires_grad_() for k, t in tensors.items()}
        y = op(**leaves)
        grads = torch.autograd.grad(y, list(leaves.values()), dy)
        return {"y": y.detach()} | {f"d{k}": g for k, g in zip(leaves, grads, strict=True)}

    def runs(self, device: torch.device, *, compiled: bool) -> dict[str, Run]:
        """What to time: "fastconv" and its rivals; if `compiled`, torch.compile of the first, and of a whole piece."""
        tensors, dy = self.inputs(device)
        rivals = self.rivals(device)
        ways: dict[str, Op] = {"fastconv": self.op, **rivals}
        if compiled:
            # What was compiled for other cases counts against the limit of recompilations, past which it runs eagerly.
            torch.compiler.reset()
            ways["torch.compile"] = torch.compile(next(iter(rivals.values())), dynamic=False)
            if self.whole:
                ways["fastconv compiled"] = torch.compile(self.op, dynamic=False)
        return {label: self._timed(way, tensors, dy) for label, way in ways.items()}

    def _timed(self, way: Op, tensors: Tensors, dy: torch.Tensor) -> Run:
        if self.direction == "infer":
            return torch.no_grad()(lambda: way(**tensors))
        leaves = {k: t.detach().requires_grad_() for k, t in tensors.items()}
        if self.direction == "fwd":
            return lambda: way(**leaves)
        if self.direction == "step":
            return lambda: torch.autograd.grad(way(**leaves), list(leaves.values()), dy)
        y, wanted = way(**leaves), list(leaves.values())
        return lambda: torch.autograd.grad(y, wanted, dy, retain_graph=True)


def ends(t: torch.Tensor) -> torch.Tensor:
    """The first and last rows of a large tensor; those in between are made alike."""
    return t if t.dim() < 2 or len(t) <= 2048 else torch.cat([t[:1024], t[-1024:]])
