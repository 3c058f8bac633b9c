"""What a case of the benchmark is: one op on one shape in one direction, or one whole model, with its rivals."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fastconv.bench.timing import Run
from fastconv.tolerance import Comparison, compare

Op = Callable[..., torch.Tensor]
Tensors = dict[str, torch.Tensor]

# Rows of a large result that are compared: of its beginning, of its end, and about as many of what is between them.
_ROWS = 1024
# Of a binomial distribution: a right share is further away once in 10^9 cases.
_SIGMAS = 6


@dataclass(frozen=True)
class Subject:
    """What a case is of, as its record tells it; None where it has no such thing.

    op: the op's name, "model" for a whole model
    model: whose shape it is, "ConvBERT base"
    batch, length: of the padded batch
    tokens: those really computed, which are not padding
    lengths: "full", or "text" where the sequences are as long as those of real text
    """

    op: str
    model: str | None = None
    batch: int | None = None
    length: int | None = None
    tokens: int | None = None
    lengths: str = "full"


class Case(ABC):
    """What is measured: of an op (a BenchCase) or of a whole model.

    direction: "infer", forward without a gradient; "step", forward and backward; "fwd" or "bwd", its halves
    """

    dtype: torch.dtype
    direction: str

    @property
    @abstractmethod
    def name(self) -> str:
        """Identifies the case in results."""

    @property
    @abstractmethod
    def subject(self) -> Subject:
        """What it is of."""

    @property
    def targets(self) -> dict[str, float]:
        """Name of a ratio -> what it has to be at least, on a GPU.

        The name of a rival: how many times faster than it fastconv is. "HF / fastconv graphs": how many times faster
        than the one the other is. "HF memory": that rival's peak memory over fastconv's.
        """
        return {}

    @property
    def cpu_targets(self) -> dict[str, float]:
        """The same on a CPU, where other things are slow."""
        return {}

    @abstractmethod
    def bytes(self) -> int:
        """Bytes that must cross the memory bus: every input read once, every output written once."""

    @abstractmethod
    def flops(self) -> int:
        """Floating point operations of the formula."""

    @abstractmethod
    def labels(self, device: torch.device) -> list[str]:
        """Those of `runs` without torch.compile, "fastconv" first; cheap, for lists of what there is."""

    @abstractmethod
    def parity(self, device: torch.device) -> dict[str, Comparison]:
        """The results on this shape, judged by the 2x rule: one comparison for each output and gradient."""

    @abstractmethod
    def runs(self, device: torch.device, *, compiled: bool) -> dict[str, Run]:
        """What to time: "fastconv", other ways of its own named "fastconv ...", and rivals.

        What has to be made for them is made here, for each call anew: a case holds no tensors.

        compiled: with torch.compile of the first rival, named "HF compile" for "HF"
        """

    def replays(self, label: str, device: torch.device) -> bool:
        """Whether a run replays CUDA graphs, whose memory is theirs already: a call's peak says nothing then."""
        return False


class BenchCase(Case):
    """One op on one shape."""

    roundings = 1  # that the 2x rule allows beside: one for each op in a row
    # Whether it is a piece of a model by itself, of several ops: then itself under torch.compile is of interest too.
    whole = False

    @property
    def subject(self) -> Subject:
        return Subject(op=self.name.split()[0])

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

    def labels(self, device: torch.device) -> list[str]:
        return ["fastconv", *self.rivals(device)]

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

    def given(self, label: str, tensors: Tensors, dy: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        """What a rival is called with, and the gradient for its result: the op's, or the same laid out as it has them.

        Laying them out is not timed.
        """
        return tensors, dy

    def runs(self, device: torch.device, *, compiled: bool) -> dict[str, Run]:
        """Of "fastconv" and its rivals; if `compiled`, torch.compile of the first, and of fastconv if it is a piece."""
        tensors, dy = self.inputs(device)
        ways: dict[str, Op] = {"fastconv": self.op, **self.rivals(device)}
        given = {label: self.given(label, tensors, dy) for label in ways}
        runs = {label: self._timed(way, *given[label]) for label, way in ways.items()}
        if compiled:
            # What was compiled for other cases counts against the limit of recompilations, past which it runs eagerly.
            torch.compiler.reset()
            first = list(ways)[1]
            for label in (first, "fastconv") if self.whole else (first,):
                runs[f"{label} compile"] = self._timed(torch.compile(ways[label], dynamic=False), *given[label])
        return runs

    def _timed(self, way: Op, tensors: Tensors, dy: torch.Tensor) -> Run:
        if self.direction == "infer":
            return torch.no_grad()(lambda: way(**tensors))
        leaves = {k: t.detach().requires_grad_() for k, t in tensors.items()}
        if self.direction == "fwd":
            return lambda: way(**leaves)
        if self.direction == "step":
            return lambda: torch.autograd.grad(way(**leaves), list(leaves.values()), dy)
        made: list[torch.Tensor] = []

        def backward() -> object:
            if not made:  # at the first call, so that a rival's forward that raises is that rival's failure
                made.append(way(**leaves))
            return torch.autograd.grad(made[0], list(leaves.values()), dy, retain_graph=True)

        return backward


def ends(t: torch.Tensor) -> torch.Tensor:
    """The first and last rows of a large tensor (..., C), and some of those in between, which are made alike."""
    rows = t.flatten(0, -2) if t.dim() > 2 else t
    if t.dim() < 2 or len(rows) <= 3 * _ROWS:
        return t
    middle = rows[_ROWS:-_ROWS]
    # An odd step: it comes to every place within a kernel's tiles.
    step = math.ceil(len(middle) / _ROWS) | 1
    return torch.cat([rows[:_ROWS], middle[::step], rows[-_ROWS:]])


def kept_share(kept: torch.Tensor, dropout_p: float) -> Comparison:
    """The share that a dropout kept against 1 - dropout_p: of a mask taken from a result that is to be judged by it.

    kept: any shape, bool
    """
    error = abs(kept.double().mean().item() - (1 - dropout_p))
    allowed = _SIGMAS * math.sqrt(dropout_p * (1 - dropout_p) / kept.numel())
    return Comparison(error, allowed, error, allowed, 1 - dropout_p, True)
