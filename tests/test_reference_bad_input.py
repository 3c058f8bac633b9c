"""Bad input to the reference models and configs: a clear error that names what was given and what was expected."""

from __future__ import annotations

import pytest
import torch

import fastconv
from fastconv import reference
from fastconv.reference import BertConfig, ConvBertConfig, RoCBertConfig

SIZES = {
    "vocab_size": 30,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 12,
}
BERT = BertConfig(**SIZES)
CONVBERT = ConvBertConfig(**SIZES, embedding_size=8, conv_kernel_size=5)
STREAMS = {"shape_vocab_size": 9, "shape_embed_dim": 6, "pronunciation_vocab_size": 8, "pronunciation_embed_dim": 10}
ROC_BERT = RoCBertConfig(**SIZES, **STREAMS)
HEADS = (
    "Model",
    "ForMaskedLM",
    "ForSequenceClassification",
    "ForMultipleChoice",
    "ForTokenClassification",
    "ForQuestionAnswering",
)
CLASSES = [family + head for family in ("Bert", "RoCBert", "ConvBert") for head in HEADS]


def build(name: str, library=reference, **changes) -> reference.Model:
    configs = {"Conv": CONVBERT, "RoCB": ROC_BERT, "Bert": BERT}
    values = configs[name[:4]].to_dict() | changes
    cls = getattr(library, name)
    return cls(cls.config_class.from_dict(values)).eval()


@pytest.fixture(params=["BertModel", "RoCBertModel", "ConvBertModel"])
def name(request) -> str:
    return request.param


@pytest.fixture(params=[reference, fastconv], ids=["reference", "fastconv"])
def model(request, name) -> reference.Model:
    # The accelerated models have other forwards: they must refuse the same.
    return build(name, request.param)


@pytest.mark.parametrize("argument", ["input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds"])
def test_tensors_on_another_device(model, argument):
    given = {"inputs_embeds": torch.zeros(2, 5, model.config.hidden_size)} if argument == "inputs_embeds" else {}
    given = given or {"input_ids": ids(2, 5), argument: ids(2, 5, value=1)}
    given[argument] = given[argument].to("meta")
    with pytest.raises(ValueError, match=rf"{argument} is on meta but the model is on cpu; move them to one device"):
        model(**given)


@pytest.mark.parametrize("value", [2, -1, 1.5, -10000.0, -torch.inf])
def test_mask_values(model, value):
    mask = torch.full((2, 5), value)
    mask[1, 3] = 1
    with pytest.raises(ValueError, match=rf"attention_mask must have values 1 and 0, got values from .*{value}( |$)"):
        model(ids(2, 5), attention_mask=mask)


def ids(*shape: int, value: int = 3) -> torch.Tensor:
    return torch.full(shape, value)


@pytest.mark.parametrize("value", [-1, 30, 2**40])
def test_ids_out_of_range(model, value):
    given = ids(2, 5)
    given[1, 2] = value
    message = (
        rf"input_ids must be from 0 to 29 \(vocab_size is 30\), got values from {min(value, 3)} to {max(value, 3)}"
    )
    with pytest.raises(IndexError, match=message):
        model(given)


def test_token_types_and_positions_out_of_range(model):
    with pytest.raises(IndexError, match=r"token_type_ids must be from 0 to 1 \(type_vocab_size is 2\).* to 2$"):
        model(ids(2, 5), token_type_ids=ids(2, 5, value=2))
    with pytest.raises(IndexError, match=r"position_ids must be from 0 to 11 \(max_position_embeddings is 12\)"):
        model(ids(2, 5), position_ids=ids(2, 5, value=12))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.int16, torch.complex64])
def test_ids_of_wrong_dtype(model, dtype):
    with pytest.raises(TypeError, match=rf"input_ids must be an int64 or int32 tensor, got {dtype}"):
        model(ids(2, 5).to(dtype))
    with pytest.raises(TypeError, match=rf"position_ids must be an int64 or int32 tensor, got {dtype}"):
        model(ids(2, 5), position_ids=ids(2, 5).to(dtype))


def test_integer_embeddings(model):
    with pytest.raises(TypeError, match=r"inputs_embeds must be a floating-point tensor, got torch\.int64"):
        model(inputs_embeds=ids(2, 5, 16))


@pytest.mark.parametrize("name", CLASSES)
def test_both_or_neither_of_ids_and_embeddings(name):
    model = build(name)
    shape = (2, 2, 5) if "Choice" in name else (2, 5)
    embeds = torch.zeros(*shape, model.get_input_embeddings().embedding_dim)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds, got both"):
        model(ids(*shape), inputs_embeds=embeds)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds, got neither"):
        model()


@pytest.mark.parametrize("shape", [(5,), (2, 4), (3, 5), (2, 4, 5), (2, 5, 4), (2, 3, 5, 5), (1, 1, 1, 4)])
def test_mask_of_wrong_shape(model, shape):
    message = r"attention_mask must have shape \(B, S\) = \(2, 5\).*got \(" + ", ".join(map(str, shape))
    with pytest.raises(ValueError, match=message):
        model(ids(2, 5), attention_mask=torch.ones(shape))


def test_complex_mask(model):
    with pytest.raises(TypeError, match=r"attention_mask must be .*got torch\.complex64"):
        model(ids(2, 5), attention_mask=torch.ones(2, 5, dtype=torch.complex64))


def test_head_mask_of_wrong_shape(model):
    with pytest.raises(ValueError, match=r"head_mask must have shape .*got \(3,\)"):
        model(ids(2, 5), head_mask=torch.ones(3))


def test_ids_and_embeddings_of_wrong_shape(model):
    with pytest.raises(ValueError, match=r"input_ids must have shape \(B, S\), got \(5,\)"):
        model(ids(5))
    with pytest.raises(ValueError, match=r"token_type_ids must have shape \(B, S\) = \(2, 5\), got \(2, 4\)"):
        model(ids(2, 5), token_type_ids=ids(2, 4))
    with pytest.raises(ValueError, match=r"inputs_embeds must have shape \(B, S, .*\), got \(2, 5, 17\)"):
        model(inputs_embeds=torch.zeros(2, 5, 17))


@pytest.mark.parametrize("name", ["BertForMultipleChoice", "RoCBertForMultipleChoice", "ConvBertForMultipleChoice"])
def test_choices_without_their_dimension(name):
    with pytest.raises(ValueError, match=r"input_ids must have 3 dimensions, \(B, choices, S, ...\), got \(2, 5\)"):
        build(name)(ids(2, 5))
    for shape in ((2, 3, 5), (3, 2, 5)):
        with pytest.raises(ValueError, match=r"attention_mask must begin with \(B, choices\) = \(2, 2\), got"):
            build(name)(ids(2, 2, 5), attention_mask=ids(*shape, value=1))


def test_sequence_longer_than_the_positions(model):
    assert model(ids(2, 12))[0].shape == (2, 12, 16)
    with pytest.raises(ValueError, match="at most max_position_embeddings 12, got 13; truncate"):
        model(ids(2, 13))
    assert model(ids(2, 13), position_ids=ids(1, 13))[0].shape == (2, 13, 16)  # explicit positions may repeat


def test_relative_positions_do_not_reach_further_than_their_table():
    model = build("BertModel", position_embedding_type="relative_key")
    assert model(ids(2, 12))[0].shape == (2, 12, 16)
    with pytest.raises(ValueError, match=r"at most max_position_embeddings 12, got 13; truncate the input$"):
        model(ids(2, 13), position_ids=ids(1, 13))


def test_sequence_not_a_multiple_of_the_chunks():
    model = build("BertModel", chunk_size_feed_forward=4)
    with pytest.raises(ValueError, match="divisible by chunk_size_feed_forward 4, got 5"):
        model(ids(2, 5))


@pytest.mark.parametrize("name", CLASSES)
def test_empty_batch_gives_empty_outputs_and_empty_sequence_an_error(name):
    model = build(name)
    choices = (2,) if "Choice" in name else ()
    output = model(ids(0, *choices, 5), attention_mask=ids(0, *choices, 5), output_hidden_states=True)
    assert all(value.shape[0] == 0 for value in output.values() if isinstance(value, torch.Tensor))
    assert output.hidden_states[-1].shape == (0, 5, 16)
    with pytest.raises(ValueError, match=r"the sequence is empty, got B = \d, S = 0; S must be at least 1"):
        model(ids(2, *choices, 0))


@pytest.mark.parametrize("name", [name for name in CLASSES if not name.endswith(("Model", "Answering"))])
def test_labels_of_wrong_shape(name):
    model = build(name)
    given = ids(2, 2, 5) if "Choice" in name else ids(2, 5)
    with pytest.raises(ValueError, match=r"labels must have shape \(.*got \(7, 7\)"):
        model(given, labels=ids(7, 7))


@pytest.mark.parametrize("name", ["BertForMaskedLM", "RoCBertForTokenClassification", "ConvBertForMultipleChoice"])
def test_labels_of_wrong_dtype(name):
    model = build(name)
    given, labels = (ids(2, 2, 5), ids(2, value=1)) if "Choice" in name else (ids(2, 5), ids(2, 5, value=1))
    assert torch.equal(model(given, labels=labels).loss, model(given, labels=labels.int()).loss)
    with pytest.raises(
        TypeError, match=r"labels must be an int64 or int32 tensor for a classification, got torch.float32"
    ):
        model(given, labels=labels.float())


@pytest.mark.parametrize(
    "name", ["BertForQuestionAnswering", "RoCBertForQuestionAnswering", "ConvBertForQuestionAnswering"]
)
def test_question_answering(name):
    with pytest.raises(ValueError, match=r"start_positions must have shape \(B,\) = \(2,\), got \(3,\)"):
        build(name)(ids(2, 5), start_positions=ids(3), end_positions=ids(2))
    with pytest.raises(TypeError, match=r"end_positions must be an int64 or int32 tensor, got torch\.float32"):
        build(name)(ids(2, 5), start_positions=ids(2), end_positions=ids(2).float())
    with pytest.raises(ValueError, match=r"num_labels must be 2 .* got 3"):
        build(name, id2label=None, num_labels=3)


def test_values_of_ids_are_not_read_under_the_compiler():
    model = build("BertModel")
    graph = torch.export.export(model, (ids(2, 5),), strict=True)
    assert torch.equal(graph.module()(ids(2, 5))[0], model(ids(2, 5))[0])


CONFIG_ERRORS = [
    (BertConfig, {"hidden_size": 18}, "hidden_size must be divisible by num_attention_heads, got 18 and 4"),
    (ConvBertConfig, {"hidden_size": 18}, r"hidden_size must be divisible by twice the attention heads .*got 18 and 4"),
    (ConvBertConfig, {"conv_kernel_size": 4}, "conv_kernel_size must be odd, got 4"),
    (ConvBertConfig, {"num_groups": 3}, "hidden_size must be divisible by num_groups, got 16 and 3"),
    (ConvBertConfig, {"num_groups": 16}, "intermediate_size must be divisible by num_groups, got 24 and 16"),
    (ConvBertConfig, {"head_ratio": 0}, "head_ratio must be at least 1, got 0"),
    (ConvBertConfig, {"summary_type": "attn"}, "summary_type must be one of .*got 'attn'"),
    (ConvBertConfig, {"summary_activation": "tahn"}, "summary_activation: activation must be one of .*got 'tahn'"),
    (BertConfig, {"hidden_act": "gleu"}, "hidden_act: activation must be one of .*gelu.*got 'gleu'"),
    (BertConfig, {"hidden_act": "prelu"}, "hidden_act: activation must be one of .*got 'prelu'"),
    (BertConfig, {"vocab_size": 0}, "vocab_size must be at least 1, got 0"),
    (BertConfig, {"pad_token_id": 30}, "pad_token_id must be less than vocab_size 30, got 30"),
    (BertConfig, {"hidden_dropout_prob": 1.5}, "hidden_dropout_prob must be between 0.0 and 1.0, got 1.5"),
    (BertConfig, {"layer_norm_eps": -1.0}, "layer_norm_eps must be between 0.0 and inf, got -1.0"),
    (BertConfig, {"problem_type": "ranking"}, "problem_type must be one of .*got 'ranking'"),
    (BertConfig, {"position_embedding_type": "rotary"}, "position_embedding_type must be one of .*got 'rotary'"),
    (BertConfig, {"num_labels": 3, "id2label": {0: "a"}}, "num_labels must be the length of id2label, 1, got 3"),
]


@pytest.mark.parametrize(("cls", "values", "message"), CONFIG_ERRORS, ids=[str(case[1]) for case in CONFIG_ERRORS])
def test_config_value(cls, values, message):
    with pytest.raises(ValueError, match=message):
        cls(**SIZES | values)


def test_config_value_of_wrong_type():
    with pytest.raises(TypeError, match="hidden_size must be an int, got '768'"):
        BertConfig(hidden_size="768")
    with pytest.raises(TypeError, match="hidden_dropout_prob must be a number, got None"):
        BertConfig(hidden_dropout_prob=None)
    with pytest.raises(TypeError, match=r"id2label must be a dict or None, got \['a'\]"):
        BertConfig.from_dict({"id2label": ["a"]})
    with pytest.raises(ValueError, match="is_decoder must be one of True, False, got 'no'"):
        BertConfig(is_decoder="no")
    with pytest.raises(TypeError, match=r"a config must be a JSON object \(a dict\), got list"):
        BertConfig.from_dict([])


def test_config_of_another_family():
    with pytest.raises(ValueError, match="BertConfig needs model_type 'bert', got 'convbert'"):
        BertConfig.from_dict(CONVBERT.to_dict())
    with pytest.raises(TypeError, match="ConvBertModel needs a ConvBertConfig, got BertConfig"):
        reference.ConvBertModel(BERT)


def test_config_changed_to_a_bad_value_is_found_when_a_model_is_built():
    config = BertConfig(**SIZES)
    config.hidden_act = "gleu"
    with pytest.raises(ValueError, match="got 'gleu'"):
        reference.BertModel(config)


def test_labels_that_are_set_later_are_counted():
    config = BertConfig(**SIZES)
    config.id2label = {0: "a", 1: "b", 2: "c"}
    assert config.num_labels == 3 and reference.BertForSequenceClassification(config).classifier.out_features == 3
    assert BertConfig.from_dict(config.to_dict()).id2label == config.id2label


@pytest.mark.parametrize("name", ["BertForPreTraining", "RoCBertForMaskedLM", "ConvBertForMaskedLM"])
@pytest.mark.parametrize("place", ["input", "output"])
def test_embeddings_of_another_size(name, place):
    model = build(name)
    size = model.get_input_embeddings().embedding_dim
    for shape in ((31, size), (30, size + 1)):
        new = torch.nn.Embedding(*shape) if place == "input" else torch.nn.Linear(*shape[::-1])
        with pytest.raises(ValueError, match=rf"must have .*\(30, {size}\), got \({shape[0]}, {shape[1]}\); resize"):
            getattr(model, f"set_{place}_embeddings")(new)
    assert model(ids(2, 5))[0].shape == (2, 5, 30)
    if place == "output":
        model.set_output_embeddings(torch.nn.Linear(size, 30, bias=False))
        model.resize_token_embeddings(33)
        assert model(ids(2, 5, value=32))[0].shape == (2, 5, 33)


def test_pruned_heads_are_not_supported():
    with pytest.raises(ValueError, match="pruned_heads must be empty"):
        build("BertModel", pruned_heads={"0": [1]})
