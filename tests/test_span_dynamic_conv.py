"""span_dynamic_conv against the reference: kernel sizes, gradients, inference, shapes, layouts, out, transforms."""

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
    leaves,
)
from shapes import LAYOUTS, with_layout
from tolerance import assert_2x, assert_op_2x
from torch.library import opcheck

import fastconv
from fastconv import Packing
from fastconv.ops import span_dynamic_conv
from fastconv.reference.ops import span_dynamic_conv as reference_span_dynamic_conv

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def make(B=2, S=11, H=2, D=5, K=3, dtype=torch.float32, device="cpu"):
    """Inputs of span_dynamic_conv without the kernel size."""
    return {
        "value": torch.randn(B, S, H * D).to(device, dtype),
        "kernel_logits": (2 * torch.randn(B, S, H * K)).to(device, dtype),
    }


def pair(kernel_size=3):
    """The op and its reference with one kernel size."""
    return (
        lambda value, kernel_logits: span_dynamic_conv(value, kernel_logits, kernel_size),
        lambda value, kernel_logits: reference_span_dynamic_conv(value, kernel_logits, kernel_size),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel_size", [1, 3, 5, 7, 9, 15, 31])
def test_span_dynamic_conv_parity(backend, device, kernel_size, dtype):
    inputs = make(S=20, K=kernel_size, dtype=dtype, device=device)
    assert_op_2x(*pair(kernel_size), inputs)
    assert_inference_2x(*pair(kernel_size), inputs)


@pytest.mark.parametrize("kernel_size", [1, 9])
def test_span_dynamic_conv_fp64(backend, device, kernel_size):
    assert_fp64(*pair(kernel_size), make(K=kernel_size, device=device))


@pytest.mark.parametrize("length", [1, 2, 4, 5, 8, 9, 63, 65, 127])
def test_span_dynamic_conv_lengths(backend, device, length):
    inputs = make(S=length, K=9, device=device)
    assert_op_2x(*pair(9), inputs)
    assert_inference_2x(*pair(9), inputs)


@pytest.mark.parametrize(("H", "D"), [(1, 1), (1, 63), (3, 1), (3, 3), (6, 64), (4, 48), (16, 2)])
def test_span_dynamic_conv_heads(backend, device, H, D):
    inputs = make(S=6, H=H, D=D, K=5, device=device)
    assert_op_2x(*pair(5), inputs)
    assert_inference_2x(*pair(5), inputs)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_span_dynamic_conv_layouts(backend, device, layout, dtype):
    inputs = make(dtype=dtype, device=device)
    dy = with_layout(torch.randn(2, 11, 10, device=device).to(dtype), layout)
    for name in inputs:
        changed = inputs | {name: with_layout(inputs[name], layout)}
        assert_op_2x(*pair(), changed, dy)
        assert_inference_2x(*pair(), changed)
    both = {name: with_layout(t, layout) for name, t in inputs.items()}
    assert_op_2x(*pair(), both, dy)


def test_span_dynamic_conv_expanded(backend, device):
    inputs = {k: t[:1, :1].expand(2, 11, -1) for k, t in make(device=device).items()}
    assert_op_2x(*pair(), inputs, torch.ones((), device=device).expand(2, 11, 10))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_span_dynamic_conv_large_logits(backend, device, dtype):
    # The softmax may neither overflow nor lose its largest logit.
    inputs = make(dtype=dtype, device=device)
    inputs["kernel_logits"] = 5e3 * inputs["kernel_logits"]
    assert_op_2x(*pair(), inputs)


def test_span_dynamic_conv_large_values(backend, device):
    # The sum runs in fp32: halves of fp16's largest number may pass through it.
    inputs = make(dtype=torch.float16, device=device)
    inputs["value"] = 3e4 * inputs["value"].sign()
    assert_op_2x(*pair(), inputs)


def test_span_dynamic_conv_is_local(backend, device):
    inputs = make(S=11, K=5, device=device)
    value = inputs["value"].requires_grad_()
    (dvalue,) = torch.autograd.grad(span_dynamic_conv(**inputs, kernel_size=5)[:, 4].sum(), value)
    assert dvalue[:, 2:7].abs().min() > 0
    for outside in (dvalue[:, :2], dvalue[:, 7:]):
        assert torch.equal(outside, torch.zeros_like(outside))


def test_span_dynamic_conv_one_tap_is_the_value(backend, device):
    inputs = make(K=1, device=device)
    assert torch.equal(span_dynamic_conv(**inputs, kernel_size=1), inputs["value"])


def test_span_dynamic_conv_each_gradient(backend, device):
    assert_each_gradient(*pair(), make(device=device))


def test_span_dynamic_conv_gradcheck(backend, device):
    inputs = make(B=1, S=4, D=2, K=5, dtype=torch.float64, device=device)
    assert torch.autograd.gradcheck(pair(5)[0], [t.requires_grad_() for t in inputs.values()])


def test_span_dynamic_conv_second_derivative(backend, device):
    assert_second_derivative(*pair(), make(S=4, device=device), "span_dynamic_conv")


def test_span_dynamic_conv_checkpointed(backend, device):
    assert_checkpointed(pair()[0], make(S=4, device=device))


def test_span_dynamic_conv_traced(backend, device):
    assert_traced(pair()[0], make(S=4, device=device))


def test_span_dynamic_conv_one_tensor_in_two_slots(backend, device):
    # value and kernel_logits may be one tensor if a head is as wide as its kernel.
    x = torch.randn(2, 7, 6, device=device)
    results = []
    for function in pair(3):
        leaf = x.clone().requires_grad_()
        results.append(torch.autograd.grad(function(leaf, leaf).sin().sum(), leaf)[0])
    torch.testing.assert_close(*results)


def test_span_dynamic_conv_is_pure(backend, device):
    assert_pure(pair()[0], make(device=device))
    assert_pure(pair(1)[0], make(K=1, device=device))


def test_span_dynamic_conv_result_is_a_new_tensor(backend, device):
    inputs = make(K=1, device=device)
    before = inputs["value"].clone()
    span_dynamic_conv(**inputs, kernel_size=1).zero_()
    assert torch.equal(inputs["value"], before)


def test_span_dynamic_conv_compiled(backend, device):
    assert_compiled(pair(5)[0], make(K=5, device=device))


@pytest.mark.filterwarnings("ignore:.torch.jit.script", "ignore:There is a performance drop")
def test_span_dynamic_conv_transforms(backend, device):
    assert_transforms(*pair(), make(S=5, device=device))


def test_span_dynamic_conv_autocast(backend, device):
    inputs = make(device=device)
    # Numbers of bf16, as the linear layer before makes them: to round logits here would be its error, not the op's.
    inputs["kernel_logits"] = inputs["kernel_logits"].bfloat16().float()
    assert_autocast_2x(*pair(), inputs)


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str)
def test_span_dynamic_conv_autocast_of_mixed_dtypes(backend, device, dtypes, trained):
    # As transformers computes it: a softmax, and a product of windows and weights, which is in autocast's dtype.
    inputs = {k: t.to(d).requires_grad_(trained) for (k, t), d in zip(make(device=device).items(), dtypes, strict=True)}
    with torch.autocast(device.type, torch.bfloat16):
        y = span_dynamic_conv(**inputs, kernel_size=3)
        windows = torch.nn.functional.pad(inputs["value"], (0, 0, 1, 1)).unfold(1, 3, 1).reshape(2, 11, 2, 5, 3)
        weights = inputs["kernel_logits"].reshape(2, 11, 2, 3, 1).softmax(-2)
        expected = torch.matmul(windows, weights).reshape(2, 11, 10)
    assert y.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=3e-2, atol=3e-2)
    if trained:
        y.float().sum().backward()
        assert all(t.grad.dtype == t.dtype for t in inputs.values())
    else:
        with torch.autocast(device.type, torch.bfloat16):
            assert span_dynamic_conv(**inputs, kernel_size=3, out=torch.empty_like(y)).equal(y)


@pytest.mark.parametrize("name", ["value", "kernel_logits"])
def test_span_dynamic_conv_fp64_stays_under_autocast(backend, device, name):
    inputs = {k: t.double() for k, t in make(device=device).items()}
    with torch.autocast(device.type, torch.bfloat16):
        assert span_dynamic_conv(**inputs, kernel_size=3).dtype == torch.float64
        with pytest.raises(TypeError, match="one dtype, got"):
            span_dynamic_conv(**inputs | {name: inputs[name].float()}, kernel_size=3)


# out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_span_dynamic_conv_out(backend, device, dtype):
    inputs = make(dtype=dtype, device=device)
    wide = torch.full((2, 11, 25), 7.0, device=device, dtype=dtype)
    with torch.no_grad():
        y = span_dynamic_conv(**inputs, kernel_size=3, out=wide[..., 5:15])
    truth = reference_span_dynamic_conv(*(t.double() for t in inputs.values()), 3)
    assert y.data_ptr() == wide[..., 5:15].data_ptr() and y.shape == (2, 11, 10)
    assert_2x("out", wide[..., 5:15], reference_span_dynamic_conv(**inputs, kernel_size=3), truth)
    assert (wide[..., :5] == 7).all() and (wide[..., 15:] == 7).all()


def wide_values(B, S, C, device):
    """Memory that holds more than an `out`, filled with 7."""
    return torch.full((B, S, C), 7.0, device=device)


# Name -> an `out` of (2, 70, 6): more tokens than a block has.
OUTS = {
    "contiguous": lambda device: wide_values(2, 70, 6, device),
    "slice of channels": lambda device: wide_values(2, 70, 20, device)[..., 3:9],
    "slice of tokens": lambda device: wide_values(2, 75, 6, device)[:, 2:72],
    "every second token": lambda device: wide_values(2, 140, 6, device)[:, ::2],
    "every second row": lambda device: wide_values(4, 70, 6, device)[::2],
    "sequence first": lambda device: wide_values(70, 2, 6, device).transpose(0, 1),
    "channels first": lambda device: wide_values(2, 6, 70, device).transpose(1, 2),
    "every second channel": lambda device: wide_values(2, 70, 12, device)[..., ::2],
}


@pytest.mark.parametrize("layout", OUTS)
def test_span_dynamic_conv_out_layouts(backend, device, layout):
    inputs, out = make(S=70, D=3, device=device), OUTS[layout](device)
    whole = out._base if out._base is not None else out
    with torch.no_grad():
        assert span_dynamic_conv(**inputs, kernel_size=3, out=out) is out
        assert torch.equal(out, span_dynamic_conv(**inputs, kernel_size=3))
        out.fill_(7.0)
    assert (whole == 7).all()


@pytest.mark.parametrize("where", ["value", "kernel_logits", "a token on", "beside value"])
def test_span_dynamic_conv_out_in_the_memory_of_an_input(backend, device, where):
    # Tokens are read again after their neighbours are written: by another program, say.
    inputs = make(B=1, S=2000, H=2, D=3, device=device)
    if where == "a token on":
        whole = torch.randn(1, 2001, 6, device=device)
        inputs["value"], out = whole[:, :-1], whole[:, 1:]
    elif where == "beside value":
        inputs["value"], out = torch.randn(1, 2000, 12, device=device).split(6, -1)
    else:
        out = inputs[where]
    with torch.no_grad():
        expected = span_dynamic_conv(**inputs, kernel_size=3)
        assert torch.equal(span_dynamic_conv(**inputs, kernel_size=3, out=out), expected)


def test_span_dynamic_conv_kernel_writes_a_slice_itself(device):
    takes_rows = importlib.import_module("fastconv.ops._out").takes_rows
    inputs = make(S=70, D=3, device=device).values()
    direct = [name for name, make_out in OUTS.items() if takes_rows(make_out(device), *inputs)]
    assert direct == ["contiguous", "slice of channels", "every second token"]
    assert takes_rows(torch.empty(70, 20, device=device)[:, 3:9], *inputs)


@pytest.mark.parametrize("compiled", [False, True])
def test_span_dynamic_conv_out_of_shared_memory(backend, device, compiled):
    inputs = make(device=device)

    def run(value, kernel_logits, out):
        return span_dynamic_conv(value, kernel_logits, 3, out=out)

    torch._dynamo.reset()
    function = torch.compile(run, backend="aot_eager") if compiled else run
    expanded = torch.zeros(1, 1, 10, device=device).expand(2, 11, 10)
    windows = torch.zeros(2 * 11 * 10, device=device).as_strided((2, 11, 10), (11, 1, 1))
    for out in (expanded,) if compiled else (expanded, windows):
        with torch.no_grad(), pytest.raises(ValueError, match=r"must not share memory, got strides \((0, 0|11, 1)"):
            function(**inputs, out=out)


@pytest.mark.parametrize("layout", OUTS)
def test_span_dynamic_conv_out_compiled(backend, device, layout):
    inputs, out = make(S=70, D=3, device=device), OUTS[layout](device)

    def run(value, kernel_logits, out):
        return span_dynamic_conv(value, kernel_logits, 3, out=out)

    with torch.no_grad():
        expected = span_dynamic_conv(**inputs, kernel_size=3)
        for dynamic in (False, True):
            torch._dynamo.reset()
            torch.compile(run, backend="aot_eager", fullgraph=True, dynamic=dynamic)(**inputs, out=out.zero_())
            torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("trained", ["value", "kernel_logits", "out"])
def test_span_dynamic_conv_out_has_no_gradient(backend, device, trained):
    inputs = leaves(make(device=device) | {"out": torch.zeros(2, 11, 10, device=device)}, (trained,))
    with pytest.raises(ValueError, match="out can't be used where a gradient is needed"):
        span_dynamic_conv(**inputs, kernel_size=3)
    with torch.no_grad():
        span_dynamic_conv(**inputs, kernel_size=3)


# packing: windows end where sequences end

LENGTHS = ([7], [1, 2, 8, 3], [0, 5, 0, 1, 0], [4] * 6)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("kernel_size", [1, 5, 31])
def test_span_dynamic_conv_packed_parity(backend, device, lengths, kernel_size):
    packing = Packing.from_lengths(lengths, device=device)
    inputs = {k: t[0] for k, t in make(B=1, S=sum(lengths), K=kernel_size, device=device).items()}

    def run(function):
        return lambda value, kernel_logits: function(value, kernel_logits, kernel_size, packing=packing)

    assert_op_2x(run(span_dynamic_conv), run(reference_span_dynamic_conv), inputs)
    assert_inference_2x(run(span_dynamic_conv), run(reference_span_dynamic_conv), inputs)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_span_dynamic_conv_packed_is_each_sequence_alone(backend, device, lengths, dtype):
    # Bit for bit, and whatever the neighbours hold; gradients of a sequence come from itself alone.
    inputs = {k: t[0] for k, t in make(B=1, S=sum(lengths), K=5, dtype=dtype, device=device).items()}
    dy = torch.randn(sum(lengths), 10, device=device).to(dtype)
    packing = Packing.from_lengths(lengths, device=device)
    start = 0
    for length in lengths:
        own = slice(start, start + length)
        other = torch.ones(sum(lengths), 1, dtype=torch.bool, device=device)
        other[own] = False
        given = leaves({k: t.masked_fill(other, 1e4) for k, t in inputs.items()})
        alone = leaves({k: t[own][None] for k, t in inputs.items()})
        y, expected = span_dynamic_conv(**given, kernel_size=5, packing=packing), None
        if length:
            expected = span_dynamic_conv(**alone, kernel_size=5)
            assert torch.equal(y[own], expected[0])
            got = torch.autograd.grad(y, list(given.values()), dy.masked_fill(other, 0.0))
            want = torch.autograd.grad(expected, list(alone.values()), dy[own][None])
            for a, b in zip(got, want, strict=True):
                assert torch.equal(a[own], b[0]) and not a[:start].any() and not a[start + length :].any()
        start += length


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("neighbour", [float("inf"), float("nan")])
@pytest.mark.parametrize("where", ["value", "kernel_logits"])
def test_span_dynamic_conv_packed_next_to_no_numbers(backend, device, where, neighbour):
    inputs = {k: t[0] for k, t in make(B=1, S=14, K=9, device=device).items()}
    packing, own = Packing.from_lengths([5, 4, 5], device=device), slice(5, 9)
    alone = leaves({k: t[None, own] for k, t in inputs.items()})
    inputs[where][:5], inputs[where][9:] = neighbour, neighbour
    given = leaves(inputs)
    y = span_dynamic_conv(**given, kernel_size=9, packing=packing)[own]
    expected = span_dynamic_conv(**alone, kernel_size=9)[0]
    assert torch.equal(y, expected)
    got = torch.autograd.grad(y.sin().sum(), list(given.values()))
    want = torch.autograd.grad(expected.sin().sum(), list(alone.values()))
    assert all(torch.equal(a[own], b[0]) for a, b in zip(got, want, strict=True))


def test_span_dynamic_conv_rows_of_one_length_are_a_packing(backend, device):
    inputs = make(B=3, S=7, K=5, device=device)
    packed = span_dynamic_conv(
        *(t.flatten(0, 1) for t in inputs.values()), 5, packing=Packing.from_lengths([7, 7, 7], device=device)
    )
    assert torch.equal(packed.unflatten(0, (3, 7)), span_dynamic_conv(**inputs, kernel_size=5))


# The raw ops


def test_span_dynamic_conv_opcheck(device):
    pytest.importorskip("triton", reason="the raw ops are kernels, and the package triton is not installed")
    value, logits = make(S=5, device=device).values()
    packing = Packing.from_lengths([4, 6], device=device)
    ops = torch.ops.fastconv
    for before, after in ((None, None), (packing.before, packing.after)):
        v, w = (value, logits) if before is None else (value.flatten(0, 1), logits.flatten(0, 1))
        for save in (False, True):
            opcheck(ops.span_dynamic_conv_fwd.default, (v, w, 3, before, after, save))
        wide = torch.zeros(*v.shape[:-1], 20, device=device)
        opcheck(ops.span_dynamic_conv_fwd_out.default, (v, w, 3, before, after, wide[..., 5:15]))
        _, stats = ops.span_dynamic_conv_fwd(v, w, 3, before, after, True)
        dy = torch.randn_like(v)
        opcheck(ops.span_dynamic_conv_bwd.default, (dy, v, w, stats, 3, before, after))


@pytest.mark.parametrize("kernel_size", [3, 17])
def test_span_dynamic_conv_writes_every_element(device, poisoned_empty, kernel_size):
    # 17 taps are the two-pass backward; 70 tokens of one head are more than one block.
    pytest.importorskip("triton", reason="kernels write, and the package triton is not installed")
    with fastconv.backend("triton"):
        given = leaves(make(B=2, S=70, H=1, D=3, K=kernel_size, device=device))
        y = span_dynamic_conv(**given, kernel_size=kernel_size)
        assert not y.isnan().any()
        for gradient in torch.autograd.grad(y.sum(), list(given.values())):
            assert not gradient.isnan().any()


# Sizes at the edges, and bad input


@pytest.mark.parametrize(("B", "S"), [(0, 5), (2, 0), (0, 0)])
def test_span_dynamic_conv_empty_batch(backend, device, B, S):
    inputs = {k: t.requires_grad_() for k, t in make(B=B, S=S, device=device).items()}
    y = span_dynamic_conv(**inputs, kernel_size=3)
    assert y.shape == (B, S, 10)
    y.sum().backward()
    assert inputs["value"].grad.shape == (B, S, 10) and inputs["kernel_logits"].grad.shape == (B, S, 6)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"value": torch.ones(2, 11, 10, dtype=torch.int64)}, TypeError, r"value must be a real floating.*int64"),
        ({"value": torch.ones(2, 11, 10, dtype=torch.complex64)}, TypeError, r"value must be.*complex64"),
        ({"kernel_logits": torch.ones(2, 11, 6, dtype=torch.bool)}, TypeError, r"kernel_logits must be.*bool"),
        ({"kernel_size": 4}, ValueError, r"kernel_size must be odd, got 4"),
        ({"kernel_size": -1}, ValueError, r"kernel_size must be odd, got -1"),
        (
            {"kernel_logits": torch.ones(2, 11, 66), "kernel_size": 33},
            ValueError,
            r"kernel_size must be odd and at most 31, got 33",
        ),
        ({"kernel_size": 3.0}, TypeError, r"kernel_size must be an int, got float"),
        ({"kernel_size": 5}, ValueError, r"divisible by kernel_size 5.*got \(2, 11, 6\) and \(2, 11, 10\)"),
        ({"value": torch.ones(2, 11, 9)}, ValueError, r"H\*D divisible by H, got \(2, 11, 6\) and \(2, 11, 9\)"),
        ({"value": torch.ones(2, 10, 10)}, ValueError, r"got \(2, 10, 10\) and \(2, 11, 6\)"),
        ({"value": torch.ones(11, 10)}, ValueError, r"\(B, S, H\*D\) and \(B, S, H\*K\), got \(11, 10\)"),
        (
            {"kernel_logits": torch.ones(2, 11, 6, device="meta")},
            ValueError,
            r"value is on cpu but kernel_logits is on",
        ),
        ({"kernel_logits": torch.ones(2, 11, 6).half()}, TypeError, r"one dtype, got torch.float32 and torch.float16"),
        ({"packing": Packing.from_lengths([11, 11])}, ValueError, r"\(T, H\*D\) and \(T, H\*K\), got \(2, 11, 10\)"),
        (
            {"value": torch.ones(9, 10), "kernel_logits": torch.ones(9, 6), "packing": Packing.from_lengths([4, 4])},
            ValueError,
            "packing covers 8 tokens, but the tensors have 9",
        ),
        (
            {"value": torch.ones(9, 10), "kernel_logits": torch.ones(9, 6), "packing": torch.tensor([0, 9])},
            TypeError,
            "packing must be a fastconv.Packing or None, got Tensor",
        ),
        ({"out": [1.0]}, TypeError, r"out must be a torch.Tensor or None, got list"),
        ({"out": torch.ones(2, 11, 9)}, ValueError, r"out must be \(2, 11, 10\).*got \(2, 11, 9\)"),
        ({"out": torch.ones(2, 11, 10).half()}, ValueError, r"out must be .*float32.*got .*float16"),
    ],
)
def test_span_dynamic_conv_bad_input(backend, changes, error, message):
    with pytest.raises(error, match=message):
        span_dynamic_conv(**({**make(), "kernel_size": 3} | changes))


@pytest.mark.parametrize("kernel_size", [33, 4, 0])
def test_span_dynamic_conv_module_knows_its_taps(kernel_size):
    with pytest.raises(ValueError, match=f"kernel_size must be odd and at most 31, got {kernel_size}"):
        fastconv.nn.SpanDynamicConv(kernel_size)
