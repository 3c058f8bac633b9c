"""BERT: Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers" (2018)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import heads, ops
from .config import BertConfig
from .layers import Embeddings, Encoder, EncoderLayer, Pooler, PredictionTransform
from .model import Model, additive_mask, check_devices, check_inputs, choose, expand_head_mask, maybe_tuple
from .outputs import BaseModelOutputWithPoolingAndCrossAttentions, ModelOutput


class BertSelfAttention(nn.Module):
    """Multi-head attention of every token to every token."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.num_attention_heads = config.num_attention_heads
        self.attention_head_size = config.hidden_size // config.num_attention_heads
        self.all_head_size = config.hidden_size
        self.query = nn.Linear(config.hidden_size, self.all_head_size)
        self.key = nn.Linear(config.hidden_size, self.all_head_size)
        self.value = nn.Linear(config.hidden_size, self.all_head_size)
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        head_mask: Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """(B, S, C) -> (B, S, C), and the probabilities (B, H, S, S) or None.

        attention_mask is added to the scores, head_mask multiplies the probabilities; both broadcast to (B, H, S, S).
        """
        heads = (self.num_attention_heads, self.attention_head_size)
        q = self.query(hidden_states).unflatten(-1, heads)
        k = self.key(hidden_states).unflatten(-1, heads)
        v = self.value(hidden_states).unflatten(-1, heads)
        probabilities = self.dropout(ops.attention_probabilities(q, k, mask=attention_mask))
        if head_mask is not None:
            probabilities = probabilities * head_mask
        context = torch.einsum("bhqk,bkhd->bqhd", probabilities, v).flatten(2)
        return context, probabilities if output_attentions else None


class BertPreTrainedModel(Model):
    """Base of the BERT models."""

    config_class = BertConfig
    base_model_prefix = "bert"
    config: BertConfig


class BertModel(BertPreTrainedModel):
    """The encoder, and a pooler over the first token unless `add_pooling_layer` is False."""

    def __init__(self, config: BertConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config)
        self.embeddings = Embeddings(config, config.hidden_size)
        self.encoder = Encoder(
            [EncoderLayer(config, BertSelfAttention(config)) for _ in range(config.num_hidden_layers)]
        )
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
        *,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Encode a batch.

        Args:
            input_ids: (B, S), int64 or int32.
            attention_mask: (B, S) or (B, S, S), 1 for keys to attend to, 0 for others; or see `model.additive_mask`.
            token_type_ids: (B, S), 0 by default.
            position_ids: (B, S), 0, 1, 2, ... by default.
            head_mask: (heads,) or (layers, heads), 1 for heads to keep.
            inputs_embeds: (B, S, C), instead of input_ids.
            output_attentions, output_hidden_states, return_dict: those of the config if None.

        Returns:
            BaseModelOutputWithPoolingAndCrossAttentions, or the tuple of its values.

        Raises:
            ValueError, TypeError, IndexError: see `model.check_devices`, `check_inputs`, `additive_mask`.
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
        )
        B, S = check_inputs(config, config.hidden_size, input_ids, token_type_ids, position_ids, inputs_embeds)
        hidden = self.embeddings(input_ids, token_type_ids, position_ids, inputs_embeds)
        last, states, attentions = self.encoder(
            hidden,
            additive_mask(attention_mask, B, config.num_attention_heads, S, hidden.dtype),
            expand_head_mask(head_mask, config.num_hidden_layers, config.num_attention_heads, hidden.dtype),
            choose(output_attentions, config.output_attentions),
            choose(output_hidden_states, config.output_hidden_states),
        )
        output = BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=last,
            pooler_output=None if self.pooler is None else self.pooler(last),
            hidden_states=states,
            attentions=attentions,
        )
        return maybe_tuple(output, choose(return_dict, config.return_dict))


class BertLMPredictionHead(nn.Module):
    """Logits over the vocabulary. `bias` and `decoder.bias` are one parameter with two names in the checkpoints."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.transform = PredictionTransform(config, config.hidden_size, config.hidden_act)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        self.bias = self.decoder.bias

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, S, C) -> (B, S, V)."""
        return self.decoder(self.transform(hidden_states))


class BertOnlyMLMHead(nn.Module):
    """The head of BertForMaskedLM: the name that its parameters have in the checkpoints."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.predictions = BertLMPredictionHead(config)


class BertForMaskedLM(heads.MaskedLM, BertPreTrainedModel):
    """BERT with a masked language modelling head."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.cls = BertOnlyMLMHead(config)
        self.init_weights(skip=self.bert)
        self.tie_weights()

    def get_output_embeddings(self) -> nn.Module:
        return self.cls.predictions.decoder

    def tie_weights(self) -> None:
        predictions = self.cls.predictions
        if self.config.tie_word_embeddings:
            predictions.decoder.weight = self.bert.embeddings.word_embeddings.weight
        predictions.bias = predictions.decoder.bias

    def logits(self, outputs: ModelOutput) -> Tensor:
        return self.cls.predictions(outputs["last_hidden_state"])


class BertForSequenceClassification(heads.SequenceClassification, BertPreTrainedModel):
    """BERT with a classifier or regressor over the pooled output."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.bert = BertModel(config)
        self.dropout = nn.Dropout(heads.head_dropout(config))
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.init_weights(skip=self.bert)

    def logits(self, outputs: ModelOutput) -> Tensor:
        return self.classifier(self.dropout(outputs["pooler_output"]))


class BertForMultipleChoice(heads.MultipleChoice, BertPreTrainedModel):
    """BERT with one score for each choice, from the pooled output."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.bert = BertModel(config)
        self.dropout = nn.Dropout(heads.head_dropout(config))
        self.classifier = nn.Linear(config.hidden_size, 1)
        self.init_weights(skip=self.bert)

    def logits(self, outputs: ModelOutput) -> Tensor:
        return self.classifier(self.dropout(outputs["pooler_output"]))


class BertForTokenClassification(heads.TokenClassification, BertPreTrainedModel):
    """BERT with a classifier over every token."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.dropout = nn.Dropout(heads.head_dropout(config))
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.init_weights(skip=self.bert)


class BertForQuestionAnswering(heads.QuestionAnswering, BertPreTrainedModel):
    """BERT with a start and an end score for every token."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.init_weights(skip=self.bert)
