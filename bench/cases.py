"""Every case: for each op its shapes, its rivals, and the bytes and operations that it can't do without."""

from __future__ import annotations

import torch

from fastconv.bench import (
    conv_branch_cases,
    dense_cases,
    embedding_norm_cases,
    layer_norm_cases,
    masked_attention_cases,
    masked_lm_loss_cases,
    separable_conv_cases,
    span_dynamic_conv_cases,
    span_kernel_logits_cases,
)
from fastconv.bench.case import BenchCase

_MODULES = (
    layer_norm_cases,
    dense_cases,
    separable_conv_cases,
    span_kernel_logits_cases,
    span_dynamic_conv_cases,
    conv_branch_cases,
    masked_attention_cases,
    masked_lm_loss_cases,
    embedding_norm_cases,
)


def cases(device: torch.device, *, quick: bool = False) -> list[BenchCase]:
    """Every case for a device: the shapes of the published models, and on a GPU enough tokens to fill it.

    quick: one small shape of each op
    """
    return [case for module in _MODULES for case in module.cases(device, quick=quick)]
