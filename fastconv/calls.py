"""Calls of a model as its users make them, right in all but the values of their arguments.

`fastconv tune` and `fastconv warmup` learn from them what a model launches. What a model takes it says itself, by the
names of its forward's arguments and by its config.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from fastconv.nn._plain import original_class

_STREAMS = ("input_shape_ids", "input_pronunciation_ids")
# What is there once for each token of a batch.
_OF_TOKENS = ("input_ids", *_STREAMS, "inputs_embeds", "token_type_ids", "position_ids")


@dataclass(frozen=True)
class Request:
    """One call of a model, with ids of B = `batch` rows of S = `length` tokens.

    given: the names of its other arguments. "inputs_embeds" stand in the place of input_ids; with "labels" the call
        asks a head over the vocabulary for its loss alone; without "use_cache" a decoder fills no cache, with it, in
        inference, a call for the next token follows
    hidden: how many tokens at the beginning of the last row the masks hide, but for its last
    pairs: whether attention_mask says it for every query, (B, 1, S, S)
    states: the length of encoder_hidden_states
    """

    batch: int
    length: int
    given: tuple[str, ...] = ()
    hidden: int = 0
    pairs: bool = False
    states: int = 0


def takes(model: nn.Module, name: str) -> bool:
    """Whether a model can be given an argument of a `Request`."""
    # transformers' heads with a loss alone say so in their signature, as this library's do.
    named = ("loss_only" if name == "labels" else name) in _parameters(type(model).forward)
    decodes = getattr(model.config, "is_decoder", False)
    if name.startswith("encoder_"):
        return named and decodes and getattr(model.config, "add_cross_attention", False)
    return named and (decodes or name != "use_cache")


def takes_pairs(model: nn.Module) -> bool:
    """Whether attention_mask may be one of pairs. A decoder makes one of any."""
    return not takes(model, "use_cache") and not _has_choices(model)


def run(model: Any, request: Request, autocast: torch.dtype | None = None) -> None:
    """Make a call in inference, or with gradients of all parameters if the model is in training mode.

    autocast: to this dtype the forward is, None: it isn't
    """
    call, kind = arguments(model, request), next(model.parameters()).device.type
    context = contextlib.nullcontext() if autocast is None else torch.autocast(kind, autocast)
    if not model.training:
        with torch.inference_mode(), context:
            output = model(**call)
            cache = output.past_key_values if "use_cache" in request.given else None
            if cache is not None and request.length < model.config.max_position_embeddings:
                model(**_next_token(model, request), past_key_values=cache)
        return
    with torch.enable_grad():
        with context:
            output = model(**call)
        found = [t for t in output.values() if isinstance(t, torch.Tensor) and t.requires_grad]
        loss = torch.stack([t.float().mean() for t in found]).sum()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    torch.autograd.grad(loss, parameters, allow_unused=True)


def arguments(model: Any, request: Request) -> dict[str, Any]:
    """The arguments of a request's call."""
    config, weight, (B, S) = model.config, next(model.parameters()), (request.batch, request.length)
    names = _parameters(type(model).forward)
    # Any token but padding, of which transformers warns.
    ids = torch.full((B, S), int(config.pad_token_id == 0), device=weight.device)
    zeros = torch.zeros_like(ids)
    call: dict[str, Any] = {"input_ids": ids} | {name: zeros for name in _STREAMS if name in names}
    for name in request.given:
        if name == "inputs_embeds":
            del call["input_ids"]
            call[name] = weight.new_zeros(B, S, model.get_input_embeddings().embedding_dim)
        elif name == "attention_mask" and request.pairs:
            call[name] = weight.new_zeros(B, 1, S, S)
        elif name == "attention_mask":
            call[name] = _mask(ids, S, request.hidden)
        elif name == "token_type_ids":
            call[name] = zeros
        elif name == "position_ids":
            call[name] = torch.arange(S, device=ids.device).repeat(B, 1)
        elif name == "head_mask":
            call[name] = weight.new_ones(model.base_model.encoder.layer[0].attention.self.num_attention_heads)
        elif name == "encoder_hidden_states":
            call[name] = weight.new_zeros(B, request.states, config.hidden_size)
        elif name == "encoder_attention_mask":
            call[name] = _mask(ids, request.states, request.hidden)
    if takes(model, "use_cache"):
        call["use_cache"] = "use_cache" in request.given
    if _has_choices(model):
        call = {name: value if name == "head_mask" else value[:, None] for name, value in call.items()}
    if "labels" in request.given:
        of_head = {"labels": ids, "labels_input_ids": ids, "next_sentence_label": zeros[:, 0]}
        call |= {"loss_only": True} | {name: value for name, value in of_head.items() if name in names}
    return call


def _mask(ids: torch.Tensor, length: int, hidden: int) -> torch.Tensor:
    mask = ids.new_ones(len(ids), length)
    mask[-1, : min(hidden, length - 1)] = 0
    return mask


def _next_token(model: Any, request: Request) -> dict[str, Any]:
    """The arguments of the call that follows one with a cache."""
    S = request.length
    call = arguments(model, replace(request, length=S + 1))
    return {name: value[:, S:] if name in _OF_TOKENS else value for name, value in call.items()}


@functools.cache
def _parameters(forward: Callable[..., Any]) -> frozenset[str]:
    """The names of a forward's arguments."""
    return frozenset(inspect.signature(forward).parameters)


def _has_choices(model: nn.Module) -> bool:
    """Whether ids are (B, choices, S)."""
    return (original_class(model) or type(model)).__name__.endswith("ForMultipleChoice")
