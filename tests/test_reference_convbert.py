"""ConvBERT in plain PyTorch against golden cases of an independent implementation."""

from __future__ import annotations

import golden
import pytest
import torch

from fastconv import reference

OK = golden.cases("convbert_")
ERRORS = golden.cases("convbert_", "error")


def load(case: dict, dtype: torch.dtype) -> reference.Model:
    model = getattr(reference, case["model_class"])(golden.config(case))
    model.load_state_dict(golden.state(case), strict=True)
    return model.to(dtype).eval()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("case", OK, ids=golden.names(OK))
def test_golden_case(case, dtype):
    golden.check(case, load(case, dtype))


@pytest.mark.parametrize("case", ERRORS, ids=golden.names(ERRORS))
def test_golden_error_is_a_clear_value_error(case):
    with pytest.raises(ValueError, match="must be|projects to"):
        model = getattr(reference, case["model_class"])(golden.config(case))
        model(**golden.tensors(case, "in."))
