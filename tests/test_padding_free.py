"""padding="remove": BERT and RoCBert give the tokens what they give on the padded batch, ConvBERT what it gives each
sequence alone, and padding gets zeros; for this library's models and those of transformers, native and by kernels.
"""

from __future__ import annotations

import copy
import importlib.util
import inspect
import threading

import pytest
import torch
from model_cases import NAMES, family_of, hypothesis, st
from model_runs import assert_equal, largest
from padded_batches import MASKS, S, draw, ids_of, labels_of, mask_of
from swap_models import FAMILIES, VOCABULARY, build, is_4, takes
from tolerance import assert_2x

import fastconv
from fastconv import Packing
from fastconv.nn import padding_free

SOURCES = ("reference", "fastconv", "transformers")
MODELS = [(source, family) for source in SOURCES for family in FAMILIES]
PLAIN = [model for model in MODELS if model[0] != "fastconv"]

Tensors = dict[str, torch.Tensor]


def make(source: str, name: str, **arguments) -> torch.nn.Module:
    """A model with random weights in fp64, in eval mode; those of fastconv are accelerated by themselves."""
    model = build("transformers" if source == "transformers" else "reference", name, **arguments)
    if source == "fastconv":
        own_class = getattr(fastconv, name)
        own = own_class(own_class.config_class.from_dict(model.config.to_dict()))
        own.load_state_dict(model.state_dict())
        model = own.eval()
    return model.double()


def removing(model: torch.nn.Module, backend: str = "native") -> torch.nn.Module:
    """A copy of the model that removes padding."""
    return fastconv.accelerate(copy.deepcopy(model), padding="remove", backend=backend)


def pair(source: str, name: str, **arguments) -> tuple[torch.nn.Module, torch.nn.Module]:
    model = make(source, name, **arguments)
    if source == "fastconv":
        fastconv.accelerate(model, backend="native")
    return model, removing(model)


def promised(family: str, model: torch.nn.Module, inputs: Tensors, keep: torch.Tensor, **options) -> Tensors:
    """What a model without padding has to give, by one that keeps it: hidden states, and what the pooler makes of each
    row's first token.
    """
    if family != "ConvBert":
        output = model(**inputs, attention_mask=keep.long(), **options)
        found = {"last": output.last_hidden_state} | named(output)
        found = {name: value.masked_fill(~keep[..., None], 0.0) for name, value in found.items()}
        first = keep.int().argmax(1)[:, None, None]
        return found | {"pooled": model.pooler(found["last"].take_along_dim(first, 1))}
    rows = [
        {name: value.expand(keep.shape[0], *value.shape[1:])[row : row + 1, tokens] for name, value in inputs.items()}
        for row, tokens in enumerate(keep)
    ]
    outputs = [model(**row, **options) if tokens.any() else None for row, tokens in zip(rows, keep, strict=True)]
    found: Tensors = {}
    for row, output in enumerate(outputs):
        if output is None:
            continue
        for name, value in ({"last": output.last_hidden_state} | named(output)).items():
            padded = found.get(name, value.new_zeros(*keep.shape, value.shape[-1]))
            index = torch.zeros_like(keep)
            index[row] = keep[row]
            found[name] = padded.masked_scatter(index[..., None], value)
    return found


def named(output) -> Tensors:
    return {f"hidden {i}": states for i, states in enumerate(getattr(output, "hidden_states", None) or ())}


def found_in(output) -> Tensors:
    pooled = getattr(output, "pooler_output", None)
    found = {"last": output.last_hidden_state} | named(output)
    return found if pooled is None else found | {"pooled": pooled}


def check(family, model, fast, inputs, keep, mask=None, **options) -> None:
    with torch.no_grad():
        output = fast(**inputs, attention_mask=keep.long() if mask is None else mask, **options)
        assert_equal(found_in(output), promised(family, model, inputs, keep, **options))
    assert not output.last_hidden_state[~keep].any()


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize(("source", "family"), MODELS)
def test_results(source, family, kind):
    model, fast = pair(source, family + "Model")
    keep, inputs = mask_of(kind), ids_of(family, 4, S)
    masks = (keep, keep.long(), keep.int(), keep.float(), keep.double(), Packing.from_mask(keep))
    for mask in masks:
        check(family, model, fast, inputs, keep, mask, output_hidden_states=True)
    if kind == "right" and family != "ConvBert":
        kept = model(**inputs, attention_mask=keep.long())
        assert_equal({"pooled": fast(**inputs, attention_mask=keep).pooler_output}, {"pooled": kept.pooler_output})
    # Without token types, and without a mask.
    inputs.pop("token_type_ids")
    check(family, model, fast, inputs, keep)
    assert_equal({"last": fast(**inputs)[0]}, {"last": model(**inputs)[0]})


@pytest.mark.parametrize("attention", ["sdpa", "fastconv"])
@pytest.mark.parametrize("family", ["Bert", "RoCBert"])
def test_other_attention_of_transformers(family, attention):
    if attention == "sdpa" and family == "RoCBert" and is_4():
        pytest.skip("RoCBert of transformers 4 has no sdpa")
    if attention == "fastconv":
        if is_4():
            pytest.skip("transformers 4 takes no attention of others in these models")
        fastconv.register_attention()
    model, fast = pair("transformers", family + "Model", attn_implementation=attention)
    with fastconv.backend("native"):
        for kind in ("right", "ragged"):
            check(family, model, fast, ids_of(family, 4, S), mask_of(kind), output_hidden_states=True)


@pytest.mark.parametrize(("source", "family"), MODELS)
def test_rows_of_products_on_a_cpu(source, family):
    model, fast = pair(source, family + "Model")
    widths = []
    fast.encoder.register_forward_pre_hook(lambda _, given: widths.append(given[0].shape[1]))
    for tokens in range(S - 4, S + 5):
        keep = torch.arange(S) < torch.tensor([S - 4, tokens - (S - 4)])[:, None]
        check(family, model, fast, ids_of(family, 2, S), keep, output_hidden_states=True)
        embeds = {"inputs_embeds": torch.randn(2, S, model.config.hidden_size, dtype=torch.float64)}
        if family == "Bert":
            check(family, model, fast, embeds, keep)
    assert set(widths) == {-(-tokens // 8) * 8 for tokens in range(S - 4, S + 5)}


def test_several_sequences_in_a_row():
    model, fast = pair("reference", "BertModel")
    inputs = {"input_ids": draw(3, S)}
    places = torch.tensor([3, 4, 0, 1, 2, 15, 16, 17])  # the second row has none
    packing = Packing(torch.tensor([0, 2, 5, 8]), indices=places, padded_shape=(3, S))
    with torch.no_grad():
        output = fast(**inputs, attention_mask=packing)
        assert torch.equal(output.pooler_output, model.pooler(output.last_hidden_state[[0, 1, 2], [0, 0, 1], None]))
    assert not output.last_hidden_state[1].any() and output.last_hidden_state[0, 0].any()


@pytest.mark.parametrize(("source", "family"), MODELS)
def test_tuples(source, family):
    model, fast = pair(source, family + "Model")
    inputs = ids_of(family, 4, S) | {"attention_mask": mask_of("right").long()}
    for options in ({}, {"output_hidden_states": True}):
        output, values = fast(**inputs, **options), fast(**inputs, **options, return_dict=False)
        assert type(values) is tuple and type(output) is type(model(**inputs, **options))
        kept = model(**inputs, **options, return_dict=False)
        assert [type(value) for value in values] == [type(value) for value in kept]
        for one, other in zip(values, output.to_tuple(), strict=True):
            pairs = zip(one, other, strict=True) if isinstance(one, tuple) else [(one, other)]
            assert all(torch.equal(a, b) for a, b in pairs)
    fast.config.return_dict = False
    assert type(fast(**inputs)) is tuple


@pytest.mark.parametrize("kind", ["left", "ragged"])
@pytest.mark.parametrize(("source", "family"), MODELS)
def test_given_positions_and_embeddings(source, family, kind):
    model, fast = pair(source, family + "Model")
    keep, inputs = mask_of(kind), ids_of(family, 4, S)
    positions = draw(4, S, high=16)
    check(family, model, fast, inputs | {"position_ids": positions}, keep)
    check(family, model, fast, inputs | {"position_ids": positions[:1]}, keep)
    words = model.get_input_embeddings()(inputs.pop("input_ids")).detach()
    check(family, model, fast, inputs | {"inputs_embeds": words}, keep)
    if takes(model, "head_mask"):
        for head_mask in (torch.tensor([1.0, 0.0]).double(), torch.tensor([[0.0, 1.0], [1.0, 0.0]]).double()):
            head_mask = head_mask if family == "ConvBert" else head_mask.repeat_interleave(2, -1)
            check(family, model, fast, inputs | {"inputs_embeds": words}, keep, head_mask=head_mask)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize(("source", "family"), MODELS)
def test_padding_changes_no_bit(source, family, kind):
    fast = pair(source, family + "Model")[1].float()
    keep, inputs, others = mask_of(kind), ids_of(family, 4, S), ids_of(family, 4, S, seed=9)
    changed = {name: torch.where(keep, inputs[name], others[name]) for name in inputs}
    out_of_range = {name: ids.masked_fill(~keep, -1) for name, ids in inputs.items()}
    with torch.no_grad():
        expected = found_in(fast(**inputs, attention_mask=keep, output_hidden_states=True))
        for ids in (changed, out_of_range):
            assert_same_bits(found_in(fast(**ids, attention_mask=keep, output_hidden_states=True)), expected)
        words = fast.get_input_embeddings()(inputs.pop("input_ids"))
        for value in (0.0, 1e30, float("nan"), float("inf")):
            embeds = words.masked_fill(~keep[..., None], value)
            output = fast(**inputs, inputs_embeds=embeds, attention_mask=keep, output_hidden_states=True)
            assert_same_bits(found_in(output), expected)


def assert_same_bits(actual: Tensors, expected: Tensors) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name


@pytest.mark.parametrize(("source", "family"), MODELS)
def test_other_sequences_change_nothing(source, family):
    fast = pair(source, family + "Model")[1]
    keep, inputs = mask_of("ragged"), ids_of(family, 4, S)
    with torch.no_grad():
        expected = fast(**inputs, attention_mask=keep).last_hidden_state
        others = {name: torch.cat((ids[:1], ids_of(family, 5, S, seed=7)[name])) for name, ids in inputs.items()}
        beside = torch.cat((keep[:1], draw(5, 1, high=2).bool() | (torch.arange(S) < 3)))
        assert_equal({"": fast(**others, attention_mask=beside)[0][:1]}, {"": expected[:1]})
        order = torch.tensor([2, 0, 3, 1])
        permuted = fast(**{name: ids[order] for name, ids in inputs.items()}, attention_mask=keep[order])
    assert_equal({"": permuted[0]}, {"": expected[order]})


def over_random_masks(check) -> None:
    """Call check(keep, random) with masks (B, S) of up to six rows, whose tokens stand anywhere, on either side."""

    @hypothesis.settings(max_examples=25, derandomize=True, deadline=None, database=None)
    @hypothesis.given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=6), st.randoms())
    def walk(rows, random):
        place = torch.arange(max(1, *(first + length for first, length in rows)))[:16]
        keep = torch.stack([(place >= first) & (place < first + length) for first, length in rows])
        hypothesis.assume(keep.any())
        check(keep, random)

    walk()


@pytest.mark.parametrize("family", FAMILIES)
def test_random_lengths(family):
    """Each sequence has what it has alone, at its place of the batch, and takes it along to another row.

    Up to rounding: a product's blocks take a row that stands elsewhere in another order.
    """
    model, fast = pair("reference", family + "Model")

    def walk(keep, random):
        inputs = ids_of(family, *keep.shape)
        check(family, model, fast, inputs, keep)
        order = list(range(len(keep)))
        random.shuffle(order)
        with torch.no_grad():
            expected = fast(**inputs, attention_mask=keep).last_hidden_state
            if family != "ConvBert":  # whose sequences have no other positions than alone
                inputs["position_ids"] = torch.arange(keep.shape[1]).expand(keep.shape)
            alone = promised("ConvBert", model, inputs, keep)["last"]
            permuted = fast(**{name: ids[order] for name, ids in inputs.items()}, attention_mask=keep[order])
        assert_equal({"": expected}, {"": alone})
        assert_equal({"": permuted.last_hidden_state}, {"": expected[order]})

    over_random_masks(walk)


@pytest.mark.parametrize("family", FAMILIES)
def test_random_padding_changes_no_bit(family):
    """Neither of an output nor of a gradient; ids that no table has are as good as others."""
    fast = pair("reference", family + "Model")[1].float().train()

    def walk(keep, random):
        inputs, found = ids_of(family, *keep.shape), []
        for high in (1, VOCABULARY, 10**6):
            others = draw(*keep.shape, high=high, seed=random.randrange(99))
            given = {name: torch.where(keep, ids, others) for name, ids in inputs.items()}
            output = found_in(fast(**given, attention_mask=keep, output_hidden_states=True))
            found.append(output | gradients(fast, output, keep))
        for actual in found[1:]:
            assert_same_bits(actual, found[0])

    over_random_masks(walk)


def gradients(model: torch.nn.Module, found: Tensors, keep: torch.Tensor, *others: torch.Tensor) -> Tensors:
    """Of a random sum of the tokens' states, for every parameter and for the others."""
    states = found["last"]
    weights = torch.randn(states.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    total = (states * weights.to(states.dtype)).masked_fill(~keep[..., None], 0.0).sum()
    if "pooled" in found:
        total = total + found["pooled"].pow(2).sum()
    names, parameters = zip(*model.named_parameters(), strict=True)
    made = torch.autograd.grad(total, (*parameters, *others), allow_unused=True)
    names += tuple(f"input {i}" for i in range(len(others)))
    return {name: gradient for name, gradient in zip(names, made, strict=True) if gradient is not None}


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize(("source", "family"), MODELS)
def test_gradients(source, family, kind):
    model, fast = (each.train() for each in pair(source, family + "Model"))
    keep, inputs = mask_of(kind), ids_of(family, 4, S)
    words = model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()
    embedded = {name: ids for name, ids in inputs.items() if name != "input_ids"} | {"inputs_embeds": words}
    for given, others in ((inputs, ()), (embedded, (words,))):
        expected = gradients(model, promised(family, model, given, keep), keep, *others)
        actual = gradients(fast, found_in(fast(**given, attention_mask=keep)), keep, *others)
        assert_equal(actual, expected, floor=largest(expected))
    assert not actual["input 0"][~keep].any()


@pytest.mark.parametrize(("source", "family"), PLAIN)
def test_dropout(source, family):
    settings = {"hidden_dropout_prob": 0.4, "attention_probs_dropout_prob": 0.4}
    fast = pair(source, family + "Model", **settings)[1].train()
    keep, inputs = mask_of("ragged"), ids_of(family, 4, S)
    first, second = (fast(**inputs, attention_mask=keep)[0] for _ in range(2))
    assert not first[~keep].any() and not torch.equal(first, second)
    first.pow(2).sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in fast.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("source", "family"), PLAIN)
def test_half_precision(source, family, dtype):
    model, fast = pair(source, family + "Model")
    keep, inputs = mask_of("ragged"), ids_of(family, 4, S)
    with torch.no_grad():
        truth = promised(family, model, inputs, keep)["last"]
        own = promised(family, model.to(dtype), inputs, keep)["last"]
        assert_2x("half", fast.to(dtype)(**inputs, attention_mask=keep)[0], own, truth)
        model, fast = model.float(), fast.float()
        with torch.autocast("cpu", dtype):
            own = promised(family, model, inputs, keep)["last"]
            out = fast(**inputs, attention_mask=keep)[0]
        assert_2x("autocast", out, own, truth, rounding=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize(("source", "family"), MODELS)
def test_gradient_checkpointing(source, family, reentrant):
    fast = pair(source, family + "Model")[1].train()
    keep, inputs = mask_of("ragged"), ids_of(family, 4, S)
    words = fast.get_input_embeddings()(inputs.pop("input_ids")).detach().requires_grad_()
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            fast.gradient_checkpointing_enable({"use_reentrant": reentrant})
        # torch.autograd.grad can't go through a reentrant checkpoint.
        fast.zero_grad()
        words.grad = None
        output = fast(**inputs, inputs_embeds=words, attention_mask=keep)
        output.last_hidden_state.pow(3).sum().backward()
        parameters = {name: p.grad.clone() for name, p in fast.named_parameters() if p.grad is not None}
        found.append(parameters | {"words": words.grad.clone(), "last": output.last_hidden_state.detach()})
    assert_equal(found[1], found[0], floor=1e-3 * largest(found[0]))


HEAD_NAMES = [name for name in NAMES if not name.endswith("Model") or "LMHead" in name]


@pytest.mark.parametrize("kind", [None, "first", "last", "mean", "cls_index"])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("source", SOURCES)
def test_summaries_of_convbert(source, side, kind):
    head, settings = "ForSequenceClassification", {}
    if kind is not None:
        head, settings = "ForMultipleChoice", {"summary_type": kind}
    model, fast = pair(source, "ConvBert" + head, **settings)
    keep, ids = mask_of(side), draw(4, S)

    def logits(each, ids, **options):
        options = {name: value[:, None] if kind else value for name, value in options.items()}
        with torch.no_grad():
            return each(ids[:, None] if kind else ids, **options).logits

    alone = torch.cat([logits(model, row[tokens][None]) for row, tokens in zip(ids, keep, strict=True)])
    assert_equal({"": logits(fast, ids, attention_mask=keep)}, {"": alone})
    fastconv.accelerate(fast, backend="native")
    mask = keep.long()
    assert_equal({"": logits(fast, ids, attention_mask=mask)}, {"": logits(model, ids, attention_mask=mask)})
    if kind == "cls_index":
        states, index = torch.randn(4, S, 16).double(), torch.tensor([0, 3, 6, 2])
        expected = model.sequence_summary(states, index)
        for padding in ("keep", "remove"):
            fastconv.accelerate(fast, padding=padding)
            assert torch.equal(fast.sequence_summary(states, index), expected)


@pytest.mark.parametrize("name", HEAD_NAMES)
@pytest.mark.parametrize("source", SOURCES)
def test_heads(source, name):
    family, head = family_of(name), name.removeprefix(family_of(name))
    model, fast = pair(source, name)
    keep, inputs = mask_of("right"), ids_of(family, 4, S)
    labels, of_tokens = labels_of(name, head, keep)
    if head == "ForMultipleChoice":
        inputs, choices = {name: ids.view(2, 2, S) for name, ids in inputs.items()}, keep.view(2, 2, S)
    else:
        choices = keep
    hidden = {"output_hidden_states": True}
    with torch.no_grad():
        given = inputs | {"attention_mask": choices}
        actual = fast(**given, **labels, **hidden)
        if family == "ConvBert":
            rows = [
                {name: ids.view(4, S)[i : i + 1, : n.sum()] for name, ids in inputs.items()} for i, n in enumerate(keep)
            ]
            alone = [
                model(**{k: v[:, None] if head == "ForMultipleChoice" else v for k, v in row.items()}) for row in rows
            ]
            for name in ("logits", "start_logits", "end_logits"):
                if name not in actual:
                    continue
                of_rows = [output[name] for output in alone]
                if of_tokens:
                    got = [row[: n.sum()] for row, n in zip(actual[name], keep, strict=True)]
                    of_rows = [row[0] for row in of_rows]
                else:
                    got, of_rows = [actual[name].flatten()], [torch.cat(of_rows).flatten()]
                assert_equal(dict(enumerate(got)), dict(enumerate(of_rows)))
        else:
            given["attention_mask"] = choices.long()
            expected = model(**given, **labels, **hidden)
            assert actual.keys() == expected.keys()
            for name, value in expected.items():
                if "logits" in name:
                    tokens = keep if value.shape[:2] == keep.shape else ...
                    assert_equal({name: actual[name][tokens]}, {name: value[tokens]})
            if head != "ForQuestionAnswering":  # where padding may be the answer
                assert_equal({"loss": actual["loss"]}, {"loss": expected["loss"]})
        assert actual["loss"].isfinite() and len(actual["hidden_states"]) == 3
        values = fast(**given, **labels, **hidden, return_dict=False)
        assert len(values) == len(actual) and len(values[-1]) == 3
        assert all(torch.equal(a, b) for a, b in zip(values[-1], actual["hidden_states"], strict=True))


@pytest.fixture
def warnings(monkeypatch, caplog):
    """What the logger "fastconv" warns of, as if nothing had been warned of before."""
    monkeypatch.setattr(padding_free, "_warned", set())
    caplog.set_level("WARNING", logger="fastconv")
    return caplog


def forget(warnings) -> None:
    padding_free._warned.clear()
    warnings.clear()


def assert_keeps(model, fast, inputs: Tensors, warnings, said: str, **options) -> None:
    """What the model gives, on the padding too, with one warning, whatever the batch."""
    with torch.no_grad():
        for batch in (inputs, {name: value.flip(0) for name, value in inputs.items()}):
            expected, actual = model(**batch, **options), fast(**batch, **options)
            assert_equal(tensors(actual), tensors(expected))
    messages = [record.getMessage() for record in warnings.records if record.name == "fastconv"]
    assert len(messages) == 1 and said in messages[0], messages


def tensors(output) -> Tensors:
    found = {}
    for name, value in output.items():
        for i, each in enumerate(value if isinstance(value, tuple) else (value,)):
            found |= {f"{name} {i}": each} if isinstance(each, torch.Tensor) else {}
    return found


@pytest.mark.parametrize(("source", "family"), PLAIN)
def test_calls_that_keep_the_padding(source, family, warnings):
    model, fast = pair(source, family + "Model")
    keep = mask_of("right")
    inputs = ids_of(family, 4, S) | {"attention_mask": keep.long()}
    assert_keeps(model, fast, inputs, warnings, "output_attentions is given", output_attentions=True)
    with pytest.raises(
        ValueError, match="needs its padding, and a mask in the place of the Packing: output_attentions"
    ):
        fast(**inputs | {"attention_mask": Packing.from_mask(keep)}, output_attentions=True)
    forget(warnings)
    square = inputs | {"attention_mask": keep[:, None].expand(4, S, S).long()}
    if source == "transformers" and not is_4():
        square["attention_mask"] = (1.0 - square["attention_mask"].double())[:, None] * -1e30
    assert_keeps(model, fast, square, warnings, "attention_mask is not (B, S)")
    forget(warnings)
    if source == "transformers" and is_4():
        of_each = torch.ones(2, 4, 2 if family == "ConvBert" else 4, S, S).double()
        of_each[1, 2, 1] = 0.0
        with torch.no_grad():
            expected, actual = (each(**inputs, head_mask=of_each).last_hidden_state for each in (model, fast))
        assert_equal({"": actual}, {"": expected})
        assert "head_mask has more than two dimensions" in warnings.text
        forget(warnings)
    elif source == "transformers" and family != "ConvBert":
        assert_keeps(model, fast, inputs, warnings, "head_mask is given", head_mask=torch.ones(4))
        forget(warnings)
    layer = fast.encoder.layer[1]
    handle = layer.attention.self.register_forward_hook(lambda module, args, output: None)
    assert_keeps(model, fast, inputs, warnings, f"the attention of a {type(layer).__name__} is not a fused one")
    handle.remove()
    forget(warnings)
    with torch.no_grad():
        assert not fast(**inputs).last_hidden_state[~keep].any()
    fastconv.restore(fast.encoder.layer[0])
    assert_keeps(model, fast, inputs, warnings, "is not a fused one")
    forget(warnings)
    fastconv.restore(fast.encoder)
    assert_keeps(model, fast, inputs, warnings, "Encoder is not a fused one")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"output_attentions": True}, "the config asks for attentions"),
        ({"chunk_size_feed_forward": 1}, "chunk_size_feed_forward is not 0"),
        ({"position_embedding_type": "relative_key_query"}, "positions are relative"),
        ({"is_decoder": True}, "is a decoder"),
    ],
)
@pytest.mark.parametrize(("source", "family"), PLAIN)
def test_configs_that_keep_the_padding(source, family, config, said, warnings):
    if "position_embedding_type" in config and (family == "ConvBert" or (source == "transformers" and not is_4())):
        pytest.skip("knows absolute positions only")
    model, fast = pair(source, family + "Model", **config)
    inputs = ids_of(family, 4, S) | {"attention_mask": mask_of("right").long()}
    assert_keeps(model, fast, inputs, warnings, said)


@pytest.mark.parametrize("source", ["reference", "transformers"])
def test_states_of_an_encoder_keep_the_padding(source, warnings):
    arguments = {"add_cross_attention": True, "is_decoder": True, "use_cache": False}
    fast = pair(source, "BertModel", **arguments)[1]
    fast.config.is_decoder = False
    inputs = {"input_ids": draw(4, S), "attention_mask": mask_of("right").long()}
    with torch.no_grad():
        fast(**inputs, encoder_hidden_states=torch.randn(4, 3, 16).double())
    assert "encoder_hidden_states is given" in warnings.text


@pytest.mark.parametrize(("source", "family"), PLAIN)
def test_padding_between_tokens(source, family, warnings):
    model, fast = pair(source, family + "Model")
    keep = mask_of("right")
    keep[0, 3] = False
    inputs = ids_of(family, 4, S) | {"attention_mask": keep.long()}
    if family != "ConvBert":
        assert_keeps(model, fast, inputs, warnings, "the tokens of a row must stand together")
        return
    with pytest.raises(ValueError, match=r"must stand together, got padding between them in rows \[0\]"):
        fast(**inputs)


@pytest.mark.parametrize(("source", "family"), MODELS)
def test_bad_input(source, family):
    model, fast = pair(source, family + "Model")
    inputs, keep = ids_of(family, 4, S), mask_of("right")
    with pytest.raises(ValueError, match=r"the batch is all padding: attention_mask \(4, 7\) has no 1"):
        fast(**inputs, attention_mask=torch.zeros(4, S))
    with pytest.raises(ValueError, match=r"make it with Packing\.from_mask"):
        fast(**inputs, attention_mask=Packing.from_lengths([7, 3, 1, 6]))
    for wrong in (keep[:, :6], keep[:3], torch.cat((keep, keep))):
        with pytest.raises(
            ValueError, match=r"input_ids must have the attention_mask's shape \(B, S\) = .*got \(4, 7\)"
        ):
            fast(**inputs, attention_mask=wrong)
        with pytest.raises(ValueError, match=r"input_ids must have the attention_mask's shape"):
            fast(**inputs, attention_mask=Packing.from_mask(wrong))
    with pytest.raises(ValueError, match="position_ids must have the attention_mask's shape"):
        fast(**inputs, attention_mask=keep, position_ids=draw(3, S))
    with pytest.raises(TypeError, match="input_ids"):
        fast(inputs["input_ids"], **inputs, attention_mask=keep)
    with pytest.raises((ValueError, TypeError)):
        fast(attention_mask=keep)
    # None of these left a packing behind.
    check(family, model, fast, inputs, keep)
    for other in (model, fastconv.accelerate(fast, padding="keep", backend="native")):
        with pytest.raises((TypeError, AttributeError, ValueError)):
            other(**inputs, attention_mask=Packing.from_mask(keep))
    with pytest.raises(TypeError, match=r'is a Packing, which needs accelerate\(model, padding="remove"\)'):
        fast(**inputs, attention_mask=Packing.from_mask(keep))


@pytest.mark.parametrize("padding", ["removed", None, True])
def test_unknown_padding(padding):
    with pytest.raises(ValueError, match='padding must be "keep" or "remove", got'):
        fastconv.accelerate(make("reference", "BertModel"), padding=padding)


@pytest.mark.parametrize("source", SOURCES)
def test_parts_of_a_model(source):
    model = make(source, "ConvBertForMaskedLM")
    for part in (model.convbert.encoder, model.convbert.encoder.layer[0], model.convbert.embeddings):
        with pytest.raises(ValueError, match="needs a BertModel, RoCBertModel or ConvBertModel, got"):
            fastconv.accelerate(part, padding="remove")
    fastconv.accelerate(model.convbert, padding="remove", backend="native")
    check("ConvBert", make(source, "ConvBertModel"), model.convbert, ids_of("ConvBert", 4, S), mask_of("left"))
    # A forward of the instance's own comes before that of any class.
    model = make(source, "BertModel")
    model.forward = model.forward
    with pytest.raises(ValueError, match='padding="remove" needs a'):
        fastconv.accelerate(model, padding="remove")


@pytest.mark.parametrize(("source", "family"), MODELS)
def test_modes_and_copies(source, family, tmp_path):
    model, fast = pair(source, family + "ForTokenClassification")
    keep, inputs = mask_of("left"), ids_of(family, 4, S)
    base_class = type(model.base_model)
    cls = type(fast.base_model)
    assert isinstance(fast.base_model, base_class) and cls is not base_class
    original = getattr(base_class, "fastconv_original", base_class)
    assert (cls.__name__, cls.__qualname__, cls.__module__) == (
        original.__name__, original.__qualname__, original.__module__
    )  # fmt: skip
    assert inspect.signature(fast.base_model.forward) == inspect.signature(model.base_model.forward)
    assert fast.state_dict().keys() == model.state_dict().keys()

    def logits(each, mask=keep):
        with torch.no_grad():
            return each(**inputs, attention_mask=mask).logits

    removed, kept = logits(fast), logits(model)
    assert not torch.equal(removed, kept)
    assert torch.equal(logits(fastconv.accelerate(copy.deepcopy(fast), padding="remove", backend="native")), removed)
    assert torch.equal(logits(copy.deepcopy(fast)), removed)
    torch.save(fast, tmp_path / "model.pt")
    assert torch.equal(logits(torch.load(tmp_path / "model.pt", weights_only=False)), removed)
    assert torch.equal(logits(fast, Packing.from_mask(keep)), removed)
    again = fastconv.accelerate(copy.deepcopy(fast), backend="native")
    assert_equal({"": logits(again)}, {"": kept})
    assert_equal({"": logits(fastconv.accelerate(again, padding="remove", backend="native"))}, {"": removed})
    fastconv.restore(fast)
    assert type(fast.base_model) is original and "fastconv_padding" not in fast.base_model.__dict__
    assert_equal({"": logits(fast)}, {"": kept})
    assert_equal({"": logits(fastconv.accelerate(fast, backend="native"))}, {"": kept})
    assert torch.equal(logits(removing(fast)), removed)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("head", ["Model", "ForSequenceClassification"])
@pytest.mark.parametrize("source", ["fastconv", "transformers"])
def test_folders(source, head, family, tmp_path):
    if not all(importlib.util.find_spec(package) for package in ("safetensors", "tokenizers")):
        pytest.skip("folders need safetensors and tokenizers")
    fast = pair(source, family + head)[1]
    fast.save_pretrained(tmp_path)
    assert f'"{family}{head}"' in (tmp_path / "config.json").read_text()
    classes = fastconv
    if source == "transformers":
        import transformers as classes
    loaded = getattr(classes, family + head).from_pretrained(tmp_path).double().eval()
    keep, inputs = mask_of("left"), ids_of(family, 4, S)
    with torch.no_grad():
        expected = fast(**inputs, attention_mask=keep)
        actual = removing(loaded)(**inputs, attention_mask=keep)
    assert_equal({"": actual[0]}, {"": expected[0]})


def test_several_threads():
    fast = {family: pair("reference", family + "Model")[1] for family in FAMILIES}
    kinds, found, wrong = list(MASKS), {}, []
    for family in FAMILIES:
        for kind in kinds:
            with torch.no_grad():
                found[family, kind] = fast[family](**ids_of(family, 4, S), attention_mask=mask_of(kind))[0]

    def work(start: int) -> None:
        with torch.no_grad():
            for i in range(12):
                kind, family = kinds[(start + i) % 4], FAMILIES[(start + i // 4) % 3]
                states = fast[family](**ids_of(family, 4, S), attention_mask=mask_of(kind))[0]
                if not torch.equal(states, found[family, kind]):
                    wrong.append((family, kind))

    threads = [threading.Thread(target=work, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize(("source", "family"), PLAIN)
def test_an_exception_leaves_no_packing(source, family):
    model, fast = pair(source, family + "Model")
    inputs, keep = ids_of(family, 4, S), mask_of("right")

    def fail(*args):
        raise KeyError("from a hook")

    for part in (fast.embeddings, fast.encoder, fast.encoder.layer[1]):
        handle = part.register_forward_pre_hook(fail)
        with pytest.raises(KeyError):
            fast(**inputs, attention_mask=keep)
        handle.remove()
        one = {name: ids[:1] for name, ids in inputs.items()}
        with torch.no_grad():
            # Without a mask, and the encoder alone: neither may meet a packing.
            assert_equal({"": fast(**one)[0]}, {"": model(**one)[0]})
            states = torch.randn(2, 3, 16).double()
            assert_equal({"": fast.encoder(states)[0]}, {"": model.encoder(states)[0]})


@pytest.mark.parametrize(("source", "family"), PLAIN)
def test_a_model_inside_a_model(source, family):
    model, fast = pair(source, family + "Model")
    inner_model, inner = pair(source, "BertModel")
    inputs, keep = ids_of(family, 4, S), mask_of("right")
    words, seen = {"input_ids": draw(2, 3)}, []
    expected = inner_model(**words)[0]
    for part in (fast.embeddings, fast.encoder.layer[0]):
        part.register_forward_hook(lambda *args: seen.append(inner(**words)[0]))
    check(family, model, fast, inputs, keep)
    assert len(seen) == 2
    for states in seen:
        assert_equal({"": states}, {"": expected})


def test_an_encoder_that_does_not_run_packed():
    fast = pair("reference", "BertModel")[1]
    original = copy.deepcopy(fast.encoder)
    fastconv.restore(original)
    fast.encoder.forward = lambda *args, **kwargs: original(*args, **kwargs)
    with pytest.raises(RuntimeError, match="did not run packed: call accelerate on the model again"):
        fast(draw(4, S), mask_of("right"))


@pytest.mark.parametrize("family", ["Bert", "ConvBert"])
def test_kernels(family):
    pytest.importorskip("triton", reason="the kernels are in Triton")
    model = make("reference", family + "Model", num_hidden_layers=1).train()
    fast = removing(model, "triton").float()
    keep = torch.tensor([[0, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]]).bool()
    inputs = ids_of(family, 3, 4)
    truth = promised(family, model, inputs, keep)
    expected = gradients(model, truth, keep)
    with torch.no_grad():
        assert_within(found_in(fast(**inputs, attention_mask=keep)), truth)
    found = found_in(fast(**inputs, attention_mask=keep))
    assert_within(found, truth)
    assert_within(gradients(fast, found, keep), expected, floor=largest(expected))


def assert_within(actual: Tensors, truth: Tensors, floor: float = 0.0) -> None:
    """fp32 against fp64: within a few roundings of the largest value."""
    assert actual.keys() == truth.keys()
    for name, value in truth.items():
        scale = max(value.abs().max().item(), floor)
        assert (actual[name].double() - value).abs().max() <= 5e-6 * scale, name
