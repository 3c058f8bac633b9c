"""Attention of accelerated models: every mask, decoders, caches, relative positions; it equals the original's.

`forbidden` shows that the fused forward ran, `kernel_calls` that it ran by kernels.
"""

from __future__ import annotations

import copy
import sys
from unittest import mock

import pytest
import swap_models
import torch
from decoders import KINDS, cut, decoder, encoder_inputs, positions, prompts, step_by_step
from swap_models import (
    assert_close,
    assert_same,
    assert_same_inference,
    attention_of,
    both,
    build,
    forbidden,
    fused_classes,
    infer,
    is_4,
    layer_of,
    library,
    make_inputs,
    pair,
    train,
)
from tolerance import assert_2x

import fastconv
from fastconv import reference

EXACT = {"rtol": 0.0, "atol": 1e-10}
DECODERS = ("BertLMHeadModel", "RoCBertForCausalLM")


def attentions(source: str, family: str) -> list[type]:
    """The classes of attention modules."""
    return [cls for cls in fused_classes(source, family) if cls.__name__.endswith("Attention")]


def spied(name: str):
    """A context that counts the calls of a function of the op's module."""
    module = sys.modules["fastconv.ops.masked_attention"]
    return mock.patch.object(module, name, side_effect=getattr(module, name))


def encoded(source: str, rows: int = 3, length: int = 4, size: int = 16) -> dict[str, torch.Tensor]:
    """The states of an encoder and their mask, with padding."""
    generator = torch.Generator().manual_seed(4)
    keep = torch.arange(length) < torch.tensor([[length], [1], [2]][:rows])
    return {
        "encoder_hidden_states": torch.randn(rows, length, size, generator=generator),
        "encoder_attention_mask": keep.long(),
    }


def is_float(value) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


# Every model and head


def test_every_model_without_its_own_attention():
    """In fp64, forward and gradients, in eval and in training mode: as the reference, and without its attention."""
    model_cases = pytest.importorskip("model_cases", reason="the cases are drawn by hypothesis")
    from model_runs import assert_equal, largest, run, walk

    seen: set[str] = set()

    def check(case: model_cases.Case) -> None:
        family = model_cases.family_of(case.name)
        off = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"), 0.0)
        off |= {key: 0.0 for key in case.config if key.startswith("summary_") and key.endswith("_dropout")}
        config = getattr(reference, family + "Config")(**case.config | off | {"output_attentions": False})
        model = getattr(reference, case.name)(config, **case.arguments).double().train(case.train)
        swap_models.randomize(model)
        if case.checkpointing:
            model.gradient_checkpointing_enable()
        inputs = {key: value for key, value in case.inputs.items() if key != "output_attentions"}
        _, *expected = run(model, inputs, case.cached)
        fastconv.accelerate(model, backend="native")
        with forbidden(attentions("reference", family)):
            _, *actual = run(model, inputs, case.cached)
        assert_equal(actual[0], expected[0])
        assert_equal(actual[1], expected[1], largest(expected[1]))
        seen.update(name for name in ("head_mask", "encoder_hidden_states") if name in inputs)
        seen.update(["cache"] if case.cached else [], [config.to_dict().get("position_embedding_type", "absolute")])

    for name in model_cases.NAMES:
        walk(model_cases.cases(name, None), check, examples=8)
    assert seen == {"head_mask", "encoder_hidden_states", "cache", *KINDS}


# By the kernels

CALLS = {
    "encoder": ("BertModel", {}, {}),
    "no mask": ("BertModel", {}, {"attention_mask": None}),
    "square mask": ("RoCBertModel", {}, {"attention_mask": torch.ones(3, 9, 9).tril(1)}),
    "row without a token": ("BertModel", {}, make_inputs("empty row")),
    "head_mask": ("RoCBertModel", {}, {"head_mask": torch.tensor([1.0, 0.0, 0.5, 1.0])}),
    "relative_key": ("BertModel", {"position_embedding_type": "relative_key"}, {}),
    "relative_key_query": ("RoCBertModel", {"position_embedding_type": "relative_key_query"}, {}),
    "decoder": ("BertLMHeadModel", {"is_decoder": True}, {}),
    "cross": ("RoCBertForCausalLM", {"is_decoder": True, "add_cross_attention": True}, encoded("reference")),
    "ConvBERT": ("ConvBertModel", {}, {}),
    "ConvBERT decoder": ("ConvBertModel", {"is_decoder": True}, {"head_mask": torch.tensor([1.0, 0.5])}),
    "ConvBERT cross": ("ConvBertModel", {"is_decoder": True, "add_cross_attention": True}, encoded("reference")),
}


def _by_modules(fast: torch.nn.Module) -> None:
    """In training the layer is one function, without the attention's op, unless somebody looks into it."""
    layer_of(fast).intermediate.register_forward_hook(lambda module, args, output: None)


@pytest.mark.parametrize("call", CALLS)
def test_by_the_kernels(call, device):
    pytest.importorskip("triton", reason="runs the kernels, and the package triton is not installed")
    name, config, extra = CALLS[call]
    model = build("reference", name, num_hidden_layers=1, **config).to(device)
    inputs = {key: None if value is None else value.to(device) for key, value in (make_inputs() | extra).items()}
    if config.get("is_decoder") and not name.startswith("Conv"):
        inputs["use_cache"] = False
    exact = {
        k: t.double() if t is not None and t is not False and t.is_floating_point() else t for k, t in inputs.items()
    }
    truth, plain = train(copy.deepcopy(model).double(), exact), train(model, inputs)
    fast = fastconv.accelerate(copy.deepcopy(model), backend="triton")
    _by_modules(fast)
    modules = 2 if "add_cross_attention" in config else 1
    classes = attentions("reference", "ConvBert" if name.startswith("Conv") else "Bert")
    with forbidden(classes), spied("_by_kernels") as kernel_calls:
        outputs = infer(fast, inputs)
        assert kernel_calls.call_count == modules
        trained = train(fast, inputs)
        assert kernel_calls.call_count == 2 * modules
    rounding = 16 * torch.finfo(torch.float32).eps  # of tens of intermediate results, in other places
    largest = max(gradient.abs().max().item() for gradient in truth[1].values())
    for key, value in truth[0].items():
        for found in (outputs, trained[0]):
            assert_2x(key, found[key], plain[0][key], value, rounding=rounding)
    assert trained[1].keys() == truth[1].keys()
    for key, value in truth[1].items():  # sums that nearly cancel have the roundings of the largest
        scale = value.abs().max().item()
        if scale < rounding * largest:  # such as those of the keys' bias, which no probability depends on
            assert trained[1][key].abs().max() <= rounding * largest, key
        else:
            assert_2x(key, trained[1][key], plain[1][key], value, rounding=rounding * max(1.0, largest / scale))


def test_convbert_writes_both_halves_into_one_tensor(backend):
    original, fast = pair("reference", "ConvBert", num_hidden_layers=1)
    _by_modules(fast)
    module = sys.modules["fastconv.nn.mixed_attention"]
    for context, shared in ((torch.no_grad, backend == "triton"), (torch.enable_grad, False)):
        with context(), mock.patch.object(module, "attend", side_effect=module.attend) as attend:
            assert_close(infer(fast) if context is torch.no_grad else train(fast)[0], infer(original))
        assert (attend.call_args.kwargs.get("out") is not None) == shared


@pytest.mark.parametrize("family", ["Bert", "ConvBert"])
def test_dropout_by_the_kernels(family):
    pytest.importorskip("triton", reason="runs the kernels, and the package triton is not installed")
    _, fast = pair("reference", family, attention_probs_dropout_prob=0.5, num_hidden_layers=1)
    kept = infer(fast, {"input_ids": make_inputs()["input_ids"][:1, :5]})
    _by_modules(fastconv.accelerate(fast, backend="triton").train())
    inputs, runs = {"input_ids": make_inputs()["input_ids"][:1, :5]}, []
    for seed in (1, 1):
        torch.manual_seed(seed)
        with spied("_by_kernels") as kernel_calls:
            runs.append(train(fast, inputs))
        assert kernel_calls.call_count == 1
    assert_close(runs[0][0], runs[1][0], 0.0)
    assert_close(runs[0][1], runs[1][1], 0.0)
    for other in (infer(fast, inputs), kept):
        assert (runs[0][0]["last_hidden_state.0"] - other["last_hidden_state.0"]).abs().max() > 1e-2


# Probabilities


@pytest.mark.parametrize("source", swap_models.SOURCES)
@pytest.mark.parametrize("family", swap_models.FAMILIES)
def test_probabilities_are_those_of_the_original(source, family):
    """After dropout and head_mask, from one seed; calls that don't ask for them are fused."""
    original, fast = pair(source, family, attention_probs_dropout_prob=0.3)
    inputs = make_inputs()
    if swap_models.takes(original, "head_mask"):
        inputs["head_mask"] = torch.tensor([0.0, 0.7] if family == "ConvBert" else [1.0, 0.0, 0.7, 1.0])
    found = []
    for model in (original, fast):
        torch.manual_seed(3)
        found.append(infer(model.train(), inputs, output_attentions=True))
    assert_close(found[1], found[0])
    assert (found[0]["attentions.0"] == 0).any()
    with forbidden(attentions(source, family)), pytest.raises(AssertionError, match="the original forward of"):
        infer(fast, inputs, output_attentions=True)
    with forbidden(attentions(source, family)):
        infer(fast, inputs)


# Decoding


@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", DECODERS)
def test_token_by_token(name, kind, cross):
    """A cache that the accelerated decoder fills: token by token, and in parts, as the reference's full forward."""
    model = decoder(name, kind, cross)
    inputs = prompts(model) | encoder_inputs(model)
    inputs["position_ids"] = positions(inputs)
    real = inputs["attention_mask"].bool()
    expected = model(**inputs, use_cache=False).logits
    fast = fastconv.accelerate(copy.deepcopy(model), backend="native")
    with forbidden(attentions("reference", "Bert")), torch.no_grad():
        for lengths in ((1,) * 9, (4, 1, 1, 3)):
            logits = torch.cat([step.logits for step in step_by_step(fast, inputs, lengths)], dim=1)
            torch.testing.assert_close(logits[real], expected[real], **EXACT)
    # A cache of either continues that of the other.
    cache = model(**cut(inputs, 0, 5), use_cache=True).past_key_values
    rest = fast(**cut(inputs, 5, 9), past_key_values=cache).logits
    torch.testing.assert_close(rest[real[:, 5:]], expected[:, 5:][real[:, 5:]], **EXACT)
    cache = fast(**cut(inputs, 0, 5), use_cache=True).past_key_values
    rest = model(**cut(inputs, 5, 9), past_key_values=cache).logits
    torch.testing.assert_close(rest[real[:, 5:]], expected[:, 5:][real[:, 5:]], **EXACT)


@pytest.mark.parametrize("kind", KINDS)
def test_token_by_token_by_the_kernels(kind):
    pytest.importorskip("triton", reason="runs the kernels, and the package triton is not installed")
    model = decoder(kind=kind, cross=True, num_hidden_layers=1)
    inputs = prompts(model, length=6) | encoder_inputs(model)
    real = inputs["attention_mask"].bool()
    expected = model(**inputs, use_cache=False).logits
    fast = fastconv.accelerate(copy.deepcopy(model), backend="triton")
    with torch.no_grad(), spied("_by_kernels") as kernel_calls:
        logits = torch.cat([step.logits for step in step_by_step(fast, inputs, (3, 1, 1, 1))], dim=1)
    assert kernel_calls.call_count == 8
    torch.testing.assert_close(logits[real], expected[real], **EXACT)


@pytest.mark.parametrize("name", DECODERS)
def test_the_encoders_keys_are_computed_once(name):
    fast = fastconv.accelerate(decoder(name, cross=True))
    inputs = prompts(fast) | encoder_inputs(fast)
    module = sys.modules["fastconv.nn.attention"]
    with torch.no_grad(), mock.patch.object(module, "packed_linear", side_effect=module.packed_linear) as products:
        cache = fast(**cut(inputs, 0, 5)).past_key_values
        assert [len(call.args[1]) for call in products.call_args_list] == [3, 2, 3, 2]
        products.reset_mock()
        fast(**cut(inputs, 5, 6), past_key_values=cache)
        assert [len(call.args[1]) for call in products.call_args_list] == [3, 3]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", DECODERS)
def test_generated_tokens(name, kind):
    model = decoder(name, kind, cross=True)
    inputs = prompts(model) | encoder_inputs(model)
    for stream in ("shape", "pronunciation"):  # which new tokens would need too
        inputs.pop(f"input_{stream}_ids", None)
    fast = fastconv.accelerate(copy.deepcopy(model))
    expected = model.generate(**inputs, max_new_tokens=8)
    with fastconv.backend("native"), forbidden(attentions("reference", "Bert")):
        for use_cache in (True, False):
            assert torch.equal(fast.generate(**inputs, max_new_tokens=8, use_cache=use_cache), expected)


# transformers


def theirs(name: str, implementation: str, **config) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A decoder of transformers in fp64, or fp32 where 4.57 has no masks with sdpa; and an accelerated copy."""
    library("transformers")
    if name.startswith("RoC") and implementation == "sdpa" and is_4():
        pytest.skip("transformers 4.57 has no sdpa for RoCBert")
    config = {"is_decoder": True, "max_position_embeddings": 32, "tie_word_embeddings": False} | config
    model = build("transformers", name, attn_implementation=implementation, **config)
    with torch.no_grad():  # no token is likely by itself, and what came before matters
        weight = model.get_output_embeddings().weight
        weight.div_(weight.norm(dim=1, keepdim=True) / 4)
        model.get_output_embeddings().bias.zero_()
        model.base_model.embeddings.position_embeddings.weight.mul_(2)
        for layer in model.base_model.encoder.layer:
            layer.attention.self.query.weight.mul_(3)
    return both(model if is_4() and implementation == "sdpa" else model.double(), backend="native")


def family_of(name: str) -> str:
    return name.split("For")[0].removesuffix("LMHeadModel")


def encoded_for(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What cross-attention takes, in the model's dtype."""
    inputs = encoded("transformers")
    return inputs | {"encoder_hidden_states": inputs["encoder_hidden_states"].to(model.dtype)}


def near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for roundings of their dtype."""
    tolerance = 1e-10 if expected.dtype == torch.float64 else 1e-4
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=tolerance)


@pytest.mark.parametrize("options", [{"use_cache": True}, {"use_cache": False}, {"num_beams": 2}], ids=str)
@pytest.mark.parametrize("padding", [False, True], ids=["full", "left padding"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", DECODERS)
def test_generate_of_transformers(name, implementation, padding, options):
    original, fast = theirs(name, implementation)
    inputs = make_inputs("left" if padding else None)
    options = options | {"max_new_tokens": 8, "pad_token_id": 0}
    expected = original.generate(**inputs, **options)
    with forbidden(attentions("transformers", family_of(name))):
        assert torch.equal(fast.generate(**inputs, **options), expected)
    assert len(expected[:, 9:].unique()) > 1


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", DECODERS)
def test_token_by_token_of_transformers(name, implementation):
    """With cross-attention, in training mode too, and in the layout that the original continues."""
    original, fast = theirs(name, implementation, add_cross_attention=True)
    ids = make_inputs()["input_ids"]
    extra = encoded_for(original)
    with torch.no_grad():
        expected = original(input_ids=ids, **extra, use_cache=False).logits
    classes = attentions("transformers", family_of(name))
    caches = library("transformers").cache_utils
    for context in (torch.no_grad, torch.enable_grad):
        cache = caches.EncoderDecoderCache(caches.DynamicCache(), caches.DynamicCache())
        with context(), forbidden(classes):
            for start, end in ((0, 4), (4, 5), (5, 6)):
                step = fast(input_ids=ids[:, start:end], past_key_values=cache, use_cache=True, **extra)
                assert step.past_key_values.get_seq_length() == end
                near(step.logits, expected[:, start:end])
        with context():
            for model, start, end in ((original, 6, 7), (fast, 7, 9)):
                step = model(input_ids=ids[:, start:end], past_key_values=step.past_key_values, use_cache=True, **extra)
                near(step.logits, expected[:, start:end])


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_cache_of_fixed_size(implementation):
    """Its keys past the last token are there, and hidden."""
    if is_4() and implementation == "eager":
        pytest.skip("transformers 4.57's eager masks don't fit it")
    original, fast = theirs("BertLMHeadModel", implementation)
    ids = make_inputs()["input_ids"]
    steps: dict[torch.nn.Module, list[torch.Tensor]] = {original: [], fast: []}
    for model, found in steps.items():
        with torch.no_grad():
            cache = library("transformers").cache_utils.StaticCache(config=model.config, max_cache_len=12)
            for start, end in ((0, 4), (4, 5), (5, 6)):
                where = {"cache_position": torch.arange(start, end)} if is_4() else {}
                found.append(model(input_ids=ids[:, start:end], past_key_values=cache, use_cache=True, **where).logits)
    near(torch.cat(steps[fast], 1), torch.cat(steps[original], 1))


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("name", DECODERS)
def test_relative_positions_with_a_cache_of_transformers(name, kind):
    """4.57 takes every query of a cached call for the last one, right for one query; both are the original's."""
    library("transformers")
    if not is_4():
        pytest.skip("transformers 5.x has no relative positions")
    original, fast = theirs(name, "eager", position_embedding_type=kind)
    ids = make_inputs()["input_ids"]
    classes = attentions("transformers", family_of(name))
    with torch.no_grad():
        whole = original(input_ids=ids, use_cache=False).logits
        found = []
        for model in (original, fast):
            first = model(input_ids=ids[:, :6], use_cache=True)
            with forbidden([] if model is original else classes):
                last = model(input_ids=ids[:, 6:7], past_key_values=first.past_key_values, use_cache=True)
            found.append((first.logits, last.logits))
        with forbidden(classes):
            near(fast(input_ids=ids, use_cache=False).logits, whole)
    for got, expected in zip(found[1], found[0], strict=True):
        near(got, expected)
    assert (found[0][0] - whole[:, :6]).abs().max() > 1e-3


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("mask", [None, "right", "left", "empty row"])
def test_by_the_kernels_of_transformers(mask, implementation):
    """As eager attention: scaled_dot_product_attention makes rows without a key 0, the kernels make them uniform."""
    pytest.importorskip("triton", reason="runs the kernels, and the package triton is not installed")
    original, _ = pair("transformers", "Bert", num_hidden_layers=1)
    _, fast = pair("transformers", "Bert", attn_implementation=implementation, num_hidden_layers=1)
    _by_modules(fastconv.accelerate(fast, backend="triton"))
    with forbidden(attentions("transformers", "Bert")), spied("_by_kernels") as kernel_calls:
        outputs, trained = infer(fast, make_inputs(mask)), train(fast, make_inputs(mask))
    assert kernel_calls.call_count == 2
    assert_close(outputs, infer(original, make_inputs(mask)))
    expected = train(original, make_inputs(mask))
    assert_close(trained[0], expected[0])
    assert_close(trained[1], expected[1], floor=max(g.abs().max().item() for g in expected[1].values()))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_decoder_by_the_kernels_of_transformers(implementation):
    pytest.importorskip("triton", reason="runs the kernels, and the package triton is not installed")
    original, _ = theirs("BertLMHeadModel", "eager", add_cross_attention=True, num_hidden_layers=1)
    _, fast = theirs("BertLMHeadModel", implementation, add_cross_attention=True, num_hidden_layers=1)
    original = original.to(fast.dtype)
    extra = encoded_for(original)
    fastconv.accelerate(fast, backend="triton")
    for mask in (None, "left"):
        inputs = make_inputs(mask) | extra
        with spied("_by_kernels") as kernel_calls:
            assert_close(infer(fast, inputs, use_cache=False), infer(original, inputs, use_cache=False))
        assert kernel_calls.call_count == 2


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", KINDS)
def test_head_masks_and_positions_with_sdpa(implementation, kind):
    """transformers 4's sdpa leaves them to its eager attention."""
    library("transformers")
    if not is_4():
        pytest.skip("transformers 5.x has neither")
    original, fast = pair("transformers", "Bert", attn_implementation=implementation, position_embedding_type=kind)
    head_mask = torch.tensor([1.0, 0.0, 0.5, 1.0])
    with forbidden(attentions("transformers", "Bert")), fastconv.backend("native"):
        infer(fast, head_mask=head_mask)
    with fastconv.backend("native"):
        for inputs in (make_inputs(), make_inputs(None)):
            assert_same(original, fast, inputs, head_mask=head_mask)
            assert_same(original, fast, inputs)


# What is left to the original


def test_calls_that_only_the_original_can_do():
    """Masks that eager attention would add, other modules' positions, broadcast encoders, wrong calls."""
    library("transformers")
    config = {"is_decoder": True, "add_cross_attention": True, "num_hidden_layers": 1}
    original, fast = theirs("BertLMHeadModel", "eager", **config)
    first, second = attention_of(original), attention_of(fast)
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    keep = torch.rand(2, 1, 5, 5) < 0.5
    near(second(x, keep)[0], first(x, keep)[0])
    with pytest.raises(TypeError, match="attention_mask"):
        second(x, keep.double(), attention_mask=keep.double())
    with pytest.raises(TypeError):
        second(x, *[None] * 9)
    if is_4():
        return
    first, second = (model.base_model.encoder.layer[0].crossattention.self for model in (original, fast))
    states = torch.randn(1, 3, 16, dtype=torch.float64)
    near(second(x, states)[0], first(x, states)[0])
    # Arguments that the self-attention of transformers 5 doesn't look at.
    first, second = attention_of(original), attention_of(fast)
    options = {"encoder_hidden_states": torch.randn(2, 3, 16), "head_mask": torch.zeros(4)}
    near(second(x, **options)[0], first(x, **options)[0])


def test_cross_attention_with_a_cache_for_one_kind_of_attention():
    """transformers 4 puts the encoder's keys beside the tokens'; transformers 5 wants a cache for both."""
    original, fast = theirs("BertLMHeadModel", "eager", add_cross_attention=True, num_hidden_layers=1)
    x, states = torch.randn(2, 5, 16, dtype=torch.float64), torch.randn(2, 3, 16, dtype=torch.float64)
    found = []
    for model in (original, fast):
        module, cache = model.base_model.encoder.layer[0].crossattention.self, library("transformers").DynamicCache()
        options = {"encoder_hidden_states": states, "past_key_values": cache}
        if not is_4():
            with pytest.raises(AttributeError, match="is_updated"):
                module(x, **options)
            continue
        found.append(torch.cat([module(x, **options)[0] for _ in range(2)]))
        assert cache.get_seq_length() == 6
    if is_4():
        near(*found)


def test_cross_attention_of_transformers_convbert():
    library("transformers")
    original, fast = (attention_of(model) for model in pair("transformers", "ConvBert"))
    x, states = torch.randn(2, 5, 16), torch.randn(2, 5, 16)
    mask = torch.zeros(2, 1, 1, 5)
    mask[0, ..., 3:] = torch.finfo(torch.float32).min
    options = {"encoder_hidden_states": states, "attention_mask": mask}
    if is_4():
        options["head_mask"] = torch.tensor([0.5, 1.0])[:, None, None]
    with fastconv.backend("native"):
        expected = original(x, **options)[0]
        with forbidden(attentions("transformers", "ConvBert")):
            torch.testing.assert_close(fast(x, **options)[0], expected, rtol=1e-4, atol=1e-5)


def test_is_causal_false_counts():
    library("transformers")
    if is_4():
        pytest.skip("transformers 4.57 passes no further arguments on")
    original, fast = theirs("BertLMHeadModel", "sdpa")
    first, second = attention_of(original), attention_of(fast)
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    for options in ({}, {"is_causal": False}, {"is_causal": True}):
        near(second(x, **options)[0], first(x, **options)[0])
    assert (first(x)[0] - first(x, is_causal=False)[0]).abs().max() > 1e-3


def test_a_hook_on_the_table_of_positions_counts():
    """transformers 4 calls the table; ours looks at its weight."""
    library("transformers")
    if not is_4():
        pytest.skip("transformers 5.x has no relative positions")
    original, fast = pair("transformers", "Bert", position_embedding_type="relative_key")
    for model in (original, fast):
        attention_of(model).distance_embedding.register_forward_hook(lambda module, args, output: 2 * output)
    with fastconv.backend("native"):
        assert_same_inference(original, fast)


# Packed weights


@pytest.mark.parametrize("name", ["BertModel", "ConvBertModel"])
def test_packed_weights_of_cross_attention(name):
    config = {"is_decoder": True, "add_cross_attention": True}
    original, fast = both(build("reference", name, **config), backend="native")
    inputs = make_inputs() | encoded("reference")
    expected = infer(original, inputs)
    assert_close(infer(fast, inputs), expected)
    cross = fast.encoder.layer[0].crossattention.self
    assert cross.value.weight.data_ptr() == cross.key.weight.data_ptr() + 4 * cross.key.weight.numel()
    for model in (original, fast):
        with torch.no_grad():
            model.encoder.layer[0].crossattention.self.value.weight.mul_(-1.0)
    assert_same(original, fast, inputs)
    assert_close(infer(copy.deepcopy(fast), inputs), infer(original, inputs))
    fastconv.restore(fast)
    places = {p.untyped_storage().data_ptr() for p in fast.parameters()}
    assert len(places) == len(list(fast.parameters()))
    assert cross.value.weight.data_ptr() != cross.key.weight.data_ptr() + 4 * cross.key.weight.numel()


@pytest.mark.parametrize("family", ["Bert", "ConvBert"])
def test_one_module_for_self_and_cross_attention(family):
    """Its weights can be packed for one of both only; the results are right in any order."""
    original, fast = (attention_of(model) for model in pair("reference", family))
    x, states = torch.randn(2, 5, 16), torch.randn(2, 3, 16)
    with torch.no_grad(), fastconv.backend("native"):
        for given in (None, states, None, states):
            for _ in range(2):
                torch.testing.assert_close(
                    fast(x, encoder_hidden_states=given)[0],
                    original(x, encoder_hidden_states=given)[0],
                    rtol=1e-4,
                    atol=1e-5,
                )
            with torch.no_grad():
                for module in (original, fast):
                    module.key.weight.mul_(1.5)


# The module


def test_module():
    module = fastconv.nn.MaskedAttention(causal=True, dropout_p=0.5, scale=0.3)
    assert not list(module.parameters())
    assert repr(module) == "MaskedAttention(causal=True, dropout_p=0.5, scale=0.3)"
    q, k, v = torch.randn(3, 2, 5, 3, 4)
    lengths = torch.tensor([5, 2])
    options = {"lengths": lengths, "head_mask": torch.tensor([1.0, 0.0, 0.5])[:, None, None]}
    with fastconv.backend("native"):
        expected = reference.ops.masked_attention(q, k, v, causal=True, scale=0.3, **options)
        torch.testing.assert_close(module.eval()(q, k, v, **options), expected)
        torch.manual_seed(1)
        dropped = module.train()(q, k, v, **options)
        torch.manual_seed(1)
        expected = fastconv.ops.masked_attention(q, k, v, causal=True, scale=0.3, dropout_p=0.5, **options)
        torch.testing.assert_close(dropped, expected)
    with pytest.raises(ValueError, match=r"dropout_p must be at least 0 and less than 1, got 1.0"):
        fastconv.nn.MaskedAttention(dropout_p=1.0)
