"""What every op is tested for besides parity, written once: each function takes the op, its reference and inputs."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import pytest
import torch
from tolerance import assert_2x
from torch.utils.checkpoint import checkpoint

Op = Callable[..., torch.Tensor]
Inputs = dict[str, torch.Tensor]


def leaves(inputs: Inputs, trained: tuple[str, ...] | None = None) -> Inputs:
    """Fresh leaves with the inputs' values and layouts; those named in `trained`, or all floating ones, need grad."""
    return {
        k: t.detach().requires_grad_(t.is_floating_point() and (trained is None or k in trained))
        for k, t in inputs.items()
    }


def assert_fp64(op: Op, reference: Op, inputs: Inputs) -> None:
    """In fp64, where the reference is no better than the op: output and gradients equal it but for a few roundings."""
    inputs = {k: t.double() if t.is_floating_point() else t for k, t in inputs.items()}
    results = []
    for function in (op, reference):
        given = leaves(inputs)
        y = function(**given)
        results.append([y, *torch.autograd.grad(y.sin().sum(), [t for t in given.values() if t.requires_grad])])
    with torch.no_grad():
        results[0].append(op(**inputs))
    results[1].append(results[1][0])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def assert_inference_2x(op: Op, reference: Op, inputs: Inputs) -> None:
    """The 2x rule without gradients, where other code runs (oneDNN's ops on a CPU): no_grad, inference_mode, frozen."""
    truth = reference(**{k: t.double() if t.is_floating_point() else t for k, t in inputs.items()})
    expected = reference(**inputs)
    with torch.no_grad():
        assert_2x("under no_grad", op(**leaves(inputs)), expected, truth)
    with torch.inference_mode():
        assert_2x("under inference_mode", op(**inputs), expected, truth)
        assert_2x("of inference tensors", op(**{k: t.clone() for k, t in inputs.items()}), expected, truth)
    assert_2x("of frozen tensors", op(**inputs), expected, truth)


def assert_each_gradient(op: Op, reference: Op, inputs: Inputs) -> None:
    """Where one input alone needs a gradient, it gets it: nothing may be taken for inference."""
    for name in (k for k, t in inputs.items() if t.is_floating_point()):
        one, other = leaves(inputs, (name,)), leaves(inputs, (name,))
        expected = reference(**other)
        dy = torch.randn_like(expected)
        (dx,) = torch.autograd.grad(op(**one), one[name], dy)
        (dx_expected,) = torch.autograd.grad(expected, other[name], dy)
        torch.testing.assert_close(dx, dx_expected, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"d{name}: {m}")


def assert_pure(op: Op, inputs: Inputs) -> None:
    """Two runs give the same bits, and neither writes to an input."""
    before = {k: t.clone() for k, t in inputs.items()}

    def run() -> list[torch.Tensor]:
        given = leaves(inputs)
        y = op(**given)
        y.square().sum().backward()
        with torch.no_grad():
            return [y, op(**inputs), *(t.grad for t in given.values() if t.requires_grad)]

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)
    for name, t in inputs.items():
        assert torch.equal(t, before[name]), name


def assert_second_derivative(op: Op, reference: Op, inputs: Inputs, refused: str | None) -> None:
    """With create_graph=True the op says by the name `refused` that it can't, or has the reference's second derivative.

    The inputs reach the loss on another path too: along it the engine would come to an end without the op's part.
    """

    def run(function: Op) -> tuple[torch.Tensor, ...]:
        given = leaves(inputs)
        wanted = [t for t in given.values() if t.requires_grad]
        loss = function(**given).sin().sum() + sum(t.pow(3).sum() for t in wanted)
        gradients = torch.autograd.grad(loss, wanted, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in gradients), wanted)

    if refused is not None:
        with pytest.raises(NotImplementedError, match=rf"fastconv's {refused} has no second derivative.*restore"):
            run(op)
        return
    for name, got, expected in zip(inputs, run(op), run(reference), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3, msg=lambda m, name=name: f"{name}: {m}")


def assert_checkpointed(op: Op, inputs: Inputs) -> None:
    """Activation checkpointing, which runs a forward within a backward, gives the same gradients."""

    def run(wrap: Callable[..., torch.Tensor]) -> list[torch.Tensor | None]:
        given = leaves(inputs)
        wrap(lambda *tensors: op(**dict(zip(inputs, tensors, strict=True))), *given.values()).sin().sum().backward()
        return [t.grad for t in given.values()]

    expected = run(lambda function, *tensors: function(*tensors))
    for reentrant in (False, True):
        got = run(functools.partial(checkpoint, use_reentrant=reentrant))
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, msg=lambda m, mode=reentrant: f"use_reentrant={mode}: {m}")


def assert_traced(op: Op, inputs: Inputs) -> None:
    """A torch.jit trace, made where no gradient was needed, still has the gradients."""
    values = tuple(t.detach() for t in inputs.values())

    def positional(*tensors: torch.Tensor) -> torch.Tensor:
        return op(**dict(zip(inputs, tensors, strict=True)))

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # shapes are compared, and torch.jit is deprecated
        traced = torch.jit.trace(positional, values, check_trace=False)
    results = []
    for function in (traced, positional):
        given = [t.clone().requires_grad_() for t in values]
        y = function(*given)
        results.append([y, *torch.autograd.grad(y.sin().sum(), given)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def checked_aot_eager(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable:
    """aot_eager, for graphs of which no torch makes wrong gradients without a word.

    torch 2.11 does for an autograd.Function with a write in place in its forward, or with one tensor in two of its
    slots (pytorch #180642, #183604). Where another torch runs the tests, results don't show it.
    """
    for node in graph.graph.nodes:
        if str(node.target) != "autograd_function_apply":
            continue
        forward, _, *given = node.args
        tensors = [t for t in given if isinstance(t, torch.fx.Node)]
        assert len(set(tensors)) == len(tensors), f"one tensor is in two slots of {tensors}"
        for inner in getattr(graph, forward.target).graph.nodes:
            overload = isinstance(inner.target, torch._ops.OpOverload)
            name = inner.target if isinstance(inner.target, str) else getattr(inner.target, "__name__", "")
            writes = overload and inner.target._schema.is_mutable
            # add_, and torch.add's out, and x[0] = 1
            writes = writes or (name.endswith("_") and not name.endswith("__") and inner.op.startswith("call"))
            assert not writes and name != "setitem" and "out" not in inner.kwargs, f"{inner} writes in place"
    return torch._dynamo.backends.debugging.aot_eager(graph, inputs)


def assert_compiled(op: Op, inputs: Inputs) -> None:
    """torch.compile makes one graph of the op, with eager's output and gradients, for training and for inference."""

    def run(function: Op) -> list[torch.Tensor]:
        given = leaves(inputs)
        y = function(**given)
        with torch.no_grad():
            inferred = function(**given)
        return [y, inferred, *torch.autograd.grad(y.sin().sum(), [t for t in given.values() if t.requires_grad])]

    torch._dynamo.reset()
    compiled = torch.compile(op, backend=checked_aot_eager, fullgraph=True)
    for got, expected in zip(run(compiled), run(op), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def assert_transforms(op: Op, reference: Op, inputs: Inputs) -> None:
    """torch.func's grad, vmap and jvp and forward-mode AD are right, also of tensors that need no gradient themselves.

    Nothing but torch.func says there that a gradient is wanted, so what serves inference only would be taken.
    """
    names = [k for k, t in inputs.items() if t.is_floating_point()]
    rest = {k: t for k, t in inputs.items() if k not in names}
    values = tuple(inputs[k] for k in names)
    tangents = tuple(torch.randn_like(t) for t in values)
    stacked = tuple(torch.stack([t, t + 0.5 * d]) for t, d in zip(values, tangents, strict=True))

    def positional(function: Op) -> Op:
        return lambda *given: function(**dict(zip(names, given, strict=True)), **rest)

    def dual(function: Op) -> torch.Tensor:
        with torch.autograd.forward_ad.dual_level():
            given = [torch.autograd.forward_ad.make_dual(t, d) for t, d in zip(values, tangents, strict=True)]
            return torch.autograd.forward_ad.unpack_dual(function(*given)).tangent

    def transformed(function: Op) -> dict[str, torch.Tensor]:
        f = positional(function)
        indices = tuple(range(len(names)))
        found = {"vmap": torch.func.vmap(f)(*stacked), "forward-mode AD": dual(f)}
        found["vmap of one"] = torch.func.vmap(f, in_dims=(0, *[None] * (len(names) - 1)))(stacked[0], *values[1:])
        found["jvp"] = torch.func.jvp(f, values, tangents)[1]
        gradients = torch.func.grad(lambda *given: f(*given).sin().sum(), argnums=indices)
        found |= {f"grad of {k}": g for k, g in zip(names, gradients(*values), strict=True)}
        per_sample = torch.func.vmap(gradients)(*stacked)
        return found | {f"vmap of grad of {k}": g for k, g in zip(names, per_sample, strict=True)}

    for context in (torch.enable_grad, torch.no_grad):
        with context():
            actual = transformed(op)
            expected = transformed(reference)
        for name, value in expected.items():
            torch.testing.assert_close(
                actual[name], value, rtol=1e-4, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}"
            )


def assert_autocast_2x(op: Op, reference: Op, inputs: Inputs) -> None:
    """Under autocast to bf16 the op keeps the 2x rule, the reference under autocast being PyTorch's own result."""
    truth = reference(**{k: t.double() if t.is_floating_point() else t for k, t in inputs.items()})
    device = next(iter(inputs.values())).device.type
    rounding = torch.finfo(torch.bfloat16).eps
    for context in (torch.enable_grad, torch.no_grad):
        with context(), torch.autocast(device, torch.bfloat16):
            assert_2x("autocast", op(**inputs).float(), reference(**inputs).float(), truth, rounding=rounding)
