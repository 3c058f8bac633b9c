"""Every case: for each op and each whole model its shapes, its rivals, and the bytes and operations that it needs."""

from __future__ import annotations

import torch

from fastconv.bench import (
    conv_branch_cases,
    dense_cases,
    embedding_norm_cases,
    layer_norm_cases,
    masked_attention_cases,
    masked_lm_loss_cases,
    model_cases,
    separable_conv_cases,
    shapes,
    span_dynamic_conv_cases,
    span_kernel_logits_cases,
)
from fastconv.bench.case import Case

_OPS = (
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


def cases(device: torch.device, *, quick: bool = False) -> list[Case]:
    """Every case for a device, the most informative first: what a run that is cut short would miss comes last.

    Where two models ask the same of an op, the case is the first one's.

    quick: tiny shapes of each op, and a tiny model
    """
    if quick:
        return [case for module in (*_OPS, model_cases) for case in module.quick(shapes.QUICK)]
    found: dict[str, Case] = {}
    for point in shapes.plan(device):
        for case in at(point):
            found.setdefault(case.name, case)
    return list(found.values())


def at(point: shapes.Point) -> list[Case]:
    """What is measured at one place: of the ops, and of the model."""
    of_ops = [case for module in _OPS for case in module.at(point)]
    wanted = [case for case in of_ops if point.ops is None or case.subject.op in point.ops]
    return [*wanted, *(model_cases.at(point) if point.model else [])]
