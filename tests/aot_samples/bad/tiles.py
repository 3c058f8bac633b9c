"""A spill, a narrow load, too much shared memory, a kernel that doesn't compile, and one that nothing launches."""

import torch
import triton
import triton.language as tl


@triton.jit
def _spill_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    # The whole tile has to live until its largest value is known: 256 values a thread.
    tl.store(y_ptr + offs, tl.exp(x - tl.max(x, 0)) * x)


@triton.jit
def _narrow_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + 2 * offs))


@triton.jit
def _shared_kernel(x_ptr, y_ptr, M: tl.constexpr, BLOCK_K: tl.constexpr):
    offs_m, offs_k = tl.arange(0, M), tl.arange(0, BLOCK_K)
    a = tl.load(x_ptr + offs_m[:, None] * BLOCK_K + offs_k[None, :])
    acc = tl.dot(a, tl.trans(a))
    tl.store(y_ptr + offs_m[:, None] * M + offs_m[None, :], acc)


@triton.jit
def _broken_kernel(x_ptr, BLOCK: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, BLOCK), tl.zeros((BLOCK + 1,), tl.float32))


@triton.jit
def _forgotten_kernel(x_ptr):
    tl.store(x_ptr, 1.0)


def launches(dtype, device):
    if dtype != torch.bfloat16:
        return
    x = torch.empty(65536, dtype=dtype, device=device)
    wide = x.float()
    _spill_kernel[(1,)](wide, torch.empty_like(wide), BLOCK=8192, num_warps=1)
    yield "spill"
    _narrow_kernel[(4,)](x, torch.empty_like(x), BLOCK=1024, num_warps=4)
    yield "narrow"
    _shared_kernel[(1,)](x, torch.empty(64, 64, device=device), M=64, BLOCK_K=2048, num_warps=8)
    yield "shared"
    _broken_kernel[(1,)](x, BLOCK=64)
    yield "broken"
