"""accelerate(graphs=True): which calls replay a graph, of what, and with which result.

Without a GPU a stand-in takes the recorder's place: it keeps the function that is to be recorded, and replays by
calling it on the graph's buffers again. All but the capture itself is what runs on a GPU, and natively too, for which
the graph's packing is told the lengths of the sequences. The last tests are those of the capture.
"""

from __future__ import annotations

import contextlib
import copy
import io
import threading
from types import SimpleNamespace

import pytest
import torch
from model_runs import assert_equal
from padded_batches import MASKS, S, draw, ids_of, labels_of, mask_of
from swap_models import FAMILIES, attention_of, build, is_4, layer_of, takes, tensors_of
from torch.utils.flop_counter import FlopCounterMode

import fastconv
from fastconv import Packing, dispatch, graphs
from fastconv import recorder as recorder_module
from fastconv.nn import padding_free

MODELS = [(source, family) for source in ("reference", "transformers") for family in FAMILIES]
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="a capture needs a CUDA GPU")


class HostPacking(graphs.StaticPacking):
    """A graph's packing with lengths, for the native formulation."""

    lengths: list[int] = []  # noqa: RUF012

    def fill(self, packing: Packing) -> None:
        super().fill(packing)
        self.lengths = [*packing.lengths, *[1] * (self.tokens - packing.tokens)]


class StandIn:
    """A recorder without a GPU: a replay calls the function again, and writes to the tensors of its first result."""

    def __init__(self) -> None:
        self.recorded = self.replayed = self.waited = 0
        self._lock = threading.RLock()

    @contextlib.contextmanager
    def turn(self):
        with self._lock:
            yield

    def wait(self) -> None:
        self.waited += 1

    def record(self, function):
        output = function()
        self.recorded += 1

        def replay():
            self.replayed += 1
            for static, new in zip(tensors(output), tensors(function()), strict=True):
                static.copy_(new)
            return output

        return replay


def tensors(output) -> list[torch.Tensor]:
    found = []
    for value in output if isinstance(output, tuple) else output.values():
        found += [value] if isinstance(value, torch.Tensor) else tensors(value or ())
    return found


@pytest.fixture
def recorder(monkeypatch) -> StandIn:
    """A stand-in for tensors on any device."""
    made = StandIn()
    monkeypatch.setattr(graphs, "recorder_of", lambda x: made)
    return made


@pytest.fixture
def native(recorder, monkeypatch) -> StandIn:
    """The same, for models that run natively."""
    monkeypatch.setattr(graphs, "StaticPacking", HostPacking)
    return recorder


@pytest.fixture
def warned(monkeypatch, caplog):
    """The warnings of the logger "fastconv", as if nothing had been warned of before."""
    monkeypatch.setattr(padding_free, "_warned", set())
    caplog.set_level("WARNING", logger="fastconv")

    def messages() -> list[str]:
        return [record.getMessage() for record in caplog.records if record.name == "fastconv"]

    return messages


def make(source: str, name: str, padding: str = "remove", **arguments) -> tuple[torch.nn.Module, torch.nn.Module]:
    """An accelerated model in fp64, and a copy with graphs."""
    model = fastconv.accelerate(build(source, name, **arguments).double(), padding=padding, backend="native")
    return model, fastconv.accelerate(copy.deepcopy(model), padding=padding, backend="native", graphs=True)


def inputs_of(family: str, kind: str = "ragged", seed: int = 0) -> dict[str, torch.Tensor]:
    return ids_of(family, 4, S, seed=seed) | {"attention_mask": mask_of(kind).long()}


def of_length(tokens: int, family: str = "Bert", seed: int = 0) -> dict[str, torch.Tensor]:
    """A batch of so many tokens, in rows of 8."""
    place = torch.arange(-(-tokens // 8) * 8).view(-1, 8)
    return ids_of(family, len(place), 8, seed=seed) | {"attention_mask": (place < tokens).long()}


def check(model, fast, inputs, **options) -> dict[str, torch.Tensor]:
    """What the model with graphs gives is what the other gives, which is returned."""
    with torch.no_grad():
        expected, actual = (tensors_of(each(**inputs, **options)) for each in (model, fast))
    assert_equal(actual, expected)
    return actual


def of(fast: torch.nn.Module) -> graphs.Graphs:
    return getattr(fast, "base_model", fast).fastconv_graphs


def test_bucket():
    found = [graphs.bucket(tokens) for tokens in range(1, 8193)]
    assert found[:64] == [64] * 64 and found[64] == 72 and found[-1] == 8192 and found == sorted(found)
    for tokens, size in enumerate(found, 1):
        assert tokens <= size <= max(64, 1.125 * tokens) and size % 8 == 0 and graphs.bucket(size) == size
    assert len(set(found)) == 57


@pytest.mark.parametrize(("source", "family"), MODELS)
def test_results(source, family, native):
    model, fast = make(source, family + "Model")
    for kind in MASKS:
        inputs = inputs_of(family, kind)
        check(model, fast, inputs)
        check(model, fast, inputs | {"attention_mask": Packing.from_mask(inputs["attention_mask"])})
    assert (native.recorded, native.replayed, len(of(fast))) == (1, 8, 1)
    for kind in MASKS:
        found = check(model, fast, inputs_of(family, kind, seed=3), output_hidden_states=True)
        assert "hidden_states.2" in found
    inputs.pop("attention_mask")
    check(model, fast, inputs)
    inputs.pop("token_type_ids")
    check(model, fast, inputs, return_dict=True)
    assert (native.recorded, native.replayed) == (3, 14)  # token types there are always
    with torch.no_grad():
        values = fast(**inputs, return_dict=False)
        expected = model(**inputs, return_dict=False)
    assert type(values) is tuple and len(values) == len(expected)
    assert_equal(dict(enumerate(values)), dict(enumerate(expected)))


@pytest.mark.parametrize(("source", "family"), MODELS)
def test_batches_without_padding_in_a_model_that_keeps_it(source, family, native, warned):
    model, fast = make(source, family + "Model", padding="keep")
    inputs = ids_of(family, 4, S)
    ones = torch.ones(4, S)
    for mask in (None, ones, ones.long(), ones.bool()):
        check(model, fast, inputs | {"attention_mask": mask}, output_hidden_states=True)
    assert (native.recorded, native.replayed) == (1, 4)
    for kind in MASKS:
        with torch.no_grad():
            given = inputs_of(family, kind)
            assert torch.equal(fast(**given)[0], model(**given)[0])
    assert native.replayed == 4 and warned() == []
    with pytest.raises(TypeError, match="is a Packing, which needs"):
        fast(**inputs, attention_mask=Packing.from_mask(ones))
    # More positions than there are: what the model says of it, which a GPU would not.
    with pytest.raises((ValueError, IndexError, RuntimeError)), torch.no_grad():
        fast(draw(1, 17))
    assert fast._whole({"input_ids": draw(1, 17)}) is None and fast._whole({"input_ids": draw(1, 16)}) is not None
    assert native.replayed == 4


@pytest.mark.parametrize("padding", ["keep", "remove"])
@pytest.mark.parametrize("head", ["ForMaskedLM", "ForSequenceClassification", "ForQuestionAnswering"])
@pytest.mark.parametrize(("source", "family"), MODELS)
def test_heads(source, family, head, padding, native):
    model, fast = make(source, family + head, padding=padding)
    keep = mask_of("right") | (padding == "keep")
    check(model, fast, ids_of(family, 4, S) | {"attention_mask": keep.long()} | labels_of(family + head, head, keep)[0])
    assert native.replayed == 1


@pytest.mark.parametrize(("source", "family"), MODELS)
def test_other_inputs(source, family, native):
    model, fast = make(source, family + "Model")
    inputs = inputs_of(family)
    check(model, fast, inputs)
    check(model, fast, inputs | {"input_ids": inputs["input_ids"].int()})
    check(model, fast, inputs | {"position_ids": draw(4, S, high=16)})
    assert native.recorded == 2  # of positions there are always some
    words = model.get_input_embeddings()(inputs.pop("input_ids")).detach()
    check(model, fast, inputs | {"inputs_embeds": words})
    assert native.recorded == 3
    if takes(model, "head_mask"):
        masks = torch.tensor([1.0, 0.0]).double(), torch.tensor([0.0, 0.5]).double()
        for mask in masks if family == "ConvBert" else (mask.repeat(2) for mask in masks):
            check(model, fast, inputs | {"inputs_embeds": words, "head_mask": mask})
        assert native.recorded == 4
    if family == "RoCBert":
        inputs.pop("input_shape_ids")
        check(model, fast, inputs | {"inputs_embeds": words})
        assert native.recorded == 5 - (not takes(model, "head_mask"))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_left_in_the_buffers_changes_no_bit(family, native):
    fast = make("reference", family + "Model")[1].float()
    inputs = inputs_of(family, "right")
    words = fast.get_input_embeddings()(inputs["input_ids"]).detach()
    embedded = {name: value for name, value in inputs.items() if name != "input_ids"} | {"inputs_embeds": words}
    with torch.no_grad():
        for given in (inputs, embedded):
            expected = fast(**given).last_hidden_state
            for graph in of(fast)._graphs.values():
                graph.packing._spans.random_(0, 64)
                for buffer in graph.inputs.values():
                    buffer.fill_(float("nan") if buffer.is_floating_point() else 10**6)
            assert torch.equal(fast(**given).last_hidden_state, expected)
            fast(**of_length(60, family))
            assert torch.equal(fast(**given).last_hidden_state, expected)
    assert native.recorded == 2


@pytest.mark.parametrize("padding", ["keep", "remove"])
def test_later_calls_change_no_result(padding, native):
    fast = make("reference", "BertForTokenClassification", padding=padding)[1]
    keep = torch.ones(4, S) if padding == "keep" else mask_of("right")
    with torch.no_grad():
        first = fast(**ids_of("Bert", 4, S), attention_mask=keep, output_hidden_states=True)
        before = [t.clone() for t in tensors(first)]
        second = fast(**ids_of("Bert", 4, S, seed=5), attention_mask=keep, output_hidden_states=True)
    assert native.recorded == 1
    for kept, now, other in zip(before, tensors(first), tensors(second), strict=True):
        assert torch.equal(kept, now) and not torch.equal(now, other)


def test_graphs_used_last_are_kept(native, monkeypatch):
    model, fast = make("reference", "BertModel", num_hidden_layers=1)
    monkeypatch.setattr(graphs.Graphs, "max_graphs", 2)
    for tokens, recorded in ((10, 1), (70, 2), (64, 2), (75, 3), (60, 3), (72, 4), (73, 5), (65, 5)):
        check(model, fast, of_length(tokens))
        assert (native.recorded, len(of(fast))) == (recorded, min(recorded, 2))
    assert [key[0] for key in of(fast)._graphs] == [80, 72]
    assert native.waited == 3  # each drop waits for what may run


def test_more_tokens_than_a_graph_is_for(native, monkeypatch, warned):
    monkeypatch.setattr(graphs.Graphs, "max_tokens", 72)
    for padding in ("keep", "remove"):
        model, fast = make("reference", "BertModel", padding=padding)
        for tokens in (72, 80):
            check(model, fast, of_length(tokens))
            inputs = of_length(tokens)
            inputs.pop("attention_mask")
            check(model, fast, inputs)
        assert len(of(fast)) == 1
    assert warned() == [] and native.replayed == 4


def test_what_a_graph_is_for(native):
    model, fast = make("reference", "BertModel")
    model, fast, inputs = model.float(), fast.float(), inputs_of("Bert")

    def run(recorded: int, **options) -> None:
        with torch.no_grad():
            for _ in range(2):
                expected, actual = (tensors_of(each(**inputs, **options)) for each in (model, fast))
                assert actual.keys() == expected.keys()
                for name, value in expected.items():
                    assert actual[name].dtype == value.dtype
                    torch.testing.assert_close(actual[name], value, rtol=1e-2, atol=1e-2)
        assert native.recorded == recorded

    run(1)
    run(2, output_hidden_states=True)
    with torch.autocast("cpu", torch.bfloat16):
        run(3)
    with torch.autocast("cpu", torch.float16):
        run(4)
    model.config.output_hidden_states = fast.config.output_hidden_states = True
    run(5)
    model.config.output_hidden_states = fast.config.output_hidden_states = False
    run(5)
    before, torch.backends.cuda.matmul.fp32_precision = torch.backends.cuda.matmul.fp32_precision, "tf32"
    try:
        run(6)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    model.config.return_dict = fast.config.return_dict = False
    with torch.no_grad():
        assert torch.equal(fast(**inputs)[0], fast(**inputs, return_dict=True)[0])
    assert native.recorded == 8


def test_modes_of_the_caller(native):
    model, fast = make("reference", "BertModel")
    inputs = inputs_of("Bert")
    with torch.inference_mode():
        first = fast(**inputs).last_hidden_state
    assert first.is_inference()
    check(model, fast, inputs)
    fast.requires_grad_(False)
    last = fast(**inputs).last_hidden_state  # with gradients on, and none to follow
    assert not last.is_inference() and torch.equal(last, first)
    with torch.inference_mode():
        assert torch.equal(fast(**inputs).last_hidden_state, first)
    assert native.recorded == 1 and native.replayed == 4


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_changed_in_place(family, dtype, native):
    model, fast = (each.float() for each in make("reference", family + "Model"))
    inputs = inputs_of(family)
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype is not None):
        before = fast(**inputs)[0]
        for p, q in zip(model.parameters(), fast.parameters(), strict=True):
            p.mul_(0.5)
            q.mul_(0.5)
        actual = fast(**inputs)[0]
        fast.load_state_dict(model.state_dict())
        assert torch.equal(fast(**inputs)[0], actual) and not torch.equal(actual, before)
        torch.testing.assert_close(actual, model(**inputs)[0], rtol=2e-2, atol=2e-2)
    assert native.recorded == 1


def moves():
    """Ways in which a model becomes another one."""

    def data(model):
        p = model.encoder.layer[1].output.dense.weight
        p.data = p.data.flip(0).clone()

    def assign(model):
        halves = {name: value / 2 for name, value in model.state_dict().items() if value.is_floating_point()}
        model.load_state_dict(halves, assign=True, strict=False)

    def parameter(model):
        model.encoder.layer[0].intermediate.dense.bias = torch.nn.Parameter(torch.ones(24).double())

    def module(model):
        dense = model.encoder.layer[0].output.dense
        model.encoder.layer[0].output.dense = torch.nn.Sequential(dense, torch.nn.Tanh()).eval()

    def module_without_tensors(model):
        model.encoder.layer[0].output.dense[1] = torch.nn.ReLU().eval()

    return [data, assign, parameter, module, module_without_tensors]


@pytest.mark.parametrize("move", moves(), ids=lambda move: move.__name__)
def test_a_model_that_became_another(move, native):
    model, fast = make("reference", "BertModel")
    inputs = inputs_of("Bert")
    for each in (model, fast) if move.__name__ == "module_without_tensors" else ():
        moves()[3](each)
    before = check(model, fast, inputs)
    check(model, fast, of_length(70))
    for each in (model, fast):
        move(each)
    after = check(model, fast, inputs)
    assert not torch.equal(after["last_hidden_state.0"], before["last_hidden_state.0"])
    assert native.recorded == 3 and len(of(fast)) == 1 and native.waited == 2
    check(model, fast, of_length(70))
    check(model.float(), fast.float(), inputs | {"inputs_embeds": None})
    assert native.recorded == 5 and len(of(fast)) == 1


def test_weights_of_another_dtype_in_the_same_memory(native):
    # As those may be that were away on another device.
    model, fast = (each.half() for each in make("reference", "BertModel"))
    inputs = inputs_of("Bert")
    with torch.no_grad():
        fast(**inputs)
        for p in (*model.parameters(), *fast.parameters()):
            values = p.bfloat16()
            p.data = p.data.view(torch.bfloat16)
            p.copy_(values)
        actual, expected = fast(**inputs)[0], model(**inputs)[0]
    assert actual.dtype == torch.bfloat16 and native.recorded == 2
    torch.testing.assert_close(actual, expected, rtol=0.1, atol=0.1)


def test_weights_that_are_packed_after_a_graph_was_recorded(native):
    # By the first call without a gradient, or by that after training elsewhere.
    fast = make("reference", "BertModel")[1]
    inputs = inputs_of("Bert")
    with torch.no_grad():
        expected = fast(**inputs)[0]
        q, k, v = (getattr(attention_of(fast), name) for name in ("query", "key", "value"))
        for layer in (q, k, v):
            layer.weight.data = layer.weight.detach().clone()
        assert torch.equal(fast(**inputs)[0], expected)
        assert k.weight.data_ptr() == q.weight.data_ptr() + q.weight.nbytes
        assert torch.equal(fast(**inputs)[0], expected)
    assert native.recorded == 2 and len(of(fast)) == 1


class Adapter(torch.nn.Module):
    """A layer beside a frozen one, as PEFT has it: its switches are attributes."""

    def __init__(self, layer: torch.nn.Linear) -> None:
        super().__init__()
        self.layer, self.down = layer, torch.nn.Linear(layer.in_features, 2, bias=False).double()
        self.up = torch.nn.Linear(2, layer.out_features, bias=False).double()
        self.scaling, self.active, self.count = {"default": 1.0}, ["default"], 0
        self.function = torch.tanh

    def forward(self, x):
        y = self.layer(x)
        for name in self.active:
            y = y + self.function(self.up(self.down(x))) * self.scaling[name]
        return y


@pytest.mark.parametrize(("source", "family"), [("reference", "ConvBert"), ("transformers", "Bert")])
def test_adapters(source, family, native):
    model, fast = make(source, family + "Model")
    for each in (model, fast):
        torch.manual_seed(0)
        attention_of(each).query = Adapter(attention_of(each).query).eval()
    inputs, seen = inputs_of(family), []

    def switched(recorded: int, **attributes) -> None:
        for each in (model, fast):
            vars(attention_of(each).query).update(copy.deepcopy(attributes))
        seen.append(check(model, fast, inputs)["last_hidden_state.0"])
        check(model, fast, inputs)
        assert native.recorded == recorded and all(not torch.equal(seen[-1], other) for other in seen[:-1])

    switched(1)
    switched(2, scaling={"default": 3.0})
    switched(3, active=["default", "default"])
    switched(4, function=torch.sin)
    switched(5, active=[])
    for each in (model, fast):
        attention_of(each).query.active.append("default")
    switched(6)
    with torch.no_grad():
        for each in (model, fast):
            attention_of(each).query.up.weight.mul_(2.0)
    switched(6)


def test_a_forward_that_changes_its_module(native, warned):
    class Counting(Adapter):
        def forward(self, x):
            self.count += 1
            return super().forward(x)

    model, fast = make("reference", "BertModel")
    for each in (model, fast):
        torch.manual_seed(0)
        attention_of(each).query = Counting(attention_of(each).query).eval()
    for tokens in (10, 20, 70):
        check(model, fast, of_length(tokens))
    calls = attention_of(fast).query.count
    check(model, fast, of_length(10))
    assert attention_of(fast).query.count == calls + 1 and native.replayed == 0
    assert warned() == ["BertModel runs without CUDA graphs: its forward changes its modules, which no graph would do"]


def test_several_threads(native):
    pairs = {family: make("reference", family + "Model") for family in FAMILIES}
    batches = [of_length(tokens, "RoCBert", seed=tokens) for tokens in (9, 40, 66, 71, 77)]
    found, wrong = {}, []
    with torch.no_grad():
        for family, (model, _) in pairs.items():
            for number, batch in enumerate(batches):
                batch = {name: value for name, value in batch.items() if takes(model, name)}
                found[family, number] = batch, model(**batch)[0]

    def work(start: int) -> None:
        with torch.no_grad():
            for i in range(15):
                case = FAMILIES[(start + i // 5) % 3], (start + i) % 5
                batch, expected = found[case]
                actual = pairs[case[0]][1](**batch)[0]
                if not torch.allclose(actual, expected, rtol=1e-9, atol=1e-9):
                    wrong.append(case)

    threads = [threading.Thread(target=work, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # Three buckets of three families, and no graph was recorded twice.
    assert wrong == [] and native.recorded == 9 and native.replayed == 60


def test_a_model_inside_a_model(native):
    model, fast = make("reference", "BertModel")
    inner_model, inner = make("reference", "ConvBertModel", padding="keep")
    words = draw(1, 5)

    class Knowing(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) + self.others[0](words)[0].mean((0, 1))

    for each, other in ((model, inner_model), (fast, inner)):
        dense = each.encoder.layer[0].output.dense
        dense.__class__, dense.others = Knowing, (other,)
    for tokens in (10, 20, 70):
        check(model, fast, of_length(tokens))
    assert len(of(fast)) == 2 and len(of(inner)) == 1


# Calls that run eagerly


def test_eager_on_a_cpu(warned):
    for padding in ("keep", "remove"):
        model, fast = make("reference", "BertModel", padding=padding)
        for tokens in (10, 64):
            check(model, fast, of_length(tokens))
        assert len(of(fast)) == 0
    where = f"{torch.device('cpu')}, with backend 'native'"
    assert warned() == [f"BertModel runs without CUDA graphs: they need a GPU and the kernels, got tensors on {where}"]


def train(fast):
    fast.train()


def train_a_part(fast):
    fast.encoder.layer[0].output.dropout.train()


def hook(fast):
    fast.encoder.layer[0].output.dense.register_forward_hook(lambda *args: None)


def pre_hook(fast):
    fast.embeddings.register_forward_pre_hook(lambda *args: None)


def own_forward(fast):
    fast.encoder.layer[0].output.dense.forward = fast.encoder.layer[0].output.dense.forward


def output_attentions(fast):
    fast.config.output_attentions = True


def decoder(fast):
    fast.config.is_decoder = True


def original_encoder(fast):
    fastconv.restore(fast.encoder)


@pytest.mark.parametrize("padding", ["keep", "remove"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (train, "it is in training mode"),
        (train_a_part, "a part of it is in training mode"),
        (hook, "there are hooks on its Linear"),
        (pre_hook, "there are hooks on its FastEmbeddings"),
        (own_forward, "there are hooks on its Linear"),
        (output_attentions, "the config asks for attentions"),
        (decoder, "the model is a decoder"),
        (original_encoder, "the forward of Encoder is not a fused one"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_eager_models(change, said, padding, native, warned):
    model, fast = make("reference", "BertModel", padding=padding)
    for each in (model, fast):
        change(each)
    for number in (1, 2):
        inputs = ids_of("Bert", number, S)
        with torch.no_grad():
            for mask in (None, torch.ones(number, S)):
                actual, expected = (each(**inputs, attention_mask=mask)[0] for each in (fast, model))
                assert torch.equal(actual, expected)
    messages = [message for message in warned() if "padding='remove'" not in message]
    assert messages == [f"BertModel runs without CUDA graphs: {said}"] and native.recorded == 0


def test_eager_with_gradients(native, warned):
    model, fast = make("reference", "BertModel")
    inputs = inputs_of("Bert")
    for _ in range(2):
        for each in (model, fast):
            each.zero_grad()
            each(**inputs).last_hidden_state.pow(3).sum().backward()
        for p, q in zip(model.parameters(), fast.parameters(), strict=True):
            assert p.grad is q.grad is None or torch.equal(p.grad, q.grad)
    words = torch.randn(4, S, 16, dtype=torch.float64, requires_grad=True)
    fast.requires_grad_(False)
    fast(inputs_embeds=words, attention_mask=inputs["attention_mask"])[0].sum().backward()
    assert words.grad is not None and native.recorded == 0
    assert len(warned()) == 1 and "gradients are recorded: call it under torch.no_grad()" in warned()[0]


def test_eager_with_hooks_on_all_modules(native, warned):
    model, fast = make("reference", "BertModel")
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *args: None)
    try:
        check(model, fast, inputs_of("Bert"))
    finally:
        handle.remove()
    assert native.recorded == 0 and "BertModel runs without CUDA graphs: there are hooks on all modules" in warned()
    fast.register_forward_hook(lambda *args: None)  # outside of the graph
    check(model, fast, inputs_of("Bert"))
    assert native.recorded == 1


def test_eager_natively(recorder, warned):
    # Natively attention splits by the lengths, of which a graph must hold none.
    model, fast = make("reference", "ConvBertModel")
    for tokens in (10, 20, 70):
        check(model, fast, of_length(tokens, "ConvBert"))
    assert recorder.recorded == 0 and len(of(fast)) == 0
    assert len(warned()) == 1 and "asks for the sequences' lengths" in warned()[0]


@pytest.mark.parametrize("padding", ["keep", "remove"])
def test_eager_where_operators_are_followed(padding, native, warned):
    model, fast = make("reference", "BertModel", padding=padding, num_hidden_layers=1)
    inputs = {"input_ids": draw(2, S)}
    with torch.no_grad():
        exported = torch.export.export(fast, (), inputs).module()
        assert_equal({"": exported(**inputs)[0]}, {"": model(**inputs)[0]})
        with FlopCounterMode(display=False) as counted:
            fast(**inputs)
    assert counted.get_total_flops() > 2 * 16 * 16 * 7 and native.recorded == 0 and warned() == []


@pytest.mark.parametrize(("source", "family"), MODELS)
def test_wrong_calls(source, family, native):
    model, fast = make(source, family + "Model")
    inputs = inputs_of(family)
    wrong = [
        inputs | {"input_ids": inputs["input_ids"] + 1000},
        inputs | {"input_ids": inputs["input_ids"].float()},
        inputs | {"inputs_embeds": torch.randn(4, S, 16).double()},
        inputs | {"attention_mask": torch.zeros(4, S)},
        inputs | {"attention_mask": mask_of("right")[:, :6]},
        {name: value for name, value in inputs.items() if name != "input_ids"},
        {"attention_mask": inputs["attention_mask"]},
    ]
    for given in wrong:
        with pytest.raises(Exception) as expected, torch.no_grad():
            model(**given)
        with pytest.raises(expected.type) as actual, torch.no_grad():
            fast(**given)
        assert str(actual.value) == str(expected.value)
    check(model, fast, inputs)
    assert native.recorded == 1


@pytest.mark.parametrize("padding", ["keep", "remove"])
def test_memory_that_runs_out(padding, native, warned):
    model, fast = make("reference", "BertModel", padding=padding)
    record, tried = native.record, []

    def fail(function):
        tried.append(1)
        if len(tried) in (2, 3):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return record(function)

    native.record = fail
    for tokens in (64, 80, 80, 88, 88, 64, 96):
        check(model, fast, of_length(tokens))
    assert len(tried) == 4 and native.recorded == 2 and native.replayed == 3
    assert warned() == [
        f"BertModel runs without CUDA graphs: no memory is left for one of {size} tokens" for size in (80, 88)
    ]


@pytest.mark.parametrize("padding", ["keep", "remove"])
def test_what_can_not_be_recorded(padding, native, warned, monkeypatch):
    model, fast = make("reference", "BertModel", padding=padding)
    tried = []

    def fail(function):
        tried.append(1)
        raise RuntimeError("operation not permitted when stream is capturing")

    native.record = fail
    # Eager is a batch without padding what it is without graphs: not packed.
    monkeypatch.setattr(padding_free._Whole, "unpack", None)
    for tokens in (64, 72, 64):
        check(model, fast, {"input_ids": of_length(tokens)["input_ids"]})
    assert tried == [1] and len(of(fast)) == 0
    (message,) = warned()
    assert message.endswith("something in it can't be recorded: operation not permitted when stream is capturing")


def test_a_weight_of_another_kind(native, warned):
    class Mine(torch.nn.Parameter):
        pass

    model, fast = make("reference", "BertModel")
    fast.pooler.dense.bias = Mine(fast.pooler.dense.bias.detach().clone())
    check(model, fast, inputs_of("Bert"))
    assert native.recorded == 0 and warned() == [
        "BertModel runs without CUDA graphs: where the data of a Mine lies is not known"
    ]


def test_arguments_that_no_graph_is_for(native, warned):
    if is_4():
        pytest.skip("transformers 4 returns the states of all layers")
    model, fast = make("transformers", "BertModel")
    with torch.no_grad():
        outputs = [each(**inputs_of("Bert"), output_hidden_states=[0, -1]) for each in (model, fast)]
    for one, other in zip(*(output.hidden_states for output in outputs), strict=True):
        assert one is other is None or torch.equal(one, other)
    assert native.recorded == 0 and "output_hidden_states is a list" in warned()[0]


# Copies, and the way back


@pytest.mark.parametrize(("source", "family"), MODELS)
def test_copies_have_graphs_of_their_own(source, family, native):
    model, fast = make(source, family + "ForSequenceClassification")
    inputs = inputs_of(family)
    check(model, fast, inputs)
    file = io.BytesIO()
    torch.save(fast, file)
    file.seek(0)
    for number, other in enumerate((copy.deepcopy(fast), torch.load(file, weights_only=False)), 2):
        assert len(of(other)) == 0 and of(other) is not of(fast)
        with torch.no_grad():
            other.classifier.weight.zero_() if hasattr(other.classifier, "weight") else None
            layer_of(other).output.dense.weight.mul_(2.0)
        with torch.no_grad():
            assert not torch.equal(other(**inputs).logits, model(**inputs).logits)
        check(model, fast, inputs)
        assert native.recorded == number and len(of(other)) == len(of(fast)) == 1


@pytest.mark.parametrize(("source", "family"), MODELS)
def test_restore(source, family, native):
    model, fast = make(source, family + "ForTokenClassification")
    inputs = inputs_of(family, "right")
    check(model, fast, inputs)
    held = of(fast)
    fastconv.accelerate(fast, padding="remove", backend="native")
    assert len(held) == 0 and native.waited == 1 and of(fast) is None
    check(model, fast, inputs)
    fastconv.accelerate(fast, graphs=True, backend="native")
    fastconv.accelerate(model, backend="native")
    check(model, fast, inputs)
    assert native.recorded == 1  # a batch with padding, which is kept now
    check(model, fast, ids_of(family, 4, S))
    held = of(fast)
    assert native.recorded == 2 and len(held) == 1
    fastconv.restore(fast)
    assert len(held) == 0 and not any(name.startswith("fastconv") for m in fast.modules() for name in vars(m))
    assert type(fast.base_model) is type(build(source, family + "Model"))
    check(model, fast, inputs)


def test_bad_arguments():
    model = build("reference", "ConvBertForMaskedLM")
    for wrong in (1, "yes", None):
        with pytest.raises(TypeError, match="graphs must be True or False, got"):
            fastconv.accelerate(model, graphs=wrong)
    for part in (model.convbert.encoder, model.convbert.embeddings):
        with pytest.raises(ValueError, match="graphs=True needs a BertModel, RoCBertModel or ConvBertModel, got"):
            fastconv.accelerate(part, graphs=True)


# By the kernels


@pytest.mark.parametrize(("family", "padding"), [("Bert", "keep"), ("ConvBert", "remove")])
def test_kernels(family, padding, recorder, device):
    pytest.importorskip("triton", reason="the kernels are in Triton")
    model = build("reference", family + "Model", num_hidden_layers=1)
    truth = fastconv.accelerate(copy.deepcopy(model).double(), padding=padding, backend="native")
    fast = fastconv.accelerate(model.to(device), padding=padding, graphs=True)
    keep = torch.tensor([[0, 1, 1, 1, 1], [1, 0, 0, 0, 0], [1, 1, 1, 0, 0]]) if padding == "remove" else None
    with fastconv.backend("triton"), torch.no_grad():
        for seed in (0, 5):
            inputs = ids_of(family, 3, 5, seed=seed) | ({} if keep is None else {"attention_mask": keep})
            with dispatch.module_backend("native"):
                expected = truth(**inputs).last_hidden_state
            actual = fast(**{name: value.to(device) for name, value in inputs.items()}).last_hidden_state
            assert (actual.cpu().double() - expected).abs().max() <= 5e-6 * expected.abs().max()
        assert recorder.recorded == 1 and recorder.replayed == 2
    # Another backend is another graph, which there is none of natively.
    with fastconv.backend("native"), torch.no_grad():
        fast(**{name: value.to(device) for name, value in inputs.items()})
    assert recorder.recorded == 1 and len(of(fast)) == 1


# The capture itself


class FakeCuda:
    """The parts of torch.cuda that a recorder calls, each of which only says that it was called."""

    def __init__(self) -> None:
        self.called: list[tuple] = []
        self.current = SimpleNamespace(wait_event=lambda event: self.called.append(("wait_event",)))

    def Stream(self, device, priority):  # noqa: N802
        return f"stream of {device}"

    def Event(self):  # noqa: N802
        return SimpleNamespace(
            record=lambda stream: self.called.append(("record",)), synchronize=lambda: self.called.append(("wait",))
        )

    def device(self, device):
        self.called.append(("device", device))
        return contextlib.nullcontext()

    def current_stream(self):
        return self.current

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def graph_pool_handle(self) -> str:
        return "a new pool"

    def end_allocate(self, device: int, pool: str) -> None:
        self.called.append(("end_allocate", device, pool))
        raise RuntimeError("not currently recording")

    def CUDAGraph(self):  # noqa: N802
        class Graph:
            def pool(graph) -> str:  # noqa: N805
                return "a pool"

            def replay(graph) -> None:  # noqa: N805
                self.called.append(("replay",))

        return Graph()

    @contextlib.contextmanager
    def graph(self, graph, **options):
        self.called.append(("capture", options))
        before, self.current = self.current, options["stream"]
        yield  # what fails leaves the stream where it is, as torch does
        self.current = before
        self.called.append(("end",))


def test_what_a_recorder_calls(monkeypatch):
    cuda = FakeCuda()
    fake = SimpleNamespace(cuda=cuda, zeros=torch.zeros, _C=SimpleNamespace(_cuda_endAllocateToPool=cuda.end_allocate))
    monkeypatch.setattr(recorder_module, "torch", fake)
    device = torch.device("cuda:1")
    recorder = recorder_module.Recorder(device)
    options = {"stream": "stream of cuda:1", "capture_error_mode": "thread_local"}

    def record(pool):
        def function():
            cuda.called.append(("function",))
            return "output"

        cuda.called.clear()
        replay = recorder.record(function)
        assert cuda.called == [("capture", {"pool": pool, **options}), ("function",), ("end",)]
        return replay

    with recorder.turn(), recorder.turn():  # a model that calls another has a turn in its own
        replays = [record("a new pool"), record("a pool")]
    cuda.called.clear()
    with pytest.raises(KeyError), recorder.turn():
        assert replays[1]() == "output"
        raise KeyError
    assert cuda.called == [("device", device), ("wait_event",), ("replay",), ("record",)]
    recorder.wait()
    assert cuda.called[-1] == ("wait",)
    # A pool goes with the last graph in it.
    del replays[0]
    replays.append(record("a pool"))
    replays.clear()
    record("a new pool")


@pytest.mark.parametrize("error", [RuntimeError, torch.OutOfMemoryError, KeyboardInterrupt])
def test_a_recorder_after_a_capture_that_failed(error, monkeypatch):
    cuda = FakeCuda()
    made = []
    fake = SimpleNamespace(
        cuda=cuda,
        zeros=lambda *args, device: made.append(device),
        _C=SimpleNamespace(_cuda_endAllocateToPool=cuda.end_allocate),
    )
    monkeypatch.setattr(recorder_module, "torch", fake)
    device = torch.device("cuda:1")
    recorder, stream = recorder_module.Recorder(device), cuda.current

    def fail():
        raise error("of the capture")

    with pytest.raises(error, match="of the capture"):
        recorder.record(fail)
    assert cuda.current is stream
    pools = [called[1]["pool"] for called in cuda.called if called[0] == "capture"]
    # A capture that ends well, of something: torch warns of an empty one.
    assert pools == ["a new pool", None] and cuda.called[-1] == ("end",) and made == [device]
    assert ("end_allocate", 1, "a new pool") in cuda.called
    assert len(recorder._live) == 0


@pytest.fixture
def cuda(device):
    """Small accelerated models on the GPU, without graphs and with."""

    def made(family: str, padding: str = "remove", dtype: torch.dtype = torch.float32):
        model = build("reference", family + "Model", hidden_size=64, intermediate_size=128).to(device, dtype)
        fast = copy.deepcopy(model)
        return fastconv.accelerate(model, padding=padding), fastconv.accelerate(fast, padding=padding, graphs=True)

    return made


def on_cuda(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.cuda() for name, value in inputs.items()}


def assert_near(actual, expected) -> None:
    for one, other in zip(tensors(actual), tensors(expected), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2 if one.dtype == torch.bfloat16 else 1e-4)


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("padding", ["keep", "remove"])
@pytest.mark.parametrize("family", FAMILIES)
def test_cuda_replays(family, padding, dtype, cuda, warned):
    model, fast = cuda(family, padding, dtype)
    with torch.inference_mode():
        for tokens in (10, 64, 70, 8, 200, 72):
            tokens = -(-tokens // 8) * 8 if padding == "keep" else tokens
            inputs = on_cuda(of_length(tokens, family, seed=tokens))
            assert_near(fast(**inputs, output_hidden_states=True), model(**inputs, output_hidden_states=True))
        for p, q in zip(model.parameters(), fast.parameters(), strict=True):
            p.mul_(0.5)
            q.mul_(0.5)
        assert_near(fast(**inputs, output_hidden_states=True), model(**inputs, output_hidden_states=True))
    assert len(of(fast)) == 3 and warned() == []


@needs_cuda
@pytest.mark.parametrize("family", FAMILIES)
def test_cuda_waits_for_nothing(family, cuda):
    fast = cuda(family)[1]
    inputs = on_cuda(of_length(60, family))
    mask = Packing.from_mask(inputs.pop("attention_mask"))
    with torch.no_grad():
        fast(**inputs, attention_mask=mask)
        fast(**inputs)
        torch.cuda.set_sync_debug_mode("error")
        try:
            fast(**inputs, attention_mask=mask)
            fast(**inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@needs_cuda
def test_cuda_streams_and_threads(cuda):
    pairs = [cuda("Bert"), cuda("ConvBert")]
    cases = [(pair, on_cuda(of_length(tokens, seed=tokens))) for pair in pairs for tokens in (9, 64, 71, 120)]
    with torch.no_grad():
        expected = [model(**inputs)[0] for (model, _), inputs in cases]
    torch.cuda.synchronize()
    wrong = []

    def work(start: int) -> None:
        streams = [torch.cuda.Stream() for _ in range(3)]
        found = []
        with torch.no_grad():
            for i in range(40):
                number = (start + i) % len(cases)
                with torch.cuda.stream(streams[i % 3]):
                    (_, fast), inputs = cases[number]
                    found.append((number, fast(**inputs)[0]))
        torch.cuda.synchronize()
        wrong.extend(number for number, states in found if not torch.allclose(states, expected[number], atol=1e-3))

    threads = [threading.Thread(target=work, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@needs_cuda
def test_cuda_memory_is_bounded(cuda, monkeypatch):
    monkeypatch.setattr(graphs.Graphs, "max_graphs", 3)
    model, fast = cuda("Bert")
    used = []
    with torch.no_grad():
        for _ in range(3):
            for tokens in range(64, 512, 32):
                inputs = on_cuda(of_length(tokens))
                assert_near(fast(**inputs), model(**inputs))
            # Weights that lie elsewhere: every graph goes, and their memory with them.
            fast.load_state_dict({name: value.clone() for name, value in fast.state_dict().items()}, assign=True)
            torch.cuda.synchronize()
            used.append(torch.cuda.memory_allocated())
    assert len(of(fast)) <= 3 and used[2] <= used[1] * 1.01
    fastconv.restore(fast)
    assert_near(fast(**inputs), model(**inputs))


@needs_cuda
def test_cuda_what_can_not_be_recorded(cuda, warned):
    class Waiting(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) if x.abs().sum().item() >= 0 else x

    other, recorded = cuda("Bert")
    model, fast = cuda("Bert")
    for each in (model, fast):
        each.encoder.layer[0].output.dense.__class__ = Waiting
    inputs = on_cuda(of_length(60))
    stream = torch.cuda.current_stream()
    with torch.no_grad():
        assert_near(recorded(**inputs), other(**inputs))  # a graph whose pool the next capture shares
        for _ in range(2):
            assert_near(fast(**inputs), model(**inputs))
    assert len(of(fast)) == 0 and len(warned()) == 1 and "can't be recorded" in warned()[0]
    # Nothing of it is left: neither the stream, nor the generator, nor the pool, which the next capture shares.
    assert torch.cuda.current_stream() == stream
    assert torch.nn.functional.dropout(torch.ones(1000, device="cuda")).sum() > 0
    inputs = on_cuda(of_length(70))
    with torch.no_grad():
        assert_near(recorded(**inputs), other(**inputs))
    assert len(of(recorded)) == 2
