"""The benchmarks' cases: their counts against counted loads and stores, what the rivals compute, what is covered."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import fastconv
from fastconv import reference
from fastconv.bench import (
    embedding_norm_cases,
    layer_norm_cases,
    masked_lm_loss_cases,
    model_cases,
    shapes,
    span_dynamic_conv_cases,
    span_kernel_logits_cases,
)
from fastconv.bench.case import ends, kept_share
from fastconv.bench.cases import at, cases
from fastconv.bench.layer_norm_cases import LayerNormCase
from fastconv.bench.masked_attention_cases import MaskedAttentionCase
from fastconv.bench.masked_lm_loss_cases import MaskedLMLossCase
from fastconv.bench.model_cases import ModelCase
from fastconv.bench.op_case import ConvolutionCase, OpCase
from fastconv.bench.records import is_own
from fastconv.bench.shapes import MODELS, Place, Point
from fastconv.tolerance import exact_convolutions

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
HALF, SINGLE = torch.bfloat16, torch.float32
QUICK = cases(CPU, quick=True)
OPS = [case for case in QUICK if isinstance(case, OpCase)]
TEN = Place("", 2, 5)


# By hand for 10 tokens of 4 channels in bf16: a tensor is 80 bytes, a vector 8, mean or rstd 40, a seed 8.
@pytest.mark.parametrize(
    ("direction", "fused", "bytes_", "flops_each"),
    [
        ("infer", False, 80 + 2 * 8 + 80, 7),  # x, weight and bias; y
        ("infer", True, 2 * 80 + 3 * 8 + 80, 9),  # x and residual, three vectors; y
        ("fwd", True, 2 * 80 + 3 * 8 + 8 + 2 * 80 + 2 * 40, 10),  # the same and the seed; y, z, mean and rstd
        ("bwd", False, 2 * 80 + 2 * 40 + 8 + 80 + 2 * 8, 13),  # dy, x, mean, rstd, weight; dx, dweight, dbias
        ("bwd", True, 2 * 80 + 2 * 40 + 8 + 8 + 2 * 80 + 3 * 8, 15),  # and the seed; dresidual and dx_bias too
        ("step", True, 432 + 440, 25),  # both
    ],
)
def test_bench_layer_norm_counts(direction, fused, bytes_, flops_each):
    case = LayerNormCase(TEN, HALF, direction, 4, fused)
    assert case.bytes() == bytes_
    assert case.flops() == flops_each * 40


# By hand for 10 tokens of 2 heads of 4 channels and 3 taps in bf16: values are 160 bytes, logits 120, statistics 160.
@pytest.mark.parametrize(
    ("direction", "bytes_", "flops"),
    [
        ("infer", 160 + 120 + 160, 20 * (4 * 3 * 2 + 4 * 3)),
        ("fwd", 160 + 120 + 160 + 160, 20 * (4 * 3 * 2 + 4 * 3)),
        ("bwd", 2 * 160 + 120 + 160 + 160 + 120, 20 * (2 * 4 * 3 * 2 + 2 * 4 * 3)),
    ],
)
def test_bench_span_dynamic_conv_counts(direction, bytes_, flops):
    case = span_dynamic_conv_cases.SpanDynamicConvCase(TEN, HALF, direction, 2, 4, taps=3)
    assert case.bytes() == bytes_ and case.flops() == flops


# By hand for 10 tokens of 8 channels, 4 in between, to 2 heads' 3 taps in bf16: x and gate are 240 bytes, y 120, the
# weights 160, the biases 20, and what is kept 320.
@pytest.mark.parametrize(
    ("direction", "bytes_", "flops_each"),
    [
        ("infer", 240 + 160 + 20 + 120, 8 * 3 * 2 + 8 * 4 * 2 + 4 * 2 + 4 * 6 * 2 + 6),
        ("fwd", 240 + 160 + 20 + 120 + 320, 8 * 3 * 2 + 8 * 4 * 2 + 4 * 2 + 4 * 6 * 2 + 6),
        ("bwd", 120 + 320 + 240 + 160 + 240 + 160 + 20, 2 * (8 * 3 * 2 + 8 * 4 * 2 + 4 * 6 * 2) + 4 * 3 + 6),
    ],
)
def test_bench_span_kernel_logits_counts(direction, bytes_, flops_each):
    case = span_kernel_logits_cases.SpanKernelLogitsCase(TEN, HALF, direction, 8, 2, taps=3)
    assert case.bytes() == bytes_ and case.flops() == 10 * flops_each


def test_bench_masked_attention_counts_padding():
    # By hand for rows of 4 and 2 tokens out of 4, 1 head of 2 channels in fp32: a row is 8 bytes.
    place = SimpleNamespace(size=8, tokens=6, rows=(4, 2), length=4, batch=2)
    kept, packed = (MaskedAttentionCase(place, SINGLE, "infer", kind, 1, 2) for kind in ("lengths", "packing"))
    assert (kept.bytes(), packed.bytes()) == (2 * 8 * 8 + 2 * 6 * 8, 4 * 6 * 8)
    assert (kept.flops(), packed.flops()) == (2 * 2 * (16 + 8) * 2, 2 * 2 * (16 + 4) * 2)


# What bytes() says against what the kernels load and store, and what torch's products get.

needs_interpreter = pytest.mark.skipif(
    torch.cuda.is_available() or importlib.util.find_spec("triton") is None, reason="counts in Triton's interpreter"
)
# Of these an op looks up the rows that it wants, or reads the labelled tokens only.
GATHERED = {"embedding_norm": {"words", "positions", "types"}, "masked_lm_loss": {"hidden"}}
PADDED = {"k", "v"}


def counted_bytes(case: OpCase) -> int:
    """What the case's passes read that was there before and write that is there after; each byte of a pass once."""
    from counted import counting

    tensors, dy = case.inputs(CPU)
    # What says where the sequences end, at most 16 bytes a token, isn't part of the formula.
    text = case.place.lengths == "text"
    packing = shapes.packing(case.place.rows, CPU)
    without = [*vars(packing).values(), shapes.lengths(case.place.rows, CPU)] if text else []
    without = [t for t in without if isinstance(t, torch.Tensor)]
    padded = isinstance(case, MaskedAttentionCase) and case.kind == "lengths"
    partly = PADDED if padded else GATHERED.get(case.title, set())
    if case.direction == "infer":
        with torch.no_grad(), counting() as traffic:
            y = case.op(**tensors)
        assert set(traffic.unread(tensors)) <= partly
        return traffic.read(without=without) + traffic.written([y])
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    kept: list[torch.Tensor] = []

    def keep(t: torch.Tensor) -> torch.Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), counting() as traffic:
        y = case.op(**leaves)
    assert set(traffic.unread(leaves)) <= partly
    forward = traffic.read(without=without) + traffic.written([y, *kept])
    with counting() as traffic:
        gradients = torch.autograd.grad(y, list(leaves.values()), dy)
    assert traffic.unread({"dy": dy}) == []
    backward = traffic.read(without=without) + traffic.written(list(gradients))
    return {"fwd": forward, "bwd": backward, "step": forward + backward}[case.direction]


def check_bytes(case: OpCase) -> None:
    with fastconv.backend("triton"):
        counted = counted_bytes(case)
    # Keys are read by blocks of the kernel's, so that some of the padding is read too: less than a block of each row.
    beyond = 0
    if isinstance(case, MaskedAttentionCase) and case.kind == "lengths":
        row = 2 * case.heads * case.size * case.dtype.itemsize  # of k and v
        beyond = row * sum(min(case.place.length, 128 * math.ceil(n / 128)) - n for n in case.place.rows)
    assert case.bytes() <= counted <= case.bytes() + beyond, (case.name, counted, case.bytes())


# In half precision bias, activation and, without a gradient, the kernel's logits go into products of this library's:
# other kernels.
COUNTED = [dataclasses.replace(case, dtype=torch.float16) for case in OPS]
COUNTED += [case for case in OPS if case.title == "linear_act"]
COUNTED += [c for c in OPS if c.title in ("span_kernel_logits", "conv_branch") and c.direction == "infer"]


@needs_interpreter
@pytest.mark.parametrize("case", COUNTED, ids=lambda case: case.name)
def test_bench_bytes_are_those_counted(case):
    check_bytes(case)


@needs_interpreter
def test_bench_keys_past_a_block_are_not_read():
    # Three blocks of keys in the first row and, of the second's 102 tokens, one.
    place = Place("", 2, 192, "text")
    assert place.rows == (192, 102)
    check_bytes(MaskedAttentionCase(place, torch.float16, "infer", "lengths", 1, 16))


@needs_interpreter
@pytest.mark.parametrize("wrong", [-8, 8, 16 * 96 * 4])
def test_bench_a_wrong_byte_count_is_caught(monkeypatch, wrong):
    case = LayerNormCase(Place("", 2, 16), SINGLE, "infer", 96, True)
    check_bytes(case)
    right = LayerNormCase.bytes_of
    monkeypatch.setattr(LayerNormCase, "bytes_of", lambda self, direction: right(self, direction) + wrong)
    with pytest.raises(AssertionError, match="layer_norm infer"):
        check_bytes(case)


@needs_interpreter
def test_bench_a_kernel_that_reads_too_little_is_caught(monkeypatch):
    # Half of the channels, twice.
    right = layer_norm_cases.layer_norm
    monkeypatch.setattr(
        layer_norm_cases,
        "layer_norm",
        lambda x, *a, **k: right(x.view(2, -1, 96)[:1].expand(2, -1, -1).flatten(0, 1), *a, **k),
    )
    with pytest.raises(AssertionError):
        check_bytes(LayerNormCase(Place("", 2, 16), SINGLE, "infer", 96, False))


@needs_interpreter
def test_counting_sees_bytes_not_tensors():
    from counted import counting

    x, out = torch.ones(4, 6), torch.zeros(6)
    with counting() as traffic:
        y = x[:2, ::3] * 2  # 4 of 24 elements
        z = torch.empty(8)
        z[:3] = y.sum()
        out.copy_(x[3])
    assert traffic.read(without=[]) == 4 * (4 + 6)
    assert traffic.read(without=[x]) == 0
    assert traffic.written([y, z]) == 4 * (4 + 3)  # z's others hold nothing
    assert traffic.written([out]) == 0  # was there before
    assert traffic.unread({"x": x, "y": y}) == ["x"]


# What is timed.


@pytest.mark.parametrize("direction", ["infer", "fwd", "bwd", "step"])
def test_bench_rivals_compute_the_same(direction, monkeypatch):
    # Without dropout, what is timed computes the same thing: the native formulation, as on a CPU.
    monkeypatch.setattr(layer_norm_cases.LayerNormCase, "dropout_p", 0.0)
    monkeypatch.setattr(embedding_norm_cases.EmbeddingNormCase, "dropout_p", 0.0)
    for case in OPS:
        if case.direction != direction:
            continue
        with fastconv.backend("native"):
            # The second time: what a backward leaves behind is there for the next.
            outputs = {k: (run(), run())[1] for k, run in case.runs(CPU, compiled=False).items()}
        assert list(outputs) == case.labels(CPU)
        own = outputs.pop("fastconv")
        assert outputs, case.name
        for rival, other in outputs.items():
            a, b = (list(o) if isinstance(o, tuple) else [o] for o in (own, other))
            if rival == "HF" and isinstance(case, ConvolutionCase) and case.place.lengths == "text":
                b = without_padding(case, b)
            torch.testing.assert_close(
                a, b, rtol=1e-3, atol=1e-3, msg=lambda m, what=(case.name, rival): f"{what}: {m}"
            )


def without_padding(case, results):
    """A padded batch's result, or the gradients of the case's tensors, as the packed ones are."""
    names = ["y"] if len(results) == 1 else list(case.inputs(CPU)[0])
    place = case.place
    keep = torch.arange(place.length) < torch.tensor(place.rows)[:, None]
    of_tokens = [name in ("y", *case.of_tokens) for name in names]
    assert all(t.shape[:2] == (place.batch, place.length) for t, each in zip(results, of_tokens, strict=True) if each)
    return [t[keep] if each else t for t, each in zip(results, of_tokens, strict=True)]


def fake(monkeypatch, name, **functions):
    """A package that is installed, with these functions."""
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: SimpleNamespace() if name.startswith(n) else found(n, *a)
    )
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:end]), SimpleNamespace(**functions, __path__=[]))


def attention(q, k, v):
    return F.scaled_dot_product_attention(*(t.transpose(-3, -2) for t in (q, k, v))).transpose(-3, -2)


def test_bench_flash_attn_if_installed(monkeypatch):
    dense, _, packed = (case for case in QUICK if isinstance(case, MaskedAttentionCase) and case.direction == "infer")
    dense, packed = (dataclasses.replace(case, dtype=HALF) for case in (dense, packed))
    assert "flash-attn" not in [*dense.labels(CUDA), *packed.labels(CUDA)]

    def varlen(q, k, v, starts, starts_k, longest, longest_k):
        assert starts.dtype == torch.int32 and longest == longest_k == max(packed.place.rows)
        sizes = starts.diff().tolist()
        return torch.cat([attention(*part) for part in zip(*(t.split(sizes) for t in (q, k, v)), strict=True)])

    fake(monkeypatch, "flash_attn", flash_attn_func=attention, flash_attn_varlen_func=varlen)
    for case in (dense, packed):
        tensors, _ = case.inputs(CPU)
        out = case.rivals(CUDA)["flash-attn"](**tensors)
        torch.testing.assert_close(out.float(), case.reference(**tensors).float(), rtol=2e-2, atol=2e-2)


def test_bench_rivals_of_a_gpu():
    dense, lengths, packed = (
        MaskedAttentionCase(Place("", 2, 16, how), HALF, "infer", kind, 2, 48)
        for how, kind in (("full", "dense"), ("text", "lengths"), ("text", "packing"))
    )
    assert dense.labels(CUDA) == ["fastconv", "HF", "SDPA", "SDPA flash", "SDPA cuDNN", "SDPA efficient"]
    assert lengths.labels(CUDA) == ["fastconv", "HF", "SDPA", "FlexAttention"]
    assert packed.labels(CUDA) == ["fastconv", "SDPA of each", "varlen_attn"]
    single = dataclasses.replace(dense, dtype=SINGLE)
    assert single.labels(CUDA) == ["fastconv", "HF", "SDPA", "SDPA efficient"]


def test_bench_liger_if_installed(monkeypatch):
    case = MaskedLMLossCase(Place("", 2, 16), SINGLE, "infer", 32, 100)
    norm = LayerNormCase(Place("", 2, 16), SINGLE, "infer", 32, False)
    assert "Liger" not in [*case.labels(CUDA), *norm.labels(CUDA)]
    fake(
        monkeypatch,
        "liger_kernel.transformers.functional",
        liger_fused_linear_cross_entropy=lambda x, weight, labels, bias: F.cross_entropy(x @ weight.T + bias, labels),
        liger_layer_norm=lambda x, weight, bias, eps: F.layer_norm(x, x.shape[-1:], weight, bias, eps),
    )
    labels = masked_lm_loss_cases.labels_of(32, 100, CPU)
    monkeypatch.setattr(MaskedLMLossCase, "_labels", lambda self, device: labels)
    for each in (case, norm):
        tensors, _ = each.inputs(CPU)
        torch.testing.assert_close(each.rivals(CUDA)["Liger"](**tensors), each.reference(**tensors))


def test_bench_layer_norm_targets():
    def targets(batch, direction, fused):
        return LayerNormCase(Place("", batch, 512, compiled=True), HALF, direction, 768, fused).targets

    assert targets(32, "infer", False) == {"copy": 0.9, "torch compile": 1.0}
    assert targets(32, "fwd", True) == {"torch compile": 1.0}
    assert targets(32, "bwd", True) == {"torch": 1.4}
    assert targets(1, "infer", False) == {}


@pytest.mark.parametrize("direction", ["infer", "fwd", "bwd", "step"])
def test_bench_parity_replays_dropout(direction):
    results = LayerNormCase(Place("", 2, 32), SINGLE, direction, 96, True).parity(CPU)
    expected = {"y"} if direction == "infer" else {"kept", "y", "dx", "dweight", "dbias", "dx_bias", "dresidual"}
    assert set(results) == expected
    assert all(result.ok for result in results.values()), results


@pytest.mark.parametrize("cases_of", [layer_norm_cases, embedding_norm_cases])
def test_bench_a_kernel_that_writes_zeros_is_red(cases_of, monkeypatch):
    # The mask is taken from the result: zeros would be what was dropped.
    case = next(case for case in cases_of.quick(shapes.QUICK) if case.direction == "bwd" and case.dropout_p)
    assert all(result.ok for result in case.parity(CPU).values())

    def zeros(self, **tensors):
        return sum(0 * t.sum() for t in tensors.values()) + torch.zeros(lead)

    lead = case.op(**case.inputs(CPU)[0]).shape
    monkeypatch.setattr(type(case), "op", zeros)
    found = case.parity(CPU)
    assert not found["kept"].ok and found["kept"].max_error == pytest.approx(0.9)


def test_bench_kept_share():
    drawn = torch.rand(2**16, generator=torch.Generator().manual_seed(0))
    assert kept_share(drawn > 0.1, 0.1).ok and not kept_share(drawn > 0.11, 0.1).ok


def test_bench_a_large_result_is_compared_within():
    x = torch.arange(2**14 * 2.0).view(4, 2**12, 2)
    rows = ends(x)[:, 0] / 2
    assert rows[:1024].tolist() == list(range(1024)) and rows[-1024:].tolist() == list(range(2**14 - 1024, 2**14))
    between = rows[1024:-1024]
    assert 900 < len(between) <= 1024 and between[-1] > 2**14 - 1100
    # Every place within a tile, and every large wrong piece.
    assert len(set((between % 128).tolist())) == 128 and between.diff().max() < 32
    for small in (x[0, :3072], x[0, 0], x.sum()):
        assert ends(small) is small


def test_exact_convolutions_are_those_of_the_context():
    before = torch.backends.cudnn.allow_tf32
    with exact_convolutions(CUDA):
        assert not torch.backends.cudnn.allow_tf32
    with exact_convolutions(CPU):
        assert torch.backends.cudnn.allow_tf32 == before
    assert torch.backends.cudnn.allow_tf32 == before


# What is covered.


@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
def test_bench_cases_can_be_listed(device):
    listed = cases(device)
    names = [case.name for case in listed]
    assert len(set(names)) == len(names)
    for case in listed:
        assert case.bytes() > 0 and case.flops() > 0
        labels = case.labels(device)
        assert labels[0] == "fastconv" and len(labels) > 1
        subject = case.subject
        assert subject.model in MODELS and 0 < subject.tokens <= subject.batch * subject.length
        # A target that nothing measures would never be reached.
        if importlib.util.find_spec("transformers") is None:
            labels.append("HF")
        compiled = {f"{label} compile" for label in labels} if case.place.compiled else set()
        for target in case.targets:
            parts = target.removesuffix(" memory").split(" / ")
            assert {*parts} <= {*labels, *compiled, "copy"}, (case.name, target)


EVERY = ("infer", "fwd", "bwd", "step")
OF_ALL = {"layer_norm", "masked_attention", "masked_lm_loss"}
OF_CONVBERT = {*OF_ALL, "embedding_norm", "separable_conv", "span_kernel_logits", "span_dynamic_conv", "conv_branch"}
OPS_OF = {
    "ConvBERT base": {*OF_CONVBERT, "linear_act"},
    "ConvBERT medium-small": {*OF_CONVBERT, "grouped_linear"},
    "ConvBERT small": {*OF_CONVBERT, "linear_act"},
    "BERT base": {*OF_ALL, "embedding_norm", "linear_act"},
    "BERT large": {*OF_ALL, "embedding_norm", "linear_act"},
    "RoCBert base": {*OF_ALL, "linear_act"},
}


def asked(place, dtype, *directions):
    """Names of the cases of all ops of a model, and of the model, at a place."""
    return {case.name for case in at(Point(place, dtype, directions, model=True))}


@pytest.mark.parametrize("lengths", ["full", "text"])
@pytest.mark.parametrize("model", MODELS)
def test_bench_every_op_has_every_pass(model, lengths):
    place = Place(model, 4, 32, lengths)
    made = at(Point(place, HALF, EVERY))
    assert len({case.name for case in made}) == len(made)
    assert {(case.title, case.direction) for case in made} == {(op, way) for op in OPS_OF[model] for way in EVERY}
    assert all(case.place is place and case.dtype == HALF for case in made)


def test_bench_coverage_of_a_gpu():
    listed = cases(CUDA)
    names = {case.name for case in listed}
    sizes = [(batch, length) for batch in (1, 4, 16, 64) for length in (32, 128, 512)]
    for model in MODELS:
        for size in sizes:
            for lengths in ("full", "text") if size[0] > 1 else ("full",):
                assert asked(Place(model, *size, lengths), HALF, "infer", "step") <= names, (model, size, lengths)
        for lengths in ("full", "text"):
            assert asked(Place(model, 64, 512, lengths), HALF, *EVERY) <= names, (model, lengths)
        for dtype in (torch.float16, SINGLE):
            assert asked(Place(model, 8, 512), dtype, "infer", "step") <= names, (model, dtype)
    # The targets of a whole model each have a case.
    targets = set().union(*(case.targets for case in listed if case.subject.op == "model"))
    assert targets == {
        "HF", "HF compile", "HF / fastconv remove", "HF / fastconv graphs", "HF compile / fastconv graphs",
        "HF memory", "matmul",
    }  # fmt: skip


def test_bench_the_most_informative_first():
    listed = cases(CUDA)
    first = listed[:140]
    assert {case.subject.op for case in first} == {"model", *set().union(*OPS_OF.values())}
    assert {case.subject.model for case in first if case.subject.op == "model"} == set(MODELS)
    goals = [{(c.title if isinstance(c, OpCase) else "", c.direction, goal) for c in of for goal in c.targets}
             for of in (first, listed)]  # fmt: skip
    assert goals[0] == goals[1]
    # A compile takes far longer than the rest of a case: in the first stage, once for each.
    compiled = [case for case in listed if case.place.compiled]
    assert compiled == [case for case in listed[:270] if case.place.compiled] and len(compiled) < 60
    assert {case.subject.model for case in compiled if case.subject.op == "model"} == set(MODELS)
    assert {case.subject.op for case in compiled} == {"model", *OPS_OF["ConvBERT base"]}


@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
def test_bench_a_case_of_two_models_is_the_firsts(device):
    kept, models = {case.name: case for case in cases(device)}, {}
    for point in shapes.plan(device):
        for case in at(point):
            first = kept[case.name]
            as_first = dataclasses.replace(case.place, model=first.place.model, compiled=first.place.compiled)
            assert dataclasses.replace(case, place=as_first) == first
            # Nothing is lost: of places that come twice the one with torch.compile comes first.
            assert first.place.compiled or not case.place.compiled
    # A map is of one model, whole.
    for case in kept.values():
        if isinstance(case, OpCase):
            models.setdefault((case.title, case.variant, case.shape), set()).add(case.place.model)
    assert [what for what, found in models.items() if len(found) > 1] == []


def test_bench_coverage_of_a_cpu():
    listed = cases(CPU)
    assert {case.subject.op for case in listed} == {case.subject.op for case in cases(CUDA)}
    for op in ("layer_norm", "span_dynamic_conv", "masked_attention", "linear_act"):
        places = {(c.subject.batch, c.subject.length) for c in listed if c.subject.op == op and c.direction == "infer"}
        assert len(places) >= 4, op
    assert {case.subject.op for case in QUICK} == {case.subject.op for case in listed}


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the default text is that of each Python's help topics")
@pytest.mark.skipif(importlib.util.find_spec("tokenizers") is None, reason="tokenizers is not installed")
def test_bench_lengths_are_those_of_the_default_text():
    from fastconv.parity.shapes import train_tokenizer
    from fastconv.parity.text import default_sentences

    sentences = default_sentences()
    chosen = [sentences[row * len(sentences) // 64] for row in range(64)]
    made = tuple(map(len, train_tokenizer(sentences, 30522)(chosen)["input_ids"]))
    # Another release of this Python may say a thing in other words.
    assert sum(a != b for a, b in zip(made, shapes.TEXT, strict=True)) <= 8
    assert Place("", 8, 512, "text").padding == pytest.approx(0.39, abs=0.01)
    assert Place("", 64, 512, "text").padding == pytest.approx(0.53, abs=0.01)


def test_bench_places():
    text = Place("", 4, 100, "text")
    assert max(text.rows) == 100 and min(text.rows) > 0 and len(text.rows) == 4
    assert text.tokens == sum(text.rows) < text.size == 400
    assert Place("", 1, 100, "text").rows == (100,)
    assert Place("", 128, 100, "text").tokens == 2 * Place("", 64, 100, "text").tokens
    assert Place("", 2, 7).rows == (7, 7)
    with pytest.raises(ValueError, match="unknown model 'BERT'"):
        shapes.config("BERT")


# Whole models, on a CPU as they are timed there.


@pytest.fixture
def native():
    with fastconv.backend("native"):
        yield


def test_bench_model_traffic_is_the_tables():
    # By hand: what the steps of a layer of ConvBERT base read and write a token, about 45 KB in half precision.
    config = shapes.config("ConvBERT base")
    steps = [
        (768, 1536),  # q, k, v, conv_out
        (768, 768),  # depthwise
        (768 + 384, 384),  # pointwise
        (384 + 384, 384),  # kernel logits, softmax, dynamic convolution
        (1152, 384),  # attention
        (768, 768),  # output
        (1536, 768),  # and LayerNorm
        (768, 3072),
        (3072, 768),
        (1536, 768),
    ]
    assert model_cases.traffic(config) == steps
    assert 2 * sum(map(sum, steps)) == 43776
    place = Place("ConvBERT base", 8, 512)
    weights = 12 * (768 * 1536 + 768 * 9 + 768 * 384 + 384 * 54 + 768 * 768 + 2 * 768 * 3072)
    bf16 = ModelCase(place, HALF, "infer")
    assert bf16.bytes() == 2 * (4096 * (12 * 21888 + 2 * 768) + weights)
    read, written = 12 * sum(s[0] for s in steps) + 768, 12 * sum(s[1] for s in steps) + 768
    assert ModelCase(place, HALF, "step").bytes() == 2 * (4096 * (3 * read + 2 * written) + 3 * weights)
    # BERT's: q, k and v in one product, attention.
    assert model_cases.traffic(shapes.config("BERT base"))[:2] == [(768, 2304), (2304, 768)]


@pytest.mark.parametrize(
    ("model", "length", "megaflops"),  # a token, as computed by others
    [("ConvBERT small", 512, 21.4), ("ConvBERT medium-small", 128, 28.0), ("ConvBERT base", 128, 165.9),
     ("ConvBERT base", 512, 173.0)],
)  # fmt: skip
def test_bench_model_flops(model, length, megaflops):
    case = ModelCase(Place(model, 8, length), HALF, "infer")
    assert case.flops() / case.place.tokens == pytest.approx(1e6 * megaflops, rel=4e-3)


@pytest.mark.parametrize("model", ["ConvBERT medium-small", "BERT base", "RoCBert base"])
@pytest.mark.parametrize("direction", ["infer", "step"])
def test_bench_model_flops_are_those_counted(model, direction, monkeypatch):
    config = shapes.config(model)
    small = type(config).from_dict({**config.to_dict(), "num_hidden_layers": 1, "vocab_size": 100})
    monkeypatch.setattr(shapes, "config", lambda name: small)
    case = ModelCase(Place(model, 2, 16), SINGLE, direction)
    encoder = getattr(reference, f"{shapes.family(small)}Model")(small)
    inputs = {name: t for name, t in case.inputs(CPU).items() if name != "labels"}
    with FlopCounterMode(display=False) as counter:
        y = encoder(**inputs).last_hidden_state
    forward = counter.get_total_flops()
    # The pooler of BERT is no part of the encoder, nor are there products in the dynamic convolution.
    pooler = 0 if "ConvBert" in type(small).__name__ else 2 * 2 * small.hidden_size**2
    other = sum(f for name, f, _ in model_cases.products(small) if name == "dynamic convolution") * case.place.tokens
    assert ModelCase(case.place, SINGLE, "infer").flops() == forward - pooler + other
    if direction == "step":
        with FlopCounterMode(display=False) as counter:
            y.sum().backward()
        backward = counter.get_total_flops()
        # torch counts the gradient of a depthwise convolution's taps as that of a full one.
        for name, flops, _ in model_cases.products(small):
            backward -= flops * case.place.tokens * (small.hidden_size - 1) if name == "depthwise" else 0
        heads, size = shapes.attention_heads(small)
        again = 2 * 2 * 16 * 16 * heads * size  # the scores, which a backward without them in memory makes again
        # The gradients of embeddings need no product; with a projection after them it has both.
        assert case.flops() == (forward - pooler) + backward + 3 * other + again


@pytest.mark.parametrize("case", [case for case in QUICK if isinstance(case, ModelCase)], ids=lambda case: case.name)
def test_bench_model_ways_agree(case, native):
    found = case.parity(CPU)
    assert all(result.ok for result in found.values()), found
    ways = [label for label in case.labels(CPU) if label.startswith("fastconv")]
    assert {name.rpartition(" ")[0] for name in found} == set(ways)
    assert any(name.endswith("gradients") for name in found) == (case.direction == "step")
    runs = case.runs(CPU, compiled=False)
    assert list(runs) == case.labels(CPU)
    inputs = case.inputs(CPU)
    assert inputs["attention_mask"].sum() == case.place.tokens == case.subject.tokens
    for run in runs.values():
        run()
    if case.direction == "infer" and case.place.lengths == "full":
        own, *others = (run().last_hidden_state for run in runs.values())
        for other in others:
            torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-4)


def test_bench_the_vocabularys_logits_are_made_by_who_says_so(native):
    case = next(case for case in QUICK if isinstance(case, ModelCase) and case.head == "MaskedLM")
    inputs, ways = case.inputs(CPU), [label for label in case.labels(CPU) if is_own(label)]
    assert ways == ["fastconv", "fastconv logits"]
    made = {label: case.build(label, False, CPU)(**case.called(label, inputs)).logits for label in ways}
    assert made["fastconv"] is None and made["fastconv logits"].shape[:2] == (case.place.batch, case.place.length)


def test_bench_a_wrong_model_is_red(monkeypatch, native):
    case = next(case for case in QUICK if isinstance(case, ModelCase) and case.direction == "step")
    build = ModelCase.build

    def wrong(*args):
        model = build(*args)
        with torch.no_grad():
            model.get_parameter("convbert.encoder.layer.1.attention.self.conv_kernel_layer.bias")[0] += 1e-2
        return model

    monkeypatch.setattr(ModelCase, "build", wrong)
    model_cases._parity.cache_clear()
    found = case.parity(CPU)
    model_cases._parity.cache_clear()
    assert not found["fastconv y"].ok and not found["fastconv gradients"].ok


def test_bench_compiled_models(monkeypatch, native):
    # Compiling takes long: here nothing is compiled.
    modes = []
    monkeypatch.setattr(torch, "compile", lambda model, dynamic, mode: modes.append(mode) or model)
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda *a, found=importlib.util.find_spec: None if a[0] == "transformers" else found(*a),
    )
    case = ModelCase(Place("", 2, 16, compiled=True), SINGLE, "infer")
    assert list(case.runs(CPU, compiled=True)) == ["fastconv", "reference", "reference compile"]
    assert "reference compile" not in case.runs(CPU, compiled=False)
    assert modes == [None]


def test_bench_models_without_transformers(monkeypatch, native):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "transformers" else found(n, *a))
    case = next(case for case in QUICK if isinstance(case, ModelCase))
    assert case.labels(CPU) == list(case.runs(CPU, compiled=False)) == ["fastconv", "reference"]
    assert case.labels(CUDA) == ["fastconv", "fastconv graphs", "reference"]


def test_bench_a_models_step_adds_nothing_to_the_last_ones_gradients(native):
    case = next(case for case in QUICK if isinstance(case, ModelCase) and case.direction == "step")
    weights = model_cases._weights(case.class_name, case.config)
    model = model_cases._model(reference, case.class_name, case.config, weights, SINGLE, CPU)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    found = []
    table = model.get_input_embeddings().weight
    table.register_post_accumulate_grad_hook(lambda parameter: found.append(parameter.grad.clone()))
    step = case._timed("reference", model, case.inputs(CPU))
    step()
    assert model.training and table.grad is None
    step()
    torch.testing.assert_close(*found)


def test_bench_a_product_as_large_as_a_model():
    flops = 2 * 8192 * 8192
    y = model_cases._product(3 * flops, SINGLE, CPU)()
    assert y.shape == (3, 8192)
