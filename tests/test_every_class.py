"""What every model and head does alike; accelerated it equals itself. Needs no transformers."""

from __future__ import annotations

import copy

import model_cases
import pytest
import swap_models
import torch
from model_cases import NAMES, Case
from model_runs import assert_equal, largest, run, together, walk
from tolerance import assert_2x

import fastconv
from fastconv import reference

# ConvBertForMultipleChoice has the dropouts of its summary instead.
CLASSIFIERS = [
    name
    for name in NAMES
    if name.endswith(("SequenceClassification", "TokenClassification", "MultipleChoice"))
    and name != "ConvBertForMultipleChoice"
]


def test_both_packages_export_the_classes_of_the_walk():
    for package in (reference, fastconv):
        exported = {name: getattr(package, name) for name in package.__all__ if name != "__version__"}
        classes = {name: value for name, value in exported.items() if isinstance(value, type)}
        models = {name for name, value in classes.items() if issubclass(value, reference.Model)}
        assert {name for name in models if not name.endswith("PreTrainedModel")} - {"Model"} == set(NAMES)
        configs = {name for name, value in classes.items() if issubclass(value, reference.Config)}
        assert configs - {"Config"} == {f"{family}Config" for family in model_cases.HEADS}
    for name in NAMES:
        assert issubclass(getattr(fastconv, name), getattr(reference, name))


def small(name: str, **values) -> torch.nn.Module:
    """A model in eval mode with random weights, in fp64, without dropout unless `values` say otherwise."""
    return swap_models.build("reference", name, **values).double()


def ids_for(name: str) -> torch.Tensor:
    shape = (3, 2, 9) if "MultipleChoice" in name else (3, 9)
    return torch.randint(0, swap_models.VOCABULARY, shape)


@pytest.mark.parametrize("name", NAMES)
def test_output_by_attribute_key_index_and_tuple(name):
    model, ids = small(name), ids_for(name)
    output = model(ids, output_hidden_states=True)
    first = {"Model": "last_hidden_state", "ForQuestionAnswering": "start_logits"}
    if name == "BertForPreTraining":
        first["ForPreTraining"] = "prediction_logits"
    main = first.get(name.removeprefix(model_cases.family_of(name)), "logits")
    assert output[0] is output[main] is getattr(output, main)
    values = model(ids, output_hidden_states=True, return_dict=False)
    assert isinstance(values, tuple) and len(values) == len(output.to_tuple())
    assert torch.equal(values[0], output[0]) and torch.equal(values[-1][-1], output.hidden_states[-1])
    model.config.return_dict = False
    assert isinstance(model(ids), tuple) and not isinstance(model(ids, return_dict=True), tuple)


@pytest.mark.parametrize("name", NAMES)
def test_chunks_of_the_feed_forward_network_change_nothing(name):
    model, ids = small(name), ids_for(name)
    chunked = small(name, chunk_size_feed_forward=3)
    sizes: list[int] = []
    chunked.base_model.encoder.layer[0].intermediate.register_forward_hook(lambda *call: sizes.append(call[2].shape[1]))
    torch.testing.assert_close(chunked(ids)[0], model(ids)[0], rtol=1e-12, atol=1e-12)
    assert sizes == [3, 3, 3]


@pytest.mark.parametrize("name", NAMES)
def test_gradient_checkpointing_computes_every_layer_again_and_changes_nothing(name):
    model, ids = small(name), ids_for(name)
    calls: list[torch.nn.Module] = []
    for layer in model.base_model.encoder.layer:
        layer.register_forward_pre_hook(lambda layer, _: calls.append(layer))
    _, expected, expected_gradients = run(model.train(), {"input_ids": ids}, 0)
    assert len(calls) == 2
    model.gradient_checkpointing_enable()
    _, tensors, gradients = run(model, {"input_ids": ids}, 0)
    assert_equal(tensors, expected)
    assert_equal(gradients, expected_gradients, largest(expected_gradients))
    assert len(calls) == 2 + 4
    model.eval()(ids)
    with torch.no_grad():
        model.train()(ids)
    model.gradient_checkpointing_disable()
    run(model, {"input_ids": ids}, 0)
    assert len(calls) == 6 + 2 + 2 + 2


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifier_dropout_is_that_before_the_classifier(name):
    ids, states = ids_for(name), []
    for rates in ({"classifier_dropout": 1.0}, {"hidden_dropout_prob": 1.0}, {"classifier_dropout": 0.0}):
        model = small(name, **rates).train()
        output = model(ids, output_hidden_states=True)
        # where everything is dropped, the bias is left
        bias = getattr(model.classifier, "out_proj", model.classifier).bias.expand(output.logits.shape)
        assert torch.equal(output.logits, bias) == (1.0 in rates.values())
        states.append(output.hidden_states[-1])
    assert torch.equal(states[0], states[2]) and not torch.equal(states[1], states[2])


@pytest.mark.parametrize("family", model_cases.HEADS)
def test_accelerated_equals_the_reference(family):
    """In fp64 within 1e-9, and in fp32 by the 2x rule: over all cases together, since one of them holds few numbers."""
    results: dict[str, list[list[torch.Tensor]]] = {"outputs": [], "gradients": []}

    def check(case: Case) -> None:
        config = getattr(reference, family + "Config")(**case.config)
        model = getattr(reference, case.name)(config, **case.arguments).eval()
        swap_models.randomize(model)
        exact = copy.deepcopy(model).double()
        _, *truth = run(exact, case.inputs, case.cached)
        _, tensors, gradients = run(fastconv.accelerate(exact, backend="native"), case.inputs, case.cached)
        assert_equal(tensors, truth[0])
        assert_equal(gradients, truth[1], largest(truth[1]))

        inputs = {key: single(value) for key, value in case.inputs.items()}
        _, *plain = run(model, inputs, case.cached)
        _, *fast = run(fastconv.accelerate(model, backend="native"), inputs, case.cached)
        for kind, floor, *found in zip(results, (0.0, largest(truth[1])), fast, plain, truth, strict=True):
            results[kind].append([together(part, found[-1], floor) for part in found])

    for head in model_cases.HEADS[family]:
        cases = model_cases.cases(family + head, None).filter(lambda case: not case.train)
        walk(cases, check, examples=12)
    for kind, found in results.items():
        assert_2x(kind, *(torch.cat(parts) for parts in zip(*found, strict=True)))


def single(value):
    """fp64 tensors as fp32."""
    return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
