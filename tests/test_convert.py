"""`fastconv convert`: the checkpoints of ConvBERT's original code, and the outputs that it gave with them."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import tiny
import torch
from checkpoint_folders import edit_config, outputs, quietly, random_model
from original_checkpoints import CASES, DATA, StandIn, give, golden_variables, needs_tensorflow, original, stand_in
from safetensors.torch import load_file

from fastconv import models
from fastconv.checkpoints.convert import convert_checkpoint


@pytest.fixture(params=["stand-in", pytest.param("tensorflow", marks=needs_tensorflow)])
def reader(request, monkeypatch) -> None:
    """What reads the golden checkpoints."""
    if request.param == "stand-in":
        stand_in(monkeypatch, lambda prefix: StandIn(golden_variables(prefix)))


@pytest.mark.parametrize("names", ["transformers", "original"])
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case["expect"] == "ok"])
def test_golden(name, names, reader, tmp_path):
    case = CASES[name]
    config = None
    if names == "original":
        config = tmp_path / "bert_config.json"
        config.write_text(json.dumps({**case["original_config"], "embedding_size": case["embedding_size"]}))
    done = convert_checkpoint(DATA / name / "model.ckpt", tmp_path / "out", config=config)
    assert done.model_class == "ConvBertModel" and not done.left_out
    assert done.parameters == sum(int(np.prod(shape)) for _, shape in case["variables"])
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"config.json", "model.safetensors"}
    model = quietly(models.ConvBertModel.from_pretrained, tmp_path / "out")
    assert model.config.pad_token_id == 0 and model.config.num_groups == case["original_config"]["linear_groups"]

    stored = load_file(DATA / name / "expected.safetensors")
    mask = stored["in.attention_mask"]
    with torch.no_grad():
        out = model(stored["in.input_ids"], mask, stored["in.token_type_ids"], None, None, None,
                    output_hidden_states=True, output_attentions=True)  # fmt: skip
    found = {"out.embedding_output": out.hidden_states[0], "out.sequence_output": out.last_hidden_state}
    found |= {f"out.layer.{layer}": value for layer, value in enumerate(out.hidden_states[1:-1])}
    found |= {f"out.attention_probs.{layer}": value for layer, value in enumerate(out.attentions)}
    assert found.keys() == {key for key in stored if key.startswith("out.")}
    recorded = case["hf_minus_original"]
    lengths = mask.sum(1).tolist()
    assert lengths == [17, 11, 3, 0]
    for key, value in found.items():
        error = (value - stored[key]).abs()
        if "attention_probs" in key:
            assert error[:3].max() <= 4 * recorded["attention_probs"], key
            continue
        real = torch.cat([error[row, :length].flatten() for row, length in enumerate(lengths[:3])])
        padding = torch.cat([error[row, length:].flatten() for row, length in enumerate(lengths[:3])])
        assert real.max() <= 4 * recorded["real_tokens"], key
        assert padding.max() <= 4 * recorded["padding_of_rows_with_tokens"], key
    # A row of padding alone: the original adds -10000 to its scores and attends by what is left of them; transformers,
    # and so this library, attends to all alike.
    assert torch.allclose(out.attentions[0][3], torch.full((17, 17), 1 / 17))
    last = (out.last_hidden_state - stored["out.sequence_output"])[3].abs().max().item()
    assert last == pytest.approx(recorded["all_padding_row"], rel=1e-4)
    probs = max((out.attentions[i] - stored[f"out.attention_probs.{i}"])[3].abs().max().item() for i in range(2))
    assert probs == pytest.approx(recorded["attention_probs_all_padding_row"], rel=1e-3)


@pytest.mark.parametrize("name", ["base", "groups2_emb16"])
def test_transformers_loads_the_folder(name, reader, tmp_path):
    transformers = pytest.importorskip("transformers", reason="the package transformers is not installed")
    convert_checkpoint(DATA / name, tmp_path)
    stored = load_file(DATA / name / "expected.safetensors")
    inputs = [stored[f"in.{key}"] for key in ("input_ids", "attention_mask", "token_type_ids")]
    theirs = transformers.AutoModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected = theirs(*inputs).last_hidden_state
        out = models.ConvBertModel.from_pretrained(tmp_path)(*inputs).last_hidden_state
    assert (out - expected).abs().max() <= 1e-5 * expected.abs().max(), "the row of padding alone too"


def test_an_even_kernel(reader, tmp_path):
    with pytest.raises(ValueError, match=r"k4_even.config.json': conv_kernel_size must be odd, got 4"):
        convert_checkpoint(DATA / "base", tmp_path, config=DATA / "k4_even" / "config.json")
    assert not list(tmp_path.iterdir())


@needs_tensorflow
def test_a_fresh_process_converts_and_loads(tmp_path):
    # The order of imports matters: triton after tensorflow would end the process.
    script = (
        "import sys; from fastconv.checkpoints.convert import convert_checkpoint; convert_checkpoint(*sys.argv[1:]); "
        "import fastconv; "
        "print(fastconv.ConvBertModel.from_pretrained(sys.argv[2]).config.vocab_size)"
    )
    done = subprocess.run([sys.executable, "-c", script, DATA / "base", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "53\n", done.stderr


DISCRIMINATOR = {
    "discriminator_predictions/dense/kernel": np.ones((16, 16), np.float32),
    "discriminator_predictions/dense/bias": np.zeros(16, np.float32),
    "discriminator_predictions/dense_1/kernel": np.ones((16, 1), np.float32),
    "discriminator_predictions/dense_1/bias": np.zeros(1, np.float32),
}


def with_training_state(variables: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Beside the variables, those of the optimizer."""
    slots = {f"{name}/{slot}": value + 1 for name, value in variables.items() for slot in ("adam_m", "adam_v")}
    return {**variables, **slots, "global_step": np.array(1000, np.int64)}


@pytest.mark.parametrize("embeddings", ["electra", "generator"])
def test_the_parts_of_a_pretraining_checkpoint(embeddings, monkeypatch, tmp_path):
    discriminator = random_model("ConvBertModel")
    generator = random_model("ConvBertForMaskedLM", hidden_size=32, intermediate_size=48)
    if embeddings == "electra":
        generator.convbert.embeddings.load_state_dict(discriminator.embeddings.state_dict())
    variables = {**original(generator, "generator", embeddings=embeddings), **original(discriminator), **DISCRIMINATOR}
    prefix = give(monkeypatch, tmp_path / "checkpoint", with_training_state(variables), discriminator.config)
    done = convert_checkpoint(prefix, tmp_path / "d")
    assert done.model_class == "ConvBertModel"
    assert set(done.left_out) == {name for name in variables if name.startswith("generator")}
    with pytest.warns(UserWarning, match="not in this model: discriminator_predictions.dense.bias, .*dense_prediction"):
        again = models.ConvBertModel.from_pretrained(tmp_path / "d")
    assert torch.equal(outputs(again)[0], outputs(discriminator)[0])

    generator.config.save_pretrained(tmp_path / "generator")
    config = tmp_path / "generator" / "config.json"
    done = convert_checkpoint(prefix, tmp_path / "g", part="generator", config=config)
    assert done.model_class == "ConvBertForMaskedLM" and "electra/encoder/layer_0/output/g_dense/bias" in done.left_out
    again = quietly(models.ConvBertForMaskedLM.from_pretrained, tmp_path / "g")
    assert torch.equal(outputs(again)[0], outputs(generator)[0])
    shapes = r"has shapes that .*: convbert.embeddings_project.weight \(checkpoint \[32, 8\], config \[16, 8\]\), "
    with pytest.raises(ValueError, match=shapes):
        convert_checkpoint(prefix, tmp_path / "x", part="generator")


def test_a_generator_that_is_one_with_the_discriminator(monkeypatch, tmp_path):
    model = random_model("ConvBertForMaskedLM", num_groups=1, embedding_size=16)
    prefix = give(monkeypatch, tmp_path, {**original(model), **DISCRIMINATOR}, model.config)
    done = convert_checkpoint(prefix, tmp_path / "g", part="generator")
    assert set(done.left_out) == set(DISCRIMINATOR)
    assert torch.equal(
        outputs(quietly(models.ConvBertForMaskedLM.from_pretrained, tmp_path / "g"))[0], outputs(model)[0]
    )
    assert all(
        name.startswith("generator_predictions/") for name in convert_checkpoint(prefix, tmp_path / "d").left_out
    )


def test_a_finetuned_checkpoint_tells_what_it_leaves_out(monkeypatch, tmp_path, capsys):
    model = random_model("ConvBertModel")
    task = {f"task_specific/cola/dense/{leaf}": np.ones(2, np.float32) for leaf in ("kernel", "bias")}
    prefix = give(monkeypatch, tmp_path, {**with_training_state(original(model)), **task}, model.config)
    assert convert_checkpoint(prefix, tmp_path / "out").left_out == sorted(task)
    edit_config(tmp_path, torch_dtype="float16")  # as older versions of transformers have it
    code, out, err = tiny.run(capsys, "convert", prefix, tmp_path / "cli")
    written = json.loads((tmp_path / "cli" / "config.json").read_text())
    assert written["dtype"] == "float32" and "torch_dtype" not in written
    assert (code, err) == (0, "")
    assert "ConvBertModel, " in out and "left out: 2 variables, of task_specific/cola/dense\n" in out
    files = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in ("out", "cli")]
    assert files[0] == files[1]


def test_the_vocabulary(monkeypatch, tmp_path):
    model = random_model("ConvBertModel")
    prefix = give(monkeypatch, tmp_path, original(model), model.config)
    tiny.write_vocab(tmp_path, ["a", "b"])
    convert_checkpoint(prefix, tmp_path / "beside")
    assert (tmp_path / "beside" / "vocab.txt").read_bytes() == (tmp_path / "vocab.txt").read_bytes()
    (tmp_path / "other").mkdir()
    tiny.write_vocab(tmp_path / "other", ["c"])
    convert_checkpoint(prefix, tmp_path / "given", vocab=tmp_path / "other" / "vocab.txt")
    assert (tmp_path / "given" / "vocab.txt").read_bytes() == (tmp_path / "other" / "vocab.txt").read_bytes()
    tiny.write_vocab(tmp_path / "other", [str(number) for number in range(36)])
    with pytest.raises(ValueError, match=r"vocab.txt' has 41 tokens, expected at most the config's vocab_size 40"):
        convert_checkpoint(prefix, tmp_path / "x", vocab=tmp_path / "other" / "vocab.txt")
    with pytest.raises(FileNotFoundError, match=r"no vocabulary file '.*nowhere.txt'"):
        convert_checkpoint(prefix, tmp_path / "x", vocab=tmp_path / "nowhere.txt")
    assert not (tmp_path / "x").exists()
