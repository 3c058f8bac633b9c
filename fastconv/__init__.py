"""fastconv: fused Triton kernels and fast paths for BERT-family encoders.

    import fastconv
    fastconv.accelerate(model)   # in place: same parameters, same state_dict, same outputs
    fastconv.restore(model)      # and back

Names are imported at their first use, so that `import fastconv` costs little more than `import torch`.
"""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

# Public name -> module that defines it.
_EXPORTS = {
    "accelerate": "fastconv.swap",
    "restore": "fastconv.swap",
    "backend": "fastconv.dispatch",
    "register_attention": "fastconv.attention_interface",
    "convert_checkpoint": "fastconv.checkpoints.convert",
    "pipeline": "fastconv.tasks",
    "Packing": "fastconv.reference",
    **dict.fromkeys(
        ("BertTokenizer", "BertTokenizerFast", "ConvBertTokenizer", "ConvBertTokenizerFast", "RoCBertTokenizer"),
        "fastconv.tokenization",
    ),
    **dict.fromkeys(
        (
            "BertConfig",
            "BertModel",
            "BertForPreTraining",
            "BertLMHeadModel",
            "BertForMaskedLM",
            "BertForNextSentencePrediction",
            "BertForSequenceClassification",
            "BertForTokenClassification",
            "BertForQuestionAnswering",
            "BertForMultipleChoice",
            "ConvBertConfig",
            "ConvBertModel",
            "ConvBertForMaskedLM",
            "ConvBertForSequenceClassification",
            "ConvBertForTokenClassification",
            "ConvBertForQuestionAnswering",
            "ConvBertForMultipleChoice",
            "RoCBertConfig",
            "RoCBertModel",
            "RoCBertForPreTraining",
            "RoCBertForCausalLM",
            "RoCBertForMaskedLM",
            "RoCBertForSequenceClassification",
            "RoCBertForTokenClassification",
            "RoCBertForQuestionAnswering",
            "RoCBertForMultipleChoice",
        ),
        "fastconv.models",
    ),
}
_SUBMODULES = ("ops", "nn", "parity", "reference")

__all__ = ["__version__", *_EXPORTS, *_SUBMODULES]


def __getattr__(name: str):
    if name in _EXPORTS:
        value = getattr(importlib.import_module(_EXPORTS[name]), name)
    elif name in _SUBMODULES:
        value = importlib.import_module(f"fastconv.{name}")
    else:
        raise AttributeError(f"module 'fastconv' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
