"""accelerate and restore: what they change, what they keep, and that the result equals the original."""

from __future__ import annotations

import copy
import io
import logging
import pickle
import random
import subprocess
import sys
import threading

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
    train,
)
from tolerance import assert_2x
from torch import nn

import fastconv
from fastconv import reference

models = pytest.mark.parametrize(("source", "family"), MODELS)

ALL_HEADS = ("Model", "ForMaskedLM", "ForSequenceClassification", "ForMultipleChoice", "ForTokenClassification")
ALL_HEADS += ("ForQuestionAnswering",)


@pytest.fixture(autouse=True)
def _native(request):
    """Kernels run in the interpreter only where a test asks for a backend: they are slow there."""
    if "backend" in request.fixturenames:
        yield
        return
    with fastconv.backend("native"):
        yield


# The same outputs


@models
def test_accelerated_model_equals_the_original(backend, source, family):
    assert_same(*pair(source, family))


@models
def test_fused_forwards_are_what_runs(source, family):
    original, fast = both(build(source, family + "ForMaskedLM"))
    expected, trained = infer(original), train(original)
    with forbidden(fused_classes(source, family)):
        assert_close(infer(fast), expected)
        assert_close(train(fast)[0], trained[0])
        with pytest.raises(AssertionError, match="the original forward of"):
            infer(original)


@pytest.mark.parametrize("head", ["Model", "ForMaskedLM"])
@pytest.mark.parametrize("family", ["Bert", "RoCBert", "ConvBert"])
def test_own_models_are_accelerated_from_construction(family, head):
    config = build("reference", family + "Model").config.to_dict()
    own = getattr(fastconv, family + head)(getattr(fastconv, family + "Config").from_dict(config))
    assert not {type(module) for module in own.modules()} & set(fused_classes("reference", family))


@models
def test_fused_attention_runs_again_after_attentions_were_asked_for(source, family):
    original, fast = pair(source, family)
    infer(fast, output_attentions=True, output_hidden_states=True)
    expected = infer(original, output_hidden_states=True)
    with forbidden(fused_classes(source, family)):
        assert_close(infer(fast, output_hidden_states=True), expected)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("head", ALL_HEADS)
@models
def test_random_configs(source, family, head, seed):
    rng = random.Random(f"{family} {head} {seed}")
    arguments = {
        "hidden_size": rng.choice((16, 32, 48)),
        "num_attention_heads": rng.choice((4, 8)),
        "intermediate_size": rng.choice((24, 40)),
        "hidden_act": rng.choice(("gelu", "gelu_new", "relu", "silu", "gelu_pytorch_tanh", "tanh", "mish")),
        "num_hidden_layers": rng.choice((1, 2)),
        "layer_norm_eps": rng.choice((1e-12, 1e-5)),
        "chunk_size_feed_forward": rng.choice((0, 0, 3)),
        "num_labels": 2 if head == "ForQuestionAnswering" else 3,
    }
    if family == "ConvBert":
        arguments |= {
            "embedding_size": rng.choice((arguments["hidden_size"], 8, 20)),
            "head_ratio": rng.choice((1, 2, 4)),
            "conv_kernel_size": rng.choice((1, 3, 5, 9)),
            "num_groups": rng.choice((1, 2, 4)),
        }
    inputs = make_inputs(rng.choice(("right", "left", "none", None)), seed)
    if family == "RoCBert":
        arguments["concat_input"] = rng.random() < 0.5
        if not arguments["concat_input"]:
            arguments |= dict.fromkeys(("shape_embed_dim", "pronunciation_embed_dim"), arguments["hidden_size"])
        inputs |= {f"input_{stream}_ids": inputs["input_ids"].roll(1, 0) for stream in ("shape", "pronunciation")}
    original, fast = both(build(source, family + head, **arguments))
    inputs |= labels_for(head, inputs)
    assert_same(original, fast, inputs, output_hidden_states=True)


def labels_for(head, inputs):
    """The labels that make a head compute its loss; the inputs of a multiple choice are given two choices."""
    if head == "ForMultipleChoice":
        inputs.update({k: torch.stack([t, t.roll(1, 0)], 1) for k, t in inputs.items()})
        return {"labels": torch.tensor([0, 1, 1])}
    if head == "ForSequenceClassification":
        return {"labels": torch.tensor([0, 2, 1])}
    if head == "ForQuestionAnswering":
        return {"start_positions": torch.tensor([0, 2, 1]), "end_positions": torch.tensor([3, 3, 1])}
    if head == "Model":
        return {}
    return {"labels": inputs["input_ids"] % 3}


@pytest.mark.parametrize("activation", sorted(reference.ops.ACTIVATIONS))
@models
def test_every_activation(source, family, activation):
    if source == "transformers" and activation not in library(source).activations.ACT2CLS:
        pytest.skip(f"this version of transformers has no activation {activation}")
    groups = {"num_groups": 1} if family == "ConvBert" else {}
    assert_same(*both(build(source, family + "ForMaskedLM", hidden_act=activation, num_hidden_layers=1, **groups)))


@models
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes(source, family, dtype):
    original, fast = pair(source, family)
    truth = infer(copy.deepcopy(original).double())
    expected, actual = infer(original.to(dtype)), infer(fast.to(dtype))
    if dtype == torch.float64:
        assert_close(actual, truth, 1e-12)
        return
    for key in truth:
        # A layer stores tens of intermediate results, in other places than the original: an output is off by a few
        # roundings, which the 2x of the largest of few errors may not hold.
        assert_2x(key, actual[key], expected[key], truth[key], rounding=4 * torch.finfo(dtype).eps)


@models
def test_autocast(source, family):
    original, fast = pair(source, family)
    truth = infer(copy.deepcopy(original).double())
    with torch.autocast("cpu", torch.bfloat16):
        expected, actual = infer(original), infer(fast)
        gradients, expected_gradients = train(fast)[1], train(original)[1]
    for key in truth:
        assert_2x(key, actual[key].float(), expected[key].float(), truth[key], rounding=4 * 2**-8)
    for key, gradient in expected_gradients.items():
        assert gradients[key].dtype == gradient.dtype and gradients[key].isfinite().all()


# What stays


@models
def test_accelerate_changes_nothing_but_forwards(source, family):
    model = build(source, family + "ForMaskedLM")
    classes = {name: type(module) for name, module in model.named_modules()}
    parameters, state = dict(model.named_parameters()), model.state_dict()
    state = {name: t.clone() for name, t in state.items()}
    assert fastconv.accelerate(model) is model
    infer(model), train(model)
    infer(model)
    assert [name for name, _ in model.named_modules()] == list(classes)
    for name, module in model.named_modules():
        assert isinstance(module, classes[name])
    # A whole model is known by its class's name: in files, and in transformers' registries.
    assert repr(type(model)) == repr(classes[""])
    for name, parameter in model.named_parameters():
        assert parameter is parameters.pop(name) and parameter.is_leaf and parameter.requires_grad
    assert not parameters
    assert list(model.state_dict()) == list(state)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name


@models
@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_stay_accelerated(source, family, way, moment):
    """Copied before the weights are packed, and after."""
    original, fast = both(build(source, family + "Model"), backend="native")
    if moment == "after":
        infer(fast)
    if way == "deepcopy":
        copied = copy.deepcopy(fast)
    elif way == "pickle":
        copied = pickle.loads(pickle.dumps(fast))
    else:
        buffer = io.BytesIO()
        torch.save(fast, buffer)
        buffer.seek(0)
        copied = torch.load(buffer, weights_only=False)
    expected = infer(original)
    with forbidden(fused_classes(source, family)):
        assert_close(infer(copied), expected)
    assert attention_of(copied).fastconv_backend == "native"
    with torch.no_grad():
        attention_of(copied).query.weight.add_(1.0)
    assert_close(infer(fast), expected)
    fastconv.restore(copied)
    attention_of(copied).query.weight.data.sub_(1.0)
    assert_close(infer(copied), expected)


def test_a_pickle_opens_in_a_fresh_process(tmp_path):
    model = fastconv.accelerate(build("reference", "ConvBertModel"))
    inputs = make_inputs()
    torch.save((model, inputs, infer(model)), tmp_path / "model.pt")
    code = f"""
import torch
model, inputs, expected = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
with torch.no_grad():
    error = (model(**inputs)[0] - expected["last_hidden_state.0"]).abs().max().item()
assert error < 1e-4, error
print(type(model.encoder.layer[0].attention.self).__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "FastConvBertSelfAttention", done.stderr


@pytest.mark.parametrize("family", ["Bert", "ConvBert"])
@pytest.mark.parametrize("head", ["Model", "ForMaskedLM"])
def test_saving_and_loading(tmp_path, family, head):
    safetensors = pytest.importorskip("safetensors.torch", reason="saves with safetensors, which is not installed")
    original, fast = both(build("transformers", family + head))
    expected = infer(fast)
    fast.save_pretrained(tmp_path / "fast")
    original.save_pretrained(tmp_path / "original")
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("fast", "original")]
    assert abs(sizes[0] - sizes[1]) < 1000
    loaded = type(original).from_pretrained(tmp_path / "fast").eval()
    for name, value in original.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert_close(infer(fastconv.accelerate(loaded)), expected)
    safetensors.save_model(fast, tmp_path / "model.safetensors")
    safetensors.load_model(loaded, tmp_path / "model.safetensors")
    torch.save(fast.state_dict(), tmp_path / "state.pt")
    assert (tmp_path / "state.pt").stat().st_size < 1.5 * sizes[0] + 20_000
    for assign in (False, True):
        original.load_state_dict(torch.load(tmp_path / "state.pt"), assign=assign)
        assert_close(infer(original), expected)
    fastconv.accelerate(original)
    assert_close(infer(original), expected)


@pytest.mark.parametrize("family", ["Bert", "ConvBert"])
def test_saving_and_loading_of_own_models(tmp_path, family):
    pytest.importorskip("safetensors", reason="saves with safetensors, which is not installed")
    original = build("reference", family + "ForMaskedLM")
    own = getattr(fastconv, family + "ForMaskedLM")
    config = getattr(fastconv, family + "Config").from_dict(original.config.to_dict())
    fast = fastconv.accelerate(own(config).eval())
    fast.load_state_dict(original.state_dict())
    assert_same(original, fast)
    fast.save_pretrained(tmp_path)
    loaded = own.from_pretrained(tmp_path)
    assert_close(infer(loaded), infer(original))
    assert_close(infer(fastconv.accelerate(loaded)), infer(original))


def test_a_state_dict_of_packed_weights_can_be_saved(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch", reason="saves with safetensors, which is not installed")
    original, fast = pair("reference", "ConvBert")
    infer(fast)
    safetensors.save_file(fast.state_dict(), tmp_path / "model.safetensors")
    for name, value in safetensors.load_file(tmp_path / "model.safetensors").items():
        assert torch.equal(value, original.state_dict()[name]), name


@models
def test_unknown_subclasses_are_left_alone(source, family):
    original = build(source, family + "Model")

    class Doubled(type(attention_of(original))):
        def forward(self, *args, **kwargs):
            context, *rest = super().forward(*args, **kwargs)
            return (2 * context, *rest)

    class Shifted(nn.LayerNorm):
        def forward(self, input):
            return super().forward(input) + 1

    attention_of(original, 0).__class__ = Doubled
    layer_of(original, 1).output.LayerNorm.__class__ = Shifted
    original, fast = original, fastconv.accelerate(clone(original))
    assert type(attention_of(fast, 0)) is Doubled
    assert type(layer_of(fast, 1).output.LayerNorm) is Shifted
    assert_same(original, fast)


class Own(type(fastconv.accelerate(nn.LayerNorm(2)))):
    """A class that somebody made from that of an accelerated module."""

    def forward(self, input):
        return super().forward(input) + 1


def test_subclasses_of_accelerated_modules_are_left_alone():
    model = fastconv.accelerate(build("reference", "BertModel"))
    norm = layer_of(model).output.LayerNorm
    norm.__class__ = Own
    expected = infer(model)
    for changed in (model, fastconv.accelerate(model), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(layer_of(changed).output.LayerNorm) is Own
        assert_close(infer(changed), expected)
    assert type(layer_of(fastconv.restore(model)).output.LayerNorm) is Own


def clone(model):
    """A copy of a model with classes that no pickle finds."""
    copied = copy.deepcopy(model)
    for module, other in zip(copied.modules(), model.modules(), strict=True):
        assert type(module) is type(other)
    return copied


def test_an_instance_with_a_forward_of_its_own_is_left_alone(caplog):
    model = build("reference", "BertModel")
    attention = attention_of(model)
    forward = attention.forward
    attention.forward = lambda *args, **kwargs: (2 * forward(*args, **kwargs)[0], None)
    expected = infer(model)
    with caplog.at_level(logging.INFO, logger="fastconv"):
        fastconv.accelerate(model)
    assert type(attention) is reference.bert.BertSelfAttention
    assert "left" in caplog.text and "1 BertSelfAttention" in caplog.text.split("left")[1]
    assert_close(infer(model), expected)


# Parts of models


@models
@pytest.mark.parametrize("part", ["layer", "attention", "self", "intermediate", "output", "LayerNorm", "encoder"])
def test_parts_of_a_model(source, family, part):
    original = build(source, family + "Model")
    fast = copy.deepcopy(original)
    layer = layer_of(fast)
    parts = {
        "layer": layer,
        "attention": layer.attention,
        "self": layer.attention.self,
        "intermediate": layer.intermediate,
        "output": layer.output,
        "LayerNorm": layer.output.LayerNorm,
        "encoder": fast.encoder,
    }
    assert fastconv.accelerate(parts[part]) is parts[part]
    assert_same(original, fast)
    assert_close(
        infer(fast, output_attentions=True, output_hidden_states=True),
        infer(original, output_attentions=True, output_hidden_states=True),
    )
    fast.config.output_attentions = original.config.output_attentions = True
    assert_close(infer(fast), infer(original))


def test_a_lone_layer_norm():
    for options in ({}, {"bias": False}, {"elementwise_affine": False}):
        original = nn.LayerNorm(6, **options)
        fast = fastconv.accelerate(copy.deepcopy(original))
        x = torch.randn(3, 6)
        torch.testing.assert_close(fast(x), original(x))
        torch.testing.assert_close(fast(input=x), original(input=x))
        torch.testing.assert_close(fast(x.half()), original.half()(x.half()), rtol=1e-3, atol=1e-3)
        assert type(fastconv.restore(fast)) is nn.LayerNorm


@models
def test_calls_of_a_part(source, family):
    original, fast = pair(source, family)
    x = torch.randn(2, 7, 16)
    mask = torch.zeros(2, 1, 1, 7)
    mask[0, ..., 4:] = torch.finfo(torch.float32).min
    with torch.no_grad():
        for find in (layer_of, attention_of):
            for arguments, options in (((x,), {}), ((x, mask), {}), ((x,), {"attention_mask": mask})):
                got, expected = (find(m)(*arguments, **options) for m in (fast, original))
                got, expected = (y[0] if isinstance(y, tuple) else y for y in (got, expected))
                torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(
                attention_of(fast)(hidden_states=x)[0], attention_of(original)(hidden_states=x)[0], rtol=1e-4, atol=1e-5
            )


def test_shared_modules_are_accelerated_once():
    original = build("reference", "ConvBertModel")
    original.encoder.layer[1] = original.encoder.layer[0]
    assert_same(*both(original))


# Options, messages, idempotence


@models
def test_twice_is_once(source, family):
    original, fast = pair(source, family)
    infer(fast)
    classes = [type(module) for module in fast.modules()]
    fastconv.accelerate(fast)
    fastconv.accelerate(layer_of(fast))
    assert [type(module) for module in fast.modules()] == classes
    assert_same(original, fast)
    fastconv.restore(fast)
    assert [type(module) for module in fast.modules()] == [type(module) for module in original.modules()]


def test_the_last_backend_counts(monkeypatch):
    from fastconv import dispatch

    seen = []
    use_triton = dispatch.use_triton

    def spy(x):
        seen.append(getattr(dispatch._of_module, "name", None) or dispatch._current)
        return use_triton(x)

    monkeypatch.setattr("fastconv.ops._eager.use_triton", spy)
    fast = fastconv.accelerate(build("reference", "BertModel", num_hidden_layers=1))
    infer(fast)
    assert set(seen) == {"native"}  # this file's own choice, by fastconv.backend
    with fastconv.backend("auto"):
        fastconv.accelerate(fast, backend="native")
        seen.clear()
        infer(fast)
        assert set(seen) == {"native"}
        fastconv.accelerate(fast, backend="auto")
        seen.clear()
        infer(fast)
        assert set(seen) == {"auto"}
    fastconv.accelerate(fast, backend="triton")
    seen.clear()
    infer(fast)
    assert set(seen) == {"triton"}


@pytest.mark.parametrize("name", ["cuda", "", "Native", None])
def test_unknown_backend(name):
    model = build("reference", "BertModel")
    with pytest.raises(ValueError, match=r"unknown backend .*: expected one of 'auto', 'triton', 'native'"):
        fastconv.accelerate(model, backend=name)
    assert type(attention_of(model)) is reference.bert.BertSelfAttention


def test_nothing_to_replace():
    with pytest.raises(
        RuntimeError, match=r"nothing to replace in Sequential: expected layers of BERT.*got .*2 Linear"
    ):
        fastconv.accelerate(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)))
    with pytest.raises(RuntimeError, match=r"nothing to replace in ReLU: .* no module"):
        fastconv.accelerate(nn.ReLU())


@pytest.mark.parametrize("function", [fastconv.accelerate, fastconv.restore])
def test_what_is_no_module(function):
    with pytest.raises(TypeError, match=r"takes a torch.nn.Module, got dict"):
        function({})


def test_the_log_says_what_was_replaced_and_what_was_left(caplog):
    model = build("reference", "ConvBertForSequenceClassification")
    with caplog.at_level(logging.INFO, logger="fastconv"):
        fastconv.accelerate(model)
    (record,) = caplog.records
    replaced, left = record.getMessage().split("; left ")
    assert replaced.startswith("ConvBertForSequenceClassification: replaced ")
    for words in ("2 ConvBertSelfAttention", "4 GroupedLinear", "2 Intermediate", "5 LayerNorm", "4 ResidualOutput"):
        assert words in replaced
    assert "3 Embedding" in left and "4 Conv1d" in left and "Linear" in left


class Odd(nn.Module):
    """A module whose config is not what a model's is."""

    def __init__(self, inner, config):
        super().__init__()
        self.inner = inner
        self.config = config


@pytest.mark.parametrize(
    "config",
    [{}, {"output_attentions": True}, torch.tensor([1, 2]), lambda: None, 3, "name"],
    ids=lambda config: type(config).__name__,
)
def test_odd_configs(config):
    original = build("reference", "ConvBertModel")
    fast = Odd(copy.deepcopy(original), config)
    fastconv.accelerate(fast)
    assert attention_of(fast.inner).fastconv_config is fast.inner.config
    assert_same(original, fast.inner)
    assert fastconv.accelerate(Odd(attention_of(copy.deepcopy(original)), config)).inner.fastconv_config is None


@pytest.mark.parametrize("source", ["reference", "transformers"])
def test_more_taps_than_the_ops_take(source):
    original, fast = pair(source, "ConvBert", conv_kernel_size=33)
    assert_same(original, fast)


@pytest.mark.parametrize("kernel_size", [4, 33])
def test_a_lone_separable_convolution_of_other_taps(kernel_size):
    # Of transformers, whose module takes an even number of them, too.
    original = attention_of(build("transformers", "ConvBertModel")).key_conv_attn_layer
    original.depthwise = nn.Conv1d(16, 16, kernel_size, padding=kernel_size // 2, groups=16, bias=False)
    fast = fastconv.accelerate(copy.deepcopy(original))
    x = torch.randn(2, 16, 7)
    torch.testing.assert_close(fast(x), original(x))


# restore


@models
@pytest.mark.parametrize("used", ["unused", "inferred", "trained", "moved"])
def test_restore_gives_everything_back(source, family, used):
    original, fast = pair(source, family)
    untouched = copy.deepcopy(original)
    expected = infer(original)
    if used in ("inferred", "moved"):
        infer(fast)
    if used == "trained":
        train(fast)
        infer(fast)
        fast.zero_grad()
    if used == "moved":
        fast.double().float()
    parameters = dict(fast.named_parameters())
    assert fastconv.restore(fast) is fast
    for (name, module), other in zip(fast.named_modules(), untouched.modules(), strict=True):
        assert type(module) is type(other), name
        assert module.__dict__.keys() - other.__dict__.keys() <= {"_output_capturing_hooks_installed"}, name
    for name, parameter in fast.named_parameters():
        assert parameter is parameters[name]
        assert parameter.untyped_storage().nbytes() == parameter.numel() * parameter.element_size(), name
    assert len({p.untyped_storage().data_ptr() for p in fast.parameters()}) == len(list(fast.parameters()))
    for key, value in infer(fast).items():
        assert torch.equal(value, expected[key]), key
    assert fastconv.restore(fast) is fast


def test_restore_of_a_part():
    original, fast = pair("reference", "Bert")
    infer(fast)
    fastconv.restore(layer_of(fast, 1))
    assert type(attention_of(fast, 1)) is reference.bert.BertSelfAttention
    assert type(attention_of(fast, 0)) is not reference.bert.BertSelfAttention
    assert_same(original, fast)


def test_restore_of_what_is_not_accelerated():
    model = build("reference", "BertModel")
    before = infer(model)
    assert fastconv.restore(model) is model
    assert_close(infer(model), before, 0.0)
    assert isinstance(fastconv.restore(nn.ReLU()), nn.ReLU)


# Training


@models
def test_dropout_keeps_its_rate(source, family):
    """The mean over many draws is that of the original's, and so is the spread."""
    arguments = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3, "num_hidden_layers": 1}
    original, fast = pair(source, family, **arguments)
    draws = []
    for model in (original, fast):
        torch.manual_seed(5)
        inputs = make_inputs()
        inputs = {k: t[:1].repeat(300, 1) for k, t in inputs.items()}
        with torch.no_grad():
            draws.append(model.train()(**inputs)[0])
    for statistic in (torch.mean, torch.std):
        expected, actual = (statistic(draw, 0) for draw in draws)
        assert (actual - expected).abs().mean() < 5 * draws[0].std(0).mean() / 300**0.5
    assert (draws[1][0] - draws[1][1]).abs().max() > 0.1
    assert_same_inference(original.eval(), fast.eval())


@models
@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad])
def test_dropout_sits_where_it_sat(source, family, context):
    """The native formulation draws what the original draws: from one seed both have the same outputs."""
    original, fast = (m.train() for m in pair(source, family, hidden_dropout_prob=0.3))
    outputs = []
    for model in (original, fast):
        torch.manual_seed(5)
        with context():
            outputs.append(model(**make_inputs())[0].detach())
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)


@models
def test_dropout_follows_the_generator(source, family):
    _, fast = pair(source, family, hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3)
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(train(fast.train())[1])
    assert_close(runs[0], runs[1], 1e-6)
    assert any((runs[0][name] - runs[2][name]).abs().max() > 1e-3 for name in runs[0])


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable")
@pytest.mark.parametrize("family", ["Bert", "ConvBert"])
def test_gradient_checkpointing(family):
    original, fast = pair("transformers", family)
    expected = train(original.train())
    for options in ({"use_reentrant": True}, {"use_reentrant": False}):
        fast.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        fast.enable_input_require_grads()
        outputs, gradients = train(fast)
        assert_close(outputs, expected[0])
        assert_close(gradients, expected[1], floor=max(g.abs().max().item() for g in expected[1].values()))


@models
@pytest.mark.parametrize("trained", ["bias", "query.weight", "LayerNorm", "value.bias", "word_embeddings", "layer.1"])
def test_partly_frozen_models(source, family, trained):
    """What needs a gradient gets the original's, and nothing else does."""
    original, fast = pair(source, family)
    for model in (original, fast):
        for name, p in model.named_parameters():
            p.requires_grad_(trained in name)
    assert_same(original, fast)


@models
def test_gradient_of_embeddings_through_a_frozen_model(source, family):
    original, fast = (m.requires_grad_(False) for m in pair(source, family))
    size = 12 if family == "ConvBert" else 16
    embeds = torch.randn(BATCH_OF_EMBEDS, 5, size)
    gradients = []
    for model in (original, fast):
        leaf = embeds.clone().requires_grad_()
        gradients.append(torch.autograd.grad(model(inputs_embeds=leaf)[0].sin().sum(), leaf)[0])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-4)


BATCH_OF_EMBEDS = 2


# torch.compile, torch.func, threads


# By the kernels; tests/test_compile.py has every model natively, and ConvBERT by the kernels.
@pytest.mark.parametrize(("source", "family"), [("transformers", "Bert"), ("reference", "RoCBert")])
def test_compiled(source, family):
    original, fast = pair(source, family, num_hidden_layers=1)
    torch._dynamo.reset()
    inputs = make_inputs()
    if source == "transformers":
        # transformers looks at a padding mask's values; that of queries and keys goes through as it is.
        keep = inputs["attention_mask"][:, None].bool().expand(-1, 9, -1)
        additive = torch.zeros(keep.shape).masked_fill(~keep, torch.finfo(torch.float32).min)[:, None]
        inputs["attention_mask"] = keep.long() if is_4() else additive
    compiled = torch.compile(fast, backend="aot_eager", fullgraph=True)
    expected = train(original, inputs)
    outputs, gradients = train(compiled, inputs)
    assert_close(outputs, expected[0])
    # A compiled model gives zeros where nothing reaches a parameter.
    gradients = {name.removeprefix("_orig_mod."): g for name, g in gradients.items()}
    gradients = {name: gradients[name] for name in expected[1]}
    assert_close(gradients, expected[1], floor=max(g.abs().max().item() for g in expected[1].values()))
    assert_close(infer(compiled, inputs), infer(original, inputs))


def test_compiled_with_a_backend_of_its_own():
    original, fast = both(build("reference", "ConvBertModel", num_hidden_layers=1), backend="native")
    torch._dynamo.reset()
    with fastconv.backend("auto"):
        compiled = torch.compile(fast, backend="aot_eager", fullgraph=True)
        assert_close(infer(compiled), infer(original))


@pytest.mark.parametrize("family", ["Bert", "ConvBert"])
def test_functional_calls(family):
    original, fast = pair("reference", family)
    other = build("reference", family + "Model")
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.1)
    weights = dict(other.named_parameters())
    inputs = make_inputs()
    for context in (torch.no_grad, torch.enable_grad):
        with context():
            for given in (weights, {k: p.detach() for k, p in weights.items()}, {}):
                got, expected = (
                    torch.func.functional_call(m, given, kwargs=inputs)["last_hidden_state"] for m in (fast, original)
                )
                torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert_same(original, fast)
    assert_same_inference(original, fast)
    assert_close(infer(other), infer(fastconv.accelerate(other)))


@pytest.mark.filterwarnings("ignore:There is a performance drop", "ignore:.torch.jit.script")
@pytest.mark.parametrize("family", ["Bert", "ConvBert"])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad])
def test_function_transforms(family, frozen, context):
    """torch.func sees what happens inside; and no weight is packed while it looks."""
    original, fast = (m.requires_grad_(not frozen) for m in pair("reference", family, num_hidden_layers=1))
    embeds = torch.randn(2, 5, 12 if family == "ConvBert" else 16)
    tangent = torch.randn_like(embeds)

    def transformed(model):
        def f(x):
            return model(inputs_embeds=x[None]).last_hidden_state[0]

        def loss(weights, x):
            return torch.func.functional_call(model, weights, kwargs={"inputs_embeds": x[None]})[0].sin().sum()

        weights = {k: p.detach() for k, p in model.named_parameters()}
        stacked = {k: torch.stack([p, 1.1 * p]) for k, p in weights.items()}
        found = {
            "vmap": torch.func.vmap(f)(embeds),
            "jvp": torch.func.jvp(f, (embeds[0],), (tangent[0],))[1],
            "grad": torch.func.grad(lambda x: f(x).sin().sum())(embeds[0]),
            "ensemble": torch.func.vmap(loss, in_dims=(0, None))(stacked, embeds[0]),
        }
        gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, embeds)
        return found | {f"per-sample gradient of {k}": g for k, g in gradients.items()}

    with context():
        expected = transformed(original)
        actual = transformed(fast)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    assert_same_inference(original, fast)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_traced_model_takes_other_weights():
    original, fast = pair("reference", "ConvBert", num_hidden_layers=1)
    infer(fast)
    embeds = torch.randn(2, 5, 12)

    class Plain(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model(inputs_embeds=x, return_dict=False)[0]

    with torch.no_grad():
        buffer = io.BytesIO()
        torch.jit.save(torch.jit.trace(Plain(fast), embeds), buffer)
        buffer.seek(0)
        traced = torch.jit.load(buffer)
        for model in (traced, original):
            for p in model.parameters():
                p.data = 1.1 * p
        torch.testing.assert_close(traced(embeds), Plain(original)(embeds), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["Bert", "ConvBert"])
def test_first_calls_from_several_threads(family):
    original, fast = both(build("reference", family + "Model"), backend="native")
    expected, threads, results = infer(original), 4, []
    start = threading.Barrier(threads)

    def call():
        start.wait()
        for _ in range(5):
            results.append(infer(fast))

    running = [threading.Thread(target=call) for _ in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert len(results) == 5 * threads
    for result in results:
        assert_close(result, expected)
    assert_same(original, fast)


def test_threads_leave_the_process_its_backend(monkeypatch):
    """Modules with a backend of their own, in calls that overlap, change nobody else's."""
    from fastconv import dispatch

    module = fastconv.accelerate(nn.LayerNorm(4), backend="native")
    inside, leave = [threading.Event(), threading.Event()], [threading.Event(), threading.Event()]
    calls = iter(range(2))

    def slow(x):
        call = next(calls)
        inside[call].set()
        leave[call].wait(10)
        return x

    with fastconv.backend("auto"):
        monkeypatch.setattr(sys.modules["fastconv.nn.layer_norm"], "layer_norm", lambda x, *rest: slow(x))
        running = []
        for event in inside:
            running.append(threading.Thread(target=module, args=(torch.ones(2, 4),)))
            running[-1].start()
            assert event.wait(10)
        for thread, event in zip(running, leave, strict=True):
            event.set()
            thread.join()
        assert dispatch._current == "auto" and getattr(dispatch._of_module, "name", None) is None


# Before and after .to()


@models
def test_meta_device(source, family):
    original = build(source, family + "Model")
    with torch.device("meta"):
        fast = type(original)(original.config).eval()
    fastconv.accelerate(fast)
    fast.load_state_dict({k: t.clone() for k, t in original.state_dict().items()}, assign=True)
    for name, buffer in original.named_buffers():
        module, _, key = name.rpartition(".")
        fast.get_submodule(module)._buffers[key] = buffer.clone()
    assert_same(original, fast)


@models
def test_moves_between_dtypes(source, family):
    original, fast = pair(source, family)
    for dtype in (torch.float64, torch.float32):
        infer(fast)
        assert_close(infer(fast.to(dtype)), infer(original.to(dtype)))
    assert_same_training(original, fast)


@pytest.mark.parametrize("name", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
def test_dropout_of_everything_is_the_originals(name):
    # The config allows it; the fused ops, which divide by what is kept, don't.
    sizes = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = reference.BertConfig(**sizes, intermediate_size=8, **{name: 1.0})
    model = reference.BertModel(config).train()
    ids = torch.randint(0, 20, (2, 5))
    torch.manual_seed(0)
    expected = model(ids).last_hidden_state
    torch.manual_seed(0)
    torch.testing.assert_close(fastconv.accelerate(model)(ids).last_hidden_state, expected)


def test_integer_masks_go_to_the_original():
    # transformers' eager attention adds whatever four-dimensional mask it gets to the scores.
    bert = pytest.importorskip("transformers.models.bert.modeling_bert", reason="needs transformers")
    config = bert.BertConfig(hidden_size=8, num_attention_heads=2, attn_implementation="eager")
    attention = bert.BertSelfAttention(config).eval()
    x, mask = torch.randn(2, 5, 8), torch.randint(0, 9, (2, 1, 5, 5))
    expected = attention(x, mask)[0]
    torch.testing.assert_close(fastconv.accelerate(attention)(x, mask)[0], expected)
