"""The 2x rule accepts what PyTorch itself would do and refuses more: the suite's one tolerance can fail."""

from __future__ import annotations

import pytest
import torch
from tolerance import assert_2x

from fastconv.tolerance import compare


def _case() -> tuple[torch.Tensor, torch.Tensor]:
    truth = torch.randn(64, 64, dtype=torch.float64)
    return truth.to(torch.float16), truth


def test_tolerance_accepts_the_reference_itself():
    reference, truth = _case()
    assert_2x("self", reference.clone(), reference, truth)


def test_tolerance_refuses_one_wrong_element():
    reference, truth = _case()
    out = reference.clone()
    out[3, 5] += 0.1
    with pytest.raises(AssertionError, match="max error"):
        assert_2x("one", out, reference, truth)


def test_tolerance_refuses_a_small_error_everywhere():
    # Each element is within the maximum's allowance; the root mean square is not.
    reference, truth = _case()
    result = compare(reference + 1.5 * (reference - truth).abs().max().half(), reference, truth)
    assert result.max_error <= 3 * result.max_allowed
    assert result.rms_error > result.rms_allowed
    assert not result.ok


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_tolerance_refuses_what_is_not_finite(bad):
    reference, truth = _case()
    out = reference.clone()
    out[0, 0] = bad
    assert not compare(out, reference, truth).ok


def test_tolerance_refuses_a_reference_that_is_not_finite():
    reference, truth = _case()
    reference[0, 0] = float("inf")
    assert not compare(reference.clone().zero_(), reference, truth).ok


def test_tolerance_refuses_another_shape():
    reference, truth = _case()
    with pytest.raises(ValueError, match="shapes differ"):
        compare(reference[:1], reference, truth)
