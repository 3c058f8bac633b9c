"""Self-attention of BERT: one product for query, key and value, then masked_attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastconv.nn._plain import dropout_p, plain_dropout
from fastconv.nn.packed_linear import packed_linear
from fastconv.ops import masked_attention
from fastconv.ops._eager import autocasting
from fastconv.ops.masked_attention import attention

# Keyword arguments that callers pass on and that no self-attention looks at.
_IGNORED = {
    "position_ids",
    "cache_position",
    "use_cache",
    "output_hidden_states",
    "return_dict",
    "num_items_in_batch",
}
# transformers' names of the implementations that compute plain attention; others are somebody's own.
_PLAIN_ATTENTION = (None, "eager", "sdpa", "flash_attention_2", "flash_attention_3")


class FastForward:
    """A forward that stands in for another class's where it can, and calls that class's where it can't.

    Put before the original class in the bases of a subclass, to which the module's `__class__` is set.
    """

    fastconv_config: Any = None  # the model's config: transformers may ask for attentions through it alone

    def fits(self, hidden_states: torch.Tensor, mask: torch.Tensor | None, args: tuple, kwargs: dict) -> bool:
        """Whether a self-attention call asks only for what the fused forward does."""
        if any(argument is not None and argument is not False for argument in args):
            return False
        for name, argument in kwargs.items():
            if argument is not None and argument is not False and name not in _IGNORED:
                return False
        if mask is not None and not _fits_scores(mask):
            return False
        return (
            hidden_states.dim() == 3
            and hidden_states.shape[1] > 0
            and getattr(self, "position_embedding_type", "absolute") == "absolute"
            and not getattr(self, "is_causal", False)
            and not getattr(self, "is_decoder", False)
            and getattr(self.fastconv_config, "_attn_implementation", None) in _PLAIN_ATTENTION
            and plain_dropout(self.dropout)  # type: ignore[attr-defined]
            and not self._observed()
        )

    def _observed(self) -> bool:
        """Whether somebody may look at the probabilities, which the fused forward doesn't make."""
        if getattr(self.fastconv_config, "output_attentions", False):
            return True
        for hook in self._forward_hooks.values():  # type: ignore[attr-defined]
            # transformers 5.x leaves hooks of its own on the module, which keep attentions if the config says so.
            own = getattr(hook, "__module__", "") == "transformers.utils.output_capturing"
            if not own or not hasattr(self.fastconv_config, "output_attentions"):
                return True
        return False


def _fits_scores(mask: Any) -> bool:
    """Whether a mask is what scaled_dot_product_attention takes; others (BlockMask, integers) are the original's."""
    return isinstance(mask, torch.Tensor) and mask.dim() == 4 and (mask.dtype == torch.bool or mask.is_floating_point())


def attend(module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Attention of a module's heads: q, k, v (B, S, H*D), mask (B, 1 or H, S, S) -> (B, S, H*D)."""
    heads = (module.num_attention_heads, module.attention_head_size)
    q, k, v = (t.unflatten(-1, heads) for t in (q, k, v))
    p = dropout_p(module.dropout)
    if mask is not None and mask.stride(2) == 0:
        # Expanded over the queries: one row says it all.
        mask = mask[:, :, :1]
    if mask is not None and _ready(module, mask, q.dtype):
        y = attention(q, k, v, mask, p)
    else:
        y = masked_attention(q, k, v, mask=mask, dropout_p=p)
    return y.flatten(2)


def _ready(module: nn.Module, mask: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether scaled_dot_product_attention may get a model's mask as it is, which saves a pass over it in every layer.

    Models add finite numbers to the scores, so there is no -inf to replace. A bool mask is one that transformers made
    for scaled_dot_product_attention: a row without a key is what that makes of it.
    """
    if mask.dtype == torch.bool:
        return getattr(module.fastconv_config, "_attn_implementation", None) == "sdpa"
    return mask.dtype == dtype and not autocasting(mask)


class SelfAttention(FastForward):
    """The fused forward of BertSelfAttention, for this library's class and those of transformers 4.57 and 5.x."""

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, S, C) -> ((B, S, C), None); other calls go to the original, probabilities included."""
        if not self.fits(hidden_states, attention_mask, args, kwargs):
            return super().forward(hidden_states, attention_mask, *args, **kwargs)  # type: ignore[misc]
        q, k, v = packed_linear(hidden_states, self.fastconv_packed())
        return attend(self, q, k, v, attention_mask), None

    def fastconv_packed(self) -> tuple[nn.Module, ...]:
        """The layers whose parameters are packed."""
        return self.query, self.key, self.value  # type: ignore[attr-defined]
