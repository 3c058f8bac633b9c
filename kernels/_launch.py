"""What every launcher needs: the tensor's device as the current one, the card's size, and Triton's options."""

from __future__ import annotations

import contextlib
import functools
from typing import NamedTuple

import torch
import triton.language as tl

# Without a GPU the interpreter runs the programs one after the other: a few are enough to exercise a two-stage sum.
_INTERPRETER_SMS = 4

# 32-bit registers of a multiprocessor, which a block can have all, on every NVIDIA GPU since Kepler.
_REGISTERS = 65536


def device_of(x: torch.Tensor) -> contextlib.AbstractContextManager:
    """Context in which Triton launches on x's device and stream.

    Triton takes the current device: without this, a model on cuda:1 would read another card's memory.
    """
    return torch.cuda.device_of(x) if x.is_cuda else contextlib.nullcontext()


@functools.cache
def _sm_count(device_index: int) -> int:
    return torch.cuda.get_device_properties(device_index).multi_processor_count


def sm_count(x: torch.Tensor) -> int:
    """Number of multiprocessors of x's card."""
    return _sm_count(x.device.index) if x.is_cuda else _INTERPRETER_SMS


class Card(NamedTuple):
    """What launch configs depend on: a GPU's name, its compute capability, as 90 for Hopper, and shared memory.

    shared: bytes that a block can have
    """

    name: str
    capability: int
    shared: int


# Stands for the interpreter.
INTERPRETER = Card("interpreter", 90, 227 * 1024)


@functools.cache
def _card(device_index: int) -> Card:
    properties = torch.cuda.get_device_properties(device_index)
    # torch doesn't tell it of AMD's.
    shared = getattr(properties, "shared_memory_per_block_optin", 64 * 1024)
    return Card(properties.name, 10 * properties.major + properties.minor, shared)


def card(x: torch.Tensor) -> Card:
    """x's card."""
    return _card(x.device.index) if x.is_cuda else INTERPRETER


def is_amd() -> bool:
    """Whether the GPUs of this process are AMD's."""
    return torch.version.hip is not None


def options(num_warps: int, registers: int) -> dict[str, object]:
    """Triton's options for a launch; `registers`: at most so many a thread, as far as a block gets them.

    Without a limit of its own ptxas spills a few values of a kernel to fit one more block on a multiprocessor: of
    another kernel with each of its versions. Fusion of a * b + c is said explicitly: Triton 3.10 turns it off.
    """
    limit = {} if is_amd() else {"maxnreg": min(registers, _REGISTERS // (32 * num_warps))}
    return {"num_warps": num_warps, "enable_fp_fusion": True, **limit}


def acc(dtype: torch.dtype) -> tl.dtype:
    """In what a kernel computes with `dtype`: fp32, or fp64 for fp64, for the interpreter: the ops give a GPU none."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def acc_torch(dtype: torch.dtype) -> torch.dtype:
    """The same for a tensor that a kernel writes."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rows(x: torch.Tensor) -> torch.Tensor:
    """x (..., C) as (T, C) with a contiguous last dimension: a view where the strides allow it, else a copy."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()
