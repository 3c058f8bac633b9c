"""What goes into a model: the checks of it, and the masks as the layers take them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .cache import Cache
from .config import Config
from .ops._checks import can_look_at


def check_devices(model: nn.Module, **tensors: Tensor | None) -> None:
    """Raise ValueError unless every tensor given is where the parameters are."""
    device = next(model.parameters()).device
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device} but the model is on {device}; move them to one device")


def check_inputs(
    config: Config,
    embedding_size: int,
    input_ids: Tensor | None,
    token_type_ids: Tensor | None,
    position_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    past_length: int = 0,
) -> tuple[int, int]:
    """Check what goes into the embeddings and return (B, S). past_length: how many tokens a cache holds.

    The values of ids are looked at on the CPU only: on a GPU that would wait for the device, and the embedding itself
    asserts.

    Raises:
        TypeError: ids that are not integers, embeddings that are not floating point.
        ValueError: both or neither of input_ids and inputs_embeds, a wrong shape, an empty sequence, a sequence
            longer than max_position_embeddings.
        IndexError: ids outside their table.
    """
    if not (input_ids is None) ^ (inputs_embeds is None):
        given = "neither" if input_ids is None else "both"
        raise ValueError(f"give exactly one of input_ids and inputs_embeds, got {given}")
    if input_ids is not None:
        if input_ids.dim() != 2:
            raise ValueError(f"input_ids must have shape (B, S), got {tuple(input_ids.shape)}")
        B, S = input_ids.shape
    else:
        assert inputs_embeds is not None
        if not inputs_embeds.is_floating_point():
            raise TypeError(f"inputs_embeds must be a floating-point tensor, got {inputs_embeds.dtype}")
        if inputs_embeds.dim() != 3 or inputs_embeds.shape[2] != embedding_size:
            raise ValueError(
                f"inputs_embeds must have shape (B, S, {embedding_size}), got {tuple(inputs_embeds.shape)}"
            )
        B, S = inputs_embeds.shape[:2]
    if S == 0:
        raise ValueError(f"the sequence is empty, got B = {B}, S = {S}; S must be at least 1")
    limit = config.max_position_embeddings
    relative = getattr(config, "position_embedding_type", "absolute") != "absolute"
    if limit < past_length + S and (position_ids is None or relative):
        length = f"{past_length} cached + {S}" if past_length else S
        hint = "truncate the input" if relative or past_length else "truncate the input or give position_ids"
        raise ValueError(f"the sequence length must be at most max_position_embeddings {limit}, got {length}; {hint}")
    check_ids("input_ids", input_ids, B, S, "vocab_size", config.vocab_size)
    check_ids("token_type_ids", token_type_ids, B, S, "type_vocab_size", config.type_vocab_size)
    check_ids("position_ids", position_ids, B, S, "max_position_embeddings", config.max_position_embeddings)
    return B, S


def check_ids(name: str, ids: Tensor | None, B: int, S: int, size_name: str, size: int) -> None:
    """Check that ids are integers, of shape (B, S), (1, S) or (S,), and, on the CPU, in [0, size)."""
    if ids is None:
        return
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} must be an int64 or int32 tensor, got {ids.dtype}")
    if tuple(ids.shape) not in ((B, S), (1, S), (S,)):
        raise ValueError(f"{name} must have shape (B, S) = {(B, S)}, got {tuple(ids.shape)}")
    if not can_look_at(ids):
        return
    low, high = (int(value) for value in ids.aminmax())
    if low < 0 or high >= size:
        raise IndexError(
            f"{name} must be from 0 to {size - 1} ({size_name} is {size}), got values from {low} to {high}"
        )


def check_encoder_states(
    config: Config, B: int, encoder_hidden_states: Tensor | None, encoder_attention_mask: Tensor | None
) -> None:
    """Check what a decoder gets from an encoder.

    Raises:
        ValueError: a model without cross-attention; shapes that don't fit; a mask alone. TypeError: integers.
    """
    if encoder_hidden_states is None:
        if encoder_attention_mask is not None:
            raise ValueError("encoder_attention_mask needs encoder_hidden_states, got None")
        return
    if not config.add_cross_attention:
        raise ValueError("encoder_hidden_states need a config with is_decoder and add_cross_attention True, got False")
    if not encoder_hidden_states.is_floating_point():
        raise TypeError(f"encoder_hidden_states must be a floating-point tensor, got {encoder_hidden_states.dtype}")
    shape = tuple(encoder_hidden_states.shape)
    if len(shape) != 3 or shape[0] != B or shape[1] == 0 or shape[2] != config.hidden_size:
        raise ValueError(
            f"encoder_hidden_states must have shape (B, S, C) = {(B, 'S', config.hidden_size)}, got {shape}"
        )


def choose_cache(
    config: Config, past_key_values: Cache | None, use_cache: bool | None, checkpointing: bool
) -> Cache | None:
    """The cache that a forward fills: the one given, a new one, or none.

    An encoder has none, nor has a forward that gradient checkpointing will repeat, whatever use_cache is.

    Raises:
        TypeError: no Cache. ValueError: one where there can be none.
    """
    use_cache = config.is_decoder and not checkpointing and (config.use_cache if use_cache is None else use_cache)
    if past_key_values is None:
        return Cache() if use_cache else None
    if not isinstance(past_key_values, Cache):
        raise TypeError(f"past_key_values must be a fastconv.reference.Cache, got {type(past_key_values).__name__}")
    if not use_cache:
        if checkpointing:
            raise ValueError("past_key_values can't be used while gradient checkpointing trains; disable one of them")
        what = "use_cache" if config.is_decoder else "a config with is_decoder"
        raise ValueError(f"past_key_values needs {what} True, got False")
    return past_key_values


def additive_mask(
    attention_mask: Tensor | None,
    scores: tuple[int, int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    *,
    causal: bool = False,
    name: str = "attention_mask",
) -> Tensor | None:
    """The mask that is added to the scores: 0 where attention_mask is 1, the lowest number of `dtype` where it is 0.

    attention_mask is (B, Sk), keys only, or (B, Sq, Sk), queries and keys, of 1 and 0 in any dtype; or broadcastable to
    `scores`, (B, H, Sq, Sk), with four dimensions: bool, or already additive. The result is broadcastable to `scores`.

    causal: the last query is at the last key, and a query sees no later key. Only a mask of keys is made causal: one of
    queries and keys says it all itself.

    Raises:
        TypeError: a complex mask. ValueError: another shape.
    """
    B, _, Sq, Sk = scores
    if attention_mask is None:
        if not causal:
            return None
        mask = causal_mask(Sq, Sk, device)[None, None]
        return (1.0 - mask.to(dtype)) * torch.finfo(dtype).min
    if attention_mask.is_complex():
        raise TypeError(f"{name} must be bool, integer or floating point, got {attention_mask.dtype}")
    shape = tuple(attention_mask.shape)
    if shape == (B, Sk):
        mask = attention_mask[:, None, None, :]
        if causal:
            mask = mask.to(dtype) * causal_mask(Sq, Sk, device)
    elif shape == (B, Sq, Sk):
        mask = attention_mask[:, None, :, :]
    elif len(shape) == 4 and all(n in (1, size) for n, size in zip(shape, scores, strict=True)):
        if attention_mask.is_floating_point():
            # Finite in `dtype` too, as those made here: a row that may not see any key is uniform.
            return attention_mask.to(dtype).clamp(min=torch.finfo(dtype).min)
        mask = attention_mask
    else:
        raise ValueError(
            f"{name} must have shape (B, S) = {(B, Sk)}, (B, S, S) = {(B, Sq, Sk)} or one broadcastable to "
            f"(B, H, S, S) = {scores}, got {shape}"
        )
    check_mask_values(name, attention_mask)
    return (1.0 - mask.to(dtype)) * torch.finfo(dtype).min


def causal_mask(Sq: int, Sk: int, device: torch.device) -> Tensor:
    """(Sq, Sk), bool: True where a query may attend to a key, the last query being at the last key."""
    return torch.ones(Sq, Sk, dtype=torch.bool, device=device).tril(Sk - Sq)


def check_mask_values(name: str, attention_mask: Tensor) -> None:
    """Raise ValueError, on the CPU, for values below 0 or above 1: lengths, say, or a mask that is already additive."""
    if not can_look_at(attention_mask):
        return
    low, high = (value.item() for value in attention_mask.aminmax())
    if low < 0 or high > 1:
        raise ValueError(f"{name} must have values 1 and 0, got values from {low} to {high}")


def expand_head_mask(head_mask: Tensor | None, layers: int, heads: int, dtype: torch.dtype) -> Tensor | None:
    """head_mask (H,) or (L, H), 1 for a head to keep, as (L, 1, H, 1, 1).

    Raises:
        ValueError: another shape.
    """
    if head_mask is None:
        return None
    if tuple(head_mask.shape) not in ((heads,), (layers, heads)):
        raise ValueError(
            f"head_mask must have shape (heads,) = {(heads,)} or (layers, heads) = {(layers, heads)}, "
            f"got {tuple(head_mask.shape)}"
        )
    return head_mask.to(dtype).expand(layers, heads)[:, None, :, None, None]
