"""separable_conv against the reference: kernel sizes, gate, gradients, inference, shapes, layouts, transforms."""

from __future__ import annotations

import importlib

import pytest
import torch
from op_suite import (
    assert_autocast_2x,
    assert_compiled,
    assert_each_gradient,
    assert_fp64,
    assert_inference_2x,
    assert_pure,
    assert_transforms,
)
from shapes import LAYOUTS, ODD, with_layout
from tolerance import assert_op_2x

from fastconv.ops import separable_conv
from fastconv.reference.ops import separable_conv as reference_separable_conv

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def make(B=2, S=11, C=6, K=5, O=4, dtype=torch.float32, device="cpu", gate=True):  # noqa: E741
    """Inputs of separable_conv."""
    inputs = {
        "x": torch.randn(B, S, C),
        "depthwise": torch.randn(C, 1, K) / K**0.5,
        "pointwise": torch.randn(O, C, 1) / C**0.5,
        "bias": 0.5 * torch.randn(O, 1),
    }
    inputs |= {"gate": torch.randn(B, S, O)} if gate else {}
    return {k: t.to(device, dtype) for k, t in inputs.items()}


def assert_parity(inputs, dy=None):
    """The 2x rule with and without gradients."""
    assert_op_2x(separable_conv, reference_separable_conv, inputs, dy)
    assert_inference_2x(separable_conv, reference_separable_conv, inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel_size", [1, 3, 5, 7, 9, 15, 31])
def test_separable_conv_parity(backend, device, kernel_size, dtype):
    assert_parity(make(S=20, K=kernel_size, dtype=dtype, device=device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_separable_conv_without_gate(backend, device, dtype):
    assert_parity(make(dtype=dtype, device=device, gate=False))


@pytest.mark.parametrize("length", [1, 2, 4, 8, 9, 63, 65, 127])
def test_separable_conv_lengths(backend, device, length):
    assert_parity(make(S=length, K=9, device=device))


@pytest.mark.parametrize("size", ODD)
def test_separable_conv_channels(backend, device, size):
    assert_parity(make(C=size, device=device))
    assert_parity(make(O=size, device=device))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_separable_conv_layouts(backend, device, layout, dtype):
    inputs = make(dtype=dtype, device=device)
    dy = with_layout(torch.randn(2, 11, 4, device=device).to(dtype), layout)
    for name in ("x", "gate", "depthwise", "pointwise"):
        assert_parity(inputs | {name: with_layout(inputs[name], layout)}, dy)


def test_separable_conv_strided_bias(backend, device):
    inputs = make(device=device)
    assert_parity(inputs | {"bias": torch.randn(4, 3, device=device)[:, :1]})
    assert_parity(inputs | {"x": torch.randn(1, 1, 6, device=device).expand(2, 11, 6)})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_separable_conv_shift_and_add(device, dtype):
    # What a GPU runs, and a CPU in fp64 only: in half precision too it keeps the 2x rule, since its sums are fp32.
    shift_and_add = importlib.import_module("fastconv.ops.separable_conv")._shift_and_add

    def conv1d(x, weight):
        return torch.nn.functional.conv1d(x.transpose(1, 2), weight, padding=15, groups=5).transpose(1, 2)

    inputs = make(C=5, K=31, S=40, dtype=dtype, device=device)
    assert_op_2x(shift_and_add, conv1d, {"x": inputs["x"], "weight": inputs["depthwise"]})
    # Large sums on the way to a small one.
    inputs["depthwise"][:, :, :15] += 8
    inputs["depthwise"][:, :, 16:] -= 8
    assert_op_2x(shift_and_add, conv1d, {"x": 1 + 0.1 * inputs["x"], "weight": inputs["depthwise"]})


@pytest.mark.parametrize("kernel_size", [1, 9])
def test_separable_conv_fp64(backend, device, kernel_size):
    assert_fp64(separable_conv, reference_separable_conv, make(K=kernel_size, device=device))


def test_separable_conv_is_local(backend, device):
    inputs = make(S=11, K=5, device=device)
    x = inputs["x"].requires_grad_()
    (dx,) = torch.autograd.grad(separable_conv(**inputs)[:, 4].sum(), x)
    assert dx[:, 2:7].abs().min() > 0
    assert torch.equal(dx[:, :2], torch.zeros_like(dx[:, :2])) and torch.equal(dx[:, 7:], torch.zeros_like(dx[:, 7:]))


def test_separable_conv_each_gradient(backend, device):
    assert_each_gradient(separable_conv, reference_separable_conv, make(device=device))
    assert_each_gradient(separable_conv, reference_separable_conv, make(device=device, gate=False))


def test_separable_conv_gradcheck(backend, device):
    inputs = make(S=4, C=3, K=3, O=2, dtype=torch.float64, device=device)

    def op(x, depthwise, pointwise, bias, gate):
        return separable_conv(x, depthwise, pointwise, bias, gate=gate)

    assert torch.autograd.gradcheck(op, [t.requires_grad_() for t in inputs.values()])


def test_separable_conv_is_pure(backend, device):
    assert_pure(separable_conv, make(device=device))


@pytest.mark.parametrize("gate", [True, False])
def test_separable_conv_compiled(backend, device, gate):
    assert_compiled(separable_conv, make(device=device, gate=gate))


@pytest.mark.parametrize("gate", [True, False])
def test_separable_conv_transforms(backend, device, gate):
    assert_transforms(separable_conv, reference_separable_conv, make(S=5, device=device, gate=gate))


def test_separable_conv_autocast(backend, device):
    assert_autocast_2x(separable_conv, reference_separable_conv, make(device=device))


@pytest.mark.parametrize(("B", "S"), [(0, 5), (2, 0), (0, 0)])
@pytest.mark.parametrize("gate", [True, False])
def test_separable_conv_empty_batch(backend, device, B, S, gate):
    inputs = {k: t.requires_grad_() for k, t in make(B=B, S=S, device=device, gate=gate).items()}
    y = separable_conv(**inputs)
    assert y.shape == (B, S, 4) and y.dtype == torch.float32
    with torch.no_grad():
        assert separable_conv(**inputs).shape == (B, S, 4)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.ones(2, 11, 6, dtype=torch.int64)}, TypeError, r"x must be a real floating.*int64"),
        ({"gate": torch.ones(2, 11, 4, dtype=torch.bool)}, TypeError, r"gate must be.*bool"),
        ({"depthwise": torch.ones(6, 1, 4)}, ValueError, r"kernel_size must be odd, got 4"),
        ({"depthwise": torch.ones(6, 1, 0)}, ValueError, r"kernel_size must be odd, got 0"),
        (
            {"depthwise": torch.ones(5, 1, 3)},
            ValueError,
            r"depthwise must have shape .* = \(6, 1, 3\), got \(5, 1, 3\)",
        ),
        ({"depthwise": torch.ones(6, 3)}, ValueError, r"\(C, 1, K\) and \(O, C, 1\), got \(6, 3\)"),
        ({"pointwise": torch.ones(4, 6, 2)}, ValueError, r"pointwise must have shape .* = \(4, 6, 1\)"),
        ({"bias": torch.ones(4)}, ValueError, r"bias must have shape \(O, 1\) = \(4, 1\), got \(4,\)"),
        ({"gate": torch.ones(2, 11, 1)}, ValueError, r"gate must have shape .* = \(2, 11, 4\), got \(2, 11, 1\)"),
        ({"x": torch.ones(11, 6)}, ValueError, r"x must have shape \(B, S, C\), got \(11, 6\)"),
        ({"gate": torch.ones(2, 11, 4, device="meta")}, ValueError, r"x is on cpu but gate is on meta"),
    ],
)
def test_separable_conv_bad_input(backend, changes, error, message):
    with pytest.raises(error, match=message):
        separable_conv(**(make() | changes))
