"""The fused embeddings of both libraries' models against the originals: ids, defaults, adapters, gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from swap_models import BATCH, FAMILIES, LENGTH, MODELS, SOURCES, VOCABULARY, build, is_4
from tolerance import assert_2x
from torch import nn

from fastconv.nn import embeddings as fused

FORWARDS = {
    ("reference", "Bert"): fused.Embeddings,
    ("reference", "ConvBert"): fused.Embeddings,
    ("reference", "RoCBert"): fused.RoCBertEmbeddings,
    ("transformers", "Bert"): fused.TransformersEmbeddings,
    ("transformers", "ConvBert"): fused.TransformersConvBertEmbeddings,
    ("transformers", "RoCBert"): fused.TransformersRoCBertEmbeddings,
}

pytestmark = pytest.mark.usefixtures("poisoned_empty")


def pair(source, family, **arguments):
    """A model's embeddings, and a copy with the fused forward."""
    module = build(source, family + "Model", **arguments).embeddings
    fast = copy.deepcopy(module)
    forward = FORWARDS[source, family]
    fast.__class__ = type(f"Fast{family}Embeddings", (forward, type(module)), {})
    return module, fast


def ids(seed=0, high=VOCABULARY):
    return torch.randint(0, high, (BATCH, LENGTH), generator=torch.Generator().manual_seed(seed))


def assert_same(module, fast, *args, **kwargs):
    """Equal outputs, without and with gradients, and equal gradients of every parameter."""
    with torch.no_grad():
        torch.testing.assert_close(fast(*args, **kwargs), module(*args, **kwargs), rtol=1e-5, atol=1e-5)
    results = []
    for m in (fast, module):
        m.zero_grad()
        y = m(*args, **kwargs)
        y.square().sin().sum().backward()
        results.append({name: p.grad for name, p in m.named_parameters()} | {"y": y.detach()})
    for name, expected in results[1].items():
        got = results[0][name]
        if expected is None:
            assert got is None, name
        else:
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize(("source", "family"), MODELS)
def test_embeddings_of_ids(backend, source, family):
    assert_same(*pair(source, family, pad_token_id=3), ids())


@pytest.mark.parametrize(("source", "family"), MODELS)
@pytest.mark.parametrize("shape", [(BATCH, LENGTH), (1, LENGTH)])
def test_embeddings_of_everything(backend, source, family, shape):
    position_ids = ids(1, 16)[: shape[0]]
    assert_same(*pair(source, family), input_ids=ids(), token_type_ids=ids(2, 2), position_ids=position_ids)
    assert_same(*pair(source, family), input_ids=ids(), position_ids=position_ids)


@pytest.mark.parametrize(("source", "family"), MODELS)
def test_embeddings_of_vectors(backend, source, family):
    module, fast = pair(source, family)
    vectors = torch.randn(BATCH, LENGTH, module.word_embeddings.embedding_dim)
    given, other = (vectors.clone().requires_grad_() for _ in range(2))
    for m, t in ((module, given), (fast, other)):
        m(inputs_embeds=t).square().sum().backward()
    torch.testing.assert_close(other.grad, given.grad, rtol=1e-4, atol=1e-5)
    assert_same(module, fast, inputs_embeds=vectors)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("concat", [True, False])
@pytest.mark.parametrize("given", [(), ("shape",), ("shape", "pronunciation")], ids=["no", "shapes", "both"])
def test_embeddings_of_three_streams(backend, source, concat, given):
    sizes = {} if concat else {"shape_embed_dim": 16, "pronunciation_embed_dim": 16}
    streams = {f"input_{name}_ids": ids(len(name)) for name in given}
    assert_same(*pair(source, "RoCBert", concat_input=concat, **sizes), ids(), **streams)


@pytest.mark.parametrize("source", SOURCES)
def test_embeddings_without_a_stream(backend, source):
    streams = {"input_shape_ids": ids(1), "input_pronunciation_ids": ids(2)}
    for disabled in ("enable_shape", "enable_pronunciation"):
        assert_same(*pair(source, "RoCBert", **{disabled: False}), ids(), **streams)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("family", ["Bert", "RoCBert"])
def test_embeddings_after_cached_tokens(backend, source, family):
    name = "past_length" if source == "reference" else "past_key_values_length"
    assert_same(*pair(source, family), ids(), **{name: 4})


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("family", ["Bert", "RoCBert"])
def test_embeddings_without_absolute_positions(backend, source, family):
    if source == "transformers" and not is_4():
        pytest.skip("transformers 5 dropped relative positions")
    module, fast = pair(source, family, position_embedding_type="relative_key")
    assert_same(module, fast, ids())
    assert fast.position_embeddings.weight.grad is None


@pytest.mark.parametrize("family", ["Bert", "RoCBert"])
def test_embeddings_of_more_tokens_than_positions(backend, family):
    # A packed batch of transformers 5: positions begin again, and token types are looked up by them.
    module, fast = pair("transformers", family)
    packed = {"input_ids": ids().view(1, -1), "position_ids": torch.arange(LENGTH).repeat(BATCH)[None]}
    if is_4():
        packed["token_type_ids"] = torch.zeros_like(packed["input_ids"])
    assert_same(module, fast, **packed)


@pytest.mark.parametrize(("source", "family"), MODELS)
def test_embeddings_dropout(backend, source, family):
    _, fast = pair(source, family, hidden_dropout_prob=0.5)
    kept = fast(ids())
    fast.train()
    dropped = fast(ids())
    if family != "RoCBert":
        dropped, kept = dropped[dropped != 0], 2 * kept[dropped != 0]
        torch.testing.assert_close(dropped, kept, rtol=1e-4, atol=1e-5)
        assert 0.3 < dropped.numel() / fast(ids()).numel() < 0.7
    assert not torch.equal(fast(ids()), fast(ids()))


@pytest.mark.parametrize(("source", "family"), MODELS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_embeddings_in_half_precision(backend, source, family, dtype):
    module, fast = (m.to(dtype) for m in pair(source, family))
    y, expected = fast(ids()), module(ids())
    assert y.dtype == dtype
    assert_2x("y", y, expected, module.double()(ids()))


class Doubled(nn.Module):
    """Stands for an adapter of the words, which looks like the layer that it wraps."""

    def __init__(self, base):
        super().__init__()
        self.base, self.weight = base, base.weight

    def forward(self, x):
        return 2 * self.base(x)


@pytest.mark.parametrize(("source", "family"), MODELS)
def test_embeddings_of_an_adapter(backend, source, family):
    module, fast = pair(source, family)
    for m in (module, fast):
        m.word_embeddings = Doubled(m.word_embeddings)
    assert_same(module, fast, ids())


@pytest.mark.parametrize(("source", "family"), MODELS)
@pytest.mark.parametrize("part", ["word_embeddings", "position_embeddings", "token_type_embeddings", "LayerNorm"])
def test_embeddings_with_hooks(backend, source, family, part):
    # A hook sees its call, and what it changes counts.
    module, fast = pair(source, family)
    for m in (module, fast):
        getattr(m, part).register_forward_hook(lambda layer, args, out: 1.5 * out)
    assert_same(module, fast, ids(), token_type_ids=ids(2, 2))


@pytest.mark.parametrize("option", [{"max_norm": 0.1}, {"scale_grad_by_freq": True}])
def test_embeddings_with_options_of_their_own(backend, option):
    for part in ("word_embeddings", "token_type_embeddings"):
        module, fast = pair("reference", "Bert")
        for m in (module, fast):
            for name, value in option.items():
                setattr(getattr(m, part), name, value)
        y = fast(ids())
        y.square().sum().backward()
        expected = module(ids())
        expected.square().sum().backward()
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(getattr(fast, part).weight.grad, getattr(module, part).weight.grad)


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_bad_input(backend, family):
    _, fast = pair("transformers", family)
    with pytest.raises(IndexError, match=f"must be from 0 to {VOCABULARY - 1}|out of range"):
        fast(ids() + VOCABULARY)
