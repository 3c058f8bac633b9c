"""The published shapes: models with the hyper-parameters of published checkpoints and random weights."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastconv import models
from fastconv.tokenization import BertTokenizer

# Those of bert-base-uncased, and of YituTech's conv-bert-small, conv-bert-medium-small and conv-bert-base. What isn't
# named is the config's default; the token ids are those of BERT's vocabulary, where ConvBertConfig's aren't.
_CONVBERT_IDS = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
_SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "convbert-base": ("ConvBertModel", _CONVBERT_IDS),
    "convbert-medium-small": (
        "ConvBertModel",
        {
            **_CONVBERT_IDS,
            "hidden_size": 384,
            "num_attention_heads": 8,
            "intermediate_size": 1536,
            "embedding_size": 128,
            "num_groups": 2,
        },
    ),
    "convbert-small": (
        "ConvBertModel",
        {
            **_CONVBERT_IDS,
            "hidden_size": 256,
            "num_attention_heads": 4,
            "intermediate_size": 1024,
            "embedding_size": 128,
        },
    ),
    "bert-base": ("BertModel", {}),
}
NAMES = tuple(_SHAPES)

# The standard deviation of what is added to biases and to LayerNorm's weights, which are 0 and 1 at first: a forward
# that leaves one out would be right.
_NOISE = 0.1
_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def build(name: str, **changes: int) -> Any:
    """The model of a published shape with random weights, the same in every run, in fp32 and eval mode.

    name: one of NAMES; `changes` are arguments of its config, as num_hidden_layers=2

    Raises: ValueError for another name.
    """
    config = config_of(name, **changes)
    return random_model(getattr(models, _SHAPES[name][0]), config)


def config_of(name: str, **changes: int) -> Any:
    """The config of a published shape; see `build`."""
    if name not in _SHAPES:
        raise ValueError(f"unknown shape {name!r}: expected one of {', '.join(NAMES)}")
    class_name, values = _SHAPES[name]
    return getattr(models, class_name).config_class(**{**values, **changes})


def random_model(model_class: Any, config: Any) -> Any:
    """A model of a class of fastconv.models or fastconv.reference with random weights, the same in every run, in fp32
    and eval mode.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(config)
        _enliven(model)
    return model.eval()


@torch.no_grad()
def _enliven(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or parameter.dim() == 1:
            parameter.add_(torch.randn_like(parameter), alpha=_NOISE)
        elif name.endswith("depthwise.weight"):
            # As the original initialises it. With 0.02 the dynamic kernels would be uniform to three digits.
            parameter.normal_(0.0, 1 / parameter.shape[-1])


def train_tokenizer(sentences: Iterable[str], vocab_size: int) -> BertTokenizer:
    """A WordPiece tokenizer, lower-casing, with a vocabulary from these sentences: their characters, and the words and
    ends of words that occur at least twice, the most frequent first. All ids are < vocab_size.

    The same sentences give the same vocabulary, which the trainers of `tokenizers` don't promise.
    """
    from tokenizers import normalizers, pre_tokenizers

    normalize = normalizers.BertNormalizer(lowercase=True).normalize_str
    split = pre_tokenizers.BertPreTokenizer().pre_tokenize_str
    words = Counter(word for sentence in sentences for word, _ in split(normalize(sentence)))
    characters: Counter[str] = Counter()
    pieces: Counter[str] = Counter()
    for word, count in words.items():
        pieces[word] += count
        for start, character in enumerate(word):
            characters["##" + character if start else character] += count
            if start:
                pieces["##" + word[start:]] += count
    ranked = [*_by_count(characters, 1), *_by_count(pieces, 2)]
    vocab = list(dict.fromkeys([*_SPECIAL, *ranked]))[:vocab_size]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "vocab.txt"
        file.write_text("".join(f"{token}\n" for token in vocab), encoding="utf-8")
        return BertTokenizer(file)


def _by_count(tokens: Counter[str], least: int) -> list[str]:
    return sorted((token for token in tokens if tokens[token] >= least), key=lambda token: (-tokens[token], token))
