"""Small models of both libraries with random weights, and comparisons of a model with its accelerated copy."""

from __future__ import annotations

import contextlib
import copy
import importlib
import inspect
from collections.abc import Callable, Iterator

import pytest
import torch

import fastconv
from fastconv import reference

SOURCES = ("reference", "transformers")
FAMILIES = ("Bert", "RoCBert", "ConvBert")
MODELS = [(source, family) for source in SOURCES for family in FAMILIES]
BATCH, LENGTH, VOCABULARY = 3, 9, 41

ARGUMENTS = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 16,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
FAMILY_ARGUMENTS = {
    "Bert": {},
    "RoCBert": {
        "shape_vocab_size": VOCABULARY,
        "shape_embed_dim": 6,
        "pronunciation_vocab_size": VOCABULARY,
        "pronunciation_embed_dim": 10,
    },
    "ConvBert": {"embedding_size": 12, "head_ratio": 2, "conv_kernel_size": 5, "num_groups": 2},
}

Tensors = dict[str, torch.Tensor]


def library(source: str):
    """The module with the models; skips the test if transformers is missing."""
    if source == "transformers":
        return pytest.importorskip("transformers", reason="accelerates its models, which are not installed")
    return reference


def is_4() -> bool:
    """Whether transformers is 4.x, where some arguments exist that 5.x dropped."""
    return library("transformers").__version__.startswith("4.")


def build(source: str, name: str, **arguments) -> torch.nn.Module:
    """A model by class name, small unless `arguments` say otherwise, in eval mode."""
    family = name.split("For")[0].removesuffix("Model").removesuffix("LMHead")
    classes = library(source)
    arguments = ARGUMENTS | FAMILY_ARGUMENTS[family] | arguments
    if source == "transformers":
        arguments = {"attn_implementation": "eager"} | arguments
    model = getattr(classes, name)(getattr(classes, family + "Config")(**arguments)).eval()
    randomize(model)
    return model


def randomize(model: torch.nn.Module, seed: int = 0) -> None:
    """Weights that no part of a model hides: LayerNorms and biases too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.dim() > 1 and p.shape[-1] > 1:
                p.copy_(1.2 * noise / p[0].numel() ** 0.5 if "embeddings" not in name else 0.7 * noise)
            else:
                p.copy_(0.3 * noise + name.endswith("LayerNorm.weight"))


def both(model: torch.nn.Module, **options) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The model and an accelerated copy."""
    return model, fastconv.accelerate(copy.deepcopy(model), **options)


def pair(source: str, family: str, **arguments) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A base model and an accelerated copy."""
    return both(build(source, family + "Model", **arguments))


def make_inputs(mask: str | None = "right", seed: int = 0) -> Tensors:
    """input_ids and, unless `mask` is None, an attention_mask for LENGTH, LENGTH // 2 and 2 (or 0) tokens."""
    generator = torch.Generator().manual_seed(seed)
    inputs = {"input_ids": torch.randint(0, VOCABULARY, (BATCH, LENGTH), generator=generator)}
    if mask is not None:
        lengths = torch.tensor([LENGTH, LENGTH // 2, 0 if mask == "empty row" else 2])
        keep = torch.arange(LENGTH) < lengths[:, None]
        inputs["attention_mask"] = (keep.flip(-1) if mask == "left" else keep).long()
    return inputs


def tensors_of(output) -> Tensors:
    """Every tensor of an output object, hidden states and attentions by layer."""
    found = {}
    for key, value in output.items():
        values = value if isinstance(value, tuple) else (value,)
        found |= {f"{key}.{i}": t for i, t in enumerate(values) if isinstance(t, torch.Tensor)}
    return found


def assert_close(actual: Tensors, expected: Tensors, tolerance: float = 1e-5, floor: float = 0.0) -> None:
    """The same tensors, equal within `tolerance` of each one's largest value, or of `floor` if that is larger."""
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert actual[key].shape == value.shape and actual[key].dtype == value.dtype, key
        assert actual[key].isfinite().all(), key
        scale = max(value.abs().max().item(), floor)
        error = (actual[key] - value).abs().max().item()
        assert error <= tolerance * scale, f"{key}: error {error:.2e}, scale {scale:.2e}"


def infer(model: torch.nn.Module, inputs: Tensors | None = None, **options) -> Tensors:
    """Outputs without gradients."""
    with torch.no_grad():
        return tensors_of(model(**(make_inputs() if inputs is None else inputs), **options))


def train(model: torch.nn.Module, inputs: Tensors | None = None, **options) -> tuple[Tensors, Tensors]:
    """Outputs, and the gradients of the loss or, without one, of a fixed random sum."""
    output = model(**(make_inputs() if inputs is None else inputs), **options)
    loss = output.get("loss")
    if loss is None:
        weights = torch.randn(output[0].shape, generator=torch.Generator().manual_seed(1)).to(output[0].dtype)
        loss = (output[0] * weights).sum()
    model.zero_grad()
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return tensors_of(output), gradients


def assert_same_inference(original: torch.nn.Module, fast: torch.nn.Module, inputs=None, **options) -> None:
    """Equal outputs under no_grad and under inference_mode, from a first call and from a second."""
    expected = infer(original, inputs, **options)
    assert_close(infer(fast, inputs, **options), expected)
    with torch.inference_mode():
        assert_close(infer(fast, inputs, **options), expected)


def assert_same_training(original: torch.nn.Module, fast: torch.nn.Module, inputs=None, **options) -> None:
    """Equal outputs and gradients; the scale of a gradient is that of all (some vanish but for rounding)."""
    expected, expected_gradients = train(original, inputs, **options)
    outputs, gradients = train(fast, inputs, **options)
    assert_close(outputs, expected)
    largest = max(g.abs().max().item() for g in expected_gradients.values())
    assert_close(gradients, expected_gradients, floor=largest)


def assert_same(original: torch.nn.Module, fast: torch.nn.Module, inputs=None, **options) -> None:
    """Equal in training and in inference, whichever comes first."""
    assert_same_inference(original, fast, inputs, **options)
    assert_same_training(original, fast, inputs, **options)
    assert_same_inference(original, fast, inputs, **options)


def attention_of(model: torch.nn.Module, layer: int = 0) -> torch.nn.Module:
    """A layer's self-attention."""
    return getattr(model, "base_model", model).encoder.layer[layer].attention.self


def layer_of(model: torch.nn.Module, layer: int = 0) -> torch.nn.Module:
    """A layer of the encoder."""
    return getattr(model, "base_model", model).encoder.layer[layer]


def fused_classes(source: str, family: str) -> list[type]:
    """The classes whose forwards an accelerated model has no use for."""
    grouped = family == "ConvBert"
    if source == "reference":
        attention = reference.convbert.ConvBertSelfAttention if grouped else reference.bert.BertSelfAttention
        names = ["Intermediate", "ResidualOutput", "PredictionTransform"] + ["GroupedLinear"] * grouped
        return [torch.nn.LayerNorm, attention, *(getattr(reference.layers, name) for name in names)]
    folder = "roc_bert" if family == "RoCBert" else family.lower()
    module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    parts = ("SelfAttention", "Intermediate", "Output", "SelfOutput", "PredictionHeadTransform")
    names = [family + part for part in parts] + ["GroupedLinearLayer"] * grouped
    # Attention of which only one of the versions has a class of its own.
    names += [name for part in ("CrossAttention", "SdpaSelfAttention") if hasattr(module, name := family + part)]
    return [torch.nn.LayerNorm, *(getattr(module, name) for name in names)]


@contextlib.contextmanager
def forbidden(classes: list[type]) -> Iterator[None]:
    """A context in which the classes' own forwards raise."""

    def refuse(cls: type) -> Callable:
        def forward(*args, **kwargs):
            raise AssertionError(f"the original forward of {cls.__name__} ran")

        return forward

    with pytest.MonkeyPatch.context() as patch:
        for cls in classes:
            patch.setattr(cls, "forward", refuse(cls))
        yield


def takes(model: torch.nn.Module, argument: str) -> bool:
    """Whether the model's forward names an argument."""
    return argument in inspect.signature(model.forward).parameters
