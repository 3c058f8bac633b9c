"""Triton kernels, their launch configs and their launchers: tensor in, tensor out; no autograd, no torch.library.

One file an op, read top to bottom: forward kernel, backward kernels, config and `pick_config`, launchers, `launches`.

Names, the same in every file:

- dimensions: B batch, S sequence, T tokens (B*S), H heads, D head size, C channels, K taps of a convolution,
  G groups; M, N, K only inside matrix products;
- arguments: input pointers, output pointers, sizes, strides, scalars, constexprs; `x_ptr`, `stride_xt`,
  `BLOCK_T`, `HAS_BIAS`; in the body `pid_t`, `offs_t`, `mask_t`, `acc`; gradients `dx`, `dw`, `dy`;
- functions: `_<op>_fwd_kernel`, `_<op>_bwd_<what>_kernel`; launchers `<op>_fwd`, `<op>_bwd`.

Rules: every load is upcast at once and every store casts back (the interpreter's bf16 arithmetic is wrong without an
error); address arithmetic is int64; sums that cross programs go through partial sums, never through atomics, so that
two runs give the same bits; numbers of sequences, of tokens and of programs are `do_not_specialize`, as long as no wide
access or register hangs on what is known of them: or a kernel would be compiled anew for a batch of 1 or a length of 16
(tests/test_warmup.py counts the variants).

`pick_config(kernel, shape, dtype, card)` is a rule, pure and decorated with `tuned` (_configs.py): tables of what was
measured on a card go before it. The decorator says what a search may vary, and what makes a config impossible.

`launches(dtype, device)` of a module makes every launch that its `pick_config` can choose, on empty tensors; the
ahead-of-time gate (tests/aot.py) records and compiles them. It wants 16-byte loads and stores wherever a tile has so
much for a thread; a module that can't do better for an argument says why in
`NARROW = {"_<op>_fwd_kernel": {"x_ptr": "reason"}}`.
"""

MAX_KERNEL_SIZE = 31  # of the convolutions: their taps are unrolled
MAX_HEAD_SIZE = 256  # of attention
MAX_FP32_HEAD_SIZE = 128  # where products need a register for each value of a row
