"""grouped_linear against the reference: groups, activations, gradients, inference, shapes, layouts, transforms."""

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
from torch.utils._python_dispatch import TorchDispatchMode

import fastconv
from fastconv.ops import grouped_linear
from fastconv.reference.ops import ACTIVATIONS
from fastconv.reference.ops import grouped_linear as reference_grouped_linear

pytestmark = pytest.mark.usefixtures("poisoned_empty")

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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu"])
def test_grouped_linear_half_activations(backend, device, activation, dtype):
    inputs = make((9,), 2, 48, 64, dtype, device)
    assert_op_2x(*pair(activation), inputs)
    assert_inference_2x(*pair(activation), inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("tokens", "groups", "size_in", "size_out"),
    [(70, 1, 48, 384), (65, 2, 192, 128), (130, 4, 16, 160), (600, 1, 5, 70), (3, 16, 64, 48)],
)
def test_grouped_linear_blocks(backend, device, tokens, groups, size_in, size_out, dtype):
    # More than one block of tokens, of outputs and of inputs; 600 tokens are more than one set of neighbours.
    inputs = make((tokens,), groups, size_in, size_out, dtype, device)
    assert_op_2x(*pair("gelu"), inputs)
    assert_inference_2x(*pair("gelu"), inputs)


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


def test_grouped_linear_expanded_gradient(backend, device):
    for activation in (None, "gelu"):
        assert_op_2x(*pair(activation), make((4,), device=device), torch.ones((), device=device).expand(4, 10))


def test_grouped_linear_groups_do_not_mix(backend, device):
    inputs = make((3,), device=device)
    x = inputs["x"].requires_grad_()
    y = grouped_linear(**inputs)
    (dx,) = torch.autograd.grad(y[:, :5].sum(), x)
    assert dx[:, :6].abs().min() > 0 and torch.equal(dx[:, 6:], torch.zeros_like(dx[:, 6:]))


@pytest.mark.parametrize("activation", [None, "gelu"])
def test_grouped_linear_each_gradient(backend, device, activation):
    assert_each_gradient(*pair(activation), make((4,), device=device))


@pytest.mark.parametrize("activation", [None, "gelu"])
def test_grouped_linear_gradcheck(backend, device, activation):
    inputs = make((3,), dtype=torch.float64, device=device)
    op = pair(activation)[0]
    assert torch.autograd.gradcheck(
        lambda *given: op(**dict(zip(inputs, given, strict=True))), [t.requires_grad_() for t in inputs.values()]
    )


@pytest.mark.parametrize("activation", [None, "gelu"])
def test_grouped_linear_second_derivative(backend, device, activation):
    refused = "grouped_linear" if backend == "triton" else None
    assert_second_derivative(*pair(activation), make((3,), device=device), refused)


def test_grouped_linear_checkpointed(backend, device):
    assert_checkpointed(pair("gelu")[0], make((3,), device=device))


def test_grouped_linear_traced(backend, device):
    assert_traced(pair("gelu")[0], make((3,), device=device))


@pytest.mark.parametrize("activation", [None, "gelu"])
def test_grouped_linear_is_pure(backend, device, activation):
    assert_pure(pair(activation)[0], make((3, 4), device=device))


@pytest.mark.parametrize("activation", [None, "gelu"])
def test_grouped_linear_compiled(backend, device, activation):
    assert_compiled(pair(activation)[0], make((2, 3), device=device))


@pytest.mark.filterwarnings("ignore:.torch.jit.script")
def test_grouped_linear_transforms(backend, device):
    assert_transforms(*pair("gelu"), make((2, 3), device=device))


def test_grouped_linear_autocast(backend, device):
    assert_autocast_2x(*pair("gelu"), make((2, 3), device=device))


def test_grouped_linear_autocast_gradients(backend, device):
    inputs = make((2, 3), device=device)
    op, reference = (torch.autocast(device.type, torch.bfloat16)(function) for function in pair("gelu"))
    results = []
    for function in (op, reference, pair("gelu")[1]):
        wide = torch.float64 if len(results) == 2 else torch.float32
        given = {k: t.to(wide).requires_grad_() for k, t in inputs.items()}
        results.append(torch.autograd.grad(function(**given).to(wide).sin().sum(), list(given.values())))
    for name, *found in zip(inputs, *results, strict=True):
        assert found[0].dtype == torch.float32
        assert_2x(f"d{name}", *found, rounding=4 * torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize("name", ["x", "weight", "bias"])
def test_grouped_linear_mixed_dtypes(backend, device, name):
    inputs = make((3,), device=device)
    inputs[name] = inputs[name].half()
    with pytest.raises(TypeError, match=f"one dtype.*{name} torch.float16"):
        grouped_linear(**inputs)


def test_grouped_linear_opcheck(device):
    pytest.importorskip("triton", reason="the package triton is not installed")
    x, weight, bias = make((2, 3), device=device).values()
    forward = torch.ops.fastconv.grouped_linear_fwd.default
    for args in (
        (x, weight, bias, "gelu", True),
        (x, weight, None, None, False),
        (x.half(), with_layout(weight.half(), "transposed"), bias.half(), "relu", False),
    ):
        opcheck(forward, args)


def test_grouped_linear_strides_are_read_in_place(device):
    # A slice of a wider tensor must not be copied; nor may the transposed weight of the backward be.
    kernels = pytest.importorskip("fastconv.kernels._launch", reason="the kernels need triton")
    x = with_layout(torch.randn(2, 3, 12, device=device), "slice")
    assert kernels.rows(x).data_ptr() == x.data_ptr() and kernels.rows(x).stride() == (36, 1)


def test_grouped_linear_config():
    pick = pytest.importorskip("fastconv.kernels.grouped_linear", reason="the kernels need triton").pick_config
    card = importlib.import_module("fastconv.kernels._launch").INTERPRETER

    def tile(*shape, dtype=torch.bfloat16):
        config = pick("grouped_linear_fwd", shape, dtype, card)
        return config.block_t, config.block_n

    assert tile(8192, 2, 192, 768) == (128, 128)
    assert tile(8192, 2, 768, 192) == (128, 64)  # 192 outputs are no two blocks of 128
    assert tile(128, 2, 192, 768) == (64, 128)  # few tokens: more tiles
    assert tile(8192, 2, 192, 768, dtype=torch.float32) == (64, 64)
    assert tile(8192, 2, 24, 40) == (64, 32)  # sizes that are no multiples of 16


def test_grouped_linear_precision_of_fp32():
    precision = pytest.importorskip("fastconv.kernels.grouped_linear", reason="the kernels need triton").precision
    assert precision(torch.float32) == "ieee"
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    try:
        assert precision(torch.float32) == "tf32" and precision(torch.float64) == "ieee"
    finally:
        matmul.fp32_precision = before


def test_grouped_linear_in_a_feed_forward_network(backend, device):
    # The activation goes into the layer's kernel; an adapter or a hook on the layer still sees the call.
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_groups": 2}
    config = fastconv.reference.ConvBertConfig(**sizes)
    module = fastconv.reference.layers.Intermediate(config).to(device)
    x = torch.randn(2, 3, 16, device=device)
    expected = module(x)
    fastconv.accelerate(module)
    called = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            called.append(str(function))
            return function(*args, **(kwargs or {}))

    with torch.no_grad(), Recorder():
        y = module(x)
    torch.testing.assert_close(y, expected)
    if backend == "triton":
        assert called == ["fastconv.grouped_linear_fwd.default"]
    seen = []
    module.dense.register_forward_hook(lambda *_: seen.append(True))
    torch.testing.assert_close(module(x), expected)
    assert seen == [True]


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)], ids=str)
def test_grouped_linear_empty_batch(backend, device, shape):
    inputs = {k: t.requires_grad_() for k, t in make(shape, device=device).items()}
    y = grouped_linear(**inputs, activation="gelu")
    assert y.shape == (*shape, 10)
    y.sum().backward()
    assert torch.equal(inputs["weight"].grad, torch.zeros_like(inputs["weight"]))
    with torch.no_grad():
        assert grouped_linear(**inputs).shape == (*shape, 10)


@pytest.mark.parametrize(("size_in", "size_out"), [(0, 5), (6, 0)])
def test_grouped_linear_without_channels(backend, device, size_in, size_out):
    inputs = {k: t.nan_to_num() for k, t in make((3,), size_in=max(1, size_in), size_out=size_out).items()}
    inputs = {k: t.to(device) for k, t in inputs.items()}
    inputs |= {"x": inputs["x"][:, : 2 * size_in], "weight": inputs["weight"][:, :size_in]}
    torch.testing.assert_close(grouped_linear(**inputs), inputs["bias"].expand(3, 2 * size_out))


@pytest.mark.parametrize(
    "sizes", [(10, 12, 3), (12, 10, 3), (10, 12, 0), (10, 12, -2)], ids=["input", "output", "zero", "negative"]
)
def test_grouped_linear_module_groups_must_divide(sizes):
    with pytest.raises(ValueError, match=rf"divide size_in {sizes[0]} and size_out {sizes[1]}, got {sizes[2]}"):
        fastconv.nn.GroupedLinear(*sizes)


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
