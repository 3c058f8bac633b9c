"""Assertions by the 2x rule (fastconv.tolerance), for one tensor and for an op with all its gradients."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

from fastconv.tolerance import compare

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"


# The interpreter stores bf16 by truncation: every stored value is off by up to an ulp, all in one direction, so that
# sums over saved tensors drift where rounding would average out.
_TRUNCATION = 4


def _rounding(*dtypes: torch.dtype) -> float:
    """One rounding of the coarsest dtype: intermediates are stored in it, whatever the result's own dtype."""
    eps = max(torch.finfo(d).eps for d in dtypes)
    return eps * (_TRUNCATION if INTERPRETING and torch.bfloat16 in dtypes else 1)


def assert_2x(
    name: str,
    out: torch.Tensor,
    reference: torch.Tensor,
    truth: torch.Tensor,
    *,
    rounding: float | None = None,
) -> None:
    """Assert that `out` keeps the 2x rule against `truth` (fp64), `reference` being PyTorch's own result."""
    result = compare(out, reference, truth, rounding=_rounding(out.dtype) if rounding is None else rounding)
    assert result.ok, f"{name} ({out.dtype}, {tuple(out.shape)}): {result}"


def assert_op_2x(
    op: Callable[..., torch.Tensor],
    reference: Callable[..., torch.Tensor],
    inputs: dict[str, torch.Tensor],
    dy: torch.Tensor | None = None,
    roundings: int = 1,
) -> None:
    """Assert the 2x rule for op(**inputs) and for the gradient of every floating point input.

    `reference` takes the same tensors; it runs in fp64 for the truth and in the inputs' dtypes for PyTorch's own error.
    dy: the output's gradient, random if None.
    roundings: how many are allowed beside the 2x; more than one only with a reason.
    """
    truth_inputs = {k: t.detach().double() if t.is_floating_point() else t for k, t in inputs.items()}
    rounding = roundings * _rounding(*(t.dtype for t in inputs.values() if t.is_floating_point()))
    y, grads, dy = _run(op, inputs, dy)
    y_ref, grads_ref, _ = _run(reference, inputs, dy)
    y_true, grads_true, _ = _run(reference, truth_inputs, dy.double())
    assert y.dtype == y_ref.dtype, f"output dtype {y.dtype}, expected {y_ref.dtype}"
    assert_2x("output", y, y_ref, y_true, rounding=rounding)
    for name in grads:
        assert grads[name].dtype == inputs[name].dtype, f"d{name} has dtype {grads[name].dtype}"
        assert_2x(f"d{name}", grads[name], grads_ref[name], grads_true[name], rounding=rounding)


def _run(
    op: Callable[..., torch.Tensor], inputs: dict[str, torch.Tensor], dy: torch.Tensor | None
) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
    leaves = {k: t.detach().requires_grad_(t.is_floating_point()) for k, t in inputs.items()}
    y = op(**leaves)
    wanted = [k for k, t in leaves.items() if t.requires_grad]
    if dy is None:
        dy = torch.randn(y.shape, device=y.device).to(y.dtype)
    grads = torch.autograd.grad(y, [leaves[k] for k in wanted], dy)
    return y.detach(), dict(zip(wanted, grads, strict=True)), dy
