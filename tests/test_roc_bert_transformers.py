"""RoCBert equals transformers in what it alone has: streams of ids, the contrastive loss, its arguments and config.

The table of all models and keywords is walked elsewhere. Everything here runs in fp64.
"""

from __future__ import annotations

import inspect

import pytest
import torch

from fastconv import reference
from fastconv.reference import RoCBertConfig

transformers = pytest.importorskip("transformers", reason="compares with transformers, which is not installed")

HEADS = [name for name in reference.__all__ if name.startswith(("RoCBertFor", "RoCBertModel"))]
SIZES = {
    "vocab_size": 30,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 12,
    "shape_vocab_size": 9,
    "shape_embed_dim": 6,
    "pronunciation_vocab_size": 8,
    "pronunciation_embed_dim": 10,
}
MEAN = {"concat_input": False, "shape_embed_dim": 16, "pronunciation_embed_dim": 16}
STREAMS = {"shape": 9, "pronunciation": 8}


def ids(*shape: int, high: int = 8) -> torch.Tensor:
    return torch.randint(0, high, shape)


def pair(name: str, **values):
    """The model of transformers with random weights, and ours with the same state dict; fp64."""
    theirs_config = transformers.RoCBertConfig(**SIZES | values, attn_implementation="eager")
    theirs = getattr(transformers, name)(theirs_config).double().eval()
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            parameter.normal_(0, 0.3).add_(key.endswith("LayerNorm.weight"))
    ours = getattr(reference, name)(RoCBertConfig.from_dict(theirs_config.to_dict())).double().eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def assert_equal_results(ours, theirs, inputs: dict, **options) -> None:
    """Outputs and gradients, of the loss or of a random sum, equal within 1e-10 of their scale."""
    results = []
    for model in (ours, theirs):
        torch.manual_seed(4)
        output = model(**inputs, **options)
        total = output.get("loss")
        total = (output[0] * torch.randn(output[0].shape, dtype=torch.float64)).sum() if total is None else total
        model.zero_grad()
        total.backward()
        gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
        results.append((total.detach(), output[0].detach(), gradients))
    (total, first, gradients), (their_total, their_first, their_gradients) = results
    torch.testing.assert_close(total, their_total, rtol=1e-10, atol=0)
    torch.testing.assert_close(first, their_first, rtol=1e-10, atol=1e-10)
    assert gradients.keys() == their_gradients.keys()
    scale = max(gradient.abs().max().item() for gradient in their_gradients.values())
    for key, gradient in their_gradients.items():
        torch.testing.assert_close(
            gradients[key], gradient, rtol=0, atol=1e-10 * scale, msg=lambda m, k=key: f"{k} {m}"
        )


@pytest.mark.parametrize("given", ["both", "shape", "pronunciation", "none"])
@pytest.mark.parametrize("enabled", ["both", "shape", "pronunciation", "none"])
@pytest.mark.parametrize("values", [{}, MEAN], ids=["concat", "mean"])
def test_streams_equal_transformers(values, enabled, given):
    values = values | {f"enable_{stream}": enabled in (stream, "both") for stream in STREAMS}
    ours, theirs = pair("RoCBertModel", **values, pad_token_id=2)
    inputs = {"input_ids": ids(3, 6), "token_type_ids": ids(3, 6, high=2), "position_ids": ids(3, 6)}
    inputs |= {f"input_{stream}_ids": ids(3, 6) for stream in STREAMS if given in (stream, "both")}
    assert_equal_results(ours, theirs, inputs)
    # dropout draws the same masks: it sits in the same places
    assert_equal_results(ours.train(), theirs.train(), inputs)


@pytest.mark.parametrize("values", [{}, MEAN, {"hidden_dropout_prob": 0.0}], ids=["concat", "mean", "no dropout"])
@pytest.mark.parametrize("left_out", ["nothing", "attack_input_ids", "streams", "masks", "labels_input_ids"])
def test_pretraining_equals_transformers(left_out, values):
    ours, theirs = pair("RoCBertForPreTraining", **values, pad_token_id=2)
    inputs, S = {}, {"": 6, "labels_": 6, "attack_": 8}
    for text, length in S.items():
        keep = torch.arange(length) < torch.tensor([length, 3, 2])[:, None]
        inputs |= {
            f"{text}input_ids": ids(3, length, high=30),
            f"{text}input_shape_ids": ids(3, length, high=9),
            f"{text}input_pronunciation_ids": ids(3, length),
            f"{text}attention_mask": keep.long(),
            f"{text}token_type_ids": ids(3, length, high=2),
        }
    inputs["labels_input_ids"][:, ::2] = -100
    parts = {"streams": ("shape", "pronunciation"), "masks": ("mask",)}.get(left_out, (left_out,))
    inputs = {name: value for name, value in inputs.items() if not any(part in name for part in parts)}
    assert_equal_results(ours, theirs, inputs)
    if values:  # the contrastive loss runs the model three times, in this order
        assert_equal_results(ours.train(), theirs.train(), inputs)


@pytest.mark.parametrize("name", HEADS)
def test_arguments_have_the_positions_that_transformers_gives_them(name):
    theirs = inspect.signature(getattr(transformers, name).forward).parameters
    ours = inspect.signature(getattr(reference, name).forward).parameters
    positional = [key for key, value in ours.items() if value.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    # 5.x has no head_mask, and takes output_* and return_dict as keywords; 4.57 takes them last
    later = {"output_attentions", "output_hidden_states", "return_dict", "logits_to_keep", "kwargs"}
    expected = [key for key in theirs if key not in later]
    assert [key for key in positional if key in theirs or key != "head_mask"] == expected
    assert all(value.default is None for key, value in ours.items() if key in positional[1:])


def test_config_defaults_are_those_of_transformers():
    ours, theirs = RoCBertConfig(), transformers.RoCBertConfig()
    expected = theirs.to_dict()
    for key, value in ours.to_dict().items():
        if key in expected or hasattr(theirs, key):
            assert value == expected.get(key, getattr(theirs, key, None)), key
    assert type(theirs).from_dict(ours.to_dict()).shape_vocab_size == 24858


@pytest.mark.parametrize("values", [{}, MEAN], ids=["concat", "mean"])
def test_fresh_weights_are_distributed_as_in_transformers(values):
    values = SIZES | {"vocab_size": 500, "hidden_size": 64, "num_hidden_layers": 1, "initializer_range": 0.05} | values
    values |= dict.fromkeys(("shape_vocab_size", "pronunciation_vocab_size"), 300)
    values |= dict.fromkeys(("shape_embed_dim", "pronunciation_embed_dim"), 64)
    ours = reference.RoCBertForMaskedLM(RoCBertConfig(**values))
    theirs = transformers.RoCBertForMaskedLM(transformers.RoCBertConfig(**values))
    expected = dict(theirs.named_parameters())
    assert {key for key, _ in ours.named_parameters()} == expected.keys()
    for key, parameter in ours.named_parameters():
        assert parameter.std().item() == pytest.approx(expected[key].std().item(), rel=0.25, abs=1e-12), key
        assert parameter.mean().item() == pytest.approx(expected[key].mean().item(), abs=0.01), key
    for table in (ours.roc_bert.get_shape_embeddings(), ours.roc_bert.get_pronunciation_embeddings()):
        assert table.weight[0].abs().max() == 0
