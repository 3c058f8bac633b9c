"""masked_attention against the reference: masks, rows without a key, gradients, inference, layouts."""

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
from shapes import LAYOUTS, with_layout
from tolerance import assert_2x, assert_op_2x

from fastconv.ops import masked_attention
from fastconv.reference.ops import masked_attention as reference_masked_attention

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MASKS = ("none", "lengths", "left", "empty row", "every row empty", "queries and keys", "heads")
KINDS = ("bool", "lowest", "-inf")


def make(B=3, Sq=7, Sk=None, H=2, D=5, dtype=torch.float32, device="cpu"):
    """q, k and v."""
    Sk = Sq if Sk is None else Sk
    shapes = {"q": (B, Sq, H, D), "k": (B, Sk, H, D), "v": (B, Sk, H, D)}
    return {name: torch.randn(shape).to(device, dtype) for name, shape in shapes.items()}


def make_mask(name, kind="bool", B=3, Sq=7, H=2, dtype=torch.float32, device="cpu"):
    """A mask over Sq queries and as many keys; None for "none"."""
    if name == "none":
        return None
    if name in ("queries and keys", "heads"):
        keep = torch.rand(B, 1 if name == "queries and keys" else H, Sq, Sq) < 0.6
        keep[..., 0] = True
        keep[1, 0, 2] = False  # a row without a key
    else:
        lengths = torch.tensor([Sq, max(1, Sq // 2), {"empty row": 0}.get(name, 1)])[:B]
        keep = torch.arange(Sq) < (0 * lengths if name == "every row empty" else lengths)[:, None]
        keep = (keep.flip(-1) if name == "left" else keep)[:, None, None]
    if kind != "bool":
        forbidden = {"-inf": float("-inf"), "lowest": torch.finfo(dtype).min}[kind]
        # What is allowed gets a bias, which must be added.
        return torch.where(keep, torch.randn(keep.shape).to(dtype), forbidden).to(device)
    return keep.to(device)


def assert_parity(functions, inputs, dy=None):
    """The 2x rule with and without gradients.

    In fp32 with 20 roundings: the exponentials of PyTorch's CPU kernel are right to 20 ulp (pytorch #115151), and its
    backward takes the probabilities from the rounded logsumexp of the scores.
    """
    if inputs["k"].shape[1] > 1:
        assert_op_2x(*functions, inputs, dy, roundings=20 if inputs["q"].dtype == torch.float32 else 1)
    else:
        assert_fp64(*functions, inputs)  # dq and dk are 0, of which no rounding is a part
    with torch.no_grad():
        y = functions[0](**inputs)
    truth = functions[1](**{name: t.double() for name, t in inputs.items()})
    rounding = 20 * torch.finfo(y.dtype).eps if y.dtype == torch.float32 else None
    assert_2x("under no_grad", y, functions[1](**inputs), truth, rounding=rounding)


def pair(mask=None, **options):
    """The op and its reference with one mask."""
    return (
        lambda q, k, v: masked_attention(q, k, v, mask=mask, **options),
        lambda q, k, v: reference_masked_attention(q, k, v, mask=mask, **options),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MASKS)
def test_masked_attention_parity(backend, device, name, kind, dtype):
    functions = pair(make_mask(name, kind, dtype=dtype, device=device))
    inputs = make(dtype=dtype, device=device)
    assert_parity(functions, inputs)


@pytest.mark.parametrize("name", MASKS)
def test_masked_attention_fp64(backend, device, name):
    assert_fp64(*pair(make_mask(name, "lowest", dtype=torch.float64, device=device)), make(device=device))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_masked_attention_fp32_mask(backend, device, dtype):
    # fp32's lowest number is -inf in the halves.
    functions = pair(make_mask("empty row", "lowest", device=device))
    assert_parity(functions, make(dtype=dtype, device=device))


@pytest.mark.parametrize("length", [1, 2, 63, 65, 127])
@pytest.mark.parametrize("name", ["none", "empty row", "queries and keys"])
def test_masked_attention_lengths(backend, device, name, length):
    # The mask of queries and keys takes the keys of a third query.
    name = "empty row" if length < 3 and name != "none" else name
    functions = pair(make_mask(name, H=1, Sq=length, device=device))
    assert_parity(functions, make(H=1, Sq=length, device=device))


@pytest.mark.parametrize(("H", "D"), [(1, 1), (1, 63), (3, 3), (6, 64), (4, 48), (8, 2)])
def test_masked_attention_heads(backend, device, H, D):
    functions = pair(make_mask("lengths", B=2, device=device))
    assert_parity(functions, make(B=2, H=H, D=D, device=device))


@pytest.mark.parametrize(("Sq", "Sk"), [(1, 7), (7, 2), (5, 9)])
def test_masked_attention_other_keys(backend, device, Sq, Sk):
    keep = torch.rand(3, 1, 1, Sk, device=device) < 0.7
    keep[0] = False
    assert_parity(pair(keep), make(Sq=Sq, Sk=Sk, device=device))


@pytest.mark.parametrize(
    "shape", [(), (7,), (1,), (7, 7), (1, 7), (7, 1), (2, 7, 7), (2, 1, 7), (1, 1, 1, 1), (3, 1, 7, 1)], ids=str
)
@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_masked_attention_broadcast_masks(backend, device, shape, kind):
    mask = torch.randn(shape, device=device)
    mask = mask > 0 if kind == "bool" else mask
    assert_parity(pair(mask), make(device=device))


@pytest.mark.parametrize("expanded", [False, True])
def test_masked_attention_expanded_mask(backend, device, expanded):
    mask = make_mask("lengths", device=device).expand(3, 2, 7, 7)
    assert_parity(pair(mask if expanded else mask.contiguous()), make(device=device))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_masked_attention_layouts(backend, device, layout, dtype):
    inputs = make(dtype=dtype, device=device)
    dy = with_layout(torch.randn(3, 7, 2, 5, device=device).to(dtype), layout)
    functions = pair(make_mask("empty row", device=device))
    for name in inputs:
        changed = inputs | {name: with_layout(inputs[name], layout)}
        assert_parity(functions, changed, dy)
    # Slices of one packed projection, heads in the middle: what the modules hand over.
    packed = torch.randn(3, 7, 3 * 10, device=device).to(dtype)
    parts = dict(zip("qkv", (t.unflatten(-1, (2, 5)) for t in packed.split(10, -1)), strict=True))
    assert_parity(functions, parts, dy)


@pytest.mark.parametrize("scale", [1.0, 0.01, 3.0])
def test_masked_attention_scale(backend, device, scale):
    assert_parity(pair(make_mask("empty row", device=device), scale=scale), make(device=device))


def test_masked_attention_one_key(backend, device):
    inputs = {k: t.requires_grad_() for k, t in make(Sk=1, device=device).items()}
    y = masked_attention(**inputs)
    assert torch.equal(y, inputs["v"].expand(3, 7, 2, 5))
    y.sum().backward()
    for name in "qk":
        torch.testing.assert_close(inputs[name].grad, torch.zeros_like(inputs[name]), rtol=0, atol=1e-5)


def test_masked_attention_large_scores(backend, device):
    inputs = make(device=device)
    inputs["q"] = 1e3 * inputs["q"]
    functions = pair(make_mask("lengths", device=device))
    assert_inference_2x(*functions, inputs)
    leaf = inputs["q"].requires_grad_()
    assert torch.autograd.grad(functions[0](**inputs).sum(), leaf)[0].isfinite().all()


def test_masked_attention_gradient_of_the_mask(backend, device):
    inputs = make(device=device) | {"mask": torch.randn(2, 7, 7, device=device)}
    assert_parity((masked_attention, reference_masked_attention), inputs)


@pytest.mark.parametrize("kind", KINDS)
def test_masked_attention_forbidden_keys_get_no_gradient(backend, device, kind):
    inputs = {k: t.requires_grad_() for k, t in make(device=device).items()}
    y = masked_attention(**inputs, mask=make_mask("lengths", kind, device=device))
    y.sin().sum().backward()
    for name in "kv":
        assert torch.equal(inputs[name].grad[1, 3:], torch.zeros(4, 2, 5, device=device)), name
        assert inputs[name].grad[1, :3].abs().min() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_masked_attention_forbidden_keys_do_not_show(backend, device, kind):
    mask, inputs = make_mask("lengths", kind, device=device), make(device=device)
    expected = masked_attention(**inputs, mask=mask)
    for name in "kv":
        inputs[name][1, 3:] = 1e6
    assert torch.equal(masked_attention(**inputs, mask=mask)[1], expected[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_masked_attention_row_without_a_key_is_the_average(backend, device, kind, dtype):
    inputs = make(dtype=dtype, device=device)
    # Scores that the lowest number of fp16 alone would not hide.
    inputs["q"] = 5 * inputs["q"]
    y = masked_attention(**inputs, mask=make_mask("every row empty", kind, dtype=dtype, device=device))
    average = inputs["v"].double().mean(1, keepdim=True).expand(3, 7, 2, 5)
    assert_2x("average", y, average.to(dtype), average)


@pytest.mark.parametrize("mask", ["none", "empty row"])
def test_masked_attention_each_gradient(backend, device, mask):
    assert_each_gradient(*pair(make_mask(mask, device=device)), make(device=device))


def test_masked_attention_gradcheck(backend, device):
    inputs = make(B=2, Sq=2, H=1, D=2, dtype=torch.float64, device=device)
    mask = make_mask("lengths", B=2, Sq=2, H=1, device=device)
    assert torch.autograd.gradcheck(pair(mask)[0], [t.requires_grad_() for t in inputs.values()])


def test_masked_attention_one_tensor_in_three_slots(backend, device):
    x = make(device=device)["q"]
    results = []
    for function in pair(make_mask("empty row", device=device)):
        leaf = x.clone().requires_grad_()
        results.append(torch.autograd.grad(function(leaf, leaf, leaf).sin().sum(), leaf)[0])
    torch.testing.assert_close(*results)


def test_masked_attention_is_pure(backend, device):
    mask = make_mask("empty row", "lowest", device=device)
    before = mask.clone()
    assert_pure(pair(mask)[0], make(device=device))
    assert torch.equal(mask, before)


@pytest.mark.parametrize("mask", ["none", "empty row"])
def test_masked_attention_compiled(backend, device, mask):
    assert_compiled(pair(make_mask(mask, device=device))[0], make(device=device))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("mask", ["none", "lengths", "empty row"])
def test_masked_attention_transforms(backend, device, mask):
    assert_transforms(*pair(make_mask(mask, device=device)), make(device=device))


@pytest.mark.parametrize("mask", ["none", "empty row"])
def test_masked_attention_autocast(backend, device, mask):
    assert_autocast_2x(*pair(make_mask(mask, "lowest", device=device)), make(device=device))


# Sizes at the edges


@pytest.mark.parametrize(("B", "Sq"), [(0, 5), (2, 0), (0, 0)])
@pytest.mark.parametrize("masked", [False, True])
def test_masked_attention_empty_batch(backend, device, B, Sq, masked):
    inputs = {k: t.requires_grad_() for k, t in make(B=B, Sq=Sq, Sk=5, device=device).items()}
    mask = torch.zeros(B, 1, 1, 5, device=device, dtype=torch.bool) if masked else None
    y = masked_attention(**inputs, mask=mask)
    assert y.shape == (B, Sq, 2, 5)
    y.sum().backward()
    assert torch.equal(inputs["v"].grad, torch.zeros_like(inputs["v"]))
