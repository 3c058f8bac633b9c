"""Small checkpoint folders with a tokenizer, and commands run in this process."""

from __future__ import annotations

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


def save(folder: Path, name: str = "BertModel") -> Path:
    """A checkpoint folder of this class, small, with random weights and a vocabulary of characters."""
    model_class = getattr(models, name)
    model = model_class(model_class.config_class(**(_CONVBERT if name.startswith("Conv") else _SMALL)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    model.save_pretrained(folder)
    letters = "abcdefghijklmnopqrstuvwxyz"
    write_vocab(folder, [*letters, *".!?,", *(f"##{letter}" for letter in letters)])
    return folder


def write_vocab(folder: Path, tokens: list[str]) -> None:
    """A vocab.txt with these tokens after the special ones."""
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *tokens]
    (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in vocab))


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command."""
    code = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err
