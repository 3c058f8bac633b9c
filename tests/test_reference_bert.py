"""BERT in plain PyTorch against golden cases of an independent implementation."""

from __future__ import annotations

import copy
import json

import golden
import pytest
import torch

from fastconv import reference

OK = golden.cases("bert_")
ERRORS = golden.cases("bert_", "error")


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
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 12,
}


def small(cls: type[reference.Model] = reference.BertModel, **values) -> reference.Model:
    return cls(reference.BertConfig(**SMALL | values)).eval()


def test_output_by_attribute_key_index_and_slice():
    output = small()(torch.ones(2, 5, dtype=torch.long), output_attentions=True)
    assert list(output) == list(output.keys()) == ["last_hidden_state", "pooler_output", "attentions"]
    assert len(output) == 3 and "hidden_states" not in output and output.hidden_states is None
    assert output[0] is output["last_hidden_state"] is output.last_hidden_state
    assert output[1:] == output.to_tuple()[1:] and output[-1] is output.attentions
    assert output.get("hidden_states") is None
    with pytest.raises(KeyError):
        output["hidden_states"]
    with pytest.raises(KeyError, match="has no field 'logits'"):
        output["logits"] = output[0]
    output["pooler_output"] = None
    assert output.to_tuple()[1] is output.attentions


def test_output_is_a_pytree():
    output = small()(torch.ones(2, 5, dtype=torch.long), output_hidden_states=True)
    doubled = torch.utils._pytree.tree_map(lambda tensor: 2 * tensor, output)
    assert type(doubled) is type(output) and doubled.attentions is None
    assert torch.equal(doubled.hidden_states[1], 2 * output.hidden_states[1])


def test_config_survives_a_round_trip_with_unknown_keys():
    values = {"model_type": "bert", "hidden_size": 24, "id2label": {"0": "no", "1": "yes", "2": "maybe"}, "flag": [1]}
    config = reference.BertConfig.from_dict(values)
    assert config.extra == {"flag": [1]} and config.num_labels == 3 and config.id2label[2] == "maybe"
    assert config.label2id == {"no": 0, "yes": 1, "maybe": 2}
    again = reference.BertConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config and again != reference.BertConfig()
    assert "hidden_size=24" in repr(config)


def test_setting_num_labels_makes_new_labels():
    config = reference.BertConfig(id2label={0: "no", 1: "yes"})
    config.num_labels = 2
    assert config.id2label == {0: "no", 1: "yes"}
    config.num_labels = 3
    assert config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"} and config.label2id["LABEL_2"] == 2


def test_output_flags_fall_back_to_the_config():
    ids = torch.ones(2, 5, dtype=torch.long)
    output = small(output_attentions=True, output_hidden_states=True)(ids, output_attentions=False)
    assert output.attentions is None and len(output.hidden_states) == 3
    assert isinstance(small(return_dict=False)(ids), tuple)


@pytest.mark.parametrize("tied", [True, False])
def test_decoder_is_tied_to_the_embeddings(tied):
    model = small(reference.BertForMaskedLM, tie_word_embeddings=tied)
    for candidate in (model, copy.deepcopy(model), copy.deepcopy(model).to(torch.float64)):
        predictions, words = candidate.cls.predictions, candidate.get_input_embeddings()
        assert candidate.get_output_embeddings() is predictions.decoder
        assert (predictions.decoder.weight is words.weight) == tied
        assert predictions.bias is predictions.decoder.bias
    model.set_input_embeddings(torch.nn.Embedding(30, 16))
    model.tie_weights()
    assert (model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight) == tied


def test_model_without_a_pooler():
    pooled, ids = small(), torch.randint(0, 30, (2, 5))
    model = reference.BertModel(pooled.config, add_pooling_layer=False).eval()
    assert model.pooler is None
    model.load_state_dict({name: value for name, value in pooled.state_dict().items() if "pooler" not in name})
    output = model(ids)
    assert output.pooler_output is None and list(output) == ["last_hidden_state"]
    assert torch.equal(output[0], pooled(ids)[0])


def test_pretraining_has_a_loss_only_with_both_labels():
    model, ids = small(reference.BertForPreTraining), torch.randint(0, 30, (2, 5))
    labels, following = torch.tensor([[4, -100, 3, 2, -100], [-100, 1, 1, 0, 29]]), torch.tensor([1, 0])
    assert model(ids, labels=labels).loss is None and model(ids, next_sentence_label=following).loss is None
    output = model(ids, labels=labels, next_sentence_label=following)
    kept = labels != -100
    words = output.prediction_logits[kept].log_softmax(-1)[range(7), labels[kept]].mean()
    pairs = output.seq_relationship_logits.log_softmax(-1)[range(2), following].mean()
    torch.testing.assert_close(output.loss, -words - pairs)
    assert output[1] is output.prediction_logits and output[2] is output.seq_relationship_logits


def test_next_sentence_prediction():
    model, ids = small(reference.BertForNextSentencePrediction), torch.randint(0, 30, (2, 5))
    assert model(ids).loss is None
    output = model(ids, labels=torch.tensor([1, 0]))
    assert output.logits.shape == (2, 2)
    torch.testing.assert_close(output.loss, -output.logits.log_softmax(-1)[range(2), [1, 0]].mean())


def test_head_mask_takes_what_a_head_gives_away():
    model, ids = small(initializer_range=0.3), torch.randint(0, 30, (2, 5))
    row = torch.tensor([1, 0, 1, 0])
    assert torch.equal(model(ids, head_mask=row)[0], model(ids, head_mask=torch.stack([row, row]))[0])
    assert torch.equal(model(ids, head_mask=torch.ones(2, 4))[0], model(ids)[0])
    masked = model(ids, head_mask=torch.stack([torch.ones(4), row]))[0]
    columns = model.encoder.layer[1].attention.output.dense.weight.data.view(16, 4, 4)
    columns[:, 1::2] = 0
    torch.testing.assert_close(model(ids)[0], masked)


def test_gradient_checkpointing_leaves_no_cache():
    model, ids = small(reference.BertLMHeadModel, is_decoder=True), torch.randint(0, 30, (2, 5))
    model.gradient_checkpointing_enable()
    assert model(ids).past_key_values is not None
    assert model.train()(ids, use_cache=True).past_key_values is None
    with pytest.raises(ValueError, match="past_key_values can't be used while gradient checkpointing trains"):
        model(ids, past_key_values=reference.Cache())


def test_masks_that_mean_the_same_give_the_same():
    model, ids = small(), torch.randint(0, 30, (2, 5))
    assert torch.equal(model(ids)[0], model(ids, attention_mask=torch.ones(2, 5))[0])
    keep = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    expected = model(ids, attention_mask=keep)[0]
    square = keep[:, None].expand(2, 5, 5)
    additive = (1.0 - square[:, None].float()) * torch.finfo(torch.float32).min
    for mask in (keep.bool(), keep.float(), square, square[:, None].bool(), additive, keep[:, None, None].int()):
        assert torch.equal(model(ids, attention_mask=mask)[0], expected)
    assert torch.equal(model(ids.int(), attention_mask=keep)[0], expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_near_fp64_and_finite_in_a_row_of_padding(dtype):
    model, ids = small(initializer_range=0.2), torch.randint(0, 30, (2, 5))
    keep = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 0, 0]])
    truth = model.double()(ids, attention_mask=keep)[0]
    result = model.to(dtype)(ids, attention_mask=keep)[0]
    assert result.dtype == dtype
    # weights and activations are rounded in two layers: errors of a few ulp of values up to 4
    assert (result.double() - truth).abs().max() < 16 * torch.finfo(dtype).eps


def test_labels_of_a_sequence_may_be_a_column():
    ids, labels = torch.randint(0, 30, (2, 5)), torch.tensor([1, 0])
    for problem, count in (("single_label_classification", 2), ("regression", 1)):
        model = small(reference.BertForSequenceClassification, problem_type=problem, num_labels=count)
        assert torch.equal(model(ids, labels=labels).loss, model(ids, labels=labels[:, None]).loss)


def test_initialisation_can_leave_the_encoder():
    model = small(reference.BertForTokenClassification)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    model.init_weights(skip=model.bert)
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {"classifier.weight"}
    model.init_weights()
    assert not torch.equal(
        model.bert.embeddings.word_embeddings.weight, before["bert.embeddings.word_embeddings.weight"]
    )
