"""The heads, written once for all families: how hidden states become logits and a loss."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import Config, check_int
from .model import Model, choose, maybe_tuple
from .outputs import (
    CausalLMOutputWithCrossAttentions,
    MaskedLMOutput,
    ModelOutput,
    MultipleChoiceModelOutput,
    NextSentencePredictorOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)


def head_dropout(config: Config) -> float:
    """The dropout probability before a classifier."""
    return config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout


class HeadModel(Model):
    """An encoder with one output: subclasses say how logits come from its outputs, and the loss from logits."""

    output_class: type[Any]

    def logits(self, outputs: ModelOutput) -> Tensor:
        """The logits from what the encoder returns."""
        raise NotImplementedError

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss, a scalar."""
        raise NotImplementedError

    def predict(self, inputs: dict[str, Any], labels: Tensor | None, return_dict: bool | None) -> Any:
        """The output for the arguments `inputs` of the base model: what a family's forward ends with."""
        outputs = self.base_model(**inputs, return_dict=True)
        logits = self.logits(outputs)
        output = self.output_class(
            loss=None if labels is None else self.loss(logits, labels),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return maybe_tuple(output, choose(return_dict, self.config.return_dict))

    def forward(
        self,
        input_ids: Tensor | None = None,
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
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "head_mask": head_mask,
            "inputs_embeds": inputs_embeds,
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
        }
        return self.predict(inputs, labels, return_dict)


class LanguageModel(Model):
    """A head over the vocabulary, that gives its loss alone where `loss_only` asks for it."""

    def logits(self, outputs: ModelOutput) -> Tensor:
        """The logits (B, S, V) from what the encoder returns."""
        raise NotImplementedError

    def loss(self, logits: Tensor, labels: Tensor, name: str = "labels") -> Tensor:
        """The loss of labels (B, S), a scalar; -100 is ignored."""
        return class_loss(logits, labels, name)

    def loss_alone(self, outputs: ModelOutput, labels: Tensor, name: str = "labels") -> Tensor:
        """The loss where nobody wants the logits, which an accelerated model doesn't compute for it."""
        return self.loss(self.logits(outputs), labels, name)

    def loss_and_logits(
        self, outputs: ModelOutput, labels: Tensor | None, loss_only: bool, name: str = "labels"
    ) -> tuple[Tensor | None, Tensor | None]:
        """What there is of both."""
        if loss_only and labels is not None:
            return self.loss_alone(outputs, labels, name), None
        logits = self.logits(outputs)
        return None if labels is None else self.loss(logits, labels, name), logits


class MaskedLM(LanguageModel, HeadModel):
    """Logits over the vocabulary for every token. labels: (B, S), -100 is ignored."""

    def predict(
        self, inputs: dict[str, Any], labels: Tensor | None, return_dict: bool | None, loss_only: bool = False
    ) -> Any:
        """The output for the arguments `inputs` of the base model."""
        check_loss_only(loss_only, labels=labels)
        outputs = self.base_model(**inputs, return_dict=True)
        loss, logits = self.loss_and_logits(outputs, labels, loss_only)
        output = MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )
        return maybe_tuple(output, choose(return_dict, self.config.return_dict))

    def forward(
        self,
        input_ids: Tensor | None = None,
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
        loss_only: bool = False,
    ) -> Any:
        """The arguments of the base model; labels (B, S), -100 is ignored.

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
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
        }
        return self.predict(inputs, labels, return_dict, loss_only)


class CausalLM(LanguageModel, HeadModel):
    """Logits over the vocabulary for the token that follows. labels: (B, S), those of the tokens; -100 is ignored."""

    def predict(
        self,
        inputs: dict[str, Any],
        labels: Tensor | None,
        return_dict: bool | None,
        logits_to_keep: int = 0,
        loss_only: bool = False,
    ) -> Any:
        """The output for the arguments `inputs` of the base model. logits_to_keep: of how many last tokens; 0: all."""
        check_int("logits_to_keep", logits_to_keep, 0)
        if labels is not None and logits_to_keep:
            raise ValueError(f"labels need all logits, got logits_to_keep {logits_to_keep}")
        check_loss_only(loss_only, labels=labels)
        outputs = self.base_model(**inputs, return_dict=True)
        kept = replace(outputs, last_hidden_state=outputs.last_hidden_state[:, -logits_to_keep:])
        loss, logits = self.loss_and_logits(kept, labels, loss_only)
        output = CausalLMOutputWithCrossAttentions(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            cross_attentions=outputs.cross_attentions,
        )
        return maybe_tuple(output, choose(return_dict, self.config.return_dict))

    def loss(self, logits: Tensor, labels: Tensor, name: str = "labels") -> Tensor:
        check_labels(labels, tuple(logits.shape[:-1]), name)
        # Over a vocabulary, half precision leaves a loss two digits; transformers computes this one in fp32 too.
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return class_loss(wide[:, :-1], labels[:, 1:], name)


class NextSentencePrediction(HeadModel):
    """Whether the second sentence follows the first, 0, or not, 1. labels: (B,)."""

    output_class = NextSentencePredictorOutput

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return class_loss(logits, labels)


class TokenClassification(HeadModel):
    """A label for every token. labels: (B, S), -100 is ignored."""

    output_class = TokenClassifierOutput
    dropout: nn.Module
    classifier: nn.Module

    def logits(self, outputs: ModelOutput) -> Tensor:
        return self.classifier(self.dropout(outputs["last_hidden_state"]))

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return class_loss(logits, labels)


class SequenceClassification(HeadModel):
    """Labels for a sequence, by `config.problem_type`; if that is None, num_labels and the labels' dtype decide.

    labels: (B,) ids for single_label_classification; (B, num_labels) of 0 and 1 for multi_label_classification;
    (B, num_labels), or (B,) for one label, for regression.
    """

    output_class = SequenceClassifierOutput

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        kind = self.config.problem_type
        if kind is None:
            kind = "multi_label_classification" if labels.is_floating_point() else "single_label_classification"
            kind = "regression" if self.config.num_labels == 1 else kind
        if kind == "single_label_classification":
            return class_loss(logits, labels.squeeze(-1) if labels.dim() == 2 else labels)
        if kind == "regression" and logits.shape[-1] == 1 and labels.dim() == 1:
            labels = labels[:, None]
        check_labels(labels, tuple(logits.shape))
        labels = labels.to(logits.dtype)
        if kind == "regression":
            return F.mse_loss(logits, labels)
        return F.binary_cross_entropy_with_logits(logits, labels)


class MultipleChoice(HeadModel):
    """One score for each of N choices. Every input is (B, N, S), inputs_embeds (B, N, S, E); labels: (B,)."""

    output_class = MultipleChoiceModelOutput

    def predict(self, inputs: dict[str, Any], labels: Tensor | None, return_dict: bool | None) -> Any:
        """As the other heads, with one dimension more, N, after the batch.

        Raises:
            ValueError, TypeError, IndexError: as the base model; an input without the dimension of the choices.
        """
        given = inputs["inputs_embeds"] if inputs["input_ids"] is None else inputs["input_ids"]
        if given is None:
            raise ValueError("give exactly one of input_ids and inputs_embeds, got neither")
        batch, choices = given.shape[:2]
        flat = {
            name: flatten_choices(name, value, batch, choices, 4 if name == "inputs_embeds" else 3)
            if isinstance(value, Tensor) and name != "head_mask"
            else value
            for name, value in inputs.items()
        }
        output = super().predict(flat, None, True)
        output.logits = output.logits.reshape(batch, choices)
        if labels is not None:
            output.loss = class_loss(output.logits, labels)
        return maybe_tuple(output, choose(return_dict, self.config.return_dict))


class QuestionAnswering(Model):
    """Where an answer starts and ends: two scores for every token."""

    qa_outputs: nn.Module

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if config.num_labels != 2:
            raise ValueError(f"num_labels must be 2 (start and end) for question answering, got {config.num_labels}")

    def forward(
        self,
        input_ids: Tensor | None = None,
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
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "head_mask": head_mask,
            "inputs_embeds": inputs_embeds,
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
        }
        return self.predict(inputs, start_positions, end_positions, return_dict)

    def predict(
        self,
        inputs: dict[str, Any],
        start_positions: Tensor | None,
        end_positions: Tensor | None,
        return_dict: bool | None,
    ) -> Any:
        """The output for the arguments `inputs` of the base model: what a family's forward ends with."""
        outputs = self.base_model(**inputs, return_dict=True)
        start_logits, end_logits = self.qa_outputs(outputs.last_hidden_state).unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            start_loss = position_loss("start_positions", start_logits, start_positions)
            loss = (start_loss + position_loss("end_positions", end_logits, end_positions)) / 2
        output = QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=start_logits.contiguous(),
            end_logits=end_logits.contiguous(),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return maybe_tuple(output, choose(return_dict, self.config.return_dict))


def class_loss(logits: Tensor, labels: Tensor, name: str = "labels") -> Tensor:
    """The mean cross-entropy of logits (..., classes) over the labels (...) that are not -100: NaN if all are.

    Raises:
        TypeError: labels that are not integers. ValueError: labels of another shape.
    """
    check_labels(labels, tuple(logits.shape[:-1]), name)
    if labels.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} must be an int64 or int32 tensor for a classification, got {labels.dtype}")
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten().long())


def position_loss(name: str, logits: Tensor, positions: Tensor) -> Tensor:
    """The cross-entropy of positions, (B,) or (B, 1), against logits (B, S); a position of S or more is ignored.

    Raises:
        ValueError: another shape. TypeError: positions that are not integers.
    """
    B, S = logits.shape
    if tuple(positions.shape) not in ((B,), (B, 1)):
        raise ValueError(f"{name} must have shape (B,) = {(B,)}, got {tuple(positions.shape)}")
    if positions.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} must be an int64 or int32 tensor, got {positions.dtype}")
    return F.cross_entropy(logits, positions.reshape(B).long().clamp(0, S), ignore_index=S)


def check_labels(labels: Tensor, shape: tuple[int, ...], name: str = "labels") -> None:
    """Raise ValueError unless labels have this shape."""
    if tuple(labels.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(labels.shape)}")


def check_loss_only(loss_only: bool, **labels: Tensor | None) -> None:
    """Raise ValueError for a loss that is asked for without any of the labels that it needs."""
    missing = [name for name, given in labels.items() if given is None]
    if loss_only and missing:
        given = ", ".join(f"{name} {'None' if name in missing else 'given'}" for name in labels)
        raise ValueError(f"loss_only needs {' and '.join(labels)}, got {given}")


def flatten_choices(name: str, tensor: Tensor, batch: int, choices: int, dim: int) -> Tensor:
    """(B, N, ...) -> (B*N, ...).

    Raises:
        ValueError: another number of dimensions, or another B or N.
    """
    if tensor.dim() != dim:
        raise ValueError(f"{name} must have {dim} dimensions, (B, choices, S, ...), got {tuple(tensor.shape)}")
    if tensor.shape[:2] != (batch, choices):
        raise ValueError(f"{name} must begin with (B, choices) = {(batch, choices)}, got {tuple(tensor.shape)}")
    return tensor.flatten(0, 1)
