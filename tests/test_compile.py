"""torch.compile of accelerated models: whole graphs, for every batch and length, with eager's results and gradients.

Gradients are compared with those of the same model without torch.compile, which other tests compare with the original.
"""

from __future__ import annotations

import copy

import pytest
import torch
from decoders import decoder
from op_suite import checked_aot_eager
from padded_batches import ids_of
from swap_models import (
    MODELS,
    assert_close,
    both,
    build,
    forbidden,
    fused_classes,
    infer,
    make_inputs,
    tensors_of,
    train,
)
from torch._dynamo.testing import CompileCounterWithBackend

import fastconv
from fastconv import Packing, ops

# A second shape makes sizes dynamic; the others are to need no graph of their own.
SHAPES = ((3, 9), (5, 14), (2, 11), (4, 6))


@pytest.fixture(autouse=True)
def _fresh():
    """Kernels run in the interpreter only where a test asks for them: they are slow there."""
    torch._dynamo.reset()
    with fastconv.backend("native"):
        yield


def small(source: str, name: str, **options) -> tuple[torch.nn.Module, torch.nn.Module]:
    return both(build(source, name, num_hidden_layers=1), **options)


def batch(family: str, B: int, S: int) -> dict[str, torch.Tensor]:
    """Ids, and a mask with padding; tokens are more than the models have channels (see `test_without_padding`)."""
    lengths = S - torch.arange(B) % 3
    return ids_of(family, B, S, seed=B) | {"attention_mask": (torch.arange(S) < lengths[:, None]).long()}


def assert_same_training(compiled: torch.nn.Module, fast: torch.nn.Module, inputs, **options) -> None:
    """Equal outputs, and gradients of every parameter."""
    expected, of_eager = train(fast, inputs, **options)
    outputs, gradients = train(compiled, inputs, **options)
    assert_close(outputs, expected)
    gradients = {name.removeprefix("_orig_mod."): gradient for name, gradient in gradients.items()}
    # A compiled model gives zeros where nothing reaches a parameter.
    assert not any(gradients.pop(name).any() for name in gradients.keys() - of_eager.keys())
    assert_close(gradients, of_eager, floor=max(g.abs().max().item() for g in of_eager.values()))


# One graph


@pytest.mark.parametrize(("source", "family"), MODELS)
def test_training_is_one_graph_for_all_shapes(source, family):
    _, fast = small(source, family + "Model")
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fast, backend=counter, fullgraph=True)
    for shape in SHAPES[:3]:
        assert_same_training(compiled, fast, batch(family, *shape))
    assert counter.frame_count == 2


@pytest.mark.parametrize(("source", "family"), MODELS)
def test_inference_is_one_graph_for_all_shapes(source, family):
    original, fast = small(source, family + "Model")
    compiled = torch.compile(fast, backend="eager", fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for shape in SHAPES:
            assert_close(infer(compiled, batch(family, *shape)), infer(original, batch(family, *shape)))


@pytest.mark.parametrize("padding", ["keep", "remove"])
def test_kernels_are_in_the_graph(padding, device):
    pytest.importorskip("triton", reason="the kernels are written in triton, which is not installed")
    fast = small("reference", "ConvBertModel", padding=padding, backend="triton")[1].to(device)
    found = set()

    def compiler(graph, inputs):
        for module in (m for m in graph.modules() if isinstance(m, torch.fx.GraphModule)):
            found.update(str(node.target) for node in module.graph.nodes if "fastconv." in str(node.target))
        return counter(graph, inputs)

    counter = CompileCounterWithBackend(checked_aot_eager)
    compiled = torch.compile(fast, backend=compiler, fullgraph=True)
    for shape in ((3, 5), (2, 7), (4, 4)):
        inputs = {name: value.to(device) for name, value in batch("ConvBert", *shape).items()}
        if padding == "remove":
            inputs["attention_mask"] = Packing.from_mask(inputs["attention_mask"])
        assert_same_training(compiled, fast, inputs)
    assert counter.frame_count == 2
    assert len(found) == 14, found


@pytest.mark.parametrize(("source", "head"), [("reference", "ForMaskedLM"), ("transformers", "ForQuestionAnswering")])
def test_heads_with_a_loss(source, head):
    _, fast = small(source, "ConvBert" + head)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fast, backend=counter, fullgraph=True)
    for shape in SHAPES[:3]:
        inputs = batch("ConvBert", *shape)
        tokens = inputs["input_ids"]
        if head == "ForMaskedLM":
            labels = {"labels": tokens.masked_fill(tokens % 3 > 0, -100), "loss_only": True}
        else:
            labels = {"start_positions": tokens[:, 0] % 4, "end_positions": tokens[:, 1] % 4}
        assert_same_training(compiled, fast, inputs, **labels)
    assert counter.frame_count == 2


def test_a_decoder_with_a_cache():
    model, fast = both(decoder(num_hidden_layers=1))
    counter = CompileCounterWithBackend("eager")

    def generated(model):
        ids, cache, logits = make_inputs()["input_ids"], None, []
        with torch.no_grad():
            for _ in range(6):
                output = model(input_ids=ids, past_key_values=cache, use_cache=True)
                cache, ids = output.past_key_values, output.logits[:, -1:].argmax(-1)
                logits.append(output.logits)
        return torch.cat(logits, 1)

    torch.testing.assert_close(generated(torch.compile(fast, backend=counter, fullgraph=True)), generated(model))
    assert counter.frame_count == 3  # the prompt, one token, one token at any place


# Without padding


@pytest.mark.parametrize(
    ("source", "family", "given"), [("reference", "ConvBert", "mask"), ("transformers", "Bert", "packing")]
)
def test_without_padding(source, family, given):
    """Two graphs; ConvBERT's are three where some batches have fewer tokens than channels, by the convolution."""
    _, fast = small(source, family + "Model", padding="remove")
    counter = CompileCounterWithBackend("aot_eager")
    # Which tokens are padding is data: with a mask that is looked at between two graphs, of which one is empty.
    compiled = torch.compile(fast, backend=counter, fullgraph=given == "packing")
    for shape in SHAPES:
        inputs = batch(family, *shape)
        if given == "packing":
            inputs["attention_mask"] = Packing.from_mask(inputs["attention_mask"])
        assert_same_training(compiled, fast, inputs)
    assert counter.frame_count == 2


def test_a_head_without_padding():
    _, fast = small("reference", "ConvBertForSequenceClassification", padding="remove")
    counter = CompileCounterWithBackend("eager")
    compiled, counts = torch.compile(fast, backend=counter), []
    for shape in SHAPES:
        inputs = batch("ConvBert", *shape) | {"labels": torch.arange(shape[0]) % 2}
        assert_close(infer(compiled, inputs), infer(fast, inputs))
        counts.append(counter.frame_count)
    assert counts == [2, 4, 4, 4]  # the model's and the head's


def test_padding_between_tokens():
    inputs = batch("Bert", 3, 9)
    inputs["attention_mask"][0, 4] = 0
    original, fast = small("reference", "BertModel", padding="remove")
    assert_close(infer(torch.compile(fast, backend="eager"), inputs), infer(original, inputs))
    _, fast = small("reference", "ConvBertModel", padding="remove")
    with pytest.raises(ValueError, match="the tokens of a row must stand together"):
        infer(torch.compile(fast, backend="eager"), inputs)


def test_a_mask_in_one_graph_says_what_to_give():
    _, fast = small("reference", "BertModel", padding="remove")
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"a fastconv\.Packing in its place"):
        infer(torch.compile(fast, backend="eager", fullgraph=True))


# The ways to compile, and to call what is compiled


@pytest.mark.parametrize(
    ("way", "source"), [("method", "transformers"), ("before", "transformers"), ("after a call", "reference")]
)
def test_ways_to_compile(source, way):
    original, _ = small(source, "ConvBertModel")
    expected, counter = infer(original), CompileCounterWithBackend("eager")
    model = copy.deepcopy(original)
    if way == "method":
        compiled = fastconv.accelerate(model)
        compiled.compile(backend=counter, fullgraph=True)
    else:
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        if way == "after a call":
            infer(compiled)
        assert fastconv.accelerate(compiled) is compiled
    with forbidden(fused_classes(source, "ConvBert")):
        assert_close(infer(compiled), expected)
    assert counter.frame_count == (2 if way == "after a call" else 1)
    fastconv.restore(compiled)
    assert_close(infer(compiled), expected)


def test_modes():
    original, fast = small("reference", "ConvBertModel")
    compiled = torch.compile(fast, backend="aot_eager", fullgraph=True)
    inputs = batch("ConvBert", 3, 9)
    with torch.inference_mode():
        assert_close(tensors_of(compiled(**inputs)), infer(original, inputs))
    assert_same_training(compiled, fast, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(infer(compiled, inputs), infer(fast, inputs), tolerance=2**-7)
        expected, of_eager = train(fast, inputs)
        outputs, gradients = train(compiled, inputs)
    assert_close(outputs, expected, tolerance=2**-7)
    gradients = {name: gradients[f"_orig_mod.{name}"] for name in of_eager}
    assert_close(gradients, of_eager, tolerance=2**-5, floor=max(g.abs().max().item() for g in of_eager.values()))
    with torch.inference_mode():
        assert_close(tensors_of(compiled(**inputs)), infer(original, inputs))


def test_dropout_draws_anew():
    config = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3, "num_hidden_layers": 1}
    fast = fastconv.accelerate(build("reference", "ConvBertModel", **config)).train()
    compiled = torch.compile(fast, backend="aot_eager", fullgraph=True)
    first, second = (compiled(**make_inputs())[0] for _ in range(2))
    assert not torch.equal(first, second)
    second.sin().sum().backward()
    assert all(p.grad.isfinite().all() for p in fast.parameters())


# What older versions of torch get wrong


TWICE = {
    "layer_norm": lambda x, square, ids: ops.layer_norm(x, square[0], square[0], x_bias=square[0], residual=x),
    "embedding_norm": lambda x, square, ids: ops.embedding_norm([ids, ids], [square, square], square[1], square[1]),
    "linear_act": lambda x, square, ids: ops.linear_act(square, square, square[0], "gelu"),
    "separable_conv": lambda x, square, ids: ops.separable_conv(
        x, square[:, None, :3], square[..., None], square[:, :1], gate=x
    ),
    "span_dynamic_conv": lambda x, square, ids: ops.span_dynamic_conv(x, x, 3),
    "masked_attention": lambda x, square, ids: ops.masked_attention(*[x.unflatten(-1, (2, 3))] * 3),
    "masked_lm_loss": lambda x, square, ids: ops.masked_lm_loss(square, square, square[0], ids.flatten()),
}


@pytest.mark.parametrize("name", TWICE)
def test_one_tensor_twice(name, device):
    """In two slots of an autograd.Function, torch 2.11 gives half its gradient, and later ones make no graph."""
    pytest.importorskip("triton", reason="the kernels are written in triton, which is not installed")
    op, ids = TWICE[name], torch.arange(6, device=device).view(2, 3)
    leaves = [torch.randn(*shape, device=device, requires_grad=True) for shape in ((2, 3, 6), (6, 6))]
    results = []
    with fastconv.backend("triton"):
        for function in (torch.compile(op, backend=checked_aot_eager, fullgraph=True), op):
            y = function(*leaves, ids)
            results.append([y, *torch.autograd.grad(y.sin().sum(), leaves, materialize_grads=True)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


class _Writes(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y):
        return (x * y).add_(1)

    @staticmethod
    def backward(ctx, dy):
        return dy, dy


def test_a_write_in_place_is_refused():
    compiled = torch.compile(_Writes.apply, backend=checked_aot_eager, fullgraph=True)
    with pytest.raises(Exception, match="writes in place"):
        compiled(torch.ones(3, requires_grad=True), torch.ones(3))
