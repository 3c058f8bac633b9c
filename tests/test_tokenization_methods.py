"""What the tokenizers do with tokens and ids: roles, added tokens, special tokens around ids, rows out of ids."""

from __future__ import annotations

import pytest
import torch
from tokenization_cases import ROCBERT, VOCAB

pytest.importorskip("tokenizers", reason="the tokenizers stand on tokenizers, which is not installed")
from tokenizers import AddedToken

from fastconv import tokenization
from fastconv.tokenization import BertTokenizer, ConvBertTokenizer, RoCBertTokenizer


@pytest.fixture
def tokenizer() -> BertTokenizer:
    return BertTokenizer(VOCAB)


def test_names_of_the_documentation():
    assert tokenization.BertTokenizerFast is BertTokenizer and tokenization.ConvBertTokenizerFast is ConvBertTokenizer


def test_special_tokens_around_ids(tokenizer):
    assert tokenizer.build_inputs_with_special_tokens([10, 11]) == [4, 10, 11, 5]
    assert tokenizer.build_inputs_with_special_tokens([10], []) == [4, 10, 5, 5]
    assert tokenizer.create_token_type_ids_from_sequences([10], [11, 12]) == [0, 0, 0, 1, 1, 1]
    assert tokenizer.create_token_type_ids_from_sequences([10]) == [0, 0, 0]
    assert tokenizer.get_special_tokens_mask([10, 11], [12]) == [1, 0, 0, 1, 0, 1]
    ids = tokenizer("hello [MASK]", "dog", return_special_tokens_mask=True)
    assert tokenizer.get_special_tokens_mask(ids.input_ids, already_has_special_tokens=True) == [1, 0, 1, 1, 0, 1]
    assert tokenizer.get_special_tokens_mask(torch.tensor([4, 10]), already_has_special_tokens=True) == [1, 0]
    assert ids.special_tokens_mask == [1, 0, 0, 1, 0, 1], "that of a call marks what it put there itself"
    with pytest.raises(ValueError, match="a pair is one row: give all of it as token_ids_0"):
        tokenizer.get_special_tokens_mask([4], [5], already_has_special_tokens=True)
    assert tokenizer.num_special_tokens_to_add() == 2 and tokenizer.num_special_tokens_to_add(pair=True) == 3
    limited = BertTokenizer(VOCAB, model_max_length=12)
    assert (limited.max_len_single_sentence, limited.max_len_sentences_pair) == (10, 9)


def test_prepare_for_model_is_a_call_on_ids(tokenizer):
    a, b = "jumping jumper running", "new york hello"
    first, second = (tokenizer.encode(text, add_special_tokens=False) for text in (a, b))
    options = {"padding": "max_length", "max_length": 9, "truncation": "only_first", "return_special_tokens_mask": True}
    assert tokenizer.prepare_for_model(first, second, **options) == tokenizer(a, b, **options)
    assert tokenizer.prepare_for_model(first, add_special_tokens=False).input_ids == first
    out = tokenizer.prepare_for_model(first, max_length=5, stride=1, return_overflowing_tokens=True, return_length=True)
    assert out.input_ids == [4, *first[:3], 5] and out.length == 5
    assert (out.overflowing_tokens, out.num_truncated_tokens) == (first[2:], len(first) - 3)
    batch = tokenizer.prepare_for_model(first, return_tensors="pt", prepend_batch_axis=True)
    assert batch.input_ids.tolist() == [[4, *first, 5]]
    assert tokenizer.prepare_for_model(first, return_tensors="np").input_ids.tolist() == [4, *first, 5]


@pytest.mark.parametrize(
    "sizes, remove, strategy, side, expected",
    [
        ((5, 5), 1, "longest_first", "right", ([0, 1, 2, 3, 4], [0, 1, 2, 3], [])),
        ((7, 5), 3, "longest_first", "right", ([0, 1, 2, 3, 4], [0, 1, 2, 3], [])),
        ((2, 7), 6, "longest_first", "left", ([0, 1], [6], [])),
        ((4, None), 2, "longest_first", "right", ([0, 1], None, [1, 2, 3])),
        ((4, None), 2, "longest_first", "left", ([2, 3], None, [0, 1, 2])),
        ((4, 3), 2, "only_second", "right", ([0, 1, 2, 3], [0], [0, 1, 2])),
        ((4, 3), 3, "only_first", "left", ([3], [0, 1, 2], [0, 1, 2, 3])),
        ((4, 3), 0, "only_first", "left", ([0, 1, 2, 3], [0, 1, 2], [])),
    ],
)
def test_truncate_sequences(tokenizer, sizes, remove, strategy, side, expected):
    tokenizer.truncation_side = side
    first, second = ([*range(size)] if size else None for size in sizes)
    assert tokenizer.truncate_sequences(first, second, remove, strategy, stride=1) == expected


def test_truncation_that_cannot_be(tokenizer):
    with pytest.raises(ValueError, match="truncation='only_first' must remove 2 of 2 tokens, which leaves none"):
        tokenizer.truncate_sequences([1, 2], [1, 2, 3], 2, "only_first")
    with pytest.raises(ValueError, match="must remove 1 tokens of text_pair, which is not given"):
        tokenizer.truncate_sequences([1, 2], None, 1, "only_second")
    with pytest.raises(ValueError, match="truncation_strategy must be one of"):
        tokenizer.truncate_sequences([1, 2], None, 1, "first")


@pytest.mark.parametrize("make", [lambda: BertTokenizer(VOCAB), lambda: RoCBertTokenizer(*ROCBERT)])
def test_added_tokens(make):
    tokenizer = make()
    size = len(tokenizer)
    assert tokenizer.add_tokens(["covid", "hello"]) == 1, "hello has an id"
    assert tokenizer.add_tokens("covid") == 0 and len(tokenizer) == size + 1 == tokenizer.vocab_size + 1
    assert tokenizer.add_tokens(AddedToken("[E1]", lstrip=True), special_tokens=True) == 1
    assert tokenizer.tokenize("hellocovid [E1]world") == ["hello", "covid", "[E1]", "world"]
    assert tokenizer("x [E1]", return_offsets_mapping=True).offset_mapping[2] in ((1, 6), (2, 6))
    ids = tokenizer.encode("hello [E1] covid")
    assert tokenizer.convert_ids_to_tokens(ids)[1:-1] == ["hello", "[E1]", "covid"]
    assert tokenizer.get_added_vocab()["covid"] == size == tokenizer.get_vocab()["covid"]
    assert tokenizer.added_tokens_decoder[size].content == "covid"
    with pytest.raises(ValueError, match="at least one character"):
        tokenizer.add_tokens([""])
    with pytest.raises(TypeError, match=r"a token must be a str or a tokenizers.AddedToken, got int"):
        tokenizer.add_tokens([3])


@pytest.mark.parametrize("make", [lambda: BertTokenizer(VOCAB), lambda: RoCBertTokenizer(*ROCBERT)])
def test_added_tokens_that_are_special_are_skipped(make):
    tokenizer = make()
    tokenizer.add_tokens("[E1]", special_tokens=True)
    ids = tokenizer.encode("hello [E1] world")
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hello world"
    assert tokenizer.convert_ids_to_tokens(ids, skip_special_tokens=True) == ["hello", "world"]


@pytest.mark.parametrize("make", [lambda: BertTokenizer(VOCAB), lambda: RoCBertTokenizer(*ROCBERT)])
def test_roles(make):
    tokenizer = make()
    size = len(tokenizer)
    assert tokenizer.add_special_tokens({"bos_token": "[BOS]", "additional_special_tokens": ["[A]", "[B]"]}) == 3
    assert (tokenizer.bos_token, tokenizer.bos_token_id, tokenizer.eos_token_id) == ("[BOS]", size, None)
    assert tokenizer.all_special_tokens[0] == "[BOS]" and tokenizer.all_special_ids[-2:] == [size + 1, size + 2]
    assert tokenizer.add_special_tokens({"extra_special_tokens": ["[C]"]}, replace_extra_special_tokens=False) == 1
    assert tokenizer.additional_special_tokens == ["[A]", "[B]", "[C]"]
    assert tokenizer.additional_special_tokens_ids == [size + 1, size + 2, size + 3]
    assert tokenizer.decode(tokenizer.encode("hello [A] [C]"), skip_special_tokens=True) == "hello"
    tokenizer.pad_token = tokenizer.sep_token
    assert tokenizer(["hello hello", "hello"], padding=True).input_ids[1][-1] == tokenizer.sep_token_id
    assert tokenizer.add_special_tokens({"cls_token": "[NEW]"}) == 1
    assert tokenizer.encode("hello")[0] == tokenizer.build_inputs_with_special_tokens([7])[0] == size + 4
    with pytest.raises(ValueError, match=r"mask_token must be in the vocabulary, got '\[X\]'; add it with add_special"):
        tokenizer.mask_token = "[X]"
    with pytest.raises(ValueError, match="must be different tokens, both are"):
        tokenizer.mask_token = tokenizer.sep_token
    with pytest.raises(ValueError, match="unk_token must be tokens of the vocabulary, got None"):
        tokenizer.unk_token = None
    with pytest.raises(ValueError, match=r"the name of a special token must be one of .* got 'cls'"):
        tokenizer.add_special_tokens({"cls": "[Y]"})
    with pytest.raises(ValueError, match=r"additional_special_tokens must be a list of tokens, got '\[Y\]'"):
        tokenizer.add_special_tokens({"additional_special_tokens": "[Y]"})
    assert len(tokenizer) == size + 5, "what failed added nothing"


def test_unk_token_can_be_another():
    tokenizer = BertTokenizer(VOCAB, unk_token="[unused0]")
    assert tokenizer.tokenize("\u4e0d\u4e0d nothing\u2603")[-1] == "[unused0]"
    tokenizer.unk_token = "[unused1]"
    assert tokenizer.tokenize("\u2603") == ["[unused1]"] and tokenizer.convert_tokens_to_ids("no such token") == 2


def test_tokens_to_text(tokenizer):
    assert tokenizer.convert_tokens_to_string(["un", "##aff", "##able", "dog", "."]) == "unaffable dog."
    rocbert = RoCBertTokenizer(*ROCBERT)
    assert rocbert.convert_tokens_to_string(["un", "##aff", "##able", "."]) == "unaffable ."
    rows = torch.tensor([[156, 5], [158, 5]])
    assert tokenizer.decode(rows, skip_special_tokens=True) == tokenizer.batch_decode(rows, True) == ["hello", "world"]
    assert tokenizer.batch_decode([torch.tensor([156]), torch.tensor([158, 156])]) == ["hello", "world hello"]
    assert tokenizer.batch_decode([156, 158]) == ["hello world"] and tokenizer.batch_decode([]) == []


def test_arrays_of_numpy(tokenizer):
    numpy = pytest.importorskip("numpy", reason="return_tensors='np' needs numpy, which is not installed")
    out = tokenizer(["hello", "hello world"], padding=True, return_tensors="np")
    assert isinstance(out.input_ids, numpy.ndarray) and out.input_ids.tolist() == [[4, 156, 5, 0], [4, 156, 158, 5]]
