"""Accelerated models called in every way: masks, attentions, hooks, adapters, decoders; each time as the original."""

from __future__ import annotations

import pytest
import torch
from swap_models import (
    MODELS,
    assert_close,
    assert_same,
    assert_same_inference,
    assert_same_training,
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
    takes,
)
from torch import nn
from torch.nn.modules import module as torch_module

import fastconv

models = pytest.mark.parametrize(("source", "family"), MODELS)
LOWEST = torch.finfo(torch.float32).min


@pytest.fixture(autouse=True)
def _native():
    with fastconv.backend("native"):
        yield


# Masks


def mask_of(kind):
    """Attention masks of queries and keys in each shape that a model takes."""
    keep = torch.rand(3, 9, 9, generator=torch.Generator().manual_seed(3)) < 0.6
    keep[:, :, 0] = True
    if "empty" in kind:
        keep[1, 4] = False
    if kind.startswith("3-D"):
        return keep.long()
    additive = torch.zeros(keep.shape).masked_fill(~keep, LOWEST)[:, None]
    return additive[:, :, :1].expand(3, 1, 9, 9) if kind.startswith("expanded") else additive


@models
@pytest.mark.parametrize("mask", [None, "right", "left", "empty row"])
def test_padding_masks(source, family, mask):
    assert_same(*pair(source, family), make_inputs(mask))


@models
@pytest.mark.parametrize("kind", ["4-D", "4-D with an empty query", "expanded 4-D", "3-D", "3-D with an empty query"])
def test_masks_of_queries_and_keys(source, family, kind):
    if source == "transformers" and is_4() != kind.startswith("3-D"):
        pytest.skip("transformers 5.x takes no 3-D mask, and 4.57 no 4-D one")
    assert_same(*pair(source, family), make_inputs(None) | {"attention_mask": mask_of(kind)})


@pytest.mark.parametrize("mask", [None, "right", "left", "empty row"])
@pytest.mark.parametrize("family", ["Bert", "RoCBert"])
def test_masks_with_sdpa(family, mask):
    library("transformers")
    if family == "RoCBert" and is_4():
        pytest.skip("transformers 4.57 has no sdpa for RoCBert")
    original, fast = pair("transformers", family, attn_implementation="sdpa")
    inputs = make_inputs(mask)
    with forbidden(fused_classes("transformers", family)):
        infer(fast, inputs)
    assert_same_inference(original, fast, inputs)
    if mask == "empty row" and is_4():
        # SDPA's gradient of a row without a key is too large by the number of keys: eager's is right.
        original = pair("transformers", "Bert")[0]
    assert_same_training(original, fast, inputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("family", "implementation"), [("Bert", "eager"), ("Bert", "sdpa"), ("ConvBert", "eager")])
def test_rows_without_a_key_in_half_precision(family, implementation, dtype):
    original, fast = pair("transformers", family, attn_implementation=implementation)
    inputs = make_inputs("empty row")
    truth = infer(original, inputs)
    for key, value in infer(fast.to(dtype), inputs).items():
        assert value.isfinite().all()
        assert (value.float() - truth[key]).abs().max() < 0.1 * truth[key].abs().max()


@models
def test_minus_infinity_in_a_mask_gives_no_nan(source, family):
    attention = attention_of(pair(source, family)[1])
    mask = mask_of("4-D with an empty query")
    mask = mask.masked_fill(mask == LOWEST, -torch.inf)
    x = torch.randn(3, 9, 16, requires_grad=True)
    y = attention(x, mask)[0]
    y.sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["Bert", "RoCBert", "ConvBert"])
@pytest.mark.parametrize("number", [-torch.inf, LOWEST], ids=["-inf", "lowest"])
def test_additive_masks_that_are_infinite_in_the_models_dtype(family, dtype, number):
    """A row without a key is the average of the values, in the accelerated model too."""
    original, fast = (model.to(dtype) for model in pair("reference", family))
    mask = mask_of("4-D with an empty query")
    inputs = {"input_ids": make_inputs()["input_ids"], "attention_mask": mask.masked_fill(mask == LOWEST, number)}
    truth = infer(original.float(), inputs | {"attention_mask": (mask == 0)})
    for key, value in infer(fast, inputs).items():
        tolerance = {torch.float32: 1e-5, torch.float16: 0.02, torch.bfloat16: 0.1}[dtype]
        assert (value.float() - truth[key]).abs().max() < tolerance * truth[key].abs().max()


@pytest.mark.parametrize("family", ["Bert", "ConvBert"])
def test_bool_masks_of_own_modules(family):
    """A row without a key is the average of the values, which scaled_dot_product_attention makes 0."""
    original, fast = (attention_of(model) for model in pair("reference", family))
    mask = mask_of("4-D with an empty query") == 0
    x = torch.randn(3, 9, 16)
    for context in (torch.no_grad, torch.enable_grad):
        with context():
            torch.testing.assert_close(fast(x, mask)[0], original(x, mask)[0], rtol=1e-4, atol=1e-5)


@models
def test_one_token(source, family):
    inputs = {"input_ids": torch.tensor([[3], [4]]), "attention_mask": torch.ones(2, 1, dtype=torch.long)}
    assert_same(*pair(source, family), inputs)


@models
def test_empty_batch(source, family):
    fast = pair(source, family)[1]
    ids = torch.zeros(0, 5, dtype=torch.long)
    # The originals of transformers can't reshape nothing to -1.
    assert fast(input_ids=ids)[0].shape == (0, 5, 16)


# Outputs beside the last hidden state


@models
@pytest.mark.parametrize("by", ["argument", "config", "both"])
def test_attentions_and_hidden_states(source, family, by):
    original, fast = pair(source, family)
    asked = {"output_attentions": True, "output_hidden_states": True}
    if by != "argument":
        for model in (original, fast):
            model.config.output_attentions = model.config.output_hidden_states = True
    options = asked if by != "config" else {}
    assert_same(original, fast, **options)
    got = fast(**make_inputs(), **options)
    assert len(got.attentions) == 2 and len(got.hidden_states) == 3
    assert got.attentions[0].shape == (3, 2 if family == "ConvBert" else 4, 9, 9)
    for model in (original, fast):
        model.config.output_attentions = model.config.output_hidden_states = False
    assert_same(original, fast)


@models
@pytest.mark.parametrize("head", ["ForMaskedLM", "ForSequenceClassification"])
def test_attentions_of_a_head(source, family, head):
    original, fast = both(build(source, family + head))
    assert_same(original, fast, output_attentions=True, output_hidden_states=True)
    original.config.output_attentions = fast.config.output_attentions = True
    assert_same(original, fast)


@models
def test_tuples(source, family):
    original, fast = pair(source, family)
    for options in ({}, {"output_attentions": True}, {"output_hidden_states": True}):
        got, expected = (m(**make_inputs(), return_dict=False, **options) for m in (fast, original))
        assert isinstance(got, tuple) and len(got) == len(expected)
        torch.testing.assert_close(got[0], expected[0], rtol=1e-4, atol=1e-4)


@models
@pytest.mark.parametrize("per_layer", [False, True])
def test_head_mask(source, family, per_layer):
    original, fast = pair(source, family)
    if not takes(original, "head_mask"):
        pytest.skip("transformers 5.x has no head_mask")
    heads = 2 if family == "ConvBert" else 4
    head_mask = torch.rand((2, heads) if per_layer else (heads,), generator=torch.Generator().manual_seed(1)).round()
    with forbidden(fused_classes(source, family)):
        infer(fast, head_mask=head_mask)
    assert_same(original, fast, head_mask=head_mask)
    assert_same(original, fast, head_mask=head_mask, output_attentions=True)


@models
def test_embeddings_and_positions(source, family):
    original, fast = pair(source, family)
    embeds = torch.randn(3, 9, 12 if family == "ConvBert" else 16)
    mask = make_inputs()["attention_mask"]
    assert_same(original, fast, {"inputs_embeds": embeds, "attention_mask": mask})
    extra = {"position_ids": torch.arange(9).flip(0)[None], "token_type_ids": (torch.arange(9) > 4).long().repeat(3, 1)}
    with forbidden(fused_classes(source, family)):
        infer(fast, make_inputs() | extra)
    assert_same(original, fast, make_inputs() | extra)


# Hooks


INNER = {
    **dict.fromkeys(("Bert", "RoCBert"), ("query", "value", "dropout")),
    "ConvBert": (
        "query",
        "conv_out_layer",
        "conv_kernel_layer",
        "dropout",
        "key_conv_attn_layer",
        "key_conv_attn_layer.depthwise",
        "key_conv_attn_layer.pointwise",
    ),
}
SWAPPED = (
    "attention.self",
    "attention.output",
    "intermediate",
    "output",
    "output.LayerNorm",
    "attention.output.LayerNorm",
)
OTHERS = (
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
    "output.dropout",
    "attention.output.dropout",
    "",
)
PLACES = [
    (source, family, place)
    for source, family in MODELS
    for place in (*(f"attention.self.{inner}" for inner in INNER[family]), *SWAPPED, *OTHERS)
    # The reference's separable convolution doesn't call its parts.
    if source == "transformers" or not place.endswith(("depthwise", "pointwise"))
]


def not_called(source, family, place):
    """Whether the original has the module but uses only what it says."""
    return source == "transformers" and not is_4() and family != "ConvBert" and place == "attention.self.dropout"


def changed(output):
    """What the hooks here make of an output."""
    return (1.5 * output[0], *output[1:]) if isinstance(output, tuple) else 1.5 * output


def counting_hooks(calls):
    """Hooks of every kind, by the name of their registration: each counts its calls and changes what it gets."""

    def forward(module, args, output):
        calls.append("forward")
        return changed(output)

    def pre(module, args, kwargs):
        calls.append("pre")
        return tuple(1.1 * a if isinstance(a, torch.Tensor) else a for a in args), kwargs

    def backward(module, grad_input, grad_output):
        calls.append("backward")
        return tuple(None if g is None else 0.5 * g for g in grad_input)

    def pre_backward(module, grad_output):
        calls.append("pre_backward")
        return tuple(None if g is None else 0.5 * g for g in grad_output)

    return {
        "register_forward_hook": (forward, {}),
        "register_forward_pre_hook": (pre, {"with_kwargs": True}),
        "register_full_backward_hook": (backward, {}),
        "register_full_backward_pre_hook": (pre_backward, {}),
    }


@pytest.mark.parametrize(("source", "family", "place"), PLACES)
def test_hooks_fire_and_change_results(source, family, place):
    if not_called(source, family, place):
        pytest.skip("that version of transformers calls a function in its place")
    original, fast = pair(source, family, num_hidden_layers=1)
    before = infer(original)
    for name in counting_hooks([]):
        if "backward" in name and place.endswith("pointwise"):
            continue  # the original adds a bias to it in place, which its own hook forbids
        calls, handles = {}, []
        for model in (original, fast):
            calls[model] = []
            hook, options = counting_hooks(calls[model])[name]
            handles.append(getattr(layer_of(model).get_submodule(place), name)(hook, **options))
        assert_same_training(original, fast)
        assert_same_inference(original, fast)
        assert calls[original]
        # Inference ran once in the original, and twice in the other.
        forwards = name.startswith("register_forward")
        assert len(calls[fast]) == (3 * len(calls[original]) // 2 if forwards else len(calls[original]))
        for handle in handles:
            handle.remove()
    assert_close(infer(original), before)
    assert_same(original, fast)


@models
def test_hooks_of_before_accelerate_stay(source, family):
    original = build(source, family + "Model")
    calls = []
    for module in original.modules():
        module.register_forward_hook(
            lambda module, args, output: calls.append(type(module).__name__.removeprefix("Fast"))
        )
    expected = infer(original)
    wanted = sorted(calls)
    calls.clear()
    assert_close(infer(fastconv.accelerate(original)), expected)
    assert sorted(calls) == wanted


@models
def test_global_hooks_see_every_module(source, family):
    original, fast = pair(source, family)
    expected = infer(original)
    seen = []
    handle = torch_module.register_module_forward_hook(lambda module, args, output: seen.append(type(module).__name__))
    try:
        infer(original)
        wanted = sorted(seen)
        seen.clear()
        assert_close(infer(fast), expected)
    finally:
        handle.remove()
    assert sorted(name.removeprefix("Fast") for name in seen) == wanted


@models
def test_a_hook_on_the_attention_gets_the_probabilities(source, family):
    """Who collects attentions by a hook of their own gets what the original hands out."""
    original, fast = pair(source, family)
    collected = {original: [], fast: []}
    for model in (original, fast):
        for layer in (0, 1):
            attention_of(model, layer).register_forward_hook(lambda m, args, out, c=collected[model]: c.append(out))
    assert_same_inference(original, fast)
    for got, expected in zip(collected[fast], collected[original], strict=False):
        assert len(got) == len(expected)
        for a, b in zip(got, expected, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# Adapters and other modules in the places of known ones


class Wrapped(nn.Module):
    """Around a module: doubles what it gives."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return changed(self.inner(*args, **kwargs))


def subclass_of(module):
    """The module with a class of its own, whose forward does more."""

    class Own(type(module)):
        def forward(self, *args, **kwargs):
            return changed(super().forward(*args, **kwargs))

    module.__class__ = Own
    return module


def instance_forward(module):
    """The module with a forward of its own."""
    forward = module.forward
    module.forward = lambda *args, **kwargs: changed(forward(*args, **kwargs))
    return module


@pytest.mark.parametrize("way", [Wrapped, subclass_of, instance_forward], ids=lambda way: way.__name__)
@pytest.mark.parametrize(("source", "family", "place"), [place for place in PLACES if place[2]])
def test_replaced_modules_are_called(source, family, place, way):
    if not_called(source, family, place):
        pytest.skip("that version of transformers calls a function in its place")
    results = []
    for when in ("before", "after"):
        original, fast = pair(source, family, num_hidden_layers=1)
        if when == "before":
            fastconv.restore(fast)
        for model in (original, fast):
            parent, _, name = place.rpartition(".")
            owner = layer_of(model).get_submodule(parent)
            setattr(owner, name, way(getattr(owner, name)))
        if when == "before":
            fastconv.accelerate(fast)
        assert_same(original, fast)
        results.append(infer(fast)["last_hidden_state.0"])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["Bert", "ConvBert"])
@pytest.mark.parametrize(
    "act", [torch.nn.functional.softplus, nn.Softplus(), nn.GELU(approximate="tanh"), nn.Sequential()]
)
def test_activations_that_are_no_name(family, act):
    library("transformers")
    original, fast = both(build("transformers", family + "ForMaskedLM", num_hidden_layers=1))
    for model in (original, fast):
        del layer_of(model).intermediate.intermediate_act_fn
        layer_of(model).intermediate.intermediate_act_fn = act
    assert_same(original, fast)


def test_a_namesake_of_an_activation_is_called():
    library("transformers")
    original, fast = pair("transformers", "Bert", num_hidden_layers=1)
    namesake = type("GELUActivation", (nn.Module,), {"forward": lambda self, x: x.sin()})()
    for model in (original, fast):
        layer_of(model).intermediate.intermediate_act_fn = namesake
    assert_same(original, fast)


# What transformers' models do beside encoding


@pytest.mark.parametrize("name", ["BertLMHeadModel", "RoCBertForCausalLM"])
@pytest.mark.parametrize("implementation", [None, "eager", "sdpa"])
def test_decoder(name, implementation):
    """Causal, with cross-attention, with a cache and token by token."""
    source = "transformers" if implementation else "reference"
    library(source)
    if name.startswith("RoC") and implementation == "sdpa" and is_4():
        pytest.skip("transformers 4.57 has no sdpa for RoCBert")
    chosen = {"attn_implementation": implementation} if implementation else {}
    original, fast = both(build(source, name, is_decoder=True, add_cross_attention=True, **chosen))
    inputs = make_inputs(None)
    encoded = {
        "encoder_hidden_states": torch.randn(3, 4, 16),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 0]] * 3),
    }
    with forbidden(fused_classes(source, name.split("For")[0].removesuffix("LMHeadModel"))), torch.no_grad():
        cache = fast(**inputs, **encoded, use_cache=True)["past_key_values"]
        fast(input_ids=inputs["input_ids"][:, :1], past_key_values=cache, **encoded, use_cache=True)
    logits = [m(**inputs, use_cache=False)["logits"] for m in (fast, original)]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
    assert_same_training(original, fast, inputs | encoded, use_cache=False)
    with torch.no_grad():
        cached = []
        for model in (fast, original):
            first = model(input_ids=inputs["input_ids"][:, :6], **encoded, use_cache=True)
            rest = model(
                input_ids=inputs["input_ids"][:, 6:7],
                past_key_values=first["past_key_values"],
                **encoded,
                use_cache=True,
            )
            cached.append((first["logits"], rest["logits"]))
        whole = original(**inputs, **encoded, use_cache=False)["logits"]
    torch.testing.assert_close(cached[0], cached[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(cached[0][1], whole[:, 6:7], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["relative_key", "relative_key_query"])
@pytest.mark.parametrize(("source", "family"), [model for model in MODELS if model[1] != "ConvBert"])
def test_relative_positions(source, family, kind):
    if source == "transformers" and not is_4():
        pytest.skip("transformers 5.x has no relative positions")
    original, fast = pair(source, family, position_embedding_type=kind)
    with forbidden(fused_classes(source, family)):
        infer(fast)
    assert_same(original, fast)


def test_an_attention_of_somebodys_own_is_called():
    transformers = library("transformers")
    if is_4():
        pytest.skip("transformers 4.57's BERT takes no attention function")
    calls = []

    def backwards(module, query, key, value, attention_mask, **kwargs):
        calls.append(1)
        return value.flip(2).transpose(1, 2).contiguous(), None

    transformers.AttentionInterface.register("backwards", backwards)
    transformers.AttentionMaskInterface.register("backwards", transformers.masking_utils.sdpa_mask)
    original, fast = pair("transformers", "Bert", attn_implementation="backwards")
    assert_same(original, fast)
    calls.clear()
    infer(fast)
    assert len(calls) == 2
    for model in (original, fast):
        model.set_attn_implementation("eager")
    assert_same(original, fast)


def test_arguments_that_an_attention_function_looks_at():
    library("transformers")
    if is_4():
        pytest.skip("transformers 4.57 passes no further arguments on")
    original, fast = pair("transformers", "Bert", attn_implementation="sdpa")
    plain = infer(original, make_inputs(None))["last_hidden_state.0"]
    causal = infer(original, make_inputs(None), is_causal=True)["last_hidden_state.0"]
    assert (plain - causal).abs().max() > 1e-2
    assert_same(original, fast, make_inputs(None), is_causal=True)


@pytest.mark.parametrize("size", [0, 1, 3])
@models
def test_chunked_feed_forward(source, family, size):
    assert_same(*pair(source, family, chunk_size_feed_forward=size))


def test_pruned_heads():
    library("transformers")
    original, fast = pair("transformers", "Bert")
    if not hasattr(original.encoder.layer[0].attention, "prune_heads"):
        pytest.skip("transformers 5.x prunes no heads")
    infer(fast)
    for model in (original, fast):
        model.prune_heads({0: [1], 1: [0, 2]})
    assert_same(original, fast)
