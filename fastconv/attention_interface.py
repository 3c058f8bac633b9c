"""register_attention: masked_attention as an attention implementation of transformers, by its AttentionInterface."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastconv.ops import masked_attention
from fastconv.reference.ops.masked_attention import attention_probabilities, combined_mask

_NAME = "fastconv"
# What models pass to their attention that changes its result in ways that masked_attention doesn't know: a cap of the
# scores, a learned share for no key, the keys that another layer chose, the paged cache of continuous batching.
_UNKNOWN = ("softcap", "s_aux", "sinks", "indices", "block_indices", "cache")


def register_attention() -> None:
    """Make attn_implementation="fastconv" known to transformers: from_pretrained, from_config, set_attn_implementation.

    It reaches every model that takes its attention from transformers' AttentionInterface: encoders, decoders with a
    cache, grouped queries and sliding windows, encoder-decoders with a bias of positions (T5), dropout, head_mask.
    output_attentions=True returns the probabilities, after dropout and head_mask; only calls that ask pay for them.
    A query that may not attend to any key attends to all equally, as in eager attention; a bias of positions gets no
    gradient from forbidden keys. Calling it again changes nothing.

    Out of reach is attention that a model has in classes of its own: BERT's, RoBERTa's, ELECTRA's and DistilBERT's in
    transformers 4.57 (KeyError where the model is made), ConvBERT's in every version (ValueError at its first mask in
    5.x; in 4.57 it stays eager). `fastconv.accelerate` is for BERT's, RoCBert's and ConvBERT's.

    Raises: ImportError without transformers, or with one that has no AttentionInterface. In a model's forward
    ValueError for what masked_attention doesn't do, rather than leave it out: softcap, attention sinks, keys chosen by
    another layer, a paged cache, a mask that isn't four-dimensional, a causal layer of fewer queries than keys without
    a mask; and for masks that the model would use in attention of its own.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            'register_attention needs transformers, which is not installed: pip install "transformers>=4.57"'
        ) from error
    if not (hasattr(transformers, "AttentionInterface") and hasattr(transformers, "AttentionMaskInterface")):
        raise ImportError(
            f"register_attention needs transformers 4.57 or newer, got {transformers.__version__}, which has no "
            "AttentionInterface"
        )
    importlib.import_module("transformers.masking_utils")
    transformers.AttentionInterface.register(_NAME, _attention)
    transformers.AttentionMaskInterface.register(_NAME, _mask)


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    head_mask: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The attention of a module of transformers.

    query: (B, H, Sq, D); key: (B, G, Sk, D); value: (B, G, Sk, E), of which each of the G heads is for H / G of query's
    attention_mask, position_bias: four-dimensional, broadcastable to (B, H, Sq, Sk); head_mask: (H,) or like these
    returns: (B, Sq, H, E), and the probabilities (B, H, Sq, Sk) if the model was asked for them

    A sliding window is in the mask already, and what other implementations need to know of a packed batch has no
    meaning here, so these arguments are passed over.
    """
    for name in _UNKNOWN:
        if others.get(name) is not None:
            raise ValueError(
                f"attn_implementation={_NAME!r} does not do {name!r}, which {type(module).__name__} needs; "
                'use attn_implementation="eager"'
            )
    scale = _scale(module, query) if scaling is None else scaling
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    if k.shape[2] != q.shape[2]:
        k, v = (t.repeat_interleave(q.shape[2] // t.shape[2], dim=2) for t in (k, v))
    q, k, v = _one_head_size(q.expand(k.shape[0], -1, -1, -1), k, v)
    # As transformers' own scaled_dot_product_attention decides it: a mask says all, and a single query sees all keys.
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    causal = bool(q.shape[1] > 1 and attention_mask is None and causal)
    if causal and q.shape[1] != k.shape[1]:
        raise ValueError(
            f"{type(module).__name__} is causal, with {q.shape[1]} queries of {k.shape[1]} keys and no mask that says "
            'where the queries are; pass a four-dimensional attention_mask, or use attn_implementation="eager"'
        )
    mask = _with_bias(_checked(attention_mask, k.shape[1]), position_bias)
    if head_mask is not None and head_mask.dim() == 1:
        head_mask = head_mask[:, None, None]
    p = dropout if module.training else 0.0
    if _asked_for_probabilities(module, others):
        y, probabilities = _with_probabilities(q, k, v, mask, causal, scale, p, head_mask)
    else:
        y = masked_attention(q, k, v, mask=mask, causal=causal, head_mask=head_mask, dropout_p=p, scale=scale)
        probabilities = None
    return y[..., : value.shape[-1]].contiguous(), probabilities


def _scale(module: Any, query: torch.Tensor) -> float:
    """The scale of a module that names none, which GPT-2's of transformers 4.57 has in its attributes."""
    scale = query.shape[-1] ** -0.5 if getattr(module, "scale_attn_weights", True) else 1.0
    return scale / (module.layer_idx + 1) if getattr(module, "scale_attn_by_inverse_layer_idx", False) else scale


def _one_head_size(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Values and keys of one head size: zeros after the smaller one's numbers change neither scores nor results."""
    missing = v.shape[-1] - k.shape[-1]
    if missing < 0:
        v = F.pad(v, (0, -missing))
    elif missing > 0:
        q, k = F.pad(q, (0, missing)), F.pad(k, (0, missing))
    return q, k, v


def _checked(mask: Any, Sk: int) -> torch.Tensor | None:
    """A mask of Sk keys, and of one query where it is the same for all."""
    if mask is None:
        return None
    if not isinstance(mask, torch.Tensor) or mask.dim() != 4:
        given = tuple(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise ValueError(
            f"attn_implementation={_NAME!r} needs an attention_mask of shape (B, 1 or H, Sq, Sk), got {given}"
        )
    mask = mask[..., :Sk]
    # Expanded over the queries: one row says it all, and keys are skipped by blocks.
    return mask[:, :, :1] if mask.stride(2) == 0 else mask


def _with_bias(mask: torch.Tensor | None, bias: torch.Tensor | None) -> torch.Tensor | None:
    if mask is None or bias is None:
        return bias if mask is None else mask
    lowest = torch.finfo(bias.dtype).min
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, lowest)
    return torch.where(mask <= torch.finfo(mask.dtype).min, lowest, bias + mask)


def _asked_for_probabilities(module: nn.Module, arguments: dict[str, Any]) -> bool:
    """Whether the caller of the model wants its attentions."""
    if arguments.get("output_attentions") or getattr(getattr(module, "config", None), "output_attentions", False):
        return True
    # Not every model of transformers 5.x hands the argument down: what it collects in this call is known here alone.
    collector = getattr(sys.modules.get("transformers.utils.output_capturing"), "_active_collector", None)
    if collector is None or torch.compiler.is_compiling():
        return False
    return any(name.endswith("attentions") for name in collector.get() or ())


def _with_probabilities(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    causal: bool,
    scale: float,
    dropout_p: float,
    head_mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """masked_attention by the formula, and the probabilities that it multiplies v with, (B, H, Sq, Sk)."""
    probabilities = attention_probabilities(q, k, mask=combined_mask(q, k, mask, None, causal), scale=scale)
    probabilities = F.dropout(probabilities, dropout_p)
    if head_mask is not None:
        probabilities = probabilities * head_mask.to(probabilities.dtype)
    return torch.einsum("bhqk,bkhd->bqhd", probabilities, v), probabilities


def _mask(**arguments: Any) -> torch.Tensor | None:
    """A mask as transformers makes it for its scaled_dot_product_attention: bool, or None where none is needed.

    Of a bidirectional model it is one row for all queries, expanded in no memory.
    """
    masking_utils = sys.modules["transformers.masking_utils"]  # torch 2.11 can't trace the import
    config, queries = arguments.get("config"), arguments.get("q_length")
    if config is not None and not _reaches(type(config)):
        raise ValueError(
            f"the attention of model type {config.model_type!r} is not taken from transformers' AttentionInterface, so "
            f'attn_implementation={_NAME!r} can\'t reach it; use attn_implementation="eager", and fastconv.accelerate '
            "for the families that it knows"
        )
    bidirectional = getattr(masking_utils, "bidirectional_mask_function", None)
    if queries is None:
        # transformers 4.57: causal masks only, left out only of as many queries as keys.
        return masking_utils.sdpa_mask(**arguments)
    if arguments.get("mask_function") is bidirectional and not arguments.get("allow_is_causal_skip", True):
        mask = masking_utils.sdpa_mask(**{**arguments, "q_length": 1})
        return None if mask is None else mask.expand(-1, -1, queries, -1)
    if queries not in (1, arguments["kv_length"]):
        # The empty end of a static cache: without a mask the attention could not tell where the queries are.
        arguments["allow_is_causal_skip"] = False
    return masking_utils.sdpa_mask(**arguments)


@torch.compiler.assume_constant_result
def _reaches(config_class: type) -> bool:
    """Whether the models of a config take their attention from the interface, or from another model's modules."""
    models = sys.modules.get(config_class.__module__.replace(".configuration_", ".modeling_"))
    if models is None or hasattr(models, "ALL_ATTENTION_FUNCTIONS"):
        return True
    return not any(
        isinstance(item, type)
        and issubclass(item, nn.Module)
        and item.__module__ == models.__name__
        and "Attention" in name
        for name, item in vars(models).items()
    )
