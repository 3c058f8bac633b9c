"""The files of the tokenizers: saved and loaded again, those of transformers, bad ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tokenization_cases as cases
from tokenization_cases import ROCBERT, TEXTS, VOCAB

pytest.importorskip("tokenizers", reason="the tokenizers stand on tokenizers, which is not installed")
from fastconv.tokenization import BertTokenizer, ConvBertTokenizer, RoCBertTokenizer


@pytest.fixture
def vocab_folder(tmp_path: Path) -> Path:
    shutil.copy(VOCAB, tmp_path / "vocab.txt")
    return tmp_path


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
        unpadded(["hello", "hello hello"], padding=True)
    with pytest.raises(ValueError, match="must be tokens of the vocabulary, got None"):
        BertTokenizer(tmp_path / "vocab.txt", **{**names, "cls_token": None})
    added = {str(5 + index): {"content": token, "special": True} for index, token in enumerate(("[C]", "[S]"))}
    names |= {"cls_token": "[C]", "sep_token": "[S]"}
    tokenizer = BertTokenizer(tmp_path / "vocab.txt", **names, mask_token=None, added_tokens_decoder=added)
    assert tokenizer.encode("hello", "hello") == [5, 4, 6, 4, 6]


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
    config.write_text('{"tokenizer_class": "RoCBertTokenizer"}')
    with pytest.raises(ValueError, match="names RoCBertTokenizer, expected BertTokenizer"):
        BertTokenizer.from_pretrained(vocab_folder)
    Tokenizer(models.BPE()).save(str(vocab_folder / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"tokenizer.json' holds a BPE model, expected WordPiece"):
        BertTokenizer.from_pretrained(vocab_folder)


def test_a_token_has_one_id(tmp_path):
    file = tmp_path / "vocab.txt"
    for twice, lines in {"dog": "6 and 8", "[CLS]": "3 and 8", "": "7 and 8"}.items():
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "dog", "" if not twice else "cat", twice, "bird"]
        file.write_text("".join(f"{token}\n" for token in special), encoding="utf-8")
        for load in (BertTokenizer, lambda path: RoCBertTokenizer(path, *ROCBERT[1:])):
            with pytest.raises(
                ValueError, match=rf"vocab.txt' has '{twice}' twice, in lines {lines}".replace("[", r"\[")
            ):
                load(file)
    stored = json.loads((cases.DATA / "fast_saved" / "tokenizer.json").read_text(encoding="utf-8"))
    stored["model"]["vocab"]["world"] = stored["model"]["vocab"]["hello"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=r"tokenizer.json' gives '\w+' and '\w+' the same id, 156"):
        BertTokenizer.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="vocab_file gives 'a' and 'b' the same id, 1"):
        BertTokenizer({"[UNK]": 0, "a": 1, "b": 1})
    with pytest.raises(ValueError, match="must be token -> id, from 0 up, got 'a': '1'"):
        BertTokenizer({"[UNK]": 0, "a": "1"})


def test_special_tokens_differ(vocab_folder):
    special = {"cls_token": "[CLS]", "sep_token": {"content": "[CLS]"}}
    (vocab_folder / "special_tokens_map.json").write_text(json.dumps(special))
    with pytest.raises(ValueError, match=r"sep_token and cls_token must be different tokens, both are '\[CLS\]'"):
        BertTokenizer.from_pretrained(vocab_folder)
    with pytest.raises(ValueError, match=r"unk_token and mask_token must be different tokens, both are '\[UNK\]'"):
        RoCBertTokenizer(*ROCBERT, mask_token="[UNK]")
    shared = BertTokenizer(VOCAB, bos_token="[CLS]", eos_token="[SEP]", pad_token="[SEP]")
    assert (shared.bos_token_id, shared.eos_token_id, shared.pad_token_id) == (4, 5, 5)
    added = {"3": {"content": "[UNK]", "special": True}, "9": {"content": "[UNK]", "special": True}}
    (vocab_folder / "special_tokens_map.json").unlink()
    (vocab_folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    with pytest.raises(ValueError, match=r"says that '\[UNK\]' is 9, but in .*vocab.txt it is 3"):
        BertTokenizer.from_pretrained(vocab_folder)


def test_vocabulary_as_a_dict():
    vocab = {token: number for number, token in enumerate(VOCAB.read_text(encoding="utf-8").split("\n")[:-1])}
    assert BertTokenizer(vocab)(TEXTS) == BertTokenizer(VOCAB)(TEXTS)
    assert BertTokenizer(vocab).get_vocab() == vocab


def test_no_mask_token_is_kept(tmp_path):
    file = tmp_path / "vocab.txt"
    file.write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\nhello\n", encoding="utf-8")
    BertTokenizer(file, mask_token=None).save_pretrained(tmp_path)
    again = BertTokenizer.from_pretrained(tmp_path)
    assert again.mask_token is None and again.pad_token == "[PAD]" and "mask_token" not in again.special_tokens_map


@pytest.mark.parametrize("saved", ["slow_saved", "fast_saved"])
def test_folders_of_transformers(saved, vocab_folder):
    shutil.copytree(cases.DATA / saved, vocab_folder, dirs_exist_ok=True)
    if saved == "fast_saved":
        (vocab_folder / "vocab.txt").unlink()
    tokenizer = BertTokenizer.from_pretrained(vocab_folder)
    lower = saved == "fast_saved"
    options = {"do_lower_case": lower, "strip_accents": None if lower else True}
    assert {name: getattr(tokenizer, name) for name in options} == options
    assert tokenizer(TEXTS) == BertTokenizer(VOCAB, **options)(TEXTS)
    assert tokenizer.model_max_length > 10**29


def test_what_only_the_slow_tokenizers_know_is_saved(tmp_path):
    for options in ({"never_split": ["Hello"]}, {"do_basic_tokenize": False}):
        tokenizer = ConvBertTokenizer(VOCAB, **options)
        tokenizer.save_pretrained(tmp_path)
        again = ConvBertTokenizer.from_pretrained(tmp_path)
        assert not again.is_fast and again(TEXTS) == tokenizer(TEXTS)
        assert again(TEXTS) != ConvBertTokenizer(VOCAB)(TEXTS)


def test_added_special_tokens_are_saved(tmp_path):
    from tokenizers import AddedToken

    tokenizer = BertTokenizer(VOCAB, additional_special_tokens=["[E1]", AddedToken("[E2]", lstrip=True, special=True)])
    expected = tokenizer("a [E1] b [E2]", return_offsets_mapping=True)
    assert expected.offset_mapping[-2] == (8, 13), "the space before is its own"
    tokenizer.save_pretrained(tmp_path)
    for _ in range(2):
        again = BertTokenizer.from_pretrained(tmp_path)
        assert again.additional_special_tokens == ["[E1]", "[E2]"]
        assert again("a [E1] b [E2]", return_offsets_mapping=True) == expected
        assert again.decode(expected.input_ids, skip_special_tokens=True) == "a b"
        (tmp_path / "tokenizer.json").unlink(missing_ok=True)


def test_vocabularies_that_no_vocab_file_holds(tmp_path):
    tokenizer = BertTokenizer({"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4, "far": 9})
    with pytest.raises(ValueError, match=r"can't write .*vocab.txt': .* gaps or line breaks"):
        tokenizer.save_vocabulary(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert not (tmp_path / "vocab.txt").exists()
    assert BertTokenizer.from_pretrained(tmp_path).encode("far") == [2, 9, 3]
    with pytest.raises(NotADirectoryError, match="expected an existing folder"):
        tokenizer.save_vocabulary(tmp_path / "nowhere")


def test_save_vocabulary(tmp_path):
    assert BertTokenizer(VOCAB).save_vocabulary(tmp_path, "my") == (str(tmp_path / "my-vocab.txt"),)
    assert (tmp_path / "my-vocab.txt").read_bytes() == VOCAB.read_bytes()
    names = RoCBertTokenizer(*ROCBERT).save_vocabulary(tmp_path)
    assert [Path(name).name for name in names] == [file.name for file in ROCBERT]
    assert all(
        json.loads(Path(name).read_text()) == json.loads(file.read_text())
        for name, file in zip(names[1:], ROCBERT[1:], strict=True)
    )


def test_rocbert_folders(tmp_path):
    for file in ROCBERT:
        with pytest.raises(FileNotFoundError, match=rf"RoCBertTokenizer needs vocab.txt, .* no {file.name}"):
            RoCBertTokenizer.from_pretrained(tmp_path)
        shutil.copy(file, tmp_path)
    bare = RoCBertTokenizer.from_pretrained(tmp_path)
    assert bare.model_max_length > 10**29
    texts = cases.read("rocbert/golden.json")["texts"]
    bare.add_tokens("covid")
    bare.add_special_tokens({"additional_special_tokens": ["[E1]"]})
    bare.padding_side = "left"
    bare.save_pretrained(tmp_path)
    again = RoCBertTokenizer.from_pretrained(tmp_path)
    texts = [*texts, "covid a [E1]"]
    assert again(texts, padding=True) == bare(texts, padding=True)
    assert again.encode("covid [E1]") == [2, 60, 61, 3]
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    with pytest.raises(ValueError, match="names BertTokenizer, expected RoCBertTokenizer"):
        RoCBertTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "content, message",
    [
        ("[1, 2]", "must hold a JSON object, got a list"),
        ("{", "is not JSON"),
        ('{"[UNK]": "1"}', r"must map each token to an id, an integer from 0 up, got '\[UNK\]': '1'"),
        ('{"[UNK]": 1, "a": -1}', "must map each token to an id, an integer from 0 up, got 'a': -1"),
        ('{"[UNK]": 1, "a": true}', "got 'a': True"),
        ('{"[UNK]": 1, "a": null}', "got 'a': None"),
        ('{"a": 1}', r"has no '\[UNK\]', which stands for every token that is not in it"),
    ],
)
def test_shapes_and_pronunciations_that_are_none(content, message, tmp_path):
    file = tmp_path / "word.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=rf"word.json' {message}" if "got 'a'" not in message[:7] else message):
        RoCBertTokenizer(ROCBERT[0], file, ROCBERT[2])
    with pytest.raises(ValueError, match=message):
        RoCBertTokenizer(*ROCBERT[:2], file)


@pytest.mark.parametrize("family", ["bert", "json", "rocbert"])
def test_from_pretrained_with_other_options(family, tmp_path):
    if family == "rocbert":
        cls = RoCBertTokenizer
        for file in ROCBERT:
            shutil.copy(file, tmp_path)
    else:
        cls = BertTokenizer
        shutil.copy(VOCAB, tmp_path / "vocab.txt")
        if family == "json":
            cls.from_pretrained(tmp_path).save_pretrained(tmp_path)
    lower = cls.from_pretrained(tmp_path)
    cased = cls.from_pretrained(tmp_path, do_lower_case=False, model_max_length=7, padding_side="left")
    assert lower.do_lower_case and not cased.do_lower_case
    assert lower.tokenize("HELLO") == lower.tokenize("hello") == cased.tokenize("hello") != cased.tokenize("HELLO")
    assert cased.model_max_length == 7 and cased.padding_side == "left" and lower.padding_side == "right"
    assert len(cased("a b c d e f g h i", truncation=True)["input_ids"]) == 7
