"""masked_lm_loss through every layer: kernels and native formulation against the reference, gradients, memory."""

from __future__ import annotations

import importlib

import pytest
import torch
import torch.nn.functional as F
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
from shapes import LAYOUTS, ODD, with_layout
from tolerance import assert_op_2x
from torch.library import opcheck

import fastconv
from fastconv.ops import masked_lm_loss
from fastconv.parity.measure import peak_bytes
from fastconv.reference.ops import masked_lm_loss as reference_masked_lm_loss

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# A scalar's own error may happen to be none: the loss gets a rounding more than the rule's one.
ROUNDINGS = 2

pytestmark = [
    pytest.mark.usefixtures("poisoned_empty"),
    # Behind the labelled tokens stands anything, and the interpreter's numpy computes with it aloud.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]


def make(T=21, C=24, V=100, dtype=torch.float32, device="cpu", labelled=0.4, bias=True):
    """Inputs of masked_lm_loss; a share of the tokens has a label, the first at least."""
    labels = torch.where(torch.rand(T) < labelled, torch.randint(0, V, (T,)), -100)
    labels[:1] = V - 1
    inputs = {"hidden": torch.randn(T, C), "weight": torch.randn(V, C) / C**0.5}
    inputs |= {"bias": 0.5 * torch.randn(V)} if bias else {}
    return {k: t.to(device, dtype) for k, t in inputs.items()} | {"labels": labels.to(device)}


def both(**options):
    """The op and its reference with options, and with a bias only if one is given."""
    return (
        lambda hidden, weight, labels, bias=None: masked_lm_loss(hidden, weight, bias, labels, **options),
        lambda hidden, weight, labels, bias=None: reference_masked_lm_loss(hidden, weight, bias, labels, **options),
    )


def without_labels(inputs, **options):
    """The op, its reference and the inputs, the labels bound to the functions."""
    labels = inputs.pop("labels")
    op, reference = both(**options)
    return lambda **t: op(**t, labels=labels), lambda **t: reference(**t, labels=labels), inputs


def assert_parity(inputs, **options):
    """The 2x rule with and without gradients."""
    op, reference = both(**options)
    assert_op_2x(op, reference, inputs, roundings=ROUNDINGS)
    assert_inference_2x(op, reference, inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"z_loss": 1e-2, "label_smoothing": 0.2}], ids=str)
def test_masked_lm_loss_parity(backend, device, options, dtype):
    assert_parity(make(dtype=dtype, device=device), **options)


@pytest.mark.parametrize("tokens", ODD)
def test_masked_lm_loss_tokens(backend, device, tokens):
    assert_parity(make(T=tokens, device=device))


@pytest.mark.parametrize("vocabulary", [2, 5, 127, 128, 129, 1000])
def test_masked_lm_loss_vocabulary(backend, device, vocabulary):
    assert_parity(make(V=vocabulary, device=device), label_smoothing=0.1)


def test_masked_lm_loss_one_word(backend, device):
    # Nothing else can be said: no loss and no gradient.
    given = leaves(make(V=1, device=device))
    loss = masked_lm_loss(**given, label_smoothing=0.1)
    loss.backward()
    for t in (loss, given["hidden"].grad, given["weight"].grad, given["bias"].grad):
        torch.testing.assert_close(t, torch.zeros_like(t), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [1, 5, 16, 65])
def test_masked_lm_loss_channels(backend, device, channels, dtype):
    assert_parity(make(C=channels, dtype=dtype, device=device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.3, "z_loss": 1e-2}], ids=str)
def test_masked_lm_loss_without_bias(backend, device, options, dtype):
    assert_parity(make(dtype=dtype, device=device, bias=False), **options)


@pytest.mark.parametrize("labelled", [0.0, 1.0], ids=["one", "all"])
def test_masked_lm_loss_share_of_labels(backend, device, labelled):
    # The first token always has a label.
    assert_parity(make(T=70, labelled=labelled, device=device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_masked_lm_loss_in_parts(backend, device, dtype, monkeypatch):
    # Large ones are cut: the vocabulary by the kernels' backward, the tokens and their softmax natively.
    if backend == "triton":
        monkeypatch.setattr(importlib.import_module("fastconv.kernels.masked_lm_loss_bwd"), "_FEW", 0)
    native = importlib.import_module("fastconv.ops.masked_lm_loss")
    monkeypatch.setattr(native, "_PIECE", 7)
    monkeypatch.setattr(native, "_SLICE", 3 * 300)
    assert_parity(make(T=40, V=300, dtype=dtype, labelled=0.6, device=device), label_smoothing=0.1)


@pytest.mark.parametrize("ignore_index", [-1, 0, 5, 2**31 - 1])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_masked_lm_loss_ignore_index(backend, device, ignore_index, dtype):
    inputs = make(device=device)
    labels = inputs["labels"]
    inputs["labels"] = torch.where(labels == -100, ignore_index, labels).to(dtype)
    inputs["labels"][:3] = ignore_index
    assert_parity(inputs, ignore_index=ignore_index)


def test_masked_lm_loss_is_cross_entropy(backend, device):
    # Of the reference too: PyTorch's own functions on a batch of sequences.
    inputs = make(T=12, device=device)
    hidden, labels = inputs["hidden"].view(3, 4, -1), inputs["labels"].view(3, 4)
    logits = F.linear(hidden, inputs["weight"], inputs["bias"])
    for options in ({}, {"label_smoothing": 0.1}):
        expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), **options)
        for op in (masked_lm_loss, reference_masked_lm_loss):
            loss = op(hidden, inputs["weight"], inputs["bias"], labels, **options)
            assert loss.shape == () and loss.dtype == torch.float32
            torch.testing.assert_close(loss, expected)
    z = logits.logsumexp(-1)[labels != -100].square().mean()
    plain = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    for op in (masked_lm_loss, reference_masked_lm_loss):
        loss = op(hidden, inputs["weight"], inputs["bias"], labels, z_loss=0.5)
        torch.testing.assert_close(loss, plain + 0.5 * z)


@pytest.mark.parametrize("tokens", [0, 1, 40])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "z_loss": 0.1}], ids=str)
def test_masked_lm_loss_no_labels(backend, device, tokens, options):
    # As torch's mean of nothing: NaN, with gradients of 0.
    inputs = make(T=tokens, device=device)
    inputs["labels"].fill_(-100)
    for function in both(**options):
        given = leaves(inputs)
        loss = function(**given)
        assert loss.isnan()
        loss.backward()
        for name in ("hidden", "weight", "bias"):
            assert torch.equal(given[name].grad, torch.zeros_like(given[name])), name


def test_masked_lm_loss_looks_at_labelled_tokens_only(backend, device):
    inputs = make(T=50, device=device)
    labelled = inputs["labels"] != -100
    given = leaves(inputs)
    loss = masked_lm_loss(**given)
    loss.backward()
    assert torch.equal(given["hidden"].grad[~labelled], torch.zeros_like(inputs["hidden"][~labelled]))
    assert given["hidden"].grad[labelled].count_nonzero() == labelled.sum() * 24
    poisoned = {**inputs, "hidden": torch.where(labelled[:, None], inputs["hidden"], float("nan"))}
    again = leaves(poisoned)
    other = masked_lm_loss(**again)
    other.backward()
    assert torch.equal(other, loss)
    for name in ("hidden", "weight", "bias"):
        assert torch.equal(again[name].grad, given[name].grad), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_masked_lm_loss_layouts(backend, device, layout):
    inputs = make(T=24, C=16, V=48, device=device)
    inputs["hidden"] = with_layout(inputs["hidden"].view(4, 6, 16), layout)
    inputs["labels"] = inputs["labels"].view(4, 6)
    if layout != "contiguous":
        inputs["weight"] = with_layout(inputs["weight"], layout)
        inputs["bias"] = torch.stack([inputs["bias"], torch.full_like(inputs["bias"], float("nan"))], -1)[:, 0]
        inputs["labels"] = torch.stack([inputs["labels"], torch.full_like(inputs["labels"], 10**6)], -1)[..., 0]
    assert_parity(inputs)


def test_masked_lm_loss_tied_weight(backend, device):
    # The embeddings' weight is the head's: it gets both gradients, also as a gradient is added to a former one.
    inputs = make(V=40, device=device)
    ids = torch.randint(0, 40, (21,), device=device)

    def run(op):
        weight = inputs["weight"].clone().requires_grad_()
        for _ in range(2):
            op(F.embedding(ids, weight), weight, inputs["bias"], inputs["labels"]).backward()
        return weight.grad

    torch.testing.assert_close(run(masked_lm_loss), run(reference_masked_lm_loss))


@pytest.mark.parametrize("magnitude", [1e-3, 30.0, 1e4])
def test_masked_lm_loss_magnitudes(backend, device, magnitude):
    inputs = make(device=device)
    inputs["hidden"] *= magnitude
    assert_parity(inputs)


def test_masked_lm_loss_forbidden_words(backend, device):
    # A bias of -inf takes words out of the vocabulary: whole tiles of it here, for which a maximum is -inf.
    inputs = make(V=300, device=device)
    inputs["bias"][:280] = float("-inf")
    inputs["labels"] = torch.where(inputs["labels"] == -100, -100, 280 + inputs["labels"] % 20)
    given, expected = leaves(inputs), leaves(inputs)
    loss, reference = masked_lm_loss(**given), reference_masked_lm_loss(**expected)
    torch.testing.assert_close(loss, reference)
    loss.backward()
    reference.backward()
    for name in ("hidden", "weight"):
        torch.testing.assert_close(given[name].grad, expected[name].grad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_masked_lm_loss_sums_in_fp32(device, dtype):
    # A mean over many labels, and a loss scaled as GradScaler scales it: half precision has no room for either.
    inputs = make(T=3000, C=4, V=16, dtype=dtype, labelled=1.0, device=device)
    op, reference = both()
    with fastconv.backend("native"):
        assert_op_2x(
            lambda **t: 1000 * op(**t), lambda **t: 1000 * reference(**t), inputs, torch.ones((), device=device)
        )


def test_masked_lm_loss_fp64(backend, device):
    assert_fp64(*both(), make(device=device))
    if backend == "native":  # options are fp32 in the interpreter
        assert_fp64(*both(label_smoothing=0.1, z_loss=0.1), make(device=device))


def test_masked_lm_loss_gradcheck(backend, device):
    op, _, inputs = without_labels(make(T=6, C=3, V=5, dtype=torch.float64, device=device))
    given = [t.requires_grad_() for t in inputs.values()]
    assert torch.autograd.gradcheck(lambda hidden, weight, bias: op(hidden=hidden, weight=weight, bias=bias), given)


def test_masked_lm_loss_each_gradient(backend, device):
    assert_each_gradient(*both(label_smoothing=0.1), make(device=device))


def test_masked_lm_loss_pure(backend, device):
    assert_pure(both(label_smoothing=0.1)[0], make(T=200, V=300, device=device))


def test_masked_lm_loss_second_derivative(backend, device):
    op, reference, inputs = without_labels(make(T=5, device=device))
    assert_second_derivative(op, reference, inputs, "masked_lm_loss")


def test_masked_lm_loss_checkpointed(backend, device):
    op, _, inputs = without_labels(make(T=5, device=device))
    assert_checkpointed(op, inputs)


def test_masked_lm_loss_traced(backend, device):
    op, _, inputs = without_labels(make(T=5, device=device))
    assert_traced(op, inputs)


def test_masked_lm_loss_transforms(backend, device):
    assert_transforms(*both(label_smoothing=0.1, z_loss=0.01), make(T=5, device=device))


def test_masked_lm_loss_batched_labels(backend, device):
    inputs = make(T=6, device=device)
    hidden, weight, labels = inputs["hidden"], inputs["weight"], inputs["labels"].view(2, 3)

    def per_sample(op):
        return torch.func.vmap(lambda h, y: op(h, weight, None, y))(hidden.view(2, 3, -1), labels)

    torch.testing.assert_close(per_sample(masked_lm_loss), per_sample(reference_masked_lm_loss), equal_nan=True)


def test_masked_lm_loss_autocast(backend, device):
    inputs = make(device=device)
    assert_autocast_2x(*both(), inputs)
    given = leaves(inputs)
    with torch.autocast(device.type, torch.bfloat16):
        loss = masked_lm_loss(**given)
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(given[k].grad.dtype == torch.float32 for k in ("hidden", "weight", "bias"))


def test_masked_lm_loss_compiled(backend, device):
    assert_compiled(both(label_smoothing=0.1)[0], make(device=device))


def test_masked_lm_loss_compiled_once_for_all_lengths(backend, device):
    # Neither the number of labels nor, made dynamic, that of tokens makes another graph.
    graphs = []

    def count(graph, example):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(masked_lm_loss, backend=count, fullgraph=True, dynamic=True)
    for tokens, labelled in ((20, 0.5), (20, 0.0), (33, 1.0)):
        inputs = make(T=tokens, labelled=labelled, device=device)
        torch.testing.assert_close(compiled(**inputs), masked_lm_loss(**inputs))
    assert len(graphs) == 1


def test_masked_lm_loss_opcheck(device):
    pytest.importorskip("triton", reason="the raw ops are kernels, and the package triton is not installed")
    inputs = make(device=device)
    hidden, weight, labels, bias = (inputs[k] for k in ("hidden", "weight", "labels", "bias"))
    ops = torch.ops.fastconv
    opcheck(ops.masked_lm_loss_fwd.default, (hidden, weight, bias, labels, -100, 0.1, 0.1, False))
    # What it saves is written as far as there are labels: with all, opcheck can compare it.
    full = labels.clamp_min(0)
    opcheck(ops.masked_lm_loss_fwd.default, (hidden, weight, bias, full, -100, 0.1, 0.1, True))
    _, packed, *saved = ops.masked_lm_loss_fwd.default(hidden, weight, bias, labels, -100, 0.1, 0.1, True)
    dy = torch.ones((), device=device)
    for needs in ((True, True), (False, True), (True, False)):
        opcheck(ops.masked_lm_loss_bwd.default, (dy, packed, weight, None, *saved, 0.1, 0.1, *needs))


def test_masked_lm_loss_native_opcheck(device):
    inputs = make(device=device)
    hidden, weight, labels, bias = (inputs[k] for k in ("hidden", "weight", "labels", "bias"))
    op = torch.ops.fastconv.masked_lm_loss_native.default
    for needs in ((True, True, True), (False, False, False)):
        opcheck(op, (hidden, weight, bias, labels, -100, 0.1, 0.1, *needs))
        opcheck(op, (hidden.half(), weight.half(), None, labels, -100, 0.0, 0.0, *needs))


def test_masked_lm_loss_memory(backend, device, monkeypatch):
    # At 15 % labels: at most a fifth of what the reference takes, forward and backward.
    if backend == "triton":
        monkeypatch.setattr(importlib.import_module("fastconv.kernels.masked_lm_loss_bwd"), "_FEW", 0)
    inputs = make(T=1024, C=16, V=2000, labelled=0.15, device=device)

    def peak(op):
        given = leaves(inputs)
        return peak_bytes(lambda: op(**given).backward(), device)

    own, reference = peak(masked_lm_loss), peak(reference_masked_lm_loss)
    assert reference >= 1024 * 2000 * 4
    assert 5 * own <= reference


# Bad input


@pytest.mark.parametrize("label", [-1, 100, 2**31 - 1])
def test_masked_lm_loss_label_out_of_range(backend, device, label):
    inputs = make(device=device)
    inputs["labels"][7] = label
    if device.type == "cuda" and backend == "triton":
        given = leaves(inputs)
        loss = masked_lm_loss(**given)
        assert loss.isnan()
        loss.backward()
        assert given["hidden"].grad[7].isnan().all() and given["weight"].grad.isnan().any()
        return
    with pytest.raises(IndexError, match=rf"labels must be from 0 to 99 .* or ignore_index -100, got {label}$"):
        masked_lm_loss(**inputs)
    if device.type == "cpu":
        with pytest.raises(IndexError, match=r"labels must be from 0 to 99"):
            reference_masked_lm_loss(**inputs)


@pytest.mark.parametrize("label", [-1, 100, 2**32 + 5])
def test_masked_lm_loss_label_out_of_range_unseen(device, label):
    pytest.importorskip("triton", reason="the raw ops are kernels, and the package triton is not installed")
    # Where nobody can look, which the raw op is like: NaN, and not another word's loss.
    inputs = make(device=device)
    inputs["labels"][0] = label
    hidden, weight, labels, bias = inputs["hidden"], inputs["weight"], inputs["labels"], inputs["bias"]
    ops, dy = torch.ops.fastconv, torch.ones((), device=device)
    loss, packed, *saved = ops.masked_lm_loss_fwd.default(hidden, weight, bias, labels, -100, 0.0, 0.0, True)
    assert loss.isnan()
    gradients = ops.masked_lm_loss_bwd.default(dy, packed, weight, bias, *saved, 0.0, 0.0, True, True)
    assert gradients[0][0].isnan().all() and not gradients[0][1:].isnan().any()
    assert gradients[1].isnan().all() and gradients[2].isnan().all()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"hidden": torch.ones(21, 24, dtype=torch.int64)}, TypeError, r"hidden must be a real floating.*int64"),
        ({"weight": torch.ones(100, 24, dtype=torch.complex64)}, TypeError, r"weight must be a real floating.*complex"),
        ({"hidden": torch.ones(21, 24, dtype=torch.float16)}, TypeError, r"one dtype .* hidden torch.float16"),
        ({"labels": torch.ones(21)}, TypeError, r"labels must be an int64 or int32 tensor, got torch.float32"),
        ({"labels": [1] * 21}, TypeError, r"labels must be a torch.Tensor, got list"),
        ({"labels": torch.ones(20, dtype=torch.int64)}, ValueError, r"labels must have shape .*\(21,\), got \(20,\)"),
        ({"labels": torch.ones(21, 1, dtype=torch.int64)}, ValueError, r"labels must have shape .*got \(21, 1\)"),
        (
            {"labels": torch.ones(21, dtype=torch.int64, device="meta")},
            ValueError,
            r"hidden is on cpu but labels is on",
        ),
        ({"hidden": torch.ones(24)}, ValueError, r"shapes \(..., C\) and \(V, C\).*got \(24,\)"),
        ({"hidden": torch.ones(21, 23)}, ValueError, r"got \(21, 23\) and \(100, 24\)"),
        ({"weight": torch.ones(0, 24)}, ValueError, r"C and V >= 1, got .*\(0, 24\)"),
        ({"bias": torch.ones(99)}, ValueError, r"bias must have shape .*\(100,\), got \(99,\)"),
        ({"bias": torch.ones(100, device="meta")}, ValueError, r"hidden is on cpu but bias is on meta"),
        ({"label_smoothing": 1.5}, ValueError, r"label_smoothing must be from 0 to 1, got 1.5"),
        ({"label_smoothing": float("nan")}, ValueError, r"label_smoothing must be from 0 to 1, got nan"),
        ({"z_loss": -1.0}, ValueError, r"z_loss must be at least 0 and finite, got -1.0"),
    ],
)
def test_masked_lm_loss_bad_input(backend, changes, error, message):
    with pytest.raises(error, match=message):
        masked_lm_loss(**{**make(), **changes})


def test_masked_lm_loss_on_the_meta_device():
    # A model's shapes can be tried without memory.
    hidden, weight = (torch.empty(shape, device="meta").requires_grad_() for shape in ((2, 3, 16), (50, 16)))
    loss = masked_lm_loss(hidden, weight, None, torch.zeros(2, 3, dtype=torch.int64, device="meta"))
    assert loss.shape == ()
    loss.backward()
    assert hidden.grad.shape == (2, 3, 16)
