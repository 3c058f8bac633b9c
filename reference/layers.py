"""The layers that the families share. Attribute names give the parameter names of the published checkpoints."""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from . import ops
from .cache import Cache
from .config import Config, ConvBertConfig
from .outputs import BaseModelOutputWithCrossAttentions


class SelfAttention(Protocol):
    """What every family's attention module can do: self-attention or, with encoder_hidden_states, cross-attention."""

    def __call__(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        head_mask: Tensor | None,
        output_attentions: bool,
        encoder_hidden_states: Tensor | None = None,
        past_key_values: Cache | None = None,
    ) -> tuple[Tensor, Tensor | None]: ...


class Embeddings(nn.Module):
    """LayerNorm(word + position + token type), then dropout. Relative positions are not added here."""

    def __init__(self, config: Config, size: int) -> None:
        super().__init__()
        self.absolute_positions = getattr(config, "position_embedding_type", "absolute") == "absolute"
        self.word_embeddings = nn.Embedding(config.vocab_size, size, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, size)
        self.LayerNorm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        input_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_length: int = 0,
    ) -> Tensor:
        """ids (B, S), or inputs_embeds (B, S, E) -> (B, S, E).

        Positions count from past_length, the number of cached tokens; token types are 0 by default.
        """
        words = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        return self.dropout(self.LayerNorm(self.add_places(words, token_type_ids, position_ids, past_length)))

    def add_places(
        self, words: Tensor, token_type_ids: Tensor | None, position_ids: Tensor | None, past_length: int
    ) -> Tensor:
        """(B, S, E) + the embeddings of positions, if they are absolute, and of token types."""
        S = words.shape[1]
        if token_type_ids is None:
            token_type_ids = torch.zeros(1, S, dtype=torch.long, device=words.device)
        if self.absolute_positions:
            if position_ids is None:
                position_ids = torch.arange(past_length, past_length + S, device=words.device)
            words = words + self.position_embeddings(position_ids)
        return words + self.token_type_embeddings(token_type_ids)


class GroupedLinear(nn.Module):
    """A linear layer over groups of channels: see `ops.grouped_linear`.

    Raises:
        ValueError: a number of groups that is no divisor of both sizes.
    """

    def __init__(self, size_in: int, size_out: int, num_groups: int) -> None:
        super().__init__()
        if num_groups < 1 or size_in % num_groups or size_out % num_groups:
            raise ValueError(
                f"num_groups must be at least 1 and divide size_in {size_in} and size_out {size_out}, got {num_groups}"
            )
        self.num_groups = num_groups
        self.weight = nn.Parameter(torch.empty(num_groups, size_in // num_groups, size_out // num_groups))
        self.bias = nn.Parameter(torch.zeros(size_out))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """(..., size_in) -> (..., size_out)."""
        return ops.grouped_linear(x, self.weight, self.bias)


class SeparableConv1D(nn.Module):
    """A depthwise and a pointwise convolution along the sequence: see `ops.separable_conv`.

    Raises:
        ValueError: an even kernel_size.
    """

    def __init__(self, size_in: int, size_out: int, kernel_size: int) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        padding = kernel_size // 2
        self.depthwise = nn.Conv1d(size_in, size_in, kernel_size, padding=padding, groups=size_in, bias=False)
        self.pointwise = nn.Conv1d(size_in, size_out, 1, bias=False)
        self.bias = nn.Parameter(torch.zeros(size_out, 1))

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        """(B, S, size_in), gate (B, S, size_out) -> (B, S, size_out)."""
        return ops.separable_conv(x, self.depthwise.weight, self.pointwise.weight, self.bias, gate=gate)


def feed_forward_linear(config: Config, size_in: int, size_out: int) -> nn.Module:
    """The linear layer of a feed-forward network: grouped if a ConvBERT config asks for groups."""
    if isinstance(config, ConvBertConfig) and config.num_groups > 1:
        return GroupedLinear(size_in, size_out, config.num_groups)
    return nn.Linear(size_in, size_out)


class ResidualOutput(nn.Module):
    """LayerNorm(dropout(dense(hidden)) + input): the end of the attention and of the feed-forward network."""

    def __init__(self, config: Config, dense: nn.Module) -> None:
        super().__init__()
        self.dense = dense
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        """(B, S, I), (B, S, C) -> (B, S, C)."""
        return self.LayerNorm(self.dropout(self.dense(hidden_states)) + input_tensor)


class Intermediate(nn.Module):
    """activation(dense(hidden)): the first half of the feed-forward network."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.dense = feed_forward_linear(config, config.hidden_size, config.intermediate_size)
        self.activation = config.hidden_act

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, S, C) -> (B, S, I)."""
        return ops.get_activation(self.activation)(self.dense(hidden_states))


class Attention(nn.Module):
    """Self-attention and what follows it. `self` is the module's name in the checkpoints."""

    def __init__(self, config: Config, self_attention: nn.Module) -> None:
        super().__init__()
        self.self = self_attention
        self.output = ResidualOutput(config, nn.Linear(config.hidden_size, config.hidden_size))

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        head_mask: Tensor | None = None,
        output_attentions: bool = False,
        encoder_hidden_states: Tensor | None = None,
        past_key_values: Cache | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """(B, Sq, C), or with the encoder's (B, Sk, C) -> (B, Sq, C), and the probabilities (B, H, Sq, Sk) or None."""
        context, probabilities = self.self(
            hidden_states, attention_mask, head_mask, output_attentions, encoder_hidden_states, past_key_values
        )
        return self.output(context, hidden_states), probabilities


class EncoderLayer(nn.Module):
    """One layer: attention, cross-attention if there is one, then the feed-forward network, in chunks of tokens if the
    config says so.
    """

    def __init__(self, config: Config, self_attention: nn.Module, cross_attention: nn.Module | None = None) -> None:
        super().__init__()
        self.chunk_size_feed_forward = config.chunk_size_feed_forward
        self.attention = Attention(config, self_attention)
        if cross_attention is not None:
            self.crossattention = Attention(config, cross_attention)
        self.intermediate = Intermediate(config)
        self.output = ResidualOutput(config, feed_forward_linear(config, config.intermediate_size, config.hidden_size))

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        head_mask: Tensor | None = None,
        output_attentions: bool = False,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(B, S, C) -> (B, S, C), and the probabilities (B, H, Sq, Sk) of attention and cross-attention, or None."""
        size = self.chunk_size_feed_forward
        if size and hidden_states.shape[1] % size:  # before the cache gets what a failed call leaves in it
            raise ValueError(
                f"the sequence length must be divisible by chunk_size_feed_forward {size}, got {hidden_states.shape[1]}"
            )
        attended, probabilities = self.attention(
            hidden_states, attention_mask, head_mask, output_attentions, past_key_values=past_key_values
        )
        cross_probabilities = None
        if encoder_hidden_states is not None:
            attended, cross_probabilities = self.crossattention(
                attended, encoder_attention_mask, head_mask, output_attentions, encoder_hidden_states, past_key_values
            )
        if size == 0:
            return self.output(self.intermediate(attended), attended), probabilities, cross_probabilities
        chunks = [self.output(self.intermediate(chunk), chunk) for chunk in attended.split(size, dim=1)]
        return torch.cat(chunks, dim=1), probabilities, cross_probabilities


class Encoder(nn.Module):
    """The stack of layers. `gradient_checkpointing`: in training, compute every layer again in the backward pass."""

    def __init__(self, layers: list[EncoderLayer]) -> None:
        super().__init__()
        self.layer = nn.ModuleList(layers)
        self.gradient_checkpointing = False
        self.checkpoint_options: dict[str, Any] = {"use_reentrant": False}

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        head_mask: Tensor | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
    ) -> BaseModelOutputWithCrossAttentions:
        """(B, S, C) -> the last hidden state, and what is asked for of all hidden states (the input first) and of all
        probabilities.

        attention_mask and encoder_attention_mask are additive, broadcastable to (B, H, Sq, Sk); head_mask has one entry
        a layer.
        """
        states = [hidden_states] if output_hidden_states else []
        attentions, cross_attentions = [], []
        for index, layer in enumerate(self.layer):
            arguments = (
                hidden_states,
                attention_mask,
                None if head_mask is None else head_mask[index],
                output_attentions,
                encoder_hidden_states,
                encoder_attention_mask,
            )
            checkpointing = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
            if checkpointing and past_key_values is None:
                outputs = torch.utils.checkpoint.checkpoint(layer, *arguments, **self.checkpoint_options)
            else:
                outputs = layer(*arguments, past_key_values)
            hidden_states, probabilities, cross_probabilities = outputs
            # What nobody asks for must not be kept alive until the last layer.
            if output_hidden_states:
                states.append(hidden_states)
            if output_attentions:
                attentions.append(probabilities)
                cross_attentions.append(cross_probabilities)
        crossed = output_attentions and encoder_hidden_states is not None
        return BaseModelOutputWithCrossAttentions(
            last_hidden_state=hidden_states,
            hidden_states=tuple(states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
            cross_attentions=tuple(cross_attentions) if crossed else None,
        )


class Pooler(nn.Module):
    """tanh(dense(first token))."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, S, C) -> (B, C)."""
        return torch.tanh(self.dense(hidden_states[:, 0]))


class PredictionTransform(nn.Module):
    """LayerNorm(activation(dense(hidden))): what a masked language model does before its decoder."""

    def __init__(self, config: Config, size_out: int, activation: str) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, size_out)
        self.LayerNorm = nn.LayerNorm(size_out, eps=config.layer_norm_eps)
        self.activation = activation

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, S, C) -> (B, S, size_out)."""
        return self.LayerNorm(ops.get_activation(self.activation)(self.dense(hidden_states)))
