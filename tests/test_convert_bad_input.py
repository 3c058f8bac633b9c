"""What `fastconv convert` refuses: the error says what was given, what was expected and why."""

from __future__ import annotations

import json
import re
import sys

import numpy as np
import pytest
import tiny
from checkpoint_folders import random_model
from original_checkpoints import DATA, give, needs_tensorflow, original

from fastconv.checkpoints.convert import convert_checkpoint


@needs_tensorflow
def test_files_that_tensorflow_can_not_read(tmp_path):
    for file in (DATA / "base").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    data = tmp_path / "model.ckpt.data-00000-of-00001"
    data.write_bytes(data.read_bytes()[:-40000])
    with pytest.raises(ValueError, match=r"\S+ can't be read from '.*model.ckpt'"):
        convert_checkpoint(tmp_path, tmp_path / "out")
    (tmp_path / "model.ckpt.index").write_bytes(b"no index")
    with pytest.raises(ValueError, match=r"model.ckpt' can't be read as a TensorFlow checkpoint"):
        convert_checkpoint(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "values, message",
    [
        (
            {"head_ratio": 4},
            r"head_ratio must be 2 .* got 4 and 4: .* = 4 channels, .* 8, so that .* can't be converted",
        ),
        ({"head_ratio": 1}, r"head_ratio must be 2 .* got 1 and 4"),
        ({"num_attention_heads": 1}, r"num_attention_heads even, got 2 and 1: .* = 16 channels, .* library 8"),
        ({"conv_type": "noconv"}, r"conv_type must be 'sdconv', .* got 'noconv'"),
        ({"linear_groups": "2", "num_groups": 2}, "linear_groups and num_groups are one, got '2' and 2"),
        ({"linear_groups": 1, "num_groups": 2}, "linear_groups and num_groups are one, got 1 and 2"),
        ({"conv_kernel_size": 4}, "conv_kernel_size must be odd, got 4"),
        ({"model_type": "bert"}, "ConvBertConfig needs model_type 'convbert', got 'bert'"),
        ({"hidden_size": "16"}, "hidden_size must be an int, got '16'"),
    ],
)
def test_configs_that_no_checkpoint_fits(values, message, monkeypatch, tmp_path):
    model = random_model("ConvBertModel")
    prefix = give(monkeypatch, tmp_path, original(model), model.config)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **values}))
    with pytest.raises((ValueError, TypeError), match=rf"config.json': .*{message}"):
        convert_checkpoint(prefix, tmp_path / "out")


@pytest.mark.parametrize(
    "values, message",
    [
        (
            {"hidden_size": 32},
            r"encoder.layer.0.attention.self.query.weight \(checkpoint \[8, 16\], config \[16, 32\]\)",
        ),
        ({"num_attention_heads": 2}, r"conv_kernel_layer.weight \(checkpoint \[6, 8\], config \[3, 8\]\)"),
        ({"num_groups": 1}, r"intermediate.dense.weight \(checkpoint \[2, 8, 12\], config \[24, 16\]\)"),
        ({"conv_kernel_size": 5}, r"depthwise.weight \(checkpoint \[16, 1, 3\], config \[16, 1, 5\]\)"),
        ({"vocab_size": 41}, r"word_embeddings.weight \(checkpoint \[40, 8\], config \[41, 8\]\)"),
        (
            {"embedding_size": None},
            r"word_embeddings.weight \(checkpoint \[40, 8\], config \[40, 16\]\)|holds what no mod",
        ),
        ({"num_hidden_layers": 1}, r"holds what no model with its config has: convbert.encoder.layer.1.attention"),
        ({"num_hidden_layers": 3}, r"lacks parameters of the encoder of ConvBertModel: encoder.layer.2.attention"),
    ],
)
def test_configs_of_other_checkpoints(values, message, monkeypatch, tmp_path):
    model = random_model("ConvBertModel")
    prefix = give(monkeypatch, tmp_path, original(model), model.config)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **values}))
    with pytest.raises(ValueError, match=rf"model.ckpt-7' .*({message})"):
        convert_checkpoint(prefix, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_checkpoints_of_something_else(monkeypatch, tmp_path):
    model = random_model("ConvBertModel")
    prefix = give(monkeypatch, tmp_path, {"bert/embeddings/word_embeddings": np.ones((40, 8))}, model.config)
    with pytest.raises(ValueError, match=r"is no checkpoint of ConvBERT's original code: .* holds bert/embeddings/"):
        convert_checkpoint(prefix, tmp_path / "out")
    give(monkeypatch, tmp_path, {**original(model), "electra/encoder/adapter/kernel": np.ones((2, 2))}, model.config)
    with pytest.raises(ValueError, match=r"no model with its config has: convbert.encoder.adapter.weight"):
        convert_checkpoint(prefix, tmp_path / "out")
    give(monkeypatch, tmp_path, original(model), model.config)
    with pytest.raises(ValueError, match=r"lacks parameters of ConvBertForMaskedLM: generator_predictions.dense"):
        convert_checkpoint(prefix, tmp_path / "out", part="generator")
    with pytest.raises(ValueError, match=r"part must be one of 'discriminator', 'generator', got 'electra'"):
        convert_checkpoint(prefix, tmp_path / "out", part="electra")
    model.config.hidden_act = "relu"
    give(monkeypatch, tmp_path, original(model), model.config)
    with pytest.raises(ValueError, match=r"head of ConvBertForMaskedLM has the activation 'gelu', got 'relu' in"):
        convert_checkpoint(prefix, tmp_path / "out", part="generator")


def test_finding_the_checkpoint(monkeypatch, tmp_path):
    model = random_model("ConvBertModel")
    folder = tmp_path / "checkpoint"
    prefix = give(monkeypatch, folder, original(model), model.config)
    for given in (prefix, folder, str(prefix) + ".index", str(prefix) + ".meta", f"{prefix}.data-00000-of-00001"):
        assert convert_checkpoint(given, tmp_path / "out").model_class == "ConvBertModel"
    with pytest.raises(FileNotFoundError, match=r"no TensorFlow checkpoint '.*model.ckpt-8': expected model.ckpt-8.in"):
        convert_checkpoint(folder / "model.ckpt-8", tmp_path / "out")
    with pytest.raises(
        FileNotFoundError, match=r"expected model.ckpt.index .* in '.*nowhere'; there is no such folder"
    ):
        convert_checkpoint(tmp_path / "nowhere" / "model.ckpt", tmp_path / "out")
    (folder / "model.ckpt-8.index").touch()
    with pytest.raises(ValueError, match=r"holds several checkpoints, expected .* one: model.ckpt-7, model.ckpt-8"):
        convert_checkpoint(folder, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"no TensorFlow checkpoint \(\*.index\) in '.*out': it holds config"):
        convert_checkpoint(tmp_path / "out", tmp_path / "x")
    with pytest.raises(ValueError, match=r"checkpoint' holds the config to read, which would be replaced"):
        convert_checkpoint(prefix, folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no config.json in '.*checkpoint': it holds model.ckpt-7.index"):
        convert_checkpoint(prefix, tmp_path / "x")


def test_without_tensorflow(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    code, out, err = tiny.run(capsys, "convert", DATA / "base", tmp_path)
    assert (code, out) == (2, "")
    assert re.fullmatch(
        r"fastconv convert: error: converting the TensorFlow checkpoint '.*model.ckpt' needs tensorflow, which nothing "
        r"else here does: pip install tensorflow\n",
        err,
    )
    code, _, err = tiny.run(capsys, "convert", DATA / "base", tmp_path, "--config", DATA / "k4_even" / "config.json")
    assert code == 2 and err.count("\n") == 1 and "conv_kernel_size must be odd, got 4" in err
    assert not list(tmp_path.iterdir())
