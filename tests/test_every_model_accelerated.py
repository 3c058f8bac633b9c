"""Every model and head, accelerated, equals the reference with its padding kept and removed, forward and gradients.

The truth is the reference in fp64. In fp64 every output and every parameter's gradient equals it; in fp32 they keep the
2x rule, all together, since one holds few numbers. Without padding BERT and RoCBert give their tokens what the
reference gives them on the padded batch, ConvBERT what it gives each sequence alone.
"""

from __future__ import annotations

import copy
import itertools
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from model_cases import HEADS, NAMES, family_of
from model_runs import Tensors, assert_equal, largest, together
from padded_batches import ids_of, labels_of, mask_of
from swap_models import FAMILIES, SOURCES, build, randomize
from tolerance import assert_2x

import fastconv

# "ragged" has padding on either side, "right" a token first in every row.
CASES = [("keep", "ragged"), ("remove", "right"), ("remove", "ragged")]
CPU = torch.device("cpu")


@pytest.mark.parametrize(("padding", "side"), CASES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("source", SOURCES)
def test_every_model_in_fp64(source, name, padding, side):
    truth, _, fast = trio(source, name, CPU, padding=padding, backend="native")
    expected = run(truth, name, padding, mask_of(side))
    # transformers computes some losses from logits.float().
    with mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
        actual = run(fast.double(), name, padding, mask_of(side))
    assert_equal(actual[0], expected[0])
    assert_equal(actual[1], expected[1], floor=1e-3 * largest(expected[1]))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("source", SOURCES)
def test_every_model_in_fp32(source, family):
    runs = itertools.product((family + head for head in HEADS[family]), CASES)
    assert_2x_together(source, CPU, "native", [(name, padding, mask_of(side)) for name, (padding, side) in runs])


# Heads of tokens and of a sequence, with the base model in both.
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_by_the_kernels(family, device):
    pytest.importorskip("triton", reason="the kernels are in Triton")
    runs = itertools.product((family + "ForMaskedLM", family + "ForSequenceClassification"), ("keep", "remove"))
    keep = mask_of("right")[:2, :4]  # of 4 and 3 tokens: the interpreter is slow
    assert_2x_together("reference", device, "triton", [(*names, keep) for names in runs], num_hidden_layers=1)


def assert_2x_together(
    source: str, device: torch.device, backend: str, runs: list[tuple[str, str, torch.Tensor]], **sizes: int
) -> None:
    """The 2x rule for the outputs of all runs (model's name, padding, mask), and for their gradients."""
    parts: dict[str, list[list[torch.Tensor]]] = {"outputs": [], "gradients": []}
    for seed, (name, padding, keep) in enumerate(runs):
        # Weights of its own for each: with some, a layer makes more of every rounding.
        models = trio(source, name, device, padding=padding, backend=backend, seed=seed, **sizes)
        truth, own, actual = (run(model, name, padding, keep) for model in models)
        for kind, *found, exact in zip(parts, actual, own, truth, strict=True):
            # A loss, or a gradient that is a sum of much that cancels, may be small: its own size says nothing.
            parts[kind].append([together(each, exact, largest(exact)) for each in (*found, exact)])
    for kind, found in parts.items():
        # A few roundings: a model stores tens of intermediate results, in other places than the reference.
        rounding = 4 * torch.finfo(torch.float32).eps
        assert_2x(kind, *(torch.cat(part) for part in zip(*found, strict=True)), rounding=rounding)


def trio(
    source: str, name: str, device: torch.device, *, padding: str, backend: str, seed: int = 0, **sizes: int
) -> list[torch.nn.Module]:
    """The reference's model in fp64 and in fp32, and the accelerated one of `source` with its weights."""
    fast, plain = build(source, name, **sizes), build("reference", name, **sizes)
    randomize(fast, seed)
    plain.load_state_dict(fast.state_dict())
    fastconv.accelerate(fast.to(device), padding=padding, backend=backend)
    return [model.train() for model in (copy.deepcopy(plain).double(), plain, fast)]


def run(model: torch.nn.Module, name: str, padding: str, keep: torch.Tensor) -> tuple[Tensors, Tensors]:
    """What a model gives for the part of a batch that padding="keep" or "remove" promises, and its gradients."""
    if padding == "keep":
        output = of_batch(model, name, keep)
    elif name.startswith("ConvBert") and getattr(model.base_model, "fastconv_padding", "keep") == "keep":
        output = of_each_alone(model, name, keep)
    else:
        output = of_tokens(of_batch(model, name, keep), name, keep)
    return {key: value.detach().cpu() for key, value in output.items()}, gradients(model, output)


def of_batch(model: torch.nn.Module, name: str, keep: torch.Tensor) -> Tensors:
    """The output for the padded batch."""
    head = name.removeprefix(family_of(name))
    inputs = ids_of(family_of(name), *keep.shape) | {"attention_mask": keep.long()}
    if head == "ForMultipleChoice":
        inputs = {key: value.unflatten(0, (-1, 2)) for key, value in inputs.items()}
    if head != "Model":
        inputs |= labels_of(name, head, keep)[0]
    device = next(model.parameters()).device
    output = model(**{key: value.to(device) for key, value in inputs.items()})
    return {key: value for key, value in output.items() if isinstance(value, torch.Tensor)}


def of_tokens(output: Tensors, name: str, keep: torch.Tensor) -> Tensors:
    """The part of a batch's output that padding="remove" promises: of T tokens, or of rows.

    BERT's and RoCBert's rows that begin with padding have no pooled state, nor a loss that looks at what comes first in
    a row. The softmax of an answer goes over the padding too.
    """
    head, alone = name.removeprefix(family_of(name)), name.startswith("ConvBert")
    found = {}
    for key, value in output.items():
        if value.shape[:2] == keep.shape:
            found[key] = value[keep]
        elif value.dim() > 0:
            found[key] = value.view(len(keep), -1)[slice(None) if alone else keep[:, 0]]
        elif head in ("ForMaskedLM", "ForTokenClassification") or (
            head != "ForQuestionAnswering" and (alone or keep[:, 0].all())
        ):
            found[key] = value
    return found


def of_each_alone(model: torch.nn.Module, name: str, keep: torch.Tensor) -> Tensors:
    """The same of ConvBERT, from a call for each sequence."""
    head, outputs = name.removeprefix("ConvBert"), []
    for row, tokens in enumerate(keep):
        inputs = {key: ids[row, tokens][None] for key, ids in ids_of("ConvBert", *keep.shape).items()}
        outputs.append(
            model(**{key: ids[None] for key, ids in inputs.items()} if head == "ForMultipleChoice" else inputs)
        )
    if head == "Model":
        return {"last_hidden_state": torch.cat([output.last_hidden_state[0] for output in outputs])}
    labels, each_token = labels_of(name, head, keep)
    found = {
        key: torch.cat([output[key][0 if each_token else ...] for output in outputs])
        for key in outputs[0]
        if "logits" in key
    }
    if head != "ForQuestionAnswering":
        labels = labels["labels"][keep] if each_token else labels["labels"]
        logits = found["logits"]
        found["loss"] = F.cross_entropy(logits.view(len(labels), -1), labels)
    return found


def gradients(model: torch.nn.Module, output: Tensors) -> Tensors:
    """Of a random sum of what the output holds, for every parameter that has a part in it."""
    generator = torch.Generator().manual_seed(6)
    total = 0.0
    for key in sorted(output):
        weights = torch.randn(output[key].shape, generator=generator, dtype=torch.float64)
        total = total + (output[key] * weights.to(output[key])).sum()
    model.zero_grad()
    total.backward()
    parameters = model.named_parameters(remove_duplicate=False)
    # Copies: to another dtype a model takes its gradients along.
    found = {key: p.grad.to("cpu", copy=True) for key, p in parameters if p.grad is not None}
    # A second name of the decoder's bias, which transformers' untied models have for a parameter without a use.
    found.pop("cls.predictions.bias", None)
    return found
