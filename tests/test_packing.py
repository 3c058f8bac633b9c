"""Packing: where the sequences of a batch without padding begin and end."""

from __future__ import annotations

import pytest
import torch

from fastconv import Packing


@pytest.mark.parametrize("given", [[3, 1, 2], torch.tensor([3, 1, 2]), torch.tensor([3, 1, 2], dtype=torch.int32)])
def test_from_lengths(given):
    packing = Packing.from_lengths(given)
    assert packing.cu_seqlens.tolist() == [0, 3, 4, 6] and packing.tokens == 6 and packing.lengths == [3, 1, 2]
    assert packing.before.tolist() == [0, 1, 2, 0, 0, 1] and packing.after.tolist() == [2, 1, 0, 0, 1, 0]
    assert packing.before.dtype == packing.after.dtype == torch.int32


def test_empty_sequences_and_no_sequences():
    packing = Packing.from_lengths([0, 2, 0])
    assert packing.cu_seqlens.tolist() == [0, 0, 2, 2] and packing.before.tolist() == [0, 1]
    assert Packing.from_lengths([]).tokens == 0


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
def test_from_mask_packs_and_unpacks(dtype):
    mask = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1], [0, 0, 0, 0], [0, 1, 0, 0]]).to(dtype)
    packing = Packing.from_mask(mask)
    assert packing.lengths == [2, 3, 0, 1] and packing.padded_shape == (4, 4)
    x = torch.randn(4, 4, 5)
    packed = packing.pack(x)
    assert torch.equal(packed, x[mask.bool()])
    assert torch.equal(packing.unpack(packed), x * (mask != 0)[..., None])


def test_gradients_go_through():
    packing = Packing.from_mask(torch.tensor([[1, 1, 0], [0, 0, 1]]))
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: packing.unpack(packing.pack(x).sin()), x)


def places(indices=None, padded_shape=None):
    """A packing of one sequence of two tokens."""
    return Packing(torch.tensor([0, 2]), indices=indices, padded_shape=padded_shape)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Packing(torch.tensor([0, 4, 3])), ValueError, "never fall, got 4 before 3"),
        (lambda: Packing(torch.tensor([1, 4])), ValueError, "must begin with 0 and never fall, got 1 first"),
        (lambda: Packing(torch.tensor([[0, 4]])), ValueError, r"shape \(N \+ 1,\), got \(1, 2\)"),
        (lambda: Packing(torch.tensor([], dtype=torch.int64)), ValueError, r"got \(0,\)"),
        (lambda: Packing(torch.tensor([0.0, 4.0])), TypeError, "int32 or int64 tensor, got torch.float32"),
        (lambda: Packing([0, 4]), TypeError, "cu_seqlens must be an int32 or int64 tensor, got list"),
        (lambda: Packing.from_mask([[1, 0]]), TypeError, "mask must be a torch.Tensor, got list"),
        (lambda: places(padded_shape=(1, 3)), ValueError, "padded_shape needs indices, got None"),
        (lambda: places(torch.tensor([0, 1])), ValueError, "indices needs padded_shape, got None"),
        (lambda: places(torch.tensor([0.0, 1.0]), (1, 3)), TypeError, "an int64 tensor, got torch.float32"),
        (lambda: places([0, 1], (1, 3)), TypeError, "indices must be an int64 tensor, got list"),
        (lambda: places(torch.tensor([0, 1, 2]), (1, 3)), ValueError, r"shape \(T,\) = \(2,\), got \(3,\)"),
        (lambda: places(torch.tensor([0, 9]), (1, 3)), ValueError, "from 0 to .* = 2, got values from 0 to 9"),
        (lambda: places(torch.tensor([-1, 1]), (1, 3)), ValueError, "got values from -1 to 1"),
        (lambda: places(torch.empty(2, dtype=torch.int64, device="meta"), (1, 3)), ValueError, "indices are on meta"),
        (lambda: Packing.from_lengths([3, -1]), ValueError, r"of at least 0, got \[3, -1\]"),
        (lambda: Packing.from_lengths([[3]]), ValueError, r"\(N,\) integers"),
        (lambda: Packing.from_lengths([1.5]), TypeError, "lengths must be integers, got torch.float32"),
        (lambda: Packing.from_mask(torch.tensor([[1, 0, 1]])), ValueError, r"padding between them in rows \[0\]"),
        (lambda: Packing.from_mask(torch.tensor([[2, 0]])), ValueError, "values 1 and 0 only"),
        (lambda: Packing.from_mask(torch.ones(3)), ValueError, r"shape \(B, S\), got \(3,\)"),
        (lambda: Packing.from_lengths([3]).pack(torch.ones(1, 3)), ValueError, "make it with Packing.from_mask"),
        (lambda: Packing.from_mask(torch.ones(1, 3)).pack(torch.ones(2, 3)), ValueError, r"\(1, 3, '...'\), got"),
        (lambda: Packing.from_mask(torch.ones(1, 3)).unpack(torch.ones(2, 3)), ValueError, "covers 3 tokens, .* 2"),
    ],
)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()
