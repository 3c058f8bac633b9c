"""The embeddings of the models: rows of their tables, LayerNorm and dropout in one op."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastconv.nn._plain import bare, dropout_p, plain_dropout, plain_layer_norm
from fastconv.ops import embedding_norm


class Embeddings:
    """The fused forward of this library's embeddings."""

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        past_length: int = 0,
    ) -> torch.Tensor:
        """dropout(LayerNorm(word + position + token type)): ids (B, S), or inputs_embeds (B, S, E) -> (B, S, E)."""
        if not plain(self):
            return super().forward(  # type: ignore[misc]
                input_ids, token_type_ids, position_ids, inputs_embeds, past_length
            )
        places = _places(self, input_ids, inputs_embeds, token_type_ids, position_ids, past_length)
        return _normalized(self, input_ids, inputs_embeds, places)


class RoCBertEmbeddings:
    """The fused forward of this library's RoCBert embeddings."""

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        input_shape_ids: torch.Tensor | None = None,
        input_pronunciation_ids: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        past_length: int = 0,
    ) -> torch.Tensor:
        """ids (B, S), or for the words inputs_embeds (B, S, C) -> (B, S, C)."""
        if not plain(self):
            return super().forward(  # type: ignore[misc]
                input_ids,
                input_shape_ids,
                input_pronunciation_ids,
                token_type_ids,
                position_ids,
                inputs_embeds,
                past_length,
            )
        places = _places(self, input_ids, inputs_embeds, token_type_ids, position_ids, past_length)
        return _with_streams(self, input_ids, input_shape_ids, input_pronunciation_ids, inputs_embeds, places)


class TransformersEmbeddings:
    """The fused forward of transformers' BertEmbeddings."""

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        past_key_values_length: int = 0,
    ) -> torch.Tensor:
        """dropout(LayerNorm(word + position + token type)): ids (B, S), or inputs_embeds (B, S, E) -> (B, S, E)."""
        if not plain(self):
            return super().forward(  # type: ignore[misc]
                input_ids, token_type_ids, position_ids, inputs_embeds, past_key_values_length
            )
        places = _places(self, input_ids, inputs_embeds, token_type_ids, position_ids, past_key_values_length)
        return _normalized(self, input_ids, inputs_embeds, places[::-1])


class TransformersConvBertEmbeddings:
    """The fused forward of transformers' ConvBertEmbeddings."""

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """dropout(LayerNorm(word + position + token type)): ids (B, S), or inputs_embeds (B, S, E) -> (B, S, E)."""
        if not plain(self):
            return super().forward(input_ids, token_type_ids, position_ids, inputs_embeds)  # type: ignore[misc]
        places = _places(self, input_ids, inputs_embeds, token_type_ids, position_ids, 0)
        return _normalized(self, input_ids, inputs_embeds, places)


class TransformersRoCBertEmbeddings:
    """The fused forward of transformers' RoCBertEmbeddings."""

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        input_shape_ids: torch.Tensor | None = None,
        input_pronunciation_ids: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        past_key_values_length: int = 0,
    ) -> torch.Tensor:
        """ids (B, S), or for the words inputs_embeds (B, S, C) -> (B, S, C)."""
        if not plain(self):
            return super().forward(  # type: ignore[misc]
                input_ids,
                input_shape_ids,
                input_pronunciation_ids,
                token_type_ids,
                position_ids,
                inputs_embeds,
                past_key_values_length,
            )
        places = _places(self, input_ids, inputs_embeds, token_type_ids, position_ids, past_key_values_length)
        return _with_streams(self, input_ids, input_shape_ids, input_pronunciation_ids, inputs_embeds, places[::-1])


def plain(module: Any) -> bool:
    """Whether embedding_norm computes what a module's parts do. Words may be an adapter's: they are called then."""
    tables = [module.token_type_embeddings] + [module.position_embeddings] * _absolute(module)
    return (
        all(_plain_embedding(table) for table in tables)
        and plain_layer_norm(module.LayerNorm)
        and plain_dropout(module.dropout)
    )


def _plain_embedding(module: Any) -> bool:
    """Whether the module is nothing but nn.Embedding, with a table that stays as it is and a dense gradient."""
    return (
        type(module) is nn.Embedding
        and module.max_norm is None
        and not module.scale_grad_by_freq
        and not module.sparse
        and bare(module)
    )


def _absolute(module: Any) -> bool:
    """Whether positions are added: transformers 5 and ConvBERT know no others."""
    if hasattr(module, "absolute_positions"):
        return module.absolute_positions
    return getattr(module, "position_embedding_type", "absolute") == "absolute"


# Tables with the ids of their rows, in the order in which the originals add them, so that sums have the same bits.
_Places = list[tuple[nn.Embedding, torch.Tensor | None]]


def _places(
    module: Any,
    input_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
    token_type_ids: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    past_length: int,
) -> _Places:
    """Positions, if they are added, and token types; where none are given they count from past_length, and are 0.

    The modules of transformers have both as buffers, and take token types by their position. Those of BERT and RoCBert
    add token types first.
    """
    tokens = inputs_embeds if input_ids is None else input_ids
    assert tokens is not None  # the models have checked
    S, buffered = tokens.shape[1], hasattr(module, "position_ids")
    if token_type_ids is None and not buffered:
        token_type_ids = torch.zeros(1, S, dtype=torch.long, device=tokens.device)
    elif token_type_ids is None and position_ids is None:
        token_type_ids = module.token_type_ids[:, :S]
    elif token_type_ids is None:
        # Of positions that are given there may be more than the buffer has.
        token_type_ids = module.token_type_ids[0][position_ids]
    if position_ids is None and buffered:
        position_ids = module.position_ids[:, past_length : past_length + S]
    elif position_ids is None and past_length:
        position_ids = torch.arange(past_length, past_length + S, device=tokens.device)
    places: _Places = [(module.position_embeddings, position_ids)] if _absolute(module) else []
    return [*places, (module.token_type_embeddings, token_type_ids)]


def _normalized(
    module: Any, input_ids: torch.Tensor | None, embeds: torch.Tensor | None, places: _Places
) -> torch.Tensor:
    """dropout(LayerNorm(words or embeds + places)): -> (B, S, C)."""
    if embeds is None:
        if _plain_embedding(module.word_embeddings):
            places = [(module.word_embeddings, input_ids), *places]
        else:
            embeds = module.word_embeddings(input_ids)
    norm = module.LayerNorm
    return embedding_norm(
        [ids for _, ids in places],
        [table.weight for table, _ in places],
        norm.weight,
        norm.bias,
        norm.eps,
        embeds=embeds,
        padding_idx=[table.padding_idx for table, _ in places],
        dropout_p=dropout_p(module.dropout),
    )


def _with_streams(
    module: Any,
    input_ids: torch.Tensor | None,
    shape_ids: torch.Tensor | None,
    pronunciation_ids: torch.Tensor | None,
    embeds: torch.Tensor | None,
    places: _Places,
) -> torch.Tensor:
    """RoCBert's: shapes and pronunciations are mapped with the words, or join the mean of what is normalized."""
    mapped = module.map_inputs_layer is not None
    if mapped:
        words: torch.Tensor = module.word_embeddings(input_ids) if embeds is None else embeds
        missing = torch.zeros(words.shape[:2], dtype=torch.long, device=words.device)
        shape_ids = missing if shape_ids is None else shape_ids
        pronunciation_ids = missing if pronunciation_ids is None else pronunciation_ids
    streams = []
    if module.enable_shape and shape_ids is not None:
        streams.append(module.shape_embed(shape_ids))
    if module.enable_pronunciation and pronunciation_ids is not None:
        streams.append(module.pronunciation_embed(pronunciation_ids))
    if mapped:
        embeds = module.map_inputs_layer(torch.cat([words, *streams], dim=-1))
        return _normalized(module, None, embeds, places)
    normalized = _normalized(module, input_ids, embeds, places)
    return sum(streams, normalized) / (1 + len(streams)) if streams else normalized
