"""What every tokenizer here does with texts: rows of ids, by the package `tokenizers` or in Python."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastconv.tokenization.batch_encoding import BatchEncoding
from fastconv.tokenization.ids import TokenizerOfIds
from fastconv.tokenization.python_splitter import Piece, PythonSplitter
from fastconv.tokenization.rows import Row, Truncation, check_overflow_of_pair, truncated, windows


class Tokenizer(TokenizerOfIds):
    """Texts to rows of ids.

    split_special_tokens: whether a special token in a text is text like any other
    """

    split_special_tokens: bool
    _splitter: PythonSplitter | None

    @property
    def is_fast(self) -> bool:
        """Whether the package `tokenizers` splits the texts, so that results know of words and characters."""
        return self._splitter is None

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
        return_token_type_ids: bool | None = None,
        return_attention_mask: bool | None = None,
        return_overflowing_tokens: bool = False,
        return_special_tokens_mask: bool = False,
        return_offsets_mapping: bool = False,
        return_length: bool = False,
    ) -> BatchEncoding:
        """The ids of a text, or of each text of a list: input_ids, what model_input_names says (token_type_ids,
        attention_mask), and what else the return_* arguments ask for.

        text, text_pair: a str or a list of them; with is_split_into_words a list of words or a list of such lists
        padding: True or "longest" (of this batch), "max_length", or False
        truncation: True or "longest_first", "only_first", "only_second", or False. None is "longest_first" where
            max_length is given without padding, else False
        max_length: the length for truncation and for padding="max_length"; None: model_max_length
        return_overflowing_tokens: what truncation cut off makes further rows, each beginning with the last `stride`
            tokens of the row before; overflow_to_sample_mapping says whose they are
        return_tensors: "pt" for tensors (batch, length) of int64, "np" for such arrays, or None for lists

        Raises TypeError for a text that is not a str, ValueError for a setting that can't be kept.
        """
        if not isinstance(text, str | list | tuple):
            raise TypeError(f"text must be a str or a list of str, got {type(text).__name__}")
        single = isinstance(text, str) or (
            is_split_into_words and not any(isinstance(part, list | tuple) for part in text[:1])
        )
        texts = _batch("text", [text] if single else text, is_split_into_words)
        pairs = None
        if text_pair is not None:
            pairs = _batch("text_pair", [text_pair] if single else text_pair, is_split_into_words)
            if len(pairs) != len(texts):
                raise ValueError(f"text and text_pair must have the same length, got {len(texts)} and {len(pairs)}")

        added = self.num_special_tokens_to_add(pairs is not None) if add_special_tokens else 0
        cut = self._truncation(truncation, max_length, padding, stride, added, pad_to_multiple_of)
        if not return_overflowing_tokens:
            cut = cut._replace(stride=0)
        if self._splitter is None:
            rows = self._encode(texts, pairs, cut, add_special_tokens, is_split_into_words)
        else:
            if return_overflowing_tokens and pairs is not None:
                check_overflow_of_pair(cut)
            rows = self._encode_in_python(texts, pairs, cut, add_special_tokens, is_split_into_words)
        owners = list(range(len(rows)))
        if return_overflowing_tokens:
            owned = [(row, owner) for owner, first in enumerate(rows) for row in (first, *first.overflowing)]
            rows, owners = [row for row, _ in owned], [owner for _, owner in owned]
        side, lengths = self._side(padding_side), [len(row.ids) for row in rows]
        length = self._padded_length(lengths, padding, max_length, pad_to_multiple_of)
        if length is not None:
            for row in rows:
                row.pad(length, direction=side, pad_id=self.pad_token_id, pad_type_id=0, pad_token=self.pad_token)

        out = BatchEncoding({"input_ids": [row.ids for row in rows], **self._streams(rows)}, rows)
        if self._returned("token_type_ids", return_token_type_ids):
            out["token_type_ids"] = [row.type_ids for row in rows]
        if self._returned("attention_mask", return_attention_mask):
            out["attention_mask"] = [row.attention_mask for row in rows]
        if return_special_tokens_mask:
            out["special_tokens_mask"] = [row.special_tokens_mask for row in rows]
        if return_offsets_mapping:
            out["offset_mapping"] = [row.offsets for row in rows]
        if return_length:
            out["length"] = [len(ids) for ids in out["input_ids"]]
        if return_overflowing_tokens:
            out["overflow_to_sample_mapping"] = owners
        elif single and return_tensors is None:
            return BatchEncoding({name: value[0] for name, value in out.items()}, rows)
        return out.convert_to_tensors(return_tensors)

    def encode(
        self,
        text: str | Sequence[str],
        text_pair: str | Sequence[str] | None = None,
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
    ) -> Any:
        """The input_ids alone of a call: a list of int, or with return_tensors="pt" a tensor (1, length)."""
        return self(
            text,
            text_pair,
            add_special_tokens=add_special_tokens,
            padding=padding,
            truncation=truncation,
            max_length=max_length,
            stride=stride,
            is_split_into_words=is_split_into_words,
            pad_to_multiple_of=pad_to_multiple_of,
            padding_side=padding_side,
            return_tensors=return_tensors,
        )["input_ids"]

    def tokenize(self, text: str, pair: str | None = None, *, add_special_tokens: bool = False) -> list[str]:
        """The tokens of a text as strings."""
        row = self(text, pair, add_special_tokens=add_special_tokens)[0]
        # `tokenizers` has an added token as it stands in the text, which is in no vocabulary.
        return row.tokens if isinstance(row, Row) else self.convert_ids_to_tokens(row.ids)

    def _streams(self, rows: Sequence[Any]) -> dict[str, list[list[int]]]:
        """Columns of ids beside input_ids, for the tokenizers that have them."""
        return {}

    def _encode(
        self, texts: list[Any], pairs: list[Any] | None, cut: Truncation, add_special_tokens: bool, split: bool
    ) -> Sequence[Any]:
        """Rows, as `tokenizers.Encoding`."""
        backend = self._backend
        backend.encode_special_tokens = self.split_special_tokens
        if cut.strategy == "do_not_truncate":
            backend.no_truncation()
        else:
            backend.enable_truncation(cut.length, stride=cut.stride, strategy=cut.strategy, direction=cut.side)
        try:
            return backend.encode_batch(
                texts if pairs is None else list(zip(texts, pairs, strict=True)),
                is_pretokenized=split,
                add_special_tokens=add_special_tokens,
            )
        except BaseException as error:  # tokenizers raises nothing more special; the types are checked above
            # It panics, which is no Exception, where a pair leaves the text that is cut no more than `stride` tokens.
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            settings = f"truncation={cut.strategy!r}, max_length={cut.length}, stride={cut.stride}"
            raise ValueError(f"can't tokenize with {settings}: {error}") from error

    def _encode_in_python(
        self, texts: list[Any], pairs: list[Any] | None, cut: Truncation, add_special_tokens: bool, split: bool
    ) -> list[Row]:
        """Rows that the PythonSplitter makes."""
        rows = []
        for text, pair in zip(texts, pairs or [None] * len(texts), strict=True):
            first = self._pieces(text, split)
            second = None if pair is None else self._pieces(pair, split)
            added = self.num_special_tokens_to_add(second is not None) if add_special_tokens else 0
            remove = len(first) + len(second or ()) + added - cut.length
            kept, kept_pair, lost = truncated(first, second, remove, cut)
            row = self._row(kept, kept_pair, add_special_tokens)
            if lost and cut.strategy == "only_second":
                more = windows(second or (), len(kept_pair or ()), cut.stride, cut.side)[1:]
                row.overflowing = [self._row(first, window, add_special_tokens) for window in more]
            elif lost:
                more = windows(first, len(kept), cut.stride, cut.side)[1:]
                row.overflowing = [self._row(window, second, add_special_tokens) for window in more]
            rows.append(row)
        return rows

    def _pieces(self, text: Any, split: bool) -> list[Piece]:
        assert self._splitter is not None
        special = self.all_special_tokens
        if not split:
            return self._splitter.pieces(text, self._backend, special, self.split_special_tokens)
        words = [self._splitter.pieces(word, self._backend, special, self.split_special_tokens) for word in text]
        return [piece._replace(word=index) for index, word in enumerate(words) for piece in word]

    def _row(self, first: Sequence[Piece], second: Sequence[Piece] | None, add_special_tokens: bool) -> Row:
        row = Row()
        if add_special_tokens:
            row.add_special(self.cls_token, self.cls_token_id, 0)
        for sequence, pieces in enumerate((first,) if second is None else (first, second)):
            row.add_text(pieces, self.convert_tokens_to_ids([piece.token for piece in pieces]), sequence)
            if add_special_tokens:
                row.add_special(self.sep_token, self.sep_token_id, sequence)
        return row


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
