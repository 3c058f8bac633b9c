"""The keys and values that a decoder keeps between calls, so that those of a token are computed once."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.utils._pytree as pytree
from torch import Tensor


class Cache:
    """Keys and values of every layer, each (B, S, H, D); a forward of a decoder appends to it and returns it.

    self_attention: one pair for each layer, of the tokens so far
    cross_attention: one pair for each layer, of the encoder's output; empty without cross-attention
    """

    def __init__(self) -> None:
        self.self_attention: list[tuple[Tensor, Tensor]] = []
        self.cross_attention: list[tuple[Tensor, Tensor]] = []

    def get_seq_length(self) -> int:
        """How many tokens it holds."""
        return self.self_attention[0][0].shape[1] if self.self_attention else 0

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add the keys and values (B, S, H, D) of new tokens to a layer and return all of that layer's."""
        if layer == len(self.self_attention):
            self.self_attention.append((key, value))
        else:
            keys, values = self.self_attention[layer]
            self.self_attention[layer] = torch.cat([keys, key], dim=1), torch.cat([values, value], dim=1)
        return self.self_attention[layer]

    def select(self, rows: Tensor) -> None:
        """Keep these rows of the batch, in this order: rows (B,), int64; one may appear more than once."""
        for pairs in (self.self_attention, self.cross_attention):
            pairs[:] = [(key.index_select(0, rows), value.index_select(0, rows)) for key, value in pairs]

    def check(self, layers: int, B: int, heads: int, head_size: int, encoder_length: int | None) -> None:
        """Raise ValueError unless it is empty, or filled by a model of these sizes with B rows.

        encoder_length: of the encoder's output that the model is given now, None for none.
        """
        for pairs, name in ((self.self_attention, "layers"), (self.cross_attention, "layers of cross-attention")):
            if len(pairs) not in (0, layers):
                raise ValueError(f"past_key_values must hold {layers} {name}, those of the model, got {len(pairs)}")
            for index, (key, value) in enumerate(pairs):
                length = pairs[0][0].shape[1]
                if tuple(key.shape) != (B, length, heads, head_size) or value.shape != key.shape:
                    raise ValueError(
                        f"past_key_values must have shape (B, S, H, D) = {(B, length, heads, head_size)} for this "
                        f"batch and model, got {tuple(key.shape)} in layer {index} of its {name}"
                    )
        cached = self.cross_attention[0][0].shape[1] if self.cross_attention else None
        if self.self_attention and cached != encoder_length:
            raise ValueError(
                f"past_key_values was filled with encoder_hidden_states of length {cached}, but now their length is "
                f"{encoder_length}; give the same ones in every call, or start with an empty Cache"
            )


def _from_lists(lists: Iterable[list[tuple[Tensor, Tensor]]], _: None) -> Cache:
    cache = Cache()
    cache.self_attention, cache.cross_attention = lists
    return cache


# So that torch.export takes and returns it, and loads the example of one that is in a saved program.
torch.serialization.add_safe_globals([Cache])
pytree.register_pytree_node(
    Cache,
    lambda cache: ([cache.self_attention, cache.cross_attention], None),
    _from_lists,
    serialized_type_name="fastconv.reference.cache.Cache",
    flatten_with_keys_fn=lambda cache: (
        [(pytree.GetAttrKey(name), getattr(cache, name)) for name in ("self_attention", "cross_attention")],
        None,
    ),
)
