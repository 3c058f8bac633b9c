"""BERT: Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers" (2018)."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .cache import Cache
from .config import BertConfig, RoCBertConfig
from .inputs import additive_mask, check_devices, check_encoder_states, check_inputs, choose_cache, expand_head_mask
from .layers import Embeddings, Encoder, EncoderLayer, Pooler
from .model import Model, choose, maybe_tuple
from .outputs import BaseModelOutputWithPoolingAndCrossAttentions


class BertSelfAttention(nn.Module):
    """Multi-head attention of every token to every token, or to an encoder's (`cross`).

    Relative positions, if the config asks for them, count in self-attention only.
    """

    def __init__(self, config: BertConfig | RoCBertConfig, layer_index: int, cross: bool = False) -> None:
        super().__init__()
        self.layer_index = layer_index
        self.num_attention_heads = config.num_attention_heads
        self.attention_head_size = config.hidden_size // config.num_attention_heads
        self.all_head_size = config.hidden_size
        self.position_embedding_type = "absolute" if cross else config.position_embedding_type
        self.query = nn.Linear(config.hidden_size, self.all_head_size)
        self.key = nn.Linear(config.hidden_size, self.all_head_size)
        self.value = nn.Linear(config.hidden_size, self.all_head_size)
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)
        if self.position_embedding_type != "absolute":
            self.distance_embedding = nn.Embedding(2 * config.max_position_embeddings - 1, self.attention_head_size)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        head_mask: Tensor | None = None,
        output_attentions: bool = False,
        encoder_hidden_states: Tensor | None = None,
        past_key_values: Cache | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """(B, Sq, C), or with the encoder's (B, Sk, C) -> (B, Sq, C), and the probabilities (B, H, Sq, Sk) or None.

        attention_mask is added to the scores, head_mask multiplies the probabilities; both broadcast to (B, H, Sq, Sk).
        past_key_values is filled with what was computed here.
        """
        q = self.query(hidden_states).unflatten(-1, (self.num_attention_heads, self.attention_head_size))
        k, v = self._keys_and_values(hidden_states, encoder_hidden_states, past_key_values)
        bias = None
        if self.position_embedding_type != "absolute":
            with_keys = self.position_embedding_type == "relative_key_query"
            bias = ops.relative_scores(q, k, self.distance_embedding.weight, with_keys=with_keys)
        probabilities = self.dropout(ops.attention_probabilities(q, k, mask=attention_mask, bias=bias))
        if head_mask is not None:
            probabilities = probabilities * head_mask
        context = torch.einsum("bhqk,bkhd->bqhd", probabilities, v).flatten(2)
        return context, probabilities if output_attentions else None

    def _keys_and_values(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor | None, cache: Cache | None
    ) -> tuple[Tensor, Tensor]:
        """(B, Sk, H, D) each; those of an encoder are computed once, those of earlier tokens come from the cache."""
        if encoder_hidden_states is not None and cache is not None and self.layer_index < len(cache.cross_attention):
            return cache.cross_attention[self.layer_index]
        states = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        k = self.key(states).unflatten(-1, (self.num_attention_heads, self.attention_head_size))
        v = self.value(states).unflatten(-1, (self.num_attention_heads, self.attention_head_size))
        if cache is None:
            return k, v
        if encoder_hidden_states is None:
            return cache.append(self.layer_index, k, v)
        cache.cross_attention.append((k, v))
        return k, v


def bert_encoder(config: BertConfig | RoCBertConfig) -> Encoder:
    """The layers of BERT, with cross-attention if the config says so."""
    return Encoder(
        [
            EncoderLayer(
                config,
                BertSelfAttention(config, index),
                BertSelfAttention(config, index, cross=True) if config.add_cross_attention else None,
            )
            for index in range(config.num_hidden_layers)
        ]
    )


def encode(
    model: Any,
    hidden: Tensor,
    attention_mask: Tensor | None,
    head_mask: Tensor | None,
    encoder_hidden_states: Tensor | None,
    encoder_attention_mask: Tensor | None,
    cache: Cache | None,
    output_attentions: bool | None,
    output_hidden_states: bool | None,
    return_dict: bool | None,
) -> Any:
    """What BERT and RoCBert do with the embeddings `hidden` (B, S, C): masks, layers, pooler, output."""
    config, B, S, H = model.config, *hidden.shape[:2], model.config.num_attention_heads
    check_encoder_states(config, B, encoder_hidden_states, encoder_attention_mask)
    encoder_length = None if encoder_hidden_states is None else encoder_hidden_states.shape[1]
    if cache is not None:
        cache.check(config.num_hidden_layers, B, H, config.hidden_size // H, encoder_length)
    past_length = 0 if cache is None else cache.get_seq_length()
    make_mask = partial(additive_mask, dtype=hidden.dtype, device=hidden.device)
    output = model.encoder(
        hidden,
        make_mask(attention_mask, (B, H, S, past_length + S), causal=config.is_decoder),
        expand_head_mask(head_mask, config.num_hidden_layers, H, hidden.dtype),
        choose(output_attentions, config.output_attentions),
        choose(output_hidden_states, config.output_hidden_states),
        encoder_hidden_states,
        make_mask(encoder_attention_mask, (B, H, S, encoder_length or 0), name="encoder_attention_mask"),
        cache,
    )
    last = output.last_hidden_state
    pooled = BaseModelOutputWithPoolingAndCrossAttentions(
        last_hidden_state=last,
        pooler_output=None if model.pooler is None else model.pooler(last),
        hidden_states=output.hidden_states,
        past_key_values=cache,
        attentions=output.attentions,
        cross_attentions=output.cross_attentions,
    )
    return maybe_tuple(pooled, choose(return_dict, config.return_dict))


class BertPreTrainedModel(Model):
    """Base of the BERT models."""

    config_class = BertConfig
    base_model_prefix = "bert"
    config: BertConfig


class BertModel(BertPreTrainedModel):
    """The encoder, or the decoder that the config asks for; a pooler over the first token if `add_pooling_layer`."""

    def __init__(self, config: BertConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config)
        self.embeddings = Embeddings(config, config.hidden_size)
        self.encoder = bert_encoder(config)
        self.pooler = Pooler(config) if add_pooling_layer else None
        self.init_weights()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        *,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Encode a batch.

        Args:
            input_ids: (B, S), int64 or int32.
            attention_mask: (B, S) or (B, S, S), 1 for keys to attend to, 0 for others; or see `inputs.additive_mask`.
                With a cache S counts the cached tokens too. A decoder attends to no later token, unless the mask has
                more than two dimensions and says it all.
            token_type_ids: (B, S), 0 by default.
            position_ids: (B, S), by default 0, 1, 2, ..., or from the number of cached tokens on.
            head_mask: (heads,) or (layers, heads), 1 for heads to keep.
            inputs_embeds: (B, S, C), instead of input_ids.
            encoder_hidden_states: (B, Se, C), for the cross-attention of a decoder.
            encoder_attention_mask: (B, Se) or (B, S, Se), 1 for the encoder's tokens to attend to.
            past_key_values: what an earlier call returned, or an empty Cache; it is updated in place.
            use_cache: whether a decoder returns past_key_values; that of the config if None.
            output_attentions, output_hidden_states, return_dict: those of the config if None.

        Returns:
            BaseModelOutputWithPoolingAndCrossAttentions, or the tuple of its values.

        Raises:
            ValueError, TypeError, IndexError: see the functions of `inputs`, and `Cache.check`.
        """
        config = self.config
        check_devices(
            self,
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            head_mask=head_mask,
            inputs_embeds=inputs_embeds,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
        )
        checkpointing = self.is_gradient_checkpointing and self.training
        cache = choose_cache(config, past_key_values, use_cache, checkpointing)
        past_length = 0 if cache is None else cache.get_seq_length()
        check_inputs(config, config.hidden_size, input_ids, token_type_ids, position_ids, inputs_embeds, past_length)
        return encode(
            self,
            self.embeddings(input_ids, token_type_ids, position_ids, inputs_embeds, past_length),
            attention_mask,
            head_mask,
            encoder_hidden_states,
            encoder_attention_mask,
            cache,
            output_attentions,
            output_hidden_states,
            return_dict,
        )
