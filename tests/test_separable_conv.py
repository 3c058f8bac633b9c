"""separable_conv against the reference: kernel sizes, gate, gradients, shapes, layouts, packing, transforms, ops."""

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
from tolerance import assert_op_2x
from torch.library import opcheck

import fastconv
from fastconv import Packing
from fastconv.ops import separable_conv
from fastconv.reference.ops import separable_conv as reference_separable_conv

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

pytestmark = pytest.mark.usefixtures("poisoned_empty")


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


def assert_parity(inputs, dy=None, roundings=1):
    """The 2x rule with and without gradients."""
    assert_op_2x(separable_conv, reference_separable_conv, inputs, dy, roundings)
    assert_inference_2x(separable_conv, reference_separable_conv, inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel_size", [1, 3, 5, 7, 9, 15, 31])
def test_separable_conv_parity(backend, device, kernel_size, dtype):
    assert_parity(make(S=20, K=kernel_size, dtype=dtype, device=device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_separable_conv_without_gate(backend, device, dtype):
    assert_parity(make(dtype=dtype, device=device, gate=False))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel_size", [9, 13, 15, 31])
def test_separable_conv_many_taps_and_tokens(device, kernel_size, dtype):
    # oneDNN's convolution in bf16 doesn't return for some of these.
    with fastconv.backend("native"):
        assert_inference_2x(separable_conv, reference_separable_conv, make(S=64, K=kernel_size, dtype=dtype))


@pytest.mark.parametrize("length", [1, 2, 4, 8, 9, 63, 65, 127])
def test_separable_conv_lengths(backend, device, length):
    assert_parity(make(S=length, K=9, device=device))


@pytest.mark.parametrize("size", ODD)
def test_separable_conv_channels(backend, device, size):
    # Where there are few channels the interpreter adds all tokens one by one, a GPU by halves, as the reference does.
    assert_parity(make(C=size, device=device), roundings=2)
    assert_parity(make(O=size, device=device), roundings=2)


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


def test_separable_conv_module_of_many_taps(backend, device):
    # More than the op takes are the plain formulation's.
    module = fastconv.nn.SeparableConv1D(6, 4, 33).to(device)
    x, gate = torch.randn(2, 5, 6, device=device), torch.randn(2, 5, 4, device=device)
    weights = module.depthwise.weight, module.pointwise.weight, module.bias
    torch.testing.assert_close(module(x, gate), reference_separable_conv(x, *weights, gate=gate))


def test_separable_conv_many_tokens(backend, device):
    # Longer runs of tokens, and more tiles than the taps' gradient has programs; no tile is a whole sequence.
    assert_parity(make(B=3, S=697, C=3, O=2, K=9, device=device))


@pytest.mark.parametrize("kernel_size", [1, 9])
def test_separable_conv_fp64(backend, device, kernel_size):
    assert_fp64(separable_conv, reference_separable_conv, make(K=kernel_size, device=device))


def test_separable_conv_is_local(backend, device):
    inputs = make(S=11, K=5, device=device)
    x = inputs["x"].requires_grad_()
    (dx,) = torch.autograd.grad(separable_conv(**inputs)[:, 4].sum(), x)
    assert dx[:, 2:7].abs().min() > 0
    assert torch.equal(dx[:, :2], torch.zeros_like(dx[:, :2])) and torch.equal(dx[:, 7:], torch.zeros_like(dx[:, 7:]))


def test_separable_conv_infinities_stay_in_their_windows(backend, device):
    inputs = make(S=11, K=5, device=device)
    inputs["x"][:, 0] = float("inf")
    assert torch.isfinite(separable_conv(**inputs)[:, 3:]).all()


def test_separable_conv_gate_is_x(backend, device):
    inputs = make(O=6, device=device)
    grads = []
    for function in (separable_conv, reference_separable_conv):
        x = inputs["x"].clone().requires_grad_()
        grads.append(torch.autograd.grad(function(**inputs | {"x": x, "gate": x}).sin().sum(), x)[0])
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


def test_separable_conv_each_gradient(backend, device):
    assert_each_gradient(separable_conv, reference_separable_conv, make(device=device))
    assert_each_gradient(separable_conv, reference_separable_conv, make(device=device, gate=False))


def test_separable_conv_gradcheck(backend, device):
    inputs = make(S=4, C=3, K=3, O=2, dtype=torch.float64, device=device)

    def op(x, depthwise, pointwise, bias, gate):
        return separable_conv(x, depthwise, pointwise, bias, gate=gate)

    assert torch.autograd.gradcheck(op, [t.requires_grad_() for t in inputs.values()])


@pytest.mark.parametrize("gate", [True, False])
def test_separable_conv_second_derivative(backend, device, gate):
    functions = separable_conv, reference_separable_conv
    refused = "separable_conv" if backend == "triton" else None
    assert_second_derivative(*functions, make(S=4, device=device, gate=gate), refused)
    if device.type == "cpu":
        # In half precision the native formulation, too, has a gradient of its own.
        inputs = make(S=4, device=device, gate=gate, dtype=torch.bfloat16)
        assert_second_derivative(*functions, inputs, "separable_conv")


def test_separable_conv_checkpointed(backend, device):
    assert_checkpointed(separable_conv, make(S=4, device=device))


def test_separable_conv_traced(backend, device):
    assert_traced(separable_conv, make(S=4, device=device))


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("neighbour", [float("inf"), float("nan")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_separable_conv_packed_next_to_no_numbers(backend, device, neighbour, dtype):
    inputs, packing = packed([5, 4, 5], device=device, K=9, dtype=dtype)
    own = slice(5, 9)
    alone = {k: t[None, own] if k in ("x", "gate") else t for k, t in inputs.items()}
    for name in ("x", "gate"):
        inputs[name] = inputs[name].clone()
        inputs[name][:5], inputs[name][9:] = neighbour, neighbour
    results = []
    for given, keywords in ((inputs, {"packing": packing}), (alone, {})):
        x = given["x"].detach().requires_grad_()
        y = separable_conv(**given | {"x": x}, **keywords)
        y = y[own] if keywords else y[0]
        (dx,) = torch.autograd.grad(y.float().sin().sum(), x)
        results.append((y, dx[own] if keywords else dx[0]))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


def test_separable_conv_sums_whatever_the_default_dtype(device):
    # The taps' gradient over many rows in half precision: in a sum of the default dtype each would lose digits.
    inputs = make(B=256, S=8, C=4, O=2, dtype=torch.bfloat16, device=device, gate=False)
    dy = torch.ones(256, 8, 2, device=device, dtype=torch.bfloat16)
    inputs["x"] += 1
    torch.set_default_dtype(torch.bfloat16)
    try:
        with fastconv.backend("native"):
            assert_op_2x(separable_conv, reference_separable_conv, inputs, dy)
    finally:
        torch.set_default_dtype(torch.float32)


def test_separable_conv_module_with_a_packing(backend, device):
    module = fastconv.nn.SeparableConv1D(6, 4, 3).to(device)
    x, packing = torch.randn(7, 6, device=device), Packing.from_lengths([7], device=device)
    torch.testing.assert_close(module(x, packing=packing), module(x[None])[0])
    hook = module.depthwise.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"a packing needs .* nothing but nn\.Conv1d.*hooks"):
        module(x, packing=packing)
    hook.remove()
    assert module(x, packing=packing).shape == (7, 4)
    with pytest.raises(ValueError, match="at most 31 taps"):
        fastconv.nn.SeparableConv1D(6, 4, 33).to(device)(x, packing=packing)


@pytest.mark.parametrize("kernel_size", [0, 4, -3])
def test_separable_conv_module_needs_an_odd_kernel(kernel_size):
    with pytest.raises(ValueError, match=f"kernel_size must be odd, got {kernel_size}"):
        fastconv.nn.SeparableConv1D(10, 12, kernel_size)


def test_separable_conv_is_pure(backend, device):
    assert_pure(separable_conv, make(device=device))


@pytest.mark.parametrize("gate", [True, False])
def test_separable_conv_compiled(backend, device, gate):
    assert_compiled(separable_conv, make(device=device, gate=gate))


@pytest.mark.filterwarnings("ignore:.torch.jit.script", "ignore:There is a performance drop")
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
    y.sum().backward()
    for name, t in inputs.items():
        assert torch.equal(t.grad, torch.zeros_like(t)), name
    with torch.no_grad():
        assert separable_conv(**inputs).shape == (B, S, 4)


# Packed sequences

LENGTHS = [3, 1, 0, 12, 70, 2, 2]


def packed(lengths=LENGTHS, device="cpu", **sizes):
    """Inputs of so many tokens, and their packing."""
    inputs = make(B=1, S=sum(lengths), device=device, **sizes)
    inputs |= {k: inputs[k][0] for k in ("x", "gate") if k in inputs}
    return inputs, Packing.from_lengths(lengths, device=device)


def with_packing(function, packing):
    """The function of tensors only."""
    return lambda **inputs: function(**inputs, packing=packing)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gate", [True, False])
def test_separable_conv_packed(backend, device, gate, dtype):
    inputs, packing = packed(device=device, K=9, dtype=dtype, gate=gate)
    functions = with_packing(separable_conv, packing), with_packing(reference_separable_conv, packing)
    assert_op_2x(*functions, inputs)
    assert_inference_2x(*functions, inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel_size", [3, 9, 31])
@pytest.mark.parametrize("length", [1, 4, 65])
def test_separable_conv_packed_equals_each_alone(backend, device, length, kernel_size, dtype):
    # Neighbours of 1e4 show nowhere, bit for bit: the pointwise product is by the identity, so it adds nothing.
    made = make(B=1, S=length, C=6, O=6, K=kernel_size, dtype=dtype, device=device, gate=False)
    made["pointwise"] = torch.eye(6, device=device, dtype=dtype).unsqueeze(-1)
    made["bias"] = torch.zeros_like(made["bias"])
    neighbour = torch.full((5, 6), 1e4, device=device, dtype=dtype)
    packing = Packing.from_lengths([5, length, 5], device=device)
    sent = slice(5, 5 + length)

    def run(x, packing, part):
        x, depthwise = x.detach().requires_grad_(), made["depthwise"].detach().requires_grad_()
        y = separable_conv(x, depthwise, made["pointwise"], made["bias"], packing=packing)[part]
        dx, ddepthwise = torch.autograd.grad((y.float() * dy).sum(), (x, depthwise))
        assert (dx != 0).any() or kernel_size == 1
        return y, dx, ddepthwise

    dy = torch.randn(length, 6, device=device)
    y, dx, ddepthwise = run(made["x"], None, 0)
    y_packed, dx_packed, ddepthwise_packed = run(torch.cat([neighbour, made["x"][0], neighbour]), packing, sent)
    assert torch.equal(y_packed, y)
    assert torch.equal(dx_packed[sent], dx[0])
    assert torch.equal(dx_packed[:5], torch.zeros_like(neighbour)) and (dx_packed[5 + length :] == 0).all()
    # Tokens are summed in another order.
    rounding = torch.finfo(dtype).eps * ddepthwise.abs().max().item()
    torch.testing.assert_close(ddepthwise_packed, ddepthwise, rtol=4 * torch.finfo(dtype).eps, atol=4 * rounding)


def test_separable_conv_packed_standard_tests(backend, device):
    inputs, packing = packed([3, 0, 4], device=device)
    function = with_packing(separable_conv, packing)
    assert_fp64(function, with_packing(reference_separable_conv, packing), inputs)
    assert_each_gradient(function, with_packing(reference_separable_conv, packing), inputs)
    assert_pure(function, inputs)
    assert_compiled(function, inputs)
    assert_autocast_2x(function, with_packing(reference_separable_conv, packing), inputs)


@pytest.mark.filterwarnings("ignore:.torch.jit.script", "ignore:There is a performance drop")
def test_separable_conv_packed_transforms(backend, device):
    inputs, packing = packed([3, 2], device=device)
    assert_transforms(with_packing(separable_conv, packing), with_packing(reference_separable_conv, packing), inputs)


def test_separable_conv_packed_empty(backend, device):
    for lengths in ([], [0, 0]):
        inputs, packing = packed(lengths, device=device)
        y = separable_conv(**{k: t.requires_grad_() for k, t in inputs.items()}, packing=packing)
        assert y.shape == (0, 4)
        y.sum().backward()
        assert all(torch.equal(t.grad, torch.zeros_like(t)) for t in inputs.values())


# The ops by themselves


@pytest.mark.parametrize("is_packed", [False, True])
def test_separable_conv_opcheck(device, is_packed):
    pytest.importorskip("triton", reason="the ops launch kernels")
    ops = torch.ops.fastconv
    packing = Packing.from_lengths([3, 4], device=device)
    spans = (packing.before, packing.after) if is_packed else (None, None)
    lead = (7,) if is_packed else (1, 7)
    for dtype in DTYPES:
        x, depthwise = torch.randn(*lead, 6, device=device).to(dtype), torch.randn(6, 1, 3, device=device).to(dtype)
        for flip in (False, True):
            opcheck(ops.separable_conv_depthwise.default, (x, depthwise, *spans, flip))
        opcheck(ops.separable_conv_bwd_depthwise.default, (x, x.clone(), 3, *spans))
        opcheck(ops.separable_conv_bwd_gate.default, (x, x.clone(), x.clone()))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.ones(2, 11, 6, dtype=torch.int64)}, TypeError, r"x must be a real floating.*int64"),
        ({"gate": torch.ones(2, 11, 4, dtype=torch.bool)}, TypeError, r"gate must be.*bool"),
        ({"depthwise": torch.ones(6, 1, 4)}, ValueError, r"kernel_size must be odd, got 4"),
        ({"depthwise": torch.ones(6, 1, 0)}, ValueError, r"kernel_size must be odd, got 0"),
        ({"depthwise": torch.ones(6, 1, 33)}, ValueError, r"kernel_size must be odd and at most 31, got 33"),
        (
            {"depthwise": torch.ones(5, 1, 3)},
            ValueError,
            r"depthwise must have shape .* = \(6, 1, 3\), got \(5, 1, 3\)",
        ),
        ({"depthwise": torch.ones(6, 3)}, ValueError, r"\(C, 1, K\) and \(O, C, 1\), O at least 1, got \(6, 3\)"),
        ({"pointwise": torch.ones(4, 6, 2)}, ValueError, r"pointwise must have shape .* = \(4, 6, 1\)"),
        ({"bias": torch.ones(4)}, ValueError, r"bias must have shape \(O, 1\) = \(4, 1\), got \(4,\)"),
        ({"gate": torch.ones(2, 11, 1)}, ValueError, r"gate must have shape .* = \(2, 11, 4\), got \(2, 11, 1\)"),
        ({"x": torch.ones(11, 6)}, ValueError, r"x must have shape \(B, S, C\), C at least 1, got \(11, 6\)"),
        ({"x": torch.ones(2, 11, 0)}, ValueError, r"C at least 1, got \(2, 11, 0\)"),
        ({"pointwise": torch.ones(0, 6, 1)}, ValueError, r"O at least 1, got \(6, 1, 5\) and \(0, 6, 1\)"),
        ({"x": torch.ones(2, 11, 6).half()}, TypeError, r"x and depthwise must have one dtype, got .*16 and .*32"),
        ({"gate": torch.ones(2, 11, 4).double()}, TypeError, r"x and gate must have one dtype, got .*32 and .*64"),
        ({"packing": Packing.from_lengths([22])}, ValueError, r"x must have shape \(T, C\).*got \(2, 11, 6\)"),
        (
            {"packing": Packing.from_lengths([4, 6]), "x": torch.ones(11, 6), "gate": torch.ones(11, 4)},
            ValueError,
            r"packing covers 10 tokens, but the tensors have 11",
        ),
        (
            {"packing": Packing.from_lengths([11]), "x": torch.ones(11, 6)},
            ValueError,
            r"gate must have shape \(T, O\) = \(11, 4\), got \(2, 11, 4\)",
        ),
        ({"packing": [11], "x": torch.ones(11, 6)}, TypeError, r"packing must be a fastconv.Packing.*list"),
        ({"gate": torch.ones(2, 11, 4, device="meta")}, ValueError, r"x is on cpu but gate is on meta"),
    ],
)
def test_separable_conv_bad_input(backend, changes, error, message):
    with pytest.raises(error, match=message):
        separable_conv(**(make() | changes))
