"""Packing: where the sequences of a batch without padding begin and end."""

from __future__ import annotations

import itertools
import sys
from typing import Any

import pytest
import torch
from padded_batches import MASKS, S, ids_of, mask_of
from swap_models import FAMILIES, build
from torch.utils._python_dispatch import TorchDispatchMode

import fastconv
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


@pytest.mark.parametrize("side", ["right", "left"])
def test_from_lengths_of_a_padded_batch(side):
    keep = mask_of(side)
    packing = Packing.from_lengths(keep.sum(1), padded_shape=(4, S), side=side)
    assert_same(packing, Packing.from_mask(keep))
    full = torch.tensor([[0, 0], [1, 1]])
    assert_same(Packing.from_lengths([0, 2], padded_shape=(2, 2), side=side), Packing.from_mask(full))
    assert Packing.from_lengths([], padded_shape=(0, 3), side=side).indices.shape == (0,)


@pytest.mark.parametrize("kind", MASKS)
def test_every_way_makes_the_same(kind):
    keep = mask_of(kind)
    packing = Packing.from_mask(keep)
    assert packing.indices.tolist() == keep.flatten().nonzero().flatten().tolist()
    again = Packing(packing.cu_seqlens, indices=packing.indices, padded_shape=packing.padded_shape)
    assert_same(again, packing)
    assert packing.lengths == keep.sum(1).tolist() == Packing.from_lengths(keep.sum(1)).lengths
    rows = list(itertools.pairwise(packing.cu_seqlens.tolist()))
    assert packing.first.tolist() == [first for first, last in rows for _ in range(first, last)]
    assert packing.last.tolist() == [last for first, last in rows for _ in range(first, last)]


def assert_same(packing: Packing, other: Packing) -> None:
    assert vars(packing).keys() == vars(other).keys()
    for name, value in vars(other).items():
        mine = vars(packing)[name]
        if isinstance(value, torch.Tensor):
            assert torch.equal(mine, value) and mine.dtype == value.dtype, name
        else:
            assert mine == value and type(mine) is type(value), name


class OnDevice(torch.Tensor):
    """A tensor that says that it lies on the device "meta", and counts who looks at its values."""

    looks = 0

    @staticmethod
    def __new__(cls, values: torch.Tensor) -> OnDevice:
        tensor = torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype, device="meta")
        tensor.values = values
        return tensor

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = [each.values if isinstance(each, cls) else each for each in args], dict(kwargs or {})
        to_host = str(kwargs.pop("device", "meta")) == "cpu"
        OnDevice.looks += to_host or looks_at_values(function)
        found = function(*args, **kwargs)
        return cls(found) if isinstance(found, torch.Tensor) and not to_host else found


def looks_at_values(function: Any) -> bool:
    """Whether an operator gives the host a number, or a tensor whose shape is one."""
    names = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "unique", "repeat_interleave", "is_nonzero")
    return function.overloadpacket.__name__.lstrip("_") in {name.lstrip("_") for name in names}


def looks_of(make: Any, *args: Any, **kwargs: Any) -> int:
    OnDevice.looks = 0
    make(*args, **kwargs)
    return OnDevice.looks


def test_the_device_is_looked_at_once():
    keep = mask_of("left")
    for dtype in (torch.bool, torch.int64, torch.float32):
        assert looks_of(Packing.from_mask, OnDevice(keep.to(dtype))) == 1
    lengths = keep.sum(1)
    assert looks_of(Packing.from_lengths, OnDevice(lengths)) == 1
    assert looks_of(Packing.from_lengths, OnDevice(lengths), padded_shape=(4, S)) == 1
    with pytest.raises(ValueError, match="padding between them"):
        looks_of(Packing.from_mask, OnDevice(torch.tensor([[1, 0, 1]])))
    assert OnDevice.looks == 1
    assert looks_of(Packing, OnDevice(torch.tensor([0, 2, 5]))) == 1
    # The looks themselves count.
    assert looks_of(lambda: OnDevice(lengths).sum().item() + len(OnDevice(lengths).nonzero())) == 2


class Looks(TorchDispatchMode):
    """Counts who looks at the values of any tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if looks_at_values(function):
            self.found.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("source", ["reference", "transformers"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_forward_looks_at_its_mask_and_at_nothing_else(source, family, monkeypatch):
    for module in list(sys.modules.values()):  # what is checked on a CPU alone, where that waits for nothing
        if module.__name__.startswith("fastconv.") and hasattr(module, "can_look_at"):
            monkeypatch.setattr(module, "can_look_at", lambda tensor: False)
    monkeypatch.setattr("fastconv.nn.padding_free._rounded", lambda packed, packing: (packed, packing))  # on a CPU too
    model = fastconv.accelerate(build(source, family + "Model"), padding="remove", backend="native")
    keep, inputs = mask_of("left"), ids_of(family, 4, S)
    packing, masks = Packing.from_lengths(keep.sum(1).tolist(), padded_shape=(4, S), side="left"), []
    monkeypatch.setattr(Packing, "from_mask", lambda mask: masks.append(mask) or packing)
    for mask in (packing, keep):
        with Looks() as looks:
            output = model(**inputs, attention_mask=mask)
        assert looks.found == []
        output[0].sum().backward()
    assert len(masks) == 1 and masks[0] is keep


@pytest.mark.parametrize("family", FAMILIES)
def test_a_forward_with_lengths_waits_for_nothing(family, device):
    if device.type != "cuda":
        pytest.skip("torch tells of waits for a GPU only")
    model = fastconv.accelerate(build("reference", family + "ForMaskedLM").to(device), padding="remove")
    keep, inputs = mask_of("right"), {name: ids.to(device) for name, ids in ids_of(family, 4, S).items()}
    lengths, labels = keep.sum(1).tolist(), inputs["input_ids"].masked_fill(~keep.to(device), -100)

    def call(mask) -> torch.Tensor:
        return model(**inputs, attention_mask=mask, labels=labels, loss_only=True).loss

    expected = call(keep.to(device)).item()  # compiles the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = call(Packing.from_lengths(lengths, padded_shape=(4, S), device=device))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert loss.item() == expected


def test_gradients_go_through():
    packing = Packing.from_mask(torch.tensor([[1, 1, 0], [0, 0, 1]]))
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: packing.unpack(packing.pack(x).sin()), x)


def places(indices=None, padded_shape=None):
    """A packing of one sequence of two tokens."""
    return Packing(torch.tensor([0, 2]), indices=indices, padded_shape=padded_shape)


def padded(lengths, padded_shape, side="right"):
    return Packing.from_lengths(lengths, padded_shape=padded_shape, side=side)


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
        (lambda: padded([3, 1], (2, 2)), ValueError, r"B of at most S for .* = \(2, 2\), got \[3, 1\]"),
        (lambda: padded([1, 1], (3, 2)), ValueError, r"padded_shape \(B, S\) = \(3, 2\), got \[1, 1\]"),
        (lambda: padded([1], (1, 2), "both"), ValueError, 'side must be "right" or "left", got \'both\''),
        (lambda: padded([1], None, "left"), ValueError, "side 'left' needs padded_shape, got None"),
        (lambda: padded([1], (1, 2)).pack(torch.ones(1, 2, device="meta")), ValueError, "is on cpu but x is on meta"),
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
