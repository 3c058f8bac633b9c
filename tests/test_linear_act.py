"""linear_act against the reference: every activation, gradients, inference, shapes, layouts, transforms, bad input."""

from __future__ import annotations

import importlib

import pytest
import torch
from op_suite import (
    assert_autocast_2x,
    assert_checkpointed,
    assert_compiled,
    assert_each_gradient,
    assert_fp64,
    assert_inference_2x,
    assert_pure,
    assert_second_derivative,
    assert_traced,
    assert_transforms,
)
from shapes import LAYOUTS, ODD, with_layout
from tolerance import assert_2x, assert_op_2x
from torch.library import opcheck

from fastconv.ops import linear_act
from fastconv.reference.ops import ACTIVATIONS
from fastconv.reference.ops import linear_act as reference_linear_act

pytestmark = pytest.mark.usefixtures("poisoned_empty")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
EVERY_ACTIVATION = (None, *ACTIVATIONS)


def make(shape, size_out, dtype=torch.float32, device="cpu", bias=True):
    """Inputs of linear_act: x of `shape`, weight and bias."""
    size_in = shape[-1]
    inputs = {
        "x": torch.randn(shape).to(device, dtype),
        "weight": (1.5 * torch.randn(size_out, size_in) / size_in**0.5).to(device, dtype),
    }
    return inputs | ({"bias": (0.5 * torch.randn(size_out)).to(device, dtype)} if bias else {})


def pair(activation):
    """The op and its reference with one activation."""
    return (
        lambda x, weight, bias=None: linear_act(x, weight, bias, activation),
        lambda x, weight, bias=None: reference_linear_act(x, weight, bias, activation),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", EVERY_ACTIVATION)
def test_linear_act_parity(backend, device, activation, dtype):
    inputs = make((3, 5, 24), 20, dtype, device)
    assert_op_2x(*pair(activation), inputs)
    assert_inference_2x(*pair(activation), inputs)
    assert_fp64(*pair(activation), inputs)


@pytest.mark.parametrize("size", ODD)
def test_linear_act_sizes(backend, device, size):
    for shape, size_out in (((size, 5), 4), ((2, size), 3), ((2, 6), size)):
        inputs = make(shape, size_out, device=device)
        assert_op_2x(*pair("gelu"), inputs)
        assert_inference_2x(*pair("gelu"), inputs)


@pytest.mark.parametrize("shape", [(7,), (2, 7), (2, 1, 3, 7)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_linear_act_dimensions(backend, device, shape, bias):
    inputs = make(shape, 5, device=device, bias=bias)
    assert_op_2x(*pair("silu"), inputs)
    assert_inference_2x(*pair("silu"), inputs)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linear_act_layouts(backend, device, layout, dtype):
    inputs = make((3, 5, 12), 10, dtype, device)
    for name in ("x", "weight"):
        changed = inputs | {name: with_layout(inputs[name], layout)}
        assert_op_2x(*pair("gelu"), changed, with_layout(torch.randn(3, 5, 10, device=device).to(dtype), layout))
        assert_inference_2x(*pair("gelu"), changed)


def test_linear_act_strided_bias(backend, device):
    # oneDNN would read the bias's memory as if it were contiguous.
    inputs = make((3, 12), 10, device=device)
    inputs["bias"] = torch.randn(30, device=device)[::3]
    assert_op_2x(*pair("gelu"), inputs)
    assert_inference_2x(*pair("gelu"), inputs)
    assert_inference_2x(*pair("gelu"), inputs | {"bias": torch.randn(1, device=device).expand(10)})


def test_linear_act_broadcast_rows(backend, device):
    inputs = make((1, 12), 10, device=device)
    inputs["x"] = inputs["x"].expand(6, 12)
    assert_inference_2x(*pair(None), inputs)


@pytest.mark.parametrize("activation", EVERY_ACTIVATION)
def test_linear_act_nan_stays_nan(backend, device, activation):
    x = torch.full((2, 1), float("nan"), device=device)
    x[1] = 1.0
    y = linear_act(x, torch.ones(3, 1, device=device), torch.zeros(3, device=device), activation)
    assert y[0].isnan().all() and y[1].isfinite().all()


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", EVERY_ACTIVATION)
def test_linear_act_large_values(backend, device, activation, dtype):
    x = torch.tensor([1e30, -1e30, 300.0, -300.0, 20.0, -20.0, 1e-30, 0.0], device=device).to(dtype)[:, None]
    arguments = (torch.ones(1, 1, device=device, dtype=dtype), torch.zeros(1, device=device, dtype=dtype), activation)
    expected = reference_linear_act(x, *arguments)
    if backend == "triton":
        # The kernel computes in fp32, where laplace in bf16 is off by 4 %.
        expected = reference_linear_act(x.float(), *(t.float() for t in arguments[:2]), activation).to(dtype)
    torch.testing.assert_close(linear_act(x, *arguments), expected)


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_linear_act_scales(backend, device, activation):
    # Of small values, too, none may lose its digits, nor may its derivative.
    op, reference = (
        lambda x, function=function: function(x, torch.ones(1, 1, device=x.device, dtype=x.dtype))
        for function in pair(activation)
    )
    for scale in (1e-6, 1e-3, 0.3, 4.0, 30.0):
        assert_op_2x(op, reference, {"x": scale * torch.randn(64, 1, device=device)})


@pytest.mark.parametrize("activation", ["relu", "relu6", "hardswish", "leaky_relu", "relu2", "gelu_10"])
def test_linear_act_derivative_at_a_kink(backend, device, activation):
    kinks = torch.tensor([0.0, -0.0, 3.0, -3.0, 6.0, 10.0, -10.0], device=device)[:, None]
    gradients = []
    for function in pair(activation):
        x = kinks.clone().requires_grad_()
        gradients.append(torch.autograd.grad(function(x, torch.ones(1, 1, device=device)).sum(), x)[0])
    torch.testing.assert_close(*gradients)


def test_linear_act_knows_every_activation():
    kernels = pytest.importorskip("fastconv.kernels._activations", reason="the kernels need triton")
    assert set(kernels.FUNCTIONS) == set(ACTIVATIONS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "size_in", "size_out"), [(70, 48, 384), (3, 384, 64), (130, 64, 130), (300, 7, 9)])
def test_linear_act_blocks(backend, device, tokens, size_in, size_out, dtype):
    # More than one block of tokens and of channels; 300 tokens are more blocks than the backward has programs.
    inputs = make((tokens, size_in), size_out, dtype, device)
    assert_op_2x(*pair("gelu"), inputs)
    assert_inference_2x(*pair("gelu"), inputs)


def test_linear_act_expanded_gradient(backend, device):
    inputs = make((4, 6), 10, device=device)
    assert_op_2x(*pair("gelu"), inputs, torch.ones((), device=device).expand(4, 10))


def test_linear_act_one_tensor_in_two_slots(backend, device):
    x = torch.randn(6, 6, device=device)
    results = []
    for function in pair("gelu"):
        leaf = x.clone().requires_grad_()
        results.append(torch.autograd.grad(function(leaf, leaf).sin().sum(), leaf)[0])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("activation", [None, "gelu", "relu"])
def test_linear_act_each_gradient(backend, device, activation):
    assert_each_gradient(*pair(activation), make((4, 12), 10, device=device))


def test_linear_act_gradcheck(backend, device):
    inputs = make((3, 5), 4, torch.float64, device)
    assert torch.autograd.gradcheck(pair("gelu")[0], [t.requires_grad_() for t in inputs.values()])


@pytest.mark.parametrize("activation", [None, "gelu"])
def test_linear_act_second_derivative(backend, device, activation):
    refused = "linear_act" if backend == "triton" and activation else None
    assert_second_derivative(*pair(activation), make((3, 12), 10, device=device), refused)


def test_linear_act_checkpointed(backend, device):
    assert_checkpointed(pair("gelu")[0], make((3, 12), 10, device=device))


def test_linear_act_traced(backend, device):
    assert_traced(pair("gelu")[0], make((3, 12), 10, device=device))


def test_linear_act_is_pure(backend, device):
    assert_pure(pair("gelu")[0], make((3, 5, 12), 10, device=device))


@pytest.mark.parametrize("activation", [None, "gelu", "gelu_new", "relu"])
def test_linear_act_compiled(backend, device, activation):
    assert_compiled(pair(activation)[0], make((3, 12), 10, device=device))


@pytest.mark.filterwarnings("ignore:.torch.jit.script")
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_linear_act_transforms(backend, device, activation):
    assert_transforms(*pair(activation), make((3, 12), 10, device=device))


def test_linear_act_autocast(backend, device):
    inputs = make((3, 12), 10, device=device)
    assert_autocast_2x(*pair("gelu"), inputs)
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
        assert linear_act(**inputs, activation="gelu").dtype == torch.bfloat16


@pytest.mark.parametrize("activation", [None, "gelu"])
def test_linear_act_autocast_gradients(backend, device, activation):
    # Computed in autocast's dtype, given in the parameters' own; x may have either.
    inputs = make((3, 12), 10, device=device)
    op, reference = (torch.autocast(device.type, torch.bfloat16)(function) for function in pair(activation))
    results = []
    for function, given in ((op, inputs), (reference, inputs), (pair(activation)[1], inputs)):
        wide = torch.float64 if len(results) == 2 else torch.float32
        given = {k: t.to(wide).requires_grad_() for k, t in given.items()}
        results.append(torch.autograd.grad(function(**given).to(wide).sin().sum(), list(given.values())))
    for name, *found in zip(inputs, *results, strict=True):
        assert found[0].dtype == torch.float32
        assert_2x(f"d{name}", *found, rounding=4 * torch.finfo(torch.bfloat16).eps)
    with torch.autocast(device.type, torch.bfloat16):
        assert linear_act(inputs["x"].bfloat16(), inputs["weight"], inputs["bias"], activation).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["x", "weight", "bias"])
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_linear_act_mixed_dtypes(backend, device, activation, name):
    inputs = make((3, 12), 10, device=device)
    inputs[name] = inputs[name].half()
    with pytest.raises(TypeError, match=f"one dtype.*{name} torch.float16"):
        linear_act(**inputs, activation=activation)


def test_linear_act_opcheck(device):
    pytest.importorskip("triton", reason="the package triton is not installed")
    product, vector = torch.randn(3, 5, 12, device=device), torch.randn(12, device=device)
    forward, backward = torch.ops.fastconv.linear_act_fwd.default, torch.ops.fastconv.grouped_linear_bwd.default
    for z, bias in ((product, vector), (product.half(), None), (product[..., ::2], vector[::2])):
        opcheck(forward, (z, bias, "gelu"))
        opcheck(backward, (torch.randn_like(z), z, bias, "gelu"))


def test_linear_act_choice_of_the_product():
    fuses = importlib.import_module("fastconv.ops.linear_act").fuses
    assert fuses(768, torch.bfloat16, training=False)
    assert not fuses(768, torch.bfloat16, training=True)
    assert not fuses(768, torch.float32, training=False)
    assert not fuses(3072, torch.float16, training=False)


@pytest.mark.parametrize("size_in", [1536, 1537])
def test_linear_act_both_products(backend, device, size_in):
    inputs = make((3, size_in), 5, torch.float16, device)
    assert_inference_2x(*pair("gelu"), inputs)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_linear_act_trace_is_whole(device):
    # A traced model is run with other weights, dtypes and gradients than it was traced with.
    inputs = make((3, 12), 10, device=device)
    with torch.no_grad():
        traced = torch.jit.trace(pair("gelu")[0], tuple(inputs.values()))
        assert "mkldnn" not in str(traced.graph)


def test_linear_act_of_fake_tensors(device):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), torch.no_grad():
        inputs = make((3, 12), 10)
        assert linear_act(**inputs, activation="gelu").shape == (3, 10)


class OnlyLinear(torch.Tensor):
    """A tensor subclass that, as quantized weights may, knows torch's own linear and nothing of oneDNN's."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        assert "mkldnn" not in str(function)
        return super().__torch_function__(function, types, args, kwargs or {})


@pytest.mark.parametrize("name", ["x", "weight", "bias"])
def test_linear_act_of_a_tensor_subclass(backend, device, name):
    inputs = make((3, 12), 10, device=device)
    expected = reference_linear_act(**inputs, activation="gelu")
    with torch.no_grad():
        y = linear_act(**inputs | {name: inputs[name].as_subclass(OnlyLinear)}, activation="gelu")
    assert type(y) is OnlyLinear
    torch.testing.assert_close(y.as_subclass(torch.Tensor), expected)


@pytest.mark.parametrize("shape", [(0, 12), (2, 0, 12)], ids=str)
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_linear_act_empty_batch(backend, device, shape, activation):
    inputs = {k: t.requires_grad_() for k, t in make(shape, 10, device=device).items()}
    y = linear_act(**inputs, activation=activation)
    assert y.shape == (*shape[:-1], 10)
    y.sum().backward()
    assert torch.equal(inputs["weight"].grad, torch.zeros_like(inputs["weight"]))
    with torch.no_grad():
        assert linear_act(**inputs, activation=activation).shape == (*shape[:-1], 10)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.ones(4, 12, dtype=torch.int64)}, TypeError, r"x must be a real floating.*int64"),
        ({"x": torch.ones(4, 12, dtype=torch.complex64)}, TypeError, r"x must be a real floating.*complex64"),
        ({"weight": torch.ones(10, 12, dtype=torch.bool)}, TypeError, r"weight must be.*bool"),
        ({"x": [1.0]}, TypeError, r"x must be a torch.Tensor, got list"),
        ({"x": torch.ones(4, 11)}, ValueError, r"\(\.\.\., I\) and \(O, I\), got \(4, 11\) and \(10, 12\)"),
        ({"x": torch.tensor(1.0)}, ValueError, r"got \(\) and \(10, 12\)"),
        ({"weight": torch.ones(12)}, ValueError, r"got \(4, 12\) and \(12,\)"),
        ({"bias": torch.ones(1)}, ValueError, r"bias must have shape \(O,\) = \(10,\), got \(1,\)"),
        ({"bias": torch.ones(10, device="meta")}, ValueError, r"x is on cpu but bias is on meta"),
        ({"activation": "gelo"}, ValueError, r"activation must be one of gelu, .*got 'gelo'"),
        ({"activation": torch.relu}, ValueError, r"activation must be one of"),
    ],
)
def test_linear_act_bad_input(backend, changes, error, message):
    with pytest.raises(error, match=message):
        linear_act(**({**make((4, 12), 10), "activation": None} | changes))
