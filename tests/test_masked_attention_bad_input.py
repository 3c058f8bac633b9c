"""masked_attention refuses what doesn't fit before any launch, and says what was given and expected."""

from __future__ import annotations

import pytest
import torch

from fastconv import Packing
from fastconv.ops import masked_attention
from fastconv.reference.ops import RelativePositions
from fastconv.reference.ops import masked_attention as reference_masked_attention


@pytest.fixture(params=[masked_attention, reference_masked_attention], ids=["op", "reference"])
def function(request):
    """The op, and the reference, which makes the same checks."""
    return request.param


def ones(*shape, dtype=torch.float32):
    return torch.ones(shape, dtype=dtype)


def make():
    """q, k and v of two rows, 7 queries and 7 keys."""
    return {name: ones(2, 7, 2, 5) for name in "qkv"}


def make_packed():
    """q, k and v of 7 tokens, and where their sequences end."""
    return {name: ones(7, 2, 5) for name in "qkv"} | {"packing": Packing.from_lengths([3, 4])}


def two(of_queries, of_keys):
    return (Packing.from_lengths(of_queries), Packing.from_lengths(of_keys))


def relative(*shape, dtype=torch.float32):
    return RelativePositions(ones(*shape, dtype=dtype))


# Changes, error, message.
BOTH = [
    # dtypes
    ({"q": ones(2, 7, 2, 5, dtype=torch.int64)}, TypeError, r"q must be a real floating.*int64"),
    ({"v": ones(2, 7, 2, 5, dtype=torch.complex64)}, TypeError, r"v must be a real floating.*complex64"),
    ({"mask": ones(2, 1, 1, 7, dtype=torch.int64)}, TypeError, r"mask must be a real floating.*int64"),
    ({"head_mask": ones(2, 1, 1, dtype=torch.bool)}, TypeError, r"head_mask must be a real floating.*bool"),
    ({"relative": relative(13, 5, dtype=torch.int64)}, TypeError, r"table must be a real floating.*int64"),
    ({"q": [1.0]}, TypeError, r"q must be a torch.Tensor, got list"),
    # shapes
    ({"k": ones(2, 6, 2, 5)}, ValueError, r"k and v \(B, Sk, H, D\), got .*k \(2, 6, 2, 5\), v \(2, 7"),
    ({"q": ones(2, 7, 1, 5)}, ValueError, r"q must have shape .*got q \(2, 7, 1, 5\)"),
    ({"q": ones(3, 7, 2, 5)}, ValueError, r"q must have shape .*got q \(3, 7, 2, 5\), k \(2, 7, 2, 5\)"),
    ({"q": ones(2, 7, 10)}, ValueError, r"q must have shape \(B, Sq, H, D\).*got q \(2, 7, 10\)"),
    ({"q": ones(2, 7, 2, 4)}, ValueError, r"got q \(2, 7, 2, 4\), k \(2, 7, 2, 5\)"),
    ({"v": ones(2, 7, 2, 4)}, ValueError, r"got q .*k \(2, 7, 2, 5\), v \(2, 7, 2, 4\)"),
    ({name: ones(2, 7, 2, 0) for name in "qkv"}, ValueError, r"at least one key and D >= 1, got q \(2, 7, 2, 0\)"),
    ({name: ones(2, 0, 2, 5) for name in "kv"}, ValueError, r"at least one key and D >= 1.*k \(2, 0, 2, 5\)"),
    # masks
    ({"mask": ones(3, 7)}, ValueError, r"mask must be broadcastable .*= \(2, 2, 7, 7\), got \(3, 7\)"),
    ({"mask": ones(2, 1, 1, 6)}, ValueError, r"mask must be broadcastable .*got \(2, 1, 1, 6\)"),
    ({"mask": ones(1, 2, 1, 1, 7)}, ValueError, r"mask must be broadcastable"),
    ({"mask": torch.ones(2, 1, 1, 7, device="meta")}, ValueError, r"q is on cpu but mask is on meta"),
    ({"head_mask": ones(3, 1, 1)}, ValueError, r"head_mask must be broadcastable .*got \(3, 1, 1\)"),
    ({"head_mask": torch.ones(2, 1, 1, device="meta")}, ValueError, r"q is on cpu but head_mask is on meta"),
    # lengths
    ({"lengths": torch.tensor([7, -1])}, ValueError, r"lengths must be from 0 to Sk = 7, got values from -1 to 7"),
    ({"lengths": torch.tensor([8, 1])}, ValueError, r"lengths must be from 0 to Sk = 7, got values from 1 to 8"),
    ({"lengths": torch.tensor([2.0, 1.0])}, TypeError, r"lengths must be an int32 or int64 tensor, got torch.float32"),
    ({"lengths": torch.tensor([True, True])}, TypeError, r"lengths must be an int32 or int64 tensor, got torch.bool"),
    ({"lengths": torch.tensor([2, 1], dtype=torch.int16)}, TypeError, r"int32 or int64 tensor, got torch.int16"),
    ({"lengths": torch.tensor([7])}, ValueError, r"lengths must have shape \(B,\) = \(2,\), got \(1,\)"),
    ({"lengths": torch.tensor([[7], [7]])}, ValueError, r"lengths must have shape \(B,\) = \(2,\), got \(2, 1\)"),
    ({"lengths": torch.tensor(7)}, ValueError, r"lengths must have shape \(B,\) = \(2,\), got \(\)"),
    ({"lengths": torch.ones(2, dtype=torch.int64, device="meta")}, ValueError, r"q is on cpu but lengths is on meta"),
    # dropout
    ({"dropout_p": 1.0}, ValueError, r"dropout_p must be at least 0 and less than 1, got 1.0"),
    ({"dropout_p": -0.1}, ValueError, r"dropout_p must be at least 0 and less than 1, got -0.1"),
    ({"dropout_p": float("nan")}, ValueError, r"dropout_p must be at least 0 and less than 1, got nan"),
    # relative positions
    (
        {"relative": relative(13, 4)},
        ValueError,
        r"table of relative must have shape \(2 P - 1, D\) with D = 5, got \(13, 4",
    ),
    ({"relative": relative(14, 5)}, ValueError, r"table of relative must have shape \(2 P - 1, D\).*got \(14, 5\)"),
    ({"relative": relative(13)}, ValueError, r"table of relative must have shape .*got \(13,\)"),
    ({"relative": relative(11, 5)}, ValueError, r"relative knows P = 6 .*got 7"),
    (
        {"relative": relative(11, 5)} | {name: ones(2, 2, 2, 5) for name in "kv"},
        ValueError,
        r"relative knows P = 6 .*got 7",
    ),
]
PACKED = [
    ({"lengths": torch.tensor([7])}, ValueError, r"give packing or lengths, not both"),
    ({"mask": ones(1, 1, 1, 7)}, ValueError, r"give packing or mask, not both"),
    ({"packing": Packing.from_lengths([4, 4])}, ValueError, r"packing covers 8 tokens, but the tensors have 7"),
    ({"packing": two([3, 4], [4, 4])}, ValueError, r"packing covers 8 tokens, but the tensors have 7"),
    ({"packing": two([3, 4], [3, 2, 2])}, ValueError, r"must have as many sequences, got 2 and 3"),
    ({"packing": two([3, 4], [4, 3]), "causal": True}, ValueError, r"causal needs queries and keys of one packing"),
    ({"packing": (Packing.from_lengths([7]),)}, TypeError, r"packing must be a Packing, or two of them"),
    ({"packing": torch.tensor([0, 7])}, TypeError, r"packing must be a Packing, or two of them.*got tensor"),
    ({"q": ones(2, 7, 2, 5)}, ValueError, r"with a packing q must have shape \(T, H, D\).*got q \(2, 7, 2, 5\)"),
    ({"k": ones(6, 2, 5)}, ValueError, r"with a packing q must have shape .*k \(6, 2, 5\), v \(7, 2, 5\)"),
    ({"q": ones(7, 2, 4)}, ValueError, r"with a packing q must have shape .*got q \(7, 2, 4\)"),
    ({name: ones(6, 2, 5) for name in "kv"}, ValueError, r"packing covers 7 tokens, but the tensors have 6"),
    ({"head_mask": ones(7, 1)}, ValueError, r"head_mask must be broadcastable .*got \(7, 1\)"),
    ({"head_mask": ones(2, 2, 1, 1)}, ValueError, r"head_mask must be broadcastable .*got \(2, 2, 1, 1\)"),
    ({"relative": relative(5, 5)}, ValueError, r"relative knows P = 3 .*got 4"),
]
# What the reference doesn't have, or refuses elsewhere.
OP = [
    (
        {"k": ones(2, 7, 2, 5).half()},
        TypeError,
        r"q, k and v must have one dtype, got .*float32, .*float16 and .*float32",
    ),
    ({"v": ones(2, 7, 2, 5).double()}, TypeError, r"q, k and v must have one dtype, got .*float32 and torch.float64"),
    (
        {"seed": torch.tensor(1.0), "dropout_p": 0.5},
        ValueError,
        r"seed must be a \(\) int64 tensor on cpu, got \(\) .*float32",
    ),
    ({"seed": torch.tensor([1]), "dropout_p": 0.5}, ValueError, r"seed must be a \(\) int64 tensor on cpu, got \(1,\)"),
    ({"seed": torch.tensor(1, dtype=torch.int32)}, ValueError, r"seed must be a \(\) int64 tensor on cpu, got .*int32"),
    ({"out": [1.0]}, TypeError, r"out must be a torch.Tensor or None, got list"),
    ({"out": ones(2, 7, 10)}, ValueError, r"out must be \(2, 7, 2, 5\) .*like the result, got \(2, 7, 10\)"),
    ({"out": ones(2, 7, 2, 5).half()}, ValueError, r"out must be .*float32.*got .*float16"),
    ({"out": ones(1, 1, 1, 5).expand(2, 7, 2, 5)}, ValueError, r"out's elements must not share memory"),
]


@pytest.mark.parametrize(("changes", "error", "message"), BOTH, ids=[case[2] for case in BOTH])
def test_masked_attention_bad_input(function, changes, error, message):
    with pytest.raises(error, match=message):
        function(**make() | changes)


@pytest.mark.parametrize(("changes", "error", "message"), PACKED, ids=[case[2] for case in PACKED])
def test_masked_attention_bad_packing(function, changes, error, message):
    with pytest.raises(error, match=message):
        function(**make_packed() | changes)


@pytest.mark.parametrize(("changes", "error", "message"), OP, ids=[case[2] for case in OP])
def test_masked_attention_bad_input_of_the_op(changes, error, message):
    with pytest.raises(error, match=message):
        masked_attention(**make() | changes)


def test_masked_attention_seed_that_is_no_tensor():
    with pytest.raises(TypeError, match=r"seed must be a \(\) int64 tensor on cpu or None, got int"):
        masked_attention(**make(), dropout_p=0.5, seed=3)


def test_masked_attention_out_of_a_packing():
    with pytest.raises(ValueError, match=r"out must be \(7, 2, 5\) .*got \(1, 7, 2, 5\)"):
        masked_attention(**make_packed(), out=ones(1, 7, 2, 5))


@pytest.mark.parametrize("lengths", [[0, 7], [7, 0], [0, 0]], ids=str)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_masked_attention_lengths_at_the_limits(function, lengths, dtype):
    y = function(**make(), lengths=torch.tensor(lengths, dtype=dtype))
    assert torch.allclose(y, torch.ones(2, 7, 2, 5))


def test_masked_attention_head_too_large(backend):
    q = torch.ones(1, 2, 1, 257)
    with pytest.raises(ValueError, match=r"a head must have at most 256 channels, got D = 257"):
        masked_attention(q, q, q)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"packing": 5}, r"packing must be a Packing, or two of them.*got 5"),
        ({"relative": 5}, r"relative must be RelativePositions\(table, with_keys\), got int"),
        ({"relative": torch.ones(13, 5)}, r"relative must be RelativePositions\(table, with_keys\), got Tensor"),
        ({"dropout_p": "0.1"}, r"dropout_p must be a number, got str"),
        ({"lengths": [7, 7, 7]}, r"lengths must be a torch.Tensor, got list"),
        ({"mask": [1.0]}, r"mask must be a torch.Tensor, got list"),
    ],
)
def test_masked_attention_wrong_types(backend, option, message):
    q = torch.ones(3, 7, 2, 5)
    with pytest.raises(TypeError, match=message):
        masked_attention(q, q, q, **option)
