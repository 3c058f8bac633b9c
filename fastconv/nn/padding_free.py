"""Models without their padding: packed before the embeddings, put back after the last layer.

The model's forward packs what it is given to (1, T), and hands its encoder, past the mask that the original forward
makes, the `Packing` in the mask's place; the fused attention takes it from there. Everything between is the original's.
"""

from __future__ import annotations

import inspect
import logging
import sys
import threading
from typing import Any

import torch

from fastconv.graphs import Graphs
from fastconv.nn._modules import RunsEagerly
from fastconv.nn.attention import IGNORED
from fastconv.ops._eager import unobserved
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

    Its results are those of the padded batch, and zeros where the padding is. With graphs it runs a batch that has no
    padding in the same way, without a mask.
    """

    fastconv_original: Any
    fastconv_arguments: tuple[str, ...]  # of the original's forward
    fastconv_padding = "keep"
    fastconv_graphs: Graphs | None = None
    # Whether a sequence counts its positions from its own first token, as it would alone.
    fastconv_alone = False

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "fastconv_original" in cls.__dict__:
            cls.fastconv_arguments = tuple(inspect.signature(cls.fastconv_original.forward).parameters)[1:]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The original's arguments; attention_mask may also be a `Packing` made from one."""
        given = {**dict(zip(self.fastconv_arguments, args, strict=False)), **kwargs}
        if len(given) < len(args) + len(kwargs):
            return self._run(args, kwargs, None)  # of an argument too many, or given twice, the original tells
        graphs = self._graphs(given)
        packing = self._packing(given)
        if packing is None and graphs is not None:
            packing = self._whole(given)
        if packing is None:
            return self._run(args, kwargs, None)
        packed = self._packed(given, packing)
        output = None if graphs is None else self._replayed(graphs, packed, packing)
        if output is None and isinstance(packing, _Whole):
            return self._run(args, kwargs, None)
        return self._unpacked(self._run((), *_rounded(packed, packing)) if output is None else output, packing)

    def _run(self, args: Any, kwargs: dict[str, Any], packing: Packing | None) -> Any:
        """The original's output for these arguments, which are packed if there is a packing."""
        if packing is not None:
            kwargs = {**kwargs, "attention_mask": self._nothing_masked(packing.cu_seqlens.device)}
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
        return output

    def _graphs(self, given: dict[str, Any]) -> Graphs | None:
        """The model's graphs, None if this call is for none."""
        # A trace, and a capture of somebody else's, want the operators.
        graphs = self.fastconv_graphs
        if graphs is None or not unobserved():
            return None
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            return None
        try:
            graphs.check(self, given)
            return graphs
        except RunsEagerly as why:
            self._warn_of_graphs(why)
            return None

    def _replayed(self, graphs: Graphs, packed: dict[str, Any], packing: Packing) -> Any:
        """The packed output by a graph, None if there is none for this call."""
        names = [name for name in (*_OF_TOKENS, *_OF_PLACES) if packed.get(name) is not None]
        inputs = {name: packed[name] for name in names}
        options = {name: value for name, value in packed.items() if name not in names}
        try:
            return graphs.run(self, lambda given, packing: self._run((), given, packing), inputs, options, packing)
        except RunsEagerly as why:
            self._warn_of_graphs(why)
            return None

    def _warn_of_graphs(self, why: object) -> None:
        _warn_once(f"{type(self).__name__} runs without CUDA graphs: {why}")

    def _whole(self, given: dict[str, Any]) -> Packing | None:
        """The packing of a batch without padding, for a graph; None of one with padding, or that no graph is for."""
        mask: Any = given.get("attention_mask")
        tokens: Any = given.get("inputs_embeds") if given.get("input_ids") is None else given["input_ids"]
        if (mask is not None and self.fastconv_padding == "remove") or not isinstance(tokens, torch.Tensor):
            return None
        B, S = (*tokens.shape[:2], 0, 0)[:2]
        # Of positions that there are none of, the original tells.
        if not 0 < B * S <= Graphs.max_tokens or self.config.max_position_embeddings < S:  # type: ignore[attr-defined]
            return None
        why = self._why_padded(given)
        if why is not None:
            self._warn_of_graphs(why)
            return None
        if mask is not None and (mask.shape != (B, S) or mask.device != tokens.device or not bool((mask == 1).all())):
            return None
        return _Whole(B, S, tokens.device)

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
            made = self._packing_of_mask(mask)
            mask, why = (mask, made) if isinstance(made, str) else (made, None)
        if why is not None:
            if isinstance(mask, Packing):
                raise ValueError(f"this call needs its padding, and a mask in the place of the Packing: {why}")
            _warn_once(f"{type(self).__name__} computes its padding in spite of padding='remove': {why}")
            return None
        if mask.padded_shape is None:
            raise ValueError(
                "attention_mask is a Packing without a padded batch: make it with Packing.from_mask, or from_lengths "
                "with padded_shape"
            )
        if mask.tokens == 0:
            raise ValueError(f"the batch is all padding: attention_mask {mask.padded_shape} has no 1")
        return mask

    def _packing_of_mask(self, mask: torch.Tensor) -> Packing | str:
        # Not is_exporting(), of which torch 2.11 says in every trace that it is true.
        if torch.compiler._is_exporting_flag or torch.jit.is_tracing():
            raise RuntimeError(
                "how many tokens a mask leaves is data, which no exported or traced program holds: export a model "
                'accelerated with padding="keep"'
            )
        if not torch.compiler.is_compiling():
            return packing_of_mask(mask, self.fastconv_alone)
        # Imported here, since it imports Dynamo.
        from fastconv.nn._outside_graphs import packing_of_mask as outside

        return outside(mask, self.fastconv_alone)

    def _why_padded(self, given: dict[str, Any]) -> str | None:
        """Why a call can't do without its padding, None if it can."""
        config, mask, head_mask = self.config, given.get("attention_mask"), given.get("head_mask")  # type: ignore[attr-defined]
        if not (mask is None or isinstance(mask, Packing) or (isinstance(mask, torch.Tensor) and mask.dim() == 2)):
            return "attention_mask is not (B, S)"
        for name in _KEEPS:
            if given.get(name) is not None and given[name] is not False:
                return f"{name} is given"
        for name, value in given.items():
            # transformers passes it on to the attention, which the fused one isn't for.
            if value is not None and value is not False and name not in self.fastconv_arguments and name not in IGNORED:
                return f"{name} is given, which its forward doesn't name"
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
        """The call's arguments with (1, T) in the place of (B, S), and without a mask."""
        B, S = packing.padded_shape  # type: ignore[misc]
        given = {name: value for name, value in given.items() if name != "attention_mask"}
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
        T = packing.tokens
        last = packing.unpack(output[0][0][:T])

        def put_back(value: Any) -> Any:
            if isinstance(value, tuple):
                # transformers 5.x has None where the states of some layers only are asked for.
                return tuple(None if states is None else packing.unpack(states[0][:T]) for states in value)
            if isinstance(value, torch.Tensor) and value.dim() == 2:
                return self.pooler(_firsts(last, packing))  # type: ignore[attr-defined]
            return value

        if isinstance(output, tuple):
            return (last, *(put_back(value) for value in output[1:]))
        for name, value in output.items():
            output[name] = last if name == "last_hidden_state" else put_back(value)
        return output


def _rounded(packed: dict[str, Any], packing: Packing) -> tuple[dict[str, Any], Packing]:
    """A call's arguments (1, T, ...) and packing on a CPU with a sequence more, unseen, that makes T a multiple of 8.

    Of many other numbers oneDNN's product takes 1.12 to 1.5 times as long a row (mkldnn._linear_pointwise of 768 x 768
    in fp32, T of 100 to 2,060, 2 cores of an AMD EPYC with AVX-512, torch 2.13.0, 2026-11-20). With the multiple
    `fastconv verify convbert-base --padding remove --batch 32 --rounds 9` went from 1.78x to 2.02x of the padded run.
    """
    more = -packing.tokens % 8
    if more == 0 or packing.cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():
        return packed, packing
    wider = {
        name: torch.cat((packed[name], packed[name].new_zeros(1, more, *packed[name].shape[2:])), 1)
        for name in (*_OF_TOKENS, *_OF_PLACES)
        if packed.get(name) is not None
    }
    return packed | wider, Packing.from_lengths([*packing.lengths, more])


def _firsts(states: torch.Tensor, packing: Packing) -> torch.Tensor:
    """The state of every row's first token: (B, S, C) -> (B, 1, C), zeros for a row without tokens."""
    if isinstance(packing, _Whole):
        return states[:, :1]
    B, S = packing.padded_shape  # type: ignore[misc]
    rows = torch.arange(B, device=states.device) * S
    # Of a row without tokens, its padding.
    places = rows.scatter_reduce(0, packing.indices // S, packing.indices, "amin", include_self=False)  # type: ignore[operator, arg-type]
    return states.flatten(0, 1).index_select(0, places)[:, None]


class _Whole(Packing):
    """The packing of a batch (B, S) without padding, made without a look at the device."""

    def __init__(self, B: int, S: int, device: torch.device) -> None:
        token = torch.arange(B * S, dtype=torch.int32, device=device)
        self.before = token % S
        self.after = S - 1 - self.before
        self.first = token - self.before
        self.last = self.first + S
        self.indices = token.long()
        self.cu_seqlens = torch.arange(0, B * S + 1, S, device=device)
        self.padded_shape, self.tokens, self.lengths, self.longest = (B, S), B * S, [S] * B, S

    def pack(self, x: torch.Tensor) -> torch.Tensor:
        """(B, S, ...) -> (T, ...), a view if x can be one."""
        return x.flatten(0, 1)

    def unpack(self, x: torch.Tensor) -> torch.Tensor:
        """(T, ...) -> (B, S, ...), a view."""
        return x.unflatten(0, self._padded())


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
            # Not by take_along_dim, of which torch.compile makes a graph for one size of batch.
            vector = hidden_states.gather(1, place[:, None, None].expand(-1, -1, hidden_states.shape[-1]))
        return super().forward(vector)  # type: ignore[misc]


def packing_of_mask(mask: torch.Tensor, alone: bool) -> Packing | str:
    """The packing of a mask (B, S); if there is none, why, or ValueError where each sequence is to be alone."""
    try:
        return Packing.from_mask(mask)
    except ValueError as error:
        if alone:
            raise
        # The rows, after the comma, are other ones in every batch.
        return f"of attention_mask, {str(error).partition(', got')[0]}"


_warned: set[str] = set()


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        logger.warning(message)
