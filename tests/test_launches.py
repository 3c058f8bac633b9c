"""How many kernels an accelerated layer launches: on a GPU as the profiler sees it; without one, the ops that would."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import fastconv
from fastconv import reference

pytest.importorskip("triton", reason="counts the launches of Triton kernels, and the package triton is not installed")

# What launches nothing: views, allocations, and what only looks at a tensor.
FREE = {
    "_reshape_alias", "_unsafe_view", "alias", "as_strided", "as_strided_", "chunk", "detach", "empty",
    "empty_like", "empty_strided", "expand", "expand_as", "flatten", "is_pinned", "item", "lift_fresh",
    "narrow", "new_empty", "permute", "promote_types", "reshape", "resize_", "resolve_conj", "resolve_neg",
    "result_type", "select", "set_", "slice", "split", "split_with_sizes", "squeeze", "t", "to", "transpose",
    "unbind", "unflatten", "unsafe_split", "unsqueeze", "view", "view_as",
}  # fmt: skip


def launches(run: Any, device: torch.device) -> Counter[str]:
    """What a call launches, by name."""
    run()  # packs weights, compiles kernels
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as profiler:
        run()
    if device.type == "cuda":
        kernels = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        return Counter(event.name for event in kernels)
    found: Counter[str] = Counter()
    for event in profiler.events():
        if event.cpu_parent is None:
            _count(event, found)
    return found


def _count(event: Any, found: Counter[str]) -> None:
    """The innermost ops that compute; one of ours is one launch, whatever the interpreter does inside of it."""
    namespace, _, name = event.name.rpartition("::")
    inner = [child for child in event.cpu_children if child.name.rpartition("::")[2] not in FREE]
    if namespace == "fastconv":
        found[event.name] += 1
    elif inner and not name.startswith(("_scaled_dot_product", "mkldnn_convolution", "addmm", "mm", "bmm", "baddbmm")):
        for child in inner:
            _count(child, found)
    elif namespace and name not in FREE:
        found[event.name] += 1


@pytest.mark.parametrize("groups", [1, 2])
def test_launches_of_a_convbert_layer(groups, device):
    def run(layers: int) -> Counter[str]:
        config = reference.ConvBertConfig(
            vocab_size=20, embedding_size=16, hidden_size=16, num_hidden_layers=layers, num_attention_heads=4,
            intermediate_size=24, conv_kernel_size=3, num_groups=groups, max_position_embeddings=8, pad_token_id=0,
        )  # fmt: skip
        model = fastconv.accelerate(reference.ConvBertModel(config)).eval().to(device)
        ids = torch.randint(1, 20, (2, 5), device=device)
        mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], device=device)
        with torch.inference_mode():
            return launches(lambda: model(ids, attention_mask=mask), device)

    layer = run(3) - run(2)
    for half in ("masked_attention", "span_dynamic_conv"):
        assert layer[f"fastconv::{half}_fwd_out"] == 1 or device.type == "cuda", layer
    assert 0 < layer.total() <= 13, layer


@pytest.mark.parametrize(("cross", "limit"), [(False, 8), (True, 13)], ids=["encoder", "decoder"])
def test_launches_of_a_bert_layer(cross, limit, device):
    def run(layers: int) -> Counter[str]:
        config = reference.BertConfig(
            vocab_size=20, hidden_size=16, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=24,
            max_position_embeddings=8, is_decoder=cross, add_cross_attention=cross,
        )  # fmt: skip
        model = fastconv.accelerate(reference.BertModel(config)).eval().to(device)
        ids = torch.randint(1, 20, (2, 5), device=device)
        mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], device=device)
        states = {"encoder_hidden_states": torch.randn(2, 3, 16, device=device)} if cross else {}
        with torch.inference_mode():
            return launches(lambda: model(ids, attention_mask=mask, use_cache=False, **states), device)

    layer = run(3) - run(2)
    assert layer["fastconv::masked_attention_fwd"] == 1 + cross or device.type == "cuda", layer
    assert 0 < layer.total() <= limit, layer
