"""`fastconv env`: what it says of ops, tables and Triton changes with them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from unittest import mock

import pytest
import torch
from tiny import run

import fastconv
from fastconv import dispatch, ops
from fastconv.parity import backends

TRITON = importlib.util.find_spec("triton") is not None
OPS = {name for name in ops.__all__ if name[0].islower()}
CPU = torch.device("cpu")


def told(capsys) -> dict:
    code, out, _ = run(capsys, "env", "--json")
    assert code == 0
    return json.loads(out)


def process(**environment: str) -> dict:
    """What a fresh process says: Triton reads its variable once."""
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "fastconv.cli", "env", "--json"]
    done = subprocess.run(command, env={**clean, **environment}, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_env_tells_of_every_op_and_dtype(capsys):
    found = told(capsys)
    assert found["environment"]["torch"] == torch.__version__
    cpu, *gpus = found["devices"]
    assert cpu["device"] == "cpu" and len(gpus) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)
    for device in found["devices"]:
        assert set(device["ops"]) == OPS
        assert all(list(by_dtype) == ["fp32", "bf16", "fp16"] for by_dtype in device["ops"].values())


def test_env_lines_say_the_same(capsys):
    found, (code, out, _) = told(capsys), run(capsys, "env")
    assert code == 0
    for device in found["devices"]:
        assert device["ops run by"] in out
        assert all(text in out for by_dtype in device["ops"].values() for text in by_dtype.values())


@pytest.mark.skipif(not TRITON, reason="the package triton is not installed")
def test_env_follows_triton_interpret(capsys):
    here = os.environ.get("TRITON_INTERPRET") == "1"
    interpreted, plain = told(capsys) if here else process(TRITON_INTERPRET="1"), process()
    assert interpreted["TRITON_INTERPRET"] == "1" and plain["TRITON_INTERPRET"] is None
    assert interpreted["devices"][0]["ops run by"].startswith("Triton's interpreter")
    assert plain["devices"][0]["ops run by"] == "native PyTorch ops: tensors on 'cpu' need TRITON_INTERPRET=1"
    assert interpreted["devices"][0]["ops"]["layer_norm"]["fp32"] == "Triton kernel, at most 8192 channels"
    assert plain["devices"][0]["ops"]["layer_norm"]["fp32"] == "native: PyTorch ops"


def test_env_follows_the_backend():
    with fastconv.backend("native"):
        assert backends.why(CPU) == "native PyTorch ops: the backend is 'native'"
        assert all("native" in text for by_dtype in backends.choices(CPU).values() for text in by_dtype.values())


def test_env_tells_a_gpu_without_support(monkeypatch):
    monkeypatch.setattr(dispatch, "_INTERPRETING", False)
    with fastconv.backend("triton"):
        assert "backend 'triton' can't run" in backends.why(CPU)
        assert "can't run" in backends.choices(CPU)["layer_norm"]["fp32"]


@pytest.mark.skipif(not TRITON, reason="the package triton is not installed")
def test_env_asks_what_dispatch_asks(monkeypatch):
    monkeypatch.setattr(dispatch, "_INTERPRETING", True)
    before = backends.choices(CPU)
    assert before["linear_act"]["bf16"].startswith("inference of 768 inputs: Triton kernel")
    assert "inference" not in before["linear_act"]["fp32"] and "inference" not in before["span_kernel_logits"]["fp32"]
    monkeypatch.setattr(backends, "fuses_activation", lambda *args, **options: False)
    monkeypatch.setattr(backends, "fuses_logits", lambda *args: False)
    after = backends.choices(CPU)
    assert after["linear_act"]["bf16"] == before["linear_act"]["fp32"]
    assert after["span_kernel_logits"]["bf16"] == before["span_kernel_logits"]["fp32"]


def test_env_attention_on_a_gpu():
    x = mock.Mock(is_cuda=True, dtype=torch.bfloat16)
    assert backends._masked_attention(x).endswith(
        "PyTorch's attention in inference without a mask for heads of 128, few queries"
    )
    x.dtype = torch.float32
    assert "for heads of 64, heads of 128, few queries" in backends._masked_attention(x)


@pytest.mark.skipif(not TRITON, reason="the package triton is not installed")
def test_env_tells_of_tables(capsys, tmp_path, monkeypatch):
    from fastconv.kernels import _configs

    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    _configs.forget()
    try:
        code, out, _ = run(capsys, "env")
        assert code == 0 and "there is none; fastconv tune makes it" in out and "nothing is tuned" in out
        path = _configs.user_table()
        assert path is not None
        path.parent.mkdir()
        measured = dict.fromkeys(("seconds", "torch", "date", "command"), "") | {
            "triton": importlib.metadata.version("triton")
        }
        entry = {"kernel": "layer_norm_fwd", "device": "A GPU", "dtype": "float32", "shape": [8, 24], "config": None}
        path.write_text(json.dumps({"schema": 1, "entries": [entry | {"measured": measured}, {"kernel": "nothing"}]}))
        _configs.forget()
        (table,) = told(capsys)["launch configs"]
        assert table["table"] == str(path) and table["entries"] == 1 and table["devices"] == ["A GPU"]
        assert table["ignored"] == ["entry 2: unknown kernel 'nothing'"]
        assert "ignored: entry 2: unknown kernel 'nothing'" in run(capsys, "env")[1]
    finally:
        monkeypatch.undo()
        _configs.forget()
