"""The one rule that says whether a result is right: the 2x rule.

Truth is the reference in fp64 on the same inputs. A result's error against it may be at most twice the error that the
reference makes when it runs in the result's dtype, plus one rounding of that dtype; in the maximum and in the root
mean square. (The rule of Dao-AILab/flash-attention's tests.)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch

FACTOR = 2.0


@dataclass(frozen=True)
class Comparison:
    """Errors of one result against the truth, and what the rule allows; `scale` is the truth's largest magnitude."""

    max_error: float
    max_allowed: float
    rms_error: float
    rms_allowed: float
    scale: float
    finite: bool

    @property
    def ok(self) -> bool:
        """Whether the result keeps the rule."""
        return self.finite and self.max_error <= self.max_allowed and self.rms_error <= self.rms_allowed

    def __str__(self) -> str:
        if not self.finite:
            return "the result, or the reference in its dtype, is not finite where the truth is"
        return (
            f"max error {self.max_error:.3e} (allowed {self.max_allowed:.3e}), "
            f"rms error {self.rms_error:.3e} (allowed {self.rms_allowed:.3e}), scale {self.scale:.3e}"
        )


def compare(
    out: torch.Tensor, reference: torch.Tensor, truth: torch.Tensor, *, rounding: float | None = None
) -> Comparison:
    """Judge `out` by the 2x rule.

    out: any shape and float dtype; its dtype says how large a rounding is
    reference: the same shape, the reference's result in out's dtype (or in the compute dtype of an autocast)
    truth: the same shape, fp64
    rounding: the rounding allowed beside the 2x, relative to the truth's scale; None is one ulp of out's dtype. More
        only where the arithmetic itself is known to round worse (Triton's interpreter truncates to bf16)

    Raises: ValueError for shapes that differ.
    """
    if not out.shape == reference.shape == truth.shape:
        raise ValueError(f"shapes differ: {tuple(out.shape)}, {tuple(reference.shape)}, {tuple(truth.shape)}")
    if out.numel() == 0:
        return Comparison(0.0, 0.0, 0.0, 0.0, 0.0, True)
    out64, reference64, truth64 = (t.detach().double().cpu() for t in (out, reference, truth))
    # A reference that overflows would allow anything.
    expected = torch.isfinite(truth64)
    finite = bool(torch.isfinite(out64[expected]).all() and torch.isfinite(reference64[expected]).all())
    rounding = torch.finfo(out.dtype).eps if rounding is None else rounding
    error, own = out64 - truth64, reference64 - truth64
    scale, rms = truth64.abs().max().item(), _rms(truth64)
    return Comparison(
        max_error=error.abs().max().item(),
        max_allowed=FACTOR * own.abs().max().item() + rounding * scale,
        rms_error=_rms(error),
        rms_allowed=FACTOR * _rms(own) + rounding * rms,
        scale=scale,
        finite=finite,
    )


@contextlib.contextmanager
def exact_convolutions(device: torch.device) -> Iterator[None]:
    """On a GPU, convolutions of fp32 in fp32, for the results to compare with.

    cuDNN convolves fp32 in TF32 unless told otherwise: the reference's own error would then allow any other path a
    hundred times that of fp32.
    """
    before = torch.backends.cudnn.allow_tf32
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.backends.cudnn.allow_tf32 = before


def _rms(t: torch.Tensor) -> float:
    return t.square().mean().sqrt().item()
