"""How many kernels an accelerated layer launches: on a GPU as the profiler sees it; without one, what would be one.

Without a GPU that is every kernel that Triton's interpreter runs, and every op of torch that computes.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

import fastconv
from fastconv import reference

pytest.importorskip("triton", reason="counts the launches of Triton kernels, and the package triton is not installed")

# Of a layer in what the page shows, by what runs and family.
LAUNCHES = json.loads((Path(__file__).parent.parent / "bench" / "results" / "launches.json").read_text())["launches"]
HALF, SINGLE = LAUNCHES["inference, half precision"], LAUNCHES["inference, fp32"]
STEP, HOOKED = LAUNCHES["training step"], LAUNCHES["training step, hooks inside the layers"]

# What launches nothing: views, allocations, what only looks at a tensor, a gradient that becomes a parameter's own.
FREE = {
    "AccumulateGrad", "_reshape_alias", "_unsafe_view", "alias", "as_strided", "as_strided_", "chunk", "detach",
    "empty", "empty_like", "empty_strided", "expand", "expand_as", "flatten", "is_pinned", "item", "lift_fresh",
    "narrow", "new_empty", "permute", "promote_types", "reshape", "resize_", "resolve_conj", "resolve_neg",
    "result_type", "select", "set_", "slice", "split", "split_with_sizes", "squeeze", "t", "to", "transpose",
    "unbind", "unflatten", "unsafe_split", "unsqueeze", "view", "view_as",
}  # fmt: skip
# What launches one kernel, whatever torch's ops on a CPU call for it.
ONE = ("_scaled_dot_product", "mkldnn_convolution", "addmm", "mm", "bmm", "baddbmm", "sum")


def launches(run: Any, device: torch.device) -> Counter[str]:
    """What a call launches, by name."""
    run()  # packs weights, compiles kernels
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as profiler, _reporting(device):
        run()
    if device.type == "cuda":
        kernels = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        return Counter(event.name for event in kernels)
    found: Counter[str] = Counter()
    for event in profiler.events():
        if event.cpu_parent is None:
            _count(event, found)
    return found


@contextlib.contextmanager
def _reporting(device: torch.device) -> Iterator[None]:
    """The interpreter tells the profiler of every kernel by its name, as a GPU does."""
    if device.type == "cuda":
        yield
        return
    from triton.runtime.interpreter import InterpretedFunction

    run = InterpretedFunction.run

    def reported(self: Any, *args: Any, **kwargs: Any) -> Any:
        with record_function(f"triton::{self.fn.__name__}"):
            return run(self, *args, **kwargs)

    with mock.patch.object(InterpretedFunction, "run", reported):
        yield


def _count(event: Any, found: Counter[str]) -> None:
    """The innermost ops that compute, and the kernels, whatever the interpreter does inside of them."""
    namespace, _, name = event.name.rpartition("::")
    inner = [child for child in event.cpu_children if child.name.rpartition("::")[2] not in FREE]
    if namespace == "triton":
        found[name] += 1
    elif inner and not name.startswith(ONE):
        for child in inner:
            _count(child, found)
    elif namespace not in ("", "fastconv") and name not in FREE:
        found[event.name] += 1


# In half precision the kernel's logits are one kernel, and bias and activation go into a product's epilogue. In fp32
# cuBLAS's products are far ahead of Triton's: three launches instead of one, and with dense layers two instead of one.
@pytest.mark.parametrize(
    ("groups", "dtype", "number"),
    [
        (1, torch.float16, HALF["ConvBERT"]),
        (2, torch.float16, HALF["ConvBERT"]),
        (1, torch.float32, SINGLE["ConvBERT"]),
        (2, torch.float32, SINGLE["ConvBERT"] - 1),  # the first dense layer's activation is in its product's epilogue
    ],
)
def test_launches_of_a_convbert_layer(groups, dtype, number, device):
    def run(layers: int) -> Counter[str]:
        config = reference.ConvBertConfig(
            vocab_size=20, embedding_size=16, hidden_size=16, num_hidden_layers=layers, num_attention_heads=4,
            intermediate_size=24, conv_kernel_size=3, num_groups=groups, max_position_embeddings=8, pad_token_id=0,
        )  # fmt: skip
        model = fastconv.accelerate(reference.ConvBertModel(config)).eval().to(device, dtype)
        ids = torch.randint(1, 20, (2, 5), device=device)
        mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], device=device)
        with torch.inference_mode():
            return launches(lambda: model(ids, attention_mask=mask), device)

    layer = run(3) - run(2)
    for op in ("masked_attention", "span_dynamic_conv", "separable_conv"):
        assert layer[f"_{op}_fwd_kernel"] == 1 or device.type == "cuda", layer
    assert layer["_span_kernel_logits_fwd_kernel"] == (dtype == torch.float16), layer
    _assert_launches(layer, number, device)


@pytest.mark.parametrize(
    ("cross", "dtype", "number"),
    [(False, torch.float16, HALF["BERT"]), (False, torch.float32, SINGLE["BERT"]), (True, torch.float32, 13)],
)
def test_launches_of_a_bert_layer(cross, dtype, number, device):
    def run(layers: int) -> Counter[str]:
        config = reference.BertConfig(
            vocab_size=20, hidden_size=16, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=24,
            max_position_embeddings=8, is_decoder=cross, add_cross_attention=cross,
        )  # fmt: skip
        model = fastconv.accelerate(reference.BertModel(config)).eval().to(device, dtype)
        ids = torch.randint(1, 20, (2, 5), device=device)
        mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], device=device)
        states = {"encoder_hidden_states": torch.randn(2, 3, 16, device=device, dtype=dtype)} if cross else {}
        with torch.inference_mode():
            return launches(lambda: model(ids, attention_mask=mask, use_cache=False, **states), device)

    layer = run(3) - run(2)
    assert layer["_masked_attention_fwd_kernel"] == 1 + cross or device.type == "cuda", layer
    _assert_launches(layer, number, device)


def _assert_launches(layer: Counter[str], number: int, device: torch.device) -> None:
    # On a GPU PyTorch's attention may need fewer.
    assert 0 < layer.total() <= number if device.type == "cuda" else layer.total() == number, layer


@pytest.mark.parametrize(
    ("family", "hooked", "number"),
    [
        ("Bert", False, STEP["BERT"]),
        ("ConvBert", False, STEP["ConvBERT"]),
        ("Bert", True, HOOKED["BERT"]),
        ("ConvBert", True, HOOKED["ConvBERT"]),
    ],
)
def test_launches_of_a_layers_training_step(family, hooked, number, device):
    """Forward and backward with dropout, each parameter's gradient becoming its own, where one function is the layer.

    BERT's 24: forward 9 (products 4, attention 1, activation 1, LayerNorm 2, seeds of all dropouts 1); backward 15
    (products 8, which add what the residuals carry; attention 2, activation 1, LayerNorm 2; the bias of query, key and
    value 1; what the others leave of parameters' sums, added up 1). A layer with hooks or adapters inside, or under
    autocast, runs its modules: 31, with 2 seeds and 2 sums more, and 3 that put together or add up gradients.

    ConvBERT's other 13: forward 5 (depthwise, pointwise product, gate, product of the kernel's logits, dynamic
    convolution); backward 8 (dynamic convolution 1, products 4, gate 1, depthwise 1, its taps 1). By its modules: 50.
    24 is out of its reach: these are products of other matrices, and convolutions.
    """
    sizes = {"vocab_size": 20, "hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 24}
    sizes |= {"max_position_embeddings": 8}
    if family == "ConvBert":
        sizes |= {"embedding_size": 16, "conv_kernel_size": 3, "pad_token_id": 0}

    def run(layers: int) -> Counter[str]:
        config = getattr(reference, f"{family}Config")(num_hidden_layers=layers, **sizes)
        model = fastconv.accelerate(getattr(reference, f"{family}Model")(config)).train().to(device)
        for layer in model.encoder.layer if hooked else ():
            layer.intermediate.register_forward_hook(lambda module, args, output: None)
        ids = torch.randint(1, 20, (2, 5), device=device)
        mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], device=device)
        dy = torch.randn(2, 5, 16, device=device)

        def step() -> None:
            model.zero_grad(set_to_none=True)
            model(ids, attention_mask=mask).last_hidden_state.backward(dy)

        return launches(step, device)

    layer = run(3) - run(2)
    for half in ("dq", "dkv"):
        assert layer[f"_masked_attention_bwd_{half}_kernel"] == 1, layer
    # cuBLAS may cut a product in two: a layer has 12 of them, and ConvBERT's 6 more.
    slack = 18 if device.type == "cuda" else 0
    assert number <= layer.total() <= number + slack, layer
