"""accelerate and restore: put the fused forwards under a model's modules, in place, and take them away again.

A module is swapped by its class: `module.__class__` becomes a subclass of the class that it had, with the fused
forward in front. Parameters, buffers, hooks, attributes, `isinstance` and `state_dict` stay what they were, copies and
pickles keep the fused forward, and restoring is setting the class back.
"""

from __future__ import annotations

import copyreg
import functools
import inspect
import logging
from collections import Counter
from typing import Any, TypeVar

from torch import nn

from fastconv import dispatch
from fastconv.graphs import Graphs
from fastconv.nn._plain import original_class
from fastconv.nn.attention import CrossAttention, SelfAttention
from fastconv.nn.embeddings import (
    Embeddings,
    RoCBertEmbeddings,
    TransformersConvBertEmbeddings,
    TransformersEmbeddings,
    TransformersRoCBertEmbeddings,
)
from fastconv.nn.encoder_layer import EncoderLayer
from fastconv.nn.feed_forward import Intermediate, PredictionTransform, ResidualOutput
from fastconv.nn.grouped_linear import GroupedLinear
from fastconv.nn.layer_norm import LayerNorm
from fastconv.nn.lm_head import (
    CausalLossOnly,
    LossOnly,
    TransformersCausalLossOnly,
    TransformersLossOnly,
    TransformersPreTraining,
    TransformersRoCBertPreTraining,
)
from fastconv.nn.mixed_attention import MixedAttention
from fastconv.nn.packed_linear import unpack
from fastconv.nn.padding_free import PackedEncoder, PaddingFree, PaddingFreeAlone, SummaryAlone
from fastconv.nn.separable_conv import ChannelsFirstSeparableConv1D, SeparableConv1D

logger = logging.getLogger("fastconv")

M = TypeVar("M", bound=nn.Module)

_BERT = "transformers.models.bert.modeling_bert"
_CONVBERT = "transformers.models.convbert.modeling_convbert"
_ROC_BERT = "transformers.models.roc_bert.modeling_roc_bert"

# The one table: which class gets which forward. Classes are named, not imported: a module of a class that was never
# imported can't exist. Subclasses are left alone, since their forward may be another.
_FORWARDS: dict[str, type] = {
    "torch.nn.modules.normalization.LayerNorm": LayerNorm,
    "fastconv.reference.bert.BertSelfAttention": SelfAttention,
    "fastconv.reference.convbert.ConvBertSelfAttention": MixedAttention,
    "fastconv.reference.layers.Embeddings": Embeddings,
    "fastconv.reference.layers.EncoderLayer": EncoderLayer,
    "fastconv.reference.layers.GroupedLinear": GroupedLinear,
    "fastconv.reference.layers.Intermediate": Intermediate,
    "fastconv.reference.layers.PredictionTransform": PredictionTransform,
    "fastconv.reference.layers.ResidualOutput": ResidualOutput,
    "fastconv.reference.layers.SeparableConv1D": SeparableConv1D,
    "fastconv.reference.roc_bert.RoCBertEmbeddings": RoCBertEmbeddings,
    "fastconv.reference.bert_heads.BertForMaskedLM": LossOnly,
    "fastconv.reference.bert_heads.BertForPreTraining": LossOnly,
    "fastconv.reference.bert_heads.BertLMHeadModel": CausalLossOnly,
    "fastconv.reference.convbert.ConvBertForMaskedLM": LossOnly,
    "fastconv.reference.roc_bert_heads.RoCBertForCausalLM": CausalLossOnly,
    "fastconv.reference.roc_bert_heads.RoCBertForMaskedLM": LossOnly,
    "fastconv.reference.roc_bert_heads.RoCBertForPreTraining": LossOnly,
    "fastconv.models.BertForMaskedLM": LossOnly,
    "fastconv.models.BertForPreTraining": LossOnly,
    "fastconv.models.BertLMHeadModel": CausalLossOnly,
    "fastconv.models.ConvBertForMaskedLM": LossOnly,
    "fastconv.models.RoCBertForCausalLM": CausalLossOnly,
    "fastconv.models.RoCBertForMaskedLM": LossOnly,
    "fastconv.models.RoCBertForPreTraining": LossOnly,
    f"{_BERT}.BertEmbeddings": TransformersEmbeddings,
    f"{_BERT}.BertSelfAttention": SelfAttention,
    f"{_BERT}.BertSdpaSelfAttention": SelfAttention,
    f"{_BERT}.BertCrossAttention": CrossAttention,
    f"{_BERT}.BertLayer": EncoderLayer,
    f"{_BERT}.BertIntermediate": Intermediate,
    f"{_BERT}.BertPredictionHeadTransform": PredictionTransform,
    f"{_BERT}.BertSelfOutput": ResidualOutput,
    f"{_BERT}.BertOutput": ResidualOutput,
    f"{_BERT}.BertForMaskedLM": TransformersLossOnly,
    f"{_BERT}.BertForPreTraining": TransformersPreTraining,
    f"{_BERT}.BertLMHeadModel": TransformersCausalLossOnly,
    f"{_CONVBERT}.ConvBertEmbeddings": TransformersConvBertEmbeddings,
    f"{_CONVBERT}.ConvBertSelfAttention": MixedAttention,
    f"{_CONVBERT}.GroupedLinearLayer": GroupedLinear,
    f"{_CONVBERT}.SeparableConv1D": ChannelsFirstSeparableConv1D,
    f"{_CONVBERT}.ConvBertLayer": EncoderLayer,
    f"{_CONVBERT}.ConvBertIntermediate": Intermediate,
    f"{_CONVBERT}.ConvBertPredictionHeadTransform": PredictionTransform,
    f"{_CONVBERT}.ConvBertSelfOutput": ResidualOutput,
    f"{_CONVBERT}.ConvBertOutput": ResidualOutput,
    f"{_CONVBERT}.ConvBertForMaskedLM": TransformersLossOnly,
    f"{_ROC_BERT}.RoCBertEmbeddings": TransformersRoCBertEmbeddings,
    f"{_ROC_BERT}.RoCBertSelfAttention": SelfAttention,
    f"{_ROC_BERT}.RoCBertCrossAttention": CrossAttention,
    f"{_ROC_BERT}.RoCBertLayer": EncoderLayer,
    f"{_ROC_BERT}.RoCBertIntermediate": Intermediate,
    f"{_ROC_BERT}.RoCBertPredictionHeadTransform": PredictionTransform,
    f"{_ROC_BERT}.RoCBertSelfOutput": ResidualOutput,
    f"{_ROC_BERT}.RoCBertOutput": ResidualOutput,
    f"{_ROC_BERT}.RoCBertForCausalLM": TransformersCausalLossOnly,
    f"{_ROC_BERT}.RoCBertForMaskedLM": TransformersLossOnly,
    f"{_ROC_BERT}.RoCBertForPreTraining": TransformersRoCBertPreTraining,
}

# The same for padding="remove" and for graphs: whole models, their encoders, and heads that would take a padded row's
# first or last state for that of a token.
_PADDING_FREE: dict[str, type] = {
    "fastconv.reference.layers.Encoder": PackedEncoder,
    "fastconv.reference.bert.BertModel": PaddingFree,
    "fastconv.reference.convbert.ConvBertModel": PaddingFreeAlone,
    "fastconv.reference.roc_bert.RoCBertModel": PaddingFree,
    "fastconv.models.BertModel": PaddingFree,
    "fastconv.models.ConvBertModel": PaddingFreeAlone,
    "fastconv.models.RoCBertModel": PaddingFree,
    "fastconv.reference.convbert.ConvBertClassificationHead": SummaryAlone,
    "fastconv.reference.convbert.ConvBertSequenceSummary": SummaryAlone,
    f"{_BERT}.BertEncoder": PackedEncoder,
    f"{_BERT}.BertModel": PaddingFree,
    f"{_CONVBERT}.ConvBertEncoder": PackedEncoder,
    f"{_CONVBERT}.ConvBertModel": PaddingFreeAlone,
    f"{_CONVBERT}.ConvBertClassificationHead": SummaryAlone,
    f"{_CONVBERT}.ConvBertSequenceSummary": SummaryAlone,
    f"{_ROC_BERT}.RoCBertEncoder": PackedEncoder,
    f"{_ROC_BERT}.RoCBertModel": PaddingFree,
}


class Swapped:
    """First base of every class that `accelerate` makes."""

    fastconv_original: type[nn.Module]
    fastconv_backend = "auto"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The fused forward, with the backend that `accelerate` was given."""
        if self.fastconv_backend == "auto":
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        with dispatch.module_backend(self.fastconv_backend):
            return super().forward(*args, **kwargs)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        if original_class(self) is None:
            return super().__reduce_ex__(protocol)  # a class that somebody made from one of ours
        # The class is made at run time: a pickle names the original instead, and makes it again.
        state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__
        return _new, (self.fastconv_original,), state


def _new(original: type[nn.Module]) -> Any:
    return copyreg.__newobj__(_swapped_class(original))  # type: ignore[attr-defined, arg-type]


@functools.cache
def _swapped_class(original: Any) -> Any:
    forward = {**_FORWARDS, **_PADDING_FREE}[_name(original)]
    bases = (Swapped, forward) if issubclass(forward, original) else (Swapped, forward, original)
    members: dict[str, Any] = {"fastconv_original": original, "__module__": __name__}
    name = f"Fast{original.__name__}"
    if issubclass(forward, (PaddingFree, LossOnly, TransformersLossOnly, EncoderLayer)):
        # Files and transformers' registries name a model's class, policies that wrap layers name theirs, and trainers
        # read a forward's arguments.
        name, members["__module__"], members["__qualname__"] = (
            original.__name__,
            original.__module__,
            original.__qualname__,
        )
        members["forward"] = functools.wraps(original.forward)(lambda self, *a, **k: Swapped.forward(self, *a, **k))
        if issubclass(forward, TransformersLossOnly):
            members["forward"].__signature__ = _with_loss_only(inspect.signature(original.forward))
    made = type(name, bases, members)
    made.fastconv_class = made  # type: ignore[attr-defined]
    return made


def _with_loss_only(signature: inspect.Signature) -> inspect.Signature:
    option = inspect.Parameter("loss_only", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=bool)
    named = list(signature.parameters.values())
    rest = len(named) - (named[-1].kind is inspect.Parameter.VAR_KEYWORD)
    return signature.replace(parameters=[*named[:rest], option, *named[rest:]])


def _original(module: nn.Module) -> type:
    return original_class(module) or type(module)


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _may_remove_padding(module: nn.Module) -> bool:
    forward = _PADDING_FREE.get(_name(_original(module)))
    return forward is not None and issubclass(forward, PaddingFree) and "forward" not in module.__dict__


def accelerate(model: M, *, padding: str = "keep", backend: str = "auto", graphs: bool = False) -> M:
    """Put the fused forwards under a model, or any part of one, in place; returns the model.

    model: a module with BERT, RoCBert or ConvBERT layers of this library or of transformers (4.57, 5.x). Before or
        after `.to()`, in train or eval mode. Modules that the table doesn't know, adapters among them, stay as they
        are and are called as before. Calls that ask for attention probabilities run the attention's original forward
    padding: "keep" computes exactly what the original does. "remove" drops the padding that attention_mask (B, S) says,
        on either side, before the embeddings, and puts zeros in its place after the last layer: with BERT and RoCBert
        the tokens' results are those of "keep", with ConvBERT, whose convolutions see the padding, those of each
        sequence alone. The mask is looked at once a call; a `Packing` given in its place, of lengths on the host and
        padded_shape, saves that.
        Calls for attentions, of decoders, with encoder_hidden_states, chunks or relative positions, with hooks on an
        attention, and with padding between the tokens of BERT's or RoCBert's keep it, with a warning once. Heads that
        make one vector of a row make it of its tokens: the first is the row's first token, on whichever side its
        padding stands
    backend: "auto", "triton" or "native", for this model's ops; see `fastconv.backend`
    graphs: True replays CUDA graphs of the model from its embeddings to its last layer, for inference in batches of up
        to 8,192 tokens; see below

    Parameters stay the same objects and state_dict the same; for inference the weights of the query, key and value
    layers (and of ConvBERT's convolution input) become neighbours in memory. What was replaced and what was left is
    logged at level INFO by the logger "fastconv". Accelerating twice is accelerating once.

    In training by kernels a whole layer is one autograd function, with fewer launches than its modules have. Layers
    with hooks, adapters or unknown modules inside, those whose weights lie in others' memory (FSDP's, tied ones), calls
    under autocast, torch.compile or torch.func, and those that ask for more than masks run the modules one by one, as
    inference does.

    The heads over the vocabulary (MaskedLM, LM, PreTraining) take `loss_only=True` in a call, transformers' too: the
    output has the loss but no logits, which are not computed (see `ops.masked_lm_loss`), and tokens without a label
    cost the head nothing. With hooks or adapters in the head, or a loss_function of somebody's own, the original
    computes them and they are left out. The labels are looked at on a copy on the host, made before the encoder runs:
    one wait for the device, which has the encoder's work by then.

    A graph is for a number of tokens, padding not counted, rounded up to one of eight steps between powers of two; at
    least 64. It is recorded by the first call that needs it, and a model keeps the 32 that it used last. Results are
    the caller's own. Threads and streams may call at once; the replays of a device run one after the other. While a
    call records, what waits for the whole device or draws random numbers on it in other threads may fail, as in every
    capture of torch's. With padding="keep" graphs run batches without padding, by one look at the mask, if one is
    given. Eager are, with a warning once: calls on a CPU, with backend "native", in training mode, with gradients
    (outside torch.no_grad()), with hooks inside the model, and those that padding="remove" would not pack; and without
    a warning batches of more tokens, and those that have padding under padding="keep". Where memory is short, calls
    like that one are eager from then on, after a warning; where something can't be recorded, all. Adapters are recorded
    with the model; what they do besides computing is done once. Changes of weights in place are seen; graphs are
    dropped when weights move, modules change or an adapter is switched, and by restore, copies and pickles.

    Raises: TypeError if model is no nn.Module, or graphs no bool; ValueError for an unknown backend or padding, or
    padding="remove" or graphs of something that holds no whole encoder; RuntimeError if there is nothing to replace.
    With padding="remove" a call raises ValueError for a batch that is all padding, and ConvBERT's for padding between
    the tokens of a row; with loss_only ValueError without labels, IndexError for labels outside the vocabulary.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate takes a torch.nn.Module, got {type(model).__name__}")
    dispatch.check_backend(backend)
    if padding not in ("keep", "remove"):
        raise ValueError(f'padding must be "keep" or "remove", got {padding!r}')
    if not isinstance(graphs, bool):
        raise TypeError(f"graphs must be True or False, got {graphs!r}")
    forwards = {**_FORWARDS, **_PADDING_FREE} if padding == "remove" or graphs else _FORWARDS
    if forwards is not _FORWARDS and not any(map(_may_remove_padding, model.modules())):
        option = 'padding="remove"' if padding == "remove" else "graphs=True"
        raise ValueError(
            f"{option} needs a BertModel, RoCBertModel or ConvBertModel, got {type(model).__name__} without one"
        )
    replaced: Counter[str] = Counter()
    left: Counter[str] = Counter()
    configs: dict[str, Any] = {}
    for name, module in model.named_modules(remove_duplicate=True):
        config = getattr(module, "config", None)
        # Any module may have a `config`: a model's says what to output. Others inherit.
        configs[name] = config if hasattr(config, "output_attentions") else configs.get(name.rpartition(".")[0])
        original = _original(module)
        known = _name(original) in forwards
        # A forward of the instance's own (an offloading hook's, say) comes before that of any class.
        if known and "forward" not in module.__dict__:
            module.__class__ = _swapped_class(original)
            module.fastconv_backend = backend
            if hasattr(module, "fastconv_config"):
                module.fastconv_config = configs[name]
            replaced[original.__name__] += 1
        elif known or next(module.parameters(recurse=False), None) is not None:
            left[original.__name__] += 1
        # One that had its padding removed may get it back.
        if hasattr(module, "fastconv_padding"):
            module.fastconv_padding = padding
        if hasattr(module, "fastconv_graphs"):
            _drop_graphs(module)
            module.fastconv_graphs = Graphs() if graphs else None
    if not replaced:
        raise RuntimeError(
            f"accelerate found nothing to replace in {type(model).__name__}: expected layers of BERT, RoCBert or "
            "ConvBERT (of fastconv or of transformers) or torch.nn.LayerNorm, got parameters in "
            f"{_count(left) or 'no module'}"
        )
    logger.info("%s: replaced %s; left %s", type(model).__name__, _count(replaced), _count(left) or "nothing")
    return model


def restore(model: M) -> M:
    """Undo `accelerate`: every module gets its class back, and packed parameters memory of their own.

    A model that isn't accelerated is returned as it is. Raises: TypeError if model is no nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"restore takes a torch.nn.Module, got {type(model).__name__}")
    for module in model.modules():
        if original := original_class(module):
            if hasattr(module, "fastconv_packed"):
                for layers in module.fastconv_packed():  # type: ignore[operator]
                    unpack(layers)
            if hasattr(module, "fastconv_graphs"):
                _drop_graphs(module)
            module.__class__ = original
            for attribute in ("fastconv_backend", "fastconv_config", "fastconv_padding", "fastconv_graphs"):
                module.__dict__.pop(attribute, None)
    return model


def _drop_graphs(module: Any) -> None:
    if module.fastconv_graphs is not None:
        module.fastconv_graphs.clear()


def _count(classes: Counter[str]) -> str:
    return ", ".join(f"{number} {name}" for name, number in sorted(classes.items()))
