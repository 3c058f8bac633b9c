"""Whether a launch config of a kernel is right."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch

from fastconv import dispatch
from fastconv.bench.case import ends
from fastconv.kernels import _configs
from fastconv.tolerance import compare, exact_convolutions
from fastconv.tuning.case import Case
from fastconv.tuning.table import TuningError


class Judge:
    """Says what is wrong with a config of a kernel, by the 2x rule on a case."""

    def __init__(self, kernel: str, case: Case) -> None:
        self._kernel, self._case = kernel, case
        self._dtype = next(iter(case.tensors.values())).dtype
        with torch.no_grad():
            self._dy = torch.randn_like(case.reference(**case.tensors))
        self._own = self._results(case.reference, self._dtype)
        self._truth = self._results(case.reference, torch.float64)

    def _results(self, function: Callable[..., torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """The output and the gradient of every tensor, by name."""
        gradients = self._case.gradients
        leaves = {name: t.detach().to(dtype).requires_grad_(gradients) for name, t in self._case.tensors.items()}
        with exact_convolutions(self._dy.device):
            with torch.set_grad_enabled(gradients), dispatch.backend("triton"):
                y = function(**leaves)
            made = torch.autograd.grad(y, list(leaves.values()), self._dy.to(y.dtype)) if gradients else ()
        found = {"the result": y.detach()}
        if gradients:
            found |= {f"the gradient of {name}": t for name, t in zip(leaves, made, strict=True)}
        return {name: ends(t.detach()).cpu() for name, t in found.items()}

    def problem(self, config: Any) -> str | None:
        """Why a config is not to be used; None: its results are right. Raises TuningError if the GPU is lost."""
        found: dict[str, torch.Tensor] = {}

        def run() -> str | None:
            with _configs.watched() as asked:
                self._case.launch()
            if not any(each.kernel == self._kernel for each in asked):
                return f"the case does not launch {self._kernel}"
            found.update(self._results(self._case.op, self._dtype))
            return None

        problem = self._tried(config, run)
        if problem is not None:
            return problem
        for name, out in found.items():
            compared = compare(out, self._own[name], self._truth[name], rounding=torch.finfo(self._dtype).eps)
            if not compared.ok:
                return f"{name} is wrong"
        return None

    def problem_of_others(self, config: Any) -> str | None:
        """Why a call that would get a config too can't launch it; None: all can. Raises what `problem` does."""

        def run() -> None:
            for launch in self._case.others:
                launch()

        problem = self._tried(config, run)
        return None if problem is None else f"with other masks, {problem}"

    def _tried(self, config: Any, run: Callable[[], str | None]) -> str | None:
        try:
            with _configs.forced(self._kernel, config):
                return run()
        except torch.OutOfMemoryError:
            return "out of memory"
        except Exception as error:  # whatever Triton's compiler or a launch raises
            with contextlib.suppress(Exception):
                _synchronize(self._dy.device)
                return f"{type(error).__name__}: {_first_line(error)}"
            raise TuningError(
                f"{self._kernel} with {config} broke the GPU's context: {_first_line(error)}; what was found before "
                "is in the table"
            ) from error


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:200]
