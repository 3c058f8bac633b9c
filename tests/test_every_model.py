"""Every model and head equals transformers: random weights, configs and inputs; outputs, losses, gradients, keywords.

Both models run in fp64 with one state dict; in training, one seed gives both the same dropout. Accelerated, that of
transformers gives what it gave. transformers 4.57 also shows head_mask and relative positions; 5 has neither.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any
from unittest import mock

import model_cases
import pytest
import swap_models
import torch
from model_cases import NAMES, Case
from model_runs import assert_equal, largest, run, walk

import fastconv
from fastconv import reference

transformers = pytest.importorskip("transformers", reason="compares with transformers, which is not installed")
transformers.logging.set_verbosity_error()
VERSION = int(transformers.__version__.split(".")[0])


def build(case: Case) -> tuple[reference.Model, Any]:
    """Our model and that of transformers with one state dict, in fp64."""
    config_name = model_cases.family_of(case.name) + "Config"
    theirs_config = getattr(transformers, config_name)(**case.config, attn_implementation="eager")
    theirs = getattr(transformers, case.name)(theirs_config, **case.arguments)
    swap_models.randomize(theirs)
    ours_config = getattr(reference, config_name).from_dict(theirs_config.to_dict())
    ours = getattr(reference, case.name)(ours_config, **case.arguments)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert dropouts(ours) == dropouts(theirs)
    return ours.double().train(case.train), theirs.double().train(case.train)


def dropouts(model: torch.nn.Module) -> dict[str, float]:
    """The probability of every dropout that does something."""
    return {name: part.p for name, part in model.named_modules() if isinstance(part, torch.nn.Dropout) and part.p > 0}


def additive(keep: torch.Tensor) -> torch.Tensor:
    """(B, Sq, Sk), 1 for a key to attend to, as what is added to the scores."""
    return (1.0 - keep.double())[:, None] * torch.finfo(torch.float64).min


@contextmanager
def adapted(theirs: Any, case: Case) -> Iterator[dict[str, Any]]:
    """The inputs for transformers, as it takes what the case means; undone at the end."""
    inputs, encoder = dict(case.inputs), {}

    def explain_masks(module, args, kwargs):
        """transformers 5 takes queries and keys in four dimensions only, and its ConvBERT ignores is_decoder."""
        given = dict(zip(inspect.signature(module.forward).parameters, args, strict=False)) | kwargs
        for name in ("attention_mask", "encoder_attention_mask"):
            mask = given.get(name)
            if mask is not None and mask.dim() == 3:
                given[name] = additive(mask)
            elif name == "attention_mask" and case.name.startswith("ConvBert") and case.config["is_decoder"]:
                tokens = given.get("input_ids")
                B, S = (given["inputs_embeds"] if tokens is None else tokens).shape[:2]
                keep = torch.ones(B, S, S).tril()
                given[name] = additive(keep if mask is None else keep * mask[:, None])
        return (), given

    def cross(module, args, kwargs):
        """ConvBertModel has no argument for an encoder's states, but its layers have."""
        return args, kwargs | encoder

    handles = []
    if VERSION == 5:
        handles.append(theirs.base_model.register_forward_pre_hook(explain_masks, with_kwargs=True))
    if case.name == "ConvBertModel" and "encoder_hidden_states" in inputs:
        encoder["encoder_hidden_states"] = inputs.pop("encoder_hidden_states")
        mask = inputs.pop("encoder_attention_mask", None)
        if mask is not None:
            encoder["encoder_attention_mask"] = additive(mask if mask.dim() == 3 else mask[:, None])
        handles.append(theirs.encoder.register_forward_pre_hook(cross, with_kwargs=True))
    try:
        # the causal loss is that of logits.float(), whatever the dtype
        with mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
            yield inputs
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("name", NAMES)
def test_equals_transformers(name):
    used: set[str] = set()

    def check(case: Case) -> None:
        ours, theirs = build(case)
        if case.checkpointing:  # which changes no result
            ours.gradient_checkpointing_enable()
        with adapted(theirs, case) as inputs:
            expected_output, expected, expected_gradients = run(theirs, inputs, case.cached)
            if not case.train:
                _, *fast = run(fastconv.accelerate(theirs, backend="native"), inputs, case.cached)
                assert_equal(fast[0], expected)
                assert_equal(fast[1], expected_gradients, largest(expected_gradients))
        output, tensors, gradients = run(ours, case.inputs, case.cached)
        # in transformers 5 an untied model has it as a parameter that nothing uses
        for found in (gradients, expected_gradients):
            found.pop("cls.predictions.bias", None)
        assert isinstance(output, tuple) == isinstance(expected_output, tuple)
        if not isinstance(output, tuple):
            assert type(output).__name__ == type(expected_output).__name__
            assert {part.name for part in fields(output)} == {part.name for part in fields(expected_output)}
        # transformers 4 orders past_key_values and hidden_states otherwise than in a tuple
        assert sorted(tensors) == sorted(expected) if VERSION == 4 else list(tensors) == list(expected)
        assert_equal(tensors, expected)
        assert_equal(gradients, expected_gradients, largest(expected_gradients))
        used.update(case.inputs, ["past_key_values"] if case.cached else [])

    walk(model_cases.cases(name, VERSION), check, examples=36)
    assert used == model_cases.keywords_of(name, VERSION)


@pytest.mark.parametrize("name", NAMES)
def test_keywords_and_their_order_are_those_of_transformers(name):
    ours = inspect.signature(getattr(reference, name).forward).parameters
    theirs = inspect.signature(getattr(transformers, name).forward).parameters
    internal = {"self", "cache_position", *(key for key, value in theirs.items() if value.kind is value.VAR_KEYWORD)}
    names = [key for key in theirs if key not in internal]
    assert [key for key in ours if key in names] == names
    assert all(ours[key].default == theirs[key].default for key in names)
