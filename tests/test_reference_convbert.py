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
    with pytest.raises(ValueError, match=r"must be|projects to"):
        model = getattr(reference, case["model_class"])(golden.config(case))
        model(**golden.tensors(case, "in."))


def model_with_kernel(kernel_size: int) -> reference.ConvBertModel:
    torch.manual_seed(1)
    config = reference.ConvBertConfig(
        vocab_size=30,
        hidden_size=16,
        embedding_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=24,
        conv_kernel_size=kernel_size,
        initializer_range=0.3,
    )
    return reference.ConvBertModel(config).double().eval()


@pytest.mark.parametrize("kernel_size", [1, 5])
def test_padding_reaches_real_tokens_through_the_convolutions_only(kernel_size):
    model, ids = model_with_kernel(kernel_size), torch.randint(2, 30, (1, 9))
    keep = (torch.arange(9) < 6)[None]
    difference = (model(ids, attention_mask=keep)[0][:, :6] - model(ids[:, :6])[0]).abs().amax(dim=-1)[0]
    assert (difference > 1e-6).tolist() == [
        kernel_size > 1
    ] * 6  # all six: the second layer attends to the first's leak


def test_head_mask_leaves_the_convolution_heads():
    model = model_with_kernel(3)
    attention, hidden = model.encoder.layer[0].attention.self, torch.randn(2, 5, 16, dtype=torch.float64)
    masked, probabilities = attention(hidden, head_mask=torch.zeros(1, 2, 1, 1), output_attentions=True)
    full, none = attention(hidden)
    assert none is None and probabilities.shape == (2, 2, 5, 5) and probabilities.abs().max() == 0
    assert masked[..., :8].abs().max() == 0 and full[..., :8].abs().min() > 0
    assert torch.equal(masked[..., 8:], full[..., 8:])
