"""Checkpoint folders: what is saved loads again, and what a folder may hold beside the parameters of a model."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import minilm
import pytest
import torch
from checkpoint_folders import (
    CLASSES,
    CONFIGS,
    edit_config,
    outputs,
    quietly,
    random_model,
    renamed,
    rewrite,
    shard,
    to_bin,
)
from safetensors.torch import load_file

import fastconv
from fastconv import models, reference


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A folder with a BertModel."""
    random_model("BertModel").save_pretrained(tmp_path)
    return tmp_path


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


def test_minilm_gives_the_golden_outputs():
    folder, golden = minilm.folder(), minilm.golden()
    model = quietly(fastconv.BertModel.from_pretrained, folder)
    expected = load_file(minilm.DATA / "expected.safetensors")
    for case in golden["picked"]:
        with fastconv.backend("native"), torch.no_grad():
            out = model(expected[f"s{case}.in.input_ids"])
        for field in ("last_hidden_state", "pooler_output"):
            want = expected[f"s{case}.out.{field}"]
            assert (out[field] - want).abs().max() <= 1e-5 * want.abs().max(), (case, field)
    texts = [row["text"] for row in golden["sentences"]]
    batch = fastconv.BertTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    with fastconv.backend("native"), torch.no_grad():
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
    assert ("not in this model: pooler.dense.bias, pooler.dense.weight" in message) is (family != "ConvBert")
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
    assert ("random until trained: pooler.dense.weight" in str(caught[0].message)) is (family != "ConvBert")
    assert torch.equal(outputs(model)[0], outputs(head.base_model)[0])


def test_an_encoder_goes_into_a_decoder_with_cross_attention(base):
    config = models.BertConfig.from_dict(
        {**models.BertConfig.from_pretrained(base).to_dict(), "is_decoder": True, "add_cross_attention": True}
    )
    with pytest.warns(
        UserWarning, match="random until trained: bert.encoder.layer.0.crossattention.self.que"
    ) as caught:
        model = models.BertLMHeadModel.from_pretrained(base, config=config)
    told = str(caught[0].message)
    assert (
        "bert.encoder.layer.1.crossattention.output.LayerNorm.bias" in told and "bert.encoder.layer.0.att" not in told
    )
    query = model.bert.encoder.layer[0].crossattention.self.query.weight
    assert 0.5 * config.initializer_range < query.std() < 2 * config.initializer_range
    stored = load_file(base / "model.safetensors")
    assert torch.equal(
        model.bert.encoder.layer[1].attention.self.key.weight, stored["encoder.layer.1.attention.self.key.weight"]
    )
    model.save_pretrained(base)
    again = quietly(models.BertLMHeadModel.from_pretrained, base)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    rewrite(base, lambda tensors: {name: value for name, value in tensors.items() if ".1.attention.self" not in name})
    with pytest.raises(ValueError, match=r"lacks parameters of the encoder of .*: bert.encoder.layer.1.attention.self"):
        models.BertLMHeadModel.from_pretrained(base)


def test_relative_positions_are_parameters(tmp_path):
    model = random_model("BertModel", position_embedding_type="relative_key")
    name = "encoder.layer.0.attention.self.distance_embedding.weight"
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs(quietly(models.BertModel.from_pretrained, tmp_path))[0], outputs(model)[0])
    edit_config(tmp_path, position_embedding_type="absolute")
    with pytest.raises(ValueError, match=rf"holds what no model with its config has: {name}"):
        models.BertModel.from_pretrained(tmp_path)
    edit_config(tmp_path, position_embedding_type="relative_key")
    rewrite(tmp_path, lambda tensors: {key: value for key, value in tensors.items() if key != name})
    with pytest.raises(ValueError, match=rf"lacks parameters of the encoder of BertModel: {name};"):
        models.BertModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["BertForMaskedLM", "ConvBertForMaskedLM", "RoCBertForMaskedLM", "ConvBertModel"])
def test_a_resized_vocabulary(name, tmp_path):
    model = random_model(name)
    model.resize_token_embeddings(47)
    model.save_pretrained(tmp_path)
    again = quietly(getattr(models, name).from_pretrained, tmp_path)
    assert again.config.vocab_size == 47 and again.get_input_embeddings().weight.shape[0] == 47
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    for ours, expected in zip(outputs(again), outputs(model), strict=True):
        assert torch.equal(ours, expected)


def test_shards(base):
    expected = outputs(models.BertModel.from_pretrained(base))
    shard(base)
    assert torch.equal(outputs(quietly(models.BertModel.from_pretrained, base))[0], expected[0])
    (base / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"the shard 'model-00002-of-00003.safetensors' is missing in .*holds "):
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


def test_two_biases_of_the_decoder(tmp_path):
    bias, of_decoder = "cls.predictions.bias", "cls.predictions.decoder.bias"
    model = random_model("BertForMaskedLM", tie_word_embeddings=False)
    model.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: {**tensors, bias: tensors[bias] + 1, of_decoder: tensors[bias]})
    again = quietly(models.BertForMaskedLM.from_pretrained, tmp_path)
    assert torch.equal(outputs(again)[0], outputs(model)[0]), "as transformers 5 has it"
    random_model("BertForMaskedLM").save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: {**tensors, of_decoder: tensors[bias] + 1})
    with pytest.raises(ValueError, match=f"different values as {bias} and as {of_decoder}, but the config makes them"):
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


def test_device(base):
    load = models.BertModel.from_pretrained
    assert load(base).device == load(base, device="cpu").device == torch.device("cpu")
    assert load(base, device="meta").device.type == "meta"
    if torch.accelerator.is_available():
        assert load(base, device=0).device == torch.device(0)
    else:
        with pytest.raises((RuntimeError, AssertionError)):  # of torch; not the CPU, for all that 0 is false
            load(base, device=0)


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
    safetensors = ["config.json", "model.safetensors", "model.safetensors.index.json", "model-*.safetensors"]
    assert asked == [("org/name", safetensors), ("org/name", ["config.json"])], "no other format is downloaded"
    to_bin(base)
    assert models.BertModel.from_pretrained("org/name").config.hidden_size == 16
    assert [patterns[1] for _, patterns in asked[2:]] == ["model.safetensors", "pytorch_model.bin"]
    with pytest.raises(OSError, match="no folder 'org/none', and it could not be downloaded from the hub: 404"):
        models.BertModel.from_pretrained("org/none")
    with pytest.raises(FileNotFoundError, match=r"no tokenizer.json and no vocab.txt"):
        fastconv.BertTokenizer.from_pretrained("org/name")
    (base / "pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"no model.safetensors, .* or tf_model.h5 in "):
        models.BertModel.from_pretrained("org/name")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match="pip install huggingface_hub, or download the folder yourself"):
        models.BertModel.from_pretrained("org/name")
