"""ConvBERT through every kernel of its layers: outputs and every parameter's gradient by the 2x rule."""

from __future__ import annotations

import copy

import pytest
import torch
from tolerance import assert_2x

import fastconv
from fastconv import reference

# Attention heads, their size, head_ratio, groups, taps: the published sizes of heads, 64 and 48, and others.
SHAPES = [(1, 64, 2, 1, 9), (1, 48, 2, 2, 9), (2, 8, 4, 2, 3), (2, 5, 2, 1, 1), (1, 16, 8, 4, 15)]


@pytest.mark.parametrize(("heads", "size", "ratio", "groups", "taps"), SHAPES)
def test_outputs_and_gradients(backend, device, heads, size, ratio, groups, taps):
    config = reference.ConvBertConfig(
        vocab_size=30, embedding_size=12, hidden_size=2 * heads * size, num_hidden_layers=2,
        num_attention_heads=heads * ratio, head_ratio=ratio, num_groups=groups, conv_kernel_size=taps,
        intermediate_size=8 * groups, max_position_embeddings=16, pad_token_id=0,
    )  # fmt: skip
    assert (config.attention_heads, config.attention_head_size) == (heads, size)
    model = reference.ConvBertForTokenClassification(config).eval().to(device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if name.endswith("LayerNorm.weight") else 0.0, 0.3 if parameter.dim() > 1 else 0.1)
    ids = torch.randint(1, 30, (2, 11), device=device)
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    labels = torch.randint(0, 2, (2, 11), device=device)

    def run(model: torch.nn.Module) -> dict[str, torch.Tensor]:
        output = model(ids, attention_mask=mask, labels=labels)
        output.loss.backward()
        found = {"logits": output.logits.detach(), "loss": output.loss.detach()[None]}
        return found | {f"d{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}

    truth, own = run(copy.deepcopy(model).double()), run(copy.deepcopy(model))
    fast = run(fastconv.accelerate(copy.deepcopy(model)))
    assert fast.keys() == own.keys()
    # Many gradients are sums that nearly cancel: their roundings are those of the largest.
    eps = 2 * torch.finfo(torch.float32).eps
    largest = max(gradient.abs().max().item() for name, gradient in truth.items() if name.startswith("d"))
    for name in fast:
        scale = truth[name].abs().max().item()
        if scale < eps * largest:  # such as those of a kernel of one tap, whose weight is always 1
            assert fast[name].abs().max() <= 8 * eps * largest, name
        else:
            allowed = 8 * eps * (max(1.0, largest / scale) if name.startswith("d") else 1.0)
            assert_2x(name, fast[name], own[name], truth[name], rounding=allowed)
