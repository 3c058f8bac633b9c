"""The activation functions of the transformers list and their derivatives, for kernels: in fp32 (fp64 for fp64).

`FUNCTIONS` maps every name of the list to the function that it means; kernels take the function as a constexpr.
Where the value has a kink, its derivative there is torch's. Nothing but tl.exp and tl.erf is called, which the
interpreter knows too; what these would lose to cancellation is computed in another form.
"""

from __future__ import annotations

import triton
import triton.language as tl

FUNCTIONS: dict[str, str] = {
    "gelu": "gelu",
    "gelu_10": "gelu_10",
    "gelu_accurate": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_python": "gelu",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "hardswish": "hardswish",
    "laplace": "laplace",
    "leaky_relu": "leaky_relu",
    "linear": "linear",
    "mish": "mish",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "relu2": "relu2",
    "relu6": "relu6",
    "sigmoid": "sigmoid",
    "silu": "silu",
    "sqrtsoftplus": "sqrtsoftplus",
    "swish": "silu",
    "tanh": "tanh",
}

# One name of the list for each function.
ONE_NAME_EACH: tuple[str, ...] = tuple({function: name for name, function in FUNCTIONS.items()}.values())


def function_name(activation: str | None) -> str:
    """The function that a name of the transformers list means; None is the identity."""
    return "linear" if activation is None else FUNCTIONS[activation]


@triton.jit
def activate(x, FUNCTION: tl.constexpr):
    """The function's value at x, a tile of fp32 or fp64; NaN stays NaN."""
    if FUNCTION == "gelu":
        y = x * _normal_cdf(x)
    elif FUNCTION == "gelu_10":
        y = x * _normal_cdf(x)
        y = tl.where(y > 10.0, 10.0, y)  # below it never leaves the range
    elif FUNCTION == "gelu_tanh":
        y = x * _gelu_tanh_gate(x)
    elif FUNCTION == "hardswish":
        y = x * (_between(x + 3.0, 0.0, 6.0) * (1.0 / 6.0))
    elif FUNCTION == "laplace":
        y = 0.5 * (1.0 + tl.erf(_laplace_argument(x)))
    elif FUNCTION == "leaky_relu":
        y = tl.where(x > 0.0, x, 0.01 * x)
    elif FUNCTION == "mish":
        value, _ = _tanh_of_softplus(x)
        y = x * value
    elif FUNCTION == "quick_gelu":
        y = x * _sigmoid(1.702 * x)
    elif FUNCTION == "relu":
        y = tl.where(x < 0.0, 0.0, x)
    elif FUNCTION == "relu2":
        y = tl.where(x < 0.0, 0.0, x)
        y = y * y
    elif FUNCTION == "relu6":
        y = _between(x, 0.0, 6.0)
    elif FUNCTION == "sigmoid":
        y = _sigmoid(x)
    elif FUNCTION == "silu":
        y = x * _sigmoid(x)
    elif FUNCTION == "sqrtsoftplus":
        y = tl.sqrt(_softplus(x))
    elif FUNCTION == "tanh":
        y = _tanh(x)
    else:
        tl.static_assert(FUNCTION == "linear", "unknown activation function")
        y = x
    return y


@triton.jit
def derivative(x, FUNCTION: tl.constexpr):
    """The function's derivative at x, a tile of fp32 or fp64; at a kink torch's."""
    if FUNCTION == "gelu":
        d = _gelu_derivative(x)
    elif FUNCTION == "gelu_10":
        d = tl.where(x * _normal_cdf(x) > 10.0, 0.0, _gelu_derivative(x))
    elif FUNCTION == "gelu_tanh":
        # Past 30 the second term is 0, and would be 0 * inf.
        inner = _between(x, -30.0, 30.0)
        slope = 1.5957691216057308 * (1.0 + 3.0 * 0.044715 * inner * inner)
        d = _gelu_tanh_gate(x) + inner * slope * _sigmoid_derivative(_gelu_tanh_argument(inner))
    elif FUNCTION == "hardswish":
        d = tl.where(x <= -3.0, 0.0, tl.where(x < 3.0, x / 3.0 + 0.5, 1.0))
    elif FUNCTION == "laplace":
        z = _laplace_argument(x)
        d = (0.5641895835477563 / (0.282095 * 1.4142135623730951)) * tl.exp(-z * z)
    elif FUNCTION == "leaky_relu":
        one = tl.full(x.shape, 1.0, x.dtype)
        d = tl.where(x > 0.0, one, 0.01 * one)
    elif FUNCTION == "mish":
        value, rest = _tanh_of_softplus(x)
        d = value + _between(x, -200.0, 200.0) * rest * (1.0 + value) * _sigmoid(x)
    elif FUNCTION == "quick_gelu":
        gate = _sigmoid(1.702 * x)
        d = gate * (1.0 + 1.702 * x * (1.0 - gate))
    elif FUNCTION == "relu":
        d = tl.where(x <= 0.0, 0.0, 1.0)
    elif FUNCTION == "relu2":
        d = tl.where(x <= 0.0, 0.0, 2.0 * x)
    elif FUNCTION == "relu6":
        d = tl.where((x <= 0.0) | (x >= 6.0), 0.0, 1.0)
    elif FUNCTION == "sigmoid":
        d = _sigmoid_derivative(x)
    elif FUNCTION == "silu":
        gate = _sigmoid(x)
        d = gate * (1.0 + x * (1.0 - gate))
    elif FUNCTION == "sqrtsoftplus":
        root = tl.sqrt(_softplus(x))
        d = tl.where(root == 0.0, 0.0, _sigmoid(x) / (2.0 * root))
    elif FUNCTION == "tanh":
        d = 4.0 * _sigmoid_derivative(2.0 * x)
    else:
        tl.static_assert(FUNCTION == "linear", "unknown activation function")
        d = tl.full(x.shape, 1.0, x.dtype)
    return d


@triton.jit
def _between(x, low: tl.constexpr, high: tl.constexpr):
    # Not tl.clamp, which makes a number of NaN.
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _sigmoid_derivative(x):
    e = tl.exp(-tl.abs(x))
    return e / ((1.0 + e) * (1.0 + e))


@triton.jit
def _normal_cdf(x):
    return 0.5 * (1.0 + tl.erf(0.7071067811865476 * x))


@triton.jit
def _gelu_derivative(x):
    return _normal_cdf(x) + x * (0.3989422804014327 * tl.exp(-0.5 * x * x))


@triton.jit
def _gelu_tanh_argument(x):
    # 2 u, u = sqrt(2 / pi) * (x + 0.044715 x^3)
    return 1.5957691216057308 * (x + 0.044715 * x * x * x)


@triton.jit
def _gelu_tanh_gate(x):
    # 0.5 * (1 + tanh(u)) = sigmoid(2 u)
    return _sigmoid(_gelu_tanh_argument(x))


@triton.jit
def _laplace_argument(x):
    return (x - 0.707107) * (1.0 / (0.282095 * 1.4142135623730951))


@triton.jit
def _tanh(x):
    e = tl.exp(-2.0 * tl.abs(x))
    value = (1.0 - e) / (1.0 + e)
    value = tl.where(x < 0.0, -value, value)
    if x.dtype != tl.float64:
        # 1 - e loses the digits of a small x: there the fraction [5/4] of Pade, to 1e-9 of the value.
        z = x * x
        near = x * (945.0 + z * (105.0 + z)) / (945.0 + z * (420.0 + 15.0 * z))
        value = tl.where(tl.abs(x) < 0.6, near, value)
    return value


@triton.jit
def _tanh_of_softplus(x):
    """The value t and 1 - t. With e = exp(-|x|): t = (1 + 2e) / (1 + 2e + 2e^2), or e (e + 2) / (e (e + 2) + 2)."""
    e = tl.exp(-tl.abs(x))
    above = 1.0 + 2.0 * e
    below = e * (e + 2.0)
    part = tl.where(x < 0.0, below, above)
    rest = tl.where(x < 0.0, 2.0, 2.0 * e * e)
    return part / (part + rest), rest / (part + rest)


@triton.jit
def _softplus(x):
    """log(1 + exp(x)) = max(x, 0) + log1p(e), e = exp(-|x|); log1p(e) = 2 atanh(e / (2 + e)) by its series.

    The series' argument is at most 1/3, so that 9 terms are exact in fp32 and 18 in fp64.
    """
    e = tl.exp(-tl.abs(x))
    s = e / (2.0 + e)
    z = s * s
    TERMS: tl.constexpr = 18 if x.dtype == tl.float64 else 9
    series = tl.zeros(x.shape, x.dtype)
    for n in tl.static_range(TERMS):
        series = series * z + 1.0 / (2 * (TERMS - n) - 1)
    return tl.where(x < 0.0, 0.0, x) + 2.0 * s * series
