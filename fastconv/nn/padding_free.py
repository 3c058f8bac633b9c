"""Models without their padding: packed before the embeddings, put back after the last layer.

The model's forward packs what it is given to (1, T), and hands its encoder, past the mask that the original forward
makes, the `Packing` in the mask's place; the fused attention takes it from there. Everything between is the original's.
"""

from __future__ import annotations

import functools
import inspect
import logging
import sys
import threading
from typing import Any

import torch

from fastconv.reference import Packing

logger = logging.getLogger("fastconv")

# The packing between a model's forward and its encoder's, which takes it; per thread.
_of_call = threading.local()

_OF_TOKENS = ("input_ids", "inputs_embeds", "input_shape_ids", "input_pronunciation_ids")
# These may be those of one sequence, for all.
_OF_PLACES = ("token_type_ids", "position_ids")
# What is computed on the padded batch as before.
_KEEPS = ("encoder_hidden_states", "past_key_values", "output_attentions")


class PaddingFree:
    """The forward of BertModel and RoCBertModel, this library's and transformers' 4.57 and 5.x, without padding.

    Its results are those of the padded batch, and zeros where the padding is.
    """

    fastconv_original: Any
    fastconv_padding = "keep"
    # Whether a sequence counts its positions from its own first token, as it would alone.
    fastconv_alone = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The original's arguments; attention_mask may also be a `Packing` made from one."""
        given = {**dict(zip(_arguments(self.fastconv_original), args, strict=False)), **kwargs}
        # Of an argument too many, or given twice, the original tells.
        packing = self._packing(given) if len(given) == len(args) + len(kwargs) else None
        if packing is not None:
            args, kwargs = (), self._packed(given, packing)
        # A model that another's forward calls, with its padding maybe, is not to take the other's packing.
        of_caller = getattr(_of_call, "packing", None)
        _of_call.packing = packing
        try:
            output = super().forward(*args, **kwargs)  # type: ignore[misc]
            left = _of_call.packing
        finally:
            _of_call.packing = of_caller
        if left is not None:
            raise RuntimeError(
                f"the encoder {type(self.encoder).__name__} did not run packed: "  # type: ignore[attr-defined]
                "call accelerate on the model again"
            )
        return output if packing is None else self._unpacked(output, packing)

    def _packing(self, given: dict[str, Any]) -> Packing | None:
        """The packing of a call; None for one that is computed on the padded batch."""
        mask: Any = given.get("attention_mask")
        if self.fastconv_padding != "remove":
            if isinstance(mask, Packing):
                raise TypeError('attention_mask is a Packing, which needs accelerate(model, padding="remove")')
            return None
        if mask is None:
            return None
        why = self._why_padded(given)
        if why is None and isinstance(mask, torch.Tensor):
            try:
                mask = Packing.from_mask(mask)
            except ValueError as error:
                if self.fastconv_alone:
                    raise
                # The rows, after the comma, are other ones in every batch.
                why = f"of attention_mask, {str(error).partition(', got')[0]}"
        if why is not None:
            if isinstance(mask, Packing):
                raise ValueError(f"this call needs its padding, and a mask in the place of the Packing: {why}")
            _warn_once(f"{type(self).__name__} computes its padding in spite of padding='remove': {why}")
            return None
        if mask.padded_shape is None:
            raise ValueError("attention_mask is a Packing without a padded batch: make it with Packing.from_mask")
        if mask.tokens == 0:
            raise ValueError(f"the batch is all padding: attention_mask {mask.padded_shape} has no 1")
        return mask

    def _why_padded(self, given: dict[str, Any]) -> str | None:
        """Why a call can't do without its padding, None if it can."""
        config, mask, head_mask = self.config, given["attention_mask"], given.get("head_mask")  # type: ignore[attr-defined]
        if not isinstance(mask, Packing) and not (isinstance(mask, torch.Tensor) and mask.dim() == 2):
            return "attention_mask is not (B, S)"
        for name in _KEEPS:
            if given.get(name) is not None and given[name] is not False:
                return f"{name} is given"
        if isinstance(head_mask, torch.Tensor) and head_mask.dim() > 2:
            return "head_mask has more than two dimensions"
        if getattr(config, "output_attentions", False):
            return "the config asks for attentions"
        if getattr(config, "is_decoder", False):
            return "the model is a decoder"
        if getattr(config, "chunk_size_feed_forward", 0):
            return "chunk_size_feed_forward is not 0"
        if getattr(config, "position_embedding_type", "absolute") != "absolute":
            return "positions are relative"
        encoder = self.encoder  # type: ignore[attr-defined]
        if not isinstance(encoder, PackedEncoder):
            return f"the forward of {type(encoder).__name__} is not a fused one"
        for layer in encoder.layer:  # type: ignore[attr-defined]
            attention: Any = getattr(getattr(layer, "attention", None), "self", None)
            if not (hasattr(attention, "takes_packing") and attention.takes_packing()):
                return f"the attention of a {type(layer).__name__} is not a fused one, or somebody looks at it"
        return None

    def _packed(self, given: dict[str, Any], packing: Packing) -> dict[str, Any]:
        """The call's arguments with (1, T) in the place of (B, S)."""
        B, S = packing.padded_shape  # type: ignore[misc]
        given = dict(given)
        for name in (*_OF_TOKENS, *_OF_PLACES):
            value = given.get(name)
            if value is None:
                continue
            if name in _OF_PLACES and tuple(value.shape) in ((S,), (1, S)):
                value = value.expand(B, S)
            if tuple(value.shape[:2]) != (B, S):
                raise ValueError(
                    f"{name} must have the attention_mask's shape (B, S) = {(B, S)}, got {tuple(value.shape)}"
                )
            given[name] = packing.pack(value)[None]
        if given.get("position_ids") is None:
            positions: Any = packing.before.long() if self.fastconv_alone else packing.indices % S  # type: ignore[operator]
            given["position_ids"] = positions[None]
        if given.get("token_type_ids") is None:
            # Their default has a buffer of the longest sequence's length behind it.
            given["token_type_ids"] = torch.zeros_like(given["position_ids"])
        given["attention_mask"] = self._nothing_masked(packing.cu_seqlens.device)
        return given

    def _nothing_masked(self, device: torch.device) -> torch.Tensor | None:
        """A mask that hides no key, which transformers passes on without looking at it or making one of T x T."""
        module = self.fastconv_original.__module__
        if not module.startswith("transformers."):
            return None
        if hasattr(sys.modules[module], "create_bidirectional_mask"):  # 5.x: it is added
            return torch.zeros(1, 1, 1, 1, device=device)
        return torch.ones(1, 1, 1, device=device)

    def _unpacked(self, output: Any, packing: Packing) -> Any:
        """The output, an object or a tuple, with (B, S, C) in the place of (1, T, C)."""
        last = packing.unpack(output[0][0])

        def put_back(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(packing.unpack(states[0]) for states in value)
            if isinstance(value, torch.Tensor) and value.dim() == 2:
                return self.pooler(last)  # type: ignore[attr-defined]
            return value

        if isinstance(output, tuple):
            return (last, *(put_back(value) for value in output[1:]))
        for name, value in output.items():
            output[name] = last if name == "last_hidden_state" else put_back(value)
        return output


class PaddingFreeAlone(PaddingFree):
    """The same of ConvBertModel, whose convolutions see the padding: each result is that of its sequence alone."""

    fastconv_alone = True


class PackedEncoder:
    """The forward of an encoder that passes on the packing of its model's call, if there is one, as the mask."""

    def forward(self, hidden_states: torch.Tensor, attention_mask: Any = None, *args: Any, **kwargs: Any) -> Any:
        """The original's arguments."""
        packing = getattr(_of_call, "packing", None)
        _of_call.packing = None
        mask = attention_mask if packing is None else packing
        return super().forward(hidden_states, mask, *args, **kwargs)  # type: ignore[misc]


class SummaryAlone:
    """The forward of ConvBERT's heads that make one vector of a sequence, of its tokens as they would be alone.

    Padding is known by its zeros: what a LayerNorm gives a token has some other number.
    """

    fastconv_padding = "keep"

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """(B, S, C) -> (B, C); a call that says which tokens to take goes to the original."""
        if self.fastconv_padding != "remove" or any(each is not None for each in (*args, *kwargs.values())):
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        tokens = (hidden_states != 0).any(-1)
        kind = getattr(self, "summary_type", "first")
        if kind == "mean":
            vector = hidden_states.sum(1, keepdim=True) / tokens.sum(1).clamp(min=1)[:, None, None]
        else:
            place = tokens.int().argmax(1) if kind == "first" else tokens.cumsum(1).argmax(1)
            vector = hidden_states.take_along_dim(place[:, None, None], 1)
        return super().forward(vector)  # type: ignore[misc]


@functools.cache
def _arguments(original: Any) -> tuple[str, ...]:
    """The names of a class's forward's arguments, in order."""
    return tuple(inspect.signature(original.forward).parameters)[1:]


_warned: set[str] = set()


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        logger.warning(message)
