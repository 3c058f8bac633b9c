"""Checkpoints of ConvBERT's original code: the golden ones, those of random models, and a stand-in that reads them.

The stand-in takes the place of tensorflow where that is not installed. The data file of the golden checkpoints is their
variables one after another, sorted by name.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest

DATA = Path(__file__).parent / "data" / "original"
CASES = {case["name"]: case for case in json.loads((DATA / "index.json").read_text())["cases"]}
needs_tensorflow = pytest.mark.skipif(
    importlib.util.find_spec("tensorflow") is None, reason="the package tensorflow is not installed"
)


class StandIn:
    """What tensorflow.train.load_checkpoint gives: a reader of these variables."""

    def __init__(self, variables: dict[str, np.ndarray]) -> None:
        self.variables = variables

    def get_variable_to_shape_map(self):
        return {name: list(value.shape) for name, value in self.variables.items()}

    def get_variable_to_dtype_map(self):
        return {name: value.dtype for name, value in self.variables.items()}

    def get_tensor(self, name: str) -> np.ndarray:
        return self.variables[name].copy()


def golden_variables(prefix: str) -> dict[str, np.ndarray]:
    data = np.fromfile(f"{prefix}.data-00000-of-00001", dtype="<f4")
    variables = {}
    for name, shape in sorted(CASES[Path(prefix).parent.name]["variables"]):
        variables[name], data = data[: np.prod(shape)].reshape(shape), data[np.prod(shape) :]
    assert not len(data)
    return variables


def stand_in(monkeypatch, load) -> None:
    """Let `load` take the place of tensorflow.train.load_checkpoint."""
    module = types.ModuleType("tensorflow")
    module.__spec__ = importlib.machinery.ModuleSpec("tensorflow", None)  # what other packages look for
    module.train = types.SimpleNamespace(load_checkpoint=load)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorflow", module)


def original(model, scope: str = "electra", *, embeddings: str = "electra") -> dict[str, np.ndarray]:
    """The variables of a model of this library with the original's names and layouts."""
    variables = {}
    for name, tensor in model.state_dict().items():
        if name == "generator_lm_head.weight":
            continue
        name = re.sub(r"\.layer\.(\d+)\.", r".layer_\1.", name.removeprefix("convbert."))
        *path, leaf = name.split(".")
        if path[-1] == "depthwise":
            path, leaf, tensor = path[:-1], "depthwise_kernel", tensor.permute(2, 0, 1)
        elif path[-1] == "pointwise":
            path, leaf, tensor = path[:-1], "pointwise_kernel", tensor.permute(2, 1, 0)
        elif path[-1].endswith("_embeddings"):
            leaf = path.pop()
        elif path[-1] == "LayerNorm":
            leaf = {"weight": "gamma", "bias": "beta"}[leaf]
        elif leaf == "weight" and tensor.dim() == 3:
            path[-1], leaf = "g_dense", "kernel"
        elif leaf == "weight":
            leaf, tensor = "kernel", tensor.T
        elif tensor.dim() == 2:
            tensor = tensor[:, 0]
        elif tensor.shape[0] == model.config.intermediate_size or (path[0] == "encoder" and path[2] == "output"):
            path[-1] = "g_dense" if model.config.num_groups > 1 else "dense"
        renamed = {"key_conv_attn_layer": "conv_attn_key", "conv_kernel_layer": "conv_attn_kernel",
                   "conv_out_layer": "conv_attn_point"}  # fmt: skip
        name = "/".join(renamed.get(part, part) for part in (*path, leaf))
        name = name.replace("generator_lm_head/bias", "generator_predictions/output_bias")
        if not name.startswith("generator_predictions"):
            name = f"{embeddings if name.startswith('embeddings/') else scope}/{name}"
        variables[name] = tensor.contiguous().numpy()
    return variables


def give(monkeypatch, folder: Path, variables: dict[str, np.ndarray], config) -> Path:
    """Put a checkpoint of these variables, beside which lies a config, into a folder; returns its prefix."""
    folder.mkdir(exist_ok=True)
    (folder / "model.ckpt-7.index").touch()
    config.save_pretrained(folder)
    stand_in(monkeypatch, lambda prefix: StandIn(variables))
    return folder / "model.ckpt-7"
