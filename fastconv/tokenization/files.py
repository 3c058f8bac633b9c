"""The files of a WordPiece tokenizer: vocab.txt, tokenizer.json, tokenizer_config.json, RoCBert's two more."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastconv.folders import read_json, what_is_there, write_json

if TYPE_CHECKING:
    import tokenizers

    from fastconv.tokenization.vocabulary import TokenizerVocabulary

SHAPE_FILE = "word_shape.json"
PRONUNCIATION_FILE = "word_pronunciation.json"
FILES = (
    "vocab.txt",
    SHAPE_FILE,
    PRONUNCIATION_FILE,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
NORMALIZER_OPTIONS = {
    "do_lower_case": "lowercase",
    "strip_accents": "strip_accents",
    "tokenize_chinese_chars": "handle_chinese_chars",
}
OTHER_OPTIONS = (
    "do_basic_tokenize",
    "never_split",
    "model_max_length",
    "model_input_names",
    "padding_side",
    "truncation_side",
    "clean_up_tokenization_spaces",
    "split_special_tokens",
)
# The tokenizers whose vocab.txt means the same as BERT's.
_SAME_AS_BERT = ("Bert", "ConvBert", "DistilBert", "Electra", "MobileBert", "BertTokenizerLegacy")


def read_vocab(file: Path) -> dict[str, int]:
    """The tokens of a vocab.txt, one a line, and their ids, which are the line numbers from 0.

    Raises FileNotFoundError, or ValueError if the file is empty, not UTF-8, or has a token twice.
    """
    if not file.is_file():
        raise FileNotFoundError(f"no vocabulary file {str(file)!r}: {what_is_there(file.parent)}")
    vocab: dict[str, int] = {}
    try:
        with file.open(encoding="utf-8") as lines:  # not str.splitlines: a token may be a line separator of Unicode
            for number, line in enumerate(lines):
                token = line.rstrip("\n")
                if vocab.setdefault(token, number) != number:
                    raise ValueError(
                        f"the vocabulary {str(file)!r} has {token!r} twice, in lines {vocab[token] + 1} and "
                        f"{number + 1}: a token has one id, so leave one out, or give the unused one a name of its own"
                    )
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(file)!r} is not a vocabulary: expected UTF-8 text, {error}") from error
    if not any(vocab):
        raise ValueError(f"the vocabulary {str(file)!r} is empty: expected one token a line")
    return vocab


def vocab_of(vocab: str | os.PathLike[str] | Mapping[str, int]) -> tuple[str, dict[str, int]]:
    """The name, for errors, and the content of a vocabulary: a file, or token -> id. Raises what read_vocab does."""
    if isinstance(vocab, Mapping):
        check_vocab(vocab, "vocab_file")
        return "vocab_file", dict(vocab)
    return str(vocab), read_vocab(Path(vocab))


def check_vocab(vocab: Mapping[str, Any], source: str) -> None:
    """Raises ValueError unless `vocab` is token -> id, with an id of its own for every token."""
    tokens: dict[int, str] = {}
    if not vocab:
        raise ValueError(f"the vocabulary {source} is empty")
    for token, number in vocab.items():
        if not isinstance(token, str) or not isinstance(number, int) or isinstance(number, bool) or number < 0:
            raise ValueError(f"a vocabulary must be token -> id, from 0 up, got {token!r}: {number!r} in {source}")
        if tokens.setdefault(number, token) != token:
            raise ValueError(f"{source} gives {tokens[number]!r} and {token!r} the same id, {number}")


def read_word_ids(file: Path, unk_token: str) -> dict[str, int]:
    """The word_shape.json or word_pronunciation.json of a RoCBert: token -> the id of its shape or pronunciation.

    Raises FileNotFoundError, or ValueError if it holds something else, or nothing for unk_token.
    """
    ids = read_json(file)
    for token, number in ids.items():
        if not isinstance(number, int) or isinstance(number, bool) or number < 0:
            raise ValueError(
                f"{str(file)!r} must map each token to an id, an integer from 0 up, got {token!r}: {number!r}"
            )
    if unk_token not in ids:
        raise ValueError(
            f"{str(file)!r} has no {unk_token!r}, which stands for every token that is not in it: add it, "
            "or give the token that it has instead as unk_token="
        )
    return ids


def backend_from_vocab(
    vocab: dict[str, int], unk_token: str, normalizer: Mapping[str, bool | None], clean_up: bool = True
) -> tokenizers.Tokenizer:
    """BERT's tokenizer over a vocabulary, before it knows the special tokens.

    normalizer: the values of NORMALIZER_OPTIONS -> setting
    clean_up: whether its decoder removes the spaces before punctuation
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token=unk_token))
    tokenizer.normalizer = normalizers.BertNormalizer()
    set_normalizer(tokenizer, normalizer)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=clean_up)
    return tokenizer


def set_template(tokenizer: tokenizers.Tokenizer, cls: str, sep: str) -> None:
    """Put a text between cls and sep, and a pair between cls, sep and sep. Both must be in the vocabulary."""
    from tokenizers.processors import TemplateProcessing

    tokenizer.post_processor = TemplateProcessing(
        single=[cls, "$A", sep],
        pair=[cls, "$A", sep, "$B:1", f"{sep}:1"],
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (cls, sep)],
    )


def backend_from_json(file: Path) -> tokenizers.Tokenizer:
    """The tokenizer of a tokenizer.json, without the truncation and padding that may be switched on in it.

    Raises FileNotFoundError, or ValueError if the file is no tokenizer or not one of WordPiece.
    """
    from tokenizers import Tokenizer, models

    read_json(file)
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises nothing more special
        raise ValueError(f"{str(file)!r} is not a tokenizer that `tokenizers` can read: {error}") from error
    if not isinstance(tokenizer.model, models.WordPiece):
        raise ValueError(f"{str(file)!r} holds a {type(tokenizer.model).__name__} model, expected WordPiece")
    check_vocab(tokenizer.get_vocab(with_added_tokens=False), repr(str(file)))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def set_normalizer(tokenizer: tokenizers.Tokenizer, normalizer: Mapping[str, bool | None]) -> None:
    """Change the settings of a tokenizer's BertNormalizer; another normalizer stays as it is."""
    from tokenizers.normalizers import BertNormalizer

    if isinstance(tokenizer.normalizer, BertNormalizer):
        current = tokenizer.normalizer
        for setting, value in normalizer.items():
            setattr(current, setting, value)
        tokenizer.normalizer = current


def normalizer_options(file: Path) -> dict[str, Any]:
    """The settings of the BertNormalizer in a tokenizer.json, as arguments of BertTokenizer; {} for another."""
    stored = read_json(file).get("normalizer") or {}
    return {name: stored[setting] for name, setting in NORMALIZER_OPTIONS.items() if setting in stored}


def content_of(token: Any) -> str | None:
    """The text of a token that is given as a str, a `tokenizers.AddedToken`, or the fields of one."""
    content = token.get("content") if isinstance(token, Mapping) else getattr(token, "content", token)
    if content is not None and not isinstance(content, str):
        raise TypeError(f"a token must be a str or a tokenizers.AddedToken, got {type(token).__name__}")
    return content


def special_token(token: Any) -> tokenizers.AddedToken:
    """A special token that is given in one of those ways. A str is found in a text as it stands there."""
    from tokenizers import AddedToken

    if isinstance(token, AddedToken):
        return token
    fields = dict(token) if isinstance(token, Mapping) else {"content": content_of(token)}
    return _added_token({"normalized": False, **fields, "special": True})


def _added_token(fields: Mapping[str, Any]) -> tokenizers.AddedToken:
    from tokenizers import AddedToken

    return AddedToken(**{key: value for key, value in fields.items() if key not in ("__type", "id")})


def add_tokens(
    tokenizer: tokenizers.Tokenizer,
    added: Mapping[str, Mapping[str, Any]],
    special: Mapping[str, Any],
    source: str,
) -> None:
    """Make the special tokens and the added ones whole words, with the ids that their file says.

    added: id -> the fields of a `tokenizers.AddedToken`, as "added_tokens_decoder" in tokenizer_config.json
    special: role -> token or None; each must be in the vocabulary or in `added`
    source: the file, for an error

    Raises ValueError if a token would get another id, or if a special token is in neither.
    """
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    for number, fields in sorted(added.items(), key=lambda item: int(item[0])):
        token = _added_token(fields)
        if token.content not in known:
            (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])
            known.add(token.content)
        if (got := tokenizer.token_to_id(token.content)) != int(number):
            raise ValueError(
                f"tokenizer_config.json says that {token.content!r} is {number}, but in {source} it is {got}"
            )
    for name, value in special.items():
        content = content_of(value)
        if content is None or content in known:
            continue
        if tokenizer.token_to_id(content) is None:
            raise ValueError(f"{source} has no {content!r}; give the token that it has instead as {name}=")
        tokenizer.add_special_tokens([special_token(value)])


def read_options(folder: Path, kinds: Sequence[str] = _SAME_AS_BERT) -> dict[str, Any]:
    """What a folder's JSON files say about its tokenizer, as arguments of a tokenizer.

    kinds: the names of tokenizers, without "Tokenizer", that it may be

    Raises ValueError for a tokenizer of another kind.
    """
    config = _read_if_there(folder / "tokenizer_config.json")
    special = _read_if_there(folder / "special_tokens_map.json")
    options = {name: config[name] for name in (*NORMALIZER_OPTIONS, *OTHER_OPTIONS) if name in config}
    options.update({name: value for name, value in special.items() if name in SPECIAL_TOKENS and value is not None})
    options.update({name: config[name] for name in SPECIAL_TOKENS if name in config})
    for name in ("extra_special_tokens", "additional_special_tokens"):
        further = config.get(name) or special.get(name)
        if further:
            options["additional_special_tokens"] = list(further.values() if isinstance(further, dict) else further)
    added = {number: dict(fields) for number, fields in config.get("added_tokens_decoder", {}).items()}
    for content, number in _read_if_there(folder / "added_tokens.json").items():
        added.setdefault(str(number), {"content": content})
    if added:
        options["added_tokens_decoder"] = added
    if not (folder / "tokenizer.json").is_file():  # with it, its content decides
        kind = str(config.get("tokenizer_class") or f"{kinds[0]}Tokenizer")
        if kind.removesuffix("Fast").removesuffix("Tokenizer") not in kinds:
            raise ValueError(f"tokenizer_config.json in {str(folder)!r} names {kind}, expected {kinds[0]}Tokenizer")
    return options


def given(**options: Any) -> dict[str, Any]:
    """The options that are not None."""
    return {name: value for name, value in options.items() if value is not None}


def write_config(folder: Path, tokenizer: TokenizerVocabulary) -> None:
    """Write tokenizer_config.json: the class of a tokenizer, its special and added tokens, its options."""
    names = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    added = {
        str(number): {name: getattr(token, name) for name in names}
        for number, token in tokenizer.added_tokens_decoder.items()
    }
    config = {name: getattr(tokenizer, name) for name in (*NORMALIZER_OPTIONS, *OTHER_OPTIONS)}
    config |= {"tokenizer_class": type(tokenizer).__name__, "added_tokens_decoder": added}
    config |= {"pad_token": None, "mask_token": None, **tokenizer.special_tokens_map}
    config["never_split"] = config["never_split"] or None
    if tokenizer.additional_special_tokens:
        config["additional_special_tokens"] = tokenizer.additional_special_tokens
    write_json(folder / "tokenizer_config.json", config)


def fits_vocab_file(tokenizer: tokenizers.Tokenizer) -> bool:
    """Whether a vocab.txt can hold the vocabulary: ids without gaps, and no token with a line break."""
    vocab = tokenizer.get_vocab(with_added_tokens=False)
    return set(vocab.values()) == set(range(len(vocab))) and not any("\n" in token or "\r" in token for token in vocab)


def write_vocab(file: Path, tokenizer: tokenizers.Tokenizer) -> None:
    """Write a vocab.txt. Raises ValueError for a vocabulary that it can't hold."""
    if not fits_vocab_file(tokenizer):
        raise ValueError(f"can't write {str(file)!r}: it holds a token a line, and these ids have gaps or line breaks")
    vocab = tokenizer.get_vocab(with_added_tokens=False)
    with file.open("w", encoding="utf-8", newline="\n") as lines:
        lines.writelines(f"{token}\n" for token in sorted(vocab, key=vocab.__getitem__))


def _read_if_there(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}
