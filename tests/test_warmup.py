"""Warming up: after it no request compiles anything; here without a GPU, of which the compiler knows nothing."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import fastconv
from fastconv import warmup

triton = pytest.importorskip("triton", reason="what is warmed up is Triton's cache")

TESTS = Path(__file__).parent
CASES = (
    "bert",
    "bert training",
    "bert graphs",
    "decoder",
    "convbert long",
    "convbert packed",
    "convbert training",
    "roc_bert",
)


_CONFIG = {
    "model_type": "bert", "vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 24, "max_position_embeddings": 20,
}  # fmt: skip


def process(*arguments: str, cache: Path, gpu: bool = False) -> Any:
    """What warmup_runs.py prints in a process of its own: in this one the kernels may be interpreted."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), **({} if gpu else {"CUDA_VISIBLE_DEVICES": ""})}
    command = [sys.executable, str(TESTS / "warmup_runs.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def noted(tmp_path_factory) -> dict[str, Any]:
    """Of every case the variants of its warm-up, and those that random requests asked for."""
    return process("requests", *CASES, cache=tmp_path_factory.mktemp("cache"))


def missing(asked: Sequence[str], warmed: Sequence[str]) -> set[str]:
    """The variants that requests would compile."""
    return set(asked) - set(warmed)


@pytest.mark.parametrize("case", CASES)
def test_warmup_knows_what_requests_ask_for(case, noted):
    warmed, asked = noted[case]["warmed"], noted[case]["asked"]
    assert not missing(asked, warmed)
    # Each of those is needed: the comparison can fail.
    for variant in asked:
        assert missing(asked, [other for other in warmed if other != variant]) == {variant}
    # Nearly all that is warmed is asked for; the rest by requests that weren't drawn.
    assert len(asked) >= 0.8 * len(warmed)


@pytest.mark.parametrize(
    ("case", "kernels"),
    [
        ("bert", {"_embedding_norm_fwd", "_masked_attention_fwd", "_layer_norm_fwd"}),
        ("bert training", {"_masked_lm_loss_bwd_weight", "_masked_attention_bwd_dq", "_layer_norm_bwd"}),
        ("convbert long", {"_span_kernel_logits_fwd", "_span_dynamic_conv_fwd", "_separable_conv_fwd"}),
        ("convbert training", {"_span_dynamic_conv_bwd", "_separable_conv_bwd_depthwise", "_sum_segments"}),
    ],
)
def test_warmup_reaches_the_kernels(case, kernels, noted):
    assert {f"{kernel}_kernel" for kernel in kernels} <= set(noted[case]["kernels"])


def test_warmup_few_variants(noted):
    """Batch and length alone make no variant: sizes that vary aren't specialised (see fastconv.kernels)."""
    for case in ("bert", "convbert packed"):
        kernels = [name for name in noted[case]["warmed"] if not name.startswith("_masked_attention")]
        # By whether the batch is packed, or has ids of its own.
        for kernel in {name.split()[0] for name in kernels}:
            assert sum(name.startswith(f"{kernel} ") for name in kernels) <= 3, kernel


def test_warmup_a_second_process_compiles_nothing(tmp_path):
    first = process("warm", cache=tmp_path)
    assert first["compiled"] == first["variants"] > 0
    assert first["cached"] == 0
    assert first["folder"] == str(tmp_path)
    again = process("warm", cache=tmp_path)
    assert (again["compiled"], again["cached"]) == (0, first["variants"])
    served = process("serve", cache=tmp_path)
    assert served["compiled"] == 0
    assert 0 < served["cached"] <= first["variants"]
    # And the count can fail: without one of the variants it is compiled again.
    removed = next(file for file in sorted(tmp_path.glob("*/_layer_norm_fwd_kernel.json")))
    removed.unlink()
    assert process("serve", cache=tmp_path)["compiled"] == 1


def test_warmup_nothing_is_tuned_by_surprise():
    from triton.runtime.autotuner import Autotuner, Heuristics

    from fastconv.kernels import _configs

    _configs.all_kernels()
    modules = [module for name, module in sys.modules.items() if name.startswith("fastconv.kernels.")]
    assert len(modules) > 10
    for module in modules:
        for name, value in vars(module).items():
            assert not isinstance(value, Autotuner | Heuristics), f"{module.__name__}.{name}"


def test_warmup_lattice():
    class Model:
        config = fastconv.BertConfig(max_position_embeddings=512)

    asked = list(warmup.requests(Model(), 64, 512))
    assert len(asked) == len(set(asked)) < 6000
    assert {request.batch for request in asked} >= {1, 2, 3, 4, 32, 64}
    assert {request.length for request in asked} >= {*range(1, 18), 128, 129, 130, 132, 512}
    assert max(request.length for request in asked) == 512
    # From one number of tokens to the next there are few, of any kind.
    tokens = sorted({r.batch * r.length for r in asked if r.padding is None and not r.typed})
    assert all(after <= 1.13 * before + 1 for before, after in pairwise(tokens))


@pytest.mark.parametrize("case", ["bert", "bert graphs", "convbert training"])
def test_warmup_on_a_gpu(case, device, tmp_path):
    if device.type != "cuda":
        pytest.skip("needs a GPU")
    first = process("gpu-warm", case, cache=tmp_path, gpu=True)
    assert first["compiled"] == first["variants"] > 0
    served = process("gpu-serve", case, cache=tmp_path, gpu=True)
    assert served["compiled"] == 0 < served["cached"]


@pytest.fixture
def command(capsys):
    """Runs `fastconv warmup` in this process: its exit code, stdout and stderr."""
    tiny = pytest.importorskip("tiny", reason="commands are tested with safetensors and tokenizers")
    return lambda *arguments: tiny.run(capsys, "warmup", *arguments)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--device", "cpu"), "there is nothing to compile for the device 'cpu': it needs a GPU"),
        (("--device", "nowhere"), "device 'nowhere' can't be used"),
    ],
)
def test_warmup_command_bad_device(options, said, command):
    code, out, err = command("bert-base", *options)
    assert (code, out) == (2, "")
    assert said in err


def test_warmup_command(command, monkeypatch, tmp_path):
    """The command but for what needs a GPU: config.json is enough, models are as it says, sums are right."""
    (tmp_path / "config.json").write_text(json.dumps({**_CONFIG, "architectures": ["BertForMaskedLM"]}))
    calls = []

    def warm_up(model, *, max_batch, max_length, progress):
        calls.append((model, max_batch, max_length))
        return warmup.Warmed({"_layer_norm_fwd_kernel": 2}, 3, 1, 2.0, "folder")

    monkeypatch.setattr(warmup, "check_device", lambda device: None)
    monkeypatch.setattr(warmup, "warm_up", warm_up)
    options = ("--device", "cpu", "--max-batch", "4", "--padding", "remove", "--train", "--dtype", "bf16")
    code, out, err = command(tmp_path, *options)
    assert code == 0, err
    own, *theirs = calls
    assert len(theirs) == (importlib.util.find_spec("transformers") is not None)
    assert out.splitlines()[0] == "fastconv's BertForMaskedLM, bf16, batches up to 4 x 20:"
    assert out.splitlines()[1].split() == ["layer_norm_fwd_kernel", "2"]
    assert out.splitlines()[-1].startswith(f"{3 * len(calls)} compiled, {len(calls)} found in the cache ")
    for model, max_batch, max_length in calls:
        assert (max_batch, max_length) == (4, 20)
        assert (model.config.num_hidden_layers, model.training, model.base_model.fastconv_padding) == (
            1,
            True,
            "remove",
        )
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert type(own[0]).__name__ == "BertForMaskedLM"
    for option, said in (
        ("--max-length=21", "from 1 to 20, the model's positions, got 21"),
        ("--max-batch=0", "got 0"),
    ):
        code, _, err = command(tmp_path, "--device", "cpu", option)
        assert code == 2
        assert said in err


def test_warmup_bad_device():
    config = {name: value for name, value in _CONFIG.items() if name != "model_type"}
    with pytest.raises(ValueError, match="nothing to compile for the device 'cpu'"):
        warmup.warm_up(fastconv.BertModel(fastconv.BertConfig(**config)), max_batch=1, max_length=1)
