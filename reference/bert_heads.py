"""The heads of BERT."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from . import heads
from .bert import BertModel, BertPreTrainedModel
from .cache import Cache
from .config import BertConfig, RoCBertConfig
from .generation import Generation
from .layers import PredictionTransform
from .model import check_same_size, choose, maybe_tuple
from .outputs import BertForPreTrainingOutput, ModelOutput


class BertLMPredictionHead(nn.Module):
    """Logits over the vocabulary. `bias` and `decoder.bias` are one parameter with two names in the checkpoints."""

    def __init__(self, config: BertConfig | RoCBertConfig) -> None:
        super().__init__()
        self.transform = PredictionTransform(config, config.hidden_size, config.hidden_act)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        self.bias = self.decoder.bias

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, S, C) -> (B, S, V)."""
        return self.decoder(self.transform(hidden_states))


class BertOnlyMLMHead(nn.Module):
    """The head of BertForMaskedLM: the name that its parameters have in the checkpoints."""

    def __init__(self, config: BertConfig | RoCBertConfig) -> None:
        super().__init__()
        self.predictions = BertLMPredictionHead(config)


class BertOnlyNSPHead(nn.Module):
    """The head of BertForNextSentencePrediction: the name that its parameters have in the checkpoints."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.seq_relationship = nn.Linear(config.hidden_size, 2)


class BertPreTrainingHeads(BertOnlyMLMHead):
    """Both heads of BertForPreTraining."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.seq_relationship = nn.Linear(config.hidden_size, 2)


class Vocabulary(heads.LanguageModel):
    """A model whose head `cls.predictions` maps to the vocabulary, by the word embeddings if the config ties them."""

    cls: BertOnlyMLMHead

    def get_output_embeddings(self) -> nn.Linear:
        return self.cls.predictions.decoder

    def set_output_embeddings(self, value: nn.Linear) -> None:
        check_same_size(self.get_output_embeddings(), value)
        self.cls.predictions.decoder = value
        self.cls.predictions.bias = value.bias

    def tie_weights(self) -> None:
        predictions = self.cls.predictions
        if self.config.tie_word_embeddings:
            predictions.decoder.weight = self.get_input_embeddings().weight
        predictions.bias = predictions.decoder.bias

    def logits(self, outputs: ModelOutput) -> Tensor:
        return self.cls.predictions(outputs["last_hidden_state"])


class BertForPreTraining(Vocabulary, BertPreTrainedModel):
    """BERT with both heads of its pre-training: masked language modelling and next sentence prediction."""

    cls: BertPreTrainingHeads

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.bert = BertModel(config)
        self.cls = BertPreTrainingHeads(config)
        self.init_weights(skip=self.bert)
        self.tie_weights()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        next_sentence_label: Tensor | None = None,
        *,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        loss_only: bool = False,
    ) -> Any:
        """The arguments of the base model; labels (B, S), -100 is ignored; next_sentence_label (B,), 0 if the second
        sentence follows the first, 1 if it is another. There is a loss, the sum of both, only if both are given.

        loss_only: return no prediction_logits but the loss, which then needs both labels.

        Raises:
            ValueError, TypeError, IndexError: as the base model; labels of a wrong shape; loss_only without labels.
        """
        heads.check_loss_only(loss_only, labels=labels, next_sentence_label=next_sentence_label)
        outputs = self.bert(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            head_mask,
            inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        relationship = self.cls.seq_relationship(outputs.pooler_output)
        loss, logits = self.loss_and_logits(outputs, None if next_sentence_label is None else labels, loss_only)
        if loss is not None and next_sentence_label is not None:
            loss = loss + heads.class_loss(relationship, next_sentence_label, "next_sentence_label")
        output = BertForPreTrainingOutput(
            loss=loss,
            prediction_logits=logits,
            seq_relationship_logits=relationship,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return maybe_tuple(output, choose(return_dict, self.config.return_dict))


class BertLMHeadModel(Generation, Vocabulary, heads.CausalLM, BertPreTrainedModel):
    """BERT with a language modelling head, a decoder if the config says is_decoder; without it every token attends to
    every other, and text can't be generated.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.cls = BertOnlyMLMHead(config)
        self.init_weights(skip=self.bert)
        self.tie_weights()

    def forward(  # type: ignore[override]  # a decoder's arguments come in between
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        *,
        logits_to_keep: int = 0,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        loss_only: bool = False,
    ) -> Any:
        """The arguments of the base model; labels (B, S), -100 is ignored: the logits of a token are compared with the
        label of the next. With labels no new cache is made.

        logits_to_keep: compute only the logits of this many last tokens; 0 for all.
        loss_only: return no logits but the loss, which then needs labels.

        Raises:
            ValueError, TypeError, IndexError: as the base model; labels of a wrong shape; labels with logits_to_keep;
                loss_only without labels.
        """
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "head_mask": head_mask,
            "inputs_embeds": inputs_embeds,
            "encoder_hidden_states": encoder_hidden_states,
            "encoder_attention_mask": encoder_attention_mask,
            "past_key_values": past_key_values,
            "use_cache": use_cache if labels is None or past_key_values is not None else False,
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
        }
        return self.predict(inputs, labels, return_dict, logits_to_keep, loss_only)


class BertForMaskedLM(Vocabulary, heads.MaskedLM, BertPreTrainedModel):
    """BERT with a masked language modelling head."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.cls = BertOnlyMLMHead(config)
        self.init_weights(skip=self.bert)
        self.tie_weights()

    def forward(  # type: ignore[override]  # a decoder's arguments come in between
        self,
        input_ids: Tensor | None = None,
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


class BertForNextSentencePrediction(heads.NextSentencePrediction, BertPreTrainedModel):
    """BERT with a classifier of sentence pairs: 0, the second follows the first; 1, it is another."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.bert = BertModel(config)
        self.cls = BertOnlyNSPHead(config)
        self.init_weights(skip=self.bert)

    def logits(self, outputs: ModelOutput) -> Tensor:
        return self.cls.seq_relationship(outputs["pooler_output"])


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
