"""Models of every class with random weights, and changes to the folders that they are saved in."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch

from fastconv import models

pytest.importorskip("safetensors", reason="checkpoints are saved as safetensors, which is not installed")
from safetensors.torch import load_file, save_file

SMALL = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 20,
}
CONFIGS = {
    "Bert": models.BertConfig(**SMALL, num_labels=2),
    "ConvBert": models.ConvBertConfig(**SMALL, embedding_size=8, conv_kernel_size=3, num_groups=2, num_labels=2),
    "RoCBert": models.RoCBertConfig(
        **SMALL,
        num_labels=2,
        shape_vocab_size=30,
        shape_embed_dim=6,
        pronunciation_vocab_size=25,
        pronunciation_embed_dim=10,
    ),
}
# Head -> the class of transformers that finds the right class by the config.
AUTO_CLASSES = {
    "Model": "AutoModel",
    "ForPreTraining": "AutoModelForPreTraining",
    "LMHeadModel": "AutoModelForCausalLM",
    "ForCausalLM": "AutoModelForCausalLM",
    "ForMaskedLM": "AutoModelForMaskedLM",
    "ForNextSentencePrediction": "AutoModelForNextSentencePrediction",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForQuestionAnswering": "AutoModelForQuestionAnswering",
    "ForMultipleChoice": "AutoModelForMultipleChoice",
}
CLASSES = [f"{family}{head}" for family in CONFIGS for head in AUTO_CLASSES if hasattr(models, f"{family}{head}")]
assert len(CLASSES) == 9 + 6 + 8, "every model class of the library"
ids = torch.tensor([[4, 7, 9, 5, 0], [4, 11, 12, 13, 5]])
mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])


def family_of(name: str) -> str:
    """The family of a class by its name."""
    return next(family for family in CONFIGS if name.startswith(family))


def config_of(name: str):
    return CONFIGS[family_of(name)]


def random_model(name: str, **changes):
    """A model of this class whose every parameter is random, so that a mixed up one shows."""
    config = config_of(name)
    return randomize(getattr(models, name)(type(config).from_dict({**config.to_dict(), **changes})))


def randomize(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return model.eval()


def outputs(model):
    """The logits, or the hidden states."""
    inputs = {"input_ids": ids, "attention_mask": mask}
    if type(model).__name__.startswith("RoCBert"):
        inputs |= {"input_shape_ids": ids + 3, "input_pronunciation_ids": ids + 1}
    if type(model).__name__.endswith("MultipleChoice"):
        inputs = {name: tensor[None] for name, tensor in inputs.items()}
    with torch.no_grad():
        out = model(**inputs)
    return [value for value in out.to_tuple() if isinstance(value, torch.Tensor)]


def rewrite(folder: Path, change) -> None:
    """Replace the tensors of a folder by what `change` makes of their dict."""
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors", metadata={"format": "pt"})


def renamed(names):
    """A change of names for `rewrite`."""
    return lambda tensors: {names(name): tensor for name, tensor in tensors.items()}


def edit_config(folder: Path, **values) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, **values}))


def shard(folder: Path, form: str = "safetensors") -> Path:
    """Replace model.safetensors by three shards and their index, as safetensors or "bin"; returns the index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    stem = "model" if form == "safetensors" else "pytorch_model"
    places = {name: f"{stem}-{number % 3 + 1:05}-of-00003.{form}" for number, name in enumerate(tensors)}
    for place in set(places.values()):
        part = {name: tensor for name, tensor in tensors.items() if places[name] == place}
        (save_file if form == "safetensors" else torch.save)(part, folder / place)
    index = folder / f"{stem}.{form}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return index


def to_bin(folder: Path, zipped: bool = True) -> Path:
    """Replace model.safetensors by pytorch_model.bin, in the format of today or in that before torch 1.6."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    return folder / "pytorch_model.bin"


def quietly(load, *arguments, **options):
    """Call with warnings as errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load(*arguments, **options)
