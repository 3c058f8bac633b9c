"""The golden cases in tests/data/hf457: inputs, weights, outputs and gradients made with transformers 4.57.6 in fp32.

Every parameter is random, LayerNorm weights and the padding row included. `fp32_noise` of a case is the largest
difference between that run and the same model in fp64, so a right model in fp64 is within it, and in fp32 within twice
it, plus the rounding of another order of summation.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fastconv import reference

pytest.importorskip("safetensors", reason="the golden data is stored in safetensors, which is not installed")
from safetensors.torch import load_file

FOLDER = Path(__file__).parent / "data" / "hf457"


def cases(prefix: str, expect: str = "ok") -> list[dict[str, Any]]:
    """The cases whose name starts with `prefix` and that must work ("ok") or fail ("error")."""
    index = json.loads((FOLDER / "index.json").read_text())
    found = [case for case in index["cases"] if case["name"].startswith(prefix) and case["expect"] == expect]
    assert found, f"no golden case called {prefix}*"
    return found


def names(found: list[dict[str, Any]]) -> list[str]:
    """Their names, for pytest's ids."""
    return [case["name"] for case in found]


def config(case: dict[str, Any]) -> reference.Config:
    """The configuration of a case."""
    values = json.loads((FOLDER / case["config_file"]).read_text())
    return getattr(reference, case["model_class"]).config_class.from_dict(values)


def state(case: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The state dict of a case, with the names of tied parameters filled in."""
    weights = load_file(FOLDER / case["weights_file"])
    return weights | {name: weights[stored] for name, stored in case["tied"].items()}


def tensors(case: dict[str, Any], prefix: str) -> dict[str, torch.Tensor]:
    """The tensors of a case under `prefix` ("in.", "out.", "grad.", "cot."), without it."""
    stored = load_file(FOLDER / case["case_file"])
    return {name.removeprefix(prefix): value for name, value in stored.items() if name.startswith(prefix)}


def run(case: dict[str, Any], model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Run `model` forward and back; return "out.<name>" and "grad.<parameter>" as the case stores them."""
    dtype = next(model.parameters()).dtype
    inputs = {
        name: value.to(dtype) if value.is_floating_point() else value for name, value in tensors(case, "in.").items()
    }
    output = model(**inputs, **case["forward_kwargs"], output_attentions=True, output_hidden_states=True)
    main = output[case["main_output"]]
    cotangent = tensors(case, "cot.").get(case["main_output"])
    if cotangent is not None:
        main = (main * cotangent.to(dtype)).sum()
    if main.dim() == 0:  # cases without a cotangent store no gradients
        main.backward()
    results: dict[str, torch.Tensor] = {}
    for name, value in output.items():
        parts = {f"out.{name}": value} if isinstance(value, torch.Tensor) else enumerate_parts(name, value)
        results.update({part: tensor.detach() for part, tensor in parts.items()})
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            results[f"grad.{name}"] = parameter.grad
    return results


def enumerate_parts(name: str, values: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    """hidden_states and attentions by layer."""
    return {f"out.{name}.{index}": value for index, value in enumerate(values)}


def check(case: dict[str, Any], model: torch.nn.Module) -> None:
    """Assert that a run of `model`, in fp64 or fp32, gives every stored output and gradient within the noise."""
    results = run(case, model)
    exact = next(model.parameters()).dtype == torch.float64
    noise = case["fp32_noise"]
    stored = load_file(FOLDER / case["case_file"])
    compared = [name for name in stored if name.startswith(("out.", "grad."))]
    assert compared
    for name in compared:
        expected, actual = stored[name].double(), results[name].double()
        assert actual.shape == expected.shape, name
        if expected.isnan().any():
            assert torch.equal(actual.isnan(), expected.isnan()), name
            continue
        ulp = 2**-23 * expected.abs().max().item()
        allowed = noise.get(name, max(noise.values()) + 2 * ulp)  # hidden states have none of their own
        # In fp64 only the noise of the stored values is left. In fp32 ours is about as large; 16 ulp, since a scalar's
        # can be small by chance.
        allowed = 1.001 * allowed + 1e-12 if exact else 2 * allowed + 16 * ulp
        error = (actual - expected).abs().max().item()
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}, ulp {ulp:.2e}"
