"""Checkpoint folders of transformers, 4.57 and 5, and ours: each library loads what the other saves."""

from __future__ import annotations

import pytest
import torch
from checkpoint_folders import AUTO_CLASSES, CLASSES, config_of, family_of, outputs, quietly, random_model, randomize

from fastconv import models

transformers = pytest.importorskip("transformers", reason="the package transformers is not installed")
IS_4 = transformers.__version__.startswith("4.")


def load_theirs(model_class: str, folder):
    """A model of transformers, with an error for any parameter that does not fit."""
    model, info = getattr(transformers, model_class).from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


def theirs_of(name: str, **changes):
    """A model of transformers with random parameters."""
    config = config_of(name)
    values = {**config.to_dict(), **changes}
    return randomize(getattr(transformers, name)(getattr(transformers, type(config).__name__)(**values)))


def assert_same(ours, theirs) -> None:
    """Every parameter, and the outputs up to rounding."""
    expected = theirs.state_dict()
    for name, value in ours.state_dict().items():
        assert torch.equal(value, expected[name]), name
    for out, want in zip(outputs(ours), outputs(theirs), strict=True):
        assert (out - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize("name", CLASSES)
def test_transformers_loads_what_is_saved_and_the_reverse(name, tmp_path):
    model = random_model(name)
    model.save_pretrained(tmp_path / "ours")
    theirs = load_theirs(name, tmp_path / "ours")
    assert_same(model, theirs)
    randomize(theirs).save_pretrained(tmp_path / "theirs")
    assert_same(quietly(getattr(models, name).from_pretrained, tmp_path / "theirs"), theirs)


@pytest.mark.parametrize("name", CLASSES)
def test_auto_classes(name, tmp_path):
    auto = AUTO_CLASSES[name.removeprefix(family_of(name))]
    model = random_model(name)
    model.save_pretrained(tmp_path / "ours", max_shard_size=4000)
    assert len(list((tmp_path / "ours").glob("model-*.safetensors"))) > 3
    theirs = load_theirs(auto, tmp_path / "ours")
    assert type(theirs).__name__ == name
    assert_same(model, theirs)
    randomize(theirs).save_pretrained(tmp_path / "theirs", max_shard_size=4000)
    assert len(list((tmp_path / "theirs").glob("model-*.safetensors"))) > 3
    again = quietly(getattr(models, name).from_pretrained, tmp_path / "theirs")
    assert_same(again, load_theirs(auto, tmp_path / "theirs"))


@pytest.mark.skipif(not IS_4, reason="transformers 5 writes safetensors only")
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("name", CLASSES)
def test_pytorch_model_bin_of_transformers(name, sharded, tmp_path):
    theirs = theirs_of(name)
    theirs.save_pretrained(tmp_path, safe_serialization=False, max_shard_size=4000 if sharded else "5GB")
    assert len(list(tmp_path.glob("pytorch_model*.bin"))) > (3 if sharded else 0)
    assert not list(tmp_path.glob("*.safetensors"))
    assert_same(quietly(getattr(models, name).from_pretrained, tmp_path), theirs)


@pytest.mark.parametrize("name", ["BertLMHeadModel", "RoCBertForCausalLM"])
def test_decoders_with_cross_attention(name, tmp_path):
    changes = {"is_decoder": True, "add_cross_attention": True}
    model = random_model(name, **changes)
    model.save_pretrained(tmp_path / "ours")
    assert_same(model, load_theirs(name, tmp_path / "ours"))
    theirs = theirs_of(name, **changes)
    theirs.save_pretrained(tmp_path / "theirs")
    assert_same(quietly(getattr(models, name).from_pretrained, tmp_path / "theirs"), theirs)


@pytest.mark.skipif(not IS_4, reason="transformers 5 has no relative positions")
@pytest.mark.parametrize("name", ["BertForMaskedLM", "RoCBertModel"])
def test_relative_positions(name, tmp_path):
    model = random_model(name, position_embedding_type="relative_key_query")
    model.save_pretrained(tmp_path / "ours")
    assert_same(model, load_theirs(name, tmp_path / "ours"))
    theirs = theirs_of(name, position_embedding_type="relative_key_query")
    theirs.save_pretrained(tmp_path / "theirs")
    assert_same(quietly(getattr(models, name).from_pretrained, tmp_path / "theirs"), theirs)


@pytest.mark.parametrize("name", ["BertForMaskedLM", "ConvBertForMaskedLM", "RoCBertForMaskedLM", "BertForPreTraining"])
def test_an_untied_decoder(name, tmp_path):
    theirs = theirs_of(name, tie_word_embeddings=False)
    theirs.save_pretrained(tmp_path)
    model = quietly(getattr(models, name).from_pretrained, tmp_path)
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight
    for out, want in zip(outputs(model), outputs(theirs), strict=True):
        assert (out - want).abs().max() <= 1e-5 * want.abs().max()
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs(quietly(getattr(models, name).from_pretrained, tmp_path))[0], outputs(model)[0])


@pytest.mark.parametrize("name", ["BertForMaskedLM", "ConvBertForMaskedLM", "RoCBertForPreTraining"])
def test_a_resized_vocabulary(name, tmp_path):
    model = random_model(name)
    model.resize_token_embeddings(47)
    model.save_pretrained(tmp_path / "ours")
    theirs = load_theirs(name, tmp_path / "ours")
    assert_same(model, theirs)
    theirs.resize_token_embeddings(52)
    theirs.save_pretrained(tmp_path / "theirs")
    assert_same(quietly(getattr(models, name).from_pretrained, tmp_path / "theirs"), theirs)
