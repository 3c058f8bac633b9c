"""What is timed: for each op its shapes, its rivals, and the bytes and operations that it can't do without."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import checkout  # noqa: F401 (makes fastconv importable)
import torch
import torch.nn.functional as F
from timing import Run

from fastconv.ops import layer_norm
from fastconv.reference.ops import layer_norm as reference_layer_norm
from fastconv.tolerance import Comparison, compare


class BenchCase(ABC):
    """One op on one shape."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Identifies the case in results."""

    @property
    @abstractmethod
    def targets(self) -> dict[str, float]:
        """Rival -> how many times faster than it the op has to be at least."""

    @abstractmethod
    def bytes(self) -> int:
        """Bytes that must cross the memory bus: every input read once, every output written once."""

    @abstractmethod
    def flops(self) -> int:
        """Floating point operations of the formula."""

    @abstractmethod
    def parity(self, device: torch.device) -> dict[str, Comparison]:
        """The op's result on this shape, judged by the 2x rule: one comparison for each output and gradient."""

    @abstractmethod
    def runs(self, device: torch.device, *, compiled: bool) -> dict[str, Run]:
        """What to time: "fastconv" and its rivals, with torch.compile among them if `compiled`."""


@dataclass(frozen=True)
class LayerNormCase(BenchCase):
    """layer_norm of (tokens, channels), alone or with bias, dropout and residual before it.

    "infer": forward without a gradient and without dropout; "fwd", "bwd": the two halves of a training step.
    """

    tokens: int
    channels: int
    dtype: torch.dtype
    direction: str
    fused: bool

    @property
    def name(self) -> str:
        kind = "bias+dropout+residual+" if self.dropout_p else "bias+residual+" if self.fused else ""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{kind}layer_norm {self.direction} {self.tokens}x{self.channels} {dtype}"

    @property
    def dropout_p(self) -> float:
        return 0.1 if self.fused and self.direction != "infer" else 0.0

    @property
    def targets(self) -> dict[str, float]:
        # From 16k tokens on launches and tails no longer show.
        if self.tokens < 16384:
            return {}
        if self.direction == "bwd":
            return {"torch": 1.4} if self.fused else {}
        return {"torch.compile": 1.0} if self.fused else {"copy": 0.90, "torch.compile": 1.0}

    def bytes(self) -> int:
        size = self.dtype.itemsize
        tensor, vector, stats = self.tokens * self.channels * size, self.channels * size, self.tokens * 4
        seed = 8 if self.dropout_p else 0
        if self.direction == "bwd":
            return (
                2 * tensor  # read dy and z
                + 2 * stats  # read mean and rstd
                + vector  # read weight
                + seed
                + tensor  # write dx
                + (tensor if self.dropout_p else 0)  # write the residual's gradient: with dropout it isn't dx
                + (3 if self.fused else 2) * vector  # write the gradients of weight, bias and x_bias
            )  # the partial sums of these are the kernel's own affair
        training = self.direction == "fwd"
        return (
            tensor  # read x
            + (tensor + vector if self.fused else 0)  # read residual and x_bias
            + 2 * vector  # read weight and bias
            + seed
            + tensor  # write y
            + (tensor if training and self.fused else 0)  # write z for the backward; alone, x is z
            + (2 * stats if training else 0)  # write mean and rstd
        )

    def flops(self) -> int:
        if self.direction == "bwd":
            each = (
                2  # xhat = (z - mean) * rstd
                + 3  # sums of dy * xhat and of dy
                + 1  # g = dy * weight
                + 3  # sums of g and of g * xhat
                + 4  # (g - mean(g) - xhat * mean(g * xhat)) * rstd
                + (1 if self.dropout_p else 0)  # the scale of what was kept
                + (1 if self.fused else 0)  # sum for x_bias
            )
        else:
            each = (
                (2 if self.fused else 0)  # + x_bias, + residual
                + (1 if self.dropout_p else 0)  # the scale of what is kept
                + 1  # sum for the mean
                + 1  # - mean
                + 2  # sum of squares
                + 3  # * rstd * weight + bias
            )
        return self.tokens * self.channels * each

    def inputs(self, device: torch.device) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """The op's tensors by name, and a gradient for its output."""
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=device).to(self.dtype)

        shape = (self.tokens, self.channels)
        tensors = {"x": normal(*shape), "weight": normal(self.channels), "bias": normal(self.channels)}
        if self.fused:
            tensors |= {"x_bias": normal(self.channels), "residual": normal(*shape)}
        return tensors, normal(*shape)

    def parity(self, device: torch.device) -> dict[str, Comparison]:
        tensors, dy = self.inputs(device)
        seed = torch.tensor(1, device=device) if self.dropout_p else None
        out = self._with_gradients(lambda **t: layer_norm(**t, dropout_p=self.dropout_p, seed=seed), tensors, dy)
        # What was dropped has gradient 0; elsewhere 0 is as good as impossible.
        kept = out["dx"] != 0 if self.dropout_p else None

        def reference(**t):
            return reference_layer_norm(**t, dropout_p=self.dropout_p, dropout_mask=kept)

        own = self._with_gradients(reference, tensors, dy)
        truth = self._with_gradients(reference, {k: t.double() for k, t in tensors.items()}, dy.double())
        return {k: compare(_ends(out[k]), _ends(own[k]), _ends(truth[k])) for k in out}

    def _with_gradients(
        self, op: Callable[..., torch.Tensor], tensors: dict[str, torch.Tensor], dy: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        if self.direction == "infer":
            with torch.no_grad():
                return {"y": op(**tensors)}
        leaves = {k: t.detach().requires_grad_() for k, t in tensors.items()}
        y = op(**leaves)
        grads = torch.autograd.grad(y, list(leaves.values()), dy)
        return {"y": y.detach()} | {f"d{k}": g for k, g in zip(leaves, grads, strict=True)}

    def runs(self, device: torch.device, *, compiled: bool) -> dict[str, Run]:
        tensors, dy = self.inputs(device)
        seed = torch.tensor(1, device=device) if self.dropout_p else None

        def fastconv(**t):
            return layer_norm(**t, dropout_p=self.dropout_p, seed=seed)

        def chain(x, weight, bias, x_bias=None, residual=None):
            if self.fused:
                x = F.dropout(x + x_bias, self.dropout_p) + residual
            return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-12)

        ways = {"fastconv": fastconv, "torch": chain}
        if compiled:
            # What was compiled for other cases counts against the limit of recompilations, past which it runs eagerly.
            torch.compiler.reset()
            ways["torch.compile"] = torch.compile(chain, dynamic=False)
        return {label: self._timed(way, tensors, dy) for label, way in ways.items()}

    def _timed(self, way: Callable[..., torch.Tensor], tensors: dict[str, torch.Tensor], dy: torch.Tensor) -> Run:
        if self.direction == "infer":
            return torch.no_grad()(lambda: way(**tensors))
        leaves = {k: t.detach().requires_grad_() for k, t in tensors.items()}
        if self.direction == "fwd":
            return lambda: way(**leaves)
        y, wanted = way(**leaves), list(leaves.values())
        return lambda: torch.autograd.grad(y, wanted, dy, retain_graph=True)


def _ends(t: torch.Tensor) -> torch.Tensor:
    """The first and last rows of a large tensor: the rows of a layer_norm don't depend on each other."""
    return t if t.dim() < 2 or len(t) <= 2048 else torch.cat([t[:1024], t[-1024:]])


def cases(device: torch.device, *, quick: bool = False) -> list[BenchCase]:
    """Every case for a device: the shapes of the published models, and on a GPU enough tokens to fill it."""
    half, single = torch.bfloat16, torch.float32
    if quick:
        shapes = [(256, 384, single)]
    elif device.type == "cuda":
        # 128 tokens: the latency of a single sentence. 65536: eight times the largest L2.
        shapes = [(t, c, half) for t in (128, 16384, 65536) for c in (384, 768)]
        shapes += [(16384, 768, torch.float16), (16384, 768, single), (16384, 4096, half)]
    else:
        shapes = [(4096, 768, single), (4096, 768, half), (128, 768, single)]
    kinds = [("infer", False), ("bwd", False), ("infer", True), ("fwd", True), ("bwd", True)]
    return [LayerNormCase(t, c, dtype, direction, fused) for t, c, dtype in shapes for direction, fused in kinds]
