"""What save_pretrained writes, and what it leaves of what was in the folder."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from checkpoint_folders import outputs, quietly, random_model
from safetensors.torch import load_file

from fastconv import models
from fastconv.checkpoints.saving import parse_size


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A folder with a BertModel."""
    random_model("BertModel").save_pretrained(tmp_path)
    return tmp_path


def test_parameters_in_one_memory_are_saved_apart(tmp_path):
    model = random_model("BertModel")
    attention = model.encoder.layer[0].attention.self
    packed = torch.randn(3 * 16, 16)
    for index, name in enumerate(("query", "key", "value")):
        getattr(attention, name).weight = torch.nn.Parameter(packed[16 * index : 16 * (index + 1)])
    attention.query.weight = torch.nn.Parameter(packed[:16].T)
    model.save_pretrained(tmp_path)
    again = models.BertModel.from_pretrained(tmp_path)
    for name, parameter in again.state_dict().items():
        assert torch.equal(parameter, model.state_dict()[name]), name
    torch.testing.assert_close(outputs(again)[0], outputs(model)[0])  # a transposed weight's product rounds otherwise
    model.to("meta")
    with pytest.raises(ValueError, match="is on the meta device, expected data to save"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize("size", ["5GB", 4000])
def test_two_parameters_of_one_memory(size, tmp_path):
    model = random_model("BertForMaskedLM", tie_word_embeddings=False)
    model.cls.predictions.decoder.weight = torch.nn.Parameter(model.get_input_embeddings().weight.data)
    model.save_pretrained(tmp_path, max_shard_size=size)
    again = quietly(models.BertForMaskedLM.from_pretrained, tmp_path)
    assert torch.equal(outputs(again)[0], outputs(model)[0])
    assert again.get_output_embeddings().weight is not again.get_input_embeddings().weight


@pytest.mark.skipif(os.name != "posix", reason="no permissions of POSIX here")
def test_the_files_are_readable_as_others_that_one_writes(tmp_path):
    (tmp_path / "other").write_text("")
    random_model("BertModel").save_pretrained(tmp_path)
    assert {file.stat().st_mode for file in tmp_path.iterdir()} == {(tmp_path / "other").stat().st_mode}


def test_a_save_that_fails_leaves_the_old_checkpoint(base, monkeypatch):
    before = {file.name: file.read_bytes() for file in base.iterdir()}
    assert before.keys() == {"config.json", "model.safetensors"}

    def fail(tensors, file, metadata):
        Path(file).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(OSError, match="no space left"):
        random_model("BertForMaskedLM").save_pretrained(base)
    assert {file.name: file.read_bytes() for file in base.iterdir()} == before
    with pytest.raises(NotADirectoryError, match="expected a folder to save into, got the file"):
        random_model("BertModel").save_pretrained(base / "config.json")


@pytest.mark.parametrize("name", ["BertForMaskedLM", "ConvBertForMaskedLM", "RoCBertForPreTraining"])
def test_shards_of_a_size(name, tmp_path):
    model = random_model(name)
    model.save_pretrained(tmp_path / "one")
    whole = load_file(tmp_path / "one" / "model.safetensors")
    most = 4000
    model.save_pretrained(tmp_path, max_shard_size=most)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {
        "total_parameters": sum(tensor.numel() for tensor in whole.values()),
        "total_size": sum(tensor.nbytes for tensor in whole.values()),
    }
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 3
    assert [file.name for file in files] == [
        f"model-{number:05}-of-{len(files):05}.safetensors" for number in range(1, len(files) + 1)
    ]
    found = {}
    for file in files:
        part = load_file(file)
        assert sum(tensor.nbytes for tensor in part.values()) <= most or len(part) == 1
        assert all(index["weight_map"][key] == file.name for key in part)
        found |= part
    assert found.keys() == whole.keys() == index["weight_map"].keys()
    assert all(torch.equal(found[key], whole[key]) for key in whole)
    again = quietly(getattr(models, name).from_pretrained, tmp_path)
    assert torch.equal(outputs(again)[0], outputs(model)[0])


def test_what_an_older_save_left_is_not_loaded(base):
    (base / "notes.txt").write_text("of mine")
    (base / "pytorch_model.bin").write_bytes(b"of somebody else")
    (base / "model-of-mine.safetensors").write_bytes(b"of mine")
    kept = {"config.json", "notes.txt", "pytorch_model.bin", "model-of-mine.safetensors"}
    for size in (3000, 5000, "5GB", 3000, "1KB", 10**9):
        model = random_model("BertModel")
        model.save_pretrained(base, max_shard_size=size)
        assert torch.equal(outputs(quietly(models.BertModel.from_pretrained, base))[0], outputs(model)[0]), size
        written = {file.name for file in base.iterdir()} - kept
        if "model.safetensors" in written:
            assert written == {"model.safetensors"} and size in ("5GB", 10**9)
        else:
            index = json.loads((base / "model.safetensors.index.json").read_text())
            assert written == {"model.safetensors.index.json", *index["weight_map"].values()}
    assert (base / "model-of-mine.safetensors").read_bytes() == b"of mine"


def test_a_sharded_save_that_fails_leaves_the_old_checkpoint(base, monkeypatch):
    from safetensors import torch as safetensors

    before = {file.name: file.read_bytes() for file in base.iterdir()}
    save, written = safetensors.save_file, []

    def fail_at_the_third(tensors, file, metadata):
        if len(written) == 2:
            raise OSError("no space left on device")
        written.append(file)
        save(tensors, file, metadata)

    monkeypatch.setattr("safetensors.torch.save_file", fail_at_the_third)
    with pytest.raises(OSError, match="no space left"):
        random_model("BertModel").save_pretrained(base, max_shard_size=2000)
    assert {file.name: file.read_bytes() for file in base.iterdir()} == before


@pytest.mark.parametrize(
    "size, expected",
    [(1, 1), ("5GB", 5 * 10**9), ("200MB", 200 * 10**6), ("1.5 kib", 1536), ("2TiB", 2**41), (" 7KB ", 7000)],
)
def test_sizes(size, expected):
    assert parse_size(size) == expected


@pytest.mark.parametrize(
    "size, error, message",
    [
        (0, ValueError, "max_shard_size must be positive, got 0"),
        (-1, ValueError, "must be positive, got -1"),
        ("0MB", ValueError, "must be positive, got 0"),
        ("5", ValueError, "must be a number and a unit, like '200MB' or '5GiB', got '5'"),
        ("GB", ValueError, "must be a number and a unit, .* got 'GB'"),
        ("-5GB", ValueError, "must be a number and a unit"),
        (2.5, TypeError, "must be an int or a str like '200MB', got 2.5"),
        (True, TypeError, "must be an int or a str like '200MB', got True"),
        (None, TypeError, "must be an int or a str like '200MB', got None"),
    ],
)
def test_sizes_that_are_none(base, size, error, message):
    before = {file.name: file.read_bytes() for file in base.iterdir()}
    with pytest.raises(error, match=message):
        random_model("BertModel").save_pretrained(base, max_shard_size=size)
    assert {file.name: file.read_bytes() for file in base.iterdir()} == before


def test_embeddings_that_are_no_longer_tied(tmp_path):
    model = random_model("BertForMaskedLM")
    model.bert.resize_token_embeddings(50)  # of the encoder alone: the head's layer stays as it was
    with pytest.raises(ValueError, match=r"tie_word_embeddings is True, but .* call tie_weights\(\), or resize"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
