"""Text generation equals that of transformers: same weights; greedy and drawn tokens, and what sampling leaves.

Runs with transformers 4.57 and 5.x. 5.x has no relative positions; with them and a cache, 4.57 takes every token of a
prompt for its last one, so it is run without. RoCBert has equal results only without shapes and pronunciations, since
transformers gives those of the prompt's last token to every new one; and 4.57 gives RoCBert's forward neither token
types, nor an encoder's output, nor positions that skip the padding.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from decoders import decoder, encoder_inputs, prompts

from fastconv.reference.sampling import NextToken

transformers = pytest.importorskip("transformers", reason="compares with transformers, which is not installed")
IS_4 = transformers.__version__.startswith("4.")


def pair(name: str, kind: str = "absolute", cross: bool = False, **config):
    """Our decoder and that of transformers with the same weights, in fp64."""
    ours = decoder(name, kind, cross, **config)
    theirs_config = getattr(transformers, type(ours.config).__name__)(
        **{key: value for key, value in ours.config.to_dict().items() if key != "model_type"},
        attn_implementation="eager",
    )
    theirs = getattr(transformers, name)(theirs_config).eval().double()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs


def assert_same_tokens(ours, theirs, inputs: dict, theirs_options: dict | None = None, **options) -> torch.Tensor:
    """The same tokens, from the same state of PyTorch's generator."""
    torch.manual_seed(3)
    actual = ours.generate(**inputs, **options)
    torch.manual_seed(3)
    expected = theirs.generate(**inputs, **options, **(theirs_options or {}))
    assert torch.equal(actual, expected)
    return actual


def common(name: str, inputs: dict) -> dict:
    """The inputs with which both libraries mean the same."""
    if name == "BertLMHeadModel":
        return inputs
    return {key: value for key, value in inputs.items() if key in ("input_ids", "attention_mask")}


def skip_what_4_57_drops(name: str, dropped: bool) -> None:
    if IS_4 and name == "RoCBertForCausalLM" and dropped:
        pytest.skip("transformers 4.57 drops this input of RoCBert when it generates")


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("padding", [False, True], ids=["full", "left padding"])
@pytest.mark.parametrize("name", ["BertLMHeadModel", "RoCBertForCausalLM"])
def test_greedy(name, padding, use_cache):
    skip_what_4_57_drops(name, padding)
    ours, theirs = pair(name)
    inputs = common(name, prompts(ours, padding=padding))
    ids = assert_same_tokens(ours, theirs, inputs, max_new_tokens=15, use_cache=use_cache)
    assert len(ids[:, 9:].unique()) > 2


@pytest.mark.parametrize("use_cache", [True, False])
def test_rows_that_end(use_cache):
    ours, theirs = pair("BertLMHeadModel")
    inputs = prompts(ours)
    tokens = ours.generate(**inputs, max_new_tokens=15)[:, 9:]
    for ends in (int(tokens[2, 2]), tokens[0, [0, 3]].tolist(), tokens.flatten().unique().tolist()):
        for pad in (0, 7):
            options = {"eos_token_id": ends, "pad_token_id": pad, "use_cache": use_cache}
            assert_same_tokens(ours, theirs, inputs, max_new_tokens=15, **options)


def test_a_token_masked_inside_a_prompt():
    ours, theirs = pair("BertLMHeadModel")
    inputs = prompts(ours, padding=False) | {"attention_mask": torch.ones(3, 9).long()}
    inputs["attention_mask"][1, 4] = 0
    assert_same_tokens(ours, theirs, inputs, max_new_tokens=10)


@pytest.mark.parametrize("name", ["BertLMHeadModel", "RoCBertForCausalLM"])
def test_cross_attention(name):
    skip_what_4_57_drops(name, True)
    ours, theirs = pair(name, cross=True)
    inputs = common(name, prompts(ours)) | encoder_inputs(ours)
    assert_same_tokens(ours, theirs, inputs, {"use_cache": False}, max_new_tokens=10)


@pytest.mark.skipif(not IS_4, reason="transformers 5.x has no relative positions")
@pytest.mark.parametrize("kind", ["relative_key", "relative_key_query"])
@pytest.mark.parametrize("name", ["BertLMHeadModel", "RoCBertForCausalLM"])
def test_relative_positions(name, kind):
    ours, theirs = pair(name, kind)
    theirs.config.use_cache = False  # RoCBert's forward isn't told by generate
    inputs = common(name, prompts(ours))
    assert_same_tokens(ours, theirs, inputs, {"use_cache": False}, max_new_tokens=12)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0, "top_k": 50, "top_p": 1.0},
        {"temperature": 3.0, "top_k": 9, "top_p": 1.0},
        {"temperature": 2.0, "top_k": 0, "top_p": 0.8},
        {"temperature": 4.0, "top_k": 20, "top_p": 0.9},
    ],
    ids=str,
)
def test_sampling(options):
    ours, theirs = pair("BertLMHeadModel")
    ends = {"eos_token_id": [3, 30], "pad_token_id": 0}
    ids = assert_same_tokens(ours, theirs, prompts(ours), do_sample=True, max_new_tokens=15, **options, **ends)
    assert len(ids[:, 9:].unique()) > 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_filter_equals_the_logits_warpers(dtype):
    """Bit for bit, ties among them."""
    logits = 3 * torch.randn(30, 23, dtype=dtype)
    logits[10:20] = logits[10:20].round()
    logits[20:] = 0.25 * torch.randint(0, 3, (10, 23)).to(dtype)
    compared = 0
    for temperature, top_k, top_p in itertools.product(
        (0.2, 1.0, 1.7), (0, 1, 2, 10, 23, 99), (1e-9, 0.1, 0.5, 0.95, 1.0)
    ):
        expected = logits
        if temperature != 1.0:
            expected = transformers.TemperatureLogitsWarper(temperature)(None, expected)
        if top_k:
            expected = transformers.TopKLogitsWarper(top_k)(None, expected)
        if top_p < 1.0:
            expected = transformers.TopPLogitsWarper(top_p)(None, expected)
        assert torch.equal(NextToken(True, temperature, top_k, top_p, None).filter(logits), expected)
        compared += expected.isinf().any()
    assert compared > 50
