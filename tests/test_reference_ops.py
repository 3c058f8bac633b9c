"""The reference ops against independent formulations: loops over elements, PyTorch's own functions, closed forms."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from fastconv.reference import Packing, ops

HALF = [torch.float16, torch.bfloat16]


def randn(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def assert_one_rounding(result: torch.Tensor, truth: torch.Tensor) -> None:
    """`result` is the fp64 truth rounded once to its dtype, up to the fp32 arithmetic before that."""
    assert torch.allclose(result.double(), truth, rtol=torch.finfo(result.dtype).eps, atol=1e-5 * truth.abs().max())


def gradcheck(function, *tensors: torch.Tensor) -> None:
    assert torch.autograd.gradcheck(function, [tensor.requires_grad_() for tensor in tensors])


# layer_norm


@pytest.mark.parametrize("channels", [1, 2, 63, 768])
def test_layer_norm_equals_pytorch(channels):
    x, weight, bias = randn(2, 5, channels), randn(channels), randn(channels)
    expected = F.layer_norm(x, (channels,), weight, bias, 1e-5)
    assert torch.allclose(ops.layer_norm(x, weight, bias, 1e-5), expected, rtol=1e-12, atol=1e-12)


def test_layer_norm_adds_bias_dropout_and_residual_in_that_order():
    x, x_bias, residual, weight, bias = randn(3, 8), randn(8), randn(3, 8), randn(8), randn(8)
    keep = torch.rand(3, 8) < 0.75
    summed = torch.where(keep, (x + x_bias) / 0.75, 0.0) + residual
    expected = F.layer_norm(summed, (8,), weight, bias, 1e-12)
    actual = ops.layer_norm(x, weight, bias, x_bias=x_bias, residual=residual, dropout_p=0.25, dropout_mask=keep)
    assert torch.allclose(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", HALF)
def test_layer_norm_rounds_once_and_keeps_the_dtype_of_x(dtype):
    x, residual = randn(4, 96, dtype=dtype), randn(4, 96, dtype=dtype)
    weight, bias = randn(96, dtype=torch.float32), randn(96, dtype=torch.float32)
    actual = ops.layer_norm(x, weight, bias, residual=residual)
    truth = ops.layer_norm(x.double(), weight.double(), bias.double(), residual=residual.double())
    assert actual.dtype == dtype
    assert_one_rounding(actual, truth)


def test_layer_norm_of_a_constant_row_is_the_bias():
    bias = randn(6)
    assert torch.equal(ops.layer_norm(torch.full((2, 6), 0.1), randn(6), bias), bias.float().expand(2, 6))


def test_layer_norm_gradients():
    keep = torch.rand(3, 7) < 0.6
    gradcheck(
        lambda x, w, b, xb, r: ops.layer_norm(x, w, b, x_bias=xb, residual=r, dropout_p=0.4, dropout_mask=keep),
        *(randn(3, 7), randn(7), randn(7), randn(7), randn(3, 7)),
    )


# span_dynamic_conv


def span_dynamic_conv_loop(value, logits, kernel_size):
    B, S, C = value.shape
    heads = logits.shape[2] // kernel_size
    size = C // heads
    y = torch.zeros_like(value)
    for b in range(B):
        for s in range(S):
            for h in range(heads):
                kernel = logits[b, s, h * kernel_size : (h + 1) * kernel_size].softmax(0)
                for k in range(kernel_size):
                    t = s + k - kernel_size // 2
                    if 0 <= t < S:
                        channels = slice(h * size, (h + 1) * size)
                        y[b, s, channels] += kernel[k] * value[b, t, channels]
    return y


@pytest.mark.parametrize("kernel_size", [1, 3, 9])
@pytest.mark.parametrize("length", [1, 2, 8, 10])
def test_span_dynamic_conv_equals_a_loop(length, kernel_size):
    value, logits = randn(2, length, 6), randn(2, length, 3 * kernel_size)
    expected = span_dynamic_conv_loop(value, logits, kernel_size)
    assert torch.allclose(ops.span_dynamic_conv(value, logits, kernel_size), expected, rtol=1e-12, atol=1e-12)


def test_span_dynamic_conv_with_one_tap_is_the_identity():
    value = randn(2, 5, 4)
    assert torch.equal(ops.span_dynamic_conv(value, randn(2, 5, 2), 1), value)


@pytest.mark.parametrize("dtype", HALF)
def test_span_dynamic_conv_rounds_once(dtype):
    value, logits = randn(2, 12, 8, dtype=dtype), randn(2, 12, 18, dtype=dtype)
    actual = ops.span_dynamic_conv(value, logits, 9)
    assert actual.dtype == dtype
    assert_one_rounding(actual, ops.span_dynamic_conv(value.double(), logits.double(), 9))


def test_span_dynamic_conv_survives_huge_logits():
    logits = torch.tensor([[[1e4, 0.0, -1e4]]]).expand(1, 4, 3)
    value = torch.randn(1, 4, 2)
    assert torch.equal(ops.span_dynamic_conv(value, logits, 3)[:, 1:], value[:, :-1])  # the first tap: one to the left


def test_span_dynamic_conv_gradients():
    gradcheck(lambda v, k: ops.span_dynamic_conv(v, k, 3), randn(2, 4, 4), randn(2, 4, 6))


# separable_conv


def separable_conv_loop(x, depthwise, pointwise, bias):
    S, K = x.shape[1], depthwise.shape[2]
    spread = torch.zeros_like(x)
    for s in range(S):
        for k in range(K):
            t = s + k - K // 2
            if 0 <= t < S:
                spread[:, s] += depthwise[:, 0, k] * x[:, t]
    return spread @ pointwise[:, :, 0].T + bias[:, 0]


@pytest.mark.parametrize("kernel_size", [1, 3, 9])
@pytest.mark.parametrize("length", [1, 4, 11])
def test_separable_conv_equals_a_loop(length, kernel_size):
    x, gate = randn(2, length, 6), randn(2, length, 4)
    weights = randn(6, 1, kernel_size), randn(4, 6, 1), randn(4, 1)
    expected = separable_conv_loop(x, *weights)
    assert torch.allclose(ops.separable_conv(x, *weights), expected, rtol=1e-12, atol=1e-12)
    assert torch.allclose(ops.separable_conv(x, *weights, gate=gate), expected * gate, rtol=1e-12, atol=1e-12)


def test_separable_conv_gradients():
    gradcheck(
        lambda x, d, p, b, g: ops.separable_conv(x, d, p, b, gate=g),
        *(randn(2, 4, 3), randn(3, 1, 3), randn(2, 3, 1), randn(2, 1), randn(2, 4, 2)),
    )


# grouped_linear, linear_act


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_grouped_linear_is_one_linear_layer_a_group(groups):
    x, weight, bias = randn(2, 5, groups * 3), randn(groups, 3, 7), randn(groups * 7)
    parts = zip(x.chunk(groups, -1), weight, bias.chunk(groups), strict=True)
    expected = torch.cat([F.linear(part, w.T, b) for part, w, b in parts], dim=-1)
    assert torch.allclose(ops.grouped_linear(x, weight, bias), expected, rtol=1e-12, atol=1e-12)
    assert torch.allclose(
        ops.grouped_linear(x, weight, bias, activation="tanh"), expected.tanh(), rtol=1e-12, atol=1e-12
    )


def test_linear_act_applies_the_activation_after_the_bias():
    x, weight, bias = randn(2, 5, 3), randn(4, 3), randn(4)
    expected = torch.relu(x @ weight.T + bias)
    assert torch.allclose(ops.linear_act(x, weight, bias, "relu"), expected, rtol=1e-12, atol=1e-12)
    assert torch.allclose(ops.linear_act(x, weight, bias, None), x @ weight.T + bias, rtol=1e-12, atol=1e-12)


def phi(x: float) -> float:
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))


def gelu_tanh(x: float) -> float:
    return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


CLOSED_FORMS = {
    "gelu": lambda x: x * phi(x),
    "gelu_10": lambda x: min(10.0, max(-10.0, x * phi(x))),
    "gelu_accurate": gelu_tanh,
    "gelu_fast": gelu_tanh,
    "gelu_new": gelu_tanh,
    "gelu_python": lambda x: x * phi(x),
    "gelu_python_tanh": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "hardswish": lambda x: x * min(6.0, max(0.0, x + 3)) / 6,
    "laplace": lambda x: 0.5 * (1 + math.erf((x - 0.707107) / (0.282095 * math.sqrt(2)))),
    "leaky_relu": lambda x: x if x > 0 else 0.01 * x,
    "linear": lambda x: x,
    "mish": lambda x: x * math.tanh(math.log1p(math.exp(x))),
    "quick_gelu": lambda x: x * sigmoid(1.702 * x),
    "relu": lambda x: max(0.0, x),
    "relu2": lambda x: max(0.0, x) ** 2,
    "relu6": lambda x: min(6.0, max(0.0, x)),
    "sigmoid": sigmoid,
    "silu": lambda x: x * sigmoid(x),
    "sqrtsoftplus": lambda x: math.sqrt(math.log1p(math.exp(x))),
    "swish": lambda x: x * sigmoid(x),
    "tanh": math.tanh,
}


@pytest.mark.parametrize("name", sorted(ops.ACTIVATIONS))
def test_activation_equals_its_closed_form(name):
    x = torch.tensor([-12.0, -3.5, -1.0, -0.1, 0.0, 0.3, 1.0, 2.9, 6.5, 12.0], dtype=torch.float64)
    expected = torch.tensor([CLOSED_FORMS[name](value) for value in x.tolist()], dtype=torch.float64)
    assert torch.allclose(ops.get_activation(name)(x), expected, rtol=1e-9, atol=1e-12)


# masked_attention


def qkv(*, queries: int = 5, keys: int = 5, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    return [randn(2, length, 3, 4, dtype=dtype) for length in (queries, keys, keys)]


def sdpa(q, k, v, mask, scale=None):
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)


@pytest.mark.parametrize("shape", [(2, 1, 1, 6), (2, 1, 5, 6), (1, 3, 5, 6), (5, 6), (2, 3, 5, 6)])
@pytest.mark.parametrize("additive", [False, True])
def test_masked_attention_equals_pytorch(shape, additive):
    q, k, v = qkv(keys=6)
    keep = torch.rand(shape) < 0.7
    keep[..., 0] = True  # no fully masked row: PyTorch gives NaN there
    mask = randn(*shape).masked_fill(~keep, -math.inf) if additive else keep
    expected = sdpa(q, k, v, mask)
    assert torch.allclose(ops.masked_attention(q, k, v, mask=mask), expected, rtol=1e-12, atol=1e-12)


def test_masked_attention_scale_head_mask_and_dropout():
    q, k, v = qkv()
    keep, head_mask = torch.rand(2, 3, 5, 5) < 0.8, torch.tensor([1.0, 0.0, 0.5]).view(3, 1, 1)
    probabilities = (torch.einsum("bqhd,bkhd->bhqk", q, k) * 0.3).softmax(-1)
    expected = torch.einsum("bhqk,bkhd->bqhd", torch.where(keep, probabilities / 0.8, 0.0) * head_mask, v)
    actual = ops.masked_attention(q, k, v, head_mask=head_mask, dropout_mask=keep, dropout_p=0.2, scale=0.3)
    assert torch.allclose(actual, expected, rtol=1e-12, atol=1e-12)
    assert actual[:, :, 1].abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF])
@pytest.mark.parametrize("forbidden", ["bool", "lowest", "-inf"])
def test_fully_masked_row_is_the_average_of_the_values(dtype, forbidden):
    q, k, v = qkv(dtype=dtype)
    keep = torch.ones(2, 1, 5, 5, dtype=torch.bool)
    keep[1, :, 2] = False
    fill = -math.inf if forbidden == "-inf" else torch.finfo(dtype).min
    mask = keep if forbidden == "bool" else torch.zeros(keep.shape, dtype=dtype).masked_fill(~keep, fill)
    actual = ops.masked_attention(10 * q, k, v, mask=mask)
    average = v[1].double().mean(dim=0)
    assert torch.allclose(actual[1, 2].double(), average, rtol=0, atol=4 * torch.finfo(dtype).eps)
    assert actual.isfinite().all()


def test_masked_keys_get_no_gradient():
    q, k, v = (tensor.requires_grad_() for tensor in qkv())
    keep = torch.arange(5) < torch.tensor([[3], [5]])
    ops.masked_attention(q, k, v, mask=keep[:, None, None]).square().sum().backward()
    for gradient in (k.grad, v.grad):
        assert gradient[0, 3:].abs().max() == 0 and gradient[0, :3].abs().min() > 0


def test_masked_attention_gradients():
    keep = torch.rand(1, 1, 3, 4) < 0.7
    gradcheck(
        lambda q, k, v: ops.masked_attention(q, k, v, mask=keep),
        *(randn(1, 3, 2, 2), randn(1, 4, 2, 2), randn(1, 4, 2, 2)),
    )


@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (2, 6), (6, 2), (1, 4)])
def test_masked_attention_lengths_and_causal_are_masks(queries, keys):
    # The last query is at the last key.
    q, k, v = qkv(queries=queries, keys=keys)
    lengths = torch.tensor([keys - 1, 0])
    within = torch.tensor([[j < n for j in range(keys)] for n in lengths.tolist()])[:, None, None]
    past = torch.tensor([[j - (keys - 1) <= i - (queries - 1) for j in range(keys)] for i in range(queries)])
    other, bias = torch.rand(2, 3, queries, keys) < 0.7, randn(queries, keys)
    for options, keep in (
        ({"lengths": lengths}, within),
        ({"causal": True}, past),
        ({"lengths": lengths.int(), "causal": True}, within & past),
        ({"lengths": lengths, "mask": other}, within & other),
        ({"lengths": lengths, "causal": True, "mask": other}, within & past & other),
    ):
        expected = ops.masked_attention(q, k, v, mask=keep)
        assert torch.allclose(ops.masked_attention(q, k, v, **options), expected, rtol=1e-12, atol=1e-12)
        added = ops.masked_attention(q, k, v, **options | {"mask": bias})
        expected = ops.masked_attention(q, k, v, mask=bias.masked_fill(~keep, -math.inf))
        if "mask" not in options:
            assert torch.allclose(added, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("with_keys", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (2, 6), (6, 2), (1, 4), (1, 1)])
def test_relative_positions_equal_a_loop(queries, keys, with_keys):
    (q, k, v), P = qkv(queries=queries, keys=keys), 7
    table = randn(2 * P - 1, 4)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k)
    for i in range(queries):
        for j in range(keys):
            row = table[P - 1 + (i + keys - queries) - j]
            scores[:, :, i, j] += q[:, i] @ row + (k[:, j] @ row if with_keys else 0.0)
    expected = torch.einsum("bhqk,bkhd->bqhd", (0.3 * scores).softmax(-1), v)
    relative = ops.RelativePositions(table, with_keys)
    actual = ops.masked_attention(q, k, v, relative=relative, scale=0.3)
    assert torch.allclose(actual, expected, rtol=1e-12, atol=1e-12)


def packed(lengths, causal=False, **options):
    """The op of a packed batch and what it must be: every sequence alone, on random values."""
    q, k, v = (randn(sum(part), 3, 4) for part in (lengths[0], lengths[-1], lengths[-1]))
    packing = tuple(Packing.from_lengths(part) for part in lengths)
    actual = ops.masked_attention(
        q, k, v, packing=packing[0] if len(lengths) == 1 else packing, causal=causal, **options
    )
    parts = zip(q.split(lengths[0]), k.split(lengths[-1]), v.split(lengths[-1]), strict=True)
    rows = [
        ops.masked_attention(qs[None], ks[None], vs[None], causal=causal, **options)[0] if len(ks) else 0.0 * qs
        for qs, ks, vs in parts
    ]
    return actual, torch.cat(rows)


@pytest.mark.parametrize("lengths", [([3, 1, 5],), ([0, 4, 0],), ([3, 2, 4], [1, 5, 2]), ([3, 2, 0], [1, 0, 2])])
def test_packed_attention_is_each_sequence_alone(lengths):
    head_mask, relative = randn(3, 1, 1), ops.RelativePositions(randn(9, 4), True)
    for options in ({}, {"scale": 2.0}, {"head_mask": head_mask}, {"relative": relative}):
        assert torch.equal(*packed(lengths, **options))
    if len(lengths) == 1:
        assert torch.equal(*packed(lengths, causal=True))


def test_packed_attention_drops_what_the_mask_says():
    (q, k, v), keep = (randn(5, 3, 4) for _ in range(3)), torch.rand(1, 3, 5, 5) < 0.5
    dropout = {"dropout_p": 0.5, "dropout_mask": keep}
    actual = ops.masked_attention(q, k, v, packing=Packing.from_lengths([2, 3]), **dropout)
    same = torch.block_diag(torch.ones(2, 2), torch.ones(3, 3)).bool()
    expected = ops.masked_attention(q[None], k[None], v[None], mask=same, **dropout)[0]
    assert torch.allclose(actual, expected, rtol=1e-12, atol=1e-12)


def test_masked_attention_gradients_of_what_is_added_and_multiplied():
    def function(q, k, v, table, mask, head_mask):
        relative = ops.RelativePositions(table, True)
        return ops.masked_attention(
            q, k, v, relative=relative, mask=mask, head_mask=head_mask, lengths=torch.tensor([2]), causal=True
        )

    tensors = (randn(1, 2, 2, 2), randn(1, 3, 2, 2), randn(1, 3, 2, 2), randn(7, 2), randn(2, 2, 3), randn(2, 2, 1))
    gradcheck(function, *tensors)


# what every op does


def calls(dtype: torch.dtype, device: str = "cpu") -> dict:
    """Each op on small inputs of one dtype; the first tensor may lie on another device."""

    def made(*shape: int, on: str = "cpu") -> torch.Tensor:
        tensor = torch.randn(shape).to(on)
        return tensor.to(dtype) if dtype.is_floating_point or dtype.is_complex else torch.ones(shape, dtype=dtype)

    def first(*shape: int) -> torch.Tensor:
        return made(*shape, on=device)

    return {
        "layer_norm": lambda: ops.layer_norm(first(2, 4), made(4), made(4)),
        "span_dynamic_conv": lambda: ops.span_dynamic_conv(first(1, 3, 4), made(1, 3, 6), 3),
        "separable_conv": lambda: ops.separable_conv(first(1, 3, 4), made(4, 1, 3), made(2, 4, 1), made(2, 1)),
        "grouped_linear": lambda: ops.grouped_linear(first(2, 4), made(2, 2, 3), made(6)),
        "linear_act": lambda: ops.linear_act(first(2, 4), made(3, 4), made(3), "gelu"),
        "masked_attention": lambda: ops.masked_attention(first(1, 3, 2, 4), made(1, 3, 2, 4), made(1, 3, 2, 4)),
    }


@pytest.mark.parametrize("name", list(calls(torch.float32)))
def test_op_works_in_every_floating_dtype_and_refuses_others(name):
    for dtype in (torch.float64, torch.float32, *HALF):
        result = calls(dtype)[name]()
        assert result.dtype == dtype and result.isfinite().all()
    for dtype in (torch.int64, torch.bool, torch.complex64):
        with pytest.raises(TypeError, match=r"must be a real floating-point tensor, got torch\."):
            calls(dtype)[name]()
    with pytest.raises(ValueError, match=r"is on meta but .* is on cpu"):
        calls(torch.float32, device="meta")[name]()


def ones(*shape: int) -> torch.Tensor:
    return torch.ones(shape)


EMPTY = {
    "layer_norm": (lambda: ops.layer_norm(ones(0, 4), ones(4), ones(4)), (0, 4)),
    "span_dynamic_conv": (lambda: ops.span_dynamic_conv(ones(0, 5, 4), ones(0, 5, 6), 3), (0, 5, 4)),
    "span_dynamic_conv sequence": (lambda: ops.span_dynamic_conv(ones(2, 0, 4), ones(2, 0, 6), 3), (2, 0, 4)),
    "separable_conv": (
        lambda: ops.separable_conv(ones(0, 5, 4), ones(4, 1, 3), ones(2, 4, 1), ones(2, 1)),
        (0, 5, 2),
    ),
    "separable_conv sequence": (
        lambda: ops.separable_conv(ones(2, 0, 4), ones(4, 1, 3), ones(2, 4, 1), ones(2, 1)),
        (2, 0, 2),
    ),
    "grouped_linear": (lambda: ops.grouped_linear(ones(0, 5, 4), ones(2, 2, 3), ones(6)), (0, 5, 6)),
    "linear_act": (lambda: ops.linear_act(ones(0, 4), ones(3, 4), ones(3), "gelu"), (0, 3)),
    "masked_attention": (lambda: ops.masked_attention(*(ones(0, 5, 2, 4),) * 3), (0, 5, 2, 4)),
}


@pytest.mark.parametrize("name", list(EMPTY))
def test_empty_input_gives_an_empty_result(name):
    call, shape = EMPTY[name]
    assert tuple(call().shape) == shape


BAD = {
    "weight of another size": (
        lambda: ops.layer_norm(ones(2, 4), ones(5), ones(4)),
        r"weight must have shape \(C,\) = \(4,\), got \(5,\)",
    ),
    "residual of another shape": (
        lambda: ops.layer_norm(ones(2, 4), ones(4), ones(4), residual=ones(4)),
        r"residual must have shape that of x = \(2, 4\), got \(4,\)",
    ),
    "no channels": (lambda: ops.layer_norm(ones(2, 0), ones(0), ones(0)), r"C >= 1, got \(2, 0\)"),
    "dropout without a mask": (
        lambda: ops.layer_norm(ones(2, 4), ones(4), ones(4), dropout_p=0.1),
        "dropout_p = 0.1 needs dropout_mask",
    ),
    "dropout of everything": (
        lambda: ops.layer_norm(ones(2, 4), ones(4), ones(4), dropout_p=1.0),
        "dropout_p must be at least 0 and less than 1, got 1.0",
    ),
    "even kernel": (
        lambda: ops.span_dynamic_conv(ones(1, 3, 4), ones(1, 3, 8), 4),
        "kernel_size must be odd, got 4",
    ),
    "even kernel of a separable convolution": (
        lambda: ops.separable_conv(ones(1, 3, 4), ones(4, 1, 2), ones(2, 4, 1), ones(2, 1)),
        "kernel_size must be odd, got 2",
    ),
    "logits not a multiple of the kernel": (
        lambda: ops.span_dynamic_conv(ones(1, 3, 4), ones(1, 3, 7), 3),
        "divisible by kernel_size 3",
    ),
    "channels not a multiple of the heads": (
        lambda: ops.span_dynamic_conv(ones(1, 3, 5), ones(1, 3, 6), 3),
        r"H\*D divisible by H",
    ),
    "logits of another length": (
        lambda: ops.span_dynamic_conv(ones(1, 3, 4), ones(1, 2, 6), 3),
        r"got \(1, 3, 4\) and \(1, 2, 6\)",
    ),
    "depthwise of another channel count": (
        lambda: ops.separable_conv(ones(1, 3, 4), ones(5, 1, 3), ones(2, 4, 1), ones(2, 1)),
        r"depthwise must have shape \(C, 1, K\) = \(4, 1, 3\), got \(5, 1, 3\)",
    ),
    "flat bias of a separable convolution": (
        lambda: ops.separable_conv(ones(1, 3, 4), ones(4, 1, 3), ones(2, 4, 1), ones(2)),
        r"bias must have shape \(O, 1\) = \(2, 1\), got \(2,\)",
    ),
    "gate of another length": (
        lambda: ops.separable_conv(ones(1, 3, 4), ones(4, 1, 3), ones(2, 4, 1), ones(2, 1), gate=ones(1, 2, 2)),
        r"gate must have shape \(B, S, O\) = \(1, 3, 2\), got \(1, 2, 2\)",
    ),
    "channels not groups times inputs": (
        lambda: ops.grouped_linear(ones(2, 5), ones(2, 2, 3), ones(6)),
        r"\(\.\.\., 4\) .*got \(2, 5\)",
    ),
    "unknown activation": (
        lambda: ops.linear_act(ones(2, 4), ones(3, 4), ones(3), "gelo"),
        "activation must be one of .*gelu.*, got 'gelo'",
    ),
    "features that don't fit": (
        lambda: ops.linear_act(ones(2, 5), ones(3, 4), ones(3), None),
        r"got \(2, 5\) and \(3, 4\)",
    ),
    "keys of another head size": (
        lambda: ops.masked_attention(ones(1, 3, 2, 4), ones(1, 3, 2, 5), ones(1, 3, 2, 5)),
        r"q \(1, 3, 2, 4\), k \(1, 3, 2, 5\)",
    ),
    "no keys": (
        lambda: ops.masked_attention(ones(1, 3, 2, 4), ones(1, 0, 2, 4), ones(1, 0, 2, 4)),
        "at least one key",
    ),
    "dropout without its mask": (
        lambda: ops.masked_attention(*(ones(1, 3, 2, 4),) * 3, dropout_p=0.5),
        r"dropout_p = 0.5 needs dropout_mask, a bool tensor of shape \(B, H, Sq, Sk\)",
    ),
    "dropout mask of another shape": (
        lambda: ops.masked_attention(*(ones(1, 3, 2, 4),) * 3, dropout_p=0.5, dropout_mask=ones(1, 3, 3, 3).bool()),
        r"dropout_mask must be broadcastable to \(B, H, Sq, Sk\) = \(1, 2, 3, 3\), got \(1, 3, 3, 3\)",
    ),
    "mask of another shape": (
        lambda: ops.masked_attention(*(ones(1, 3, 2, 4),) * 3, mask=ones(1, 3)[0, :2].bool()),
        r"mask must be broadcastable to \(B, H, Sq, Sk\) = \(1, 2, 3, 3\), got \(2,\)",
    ),
}


@pytest.mark.parametrize("name", list(BAD))
def test_bad_argument_gives_a_clear_error(name):
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_masks_of_wrong_dtype_are_refused():
    q = ones(1, 3, 2, 4)
    with pytest.raises(TypeError, match=r"mask must be a real floating-point tensor, got torch.int64"):
        ops.masked_attention(q, q, q, mask=torch.ones(3, 3, dtype=torch.long))
    with pytest.raises(TypeError, match=r"dropout_mask must be a bool tensor, got torch.float32"):
        ops.masked_attention(q, q, q, dropout_p=0.1, dropout_mask=ones(3, 3))
    with pytest.raises(TypeError, match=r"dropout_mask must be a bool tensor, got torch.float32"):
        ops.layer_norm(ones(2, 4), ones(4), ones(4), dropout_p=0.1, dropout_mask=ones(2, 4))
    with pytest.raises(TypeError, match="kernel_size must be an int, got float"):
        ops.span_dynamic_conv(ones(1, 3, 4), ones(1, 3, 6), 3.0)
