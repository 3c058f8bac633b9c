"""packed_linear with a gradient: layers' outputs and gradients by one product, and where their parameters lie.

What it does to models, for inference above all, is in test_swap_weights.py.
"""

from __future__ import annotations

import copy

import pytest
import torch
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


def assert_equal(function, layers, x, dtype=torch.float32):
    """The function does what the layers do."""
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.float16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(gradients(function, layers, x), gradients(one_by_one, layers, x), **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_packed_linear_gradients(backend, device, bias, dtype):
    layers, x = make(device, bias, dtype)
    for _ in range(2):
        assert_equal(packed_linear, layers, x, dtype)
    assert_equal(packed_linear, layers, x.detach(), dtype)
    assert_equal(packed_linear, layers, x.detach().transpose(0, 1).requires_grad_(), dtype)


@pytest.mark.parametrize("frozen", ["0.weight", "1.", "weight", "bias", ""])
def test_packed_linear_of_frozen_parameters(backend, device, frozen):
    layers, x = make(device)
    for name, p in layers.named_parameters():
        p.requires_grad_(frozen not in name)
    assert_equal(packed_linear, layers, x)


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
    assert_equal(packed_linear, layers, x)


def test_packed_linear_of_parameters_that_cannot_move(backend, device):
    layers, x = make(device)
    layers[2].weight = nn.Parameter(torch.randn(5, 8, device=device)[:3])
    start = layers[2].weight.data_ptr()
    assert_equal(packed_linear, layers, x)
    assert layers[2].weight.data_ptr() == start and layers[0] not in _packs


def test_packed_linear_of_parameters_that_moved(backend, device):
    layers, x = make(device)
    gradients(packed_linear, layers, x)
    layers.double().float()
    assert_equal(packed_linear, layers, x)
    copied = copy.deepcopy(layers)
    with torch.no_grad():
        layers[0].weight.zero_()
    assert_equal(packed_linear, copied, x)


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
    assert all(y.dtype == torch.bfloat16 for y in outputs)
    torch.testing.assert_close(found, expected, rtol=3e-2, atol=3e-2)


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
    assert_equal(lambda x, _: compiled(x), layers, x)
