"""The golden cases in tests/data/hf457: inputs, weights, outputs and gradients made with transformers 4.57.6 in fp32.

Every parameter is random, LayerNorm weights and the padding row included. `fp32_noise` of a case is the largest
difference between that run and the same model in fp64, so a right model in fp64 is within it, and in fp32 within twice
it, plus the rounding of another order of summation. Cases of the kind "decode" have none: there it is measured here.
"""

from __future__ import annotations

import copy
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
    """Run `model` forward and back; return everything under the names that the case stores it by."""
    dtype = next(model.parameters()).dtype
    inputs = {
        name: value.to(dtype) if value.is_floating_point() else value for name, value in tensors(case, "in.").items()
    }
    if case["kind"] == "decode":
        return run_decoder(case, model, inputs)
    return run_forward(case, model, inputs)


def run_forward(
    case: dict[str, Any], model: torch.nn.Module, inputs: dict[str, torch.Tensor], **options: bool
) -> dict[str, torch.Tensor]:
    """One call, and the gradient of its loss or of what the case's cotangent weighs: "out.<name>", "grad.<name>"."""
    output = model(
        **inputs, **case.get("forward_kwargs", {}), **options, output_attentions=True, output_hidden_states=True
    )
    main = output[case["main_output"] if output.get("loss") is None else "loss"]
    cotangent = tensors(case, "cot.").get(case["main_output"])
    if cotangent is not None:
        main = (main * cotangent.to(main.dtype)).sum()
    if main.dim() == 0:  # cases without a cotangent store no gradients
        main.backward()
    grads = {f"grad.{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return named("out.", output) | grads


def run_decoder(
    case: dict[str, Any], model: torch.nn.Module, inputs: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """A run without a cache, "full.", one that fills a cache, "cached_full.", and one in steps, "step<i>."."""
    full = run_forward(case, model, inputs, use_cache=False)
    results = {name if name.startswith("grad.") else f"full.{name}": value for name, value in full.items()}
    inputs = {name: value for name, value in inputs.items() if name != "labels"}
    with torch.no_grad():
        output = model(**inputs, use_cache=True)
        results |= named("cached_full.out.", output)
        for kind in ("self", "cross"):
            for layer, pair in enumerate(getattr(output.past_key_values, f"{kind}_attention")):
                for part, tensor in zip(("key", "value"), pair, strict=True):
                    # ours are (B, S, H, D), the stored ones (B, H, S, D)
                    results[f"cached_full.past.{layer}.{kind}_{part}"] = tensor.transpose(1, 2)
        cache = reference.Cache()
        for index, step in enumerate(case["steps"]):
            start, end = step["start"], step["start"] + step["length"]
            part = {
                name: value if name.startswith("encoder_") else value[:, 0 if name == "attention_mask" else start : end]
                for name, value in inputs.items()
            }
            output = model(**part, past_key_values=cache, use_cache=True)
            assert output.past_key_values is cache and cache.get_seq_length() == end
            results |= named(f"step{index}.out.", output)
    return results


def named(prefix: str, output: reference.ModelOutput) -> dict[str, torch.Tensor]:
    """The tensors of an output by name; hidden_states and attentions by name and layer."""
    found: dict[str, torch.Tensor] = {}
    for name, value in output.items():
        if isinstance(value, torch.Tensor):
            found[prefix + name] = value.detach()
        elif isinstance(value, tuple):
            found |= {f"{prefix}{name}.{index}": part.detach() for index, part in enumerate(value)}
    return found


def measured_noise(case: dict[str, Any], model: torch.nn.Module) -> dict[str, float]:
    """The largest difference between an fp32 and an fp64 run of `model`, for each result."""
    narrow, wide = (run(case, copy.deepcopy(model).to(dtype)) for dtype in (torch.float32, torch.float64))
    return {name: (narrow[name].double() - wide[name]).abs().max().item() for name in wide}


def expected_name(case: dict[str, Any], name: str) -> str:
    """The name of the stored tensor that a result must equal.

    With relative positions transformers 4.57 takes every query of a call with a cache for the last one: what it stored
    for such calls of several tokens is wrong, and the call without a cache is the truth.
    """
    relative = getattr(config(case), "position_embedding_type", "absolute") != "absolute"
    return name.removeprefix("cached_") if relative and name.startswith("cached_full.out.") else name


def check(case: dict[str, Any], model: torch.nn.Module) -> None:
    """Assert that a run of `model`, in fp64 or fp32, gives every stored output and gradient within the noise."""
    recorded = "fp32_noise" in case
    noise = case["fp32_noise"] if recorded else measured_noise(case, model)
    results = run(case, model)
    exact = recorded and next(model.parameters()).dtype == torch.float64
    stored = load_file(FOLDER / case["case_file"])
    compared = [name for name in stored if not name.startswith(("in.", "cot."))]
    assert compared
    for name in compared:
        expected, actual = stored[expected_name(case, name)].double(), results[name].double()
        assert actual.shape == expected.shape, name
        if expected.isnan().any():
            assert torch.equal(actual.isnan(), expected.isnan()), name
            continue
        ulp = 2**-23 * expected.abs().max().item()
        allowed = noise.get(name, max(noise.values()) + 2 * ulp)  # hidden states have none of their own
        # In fp64 only the recorded noise of the stored values is left. In fp32 ours is about as large, and a measured
        # one is about that of the stored values; 16 ulp, since a scalar's can be small by chance.
        allowed = 1.001 * allowed + 1e-12 if exact else 2 * allowed + 16 * ulp
        error = (actual - expected).abs().max().item()
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}, ulp {ulp:.2e}"
