"""Heads over the vocabulary that compute their loss alone: no logits in memory, nothing for tokens without a label."""

from __future__ import annotations

import inspect
import sys
import threading
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastconv.nn._plain import bare, original_class, plain_layer_norm, plain_linear
from fastconv.ops import masked_lm_loss
from fastconv.ops._eager import autocasting, plain, transformed
from fastconv.reference.heads import check_labels, check_loss_only
from fastconv.reference.ops.masked_lm_loss import check_range
from fastconv.reference.packing import send
from fastconv.reference.roc_bert_heads import contrastive_loss

# The labels between a head's forward and its loss; per thread.
_of_call = threading.local()

_IGNORED = -100

# What transformers' heads may take without naming it. Others may be for the loss.
_KEYWORDS = ("return_dict", "output_attentions", "output_hidden_states", "num_items_in_batch")


class LossOnly:
    """The forward of this library's heads over the vocabulary, whose loss alone needs no logits."""

    fastconv_arguments: tuple[str, ...]
    # Whether a token's label is that of the one after it.
    fastconv_causal = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "fastconv_original" in cls.__dict__:
            # Here, since a trace of torch.compile can't read a signature.
            cls.fastconv_arguments = tuple(inspect.signature(cls.fastconv_original.forward).parameters)[1:]  # type: ignore[attr-defined]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The original's arguments."""
        if not kwargs.get("loss_only") or torch.compiler.is_compiling():
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        given = {**dict(zip(self.fastconv_arguments, args, strict=False)), **kwargs}
        labels = given.get("labels_input_ids", given.get("labels"))
        of_caller = getattr(_of_call, "labels", None)
        _of_call.labels = Labels(labels) if isinstance(labels, torch.Tensor) else None
        try:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            _of_call.labels = of_caller

    def loss_alone(self, outputs: Any, labels: torch.Tensor, name: str = "labels") -> torch.Tensor:
        """The loss of labels (B, S), a scalar, as the original gives it."""
        parts = _parts(self)
        if parts is None:
            return super().loss_alone(outputs, labels, name)  # type: ignore[misc]
        given = None if torch.compiler.is_compiling() else getattr(_of_call, "labels", None)
        return _loss(*parts, outputs["last_hidden_state"], given or Labels(labels), name, self.fastconv_causal)


class CausalLossOnly(LossOnly):
    """The same of the heads that predict the next token."""

    fastconv_causal = True


class TransformersLossOnly:
    """The forward of transformers' heads over the vocabulary, which takes `loss_only` too.

    Where somebody looks at the head's layers, or the loss is not the library's own, the original computes the logits,
    and they are left out of the output.
    """

    fastconv_arguments: tuple[str, ...]
    # The arguments that mean here what they mean to the original.
    fastconv_known: frozenset[str]
    # What the loss needs; first the labels over the vocabulary.
    fastconv_labels: tuple[str, ...] = ("labels",)
    fastconv_output = "MaskedLMOutput"
    fastconv_output_class: Any
    # What the output has of the encoder's.
    fastconv_of_encoder: tuple[str, ...] = ("hidden_states", "attentions")

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "fastconv_original" in cls.__dict__:
            original = cls.fastconv_original  # type: ignore[attr-defined]
            parameters = inspect.signature(original.forward).parameters
            cls.fastconv_arguments = tuple(parameters)[1:]
            more = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
            cls.fastconv_known = frozenset(cls.fastconv_arguments + (_KEYWORDS if more else ()))
            cls.fastconv_output_class = getattr(sys.modules[original.__module__], cls.fastconv_output)

    def forward(self, *args: Any, loss_only: bool = False, **kwargs: Any) -> Any:
        """The original's arguments; loss_only: return no logits but the loss, which then needs labels."""
        if not loss_only:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        given = {**dict(zip(self.fastconv_arguments, args, strict=False)), **kwargs}
        check_loss_only(True, **{name: given.get(name) for name in self.fastconv_labels})
        parts = _parts(self)
        # Of an argument too many, given twice or unknown the original tells, or what it does with it.
        fits = len(given) == len(args) + len(kwargs) and self.fastconv_known.issuperset(given)
        if parts is None or not fits or not self._is_usual(given):
            return _without_logits(super().forward(*args, **kwargs))  # type: ignore[misc]
        labels = Labels(given[self.fastconv_labels[0]])
        return_dict = given.pop("return_dict", None)
        if return_dict is None:
            config = self.config  # type: ignore[attr-defined]
            return_dict = config.return_dict and not getattr(config, "torchscript", False)
        outputs = self._encode({name: value for name, value in given.items() if not _is_of_head(name)})
        loss, found = self._loss(parts, outputs, labels, given)
        found |= {name: outputs[name] for name in self.fastconv_of_encoder if name in outputs}
        output = self.fastconv_output_class(loss=loss, **found)
        return output if return_dict else output.to_tuple()

    def _is_usual(self, given: dict[str, Any]) -> bool:
        """Whether the call's loss is the library's own."""
        return True

    def _encode(self, inputs: dict[str, Any]) -> Any:
        return self.base_model(**inputs, return_dict=True)  # type: ignore[attr-defined]

    def _loss(
        self, parts: tuple[nn.Module, nn.Linear], outputs: Any, labels: Labels, given: dict[str, Any]
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """The loss, and what else the head gives."""
        return _loss(*parts, outputs[0], labels, self.fastconv_labels[0], False), {}


class TransformersCausalLossOnly(TransformersLossOnly):
    """The same of BertLMHeadModel and RoCBertForCausalLM."""

    fastconv_output = "CausalLMOutputWithCrossAttentions"
    fastconv_of_encoder = ("past_key_values", "hidden_states", "attentions", "cross_attentions")

    def _is_usual(self, given: dict[str, Any]) -> bool:
        usual_loss = sys.modules["transformers.loss.loss_utils"].ForCausalLMLoss
        keep = given.get("logits_to_keep", 0)
        return (
            self.loss_function is usual_loss  # type: ignore[attr-defined]
            and isinstance(keep, int)
            and keep == 0
        )

    def _encode(self, inputs: dict[str, Any]) -> Any:
        if self.base_model_prefix == "bert":  # type: ignore[attr-defined]
            inputs["use_cache"] = False  # as BertLMHeadModel does where there are labels
        return super()._encode(inputs)

    def _loss(
        self, parts: tuple[nn.Module, nn.Linear], outputs: Any, labels: Labels, given: dict[str, Any]
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        labels.labels = labels.labels.to(outputs[0].device)
        loss = _loss(*parts, outputs[0], labels, "labels", True).float()
        items = given.get("num_items_in_batch")
        if items is not None:
            number = (_of_next(labels.labels) != _IGNORED).sum()
            items = items.to(loss.device) if isinstance(items, torch.Tensor) else items
            loss = torch.where(number > 0, loss, 0.0) * number / items
        return loss, {}


class TransformersPreTraining(TransformersLossOnly):
    """The same of BertForPreTraining."""

    fastconv_labels = ("labels", "next_sentence_label")
    fastconv_output = "BertForPreTrainingOutput"

    def _loss(
        self, parts: tuple[nn.Module, nn.Linear], outputs: Any, labels: Labels, given: dict[str, Any]
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        loss, found = super()._loss(parts, outputs, labels, given)
        relationship = self.cls.seq_relationship(outputs.pooler_output)  # type: ignore[attr-defined]
        loss = loss + F.cross_entropy(relationship.view(-1, 2), given["next_sentence_label"].view(-1))
        return loss, found | {"seq_relationship_logits": relationship}


class TransformersRoCBertPreTraining(TransformersLossOnly):
    """The same of RoCBertForPreTraining."""

    fastconv_labels = ("labels_input_ids",)

    def _loss(
        self, parts: tuple[nn.Module, nn.Linear], outputs: Any, labels: Labels, given: dict[str, Any]
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        loss, found = super()._loss(parts, outputs, labels, given)
        if given.get("attack_input_ids") is None:
            return loss, found
        pad = self.config.pad_token_id  # type: ignore[attr-defined]
        texts = given | {"labels_input_ids": labels.labels.masked_fill(labels.labels == _IGNORED, pad)}
        original, attack = (
            self._encode({name.removeprefix(of): value for name, value in texts.items() if name.startswith(of)})
            for of in ("labels_", "attack_")
        )
        return contrastive_loss(outputs.pooler_output, original.pooler_output, attack.pooler_output) + loss, found


class Labels:
    """Labels (B, S), and a copy of them on the host, which begins at once and is waited for when it is read.

    By then an encoder has been given its work: the copy, made before that, is not waited for long.
    """

    def __init__(self, labels: torch.Tensor) -> None:
        self.labels = labels
        self._copy: torch.Tensor | None = None
        self._copied: torch.cuda.Event | None = None
        # What a trace follows, or a graph captures, is not to depend on values.
        if transformed() or torch.compiler.is_compiling() or torch.jit.is_tracing() or not plain(labels):
            return
        if labels.device.type != "cuda":
            self._copy = labels.cpu()
        elif not torch.cuda.is_current_stream_capturing():
            self._copy = torch.empty_like(labels, device="cpu", pin_memory=True).copy_(labels, non_blocking=True)
            self._copied = torch.cuda.current_stream(labels.device).record_event()

    def index(self, vocabulary: int, causal: bool) -> torch.Tensor | None:
        """Where in (B * S,) the tokens with a label stand; None for all of them, or if that can't be looked at.

        Raises: IndexError for labels outside the vocabulary.
        """
        if self._copy is None:
            return None
        if self._copied is not None:
            self._copied.synchronize()
        labels = (_of_next(self._copy) if causal else self._copy).flatten()
        check_range(labels, vocabulary, _IGNORED)
        index = (labels != _IGNORED).nonzero().squeeze(1)
        return None if len(index) == len(labels) else send(index, self.labels.device)


def _of_next(labels: torch.Tensor) -> torch.Tensor:
    """(B, S): every token's label is that of the next, and the last has none."""
    return F.pad(labels[:, 1:], (0, 1), value=_IGNORED)


def _loss(
    transform: nn.Module, decoder: nn.Linear, hidden: torch.Tensor, labels: Labels, name: str, causal: bool
) -> torch.Tensor:
    """The loss of hidden states (B, S, C), in their dtype; where `causal` or autocast says so, in fp32 at least."""
    check_labels(labels.labels, tuple(hidden.shape[:-1]), name)
    targets = (_of_next(labels.labels) if causal else labels.labels).flatten()
    states, index = hidden.flatten(0, 1), labels.index(decoder.weight.shape[0], causal)
    if index is not None:
        states, targets = states.index_select(0, index), targets.index_select(0, index)
    states = transform(states)
    loss = masked_lm_loss(states, decoder.weight, decoder.bias, targets)
    # Autocast computes a cross-entropy in fp32.
    return loss if causal or autocasting(states) else loss.to(states.dtype)


def _parts(model: Any) -> tuple[nn.Module, nn.Linear] | None:
    """A head's transform and decoder, None if one of its modules does more than the library's."""
    if hasattr(model, "generator_lm_head"):
        around: tuple[Any, ...] = ()
        transform, decoder = model.generator_predictions, model.generator_lm_head
    else:
        predictions = getattr(model.cls, "predictions", None)
        around = (model.cls, predictions)
        transform, decoder = getattr(predictions, "transform", None), getattr(predictions, "decoder", None)
    known = all(_is_of_library(module) and bare(module) for module in (*around, transform)) and plain_linear(decoder)
    if known and plain_linear(transform.dense) and plain_layer_norm(transform.LayerNorm):
        return (transform, decoder) if all(map(bare, transform.children())) else None
    return None


def _is_of_library(module: Any) -> bool:
    cls = original_class(module) or type(module)
    return cls.__module__.startswith(("fastconv.reference.", "transformers.models."))


def _is_of_head(name: str) -> bool:
    """Whether an argument is the head's own, and not its encoder's."""
    return name.startswith(("labels", "attack_")) or name in (
        "next_sentence_label",
        "logits_to_keep",
        "num_items_in_batch",
    )


def _without_logits(output: Any) -> Any:
    """An output of transformers that has a loss, without the logits over the vocabulary."""
    if isinstance(output, tuple):
        return (output[0], *output[2:])
    left = ("logits", "prediction_logits")
    return type(output)(**{name: value for name, value in output.items() if name not in left})
