"""BertTokenizer and ConvBertTokenizer on texts: golden ids, padding, truncation, what results know."""

from __future__ import annotations

import itertools
import pickle
import subprocess
import sys

import minilm
import pytest
import tokenization_cases as cases
import torch
from tokenization_cases import TEXTS, VOCAB

from fastconv import tokenization

pytest.importorskip("tokenizers", reason="the tokenizers stand on tokenizers, which is not installed")
from fastconv.tokenization import BatchEncoding, BertTokenizer

# What transformers 4.57's slow tokenizers give for the words of never_split: text is lower-cased first, letter by
# letter, so that a word with capitals is never found. From 5.0 on, and here, such a word is left as it is.
NEVER_SPLIT = {
    "  Hello   world  ": ["Hello", "world"],
    "CAF\u00c9": ["CAF\u00c9"],
    "CAFE\u0301": ["CAF\u00c9"],
    "\u039b\u038c\u0393\u039f\u03a3 \u03bb\u03cc\u03b3\u03bf\u03c2 \u03a3 \u03c3\u03c2": [
        *("\u03bb\u03bf\u03b3\u03bf\u03c2", "\u03bb\u03bf\u03b3\u03bf\u03c2", "\u03c3", "\u03c3", "##\u03c2")
    ],
    "\u0391\u03a3 \u039f\u0394\u03a5\u03a3\u03a3\u0395\u03a5\u03a3": ["\u03b1", "##\u03c2", "[UNK]"],
    "[NEVER] never [never] [Never]": ["[NEVER]", "never", "[", "never", "]", "[", "never", "]"],
    "New-York new york": ["New-York", "new", "york"],
}


@pytest.fixture(scope="module")
def tokenizer() -> BertTokenizer:
    return BertTokenizer(VOCAB)


@pytest.mark.parametrize(
    "name, options, expected",
    [
        pytest.param(*case, id="-".join([case[0], *(f"{name}={value}" for name, value in case[1].items())]))
        for case in cases.golden_ids()
    ],
)
def test_ids_are_the_golden_ones(name, options, expected):
    tokenizer = getattr(tokenization, name)(VOCAB, **options)
    different = {}
    if "Fast" not in name and tokenizer.is_fast:
        different = cases.fast_instead(options)
    elif options.get("never_split") and options["do_lower_case"]:
        different = NEVER_SPLIT
    ids = tokenizer(TEXTS, add_special_tokens=False).input_ids
    assert [text for text, got, want in zip(TEXTS, ids, expected, strict=True) if got != want] == [*different]
    assert {text: tokenizer.tokenize(text) for text in different} == different


@pytest.mark.parametrize("case", cases.read("full_and_decode.json")["full"], ids=lambda case: case["tokenizer"])
def test_special_tokens_offsets_and_decode_are_the_golden_ones(case):
    tokenizer = getattr(tokenization, case["tokenizer"])(VOCAB, **case["kwargs"])
    out = tokenizer(TEXTS, return_special_tokens_mask=True, return_offsets_mapping=True)
    different = {} if "Fast" in case["tokenizer"] else cases.fast_instead(case["kwargs"])
    compared = [index for index, text in enumerate(TEXTS) if text not in different]
    assert len(compared) >= 139
    for index in compared:
        text, row = TEXTS[index], case["rows"][index]
        ids = row["ids"]
        assert out.input_ids[index] == ids == tokenizer.encode(text), text
        assert out.special_tokens_mask[index] == row.get("mask", out.special_tokens_mask[index]), text
        offsets = [list(offset) for offset in out.offset_mapping[index]]
        assert offsets == row.get("offsets", offsets), text
        if "decode" in row:
            assert tokenizer.decode(ids) == row["decode"], text
            assert tokenizer.decode(torch.tensor(ids), skip_special_tokens=True) == row["decode_skip"], text
        if "offsets" in row:  # the slow tokenizers clean nothing up then, the fast ones some
            unclean = row.get("decode_skip_noclean", row["decode_skip"])
            assert tokenizer.decode(ids, True, clean_up_tokenization_spaces=False) == unclean, text


def test_minilm_sentences_and_pairs_are_the_golden_ones():
    golden, tokenizer = minilm.golden(), BertTokenizer.from_pretrained(minilm.folder())
    assert (tokenizer.vocab_size, tokenizer.model_max_length) == (30522, 512)
    sentences = golden["sentences"]
    out = tokenizer([row["text"] for row in sentences], return_offsets_mapping=True)
    assert out.input_ids == [row["ids"] for row in sentences]
    assert [[list(offset) for offset in row] for row in out.offset_mapping] == [row["offsets"] for row in sentences]
    assert tokenizer.batch_decode(out.input_ids, skip_special_tokens=True) == [row["decode"] for row in sentences]
    assert [tokenizer.convert_ids_to_tokens(row["ids"]) for row in sentences] == [row["tokens"] for row in sentences]
    cased = BertTokenizer(minilm.folder() / "vocab.txt", do_lower_case=False)
    assert cased([row["text"] for row in sentences]).input_ids == [row["cased_ids"] for row in sentences]
    for pair in golden["pairs"]:
        got = tokenizer(pair["a"], pair["b"], truncation=True, padding="max_length", max_length=24)
        for name in ("input_ids", "token_type_ids", "attention_mask"):
            assert got[name] == pair[name]


def test_truncation_and_padding_in_tokenizer_json_are_off():
    # The tokenizer.json of this package has truncation to 128 tokens and padding to 128 switched on.
    tokenizer = BertTokenizer.from_pretrained(minilm.folder())
    assert tokenizer("No.").input_ids == [101, 2053, 1012, 102]
    assert len(tokenizer("word " * 300).input_ids) == 302


def test_padding_and_truncation(tokenizer):
    texts = ["hello", "the quick brown fox jumps over the lazy dog"]
    short, long = tokenizer(texts).input_ids
    out = tokenizer(texts, padding=True, return_tensors="pt")
    assert out.input_ids.dtype == torch.int64
    assert out.input_ids.tolist() == [short + [0] * (len(long) - len(short)), long]
    assert out.attention_mask.sum(1).tolist() == [len(short), len(long)]
    assert out.token_type_ids.unique().tolist() == [0]
    left = tokenizer(texts, padding="longest", padding_side="left")
    assert left.input_ids[0] == [0] * (len(long) - len(short)) + short
    out = tokenizer(texts, padding="max_length", max_length=6, truncation=True, return_length=True)
    assert out.input_ids == [[*short, 0, 0, 0], [*long[:5], long[-1]]]
    assert out.length == [6, 6]
    assert tokenizer(texts, max_length=6).input_ids[1] == [*long[:5], long[-1]]
    assert [len(row) for row in tokenizer(texts, padding=True, pad_to_multiple_of=8).input_ids] == [16, 16]
    assert tokenizer(texts, truncation=True).input_ids == [short, long], "no limit is known"
    limited = BertTokenizer(VOCAB, model_max_length=6, truncation_side="left")
    assert limited(texts, truncation=True, padding="max_length").input_ids[1] == [long[0], *long[-5:]]


def test_pairs_are_truncated_as_asked(tokenizer):
    a, b = "jumping jumper running", "new york hello"
    first, second = (tokenizer.encode(text, add_special_tokens=False) for text in (a, b))
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    assert tokenizer.encode(a, b) == [cls, *first, sep, *second, sep]
    assert tokenizer.encode(a, b, truncation="only_first", max_length=8) == [cls, *first[:2], sep, *second, sep]
    got = tokenizer.encode(a, b, truncation="only_second", max_length=len(first) + 5)
    assert got == [cls, *first, sep, *second[:2], sep]
    out = tokenizer([a, b], [b, a], truncation=True, max_length=9)
    assert [len(row) for row in out.input_ids] == [9, 9]
    assert out.token_type_ids[1] == [0] * (out.input_ids[1].index(sep) + 1) + [1] * (8 - out.input_ids[1].index(sep))


def test_overflow_has_the_stride(tokenizer):
    text = "the quick brown fox jumps over the lazy dog"
    whole = tokenizer.encode(text, add_special_tokens=False)
    out = tokenizer([text, "hello"], truncation=True, max_length=6, stride=2, return_overflowing_tokens=True)
    assert out.overflow_to_sample_mapping == [0] * (len(out.input_ids) - 1) + [1]
    rows = [row[1:-1] for row in out.input_ids[:-1]]
    for before, after in itertools.pairwise(rows):
        assert after[:2] == before[-2:]
    assert rows[0] + [number for row in rows[1:] for number in row[2:]] == whole


def test_words_that_are_split_already(tokenizer):
    assert tokenizer(["new", "york"], is_split_into_words=True).input_ids == tokenizer("new york").input_ids
    batch = tokenizer([["new", "york"], ["hello"]], is_split_into_words=True).input_ids
    assert batch == tokenizer(["new york", "hello"]).input_ids

    assert tokenizer([], is_split_into_words=True).input_ids == [4, 5], "a text without words"
    assert tokenizer.encode(["new", "york"], is_split_into_words=True) == tokenizer.encode("new york")


def test_pad_of_tokenized_rows(tokenizer):
    rows = [tokenizer("hello") | {"labels": 1}, tokenizer("the quick brown fox") | {"labels": 0}]
    out = tokenizer.pad(rows, return_tensors="pt")
    whole = tokenizer(["hello", "the quick brown fox"], padding=True, return_tensors="pt")
    for name in whole:
        assert torch.equal(out[name], whole[name])
    assert out.labels.tolist() == [1, 0]
    out = tokenizer.pad({"input_ids": [[4, 5], [4, 7, 5]]})
    assert out == {"input_ids": [[4, 5, 0], [4, 7, 5]], "attention_mask": [[1, 1, 0], [1, 1, 1]]}
    assert tokenizer.pad({"input_ids": [4, 5]}, "max_length", 4).input_ids == [4, 5, 0, 0]
    out = tokenizer.pad([{"input_ids": torch.tensor([4, 5])}], pad_to_multiple_of=4)
    assert out.input_ids.tolist() == [[4, 5, 0, 0]], "tensors stay tensors"
    assert tokenizer.pad({"input_ids": torch.tensor([[4, 5]]).numpy()}).attention_mask.tolist() == [[1, 1]]


@pytest.mark.parametrize(
    "rows, error, message",
    [
        (
            [{"input_ids": [4], "labels": 1}, {"input_ids": [4]}],
            ValueError,
            "got input_ids, labels at 0 and input_ids at",
        ),
        ([{"input_ids": [4]}, {"input_ids": [4], "labels": 1}], ValueError, "got input_ids at 0 and input_ids, labels"),
        ({"labels": [4]}, ValueError, "pad needs input_ids, got only labels"),
        ([[4, 5], [4]], TypeError, "pad needs a dict with input_ids or a list of such dicts, got a list of list"),
        ([{"input_ids": torch.tensor([[4, 5]])}], ValueError, "pad needs rows of ids as input_ids, got .* a batch"),
        ([{"input_ids": [4]}, {"input_ids": 4}], ValueError, "pad needs rows of ids as input_ids, got a number"),
    ],
)
def test_rows_that_can_not_be_padded(tokenizer, rows, error, message):
    with pytest.raises(error, match=message):
        tokenizer.pad(rows)


def test_rows_of_one_length_need_no_pad_token():
    tokenizer = BertTokenizer(VOCAB, pad_token=None)
    assert tokenizer(["hello", "world"], padding=True).input_ids == [[4, 156, 5], [4, 158, 5]]
    assert tokenizer.pad([tokenizer("hello"), tokenizer("world")]).input_ids == [[4, 156, 5], [4, 158, 5]]
    with pytest.raises(ValueError, match="padding=True needs a pad token"):
        tokenizer(["hello", "hello world"], padding=True)


def test_tokens_and_ids(tokenizer):
    assert tokenizer.convert_tokens_to_ids("[MASK]") == tokenizer.mask_token_id == 6
    assert tokenizer.convert_tokens_to_ids(["hello", "no such word"]) == [156, tokenizer.unk_token_id]
    assert tokenizer.convert_ids_to_tokens(156) == "hello"
    assert tokenizer.convert_ids_to_tokens(torch.tensor([4, 156, 5]), skip_special_tokens=True) == ["hello"]
    assert tokenizer.convert_ids_to_tokens(10**6) is None
    assert tokenizer.tokenize("Hello unaffable") == ["hello", "un", "##aff", "##able"]
    assert tokenizer.vocab_size == len(tokenizer) == len(VOCAB.read_text(encoding="utf-8").splitlines())
    assert tokenizer.all_special_ids == [3, 5, 0, 4, 6]
    assert tokenizer.decode(156) == "hello"


def test_empty_text_and_empty_batch(tokenizer):
    assert tokenizer("").input_ids == [4, 5]
    assert tokenizer([]) == {"input_ids": [], "token_type_ids": [], "attention_mask": []}
    assert tokenizer([], padding=True, return_tensors="pt").input_ids.shape == (0, 0)


def test_the_result_is_a_dict_with_attributes(tokenizer):
    out = tokenizer("hello", return_tensors="pt")
    assert isinstance(out, dict) and dict(**out).keys() == out.keys()
    assert out.to("cpu") is out and out.to("meta").input_ids.is_meta
    with pytest.raises(AttributeError, match="no 'labels' here, only input_ids"):
        _ = out.labels
    copy = pickle.loads(pickle.dumps(tokenizer("hello")))
    assert isinstance(copy, BatchEncoding) and copy.input_ids == [4, 156, 5]


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((None,), TypeError, "text must be a str or a list of str, got NoneType"),
        ((5,), TypeError, "text must be a str or a list of str, got int"),
        ((["a", 5],), TypeError, "text must be a str or a list of str, got int at 1"),
        (([("a", "b")],), TypeError, "got tuple at 0; for pairs give text_pair"),
        (("a", ["b"]), TypeError, "text_pair must be a str or a list of str, got list at 0"),
        ((["a"], "b"), TypeError, "text_pair must be a str or a list of str, got str"),
        ((["a"], ["b", "c"]), ValueError, "text and text_pair must have the same length, got 1 and 2"),
        (("a\ud800b",), ValueError, r"text must be valid Unicode, got the lone surrogate '\\ud800' at 0"),
    ],
)
def test_texts_that_are_none(tokenizer, arguments, error, message):
    with pytest.raises(error, match=message):
        tokenizer(*arguments)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"truncation": "first"}, "truncation must be one of 'longest_first', .* got 'first'"),
        ({"padding": "max"}, "padding must be True, False, 'longest' or 'max_length', got 'max'"),
        ({"padding": "max_length"}, "padding='max_length' needs max_length"),
        ({"padding_side": "top"}, "padding_side must be one of 'right', 'left', got 'top'"),
        ({"padding": True, "pad_to_multiple_of": -4}, "pad_to_multiple_of must be at least 1, or None, got -4"),
        ({"return_tensors": "tf"}, "return_tensors must be one of 'pt', 'np', None, got 'tf'"),
        ({"return_tensors": "pt"}, r"a tensor needs rows of equal length, got lengths \[3, 4\] in input_ids"),
        ({"truncation": True, "max_length": 1}, "max_length must be at least 2, the number of special tokens, got 1"),
        ({"truncation": True, "max_length": 6, "stride": 4}, "stride must be from 0 to 3 for max_length 6, got 4"),
        ({"truncation": "only_second", "max_length": 3}, "can't tokenize with truncation='only_second'"),
        (
            {"truncation": True, "padding": True, "max_length": 6, "pad_to_multiple_of": 4},
            "can't be truncated to 6 tokens and padded to a multiple of 4",
        ),
    ],
)
def test_settings_that_cannot_be(tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        tokenizer(["hello", "hello world"], **options)


def test_negative_ids_have_no_text(tokenizer):
    for wrong in (-100, 2**32):
        with pytest.raises(ValueError, match=f"ids must be from 0 to 4294967295, got {wrong}"):
            tokenizer.decode([156, wrong])
        with pytest.raises(ValueError, match=f"ids must be from 0 to 4294967295, got {wrong}"):
            tokenizer.convert_ids_to_tokens(wrong)


def test_import_is_lazy():
    code = "import sys, fastconv.tokenization; sys.exit('tokenizers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_overflow_of_a_pair_has_its_errors(tokenizer):
    question, context = "hello", "the quick brown fox jumps over the lazy dog"
    options = {"truncation": "only_second", "max_length": 9, "stride": 2, "return_overflowing_tokens": True}
    out = tokenizer(question, context, **options)
    first = tokenizer.encode(question)
    assert len(out.input_ids) > 2 and all(row[:3] == first for row in out.input_ids)
    with pytest.raises(ValueError, match=r"can't tokenize with truncation='only_second', max_length=9, stride=2"):
        tokenizer(context[:19], context, **options)  # leaves room for 2 tokens of the second
    assert tokenizer(question, context, **options) == out, "an error leaves it as it was"
    slow = BertTokenizer(VOCAB, never_split=["never"])
    assert dict(slow(question, context, **options)) == dict(out)
    with pytest.raises(ValueError, match="stride must be less than the 2 tokens that a row has of the text, got 2"):
        slow(context[:19], context, **options)
    with pytest.raises(ValueError, match="give truncation='only_first' or 'only_second', got 'longest_first'"):
        slow(question, context, **{**options, "truncation": True})


def test_the_result_knows_words_and_characters(tokenizer):
    out = tokenizer(["Hello  unaffable new-york"], ["an unaffable dog"], padding="max_length", max_length=20)
    assert out.tokens()[:5] == out[0].tokens[:5] == ["[CLS]", "hello", "un", "##aff", "##able"]
    assert out.tokens(0)[-1] == "[PAD]" and out.is_fast and out.n_sequences == 2
    assert out.word_ids(0)[:8] == [None, 0, 1, 1, 1, 2, 3, 4]
    assert out.sequence_ids()[7:10] == [0, None, 1]
    assert out.char_to_token(7) == out.char_to_token(0, 7) == 2 and out.char_to_token(5) is None
    assert out.char_to_word(8) == 1 and out.char_to_token(0, 3, sequence_index=1) == out.sequence_ids().index(1) + 2
    assert out.token_to_chars(0, 3) == (9, 12) and out.token_to_chars(0) is None
    assert out.token_to_chars(3).start == 9 and out.word_to_chars(1).end == 16 and out.word_to_chars(99) is None
    assert out.word_to_tokens(1) == (2, 5) and out.word_to_tokens(0, 1, sequence_index=1) == (11, 14)
    assert out.token_to_word(4) == out.token_to_word(0, 4 - 20) == 1 and out.token_to_sequence(0, 9) == 1
    with pytest.raises(ValueError, match="known of what a tokenizer made out of texts, not of rows out of ids"):
        tokenizer.pad(dict(out)).word_ids()
    slow = BertTokenizer(VOCAB, never_split=["never"])("hello unaffable", "dog")
    assert slow.word_ids() == tokenizer("hello unaffable", "dog").word_ids() and not slow.is_fast
    assert slow.sequence_ids() == [None, 0, 0, 0, 0, None, 1, None]
    with pytest.raises(ValueError, match="char_to_token is not known of rows that were made in Python"):
        slow.char_to_token(0)


def test_rows_that_python_makes_are_those_of_tokenizers(tokenizer):
    slow = BertTokenizer(VOCAB, never_split=["never"])
    texts = [text for text in TEXTS if text not in cases.fast_instead({}) and len(tokenizer.tokenize(text)) < 30]
    # The slow one composes an accent with its letter before it is stripped, so that the letter's offsets have both.
    options = {"return_offsets_mapping": True, "return_special_tokens_mask": True}
    texts = [text for text in texts if slow(text, **options) == tokenizer(text, **options)]
    assert len(texts) > 110
    pairs = texts[::-1]
    for side, stride, limit in itertools.product(("left", "right"), (0, 1, 3), (8, 13)):
        for each in (slow, tokenizer):
            each.truncation_side = each.padding_side = side
        settings = {
            "stride": stride,
            "max_length": limit,
            "padding": True,
            "return_overflowing_tokens": True,
            **options,
        }
        assert dict(slow(texts, truncation=True, **settings)) == dict(tokenizer(texts, truncation=True, **settings))
        same = 0
        for text, pair in zip(texts, pairs, strict=True):
            for truncation in ("only_first", "only_second"):
                found = []
                for each in (slow, tokenizer):
                    try:
                        found.append(dict(each(text, pair, truncation=truncation, **{**settings, "stride": 0})))
                    except ValueError:
                        found.append("too short to be cut")
                assert found[0] == found[1]
                same += isinstance(found[0], dict)
        assert same > 50
    tokenizer.truncation_side = tokenizer.padding_side = "right"


def test_split_special_tokens():
    assert BertTokenizer(VOCAB).tokenize("a [MASK]") == ["a", "[MASK]"]
    assert BertTokenizer(VOCAB, split_special_tokens=True).tokenize("a [MASK]")[:2] == ["a", "["]
