"""RoCBert in plain PyTorch: golden cases of an independent implementation, its three streams of ids, bad input."""

from __future__ import annotations

import golden
import pytest
import torch
import torch.nn.functional as F

import fastconv
from fastconv import reference
from fastconv.reference import RoCBertConfig

OK = golden.cases("rocbert_")
ERRORS = golden.cases("rocbert_", "error")


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
    with pytest.raises(ValueError, match="shape_embed_dim must be hidden_size 32 where concat_input is False, got 12"):
        golden.config(case)


# The contrastive loss


@pytest.mark.parametrize(
    ("texts", "loss", "pooler_norm", "shape_norm"),
    [
        ((), 11.896127834416461, 0.0, 0.6060415139920632),
        (("labels_input_ids", "attack_input_ids"), 13.655202359800704, 7.058038470076989, 0.6265142255916045),
        (("labels_", "attack_"), 21.02801145637439, 47.55688228490796, 6.757579013477021),
    ],
    ids=["no attack", "ids alone", "all inputs"],
)
def test_contrastive_loss_is_that_of_transformers(texts, loss, pooler_norm, shape_norm):
    """The numbers, and the norms of two gradients, are those of transformers 4.57.6 in fp64 for the same inputs."""
    case = next(case for case in OK if case["name"] == "rocbert_pretraining_no_labels")
    model, inputs = load(case, torch.float64), golden.tensors(case, "in.")
    further = {f"labels_{name}": value for name, value in inputs.items()}
    further["labels_input_ids"] = inputs["input_ids"].masked_fill(inputs["input_ids"] % 3 == 0, -100)
    further |= {f"attack_{name}": value.roll(1, -1) for name, value in inputs.items()}
    further["attack_attention_mask"] = inputs["attention_mask"]
    inputs |= {name: value for name, value in further.items() if name.startswith(("labels_input_ids", *texts))}
    output = model(**inputs)
    output.loss.backward()
    assert output.loss.item() == pytest.approx(loss, rel=1e-12)
    gradient = model.roc_bert.pooler.dense.weight.grad
    assert (0.0 if gradient is None else gradient.norm().item()) == pytest.approx(pooler_norm, rel=1e-10)
    gradient = model.roc_bert.embeddings.shape_embed.weight.grad
    assert gradient.norm().item() == pytest.approx(shape_norm, rel=1e-10)


def test_contrastive_loss_by_its_definition():
    text, original, attack = torch.randn(3, 4, 6, dtype=torch.float64)
    total = 0.0
    for queries in (text, original):
        for row, query in enumerate(queries):
            scores = torch.stack([100 * F.cosine_similarity(query, key, dim=0) for key in attack])
            total += (scores.logsumexp(0) - scores[row]) / 8
    loss = reference.roc_bert_heads.contrastive_loss(text, original, attack)
    torch.testing.assert_close(loss, total, rtol=1e-12, atol=0)


# Three streams of ids

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


def small(name: str = "RoCBertModel", library=reference, **values) -> reference.Model:
    cls = getattr(library, name)
    return cls(cls.config_class(**SIZES | values)).eval()


def ids(*shape: int, high: int = 8) -> torch.Tensor:
    return torch.randint(0, high, shape)


def test_missing_ids_count_as_zeros_where_they_are_concatenated():
    model, tokens, zeros = small(), ids(2, 5), torch.zeros(2, 5, dtype=torch.long)
    expected = model(tokens, zeros, zeros)[0]
    assert torch.equal(model(tokens)[0], expected)
    assert torch.equal(model(inputs_embeds=model.get_input_embeddings()(tokens))[0], expected)
    assert not torch.equal(model(tokens, ids(2, 5) + 1)[0], expected)


@pytest.mark.parametrize("values", [{}, MEAN], ids=["concat", "mean"])
@pytest.mark.parametrize("stream", STREAMS)
def test_disabled_ids_are_left_out_but_keep_their_parameters(stream, values):
    model, tokens, extra = small(**{f"enable_{stream}": False}, **values), ids(2, 5), ids(2, 5)
    expected = model(tokens)[0]
    # not looked at: their table may be smaller than the ids
    assert torch.equal(model(tokens, **{f"input_{stream}_ids": extra + 100})[0], expected)
    other = next(name for name in STREAMS if name != stream)
    assert not torch.equal(model(tokens, **{f"input_{other}_ids": extra})[0], expected)
    assert f"embeddings.{stream}_embed.weight" in model.state_dict()


def test_missing_ids_are_left_out_of_the_mean():
    model, tokens, shapes = small(**MEAN), ids(2, 5), ids(2, 5)
    first = model(tokens, output_hidden_states=True).hidden_states[0]
    second = model(tokens, shapes, output_hidden_states=True).hidden_states[0]
    torch.testing.assert_close(2 * second - first, model.get_shape_embeddings()(shapes), rtol=1e-5, atol=1e-5)


def test_replaced_embeddings_are_used():
    model, tokens = small(), ids(2, 5)
    for stream in STREAMS:
        old = getattr(model, f"get_{stream}_embeddings")()
        new = torch.nn.Embedding(40, old.embedding_dim)
        getattr(model, f"set_{stream}_embeddings")(new)
        assert getattr(model, f"get_{stream}_embeddings")() is new
        given = {f"input_{stream}_ids": torch.full((2, 5), 39)}
        model(tokens, **given).last_hidden_state.square().sum().backward()
        assert new.weight.grad[39].abs().max() > 0 and new.weight.grad[38].abs().max() == 0
        with pytest.raises(IndexError, match=f"input_{stream}_ids must be from 0 to 39"):
            model(tokens, **{f"input_{stream}_ids": torch.full((2, 5), 40)})


def test_resized_token_embeddings_keep_the_other_streams():
    model, tokens = small("RoCBertForMaskedLM"), ids(2, 5)
    before = model(tokens, ids(2, 5, high=1) + 3).logits
    model.resize_token_embeddings(35)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert torch.equal(model(tokens, ids(2, 5, high=1) + 3).logits[..., :30], before)
    assert model(torch.full((2, 5), 34)).logits.shape == (2, 5, 35)


@pytest.mark.parametrize("values", [{}, MEAN], ids=["concat", "mean"])
def test_checkpointing_changes_no_gradient(values):
    model, inputs = small("RoCBertForMaskedLM", hidden_dropout_prob=0.0, **values).train(), [ids(2, 5) for _ in "123"]
    gradients = []
    for enable in (model.gradient_checkpointing_disable, model.gradient_checkpointing_enable):
        enable()
        torch.manual_seed(1)
        model.zero_grad()
        model(*inputs, labels=inputs[0]).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert model.is_gradient_checkpointing
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again, rtol=0, atol=0)


def test_a_decoder_returns_its_cache_beside_the_loss():
    model, tokens = small("RoCBertForCausalLM", is_decoder=True), ids(2, 5)
    output = model(tokens, labels=tokens)
    assert output.loss.isfinite() and output.past_key_values.get_seq_length() == 5
    assert model(tokens, labels=tokens, use_cache=False).past_key_values is None


def test_choices_are_scored_one_by_one():
    model = small("RoCBertForMultipleChoice")
    streams = [ids(2, 3, 5) for _ in "123"]
    scores = model(*streams).logits
    assert scores.shape == (2, 3)
    for choice in range(3):
        alone = model(*(stream[:, choice : choice + 1] for stream in streams)).logits
        torch.testing.assert_close(alone[:, 0], scores[:, choice], rtol=1e-5, atol=1e-6)


# Bad input


@pytest.fixture(params=[reference, fastconv], ids=["reference", "fastconv"])
def library(request):
    return request.param


@pytest.mark.parametrize("shape", [(2, 4), (3, 5), (5,), (1, 5), (5, 2), (2, 5, 1)])
@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("values", [{}, MEAN], ids=["concat", "mean"])
def test_ids_of_unequal_shapes(library, values, stream, shape):
    model = small(library=library, **values)
    message = rf"input_{stream}_ids must have the \(B, S\) of {{}}, \(2, 5\), one id a token, got "
    message += r"\(" + ", ".join(map(str, shape))
    with pytest.raises(ValueError, match=message.format("input_ids")):
        model(ids(2, 5), **{f"input_{stream}_ids": ids(*shape)})
    with pytest.raises(ValueError, match=message.format("inputs_embeds")):
        model(inputs_embeds=torch.randn(2, 5, 16), **{f"input_{stream}_ids": ids(*shape)})
    model = small(library=library, **{f"enable_{stream}": False}, **values)
    with pytest.raises(ValueError, match=message.format("input_ids")):
        model(ids(2, 5), **{f"input_{stream}_ids": ids(*shape)})


@pytest.mark.parametrize("stream", STREAMS)
def test_ids_outside_their_table_of_another_dtype_or_device(library, stream):
    model, name, size = small(library=library), f"input_{stream}_ids", STREAMS[stream]
    for value in (-1, size):
        given = ids(2, 5)
        given[1, 2] = value
        message = rf"{name} must be from 0 to {size - 1} \({stream}_vocab_size is {size}\), got values from .*{value}"
        with pytest.raises(IndexError, match=message):
            model(ids(2, 5), **{name: given})
    with pytest.raises(TypeError, match=f"{name} must be an int64 or int32 tensor, got torch.float32"):
        model(ids(2, 5), **{name: torch.ones(2, 5)})
    with pytest.raises(ValueError, match=f"{name} is on meta but the model is on cpu"):
        model(ids(2, 5), **{name: ids(2, 5).to("meta")})
    given = ids(2, 5)
    assert torch.equal(model(ids(2, 5) * 0, **{name: given.int()})[0], model(ids(2, 5) * 0, **{name: given})[0])


def test_choices_without_their_dimension(library):
    with pytest.raises(ValueError, match=r"input_shape_ids must have 3 dimensions, .*got \(2, 5\)"):
        small("RoCBertForMultipleChoice", library)(ids(2, 3, 5), ids(2, 5))


def test_a_cache_does_not_bring_earlier_ids_back(library):
    model = small("RoCBertForCausalLM", library, is_decoder=True)
    cache = model(ids(2, 5), ids(2, 5)).past_key_values
    with pytest.raises(ValueError, match=r"input_shape_ids must have the \(B, S\) of input_ids, \(2, 1\), .*\(2, 6\)"):
        model(ids(2, 1), ids(2, 6), past_key_values=cache)


def test_further_texts_of_the_pretraining(library):
    model, tokens = small("RoCBertForPreTraining", library), ids(2, 5)
    # without labels there is no loss, whatever the attack; an attack may have another length
    assert model(tokens, attack_input_ids=ids(2, 7)).loss is None
    assert model(tokens, labels_input_ids=tokens, attack_input_ids=ids(2, 7)).loss.isfinite()
    for bad, error, message in (
        ({"labels_input_ids": ids(2, 4)}, ValueError, r"labels_input_ids must have shape \(2, 5\), got \(2, 4\)"),
        ({"labels_input_ids": tokens.float()}, TypeError, "labels_input_ids must be an int64 or int32 tensor"),
        ({"attack_input_ids": ids(3, 5)}, ValueError, "attack_input_ids must have as many rows as input_ids, 2, got 3"),
        ({"attack_input_shape_ids": ids(2, 4)}, ValueError, r"attack_\*: input_shape_ids must have .*got \(2, 4\)"),
        ({"attack_input_ids": ids(2, 5) + 30}, IndexError, r"attack_\*: input_ids must be from 0 to 29"),
        ({"labels_attention_mask": ids(2, 4)}, ValueError, r"labels_\*: attention_mask must have shape .*\(2, 4\)"),
    ):
        with pytest.raises(error, match=message):
            model(tokens, **{"labels_input_ids": tokens, "attack_input_ids": tokens} | bad)
    model = small("RoCBertForPreTraining", library, pad_token_id=None)
    assert model(tokens, labels_input_ids=tokens).loss.isfinite()
    with pytest.raises(ValueError, match="the contrastive loss needs a config with a pad_token_id, got None"):
        model(tokens, labels_input_ids=tokens, attack_input_ids=tokens)


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({**MEAN, "shape_embed_dim": 6}, ValueError, "shape_embed_dim must be hidden_size 16 where .* got 6"),
        ({**MEAN, "pronunciation_embed_dim": 6}, ValueError, "pronunciation_embed_dim must be hidden_size 16 .* got 6"),
        ({"shape_vocab_size": 0}, ValueError, "shape_vocab_size must be at least 1, got 0"),
        ({"pronunciation_embed_dim": "6"}, TypeError, "pronunciation_embed_dim must be an int, got '6'"),
        ({"pad_token_id": 8}, ValueError, "pad_token_id must be less than pronunciation_vocab_size 8, got 8"),
        ({"position_embedding_type": "rotary"}, ValueError, "position_embedding_type must be one of .*got 'rotary'"),
        ({"add_cross_attention": True}, ValueError, "add_cross_attention needs is_decoder True, got False"),
    ],
    ids=str,
)
def test_config_value(values, error, message):
    with pytest.raises(error, match=message):
        RoCBertConfig(**SIZES | values)
    config = RoCBertConfig(**SIZES)
    for name, value in values.items():
        setattr(config, name, value)
    with pytest.raises(error, match=message):
        reference.RoCBertModel(config)


def test_config_survives_a_round_trip():
    config = RoCBertConfig(**SIZES, enable_shape=False, position_embedding_type="relative_key")
    assert RoCBertConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="RoCBertConfig needs model_type 'roc_bert', got 'bert'"):
        RoCBertConfig.from_dict(reference.BertConfig().to_dict())
