"""The reference equals transformers: same weights, random configs; outputs, losses and gradients within 1e-5 of scale.

Runs with transformers 4.57 and 5.x. head_mask and 3-D masks exist in 4.57 only: 5.x is given the 4-D equivalent of a
3-D mask.
"""

from __future__ import annotations

import inspect
import random

import pytest
import torch

from fastconv import reference

transformers = pytest.importorskip("transformers", reason="compares with transformers, which is not installed")
ACT2CLS = transformers.activations.ACT2CLS

VOCABULARY, BATCH, LENGTH, MAX_LENGTH = 37, 3, 11, 16
HEADS = (
    "Model",
    "ForMaskedLM",
    "ForSequenceClassification",
    "ForMultipleChoice",
    "ForTokenClassification",
    "ForQuestionAnswering",
)
CLASSES = [family + head for family in ("Bert", "ConvBert") for head in HEADS]
PROBLEMS = ("single_label_classification", "multi_label_classification", "regression", "regression of one")
HAS_HEAD_MASK = "head_mask" in inspect.signature(transformers.BertModel.forward).parameters


def random_config(family: str, rng: random.Random) -> dict:
    """Arguments for both libraries' config classes."""
    heads = rng.choice((4, 8))
    arguments = {
        "vocab_size": VOCABULARY,
        "hidden_size": rng.choice((16, 32, 48)),
        "num_hidden_layers": rng.choice((1, 2)),
        "num_attention_heads": heads,
        "intermediate_size": rng.choice((24, 40)),
        "hidden_act": rng.choice(("gelu", "gelu_new", "relu", "silu", "gelu_pytorch_tanh")),
        "max_position_embeddings": MAX_LENGTH,
        "type_vocab_size": rng.choice((1, 2, 3)),
        "layer_norm_eps": rng.choice((1e-12, 1e-5)),
        "pad_token_id": rng.choice((0, 1, 5)),
        "tie_word_embeddings": rng.random() < 0.7,
        "num_labels": 3,
    }
    if family == "ConvBert":
        arguments |= {
            "embedding_size": rng.choice((arguments["hidden_size"], 8, 20)),
            "head_ratio": rng.choice((1, 2, 4)),
            "conv_kernel_size": rng.choice((1, 3, 5, 9)),
            "num_groups": rng.choice((1, 2, 4)),
        }
    return arguments


def build_pair(name: str, arguments: dict, seed: int = 0):
    """The model of transformers with random weights, and the reference with the same state dict; fp32, eval mode."""
    family = name.split("For")[0].removesuffix("Model")
    theirs_config = getattr(transformers, family + "Config")(**arguments, attn_implementation="eager")
    theirs = getattr(transformers, name)(theirs_config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "embeddings.weight" in key:
                parameter.copy_(0.7 * noise)
            elif parameter.dim() > 1 and not key.endswith("bias"):
                parameter.copy_(1.3 * noise / noise[0].numel() ** 0.5)
            else:
                parameter.copy_(0.3 * noise + key.endswith("LayerNorm.weight"))
    ours_config = getattr(reference, family + "Config").from_dict(theirs_config.to_dict())
    ours = getattr(reference, name)(ours_config).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert shapes_of(ours) == shapes_of(theirs)
    return ours, theirs


def shapes_of(model) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in model.state_dict().items()}


def make_inputs(name: str, config, rng: random.Random, mask: str = "right", embeds: bool = False) -> dict:
    """Random inputs with labels; sequences of LENGTH, LENGTH // 2 and 2 tokens unless the mask is "none"."""
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    shape = (BATCH, 2, LENGTH) if "MultipleChoice" in name else (BATCH, LENGTH)

    def integers(high: int, size: tuple[int, ...]) -> torch.Tensor:
        return torch.randint(0, high, size, generator=generator)

    inputs = {"input_ids": integers(VOCABULARY, shape)}
    if embeds:
        size = getattr(config, "embedding_size", config.hidden_size)
        inputs = {"inputs_embeds": torch.randn(*shape, size, generator=generator)}
    if mask != "none":
        lengths = torch.tensor([LENGTH, LENGTH // 2, 0 if mask == "empty row" else 2])
        keep = torch.arange(LENGTH) < lengths[:, None]
        keep = keep.flip(-1) if mask == "left" else keep
        keep = keep[:, None].expand(shape).contiguous() if len(shape) == 3 else keep
        inputs["attention_mask"] = keep if mask == "bool" else keep.to(torch.float if mask == "float" else torch.long)
    if rng.random() < 0.6:
        inputs["token_type_ids"] = integers(config.type_vocab_size, shape)
    if rng.random() < 0.6:
        inputs["position_ids"] = integers(MAX_LENGTH, shape)
    inputs.update(make_labels(name, config, shape, integers))
    return inputs


def make_labels(name: str, config, shape: tuple[int, ...], integers) -> dict:
    if "MaskedLM" in name or "TokenClassification" in name:
        labels = integers(VOCABULARY if "MaskedLM" in name else config.num_labels, shape)
        return {"labels": labels.masked_fill(integers(4, shape) == 0, -100)}
    if "QuestionAnswering" in name:  # the last position lies outside the sequence: ignored
        return {"start_positions": torch.tensor([0, 3, 2]), "end_positions": torch.tensor([4, 5, LENGTH + 7])}
    if "MultipleChoice" in name:
        return {"labels": integers(2, (BATCH,))}
    if "SequenceClassification" in name:
        if config.problem_type in (None, "single_label_classification"):
            return {"labels": integers(config.num_labels, (BATCH,))}
        labels = integers(2, (BATCH, config.num_labels)).float()
        return {"labels": labels.squeeze(-1) if config.num_labels == 1 else labels}
    return {}


def tensors_of(output) -> dict[str, torch.Tensor]:
    """Every tensor of an output, hidden states and attentions by layer."""
    found = {}
    for key, value in output.items():
        values = value if isinstance(value, tuple) else (value,)
        found.update({f"{key}.{index}": tensor for index, tensor in enumerate(values)})
    return found


def gradients_of(model) -> dict[str, torch.Tensor]:
    """Gradients by parameter name, tied parameters under each of their names."""
    parameters = model.named_parameters(remove_duplicate=False)
    return {name: parameter.grad for name, parameter in parameters if parameter.grad is not None}


def run(model, inputs: dict) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Every output, and every gradient of the loss, or, without one, of a fixed random sum."""
    output = model(**inputs, output_attentions=True, output_hidden_states=True)
    loss = output.get("loss")
    if loss is None:
        weights = torch.randn(output[0].shape, generator=torch.Generator().manual_seed(0)).to(output[0].dtype)
        loss = (output[0] * weights).sum()
    model.zero_grad()
    loss.backward()
    return tensors_of(output), gradients_of(model)


def assert_close(actual: dict, expected: dict, tolerance: float, floor: float = 0.0) -> None:
    """Equal within `tolerance` of the largest value of each tensor, or of `floor` if that is larger."""
    assert expected.keys() <= actual.keys()
    for key, value in expected.items():
        assert actual[key].shape == value.shape and actual[key].dtype == value.dtype, key
        scale = max(value.abs().max().item(), floor)
        error = (actual[key] - value).abs().max().item()
        assert error <= tolerance * scale, f"{key}: error {error:.2e}, scale {scale:.2e}"


def assert_equal_runs(ours, theirs, inputs: dict, theirs_inputs: dict | None = None) -> None:
    """Outputs, loss and gradients are equal: within 1e-5 of scale in fp32, and within 1e-10 in fp64 (gelu_fast knows
    sqrt(2 / pi) to ten digits).

    The scale of a gradient is that of all gradients: many are sums that nearly cancel (those of key biases vanish),
    so that their own size says nothing about rounding. fp64 shows that those are right too.
    """
    theirs_inputs = inputs if theirs_inputs is None else theirs_inputs
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        outputs, gradients = run(ours.to(dtype), to_dtype(inputs, dtype))
        expected_outputs, expected_gradients = run(theirs.to(dtype), to_dtype(theirs_inputs, dtype))
        assert outputs.keys() == expected_outputs.keys()
        assert_close(outputs, expected_outputs, tolerance)
        largest = max(gradient.abs().max().item() for gradient in expected_gradients.values())
        assert_close(gradients, expected_gradients, tolerance, largest)


def to_dtype(inputs: dict, dtype: torch.dtype) -> dict:
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", CLASSES)
def test_random_config_equals_transformers(name, seed):
    rng = random.Random(f"{name} {seed}")
    arguments = random_config(name.split("For")[0].removesuffix("Model"), rng)
    if "QuestionAnswering" in name:
        arguments["num_labels"] = 2
    if "SequenceClassification" in name and seed < len(PROBLEMS):
        arguments["problem_type"] = PROBLEMS[seed].removesuffix(" of one")
        arguments["num_labels"] = 1 if "of one" in PROBLEMS[seed] else 3
    ours, theirs = build_pair(name, arguments, seed)
    mask = ("right", "left", "none", "bool", "float", "empty row")[seed]
    inputs = make_inputs(name, ours.config, rng, mask, embeds=seed == 3)
    assert_equal_runs(ours, theirs, inputs)


@pytest.mark.parametrize("name", CLASSES)
def test_tuple_output_equals_transformers(name):
    rng = random.Random(name)
    arguments = random_config(name.split("For")[0].removesuffix("Model"), rng) | {"num_labels": 2}
    ours, theirs = build_pair(name, arguments | {"output_hidden_states": True})
    for labelled in (True, False):
        inputs = make_inputs(name, ours.config, rng)
        if not labelled:
            inputs = {key: value for key, value in inputs.items() if "labels" not in key and "_positions" not in key}
        actual = ours(**inputs, return_dict=False)
        expected = [value for value in theirs(**inputs, return_dict=False) if value != ()]
        assert isinstance(actual, tuple) and len(actual) == len(expected)
        for index, (mine, other) in enumerate(zip(actual, expected, strict=True)):
            assert isinstance(mine, tuple) == isinstance(other, tuple)
            parts = zip(mine, other, strict=True) if isinstance(mine, tuple) else [(mine, other)]
            for mine_part, other_part in parts:
                assert_close({str(index): mine_part}, {str(index): other_part}, 1e-5)


@pytest.mark.parametrize("activation", sorted(reference.ops.ACTIVATIONS))
@pytest.mark.parametrize("name", ["BertForMaskedLM", "ConvBertForSequenceClassification"])
def test_activation_equals_transformers(name, activation):
    if activation not in ACT2CLS:
        pytest.skip(f"this version of transformers has no activation {activation}")
    rng = random.Random(activation)
    arguments = random_config(name.split("For")[0], rng) | {"hidden_act": activation, "num_hidden_layers": 1}
    ours, theirs = build_pair(name, arguments)
    assert_equal_runs(ours, theirs, make_inputs(name, ours.config, rng))


def test_every_activation_without_parameters_is_known():
    assert set(ACT2CLS) - set(reference.ops.ACTIVATIONS) <= {"prelu", "xielu"}


@pytest.mark.parametrize("name", ["BertModel", "ConvBertForTokenClassification"])
def test_mask_of_queries_and_keys_equals_transformers(name):
    rng = random.Random(name)
    ours, theirs = build_pair(name, random_config(name.split("For")[0].removesuffix("Model"), rng))
    inputs = make_inputs(name, ours.config, rng, mask="none")
    keep = torch.rand(BATCH, LENGTH, LENGTH, generator=torch.Generator().manual_seed(1)) < 0.6
    keep[1, 4] = False
    additive = (~keep)[:, None] * torch.finfo(torch.float32).min
    # 5.x takes queries and keys only as an additive four-dimensional mask, 4.57 only as a three-dimensional one
    other = {"attention_mask": keep.long() if HAS_HEAD_MASK else additive}
    assert_equal_runs(ours, theirs, inputs | {"attention_mask": keep.long()}, inputs | other)
    assert_equal_runs(ours, theirs, inputs | {"attention_mask": additive}, inputs | other)


@pytest.mark.skipif(not HAS_HEAD_MASK, reason="transformers 5.x has no head_mask")
@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("name", ["BertForQuestionAnswering", "ConvBertModel"])
def test_head_mask_equals_transformers(name, per_layer):
    rng = random.Random(name)
    family = name.split("For")[0].removesuffix("Model")
    arguments = random_config(family, rng) | {"num_hidden_layers": 2, "num_labels": 2}
    ours, theirs = build_pair(name, arguments)
    heads = getattr(ours.config, "attention_heads", ours.config.num_attention_heads)
    head_mask = torch.rand((2, heads) if per_layer else (heads,), generator=torch.Generator().manual_seed(1)).round()
    assert_equal_runs(ours, theirs, make_inputs(name, ours.config, rng) | {"head_mask": head_mask})


@pytest.mark.parametrize("name", ["BertForSequenceClassification", "ConvBertForSequenceClassification"])
def test_dropout_draws_the_same_masks(name):
    """Dropout sits in the same places: in training, one seed gives both models the same outputs."""
    rng = random.Random(name)
    arguments = random_config(name.split("For")[0], rng) | {"classifier_dropout": 0.3}
    ours, theirs = build_pair(name, arguments)
    inputs = make_inputs(name, ours.config, rng)
    results = []
    for model in (ours.train(), theirs.train()):
        torch.manual_seed(3)
        results.append(tensors_of(model(**inputs, output_attentions=True)))
    assert_close(*results, 1e-5)


@pytest.mark.parametrize("family", ["Bert", "ConvBert"])
def test_config_defaults_are_those_of_transformers(family):
    ours, theirs = getattr(reference, family + "Config")(), getattr(transformers, family + "Config")()
    expected = theirs.to_dict()
    for key, value in ours.to_dict().items():
        # those of a decoder, and what one of the supported versions doesn't know
        if key in expected or hasattr(theirs, key):
            assert value == expected.get(key, getattr(theirs, key, None)), key
    round_trip = type(theirs).from_dict(ours.to_dict())
    assert round_trip.num_labels == 2 and round_trip.model_type == ours.model_type


@pytest.mark.parametrize("family", ["Bert", "ConvBert"])
def test_fresh_weights_are_distributed_as_in_transformers(family):
    arguments = {"vocab_size": 500, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    arguments |= {"intermediate_size": 96, "initializer_range": 0.05}
    if family == "ConvBert":
        arguments |= {"embedding_size": 32, "num_groups": 2}
    name = family + "ForMaskedLM"
    ours = getattr(reference, name)(getattr(reference, family + "Config")(**arguments))
    theirs = getattr(transformers, name)(getattr(transformers, family + "Config")(**arguments))
    expected = dict(theirs.named_parameters())
    assert {key for key, _ in ours.named_parameters()} == expected.keys()
    for key, parameter in ours.named_parameters():
        assert parameter.std().item() == pytest.approx(expected[key].std().item(), rel=0.25, abs=1e-12), key
        assert parameter.mean().item() == pytest.approx(expected[key].mean().item(), abs=0.01), key
    padding = ours.config.pad_token_id
    assert ours.get_input_embeddings().weight[padding].abs().max() == 0
