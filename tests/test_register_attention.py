"""register_attention: models of transformers with attn_implementation="fastconv" against the same with "eager".

What a version of transformers doesn't take from its AttentionInterface is tested to raise there.
"""

from __future__ import annotations

import copy
import sys
import types
from typing import NamedTuple

import pytest
import torch

import fastconv
from fastconv import attention_interface

transformers = pytest.importorskip("transformers", reason="attn_implementation is an option of transformers")

VERSION_5 = int(transformers.__version__.split(".")[0]) >= 5
FASTCONV, EAGER = "fastconv", "eager"
BATCH, LENGTH, VOCABULARY = 2, 7, 41

BERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 24,
    "pad_token_id": 0,
}
LLAMA = BERT | {"num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}


class Case(NamedTuple):
    """A model class, its config's name and arguments, and the dtype of its eager softmax at least."""

    model: str
    config: str
    arguments: dict
    dtype: torch.dtype = torch.float64
    only_5: bool = False


# In fp32 are those whose eager softmax is, whatever the model's dtype: there fp64's lowest number is -inf, and a row
# without a key NaN.
CASES = {
    "bert": Case("BertModel", "BertConfig", BERT, only_5=True),
    "roberta": Case("RobertaModel", "RobertaConfig", BERT, only_5=True),
    "electra": Case("ElectraModel", "ElectraConfig", BERT | {"embedding_size": 8}, only_5=True),
    "distilbert": Case(
        "DistilBertModel",
        "DistilBertConfig",
        {"vocab_size": VOCABULARY, "dim": 16, "n_layers": 2, "n_heads": 4, "hidden_dim": 24, "pad_token_id": 0},
        only_5=True,
    ),
    # Every second layer sees two keys on either side.
    "modernbert": Case(
        "ModernBertModel",
        "ModernBertConfig",
        BERT | {"local_attention": 4, "global_attn_every_n_layers": 2},
        dtype=torch.float32,
        only_5=True,
    ),
    "llama": Case("LlamaForCausalLM", "LlamaConfig", LLAMA, dtype=torch.float32),
    "mistral": Case("MistralForCausalLM", "MistralConfig", LLAMA | {"sliding_window": 3}, dtype=torch.float32),
    "gpt2": Case(
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 24}
        | {"scale_attn_by_inverse_layer_idx": True, "scale_attn_weights": False, "pad_token_id": 0},
    ),
    "bert_decoder": Case("BertLMHeadModel", "BertConfig", BERT | {"is_decoder": True}, only_5=True),
    "bart": Case(
        "BartForConditionalGeneration",
        "BartConfig",
        {"vocab_size": VOCABULARY, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2}
        | {"encoder_attention_heads": 4, "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
        | {"max_position_embeddings": 24, "pad_token_id": 0, "decoder_start_token_id": 1, "bos_token_id": 1}
        | {"eos_token_id": 2, "forced_eos_token_id": 2},
    ),
    "t5": Case(
        "T5ForConditionalGeneration",
        "T5Config",
        {"vocab_size": VOCABULARY, "d_model": 16, "d_kv": 6, "d_ff": 24, "num_layers": 2, "num_heads": 4}
        | {"relative_attention_num_buckets": 8, "pad_token_id": 0, "decoder_start_token_id": 0, "eos_token_id": 2},
        only_5=True,
    ),
}
ENCODERS = ["bert", "roberta", "electra", "distilbert", "modernbert"]
DECODERS = ["llama", "mistral", "gpt2", "bert_decoder"]
BOTH = ["bart", "t5"]


@pytest.fixture(autouse=True)
def _registered():
    """Registered, and native where a test doesn't ask for each backend: Triton's interpreter is slow."""
    fastconv.register_attention()
    with fastconv.backend("native"):
        yield


def skip_out_of_reach(name: str) -> None:
    if CASES[name].only_5 and not VERSION_5:
        pytest.skip(f"transformers {transformers.__version__} has {name}'s attention outside its AttentionInterface")


def build(name: str, attention: str = FASTCONV, **arguments: object) -> torch.nn.Module:
    """A model in eval mode, whose weights are a function of its name and arguments."""
    case = CASES[name]
    config = getattr(transformers, case.config)(**case.arguments, **arguments)
    torch.manual_seed(1)
    model = getattr(transformers, case.model)._from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
    return model.to(case.dtype).eval()


def pair(name: str, **arguments: object) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The same model with both implementations."""
    skip_out_of_reach(name)
    ours, theirs = build(name, **arguments), build(name, EAGER, **arguments)
    theirs.load_state_dict(ours.state_dict())
    assert ours.config._attn_implementation == FASTCONV and theirs.config._attn_implementation == EAGER
    return ours, theirs


def inputs(name: str, padding: str = "right") -> dict[str, torch.Tensor]:
    """Ids, and a mask with three keys of padding in the first row: "right", "left", "all" (of that row) or "none"."""
    ids = torch.randint(3, VOCABULARY, (BATCH, LENGTH))
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    mask[0, {"right": slice(-3, None), "left": slice(3), "all": slice(None), "none": slice(0)}[padding]] = 0
    given = {"input_ids": ids, "attention_mask": mask}
    if name in BOTH:
        given["decoder_input_ids"] = torch.randint(3, VOCABULARY, (BATCH, 5))
    return given


def run(model: torch.nn.Module, given: dict[str, torch.Tensor], **options: object) -> tuple[torch.Tensor, dict]:
    """The model's first output, and the gradient of every parameter (None where there is none)."""
    model.zero_grad(set_to_none=True)
    output = model(**given, **options)[0]
    torch.manual_seed(2)
    (output * torch.randn_like(output)).sum().backward()
    return output.detach(), {key: parameter.grad for key, parameter in model.named_parameters()}


def assert_same(
    ours: torch.nn.Module, theirs: torch.nn.Module, given: dict[str, torch.Tensor], *, but: str | None = None
) -> None:
    """Assert equal outputs, and equal gradients of all parameters `but` those whose name has this in it."""
    output, gradients = run(ours, given)
    expected, expected_gradients = run(theirs, given)
    assert_near("output", output, expected)
    for key, gradient in expected_gradients.items():
        assert (gradient is None) == (gradients[key] is None), key
        if gradient is not None and not (but and but in key):
            assert_near(key, gradients[key], gradient)


def assert_near(name: str, tensor: torch.Tensor, expected: torch.Tensor) -> None:
    """Assert that two tensors are equal up to rounding, relative to the largest element."""
    assert expected.isfinite().all(), name
    # A few hundred roundings: of sums over two layers and all tokens, in another order.
    allowed = 300 * torch.finfo(expected.dtype).eps * max(1.0, expected.abs().max().item())
    torch.testing.assert_close(tensor, expected, rtol=0, atol=allowed, msg=lambda text: f"{name}: {text}")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """What masked_attention is called with."""
    seen: list[dict] = []
    op = attention_interface.masked_attention

    def recorded(q, k, v, **options):
        seen.append({"q": q, "k": k, "v": v, **options})
        return op(q, k, v, **options)

    monkeypatch.setattr(attention_interface, "masked_attention", recorded)
    return seen


@pytest.mark.parametrize("padding", ["none", "right", "left", "all"])
@pytest.mark.parametrize("name", CASES)
def test_register_attention_equals_eager(name, padding, calls):
    if name == "gpt2" and padding in ("left", "all") and not VERSION_5:
        pytest.skip("the eager GPT-2 of transformers 4.57 forbids keys twice, so a row without a key is not uniform")
    ours, theirs = pair(name)
    # A forbidden key gives its bias no gradient; eager's gives one in rows that have no other key.
    but = "relative_attention_bias" if padding == "all" else None
    assert_same(ours, theirs, inputs(name, padding), but=but)
    assert len(calls) == (6 if name in BOTH else 2)


@pytest.mark.parametrize("name", ["bert", "llama", "bart", "t5"])
def test_register_attention_equals_eager_by_the_backend(name, backend, calls):
    ours, theirs = pair(name)
    assert_same(ours.float(), theirs.float(), inputs(name))
    assert calls


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_register_attention_keeps_padding_as_one_row_and_copies_nothing(name, calls):
    skip_out_of_reach(name)
    given = inputs(name)
    build(name)(**given)
    first = calls[0]
    if name == "bert":
        assert first["mask"].shape == (BATCH, 1, 1, LENGTH) and first["mask"].dtype == torch.bool
        assert torch.equal(first["mask"][:, 0, 0], given["attention_mask"].bool())
    assert not first["causal"]
    for tensor in (first["q"], first["k"], first["v"]):
        assert tensor.is_contiguous()  # as the projection left it


@pytest.mark.parametrize("name", ["bert", "llama", "bart"])
def test_register_attention_has_no_mask_where_none_is_needed(name, calls):
    skip_out_of_reach(name)
    build(name)(**inputs(name, "none"))
    if name == "llama":
        assert all(call["mask"] is None and call["causal"] for call in calls)
    elif VERSION_5 or name != "bart":  # Bart makes masks of its own in 4.57
        assert calls[0]["mask"] is None and not calls[0]["causal"]


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("name", DECODERS + BOTH)
def test_register_attention_generates_the_tokens_of_eager(name, padding, calls):
    ours, theirs = pair(name)
    given = inputs(name, "right" if name in BOTH and padding == "left" else padding)
    given.pop("decoder_input_ids", None)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "num_beams": 1}
    torch.testing.assert_close(ours.generate(**given, **options), theirs.generate(**given, **options))
    single = [call for call in calls if call["q"].shape[1] == 1]
    assert single and not any(call["causal"] for call in single)


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_register_attention_with_a_static_cache(name, padding):
    ours, theirs = pair(name)
    options = {"max_new_tokens": 5, "do_sample": False, "cache_implementation": "static"}
    given = inputs(name, padding)
    torch.testing.assert_close(ours.generate(**given, **options), theirs.generate(**given, **options))
    # A prompt in a cache with empty room behind it.
    caches = [transformers.StaticCache(config=model.config, max_cache_len=12) for model in (ours, theirs)]
    with torch.no_grad():
        results = [m(**given, past_key_values=c).logits for m, c in zip((ours, theirs), caches, strict=True)]
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "bert_decoder"])
def test_register_attention_of_several_tokens_after_a_cache(name):
    skip_out_of_reach(name)
    model, ids = build(name), torch.randint(3, VOCABULARY, (BATCH, LENGTH))
    with torch.no_grad():
        expected = model(ids).logits
        first = model(ids[:, :3], use_cache=True)
        rest = model(ids[:, 3:], past_key_values=first.past_key_values, use_cache=True).logits
    torch.testing.assert_close(rest, expected[:, 3:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["bert", "distilbert", "llama", "gpt2", "bart", "t5"])
def test_register_attention_returns_the_attentions_of_eager(name):
    if name == "gpt2" and not VERSION_5:
        pytest.skip("transformers 4.57 doesn't tell GPT-2's attention that somebody asks for the probabilities")
    ours, theirs = pair(name)
    # In training mode, so that they are those after dropout; by one seed, since both draw one number for each.
    given, results = inputs(name), []
    for model in (ours.train(), theirs.train()):
        torch.manual_seed(3)
        results.append(model(**given, output_attentions=True))
    ours_out, theirs_out = results
    torch.testing.assert_close(ours_out[0], theirs_out[0], rtol=1e-5, atol=1e-5)
    names = [key for key in theirs_out if key.endswith("attentions")]
    assert len(ours_out[names[0]]) == 2
    for key in names:
        for mine, their in zip(ours_out[key], theirs_out[key], strict=True):
            torch.testing.assert_close(mine, their, rtol=1e-5, atol=1e-5)


def test_register_attention_makes_no_probabilities_unasked():
    skip_out_of_reach("bert")
    model, given = build("bert"), inputs("bert")
    with_them = model(**given, output_attentions=True)
    without = model(**given)
    assert without.attentions is None
    torch.testing.assert_close(without[0], with_them[0])
    assert model.encoder.layer[0].attention.self(torch.randn(1, 3, 16).double())[1] is None


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_register_attention_drops_by_the_seed_of_torch(name, backend, calls):
    skip_out_of_reach(name)
    bert = {"attention_probs_dropout_prob": 0.4, "hidden_dropout_prob": 0.0}
    model = build(name, **(bert if name == "bert" else {"attention_dropout": 0.4})).float()
    given = {key: ids[:, :4] for key, ids in inputs(name, "left").items()}
    expected = model(**given)[0]
    model.train()
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(run_seeded(model, given))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    assert not torch.equal(results[0], expected)
    assert results[0].isfinite().all() and calls[-1]["dropout_p"] == 0.4


def run_seeded(model: torch.nn.Module, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """Output and gradients in one vector."""
    model.zero_grad()
    output = model(**given)[0]
    output.square().sum().backward()
    return torch.cat([output.detach().flatten(), *(p.grad.flatten() for p in model.parameters() if p.grad is not None)])


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_register_attention_saves_and_loads(name, tmp_path):
    skip_out_of_reach(name)
    model, given = build(name), inputs(name)
    model.save_pretrained(tmp_path)
    auto = transformers.AutoModelForCausalLM if name == "llama" else transformers.AutoModel
    loaded = auto.from_pretrained(tmp_path, attn_implementation=FASTCONV, dtype=CASES[name].dtype)
    assert loaded.config._attn_implementation == FASTCONV
    torch.testing.assert_close(loaded.eval()(**given)[0], model(**given)[0], rtol=0, atol=0)
    # What is saved doesn't ask for this library.
    assert auto.from_pretrained(tmp_path).config._attn_implementation == "sdpa"
    made = auto.from_config(model.config, attn_implementation=FASTCONV)
    assert made.config._attn_implementation == FASTCONV


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_register_attention_of_a_model_that_is_there(name, calls):
    ours, theirs = pair(name)
    theirs.set_attn_implementation(FASTCONV)
    given = inputs(name)
    torch.testing.assert_close(theirs(**given)[0], ours(**given)[0], rtol=0, atol=0)
    assert len(calls) == 4
    theirs.set_attn_implementation(EAGER)
    theirs(**given)
    assert len(calls) == 4


def test_register_attention_twice():
    before = transformers.AttentionInterface._global_mapping[FASTCONV]
    fastconv.register_attention()
    assert transformers.AttentionInterface._global_mapping[FASTCONV] is before


@pytest.mark.parametrize("name", ["bert", "llama"])
@pytest.mark.parametrize("padding", ["none", "right"])
def test_register_attention_compiles(name, padding):
    ours, _ = pair(name)
    given = inputs(name, padding)
    expected, gradients = run(ours, given)
    compiled = torch.compile(copy.deepcopy(ours), backend="aot_eager", fullgraph=VERSION_5)
    output, compiled_gradients = run(compiled, given)
    torch.testing.assert_close(output, expected)
    for key, gradient in compiled_gradients.items():
        expected_gradient = gradients[key.removeprefix("_orig_mod.")]
        if expected_gradient is None:
            # The pooler's, which the output has nothing of: a compiled model has a gradient of zeros there.
            assert gradient is None or not gradient.any()
        else:
            assert_near(key, gradient, expected_gradient)


@pytest.mark.parametrize("name", ["bert", "bart"])
def test_register_attention_and_accelerate(name):
    ours, theirs = pair(name)
    if name == "bert":
        fastconv.accelerate(ours)
    for padding in ("none", "right", "all"):
        assert_same(ours, theirs, inputs(name, padding))


@pytest.mark.skipif(VERSION_5, reason="transformers 5.x has no head_mask")
def test_register_attention_head_mask():
    ours, theirs = pair("bart")
    given = inputs("bart") | {"head_mask": torch.rand(2, 4).double(), "decoder_head_mask": torch.rand(2, 2).double()}
    assert_same(ours, theirs, given)
    ours, theirs = pair("gpt2")
    given = inputs("gpt2") | {"head_mask": torch.rand(2, 4).double()}
    assert_same(ours, theirs, given)


def module(**attributes: object) -> torch.nn.Module:
    """A module as the attention function sees one."""
    made = torch.nn.Module().eval()
    made.__dict__.update(attributes)
    return made


def qkv(Sq: int = 4, Sk: int = 4, D: int = 6, E: int = 6) -> list[torch.Tensor]:
    shapes = (BATCH, 4, Sq, D), (BATCH, 2, Sk, D), (BATCH, 2, Sk, E)
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def expected_attention(q, k, v, mask=None, bias=0.0, **options):
    k, v = (t.repeat_interleave(2, dim=1) for t in (k, v))
    scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5 + bias
    scores = scores if mask is None else scores + mask
    return (scores.softmax(-1) @ v).transpose(1, 2)


def additive(mask: torch.Tensor) -> torch.Tensor:
    return torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, torch.finfo(torch.float64).min)


@pytest.mark.parametrize("E", [3, 9])
def test_attention_of_values_of_another_size(E):
    q, k, v = qkv(E=E)
    y, weights = attention_interface._attention(module(), q, k, v, None, is_causal=False)
    expected = expected_attention(q, k, v)
    assert y.shape == (BATCH, 4, 4, E) and weights is None
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    torch.testing.assert_close(torch.autograd.grad(y, (q, k, v), dy), torch.autograd.grad(expected, (q, k, v), dy))


@pytest.mark.parametrize("kind", ["none", "bool", "additive", "causal"])
def test_attention_with_a_bias_of_positions(kind):
    q, k, v = qkv()
    bias = torch.randn(1, 4, 4, 4, dtype=torch.float64, requires_grad=True)
    allowed = torch.rand(BATCH, 1, 4, 4) > 0.3
    allowed[..., 0] = True
    past = torch.ones(4, 4, dtype=torch.bool).tril()
    given = {"none": None, "bool": allowed, "additive": additive(allowed), "causal": None}[kind]
    y, _ = attention_interface._attention(module(is_causal=kind == "causal"), q, k, v, given, position_bias=bias)
    mask = {"none": None, "causal": additive(past)}.get(kind, additive(allowed))
    expected = expected_attention(q, k, v, mask, bias)
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    torch.testing.assert_close(
        torch.autograd.grad(y, (q, k, v, bias), dy), torch.autograd.grad(expected, (q, k, v, bias), dy)
    )


def test_attention_of_a_mask_longer_than_the_keys():
    q, k, v = qkv()
    allowed = torch.rand(BATCH, 1, 4, 9) > 0.3
    allowed[..., 0] = True
    y, _ = attention_interface._attention(module(), q, k, v, allowed)
    torch.testing.assert_close(y, expected_attention(q, k, v, additive(allowed[..., :4])))


def test_attention_of_one_query_sees_all_keys():
    q, k, v = qkv(Sq=1, Sk=5)
    y, _ = attention_interface._attention(module(is_causal=True), q, k, v, None)
    torch.testing.assert_close(y, expected_attention(q, k, v))


def test_attention_drops_nothing_in_eval_mode():
    q, k, v = qkv()
    y, _ = attention_interface._attention(module(), q, k, v, None, dropout=0.5, is_causal=False)
    torch.testing.assert_close(y, expected_attention(q, k, v))


@pytest.mark.parametrize("argument", ["softcap", "s_aux", "sinks", "indices", "block_indices", "cache"])
def test_attention_refuses_what_it_can_not_do(argument):
    with pytest.raises(ValueError, match=f"does not do '{argument}', which Module needs; use attn_impl.*eager"):
        attention_interface._attention(module(), *qkv(), None, **{argument: torch.ones(2)})
    attention_interface._attention(module(), *qkv(), None, **{argument: None}, sliding_window=2, position_ids=None)


def test_attention_refuses_masks_that_are_not_of_scores():
    with pytest.raises(ValueError, match=r"attention_mask of shape \(B, 1 or H, Sq, Sk\), got \(2, 4\)"):
        attention_interface._attention(module(), *qkv(), torch.ones(BATCH, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="got str"):
        attention_interface._attention(module(), *qkv(), "causal")


def test_attention_refuses_to_guess_where_causal_queries_are():
    with pytest.raises(ValueError, match="causal, with 2 queries of 5 keys and no mask"):
        attention_interface._attention(module(is_causal=True), *qkv(Sq=2, Sk=5), None)


def test_softcap_of_a_model_raises():
    config = transformers.Gemma2Config(**LLAMA, head_dim=4, attn_logit_softcapping=30.0)
    model = transformers.AutoModel.from_config(config, attn_implementation=FASTCONV)
    with pytest.raises(ValueError, match="does not do 'softcap', which Gemma2Attention needs"):
        model(**inputs("gemma2"))


def test_sinks_of_a_model_raise():
    config = transformers.GptOssConfig(**LLAMA, head_dim=4, num_local_experts=2, num_experts_per_tok=1)
    model = transformers.AutoModel.from_config(config, attn_implementation=FASTCONV)
    with pytest.raises(ValueError, match="does not do 's_aux', which GptOssAttention needs"):
        model(**inputs("gpt_oss"))


@pytest.mark.skipif(VERSION_5, reason="transformers 5.x has them on its AttentionInterface")
@pytest.mark.parametrize("name", [name for name in ENCODERS if CASES[name].only_5 and name != "modernbert"])
def test_models_out_of_reach_raise(name):
    # A table of transformers' own classes, without a word on what else there is.
    with pytest.raises(KeyError, match=FASTCONV):
        build(name)


@pytest.mark.parametrize("family", ["ConvBert", "MPNet"])
def test_models_out_of_reach_are_not_given_masks_for_others(family):
    arguments = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": VOCABULARY, "num_attention_heads": 4}
    config = getattr(transformers, family + "Config")(**arguments)
    given, model_class = inputs("bert"), getattr(transformers, family + "Model")
    model = model_class._from_config(copy.deepcopy(config), attn_implementation=FASTCONV).eval()
    if VERSION_5:
        with pytest.raises(ValueError, match=rf"type '{config.model_type}' is not taken from .* use attn_impl.*eager"):
            model(**given)
        return
    # 4.57 has these models make masks of their own, so they compute as ever.
    eager = model_class._from_config(config, attn_implementation=EAGER).eval()
    eager.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(**given)[0], eager(**given)[0], rtol=0, atol=0)


def test_unregistered_raises(monkeypatch):
    monkeypatch.delitem(transformers.AttentionInterface._global_mapping, FASTCONV)
    with pytest.raises(ValueError, match='attn_implementation="fastconv"` is not supported'):
        build("llama")


def test_register_attention_without_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="transformers, which is not installed: pip install"):
        fastconv.register_attention()


def test_register_attention_with_an_old_transformers(monkeypatch):
    old = types.ModuleType("transformers")
    old.__version__ = "4.40.0"
    monkeypatch.setitem(sys.modules, "transformers", old)
    with pytest.raises(ImportError, match=r"needs transformers 4\.57 or newer, got 4\.40\.0"):
        fastconv.register_attention()
