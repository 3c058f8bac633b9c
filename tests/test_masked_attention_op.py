"""masked_attention as an op: head sizes, layouts, out, registration, derivatives, memory, which implementation."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from op_suite import (
    assert_autocast_2x,
    assert_checkpointed,
    assert_compiled,
    assert_fp64,
    assert_second_derivative,
    assert_traced,
    assert_transforms,
    leaves,
)
from tolerance import assert_op_2x
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastconv
from fastconv import Packing
from fastconv.ops import masked_attention
from fastconv.ops.masked_attention import _prefers_sdpa as prefers_sdpa
from fastconv.ops.masked_attention import sdpa_is_faster
from fastconv.reference.ops import RelativePositions
from fastconv.reference.ops import masked_attention as reference_masked_attention


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


# Name -> options for two rows of 7 queries and keys.
OPTIONS = {
    "none": lambda device: {},
    "lengths": lambda device: {"lengths": torch.tensor([7, 0], device=device)},
    "causal": lambda device: {"causal": True},
    "keys": lambda device: {"mask": (torch.arange(7) < torch.tensor([[7], [3]]))[:, None, None].to(device)},
    "pairs": lambda device: {"mask": torch.randn(2, 1, 7, 7, device=device), "causal": True},
    "relative": lambda device: {"relative": RelativePositions(torch.randn(15, 5, device=device), True)},
    "head_mask": lambda device: {"head_mask": torch.rand(2, 1, 1, device=device)},
}

# Head sizes: up to 128 there are kernels for fp32, up to 256 for the halves, whose tiles are powers of two.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("D", [1, 2, 16, 17, 48, 64, 80, 128, 129, 192, 256])
def test_masked_attention_head_sizes(backend, device, D, dtype):
    inputs = make(B=1, Sq=3, Sk=9, D=D, dtype=dtype, device=device)
    assert_op_2x(*pair(causal=True), inputs, roundings=20 if dtype == torch.float32 else 1)


# Layouts


def heads_first(t):
    return t.transpose(1, 2).contiguous().transpose(1, 2)


def head_size_in_the_middle(t):
    return t.transpose(2, 3).contiguous().transpose(2, 3)


LAYOUTS = {
    "heads first": heads_first,
    "last dimension with a stride": head_size_in_the_middle,
    "sequence first": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "every second token": lambda t: t.repeat_interleave(2, 1)[:, ::2],
    "one row for all": lambda t: t[:1].expand(t.shape),
    "one head for all": lambda t: t[:, :, :1].expand(t.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_masked_attention_strides(backend, device, layout):
    inputs = {name: LAYOUTS[layout](t) for name, t in make(Sq=33, device=device).items()}
    dy = LAYOUTS[layout](torch.randn(2, 33, 2, 5, device=device))
    assert_op_2x(*pair(), inputs, dy, roundings=20)


@pytest.mark.parametrize("name", ["k", "v"])
def test_masked_attention_keys_of_one_row(backend, device, name):
    # As a cache that all beams share.
    inputs = make(B=3, Sq=1, Sk=9, device=device)
    inputs[name] = inputs[name][:1].expand(3, 9, 2, 5)
    assert_fp64(*pair(), inputs)


def test_masked_attention_strided_masks(backend, device):
    inputs, wide = make(device=device), torch.randn(7, 14, 2, 2, device=device)
    mask = wide.permute(3, 2, 0, 1)[..., ::2]
    for given in (mask, mask > 0, mask[:, :1], mask[:1], mask[:, :, :1], mask[0, 0].t()):
        assert_fp64(*pair(mask=given.double() if given.is_floating_point() else given), inputs)


# out


def wide_values(*shape, device):
    """Memory that holds more than an `out`, filled with 7."""
    return torch.full(shape, 7.0, device=device)


# Name -> an `out` of (2, 33, 2, 5).
OUTS = {
    "contiguous": lambda device: wide_values(2, 33, 2, 5, device=device),
    "half of a wider": lambda device: wide_values(2, 33, 20, device=device)[..., 10:].unflatten(-1, (2, 5)),
    "slice of tokens": lambda device: wide_values(2, 40, 2, 5, device=device)[:, 3:36],
    "heads first": lambda device: wide_values(2, 2, 33, 5, device=device).transpose(1, 2),
    "sequence first": lambda device: wide_values(33, 2, 2, 5, device=device).transpose(0, 1),
    "every second element": lambda device: wide_values(2, 33, 2, 10, device=device)[..., ::2],
    "head size first": lambda device: wide_values(2, 5, 33, 2, device=device).permute(0, 2, 3, 1),
}


@pytest.mark.parametrize("layout", OUTS)
def test_masked_attention_out(backend, device, layout):
    inputs, out = make(Sq=33, device=device), OUTS[layout](device)
    whole = out._base if out._base is not None else out
    with torch.no_grad():
        assert masked_attention(**inputs, out=out) is out
        torch.testing.assert_close(out, masked_attention(**inputs), rtol=0, atol=0)
        out.fill_(7.0)
    assert (whole == 7).all()


@pytest.mark.parametrize("name", OPTIONS)
def test_masked_attention_out_with_options(backend, device, name):
    inputs, options = make(device=device), OPTIONS[name](device)
    whole = wide_values(2, 7, 20, device=device)
    out = whole[..., :10].unflatten(-1, (2, 5))
    with torch.no_grad():
        masked_attention(**inputs, **options, out=out)
        assert torch.equal(out, masked_attention(**inputs, **options))
    assert (whole[..., 10:] == 7).all()


@pytest.mark.parametrize("where", ["q", "k", "v", "a token on", "mask"])
def test_masked_attention_out_in_the_memory_of_an_input(backend, device, where):
    inputs, mask = make(Sq=70, D=5, device=device), None
    if where == "a token on":
        whole = torch.randn(2, 71, 2, 5, device=device)
        inputs["q"], out = whole[:, :-1], whole[:, 1:]
    elif where == "mask":
        mask = torch.randn(2, 1, 70, 70, device=device)
        out = mask.flatten()[: 2 * 70 * 10].view(2, 70, 2, 5)
    else:
        out = inputs[where]
    with torch.no_grad():
        expected = masked_attention(**inputs, mask=mask)
        assert torch.equal(masked_attention(**inputs, mask=mask, out=out), expected)


@pytest.mark.parametrize("trained", ["q", "k", "v", "mask", "head_mask", "table", "out"])
def test_masked_attention_out_has_no_gradient(backend, device, trained):
    inputs = make(device=device) | {
        "mask": torch.randn(7, 7, device=device),
        "out": torch.zeros(2, 7, 2, 5, device=device),
    }
    inputs |= {"head_mask": torch.rand(2, 1, 1, device=device), "table": torch.randn(13, 5, device=device)}
    given = leaves(inputs, (trained,))
    relative = RelativePositions(given.pop("table"))
    with pytest.raises(ValueError, match="out can't be used where a gradient is needed"):
        masked_attention(**given, relative=relative)
    with torch.no_grad():
        masked_attention(**given, relative=relative)


@pytest.mark.parametrize("layout", ["half of a wider", "every second element"])
def test_masked_attention_out_compiled(backend, device, layout):
    inputs, out = make(Sq=33, device=device), OUTS[layout](device)

    def run(q, k, v, out):
        return masked_attention(q, k, v, causal=True, out=out)

    with torch.no_grad():
        expected = masked_attention(**inputs, causal=True)
        torch._dynamo.reset()
        torch.compile(run, backend="aot_eager", fullgraph=True)(**inputs, out=out)
    torch.testing.assert_close(out, expected)


# The raw ops


@pytest.mark.parametrize("kind", ["none", "lengths", "keys", "pairs", "packing", "two packings", "dropout"])
def test_masked_attention_opcheck(device, kind):
    pytest.importorskip("triton", reason="the raw ops are kernels, and the package triton is not installed")
    q, k, v = make(Sq=5, Sk=6, device=device).values()
    lengths = torch.tensor([6, 2], device=device) if kind == "lengths" else None
    mask = {"keys": torch.rand(2, 1, 1, 6) < 0.5, "pairs": torch.randn(2, 1, 5, 6)}.get(kind)
    packed = []
    if "packing" in kind:
        q, k, v = q[:1], k[:1, :5], v[:1, :5]
        packing = Packing.from_lengths([3, 2], device=device)
        packed = [packing.first, packing.last] * (2 if kind == "two packings" else 1)
    seed = torch.tensor(3, device=device) if kind == "dropout" else None
    mask = None if mask is None else mask.to(device)
    options = (lengths, mask, packed, kind == "causal", 0.5 if kind == "dropout" else 0.0, seed, 0.4)
    ops = torch.ops.fastconv
    for save in (False, True):
        opcheck(ops.masked_attention_fwd.default, (q, k, v, *options, save))
    out = torch.zeros(*q.shape[:2], 20, device=device)[..., 10:].unflatten(-1, (2, 5))
    opcheck(ops.masked_attention_fwd_out.default, (q, k, v, *options, out))
    y, stats = ops.masked_attention_fwd(q, k, v, *options, True)
    assert stats.shape == (2, q.shape[0], 2, 5)
    for need_dmask in (False, True) if kind == "pairs" else (False,):
        opcheck(ops.masked_attention_bwd.default, (torch.randn_like(q), q, k, v, y, stats, *options, need_dmask))


@pytest.mark.parametrize("name", OPTIONS)
def test_masked_attention_compiled_with(backend, device, name):
    assert_compiled(pair(**OPTIONS[name](device))[0], make(device=device))


@pytest.mark.parametrize("trained", [False, True])
def test_masked_attention_compiled_graph_has_the_kernel(device, trained):
    # Or a compiled model would run without kernels, with nobody saying so.
    pytest.importorskip("triton", reason="the package triton is not installed")
    inputs, found = leaves(make(device=device), None if trained else ()), []

    def keep(graph, _):
        found.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch._dynamo.reset()
    with fastconv.backend("triton"):
        compiled = torch.compile(masked_attention, backend=torch._dynamo.backends.common.aot_autograd(fw_compiler=keep))
        compiled(**inputs)
    assert "fastconv.masked_attention_fwd.default" in found


@pytest.mark.parametrize("name", OPTIONS)
def test_masked_attention_writes_every_element(backend, device, poisoned_empty, name):
    # 7 queries don't fill a block, and forbidden keys are visited by no program.
    given = leaves(make(device=device))
    y = masked_attention(**given, **OPTIONS[name](device))
    for written in (y, *torch.autograd.grad(y.sum(), list(given.values()))):
        assert not written.isnan().any()


def test_masked_attention_writes_every_element_behind_lengths(backend, device, poisoned_empty):
    # Whole blocks of keys that no query sees.
    given = leaves(make(Sq=3, Sk=70, device=device))
    y = masked_attention(**given, lengths=torch.tensor([5, 70], device=device))
    for written in (y, *torch.autograd.grad(y.sum(), list(given.values()))):
        assert not written.isnan().any()
    mask = torch.randn(2, 1, 3, 70, device=device).requires_grad_()
    y = masked_attention(**given, mask=mask, lengths=torch.tensor([5, 70], device=device))
    (dmask,) = torch.autograd.grad(y.sin().sum(), mask)
    assert not dmask[0, ..., 5:].any() and not dmask.isnan().any()


# Other derivatives


@pytest.mark.parametrize("name", OPTIONS)
def test_masked_attention_second_derivative(backend, device, name):
    functions, inputs = pair(**OPTIONS[name](device)), make(device=device)
    if backend == "triton":
        assert_second_derivative(*functions, inputs, "masked_attention")
    elif name == "relative":
        assert_second_derivative(*functions, inputs, None)
    else:
        # PyTorch's kernel for a CPU says so too.
        with pytest.raises(RuntimeError, match=r"derivative for .*is not implemented"):
            assert_second_derivative(*functions, inputs, None)


def test_masked_attention_checkpointed(backend, device):
    assert_checkpointed(pair(causal=True)[0], make(Sq=4, device=device))


def test_masked_attention_traced(backend, device):
    assert_traced(pair(causal=True)[0], make(Sq=4, device=device))


@pytest.mark.filterwarnings("ignore:.torch.jit.script", "ignore:There is a performance drop")
@pytest.mark.parametrize("name", ["lengths", "pairs", "relative", "head_mask"])
def test_masked_attention_transforms_with(backend, device, name):
    assert_transforms(*pair(**OPTIONS[name](device)), make(device=device))


@pytest.mark.parametrize("name", ["lengths", "pairs", "relative", "head_mask"])
def test_masked_attention_autocast_with(backend, device, name):
    assert_autocast_2x(*pair(**OPTIONS[name](device)), make(device=device))


@pytest.mark.parametrize("trained", [False, True])
def test_masked_attention_autocast_of_mixed_dtypes(backend, device, trained):
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    inputs = {k: t.to(d).requires_grad_(trained) for (k, t), d in zip(make(device=device).items(), dtypes, strict=True)}
    with torch.autocast(device.type, torch.bfloat16):
        y = masked_attention(**inputs)
    assert y.dtype == torch.bfloat16
    expected = reference_masked_attention(**{k: t.detach().bfloat16().float() for k, t in inputs.items()})
    torch.testing.assert_close(y.float(), expected, rtol=3e-2, atol=3e-2)
    if trained:
        y.float().sum().backward()
        assert all(t.grad.dtype == t.dtype for t in inputs.values())


def test_masked_attention_fp64_stays_under_autocast(backend, device):
    inputs = make(dtype=torch.float64, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        assert masked_attention(**inputs).dtype == torch.float64
        with pytest.raises(TypeError, match="one dtype, got"):
            masked_attention(**inputs | {"k": inputs["k"].float()})


# Memory


class Largest(TorchDispatchMode):
    """The bytes of the largest memory that an operator, or a launcher's torch.empty or torch.zeros, returns."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.bytes = 0
        for name in ("empty", "zeros"):
            # What an op of the library makes within itself is no operator's result here.
            monkeypatch.setattr(torch, name, self._noting(getattr(torch, name)))

    def _noting(self, function):
        return lambda *args, **kwargs: self._note(function(*args, **kwargs))

    def _note(self, made):
        sizes = [t.untyped_storage().nbytes() for t in tree_leaves(made) if isinstance(t, torch.Tensor)]
        self.bytes = max(self.bytes, *sizes, 0)
        return made

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self._note(func(*args, **(kwargs or {})))


@pytest.mark.parametrize(
    "kind", ["none", "lengths", "keys", "additive keys", "causal", "dropout", "packing", "head_mask"]
)
def test_masked_attention_memory_grows_linearly(device, monkeypatch, kind):
    pytest.importorskip("triton", reason="the native formulation makes the scores, and triton is not installed")

    def largest(S):
        q, k, v = leaves(make(B=1, Sq=S, H=1, D=16, dtype=torch.float16, device=device)).values()
        keep = (torch.arange(S, device=device) < S - 5).view(1, 1, 1, S)
        options = {
            "none": {},
            "lengths": {"lengths": torch.tensor([S - 5], device=device)},
            "keys": {"mask": keep},
            "additive keys": {"mask": torch.zeros(1, 1, 1, S, device=device).masked_fill(~keep, -float("inf"))},
            "causal": {"causal": True},
            "dropout": {"dropout_p": 0.1},
            "packing": {"packing": Packing.from_lengths([S - 5, 5], device=device)},
            "head_mask": {"head_mask": torch.ones(1, 1, 1, device=device)},
        }[kind]
        q, k, v = (t[0] if kind == "packing" else t for t in (q, k, v))
        with monkeypatch.context() as patch, Largest(patch) as found:
            masked_attention(q, k, v, **options).sum().backward()
        return found.bytes

    with fastconv.backend("triton"):
        small, large = largest(128), largest(256)
    # q's size, or the statistics'.
    assert 128 * 16 * 2 <= small < 128 * 128 and large == 2 * small


def test_masked_attention_memory_is_counted(device, monkeypatch):
    # The same count finds the scores where they are made.
    q, k, v = make(B=1, Sq=64, H=1, D=8, device=device).values()
    with monkeypatch.context() as patch, Largest(patch) as found:
        reference_masked_attention(q, k, v)
    assert found.bytes >= 64 * 64 * 4


def test_masked_attention_out_needs_no_memory(device, monkeypatch):
    pytest.importorskip("triton", reason="kernels write into out, and the package triton is not installed")
    q, k, v = make(Sq=33, device=device).values()
    out = OUTS["half of a wider"](device)
    with fastconv.backend("triton"), torch.no_grad(), monkeypatch.context() as patch, Largest(patch) as found:
        masked_attention(q, k, v, causal=True, out=out)
    assert found.bytes == out.untyped_storage().nbytes() or found.bytes == 0


# Which implementation


@pytest.mark.parametrize(
    ("Sq", "D", "dtype", "expected"),
    [
        (512, 64, torch.float16, False),
        (512, 48, torch.bfloat16, False),
        (512, 128, torch.float16, True),
        (512, 64, torch.float32, True),
        (1, 64, torch.bfloat16, True),
        (16, 64, torch.bfloat16, True),
        (17, 64, torch.bfloat16, False),
    ],
)
def test_masked_attention_sdpa_is_faster(Sq, D, dtype, expected):
    assert sdpa_is_faster(Sq, D, dtype, masked=False) == expected
    # With a mask its fast kernels don't run.
    assert not sdpa_is_faster(Sq, D, dtype, masked=True)


def test_masked_attention_prefers_sdpa_in_inference_without_masks_or_dropout():
    q = SimpleNamespace(is_cuda=True, requires_grad=False, shape=(2, 512, 4, 128), dtype=torch.float16)
    assert prefers_sdpa(q, q, q, False, 0.0, None)
    assert not prefers_sdpa(q, q, q, False, 0.0, q)
    # A checkpoint's first run is one without gradients: it must drop what the second does.
    assert not prefers_sdpa(q, q, q, False, 0.1, None)
    with fastconv.backend("triton"):
        assert not prefers_sdpa(q, q, q, False, 0.0, None)
    q.requires_grad = True
    assert not prefers_sdpa(q, q, q, False, 0.0, None)


@pytest.mark.parametrize("layout", ["slice", "expanded", "int64 step"])
def test_masked_attention_strided_lengths(backend, device, layout):
    given = torch.tensor([[3, 40], [7, 39], [20, 38]], dtype=torch.int64 if "64" in layout else torch.int32)
    lengths = {"slice": given[:, 0], "expanded": torch.tensor([7]).expand(3), "int64 step": given.flatten()[::2]}[
        layout
    ]
    inputs = {k: torch.randn(3, 5 if k == "q" else 40, 2, 16, dtype=torch.float64, device=device) for k in "qkv"}
    results = []
    for function in (masked_attention, reference_masked_attention):
        given_leaves = leaves(inputs)
        y = function(**given_leaves, lengths=lengths.to(device))
        results.append([y, *torch.autograd.grad(y.sin().sum(), list(given_leaves.values()))])
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def test_masked_attention_not_a_number_shows(device):
    # In a mask of keys past the last allowed one, and of scores that are all -inf: as in the reference.
    q, k, v = (torch.randn(2, 40, 1, 16, device=device) for _ in range(3))
    mask = torch.zeros(2, 1, 1, 40, device=device)
    mask[..., 30:] = float("-inf")
    mask[0, ..., 35] = float("nan")
    with fastconv.backend("triton"):
        y = masked_attention(q, k, v, mask=mask)
        assert y[0].isnan().all() and not y[1].isnan().any()
        q[0, 0, 0, 0], k[..., 0] = float("inf"), -k[..., 0].abs()
        assert masked_attention(q, k, v)[0, 0].isnan().all()
