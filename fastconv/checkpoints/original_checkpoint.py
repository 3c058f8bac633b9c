"""The TensorFlow 1 checkpoints of ConvBERT's original code, github.com/yitu-opensource/ConvBert.

Its pretraining keeps a discriminator under `electra/` and `discriminator_predictions/`, and a generator under
`generator/` and `generator_predictions/`, which takes the embeddings, and possibly the encoder too, from `electra/`.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
from functools import partial
from pathlib import Path
from typing import Any

from fastconv import reference
from fastconv.checkpoints.stored_tensors import StoredTensor, listed
from fastconv.checkpoints.tensorflow_layouts import from_tensorflow
from fastconv.folders import read_json, what_is_there

PARTS = ("discriminator", "generator")
# A grouped kernel is (G, I, O) there.
_GROUPED = (0, 1, 2)
_TRAINING = re.compile(r"(^|/)(global_step|adam_[mv])$")
# Parts of the original's names -> those of transformers, in the order in which they are replaced.
_NAMES = (
    (r"/layer_(\d+)/", r"/layer/\1/"),
    (r"/conv_attn_key/", "/key_conv_attn_layer/"),
    (r"/conv_attn_kernel/", "/conv_kernel_layer/"),
    (r"/conv_attn_point/", "/conv_out_layer/"),
    (r"/g_dense/", "/dense/"),
    (r"_embeddings$", "_embeddings/embeddings"),
    (r"^generator_predictions/output_bias$", "generator_lm_head/bias"),
    (r"^discriminator_predictions/dense_1/", "discriminator_predictions/dense_prediction/"),
)


def read_config(file: Path) -> reference.ConvBertConfig:
    """The config in a JSON file with the names of the original (linear_groups, conv_type) or of transformers.

    Raises FileNotFoundError; ValueError, TypeError for values that no model can be built from, and for a head_ratio
    with which the original's parameters have other shapes than those of transformers' ConvBERT.
    """
    values = read_json(file)
    try:
        return _config(values)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{str(file)!r}: {error}") from error


def _config(values: dict[str, Any]) -> reference.ConvBertConfig:
    conv_type = values.pop("conv_type", "sdconv")
    if conv_type != "sdconv":
        raise ValueError(f"conv_type must be 'sdconv', the span-based dynamic convolution, got {conv_type!r}")
    groups = values.pop("linear_groups", None)
    if groups is not None and values.setdefault("num_groups", groups) != groups:
        raise ValueError(f"linear_groups and num_groups are one, got {groups!r} and {values['num_groups']!r}")
    if values.get("embedding_size") is None:
        values["embedding_size"] = values.get("hidden_size", reference.ConvBertConfig.hidden_size)
    values.setdefault("pad_token_id", 0)  # [PAD] is the first token of the original's vocab.txt
    config = reference.ConvBertConfig.from_dict(values)
    original = config.hidden_size // config.num_attention_heads
    if config.head_ratio != 2 or original != config.attention_head_size:
        raise ValueError(
            f"head_ratio must be 2 and num_attention_heads even, got {config.head_ratio} and "
            f"{config.num_attention_heads}: the original gives a head hidden_size / num_attention_heads = {original} "
            f"channels, transformers' ConvBERT and this library {config.attention_head_size}, so that the "
            "parameters have other shapes and can't be converted"
        )
    return config


def find_prefix(checkpoint: str | os.PathLike[str]) -> Path:
    """The prefix of a checkpoint's files, given it, one of the files, or a folder with one checkpoint.

    Raises FileNotFoundError; ValueError for a folder with several.
    """
    path = Path(checkpoint)
    if path.is_dir():
        found = sorted(path.glob("*.index"))
        if len(found) > 1:
            names = listed(file.stem for file in found)
            raise ValueError(f"{str(path)!r} holds several checkpoints, expected the path of one: {names}")
        if not found:
            raise FileNotFoundError(f"no TensorFlow checkpoint (*.index) in {str(path)!r}: {what_is_there(path)}")
        path = found[0]
    path = path.with_name(re.sub(r"\.(index|meta|data-\d{5}-of-\d{5})$", "", path.name))
    if not path.with_name(f"{path.name}.index").is_file():
        raise FileNotFoundError(
            f"no TensorFlow checkpoint {str(path)!r}: expected {path.name}.index and {path.name}.data-* in "
            f"{str(path.parent)!r}; {what_is_there(path.parent)}"
        )
    return path


def read_variables(prefix: Path, part: str) -> tuple[dict[str, StoredTensor], list[str]]:
    """The tensors of a part with the names and layouts of PyTorch, and the names of the variables of other parts.

    part: "discriminator" or "generator"

    Raises ImportError without tensorflow; ValueError for a checkpoint of something else, or not whole.
    """
    reader = _open(prefix)
    shapes = {name: shape for name, shape in reader.get_variable_to_shape_map().items() if not _TRAINING.search(name)}
    dtypes = reader.get_variable_to_dtype_map()
    if not any(name.startswith("electra/encoder/") for name in shapes):
        raise ValueError(
            f"{str(prefix)!r} is no checkpoint of ConvBERT's original code: it has no variables under "
            f"electra/encoder/; it holds {listed(sorted(shapes), 3) or 'none'}"
        )
    scopes = _scopes(part, list(shapes))
    tensors: dict[str, StoredTensor] = {}
    others: list[str] = []
    for variable in sorted(shapes):
        scope = next((scope for scope in scopes if variable.startswith(scope)), None)
        if scope is None:
            others.append(variable)
            continue
        name = scopes[scope] + variable.removeprefix(scope)
        for theirs, ours in _NAMES:
            name = re.sub(theirs, ours, name)
        name, tensor = from_tensorflow(
            name,
            tuple(shapes[variable]),
            dtypes[variable].name,
            partial(_read, reader, prefix, variable),
            _GROUPED,
        )
        tensors[name] = tensor
    return tensors, others


def _open(prefix: Path) -> Any:
    with contextlib.suppress(ImportError):
        # Both bring an LLVM. Imported after tensorflow (2.21), triton (3.7) ends the process; before it, both work.
        importlib.import_module("triton")
    try:
        tensorflow = importlib.import_module("tensorflow")
    except ImportError as error:
        raise ImportError(
            f"converting the TensorFlow checkpoint {str(prefix)!r} needs tensorflow, which nothing else here does: "
            "pip install tensorflow"
        ) from error
    try:
        return tensorflow.train.load_checkpoint(str(prefix))
    except Exception as error:  # TensorFlow's own kinds
        raise ValueError(f"{str(prefix)!r} can't be read as a TensorFlow checkpoint: {error}") from error


def _scopes(part: str, variables: list[str]) -> dict[str, str]:
    """Scope of the original -> that of transformers, for a part."""
    if part == "discriminator":
        return {"electra/": "convbert/", "discriminator_predictions/": "discriminator_predictions/"}
    if not any(name.startswith("generator/encoder/") for name in variables):  # it is one with the discriminator
        return {"electra/": "convbert/", "generator_predictions/": "generator_predictions/"}
    tied = not any(name.startswith("generator/embeddings/") for name in variables)
    return {
        "electra/embeddings/" if tied else "generator/embeddings/": "convbert/embeddings/",
        "generator/": "convbert/",
        "generator_predictions/": "generator_predictions/",
    }


def _read(reader: Any, prefix: Path, variable: str) -> Any:
    try:
        return reader.get_tensor(variable)
    except Exception as error:
        raise ValueError(f"{variable} can't be read from {str(prefix)!r}: {error}") from error
