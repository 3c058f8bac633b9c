"""packed_linear with a gradient: layers' outputs and gradients by one product, and where their parameters lie.

What it does to models, for inference above all, is in test_swap_weights.py.
"""

from __future__ import annotations

import copy

import pytest
import torch
from tolerance import assert_2x
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastconv
from fastconv.nn.packed_linear import _packs, packed_linear

SIZES = (4, 6, 3)


def make(device, bias=True, dtype=torch.float32):
    """Layers of one input, and that."""
    layers = nn.ModuleList(nn.Linear(8, size, bias=bias) for size in SIZES).to(device, dtype)
    return layers, torch.randn(2, 5, 8, device=device).to(dtype).requires_grad_()


def one_by_one(x, layers):
    return [layer(x) for layer in layers]


def gradients(function, layers, x):
    """The outputs and, by name, what x and the parameters get."""
    layers.zero_grad()
    outputs = function(x, layers)
    loss = sum((y.float() * torch.arange(y.numel(), device=y.device).view_as(y).cos()).sum() for y in outputs)
    wanted = {"x": x, **dict(layers.named_parameters())}
    wanted = {k: t for k, t in wanted.items() if t.requires_grad}
    return outputs, dict(zip(wanted, torch.autograd.grad(loss, wanted.values()), strict=True))


def assert_2x_of_layers(function, layers, x):
    """The function does what the layers do, by the 2x rule."""
    wide = copy.deepcopy(layers).double(), x.detach().double().requires_grad_(x.requires_grad)
    runs = gradients(function, layers, x), gradients(one_by_one, layers, x), gradients(one_by_one, *wide)
    for number, each in enumerate(zip(*(outputs for outputs, _ in runs), strict=True)):
        assert_2x(f"output {number}", *each)
    for name in runs[1][1]:
        assert_2x(name, *(found[name] for _, found in runs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_packed_linear_gradients(backend, device, bias, dtype):
    layers, x = make(device, bias, dtype)
    for _ in range(2):
        assert_2x_of_layers(packed_linear, layers, x)
    assert_2x_of_layers(packed_linear, layers, x.detach())
    assert_2x_of_layers(packed_linear, layers, x.detach().transpose(0, 1).requires_grad_())


@pytest.mark.parametrize("frozen", ["0.weight", "1.", "weight", "bias", ""])
def test_packed_linear_of_frozen_parameters(backend, device, frozen):
    layers, x = make(device)
    for name, p in layers.named_parameters():
        p.requires_grad_(frozen not in name)
    assert_2x_of_layers(packed_linear, layers, x)


def test_packed_linear_where_the_parameters_lie(backend, device):
    layers, x = make(device)
    gradients(packed_linear, layers, x)
    starts = [layer.weight.data_ptr() for layer in layers]
    ends = [layer.weight.data_ptr() + 4 * layer.weight.numel() for layer in layers]
    assert (starts[1:] == ends[:-1]) == (backend == "triton")
    # A step of an optimizer writes to what the product reads.
    torch.optim.SGD(layers.parameters(), lr=0.5).step()
    with torch.no_grad():
        layers[1].weight += 1
    assert_2x_of_layers(packed_linear, layers, x)


def test_packed_linear_of_parameters_that_cannot_move(backend, device):
    layers, x = make(device)
    layers[2].weight = nn.Parameter(torch.randn(5, 8, device=device)[:3])
    start = layers[2].weight.data_ptr()
    assert_2x_of_layers(packed_linear, layers, x)
    assert layers[2].weight.data_ptr() == start and layers[0] not in _packs


def test_packed_linear_of_parameters_that_moved(backend, device):
    layers, x = make(device)
    gradients(packed_linear, layers, x)
    layers.double().float()
    assert_2x_of_layers(packed_linear, layers, x)
    copied = copy.deepcopy(layers)
    with torch.no_grad():
        layers[0].weight.zero_()
    assert_2x_of_layers(packed_linear, copied, x)


def test_packed_linear_notices_a_write_before_the_backward(device):
    # As a layer alone does. What was concatenated isn't written to.
    pytest.importorskip("triton", reason="the package triton is not installed")
    layers, x = make(device)
    with fastconv.backend("triton"):
        outputs = packed_linear(x, layers)
    with torch.no_grad():
        layers[1].weight += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        sum(y.sum() for y in outputs).backward()


def saved_by(function, x, layers):
    """Where in memory that lies which a call saves for its backward."""
    found = set()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: found.add(t.data_ptr()) or t, lambda t: t):
        function(x, layers)
    return found


@pytest.mark.parametrize("frozen", ["weight", "bias", "x", ""])
def test_packed_linear_saves_what_the_layers_save(device, frozen):
    # No more memory, and whoever may write to a parameter before a layer's backward may do so here.
    pytest.importorskip("triton", reason="the package triton is not installed")
    layers, x = make(device)
    for name, t in [("x", x), *layers.named_parameters()]:
        t.requires_grad_(not frozen or frozen not in name)
    with fastconv.backend("triton"):
        packed_linear(x, layers)  # moves the parameters
        found = saved_by(packed_linear, x, layers)
    assert found == saved_by(one_by_one, x, layers) != set()


def test_packed_linear_with_hooks_on_saved_tensors(backend, device):
    # With hooks torch doesn't look for writes before the backward: what the hooks kept counts.
    layers, x = make(device)
    expected = gradients(one_by_one, layers, x)[1]["x"]
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda t: t):
        outputs = packed_linear(x, layers)
    loss = sum((y * torch.arange(y.numel(), device=y.device).view_as(y).cos()).sum() for y in outputs)
    with torch.no_grad():
        layers[1].weight += 1
    torch.testing.assert_close(torch.autograd.grad(loss, x)[0], expected)


@pytest.mark.parametrize("training", [True, False])
def test_packed_linear_moves_nothing_in_a_capture(backend, device, training, monkeypatch):
    layers, x = make(device)
    with torch.no_grad():  # what a graph holds doesn't move anyway
        expected = one_by_one(x, layers)
    places = [layer.weight.data_ptr() for layer in layers]
    for name in ("is_initialized", "is_current_stream_capturing"):
        monkeypatch.setattr(torch.cuda, name, lambda: True)
    with torch.set_grad_enabled(training):
        torch.testing.assert_close(packed_linear(x, layers), expected)
    assert places == [layer.weight.data_ptr() for layer in layers]


def test_packed_linear_moves_before_another_stream_looks(device):
    if device.type != "cuda":
        pytest.skip("only a GPU has streams")
    layers, x = make(device)
    expected = [p.detach().clone() for p in layers.parameters()]
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()), torch.no_grad():
        torch.cuda._sleep(10**8)
        packed_linear(x, layers)
    assert layers[0] in _packs and all(map(torch.equal, layers.parameters(), expected))


@pytest.mark.parametrize("reentrant", [True, False])
def test_packed_linear_checkpointed(backend, device, reentrant):
    layers, x = make(device)
    found = []
    for function in (lambda f, x: f(x), lambda f, x: checkpoint(f, x, use_reentrant=reentrant)):
        layers.zero_grad()
        outputs = function(lambda x: tuple(packed_linear(x, layers)), x)
        sum(y.sin().sum() for y in outputs).backward()
        found.append([p.grad for p in layers.parameters()])
    torch.testing.assert_close(*found)


def test_packed_linear_under_autocast(backend, device):
    layers, x = make(device)
    with torch.autocast(device.type, torch.bfloat16):
        outputs, found = gradients(packed_linear, layers, x)
        _, expected = gradients(one_by_one, layers, x)
    _, truth = gradients(one_by_one, copy.deepcopy(layers).double(), x.detach().double().requires_grad_())
    assert all(y.dtype == torch.bfloat16 for y in outputs)
    for name in truth:
        assert_2x(name, found[name], expected[name], truth[name], rounding=torch.finfo(torch.bfloat16).eps)


def test_packed_linear_second_derivative(device):
    layers, x = make(device)

    def run():
        (dx,) = torch.autograd.grad(sum(y.sin().sum() for y in packed_linear(x, layers)), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), x)

    with fastconv.backend("native"):
        run()
    pytest.importorskip("triton", reason="the package triton is not installed")
    with fastconv.backend("triton"), pytest.raises(NotImplementedError, match="no second derivative"):
        run()


def test_packed_linear_compiled(backend, device):
    layers, x = make(device)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: packed_linear(x, list(layers)), backend="aot_eager", fullgraph=True)
    assert_2x_of_layers(lambda x, _: compiled(x), layers, x)
