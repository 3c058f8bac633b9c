"""tf_model.h5: the outputs of TensorFlow's ConvBERT classes, from the files that they saved."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from random import Random

import pytest
import torch
from checkpoint_folders import outputs, quietly, random_model, to_bin
from safetensors.torch import load_file

from fastconv import models

DATA = Path(__file__).parent / "data" / "tf_convbert"
CASES = {case["dir"]: case for case in json.loads((DATA / "index.json").read_text())["cases"]}

h5py = pytest.importorskip("h5py", reason="tf_model.h5 is read with h5py, which is not installed")


def write_keras(model: torch.nn.Module, folder: Path) -> Path:
    """Write a model's parameters the way that Keras writes those of TensorFlow's class, with its config beside them."""
    model.config.save_pretrained(folder)
    with h5py.File(folder / "tf_model.h5", "w") as file:
        for name, tensor in model.state_dict().items():
            if name == "generator_lm_head.weight":
                continue
            if model.base_model is model:
                name = f"convbert.{name}"
            *path, kind, leaf = re.sub(r"layer\.(\d+)", r"layer_%\1", name).split(".")
            tensor = tensor.numpy()
            if leaf == "weight" and kind in ("depthwise", "pointwise"):
                leaf = f"{kind}_kernel"
                tensor = tensor.transpose(2, 0, 1) if kind == "depthwise" else tensor.T
            else:
                path.append(kind)
                if kind == "key_conv_attn_layer":
                    tensor = tensor[:, 0]
                elif kind == "LayerNorm":
                    leaf = {"weight": "gamma", "bias": "beta"}[leaf]
                elif kind.endswith("_embeddings"):
                    leaf = "weight" if kind == "word_embeddings" else "embeddings"
                elif leaf == "weight":
                    leaf, tensor = "kernel", tensor.T  # of a grouped one, (G, I, O) -> (O, I, G), too
            file[f"{path[0]}/tf_conv_bert/{'/'.join(path).replace('%', '._')}/{leaf}:0"] = tensor
    return folder / "tf_model.h5"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A folder with a ConvBertForMaskedLM."""
    write_keras(random_model("ConvBertForMaskedLM"), tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", CASES)
def test_golden(name):
    case = CASES[name]
    model = quietly(getattr(models, case["pt_class"]).from_pretrained, DATA / name)
    assert {key: list(value.shape) for key, value in model.named_parameters()} == case["pt_param_shapes"]
    stored = load_file(DATA / name / "expected.safetensors")
    ids = stored["in.input_ids"]
    both = {"attention_mask": stored["in.attention_mask"], "token_type_ids": stored["in.token_type_ids"]}
    found = {}
    with torch.no_grad():
        out = model(ids, **both, output_hidden_states=True, output_attentions=True)
        for field, value in out.items():
            parts = enumerate(value) if isinstance(value, tuple) else [(None, value)]
            found |= {f"out.{field}" + ("" if part is None else f".{part}"): tensor for part, tensor in parts}
        for prefix, inputs in {
            "nomask": {},
            "pos": {**both, "position_ids": stored["pos.in.position_ids"]},
        }.items():
            found |= {f"{prefix}.out.{field}": value for field, value in model(ids, **inputs).items()}
        if "unpadded_row1.out.last_hidden_state" in stored:
            row = {key: value[1:2, : both["attention_mask"][1].sum()] for key, value in both.items()}
            length = row["attention_mask"].shape[1]
            found["unpadded_row1.out.last_hidden_state"] = model(ids[1:2, :length], **row).last_hidden_state
    noise = case["pt_minus_tf_max_abs"]
    compared = [key for key in stored if ".out." in f".{key}"]
    assert len(compared) >= len(case["outputs"])
    for key in compared:
        recorded = noise.get(key.replace("out.", ""), max(noise.values()))
        error = (found[key] - stored[key]).abs().max().item()
        assert found[key].shape == stored[key].shape and error <= 4 * recorded, f"{key}: {error:.1e} of {recorded:.1e}"


@pytest.mark.parametrize("summary", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    "name", ["Model", "ForMaskedLM", *(f"For{kind}" for kind in ("MultipleChoice", "TokenClassification"))]
)
def test_round_trip(name, groups, summary, tmp_path):
    changes = {"num_groups": groups, "summary_use_proj": summary, "embedding_size": 8 * groups}
    model = random_model(f"ConvBert{name}", **changes)
    write_keras(model, tmp_path)
    again = quietly(type(model).from_pretrained, tmp_path)
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    again.save_pretrained(tmp_path)
    (tmp_path / "tf_model.h5").unlink()
    assert torch.equal(outputs(quietly(type(model).from_pretrained, tmp_path))[0], outputs(model)[0])


def test_a_head_goes_into_an_encoder_and_the_reverse(base):
    with pytest.warns(UserWarning, match="not in this model: generator_lm_head.bias, generator_predictions.Layer"):
        model = models.ConvBertModel.from_pretrained(base)
    with pytest.warns(UserWarning, match="random until trained: classifier.dense.weight"):
        head = models.ConvBertForSequenceClassification.from_pretrained(base)
    assert torch.equal(outputs(head.base_model)[0], outputs(model)[0])


def test_it_is_the_last_of_the_formats(base):
    expected = outputs(models.ConvBertForMaskedLM.from_pretrained(base))[0]
    other = random_model("ConvBertForMaskedLM")
    other.save_pretrained(base)
    to_bin(base)
    assert torch.equal(outputs(models.ConvBertForMaskedLM.from_pretrained(base))[0], outputs(other)[0])
    (base / "pytorch_model.bin").unlink()
    assert torch.equal(outputs(models.ConvBertForMaskedLM.from_pretrained(base))[0], expected)


def test_without_h5py(base, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ImportError, match=r"reading '.*tf_model.h5' needs h5py: pip install h5py"):
        models.ConvBertForMaskedLM.from_pretrained(base)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda data: data[: len(data) // 2], "is truncated or corrupted .*; expected HDF5"),
        (lambda data: b"", r"is truncated or corrupted \(0 bytes\); .*expected HDF5"),
        (lambda data: b"\x80\x02}q\x00." + data, "is a pickle, .*expected HDF5"),
        (lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "is a Git LFS pointer; .*expected"),
    ],
)
def test_files_that_are_no_hdf5(base, change, message):
    file = base / "tf_model.h5"
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(ValueError, match=rf"tf_model.h5' {message}"):
        models.ConvBertForMaskedLM.from_pretrained(base)


def test_damaged_files(base):
    """Whatever byte is wrong, what is raised is no error of h5py."""
    file = base / "tf_model.h5"
    good, random, refused = file.read_bytes(), Random(0), 0
    for _ in range(60):
        data = bytearray(good)
        for _ in range(5):
            data[random.randrange(20_000)] = random.randrange(256)
        file.write_bytes(data)
        try:
            models.ConvBertForMaskedLM.from_pretrained(base)
        except ValueError as error:
            assert str(base) in str(error)
            refused += 1
    assert refused > 20


QUERY = "convbert/tf_conv_bert/convbert/encoder/layer_._1/attention/self/query/kernel:0"
TIED = "generator_lm_head/tf_conv_bert/convbert/embeddings/word_embeddings/weight:0"  # Keras stores it twice


def set_dataset(file, name: str, value) -> None:
    del file[name]
    file[name] = value


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda file: set_dataset(file, QUERY, torch.zeros(16, 9).numpy()),
            r"has shapes that are not .*: convbert.encoder.layer.1.attention.self.query.weight "
            r"\(checkpoint \[9, 16\], config \[8, 16\]\)",
        ),
        (
            lambda file: set_dataset(file, QUERY, torch.zeros(16).numpy()),
            r"has shapes that are not .*query.weight \(checkpoint \[16\], config \[8, 16\]\)$",
        ),
        (lambda file: file.pop(QUERY), "lacks parameters of the encoder .*: convbert.encoder.layer.1.attention.self.q"),
        (
            lambda file: file.move(QUERY, QUERY.replace("query", "adapter")),
            "holds what no model with its config has: convbert.encoder.layer.1.attention.self.adapter.weight",
        ),
        (lambda file: set_dataset(file, QUERY, torch.zeros(16, 8).long().numpy()), r"query.weight \(int64\)"),
        (
            lambda file: file.create_dataset(TIED, data=torch.ones(40, 8)),
            "holds different values of convbert.embeddings.word_embeddings.weight, one of them as generator_lm_head/",
        ),
        (
            lambda file: file.create_dataset(TIED, shape=(2**30, 2**10), dtype="f4", chunks=(64, 64)),  # nothing in it
            "holds different values of convbert.embeddings.word_embeddings.weight, one of them as generator_lm_head/",
        ),
        (lambda file: file.create_dataset(TIED, shape=(40, 8), dtype=h5py.string_dtype()), "holds different values of"),
        (lambda file: set_dataset(file, QUERY, h5py.Empty("f4")), "tf_model.h5' is truncated or corrupted"),
        (lambda file: file.create_dataset(b"convbert/\xff", data=1.0), "tf_model.h5' is truncated or corrupted"),
        (lambda file: file.move("convbert", "bert"), "has no weights under 'convbert/': of TensorFlow's classes only"),
    ],
)
def test_weights_that_do_not_fit(base, change, message):
    with h5py.File(base / "tf_model.h5", "a") as file:
        if "bert" in message and "under" in message:  # a model of another family
            for name in ("generator_predictions", "generator_lm_head"):
                del file[name]
            inner = file["convbert/tf_conv_bert"]
            inner.move("convbert", "bert")
        change(file)
    with pytest.raises(ValueError, match=message):
        models.ConvBertForMaskedLM.from_pretrained(base)


def test_weights_in_other_files_are_not_read(base):
    """HDF5 can link to another file, or take a dataset's bytes from one; no model needs that."""
    other = base / "secret"
    other.write_bytes(bytes(16 * 8 * 4))
    with h5py.File(base / "tf_model.h5", "a") as file:
        del file[QUERY]
        file.create_dataset(QUERY, shape=(16, 8), dtype="f4", external=[(str(other), 0, 16 * 8 * 4)])
    with pytest.raises(ValueError, match=r"keeps .*query/kernel:0 in another file; expected all weights in it"):
        models.ConvBertForMaskedLM.from_pretrained(base)
    shutil.copy(DATA / "ConvBertForMaskedLM" / "tf_model.h5", base / "other.h5")
    with h5py.File(base / "tf_model.h5", "a") as file:
        del file[QUERY]
        file[QUERY] = h5py.ExternalLink("other.h5", QUERY)
    with pytest.raises(ValueError, match=r"lacks parameters of the encoder .*layer.1.attention.self.query.weight"):
        models.ConvBertForMaskedLM.from_pretrained(base)
