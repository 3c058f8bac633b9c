"""A layer that is one autograd function: the reference's results and gradients, and when the modules run instead."""

from __future__ import annotations

import copy
import functools
import pickle
from unittest import mock

import pytest
import torch
from model_runs import assert_equal, largest, together
from swap_models import MODELS, attention_of, build, layer_of, make_inputs, tensors_of, train
from tolerance import assert_2x
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import fastconv

pytest.importorskip("triton", reason="the function is for kernels, and the package triton is not installed")
from fastconv.kernels._dropout import dropout_mask
from fastconv.kernels._reduce import sum_segments
from fastconv.nn import _encoder_layer
from fastconv.ops.masked_attention import attention_dropout_mask

DROPOUT = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.2}
CASES = [(source, family, 1) for source, family in MODELS] + [("reference", "ConvBert", 2)]
SHAPE = (2, 5, 16)


@pytest.fixture
def taken():
    """The calls of the function."""
    with mock.patch.object(_encoder_layer, "encoder_layer", wraps=_encoder_layer.encoder_layer) as function:
        yield function


def make(source: str, family: str, groups: int = 1, **arguments) -> nn.Module:
    """A model of one layer."""
    arguments |= {"num_groups": groups} if family == "ConvBert" else {}
    return build(source, family + "Model", num_hidden_layers=1, **arguments)


def fast_layer(device, source="reference", family="Bert", *, dtype=torch.float32, **arguments):
    """A layer that runs by kernels, and its input."""
    model = make(source, family, **arguments).to(device, dtype)
    layer = fastconv.accelerate(layer_of(model), backend="triton").train()
    return layer, torch.randn(SHAPE, device=device).to(dtype).requires_grad_()


def call(layer: nn.Module, x: torch.Tensor, *arguments, **named) -> torch.Tensor:
    output = layer(x, *arguments, **named)
    return output[0] if isinstance(output, tuple) else output


def run(layer: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The output and all gradients, with the dropout of one seed."""
    torch.manual_seed(7)
    y = call(layer, x)
    wanted = {"x": x, **dict(layer.named_parameters())}
    wanted = {name: t for name, t in wanted.items() if t.requires_grad}
    return {"y": y.detach(), **dict(zip(wanted, torch.autograd.grad(y.sin().sum(), wanted.values()), strict=True))}


def assert_identical(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


# What it computes


@pytest.mark.parametrize(("dtype", "padding"), [(torch.float32, "keep"), (torch.float16, "remove")], ids=str)
@pytest.mark.parametrize(("source", "family", "groups"), CASES)
def test_encoder_layer(source, family, groups, dtype, padding, device, taken, poisoned_empty):
    model = make(source, family, groups).to(device).train()
    inputs = {name: value[:2, :5].to(device) for name, value in make_inputs().items()}
    if padding == "remove":
        inputs["attention_mask"][1, 2:] = 0
    fast = fastconv.accelerate(copy.deepcopy(model).to(dtype), backend="triton", padding=padding)
    truth = train_as(padding, copy.deepcopy(model).double(), inputs)
    actual, own = train(fast, inputs), train_as(padding, model.to(dtype), inputs)
    assert taken.call_count == 1 and (taken.call_args.args[2].packing is not None) == (padding == "remove")
    assert actual[1].keys() == truth[1].keys()
    # All together, each in units of its largest value: of a few values one run says little.
    found = (together(each[0] | each[1], truth[0] | truth[1], largest(truth[1])) for each in (actual, own, truth))
    assert_2x(str(dtype), *found, rounding=4 * torch.finfo(dtype).eps)  # a layer rounds more than once


def train_as(padding: str, model: nn.Module, inputs: dict[str, torch.Tensor]):
    """What a model accelerated with this padding has to give; without its padding, each row by itself."""
    if padding == "keep":
        return train(model, inputs)
    rows, lengths = [], inputs["attention_mask"].sum(1).tolist()
    for row, length in enumerate(lengths):
        rows.append(model(inputs["input_ids"][row : row + 1, :length])[0][0])
    states = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    weights = torch.randn(states.shape, generator=torch.Generator().manual_seed(1)).to(states)
    model.zero_grad()
    (states * weights).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"last_hidden_state.0": states.detach()}, gradients


class Kept(nn.Module):
    """Dropout with a mask."""

    def __init__(self, keep: torch.Tensor, p: float) -> None:
        super().__init__()
        self.keep, self.p = keep, p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.where(self.keep, x / (1 - self.p), 0.0)


# The modules of transformers' BERT don't all call what they hold as their dropout.
EXACT = [(*case, (0.0, 0.0)) for case in CASES]
EXACT += [(*case, (0.2, 0.3)) for case in CASES if case[0] == "reference" or case[1] == "ConvBert"]
EXACT += [("reference", "ConvBert", 2, p) for p in ((0.2, 0.0), (0.0, 0.3))]


@pytest.mark.parametrize(("source", "family", "groups", "p"), EXACT, ids=str)
def test_encoder_layer_in_fp64(source, family, groups, p, device, taken):
    if device.type == "cuda":
        pytest.skip("exact in fp64, in which kernels run in the interpreter only")
    arguments = {"attention_probs_dropout_prob": p[0], "hidden_dropout_prob": p[1]}
    layer, x = fast_layer(device, source, family, dtype=torch.float64, groups=groups, **arguments)
    actual = run(layer, x)
    assert taken.call_count == 1
    torch.manual_seed(7)
    seeds = torch.randint(2**63 - 1, (3, 2), device=device)[:, 0]
    own, (B, S, C) = fastconv.restore(copy.deepcopy(layer)), x.shape
    if any(p):
        core = own.attention.self
        keep = attention_dropout_mask(B, core.num_attention_heads, S, S, p[0], seeds[0], by_kernels=True)
        core.dropout = Kept(keep, p[0])
        for module, seed in ((own.attention.output, seeds[1]), (own.output, seeds[2])):
            module.dropout = Kept(dropout_mask(B * S, C, p[1], seed).view(B, S, C), p[1])
    expected = run(own, x)
    assert_equal(actual, expected, floor=1e-3 * largest(expected))


def test_encoder_layer_adds_up_segments(device):
    shapes = [(3, 70, 40), (1, 1, 33), (3, 2, 64), (1, 32, 7), (5, 33, 48)]
    partials = [torch.randn(shape, device=device) for shape in shapes]
    for number in range(1, 5):
        expected = [partial.sum(1) for partial in partials[:number]]
        torch.testing.assert_close(sum_segments(partials[:number], torch.float32), expected)
        found = sum_segments(partials[:number], torch.float16, partials[-1])
        torch.testing.assert_close(found, [t.half() for t in (*expected, partials[-1].sum(1).t().contiguous())])
        assert all(t.is_contiguous() for t in found)


# Training


FROZEN = {
    "attention": lambda name: name.startswith("attention"),
    "weights": lambda name: "weight" in name,
    "all but the last": lambda name: "output.LayerNorm" not in name,
    "convolution": lambda name: "conv" in name,
    "all": lambda name: True,
}


@pytest.mark.parametrize("frozen", FROZEN)
def test_encoder_layer_of_frozen_parameters(device, frozen, taken):
    layer, x = fast_layer(device, family="ConvBert", **DROPOUT)
    expected = run(layer, x)
    for name, p in layer.named_parameters():
        p.requires_grad_(not FROZEN[frozen](name))
    wanted = [name for name, p in layer.named_parameters() if p.requires_grad]
    assert_identical(run(layer, x), {name: expected[name] for name in ("y", "x", *wanted)})
    if wanted:
        assert_identical(run(layer, x.detach()), {name: expected[name] for name in ("y", *wanted)})
    assert taken.call_count == 2 + bool(wanted)


@pytest.mark.parametrize("reentrant", [True, False])
def test_encoder_layer_checkpointed(device, reentrant, taken):
    layer, x = fast_layer(device, family="ConvBert", **DROPOUT)
    expected = run(layer, x)
    torch.manual_seed(7)
    y = checkpoint(call, layer, x, use_reentrant=reentrant)
    y.sin().sum().backward()
    gradients = {"x": x.grad, **{name: p.grad for name, p in layer.named_parameters()}}
    assert_identical({"y": y.detach(), **gradients}, expected)
    assert taken.call_count == 3
    with torch.no_grad():
        assert not torch.equal(call(layer, x), expected["y"])


def test_encoder_layer_checkpointed_with_a_mask_that_gets_a_gradient(device, taken):
    layer, x = fast_layer(device, **DROPOUT)
    mask = torch.zeros(2, 1, 1, 5, device=device).requires_grad_()

    def found(function) -> dict[str, torch.Tensor]:
        x.grad = mask.grad = None
        torch.manual_seed(7)
        y = function(layer, x, mask)
        y.sin().sum().backward()
        return {"y": y.detach(), "x": x.grad, "mask": mask.grad}

    assert_identical(found(functools.partial(checkpoint, call, use_reentrant=True)), found(call))
    assert taken.call_count == 0


@pytest.mark.parametrize("training", [True, False])
def test_encoder_layer_output_may_be_written_into(device, training, taken):
    layer, x = fast_layer(device, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    layer.train(training)
    expected = torch.autograd.grad((call(layer, x) + 1).sin().sum(), x)[0]
    y = call(layer, x)
    y.add_(1)
    assert torch.equal(torch.autograd.grad(y.sin().sum(), x)[0], expected)
    assert taken.call_count == 2


def test_encoder_layer_saves_nothing_for_frozen_weights(device, taken):
    def saved(layer: nn.Module, x: torch.Tensor) -> int:
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            call(layer, x)
        return sum(sizes)

    layer, x = fast_layer(device, family="ConvBert")
    every = saved(layer, x)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(not name.endswith("weight"))
    inner = layer.intermediate.dense.out_features
    # What goes into the feed-forward network's two products and into those of the convolutions.
    assert every - saved(layer, x) == 10 * (16 + inner + 16 + 8)


def test_encoder_layer_backward_twice(device):
    layer, x = fast_layer(device, family="ConvBert", **DROPOUT)
    loss = call(layer, x).sum()
    for _ in range(2):
        loss.backward(retain_graph=True)
    wanted = [x, *layer.parameters()]
    once = torch.autograd.grad(loss, wanted, retain_graph=True)
    torch.testing.assert_close([t.grad for t in wanted], [2 * d for d in once])
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(loss, x, create_graph=True)


WRITTEN = ("attention.self.key.weight", "attention.self.conv_kernel_layer.weight", "attention.output.LayerNorm.weight")
WRITTEN += ("intermediate.dense.bias", "output.dense.weight", "x")


@pytest.mark.parametrize("name", WRITTEN)
def test_encoder_layer_notices_a_write_before_the_backward(device, name):
    layer, x = fast_layer(device, family="ConvBert")
    x = x + 0
    y = call(layer, x)
    with torch.no_grad():
        (x if name == "x" else layer.get_parameter(name)).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_encoder_layer_with_hooks_on_saved_tensors(device):
    # What was saved counts, not what has become of it.
    layer, x = fast_layer(device)
    expected = run(layer, x)
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda t: t):
        y = call(layer, x)
    with torch.no_grad():
        layer.attention.self.key.weight.add_(1)
    torch.testing.assert_close(torch.autograd.grad(y.sin().sum(), x)[0], expected["x"])


@pytest.mark.parametrize("layout", ["transposed", "slice", "expanded"])
def test_encoder_layer_layouts(device, layout, taken):
    layer, x = fast_layer(device, family="ConvBert")
    wide = torch.randn(5, 2, 40, device=device)
    other = {
        "transposed": wide[..., :16].transpose(0, 1),
        "slice": wide[..., 3:19],
        "expanded": x[:1].expand(4, -1, -1),
    }
    x = other[layout].detach().requires_grad_()
    assert not x.is_contiguous()
    actual = run(layer, x)
    assert_identical(actual, run(layer, x.detach().contiguous().requires_grad_()))
    assert taken.call_count == 2


def test_encoder_layer_copies(device, taken):
    layer, x = fast_layer(device, family="ConvBert", **DROPOUT)
    expected = run(layer, x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert_identical(run(other, x), expected)
    assert taken.call_count == 3
    assert type(layer).__name__ == "EncoderLayer" and type(layer) is not type(fastconv.restore(copy.deepcopy(layer)))
    call(fastconv.restore(layer), x)
    assert taken.call_count == 3


# When the modules run


class Lora(nn.Module):
    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.out_features = base, base.out_features
        self.down, self.up = nn.Parameter(torch.randn(2, 16) / 4), nn.Parameter(torch.randn(base.out_features, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + x @ self.down.to(x).t() @ self.up.to(x).t()


class Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


def double(module, *found):
    return tuple(2 * t for t in found[-1]) if isinstance(found[-1], tuple) else 2 * found[-1]


CHANGES = {
    "a forward hook": lambda layer: layer.attention.output.dense.register_forward_hook(double),
    "a hook before a forward": lambda layer: layer.intermediate.register_forward_pre_hook(double),
    "a hook on gradients": lambda layer: layer.output.dropout.register_full_backward_hook(
        lambda module, found, _: tuple(2 * t for t in found)
    ),
    "a hook on the attention": lambda layer: layer.attention.self.register_forward_hook(
        lambda module, args, output: (2 * output[0], *output[1:])
    ),
    "a hook between": lambda layer: layer.attention.register_forward_pre_hook(lambda module, args: None),
    "an adapter": lambda layer: setattr(layer.attention.self, "query", Lora(layer.attention.self.query)),
    "an adapter in the network": lambda layer: setattr(layer.intermediate, "dense", Lora(layer.intermediate.dense)),
    "a parametrization": lambda layer: parametrize.register_parametrization(layer.output.dense, "weight", Doubled()),
    "a norm's parametrization": lambda layer: parametrize.register_parametrization(
        layer.output.LayerNorm, "weight", Doubled()
    ),
    "a method": lambda layer: setattr(
        layer.output.LayerNorm, "forward", lambda x: 2 * nn.LayerNorm.forward(layer.output.LayerNorm, x)
    ),
    "another module": lambda layer: setattr(layer.output, "dropout", nn.Hardtanh()),
    "a chunk size": lambda layer: setattr(layer, "chunk_size_feed_forward", 5),
}


@pytest.mark.parametrize("change", CHANGES)
def test_encoder_layer_that_was_changed(device, change, taken):
    layer, x = fast_layer(device)
    own = fastconv.restore(copy.deepcopy(layer))
    for each in (layer, own):
        torch.manual_seed(1)
        CHANGES[change](each)
    expected = run(own, x)
    actual = run(layer, x)
    assert taken.call_count == 0
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=1e-5 * largest(expected))


def test_encoder_layer_with_a_hook_of_its_own(device, taken):
    layer, x = fast_layer(device)
    expected = run(layer, x)["y"]
    layer.register_forward_hook(lambda module, args, output: (2 * output[0], *output[1:]))
    assert torch.equal(call(layer, x), 2 * expected) and taken.call_count == 2


@pytest.mark.parametrize("family", ["Bert", "ConvBert"])
def test_encoder_layer_runs_its_modules(device, family, taken):
    layer, x = fast_layer(device, family=family, attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0)
    for options in ({"output_attentions": True}, {"head_mask": torch.ones(1, 1, 1, 1, device=device)}):
        call(layer, x, **options)
    mask = torch.zeros(2, 1, 1, 5, device=device).requires_grad_()
    call(layer, x, mask).sum().backward()
    assert mask.grad is not None
    with torch.autocast(device.type, torch.bfloat16):
        call(layer, x)
    with fastconv.backend("native"):
        call(fastconv.accelerate(copy.deepcopy(layer), backend="auto"), x)
    with torch.no_grad():
        call(layer.eval(), x)
    call(layer.requires_grad_(False), x.detach())
    layer.requires_grad_(True).intermediate.fastconv_backend = "native"
    call(layer, x)
    assert taken.call_count == 0
    layer.intermediate.fastconv_backend = "triton"
    call(layer, x)
    assert taken.call_count == 1
    with pytest.raises(ValueError, match="mask must be broadcastable"):
        call(layer, x, torch.zeros(2, 1, 1, 4, device=device))


@pytest.mark.parametrize("family", ["Bert", "ConvBert"])
def test_encoder_layer_of_transformers_collects(family, device, taken):
    """Hidden states are collected by hooks that transformers 5 leaves, attentions by the original's forward."""
    model = make("transformers", family).to(device).train()
    inputs = {name: value[:2, :5].to(device) for name, value in make_inputs().items()}
    fast = fastconv.accelerate(copy.deepcopy(model), backend="triton")
    for options, calls in (({"output_hidden_states": True}, 1), ({"output_attentions": True}, 1), ({}, 2)):
        expected, actual = (tensors_of(each(**inputs, **options)) for each in (model, fast))
        assert taken.call_count == calls
        assert expected.keys() == actual.keys()
        for name, value in expected.items():
            torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=1e-5, msg=name)
    assert attention_of(fast)._forward_hooks or "attentions.0" not in expected
