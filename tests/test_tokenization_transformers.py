"""The tokenizers against those of transformers: 2,000 random texts, every setting of a call, folders both ways."""

from __future__ import annotations

import itertools
import json
import random
import shutil

import pytest
import tokenization_cases as cases
from tokenization_cases import ROCBERT, TEXTS, VOCAB

from fastconv.tokenization import BertTokenizer, ConvBertTokenizer, RoCBertTokenizer

tokenizers = pytest.importorskip("tokenizers", reason="the tokenizers stand on tokenizers, which is not installed")
transformers = pytest.importorskip("transformers", reason="the package transformers is not installed")

VERSION_5 = int(transformers.__version__.split(".")[0]) >= 5
only_5 = pytest.mark.skipif(
    not VERSION_5, reason="transformers 4 lower-cases a text before it looks for added tokens and never_split"
)
ROCBERT_NAMES = [str(file) for file in ROCBERT]
FUZZ = cases.random_texts(2000, seed=1)
OPTIONS = (
    {},
    {"do_lower_case": False},
    {"strip_accents": False},
    {"do_lower_case": False, "strip_accents": True},
    {"tokenize_chinese_chars": False},
)
SLOW_OPTIONS = (
    {"never_split": ["Hello", "CAFE\u0301", "CAF\u00c9", "covid.", "[E1]", "new-york", "."]},
    {"do_basic_tokenize": False},
)
MARKED = {"return_special_tokens_mask": True, "return_token_type_ids": True}


def with_added(tokenizer):
    """The same added tokens in ours and in theirs, with each of their fields."""
    fields = ("new token", "lstrip"), ("zqzq", "single_word"), ("yqyq", "rstrip"), ("[e2]", "normalized")
    tokenizer.add_tokens(["covid", *(tokenizers.AddedToken(content, **{field: True}) for content, field in fields)])
    tokenizer.add_special_tokens({"additional_special_tokens": ["[E1]"]})
    return tokenizer


def assert_same(ours, theirs, texts, **options):
    """Every entry of a call on these texts, and both ways of decoding."""
    got, expected = ours(texts, **options), theirs(texts, **options)
    assert got.keys() >= expected.keys()
    for name, rows in expected.items():
        different = [text for text, row, other in zip(texts, got[name], rows, strict=True) if row != other]
        assert different == [], name
    for skip, clean in ((False, False), (True, True)):
        wanted = [theirs.decode(row, skip, clean_up_tokenization_spaces=clean) for row in expected["input_ids"]]
        assert ours.batch_decode(got.input_ids, skip, clean) == wanted


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_bert_on_random_texts(options):
    ours = with_added(BertTokenizer(VOCAB, **options))
    theirs = with_added(transformers.BertTokenizerFast(str(VOCAB), **options))
    assert len({number for row in ours(FUZZ).input_ids for number in row}) > 250, (
        "these texts try much of the vocabulary"
    )
    assert_same(ours, theirs, FUZZ, return_offsets_mapping=True, **MARKED)


@only_5
@pytest.mark.parametrize(
    "options, vocab",
    [
        *((options, VOCAB) for options in (*OPTIONS, *SLOW_OPTIONS, {"split_special_tokens": True})),
        *((options, ROCBERT[0]) for options in ({}, SLOW_OPTIONS[0])),
    ],
    ids=str,
)
def test_rocbert_on_random_texts(options, vocab):
    ours = RoCBertTokenizer(vocab, *ROCBERT[1:], **options)
    theirs = transformers.RoCBertTokenizer(str(vocab), *ROCBERT_NAMES[1:], **options)
    if "do_basic_tokenize" in options:  # else it asks a part that it doesn't have for do_lower_case
        theirs = type("Lower", (transformers.RoCBertTokenizer,), {"do_lower_case": True})(
            str(vocab), *ROCBERT_NAMES[1:], **options
        )
    assert_same(with_added(ours), with_added(theirs), FUZZ, **MARKED)


@only_5
@pytest.mark.parametrize("options", SLOW_OPTIONS, ids=str)
def test_never_split_on_random_texts(options):
    from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy

    legacy = type("Lower", (BertTokenizerLegacy,), {"do_lower_case": True})
    ours, theirs = with_added(BertTokenizer(VOCAB, **options)), with_added(legacy(str(VOCAB), **options))
    got, expected = ours(FUZZ, **MARKED), theirs(FUZZ, **MARKED)
    assert [
        text for text, row, other in zip(FUZZ, got.input_ids, expected["input_ids"], strict=True) if row != other
    ] == []
    assert got.special_tokens_mask == expected["special_tokens_mask"]


@pytest.mark.filterwarnings("ignore:`max_length` is ignored")
@pytest.mark.parametrize("padding", [False, True, "max_length"])
@pytest.mark.parametrize("truncation", [None, True, False, "only_first", "longest_first"])
@pytest.mark.parametrize("pair", [False, True])
def test_bert_in_every_setting(tmp_path, padding, truncation, pair):
    tokenizer = BertTokenizer(VOCAB)
    tokenizer.save_pretrained(tmp_path)
    theirs = transformers.BertTokenizerFast.from_pretrained(tmp_path)
    texts = [text for text in TEXTS if len(tokenizer.tokenize(text)) < 20]
    options = {"padding": padding, "truncation": truncation, "max_length": 24, "pad_to_multiple_of": 4}
    options |= {"return_special_tokens_mask": True, "return_offsets_mapping": True, "return_length": True}
    pairs = texts[::-1] if pair else None
    ours = tokenizer(texts, pairs, **options)
    expected = theirs(texts, pairs, **options)
    assert ours.keys() == expected.keys()
    for name in ours:
        assert ours[name] == expected[name], name
    for index in range(0, len(texts), 9):
        assert ours.word_ids(index) == expected.word_ids(index)
        assert ours.tokens(index) == expected.tokens(index)
        assert ours.sequence_ids(index) == expected.sequence_ids(index)
        assert [ours.char_to_token(index, number) for number in range(9)] == [
            expected.char_to_token(index, number) for number in range(9)
        ]
    single = tokenizer(texts[5], texts[6], **options)
    expected = dict(theirs(texts[5], texts[6], **options))
    assert {name: single[name] for name in single if name != "length"} == {
        name: expected[name] for name in expected if name != "length"
    }


def test_bert_overflow_of_random_settings():
    ours, theirs = BertTokenizer(VOCAB), transformers.BertTokenizerFast(str(VOCAB))
    made, tried = random.Random(0), 0
    for _ in range(400):
        text, pair = made.choice(TEXTS), made.choice([None, *TEXTS])
        options = {"truncation": made.choice([True, "only_first", "only_second"]), "max_length": made.randint(4, 12)}
        # A larger stride makes `tokenizers` panic where a pair leaves the text that is cut less.
        options |= {"stride": 0 if pair else made.randint(0, 1), "return_overflowing_tokens": True}
        options |= {"return_offsets_mapping": True}
        for each in (ours, theirs):
            each.truncation_side, each.padding_side = (
                options["truncation"] and "left" if tried % 2 else "right",
                "right",
            )
        try:
            expected = dict(theirs(text, pair or None, **options))
        except Exception:  # too short a text to be cut, which is its panic or its Exception
            with pytest.raises(ValueError, match="can't tokenize with truncation="):
                ours(text, pair or None, **options)
            continue
        assert dict(ours(text, pair or None, **options)) == expected
        tried += 1
    assert tried > 200


@only_5
@pytest.mark.filterwarnings("ignore:`max_length` is ignored")
def test_rocbert_in_random_settings():
    ours, theirs = RoCBertTokenizer(*ROCBERT), transformers.RoCBertTokenizer(*ROCBERT_NAMES)
    words = ROCBERT[0].read_text(encoding="utf-8").split()
    made, tried = random.Random(0), 0
    for _ in range(1500):
        count = made.randint(1, 3)
        texts, pairs = ([" ".join(made.choices(words, k=made.randint(1, 8))) for _ in range(count)] for _ in range(2))
        options = {"truncation": made.choice([None, True, False, "only_first", "only_second"])}
        options |= {"max_length": made.randint(5, 14), "padding": made.choice([False, True, "max_length"])}
        options |= {"padding_side": made.choice(["left", "right"]), "return_special_tokens_mask": True}
        options |= {"return_token_type_ids": True, "pad_to_multiple_of": made.choice([None, None, 4])}
        ours.truncation_side = theirs.truncation_side = made.choice(["left", "right"])
        pair = pairs if made.random() < 0.5 or options["truncation"] == "only_second" else None
        if made.random() < 0.3:
            texts, pair = texts[0], pair and pair[0]
        elif options["padding"] is True:
            options["return_tensors"] = made.choice(["pt", None])
        try:
            got = ours(texts, pair, **options)
        except ValueError as error:
            # theirs goes on with rows longer than max_length where the text that is cut is too short
            assert "leaves none of them" in str(error) or "can't be truncated" in str(error)
            continue
        expected = theirs(texts, pair, **options)
        assert got.keys() == expected.keys()
        for name in got:
            assert plain(got[name]) == plain(expected[name]), (name, texts, pair, options)
        tried += 1
    assert tried > 1000


@only_5
def test_rocbert_prepare_for_model():
    ours, theirs = RoCBertTokenizer(*ROCBERT), transformers.RoCBertTokenizer(*ROCBERT_NAMES)
    made = random.Random(0)
    for truncation, pair, stride, special, overflow in itertools.product(
        (None, True, "only_first"), (False, True), (0, 2), (False, True), (False, True)
    ):
        streams = [[made.randint(5, 30) for _ in range(9)] for _ in range(3)]
        pairs = [[made.randint(5, 30) for _ in range(4)] for _ in range(3)] if pair else [None] * 3
        options = {"truncation": truncation, "stride": stride, "add_special_tokens": special, "max_length": 12}
        options |= {"return_overflowing_tokens": overflow, "return_special_tokens_mask": True, "padding": "longest"}
        options |= {"return_token_type_ids": True if special else None, "return_length": True}
        if pair and overflow and truncation is True:
            for each in (ours, theirs):
                with pytest.raises(ValueError, match="longest_first"):
                    each.prepare_for_model(*streams, *pairs, **options)
            continue
        got, expected = (dict(each.prepare_for_model(*streams, *pairs, **options)) for each in (ours, theirs))
        if not special:
            got.pop("token_type_ids")  # theirs has none by default since 5.0, and none without special tokens
        assert got == expected


def plain(value):
    return value.tolist() if hasattr(value, "tolist") else value


@pytest.mark.parametrize(
    "options", [{}, {"do_lower_case": False, "strip_accents": True, "model_max_length": 77}], ids=str
)
@pytest.mark.parametrize("name", ["BertTokenizer", "ConvBertTokenizer"])
def test_bert_folders_both_ways(name, options, tmp_path):
    ours = with_added({"BertTokenizer": BertTokenizer, "ConvBertTokenizer": ConvBertTokenizer}[name](VOCAB, **options))
    ours.save_pretrained(tmp_path / "ours")
    texts = [*TEXTS, *FUZZ[:200]]
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert (theirs.model_max_length, len(theirs)) == (ours.model_max_length, len(ours))
    assert_same(ours, theirs, texts, return_offsets_mapping=True)
    theirs = with_added(getattr(transformers, f"{name}Fast")(str(VOCAB), **options))
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = type(ours).from_pretrained(tmp_path / "theirs")
    assert (loaded.model_max_length, loaded.additional_special_tokens) == (ours.model_max_length, ["[E1]"])
    assert_same(loaded, theirs, texts, return_offsets_mapping=True)


@pytest.mark.parametrize(
    "options", [{}, {"do_lower_case": False, "strip_accents": True, "model_max_length": 77}], ids=str
)
def test_rocbert_folders_both_ways(options, tmp_path):
    texts = cases.read("rocbert/golden.json")["texts"] + ["covid [E1] new token"]
    ours = with_added(RoCBertTokenizer(*ROCBERT, **options))
    ours.save_pretrained(tmp_path / "ours")
    (tmp_path / "ours" / "config.json").write_text('{"model_type": "roc_bert"}')
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert (theirs.model_max_length, len(theirs)) == (ours.model_max_length, len(ours))
    assert_same(ours, theirs, texts)
    theirs = with_added(transformers.RoCBertTokenizer(*ROCBERT_NAMES, **options))
    theirs.save_pretrained(tmp_path / "theirs")
    assert_same(RoCBertTokenizer.from_pretrained(tmp_path / "theirs"), theirs, texts)


def test_folders_without_a_tokenizer_config(tmp_path):
    """What the published checkpoints are: config.json and vocab.txt, for RoCBert also its two files."""
    for kind, files, ours_class in (("convbert", (VOCAB,), ConvBertTokenizer), ("roc_bert", ROCBERT, RoCBertTokenizer)):
        folder = tmp_path / kind
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"model_type": kind}))
        for file in files:
            shutil.copy(file, folder)
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        ours = ours_class.from_pretrained(folder)
        assert ours.model_max_length == theirs.model_max_length
        assert_same(ours, theirs, TEXTS if kind == "convbert" else cases.read("rocbert/golden.json")["texts"])
