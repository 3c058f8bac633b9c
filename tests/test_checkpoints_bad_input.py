"""Every kind of bad checkpoint folder: the error names the file, what it holds and what was expected."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from checkpoint_folders import CONFIGS, edit_config, outputs, random_model, rewrite, shard, to_bin

from fastconv import models


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A folder with a BertModel."""
    random_model("BertModel").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def corrupt_header(data: bytes) -> bytes:
    return data[:8] + data[8:].replace(b'"F32"', b'"F33"', 1)


def test_missing_and_unexpected_encoder_parameters(base, tmp_path):
    layer = "encoder.layer.1.attention.self.query.weight"
    rewrite(base, lambda tensors: {name: tensor for name, tensor in tensors.items() if name != layer})
    for model_class, name in ((models.BertModel, layer), (models.BertForMaskedLM, f"bert.{layer}")):
        with pytest.raises(ValueError, match=rf"lacks parameters of the encoder of {model_class.__name__}: {name}; "):
            model_class.from_pretrained(base)
    rewrite(base, lambda tensors: {**tensors, layer: torch.zeros(16, 16), "adapter.up.weight": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"holds what no model with its config has: adapter.up.weight; "):
        models.BertModel.from_pretrained(base)


def test_a_config_for_other_weights(base):
    edit_config(base, num_hidden_layers=1)
    with pytest.raises(ValueError, match=r"holds what no .*encoder.layer.1.attention.* and 4 more"):
        models.BertModel.from_pretrained(base)
    edit_config(base, num_hidden_layers=2, vocab_size=41)
    shapes = r"embeddings.word_embeddings.weight \(checkpoint \[40, 16\], config \[41, 16\]\)"
    with pytest.raises(ValueError, match=rf"has shapes that are not those of its config: {shapes}$"):
        models.BertModel.from_pretrained(base)
    to_bin(base)
    with pytest.raises(ValueError, match=rf"has shapes that are not those of its config: {shapes}$"):
        models.BertModel.from_pretrained(base)


def test_sizes_that_no_memory_holds(base):
    edit_config(base, vocab_size=2**40)
    with pytest.raises(
        ValueError, match=r"word_embeddings.weight \(checkpoint \[40, 16\], config \[1099511627776, 16\]\)"
    ):
        models.BertModel.from_pretrained(base)


def test_a_tied_parameter_that_does_not_fit(tmp_path):
    random_model("BertForMaskedLM").save_pretrained(tmp_path)
    decoder = "cls.predictions.decoder.weight"
    for tensor, message in (
        (torch.ones(41, 16), rf"has shapes that .*: {decoder} \(checkpoint \[41, 16\], config \[40, 16\]\)"),
        (torch.ones(40, 16, dtype=torch.int8), rf"tensors, got {decoder} \(int8\)"),
    ):
        rewrite(tmp_path, lambda tensors, tensor=tensor: {**tensors, decoder: tensor})
        with pytest.raises(ValueError, match=message):
            models.BertForMaskedLM.from_pretrained(tmp_path)


def test_weights_of_another_family(base, tmp_path):
    config = CONFIGS["ConvBert"]
    with pytest.raises(ValueError, match="lacks parameters of the encoder of ConvBertModel"):
        models.ConvBertModel.from_pretrained(base, config=config)
    with pytest.raises(ValueError, match=r"config.json'.*needs model_type 'convbert', got 'bert'"):
        models.ConvBertModel.from_pretrained(base)


def test_integer_weights_and_twice_the_same(base):
    name = "pooler.dense.weight"
    rewrite(base, lambda tensors: {**tensors, name: torch.ones(16, 16, dtype=torch.int8)})
    with pytest.raises(
        ValueError, match=rf"must hold float64, float32, bfloat16, float16 tensors, got {name} \(int8\)"
    ):
        models.BertModel.from_pretrained(base)
    rewrite(base, lambda tensors: {**tensors, f"bert.{name}": torch.ones(16, 16)})
    with pytest.raises(ValueError, match=f"holds {name} twice, as "):
        models.BertModel.from_pretrained(base)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda data: data[:-7], "truncated or corrupted"),
        (lambda data: data[:5], r"truncated or corrupted \(5 bytes\)"),
        (lambda data: b"", r"truncated or corrupted \(0 bytes\)"),
        (lambda data: data + b"more", "truncated or corrupted"),
        (corrupt_header, "truncated or corrupted"),
        (lambda data: b"\xff" * 8 + data[8:], "truncated or corrupted"),
        (
            lambda data: pickle.dumps({"weight": [1.0] * 99}),
            "is a pickle, .*; rename it, or .*expected safetensors",
        ),
        (
            lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0",
            "is a Git LFS pointer; get .* git lfs",
        ),
    ],
)
@pytest.mark.parametrize("sharded", [False, True])
def test_files_that_are_no_safetensors(base, change, message, sharded):
    file = base / "model.safetensors"
    if sharded:
        shard(base)
        file = base / "model-00003-of-00003.safetensors"
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(ValueError, match=rf"{file.name}' .*{message}"):
        models.BertModel.from_pretrained(base)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_under_another_name_is_not_read(base, zipped):
    to_bin(base, zipped).rename(base / "model.safetensors")
    with pytest.raises(ValueError, match=r"model.safetensors' is a pickle, .*; rename it, .*; expected safetensors"):
        models.BertModel.from_pretrained(base)


def test_a_header_that_looks_like_a_pickle_is_no_pickle(tmp_path):
    # The first bytes are the length of the header: 640 is 80 02, as a pickle begins.
    model = random_model("BertModel")
    model.save_pretrained(tmp_path)
    data = (tmp_path / "model.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    padded = (size // 2**16 + 1) * 2**16 + 640
    header = data[8 : 8 + size] + b" " * (padded - size)
    data = padded.to_bytes(8, "little") + header + data[8 + size :]
    assert data[:2] == b"\x80\x02"
    (tmp_path / "model.safetensors").write_bytes(data)
    assert torch.equal(outputs(models.BertModel.from_pretrained(tmp_path))[0], outputs(model)[0])


@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize(
    "index, message",
    [
        ("{", r"index.json' is not JSON"),
        ("{}", "must hold a weight_map of names to files, got None"),
        ('{"weight_map": {"a": 1}}', "must hold a weight_map"),
        ('{"weight_map": {"a": "../STEM.FORM"}}', r"names the shard '../STEM.FORM', expected a file of that folder"),
        ('{"weight_map": {"a": "/STEM.FORM"}}', r"names the shard '/STEM.FORM', expected a file of that folder"),
        ('{"weight_map": {"a": "sub/STEM.FORM"}}', r"names the shard 'sub/STEM.FORM', expected a file of that folder"),
        ('{"weight_map": {"a": ".."}}', r"the shard '\.\.' is missing"),
        ('{"weight_map": {"a": ""}}', r"the shard '' is missing"),
    ],
)
def test_a_bad_index(base, form, index, message):
    place = shard(base, form)
    stem = place.name.partition(".")[0]
    place.write_text(index.replace("STEM", stem).replace("FORM", form))
    # What the paths lead to is there, so that only the check keeps it from being read.
    (base / "sub").mkdir()
    for folder in (base.parent, base / "sub"):
        torch.save({"a": torch.ones(1)}, folder / f"{stem}.{form}")
    with pytest.raises((ValueError, FileNotFoundError), match=message.replace("STEM", stem).replace("FORM", form)):
        models.BertModel.from_pretrained(base)


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_an_index_that_names_what_is_not_there(base, form):
    place = shard(base, form)
    index = json.loads(place.read_text())
    first = place.name.replace(f".{form}.index.json", f"-00001-of-00003.{form}")
    place.write_text(json.dumps({"weight_map": {**index["weight_map"], "encoder.more": first}}))
    with pytest.raises(ValueError, match=rf"{first}' lacks encoder.more, which {place.name} says it holds"):
        models.BertModel.from_pretrained(base)
    (base / first).unlink()
    with pytest.raises(FileNotFoundError, match=rf"the shard '{first}' is missing in .*{place.name} says"):
        models.BertModel.from_pretrained(base)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"{,}", r"config.json' is not JSON: .*; it starts with b'{,}'"),
        (b"\x80\x02}q\x00.", r"config.json' is not JSON"),
        (b"[" * 100_000, r"config.json' is not JSON: maximum recursion depth"),
        (b"[1]", r"config.json' must hold a JSON object, got a list"),
        (b'{"model_type": "roberta"}', r"config.json': BertConfig needs model_type 'bert', got 'roberta'"),
        (b'{"hidden_size": 10}', r"config.json': hidden_size must be divisible by num_attention_heads, got 10 and 12"),
    ],
)
def test_a_bad_config(base, content, message):
    (base / "config.json").write_bytes(content)
    for load in (models.BertConfig.from_pretrained, models.BertModel.from_pretrained):
        with pytest.raises(ValueError, match=message):
            load(base)


def test_a_folder_without_weights(base):
    (base / "model.safetensors").unlink()
    files = r"no model.safetensors, model.safetensors.index.json, pytorch_model.bin, .* or tf_model.h5 in "
    with pytest.raises(FileNotFoundError, match=files + r"'.*': it holds config.json$"):
        models.BertModel.from_pretrained(base)
    (base / "model.ckpt-100.index").touch()
    with pytest.raises(FileNotFoundError, match=files + r".*; a TensorFlow 1 checkpoint .* first: fastconv convert"):
        models.BertModel.from_pretrained(base)


def test_folders_that_are_not_there(base):
    (base / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no config.json in .*: it holds model.safetensors"):
        models.BertModel.from_pretrained(base)
    with pytest.raises(
        FileNotFoundError, match=r"'.*nowhere' is neither an existing folder nor a hub id like 'org/name'"
    ):
        models.BertModel.from_pretrained(str(base / "nowhere"))
    with pytest.raises(NotADirectoryError, match=r"expected a checkpoint folder, got the file '.*model.safetensors'"):
        models.BertModel.from_pretrained(base / "model.safetensors")
