"""Self-attention of BERT: one product for query, key and value, then masked_attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastconv.nn._plain import dropout_p, plain_dropout
from fastconv.nn.packed_linear import packed_linear
from fastconv.ops import masked_attention

# Arguments of the callers' signatures that the fused forward has no part for; None and False ask for nothing.
_BEYOND = (
    "head_mask",
    "encoder_hidden_states",
    "past_key_values",
    "past_key_value",
    "output_attentions",
)


class FastForward:
    """A forward that stands in for another class's where it can, and calls that class's where it can't.

    Put before the original class in the bases of a subclass, to which the module's `__class__` is set.
    """

    fastconv_config: Any = None  # the model's config: transformers may ask for attentions through it alone

    def fits(self, hidden_states: torch.Tensor, mask: torch.Tensor | None, args: tuple, kwargs: dict) -> bool:
        """Whether a self-attention call asks only for what the fused forward does."""
        if any(argument is not None and argument is not False for argument in args):
            return False
        for name in _BEYOND:
            argument = kwargs.get(name)
            if argument is not None and argument is not False:
                return False
        if mask is not None and not (isinstance(mask, torch.Tensor) and mask.dim() == 4):
            return False
        if getattr(self.fastconv_config, "output_attentions", False):
            return False
        return (
            hidden_states.dim() == 3
            and hidden_states.shape[1] > 0
            and getattr(self, "position_embedding_type", "absolute") == "absolute"
            and not getattr(self, "is_causal", False)
            and not getattr(self, "is_decoder", False)
            and plain_dropout(self.dropout)  # type: ignore[attr-defined]
        )


def attend(
    module: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """masked_attention of a module's heads: q, k, v (B, S, H*D), mask (B, 1 or H, S, S) -> (B, S, H*D)."""
    heads = (module.num_attention_heads, module.attention_head_size)
    if mask is not None and mask.stride(2) == 0:
        # Expanded over the queries: one row says it all.
        mask = mask[:, :, :1]
    p = dropout_p(module.dropout)
    y = masked_attention(*(t.unflatten(-1, heads) for t in (q, k, v)), mask=mask, dropout_p=p)
    return y.flatten(2)


class SelfAttention(FastForward):
    """The fused forward of BertSelfAttention, for this library's class and those of transformers 4.57 and 5.x."""

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, S, C) -> ((B, S, C), None); other calls go to the original, probabilities included."""
        if not self.fits(hidden_states, attention_mask, args, kwargs):
            return super().forward(hidden_states, attention_mask, *args, **kwargs)  # type: ignore[misc]
        q, k, v = packed_linear(hidden_states, self.fastconv_packed())
        return attend(self, q, k, v, attention_mask), None  # type: ignore[arg-type]

    def fastconv_packed(self) -> tuple[nn.Module, ...]:
        """The layers whose parameters are packed."""
        return self.query, self.key, self.value  # type: ignore[attr-defined]
