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


SMALL = {
    "vocab_size": 30,
    "hidden_size": 16,
    "embedding_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "initializer_range": 0.3,
}


def model_with_kernel(kernel_size: int, **values) -> reference.ConvBertModel:
    torch.manual_seed(1)
    config = reference.ConvBertConfig(**SMALL, conv_kernel_size=kernel_size, **values)
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


def test_head_mask_has_a_column_for_every_attention_head():
    model, ids = model_with_kernel(3), torch.randint(0, 30, (2, 5))
    row = torch.tensor([1.0, 0.0])
    expected = model(ids, head_mask=row, output_attentions=True)
    assert all(p[:, 0].abs().min() > 0 and p[:, 1].abs().max() == 0 for p in expected.attentions)
    assert torch.equal(model(ids, head_mask=torch.stack([row, row]))[0], expected[0])
    assert torch.equal(model(ids, head_mask=torch.ones(2, 2))[0], model(ids)[0])
    with pytest.raises(
        ValueError, match=r"head_mask must have shape \(heads,\) = \(2,\) or \(layers, heads\) = \(2, 2\)"
    ):
        model(ids, head_mask=torch.ones(4))


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_decoder_sees_later_tokens_through_the_convolutions_only(kernel_size):
    model, ids = model_with_kernel(kernel_size, is_decoder=True), torch.randint(0, 30, (1, 9))
    changed = ids.clone()
    changed[0, 6] = (ids[0, 6] + 1) % 30
    difference = (model(ids)[0] - model(changed)[0]).abs().amax(dim=-1)[0]
    reach = kernel_size // 2 * 2  # half a kernel in each of two layers
    assert (difference > 1e-9).tolist() == [position >= 6 - reach for position in range(9)]
    attentions = model(ids, attention_mask=torch.ones(1, 9), output_attentions=True).attentions
    assert all(torch.equal(p.triu(1), torch.zeros_like(p)) for p in attentions)


def test_cross_attention_sees_the_tokens_of_the_encoder_that_its_mask_leaves():
    model = model_with_kernel(3, is_decoder=True, add_cross_attention=True)
    ids, states = torch.randint(0, 30, (2, 5)), torch.randn(2, 7, 16, dtype=torch.float64)
    keep = (torch.arange(7) < torch.tensor([[7], [4]])).long()
    output = model(ids, encoder_hidden_states=states, encoder_attention_mask=keep, output_attentions=True)
    assert len(output.cross_attentions) == len(output.attentions) == 2
    for p in output.cross_attentions:
        assert p.shape == (2, 2, 5, 7) and p[1, :, :, 4:].abs().max() == 0
        torch.testing.assert_close(p.sum(-1), torch.ones(2, 2, 5, dtype=torch.float64))
    states[1, 4:] = 100.0
    assert torch.equal(model(ids, encoder_hidden_states=states, encoder_attention_mask=keep)[0], output[0])
    assert not torch.equal(model(ids, encoder_hidden_states=states)[0], output[0])
    alone = model(ids, output_attentions=True)
    assert alone.cross_attentions is None and not torch.equal(alone[0], output[0])


def multiple_choice(**values) -> reference.ConvBertForMultipleChoice:
    torch.manual_seed(1)
    model = reference.ConvBertForMultipleChoice(reference.ConvBertConfig(**SMALL, **values)).double().eval()
    torch.nn.init.normal_(model.classifier.bias)
    return model


@pytest.mark.parametrize("kind", ["last", "first", "mean", "cls_index"])
def test_summary(kind):
    """That of a padded row is of the padding too: its last position, the mean of all."""
    model = multiple_choice(summary_type=kind, summary_use_proj=True, summary_activation="tanh")
    ids, mask = torch.randint(0, 30, (2, 3, 5)), torch.ones(2, 3, 5, dtype=torch.long)
    mask[..., 3:] = 0
    output = model(ids, attention_mask=mask, output_hidden_states=True)
    hidden = output.hidden_states[-1]
    positions = {"last": [4], "first": [0], "mean": range(5), "cls_index": [4]}[kind]
    vector = sum(hidden[:, position] for position in positions) / len(positions)
    scores = model.classifier(torch.tanh(model.sequence_summary.summary(vector)))
    torch.testing.assert_close(output.logits, scores.view(2, 3))


def test_summary_at_an_index():
    summary, hidden = multiple_choice(summary_type="cls_index").sequence_summary, torch.randn(3, 5, 16)
    chosen = summary(hidden, torch.tensor([4, 0, 2]))
    assert torch.equal(chosen, torch.stack([hidden[0, 4], hidden[1, 0], hidden[2, 2]]))


def test_summary_projected_to_as_many_labels_as_there_are_channels():
    model = multiple_choice(summary_use_proj=True, summary_proj_to_labels=True, num_labels=16)
    assert model.sequence_summary.summary.weight.shape == (16, 16)
    assert model(torch.randint(0, 30, (2, 3, 5))).logits.shape == (2, 3)


def test_dropouts_of_the_summary():
    """The first comes before the projection and its activation, the last after both; no other is in this head."""
    options = {"summary_use_proj": True, "summary_activation": "relu", "hidden_dropout_prob": 0.0}
    options |= {"attention_probs_dropout_prob": 0.0, "classifier_dropout": 1.0}
    ids = torch.randint(0, 30, (2, 3, 5))
    model = multiple_choice(**options)
    assert torch.equal(model(ids).logits, model.train()(ids).logits)

    first = multiple_choice(**options, summary_first_dropout=1.0).train()
    torch.nn.init.normal_(first.sequence_summary.summary.bias)
    rest = first.classifier(torch.relu(first.sequence_summary.summary.bias))
    torch.testing.assert_close(first(ids).logits, rest.expand(2, 3))
    last = multiple_choice(**options, summary_last_dropout=1.0).train()
    assert torch.equal(last(ids).logits, last.classifier.bias.expand(2, 3))
