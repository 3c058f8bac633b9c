"""Small checkpoint folders with a tokenizer, and commands run in this process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fastconv import cli, models

for package in ("safetensors", "tokenizers"):
    pytest.importorskip(package, reason=f"checkpoint folders need {package}, which is not installed")

TEXT = "The cat sat. A dog ran far away from it! Who saw them go? Nobody did, so the tale ends here.\n\nAnother one."
_SMALL = {
    "vocab_size": 70,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 20,
}
_CONVBERT = {**_SMALL, "embedding_size": 8, "conv_kernel_size": 3, "num_groups": 2, "pad_token_id": 0}
_ROCBERT = {
    **_SMALL,
    "shape_vocab_size": 40,
    "shape_embed_dim": 6,
    "pronunciation_vocab_size": 30,
    "pronunciation_embed_dim": 5,
}


def save(folder: Path, name: str = "BertModel", **config: object) -> Path:
    """A checkpoint folder of this class, small, with random weights and a vocabulary of characters."""
    model_class = getattr(models, name)
    small = {"Conv": _CONVBERT, "RoCB": _ROCBERT}.get(name[:4], _SMALL)
    model = model_class(model_class.config_class(**{**small, **config}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    model.save_pretrained(folder)
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocab = write_vocab(folder, [*letters, *".!?,", *(f"##{letter}" for letter in letters)])
    if name.startswith("RoC"):
        for kind, size in (("shape", 40), ("pronunciation", 30)):
            ids = {token: number % size for number, token in enumerate(vocab)}
            (folder / f"word_{kind}.json").write_text(json.dumps(ids))
    return folder


def save_decoder(folder: Path, name: str = "BertLMHeadModel") -> Path:
    """A checkpoint folder of a decoder whose next token depends on the text."""
    model = getattr(models, name).from_pretrained(save(folder, name, is_decoder=True))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "LayerNorm.weight" in key or key.endswith("predictions.bias"):
                parameter.fill_("LayerNorm" in key)
    model.save_pretrained(folder)
    return folder


def write_vocab(folder: Path, tokens: list[str]) -> list[str]:
    """Write a vocab.txt with these tokens after the special ones, and return all of them."""
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *tokens]
    (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in vocab))
    return vocab


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command."""
    code = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err
