"""resize_token_embeddings: what is kept, what is new, what is tied, and that a model works on."""

from __future__ import annotations

import copy

import pytest
import swap_models
import torch
from model_cases import NAMES

import fastconv
from fastconv import reference

# the output layer of each head that maps to the vocabulary
VOCABULARIES = ["BertForPreTraining", "BertLMHeadModel", "BertForMaskedLM", "ConvBertForMaskedLM"]
VOCABULARIES += ["RoCBertForPreTraining", "RoCBertForCausalLM", "RoCBertForMaskedLM"]
SIZE = swap_models.VOCABULARY


def build(name: str, **values) -> reference.Model:
    return swap_models.build("reference", name, **values)


def ids_for(name: str, high: int) -> torch.Tensor:
    return torch.randint(0, high, (3, 2, 9) if "MultipleChoice" in name else (3, 9))


@pytest.mark.parametrize("size", [SIZE + 6, SIZE - 6])
@pytest.mark.parametrize("name", NAMES)
def test_old_rows_stay_and_give_what_they_gave(name, size):
    model, ids = build(name), ids_for(name, SIZE - 6)
    before, expected = model.state_dict(), model(ids)[0]
    words = model.resize_token_embeddings(size)
    assert words is model.get_input_embeddings() and words.num_embeddings == len(words.weight) == size
    assert model.config.vocab_size == model.base_model.config.vocab_size == size
    kept = min(SIZE, size)
    ends = (
        "word_embeddings.weight",
        "decoder.weight",
        "decoder.bias",
        "predictions.bias",
        "lm_head.weight",
        "lm_head.bias",
    )
    for key, value in model.state_dict().items():
        if key.endswith(ends):
            assert len(value) == size and torch.equal(value[:kept], before[key][:kept]), key
        else:
            assert torch.equal(value, before[key]), key
    result = model(ids)[0]
    assert torch.equal(result[..., :kept], expected[..., :kept]) and result.isfinite().all()
    if size > SIZE:
        assert model(ids_for(name, size))[0].isfinite().all()
    assert (result.shape[-1] == size) == (name in VOCABULARIES)
    again = type(model)(model.config)
    again.load_state_dict(model.state_dict())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", VOCABULARIES)
def test_tied_stays_tied_and_untied_untied(name, tied):
    model = build(name, tie_word_embeddings=tied)
    model.resize_token_embeddings(SIZE + 6)
    output, words = model.get_output_embeddings(), model.get_input_embeddings()
    assert (output.weight is words.weight) == tied
    assert output.out_features == SIZE + 6 and output.weight.shape == words.weight.shape[:1] + output.weight.shape[1:]
    if hasattr(model, "cls"):
        assert model.cls.predictions.bias is output.bias
    ids = ids_for(name, SIZE + 6)
    model.train()(ids)[0].sum().backward()
    assert all(p.grad.shape == p.shape for p in (words.weight, output.weight, output.bias))


def test_new_rows_are_near_the_mean_of_the_old():
    model = build("BertForMaskedLM", tie_word_embeddings=False)
    words, output = model.get_input_embeddings().weight.clone(), model.get_output_embeddings()
    old_output, old_bias = output.weight.clone(), output.bias.clone()
    model.resize_token_embeddings(SIZE + 4000)
    new = model.get_input_embeddings().weight[SIZE:]
    for rows, old in ((new, words), (output.weight[SIZE:], old_output)):
        torch.testing.assert_close(rows, old.mean(0).expand_as(rows), rtol=0, atol=1e-3)
        expected = 1e-9 * torch.cov(old.T.double(), correction=0)
        # the entries of a covariance of 4000 draws are known to about 1 / sqrt(4000) of the largest
        torch.testing.assert_close(torch.cov(rows.T.double()), expected, rtol=0, atol=0.1 * expected.max().item())
    assert torch.equal(output.bias[SIZE:], old_bias.mean().expand(4000))


def test_new_rows_as_fresh_ones():
    model = build("BertForMaskedLM", tie_word_embeddings=False, initializer_range=0.5)
    model.resize_token_embeddings(SIZE + 1000, mean_resizing=False)
    output = model.get_output_embeddings()
    for rows in (model.get_input_embeddings().weight[SIZE:], output.weight[SIZE:]):
        assert rows.std().item() == pytest.approx(0.5, rel=0.05) and abs(rows.mean().item()) < 0.02
    assert output.bias[SIZE:].abs().max() == 0


def test_multiples():
    model = build("BertModel")
    assert model.resize_token_embeddings() is model.get_input_embeddings() and model.config.vocab_size == SIZE
    for given, multiple, expected in ((None, 8, 48), (48, 8, 48), (49, 64, 64), (30, None, 30)):
        model.resize_token_embeddings(given, pad_to_multiple_of=multiple)
        assert model.config.vocab_size == len(model.get_input_embeddings().weight) == expected


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"new_num_tokens": 0}, ValueError, "new_num_tokens must be at least 1, got 0"),
        ({"new_num_tokens": 8.0}, TypeError, "new_num_tokens must be an int, got 8.0"),
        ({"pad_to_multiple_of": 0}, ValueError, "pad_to_multiple_of must be at least 1, got 0"),
        ({"new_num_tokens": 3}, ValueError, "the new vocabulary size must be above pad_token_id 3, got 3"),
    ],
)
def test_bad_sizes_change_nothing(arguments, error, message):
    model = build("BertForMaskedLM", pad_token_id=3)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        model.resize_token_embeddings(**arguments)
    assert model.config.vocab_size == SIZE
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", VOCABULARIES)
def test_accelerated_and_saved(name, tmp_path):
    pytest.importorskip("safetensors", reason="checkpoints are safetensors, which is not installed")
    source = build(name)
    model = getattr(fastconv, name)(getattr(fastconv, type(source.config).__name__).from_dict(source.config.to_dict()))
    model.load_state_dict(source.state_dict())
    ids = ids_for(name, SIZE - 6)
    expected = model.eval()(ids)[0]  # after it, the weights of inference are packed
    model.resize_token_embeddings(SIZE + 6)
    torch.testing.assert_close(model(ids)[0][..., :SIZE], expected)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert again.config.vocab_size == SIZE + 6 and torch.equal(again(ids)[0], model(ids)[0])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", VOCABULARIES)
def test_equals_transformers(name, tied):
    """The sizes, and everything but the draws of the new rows."""
    theirs = swap_models.build("transformers", name, tie_word_embeddings=tied)
    ours = build(name, tie_word_embeddings=tied)
    ours.load_state_dict(theirs.state_dict())
    for arguments in ({"new_num_tokens": 50}, {"pad_to_multiple_of": 16}, {"new_num_tokens": 45}):
        for mean in (True, False):
            theirs.resize_token_embeddings(**arguments, mean_resizing=mean)
            ours.resize_token_embeddings(**arguments, mean_resizing=mean)
            expected = theirs.state_dict()
            assert ours.config.vocab_size == theirs.config.vocab_size
            for key, value in ours.state_dict().items():
                assert value.shape == expected[key].shape, key
                if mean:  # 1e-9 of the covariance is about 3e-5 of the spread
                    torch.testing.assert_close(value, expected[key], rtol=0, atol=1e-3)
            ours.load_state_dict(expected)
    ids = ids_for(name, 45)
    torch.testing.assert_close(ours(ids)[0], theirs(ids)[0])
