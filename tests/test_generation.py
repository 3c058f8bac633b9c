"""Text generation, against a loop over plain forwards of one row, and against counted draws."""

from __future__ import annotations

import copy
import itertools
import math
import re

import pytest
import torch
from decoders import BATCH, KINDS, NAMES, Tensors, decoder, encoder_inputs, prompts
from swap_models import VOCABULARY, build

import fastconv
from fastconv import reference
from fastconv.reference.sampling import NextToken

TABLE = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(3))


def generation_inputs(model: reference.Model, **options) -> Tensors:
    """Prompts for `generate`, with the tables that RoCBert's take."""
    inputs = prompts(model, **options)
    if "input_shape_ids" in inputs:
        inputs |= {"shape_ids_of_vocab": TABLE, "pronunciation_ids_of_vocab": TABLE.flip(0)}
    return inputs | encoder_inputs(model, inputs["input_ids"].shape[0])


def alone(inputs: Tensors, row: int) -> Tensors:
    """One row of a batch, without its padding."""
    keep = slice(None)
    if "attention_mask" in inputs:
        keep = inputs["attention_mask"][row].bool()
    return {
        name: value[row : row + 1] if name.startswith("encoder_") else value[row : row + 1, keep]
        for name, value in inputs.items()
        if name != "attention_mask" and not name.endswith("_of_vocab")
    }


@torch.no_grad()
def likeliest(model: reference.Model, inputs: Tensors, row: int, count: int) -> list[int]:
    """The tokens that follow a row, each from a forward of its own over the row's tokens alone."""
    row_inputs, tokens = alone(inputs, row), []
    while len(tokens) < count:
        tokens.append(int(model(**row_inputs, use_cache=False).logits[0, -1].argmax()))
        follow = {
            "input_ids": tokens[-1],
            "token_type_ids": int(row_inputs["token_type_ids"][0, -1]),
            "input_shape_ids": int(TABLE[tokens[-1]]),
            "input_pronunciation_ids": int(TABLE.flip(0)[tokens[-1]]),
        }
        for name in set(follow) & set(row_inputs):
            row_inputs[name] = torch.cat([row_inputs[name], torch.tensor([[follow[name]]])], dim=1)
    return tokens


@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_greedy_takes_the_likeliest_token(name, kind, cross):
    """With a cache and without, padded on the left and not: every row's tokens are those that it gives alone."""
    model = decoder(name, kind, cross)
    found = set()
    for padding, use_cache in itertools.product((False, True), repeat=2):
        inputs = generation_inputs(model, padding=padding)
        ids = model.generate(**inputs, max_new_tokens=12, use_cache=use_cache)
        assert ids.dtype == torch.int64 and torch.equal(ids[:, :9], inputs["input_ids"])
        assert ids[:, 9:].tolist() == [likeliest(model, inputs, row, 12) for row in range(BATCH)]
        found |= set(ids[:, 9:].flatten().tolist())
    assert len(found) > 4  # a model that repeats one token would show nothing


def test_arguments_by_position_and_defaults():
    model = decoder()
    inputs = prompts(model)
    expected = model.generate(**inputs)
    assert expected[:, 9:].tolist() == [likeliest(model, inputs, row, 20) for row in range(BATCH)]
    order = ("input_ids", "attention_mask", "token_type_ids")
    actual = model.generate(*(inputs[name].int() for name in order))
    assert actual.dtype == torch.int64 and torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32])
def test_masks_of_every_dtype(dtype):
    model = decoder()
    inputs = prompts(model)
    other = inputs | {"attention_mask": inputs["attention_mask"].to(dtype)}
    assert torch.equal(model.generate(**other, max_new_tokens=5), model.generate(**inputs, max_new_tokens=5))


def test_a_token_masked_inside_a_prompt_counts_as_none():
    model = decoder()
    inputs = prompts(model, padding=False)
    inputs["attention_mask"] = torch.ones(BATCH, 9).long()
    inputs["attention_mask"][1, 4] = 0
    ids = model.generate(**inputs, max_new_tokens=6)
    assert ids[:, 9:].tolist() == [likeliest(model, inputs, row, 6) for row in range(BATCH)]


@pytest.mark.parametrize("use_cache", [True, False])
def test_rows_end_and_are_filled(use_cache):
    """Each row ends at the first of the tokens that end one, keeps it, and is filled with padding from there on."""
    model = decoder(kind="relative_key")
    inputs = prompts(model)
    free = [likeliest(model, inputs, row, 15) for row in range(BATCH)]
    ends = [free[1][3], free[2][2]]
    lengths = [1 + min(tokens.index(end) for end in ends if end in tokens) for tokens in free]
    assert len(set(lengths)) == BATCH and max(lengths) < 15

    def filled(pad: int) -> list[list[int]]:
        rows = zip(free, lengths, strict=True)
        return [tokens[:length] + [pad] * (max(lengths) - length) for tokens, length in rows]

    options = {"max_new_tokens": 15, "use_cache": use_cache}
    assert model.generate(**inputs, eos_token_id=ends, **options)[:, 9:].tolist() == filled(0)
    model.config.eos_token_id = ends
    assert model.generate(**inputs, pad_token_id=7, **options)[:, 9:].tolist() == filled(7)
    assert model.generate(**inputs, eos_token_id=[], **options)[:, 9:].tolist() == free


def test_generation_stops_when_all_rows_have_ended():
    model = decoder()
    inputs = prompts(model)
    first = model.generate(**inputs, max_new_tokens=1)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    ends = first[:, -1].unique().tolist()
    assert torch.equal(model.generate(**inputs, eos_token_id=ends), first) and len(calls) == 1
    one = {name: value[:1] for name, value in inputs.items()}
    end = int(first[0, -1])
    model.config.pad_token_id = None  # a single row needs no padding
    assert torch.equal(model.generate(**one, eos_token_id=end), first[:1])


def test_what_is_computed_with_a_cache():
    """The prompt once, then one token a call; without a cache all of it every time."""
    model = decoder(cross=True)
    inputs = generation_inputs(model)
    lengths = []
    model.bert.encoder.layer[0].register_forward_hook(lambda _, args, output: lengths.append(args[0].shape[1]))
    encoded = []
    model.bert.encoder.layer[0].crossattention.self.key.register_forward_hook(lambda *_: encoded.append(1))
    model.generate(**inputs, max_new_tokens=4)
    assert lengths == [9, 1, 1, 1] and len(encoded) == 1
    model.generate(**inputs, max_new_tokens=4, use_cache=False)
    assert lengths[4:] == [9, 10, 11, 12] and len(encoded) == 5


def test_without_token_types_they_are_0():
    model = decoder()
    inputs = prompts(model)
    zeros = inputs | {"token_type_ids": torch.zeros(9).long()}  # any shape that the forward takes
    del inputs["token_type_ids"]
    assert torch.equal(model.generate(**inputs, max_new_tokens=5), model.generate(**zeros, max_new_tokens=5))


@pytest.mark.parametrize("training", [False, True])
def test_the_model_stays_as_it_is(training):
    model = decoder(hidden_dropout_prob=0.5).train(training)
    inputs = prompts(model)
    before = {name: value.clone() for name, value in inputs.items()}
    recorded = []
    model.register_forward_hook(lambda _, args, output: recorded.append(output.logits.requires_grad))
    torch.manual_seed(1)
    first, second = (model.generate(**inputs) for _ in range(2))
    assert len(recorded) == 40 and not any(recorded)
    assert model.training is training and torch.is_grad_enabled()
    assert torch.equal(first, second) is not training  # dropout is that of the mode
    assert all(torch.equal(inputs[name], value) for name, value in before.items())


def test_gradient_checkpointing_in_training_only_loses_the_cache():
    model = decoder().train()
    inputs = prompts(model)
    expected = model.generate(**inputs)
    model.gradient_checkpointing_enable()
    assert torch.equal(model.generate(**inputs), expected)


@pytest.mark.parametrize("given", [("shape",), ("pronunciation",), ()], ids=str)
def test_roc_bert_without_a_stream(given):
    """What isn't given isn't given for new tokens either."""
    model = decoder("RoCBertForCausalLM")
    inputs = generation_inputs(model)
    for stream in {"shape", "pronunciation"} - set(given):
        del inputs[f"input_{stream}_ids"], inputs[f"{stream}_ids_of_vocab"]
    ids = model.generate(**inputs, max_new_tokens=8)
    assert ids[:, 9:].tolist() == [likeliest(model, inputs, row, 8) for row in range(BATCH)]


def test_roc_bert_ignores_a_stream_that_its_config_disables():
    model = decoder("RoCBertForCausalLM", enable_shape=False)
    inputs = generation_inputs(model)
    expected = model.generate(**inputs)
    inputs["shape_ids_of_vocab"] = None
    assert torch.equal(model.generate(**inputs), expected)


# Sampling


def allowed(logits: list[float], temperature: float, top_k: int, top_p: float) -> dict[int, float]:
    """The tokens that may be drawn and their probabilities, by the definitions, one token at a time."""
    weights = {token: math.exp(logit / temperature) for token, logit in enumerate(logits)}
    if top_k:
        lowest = sorted(weights.values(), reverse=True)[:top_k][-1]
        weights = {token: weight for token, weight in weights.items() if weight >= lowest}
    total, kept, reached = sum(weights.values()), {}, 0.0
    for token, weight in sorted(weights.items(), key=lambda item: -item[1]):
        if reached < top_p or top_p == 1.0:
            kept[token] = weight
            reached += weight / total
    return {token: weight / sum(kept.values()) for token, weight in kept.items()}


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    list(itertools.product((0.3, 1.0, 4.0), (0, 1, 3, 9, 50), (0.05, 0.5, 0.9, 1.0))),
)
def test_filter(temperature, top_k, top_p):
    logits = 2 * torch.randn(20, 9, dtype=torch.float64)
    logits[10:] = logits[10:].round()  # ties; among them top_k keeps all, top_p as many as it takes
    filtered = NextToken(True, temperature, top_k, top_p, None).filter(logits)
    for row in range(20):
        expected = allowed(logits[row].tolist(), temperature, top_k, top_p)
        probabilities = filtered[row].softmax(-1)
        drawn = {token: p for token, p in enumerate(probabilities.tolist()) if p > 0}
        assert sorted(drawn.values()) == pytest.approx(sorted(expected.values()), rel=1e-12)
        if row < 10:
            assert drawn.keys() == expected.keys()


def test_filter_of_known_probabilities():
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]], dtype=torch.float64).log()

    def kept(top_k: int, top_p: float) -> list[bool]:
        return NextToken(True, 1.0, top_k, top_p, None).filter(logits).isfinite()[0].tolist()

    assert kept(0, 1.0) == kept(4, 1.0) == kept(5, 1.0) == [True] * 4
    assert kept(3, 1.0) == [True] * 4  # the fourth is as likely as the third
    assert kept(2, 1.0) == kept(0, 0.7) == kept(2, 0.9) == [True, True, False, False]
    assert kept(1, 1.0) == kept(0, 0.4) == kept(0, 1e-9) == [True, False, False, False]
    assert kept(2, 0.6) == [True, False, False, False]  # of the two that top_k leaves, the first has 2 / 3
    equal = NextToken(True, 1.0, 0, 1e-9, None).filter(torch.zeros(1, 4))  # in fp32, where 1 - 1e-9 is 1
    assert equal.isfinite().sum() == 1


def tiny(**config) -> reference.Model:
    arguments = {"vocab_size": 6, "is_decoder": True, "tie_word_embeddings": False, "pad_token_id": None}
    return build("reference", "BertLMHeadModel", **arguments | config)


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 2.5}, {"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.8}, {"top_k": 4, "top_p": 0.7}],
    ids=str,
)
def test_draws_follow_the_probabilities(options):
    model = tiny()
    prompt = torch.tensor([[1, 4, 2]]).expand(20000, 3)
    tokens = model.generate(prompt, max_new_tokens=1, do_sample=True, seed=0, **options)[:, 3]
    options = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} | options
    expected = allowed(model(prompt[:1]).logits[0, -1].tolist(), **options)
    counts = tokens.bincount(minlength=6).tolist()
    assert len(expected) > 1 and {token for token, count in enumerate(counts) if count} == set(expected)
    statistic = sum((counts[token] - 20000 * p) ** 2 / (20000 * p) for token, p in expected.items())
    assert statistic < 20.5  # the 99.9 % quantile of chi-square with 5 degrees of freedom


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_every_draw_follows_what_was_drawn_before(name, use_cache):
    """The loop written out, with a generator of the same seed."""
    model = decoder(name)
    inputs = generation_inputs(model, padding=False)
    options = {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "seed": 11}
    ids = model.generate(**inputs, max_new_tokens=10, do_sample=True, use_cache=use_cache, **options)
    generator = torch.Generator().manual_seed(11)
    follow = {"input_shape_ids": TABLE, "input_pronunciation_ids": TABLE.flip(0)}
    for step in range(9, 19):
        streams = {
            key: torch.cat([inputs[key], table[ids[:, 9:step]]], 1) for key, table in follow.items() if key in inputs
        }
        types = inputs["token_type_ids"]
        types = torch.cat([types, types[:, -1:].expand(-1, step - 9)], 1)
        logits = model(ids[:, :step], **streams, token_type_ids=types).logits[:, -1]
        probabilities = NextToken(True, **options).filter(logits).softmax(-1)
        assert torch.equal(torch.multinomial(probabilities, 1, generator=generator)[:, 0], ids[:, step])


def test_a_seed_decides_and_leaves_the_global_generator_alone():
    model = decoder()
    inputs = prompts(model)

    def draw(seed: int | None) -> torch.Tensor:
        return model.generate(**inputs, do_sample=True, temperature=3.0, seed=seed)

    state = torch.get_rng_state()
    first = draw(0)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(draw(0), first) and not torch.equal(draw(1), first)
    torch.manual_seed(4)
    second = draw(None)
    assert not torch.equal(draw(None), second)
    torch.manual_seed(4)
    assert torch.equal(draw(None), second)


def test_greedy_ignores_the_options_of_sampling():
    model = decoder()
    inputs = prompts(model)
    expected = model.generate(**inputs)
    assert torch.equal(model.generate(**inputs, temperature=5.0, top_k=2, top_p=0.1, seed=3), expected)
    assert torch.equal(model.generate(**inputs, do_sample=True, top_k=1, seed=3), expected)
    assert torch.equal(model.generate(**inputs, do_sample=True, top_p=1e-6, top_k=0, seed=3), expected)


@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
@pytest.mark.parametrize("name", NAMES)
def test_accelerated_models_generate_the_same(name, cross, device, backend):
    model = decoder(name, cross=cross).float()
    fast = getattr(fastconv, name)(getattr(fastconv, type(model.config).__name__).from_dict(model.config.to_dict()))
    fast.load_state_dict(model.state_dict())
    inputs = generation_inputs(model)
    on_device = {key: value.to(device) for key, value in inputs.items()}
    # In the interpreter a token takes a second.
    tokens = 2 if backend == "triton" and device.type == "cpu" else 4
    for options in ({}, {"use_cache": False}, {"do_sample": True, "seed": 5}):
        expected = model.generate(**inputs, max_new_tokens=tokens, **options)
        for other in (fast.eval(), fastconv.accelerate(copy.deepcopy(model), backend=backend)):
            actual = other.to(device).generate(**on_device, max_new_tokens=tokens, **options)
            if device.type == "cuda" and "seed" in options:  # whose generator draws otherwise
                expected = other.generate(**on_device, max_new_tokens=tokens, **options).cpu()
            assert torch.equal(actual.cpu(), expected)


# Bad input


PROMPT = torch.tensor([[5, 6, 7], [8, 9, 10]])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"max_new_tokens": 30}, ValueError, r"fit into max_position_embeddings 32, got 3 + 30; shorten one of them"),
        ({"input_ids": torch.ones(2, 33).long()}, ValueError, "at most max_position_embeddings 32, got 33"),
        ({"input_ids": torch.ones(2, 0).long()}, ValueError, "the sequence is empty, got B = 2, S = 0"),
        ({"input_ids": PROMPT[0]}, ValueError, "input_ids must have shape (B, S), got (3,)"),
        ({"input_ids": PROMPT.float()}, TypeError, "input_ids must be an int64 or int32 tensor, got torch.float32"),
        ({"input_ids": PROMPT + 40}, IndexError, "input_ids must be from 0 to 40"),
        ({"input_ids": None}, ValueError, "give exactly one of input_ids and inputs_embeds"),
        ({"input_ids": PROMPT - 5}, ValueError, "input_ids hold pad_token_id 0: give attention_mask"),
        (
            {"attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]])},
            ValueError,
            "mask ends with 0 in rows [1]",
        ),
        ({"attention_mask": torch.tensor([[0, 0, 0], [0, 1, 1]])}, ValueError, "is 0 everywhere in rows [0]"),
        (
            {"attention_mask": torch.ones(2, 4)},
            ValueError,
            "must have shape (B, S) = (2, 3), got (2, 4)",
        ),
        ({"attention_mask": torch.ones(2, 3, 3)}, ValueError, "must have shape (B, S) = (2, 3), got (2, 3, 3)"),
        ({"attention_mask": torch.tensor([[3, 1, 1]] * 2)}, ValueError, "attention_mask must have values 1 and 0 only"),
        ({"attention_mask": torch.tensor([[0.5, 1, 1]] * 2)}, ValueError, "attention_mask must have values 1 and 0"),
        ({"token_type_ids": torch.zeros(2, 4).long()}, ValueError, "token_type_ids must have shape (B, S) = (2, 3)"),
        ({"token_type_ids": torch.zeros(2, 3)}, TypeError, "token_type_ids must be an int64 or int32 tensor"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be at least 1, got 0"),
        ({"max_new_tokens": 2.0}, TypeError, "max_new_tokens must be an int, got 2.0"),
        ({"temperature": 0.0}, ValueError, "temperature must be above 0 and finite, got 0.0; do_sample=False takes"),
        ({"temperature": -1}, ValueError, "temperature must be above 0 and finite, got -1"),
        ({"temperature": math.nan}, ValueError, "temperature must be above 0 and finite, got nan"),
        ({"temperature": math.inf}, ValueError, "temperature must be above 0 and finite, got inf"),
        ({"temperature": "1"}, TypeError, "temperature must be a number, got '1'"),
        ({"top_k": -1}, ValueError, "top_k must be at least 0, got -1"),
        ({"top_k": 2.5}, TypeError, "top_k must be an int, got 2.5"),
        ({"top_k": None}, TypeError, "top_k must be an int, got None"),
        ({"top_p": 0.0}, ValueError, "top_p must be above 0 and at most 1, got 0.0"),
        ({"top_p": 1.5}, ValueError, "top_p must be above 0 and at most 1, got 1.5"),
        ({"top_p": True}, TypeError, "top_p must be a number, got True"),
        ({"seed": -1}, ValueError, "seed must be at least 0, got -1"),
        ({"seed": "0"}, TypeError, "seed must be an int, got '0'"),
        ({"eos_token_id": 41}, ValueError, "eos_token_id must be less than vocab_size 41, got 41"),
        ({"eos_token_id": [3, -1]}, ValueError, "eos_token_id must be at least 0, got -1"),
        ({"eos_token_id": "3"}, TypeError, "eos_token_id must be an int, got '3'"),
        ({"pad_token_id": 41}, ValueError, "pad_token_id must be less than vocab_size 41, got 41"),
        ({"pad_token_id": [1]}, TypeError, "pad_token_id must be an int, got [1]"),
        ({"encoder_hidden_states": torch.zeros(2, 4, 16)}, ValueError, "is_decoder and add_cross_attention True"),
        (
            {"encoder_attention_mask": torch.ones(2, 4)},
            ValueError,
            "encoder_attention_mask needs encoder_hidden",
        ),
    ],
)
@pytest.mark.parametrize("do_sample", [False, True])
def test_bad_input(arguments, error, message, do_sample):
    model = decoder()
    calls = []
    model.bert.encoder.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(error, match=re.escape(message)):
        model.generate(**{"input_ids": PROMPT, "do_sample": do_sample} | arguments)
    assert not calls  # nothing was computed


def test_the_longest_that_fits():
    model = decoder(max_position_embeddings=9)
    ids = model.generate(PROMPT, max_new_tokens=6)
    assert ids.shape == (2, 9) and model(ids).logits.shape[1] == 9


def test_no_decoder():
    model = decoder(is_decoder=False)
    message = "generate needs a config with is_decoder True, got False; set model.config.is_decoder = True"
    with pytest.raises(ValueError, match=message):
        model.generate(PROMPT)
    model.config.is_decoder = True
    assert torch.equal(model.generate(PROMPT), decoder().generate(PROMPT))


def test_a_batch_that_ends_needs_padding():
    model = decoder(pad_token_id=None)
    message = "rows end at eos_token_id needs pad_token_id to fill them, got None"
    with pytest.raises(ValueError, match=message):
        model.generate(PROMPT, eos_token_id=3)
    assert model.generate(PROMPT).shape == (2, 23)  # without an end there is nothing to fill
    assert model.generate(PROMPT[:1], eos_token_id=3).shape[0] == 1


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"shape_ids_of_vocab": None}, ValueError, "must be given together, since every new token has a shape too; "),
        ({"input_shape_ids": None}, ValueError, "input_shape_ids is None"),
        ({"pronunciation_ids_of_vocab": None}, ValueError, "pronunciation_ids_of_vocab is None"),
        ({"input_pronunciation_ids": None}, ValueError, "input_pronunciation_ids is None"),
        ({"input_shape_ids": PROMPT[:1]}, ValueError, "input_shape_ids must have shape (2, 3), got (1, 3)"),
        ({"input_shape_ids": PROMPT.float()}, TypeError, "input_shape_ids must be an int64 or int32 tensor"),
        ({"input_shape_ids": PROMPT + 40}, IndexError, "(shape_vocab_size is 41)"),
        ({"shape_ids_of_vocab": TABLE[:9]}, ValueError, "shape_ids_of_vocab must have shape (41,), got (9,)"),
        ({"shape_ids_of_vocab": TABLE[None]}, ValueError, "shape_ids_of_vocab must have shape (41,), got (1, 41)"),
        ({"shape_ids_of_vocab": TABLE.float()}, TypeError, "shape_ids_of_vocab must be an int64 or int32 tensor"),
        ({"pronunciation_ids_of_vocab": TABLE + 1}, IndexError, "pronunciation_ids_of_vocab must be from 0 to 40"),
    ],
)
def test_bad_streams_of_roc_bert(change, error, message):
    model = decoder("RoCBertForCausalLM")
    inputs = {
        "input_shape_ids": PROMPT,
        "input_pronunciation_ids": PROMPT,
        "shape_ids_of_vocab": TABLE,
        "pronunciation_ids_of_vocab": TABLE,
    }
    assert model.generate(PROMPT, **inputs).shape == (2, 23)
    with pytest.raises(error, match=re.escape(message)):
        model.generate(PROMPT, **inputs | change)


@pytest.mark.parametrize("do_sample", [False, True])
def test_logits_that_are_not_numbers(do_sample):
    model = decoder()
    with torch.no_grad():
        model.get_output_embeddings().bias[3] = float("nan")
    with pytest.raises(ValueError, match="logits of the next token must be finite, got NaN"):
        model.generate(torch.tensor([[5, 6]]), do_sample=do_sample, max_new_tokens=2)
