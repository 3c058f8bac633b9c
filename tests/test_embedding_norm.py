"""embedding_norm through every layer: kernel and native formulation against the reference, gradients, ids, packing."""

from __future__ import annotations

import importlib

import pytest
import torch
from op_suite import (
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
from tolerance import INTERPRETING, assert_2x, assert_op_2x
from torch.library import opcheck

import fastconv
from fastconv import Packing
from fastconv.ops import embedding_norm
from fastconv.reference.ops import embedding_norm as reference_embedding_norm

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CHANNELS = (8, 63, 65, 127, 384, 768)
ROWS = (41, 16, 2)  # of the tables of words, positions and token types

pytestmark = pytest.mark.usefixtures("poisoned_empty")


def make(dtype, device, channels=24, *, rows=ROWS, embeds=None, param_dtype=None):
    """Tables by number, weight and bias, and embeds of a shape if one is given."""
    inputs = {f"table{i}": (0.7 * torch.randn(size, channels)).to(device, dtype) for i, size in enumerate(rows)}
    inputs["weight"] = (1 + 0.3 * torch.randn(channels)).to(device, param_dtype or dtype)
    inputs["bias"] = (0.3 * torch.randn(channels)).to(device, param_dtype or dtype)
    if embeds is not None:
        inputs["embeds"] = torch.randn(*embeds, channels).to(device, dtype)
    return inputs


def make_ids(device, lead=(3, 5), rows=ROWS, dtype=torch.int64):
    """Random ids for every table."""
    return [torch.randint(0, size, lead, dtype=dtype).to(device) for size in rows]


def with_ids(function, ids, **options):
    """The op as a function of its floating tensors alone, the tables being table0, table1, ..."""

    def run(weight, bias=None, embeds=None, **tables):
        return function(ids, list(tables.values()), weight, bias, options.get("eps", 1e-12), embeds=embeds, **keywords)

    keywords = {k: v for k, v in options.items() if k != "eps"}
    return run


def both(ids, **options):
    """The op and its reference on these ids."""
    return with_ids(embedding_norm, ids, **options), with_ids(reference_embedding_norm, ids, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", CHANNELS)
def test_embedding_norm_parity(backend, device, channels, dtype):
    assert_op_2x(*both(make_ids(device)), make(dtype, device, channels))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tables", [1, 2, 4, 5])
def test_embedding_norm_tables(backend, device, tables, dtype):
    rows = (9, 7, 2, 1, 5)[:tables]
    assert_op_2x(*both(make_ids(device, rows=rows)), make(dtype, device, rows=rows))


@pytest.mark.parametrize("length", ODD)
def test_embedding_norm_lengths(backend, device, length):
    assert_op_2x(*both(make_ids(device, (2, length))), make(torch.float32, device))


def test_embedding_norm_int32_ids(backend, device):
    ids = make_ids(device, dtype=torch.int32)
    assert_op_2x(*both(ids), make(torch.float32, device))
    ids[1] = ids[1].long()
    assert_op_2x(*both(ids), make(torch.float32, device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["(1, S)", "(S,)", "positions"])
def test_embedding_norm_ids_for_every_sequence(backend, device, kind, dtype):
    words, places, types = make_ids(device, (4, 6))
    shared = {"(1, S)": places[:1], "(S,)": places[0], "positions": None}[kind]
    assert_op_2x(*both([words, shared, types[:1]]), make(dtype, device))
    expected = torch.arange(6, device=device) if shared is None else places[0]
    inputs = make(dtype, device)
    got, wanted = (both([words, t, types[:1]])[0](**inputs) for t in (shared, expected.expand(4, 6)))
    assert torch.equal(got, wanted)


def test_embedding_norm_one_sequence_without_a_batch(backend, device):
    ids = [t[0] for t in make_ids(device)]
    inputs = make(torch.float32, device)
    ours, reference = both(ids)
    assert ours(**inputs).shape == (5, 24)
    assert_op_2x(ours, reference, inputs)
    ids[1] = None
    assert_op_2x(*both(ids), inputs)


def test_embedding_norm_expanded_and_strided_ids(backend, device):
    ids = [torch.stack([t, -t], -1).transpose(0, 1)[..., 0].t() for t in make_ids(device)]
    ids[2] = ids[2][:1].expand(3, 5)
    assert_op_2x(*both(ids), make(torch.float32, device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ids", ["alone", "with words", "with positions"])
def test_embedding_norm_embeds(backend, device, ids, dtype):
    words, _, types = make_ids(device)
    chosen = {"alone": [types], "with words": [words, types], "with positions": [None, types[:1]]}[ids]
    rows = {"alone": (2,), "with words": (41, 2), "with positions": (16, 2)}[ids]
    assert_op_2x(*both(chosen), make(dtype, device, rows=rows, embeds=(3, 5)))


def test_embedding_norm_fp32_embeds_of_half_tables(backend, device):
    # What comes out of another layer under autocast need not have the tables' dtype.
    inputs = make(torch.float16, device, embeds=(3, 5))
    inputs["embeds"] = inputs["embeds"].float()
    assert_op_2x(*both(make_ids(device)), inputs)


def test_embedding_norm_tables_of_several_dtypes(backend, device):
    inputs = make(torch.float16, device)
    inputs["table1"] = inputs["table1"].float()
    assert_op_2x(*both(make_ids(device)), inputs)
    inputs["table2"] = inputs["table2"].double()
    assert both(make_ids(device))[0](**inputs).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_embedding_norm_fp32_parameters(backend, device, dtype):
    assert_op_2x(*both(make_ids(device)), make(dtype, device, param_dtype=torch.float32))


def test_embedding_norm_without_a_bias(backend, device):
    inputs = make(torch.float32, device)
    del inputs["bias"]
    assert_op_2x(*both(make_ids(device)), inputs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_embedding_norm_layouts(backend, device, layout):
    inputs = make(torch.float32, device, embeds=(3, 5))
    for name in ("table0", "table1", "table2", "embeds"):
        inputs[name] = with_layout(inputs[name], layout)
    if layout != "contiguous":
        for name in ("weight", "bias"):
            inputs[name] = torch.stack([inputs[name], inputs[name] * float("nan")], -1)[:, 0]
    dy = with_layout(torch.randn(3, 5, 24, device=device), layout)
    assert_op_2x(*both(make_ids(device)), inputs, dy)


def test_embedding_norm_limit_is_the_kernels():
    kernels = pytest.importorskip("fastconv.kernels.embedding_norm", reason="the kernels need triton")
    assert importlib.import_module("fastconv.ops.embedding_norm").MAX_CHANNELS == kernels.MAX_CHANNELS


@pytest.mark.parametrize("channels", [4096, 5001, 8193])
def test_embedding_norm_widest(backend, device, channels):
    with fastconv.backend("auto"):
        assert_op_2x(*both(make_ids(device, (1, 3), (3, 4, 2))), make(torch.float32, device, channels, rows=(3, 4, 2)))


def test_embedding_norm_large_mean(backend, device):
    inputs = make(torch.float32, device, 256)
    inputs["table0"] += 1e4
    assert_op_2x(*both(make_ids(device)), inputs)


def test_embedding_norm_fp64(backend, device):
    assert_fp64(*both(make_ids(device)), make(torch.float32, device, embeds=(3, 5)))


def test_embedding_norm_inference(backend, device):
    assert_inference_2x(*both(make_ids(device)), make(torch.float32, device, embeds=(3, 5)))


def test_embedding_norm_each_gradient(backend, device):
    assert_each_gradient(*both([make_ids(device)[0], None, make_ids(device)[2]]), make(torch.float32, device))


def test_embedding_norm_autocast(backend, device):
    # As torch's layer_norm: fp32, though the tables are of another dtype.
    ids, inputs = make_ids(device), make(torch.float32, device)
    with torch.autocast(device.type, torch.bfloat16):
        y = both(ids)[0](**inputs)
        assert both(ids)[0](**make(torch.bfloat16, device)).dtype == torch.float32
    assert y.dtype == torch.float32
    reference = both(ids)[1]
    assert_2x("autocast", y, reference(**inputs), reference(**{k: t.double() for k, t in inputs.items()}))


# The gradients of tables: sums over tokens


def gradient_of_table(ids, rows, channels, dtype, device, padding=None):
    """d table0 of the op and of the reference in its dtype and in fp64, for (T,) ids of one table."""
    inputs = make(dtype, device, channels, rows=(rows,), embeds=(len(ids),))
    dy = torch.randn(len(ids), channels, device=device).to(dtype)

    def run(function, dtype):
        given = {k: t.to(dtype).requires_grad_(k == "table0") for k, t in inputs.items()}
        y = with_ids(function, [ids], padding_idx=[padding])(**given)
        return torch.autograd.grad(y, given["table0"], dy.to(dtype))[0]

    return (
        run(embedding_norm, dtype),
        run(reference_embedding_norm, dtype),
        run(reference_embedding_norm, torch.float64),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["one row", "two rows", "first row long", "last row long", "all different"])
def test_embedding_norm_long_segments(backend, device, kind, dtype):
    # 64 sorted tokens are a chunk: rows of several chunks, with ends inside of them, and rows without a chunk.
    T, rows = 331, 400 if kind == "all different" else 7
    few = torch.randint(0, rows, (T,))
    ids = {
        "one row": torch.full((T,), 3),
        "two rows": torch.arange(T) % 2,
        "first row long": torch.where(torch.rand(T) < 0.8, 0, few),
        "last row long": torch.where(torch.rand(T) < 0.8, rows - 1, few),
        "all different": torch.randperm(rows)[:T],
    }[kind].to(device)
    got, reference, truth = gradient_of_table(ids, rows, 12, dtype, device)
    assert_2x("dtable", got, reference, truth)
    unused = torch.ones(rows, dtype=torch.bool, device=device).index_fill(0, ids, False)
    assert torch.equal(got[unused], torch.zeros_like(got[unused]))


@pytest.mark.parametrize("padding", [0, 3, 6])
def test_embedding_norm_padding_idx(backend, device, padding):
    # The padding's row is added as any other, but has no gradient, be it a token's or a whole chunk's.
    ids = torch.where(torch.rand(300) < 0.7, padding, torch.randint(0, 7, (300,))).to(device)
    got, reference, truth = gradient_of_table(ids, 7, 12, torch.float32, device, padding)
    assert torch.equal(got[padding], torch.zeros_like(got[padding]))
    assert truth[padding].count_nonzero() == 0 and truth.count_nonzero() == 6 * 12
    assert_2x("dtable", got, reference, truth)
    assert_op_2x(*both(make_ids(device), padding_idx=(4, None, 1)), make(torch.float32, device))


def test_embedding_norm_padding_idx_of_shared_ids(backend, device):
    words = make_ids(device, (4, 6))[0]
    assert_op_2x(
        *both([words, None, words[:1] % 2], padding_idx=(0, 2, 0)),
        make(torch.float32, device),
    )


def test_embedding_norm_sums_over_many_tokens(device):
    # In half precision a sum stops growing at a few hundred terms.
    ids = torch.arange(4096, device=device) % 2
    for dtype in (torch.bfloat16, torch.float16):
        with fastconv.backend("native"):
            assert_2x("dtable", *gradient_of_table(ids, 2, 8, dtype, device))


def test_embedding_norm_one_table_twice(backend, device):
    inputs = make(torch.float32, device, rows=(9,))
    ids = make_ids(device, rows=(9, 9))

    def run(function):
        table = inputs["table0"].clone().requires_grad_()
        y = function(ids, (table, table), inputs["weight"], inputs["bias"])
        return torch.autograd.grad(y.square().sum(), table)[0]

    torch.testing.assert_close(run(embedding_norm), run(reference_embedding_norm), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("frozen", ["table0", "table1", "table2", "weight", "bias", "embeds"])
def test_embedding_norm_frozen_inputs(backend, device, frozen):
    inputs = make(torch.float32, device, embeds=(3, 5))
    results = []
    for function in both(make_ids(device)):
        leaves = {k: t.clone().requires_grad_(k != frozen) for k, t in inputs.items()}
        function(**leaves).square().sum().backward()
        results.append(leaves)
    for name, leaf in results[0].items():
        assert (leaf.grad is None) == (name == frozen)
        if name != frozen:
            torch.testing.assert_close(leaf.grad, results[1][name].grad, rtol=1e-4, atol=1e-5)


def test_embedding_norm_tables_changed_before_the_backward(backend, device):
    # nn.Embedding doesn't keep its weight for the backward: a step may come first.
    inputs = {k: t.requires_grad_() for k, t in make(torch.float32, device).items()}
    y = both(make_ids(device))[0](**inputs)
    with torch.no_grad():
        inputs["table0"].add_(1.0)
    y.sum().backward()


def test_embedding_norm_pure(backend, device):
    ids = [torch.randint(0, 3, (5, 60), device=device), None, torch.zeros(1, 60, dtype=torch.int64, device=device)]
    seed = torch.tensor(3, device=device)
    assert_pure(both(ids, dropout_p=0.1, seed=seed)[0], make(torch.float32, device, rows=(3, 60, 2)))


def test_embedding_norm_second_derivative(backend, device):
    refused = "embedding_norm" if backend == "triton" else None
    ids = make_ids(device, (2, 3), (4, 3, 2))
    assert_second_derivative(*both(ids), make(torch.float32, device, 5, rows=(4, 3, 2)), refused)


def test_embedding_norm_checkpointed(backend, device):
    assert_checkpointed(both(make_ids(device))[0], make(torch.float32, device))


def test_embedding_norm_traced(backend, device):
    ids = make_ids(device)
    ids[1] = None
    assert_traced(both(ids)[0], make(torch.float32, device))


def test_embedding_norm_transforms(backend, device):
    assert_transforms(*both(make_ids(device)), make(torch.float32, device, embeds=(3, 5)))


def test_embedding_norm_vmap_over_sequences(backend, device):
    # Per-sample gradients: ids whose values nobody can look at.
    ids, inputs = make_ids(device), make(torch.float32, device)

    def one(words, places, types):
        return both([words, places, types])[0](**inputs)

    torch.testing.assert_close(torch.func.vmap(one)(*ids), both(ids)[0](**inputs), rtol=1e-5, atol=1e-5)


# Dropout


def drawn_mask(ids, inputs, p, seed):
    """The keep-mask that the op draws: a bias of 100 is far from 0 wherever it keeps."""
    given = {**inputs, "bias": torch.full_like(inputs["weight"], 100.0)}
    return both(ids, dropout_p=p, seed=seed)[0](**given) != 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [24, 64])
def test_embedding_norm_dropout_parity(backend, device, channels, dtype):
    ids, inputs, p, seed = make_ids(device), make(dtype, device, channels), 0.3, torch.tensor(1234, device=device)
    mask = drawn_mask(ids, inputs, p, seed)
    assert 0.1 < 1 - mask.float().mean() < 0.5
    assert_op_2x(
        both(ids, dropout_p=p, seed=seed)[0],
        both(ids, dropout_p=p, dropout_mask=mask)[1],
        make(dtype, device, channels),
    )


def test_embedding_norm_dropout_of_wide_tokens(backend, device):
    # Past 4096 channels two programs of the backward draw the same mask.
    rows, p, seed = (3, 4, 2), 0.4, torch.tensor(7, device=device)
    ids, inputs = make_ids(device, (1, 3), rows), make(torch.float32, device, 5001, rows=rows)
    mask = drawn_mask(ids, inputs, p, seed)
    assert_op_2x(both(ids, dropout_p=p, seed=seed)[0], both(ids, dropout_p=p, dropout_mask=mask)[1], inputs)


def test_embedding_norm_dropout_seeds(backend, device):
    ids, inputs = make_ids(device), make(torch.float32, device)
    seeds = [torch.tensor(s, device=device) for s in (0, 1, 2**40, 2**62)]
    masks = [drawn_mask(ids, inputs, 0.5, s) for s in seeds]
    for i, mask in enumerate(masks):
        assert torch.equal(mask, drawn_mask(ids, inputs, 0.5, seeds[i]))
        assert not any(torch.equal(mask, other) for other in masks[:i])


def test_embedding_norm_dropout_follows_manual_seed(backend, device):
    run = both(make_ids(device), dropout_p=0.5)[0]
    inputs = make(torch.float32, device)
    torch.manual_seed(11)
    first, second = (run(**inputs) for _ in range(2))
    torch.manual_seed(11)
    assert torch.equal(first, run(**inputs))
    assert not torch.equal(first, second)


# Packing


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_embedding_norm_packing(backend, device, dtype):
    packing = Packing.from_lengths([5, 0, 1, 9], device=device)
    words, _, types = make_ids(device, (15,))
    assert_op_2x(*both([words, None, types], packing=packing), make(dtype, device))
    assert_op_2x(*both([words, words % 16, types], packing=packing), make(dtype, device, embeds=(15,)))


def test_embedding_norm_packing_equals_each_sequence_alone(backend, device):
    lengths = [5, 1, 9]
    packing = Packing.from_lengths(lengths, device=device)
    (words, _, types), inputs = make_ids(device, (15,)), make(torch.float32, device)
    packed = both([words, None, types], packing=packing)[0](**inputs)
    parts = zip(*(t.split(lengths) for t in (packed, words, types)), strict=True)
    for y, word, kind in parts:
        torch.testing.assert_close(y, both([word[None], None, kind[None]])[0](**inputs)[0], rtol=1e-5, atol=1e-5)


# Registration and compile


def test_embedding_norm_opcheck(device):
    ids, seed = make_ids(device), torch.tensor(1, device=device)
    *tables, weight, bias, embeds = make(torch.float32, device, embeds=(3, 5)).values()
    ops = torch.ops.fastconv
    forward, backward = ops.embedding_norm_fwd.default, ops.embedding_norm_bwd.default
    training = (ids, tables, None, weight, bias, 1e-12, 0.1, seed, (3, 5), torch.float32, True)
    opcheck(forward, training)
    opcheck(
        forward, ([None, ids[2][:1]], tables[1:], embeds, weight, None, 1e-12, 0.0, None, (3, 5), torch.half, False)
    )
    _, z, mean, rstd = forward(*training)
    opcheck(backward, (embeds, z, weight, mean, rstd, 0.1, seed))
    opcheck(backward, (embeds, z, weight, mean, rstd, 0.0, None))
    for given, padding in ((ids[1], -1), (ids[1][0], 3), (None, -1)):
        opcheck(ops.embedding_norm_bwd_table.default, (z, given, 16, padding, torch.float16))


@pytest.mark.parametrize("places", ["ids", "positions"])
def test_embedding_norm_compiled(backend, device, places):
    ids = make_ids(device)
    ids[1] = None if places == "positions" else ids[1][:1]
    assert_compiled(both(ids, padding_idx=(0, None, None))[0], make(torch.float32, device, embeds=(3, 5)))


def test_embedding_norm_compiled_for_any_length(backend, device):
    # One graph for every batch and length.
    inputs = {k: t.requires_grad_() for k, t in make(torch.float32, device).items()}

    def step(words, types, **tensors):
        return both([words, None, types])[0](**tensors).sin()

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)
    results = []
    for lead in ((3, 5), (4, 7), (2, 16)):
        words, _, types = make_ids(device, lead)
        for function in (compiled, step):
            y = function(words, types, **inputs)
            results.append([y, *torch.autograd.grad(y.sum(), list(inputs.values()))])
    for i in range(0, len(results), 2):
        for got, expected in zip(*results[i : i + 2], strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


# Sizes at the edges, and bad input


@pytest.mark.parametrize("lead", [(0, 4), (2, 0), (0,)])
def test_embedding_norm_no_tokens(backend, device, lead):
    leaves = {k: t.requires_grad_() for k, t in make(torch.float32, device).items()}
    words, _, types = make_ids(device, lead)
    y = both([words, None, types])[0](**leaves)
    assert y.shape == (*lead, 24)
    y.sum().backward()
    for name, leaf in leaves.items():
        assert torch.equal(leaf.grad, torch.zeros_like(leaf)), name


@pytest.mark.parametrize("lead", [(1, 1), (1,)])
def test_embedding_norm_one_token(backend, device, lead):
    assert_op_2x(*both(make_ids(device, lead)), make(torch.float32, device))


def test_embedding_norm_on_the_meta_device():
    # A model's shapes can be tried without memory.
    table, weight = torch.empty(9, 16, device="meta"), torch.empty(16, device="meta")
    ids = torch.empty(2, 3, dtype=torch.int64, device="meta")
    assert embedding_norm([ids, None], [table, table], weight, weight).shape == (2, 3, 16)


@pytest.mark.skipif(INTERPRETING or not torch.cuda.is_available(), reason="needs a GPU")
def test_embedding_norm_ids_outside_of_their_table_on_a_gpu(device):
    # Nothing outside of the table is read, and nobody gets its gradient.
    table = torch.randn(4, 16, device=device, requires_grad=True)
    weight = torch.ones(16, device=device)
    ids = torch.tensor([[0, 4, -1, 2**40]], device=device)
    y = embedding_norm([ids], [table], weight, None, 1e-5)
    assert torch.equal(y[0, 1:], torch.zeros_like(y[0, 1:]))
    y.square().sum().backward()
    assert torch.equal(table.grad[1:], torch.zeros_like(table.grad[1:]))


def call(function=embedding_norm, **changes):
    words, places, types = make_ids("cpu")
    table0, table1, table2, weight, bias = make(torch.float32, "cpu").values()
    given = {"ids": [words, places, types], "tables": [table0, table1, table2], "weight": weight, "bias": bias}
    return function(**{**given, **changes})


WORDS, LONG = torch.zeros(3, 5, dtype=torch.int64), torch.zeros(3, 17, dtype=torch.int64)
TABLE = torch.ones(9, 24)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"ids": WORDS}, TypeError, "ids and tables must be tuples or lists.*got a tensor"),
        ({"ids": [WORDS]}, ValueError, "as many, 1 to 5, got 1 ids and 3 tables"),
        ({"ids": [], "tables": []}, ValueError, "as many, 1 to 5, got 0"),
        ({"ids": [WORDS] * 6, "tables": [TABLE] * 6}, ValueError, "as many, 1 to 5, got 6"),
        ({"ids": [WORDS.float(), None, WORDS]}, TypeError, r"ids\[0\] must be an int64 or int32 tensor, got.*float32"),
        ({"ids": [[0, 1], None, WORDS]}, TypeError, r"ids\[0\] must be a torch.Tensor or None, got list"),
        ({"ids": [WORDS, None, None]}, ValueError, "one of the ids may be None"),
        ({"ids": [None], "tables": [TABLE]}, ValueError, "ids is None for every table"),
        ({"ids": [LONG, None, LONG]}, ValueError, r"tables\[1\] has 16 rows, got a sequence of 17 tokens"),
        ({"ids": [WORDS, WORDS[:2], WORDS]}, ValueError, r"ids\[1\] must have shape .* of a result of \(3, 5\), got"),
        ({"ids": [WORDS, WORDS[:, :1], WORDS]}, ValueError, r"ids\[1\] must have shape"),
        ({"ids": [WORDS[None]] * 3}, ValueError, r"ids must have shape.*got \(1, 3, 5\)"),
        ({"ids": [WORDS + 41, None, WORDS]}, IndexError, r"ids\[0\] must be from 0 to 40.*got values from 41 to 41"),
        ({"ids": [WORDS, WORDS - 1, WORDS]}, IndexError, r"ids\[1\] must be from 0 to 15.*got values from -1"),
        ({"ids": [WORDS.to("meta"), None, WORDS]}, ValueError, r"ids\[0\] is on meta but weight is on cpu"),
        ({"tables": [TABLE.long()] * 3}, TypeError, r"tables\[0\] must be a real floating.*int64"),
        ({"tables": [TABLE[0]] * 3}, ValueError, r"tables\[0\] must have shape \(V, C\).*got \(24,\)"),
        ({"tables": [TABLE, TABLE, TABLE[:, 1:]]}, ValueError, r"tables\[2\] must have shape.*24.*got \(9, 23\)"),
        ({"weight": torch.ones(23)}, ValueError, r"weight must have shape .*\(24,\), got \(23,\)"),
        ({"bias": torch.ones(1, 24)}, ValueError, r"bias must have shape .*\(24,\), got \(1, 24\)"),
        ({"embeds": torch.ones(3, 5, 23)}, ValueError, r"embeds must have shape.*\(3, 5, 24\), got \(3, 5, 23\)"),
        ({"embeds": torch.ones(1, 5, 24)}, ValueError, r"ids\[0\] must have shape .* of a result of \(1, 5\), got"),
        ({"embeds": torch.ones(24)}, ValueError, r"embeds must have shape \(B, S, C\)"),
        ({"padding_idx": 0}, ValueError, "padding_idx must have an int or None for each of 3 tables, got 0"),
        ({"padding_idx": (0, None)}, ValueError, "padding_idx must have an int or None for each of 3"),
        ({"padding_idx": (41, None, None)}, ValueError, r"padding_idx\[0\] must be from 0 to 40 or None, got 41"),
        ({"dropout_p": 1.0}, ValueError, "less than 1, got 1.0"),
        ({"packing": Packing.from_lengths([5])}, ValueError, "packing covers 5 tokens, but the tensors have 3"),
        ({"packing": Packing.from_lengths([3])}, ValueError, r"ids\[0\] must have shape \(T,\).*\(3,\), got \(3, 5\)"),
        ({"packing": [3]}, TypeError, "packing must be a fastconv.Packing"),
    ],
)
def test_embedding_norm_bad_input(backend, changes, error, message):
    for function in (embedding_norm, reference_embedding_norm):
        with pytest.raises(error, match=message):
            call(function, **changes)


def test_embedding_norm_bad_seed_and_mask(backend):
    with pytest.raises(ValueError, match=r"seed must be a \(\) int64"):
        call(dropout_p=0.5, seed=torch.tensor(1.0))
    for mask, error, message in (
        (None, ValueError, "needs dropout_mask"),
        (torch.ones(3, 5, 24), TypeError, "must be a bool tensor"),
        (torch.ones(3, 5, dtype=torch.bool), ValueError, "dropout_mask must have shape"),
    ):
        with pytest.raises(error, match=message):
            call(reference_embedding_norm, dropout_p=0.5, dropout_mask=mask)
