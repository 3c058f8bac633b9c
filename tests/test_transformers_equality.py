"""What the reference shares with transformers beside what models compute: activations, config defaults, fresh weights.

What the models compute is compared in test_every_model.py.
"""

from __future__ import annotations

import pytest
import torch

from fastconv import reference

transformers = pytest.importorskip("transformers", reason="compares with transformers, which is not installed")
ACT2FN, ACT2CLS = transformers.activations.ACT2FN, transformers.activations.ACT2CLS

FAMILIES = ["Bert", "ConvBert", "RoCBert"]


@pytest.mark.parametrize("activation", sorted(reference.ops.ACTIVATIONS))
def test_activation_equals_transformers(activation):
    if activation not in ACT2CLS:
        pytest.skip(f"this version of transformers has no activation {activation}")
    x = torch.linspace(-12, 12, 1001, dtype=torch.float64)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = reference.ops.get_activation(activation)(ours), ACT2FN[activation](theirs)
    # gelu_fast knows sqrt(2 / pi) to ten digits
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
    y.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-9)


def test_every_activation_without_parameters_is_known():
    assert set(ACT2CLS) - set(reference.ops.ACTIVATIONS) <= {"prelu", "xielu"}


@pytest.mark.parametrize("family", FAMILIES)
def test_config_defaults_are_those_of_transformers(family):
    ours, theirs = getattr(reference, family + "Config")(), getattr(transformers, family + "Config")()
    expected = theirs.to_dict()
    for key, value in ours.to_dict().items():
        # those of a decoder, and what one of the supported versions doesn't know
        if key in expected or hasattr(theirs, key):
            assert value == expected.get(key, getattr(theirs, key, None)), key
    round_trip = type(theirs).from_dict(ours.to_dict())
    assert round_trip.num_labels == 2 and round_trip.model_type == ours.model_type


@pytest.mark.parametrize("family", FAMILIES)
def test_fresh_weights_are_distributed_as_in_transformers(family):
    arguments = {"vocab_size": 500, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    arguments |= {"intermediate_size": 96, "initializer_range": 0.05}
    if family == "ConvBert":
        arguments |= {"embedding_size": 32, "num_groups": 2}
    if family == "RoCBert":
        arguments |= {"shape_vocab_size": 300, "pronunciation_vocab_size": 300}
    name = family + "ForMaskedLM"
    ours = getattr(reference, name)(getattr(reference, family + "Config")(**arguments))
    theirs = getattr(transformers, name)(getattr(transformers, family + "Config")(**arguments))
    expected = dict(theirs.named_parameters())
    assert {key for key, _ in ours.named_parameters()} == expected.keys()
    for key, parameter in ours.named_parameters():
        assert parameter.std().item() == pytest.approx(expected[key].std().item(), rel=0.25, abs=1e-12), key
        assert parameter.mean().item() == pytest.approx(expected[key].mean().item(), abs=0.01), key
    padding = ours.config.pad_token_id
    assert ours.get_input_embeddings().weight[padding].abs().max() == 0
