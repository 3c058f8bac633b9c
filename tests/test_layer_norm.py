"""layer_norm through every layer: kernel and native formulation against the reference, gradients, shapes, layouts."""

from __future__ import annotations

import importlib

import pytest
import torch
from op_suite import assert_checkpointed, assert_second_derivative, assert_traced, checked_aot_eager
from shapes import LAYOUTS, with_layout
from tolerance import INTERPRETING, assert_2x, assert_op_2x
from torch.library import opcheck

import fastconv
from fastconv.ops import layer_norm
from fastconv.reference.ops import layer_norm as reference_layer_norm

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CHANNELS = (8, 63, 65, 127, 384, 768)

pytestmark = pytest.mark.usefixtures("poisoned_empty")


def make(shape, dtype, device, *, fused=True, param_dtype=None):
    """Inputs of layer_norm: x, weight and bias, and with `fused` x_bias and residual."""
    channels = shape[-1]
    param_dtype = param_dtype or dtype
    inputs = {
        "x": (2 * torch.randn(shape) + 1).to(device, dtype),
        "weight": (1 + 0.3 * torch.randn(channels)).to(device, param_dtype),
        "bias": (0.3 * torch.randn(channels)).to(device, param_dtype),
    }
    if fused:
        inputs["x_bias"] = torch.randn(channels).to(device, param_dtype)
        inputs["residual"] = torch.randn(shape).to(device, dtype)
    return inputs


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", CHANNELS)
def test_layer_norm_parity(backend, device, channels, dtype):
    assert_op_2x(layer_norm, reference_layer_norm, make((5, 3, channels), dtype, device))


@pytest.mark.parametrize("channels", [2, 3])
def test_layer_norm_few_channels(backend, device, channels):
    # Two channels are normalized to +1 and -1 whatever they are: without a larger eps every gradient is noise.
    assert_op_2x(
        lambda **t: layer_norm(**t, eps=1e-2),
        lambda **t: reference_layer_norm(**t, eps=1e-2),
        make((5, 3, channels), torch.float32, device),
    )


def test_layer_norm_one_channel(backend, device):
    # The channel is its own mean: the bias remains, and no gradient but the bias's.
    inputs = {k: t.requires_grad_() for k, t in make((5, 1), torch.float32, device).items()}
    y = layer_norm(**inputs, eps=1e-2)
    torch.testing.assert_close(y, inputs["bias"].expand(5, 1), rtol=0, atol=1e-5)
    y.sum().backward()
    assert inputs["bias"].grad.item() == 5
    for name in ("x", "weight", "x_bias", "residual"):
        torch.testing.assert_close(inputs[name].grad, torch.zeros_like(inputs[name]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("given", [(), ("x_bias",), ("residual",)], ids=["plain", "x_bias", "residual"])
def test_layer_norm_optional_inputs(backend, device, given, dtype):
    inputs = make((7, 96), dtype, device)
    kept = {k: t for k, t in inputs.items() if k in ("x", "weight", "bias", *given)}
    assert_op_2x(layer_norm, reference_layer_norm, kept)


@pytest.mark.parametrize("tokens", [1, 2, 65, 1030])
def test_layer_norm_tokens(backend, device, tokens):
    # 1030 tokens are more blocks than the backward has programs: each keeps sums over several.
    assert_op_2x(layer_norm, reference_layer_norm, make((tokens, 40), torch.float32, device))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_layer_norm_sums_over_many_tokens(device, dtype):
    # In half precision a sum stops growing at a few hundred terms: the gradients of the vectors must be summed in fp32.
    with fastconv.backend("native"):
        assert_op_2x(layer_norm, reference_layer_norm, make((4096, 24), dtype, device))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layer_norm_layouts(backend, device, layout):
    inputs = make((4, 6, 48), torch.float32, device)
    inputs["x"] = with_layout(inputs["x"], layout)
    inputs["residual"] = with_layout(inputs["residual"], layout)
    if layout != "contiguous":
        for name in ("weight", "bias", "x_bias"):
            inputs[name] = torch.stack([inputs[name], inputs[name] * float("nan")], -1)[:, 0]
    dy = with_layout(torch.randn(4, 6, 48, device=device), layout)
    assert_op_2x(layer_norm, reference_layer_norm, inputs, dy)


def test_layer_norm_expanded_gradient(backend, device):
    # sum().backward() hands the backward a dy with all strides 0.
    inputs = make((4, 48), torch.float32, device)
    assert_op_2x(layer_norm, reference_layer_norm, inputs, torch.ones((), device=device).expand(4, 48))


def test_layer_norm_limit_is_the_kernels():
    kernels = pytest.importorskip("fastconv.kernels.layer_norm", reason="the kernels need triton")
    assert importlib.import_module("fastconv.ops.layer_norm").MAX_CHANNELS == kernels.MAX_CHANNELS


@pytest.mark.parametrize("channels", [4096, 5001, 8192, 8193])
def test_layer_norm_widest(backend, device, channels):
    # From 4097 on two programs share a token in the backward. The kernel ends at 8192; beyond, native takes over.
    with fastconv.backend("auto"):
        assert_op_2x(layer_norm, reference_layer_norm, make((3, channels), torch.float32, device))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_layer_norm_fp32_parameters(backend, device, dtype):
    inputs = make((6, 64), dtype, device, param_dtype=torch.float32)
    assert_op_2x(layer_norm, reference_layer_norm, inputs)


def test_layer_norm_fp32_residual(backend, device):
    # Under autocast the residual stream is fp32 and the linear layer's output is not: the result is fp32.
    inputs = make((6, 64), torch.float16, device)
    inputs["residual"] = inputs["residual"].float()
    assert_op_2x(layer_norm, lambda x, **t: reference_layer_norm(x.to(t["residual"].dtype), **t), inputs)


def test_layer_norm_autocast(backend, device):
    inputs = make((6, 64), torch.float32, device)
    with torch.autocast(device.type, torch.bfloat16):
        y = layer_norm(**inputs)
    assert y.dtype == torch.float32
    truth = reference_layer_norm(**{k: t.double() for k, t in inputs.items()})
    assert_2x("autocast", y, reference_layer_norm(**inputs), truth)


def test_layer_norm_large_mean(backend, device):
    # A one-pass variance would lose every digit here.
    inputs = make((4, 256), torch.float32, device, fused=False)
    inputs["x"] += 1e4
    assert_op_2x(layer_norm, reference_layer_norm, inputs)


def test_layer_norm_constant_rows(backend, device):
    inputs = make((4, 64), torch.float32, device, fused=False)
    inputs["x"] = torch.full_like(inputs["x"], 3.0)
    y = layer_norm(**inputs)
    torch.testing.assert_close(y, inputs["bias"].expand(4, 64), rtol=0, atol=0)


def test_layer_norm_gradcheck(backend, device):
    inputs = make((3, 5), torch.float64, device)
    leaves = [t.requires_grad_() for t in inputs.values()]

    def op(x, weight, bias, x_bias, residual):
        return layer_norm(x, weight, bias, 1e-12, x_bias=x_bias, residual=residual)

    assert torch.autograd.gradcheck(op, leaves)


@pytest.mark.parametrize("fused", [False, True])
def test_layer_norm_second_derivative(backend, device, fused):
    inputs = make((3, 5), torch.float32, device, fused=fused)
    refused = "layer_norm" if backend == "triton" else None
    assert_second_derivative(layer_norm, reference_layer_norm, inputs, refused)


def test_layer_norm_checkpointed(backend, device):
    assert_checkpointed(layer_norm, make((3, 5), torch.float32, device))


def test_layer_norm_traced(backend, device):
    assert_traced(layer_norm, make((3, 5), torch.float32, device))


@pytest.mark.parametrize("frozen", ["x", "weight", "bias", "x_bias", "residual"])
def test_layer_norm_frozen_inputs(backend, device, frozen):
    inputs = make((5, 32), torch.float32, device)
    leaves = {k: t.clone().requires_grad_(k != frozen) for k, t in inputs.items()}
    layer_norm(**leaves).square().sum().backward()
    expected = {k: t.clone().requires_grad_(k != frozen) for k, t in inputs.items()}
    reference_layer_norm(**expected).square().sum().backward()
    for name, leaf in leaves.items():
        assert (leaf.grad is None) == (name == frozen)
        if name != frozen:
            torch.testing.assert_close(leaf.grad, expected[name].grad, rtol=1e-4, atol=1e-5)


def test_layer_norm_one_tensor_in_two_slots(backend, device):
    inputs = make((5, 32), torch.float32, device, fused=False)
    x = inputs.pop("x").requires_grad_()
    (got,) = torch.autograd.grad(layer_norm(x, **inputs, residual=x).square().sum(), x)
    (expected,) = torch.autograd.grad(reference_layer_norm(x, **inputs, residual=x).square().sum(), x)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_layer_norm_inputs_are_left_alone(backend, device):
    inputs = make((5, 32), torch.float32, device)
    before = {k: t.clone() for k, t in inputs.items()}
    leaves = {k: t.requires_grad_() for k, t in inputs.items()}
    layer_norm(**leaves).sum().backward()
    for name, t in leaves.items():
        assert torch.equal(t, before[name]), name


def test_layer_norm_runs_twice_to_the_same_bits(device):
    def run():
        inputs = {k: t.clone().requires_grad_() for k, t in fixed.items()}
        y = layer_norm(**inputs, dropout_p=0.1, seed=torch.tensor(3, device=device))
        y.square().sum().backward()
        return [y, *(t.grad for t in inputs.values())]

    fixed = make((300, 80), torch.float32, device)
    with fastconv.backend("triton"):
        for first, second in zip(run(), run(), strict=True):
            assert torch.equal(first, second)


# Dropout


def drawn_mask(shape, p, seed, device):
    """The keep-mask that the op draws: dropout of ones is above a token's mean exactly where it keeps."""
    channels = shape[-1]
    y = layer_norm(
        torch.ones(shape, device=device),
        torch.ones(channels, device=device),
        torch.zeros(channels, device=device),
        dropout_p=p,
        seed=seed,
    )
    return y > 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layer_norm_dropout_parity(backend, device, dtype):
    shape, p, seed = (9, 64), 0.3, torch.tensor(1234, device=device)
    mask = drawn_mask(shape, p, seed, device)
    assert 0.1 < 1 - mask.float().mean() < 0.5
    assert_op_2x(
        lambda **t: layer_norm(**t, dropout_p=p, seed=seed),
        lambda **t: reference_layer_norm(**t, dropout_p=p, dropout_mask=mask),
        make(shape, dtype, device),
    )


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_layer_norm_dropout_rate(backend, device, p):
    shape = (64, 1024)
    mask = drawn_mask(shape, p, torch.tensor(5, device=device), device)
    # Five standard deviations of a binomial.
    spread = 5 * (p * (1 - p) / mask.numel()) ** 0.5
    assert abs((~mask).float().mean().item() - p) < spread
    # Neighbours in either direction are independent: dropping both happens with p * p.
    for both in ((~mask[1:] & ~mask[:-1]), (~mask[:, 1:] & ~mask[:, :-1]), (~mask[:, 4:] & ~mask[:, :-4])):
        assert abs(both.float().mean().item() - p * p) < 3 * spread


def test_layer_norm_dropout_seeds(backend, device):
    seeds = [torch.tensor(s, device=device) for s in (0, 1, 2**40, 2**62)]
    masks = [drawn_mask((16, 64), 0.5, s, device) for s in seeds]
    for i, mask in enumerate(masks):
        assert torch.equal(mask, drawn_mask((16, 64), 0.5, seeds[i], device))
        for other in masks[:i]:
            assert not torch.equal(mask, other)


def test_layer_norm_dropout_follows_manual_seed(backend, device):
    inputs = make((4, 64), torch.float32, device)
    torch.manual_seed(11)
    first, second = (layer_norm(**inputs, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(11)
    assert torch.equal(first, layer_norm(**inputs, dropout_p=0.5))
    assert not torch.equal(first, second)


# Registration and compile


def test_layer_norm_opcheck(device):
    inputs = make((5, 32), torch.float32, device)
    x, weight, bias, x_bias, residual = inputs.values()
    seed = torch.tensor(1, device=device)
    forward, backward = torch.ops.fastconv.layer_norm_fwd.default, torch.ops.fastconv.layer_norm_bwd.default
    for args in (
        (x, weight, bias, 1e-12, x_bias, residual, 0.1, seed, torch.float32, True),
        (x, weight, None, 1e-12, None, None, 0.0, None, torch.float32, True),
        (x, weight, bias, 1e-12, x_bias, None, 0.0, None, torch.float16, False),
        (x.t().contiguous().t(), weight, bias, 1e-12, x_bias, residual, 0.0, None, torch.float32, True),
    ):
        opcheck(forward, args)
    _, z, mean, rstd = forward(x, weight, bias, 1e-12, x_bias, residual, 0.1, seed, torch.float32, True)
    for args in (
        (x, z, weight, mean, rstd, 0.1, seed, True, torch.float32, torch.float32),
        (x, z, weight, mean, rstd, 0.0, None, False, torch.float16, None),
    ):
        opcheck(backward, args)


@pytest.mark.parametrize("same", [False, True], ids=["two-tensors", "one-tensor-twice"])
def test_layer_norm_compiled_gradient(backend, device, same):
    inputs = make((6, 32), torch.float32, device)
    if same:
        inputs["residual"] = inputs["x"]

    def step(x, weight, bias, x_bias, residual):
        return layer_norm(x, weight, bias, x_bias=x_bias, residual=residual).sin()

    def run(function):
        leaves = {k: t.clone().requires_grad_() for k, t in inputs.items()}
        if same:
            leaves["residual"] = leaves["x"]
        y = function(**leaves)
        wanted = [t for k, t in leaves.items() if not (same and k == "residual")]
        return [y, *torch.autograd.grad(y.sum(), wanted)]

    torch._dynamo.reset()
    # The graph must be whole and its gradient eager's; what code Inductor makes of the rest is not this op's matter.
    compiled = torch.compile(step, backend=checked_aot_eager, fullgraph=True)
    for got, expected in zip(run(compiled), run(step), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


# The module


def test_layer_norm_module(backend, device):
    module = fastconv.nn.LayerNorm(48, eps=1e-12).to(device)
    plain = torch.nn.LayerNorm(48, eps=1e-12).to(device)
    plain.load_state_dict(module.state_dict(), strict=True)
    x = torch.randn(3, 48, device=device)
    torch.testing.assert_close(module(x), plain(x))
    for options in ({"normalized_shape": (3, 48)}, {"normalized_shape": 48, "elementwise_affine": False}):
        torch.testing.assert_close(
            fastconv.nn.LayerNorm(**options).to(device)(x), torch.nn.LayerNorm(**options).to(device)(x)
        )


# Sizes at the edges, and bad input


def test_layer_norm_no_tokens(backend, device):
    inputs = make((0, 32), torch.float32, device)
    leaves = {k: t.requires_grad_() for k, t in inputs.items()}
    y = layer_norm(**leaves)
    assert y.shape == (0, 32)
    y.sum().backward()
    assert torch.equal(leaves["weight"].grad, torch.zeros(32, device=device))
    assert torch.equal(leaves["x_bias"].grad, torch.zeros(32, device=device))


@pytest.mark.skipif(INTERPRETING or not torch.cuda.is_available(), reason="needs a GPU with 20 GB free")
def test_layer_norm_more_than_2_31_elements(device):
    if torch.cuda.mem_get_info()[0] < 20e9:
        pytest.skip("needs a GPU with 20 GB free")
    tokens = 2**31 // 768 + 8
    x = torch.randn(tokens, 768, device=device, dtype=torch.bfloat16)
    weight, bias = torch.ones(2, 768, device=device, dtype=torch.bfloat16)
    y = layer_norm(x, weight, bias)
    torch.testing.assert_close(y[-8:], torch.nn.functional.layer_norm(x[-8:], (768,), weight, bias, 1e-12))


def bad(**changes):
    inputs = {**make((4, 16), torch.float32, "cpu"), **changes}
    return {k: v for k, v in inputs.items() if v is not ...}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.ones(4, 16, dtype=torch.int64)}, TypeError, r"x must be a real floating.*int64"),
        ({"x": torch.ones(4, 16, dtype=torch.complex64)}, TypeError, r"x must be a real floating.*complex64"),
        ({"residual": torch.ones(4, 16, dtype=torch.bool)}, TypeError, r"residual must be.*bool"),
        ({"weight": torch.ones(15)}, ValueError, r"weight must have shape .*\(16,\), got \(15,\)"),
        ({"x_bias": torch.ones(1, 16)}, ValueError, r"x_bias must have shape .*\(16,\), got \(1, 16\)"),
        ({"residual": torch.ones(4, 15)}, ValueError, r"residual must have shape .*\(4, 16\), got \(4, 15\)"),
        ({"residual": torch.ones(16)}, ValueError, r"residual must have shape"),
        ({"x": torch.ones(4, 0)}, ValueError, r"C >= 1, got \(4, 0\)"),
        ({"x": torch.tensor(1.0)}, ValueError, r"C >= 1, got \(\)"),
        ({"weight": torch.ones(16, device="meta")}, ValueError, r"x is on cpu but weight is on meta"),
        ({"dropout_p": 1.5}, ValueError, r"less than 1, got 1.5"),
        ({"dropout_p": 0.5, "seed": torch.tensor(1.0)}, ValueError, r"seed must be a \(\) int64"),
    ],
)
def test_layer_norm_bad_input(backend, changes, error, message):
    with pytest.raises(error, match=message):
        layer_norm(**bad(**changes))


def test_layer_norm_on_the_meta_device():
    # A model's shapes can be tried without memory.
    x, weight = torch.empty(2, 3, 16, device="meta"), torch.empty(16, device="meta")
    assert layer_norm(x, weight, weight, residual=x).shape == (2, 3, 16)
