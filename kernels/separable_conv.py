"""Separable convolution on tokens as they lie: the depthwise part and the gradients that are no matrix product.

    d[t, c] = sum_k depthwise[c, k] * x[t + k - K // 2, c]               x is zero outside of the token's sequence
    y[t] = (pointwise @ d[t] + bias) * gate[t]

The products with pointwise are cuBLAS's; here are:

The depthwise convolution, and with flipped taps the gradient of its input: one program owns BLOCK_G groups of RUN
successive tokens, BLOCK_C channels, with the taps and RUN sums of each channel in registers. A row that a thread loads
goes into all the sums that it counts in: (RUN + K - 1) / RUN loads and conversions a token, where gathering each
token's window would be K. Reads C elements a token, writes C.

The taps' gradient: the same tiles the other way round, with the sums of the taps in registers while a program goes
through a strided set of tiles; reads x and d's gradient, 2 C elements a token. The gate's: one pass that reads dy, gate
and the product, writes the gradients of the last two, and sums the bias's on the way: 5 O elements. Both leave partial
sums that a second kernel adds in a fixed order.

A tile goes through the sequences that it has tokens of one by one, so that a window's end is a matter of rows, not of
taps: most tiles lie within one.

Depthwise separable convolution: Chollet, arXiv 1610.02357; in ConvBERT: Jiang et al., arXiv 2008.02496, section 4.2.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from . import MAX_KERNEL_SIZE, _launch
from ._configs import Card, any_config, tuned
from ._reduce import sum_partials
from ._spans import sequence_ends


@triton.jit
def _add_taps(
    acc,  # RUN sums (BLOCK_G, BLOCK_C)
    rows_ptr,  # (BLOCK_G, BLOCK_C): the first tokens of the groups in x
    taps_ptr,  # (BLOCK_C,): the channels' first taps
    offs_g,  # (BLOCK_G,) int64: the groups' first tokens
    first,
    last,
    mask_c,
    first_k,
    stride_xt,
    stride_wk,
    K: tl.constexpr,
    FLIP: tl.constexpr,
    TAPS: tl.constexpr,
    RUN: tl.constexpr,
):
    """acc with the products of taps [first_k, +TAPS) and the tokens from first to last, which are their sequence."""
    taps = ()
    for i in tl.static_range(TAPS):
        k = K - 1 - (first_k + i) if FLIP else first_k + i
        tap = tl.load(taps_ptr + k * stride_wk, mask=mask_c, other=0.0).to(acc[0].dtype)
        taps = taps + (tap[None, :],)  # noqa: RUF005 (Triton has no unpacking)
    for j in tl.static_range(RUN + TAPS - 1):
        shift = first_k + j - K // 2
        mask = ((offs_g + shift >= first) & (offs_g + shift <= last))[:, None] & mask_c[None, :]
        row = tl.load(rows_ptr + tl.cast(shift, tl.int64) * stride_xt, mask=mask, other=0.0).to(acc[0].dtype)
        sums = ()
        for r in tl.static_range(RUN):
            total = acc[r]
            if (j >= r) & (j - r < TAPS):
                total += taps[j - r] * row
            sums = sums + (total,)  # noqa: RUF005
        acc = sums
    return acc


@triton.jit(do_not_specialize=["T", "S"])
def _separable_conv_fwd_kernel(
    x_ptr,  # (T, C)
    depthwise_ptr,  # (C, K)
    before_ptr,  # (T,) int32
    after_ptr,  # (T,) int32
    y_ptr,  # (T, C) contiguous
    T,
    S,
    C,
    stride_xt,
    stride_wc,
    stride_wk,
    ACC: tl.constexpr,
    K: tl.constexpr,
    FLIP: tl.constexpr,
    ADD: tl.constexpr,
    HAS_PACKING: tl.constexpr,
    TAPS: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # One program: BLOCK_G groups of RUN successive tokens, BLOCK_C channels.
    pid = tl.program_id(0).to(tl.int64)
    blocks_c = tl.cdiv(C, BLOCK_C)
    first_t = pid // blocks_c * (BLOCK_G * RUN)
    last_t = tl.minimum(first_t + BLOCK_G * RUN, T) - 1
    offs_g = first_t + tl.arange(0, BLOCK_G) * RUN
    offs_c = (pid % blocks_c).to(tl.int32) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C

    t = first_t
    while t <= last_t:
        first, last = sequence_ends(before_ptr, after_ptr, t, S, HAS_PACKING)
        acc = ()
        for _ in tl.static_range(RUN):
            acc = acc + (tl.zeros((BLOCK_G, BLOCK_C), ACC),)  # noqa: RUF005 (Triton has no unpacking)
        # So many taps at a time as a thread has registers for; in a loop, or the compiler holds them all at once.
        x = x_ptr + offs_g[:, None] * stride_xt + offs_c[None, :]
        w = depthwise_ptr + offs_c.to(tl.int64) * stride_wc
        for k in range(0, K // TAPS * TAPS, TAPS):
            acc = _add_taps(acc, x, w, offs_g, first, last, mask_c, k, stride_xt, stride_wk, K, FLIP, TAPS, RUN)
        if K % TAPS > 0:
            k = K // TAPS * TAPS
            acc = _add_taps(acc, x, w, offs_g, first, last, mask_c, k, stride_xt, stride_wk, K, FLIP, K % TAPS, RUN)
        last = tl.minimum(last, last_t)
        for r in tl.static_range(RUN):
            offs_t = offs_g + r
            mask = ((offs_t >= t) & (offs_t <= last))[:, None] & mask_c[None, :]
            offs_y = offs_t[:, None] * C + offs_c[None, :]
            y = acc[r]
            if ADD:
                y += tl.load(y_ptr + offs_y, mask=mask, other=0.0).to(ACC)
            tl.store(y_ptr + offs_y, y.to(y_ptr.dtype.element_ty), mask=mask)
        t = last + 1


@triton.jit(do_not_specialize=["T", "S"])
def _separable_conv_bwd_depthwise_kernel(
    dy_ptr,  # (T, C)
    x_ptr,  # (T, C)
    before_ptr,  # (T,) int32
    after_ptr,  # (T,) int32
    partial_ptr,  # (K, programs, C) fp32
    T,
    S,
    C,
    first_k,
    stride_dyt,
    stride_xt,
    ACC: tl.constexpr,
    K: tl.constexpr,
    HAS_PACKING: tl.constexpr,
    TAPS: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # One program: tiles pid, pid + programs, ... of BLOCK_G * RUN tokens; BLOCK_C channels, taps [first_k, +TAPS).
    pid = tl.program_id(0).to(tl.int64)
    programs = tl.num_programs(0)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    acc = ()
    for _ in tl.static_range(TAPS):
        acc = acc + (tl.zeros((BLOCK_G, BLOCK_C), ACC),)  # noqa: RUF005 (Triton has no unpacking)

    t = pid * (BLOCK_G * RUN)
    while t < T:
        tile = t // (BLOCK_G * RUN)
        offs_g = tile * (BLOCK_G * RUN) + tl.arange(0, BLOCK_G) * RUN
        first, last = sequence_ends(before_ptr, after_ptr, t, S, HAS_PACKING)
        end = tl.minimum(tl.minimum(last + 1, (tile + 1) * (BLOCK_G * RUN)), T)
        dys = ()
        for r in tl.static_range(RUN):
            offs_t = offs_g + r
            mask = ((offs_t >= t) & (offs_t < end))[:, None] & mask_c[None, :]
            dy = tl.load(dy_ptr + offs_t[:, None] * stride_dyt + offs_c[None, :], mask=mask, other=0.0)
            dys = dys + (dy.to(ACC),)  # noqa: RUF005
        for j in tl.static_range(RUN + TAPS - 1):
            offs_t = offs_g + (first_k + j - K // 2)
            mask = ((offs_t >= first) & (offs_t <= last))[:, None] & mask_c[None, :]
            row = tl.load(x_ptr + offs_t[:, None] * stride_xt + offs_c[None, :], mask=mask, other=0.0).to(ACC)
            sums = ()
            for k in tl.static_range(TAPS):
                total = acc[k]
                if (j >= k) & (j - k < RUN):
                    total += dys[j - k] * row
                sums = sums + (total,)  # noqa: RUF005
            acc = sums
        # The tile's next sequence, or this program's next tile.
        t = tl.where(end == (tile + 1) * (BLOCK_G * RUN), (tile + programs) * (BLOCK_G * RUN), end)

    for k in tl.static_range(TAPS):
        row = partial_ptr + ((first_k + k) * programs + pid) * C + offs_c
        tl.store(row, tl.sum(acc[k], axis=0), mask=mask_c)


@triton.jit(do_not_specialize=["T"])
def _separable_conv_bwd_gate_kernel(
    dy_ptr,  # (T, C)
    gate_ptr,  # (T, C)
    product_ptr,  # (T, C)
    dproduct_ptr,  # (T, C) contiguous
    dgate_ptr,  # (T, C)
    partial_ptr,  # (1, programs, C) fp32: sums of dproduct, for the bias
    T,
    C,
    stride_dyt,
    stride_gt,
    stride_pt,
    stride_dgt,
    ACC: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # One program: blocks pid, pid + programs, ... of BLOCK_T tokens, BLOCK_C of the C output channels.
    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    acc = tl.zeros((BLOCK_T, BLOCK_C), ACC)
    for block in range(pid, tl.cdiv(T, BLOCK_T), programs):
        offs_t = (tl.cast(block, tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T))[:, None]
        mask = (offs_t < T) & mask_c[None, :]
        dy = tl.load(dy_ptr + offs_t * stride_dyt + offs_c[None, :], mask=mask, other=0.0).to(ACC)
        gate = tl.load(gate_ptr + offs_t * stride_gt + offs_c[None, :], mask=mask, other=0.0).to(ACC)
        product = tl.load(product_ptr + offs_t * stride_pt + offs_c[None, :], mask=mask, other=0.0).to(ACC)
        rows = offs_t * C + offs_c[None, :]
        dproduct = dy * gate
        tl.store(dproduct_ptr + rows, dproduct.to(dproduct_ptr.dtype.element_ty), mask=mask)
        dgate = dy * product
        dgate_tile = dgate_ptr + offs_t * stride_dgt + offs_c[None, :]
        if ADD:
            dgate += tl.load(dgate_tile, mask=mask, other=0.0).to(ACC)
        tl.store(dgate_tile, dgate.to(dgate_ptr.dtype.element_ty), mask=mask)
        acc += dproduct
    tl.store(partial_ptr + pid.to(tl.int64) * C + offs_c, tl.sum(acc, axis=0), mask=mask_c)


@dataclass(frozen=True)
class Config:
    """Launch parameters of the convolution and of its taps' gradient."""

    run: int
    block_g: int
    block_c: int
    taps: int  # that a thread holds at a time
    num_warps: int
    registers: int  # at most so many a thread

    @property
    def block_t(self) -> int:
        """Tokens of a tile."""
        return self.run * self.block_g


# ConvBERT's 9 taps fit in one pass over the rows, of fp32 at three blocks a multiprocessor. A loop over passes needs
# more registers, since the compiler unrolls it, and is no ConvBERT's.
_ONE_PASS, _ONE_PASS_REGISTERS = 9, 168
_MAX_TAPS, _REGISTERS = 6, 255

# Tokens of a group: their sums are unrolled.
_MAX_RUN = 16

# Bytes of a row that a thread loads at a time.
_VECTOR = 16

# 128 channels: the models' sizes are multiples of it.
_BLOCK_C, _NUM_WARPS = 128, 4

# Programs a multiprocessor of the kernels that keep sums: several, to hide the latency of each other's loads.
_PROGRAMS = 4


@dataclass(frozen=True)
class GateConfig:
    """Launch parameters of the gate's gradient."""

    block_t: int
    block_c: int
    num_warps: int
    registers: int


def _check(kernel: str, shape: tuple[int, ...], dtype: torch.dtype, card: Card, config: Config) -> str | None:
    if config.taps > shape[2] or config.run > _MAX_RUN:
        return f"taps must be at most {shape[2]}, run {_MAX_RUN}; got {config.taps}, {config.run}"
    return None


@tuned(
    "separable_conv_fwd",
    "separable_conv_bwd_depthwise",
    vary=("run", "block_g", "block_c", "num_warps", "registers"),
    config=Config,
    check=_check,
)
def pick_config(kernel: str, shape: tuple[int, int, int], dtype: torch.dtype, card: Card) -> Config:
    """Launch config for x (T, C) and K taps, `shape` (T, C, K). Not tuned on a card yet."""
    tokens, channels, kernel_size = shape
    itemsize = dtype.itemsize
    block_c = min(_BLOCK_C, max(16, triton.next_power_of_2(channels)))
    block_g = max(1, 32 * _NUM_WARPS * _VECTOR // itemsize // block_c)
    # Few tokens: small programs, so that they spread over the card. In half precision a thread has the taps and sums of
    # eight channels, and no registers for those of more than two tokens.
    run = 4 if tokens > 2048 and itemsize > 2 else 2
    # As many passes over the rows as the taps need, of equal length.
    passes = 1 if kernel_size <= _ONE_PASS else triton.cdiv(kernel_size, _MAX_TAPS)
    registers = _ONE_PASS_REGISTERS if passes == 1 and itemsize > 2 else _REGISTERS
    taps = triton.cdiv(kernel_size, passes)
    return Config(run, block_g, block_c, taps, _NUM_WARPS, registers)


@tuned(
    "separable_conv_bwd_gate",
    vary=("block_t", "block_c", "num_warps", "registers"),
    config=GateConfig,
    check=any_config,
)
def pick_gate_config(kernel: str, shape: tuple[int, int], dtype: torch.dtype, card: Card) -> GateConfig:
    """Launch config for the gate (T, O): a thread has 16 values of three tensors. Not tuned on a card yet."""
    _, channels = shape
    block_c = min(_BLOCK_C, max(16, triton.next_power_of_2(channels)))
    return GateConfig(max(1, 32 * _NUM_WARPS * 16 // (block_c * dtype.itemsize)), block_c, _NUM_WARPS, _REGISTERS)


def separable_conv_depthwise(
    x: torch.Tensor,
    depthwise: torch.Tensor,
    before: torch.Tensor | None,
    after: torch.Tensor | None,
    flip: bool,
    add_to: torch.Tensor | None = None,
) -> torch.Tensor:
    """The depthwise convolution of x (B, S, C), or (T, C) with before and after, (T,) int32, of a packing.

    depthwise (C, 1, K); the result is contiguous, with x's shape and dtype. flip: with the taps in reverse order, which
    makes it the gradient of x from the result's. add_to: contiguous and like x; the result is added to it, in place.
    """
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device) if add_to is None else add_to
    rows = _launch.rows(x)
    tokens, channels = rows.shape
    if tokens == 0:
        return y
    shape = (tokens, channels, depthwise.shape[-1])
    config = pick_config("separable_conv_fwd", shape, x.dtype, _launch.card(x))
    with _launch.device_of(x):
        _separable_conv_fwd_kernel[(triton.cdiv(tokens, config.block_t) * triton.cdiv(channels, config.block_c),)](
            rows,
            depthwise,
            before,
            after,
            y,
            tokens,
            x.shape[-2],
            channels,
            rows.stride(0),
            depthwise.stride(0),
            depthwise.stride(2),
            ACC=_launch.acc(x.dtype),
            K=depthwise.shape[-1],
            FLIP=flip,
            ADD=add_to is not None,
            HAS_PACKING=before is not None,
            TAPS=config.taps,
            RUN=config.run,
            BLOCK_G=config.block_g,
            BLOCK_C=config.block_c,
            **_launch.options(config.num_warps, config.registers),
        )
    return y


def separable_conv_bwd_depthwise(
    dy: torch.Tensor,
    x: torch.Tensor,
    kernel_size: int,
    before: torch.Tensor | None,
    after: torch.Tensor | None,
    *,
    add_up: bool = True,
) -> torch.Tensor:
    """The gradient of depthwise, (C, 1, K) contiguous of x's dtype, from that of its result, dy like x.

    add_up=False: the sums of the programs, (K, programs, C) fp32 (fp64 for fp64), instead of theirs.
    """
    channels = x.shape[-1]
    dy_rows, rows = _launch.rows(dy), _launch.rows(x)
    tokens = rows.shape[0]
    if tokens == 0:
        return torch.zeros(channels, 1, kernel_size, dtype=x.dtype, device=x.device)
    shape = (tokens, channels, kernel_size)
    config = pick_config("separable_conv_bwd_depthwise", shape, x.dtype, _launch.card(x))
    blocks_c = triton.cdiv(channels, config.block_c)
    programs = min(triton.cdiv(tokens, config.block_t), triton.cdiv(_PROGRAMS * _launch.sm_count(x), blocks_c))
    stats = _launch.acc_torch(x.dtype)
    partial = torch.empty(kernel_size, programs, channels, dtype=stats, device=x.device)
    for first_k in range(0, kernel_size, config.taps):
        with _launch.device_of(x):
            _separable_conv_bwd_depthwise_kernel[(programs, blocks_c)](
                dy_rows,
                rows,
                before,
                after,
                partial,
                tokens,
                x.shape[-2],
                channels,
                first_k,
                dy_rows.stride(0),
                rows.stride(0),
                ACC=_launch.acc(x.dtype),
                K=kernel_size,
                HAS_PACKING=before is not None,
                TAPS=min(config.taps, kernel_size - first_k),
                RUN=config.run,
                BLOCK_G=config.block_g,
                BLOCK_C=config.block_c,
                **_launch.options(config.num_warps, config.registers),
            )
    if not add_up:
        return partial
    ddepthwise = torch.empty(channels, 1, kernel_size, dtype=x.dtype, device=x.device)
    sum_partials(partial, ddepthwise.view(channels, kernel_size).t())
    return ddepthwise


def separable_conv_bwd_gate(
    dy: torch.Tensor,
    gate: torch.Tensor,
    product: torch.Tensor,
    *,
    add_to: torch.Tensor | None = None,
    add_up: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of product, gate and the product's bias (O, 1) from that of product * gate, all (..., O).

    add_to: like gate, contiguous but for the tokens' one stride; the gate's gradient is added to it, in place.
    add_up=False: the sums of the programs, (1, programs, O) fp32 (fp64 for fp64), instead of theirs for the bias.
    """
    dproduct = torch.empty(product.shape, dtype=product.dtype, device=dy.device)
    dgate = torch.empty(gate.shape, dtype=gate.dtype, device=dy.device) if add_to is None else add_to
    channels = product.shape[-1]
    dgate_rows = dgate.view(-1, channels)
    dy, gate, product = _launch.rows(dy), _launch.rows(gate), _launch.rows(product)
    tokens = dy.shape[0]
    if tokens == 0:
        return dproduct, dgate, torch.zeros(channels, 1, dtype=product.dtype, device=dy.device)
    config = pick_gate_config("separable_conv_bwd_gate", (tokens, channels), dy.dtype, _launch.card(dy))
    blocks_c = triton.cdiv(channels, config.block_c)
    programs = min(triton.cdiv(tokens, config.block_t), triton.cdiv(_PROGRAMS * _launch.sm_count(dy), blocks_c))
    stats = _launch.acc_torch(product.dtype)
    partial = torch.empty(1, programs, channels, dtype=stats, device=dy.device)
    with _launch.device_of(dy):
        _separable_conv_bwd_gate_kernel[(programs, blocks_c)](
            dy,
            gate,
            product,
            dproduct,
            dgate_rows,
            partial,
            tokens,
            channels,
            dy.stride(0),
            gate.stride(0),
            product.stride(0),
            dgate_rows.stride(0),
            ACC=_launch.acc(product.dtype),
            ADD=add_to is not None,
            BLOCK_T=config.block_t,
            BLOCK_C=config.block_c,
            **_launch.options(config.num_warps, config.registers),
        )
    if not add_up:
        return dproduct, dgate, partial
    dbias = torch.empty(channels, 1, dtype=product.dtype, device=dy.device)
    sum_partials(partial, dbias.view(1, channels))
    return dproduct, dgate, dbias


def launches(dtype: torch.dtype, device: torch.device) -> Iterator[str]:
    """Make every launch that `pick_config` can choose, on empty tensors; yields a name after each.

    C over every block size; for ConvBERT's 768 also T over both branches, K over the ends of its range and of one pass,
    and a packing, for which the kernels have other code.
    """

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    cases = [(768, tokens, 9, packed) for tokens in (512, 8192) for packed in (False, True)]
    cases += [(768, 8192, 1, False), (768, 8192, 11, False), (768, 8192, MAX_KERNEL_SIZE, False)]
    cases += [(channels, 8192, 9, False) for channels in (16, 32, 64)]
    for channels, tokens, kernel_size, packed in cases:
        lead = (tokens,) if packed else (8, tokens // 8)
        x, depthwise = empty(*lead, channels), empty(channels, 1, kernel_size)
        span = empty(tokens, dtype=torch.int32) if packed else None
        name = f"C={channels} K={kernel_size} T={tokens} packed={packed}"
        y = separable_conv_depthwise(x, depthwise, span, span, False)
        if kernel_size == 9 and channels == 768:
            separable_conv_depthwise(x, depthwise, span, span, True)
            separable_conv_depthwise(x, depthwise, span, span, True, add_to=y)
        yield f"separable_conv_depthwise {name}"
        separable_conv_bwd_depthwise(y, x, kernel_size, span, span)
        yield f"separable_conv_bwd_depthwise {name}"
    for channels in (16, 32, 64, 384):
        x = empty(8, 1024, channels)
        separable_conv_bwd_gate(x, x, x)
        separable_conv_bwd_gate(x, x, x, add_to=empty(8, 1024, 4 * channels)[..., :channels])
        yield f"separable_conv_bwd_gate O={channels}"
