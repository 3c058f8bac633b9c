"""pytorch_model.bin: what torch.save wrote is read, and no code in it ever runs."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
import weakref
import zipfile
from pathlib import Path

import pytest
import torch
from checkpoint_folders import CLASSES, outputs, quietly, random_model, shard, to_bin
from safetensors.torch import load_file

import fastconv
from fastconv import models
from fastconv.checkpoints.pickled_tensors import open_pickle

VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz", "##a", "##b", "cat", "dog"]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A folder with a BertModel."""
    random_model("BertModel").save_pretrained(tmp_path)
    return tmp_path


def save_bin(folder: Path, content, zipped: bool = True) -> None:
    """Write pytorch_model.bin in the place of model.safetensors."""
    (folder / "model.safetensors").unlink(missing_ok=True)
    torch.save(content, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", CLASSES)
def test_a_state_dict_loads(name, zipped, tmp_path):
    model = random_model(name)
    model.save_pretrained(tmp_path)
    save_bin(tmp_path, model.state_dict(), zipped)  # tied parameters twice, in one memory
    again = quietly(getattr(models, name).from_pretrained, tmp_path)
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    for ours, expected in zip(outputs(again), outputs(model), strict=True):
        assert torch.equal(ours, expected)


def test_the_folder_of_a_published_checkpoint(tmp_path):
    """As those of ConvBERT on the hub: no tokenizer_config.json, no safetensors, and the names of older versions."""
    pytest.importorskip("tokenizers", reason="the tokenizer is of the package tokenizers, which is not installed")
    model = random_model("ConvBertModel", pad_token_id=0)
    (tmp_path / "config.json").write_text(
        """{
  "architectures": ["ConvBertModel"], "attention_probs_dropout_prob": 0.1, "bos_token_id": 0, "conv_kernel_size": 3,
  "embedding_size": 8, "eos_token_id": 2, "head_ratio": 2, "hidden_act": "gelu", "hidden_dropout_prob": 0.1,
  "hidden_size": 16, "initializer_range": 0.02, "intermediate_size": 24, "layer_norm_eps": 1e-12,
  "max_position_embeddings": 20, "model_type": "convbert", "num_attention_heads": 4, "num_groups": 2,
  "num_hidden_layers": 2, "pad_token_id": 0, "summary_activation": "gelu", "summary_last_dropout": 0.1,
  "summary_type": "first", "summary_use_proj": true, "type_vocab_size": 2, "vocab_size": 40
}"""
    )
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    state = {}
    for name, value in model.state_dict().items():
        for new, gamma in old.items():
            name = name.replace(new, gamma)
        state[f"convbert.{name}"] = value
    state["convbert.embeddings.position_ids"] = torch.arange(20).expand(1, -1)  # stride 0
    state["discriminator_predictions.dense.weight"] = torch.randn(16, 16)
    state["discriminator_predictions.dense_prediction.weight"] = torch.randn(1, 16)
    save_bin(tmp_path, state, zipped=False)
    (tmp_path / "vocab.txt").write_text("".join(f"{token}\n" for token in VOCAB))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "pytorch_model.bin", "vocab.txt"]

    tokenizer = quietly(fastconv.ConvBertTokenizer.from_pretrained, tmp_path)
    assert tokenizer("Cat ab")["input_ids"] == [2, VOCAB.index("cat"), VOCAB.index("a"), VOCAB.index("##b"), 3]
    unused = "not in this model: discriminator_predictions.dense.weight, discriminator_predictions.dense_prediction.wei"
    with pytest.warns(UserWarning, match=unused) as caught:
        again = fastconv.ConvBertModel.from_pretrained(tmp_path)
    assert len(caught) == 1 and "random" not in str(caught[0].message)
    assert torch.equal(outputs(again)[0], outputs(model)[0])
    with pytest.warns(
        UserWarning, match=r"random until trained: classifier.weight, classifier.bias; in the checkpoint"
    ):
        head = fastconv.ConvBertForTokenClassification.from_pretrained(tmp_path)
    assert torch.equal(outputs(head.base_model)[0], outputs(model)[0])
    again.save_pretrained(tmp_path)
    assert torch.equal(outputs(quietly(fastconv.ConvBertModel.from_pretrained, tmp_path))[0], outputs(model)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("zipped", [True, False])
def test_dtypes_and_layouts_in_the_file(base, dtype, zipped):
    model = models.BertModel.from_pretrained(base).to(dtype)
    state = {
        name: value.t().contiguous().t() if value.dim() == 2 else value for name, value in model.state_dict().items()
    }
    packed = torch.stack(list(state["encoder.layer.0.attention.self.query.weight"][None]) * 2)  # slices of one tensor
    state["encoder.layer.0.attention.self.query.weight"] = packed[1]
    state["encoder.layer.0.attention.self.query.bias"] = torch.nn.Parameter(
        state["encoder.layer.0.attention.self.query.bias"]
    )
    assert not state["embeddings.word_embeddings.weight"].is_contiguous()
    save_bin(base, state, zipped)
    again = quietly(models.BertModel.from_pretrained, base, dtype="auto")
    assert again.dtype == dtype
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    assert all(parameter.requires_grad for parameter in again.parameters())
    assert quietly(models.BertModel.from_pretrained, base).dtype == torch.float32, "as config.json says"


def test_loading_leaves_the_file_as_it_is(base):
    file = to_bin(base)
    before = file.read_bytes()
    model = models.BertModel.from_pretrained(base)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert file.read_bytes() == before


def test_a_compressed_archive(base):
    # By a zip tool: the tensors don't lie in it as they are, so that it can't be mapped into memory.
    expected = outputs(models.BertModel.from_pretrained(base))[0]
    file = to_bin(base)
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    assert torch.equal(outputs(models.BertModel.from_pretrained(base))[0], expected)


def test_shards(base):
    expected = outputs(models.BertModel.from_pretrained(base))[0]
    shard(base, "bin")
    assert torch.equal(outputs(quietly(models.BertModel.from_pretrained, base))[0], expected)


def test_the_order_of_the_formats(base):
    """safetensors, its shards, bin, its shards; tf_model.h5 is last, see test_checkpoints_keras."""
    forms = {
        "model.safetensors": lambda folder: None,
        "model.safetensors.index.json": shard,
        "pytorch_model.bin": to_bin,
        "pytorch_model.bin.index.json": lambda folder: shard(folder, "bin"),
    }
    expected = {}
    for name, change in forms.items():
        model = random_model("BertModel")
        model.save_pretrained(base / "of" / name)
        change(base / "of" / name)
        expected[name] = outputs(model)[0]
    for name in forms:
        for file in (base / "of" / name).iterdir():
            file.rename(base / file.name)
    for name in forms:
        assert torch.equal(outputs(quietly(models.BertModel.from_pretrained, base))[0], expected[name]), name
        (base / name).unlink()


class Attack:
    """Unpickled, it writes a file."""

    def __init__(self, function, *arguments) -> None:
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", ["whole", "beside tensors", "inside", "shard"])
def test_a_malicious_pickle_is_refused_and_not_executed(base, zipped, place, forced, monkeypatch):
    if forced:  # torch's switch for code that does not say weights_only itself
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    mark = base / "executed"
    attack = Attack(os.system, f"touch {mark}")
    state = dict(models.BertModel.from_pretrained(base).state_dict())
    contents = {
        "whole": attack,
        "beside tensors": {**state, "more": attack},
        "inside": {**state, "more": [{"a": attack}]},
    }
    file = base / "pytorch_model.bin"
    if place == "shard":
        shard(base, "bin")
        file = base / "pytorch_model-00002-of-00003.bin"
        torch.save({**torch.load(file, weights_only=True), "more": attack}, file, _use_new_zipfile_serialization=zipped)
    else:
        save_bin(base, contents[place], zipped)
    refused = rf"{file.name}' is refused: it is a pickle that asks for (posix|nt).system, .* nothing of it was executed"
    with pytest.raises(ValueError, match=refused):
        models.BertModel.from_pretrained(base)
    assert not mark.exists()
    torch.load(file, weights_only=False)
    assert mark.exists(), "the attack is one"


@pytest.mark.filterwarnings("ignore:'torch.load' received a zip file that looks like a TorchScript archive")
def test_formats_that_could_run_code_are_refused(base, tmp_path):
    mark = tmp_path / "attacked"
    parts = {
        "sys_info": {"protocol_version": 1000, "little_endian": True},
        "pickle": Attack(os.system, f"touch '{mark}'"),
        "tensors": 0,
        "storages": 0,
    }
    (base / "model.safetensors").unlink()
    file = base / "pytorch_model.bin"
    with tarfile.open(file, "w:", format=tarfile.PAX_FORMAT) as archive:
        for name, content in parts.items():
            data = pickle.dumps(content, 2)
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"pytorch_model.bin' is refused: a tar or TorchScript archive could run"):
            models.BertModel.from_pretrained(base)
        save_bin(base, {})
        with zipfile.ZipFile(file, "a") as archive:
            archive.writestr("pytorch_model/constants.pkl", b"")  # by which torch knows TorchScript's
    assert not mark.exists()


@pytest.mark.parametrize("function", [eval, exec, open, torch.load, torch.hub.load], ids=lambda f: f.__name__)
def test_functions_that_could_harm_are_refused(base, function):
    save_bin(base, {"weight": Attack(function, "1")})
    with pytest.raises(ValueError, match=r"is refused: it is a pickle that asks for \S+"):
        models.BertModel.from_pretrained(base)


@pytest.mark.parametrize(
    "content, message",
    [
        ([torch.ones(2)], r"holds a list, expected a state dict"),
        ({"epoch": 3, "weight": torch.ones(2)}, r"what is no named tensor: 'epoch' \(int\); expected a state dict"),
        ({"state_dict": {"weight": torch.ones(2)}}, r"'state_dict' \(dict\); .*save the model's state dict alone"),
        ({1: torch.ones(2)}, r"holds what is no named tensor: 1 \(a tensor, "),
        ({"weight": torch.eye(2).to_sparse()}, r"'weight' \(a tensor, torch.sparse_coo, on cpu\)"),
        ({"weight": torch.ones(2, device="meta")}, r"'weight' \(a tensor, torch.strided, on meta\)"),
        ({"pooler.dense.weight": torch.ones(16, 16, dtype=torch.int8)}, r"lacks parameters of the encoder"),
        ({}, "lacks parameters of the encoder"),
    ],
)
def test_contents_that_are_no_weights(base, content, message):
    save_bin(base, content)
    with pytest.raises(ValueError, match=message):
        models.BertModel.from_pretrained(base)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_tensors_that_are_no_plain_ones(base):
    state = load_file(base / "model.safetensors")
    name = "pooler.dense.weight"
    save_bin(base, {**state, name: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])})
    with pytest.raises(ValueError, match=rf"what is no named tensor: '{name}' \(a tensor, nested, on cpu\)"):
        models.BertModel.from_pretrained(base)
    parameter = torch.nn.Parameter(torch.ones(16, 16))
    parameter.detach = "a name of torch's"  # as a pickle can have it
    save_bin(base, {**state, name: parameter})
    assert (models.BertModel.from_pretrained(base).pooler.dense.weight == 1).all()


def test_tensors_are_freed_once_they_are_taken(base):
    """The older format is read into memory as a whole; a model that is filled from it takes its place bit by bit."""
    with open_pickle(to_bin(base, zipped=False)) as stored:
        taken = weakref.ref(stored.pop("pooler.dense.weight").read.args[0])
        kept = weakref.ref(stored["pooler.dense.bias"].read.args[0])
        assert taken() is None and kept() is not None


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "change, message",
    [
        (lambda data: data[:-300], "truncated or corrupted"),
        (lambda data: data[: len(data) // 2], "truncated or corrupted"),
        (lambda data: data[:5], "truncated or corrupted|is no pickle of tensors"),
        (lambda data: b"", r"truncated or corrupted \(0 bytes\)"),
        (lambda data: b"\x00" * 400, "is no pickle of tensors"),
        (lambda data: pickle.dumps({"weight": [1.0]}), "is no pickle of tensors"),
        (
            lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0",
            "is a Git LFS pointer; get the file",
        ),
    ],
)
def test_files_that_are_no_state_dict(base, change, message, zipped):
    file = to_bin(base, zipped)
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(ValueError, match=rf"pytorch_model.bin' .*({message}).*; expected a state dict"):
        models.BertModel.from_pretrained(base)
