"""torch.export of accelerated models, with any batch and length, and AOTInductor's packages of them."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest
import torch
from decoders import decoder, encoder_inputs
from padded_batches import draw, ids_of
from swap_models import MODELS, Tensors, assert_close, both, build, infer, make_inputs
from torch.export import Dim, ExportedProgram

import fastconv

SHAPES = ((5, 14), (2, 6), (3, 16))


@pytest.fixture(autouse=True)
def _native():
    """Kernels run in the interpreter only where a test asks for them: they are slow there."""
    torch._dynamo.reset()
    with fastconv.backend("native"):
        yield


def small(source: str, name: str, **options) -> tuple[torch.nn.Module, torch.nn.Module]:
    return both(build(source, name, num_hidden_layers=1), **options)


def batch(family: str, B: int, S: int) -> Tensors:
    lengths = S - torch.arange(B) % 3
    return ids_of(family, B, S, seed=B) | {"attention_mask": (torch.arange(S) < lengths[:, None]).long()}


def exported(model: torch.nn.Module, inputs: Tensors, *, strict: bool = False) -> ExportedProgram:
    """A program for any batch (B, S)."""
    sizes = {0: Dim("batch", max=64), 1: Dim("length", max=16)}
    with torch.no_grad():
        return torch.export.export(model, (), inputs, dynamic_shapes=dict.fromkeys(inputs, sizes), strict=strict)


def saved(program: ExportedProgram) -> ExportedProgram:
    """The program from a file."""
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


def namespaces(program: ExportedProgram) -> set[str]:
    """Of the operators in the graph."""
    targets = (node.target for node in program.graph.nodes)
    return {target.namespace for target in targets if isinstance(target, torch._ops.OpOverload)}


@pytest.mark.parametrize(("source", "family"), MODELS)
def test_exported_model(source, family):
    original, fast = small(source, family + "Model")
    program = saved(exported(fast, batch(family, 3, 9)))
    assert namespaces(program) == {"aten"}
    for shape in SHAPES:
        inputs = batch(family, *shape)
        assert_close(infer(program.module(), inputs), infer(original, inputs))


def test_exported_head():
    original, fast = small("reference", "ConvBertForSequenceClassification")
    program = exported(fast, batch("ConvBert", 3, 9))
    for shape in SHAPES:
        inputs = batch("ConvBert", *shape)
        assert_close(infer(program.module(), inputs), infer(original, inputs))


def test_strict_export_has_the_kernels(device, tmp_path):
    pytest.importorskip("triton", reason="the kernels are written in triton, which is not installed")
    original, fast = (model.to(device) for model in small("reference", "ConvBertModel", backend="triton"))
    example, inputs = ({k: t.to(device) for k, t in batch("ConvBert", *s).items()} for s in ((3, 9), SHAPES[0]))
    program = exported(fast, example, strict=True)
    assert namespaces(program) == {"aten", "fastconv"}
    expected = infer(original, inputs)
    assert_close(infer(program.module(), inputs), expected)
    # Another process needs nothing of this library but its ops.
    torch.export.save(program, tmp_path / "program.pt2")
    torch.save((inputs, expected["last_hidden_state.0"]), tmp_path / "data.pt")
    code = """
import torch, fastconv.ops
inputs, expected = torch.load("data.pt")
torch.testing.assert_close(torch.export.load("program.pt2").module()(**inputs)[0], expected, rtol=1e-4, atol=1e-5)
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


def test_exported_decoder_with_its_cache():
    model, fast = both(decoder(cross=True, num_hidden_layers=2))
    B, S, encoded, past = (Dim(name, min=2, max=30) for name in ("batch", "length", "encoded", "past"))
    of_encoder = {name: {0: B, 1: encoded} for name in encoder_inputs(model)}

    def program(module, inputs, **sizes):
        given = inputs | encoder_inputs(model) | {"use_cache": True}
        with torch.no_grad():
            return torch.export.export(module, (), given, dynamic_shapes=sizes | of_encoder | {"use_cache": None})

    start = program(fast, {"input_ids": draw(3, 9)}, input_ids={0: B, 1: S}).module()
    cache = start(input_ids=draw(3, 9), **encoder_inputs(model), use_cache=True).past_key_values
    own, cross = [({0: B, 1: past},) * 2] * 2, [({0: B, 1: encoded},) * 2] * 2
    inputs = {"input_ids": draw(3, 1), "past_key_values": cache}
    step = saved(program(fast, inputs, input_ids={0: B}, past_key_values=[own, cross])).module()

    def generated(start, step):
        ids, cache, logits = draw(5, 4), None, []
        with torch.no_grad():
            for run in (start, step, step, step):
                past = {} if cache is None else {"past_key_values": cache}
                output = run(input_ids=ids, **past, **encoder_inputs(model, rows=5), use_cache=True)
                cache, ids = output.past_key_values, output.logits[:, -1:].argmax(-1)
                logits.append(output.logits)
        return torch.cat(logits, 1)

    torch.testing.assert_close(generated(start, step), generated(model, model))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("source", ["reference", "transformers"])
def test_no_program_without_padding(source):
    """It would be for one batch's tokens alone."""
    _, fast = small(source, "BertModel", padding="remove")
    inputs = make_inputs()
    with torch.no_grad():
        with pytest.raises(RuntimeError, match='accelerated with padding="keep"'):
            torch.export.export(fast, (), inputs)
        with pytest.raises(RuntimeError, match='accelerated with padding="keep"'):
            torch.jit.trace(fast, tuple(inputs.values()), strict=False)


@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec")
def test_aot_inductor_package(tmp_path):
    cpp_builder = pytest.importorskip("torch._inductor.cpp_builder")
    try:
        cpp_builder.get_cpp_compiler()
    except Exception:
        pytest.skip("AOTInductor needs a C++ compiler, and none was found")
    original, fast = small("reference", "ConvBertModel")
    with torch.no_grad():
        package = torch._inductor.aoti_compile_and_package(
            exported(fast, batch("ConvBert", 3, 9)), package_path=str(tmp_path / "model.pt2")
        )
    run = torch._inductor.aoti_load_package(package)
    for shape in SHAPES:
        inputs = batch("ConvBert", *shape)
        assert_close({"": run(**inputs)[0]}, {"": infer(original, inputs)["last_hidden_state.0"]})
