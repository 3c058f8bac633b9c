"""loss_only: the heads over the vocabulary give the loss that they give with logits, and its gradients."""

from __future__ import annotations

import copy
import inspect
import pickle
import threading
from unittest import mock

import pytest
import torch
from model_cases import family_of
from model_runs import assert_equal, flat, largest, together
from padded_batches import S, draw, ids_of, mask_of
from swap_models import VOCABULARY, build, library
from tolerance import assert_2x
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastconv
from fastconv.nn import lm_head

NAMES = (
    "BertForMaskedLM",
    "BertLMHeadModel",
    "BertForPreTraining",
    "RoCBertForMaskedLM",
    "RoCBertForCausalLM",
    "RoCBertForPreTraining",
    "ConvBertForMaskedLM",
)
CAUSAL = ("BertLMHeadModel", "RoCBertForCausalLM")
SOURCES = ("reference", "fastconv", "transformers")
MODELS = [(source, name) for source in ("reference", "transformers") for name in NAMES]

Tensors = dict[str, torch.Tensor]


def make(source: str, name: str, **arguments) -> torch.nn.Module:
    """A model with random weights, in eval mode, not accelerated but for fastconv's."""
    if name == "RoCBertForPreTraining":
        arguments = {"pad_token_id": 0} | arguments
    model = build("transformers" if source == "transformers" else "reference", name, **arguments)
    if source == "fastconv":
        own_class = getattr(fastconv, name)
        own = own_class(own_class.config_class.from_dict(model.config.to_dict()))
        own.load_state_dict(model.state_dict())
        model = fastconv.accelerate(own.eval(), backend="native")
    return model


def pair(source: str, name: str, padding: str = "keep", **arguments) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A model and its accelerated copy, in fp64."""
    model = make(source, name, **arguments).double()
    return model, fastconv.accelerate(copy.deepcopy(model), padding=padding, backend="native")


def inputs_of(name: str, share: float = 0.4, kind: str = "right") -> Tensors:
    """Every argument of a head with a loss; labels for a share of the tokens."""
    family, keep = family_of(name), mask_of(kind)
    inputs = ids_of(family, 4, S) | {"attention_mask": keep.long()}
    dropped = torch.rand(4, S, generator=torch.Generator().manual_seed(4)) >= share
    labels = draw(4, S, seed=5).masked_fill(dropped | ~keep, -100)
    if name == "RoCBertForPreTraining":
        texts = {f"{of}_{key}": ids for of in ("labels", "attack") for key, ids in ids_of(family, 4, S, seed=7).items()}
        masks = {f"{of}_attention_mask": keep.long() for of in ("labels", "attack")}
        return inputs | texts | masks | {"labels_input_ids": labels}
    if name == "BertForPreTraining":
        inputs["next_sentence_label"] = torch.tensor([0, 1, 1, 0])
    return inputs | {"labels": labels}


def labels_name(name: str) -> str:
    return "labels_input_ids" if name == "RoCBertForPreTraining" else "labels"


def train(model: torch.nn.Module, inputs: Tensors, **options) -> tuple[torch.Tensor, Tensors]:
    """The loss and the gradient of every parameter by all of its names."""
    model.zero_grad()
    loss = model(**inputs, **options).loss
    loss.backward()
    parameters = model.named_parameters(remove_duplicate=False)
    return loss.detach(), {name: p.grad.clone() for name, p in parameters if p.grad is not None}


def wide():
    """transformers computes the loss of a causal model from logits.float()."""
    return mock.patch.object(torch.Tensor, "float", torch.Tensor.double)


def assert_same_training(fast: tuple, expected: tuple) -> None:
    assert_equal({"loss": fast[0]}, {"loss": expected[0]})
    assert_equal(fast[1], expected[1], floor=largest(expected[1]))


@pytest.mark.parametrize("padding", ["keep", "remove"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("source", SOURCES)
def test_loss_and_gradients(source, name, padding):
    model, fast = pair(source, name, padding)
    inputs = inputs_of(name)
    # Without its padding ConvBERT computes something else than with it.
    truth = fast if (padding, name) == ("remove", "ConvBertForMaskedLM") else model
    with wide():
        expected = train(truth, inputs)
        assert_same_training(train(fast, inputs, loss_only=True), expected)
        if source == "reference" and padding == "keep":
            assert_same_training(train(model, inputs, loss_only=True), expected)
    names = " ".join(expected[1])
    assert "word_embeddings.weight" in names and ("decoder.bias" in names or "generator_lm_head.bias" in names)


@pytest.mark.parametrize(("source", "name"), MODELS)
def test_output(source, name):
    model, fast = pair(source, name)
    inputs = inputs_of(name) | {"output_hidden_states": True}
    with torch.no_grad(), wide():
        full, output = model(**inputs), fast(**inputs, loss_only=True)
        values = fast(**inputs, loss_only=True, return_dict=False)
    main = "prediction_logits" if name == "BertForPreTraining" else "logits"
    assert type(output) is type(full) and getattr(output, main) is None and main in full
    assert list(output) == [key for key in full if key != main]
    assert_equal(flat("", output), {key: value for key, value in flat("", full).items() if key != f".{main}"})
    assert isinstance(values, tuple)
    assert_equal(flat("", values), dict(zip(flat("", values), flat("", output).values(), strict=True)))
    fast.config.return_dict = False
    assert isinstance(fast(**inputs, loss_only=True), tuple)
    fast.config.return_dict = True
    # By default there are logits, with labels and without.
    for given in (inputs, {"input_ids": inputs["input_ids"]}):
        assert fast(**given)[main] is not None and fast(**given, loss_only=False)[main] is not None
    ids = inputs.pop("input_ids")
    assert torch.equal(fast(ids, **inputs, loss_only=True).loss, fast(input_ids=ids, **inputs, loss_only=True).loss)


class Shapes(TorchDispatchMode):
    """Collects the shapes of everything that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        outputs = function(*args, **(kwargs or {}))
        self.found |= {tuple(t.shape) for t in tree_leaves(outputs) if isinstance(t, torch.Tensor)}
        return outputs


@pytest.mark.parametrize(("source", "name"), MODELS)
def test_nothing_is_computed_for_tokens_without_a_label(source, name, monkeypatch):
    # The vocabulary's own size, that no other dimension has; as the transform's of ConvBERT.
    _, fast = pair(source, name, vocab_size=101, hidden_size=16, intermediate_size=24)
    inputs = inputs_of(name)
    labels = inputs[labels_name(name)]
    labels = labels[:, 1:] if name in CAUSAL else labels
    states: list[torch.Tensor] = []
    loss = lm_head.masked_lm_loss

    def watched(hidden, weight, bias, targets):
        states.append(hidden)
        assert torch.equal(targets, labels[labels != -100])
        return loss(hidden, weight, bias, targets)

    monkeypatch.setattr(lm_head, "masked_lm_loss", watched)
    with Shapes() as shapes:
        fast(**inputs, loss_only=True)
    assert [len(each) for each in states] == [(labels != -100).sum()]
    assert not [shape for shape in shapes.found if shape[-1:] == (101,) and shape != (101,)]
    # In the model with logits there are some, so that what is not found above could be.
    with Shapes() as shapes:
        fast(**inputs)
    assert (4, S, 101) in shapes.found


@pytest.mark.parametrize(("source", "name"), MODELS)
def test_half_precision(source, name):
    """The loss has the dtype that it has with logits; it and the gradients, all together, keep the 2x rule."""
    model, fast = pair(source, name, num_hidden_layers=1)
    inputs = inputs_of(name)
    # Rounding in the contrastive loss, of similarities times 100, would hide that of the head's.
    inputs.pop("attack_input_ids", None)
    truth = train(model, inputs)
    assert train(fast, inputs, loss_only=True)[0].dtype == truth[0].dtype
    for dtype in (torch.bfloat16, torch.float32):
        own, actual = train(model.to(dtype), inputs), train(fast.to(dtype), inputs, loss_only=True)
        assert actual[0].dtype == own[0].dtype
        compare_2x(actual, own, truth)
    model, fast = model.float(), fast.float()
    with torch.autocast("cpu", torch.bfloat16):
        own, actual = train(model, inputs), train(fast, inputs, loss_only=True)
    assert actual[0].dtype == own[0].dtype == torch.float32
    compare_2x(actual, own, truth, rounding=2 * torch.finfo(torch.bfloat16).eps)


def compare_2x(actual: tuple, own: tuple, truth: tuple, rounding: float | None = None) -> None:
    floor = largest(truth[1])
    # One number says little of a rule of errors: the loss's is of one rounding in its dtype.
    scale = max(truth[0].abs().item(), 1.0)
    eps = max(torch.finfo(actual[0].dtype).eps, rounding or 0.0)
    assert abs(actual[0].double() - truth[0]) <= 2 * abs(own[0].double() - truth[0]) + 2 * eps * scale
    assert_2x("gradients", *(together(each[1], truth[1], floor) for each in (actual, own, truth)), rounding=rounding)


@pytest.mark.parametrize("name", ["BertForMaskedLM", "BertLMHeadModel", "ConvBertForMaskedLM"])
def test_by_the_kernels(name, device):
    pytest.importorskip("triton", reason="the kernels are in Triton")
    model = make("reference", name, num_hidden_layers=1).to(device)
    fast = fastconv.accelerate(copy.deepcopy(model), backend="triton", padding="remove")
    inputs = {key: value[1:, :4].to(device) for key, value in inputs_of(name, share=0.9, kind="left").items()}
    # Nothing is padding, which has other states without than with it.
    inputs = {key: torch.ones_like(value) if "mask" in key else value for key, value in inputs.items()}
    for share in (inputs, inputs | {labels_name(name): torch.full_like(inputs[labels_name(name)], -100)}):
        exact = train(copy.deepcopy(model).double(), share)
        # The same encoder, with logits: what its kernels round says nothing of the head.
        actual, own = train(fast, share, loss_only=True), train(fast, share)
        assert actual[0].isnan() == own[0].isnan() and actual[1].keys() == own[1].keys()
        if not own[0].isnan():
            compare_2x(actual, own, exact, rounding=4 * torch.finfo(torch.float32).eps)
        else:
            assert not any(gradient.any() for gradient in actual[1].values())


@pytest.mark.parametrize("padding", ["keep", "remove"])
@pytest.mark.parametrize(("source", "name"), MODELS)
def test_no_token_has_a_label(source, name, padding):
    model, fast = pair(source, name, padding)
    inputs = inputs_of(name, share=0.0)
    with wide():
        expected, actual = train(model, inputs), train(fast, inputs, loss_only=True)
    assert expected[0].isnan() and actual[0].isnan()
    if "attack_input_ids" in inputs or name == "BertForPreTraining":  # the rest of the loss has gradients
        assert_equal(actual[1], expected[1], floor=largest(expected[1]))
    else:
        assert actual[1].keys() == expected[1].keys() and not any(gradient.any() for gradient in actual[1].values())


def parts(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The modules of a head over the vocabulary."""
    if hasattr(model, "generator_lm_head"):
        transform, found = model.generator_predictions, {"decoder": model.generator_lm_head}
    else:
        head = model.cls.predictions
        transform, found = head.transform, {"head": head, "decoder": head.decoder}
    # transformers has activations that are modules, by two names.
    names = {"LayerNorm": "norm", "transform_act_fn": "activation"}
    return found | {"transform": transform} | {names.get(key, key): part for key, part in transform.named_children()}


@pytest.mark.parametrize("part", ["head", "transform", "decoder", "dense", "norm", "activation"])
@pytest.mark.parametrize(("source", "name"), MODELS)
def test_hooks_see_every_token(source, name, part):
    """Where somebody looks at the head's modules, the logits are computed as before, and left out."""
    model, fast = pair(source, name)
    if part not in parts(model):
        pytest.skip("this head has no such module")
    inputs, seen = inputs_of(name), []
    parts(fast)[part].register_forward_hook(lambda _, args, output: seen.append(output.shape))
    with wide():
        assert_same_training(train(fast, inputs, loss_only=True), train(model, inputs))
    assert [shape[:2] for shape in seen] == [(4, S)]
    full, output = fast(**inputs), fast(**inputs, loss_only=True)
    assert list(output) == [key for key in full if key not in ("logits", "prediction_logits")]
    values, full = fast(**inputs, return_dict=False, loss_only=True), fast(**inputs, return_dict=False)
    assert len(values) == len(full) - 1 and torch.equal(values[0], full[0])


class Scaled(torch.nn.Module):
    """A weight times two, by a parametrization."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


class Adapter(torch.nn.Linear):
    """An adapter's layer: more than a linear one."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).sin()


@pytest.mark.parametrize("part", ["decoder", "dense"])
@pytest.mark.parametrize(("source", "name"), MODELS)
def test_adapters_are_called(source, name, part):
    model, fast = pair(source, name)
    inputs = inputs_of(name)
    with torch.no_grad():
        plain = fast(**inputs, loss_only=True).loss
    for each in (model, fast):
        torch.nn.utils.parametrize.register_parametrization(parts(each)[part], "weight", Scaled())
    with wide():
        expected = train(model, inputs)
        assert_same_training(train(fast, inputs, loss_only=True), expected)
    assert expected[0] != plain
    for each in (model, fast):
        torch.nn.utils.parametrize.remove_parametrizations(parts(each)[part], "weight")
        parts(each)[part].__class__ = Adapter
    with torch.no_grad(), wide():
        found = fast(**inputs, loss_only=True).loss
        assert_equal({"": found}, {"": model(**inputs).loss})
    assert found != expected[0]


@pytest.mark.parametrize("padding", ["keep", "remove"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("source", "name"), MODELS)
def test_untied_and_resized_vocabularies(source, name, tied, padding):
    model = make(source, name, tie_word_embeddings=tied).double()
    fast = fastconv.accelerate(copy.deepcopy(model), padding=padding, backend="native")
    for each in (model, fast):
        each.resize_token_embeddings(VOCABULARY + 3)
        with torch.no_grad():
            for weight in (each.get_input_embeddings().weight, each.get_output_embeddings().weight):
                weight[-3:] = 0.5 * torch.randn(weight[-3:].shape, generator=torch.Generator().manual_seed(1)).double()
            each.get_output_embeddings().bias[-3:] = 0.25
    inputs = inputs_of(name)
    labels = inputs[labels_name(name)]
    labels[0, 1], labels[1, 1] = VOCABULARY + 2, VOCABULARY
    with wide():
        expected = train(fast if (padding, family_of(name)) == ("remove", "ConvBert") else model, inputs)
        assert_same_training(train(fast, inputs, loss_only=True), expected)


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("items", [7, torch.tensor(7), torch.tensor(3.0)])
def test_number_of_items_of_transformers(name, items):
    """A trainer that accumulates gradients divides the sum of the losses by the items of several batches."""
    model, fast = pair("transformers", name)
    with wide():
        for share in (0.4, 0.0):
            inputs = inputs_of(name, share) | {"num_items_in_batch": items}
            expected = train(model, inputs)
            assert_same_training(train(fast, inputs, loss_only=True), expected)
            assert (expected[0] == 0) == (share == 0.0)


@pytest.mark.parametrize("name", CAUSAL)
def test_other_losses_of_transformers(name, monkeypatch):
    model, fast = pair("transformers", name)
    inputs = inputs_of(name)
    calls: list[torch.Size] = []
    fused = lm_head.masked_lm_loss
    monkeypatch.setattr(lm_head, "masked_lm_loss", lambda x, *rest: calls.append(x.shape) or fused(x, *rest))
    with wide():
        labels = inputs["labels"]
        others = {"labels": labels.masked_fill(labels == -100, 3), "ignore_index": 3}
        for given in (others, {"shift_labels": labels}):
            expected = train(model, inputs | given)
            assert_same_training(train(fast, inputs | given, loss_only=True), expected)
        for each in (model, fast):
            each.loss_function = lambda logits, labels, vocab_size, **_: logits.square().mean() + vocab_size
        assert_same_training(train(fast, inputs, loss_only=True), train(model, inputs))
        assert not calls
        fast.loss_function = model.loss_function = None
        del fast._loss_function
        fast(**inputs, loss_only=True)
    assert len(calls) == 1


@pytest.mark.parametrize("name", NAMES)
def test_arguments_that_only_the_original_knows(name):
    """transformers 4 gives them to the loss, or raises; 5 to the encoder too."""
    model, fast = pair("transformers", name)
    for given in ({"ignore_index": -100}, {"shift_labels": None}, {"use_cache": False}, {"num_items_in_batch": 7}):
        inputs = inputs_of(name) | given
        try:
            with wide():
                expected = model(**inputs).loss
        except TypeError as error:
            with pytest.raises(TypeError, match=str(error).split(".forward() ")[1]):
                fast(**inputs, loss_only=True)
        else:
            with wide():
                assert_equal({"": fast(**inputs, loss_only=True).loss}, {"": expected})


@pytest.mark.parametrize("source", ["reference", "transformers"])
def test_a_decoder_makes_the_cache_that_it_makes_with_logits(source):
    for name in CAUSAL:
        model, fast = pair(source, name, is_decoder=True)
        inputs = inputs_of(name)
        for given in ({}, {"use_cache": True}):
            with wide(), torch.no_grad():
                full, output = model(**inputs, **given), fast(**inputs, **given, loss_only=True)
            assert list(output) == [key for key in full if key != "logits"]
            assert_equal(flat("", output["loss"]), flat("", full["loss"]))


ERRORS = [
    ({"labels": None}, ValueError, "loss_only needs {labels}.*, got {labels} None"),
    ({"labels": torch.zeros(4, S + 1).long()}, ValueError, r"{labels} must have shape \(4, 7\), got \(4, 8\)"),
    ({"labels": torch.full((4, S), VOCABULARY)}, IndexError, "from 0 to 40 .* or ignore_index -100, got 41"),
    ({"labels": torch.full((4, S), -7)}, IndexError, "from 0 to 40 .* or ignore_index -100, got -7"),
    ({"labels": torch.zeros(4, S)}, TypeError, "int64 or int32 tensor, got torch.float32"),
]


@pytest.mark.parametrize(("changed", "error", "message"), ERRORS)
@pytest.mark.parametrize(("source", "name"), MODELS)
def test_bad_labels(source, name, changed, error, message):
    fast = pair(source, name)[1]
    inputs = inputs_of(name) | {labels_name(name): changed["labels"]}
    inputs.pop("attack_input_ids", None)
    with pytest.raises(error, match=message.format(labels=labels_name(name))):
        fast(**inputs, loss_only=True)


def test_missing_labels_are_named():
    for source in ("reference", "transformers"):
        model, fast = pair(source, "BertForPreTraining")
        inputs = inputs_of("BertForPreTraining")
        del inputs["next_sentence_label"]
        for each in (model, fast) if source == "reference" else (fast,):
            with pytest.raises(ValueError, match="got labels given, next_sentence_label None"):
                each(**inputs, loss_only=True)
    model = make("reference", "BertForMaskedLM")
    with pytest.raises(ValueError, match="loss_only needs labels, got labels None"):
        model(torch.zeros(1, 3).long(), loss_only=True)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("source", SOURCES)
def test_a_head_keeps_its_class_name_and_signature(source, name, tmp_path):
    _, fast = pair(source, name)
    original = getattr(library(source) if source != "fastconv" else fastconv, name)
    own, changed = (list(inspect.signature(each.forward).parameters) for each in (original, type(fast)))
    assert type(fast) is not original and isinstance(fast, original)
    assert (type(fast).__name__, type(fast).__module__) == (original.__name__, original.__module__)
    assert [key for key in changed if key != "loss_only"] == [key for key in own if key != "loss_only"]
    assert changed.count("loss_only") == 1
    inputs = inputs_of(name)
    expected = fast(**inputs, loss_only=True).loss
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert type(other) is type(fast) and torch.equal(other(**inputs, loss_only=True).loss, expected)
    if source != "reference":
        fast.save_pretrained(tmp_path)
        assert f'"{name}"' in (tmp_path / "config.json").read_text()
        again = original.from_pretrained(tmp_path).double().eval()
        again = fastconv.accelerate(again, backend="native")
        assert torch.equal(again(**inputs, loss_only=True).loss, expected)
    assert type(fastconv.restore(fast)) is original


def test_threads_have_labels_of_their_own():
    _, fast = pair("reference", "BertForMaskedLM")
    batches = [inputs_of("BertForMaskedLM", share) for share in (0.2, 0.4, 0.6, 0.8)]
    expected = [fast(**inputs, loss_only=True).loss.item() for inputs in batches]
    found: dict[int, set[float]] = {number: set() for number in range(4)}

    def work(number: int) -> None:
        for _ in range(5):
            found[number].add(fast(**batches[number], loss_only=True).loss.item())

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: {value} for number, value in enumerate(expected)}


@pytest.mark.parametrize(
    ("source", "name"),
    [("reference", "BertForMaskedLM"), ("transformers", "RoCBertForCausalLM"), ("transformers", "BertForPreTraining")],
)
def test_compiled_in_one_graph(source, name):
    _, fast = pair(source, name, num_hidden_layers=1)
    inputs = inputs_of(name)
    del inputs["attention_mask"]
    with wide():
        expected = train(fast, inputs, loss_only=True)
    torch._dynamo.reset()
    compiled = torch.compile(fast.float(), backend="aot_eager", fullgraph=True)
    fast.zero_grad()
    loss = compiled(**inputs, loss_only=True).loss
    loss.backward()
    assert abs(loss - expected[0]) < 1e-5 * abs(expected[0])
    assert fast.get_output_embeddings().weight.grad is not None
