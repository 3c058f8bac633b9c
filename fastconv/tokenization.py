"""Text to ids and back: BertTokenizer and ConvBertTokenizer, over the `tokenizers` package."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from fastconv import tokenizer_files
from fastconv.batch_encoding import (
    NO_LIMIT,
    BatchEncoding,
    one_of,
    pad_rows,
    padded_length,
    plain,
    to_list,
    to_tensors,
)
from fastconv.folders import find_folder, replacing, what_is_there

if TYPE_CHECKING:
    from typing_extensions import Self

_SIDES = ("right", "left")
_STRATEGIES = ("longest_first", "only_first", "only_second", "do_not_truncate")
_CLEAN_UP = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)


class BertTokenizer:
    """BERT's WordPiece tokenizer, as transformers' BertTokenizerFast computes it.

    vocab_file: a vocab.txt, one token a line
    tokenizer_file: or a tokenizer.json. Its added tokens and its way of adding special tokens are kept
    do_lower_case, strip_accents (None: as do_lower_case), tokenize_chinese_chars: how text is cleaned
    unk_token, sep_token, pad_token, cls_token, mask_token: the special tokens; each must be in the vocabulary,
        but pad_token and mask_token may be None
    model_max_length: how many tokens the model takes, for truncation and padding without a max_length
    padding_side, truncation_side: "right" or "left"
    clean_up_tokenization_spaces: whether decode removes the spaces before punctuation
    added_tokens_decoder: id -> fields of further tokens, as in tokenizer_config.json

    Raises FileNotFoundError, or ValueError for a file that is empty, of another kind, or without a special token.
    """

    model_input_names = ("input_ids", "token_type_ids", "attention_mask")

    def __init__(
        self,
        vocab_file: str | os.PathLike[str] | None = None,
        *,
        tokenizer_file: str | os.PathLike[str] | None = None,
        do_lower_case: bool = True,
        unk_token: str = "[UNK]",
        sep_token: str = "[SEP]",
        pad_token: str | None = "[PAD]",
        cls_token: str = "[CLS]",
        mask_token: str | None = "[MASK]",
        tokenize_chinese_chars: bool = True,
        strip_accents: bool | None = None,
        model_max_length: int | None = None,
        padding_side: str = "right",
        truncation_side: str = "right",
        clean_up_tokenization_spaces: bool = True,
        added_tokens_decoder: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        self.unk_token, self.sep_token, self.pad_token = unk_token, sep_token, pad_token
        self.cls_token, self.mask_token = cls_token, mask_token
        self.do_lower_case = do_lower_case
        self.strip_accents = strip_accents
        self.tokenize_chinese_chars = tokenize_chinese_chars
        self.model_max_length = NO_LIMIT if model_max_length is None else int(model_max_length)
        self.padding_side = one_of("padding_side", padding_side, _SIDES)
        self.truncation_side = one_of("truncation_side", truncation_side, _SIDES)
        self.clean_up_tokenization_spaces = clean_up_tokenization_spaces

        if unk_token is None or cls_token is None or sep_token is None:
            raise ValueError("unk_token, cls_token and sep_token must be tokens of the vocabulary, got None")
        normalizer = {setting: getattr(self, name) for name, setting in tokenizer_files.NORMALIZER_OPTIONS.items()}
        if vocab_file is not None and tokenizer_file is None:
            source = Path(vocab_file)
            vocab = tokenizer_files.read_vocab(source)
            self._backend = tokenizer_files.backend_from_vocab(vocab, unk_token, normalizer)
        elif tokenizer_file is not None and vocab_file is None:
            source = Path(tokenizer_file)
            self._backend = tokenizer_files.backend_from_json(source)
            tokenizer_files.set_normalizer(self._backend, normalizer)
        else:
            raise ValueError(
                "give exactly one of vocab_file and tokenizer_file, "
                f"got vocab_file={vocab_file!r} and tokenizer_file={tokenizer_file!r}"
            )
        tokenizer_files.add_tokens(self._backend, added_tokens_decoder or {}, self.special_tokens_map, str(source))
        if vocab_file is not None:
            tokenizer_files.set_template(self._backend, cls_token, sep_token)

    @classmethod
    def from_pretrained(cls, name_or_folder: str | os.PathLike[str]) -> Self:
        """The tokenizer of a checkpoint: its tokenizer.json, else its vocab.txt, and its tokenizer_config.json.

        name_or_folder: a folder, or a hub id like "org/name", which needs huggingface_hub

        Raises FileNotFoundError, ValueError for a file of another kind, ImportError or OSError for a hub id.
        """
        folder = find_folder(name_or_folder, tokenizer_files.FILES)
        options = tokenizer_files.read_options(folder)
        if (folder / "tokenizer.json").is_file():
            stored = tokenizer_files.normalizer_options(folder / "tokenizer.json")
            return cls(tokenizer_file=folder / "tokenizer.json", **{**stored, **options})
        if (folder / "vocab.txt").is_file():
            return cls(folder / "vocab.txt", **options)
        raise FileNotFoundError(f"no tokenizer.json and no vocab.txt in {str(folder)!r}: {what_is_there(folder)}")

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write tokenizer.json, tokenizer_config.json and vocab.txt, which transformers reads too."""
        names = (*tokenizer_files.NORMALIZER_OPTIONS, *tokenizer_files.OTHER_OPTIONS)
        config = {"tokenizer_class": type(self).__name__, **self.special_tokens_map}
        config.update({name: getattr(self, name) for name in names})
        with replacing(folder) as temporary:
            tokenizer_files.write_files(temporary, self._backend, config)

    def __len__(self) -> int:
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def vocab_size(self) -> int:
        """The size of the vocabulary, without the added tokens; len() counts those too."""
        return self._backend.get_vocab_size(with_added_tokens=False)

    def get_vocab(self) -> dict[str, int]:
        """Token -> id, the added tokens included."""
        return self._backend.get_vocab(with_added_tokens=True)

    @property
    def special_tokens_map(self) -> dict[str, str | None]:
        """unk_token, sep_token, pad_token, cls_token and mask_token by name."""
        return {name: getattr(self, name) for name in tokenizer_files.SPECIAL_TOKENS}

    @property
    def all_special_tokens(self) -> list[str]:
        return [token for token in self.special_tokens_map.values() if token is not None]

    @property
    def all_special_ids(self) -> list[int]:
        return [cast(int, self._special_id(token)) for token in self.all_special_tokens]

    @property
    def unk_token_id(self) -> int:
        return cast(int, self._special_id(self.unk_token))

    @property
    def sep_token_id(self) -> int:
        return cast(int, self._special_id(self.sep_token))

    @property
    def pad_token_id(self) -> int | None:
        return self._special_id(self.pad_token)

    @property
    def cls_token_id(self) -> int:
        return cast(int, self._special_id(self.cls_token))

    @property
    def mask_token_id(self) -> int | None:
        return self._special_id(self.mask_token)

    def _special_id(self, token: str | None) -> int | None:
        return None if token is None else self._backend.token_to_id(token)

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        """How many special tokens one text, or a pair of texts, gets."""
        return self._backend.num_special_tokens_to_add(pair)

    def __call__(
        self,
        text: str | Sequence[str] | Sequence[Sequence[str]],
        text_pair: str | Sequence[str] | Sequence[Sequence[str]] | None = None,
        *,
        add_special_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        stride: int = 0,
        is_split_into_words: bool = False,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_tensors: str | None = None,
        return_token_type_ids: bool = True,
        return_attention_mask: bool = True,
        return_overflowing_tokens: bool = False,
        return_special_tokens_mask: bool = False,
        return_offsets_mapping: bool = False,
        return_length: bool = False,
    ) -> BatchEncoding:
        """The ids of a text, or of each text of a list: input_ids, token_type_ids, attention_mask, and what else
        the return_* arguments ask for.

        text, text_pair: a str or a list of them; with is_split_into_words a list of words or a list of such lists
        padding: True or "longest" (of this batch), "max_length", or False
        truncation: True or "longest_first", "only_first", "only_second", or False. None is "longest_first" where
            max_length is given without padding, else False
        max_length: the length for truncation and for padding="max_length"; None: model_max_length
        return_overflowing_tokens: what truncation cut off makes further rows, each beginning with the last `stride`
            tokens of the row before; overflow_to_sample_mapping says whose they are
        return_tensors: "pt" for tensors (batch, length) of int64, or None for lists

        Raises TypeError for a text that is not a str, ValueError for a setting that can't be kept.
        """
        if not isinstance(text, str | list | tuple):
            raise TypeError(f"text must be a str or a list of str, got {type(text).__name__}")
        if max_length is not None and truncation is None and padding is False:
            truncation = "longest_first"
        single = isinstance(text, str) or (is_split_into_words and len(text) > 0 and isinstance(text[0], str))
        texts = _batch("text", [text] if single else text, is_split_into_words)
        pairs = None
        if text_pair is not None:
            pairs = _batch("text_pair", [text_pair] if single else text_pair, is_split_into_words)
            if len(pairs) != len(texts):
                raise ValueError(f"text and text_pair must have the same length, got {len(texts)} and {len(pairs)}")

        added = self.num_special_tokens_to_add(pairs is not None) if add_special_tokens else 0
        self._set_truncation(truncation, max_length, stride, added)
        try:
            encodings = self._backend.encode_batch(
                list(zip(texts, pairs, strict=True)) if pairs is not None else texts,
                is_pretokenized=is_split_into_words,
                add_special_tokens=add_special_tokens,
            )
        except Exception as error:  # tokenizers raises nothing more special; the types are checked above
            raise ValueError(f"can't tokenize with truncation={truncation!r}: {error}") from error

        rows, owners = encodings, list(range(len(encodings)))
        if return_overflowing_tokens:
            owned = [(row, owner) for owner, first in enumerate(encodings) for row in (first, *first.overflowing)]
            rows, owners = [row for row, _ in owned], [owner for _, owner in owned]
        out = BatchEncoding(input_ids=[row.ids for row in rows])
        if return_token_type_ids:
            out["token_type_ids"] = [row.type_ids for row in rows]
        if return_attention_mask:
            out["attention_mask"] = [row.attention_mask for row in rows]
        if return_special_tokens_mask:
            out["special_tokens_mask"] = [row.special_tokens_mask for row in rows]
        if return_offsets_mapping:
            out["offset_mapping"] = [row.offsets for row in rows]
        self._pad(out, padding, max_length, pad_to_multiple_of, padding_side)
        if return_length:
            out["length"] = [len(ids) for ids in out["input_ids"]]
        if return_overflowing_tokens:
            out["overflow_to_sample_mapping"] = owners
        elif single and return_tensors is None:
            return BatchEncoding({name: value[0] for name, value in out.items()})
        return to_tensors(out, return_tensors)

    def encode(
        self,
        text: str | Sequence[str],
        text_pair: str | Sequence[str] | None = None,
        *,
        add_special_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        return_tensors: str | None = None,
    ) -> Any:
        """The input_ids alone of `__call__`: a list of int, or with return_tensors="pt" a tensor (1, length)."""
        return self(
            text,
            text_pair,
            add_special_tokens=add_special_tokens,
            padding=padding,
            truncation=truncation,
            max_length=max_length,
            return_tensors=return_tensors,
        )["input_ids"]

    def tokenize(self, text: str, pair: str | None = None, *, add_special_tokens: bool = False) -> list[str]:
        """The tokens of a text as strings."""
        return self.convert_ids_to_tokens(self.encode(text, pair, add_special_tokens=add_special_tokens))

    def decode(
        self,
        token_ids: int | Sequence[int] | torch.Tensor,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> str:
        """The text of one row of ids; an id that is not in the vocabulary has none.

        Raises ValueError for a negative id.
        """
        ids = to_list(token_ids)
        if any(number < 0 for number in ids):
            raise ValueError(f"ids must be at least 0, got {min(ids)}; leave out ignored labels")
        text = self._backend.decode(ids, skip_special_tokens=skip_special_tokens)
        if clean_up_tokenization_spaces is None:
            clean_up_tokenization_spaces = self.clean_up_tokenization_spaces
        if clean_up_tokenization_spaces:
            for spaced, plain in _CLEAN_UP:
                text = text.replace(spaced, plain)
        return text

    def batch_decode(
        self,
        sequences: Iterable[Sequence[int]] | torch.Tensor,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> list[str]:
        """The text of each row of ids."""
        return [self.decode(row, skip_special_tokens, clean_up_tokenization_spaces) for row in sequences]

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> Any:
        """The id of a token, or the ids of a list; the id of unk_token for what is not in the vocabulary."""
        if not isinstance(tokens, str):
            return [self.convert_tokens_to_ids(token) for token in tokens]
        found = self._backend.token_to_id(tokens)
        return self.unk_token_id if found is None else found

    def convert_ids_to_tokens(self, ids: int | Sequence[int] | torch.Tensor, skip_special_tokens: bool = False) -> Any:
        """The token of an id, or the tokens of a list; None for what is not in the vocabulary."""
        if isinstance(ids, int):
            return self._backend.id_to_token(ids)
        skipped = set(self.all_special_ids) if skip_special_tokens else set()
        return [self._backend.id_to_token(number) for number in to_list(ids) if number not in skipped]

    def pad(
        self,
        encoded_inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        padding: bool | str = True,
        max_length: int | None = None,
        *,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool = True,
        return_tensors: str | None = None,
    ) -> BatchEncoding:
        """Pad rows that are tokenized already, as a data loader gets them.

        encoded_inputs: a result of `__call__`, or a list of the results of single texts; entries that are not the
            tokenizer's own (labels) are carried along as they are

        Raises ValueError if there are no input_ids.
        """
        if isinstance(encoded_inputs, Mapping):
            columns = {name: plain(value) for name, value in encoded_inputs.items()}
        else:
            names = encoded_inputs[0] if encoded_inputs else ("input_ids",)
            columns = {name: [plain(row[name]) for row in encoded_inputs] for name in names}
        if "input_ids" not in columns:
            raise ValueError(f"pad needs input_ids, got only {', '.join(columns) or 'an empty dict'}")
        single = len(columns["input_ids"]) > 0 and isinstance(columns["input_ids"][0], int)
        out = BatchEncoding({name: [value] for name, value in columns.items()} if single else columns)
        if return_attention_mask and "attention_mask" not in out:
            out["attention_mask"] = [[1] * len(ids) for ids in out["input_ids"]]
        self._pad(out, padding, max_length, pad_to_multiple_of, padding_side)
        if single:
            out = BatchEncoding({name: value[0] for name, value in out.items()})
        return to_tensors(out, return_tensors)

    def _set_truncation(self, truncation: bool | str | None, max_length: int | None, stride: int, added: int) -> None:
        strategy = "longest_first" if truncation is True else truncation
        limit = self.model_max_length if max_length is None else max_length
        if not strategy or one_of("truncation", strategy, _STRATEGIES) == "do_not_truncate" or limit >= NO_LIMIT:
            self._backend.no_truncation()
            return
        if limit < added:  # tokenizers would not truncate at all
            raise ValueError(f"max_length must be at least {added}, the number of special tokens, got {limit}")
        if not 0 <= stride < max(limit - added, 1):
            most = max(limit - added - 1, 0)
            raise ValueError(f"stride must be from 0 to {most} for max_length {limit}, got {stride}")
        direction = self.truncation_side
        self._backend.enable_truncation(limit, stride=stride, strategy=strategy, direction=direction)

    def _pad(
        self,
        rows: BatchEncoding,
        padding: bool | str,
        max_length: int | None,
        pad_to_multiple_of: int | None,
        padding_side: str | None,
    ) -> None:
        side = one_of("padding_side", padding_side or self.padding_side, _SIDES)
        lengths = [len(ids) for ids in rows["input_ids"]]
        limit = self.model_max_length if max_length is None else max_length
        length = padded_length(lengths, padding, limit, pad_to_multiple_of)
        if length is not None:
            if self.pad_token_id is None:
                raise ValueError(f"padding={padding!r} needs a pad token; give this tokenizer a pad_token")
            pad_rows(rows, length, side, self.pad_token_id)


class ConvBertTokenizer(BertTokenizer):
    """ConvBERT's tokenizer, which is BERT's."""


def _batch(name: str, texts: Any, split: bool) -> list[Any]:
    """Check a batch of texts, or of lists of words, down to the last str."""
    expected = "a list of lists of words" if split else "a str or a list of str"
    if isinstance(texts, str) or not isinstance(texts, list | tuple):
        raise TypeError(f"{name} must be {expected}, got {type(texts).__name__}")
    for row, text in enumerate(texts):
        if isinstance(text, list | tuple) is not split:
            hint = "" if split else "; for pairs give text_pair, for words is_split_into_words=True"
            raise TypeError(f"{name} must be {expected}, got {type(text).__name__} at {row}{hint}")
        for part in text if split else (text,):
            if not isinstance(part, str):
                raise TypeError(f"{name} must be {expected}, got {type(part).__name__} at {row}")
            try:
                part.encode()
            except UnicodeEncodeError as error:
                lone = part[error.start]
                raise ValueError(f"{name} must be valid Unicode, got the lone surrogate {lone!r} at {row}") from error
    return list(texts)
