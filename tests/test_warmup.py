"""Warming up: after it no request compiles anything; here without a GPU, of which the compiler knows nothing."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
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
    "bert autocast",
    "decoder",
    "decoder training",
    "convbert long",
    "convbert packed",
    "convbert training",
    "roc_bert",
)
THEIRS = ("transformers decoder",) if importlib.util.find_spec("transformers") else ()

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
    return process("requests", *CASES, *THEIRS, cache=tmp_path_factory.mktemp("cache"))


def missing(asked: Sequence[str], warmed: Sequence[str]) -> set[str]:
    """The variants that requests would compile."""
    return set(asked) - set(warmed)


@pytest.mark.parametrize("case", (*CASES, *THEIRS))
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
        ("bert autocast", {"_masked_lm_loss_fwd", "_masked_attention_fwd", "_grouped_linear_fwd"}),
        ("convbert long", {"_span_kernel_logits_fwd", "_span_dynamic_conv_fwd", "_separable_conv_fwd"}),
        ("convbert training", {"_span_dynamic_conv_bwd", "_separable_conv_bwd_depthwise", "_sum_segments"}),
    ],
)
def test_warmup_reaches_the_kernels(case, kernels, noted):
    assert {f"{kernel}_kernel" for kernel in kernels} <= set(noted[case]["kernels"])


def test_warmup_few_variants(noted):
    """Batch and length alone make no variant: sizes that vary aren't specialised (see fastconv.kernels)."""
    for case in ("bert", "convbert packed"):
        counts = Counter(name.split()[0] for name in noted[case]["warmed"])
        # By which ids are given, beside vectors or words, for one row or several; by what a mask is and is read by.
        assert counts.pop("_embedding_norm_fwd_kernel") <= 8
        assert counts.pop("_masked_attention_fwd_kernel") <= 11
        # By whether the batch is packed.
        assert max(counts.values()) <= 2, case


def test_warmup_a_second_process_compiles_nothing(tmp_path):
    found = process("serve", cache=tmp_path)
    first = found["first"]
    assert first["compiled"] == first["variants"] > 0
    assert first["cached"] == 0
    assert first["folder"] == str(tmp_path)
    assert (found["again"]["compiled"], found["again"]["cached"]) == (0, first["variants"])
    assert found["served"]["compiled"] == 0
    assert 0 < found["served"]["cached"] <= first["variants"]
    # And the count can fail: what is missing is compiled.
    assert found["without one"]["compiled"] == 1


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
        forward = fastconv.BertModel.forward

    asked = list(warmup.requests(Model(), 64, 512))
    assert len(set(asked)) < 8000
    for given in ((), ("attention_mask",), ("token_type_ids", "position_ids")):
        of_kind = [request for request in asked if request.given == given]
        assert {request.batch for request in of_kind} >= {1, 2, 3, 4, 32, 64}
        assert {request.length for request in of_kind} >= {1, 2, 3, 4, 6, 8, 12, 16, 128, 512}
        assert max(request.length for request in of_kind) == 512
        # From one number of tokens to the next there are few: thresholds are powers of two, or not so near each other.
        tokens = sorted({request.batch * request.length for request in of_kind})
        most = 1.5 if "position_ids" in given else 1.17
        assert all(after <= most * before + 1 for before, after in pairwise(tokens))
    assert {request.length for request in asked if request.given == ()} >= {*range(1, 18), 129, 385}


@pytest.mark.parametrize("case", ["bert", "bert graphs", "bert autocast", "decoder", "convbert training"])
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

    def warm_up(model, *, max_batch, max_length, autocast, progress):
        calls.append((model, max_batch, max_length, autocast))
        return warmup.Warmed({"_layer_norm_fwd_kernel": 2}, 3, 1, 2.0, "folder")

    monkeypatch.setattr(warmup, "check_device", lambda device: None)
    monkeypatch.setattr(warmup, "warm_up", warm_up)
    options = ("--device", "cpu", "--max-batch", "4", "--padding", "remove", "--train", "--dtype", "bf16")
    options += ("--autocast", "fp16")
    code, out, err = command(tmp_path, *options)
    assert code == 0, err
    own, *theirs = calls
    assert len(theirs) == (importlib.util.find_spec("transformers") is not None)
    assert out.splitlines()[0] == "fastconv's BertForMaskedLM, bf16 under autocast to fp16, batches up to 4 x 20:"
    assert out.splitlines()[1].split() == ["layer_norm_fwd_kernel", "2"]
    assert out.splitlines()[-1].startswith(f"{3 * len(calls)} compiled, {len(calls)} found in the cache ")
    for model, *given in calls:
        assert given == [4, 20, torch.float16]
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
