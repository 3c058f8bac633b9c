"""span_kernel_logits against the reference: the kernel and the composed path, shapes, layouts, packing, transforms."""

from __future__ import annotations

import functools
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

import fastconv
from fastconv import Packing
from fastconv.ops import span_kernel_logits
from fastconv.reference.ops import span_kernel_logits as reference_span_kernel_logits

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# What the kernel is for.
HALF = (torch.float16, torch.bfloat16)
PAIR = (span_kernel_logits, reference_span_kernel_logits)

pytestmark = pytest.mark.usefixtures("poisoned_empty")


def make(B=2, S=11, C=6, K=5, O=4, N=10, dtype=torch.float32, device="cpu", bias=True):  # noqa: E741
    """Inputs of span_kernel_logits."""
    inputs = {
        "x": torch.randn(B, S, C),
        "depthwise": torch.randn(C, 1, K) / K**0.5,
        "pointwise": torch.randn(O, C, 1) / C**0.5,
        "bias": 0.5 * torch.randn(O, 1),
        "gate": torch.randn(B, S, O),
        "weight": torch.randn(N, O) / O**0.5,
        "kernel_bias": 0.5 * torch.randn(N),
    }
    inputs = {k: t.to(device, dtype) for k, t in inputs.items()}
    return inputs if bias else inputs | {"kernel_bias": None}


def given(inputs):
    """The op and its reference as functions of the tensors among the inputs, and these."""
    missing = {k: t for k, t in inputs.items() if t is None}
    return *(functools.partial(f, **missing) for f in PAIR), {k: t for k, t in inputs.items() if t is not None}


def assert_forward_2x(inputs):
    """The 2x rule for one call without a gradient."""
    truth = reference_span_kernel_logits(**{k: t.double() for k, t in inputs.items()})
    with torch.no_grad():
        assert_2x("logits", span_kernel_logits(**inputs), reference_span_kernel_logits(**inputs), truth)


@pytest.fixture
def fused(monkeypatch):
    """A list that grows with every call of the fused op."""
    module, calls = importlib.import_module("fastconv.ops.span_kernel_logits"), []
    forward = module._forward
    monkeypatch.setattr(module, "_forward", lambda *args: calls.append(args) or forward(*args))
    return calls


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_span_kernel_logits_parity(backend, device, dtype, bias):
    op, reference, tensors = given(make(S=20, K=9, dtype=dtype, device=device, bias=bias))
    assert_op_2x(op, reference, tensors)
    assert_inference_2x(op, reference, tensors)


@pytest.mark.parametrize(("C", "O", "N"), [(768, 384, 54), (384, 192, 36), (256, 128, 18), (1024, 512, 72)])
def test_span_kernel_logits_of_models(device, fused, C, O, N):  # noqa: E741
    pytest.importorskip("triton", reason="the package triton is not installed")
    for dtype in HALF:
        assert_forward_2x(make(B=1, S=18, C=C, O=O, N=N, K=3, dtype=dtype, device=device))
    assert len(fused) == 2


@pytest.mark.parametrize("size", ODD)
@pytest.mark.parametrize("name", ["C", "O", "N", "S"])
def test_span_kernel_logits_sizes(backend, device, name, size):
    assert_forward_2x(make(**{name: size}, dtype=torch.float16, device=device))


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_span_kernel_logits_layouts(backend, device, layout, dtype):
    inputs = make(C=16, O=32, dtype=dtype, device=device)
    for name in ("x", "gate", "depthwise", "pointwise", "weight"):
        assert_forward_2x(inputs | {name: with_layout(inputs[name], layout)})
    wide = torch.randn(32, 3, device=device).to(dtype)
    strided = {"gate": inputs["gate"][:1, :1].expand(2, 11, 32), "bias": wide[:, :1], "kernel_bias": wide[:10, 0]}
    assert_forward_2x(inputs | strided)


@pytest.mark.parametrize("tokens", [1040, 128 * 132])
def test_span_kernel_logits_many_tokens(device, tokens):
    # The larger tiles of pick_config, with a last one that is not full.
    assert_forward_2x(make(B=1, S=tokens + 3, C=16, O=16, N=4, K=1, dtype=torch.float16, device=device))


def test_span_kernel_logits_config():
    pick = pytest.importorskip("fastconv.kernels.span_kernel_logits", reason="the kernels need triton").pick_config
    card = importlib.import_module("fastconv.kernels._launch").INTERPRETER

    def tile(*shape):
        config = pick("span_kernel_logits_fwd", shape, torch.bfloat16, card)
        return config.block_t, config.block_o, config.num_warps

    assert tile(128, 768, 384, 54) == (16, 128, 4)
    assert tile(128, 1024, 512, 72) == (16, 64, 4)
    assert tile(4096, 768, 384, 54) == (64, 128, 8)
    assert tile(32768, 768, 384, 54) == (128, 128, 8)
    assert tile(32768, 1024, 512, 72) == (64, 128, 8)  # registers for the sums of 128 logits
    assert tile(32768, 768, 100, 54) == (64, 32, 8)  # sizes that are no multiples of 16


def test_span_kernel_logits_choice_of_the_kernel(device, fused):
    pytest.importorskip("triton", reason="the package triton is not installed")
    fuses = importlib.import_module("fastconv.ops.span_kernel_logits").fuses
    assert fuses(768, 54, torch.bfloat16) and fuses(1024, 72, torch.float16)
    assert not fuses(768, 54, torch.float32) and not fuses(2048, 54, torch.float16)
    inputs = make(dtype=torch.float16, device=device)
    with torch.no_grad():
        span_kernel_logits(**inputs)
    assert len(fused) == 1
    span_kernel_logits(**{k: t.requires_grad_() for k, t in inputs.items()})
    with torch.no_grad(), fastconv.backend("native"):
        span_kernel_logits(**inputs)
    with torch.no_grad():
        span_kernel_logits(**make(device=device))
    wide = make(N=129, dtype=torch.float16, device=device)
    assert_inference_2x(*PAIR, wide)
    assert len(fused) == 1


@pytest.mark.parametrize("bias", [True, False])
def test_span_kernel_logits_op_in_fp64(device, bias):
    # The kernel's own arithmetic without roundings: the interpreter has fp64.
    if device.type != "cpu":
        pytest.skip("no kernel computes in fp64 on a GPU")
    pytest.importorskip("triton", reason="the op launches a kernel")
    inputs = make(S=70, C=130, K=1, O=67, N=19, dtype=torch.float64, bias=bias)
    inputs["depthwise"] = torch.ones_like(inputs["depthwise"])
    got = torch.ops.fastconv.span_kernel_logits_fwd(*(t for k, t in inputs.items() if k != "depthwise"))
    torch.testing.assert_close(got, reference_span_kernel_logits(**inputs), rtol=1e-12, atol=1e-12)


def test_span_kernel_logits_fp64(backend, device):
    assert_fp64(*PAIR, make(device=device))


@pytest.mark.filterwarnings("ignore:invalid value")
def test_span_kernel_logits_infinities_stay_in_their_windows(backend, device):
    inputs = make(S=11, K=5, dtype=torch.float16, device=device)
    inputs["x"][:, 0], inputs["gate"][:, 0] = float("inf"), float("nan")
    with torch.no_grad():
        assert torch.isfinite(span_kernel_logits(**inputs)[:, 3:]).all()


def test_span_kernel_logits_gate_is_x(backend, device):
    for dtype in (torch.float32, torch.float16):
        inputs = make(O=6, dtype=dtype, device=device)
        both = [lambda function=function, **t: function(**t, gate=t["x"]) for function in PAIR]
        assert_op_2x(*both, {k: t for k, t in inputs.items() if k != "gate"})
        assert_inference_2x(*both, {k: t for k, t in inputs.items() if k != "gate"})


def test_span_kernel_logits_each_gradient(backend, device):
    assert_each_gradient(*PAIR, make(device=device))


def test_span_kernel_logits_second_derivative(backend, device):
    assert_second_derivative(*PAIR, make(S=4, device=device), "separable_conv" if backend == "triton" else None)


def test_span_kernel_logits_checkpointed(backend, device):
    assert_checkpointed(span_kernel_logits, make(S=4, device=device))


def test_span_kernel_logits_traced(backend, device):
    assert_traced(span_kernel_logits, make(S=4, device=device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_span_kernel_logits_is_pure(backend, device, dtype):
    assert_pure(span_kernel_logits, make(dtype=dtype, device=device))


def test_span_kernel_logits_compiled(backend, device):
    assert_compiled(span_kernel_logits, make(device=device))


def test_span_kernel_logits_compiled_in_half_precision(device):
    pytest.importorskip("triton", reason="the package triton is not installed")
    assert_compiled(span_kernel_logits, make(dtype=torch.float16, device=device))
    op, _, inputs = packed([3, 0, 4], dtype=torch.float16, device=device)
    assert_compiled(op, inputs)


@pytest.mark.filterwarnings("ignore:.torch.jit.script", "ignore:There is a performance drop")
def test_span_kernel_logits_transforms(backend, device):
    assert_transforms(*PAIR, make(S=5, device=device))


def test_span_kernel_logits_autocast(backend, device):
    assert_autocast_2x(*PAIR, make(device=device))


@pytest.mark.parametrize(("B", "S"), [(0, 5), (2, 0), (0, 0)])
def test_span_kernel_logits_empty_batch(backend, device, B, S):
    inputs = {k: t.requires_grad_() for k, t in make(B=B, S=S, dtype=torch.float16, device=device).items()}
    y = span_kernel_logits(**inputs)
    assert y.shape == (B, S, 10) and y.dtype == torch.float16
    y.sum().backward()
    assert all(torch.equal(t.grad, torch.zeros_like(t)) for t in inputs.values())
    with torch.no_grad():
        assert span_kernel_logits(**inputs).shape == (B, S, 10)


# Packed sequences


def packed(lengths, **sizes):
    """The op and its reference with a packing of sequences so long, and their inputs."""
    inputs = make(B=1, S=sum(lengths), **sizes)
    packing = Packing.from_lengths(lengths, device=inputs["x"].device)
    functions = [functools.partial(function, packing=packing) for function in PAIR]
    return *functions, inputs | {k: inputs[k][0] for k in ("x", "gate")}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_span_kernel_logits_packed(backend, device, dtype):
    *functions, inputs = packed([3, 1, 0, 12, 70, 2], K=9, dtype=dtype, device=device)
    assert_op_2x(*functions, inputs)
    assert_inference_2x(*functions, inputs)


@pytest.mark.filterwarnings("ignore:invalid value", "ignore:overflow")
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("length", [1, 4, 65])
def test_span_kernel_logits_packed_equals_alone(backend, device, length, dtype):
    # Neighbours of 1e4 show nowhere, bit for bit.
    op, _, inputs = packed([5, length, 5], K=9, C=16, O=16, dtype=dtype, device=device)
    own = slice(5, 5 + length)
    others = dict.fromkeys(("x", "gate"))
    for name in others:
        others[name] = torch.full_like(inputs[name], 1e4)
        others[name][own] = inputs[name][own]
    with torch.no_grad():
        alone = span_kernel_logits(**inputs | {k: inputs[k][None, own] for k in others})[0]
        with_others = op(**inputs | others)[own]
        assert torch.equal(with_others, op(**inputs)[own])
    torch.testing.assert_close(with_others, alone, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)


def test_span_kernel_logits_packed_standard_tests(backend, device):
    op, _, inputs = packed([3, 0, 4], dtype=torch.float16, device=device)
    assert_pure(op, inputs)
    *functions, inputs = packed([3, 0, 4], device=device)
    assert_compiled(functions[0], inputs)
    assert_autocast_2x(*functions, inputs)
    assert_each_gradient(*functions, inputs)
    for lengths in ([], [0, 0]):
        op, _, inputs = packed(lengths, dtype=torch.float16, device=device)
        with torch.no_grad():
            assert op(**inputs).shape == (0, 10)


# The op by itself


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_span_kernel_logits_opcheck(device, dtype):
    pytest.importorskip("triton", reason="the op launches a kernel")
    forward = torch.ops.fastconv.span_kernel_logits_fwd.default
    inputs = make(dtype=dtype, device=device)
    x, _, pointwise, bias, gate, weight, kernel_bias = inputs.values()
    opcheck(forward, (x, pointwise, bias, gate, weight, kernel_bias))
    opcheck(forward, (x[0], pointwise, bias, with_layout(gate[0], "slice"), weight, None))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.ones(2, 11, 6, dtype=torch.int64)}, TypeError, r"x must be a real floating.*int64"),
        ({"gate": None}, TypeError, r"gate must be a torch.Tensor, got NoneType"),
        ({"weight": torch.ones(10, 4, dtype=torch.int8)}, TypeError, r"weight must be a real floating.*int8"),
        ({"depthwise": torch.ones(6, 1, 4)}, ValueError, r"kernel_size must be odd, got 4"),
        ({"depthwise": torch.ones(6, 1, 33)}, ValueError, r"kernel_size must be odd and at most 31, got 33"),
        ({"pointwise": torch.ones(4, 5, 1)}, ValueError, r"pointwise must have shape .* = \(4, 6, 1\)"),
        ({"bias": torch.ones(4)}, ValueError, r"bias must have shape \(O, 1\) = \(4, 1\), got \(4,\)"),
        ({"gate": torch.ones(2, 11, 1)}, ValueError, r"gate must have shape .* = \(2, 11, 4\), got \(2, 11, 1\)"),
        ({"weight": torch.ones(10, 5)}, ValueError, r"weight must have shape \(N, O\) = \(10, 4\), got \(10, 5\)"),
        ({"weight": torch.ones(10)}, ValueError, r"weight must have shape \(N, O\), N at least 1, got \(10,\)"),
        ({"weight": torch.ones(0, 4)}, ValueError, r"N at least 1, got \(0, 4\)"),
        ({"kernel_bias": torch.ones(4)}, ValueError, r"kernel_bias must have shape \(N,\) = \(10,\), got \(4,\)"),
        ({"weight": torch.ones(10, 4).half()}, TypeError, r"one dtype outside of autocast, got .*weight .*float16"),
        ({"packing": Packing.from_lengths([22])}, ValueError, r"x must have shape \(T, C\).*got \(2, 11, 6\)"),
        ({"weight": torch.ones(10, 4, device="meta")}, ValueError, r"x is on cpu but weight is on meta"),
    ],
)
def test_span_kernel_logits_bad_input(backend, changes, error, message):
    with pytest.raises(error, match=message):
        span_kernel_logits(**(make() | changes))
