"""A small ConvBERT learns as well accelerated as by the reference: masked language modelling on real text.

Two runs of one model that differ in rounding alone drift apart as they train; how far is measured between the
reference in fp32 and in fp64. The accelerated model, in fp32, may be as far from fp64 as twice that.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch

import fastconv
from fastconv import reference

pytest.importorskip("tokenizers", reason="the text is tokenized by tokenizers, which is not installed")
from fastconv.parity import shapes, text

STEPS, BATCH, LENGTH, VOCABULARY = 200, 8, 24, 400
CONFIG = reference.ConvBertConfig(
    vocab_size=VOCABULARY,
    embedding_size=24,
    hidden_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=96,
    conv_kernel_size=9,
    num_groups=2,
    max_position_embeddings=LENGTH,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
    pad_token_id=0,
)


def batches(steps: int) -> Iterator[dict[str, torch.Tensor]]:
    """Sentences with 15 % of their tokens masked, the labels -100 elsewhere."""
    sentences = text.default_sentences()
    tokenizer = shapes.train_tokenizer(sentences, VOCABULARY)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        chosen = [sentences[(step * BATCH + row) * 7 % len(sentences)] for row in range(BATCH)]
        batch = tokenizer(chosen, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
        masked = (torch.rand(batch["input_ids"].shape, generator=generator) < 0.15) & (batch["input_ids"] > 4)
        batch["labels"] = batch["input_ids"].masked_fill(~masked, -100)
        batch["input_ids"] = batch["input_ids"].masked_fill(masked, tokenizer.mask_token_id)
        yield dict(batch)


def train(model: reference.Model, steps: int, device: torch.device) -> torch.Tensor:
    """The loss of every step."""
    model = model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for batch in batches(steps):
        loss = model(**{name: tensor.to(device) for name, tensor in batch.items()}).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64)


# The interpreter takes a second a step.
@pytest.mark.parametrize(("backend_name", "steps"), [("native", STEPS), ("auto", 4)])
def test_the_loss_falls_as_the_references_does(backend_name, steps, device):
    steps = STEPS if device.type == "cuda" else steps
    torch.manual_seed(1)
    start = reference.ConvBertForMaskedLM(CONFIG)
    truth = train(copy.deepcopy(start).double(), steps, device)
    own = train(copy.deepcopy(start), steps, device)
    with fastconv.backend(backend_name):
        fast = train(fastconv.accelerate(copy.deepcopy(start)), steps, device)
    spread, distance = (own - truth).abs(), (fast - truth).abs()
    assert distance.mean() <= 2 * spread.mean() + 1e-6 and distance.max() <= 2 * spread.max() + 1e-6
    if steps == STEPS:
        assert truth[:10].mean() > 5.5 and truth[-20:].mean() < truth[:10].mean() - 0.5
