"""ConvBERT: Jiang et al., "ConvBERT: Improving BERT with Span-based Dynamic Convolution" (2020)."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import heads, ops
from .cache import Cache
from .config import ConvBertConfig
from .inputs import additive_mask, check_devices, check_encoder_states, check_inputs, expand_head_mask
from .layers import Embeddings, Encoder, EncoderLayer, PredictionTransform, SeparableConv1D
from .model import Model, check_same_size, choose, maybe_tuple
from .outputs import ModelOutput


class ConvBertSelfAttention(nn.Module):
    """Mixed attention: one half of the output channels attends, the other half is a span-based dynamic convolution.

    Padding is masked in the attention only. The convolutions see it, as in the original and in transformers.
    """

    def __init__(self, config: ConvBertConfig) -> None:
        super().__init__()
        self.num_attention_heads = config.attention_heads
        self.attention_head_size = config.attention_head_size
        self.all_head_size = self.num_attention_heads * self.attention_head_size
        self.conv_kernel_size = config.conv_kernel_size
        C, half = config.hidden_size, self.all_head_size
        self.query = nn.Linear(C, half)
        self.key = nn.Linear(C, half)
        self.value = nn.Linear(C, half)
        self.key_conv_attn_layer = SeparableConv1D(C, half, self.conv_kernel_size)
        self.conv_kernel_layer = nn.Linear(half, self.num_attention_heads * self.conv_kernel_size)
        self.conv_out_layer = nn.Linear(C, half)
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)

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
        The first C/2 output channels come from attention heads, the others from convolution heads. Those see
        hidden_states only, and later tokens too; so there is nothing that a cache could keep.
        """
        query = self.query(hidden_states)
        heads = (self.num_attention_heads, self.attention_head_size)
        states = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q = query.unflatten(-1, heads)
        k = self.key(states).unflatten(-1, heads)
        v = self.value(states).unflatten(-1, heads)
        probabilities = self.dropout(ops.attention_probabilities(q, k, mask=attention_mask))
        if head_mask is not None:
            probabilities = probabilities * head_mask
        attended = torch.einsum("bhqk,bkhd->bqhd", probabilities, v).flatten(2)

        span = self.key_conv_attn_layer(hidden_states, gate=query)
        kernel_logits = self.conv_kernel_layer(span)
        convolved = ops.span_dynamic_conv(self.conv_out_layer(hidden_states), kernel_logits, self.conv_kernel_size)
        return torch.cat([attended, convolved], dim=-1), probabilities if output_attentions else None


class ConvBertPreTrainedModel(Model):
    """Base of the ConvBERT models."""

    config_class = ConvBertConfig
    base_model_prefix = "convbert"
    config: ConvBertConfig


class ConvBertModel(ConvBertPreTrainedModel):
    """The encoder. `embeddings_project` is there if embedding_size is not hidden_size."""

    def __init__(self, config: ConvBertConfig) -> None:
        super().__init__(config)
        self.embeddings = Embeddings(config, config.embedding_size)
        if config.embedding_size != config.hidden_size:
            self.embeddings_project = nn.Linear(config.embedding_size, config.hidden_size)
        self.encoder = Encoder(
            [
                EncoderLayer(
                    config,
                    ConvBertSelfAttention(config),
                    ConvBertSelfAttention(config) if config.add_cross_attention else None,
                )
                for _ in range(config.num_hidden_layers)
            ]
        )
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
        *,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Encode a batch.

        Args:
            input_ids: (B, S), int64 or int32.
            attention_mask: (B, S) or (B, S, S), 1 for keys to attend to, 0 for others; or see `inputs.additive_mask`.
                With is_decoder no attention head attends to a later token, as in transformers 4 (transformers 5 does
                not look at is_decoder here), unless the mask has more than two dimensions and says it all.
            token_type_ids: (B, S), 0 by default.
            position_ids: (B, S), 0, 1, 2, ... by default.
            head_mask: (heads,) or (layers, heads), 1 for attention heads to keep; convolution heads are always kept.
            inputs_embeds: (B, S, embedding_size), instead of input_ids.
            encoder_hidden_states: (B, Se, C), for the cross-attention of a decoder.
            encoder_attention_mask: (B, Se) or (B, S, Se), 1 for the encoder's tokens to attend to.
            output_attentions, output_hidden_states, return_dict: those of the config if None.

        Returns:
            BaseModelOutputWithCrossAttentions, or the tuple of its values. In a row that is all padding attention is
            uniform, as in transformers; the original adds -10000 instead and attends by the scores.

        Raises:
            ValueError, TypeError, IndexError: see the functions of `inputs`.
        """
        config, heads = self.config, self.config.attention_heads
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
        B, S = check_inputs(config, config.embedding_size, input_ids, token_type_ids, position_ids, inputs_embeds)
        check_encoder_states(config, B, encoder_hidden_states, encoder_attention_mask)
        hidden = self.embeddings(input_ids, token_type_ids, position_ids, inputs_embeds)
        if config.embedding_size != config.hidden_size:
            hidden = self.embeddings_project(hidden)
        encoder_length = 0 if encoder_hidden_states is None else encoder_hidden_states.shape[1]
        make_mask = partial(additive_mask, dtype=hidden.dtype, device=hidden.device)
        output = self.encoder(
            hidden,
            make_mask(attention_mask, (B, heads, S, S), causal=config.is_decoder),
            expand_head_mask(head_mask, config.num_hidden_layers, heads, hidden.dtype),
            choose(output_attentions, config.output_attentions),
            choose(output_hidden_states, config.output_hidden_states),
            encoder_hidden_states,
            make_mask(encoder_attention_mask, (B, heads, S, encoder_length), name="encoder_attention_mask"),
        )
        return maybe_tuple(output, choose(return_dict, config.return_dict))


class ConvBertForMaskedLM(heads.MaskedLM, ConvBertPreTrainedModel):
    """ConvBERT with the masked language modelling head of its generator. Its activation is always the erf GELU."""

    def __init__(self, config: ConvBertConfig) -> None:
        super().__init__(config)
        self.convbert = ConvBertModel(config)
        self.generator_predictions = PredictionTransform(config, config.embedding_size, "gelu")
        self.generator_lm_head = nn.Linear(config.embedding_size, config.vocab_size)
        self.init_weights(skip=self.convbert)
        self.tie_weights()

    def get_output_embeddings(self) -> nn.Linear:
        return self.generator_lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        check_same_size(self.generator_lm_head, value)
        self.generator_lm_head = value

    def tie_weights(self) -> None:
        if self.config.tie_word_embeddings:
            self.generator_lm_head.weight = self.convbert.embeddings.word_embeddings.weight

    def logits(self, outputs: ModelOutput) -> Tensor:
        return self.generator_lm_head(self.generator_predictions(outputs["last_hidden_state"]))


class ConvBertClassificationHead(nn.Module):
    """out_proj(dropout(activation(dense(dropout(first token)))))."""

    def __init__(self, config: ConvBertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(heads.head_dropout(config))
        self.out_proj = nn.Linear(config.hidden_size, config.num_labels)
        self.activation = config.hidden_act

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, S, C) -> (B, num_labels)."""
        hidden = self.dense(self.dropout(hidden_states[:, 0]))
        return self.out_proj(self.dropout(ops.get_activation(self.activation)(hidden)))


class ConvBertForSequenceClassification(heads.SequenceClassification, ConvBertPreTrainedModel):
    """ConvBERT with a classifier or regressor over the first token."""

    def __init__(self, config: ConvBertConfig) -> None:
        super().__init__(config)
        self.convbert = ConvBertModel(config)
        self.classifier = ConvBertClassificationHead(config)
        self.init_weights(skip=self.convbert)

    def logits(self, outputs: ModelOutput) -> Tensor:
        return self.classifier(outputs["last_hidden_state"])


class ConvBertSequenceSummary(nn.Module):
    """One vector for a sequence, by the `summary_*` values of the config. "last" is the last position, padding or not;
    "cls_index" without an index is the same. The original knows no summary; what it is of a padded row is that of
    transformers.
    """

    def __init__(self, config: ConvBertConfig) -> None:
        super().__init__()
        self.summary_type = config.summary_type
        self.activation = config.summary_activation
        self.first_dropout = nn.Dropout(config.summary_first_dropout)
        self.last_dropout = nn.Dropout(config.summary_last_dropout)
        if config.summary_use_proj and config.summary_proj_to_labels and config.num_labels != config.hidden_size:
            raise ValueError(
                f"summary_proj_to_labels projects to num_labels {config.num_labels}, but the classifier takes "
                f"hidden_size {config.hidden_size}; set summary_proj_to_labels to False"
            )
        self.summary = nn.Linear(config.hidden_size, config.hidden_size) if config.summary_use_proj else nn.Identity()

    def forward(self, hidden_states: Tensor, cls_index: Tensor | None = None) -> Tensor:
        """(B, S, C), and the positions (B,) to take for the type "cls_index" -> (B, C)."""
        if self.summary_type == "mean":
            vector = hidden_states.mean(dim=1)
        elif self.summary_type == "cls_index" and cls_index is not None:
            rows = torch.arange(hidden_states.shape[0], device=hidden_states.device)
            vector = hidden_states[rows, cls_index.to(hidden_states.device)]
        else:
            vector = hidden_states[:, 0 if self.summary_type == "first" else -1]
        vector = self.summary(self.first_dropout(vector))
        return self.last_dropout(ops.get_activation(self.activation)(vector))


class ConvBertForMultipleChoice(heads.MultipleChoice, ConvBertPreTrainedModel):
    """ConvBERT with one score for each choice, from the summary of its sequence."""

    def __init__(self, config: ConvBertConfig) -> None:
        super().__init__(config)
        self.convbert = ConvBertModel(config)
        self.sequence_summary = ConvBertSequenceSummary(config)
        self.classifier = nn.Linear(config.hidden_size, 1)
        self.init_weights(skip=self.convbert)

    def logits(self, outputs: ModelOutput) -> Tensor:
        return self.classifier(self.sequence_summary(outputs["last_hidden_state"]))


class ConvBertForTokenClassification(heads.TokenClassification, ConvBertPreTrainedModel):
    """ConvBERT with a classifier over every token."""

    def __init__(self, config: ConvBertConfig) -> None:
        super().__init__(config)
        self.convbert = ConvBertModel(config)
        self.dropout = nn.Dropout(heads.head_dropout(config))
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.init_weights(skip=self.convbert)


class ConvBertForQuestionAnswering(heads.QuestionAnswering, ConvBertPreTrainedModel):
    """ConvBERT with a start and an end score for every token."""

    def __init__(self, config: ConvBertConfig) -> None:
        super().__init__(config)
        self.convbert = ConvBertModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.init_weights(skip=self.convbert)
