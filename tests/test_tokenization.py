"""BertTokenizer and ConvBertTokenizer: golden ids, the same as transformers where that is installed, bad input."""

from __future__ import annotations

import itertools
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import minilm
import pytest
import torch

from fastconv import tokenization

pytest.importorskip("tokenizers", reason="the tokenizers stand on tokenizers, which is not installed")
from fastconv.batch_encoding import BatchEncoding
from fastconv.tokenization import BertTokenizer, ConvBertTokenizer

DATA = Path(__file__).parent / "data" / "tokenizer"
VOCAB = DATA / "vocab.txt"
GOLDEN = json.loads((DATA / "golden.json").read_text(encoding="utf-8"))
TEXTS = GOLDEN["texts"]
OPTIONS = [
    pytest.param(name, options, case["ids"], id=f"{name}-{'-'.join(map(str, options.values()))}")
    for case in GOLDEN["without_special_tokens"]
    for name, options in case["options"]
]


@pytest.fixture(scope="module")
def tokenizer() -> BertTokenizer:
    return BertTokenizer(VOCAB)


@pytest.fixture
def vocab_folder(tmp_path: Path) -> Path:
    shutil.copy(VOCAB, tmp_path / "vocab.txt")
    return tmp_path


@pytest.mark.parametrize("name, options, expected", OPTIONS)
def test_ids_are_the_golden_ones(name, options, expected):
    tokenizer = getattr(tokenization, name)(VOCAB, **options)
    ids = tokenizer(TEXTS, add_special_tokens=False).input_ids
    assert [text for text, got, want in zip(TEXTS, ids, expected, strict=True) if got != want] == []


@pytest.mark.parametrize("case", ["lower", "cased"])
@pytest.mark.parametrize("tokenizer_class", [BertTokenizer, ConvBertTokenizer])
def test_special_tokens_offsets_and_decode_are_the_golden_ones(tokenizer_class, case):
    tokenizer = tokenizer_class(VOCAB, do_lower_case=case == "lower")
    out = tokenizer(TEXTS, return_special_tokens_mask=True, return_offsets_mapping=True)
    for index, (text, row) in enumerate(zip(TEXTS, GOLDEN["with_special_tokens"][case], strict=True)):
        ids = row["ids"]
        assert out.input_ids[index] == ids == tokenizer.encode(text), text
        assert out.special_tokens_mask[index] == row["mask"], text
        assert [list(offset) for offset in out.offset_mapping[index]] == row["offsets"], text
        assert tokenizer.decode(ids) == row["decode"], text
        assert tokenizer.decode(torch.tensor(ids), skip_special_tokens=True) == row["decode_skip"], text
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
    assert tokenizer.pad([{"input_ids": torch.tensor([4, 5])}], pad_to_multiple_of=4).input_ids == [[4, 5, 0, 0]]


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
    "options", [{}, {"do_lower_case": False, "strip_accents": True, "tokenize_chinese_chars": False}]
)
def test_saved_tokenizers_are_the_same(options, tmp_path):
    tokenizer = ConvBertTokenizer(VOCAB, model_max_length=77, padding_side="left", **options)
    tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "vocab.txt").read_bytes() == VOCAB.read_bytes()
    expected = tokenizer(TEXTS)
    again = ConvBertTokenizer.from_pretrained(tmp_path)
    assert (again.model_max_length, again.padding_side) == (77, "left")
    assert again(TEXTS) == expected
    (tmp_path / "tokenizer.json").unlink()
    assert BertTokenizer.from_pretrained(tmp_path)(TEXTS) == expected


def test_added_tokens_keep_their_ids(vocab_folder):
    size = len(BertTokenizer(VOCAB))
    added = {str(size): {"content": "[E1]", "special": True}, str(size + 1): {"content": "covid", "special": False}}
    (vocab_folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    tokenizer = BertTokenizer.from_pretrained(vocab_folder)
    assert tokenizer.encode("hello[E1]covid", add_special_tokens=False) == [156, size, size + 1]
    assert (tokenizer.vocab_size, len(tokenizer)) == (size, size + 2)
    tokenizer.save_pretrained(vocab_folder)
    assert BertTokenizer.from_pretrained(vocab_folder).encode("[E1]") == [4, size, 5]
    added = {str(size + 5): {"content": "[E1]", "special": True}}
    (vocab_folder / "tokenizer.json").unlink()
    (vocab_folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    with pytest.raises(ValueError, match=rf"says that '\[E1\]' is {size + 5}, but in .*vocab.txt.* it is {size}"):
        BertTokenizer.from_pretrained(vocab_folder)


def test_options_come_from_the_config_or_else_from_tokenizer_json(vocab_folder):
    BertTokenizer(VOCAB, do_lower_case=False).save_pretrained(vocab_folder)
    (vocab_folder / "tokenizer_config.json").write_text("{}")
    assert BertTokenizer.from_pretrained(vocab_folder).do_lower_case is False
    (vocab_folder / "tokenizer_config.json").write_text('{"do_lower_case": true}')
    tokenizer = BertTokenizer.from_pretrained(vocab_folder)
    assert tokenizer.encode("HELLO") == [4, 156, 5]


def test_other_special_tokens(tmp_path):
    (tmp_path / "vocab.txt").write_text("<p>\n<u>\n<s>\n</s>\nhello\n", encoding="utf-8")
    special = {"pad_token": "<p>", "unk_token": "<u>", "cls_token": {"content": "<s>"}, "sep_token": "</s>"}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(special))
    with pytest.raises(ValueError, match=r"has no '\[MASK\]'; give .* as mask_token="):
        BertTokenizer.from_pretrained(tmp_path)
    names = {"pad_token": "<p>", "unk_token": "<u>", "cls_token": "<s>", "sep_token": "</s>"}
    tokenizer = BertTokenizer(tmp_path / "vocab.txt", **names, mask_token=None)
    assert tokenizer.encode("hello there") == [2, 4, 1, 3]
    assert tokenizer.mask_token_id is None and tokenizer.pad_token_id == 0
    unpadded = BertTokenizer(tmp_path / "vocab.txt", **{**names, "pad_token": None}, mask_token=None)
    with pytest.raises(ValueError, match="padding=True needs a pad token"):
        unpadded(["hello"], padding=True)
    with pytest.raises(ValueError, match="must be tokens of the vocabulary, got None"):
        BertTokenizer(tmp_path / "vocab.txt", **{**names, "cls_token": None})
    added = {str(5 + index): {"content": token, "special": True} for index, token in enumerate(("[C]", "[S]"))}
    names |= {"cls_token": "[C]", "sep_token": "[S]"}
    tokenizer = BertTokenizer(tmp_path / "vocab.txt", **names, mask_token=None, added_tokens_decoder=added)
    assert tokenizer.encode("hello", "hello") == [5, 4, 6, 4, 6]


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
        ({"return_tensors": "tf"}, "return_tensors must be one of 'pt', None, got 'tf'"),
        ({"return_tensors": "pt"}, r"a tensor needs rows of equal length, got lengths \[3, 4\] in input_ids"),
        ({"truncation": True, "max_length": 1}, "max_length must be at least 2, the number of special tokens, got 1"),
        ({"truncation": True, "max_length": 6, "stride": 4}, "stride must be from 0 to 3 for max_length 6, got 4"),
        ({"truncation": "only_second", "max_length": 3}, "can't tokenize with truncation='only_second'"),
    ],
)
def test_settings_that_cannot_be(tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        tokenizer(["hello", "hello world"], **options)


def test_negative_ids_have_no_text(tokenizer):
    with pytest.raises(ValueError, match="ids must be at least 0, got -100"):
        tokenizer.decode([156, -100])


def test_files_that_are_no_tokenizer(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no vocabulary file '.*vocab.txt'"):
        BertTokenizer(tmp_path / "vocab.txt")
    with pytest.raises(FileNotFoundError, match=r"no tokenizer.json and no vocab.txt in .*: it is empty"):
        BertTokenizer.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="neither an existing folder nor a hub id"):
        BertTokenizer.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="exactly one of vocab_file and tokenizer_file, got vocab_file=None"):
        BertTokenizer()
    (tmp_path / "vocab.txt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"the vocabulary '.*vocab.txt' is empty"):
        BertTokenizer.from_pretrained(tmp_path)
    (tmp_path / "vocab.txt").write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(ValueError, match=r"vocab.txt' is not a vocabulary: expected UTF-8 text"):
        BertTokenizer.from_pretrained(tmp_path)
    (tmp_path / "vocab.txt").write_text("hello\nworld\n", encoding="utf-8")
    with pytest.raises(
        ValueError, match=r"vocab.txt has no '\[UNK\]'; give the token that it has instead as unk_token="
    ):
        BertTokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer.json' is not JSON"):
        BertTokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(ValueError, match=r"tokenizer.json' is not a tokenizer that `tokenizers` can read"):
        BertTokenizer.from_pretrained(tmp_path)


def test_tokenizers_of_another_kind(vocab_folder):
    from tokenizers import Tokenizer, models

    config = vocab_folder / "tokenizer_config.json"
    config.write_text('{"tokenizer_class": "BertJapaneseTokenizer"}')
    with pytest.raises(ValueError, match="names BertJapaneseTokenizer, expected BertTokenizer"):
        BertTokenizer.from_pretrained(vocab_folder)
    config.write_text('{"do_basic_tokenize": false}')
    with pytest.raises(ValueError, match="says do_basic_tokenize false, expected true"):
        BertTokenizer.from_pretrained(vocab_folder)
    Tokenizer(models.BPE()).save(str(vocab_folder / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"tokenizer.json' holds a BPE model, expected WordPiece"):
        BertTokenizer.from_pretrained(vocab_folder)


def test_import_is_lazy():
    code = "import sys, fastconv.tokenization; sys.exit('tokenizers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.filterwarnings("ignore:`max_length` is ignored")
@pytest.mark.parametrize("padding", [False, True, "max_length"])
@pytest.mark.parametrize("truncation", [None, True, False, "only_first", "longest_first"])
@pytest.mark.parametrize("pair", [False, True])
def test_same_as_transformers(tokenizer, tmp_path, padding, truncation, pair):
    transformers = pytest.importorskip("transformers", reason="the package transformers is not installed")
    tokenizer.save_pretrained(tmp_path)
    theirs = transformers.BertTokenizerFast.from_pretrained(tmp_path)
    texts = [text for text in TEXTS if len(tokenizer.tokenize(text)) < 20]
    options = {"padding": padding, "truncation": truncation, "max_length": 24, "pad_to_multiple_of": 4}
    options |= {"return_special_tokens_mask": True, "return_offsets_mapping": True}
    pairs = texts[::-1] if pair else None
    ours = tokenizer(texts, pairs, **options)
    expected = theirs(texts, pairs, **options)
    assert ours.keys() == expected.keys()
    for name in ours:
        assert ours[name] == expected[name], name
    single = tokenizer(texts[5], texts[6], **options)
    assert single == dict(theirs(texts[5], texts[6], **options))
