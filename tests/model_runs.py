"""Walk through cases, run a model of either library on one, and compare everything that comes out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from model_cases import hypothesis

from fastconv import reference

Tensors = dict[str, torch.Tensor]


def walk(strategy: Any, check: Any, examples: int) -> None:
    """Check as many cases, the same ones in every run; one that fails is printed, and made as small as possible."""
    settings = hypothesis.settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    settings(hypothesis.given(strategy)(check))()


def run(model: Any, inputs: dict[str, Any], cached: int) -> tuple[Any, Tensors, Tensors]:
    """The output, its tensors, and the gradient of every parameter, of a random sum of all that the output holds."""
    output = call(model, inputs, cached)
    tensors = flat("output", output)
    generator = torch.Generator().manual_seed(6)
    total = torch.zeros((), dtype=torch.float64)
    for name in sorted(tensors):
        weights = torch.randn(tensors[name].shape, generator=generator, dtype=torch.float64)
        if tensors[name].requires_grad:
            total = total + (tensors[name] * weights).sum()
    model.zero_grad()
    total.backward()
    parameters = model.named_parameters(remove_duplicate=False)
    gradients = {name: parameter.grad for name, parameter in parameters if parameter.grad is not None}
    return output, {name: tensor.detach() for name, tensor in tensors.items()}, gradients


def call(model: Any, inputs: dict[str, Any], cached: int) -> Any:
    """The output; of the tokens from `cached` on if those before go into a cache first."""
    torch.manual_seed(5)
    if not cached:
        return model(**inputs)
    first = {name: value for name, value in inputs.items() if name != "logits_to_keep"}
    rest = dict(inputs)
    for name, value in inputs.items():
        if name == "inputs_embeds" or name.endswith("_ids"):
            first[name], rest[name] = value[:, :cached], value[:, cached:]
    if "attention_mask" in inputs:
        first["attention_mask"] = inputs["attention_mask"][:, :cached]
    past = model(**first | {"use_cache": True, "return_dict": True}).past_key_values
    return model(**rest, past_key_values=past, use_cache=True)


def flat(name: str, value: Any) -> Tensors:
    """Every tensor of an output by name or, in a tuple, by position; those of a cache are (B, S, H, D)."""
    if isinstance(value, torch.Tensor):
        return {name: value}
    if isinstance(value, reference.Cache):
        value = {"self": value.self_attention, "cross": value.cross_attention}
    elif hasattr(value, "cross_attention_cache"):
        value = {"self": layers(value.self_attention_cache), "cross": layers(value.cross_attention_cache)}
    elif hasattr(value, "layers"):
        value = {"self": layers(value)}
    # transformers 4 has None in a tuple where there is no pooler
    parts = value.items() if isinstance(value, Mapping) else enumerate(part for part in value if part is not None)
    found: Tensors = {}
    for key, part in parts:
        found |= flat(f"{name}.{key}", part)
    return found


def layers(cache: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values of a cache of transformers, in the layout of ours."""
    filled = [layer for layer in cache.layers if layer.is_initialized]
    return [(layer.keys.transpose(1, 2), layer.values.transpose(1, 2)) for layer in filled]


def assert_equal(actual: Tensors, expected: Tensors, floor: float = 0.0) -> None:
    """The same names, equal within 1e-9 of each one's largest value, or of `floor` if that is larger; NaN where NaN."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].shape == value.shape and actual[name].dtype == value.dtype, name
        assert torch.equal(actual[name].isnan(), value.isnan()), name
        scale = max(largest({name: value}), floor)
        error = (actual[name] - value).nan_to_num().abs().max().item()
        assert error <= 1e-9 * scale, f"{name}: error {error:.2e}, scale {scale:.2e}"


def largest(tensors: Tensors) -> float:
    """The largest magnitude: the scale of gradients. Many are sums that nearly cancel, whose own size says nothing."""
    return max(tensor.nan_to_num().abs().max().item() for tensor in tensors.values())


def together(tensors: Tensors, truth: Tensors, floor: float) -> torch.Tensor:
    """All values in units of the largest of their tensor in `truth`, or of `floor`; but for tensors that hold NaN."""
    scales = {
        name: max(largest({name: value}), floor) or 1.0 for name, value in truth.items() if not value.isnan().any()
    }
    return torch.cat([torch.zeros(0), *(tensors[name].flatten() / scale for name, scale in scales.items())])
