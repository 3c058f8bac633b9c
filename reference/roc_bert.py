"""RoCBert: Su et al., "RoCBert: Robust Chinese Bert with Multimodal Contrastive Pretraining" (2022).

It is BERT over three streams of ids: a token's own, that of its shape, and that of its pronunciation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .bert import bert_encoder, encode
from .cache import Cache
from .config import RoCBertConfig
from .inputs import check_devices, check_ids, check_inputs, choose_cache
from .layers import Embeddings, Pooler
from .model import Model


class RoCBertEmbeddings(Embeddings):
    """The embeddings of words, shapes and pronunciations in one, with those of positions and token types.

    concat_input: LayerNorm(map([word, shape, pronunciation]) + position + token type), then dropout; ids that are
    missing count as 0. Else the mean of LayerNorm(word + position + token type), after dropout, and of the embeddings
    of those ids that are given. What the config disables is left out, but has its parameters in the checkpoints.
    """

    def __init__(self, config: RoCBertConfig) -> None:
        super().__init__(config, config.hidden_size)
        pad = config.pad_token_id
        self.shape_embed = nn.Embedding(config.shape_vocab_size, config.shape_embed_dim, padding_idx=pad)
        self.pronunciation_embed = nn.Embedding(
            config.pronunciation_vocab_size, config.pronunciation_embed_dim, padding_idx=pad
        )
        self.enable_shape = config.enable_shape
        self.enable_pronunciation = config.enable_pronunciation
        size = config.hidden_size
        size += config.shape_embed_dim if config.enable_shape else 0
        size += config.pronunciation_embed_dim if config.enable_pronunciation else 0
        self.map_inputs_layer = nn.Linear(size, config.hidden_size) if config.concat_input else None

    def forward(  # type: ignore[override]  # three streams of ids
        self,
        input_ids: Tensor | None = None,
        input_shape_ids: Tensor | None = None,
        input_pronunciation_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_length: int = 0,
    ) -> Tensor:
        """ids (B, S), or for the words inputs_embeds (B, S, C) -> (B, S, C).

        Positions count from past_length, the number of cached tokens; token types are 0 by default.
        """
        words = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        places = token_type_ids, position_ids, past_length
        if self.map_inputs_layer is None:
            normalized = self.dropout(self.LayerNorm(self.add_places(words, *places)))
            streams = [normalized, *self.streams(input_shape_ids, input_pronunciation_ids)]
            return sum(streams[1:], streams[0]) / len(streams)
        missing = torch.zeros(words.shape[:2], dtype=torch.long, device=words.device)
        shape_ids = missing if input_shape_ids is None else input_shape_ids
        pronunciation_ids = missing if input_pronunciation_ids is None else input_pronunciation_ids
        mapped = self.map_inputs_layer(torch.cat([words, *self.streams(shape_ids, pronunciation_ids)], dim=-1))
        return self.dropout(self.LayerNorm(self.add_places(mapped, *places)))

    def streams(self, shape_ids: Tensor | None, pronunciation_ids: Tensor | None) -> list[Tensor]:
        """The embeddings (B, S, E) of shapes and of pronunciations, of those that are given and not disabled."""
        found = []
        if self.enable_shape and shape_ids is not None:
            found.append(self.shape_embed(shape_ids))
        if self.enable_pronunciation and pronunciation_ids is not None:
            found.append(self.pronunciation_embed(pronunciation_ids))
        return found

    def check(self, words: str, B: int, S: int, shape_ids: Tensor | None, pronunciation_ids: Tensor | None) -> None:
        """Check the ids of shapes and pronunciations against the (B, S) of `words`, input_ids or inputs_embeds.

        Raises:
            ValueError: another shape. TypeError: no integers. IndexError: ids outside their table, if that is used.
        """
        for name, ids, table, enabled in (
            ("shape", shape_ids, self.shape_embed, self.enable_shape),
            ("pronunciation", pronunciation_ids, self.pronunciation_embed, self.enable_pronunciation),
        ):
            if ids is None:
                continue
            if tuple(ids.shape) != (B, S):
                raise ValueError(
                    f"input_{name}_ids must have the (B, S) of {words}, {(B, S)}, one id a token, "
                    f"got {tuple(ids.shape)}"
                )
            if enabled:
                check_ids(f"input_{name}_ids", ids, B, S, f"{name}_vocab_size", table.num_embeddings)


class RoCBertPreTrainedModel(Model):
    """Base of the RoCBert models."""

    config_class = RoCBertConfig
    base_model_prefix = "roc_bert"
    config: RoCBertConfig


class RoCBertModel(RoCBertPreTrainedModel):
    """The encoder, or the decoder that the config asks for; a pooler over the first token if `add_pooling_layer`."""

    def __init__(self, config: RoCBertConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config)
        self.embeddings = RoCBertEmbeddings(config)
        self.encoder = bert_encoder(config)
        self.pooler = Pooler(config) if add_pooling_layer else None
        self.init_weights()

    def get_shape_embeddings(self) -> nn.Embedding:
        """The embeddings of shapes."""
        return self.embeddings.shape_embed

    def set_shape_embeddings(self, value: nn.Embedding) -> None:
        """Replace the embeddings of shapes."""
        self.embeddings.shape_embed = value

    def get_pronunciation_embeddings(self) -> nn.Embedding:
        """The embeddings of pronunciations."""
        return self.embeddings.pronunciation_embed

    def set_pronunciation_embeddings(self, value: nn.Embedding) -> None:
        """Replace the embeddings of pronunciations."""
        self.embeddings.pronunciation_embed = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        input_shape_ids: Tensor | None = None,
        input_pronunciation_ids: Tensor | None = None,
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
            input_shape_ids, input_pronunciation_ids: (B, S), int64 or int32, of the same tokens. If None they count as
                0 where the config says concat_input, and are left out otherwise.
            inputs_embeds: (B, S, C), instead of input_ids; the other two streams stay ids.
            attention_mask, token_type_ids, position_ids, head_mask, encoder_hidden_states, encoder_attention_mask,
                past_key_values, use_cache, output_attentions, output_hidden_states, return_dict: as of BertModel.

        Returns:
            BaseModelOutputWithPoolingAndCrossAttentions, or the tuple of its values.

        Raises:
            ValueError, TypeError, IndexError: as BertModel, and see `RoCBertEmbeddings.check`.
        """
        config = self.config
        check_devices(
            self,
            input_ids=input_ids,
            input_shape_ids=input_shape_ids,
            input_pronunciation_ids=input_pronunciation_ids,
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
        places = token_type_ids, position_ids, inputs_embeds, past_length
        B, S = check_inputs(config, config.hidden_size, input_ids, *places)
        words = "inputs_embeds" if input_ids is None else "input_ids"
        self.embeddings.check(words, B, S, input_shape_ids, input_pronunciation_ids)
        return encode(
            self,
            self.embeddings(input_ids, input_shape_ids, input_pronunciation_ids, *places),
            attention_mask,
            head_mask,
            encoder_hidden_states,
            encoder_attention_mask,
            cache,
            output_attentions,
            output_hidden_states,
            return_dict,
        )
