"""masked_attention of packed batches: each sequence alone, whatever its neighbours hold."""

from __future__ import annotations

import pytest
import torch
from op_suite import assert_compiled, assert_fp64, assert_pure, leaves
from tolerance import assert_2x, assert_op_2x

import fastconv
from fastconv import Packing
from fastconv.ops import masked_attention
from fastconv.ops.masked_attention import attention_dropout_mask
from fastconv.reference.ops import RelativePositions
from fastconv.reference.ops import masked_attention as reference_masked_attention

INF, NAN = float("inf"), float("nan")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# One sequence; several in a block; empty ones; some over several blocks, which begin within one and on its edge.
LENGTHS = ([7], [1, 2, 8, 3], [0, 5, 0, 1, 0], [31, 33, 64, 1], [32, 32])


def make(Tq, Tk=None, H=2, D=5, dtype=torch.float32, device="cpu"):
    """q, k and v of so many tokens."""
    shapes = {"q": (Tq, H, D), "k": (Tq if Tk is None else Tk, H, D)}
    shapes["v"] = shapes["k"]
    return {name: torch.randn(shape).to(device, dtype) for name, shape in shapes.items()}


def pair(**options):
    """The op and its reference with the same options."""
    return (
        lambda **tensors: masked_attention(**tensors, **options),
        lambda **tensors: reference_masked_attention(**tensors, **options),
    )


def roundings(dtype):
    """How many the 2x rule allows beside the 2x, as in the tests of masks."""
    return 20 if dtype == torch.float32 else 1


def spans(lengths):
    """Where each sequence lies."""
    ends = [sum(lengths[:n]) for n in range(len(lengths) + 1)]
    return [slice(*ends[n : n + 2]) for n in range(len(lengths))]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", [[1, 2, 8, 3], [31, 33, 64, 1]], ids=str)
def test_masked_attention_packed_parity(backend, device, lengths, dtype, causal):
    inputs = make(sum(lengths), H=1, dtype=dtype, device=device)
    functions = pair(packing=Packing.from_lengths(lengths, device=device), causal=causal)
    assert_op_2x(*functions, inputs, roundings=roundings(dtype))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_masked_attention_packed_fp64(backend, device, lengths, causal):
    packing = Packing.from_lengths(lengths, device=device)
    H = 1 if sum(lengths) > 100 else 2
    assert_fp64(*pair(packing=packing, causal=causal), make(sum(lengths), H=H, device=device))


@pytest.mark.parametrize("D", [1, 16, 48, 80, 128, 256])
def test_masked_attention_packed_heads(backend, device, D):
    lengths = [3, 0, 40]
    inputs = make(43, D=D, dtype=torch.float16, device=device)
    assert_op_2x(*pair(packing=Packing.from_lengths(lengths, device=device)), inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_attention_packed_is_each_sequence_alone(backend, device, dtype):
    # By the op itself, for the result and for the gradients; the neighbours hold large numbers.
    inputs, own = make(5 + 40 + 30, dtype=dtype, device=device), slice(5, 45)
    alone = {name: t[None, own].clone() for name, t in inputs.items()}
    for t in inputs.values():
        t[:5], t[45:] = 1e4, -1e4
    dy = torch.randn(40, 2, 5, device=device).to(dtype)
    truth_inputs = {name: t.double() for name, t in alone.items()}
    got = run(masked_attention, inputs, own, dy, packing=Packing.from_lengths([5, 40, 30], device=device))
    expected = run(masked_attention, alone, 0, dy)
    truth = run(reference_masked_attention, truth_inputs, 0, dy.double())
    rounding = roundings(dtype) * torch.finfo(dtype).eps
    for name, a, b, true in zip(("y", "dq", "dk", "dv"), got, expected, truth, strict=True):
        assert_2x(name, a, b, true, rounding=rounding)


def run(function, inputs, own, dy, **options):
    """The result and the gradients of what `own` selects."""
    given = leaves(inputs)
    y = function(**given, **options)[own]
    return [y, *(t[own] for t in torch.autograd.grad(y, list(given.values()), dy))]


@pytest.mark.parametrize("neighbour", [INF, NAN])
@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_masked_attention_packed_next_to_no_numbers(device, where, neighbour):
    # Natively only: in a block of the kernels, sequences share products, where a probability of 0 times NaN is NaN.
    inputs, own = make(5 + 20 + 30, device=device), slice(5, 25)
    alone = {name: t[None, own].clone() for name, t in inputs.items()}
    inputs[where][:5], inputs[where][25:] = neighbour, neighbour
    dy = torch.randn(20, 2, 5, device=device)
    with fastconv.backend("native"):
        got = run(masked_attention, inputs, own, dy, packing=Packing.from_lengths([5, 20, 30], device=device))
        expected = run(masked_attention, alone, 0, dy)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_masked_attention_packed_gradient_stays_in_its_sequence(backend, device):
    lengths = [5, 40, 0, 30]
    inputs, packing = leaves(make(75, device=device)), Packing.from_lengths(lengths, device=device)
    for own in spans(lengths):
        y = masked_attention(**inputs, packing=packing)[own]
        for gradient in torch.autograd.grad(y.sin().sum(), list(inputs.values())):
            assert not gradient[: own.start].any() and not gradient[own.stop :].any()


def test_masked_attention_rows_of_one_length_are_a_packing(backend, device):
    inputs = {name: torch.randn(3, 33, 2, 5, dtype=torch.float64, device=device) for name in "qkv"}
    packing = Packing.from_lengths([33, 33, 33], device=device)
    packed = masked_attention(**{name: t.flatten(0, 1) for name, t in inputs.items()}, packing=packing)
    torch.testing.assert_close(packed.unflatten(0, (3, 33)), masked_attention(**inputs), rtol=1e-12, atol=1e-12)


def test_masked_attention_packed_equals_padded_with_lengths(backend, device):
    lengths = torch.tensor([33, 0, 7], device=device)
    packing = Packing.from_mask(torch.arange(33, device=device) < lengths[:, None])
    inputs = {name: torch.randn(3, 33, 2, 5, dtype=torch.float64, device=device) for name in "qkv"}
    packed = masked_attention(**{name: packing.pack(t) for name, t in inputs.items()}, packing=packing)
    padded = masked_attention(**inputs, lengths=lengths)
    torch.testing.assert_close(packed, packing.pack(padded), rtol=1e-12, atol=1e-12)


# Two packings: of queries and of keys

CROSS = (([3, 1, 5], [4, 6, 2]), ([3, 0, 5, 2], [4, 6, 0, 1]), ([40, 1], [3, 70]))


@pytest.mark.parametrize(("of_queries", "of_keys"), CROSS, ids=str)
def test_masked_attention_packed_cross(backend, device, of_queries, of_keys):
    packing = tuple(Packing.from_lengths(lengths, device=device) for lengths in (of_queries, of_keys))
    inputs = make(sum(of_queries), sum(of_keys), device=device)
    assert_fp64(*pair(packing=packing), inputs)
    y = masked_attention(**inputs, packing=packing)
    for queries, keys in zip(spans(of_queries), of_keys, strict=True):
        assert keys or torch.equal(y[queries], torch.zeros_like(y[queries]))


@pytest.mark.parametrize(("of_queries", "of_keys"), [([0, 0], [2, 0]), ([2, 2], [0, 0]), ([0], [0]), ([], [])], ids=str)
def test_masked_attention_packed_cross_where_none_attends(backend, device, of_queries, of_keys):
    packing = tuple(Packing.from_lengths(lengths, device=device) for lengths in (of_queries, of_keys))
    inputs = leaves(make(sum(of_queries), sum(of_keys), device=device))
    y = masked_attention(**inputs, packing=packing)
    y.sum().backward()
    assert torch.equal(y, torch.zeros_like(inputs["q"]))
    for t in inputs.values():
        assert torch.equal(t.grad, torch.zeros_like(t))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_attention_packed_cross_parity(backend, device, dtype):
    packing = (Packing.from_lengths([3, 34, 2, 5], device=device), Packing.from_lengths([34, 3, 0, 7], device=device))
    functions, inputs = pair(packing=packing), make(44, dtype=dtype, device=device)
    assert_op_2x(*functions, inputs, roundings=roundings(dtype))
    # Without a gradient the kernel saves no statistics.
    y = functions[0](**inputs)
    assert torch.equal(y, functions[0](**leaves(inputs)))


# With the other options


@pytest.mark.parametrize("with_keys", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_masked_attention_packed_relative(backend, device, with_keys, causal):
    packing = Packing.from_lengths([3, 0, 34, 1], device=device)
    inputs = make(38, device=device) | {"table": torch.randn(2 * 40 - 1, 5, device=device)}

    def run(function):
        return lambda q, k, v, table: function(
            q, k, v, packing=packing, causal=causal, relative=RelativePositions(table, with_keys)
        )

    assert_fp64(run(masked_attention), run(reference_masked_attention), inputs)


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("shape", [(), (2, 1, 1), (1, 2, 1, 1)], ids=str)
def test_masked_attention_packed_head_mask(backend, device, shape, relative):
    options = {"packing": Packing.from_lengths([3, 0, 34, 1], device=device)}
    if relative:
        options["relative"] = RelativePositions(torch.randn(69, 5, dtype=torch.float64, device=device))
    assert_fp64(*pair(**options), make(38, device=device) | {"head_mask": torch.randn(shape, device=device)})


@pytest.mark.parametrize(("cross", "causal"), [(False, False), (False, True), (True, False)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_masked_attention_packed_dropout(backend, device, dtype, cross, causal):
    packing = Packing.from_lengths([3, 1, 34, 2], device=device)
    packing = (packing, Packing.from_lengths([5, 0, 3, 33], device=device)) if cross else packing
    inputs = make(40, 41 if cross else 40, device=device, dtype=dtype)
    dropout = {"dropout_p": 0.4, "seed": torch.tensor(77, device=device)}
    keep = attention_dropout_mask(
        1, 2, *(len(inputs[name]) for name in "qk"), **dropout, by_kernels=backend == "triton"
    )
    options = {"packing": packing, "causal": causal}
    functions = pair(**options, **dropout)[0], pair(**options, dropout_p=0.4, dropout_mask=keep)[1]
    if dtype == torch.float64:
        assert_fp64(*functions, inputs)
    else:
        assert_op_2x(*functions, inputs, roundings=20)


def test_masked_attention_packed_dropout_with_relative_positions(backend, device):
    # A sequence has a seed of its own there.
    lengths, dropout_p, seed = [3, 0, 34, 1], 0.4, torch.tensor(77, device=device)
    keep = torch.zeros(1, 2, 38, 38, dtype=torch.bool, device=device)
    for number, own in enumerate(spans(lengths)):
        n = own.stop - own.start
        mask = attention_dropout_mask(1, 2, n, n, dropout_p, seed + number, by_kernels=backend == "triton")
        keep[:, :, own, own] = mask
    packing = Packing.from_lengths(lengths, device=device)
    relative = RelativePositions(torch.randn(69, 5, dtype=torch.float64, device=device))
    options = {"packing": packing, "relative": relative, "dropout_p": dropout_p}
    assert_fp64(pair(**options, seed=seed)[0], pair(**options, dropout_mask=keep)[1], make(38, device=device))


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]], ids=str)
def test_masked_attention_packing_without_tokens(backend, device, lengths):
    inputs = leaves(make(0, device=device))
    y = masked_attention(**inputs, packing=Packing.from_lengths(lengths, device=device))
    assert y.shape == (0, 2, 5)
    y.sum().backward()
    assert all(torch.equal(t.grad, t) for t in inputs.values())


# Random ones


@pytest.mark.filterwarnings("ignore:.*function-scoped fixture")
def test_masked_attention_packed_property(backend, device):
    hypothesis = pytest.importorskip("hypothesis", reason="the lengths are drawn by hypothesis, which is not installed")
    length = hypothesis.strategies.integers(0, 15)

    @hypothesis.settings(max_examples=15, derandomize=True, deadline=None, database=None)
    @hypothesis.given(
        hypothesis.strategies.lists(hypothesis.strategies.tuples(length, length), max_size=5),
        hypothesis.strategies.sampled_from(["one", "one causal", "two"]),
    )
    def check(lengths, packings):
        # One more, since the reference's result of no tokens has no gradient.
        of_queries, of_keys = zip(*lengths, (3, 2), strict=True)
        of_keys = of_keys if packings == "two" else of_queries
        packing = Packing.from_lengths(of_queries, device=device)
        if packings == "two":
            packing = (packing, Packing.from_lengths(of_keys, device=device))
        inputs = make(sum(of_queries), sum(of_keys), H=1, D=4, device=device)
        assert_fp64(*pair(packing=packing, causal=packings == "one causal"), inputs)

    check()


# What every op is tested for


@pytest.mark.parametrize("options", ["one", "one causal", "two"])
def test_masked_attention_packed_compiled(backend, device, options):
    packing = Packing.from_lengths([3, 0, 6, 2], device=device)
    if options == "two":
        packing = (packing, Packing.from_lengths([2, 6, 0, 3], device=device))
    assert_compiled(pair(packing=packing, causal=options == "one causal")[0], make(11, device=device))


def test_masked_attention_packed_is_pure(backend, device):
    assert_pure(pair(packing=Packing.from_lengths([3, 0, 6, 2], device=device))[0], make(11, device=device))


def test_masked_attention_packed_writes_every_element(backend, device, poisoned_empty):
    packing = (Packing.from_lengths([3, 0, 34, 2], device=device), Packing.from_lengths([40, 1, 0, 5], device=device))
    given = leaves(make(39, 46, device=device))
    y = masked_attention(**given, packing=packing)
    for written in (y, *torch.autograd.grad(y.sum(), list(given.values()))):
        assert not written.isnan().any()


def test_masked_attention_packed_out(backend, device):
    wide = torch.full((38, 2, 15), 7.0, device=device)
    packing, inputs = Packing.from_lengths([3, 0, 34, 1], device=device), make(38, device=device)
    with torch.no_grad():
        expected = masked_attention(**inputs, packing=packing)
        masked_attention(**inputs, packing=packing, out=wide[..., 5:10])
    assert torch.equal(wide[..., 5:10], expected)
    assert (wide[..., :5] == 7).all() and (wide[..., 10:] == 7).all()
