"""Attention of BERT and RoCBert: one product for query, key and value, then masked_attention."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch import nn

from fastconv.kernels import MAX_HEAD_SIZE
from fastconv.nn._plain import bare, collects_outputs, dropout_p, plain_dropout
from fastconv.nn.packed_linear import linear, packed_linear
from fastconv.ops import masked_attention
from fastconv.ops._eager import autocasting, use_kernels
from fastconv.ops._sdpa import attention
from fastconv.reference import Cache, Packing
from fastconv.reference.ops import RelativePositions

# Keyword arguments that callers pass on and that no attention looks at, or only for its cache.
IGNORED = {
    "position_ids",
    "cache_position",
    "use_cache",
    "output_hidden_states",
    "return_dict",
    "num_items_in_batch",
}
# transformers' names of the implementations that compute plain attention; others are somebody's own.
_FLASH = ("flash_attention_2", "flash_attention_3")
# Those that take bool masks, and are causal by themselves.
_LIKE_SDPA = ("sdpa", "fastconv")
_PLAIN_ATTENTION = ("eager", *_LIKE_SDPA, *_FLASH)


class Call(NamedTuple):
    """What a call of an attention module asks for, beside its hidden states (B, Sq, C)."""

    mask: torch.Tensor | None  # broadcastable to (B, H, Sq, Sk)
    packing: Packing | None  # of the states, which are (1, T, C) then
    head_mask: torch.Tensor | None  # broadcastable to (B, H, Sq, Sk)
    states: torch.Tensor | None  # (B, Sk, C) of an encoder, for cross-attention
    cache: Any  # a Cache of this library or of transformers, or None
    cache_position: Any  # what transformers 4 hands its cache
    sdpa: bool  # whether the original calls scaled_dot_product_attention
    causal: bool


class StandIn:
    """A forward that stands in for another class's where it can, and calls that class's where it can't.

    Put before the original class in the bases of a subclass, to which the module's `__class__` is set.
    """

    fastconv_original: Any
    fastconv_arguments: tuple[str, ...]  # of the original's forward, after hidden_states

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "fastconv_original" in cls.__dict__:
            named = inspect.signature(cls.fastconv_original.forward).parameters.values()
            cls.fastconv_arguments = tuple(p.name for p in named if p.kind is p.POSITIONAL_OR_KEYWORD)[2:]


class FastForward(StandIn):
    """The forward of an attention module, as far as it is the same for all."""

    fastconv_config: Any = None  # the model's config: transformers may ask for attentions through it alone

    def call(self, hidden_states: torch.Tensor, args: tuple, kwargs: dict) -> Call | None:
        """What a call asks for; None if the fused forward doesn't do exactly that, or the call is wrong."""
        given = dict(zip(self.fastconv_arguments, args, strict=False))
        if len(given) < len(args) or any(name in given for name in kwargs):
            return None
        given.update(kwargs)
        for name, argument in given.items():
            known = name in ("attention_mask", "head_mask", "encoder_hidden_states", "past_key_values")
            asked = argument is not None and (argument is not False or name == "is_causal") and name not in IGNORED
            # A **kwargs of the original takes names that it does nothing with.
            if asked and not (known and name in self.fastconv_arguments):
                return None
        mask, head_mask, packing = given.get("attention_mask"), given.get("head_mask"), None
        if isinstance(mask, Packing):
            mask, packing = None, mask
        states, cache = given.get("encoder_hidden_states"), given.get("past_key_values")
        function = self._attention_function(head_mask)
        causal = getattr(self, "is_causal", getattr(self, "is_decoder", False) and states is None)
        if (
            hidden_states.dim() != 3
            or hidden_states.shape[1] == 0
            or self.attention_head_size > MAX_HEAD_SIZE  # type: ignore[attr-defined]
            or function not in _PLAIN_ATTENTION
            or (function in _FLASH and causal)
            or not plain_dropout(self.dropout)  # type: ignore[attr-defined]
            or not self._takes_mask(mask, function)
            or not (head_mask is None or (isinstance(head_mask, torch.Tensor) and head_mask.is_floating_point()))
            or not (states is None or _fits(states, hidden_states))
            or not self._takes_cache(cache, states)
            or not self._takes_positions(hidden_states, states, cache)
            or self._observed()
        ):
            return None
        # As transformers: a mask says all, and one query sees everything.
        causal = function in _LIKE_SDPA and causal and mask is None and hidden_states.shape[1] > 1
        return Call(mask, packing, head_mask, states, cache, given.get("cache_position"), function == "sdpa", causal)

    def takes_packing(self) -> bool:
        """Whether a call with a `Packing` as the mask, and nothing else, gets the fused forward."""
        function = self._attention_function(None)
        plain = function in _PLAIN_ATTENTION and plain_dropout(self.dropout)  # type: ignore[attr-defined]
        small = self.attention_head_size <= MAX_HEAD_SIZE  # type: ignore[attr-defined]
        return plain and small and not self._relative() and not self._observed()

    def _own(self) -> bool:
        return self.fastconv_original.__module__.startswith("fastconv.reference.")

    def _attention_function(self, head_mask: Any) -> str:
        """transformers' name of what computes the original's attention; "eager" for its own products too."""
        if self.fastconv_original.__name__ == "BertSdpaSelfAttention":  # of transformers 4
            return "sdpa" if head_mask is None and not self._relative() else "eager"
        return getattr(getattr(self, "config", None), "_attn_implementation", None) or "eager"

    def _takes_mask(self, mask: Any, function: str) -> bool:
        """Whether a mask hides keys; others are the original's: BlockMask, integers, a bool one that is added."""
        if mask is None:
            return True
        if not isinstance(mask, torch.Tensor) or mask.dim() != 4:
            return False
        return mask.is_floating_point() or (mask.dtype == torch.bool and (self._own() or function in _LIKE_SDPA))

    def _takes_cache(self, cache: Any, states: Any) -> bool:
        if cache is None or self._own():
            return cache is None or isinstance(cache, Cache)
        # transformers 4 mixes the keys of cross-attention with the others in a cache that isn't for both.
        return hasattr(cache, "update" if states is None else "is_updated")

    def _relative(self) -> bool:
        return getattr(self, "position_embedding_type", "absolute") != "absolute"

    def _takes_positions(self, hidden_states: torch.Tensor, states: Any, cache: Any) -> bool:
        if not self._relative():
            return True
        if self.position_embedding_type not in _WITH_KEYS or states is not None:  # type: ignore[attr-defined]
            return False
        table = self.distance_embedding  # type: ignore[attr-defined]
        # With a cache transformers 4 takes every query for the last one.
        last = self._own() or cache is None or hidden_states.shape[1] == 1
        return type(table) is nn.Embedding and table.max_norm is None and bare(table) and last

    def _observed(self) -> bool:
        """Whether somebody may look at the probabilities, which the fused forward doesn't make."""
        if getattr(self.fastconv_config, "output_attentions", False):
            return True
        for hook in self._forward_hooks.values():  # type: ignore[attr-defined]
            # They keep attentions if the config says so.
            if not collects_outputs(hook) or not hasattr(self.fastconv_config, "output_attentions"):
                return True
        return False


def _fits(states: torch.Tensor, hidden_states: torch.Tensor) -> bool:
    """Whether an encoder's states are (B, Sk, C) with the B of a call's, and Sk not 0."""
    # Not by len, of which torch.export makes a program for one size of batch.
    return states.dim() == 3 and states.shape[0] == hidden_states.shape[0] and states.shape[1] != 0


# position_embedding_type -> whether keys count too.
_WITH_KEYS = {"relative_key": False, "relative_key_query": True}


def attend(
    module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Attention of a module's heads as a call asks for it: (B, Sq, H, D), (B, Sk, H, D) twice -> (B, Sq, H, D).

    out: see masked_attention
    """
    p, scale = dropout_p(module.dropout), getattr(module, "scaling", None)
    mask, head_mask, relative = call.mask, call.head_mask, None
    if call.packing is not None:
        y = masked_attention(
            q[0],
            k[0],
            v[0],
            packing=call.packing,
            head_mask=head_mask,
            dropout_p=p,
            scale=scale,
            out=None if out is None else out[0],
        )
        return y[None]
    if mask is not None and mask.stride(2) == 0:
        # Expanded over the queries: one row says it all.
        mask = mask[:, :, :1]
    if getattr(module, "position_embedding_type", "absolute") != "absolute":
        relative = RelativePositions(module.distance_embedding.weight, _WITH_KEYS[module.position_embedding_type])
    if call.causal:
        # The first query is at the first key, and no query sees those that a cache of fixed size has left.
        k, v = k[:, : q.shape[1]], v[:, : q.shape[1]]
    elif (
        mask is not None
        and head_mask is None
        and relative is None
        and not use_kernels(q, k, v, mask)
        and _ready(mask, q.dtype, call)
    ):
        return attention(q, k, v, mask, p, scale)
    return masked_attention(
        q,
        k,
        v,
        mask=mask,
        causal=call.causal,
        relative=relative,
        head_mask=head_mask,
        dropout_p=p,
        scale=scale,
        out=out,
    )


def _ready(mask: torch.Tensor, dtype: torch.dtype, call: Call) -> bool:
    """Whether scaled_dot_product_attention may get a model's mask as it is, which saves a pass over it in every layer.

    Models add finite numbers to the scores, so there is no -inf to replace. A bool mask is one that transformers made
    for scaled_dot_product_attention: a row without a key is what that makes of it, here; by the kernels it is uniform,
    as in eager attention.
    """
    if mask.dtype == torch.bool:
        return call.sdpa
    return mask.dtype == dtype and not autocasting(mask)


class SelfAttention(FastForward):
    """The fused forward of BertSelfAttention and RoCBertSelfAttention: this library's, transformers' 4.57 and 5.x.

    With an encoder's states it is cross-attention, where the original's is.
    """

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, Any]:
        """(B, S, C) -> ((B, S, C), None); other calls go to the original, those for probabilities among them."""
        call = self.call(hidden_states, args, kwargs)
        if call is None:
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        return attend(self, *self._projections(hidden_states, call), call).flatten(2), None

    def _projections(self, hidden_states: torch.Tensor, call: Call) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        heads = (self.num_attention_heads, self.attention_head_size)  # type: ignore[attr-defined]
        of_both, of_encoder = self.fastconv_packed()
        if call.states is None:
            q, k, v = (t.unflatten(-1, heads) for t in packed_linear(hidden_states, of_both))
            return q, *_append(self, call, k, v)
        q = linear(hidden_states, self.query).unflatten(-1, heads)  # type: ignore[attr-defined]
        cached = _cached(self, call)
        if cached is not None:
            return q, *cached
        k, v = (t.unflatten(-1, heads) for t in packed_linear(call.states, of_encoder))
        return q, *_append(self, call, k, v)

    def fastconv_packed(self) -> tuple[tuple[nn.Module, ...], ...]:
        """The layers whose parameters are packed, of self-attention and of cross-attention."""
        q, k, v = self.query, self.key, self.value  # type: ignore[attr-defined]
        return (q, k, v), (k, v)


class CrossAttention(SelfAttention):
    """The fused forward of BertCrossAttention and RoCBertCrossAttention of transformers 5.x."""

    def call(self, hidden_states: torch.Tensor, args: tuple, kwargs: dict) -> Call | None:
        """What a call asks for; None if the fused forward doesn't do exactly that, or the call is wrong."""
        call = super().call(hidden_states, args, kwargs)
        return None if call is None or call.states is None else call


def _cached(module: Any, call: Call) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Keys and values (B, Sk, H, D) of the encoder's states that an earlier call has computed, if one has."""
    if isinstance(call.cache, Cache):
        pairs = call.cache.cross_attention
        return pairs[module.layer_index] if module.layer_index < len(pairs) else None
    if call.cache is None or not call.cache.is_updated.get(module.layer_idx):
        return None
    layer = call.cache.cross_attention_cache.layers[module.layer_idx]
    return layer.keys.transpose(1, 2), layer.values.transpose(1, 2)


def _append(module: Any, call: Call, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values (B, S, H, D) put into the cache, if there is one; all that it then holds for the module."""
    cache, cross = call.cache, call.states is not None
    if cache is None:
        return k, v
    if isinstance(cache, Cache):
        if not cross:
            return cache.append(module.layer_index, k, v)
        cache.cross_attention.append((k, v))
        return k, v
    part = cache.cross_attention_cache if cross else getattr(cache, "self_attention_cache", cache)
    # transformers 4 tells its cache the positions.
    positions = ({"cache_position": None if cross else call.cache_position},)
    k, v = part.update(
        k.transpose(1, 2),
        v.transpose(1, 2),
        module.layer_idx,
        *(positions if "cache_position" in module.fastconv_arguments else ()),
    )
    if cross:
        cache.is_updated[module.layer_idx] = True
    return k.transpose(1, 2), v.transpose(1, 2)
