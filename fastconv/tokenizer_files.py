"""The files of a WordPiece tokenizer: vocab.txt, tokenizer.json, tokenizer_config.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastconv.folders import read_json, what_is_there, write_json

if TYPE_CHECKING:
    import tokenizers

FILES = (
    "vocab.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
SPECIAL_TOKENS = ("unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
NORMALIZER_OPTIONS = {
    "do_lower_case": "lowercase",
    "strip_accents": "strip_accents",
    "tokenize_chinese_chars": "handle_chinese_chars",
}
OTHER_OPTIONS = ("model_max_length", "padding_side", "truncation_side", "clean_up_tokenization_spaces")
# The tokenizers whose vocab.txt means the same as BERT's.
_SAME_ALGORITHM = ("Bert", "ConvBert", "DistilBert", "Electra", "MobileBert")


def read_vocab(file: Path) -> dict[str, int]:
    """The tokens of a vocab.txt, one a line, and their ids, which are the line numbers.

    Raises FileNotFoundError, or ValueError if the file is empty or not UTF-8.
    """
    if not file.is_file():
        raise FileNotFoundError(f"no vocabulary file {str(file)!r}: {what_is_there(file.parent)}")
    try:
        with file.open(encoding="utf-8") as lines:  # not str.splitlines: a token may be a line separator of Unicode
            vocab = {line.rstrip("\n"): number for number, line in enumerate(lines)}
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(file)!r} is not a vocabulary: expected UTF-8 text, {error}") from error
    if not any(vocab):
        raise ValueError(f"the vocabulary {str(file)!r} is empty: expected one token a line")
    return vocab


def backend_from_vocab(
    vocab: dict[str, int], unk_token: str, normalizer: Mapping[str, bool | None]
) -> tokenizers.Tokenizer:
    """BERT's tokenizer over a vocabulary, before it knows the special tokens.

    normalizer: the values of NORMALIZER_OPTIONS -> setting
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token=unk_token))
    tokenizer.normalizer = normalizers.BertNormalizer()
    set_normalizer(tokenizer, normalizer)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
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


def add_tokens(
    tokenizer: tokenizers.Tokenizer,
    added: Mapping[str, Mapping[str, Any]],
    special: Mapping[str, str | None],
    source: str,
) -> None:
    """Make the special tokens and the added ones whole words, with the ids that their file says.

    added: id -> the fields of a `tokenizers.AddedToken`, as "added_tokens_decoder" in tokenizer_config.json
    special: name -> token; each must be in the vocabulary or in `added`
    source: the file, for an error

    Raises ValueError if a token would get another id, or if a special token is in neither.
    """
    from tokenizers import AddedToken

    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    for number, fields in sorted(added.items(), key=lambda item: int(item[0])):
        token = AddedToken(**{key: value for key, value in fields.items() if key != "__type"})
        if token.content not in known:
            (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])
            known.add(token.content)
        if (got := tokenizer.token_to_id(token.content)) != int(number):
            raise ValueError(
                f"tokenizer_config.json says that {token.content!r} is {number}, but in {source} it is {got}"
            )
    for name, content in special.items():
        if content is None or content in known:
            continue
        if tokenizer.token_to_id(content) is None:
            raise ValueError(f"{source} has no {content!r}; give the token that it has instead as {name}=")
        tokenizer.add_special_tokens([AddedToken(content, normalized=False)])


def read_options(folder: Path) -> dict[str, Any]:
    """What a folder's JSON files say about its tokenizer, as arguments of BertTokenizer.

    Raises ValueError for a tokenizer of another kind.
    """
    config = _read_if_there(folder / "tokenizer_config.json")
    special = _read_if_there(folder / "special_tokens_map.json")
    options = {name: config[name] for name in (*NORMALIZER_OPTIONS, *OTHER_OPTIONS) if name in config}
    for name in SPECIAL_TOKENS:
        value = config.get(name, special.get(name))
        if value is not None:
            options[name] = value["content"] if isinstance(value, dict) else value
    added = {number: dict(fields) for number, fields in config.get("added_tokens_decoder", {}).items()}
    for content, number in _read_if_there(folder / "added_tokens.json").items():
        added.setdefault(str(number), {"content": content})
    if added:
        options["added_tokens_decoder"] = added
    if not (folder / "tokenizer.json").is_file():  # with it, its content decides
        kind = str(config.get("tokenizer_class") or "BertTokenizer")
        if kind.removesuffix("Fast").removesuffix("Tokenizer") not in _SAME_ALGORITHM:
            raise ValueError(f"tokenizer_config.json in {str(folder)!r} names {kind}, expected BertTokenizer")
        if config.get("do_basic_tokenize") is False:
            raise ValueError(f"tokenizer_config.json in {str(folder)!r} says do_basic_tokenize false, expected true")
    return options


def write_files(folder: Path, tokenizer: tokenizers.Tokenizer, config: dict[str, Any]) -> None:
    """Write tokenizer.json, tokenizer_config.json and, where every id has its token, vocab.txt."""
    tokenizer.save(str(folder / "tokenizer.json"))
    added = {
        str(number): {
            "content": token.content,
            "lstrip": token.lstrip,
            "normalized": token.normalized,
            "rstrip": token.rstrip,
            "single_word": token.single_word,
            "special": token.special,
        }
        for number, token in tokenizer.get_added_tokens_decoder().items()
    }
    write_json(folder / "tokenizer_config.json", {**config, "added_tokens_decoder": added})
    vocab = sorted(tokenizer.get_vocab(with_added_tokens=False).items(), key=lambda item: item[1])
    if [number for _, number in vocab] == list(range(len(vocab))):
        with (folder / "vocab.txt").open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(f"{token}\n" for token, _ in vocab)


def _read_if_there(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}
