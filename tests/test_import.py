"""What `import fastconv` costs and brings along, in a fresh process."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

SCRIPT = """
import json, sys, time
start = time.perf_counter()
import torch
between = time.perf_counter()
before = set(sys.modules)
import fastconv
end = time.perf_counter()
print(json.dumps({"torch": between - start, "fastconv": end - between, "new": sorted(set(sys.modules) - before)}))
"""


def run(script: str, **environment: str) -> str:
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", script], env={**clean, **environment}, capture_output=True, text=True, cwd=os.path.sep
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_quick_and_lean():
    found = min((json.loads(run(SCRIPT)) for _ in range(3)), key=lambda m: m["fastconv"])
    assert found["fastconv"] <= 0.3
    for name in ("transformers", "matplotlib", "tokenizers", "triton", "safetensors", "huggingface_hub"):
        assert not [m for m in found["new"] if m.split(".")[0] == name], name


def test_import_of_ops_brings_no_triton_compiler():
    names = run("import fastconv.ops, fastconv.nn, fastconv.swap, fastconv.models, sys; print(*sys.modules)").split()
    for name in ("transformers", "matplotlib", "triton.compiler", "tokenizers"):
        assert name not in names


def test_import_without_triton():
    # As on a machine where triton can't be installed: the native path is there, and "triton" says why it isn't.
    script = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.split(".")[0] == "triton" else find(name, *rest)
sys.modules["triton"] = None
import torch, fastconv
x = torch.randn(2, 8)
print(fastconv.ops.layer_norm(x, torch.ones(8), torch.zeros(8)).shape)
with fastconv.backend("triton"):
    try:
        fastconv.ops.layer_norm(x, torch.ones(8), torch.zeros(8))
    except RuntimeError as error:
        print(error)
from fastconv.cli import main
print(main(["bench", "--quick", "--filter", "layer_norm infer"]))
"""
    found = run(script)
    assert "triton is not installed" in found and found.endswith("\n0\n")


def test_first_call_in_a_fresh_process_works():
    pytest.importorskip("triton", reason="the interpreter is part of triton")
    script = (
        "import torch, fastconv; print(fastconv.ops.layer_norm(torch.randn(2, 8), torch.ones(8), torch.zeros(8)).sum())"
    )
    assert "tensor" in run(script, TRITON_INTERPRET="1")
    assert "tensor" in run(script)


def test_public_names_exist():
    import fastconv

    for name in fastconv.__all__:
        assert getattr(fastconv, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = fastconv.nonsense
