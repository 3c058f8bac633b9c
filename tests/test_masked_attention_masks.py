"""masked_attention against the reference over its options: masks, sizes, relative positions, head_mask, extremes."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from op_suite import assert_fp64, leaves
from tolerance import assert_2x, assert_op_2x

from fastconv.ops import masked_attention
from fastconv.ops.masked_attention import attention_dropout_mask
from fastconv.reference.ops import RelativePositions
from fastconv.reference.ops import masked_attention as reference_masked_attention

INF = float("inf")


def make(B=2, Sq=7, Sk=None, H=2, D=5, dtype=torch.float32, device="cpu"):
    """q, k and v."""
    Sk = Sq if Sk is None else Sk
    shapes = {"q": (B, Sq, H, D), "k": (B, Sk, H, D), "v": (B, Sk, H, D)}
    return {name: torch.randn(shape).to(device, dtype) for name, shape in shapes.items()}


def pair(**options):
    """The op and its reference with the same options."""
    return (
        lambda **tensors: masked_attention(**tensors, **options),
        lambda **tensors: reference_masked_attention(**tensors, **options),
    )


def runs_kernels(backend, D, dtype):
    """Whether heads of that size have a kernel."""
    limit = 256 if dtype.itemsize == 2 else 128
    return backend == "triton" and limit >= D


def roundings(dtype):
    """How many the 2x rule allows beside the 2x: 20 in fp32, where the reference's own error is a few.

    The kernels' dP - delta is a difference of two sums of D products, whose rounding is relative to those; PyTorch's
    kernels for a CPU have exponentials that are right to 20 ulp (pytorch #115151).
    """
    return 20 if dtype == torch.float32 else 1


# Every pair of options. Blocks are 16 to 128 queries and 16 to 128 keys, so 63, 65 and 127 are in several.

KINDS = (
    "none",
    "causal",
    "lengths",
    "lengths causal",
    "bool keys",
    "additive keys",
    "bool keys causal",
    "additive keys lengths",
    "bool pairs",
    "additive pairs",
    "bool pairs causal",
    "additive pairs lengths causal",
    "bool heads",
    "additive heads causal",
)
FACTORS = {
    "kind": KINDS,
    "size": ((1, 1), (2, 2), (63, 63), (65, 65), (127, 2), (1, 65), (3, 65), (63, 127)),
    "D": (5, 16, 48, 64, 80, 128, 256),
    # What is there twice is tried more often.
    "relative": (None, None, None, "relative_key", "relative_key_query"),
    "dropout_p": (0.0, 0.0, 0.3),
    "dtype": (torch.float64, torch.float32, torch.float16, torch.bfloat16),
}


def covering(factors):
    """Cases in which every two values of different factors meet: always the same ones, chosen greedily."""
    drawn = random.Random(0)
    names = list(factors)
    missing = {((a, x), (b, y)) for a, b in itertools.combinations(names, 2) for x in factors[a] for y in factors[b]}
    cases = []
    for wanted in sorted(missing, key=repr):
        if wanted in missing:
            candidates = [{n: drawn.choice(factors[n]) for n in names} | dict(wanted) for _ in range(30)]
            found = [set(itertools.combinations(case.items(), 2)) & missing for case in candidates]
            best = max(range(30), key=lambda i: len(found[i]))
            cases.append(candidates[best])
            missing -= found[best]
    return cases


CASES = covering(FACTORS)


def describe(case):
    return " ".join(str(value).removeprefix("torch.") for value in case.values())


def make_masks(kind, B, H, Sq, Sk, dtype, device):
    """The options that say it; with rows without a key where there is a mask or lengths."""
    options = {"causal": True} if "causal" in kind else {}
    if "lengths" in kind:
        options["lengths"] = torch.tensor([Sk, 0, Sk // 2 + 1][:B], device=device)
    shapes = {"keys": (B, 1, 1, Sk), "pairs": (B, 1, Sq, Sk), "heads": (H, Sq, Sk)}
    shape = next((shapes[name] for name in shapes if name in kind), None)
    if shape is None:
        return options
    keep = torch.rand(shape) < 0.6
    keep[0].select(-2, -1)[:] = False
    if "bool" in kind:
        return options | {"mask": keep.to(device)}
    forbidden = torch.finfo(dtype).min if dtype == torch.float16 else -INF
    return options | {"mask": torch.where(keep, torch.randn(shape).to(dtype), forbidden).to(device)}


@pytest.mark.parametrize("case", CASES, ids=describe)
def test_masked_attention_pairs_of_options(backend, device, case):
    kind, (Sq, Sk), D, relative, dropout_p, dtype = case.values()
    B, H = (3, 1) if "lengths" in kind else (1, 2) if "heads" in kind else (2, 1)
    inputs, masks = make(B, Sq, Sk, H, D, dtype, device), make_masks(kind, B, H, Sq, Sk, dtype, device)
    if relative is not None:
        inputs["table"] = torch.randn(2 * max(Sq, Sk) + 3, D).to(device, dtype)
    dropout, keep = {}, {}
    if dropout_p:
        dropout = {"dropout_p": dropout_p, "seed": torch.tensor(2**40 + D, device=device)}
        mask = attention_dropout_mask(B, H, Sq, Sk, **dropout, by_kernels=runs_kernels(backend, D, dtype))
        keep = {"dropout_p": dropout_p, "dropout_mask": mask}

    def positions(table):
        return None if table is None else RelativePositions(table, relative == "relative_key_query")

    def op(q, k, v, table=None):
        return masked_attention(q, k, v, relative=positions(table), **masks, **dropout)

    def reference(q, k, v, table=None):
        return reference_masked_attention(q, k, v, relative=positions(table), **masks, **keep)

    if dtype == torch.float64:
        assert_fp64(op, reference, inputs)
    elif Sk == 1:
        assert_one_key(op, reference, inputs)
    else:
        assert_op_2x(op, reference, inputs, roundings=roundings(dtype))


def assert_one_key(op, reference, inputs):
    """The 2x rule for y and dv; every other gradient is 0: a single key's probability is 1 whatever its score.

    The kernels take that 0 as the difference of two equal sums that are not added up in the same order, and the second
    of which is of rounded values, so one rounding of what is added up remains.
    """
    given, dy = leaves(inputs), torch.randn_like(inputs["q"])
    y = op(**given)
    gradients = dict(zip(given, torch.autograd.grad(y, list(given.values()), dy), strict=True))
    for name, gradient in gradients.items():
        if name != "v":
            atol = 100 * torch.finfo(y.dtype).eps
            torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=atol)

    def with_values(function, v):
        return function(**{name: t.to(v.dtype) for name, t in inputs.items() if name != "v"}, v=v)

    assert_op_2x(lambda v: with_values(op, v), lambda v: with_values(reference, v), {"v": inputs["v"]}, dy)


# Rows without a key

# What may say that no query has a key, alone or together, for the last of two rows; over 65 keys, which are in several
# blocks.
LAST_ROW = torch.tensor([True, False])[:, None, None, None]
EVEN = torch.arange(65) % 2 == 0
EMPTY = {
    "bool": {"mask": LAST_ROW.expand(2, 1, 1, 65)},
    "bool pairs": {"mask": LAST_ROW.expand(2, 1, 3, 65).contiguous()},
    "-inf": {"mask": torch.zeros(2, 1, 1, 65).masked_fill(~LAST_ROW, -INF)},
    "-inf pairs": {"mask": torch.zeros(2, 2, 3, 65).masked_fill(~LAST_ROW, -INF)},
    "lowest": {"mask": torch.zeros(2, 1, 1, 65).masked_fill(~LAST_ROW, torch.finfo(torch.float32).min)},
    "lowest of fp16": {"mask": torch.zeros(2, 1, 1, 65).masked_fill(~LAST_ROW, -65504.0).half()},
    "lengths": {"lengths": torch.tensor([65, 0])},
    "lengths causal": {"lengths": torch.tensor([65, 0]), "causal": True},
    "lengths and a mask": {"lengths": torch.tensor([65, 5]), "mask": LAST_ROW | (torch.arange(65) > 5)},
    "lengths and pairs": {
        "lengths": torch.tensor([65, 5]),
        "mask": (LAST_ROW | (torch.arange(65) > 5)).expand(2, 1, 3, 65),
    },
    "causal and a mask": {"causal": True, "mask": LAST_ROW | (torch.arange(65) > 64)},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("kind", EMPTY)
def test_masked_attention_rows_without_a_key(backend, device, kind, dtype):
    options = {name: t.to(device) if isinstance(t, torch.Tensor) else t for name, t in EMPTY[kind].items()}
    inputs = make(Sq=3, Sk=65, D=16, dtype=dtype, device=device)
    # Scores that the lowest number of fp16 alone would not hide.
    inputs["q"] = 5 * inputs["q"]
    y = masked_attention(**inputs, **options)
    last = slice(1, 2) if kind != "causal and a mask" else slice(0, 0)
    average = inputs["v"].double().mean(1, keepdim=True).expand(2, 3, 2, 16)
    # A mean of 65 numbers in whatever order.
    rounding = 4 * torch.finfo(dtype).eps
    assert_2x("average", y[last], average.to(dtype)[last], average[last], rounding=rounding)
    assert_op_2x(*pair(**options), inputs, roundings=roundings(dtype))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("Sq", "Sk"), [(70, 40), (40, 2)])
def test_masked_attention_causal_with_more_queries_than_keys(backend, device, Sq, Sk, masked):
    # The first Sq - Sk queries come before every key.
    options = {"causal": True, "mask": (torch.arange(Sk, device=device) > 0) if masked else None}
    inputs = make(B=1, Sq=Sq, Sk=Sk, device=device)
    y, average = masked_attention(**inputs, **options), inputs["v"].double().mean(1, keepdim=True)
    early = Sq - Sk + (1 if masked else 0)
    average = average.expand(1, early, 2, 5)
    assert_2x("average", y[:, :early], average.float(), average)
    assert not torch.allclose(y[:, -1:].double(), average[:, :1])
    assert_fp64(*pair(**options), inputs)


# Extreme scores and masks


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"lengths": torch.tensor([65, 1])}], ids=str)
def test_masked_attention_extreme_scores(backend, device, options):
    # +-1e4, exact in fp32: what is left of the probabilities is the keys of the largest score, so the gradients are no
    # rounding's; a logsumexp instead of the largest score and the sum would lose the number of those keys.
    options = {name: t.to(device) if isinstance(t, torch.Tensor) else t for name, t in options.items()}
    inputs = make(Sq=65, H=1, D=16, device=device)
    inputs["q"] = 32.0 * inputs["q"].sign()
    inputs["k"] = 32.0 * inputs["k"].sign()[:, torch.arange(65) // 4]
    scores = torch.einsum("bqhd,bkhd->bhqk", inputs["q"], inputs["k"])
    assert scores.abs().max() > 1e4
    functions = pair(**options, scale=1.0)
    if backend == "triton":
        assert_op_2x(*functions, inputs, roundings=20)
        return
    # The backward of PyTorch's kernel for a CPU has the logsumexp.
    given, truth = leaves(inputs), functions[1](**{name: t.double() for name, t in inputs.items()})
    rounding = 20 * torch.finfo(torch.float32).eps
    assert_2x("output", functions[0](**given), functions[1](**inputs), truth, rounding=rounding)
    for gradient in torch.autograd.grad(functions[0](**given).sin().sum(), list(given.values())):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("wide", [False, True], ids=["mask of their dtype", "mask in fp32"])
@pytest.mark.parametrize("shape", [(2, 1, 1, 65), (2, 1, 3, 65)], ids=str)
def test_masked_attention_extreme_masks(backend, device, shape, wide, dtype):
    # -1e4 for every key of a row is no reason to forbid them: it changes nothing but the scores' rounding.
    mask = torch.zeros(shape)
    mask[0], mask[1, ..., ::3], mask[1, ..., 1::3] = -1e4, -INF, 1e4
    mask = mask.to(device, torch.float32 if wide else dtype)
    inputs = make(Sq=3, Sk=65, D=16, dtype=dtype, device=device)
    assert_op_2x(*pair(mask=mask), inputs, roundings=roundings(dtype))
    assert_fp64(*pair(mask=mask.double()), inputs)


# Gradients of what is added and multiplied

GRADIENT_OPTIONS = {
    "alone": lambda device: {},
    "lengths": lambda device: {"lengths": torch.tensor([33, 0], device=device)},
    "causal": lambda device: {"causal": True},
    "lengths causal": lambda device: {"lengths": torch.tensor([20, 0], device=device), "causal": True},
}


@pytest.mark.parametrize("options", GRADIENT_OPTIONS)
@pytest.mark.parametrize("shape", [(), (33,), (2, 1, 1, 33), (2, 3, 33), (1, 1, 3, 1), (2, 2, 3, 33)], ids=str)
def test_masked_attention_gradient_of_an_additive_mask(backend, device, shape, options):
    inputs = make(Sq=3, Sk=33, device=device) | {"mask": torch.randn(shape, device=device)}
    assert_fp64(*pair(**GRADIENT_OPTIONS[options](device)), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_masked_attention_gradient_of_a_mask_that_forbids(backend, device, causal, dtype):
    inputs = make(Sq=5, Sk=33, dtype=dtype, device=device)
    forbidden = torch.rand(2, 1, 5, 33, device=device) < 0.4
    forbidden[1, 0, 2] = True
    inputs["mask"] = torch.randn(2, 1, 5, 33, device=device).to(dtype).masked_fill(forbidden, -INF)
    assert_op_2x(*pair(causal=causal), inputs, roundings=20 if dtype == torch.float32 else 1)
    mask = inputs.pop("mask").requires_grad_()
    (gradient,) = torch.autograd.grad(masked_attention(**inputs, mask=mask, causal=causal).sin().sum(), mask)
    assert not gradient[forbidden].any() and gradient[~forbidden].any()


@pytest.mark.parametrize("with_keys", [False, True])
@pytest.mark.parametrize(
    ("Sq", "Sk", "P"), [(9, 9, 9), (9, 9, 30), (1, 9, 12), (9, 1, 9), (1, 1, 1), (2, 9, 9), (12, 9, 12)]
)
def test_masked_attention_relative_positions(backend, device, Sq, Sk, P, with_keys):
    inputs = make(Sq=Sq, Sk=Sk, device=device) | {"table": torch.randn(2 * P - 1, 5, device=device)}

    def run(function):
        return lambda q, k, v, table: function(q, k, v, relative=RelativePositions(table, with_keys))

    assert_fp64(run(masked_attention), run(reference_masked_attention), inputs)
    table = inputs["table"].requires_grad_()
    (gradient,) = torch.autograd.grad(run(masked_attention)(**inputs | {"table": table}).sin().sum(), table)
    # The distances that there are: from the first query to the last key, from the last query to the first key.
    reached = slice(P - 1 + (Sk - Sq) - (Sk - 1), P - 1 + Sk)
    outside = torch.ones(2 * P - 1, dtype=torch.bool, device=device)
    outside[reached] = False
    assert not gradient[outside].any() and (Sk == 1 or gradient[~outside].any(-1).all())


@pytest.mark.parametrize("trained", ["q", "k", "v", "mask", "table"])
def test_masked_attention_gradient_of_one_of_five(backend, device, trained):
    inputs = make(Sq=5, device=device)
    inputs |= {"mask": torch.randn(5, 5, device=device), "table": torch.randn(11, 5, device=device)}

    def run(function):
        given = leaves(inputs, (trained,))
        table = given.pop("table")
        y = function(**given, relative=RelativePositions(table, True))
        return torch.autograd.grad(y.sin().sum(), (given | {"table": table})[trained])[0]

    torch.testing.assert_close(run(masked_attention), run(reference_masked_attention), rtol=1e-4, atol=1e-5)


HEAD_MASKS = [(), (2, 1, 1), (2, 2, 1, 1), (2, 1, 9, 1), (2, 2, 9, 35), (35,), (1, 2, 1, 35)]


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("shape", HEAD_MASKS, ids=str)
def test_masked_attention_head_mask(backend, device, shape, relative):
    inputs = make(Sq=9, Sk=35, device=device) | {"head_mask": torch.randn(shape, device=device)}
    options = {"lengths": torch.tensor([0, 20], device=device), "causal": True}
    if relative:
        options["relative"] = RelativePositions(torch.randn(69, 5, dtype=torch.float64, device=device))
    assert_fp64(*pair(**options), inputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 1, 1), (2, 2, 9, 35)], ids=str)
def test_masked_attention_head_mask_in_half_precision(backend, device, shape, dtype):
    # The kernels multiply the result, the reference the probabilities: as many roundings, elsewhere.
    inputs = make(Sq=9, Sk=35, dtype=dtype, device=device) | {"head_mask": torch.rand(shape, device=device).to(dtype)}
    assert_op_2x(*pair(), inputs)


def test_masked_attention_head_that_is_masked(backend, device):
    inputs, head_mask = leaves(make(device=device)), torch.tensor([1.0, 0.0], device=device).view(2, 1, 1)
    y = masked_attention(**inputs, head_mask=head_mask)
    assert not y[:, :, 1].any() and torch.equal(y[:, :, 0], masked_attention(**inputs)[:, :, 0])
    for gradient in torch.autograd.grad(y.sin().sum(), list(inputs.values())):
        assert not gradient[:, :, 1].any() and gradient[:, :, 0].any()
