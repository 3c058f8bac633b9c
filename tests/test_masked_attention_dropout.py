"""masked_attention's dropout: the reference's with the same mask, statistics, seeds."""

from __future__ import annotations

import pytest
import torch
from op_suite import assert_checkpointed, assert_compiled, assert_fp64, assert_pure, leaves
from tolerance import assert_op_2x
from torch.utils.checkpoint import checkpoint

import fastconv
from fastconv.ops import masked_attention
from fastconv.ops.masked_attention import attention_dropout_mask
from fastconv.reference.ops import masked_attention as reference_masked_attention


def make(B=2, Sq=7, Sk=None, H=2, D=5, dtype=torch.float32, device="cpu"):
    """q, k and v."""
    Sk = Sq if Sk is None else Sk
    shapes = {"q": (B, Sq, H, D), "k": (B, Sk, H, D), "v": (B, Sk, H, D)}
    return {name: torch.randn(shape).to(device, dtype) for name, shape in shapes.items()}


def seed_of(number, device):
    return torch.tensor(number, device=device)


def drawn_mask(backend, B, H, Sq, Sk, p, number, device):
    """What the op keeps."""
    return attention_dropout_mask(B, H, Sq, Sk, p, seed_of(number, device), by_kernels=backend == "triton")


def pair(keep, p, number, device, **options):
    """The op with a seed and its reference with that seed's mask."""
    return (
        lambda **t: masked_attention(**t, dropout_p=p, seed=seed_of(number, device), **options),
        lambda **t: reference_masked_attention(**t, dropout_p=p, dropout_mask=keep, **options),
    )


def make_options(name, device):
    """For two rows of 3 queries and 37 keys: some masks, with rows that have no key."""
    lengths = torch.tensor([20, 0], device=device)
    pairs = torch.rand(2, 1, 3, 37, device=device) < 0.5
    pairs[0, 0, 1] = False
    return {
        "none": {},
        "lengths": {"lengths": lengths},
        "causal": {"causal": True},
        "lengths causal": {"lengths": lengths, "causal": True},
        "keys": {"mask": pairs[:, :, :1]},
        "pairs": {"mask": pairs},
        "head_mask of queries": {"head_mask": torch.rand(2, 3, 1, dtype=torch.float64, device=device)},
        "head_mask of keys": {"head_mask": torch.rand(37, dtype=torch.float64, device=device)},
    }[name]


OPTIONS = ("none", "lengths", "causal", "lengths causal", "keys", "pairs", "head_mask of queries", "head_mask of keys")


@pytest.mark.parametrize("p", [0.1, 0.9])
@pytest.mark.parametrize("name", OPTIONS)
def test_masked_attention_dropout_is_the_references(backend, device, name, p):
    keep = attention_dropout_mask(
        2, 2, 3, 37, p, seed_of(5, device), by_kernels=backend == "triton" and name != "head_mask of keys"
    )
    assert_fp64(*pair(keep, p, 5, device, **make_options(name, device)), make(Sq=3, Sk=37, device=device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", [1, 2, 63, 65])
def test_masked_attention_dropout_parity(backend, device, length, dtype):
    keep = drawn_mask(backend, 2, 1, length, 65, 0.3, 2**40 + 3, device)
    functions = pair(keep, 0.3, 2**40 + 3, device)
    inputs = make(Sq=length, Sk=65, H=1, dtype=dtype, device=device)
    assert_op_2x(*functions, inputs, roundings=20 if dtype == torch.float32 else 1)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_masked_attention_dropout_rate(backend, device, p):
    mask = drawn_mask(backend, 2, 3, 64, 200, p, 11, device)
    # Five standard deviations of a binomial.
    spread = 5 * (p * (1 - p) / mask.numel()) ** 0.5
    assert abs((~mask).float().mean().item() - p) < spread
    # Neighbours in every direction are independent: dropping both happens with p * p.
    neighbours = {
        "rows of the batch": (mask[1:], mask[:-1]),
        "heads": (mask[:, 1:], mask[:, :-1]),
        "queries": (mask[:, :, 1:], mask[:, :, :-1]),
        "keys": (mask[..., 1:], mask[..., :-1]),
        "every fourth key": (mask[..., 4:], mask[..., :-4]),
    }
    for name, (a, b) in neighbours.items():
        assert abs((~a & ~b).float().mean().item() - p * p) < 3 * spread, name


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_masked_attention_dropout_drops_probabilities(backend, device, p):
    # With the unit vectors as v, y is the dropped probabilities themselves.
    S = 32
    inputs = make(B=4, Sq=S, D=S, device=device)
    inputs["v"] = torch.eye(S, device=device)[:, None].expand(4, S, 2, S)
    probabilities = masked_attention(**inputs)
    dropped = masked_attention(**inputs, dropout_p=p)
    kept = dropped != 0
    assert abs(1 - kept.float().mean().item() - p) < 5 * (p * (1 - p) / kept.numel()) ** 0.5
    torch.testing.assert_close(dropped[kept], probabilities[kept] / (1 - p))
    assert not torch.equal(kept, masked_attention(**inputs, dropout_p=p) != 0)


def test_masked_attention_dropout_of_nothing(backend, device):
    inputs = make(device=device)
    assert torch.equal(masked_attention(**inputs, dropout_p=0.0, seed=seed_of(1, device)), masked_attention(**inputs))


# Seeds


def test_masked_attention_dropout_seeds(backend, device):
    numbers = (0, 1, 2**40, 2**62)
    masks = [drawn_mask(backend, 1, 2, 8, 16, 0.5, number, device) for number in numbers]
    for i, number in enumerate(numbers):
        assert torch.equal(masks[i], drawn_mask(backend, 1, 2, 8, 16, 0.5, number, device))
        assert not any(torch.equal(masks[i], other) for other in masks[:i])


def test_masked_attention_dropout_follows_the_generator(backend, device):
    inputs, lengths = leaves(make(device=device)), torch.tensor([7, 4], device=device)
    runs = []
    for number in (1, 1, 2):
        torch.manual_seed(number)
        first, second = (masked_attention(**inputs, lengths=lengths, dropout_p=0.5) for _ in range(2))
        assert not torch.equal(first, second)
        runs.append((first, second, *torch.autograd.grad(first.sum(), list(inputs.values()))))
    assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[1], strict=True))
    assert not torch.equal(runs[0][0], runs[2][0])


@pytest.mark.parametrize("trained", [False, True])
def test_masked_attention_dropout_reads_the_seed_when_it_runs(backend, device, trained):
    # A captured graph, which has the tensor's address, draws another mask when its value has changed.
    inputs, seed = leaves(make(device=device), None if trained else ()), seed_of(1, device)
    results = []
    for number in (1, 2, 1):
        seed.fill_(number)
        results.append(masked_attention(**inputs, dropout_p=0.5, seed=seed))
        assert torch.equal(results[-1], masked_attention(**inputs, dropout_p=0.5, seed=seed_of(number, device)))
    assert torch.equal(results[0], results[2]) and not torch.equal(results[0], results[1])


def test_masked_attention_dropout_with_a_seed_that_changes_before_the_backward(device):
    # The backward would draw another mask than the forward.
    pytest.importorskip(
        "triton", reason="the native formulation keeps the mask, and the package triton is not installed"
    )
    inputs, seed = leaves(make(device=device)), seed_of(1, device)
    with fastconv.backend("triton"):
        y = masked_attention(**inputs, dropout_p=0.5, seed=seed)
        seed.fill_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_masked_attention_dropout_draws_anew_when_compiled(backend, device):
    inputs = leaves(make(device=device))

    def run(q, k, v):
        return masked_attention(q, k, v, dropout_p=0.5)

    torch._dynamo.reset()
    compiled, results = torch.compile(run, backend="aot_eager", fullgraph=True), []
    for number in (3, 4, 3):
        torch.manual_seed(number)
        y = compiled(**inputs)
        results.append([y, *torch.autograd.grad(y.sin().sum(), list(inputs.values()))])
    for first, second, third in zip(*results, strict=True):
        assert torch.equal(first, third) and not torch.equal(first, second)


# What every op is tested for


def test_masked_attention_dropout_compiled(device):
    # The native formulation looks at the seed, which no graph has.
    pytest.importorskip("triton", reason="kernels read a seed, and the package triton is not installed")
    with fastconv.backend("triton"):
        assert_compiled(pair(None, 0.5, 3, device, causal=True)[0], make(device=device))


def test_masked_attention_dropout_is_pure(backend, device):
    assert_pure(pair(None, 0.5, 3, device)[0], make(device=device))


def test_masked_attention_dropout_checkpointed(backend, device):
    inputs = make(Sq=4, device=device)
    assert_checkpointed(pair(None, 0.5, 3, device)[0], inputs)
    # A seed that is drawn is drawn again.
    results = []
    for wrap in (lambda function, *given: function(*given), lambda *given: checkpoint(*given, use_reentrant=False)):
        torch.manual_seed(6)
        given = leaves(inputs)
        wrap(lambda *t: masked_attention(*t, dropout_p=0.5), *given.values()).sin().sum().backward()
        results.append([t.grad for t in given.values()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_masked_attention_dropout_gradcheck(backend, device):
    inputs = leaves(make(B=1, Sq=2, Sk=3, H=1, D=2, dtype=torch.float64, device=device))
    op = pair(None, 0.4, 3, device)[0]
    assert torch.autograd.gradcheck(lambda *given: op(**dict(zip("qkv", given, strict=True))), list(inputs.values()))
