"""grouped_linear against the reference: groups, activations, gradients, inference, shapes, layouts, transforms."""

from __future__ import annotations

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

from fastconv.ops import grouped_linear
from fastconv.reference.ops import ACTIVATIONS
from fastconv.reference.ops import grouped_linear as reference_grouped_linear

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def make(shape, groups=2, size_in=6, size_out=5, dtype=torch.float32, device="cpu"):
    """Inputs of grouped_linear: x (*shape, groups * size_in), weight and bias."""
    return {
        "x": torch.randn(*shape, groups * size_in).to(device, dtype),
        "weight": (1.5 * torch.randn(groups, size_in, size_out) / size_in**0.5).to(device, dtype),
        "bias": (0.5 * torch.randn(groups * size_out)).to(device, dtype),
    }


def pair(activation=None):
    """The op and its reference with one activation."""
    return (
        lambda **t: grouped_linear(**t, activation=activation),
        lambda **t: reference_grouped_linear(**t, activation=activation),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("groups", [1, 2, 3, 4, 8, 16])
def test_grouped_linear_parity(backend, device, groups, dtype):
    inputs = make((2, 5), groups, 7, 9, dtype, device)
    assert_op_2x(*pair(), inputs)
    assert_inference_2x(*pair(), inputs)
    assert_fp64(*pair(), inputs)


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_grouped_linear_activations(backend, device, activation):
    inputs = make((2, 5), device=device)
    assert_op_2x(*pair(activation), inputs)
    assert_inference_2x(*pair(activation), inputs)


@pytest.mark.parametrize("size", ODD)
def test_grouped_linear_sizes(backend, device, size):
    for inputs in (
        make((size,), device=device),
        make((3,), size_in=size, device=device),
        make((3,), size_out=size, device=device),
    ):
        assert_op_2x(*pair(), inputs)
        assert_inference_2x(*pair(), inputs)


@pytest.mark.parametrize("shape", [(), (3,), (2, 1, 3)], ids=str)
def test_grouped_linear_dimensions(backend, device, shape):
    inputs = make(shape, device=device)
    assert_op_2x(*pair("gelu"), inputs)
    assert_inference_2x(*pair("gelu"), inputs)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_grouped_linear_layouts(backend, device, layout, dtype):
    inputs = make((3, 4), dtype=dtype, device=device)
    for name in ("x", "weight"):
        changed = inputs | {name: with_layout(inputs[name], layout)}
        assert_op_2x(*pair(), changed, with_layout(torch.randn(3, 4, 10, device=device).to(dtype), layout))
        assert_inference_2x(*pair(), changed)


def test_grouped_linear_strided_bias(backend, device):
    inputs = make((3,), device=device)
    inputs["bias"] = torch.randn(30, device=device)[::3]
    assert_op_2x(*pair(), inputs)
    assert_inference_2x(*pair(), inputs)


def test_grouped_linear_groups_do_not_mix(backend, device):
    inputs = make((3,), device=device)
    x = inputs["x"].requires_grad_()
    y = grouped_linear(**inputs)
    (dx,) = torch.autograd.grad(y[:, :5].sum(), x)
    assert dx[:, :6].abs().min() > 0 and torch.equal(dx[:, 6:], torch.zeros_like(dx[:, 6:]))


def test_grouped_linear_each_gradient(backend, device):
    assert_each_gradient(*pair("gelu"), make((4,), device=device))


def test_grouped_linear_gradcheck(backend, device):
    inputs = make((3,), dtype=torch.float64, device=device)
    assert torch.autograd.gradcheck(grouped_linear, [t.requires_grad_() for t in inputs.values()])


def test_grouped_linear_is_pure(backend, device):
    assert_pure(grouped_linear, make((3, 4), device=device))


@pytest.mark.parametrize("activation", [None, "gelu"])
def test_grouped_linear_compiled(backend, device, activation):
    assert_compiled(pair(activation)[0], make((2, 3), device=device))


@pytest.mark.filterwarnings("ignore:.torch.jit.script")
def test_grouped_linear_transforms(backend, device):
    assert_transforms(*pair("gelu"), make((2, 3), device=device))


def test_grouped_linear_autocast(backend, device):
    assert_autocast_2x(*pair("gelu"), make((2, 3), device=device))


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)], ids=str)
def test_grouped_linear_empty_batch(backend, device, shape):
    inputs = {k: t.requires_grad_() for k, t in make(shape, device=device).items()}
    y = grouped_linear(**inputs, activation="gelu")
    assert y.shape == (*shape, 10)
    y.sum().backward()
    assert torch.equal(inputs["weight"].grad, torch.zeros_like(inputs["weight"]))
    with torch.no_grad():
        assert grouped_linear(**inputs).shape == (*shape, 10)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.ones(3, 12, dtype=torch.int32)}, TypeError, r"x must be a real floating.*int32"),
        ({"x": torch.ones(3, 12, dtype=torch.complex64)}, TypeError, r"x must be a real floating.*complex64"),
        ({"x": torch.ones(3, 11)}, ValueError, r"\(\.\.\., 12\) for a weight .* = \(2, 6, 5\), got \(3, 11\)"),
        ({"x": torch.tensor(1.0)}, ValueError, r"got \(\)"),
        ({"weight": torch.ones(12, 5)}, ValueError, r"weight must have shape \(G, I, O\), got \(12, 5\)"),
        ({"bias": torch.ones(5)}, ValueError, r"bias must have shape \(G\*O,\) = \(10,\), got \(5,\)"),
        ({"weight": torch.ones(2, 6, 5, device="meta")}, ValueError, r"x is on cpu but weight is on meta"),
        ({"activation": "gelo"}, ValueError, r"activation must be one of gelu, .*got 'gelo'"),
    ],
)
def test_grouped_linear_bad_input(backend, changes, error, message):
    with pytest.raises(error, match=message):
        grouped_linear(**(make((3,)) | changes))
