"""Checkpoint folders: what is saved and loaded, with transformers and without, and every kind of bad folder."""

from __future__ import annotations

import json
import pickle
import sys
import types
import warnings
from pathlib import Path

import minilm
import pytest
import torch

import fastconv
from fastconv import models, reference

pytest.importorskip("safetensors", reason="checkpoints are safetensors, which is not installed")
from safetensors.torch import load_file, save_file

from fastconv.tokenization import BertTokenizer

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
}
HEADS = (
    "Model",
    "ForMaskedLM",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForMultipleChoice",
)
CLASSES = [f"{family}{head}" for family in CONFIGS for head in HEADS]
ids = torch.tensor([[4, 7, 9, 5, 0], [4, 11, 12, 13, 5]])
mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])


def config_of(name: str):
    return CONFIGS["ConvBert" if name.startswith("Conv") else "Bert"]


def random_model(name: str, **changes):
    """A model of this class whose every parameter is random, so that a mixed up one shows."""
    config = config_of(name)
    model = getattr(models, name)(type(config).from_dict({**config.to_dict(), **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return model.eval()


def outputs(model):
    """The logits, or the hidden states."""
    choices = type(model).__name__.endswith("MultipleChoice")
    with torch.no_grad():
        out = model(*(tensor[None] if choices else tensor for tensor in (ids, mask)))
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


def shard(folder: Path) -> None:
    """Replace model.safetensors by three shards and their index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places = {name: f"model-{index % 3 + 1:05}-of-00003.safetensors" for index, name in enumerate(tensors)}
    for place in set(places.values()):
        save_file({name: tensor for name, tensor in tensors.items() if places[name] == place}, folder / place)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A folder with a BertModel."""
    random_model("BertModel").save_pretrained(tmp_path)
    return tmp_path


def quietly(load, *arguments, **options):
    """Call with warnings as errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load(*arguments, **options)


@pytest.mark.parametrize("name", CLASSES)
def test_saved_models_load(name, tmp_path):
    model = random_model(name)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == [name] and config["dtype"] == "float32"
    assert config["model_type"] == model.config.model_type
    state = torch.get_rng_state()
    again = quietly(getattr(fastconv, name).from_pretrained, tmp_path)
    assert torch.equal(torch.get_rng_state(), state), "nothing is drawn for parameters that are loaded"
    assert type(again) is type(model) and not again.training and isinstance(again, getattr(reference, name))
    assert again.config.hidden_size == model.config.hidden_size
    assert again.state_dict().keys() == model.state_dict().keys()
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    for ours, expected in zip(outputs(again), outputs(model), strict=True):
        assert torch.equal(ours, expected)
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


@pytest.mark.parametrize("name", CLASSES)
def test_transformers_loads_what_is_saved_and_the_reverse(name, tmp_path):
    transformers = pytest.importorskip("transformers", reason="the package transformers is not installed")
    model = random_model(name)
    model.save_pretrained(tmp_path / "ours")
    theirs, info = getattr(transformers, name).from_pretrained(
        tmp_path / "ours", attn_implementation="eager", output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    for ours, expected in zip(outputs(model), outputs(theirs.eval()), strict=True):
        assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(0, 0.3)
    theirs.save_pretrained(tmp_path / "theirs")
    again = quietly(getattr(models, name).from_pretrained, tmp_path / "theirs")
    for ours, expected in zip(outputs(again), outputs(theirs), strict=True):
        assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", ["BertForMaskedLM", "ConvBertForMaskedLM"])
def test_untied_decoder_of_transformers(name, tmp_path):
    transformers = pytest.importorskip("transformers", reason="the package transformers is not installed")
    config = config_of(name)
    theirs = getattr(transformers, name)(
        getattr(transformers, type(config).__name__)(**{**config.to_dict(), "tie_word_embeddings": False})
    ).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(0, 0.3)
    theirs.save_pretrained(tmp_path)
    model = quietly(getattr(models, name).from_pretrained, tmp_path)
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight
    for ours, expected in zip(outputs(model), outputs(theirs), strict=True):
        assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs(quietly(getattr(models, name).from_pretrained, tmp_path))[0], outputs(model)[0])


def test_minilm_gives_the_golden_outputs():
    folder, golden = minilm.folder(), minilm.golden()
    model = quietly(fastconv.BertModel.from_pretrained, folder)
    expected = load_file(minilm.DATA / "expected.safetensors")
    for case in golden["picked"]:
        with torch.no_grad():
            out = model(expected[f"s{case}.in.input_ids"])
        for field in ("last_hidden_state", "pooler_output"):
            want = expected[f"s{case}.out.{field}"]
            assert (out[field] - want).abs().max() <= 1e-5 * want.abs().max(), (case, field)
    texts = [row["text"] for row in golden["sentences"]]
    batch = BertTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    weights = batch.attention_mask[..., None].to(hidden.dtype)
    pooled = torch.nn.functional.normalize((hidden * weights).sum(1) / weights.sum(1))
    assert (pooled - expected["all40.mean_pooled_normalized"]).abs().max() <= 1e-5


@pytest.mark.parametrize("family", CONFIGS)
def test_an_encoder_goes_into_a_head(family, tmp_path):
    base = random_model(f"{family}Model")
    base.save_pretrained(tmp_path)
    head = f"{family}ForTokenClassification"
    with pytest.warns(UserWarning) as caught:
        model = getattr(models, head).from_pretrained(tmp_path)
    assert len(caught) == 1 and caught[0].filename == __file__
    message = str(caught[0].message)
    assert f"{head} from" in message and "random until trained: classifier.weight, classifier.bias" in message
    assert ("not in this model: pooler.dense.bias, pooler.dense.weight" in message) is (family == "Bert")
    assert torch.equal(outputs(model.base_model)[0], outputs(base)[0])
    std = model.classifier.weight.std().item()
    assert 0.5 * model.config.initializer_range < std < 2 * model.config.initializer_range
    assert not model.classifier.bias.any()


@pytest.mark.parametrize("family", CONFIGS)
def test_a_head_goes_into_an_encoder(family, tmp_path):
    head = random_model(f"{family}ForQuestionAnswering")
    head.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"not in this model: qa_outputs.bias, qa_outputs.weight$") as caught:
        model = getattr(models, f"{family}Model").from_pretrained(tmp_path)
    assert ("random until trained: pooler.dense.weight" in str(caught[0].message)) is (family == "Bert")
    assert torch.equal(outputs(model)[0], outputs(head.base_model)[0])


def test_shards(base):
    expected = outputs(models.BertModel.from_pretrained(base))
    shard(base)
    assert torch.equal(outputs(quietly(models.BertModel.from_pretrained, base))[0], expected[0])
    (base / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"the shard model-00002-of-00003.safetensors is missing in .*holds "):
        models.BertModel.from_pretrained(base)


def test_old_names_and_buffers(base):
    expected = outputs(models.BertModel.from_pretrained(base))
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    for new, name in old.items():
        rewrite(base, renamed(lambda key, new=new, name=name: "bert." + key.removeprefix("bert.").replace(new, name)))
    rewrite(base, lambda tensors: {**tensors, "bert.embeddings.position_ids": torch.arange(20)[None]})
    model = quietly(models.BertModel.from_pretrained, base)
    assert torch.equal(outputs(model)[0], expected[0]) and torch.equal(outputs(model)[1], expected[1])


def test_tied_decoder(tmp_path):
    model = random_model("BertForMaskedLM")
    model.save_pretrained(tmp_path)
    assert "cls.predictions.decoder.weight" not in load_file(tmp_path / "model.safetensors")
    words, decoder = "bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"
    rewrite(tmp_path, lambda tensors: {**tensors, decoder: tensors[words].clone()})
    again = quietly(models.BertForMaskedLM.from_pretrained, tmp_path)
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    assert torch.equal(outputs(again)[0], outputs(model)[0])
    rewrite(tmp_path, lambda tensors: {name: value for name, value in tensors.items() if name != words})
    again = quietly(models.BertForMaskedLM.from_pretrained, tmp_path)
    assert torch.equal(outputs(again)[0], outputs(model)[0])
    rewrite(tmp_path, lambda tensors: {**tensors, words: tensors[decoder] + 1})
    with pytest.raises(ValueError, match=f"different values as {words} and as {decoder}.* tie_word_embeddings false"):
        models.BertForMaskedLM.from_pretrained(tmp_path)


def test_dtype(base):
    load = models.BertModel.from_pretrained
    assert load(base).dtype == torch.float32
    assert load(base, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert load(base, dtype="float16").dtype == torch.float16
    load(base, dtype="bfloat16").save_pretrained(base)
    assert load(base).dtype == torch.bfloat16, "as config.json says"
    edit_config(base, dtype=None)
    assert load(base).dtype == torch.float32, "nothing is said"
    assert load(base, dtype="auto").dtype == torch.bfloat16
    edit_config(base, torch_dtype="float16")
    assert load(base).dtype == torch.float16
    for wrong in (torch.int8, "float31", torch.complex64):
        with pytest.raises(
            ValueError, match="the dtype must be one of float64, float32, bfloat16, float16, got dtype="
        ):
            load(base, dtype=wrong)
    edit_config(base, torch_dtype="int8")
    with pytest.raises(ValueError, match=r"got 'int8' in config.json"):
        load(base)


def test_a_config_in_the_place_of_the_folder_s(base):
    config = models.BertConfig.from_pretrained(base)
    assert config.extra["architectures"] == ["BertModel"]
    config.hidden_act = "relu"
    model = models.BertModel.from_pretrained(base, config=config)
    assert model.config is config
    assert not torch.equal(outputs(model)[0], outputs(models.BertModel.from_pretrained(base))[0])
    with pytest.raises(TypeError, match="BertModel needs a BertConfig, got ConvBertConfig"):
        models.BertModel.from_pretrained(base, config=CONFIGS["ConvBert"])


def test_configs_keep_what_they_do_not_know(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "convbert", "head_ratio": 4, "of_mine": [1, {"a": 2}]}')
    config = fastconv.ConvBertConfig.from_pretrained(tmp_path)
    assert config.head_ratio == 4 and isinstance(config, reference.ConvBertConfig)
    config.save_pretrained(tmp_path / "new")
    assert json.loads((tmp_path / "new" / "config.json").read_text())["of_mine"] == [1, {"a": 2}]
    assert fastconv.ConvBertConfig.from_pretrained(tmp_path / "new") == config


def test_parameters_in_one_memory_are_saved_apart(tmp_path):
    model = random_model("BertModel")
    attention = model.encoder.layer[0].attention.self
    packed = torch.randn(3 * 16, 16)
    for index, name in enumerate(("query", "key", "value")):
        getattr(attention, name).weight = torch.nn.Parameter(packed[16 * index : 16 * (index + 1)])
    attention.query.weight = torch.nn.Parameter(packed[:16].T)
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs(models.BertModel.from_pretrained(tmp_path))[0], outputs(model)[0])
    model.to("meta")
    with pytest.raises(ValueError, match="is on the meta device, expected data to save"):
        model.save_pretrained(tmp_path)


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


def test_weights_of_another_family(base, tmp_path):
    config = CONFIGS["ConvBert"]
    with pytest.raises(ValueError, match="lacks parameters of the encoder of ConvBertModel"):
        models.ConvBertModel.from_pretrained(base, config=config)
    with pytest.raises(ValueError, match=r"config.json'.*needs model_type 'convbert', got 'bert'"):
        models.ConvBertModel.from_pretrained(base)


def test_integer_weights_and_twice_the_same(base):
    name = "pooler.dense.weight"
    rewrite(base, lambda tensors: {**tensors, name: torch.ones(16, 16, dtype=torch.int8)})
    with pytest.raises(ValueError, match=rf"must hold F64, F32, BF16, F16 tensors, got {name} \(I8\)"):
        models.BertModel.from_pretrained(base)
    rewrite(base, lambda tensors: {**tensors, f"bert.{name}": torch.ones(16, 16)})
    with pytest.raises(ValueError, match=f"holds {name} twice, as "):
        models.BertModel.from_pretrained(base)


def corrupt_header(data: bytes) -> bytes:
    return data[:8] + data[8:].replace(b'"F32"', b'"F33"', 1)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda data: data[:-7], "truncated or corrupted"),
        (lambda data: data[:5], r"truncated or corrupted \(5 bytes\)"),
        (lambda data: b"", r"truncated or corrupted \(0 bytes\)"),
        (lambda data: data + b"more", "truncated or corrupted"),
        (corrupt_header, "truncated or corrupted"),
        (lambda data: b"\xff" * 8 + data[8:], "truncated or corrupted"),
        (lambda data: pickle.dumps({"weight": [1.0] * 99}), "is a pickle, which can run code .*; expected safetensors"),
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
def test_a_pickle_is_not_read(base, zipped):
    state = models.BertModel.from_pretrained(base).state_dict()
    torch.save(state, base / "model.safetensors", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"model.safetensors' is a pickle, .*; expected safetensors"):
        models.BertModel.from_pretrained(base)
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    with pytest.raises(
        FileNotFoundError, match=r"no model.safetensors .* it holds config.json, pytorch_model.bin; other"
    ):
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


@pytest.mark.parametrize(
    "index, message",
    [
        ("{", r"index.json' is not JSON"),
        ("{}", "must hold a weight_map of names to files, got None"),
        ('{"weight_map": {"a": 1}}', "must hold a weight_map"),
        (
            '{"weight_map": {"a": "../model.safetensors"}}',
            r"names the shard '../model.safetensors', expected a file of",
        ),
    ],
)
def test_a_bad_index(base, index, message):
    shard(base)
    (base / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=message):
        models.BertModel.from_pretrained(base)


def test_an_index_that_names_a_tensor_that_is_not_there(base):
    shard(base)
    index = json.loads((base / "model.safetensors.index.json").read_text())
    index["weight_map"]["encoder.more"] = "model-00001-of-00003.safetensors"
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        ValueError, match=r"model-00001-of-00003.safetensors' lacks encoder.more, which model.safetensors"
    ):
        models.BertModel.from_pretrained(base)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"{,}", r"config.json' is not JSON: .*; it starts with b'{,}'"),
        (b"\x80\x02}q\x00.", r"config.json' is not JSON"),
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


def test_hub_ids(base, monkeypatch):
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append((name, allow_patterns))
        if name == "org/none":
            raise RuntimeError("404")
        return str(base)

    hub = types.ModuleType("huggingface_hub")
    hub.snapshot_download = snapshot_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert models.BertModel.from_pretrained("org/name").config.hidden_size == 16
    assert models.BertConfig.from_pretrained("org/name").hidden_size == 16
    assert [name for name, _ in asked] == ["org/name"] * 2
    assert "model.safetensors" in asked[0][1] and not any(".bin" in pattern for pattern in asked[0][1])
    assert asked[1][1] == ["config.json"]
    with pytest.raises(OSError, match="no folder 'org/none', and it could not be downloaded from the hub: 404"):
        models.BertModel.from_pretrained("org/none")
    with pytest.raises(FileNotFoundError, match=r"no tokenizer.json and no vocab.txt"):
        BertTokenizer.from_pretrained("org/name")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match="pip install huggingface_hub, or download the folder yourself"):
        models.BertModel.from_pretrained("org/name")
