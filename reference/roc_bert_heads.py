"""The heads of RoCBert."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import heads
from .bert_heads import BertOnlyMLMHead, Vocabulary
from .cache import Cache
from .config import RoCBertConfig
from .generation import RoCBertGeneration
from .model import choose, maybe_tuple
from .outputs import MaskedLMOutput, ModelOutput
from .roc_bert import RoCBertModel, RoCBertPreTrainedModel


class RoCBertForPreTraining(Vocabulary, RoCBertPreTrainedModel):
    """RoCBert as it is pre-trained: a masked language modelling head, and a contrastive loss of the pooled outputs."""

    def __init__(self, config: RoCBertConfig) -> None:
        super().__init__(config)
        self.roc_bert = RoCBertModel(config)
        self.cls = BertOnlyMLMHead(config)
        self.init_weights(skip=self.roc_bert)
        self.tie_weights()

    def forward(
        self,
        input_ids: Tensor | None = None,
        input_shape_ids: Tensor | None = None,
        input_pronunciation_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        attack_input_ids: Tensor | None = None,
        attack_input_shape_ids: Tensor | None = None,
        attack_input_pronunciation_ids: Tensor | None = None,
        attack_attention_mask: Tensor | None = None,
        attack_token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels_input_ids: Tensor | None = None,
        labels_input_shape_ids: Tensor | None = None,
        labels_input_pronunciation_ids: Tensor | None = None,
        labels_attention_mask: Tensor | None = None,
        labels_token_type_ids: Tensor | None = None,
        *,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        loss_only: bool = False,
    ) -> Any:
        """The arguments of the base model, and those of two further texts for the loss.

        labels_*: the original text, (B, S). labels_input_ids are the labels of the masked language modelling, -100 is
            ignored, and stands for padding where they are read as a text. Without them there is no loss.
        attack_*: the text with other characters for some, (B, any length). Without attack_input_ids the loss is that of
            the masked language modelling alone; with them the contrastive loss is added.
        loss_only: return no logits but the loss, which then needs labels_input_ids.

        Raises:
            ValueError, TypeError, IndexError: as the base model, of each text; labels of a wrong shape; another number
                of attacks than of texts; no pad_token_id in the config; loss_only without labels_input_ids.
        """
        heads.check_loss_only(loss_only, labels_input_ids=labels_input_ids)
        outputs = self.roc_bert(
            input_ids,
            input_shape_ids,
            input_pronunciation_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            head_mask,
            inputs_embeds,
            use_cache=False,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        loss, logits = self.loss_and_logits(outputs, labels_input_ids, loss_only, "labels_input_ids")
        if loss is not None and labels_input_ids is not None and attack_input_ids is not None:
            labels = self.pooled(
                "labels",
                self.labels_as_text(labels_input_ids),
                labels_input_shape_ids,
                labels_input_pronunciation_ids,
                labels_attention_mask,
                labels_token_type_ids,
            )
            attack = self.pooled(
                "attack",
                attack_input_ids,
                attack_input_shape_ids,
                attack_input_pronunciation_ids,
                attack_attention_mask,
                attack_token_type_ids,
            )
            loss = contrastive_loss(outputs.pooler_output, labels, attack) + loss
        output = MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )
        return maybe_tuple(output, choose(return_dict, self.config.return_dict))

    def labels_as_text(self, labels: Tensor) -> Tensor:
        """Labels (B, S) with padding in the place of -100."""
        pad = self.config.pad_token_id
        if pad is None:
            raise ValueError("the contrastive loss needs a config with a pad_token_id, got None")
        return labels.masked_fill(labels == -100, pad)

    def pooled(self, text: str, *inputs: Tensor | None) -> Tensor:
        """The pooled output (B, C) of a text: its three streams of ids, attention_mask and token_type_ids.

        text: the prefix of its arguments, for the errors.
        """
        try:
            outputs = self.roc_bert(
                *inputs, use_cache=False, output_attentions=False, output_hidden_states=False, return_dict=True
            )
        except (ValueError, TypeError, IndexError) as error:
            raise type(error)(f"{text}_*: {error}") from error
        return outputs.pooler_output


def contrastive_loss(text: Tensor, original: Tensor, attack: Tensor) -> Tensor:
    """Pooled outputs (B, C) each -> the loss, a scalar: every text, and every original, must find its attack among B.

    The mean of both cross-entropies over the cosine similarities times 100. Source: section 3.2 of the paper, as
    transformers implements it.
    """
    if attack.shape != text.shape:
        raise ValueError(f"attack_input_ids must have as many rows as input_ids, {len(text)}, got {len(attack)}")
    text, original, attack = (F.normalize(pooled, dim=-1) for pooled in (text, original, attack))
    target = torch.arange(len(text), device=text.device)
    return (F.cross_entropy(100 * text @ attack.T, target) + F.cross_entropy(100 * original @ attack.T, target)) / 2


class RoCBertForCausalLM(RoCBertGeneration, Vocabulary, heads.CausalLM, RoCBertPreTrainedModel):
    """RoCBert with a language modelling head, a decoder if the config says is_decoder; without it every token attends
    to every other, and text can't be generated.
    """

    def __init__(self, config: RoCBertConfig) -> None:
        super().__init__(config)
        self.roc_bert = RoCBertModel(config, add_pooling_layer=False)
        self.cls = BertOnlyMLMHead(config)
        self.init_weights(skip=self.roc_bert)
        self.tie_weights()

    def forward(  # type: ignore[override]  # three streams of ids
        self,
        input_ids: Tensor | None = None,
        input_shape_ids: Tensor | None = None,
        input_pronunciation_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        head_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        *,
        logits_to_keep: int = 0,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        loss_only: bool = False,
    ) -> Any:
        """The arguments of the base model, in another order; labels (B, S), -100 is ignored: the logits of a token are
        compared with the label of the next.

        logits_to_keep: compute only the logits of this many last tokens; 0 for all.
        loss_only: return no logits but the loss, which then needs labels.

        Raises:
            ValueError, TypeError, IndexError: as the base model; labels of a wrong shape; labels with logits_to_keep;
                loss_only without labels.
        """
        inputs = {
            "input_ids": input_ids,
            "input_shape_ids": input_shape_ids,
            "input_pronunciation_ids": input_pronunciation_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "head_mask": head_mask,
            "inputs_embeds": inputs_embeds,
            "encoder_hidden_states": encoder_hidden_states,
            "encoder_attention_mask": encoder_attention_mask,
            "past_key_values": past_key_values,
            "use_cache": use_cache,
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
        }
        return self.predict(inputs, labels, return_dict, logits_to_keep, loss_only)


class RoCBertForMaskedLM(Vocabulary, heads.MaskedLM, RoCBertPreTrainedModel):
    """RoCBert with a masked language modelling head."""

    def __init__(self, config: RoCBertConfig) -> None:
        super().__init__(config)
        self.roc_bert = RoCBertModel(config, add_pooling_layer=False)
        self.cls = BertOnlyMLMHead(config)
        self.init_weights(skip=self.roc_bert)
        self.tie_weights()

    def forward(  # type: ignore[override]  # three streams of ids
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
        labels: Tensor | None = None,
        *,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        loss_only: bool = False,
    ) -> Any:
        """The arguments of the base model but the cache; labels (B, S), -100 is ignored.

        loss_only: return no logits but the loss, which then needs labels.

        Raises:
            ValueError, TypeError, IndexError: as the base model; labels of a wrong shape; loss_only without labels.
        """
        inputs = {
            "input_ids": input_ids,
            "input_shape_ids": input_shape_ids,
            "input_pronunciation_ids": input_pronunciation_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "head_mask": head_mask,
            "inputs_embeds": inputs_embeds,
            "encoder_hidden_states": encoder_hidden_states,
            "encoder_attention_mask": encoder_attention_mask,
            "use_cache": False,
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
        }
        return self.predict(inputs, labels, return_dict, loss_only)


class Classifier(heads.HeadModel):
    """The forward of the heads with one tensor of labels."""

    def forward(  # type: ignore[override]  # three streams of ids
        self,
        input_ids: Tensor | None = None,
        input_shape_ids: Tensor | None = None,
        input_pronunciation_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """The arguments of the base model, and `labels`; with labels the output has a loss.

        Raises:
            ValueError, TypeError, IndexError: as the base model; labels of a wrong shape.
        """
        inputs = {
            "input_ids": input_ids,
            "input_shape_ids": input_shape_ids,
            "input_pronunciation_ids": input_pronunciation_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "head_mask": head_mask,
            "inputs_embeds": inputs_embeds,
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
        }
        return self.predict(inputs, labels, return_dict)


class RoCBertForSequenceClassification(Classifier, heads.SequenceClassification, RoCBertPreTrainedModel):
    """RoCBert with a classifier or regressor over the pooled output."""

    def __init__(self, config: RoCBertConfig) -> None:
        super().__init__(config)
        self.roc_bert = RoCBertModel(config)
        self.dropout = nn.Dropout(heads.head_dropout(config))
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.init_weights(skip=self.roc_bert)

    def logits(self, outputs: ModelOutput) -> Tensor:
        return self.classifier(self.dropout(outputs["pooler_output"]))


class RoCBertForMultipleChoice(Classifier, heads.MultipleChoice, RoCBertPreTrainedModel):
    """RoCBert with one score for each choice, from the pooled output."""

    def __init__(self, config: RoCBertConfig) -> None:
        super().__init__(config)
        self.roc_bert = RoCBertModel(config)
        self.dropout = nn.Dropout(heads.head_dropout(config))
        self.classifier = nn.Linear(config.hidden_size, 1)
        self.init_weights(skip=self.roc_bert)

    def logits(self, outputs: ModelOutput) -> Tensor:
        return self.classifier(self.dropout(outputs["pooler_output"]))


class RoCBertForTokenClassification(Classifier, heads.TokenClassification, RoCBertPreTrainedModel):
    """RoCBert with a classifier over every token."""

    def __init__(self, config: RoCBertConfig) -> None:
        super().__init__(config)
        self.roc_bert = RoCBertModel(config, add_pooling_layer=False)
        self.dropout = nn.Dropout(heads.head_dropout(config))
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.init_weights(skip=self.roc_bert)


class RoCBertForQuestionAnswering(heads.QuestionAnswering, RoCBertPreTrainedModel):
    """RoCBert with a start and an end score for every token."""

    def __init__(self, config: RoCBertConfig) -> None:
        super().__init__(config)
        self.roc_bert = RoCBertModel(config, add_pooling_layer=False)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.init_weights(skip=self.roc_bert)

    def forward(  # type: ignore[override]  # three streams of ids
        self,
        input_ids: Tensor | None = None,
        input_shape_ids: Tensor | None = None,
        input_pronunciation_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        *,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """The arguments of the base model, and the positions, (B,) or (B, 1): those of S or more are ignored, negative
        ones count as 0.

        Raises:
            ValueError, TypeError, IndexError: as the base model; positions of a wrong shape.
        """
        inputs = {
            "input_ids": input_ids,
            "input_shape_ids": input_shape_ids,
            "input_pronunciation_ids": input_pronunciation_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "head_mask": head_mask,
            "inputs_embeds": inputs_embeds,
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
        }
        return self.predict(inputs, start_positions, end_positions, return_dict)
