"""A copy in 16-byte instructions, a declared narrow gather, and a matrix product."""

import torch
import triton
import triton.language as tl

NARROW = {"_gather_kernel": {"x_ptr": "every other element"}}


@triton.jit
def _copy_kernel(x_ptr, y_ptr, N, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs, mask=offs < N), mask=offs < N)


@triton.jit
def _gather_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + 2 * offs))


@triton.jit
def _matmul_kernel(a_ptr, b_ptr, c_ptr, K, M: tl.constexpr, BLOCK_K: tl.constexpr):
    offs_m, offs_k = tl.arange(0, M), tl.arange(0, BLOCK_K)
    a_ptr += offs_m[:, None] * K + offs_k[None, :]
    b_ptr += offs_k[:, None] * M + offs_m[None, :]
    acc = tl.zeros((M, M), tl.float32)
    for _ in range(0, K, BLOCK_K):
        acc += tl.dot(tl.load(a_ptr), tl.load(b_ptr))
        a_ptr += BLOCK_K
        b_ptr += BLOCK_K * M
    tl.store(c_ptr + offs_m[:, None] * M + offs_m[None, :], acc)


def launches(dtype, device):
    if dtype != torch.bfloat16:
        return
    x = torch.empty(4096, dtype=dtype, device=device)
    _copy_kernel[(4,)](x, torch.empty_like(x), 4096, BLOCK=1024, num_warps=4)
    yield "copy"
    _copy_kernel[(4,)](x, torch.empty_like(x), 4096, BLOCK=1024, num_warps=4)
    yield "the same launch again"
    _copy_kernel[(4,)](x[1:], torch.empty_like(x), 4000, BLOCK=128, num_warps=4)
    yield "an unaligned pointer, a tile of 2 bytes a thread"
    _gather_kernel[(4,)](x, torch.empty_like(x), BLOCK=1024, num_warps=4)
    yield "gather"
    a, b = torch.empty(64, 256, dtype=dtype, device=device), torch.empty(256, 64, dtype=dtype, device=device)
    _matmul_kernel[(1,)](a, b, torch.empty(64, 64, device=device), 256, M=64, BLOCK_K=64, num_warps=4)
    yield "matmul"
