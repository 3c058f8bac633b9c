"""What people do with accelerated models: mixed precision, scaled losses, recomputed activations, adapters, threads."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable

import pytest
import torch
from model_runs import assert_equal, largest, together
from swap_models import (
    BATCH,
    LENGTH,
    MODELS,
    Tensors,
    attention_of,
    build,
    infer,
    layer_of,
    make_inputs,
    train,
)
from tolerance import assert_2x
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

import fastconv

models = pytest.mark.parametrize(("source", "family"), MODELS)
both_paddings = pytest.mark.parametrize("padding", ["keep", "remove"])
DROPOUT = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3}


@pytest.fixture(autouse=True)
def _backend(device):
    """Kernels run on a GPU, and elsewhere only where a test asks for them: they are slow in the interpreter."""
    with fastconv.backend("auto" if device.type == "cuda" else "native"):
        yield


def accelerated(model: nn.Module, padding: str) -> nn.Module:
    return fastconv.accelerate(copy.deepcopy(model), padding=padding)


def inputs_on(device: torch.device, padding: str = "keep", seed: int = 0) -> Tensors:
    """A batch for which both modes give the same in all families: what "remove" packs has no padding here."""
    inputs = make_inputs("right" if padding == "keep" else None, seed)
    inputs.setdefault("attention_mask", torch.ones(BATCH, LENGTH, dtype=torch.long))
    return {name: value.to(device) for name, value in inputs.items()}


def assert_same(actual: tuple[Tensors, Tensors], expected: tuple[Tensors, Tensors]) -> None:
    """Equal outputs, and gradients within a rounding of the largest, in fp64."""
    assert_equal(actual[0], expected[0])
    assert_equal(actual[1], expected[1], floor=1e-3 * largest(expected[1]))


def assert_rounded(actual, own, truth, dtype: torch.dtype) -> None:
    """Outputs and gradients by the 2x rule, all together; a layer rounds more than once, in other places."""
    for found in zip(actual, own, truth, strict=True):
        exact = found[-1]
        parts = (together({k: t.double().cpu() for k, t in each.items()}, exact, largest(exact)) for each in found)
        assert_2x(str(dtype), *parts, rounding=4 * torch.finfo(dtype).eps)


# Mixed and half precision


@both_paddings
@models
def test_autocast(source, family, padding, device):
    model = build(source, family + "ForMaskedLM").to(device).train()
    fast, inputs = accelerated(model, padding), inputs_on(device, padding)
    with torch.autocast(device.type, torch.bfloat16):
        actual, own = train(fast, inputs), train(model, inputs)
    assert {name: g.dtype for name, g in actual[1].items()} == dict.fromkeys(own[1], torch.float32)
    assert_rounded(actual, own, train(model.double(), inputs), torch.bfloat16)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@both_paddings
@models
def test_half_precision(source, family, padding, dtype, when, device):
    """Training, of a model that was in half precision when it was accelerated or became so, having been used."""
    model, inputs = build(source, family + "ForMaskedLM").to(device).train(), inputs_on(device, padding)
    truth = train(copy.deepcopy(model).double(), inputs)
    fast = accelerated(model, padding)
    infer(fast, inputs)
    if when == "before":
        fastconv.restore(fast)
        fast = accelerated(fast.to(dtype), padding)
    actual, own = train(fast.to(dtype), inputs), train(model.to(dtype), inputs)
    assert {name: g.dtype for name, g in actual[1].items()} == dict.fromkeys(own[1], dtype)
    assert_rounded(actual, own, truth, dtype)


@both_paddings
@models
def test_scaled_loss(source, family, padding, device):
    """A power of two scales gradients without rounding: the steps are those without a scaler, bit for bit."""
    fast = accelerated(build(source, family + "ForMaskedLM").to(device).train(), padding)
    scaled = copy.deepcopy(fast)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10, growth_interval=1)
    optimizers = {model: torch.optim.SGD(model.parameters(), lr=0.05) for model in (fast, scaled)}

    def loss_of(model: nn.Module, step: int) -> torch.Tensor:
        optimizers[model].zero_grad()
        inputs = inputs_on(device, padding, step)
        with torch.autocast(device.type, torch.bfloat16):
            return model(**inputs, labels=inputs["input_ids"]).loss

    def scaled_step(step: int, factor: float) -> dict[str, torch.Tensor]:
        before = {name: p.detach().clone() for name, p in scaled.named_parameters()}
        scaler.scale(factor * loss_of(scaled, step)).backward()
        scaler.step(optimizers[scaled])
        scaler.update()
        return {name: p for name, p in scaled.named_parameters() if not torch.equal(p, before[name])}

    for step in range(3):
        loss_of(fast, step).backward()
        optimizers[fast].step()
        assert scaled_step(step, 1.0) and scaler.get_scale() == 2.0 ** (11 + step)
        for (name, p), q in zip(scaled.named_parameters(), fast.parameters(), strict=True):
            assert torch.equal(p, q), name
    # An overflow skips the step.
    assert not scaled_step(3, float("inf")) and scaler.get_scale() == 2.0**12
    assert scaled_step(4, 1.0)


# Activations that are computed again


def recomputed(model: nn.Module, inputs: Tensors, enable: Callable[[], None]) -> list[tuple[Tensors, Tensors]]:
    """Outputs and gradients without and with what `enable` turns on, from one seed of the dropout, and from another."""
    found = []
    for seed in (3, 4, 3):
        if len(found) == 2:
            enable()
        torch.manual_seed(seed)
        found.append(train(model, inputs))
    assert (found[1][0]["last_hidden_state.0"] - found[0][0]["last_hidden_state.0"]).abs().max() > 0.1
    return [found[0], found[2]]


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable")
@pytest.mark.parametrize("reentrant", [True, False])
@both_paddings
@models
def test_gradient_checkpointing_repeats_the_dropout(source, family, padding, reentrant, device):
    fast = accelerated(build(source, family + "Model", **DROPOUT).to(device).double().train(), padding)
    calls: list[nn.Module] = []
    attention_of(fast, 1).register_forward_pre_hook(lambda module, args: calls.append(module))
    kept, again = recomputed(
        fast, inputs_on(device, padding), lambda: fast.gradient_checkpointing_enable({"use_reentrant": reentrant})
    )
    assert len(calls) == 4
    assert_same(again, kept)


def test_gradient_checkpointing_repeats_the_dropout_of_the_kernels(device):
    pytest.importorskip("triton", reason="the kernels are in Triton")
    fast = build("reference", "ConvBertModel", num_hidden_layers=1, **DROPOUT).to(device).train()
    fastconv.accelerate(fast, padding="remove", backend="triton")
    inputs = {name: value[1:, :4] for name, value in inputs_on(device).items()}
    kept, again = recomputed(fast, inputs, fast.gradient_checkpointing_enable)
    for found, expected in zip(again, kept, strict=True):
        for name, value in expected.items():
            assert torch.equal(found[name], value), name


@pytest.mark.parametrize("reentrant", [True, False])
@both_paddings
@models
def test_checkpoint_of_a_layer_and_of_a_model(source, family, padding, reentrant, device):
    """As somebody's own training loop does it, without a word to the model; what follows is a call as any other."""
    fast = accelerated(build(source, family + "Model", **DROPOUT).to(device).double().train(), padding)
    inputs = inputs_on(device, padding)
    embeds = fast.get_input_embeddings()(inputs.pop("input_ids")).detach()
    states = torch.randn(BATCH, LENGTH, 16, dtype=torch.float64, device=device)
    layer = layer_of(fast)

    def of_model(x: torch.Tensor) -> torch.Tensor:
        return fast(inputs_embeds=x, **inputs)[0]

    def of_layer(x: torch.Tensor) -> torch.Tensor:
        output = layer(x)
        return output[0] if isinstance(output, tuple) else output

    for function, start in ((of_layer, states), (of_model, embeds), (of_layer, states)):
        found = []
        for run in (function, lambda x, f=function: checkpoint(f, x, use_reentrant=reentrant)):
            torch.manual_seed(3)
            x = start.clone().requires_grad_()
            fast.zero_grad()
            y = run(x)
            y.sin().sum().backward()
            gradients = {name: p.grad.clone() for name, p in fast.named_parameters() if p.grad is not None}
            found.append(({"y": y.detach()}, gradients | {"x": x.grad}))
        assert_same(found[1], found[0])


# Weights that are computed, and adapters


class Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


@both_paddings
@models
def test_weight_norm(source, family, padding, device):
    model = build(source, family + "Model").to(device).double().train()
    fast, inputs = accelerated(model, padding), inputs_on(device, padding)
    infer(fast, inputs)
    for each in (model, fast):
        for layer in (0, 1):
            for linear in (attention_of(each, layer).query, attention_of(each, layer).value):
                parametrizations.weight_norm(linear)
                with torch.no_grad():
                    linear.parametrizations.weight.original0.mul_(1.5)
    expected = train(model, inputs)
    assert sum("query.parametrizations.weight.original" in name for name in expected[1]) == 4
    assert_same(train(fast, inputs), expected)
    assert_same(train(accelerated(model, padding), inputs), expected)


@pytest.mark.parametrize("when", ["before", "after"])
@both_paddings
@models
def test_a_parametrization_of_every_weight(source, family, padding, when, device):
    model = build(source, family + "Model").to(device).double().train()
    fast, inputs = accelerated(model, padding), inputs_on(device, padding)
    for each in (model, fast):
        if when == "before":
            fastconv.restore(each)
        weights = [(module, name) for module in each.modules() for name, _ in module.named_parameters(recurse=False)]
        for module, name in weights:
            parametrize.register_parametrization(module, name, Doubled())
    if when == "before":
        fastconv.accelerate(fast, padding=padding)
    assert_same(train(fast, inputs), train(model, inputs))
    assert_same(train(copy.deepcopy(fast), inputs), train(model, inputs))


class Lora(nn.Module):
    """A low-rank adapter in the place of a linear layer, with that layer's attributes, as PEFT has it."""

    def __init__(self, base_layer: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        options = {"bias": False, "dtype": base_layer.weight.dtype, "device": base_layer.weight.device}
        self.lora_A = nn.ModuleDict({"default": nn.Linear(self.in_features, rank, **options)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, self.out_features, **options)})
        self.merged = False

    @property
    def weight(self) -> torch.Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> torch.Tensor:
        return self.base_layer.bias

    def merge(self, sign: int = 1) -> None:
        self.base_layer.weight.data += sign * self.lora_B["default"].weight @ self.lora_A["default"].weight
        self.merged = sign == 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base_layer(x)
        return y if self.merged else y + self.lora_B["default"](self.lora_A["default"](x))


def adapt(model: nn.Module) -> list[Lora]:
    """Adapters around query and value, with weights of their own; nothing else is trained."""
    model.requires_grad_(False)
    adapters = []
    for layer in (0, 1):
        for name in ("query", "value"):
            torch.manual_seed(layer)
            adapters.append(Lora(getattr(attention_of(model, layer), name)))
            setattr(attention_of(model, layer), name, adapters[-1])
    return adapters


@pytest.mark.parametrize("when", ["before", "after"])
@both_paddings
@models
def test_lora(source, family, padding, when, device):
    model, inputs = build(source, family + "Model").to(device).double().train(), inputs_on(device, padding)
    if when == "before":
        adapt(model)
        fast = accelerated(model, padding)
        adapters = [module for module in fast.modules() if isinstance(module, Lora)]
    else:
        fast = accelerated(model, padding)
        infer(fast, inputs)
        adapt(model)
        adapters = adapt(fast)
    expected = train(model, inputs)
    assert len(expected[1]) == 8 and all("lora_" in name for name in expected[1])
    assert_same(train(fast, inputs), expected)
    for sign in (1, -1):
        base = adapters[0].weight.clone()
        for adapter in adapters:
            adapter.merge(sign)
        assert not torch.equal(adapters[0].weight, base)
        assert_equal(infer(fast, inputs), expected[0])
    # Merged for good, query and value are plain layers again.
    for adapter in adapters:
        adapter.merge()
    for layer in (0, 1):
        for name in ("query", "value"):
            setattr(attention_of(fast, layer), name, getattr(attention_of(fast, layer), name).base_layer)
    for _ in range(2):
        assert_equal(infer(fast, inputs), expected[0])


@pytest.mark.parametrize("when", ["before", "after"])
@both_paddings
@models
def test_peft(source, family, padding, when, device):
    peft = pytest.importorskip("peft", reason="adapts by PEFT, which is not installed")
    plain, inputs = build(source, family + "ForSequenceClassification").to(device).double(), inputs_on(device, padding)
    lora = peft.LoraConfig(target_modules=["query", "value"], r=2, init_lora_weights=False)
    model = peft.get_peft_model(copy.deepcopy(plain), lora)
    if when == "before":
        fast = accelerated(model, padding)
    else:
        fast = accelerated(plain, padding)
        infer(fast, inputs)
        fast = peft.get_peft_model(fast, lora)
        fast.load_state_dict(model.state_dict())
    expected = train(model.eval(), inputs)
    assert len(expected[1]) == 8 and all("lora_" in name for name in expected[1])
    assert_same(train(fast.eval(), inputs), expected)
    for change in (fast.merge_adapter, fast.unmerge_adapter):
        change()
        assert_equal(infer(fast, inputs), expected[0])
    with fast.disable_adapter():
        assert_equal(infer(fast, inputs), infer(plain, inputs))
    assert_equal(infer(fast.merge_and_unload(), inputs), expected[0])


# Inference mode, copies, threads


@both_paddings
@models
def test_training_after_inference_mode(source, family, padding, device):
    """Nothing that inference_mode made is kept for what comes later."""
    fast = accelerated(build(source, family + "ForMaskedLM").to(device).double().train(), padding)
    fresh, inputs = copy.deepcopy(fast), inputs_on(device, padding)
    with torch.inference_mode():
        for mode in (True, False):
            infer(fast.train(mode), inputs)
    assert_same(train(fast.train(), inputs), train(fresh, inputs))
    assert not any(t.is_inference() for t in (*fast.parameters(), *fast.buffers()))


@both_paddings
@models
def test_copies_are_independent(source, family, padding, device):
    """Training one changes no bit of the other, whichever it is, before and after their weights are packed."""
    fast, inputs = accelerated(build(source, family + "Model").to(device), padding), inputs_on(device, padding)
    for used in (False, True):
        if used:
            infer(fast, inputs)
        other = copy.deepcopy(fast)
        for trained, left in ((other, fast), (fast, other)):
            expected = {name: p.detach().clone() for name, p in left.named_parameters()}
            before, states = (infer(each, inputs)["last_hidden_state.0"] for each in (trained, left))
            optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
            train(trained, inputs)
            optimizer.step()
            assert not torch.equal(infer(trained, inputs)["last_hidden_state.0"], before)
            assert torch.equal(infer(left, inputs)["last_hidden_state.0"], states)
            assert all(torch.equal(p, expected[name]) for name, p in left.named_parameters())


@pytest.mark.parametrize("what", ["inference", "training"])
@both_paddings
@models
def test_eight_threads(source, family, padding, what, device):
    """Calls of one model at once, the first among them, on batches of several sizes: each gives what it gives alone."""
    fast = accelerated(build(source, family + "ForMaskedLM").to(device).requires_grad_(what == "training"), padding)
    batches = []
    for thread in range(8):
        inputs = {name: value[: 1 + thread % 3, : 3 + thread] for name, value in inputs_on(device, seed=thread).items()}
        batches.append(inputs | {"labels": inputs["input_ids"].contiguous()})

    def call(model: nn.Module, inputs: Tensors) -> list[torch.Tensor]:
        with torch.set_grad_enabled(what == "training"):
            output = model(**inputs)
        if what == "inference":
            return [output.logits]
        return [output.logits, *torch.autograd.grad(output.loss, list(model.parameters()), allow_unused=True)]

    alone = [call(copy.deepcopy(fast), inputs) for inputs in batches]
    start, found = threading.Barrier(8), [[] for _ in batches]

    def work(thread: int) -> None:
        start.wait()
        found[thread] += [call(fast, batches[thread]) for _ in range(3)]

    threads = [threading.Thread(target=work, args=(thread,)) for thread in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for results, expected in zip(found, alone, strict=True):
        assert len(results) == 3
        for result in results:
            for a, b in zip(result, expected, strict=True):
                assert (a is b is None) or torch.equal(a, b)
