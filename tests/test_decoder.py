"""Decoders: what a token may attend to, the key/value cache, cross-attention, gradients, gradient checkpointing.

The truth is the forward without a cache, in fp64, which golden cases and transformers prove elsewhere.
"""

from __future__ import annotations

import itertools
from collections import Counter
from unittest import mock

import pytest
import torch
import torch.utils.checkpoint
from decoders import BATCH, KINDS, NAMES, cut, decoder, encoder_inputs, positions, prompts, step_by_step

from fastconv import reference

EXACT = {"rtol": 0.0, "atol": 1e-12}
CHUNKS = [(9,), (1,) * 9, (4, 1, 1, 3), (2, 7)]


def all_inputs(model: reference.Model, **options) -> dict[str, torch.Tensor]:
    return prompts(model, **options) | encoder_inputs(model)


@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_cached_chunks_equal_the_full_forward(name, kind, cross):
    model = decoder(name, kind, cross)
    inputs = all_inputs(model)
    real = inputs["attention_mask"].bool()
    for with_positions, lengths in itertools.product((False, True), CHUNKS):
        if with_positions:
            inputs["position_ids"] = positions(inputs)
        expected = model(**inputs, use_cache=False, output_attentions=True, output_hidden_states=True)
        steps = step_by_step(model, inputs, lengths, output_attentions=True, output_hidden_states=True)
        logits = torch.cat([step.logits for step in steps], dim=1)
        torch.testing.assert_close(logits[real], expected.logits[real], **EXACT)
        for layer in range(3):
            hidden = torch.cat([step.hidden_states[layer] for step in steps], dim=1)
            torch.testing.assert_close(hidden[real], expected.hidden_states[layer][real], **EXACT)
        for attention in ("attentions", "cross_attentions") if cross else ("attentions",):
            for layer, start in itertools.product(range(2), range(len(steps))):
                actual = steps[start][attention][layer]
                rows = slice(sum(lengths[:start]), sum(lengths[: start + 1]))
                whole = expected[attention][layer][:, :, rows, : actual.shape[-1]]
                keep = real[:, None, rows, None]
                torch.testing.assert_close(actual * keep, whole * keep, **EXACT)


@pytest.mark.parametrize("kind", KINDS)
def test_base_model_caches_too(kind):
    model = decoder(kind=kind)
    model = reference.BertModel(model.config).double().eval()
    inputs = all_inputs(model)
    real = inputs["attention_mask"].bool()
    expected = model(**inputs, use_cache=False)
    steps = step_by_step(model, inputs, (4, 1, 1, 3))
    states = torch.cat([step.last_hidden_state for step in steps], dim=1)
    torch.testing.assert_close(states[real], expected.last_hidden_state[real], **EXACT)
    torch.testing.assert_close(steps[0].pooler_output, model.pooler(states), **EXACT)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_relative_scores_pair_by_pair(kind):
    """The scores of cached queries, one pair at a time, as the papers write them."""
    attention = decoder(kind=kind).bert.encoder.layer[0].attention.self
    hidden = torch.randn(1, 7, 16, dtype=torch.float64)
    cache = reference.Cache()
    attention(hidden[:, :3], past_key_values=cache)
    probabilities = attention(hidden[:, 3:], output_attentions=True, past_key_values=cache)[1][0]
    q, k = (layer(hidden)[0].unflatten(-1, (4, 4)) for layer in (attention.query, attention.key))
    scores = torch.empty(4, 4, 7, dtype=torch.float64)
    for head, i, j in itertools.product(range(4), range(3, 7), range(7)):
        relative = attention.distance_embedding.weight[i - j + 31]
        scores[head, i - 3, j] = q[i, head] @ k[j, head] + q[i, head] @ relative
        if kind == "relative_key_query":
            scores[head, i - 3, j] += k[j, head] @ relative
    torch.testing.assert_close(probabilities, (scores / 4**0.5).softmax(-1), **EXACT)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_on_the_left_changes_nothing(kind):
    model = decoder(kind=kind, cross=True)
    inputs = all_inputs(model)
    logits = model(**inputs, position_ids=positions(inputs)).logits
    for row in range(BATCH):
        alone = {name: value[row : row + 1] for name, value in inputs.items()}
        padding = int((alone.pop("attention_mask") == 0).sum())
        alone = {name: value if name.startswith("encoder_") else value[:, padding:] for name, value in alone.items()}
        torch.testing.assert_close(model(**alone).logits[0], logits[row, padding:], **EXACT)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_what_may_not_be_seen_gets_no_gradient(name, kind):
    """Later tokens, padding, and the encoder's masked tokens: exactly 0."""
    model = decoder(name, kind, cross=True)
    inputs = all_inputs(model)
    embeds = model.get_input_embeddings()(inputs.pop("input_ids")).detach().requires_grad_()
    states = inputs["encoder_hidden_states"].requires_grad_()
    logits = model(**inputs, inputs_embeds=embeds).logits
    for token in (6, 7, 8):
        for gradient in torch.autograd.grad(logits[:, token].square().sum(), (embeds, states), retain_graph=True):
            seen = inputs["encoder_attention_mask" if gradient.shape[1] == 5 else "attention_mask"].bool()
            if gradient.shape[1] != 5:
                seen = seen & (torch.arange(9) <= token)
            assert (gradient != 0).any(-1).equal(seen)


def test_an_encoder_sees_later_tokens():
    """With the config alone the same weights become an encoder."""
    model = decoder()
    inputs = all_inputs(model, padding=False)
    causal = model(**inputs, use_cache=False, output_attentions=True)
    model.config.is_decoder = False
    full = model(**inputs, output_attentions=True)
    later = torch.ones(9, 9).triu(1).bool()
    assert causal.attentions[0][..., later].eq(0).all() and full.attentions[0][..., later].gt(0).all()
    assert full.past_key_values is None


@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
@pytest.mark.parametrize("kind", KINDS)
def test_masks_of_queries_and_keys(kind, cross):
    """A mask of more than two dimensions says it all: the causal one gives what the mask of keys gives."""
    model = decoder(kind=kind, cross=cross)
    inputs = all_inputs(model)
    real = inputs["attention_mask"].bool()
    expected = model(**inputs).logits[real]
    keep = real[:, None, :] & torch.ones(9, 9, dtype=torch.bool).tril()
    additive = torch.zeros(BATCH, 1, 9, 9, dtype=torch.float64).masked_fill(~keep[:, None], torch.finfo().min)
    for mask in (keep, keep.long(), keep[:, None], keep[:, None].expand(-1, 4, -1, -1), additive):
        inputs["attention_mask"] = mask
        if cross:
            encoder_mask = encoder_inputs(model)["encoder_attention_mask"]
            inputs["encoder_attention_mask"] = encoder_mask[:, None, :].expand(-1, 9, -1)
        torch.testing.assert_close(model(**inputs).logits[real], expected, **EXACT)
        for lengths in CHUNKS:
            logits = torch.cat([step.logits for step in step_by_step(model, inputs, lengths)], dim=1)
            torch.testing.assert_close(logits[real], expected, **EXACT)


def test_a_square_mask_may_show_later_tokens():
    model = decoder()
    inputs = all_inputs(model, padding=False)
    shown = model(**inputs, attention_mask=torch.ones(BATCH, 9, 9))
    model.config.is_decoder = False
    torch.testing.assert_close(shown.logits, model(**inputs).logits, **EXACT)


@pytest.mark.parametrize("name", NAMES)
def test_the_encoder_s_keys_are_computed_once(name):
    model = decoder(name, cross=True)
    inputs = all_inputs(model)
    calls: Counter[str] = Counter()
    for path, module in model.named_modules():
        if path.endswith((".self.key", ".self.value")):
            module.register_forward_hook(lambda *_, path=path: calls.update([path]))
    steps = step_by_step(model, inputs, (4, 1, 1, 3))
    assert len(calls) == 8
    assert {path: count for path, count in calls.items() if "crossattention" in path and count != 1} == {}
    assert {count for path, count in calls.items() if "crossattention" not in path} == {4}
    cache = steps[-1].past_key_values
    assert [tuple(part.shape) for pair in cache.cross_attention for part in pair] == [(BATCH, 5, 4, 4)] * 4
    assert [tuple(part.shape) for pair in cache.self_attention for part in pair] == [(BATCH, 9, 4, 4)] * 4


def test_a_decoder_with_cross_attention_runs_without_an_encoder():
    """As in transformers: the layers of cross-attention are left out."""
    model = decoder(cross=True)
    plain = decoder()
    plain.load_state_dict({key: value for key, value in model.state_dict().items() if "crossattention" not in key})
    inputs = prompts(model)
    assert torch.equal(model(**inputs).logits, plain(**inputs).logits)
    assert model(**inputs).past_key_values.cross_attention == []


@pytest.mark.parametrize("name", NAMES)
def test_a_head_mask_counts_in_cross_attention_too(name):
    model = decoder(name, cross=True)
    mask = torch.tensor([[0.0, 1.0, 1.0, 0.5], [1.0, 0.0, 1.0, 1.0]], dtype=torch.float64)
    output = model(**all_inputs(model), head_mask=mask, output_attentions=True)
    for attentions in (output.attentions, output.cross_attentions):
        for layer in range(2):
            torch.testing.assert_close(attentions[layer].sum(-1), mask[layer, None, :, None].expand(BATCH, 4, 9))


@pytest.mark.parametrize("name", NAMES)
def test_gradients_through_a_cache_equal_those_of_the_full_forward(name):
    model = decoder(name, "relative_key_query", cross=True)
    inputs = all_inputs(model)
    weights = torch.randn(BATCH, 9, 41, dtype=torch.float64) * inputs["attention_mask"][:, :, None]

    def gradients(logits: torch.Tensor) -> dict[str, torch.Tensor]:
        model.zero_grad()
        (logits * weights).sum().backward()
        return {key: parameter.grad for key, parameter in model.named_parameters() if parameter.grad is not None}

    expected = gradients(model(**inputs, use_cache=False).logits)
    steps = step_by_step(model, inputs, (4, 1, 1, 3))
    actual = gradients(torch.cat([step.logits for step in steps], dim=1))
    assert actual.keys() == expected.keys()
    scale = max(gradient.abs().max() for gradient in expected.values())
    for key, gradient in expected.items():
        assert (actual[key] - gradient).abs().max() <= 1e-13 * scale, key


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_gradient_checkpointing_changes_nothing(name, kind):
    """Outputs and gradients, with dropout; the layers run a second time; there is no cache, asked for or not."""
    rates = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.3}
    model = decoder(name, kind, cross=True, **rates).train()
    inputs = all_inputs(model)
    calls: Counter[str] = Counter()
    model.base_model.encoder.layer[1].intermediate.register_forward_hook(lambda *_: calls.update(["layer"]))

    def run(use_cache: bool | None) -> tuple[reference.ModelOutput, dict[str, torch.Tensor], int]:
        calls.clear()
        model.zero_grad()
        torch.manual_seed(7)
        output = model(**inputs, labels=inputs["input_ids"], use_cache=use_cache, output_hidden_states=True)
        output.loss.backward()
        gradients = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
        return output, gradients, calls["layer"]

    expected, expected_gradients, count = run(False)
    assert count == 1
    model.gradient_checkpointing_enable()
    for use_cache in (False, True, None):
        output, gradients, count = run(use_cache)
        assert count == 2 and output.past_key_values is None
        assert torch.equal(output.logits, expected.logits) and torch.equal(output.loss, expected.loss)
        for layer, states in enumerate(expected.hidden_states):
            assert torch.equal(output.hidden_states[layer], states)
        assert gradients.keys() == expected_gradients.keys()
        assert all(torch.equal(gradients[key], gradient) for key, gradient in expected_gradients.items())
    with pytest.raises(ValueError, match="past_key_values can't be used while gradient checkpointing trains"):
        model(**inputs, past_key_values=reference.Cache())
    assert model(**inputs, use_cache=True).past_key_values is None
    assert model.eval()(**inputs).past_key_values.get_seq_length() == 9
    model.train().gradient_checkpointing_disable()
    assert run(False)[2] == 1
    # As transformers' Trainer enables it; the reentrant kind needs an input with a gradient.
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    embedded = model.get_input_embeddings()(inputs.pop("input_ids"))
    with mock.patch.object(torch.utils.checkpoint, "checkpoint", wraps=torch.utils.checkpoint.checkpoint) as called:
        model(**inputs, inputs_embeds=embedded).logits.sum().backward()
    assert all(call.kwargs == {"use_reentrant": True} for call in called.call_args_list) and called.call_count > 0


def test_an_encoder_that_trains_alone_still_uses_the_cache():
    model = decoder(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    inputs = prompts(model, padding=False)
    model.gradient_checkpointing_enable()
    model.base_model.encoder.train()
    cache = filled_cache(model, inputs)
    logits = model(**cut(inputs, 5, 9), past_key_values=cache).logits
    torch.testing.assert_close(logits, model(**inputs, use_cache=False).logits[:, 5:], **EXACT)


def test_when_there_is_a_cache():
    model = decoder()
    inputs = prompts(model)
    assert model(**inputs).past_key_values.get_seq_length() == 9
    assert model(**inputs, use_cache=False).past_key_values is None
    model.config.use_cache = False
    assert model(**inputs).past_key_values is None
    assert isinstance(model(**inputs, use_cache=True).past_key_values, reference.Cache)
    assert model(**inputs, labels=inputs["input_ids"], use_cache=True).past_key_values is None
    model.config.is_decoder = False
    assert model(**inputs, use_cache=True).past_key_values is None


@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
def test_tuple_output(cross):
    model = decoder(cross=cross)
    inputs = all_inputs(model, padding=False)
    options = {"output_attentions": True, "output_hidden_states": True}
    named = model(**inputs, labels=inputs["input_ids"], **options)
    values = model(**inputs, labels=inputs["input_ids"], **options, return_dict=False)
    names = ["loss", "logits", "hidden_states", "attentions"] + ["cross_attentions"] * cross
    assert isinstance(values, tuple) and list(named.keys()) == names and len(values) == len(names)
    assert torch.equal(values[1], named.logits) and torch.equal(values[-1][1], named[names[-1]][1])
    logits, cache = model(**cut(inputs, 0, 5), return_dict=False)
    assert isinstance(cache, reference.Cache) and torch.equal(logits, model(**cut(inputs, 0, 5)).logits)
    last, same = model(**cut(inputs, 5, 9), past_key_values=cache, return_dict=False)
    assert same is cache
    torch.testing.assert_close(last, named.logits[:, 5:], **EXACT)


@pytest.mark.parametrize("name", NAMES)
def test_logits_to_keep(name):
    model = decoder(name)
    inputs = prompts(model)
    everything = model(**inputs)
    for number in (1, 3, 9, 20):
        kept = model(**inputs, logits_to_keep=number, output_hidden_states=True)
        torch.testing.assert_close(kept.logits, everything.logits[:, -number:], **EXACT)
        assert kept.hidden_states[-1].shape[1] == kept.past_key_values.get_seq_length() == 9
    assert torch.equal(model(**inputs, logits_to_keep=0).logits, everything.logits)
    with pytest.raises(ValueError, match="labels need all logits, got logits_to_keep 2"):
        model(**inputs, labels=inputs["input_ids"], logits_to_keep=2)
    with pytest.raises(ValueError, match="logits_to_keep must be at least 0, got -1"):
        model(**inputs, logits_to_keep=-1)


def test_loss_is_that_of_the_next_token():
    model = decoder()
    inputs = prompts(model)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    logits = model(**inputs).logits.log_softmax(-1)
    terms = [
        -logits[row, token - 1, labels[row, token]]
        for row, token in itertools.product(range(BATCH), range(1, 9))
        if labels[row, token] != -100
    ]
    torch.testing.assert_close(model(**inputs, labels=labels).loss, torch.stack(terms).mean(), **EXACT)


@pytest.mark.parametrize("name", NAMES)
def test_loss_of_what_follows_a_cache(name):
    model = decoder(name)
    inputs = prompts(model, padding=False)
    cache = filled_cache(model, inputs)
    output = model(**cut(inputs, 5, 9), past_key_values=cache, labels=inputs["input_ids"][:, 5:])
    assert output.past_key_values is cache and cache.get_seq_length() == 9
    labels = inputs["input_ids"].clone()
    labels[:, :6] = -100  # the first token that follows is what the cache alone would predict
    torch.testing.assert_close(output.loss, model(**inputs, labels=labels).loss, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_loss_in_half_precision_is_not_rounded_to_it(dtype):
    model = decoder().to(dtype)
    inputs = prompts(model)
    logits = model(**inputs).logits.double()
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), inputs["input_ids"][:, 1:].flatten())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0.0)


def test_select_reorders_the_rows_of_a_cache():
    model = decoder(cross=True)
    inputs = all_inputs(model, padding=False)
    rows = torch.tensor([2, 0, 0, 1])
    cache = model(**cut(inputs, 0, 5)).past_key_values
    cache.select(rows)
    selected = {name: value[rows] for name, value in inputs.items()}
    logits = model(**cut(selected, 5, 9), past_key_values=cache).logits
    torch.testing.assert_close(logits, model(**inputs).logits[rows, 5:], **EXACT)


def filled_cache(model: reference.Model, inputs: dict[str, torch.Tensor], length: int = 5) -> reference.Cache:
    return model(**cut(inputs, 0, length)).past_key_values


@pytest.mark.parametrize("name", NAMES)
def test_cache_of_another_batch_size(name):
    model = decoder(name)
    inputs = prompts(model)
    cache = filled_cache(model, inputs)
    rest = {key: value[:2] for key, value in cut(inputs, 5, 9).items()}
    expected = r"shape \(B, S, H, D\) = \(2, 5, 4, 4\) for this batch and model, got \(3, 5, 4, 4\) in layer 0"
    with pytest.raises(ValueError, match=expected):
        model(**rest, past_key_values=cache)
    assert cache.get_seq_length() == 5
    model(**cut(inputs, 5, 9), past_key_values=cache)  # still as it was
    assert cache.get_seq_length() == 9


def test_cache_of_another_model():
    model = decoder()
    inputs = prompts(model)
    rest = cut(inputs, 5, 9)
    with pytest.raises(ValueError, match="must hold 2 layers, those of the model, got 1"):
        model(**rest, past_key_values=filled_cache(decoder(num_hidden_layers=1), inputs))
    with pytest.raises(ValueError, match=r"= \(3, 5, 4, 4\) for this batch and model, got \(3, 5, 2, 8\) in layer 0"):
        model(**rest, past_key_values=filled_cache(decoder(num_attention_heads=2), inputs))


@pytest.mark.parametrize("cache", [(), [], ((torch.zeros(3, 4, 5, 4),) * 2,) * 2, {}], ids=repr)
def test_past_key_values_of_another_type(cache):
    model = decoder()
    name = type(cache).__name__
    with pytest.raises(TypeError, match=f"past_key_values must be a fastconv.reference.Cache, got {name}"):
        model(**prompts(model), past_key_values=cache)


def test_cache_where_there_can_be_none():
    model = decoder()
    inputs = prompts(model)
    with pytest.raises(ValueError, match="past_key_values needs use_cache True, got False"):
        model(**inputs, use_cache=False, past_key_values=reference.Cache())
    model.config.is_decoder = False
    with pytest.raises(ValueError, match="past_key_values needs a config with is_decoder True, got False"):
        model(**inputs, past_key_values=reference.Cache())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_cached_sequence_longer_than_the_model(name, kind):
    model = decoder(name, kind, max_position_embeddings=9)
    inputs = prompts(model)
    cache = filled_cache(model, inputs, 9)
    more = {key: value[:, :1] for key, value in inputs.items()} | {"attention_mask": torch.ones(BATCH, 10).long()}
    with pytest.raises(ValueError, match=r"at most max_position_embeddings 9, got 9 cached \+ 1; truncate the input"):
        model(**more, past_key_values=cache)
    assert cache.get_seq_length() == 9


@pytest.mark.parametrize("layers", [1, 2])
def test_a_length_that_can_not_be_chunked_leaves_the_cache_as_it_was(layers):
    model = decoder(num_hidden_layers=layers, chunk_size_feed_forward=3)
    inputs = prompts(model, padding=False)
    cache = filled_cache(model, inputs, 3)
    with pytest.raises(ValueError, match="divisible by chunk_size_feed_forward 3, got 2"):
        model(**cut(inputs, 3, 5), past_key_values=cache)
    logits = model(**cut(inputs, 3, 9), past_key_values=cache).logits
    torch.testing.assert_close(logits, model(**inputs).logits[:, 3:], **EXACT)


def test_mask_that_leaves_the_cached_tokens_out():
    model = decoder()
    inputs = prompts(model)
    cache = filled_cache(model, inputs)
    rest = cut(inputs, 5, 9) | {"attention_mask": inputs["attention_mask"][:, 5:]}
    with pytest.raises(ValueError, match=r"attention_mask must have shape \(B, S\) = \(3, 9\).*got \(3, 4\)"):
        model(**rest, past_key_values=cache)
    assert cache.get_seq_length() == 5


def test_encoder_states_that_do_not_fit_the_cache():
    model = decoder(cross=True)
    inputs = all_inputs(model)
    cache = filled_cache(model, inputs)
    rest = cut(inputs, 5, 9)
    shorter = rest | {name: value[:, :4] for name, value in rest.items() if name.startswith("encoder_")}
    missing = {name: value for name, value in rest.items() if not name.startswith("encoder_")}
    for part, length in ((shorter, "4"), (missing, "None")):
        with pytest.raises(ValueError, match=f"encoder_hidden_states of length 5, but now their length is {length}"):
            model(**part, past_key_values=cache)
    without = filled_cache(model, prompts(model))
    with pytest.raises(ValueError, match="encoder_hidden_states of length None, but now their length is 5"):
        model(**rest, past_key_values=without)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"encoder_hidden_states": None}, ValueError, "encoder_attention_mask needs encoder_hidden_states, got None"),
        ({"encoder_hidden_states": torch.zeros(2, 5, 16)}, ValueError, r"= \(3, 'S', 16\), got \(2, 5, 16\)"),
        ({"encoder_hidden_states": torch.zeros(3, 5, 8)}, ValueError, r"= \(3, 'S', 16\), got \(3, 5, 8\)"),
        ({"encoder_hidden_states": torch.zeros(3, 0, 16)}, ValueError, r"= \(3, 'S', 16\), got \(3, 0, 16\)"),
        ({"encoder_hidden_states": torch.zeros(3, 5, 16).long()}, TypeError, "must be a floating-point tensor"),
        (
            {"encoder_attention_mask": torch.ones(3, 9)},
            ValueError,
            r"encoder_attention_mask must have shape .*\(3, 5\)",
        ),
        (
            {"encoder_attention_mask": torch.full((3, 5), 2)},
            ValueError,
            "encoder_attention_mask must have values 1 and 0",
        ),
    ],
)
def test_bad_encoder_inputs(change, error, message):
    model = decoder(cross=True)
    inputs = all_inputs(model) | change
    for name in inputs:
        if inputs[name] is not None and inputs[name].is_floating_point():
            inputs[name] = inputs[name].double()
    with pytest.raises(error, match=message):
        model(**inputs)


def test_encoder_states_for_a_model_without_cross_attention():
    model = decoder()
    with pytest.raises(ValueError, match="need a config with is_decoder and add_cross_attention True"):
        model(**prompts(model), encoder_hidden_states=torch.zeros(BATCH, 5, 16).double())
