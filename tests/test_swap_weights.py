"""Packed weights are never stale: whatever changes an accelerated model's parameters changes what it computes."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from swap_models import (
    MODELS,
    assert_close,
    assert_same,
    assert_same_inference,
    attention_of,
    build,
    infer,
    make_inputs,
    pair,
    randomize,
    train,
)
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import fastconv
from fastconv.nn.packed_linear import _packs

models = pytest.mark.parametrize(("source", "family"), MODELS)
both_families = pytest.mark.parametrize("family", ["Bert", "ConvBert"])


@pytest.fixture(autouse=True)
def _native():
    with fastconv.backend("native"):
        yield


class Lora(nn.Module):
    """A low-rank adapter around a linear layer."""

    def __init__(self, base, rank=2):
        super().__init__()
        self.base = base
        generator = torch.Generator().manual_seed(0)
        self.down = nn.Parameter(torch.randn(rank, base.in_features, generator=generator))
        self.up = nn.Parameter(torch.randn(base.out_features, rank, generator=generator))
        self.merged = False

    def merge(self):
        self.base.weight.data += self.up @ self.down
        self.merged = True

    def forward(self, x):
        return self.base(x) if self.merged else self.base(x) + x @ self.down.T @ self.up.T


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def step(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    train(model)
    optimizer.step()
    optimizer.zero_grad()


def adam_steps(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(2):
        train(model)
        optimizer.step()
        infer(model)


def other_state(model):
    other = copy.deepcopy(model)
    randomize(other, 7)
    return {name: t.clone() for name, t in other.state_dict().items()}


def load(model):
    model.load_state_dict(other_state(model))


def assign(model):
    model.load_state_dict(other_state(model), assign=True)


def edit_data(model):
    for p in model.parameters():
        p.data.mul_(1.2)


def edit_in_place(model):
    with torch.no_grad():
        attention_of(model).key.weight.add_(0.3)
        attention_of(model).value.bias[2:5] = 1.0


def edit_as_inference(model):
    with torch.inference_mode():
        attention_of(model).value.weight.mul_(-1.0)


def replace_data(model):
    attention_of(model).key.weight.data = attention_of(model).key.weight.data.flip(0).clone()


def swap_data(model):
    query, value = attention_of(model).query, attention_of(model).value
    query.weight.data, value.weight.data = value.weight.data, query.weight.data


def swap_modules(model):
    attention = attention_of(model)
    attention.query, attention.value = attention.value, attention.query


def replace_parameter(model):
    attention_of(model).value.weight = nn.Parameter(attention_of(model).value.weight.detach() * 3)


def replace_module(model):
    old = attention_of(model).value
    attention_of(model).value = copy.deepcopy(old)
    with torch.no_grad():
        attention_of(model).value.weight.neg_()
        old.weight.fill_(99.0)


def replace_by_lora(model):
    attention_of(model).query = Lora(attention_of(model).query)


def replace_by_lora_and_merge(model):
    replace_by_lora(model)
    infer(model)
    attention_of(model).query.merge()


def merge_lora_and_unwrap(model):
    replace_by_lora_and_merge(model)
    infer(model)
    attention_of(model).query = attention_of(model).query.base


def merge_in_place(model):
    weight = attention_of(model).query.weight
    weight.data += torch.ones(weight.shape[0], 1) @ torch.ones(1, weight.shape[1])


def drop_the_biases(model):
    attention_of(model).query.bias = None


def drop_all_biases(model):
    for name in ("query", "key", "value", "conv_out_layer"):
        if hasattr(attention_of(model), name):
            getattr(attention_of(model), name).bias = None


def register_parametrization(model):
    parametrize.register_parametrization(attention_of(model).query, "weight", Doubled())


def remove_parametrization(model):
    register_parametrization(model)
    infer(model)
    parametrize.remove_parametrizations(attention_of(model).query, "weight")


def register_weight_norm(model):
    parametrizations.weight_norm(attention_of(model).query)
    attention_of(model).query.parametrizations.weight.original0.data.mul_(2)


def register_old_weight_norm(model):
    nn.utils.weight_norm(attention_of(model).query)
    attention_of(model).query.weight_g.data.mul_(2)


def prune_query(model):
    prune.l1_unstructured(attention_of(model).query, "weight", amount=0.5)


def prune_for_good(model):
    prune_query(model)
    infer(model)
    prune.remove(attention_of(model).query, "weight")


def tie_parameters(model):
    attention_of(model).key.weight = attention_of(model).query.weight


def tie_modules(model):
    attention_of(model).key = attention_of(model).query


def tie_across_layers(model):
    attention_of(model, 1).key = attention_of(model, 0).key
    attention_of(model, 1).query.weight = attention_of(model, 0).value.weight


def tie_data(model):
    attention_of(model).key.weight.data = attention_of(model).query.weight.data
    infer(model)
    attention_of(model).query.weight.data.mul_(2)


def write_through_a_view(model):
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    nn.utils.vector_to_parameters(flat, model.parameters())
    infer(model)
    flat.mul_(1.1)


def freeze_and_thaw(model):
    for p in model.parameters():
        p.requires_grad_(False)
    infer(model)
    model(**make_inputs())
    for p in model.parameters():
        p.requires_grad_(True)
    step(model)


def move_and_return(model):
    model.double()
    infer(model)
    model.float()


def move_a_part(model):
    attention_of(model).key.double().float()
    attention_of(model).value.weight.data.add_(1)


def share_memory(model):
    model.share_memory()
    step(model)


CHANGES = [
    value for value in list(globals().values()) if callable(value) and getattr(value, "__module__", "") == __name__
]
CHANGES = [change for change in CHANGES if not isinstance(change, type) and change not in (other_state, _native)]


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@models
def test_changed_parameters_count(source, family, change):
    original, fast = pair(source, family)
    before = infer(original)["last_hidden_state.0"]
    assert_close(infer(fast), infer(original))
    change(original)
    change(fast)
    after = infer(original)["last_hidden_state.0"]
    assert change is move_and_return or (after - before).abs().max() > 1e-3
    assert_same_inference(original, fast)
    assert_same(original, fast)
    fastconv.restore(fast)
    assert_same(original, fast)


@both_families
def test_aliases_from_before_the_first_call_stay_aliases(family):
    """Who holds a parameter's memory, as a tensor, a NumPy array or a state_dict, may write through it later."""
    for make in (
        lambda model: attention_of(model).query.weight.detach(),
        lambda model: torch.from_numpy(attention_of(model).query.weight.detach().numpy()),
        lambda model: model.state_dict()["encoder.layer.0.attention.self.query.weight"],
        lambda model: attention_of(model).query.weight.data[1:3],
    ):
        original, fast = pair("reference", family)
        for model in (original, fast):
            alias = make(model)
            infer(model)
            alias.add_(0.5)
        assert_same_inference(original, fast)
        del alias
        assert_same(original, fast)


@both_families
def test_aliases_from_after_the_first_call_stay_aliases(family):
    original, fast = pair("reference", family)
    infer(fast)
    for model in (original, fast):
        state = model.state_dict()
        infer(model)
        for value in state.values():
            value.mul_(1.1)
    assert_same(original, fast)


def test_parameters_in_shared_memory_stay_there():
    _, fast = pair("reference", "Bert")
    fast.share_memory()
    infer(fast)
    assert all(p.is_shared() for p in fast.parameters())


@both_families
def test_weights_are_packed_once(family):
    """A second call finds them where the first put them, and training leaves them there."""
    original, fast = pair("reference", family)
    places = []
    for _ in range(2):
        infer(fast)
        attention = attention_of(fast)
        layers = [attention.query, attention.key, attention.value]
        places.append([layer.weight.data_ptr() for layer in layers])
        step(fast)
    assert places[0] == places[1]
    size = 4 * layers[0].weight.numel()
    assert places[0] == [places[0][0], places[0][0] + size, places[0][0] + 2 * size]
    for layer in layers:
        assert layer.weight.untyped_storage().nbytes() == size
    step(original), step(original)
    assert_same_inference(original, fast)


def test_packed_weights_may_be_trained_after_inference_mode():
    original, fast = pair("reference", "ConvBert")
    with torch.inference_mode():
        infer(fast)
    assert not any(p.is_inference() for p in fast.parameters())
    step(original), step(fast)
    assert_same(original, fast)


def test_a_model_made_in_inference_mode():
    with torch.inference_mode():
        original = build("reference", "ConvBertModel")
        fast = fastconv.accelerate(copy.deepcopy(original))
        assert_close(infer(fast), infer(original))
    assert_same_inference(original, fast)
    assert all(p.is_inference() for p in fast.parameters())


@pytest.mark.parametrize(
    "tie", [tie_parameters, tie_modules, tie_across_layers, tie_data], ids=lambda tie: tie.__name__
)
def test_tied_parameters_stay_where_they_are(tie):
    """They couldn't be in two places, and would move at every call."""
    _, fast = pair("reference", "Bert")
    tie(fast)
    infer(fast)
    places = [p.data_ptr() for p in fast.parameters()]
    infer(fast)
    assert [p.data_ptr() for p in fast.parameters()] == places


@both_families
def test_restored_parameters_have_memory_of_their_own(family):
    _, fast = pair("reference", family)
    infer(fast)
    attention = attention_of(fastconv.restore(fast))
    assert attention.query not in _packs
    for first, second in ((attention.query, attention.key), (attention.key, attention.value)):
        assert second.weight.data_ptr() != first.weight.data_ptr() + 4 * first.weight.numel()


@both_families
def test_memory_that_the_parameters_left_is_given_back(family):
    _, fast = pair("reference", family)
    infer(fast)
    whole = weakref.ref(_packs[attention_of(fast).query][0])
    fast.double()
    train(fast)
    assert whole() is None


def test_memory_goes_with_the_model():
    fast = pair("reference", "Bert")[1]
    infer(fast)
    query = weakref.ref(attention_of(fast).query)
    assert query() in _packs
    del fast
    gc.collect()
    assert query() is None


def test_an_optimizer_of_before_keeps_its_parameters():
    """The objects that an optimizer holds are the ones that the model computes with after the first inference."""
    original, fast = pair("reference", "ConvBert")
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9) for model in (original, fast)]
    for _ in range(3):
        for model, optimizer in zip((original, fast), optimizers, strict=True):
            infer(model)
            train(model)
            optimizer.step()
        assert_same_inference(original, fast)


def test_inference_between_forward_and_backward():
    """Packing while a graph waits for its backward doesn't change its gradients."""
    original, fast = pair("reference", "Bert")
    gradients = []
    for model in (original, fast):
        loss = model(**make_inputs())[0].sin().sum()
        infer(model)
        loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert_close(gradients[1], gradients[0], floor=max(g.abs().max().item() for g in gradients[0].values()))
    assert_same(original, fast)


class Tagged(torch.Tensor):
    """A tensor subclass that, as quantized and distributed weights may, knows nothing of torch.cat."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.cat:
            raise NotImplementedError("cat")
        return super().__torch_function__(function, types, args, kwargs or {})


@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad])
def test_weights_of_another_tensor_class_are_left_to_their_layer(context):
    original, fast = pair("reference", "Bert", num_hidden_layers=1)
    query = attention_of(fast).query
    query.weight = nn.Parameter(query.weight.detach().as_subclass(Tagged), requires_grad=False)
    with context():
        got = fast(**make_inputs())[0]
        assert type(got) is Tagged
        torch.testing.assert_close(got.as_subclass(torch.Tensor), original(**make_inputs())[0], rtol=1e-4, atol=1e-4)
