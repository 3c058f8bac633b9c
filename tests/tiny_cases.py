"""Cases of the benchmark that take no time: of an op, right or wrong, and of a model."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from fastconv.bench.case import BenchCase, Case, Subject
from fastconv.ops import layer_norm
from fastconv.reference.ops import layer_norm as reference_layer_norm
from fastconv.tolerance import Comparison, compare


def no_compiler(x, weight, bias):
    raise RuntimeError("no compiler\nhere")


@dataclass(frozen=True)
class TinyCase(BenchCase):
    """layer_norm, or something near it."""

    tokens: int
    direction: str = "infer"
    off_by: float = 0.0
    goals: tuple[tuple[str, float], ...] = ()
    whole: bool = False
    dtype: torch.dtype = torch.float32

    @property
    def name(self) -> str:
        return f"layer_norm {self.direction} {self.tokens}x16"

    @property
    def subject(self) -> Subject:
        return Subject("layer_norm", "tiny", 1, self.tokens, self.tokens)

    @property
    def cpu_targets(self) -> dict[str, float]:
        return dict(self.goals)

    def bytes(self) -> int:
        return 4 * 2 * self.tokens * 16

    def flops(self) -> int:
        return 8 * self.tokens * 16

    def tensors(self, normal):
        return {"x": normal(self.tokens, 16), "weight": normal(16), "bias": normal(16)}

    def op(self, **tensors):
        return layer_norm(**tensors) + self.off_by

    def reference(self, **tensors):
        return reference_layer_norm(**tensors)

    def rivals(self, device):
        def chain(x, weight, bias):
            return F.layer_norm(torch.cat([x, x])[: len(x)], (16,), weight, bias, 1e-12)

        return {"torch": chain, "broken": no_compiler}


@dataclass(frozen=True)
class TinyModel(Case):
    """A product, which stands for a model."""

    name: str = "model infer tiny 2x8 text"
    direction: str = "infer"
    dtype: torch.dtype = torch.float32
    subject: Subject = field(default=Subject("model", "tiny", 2, 8, 12, "text"))

    def bytes(self) -> int:
        return 1000

    def flops(self) -> int:
        return 100_000

    def labels(self, device):
        return ["fastconv", "fastconv remove", "HF"]

    def parity(self, device) -> dict[str, Comparison]:
        x = torch.ones(3)
        return {"y": compare(x, x, x.double())}

    def runs(self, device, *, compiled):
        x = torch.randn(32, 32, device=device)
        return {"fastconv": lambda: x @ x, "fastconv remove": lambda: x @ x, "HF": lambda: x @ x @ x}
