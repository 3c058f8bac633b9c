"""What a tokenizer returns: a dict of rows, which also maps between tokens, words and characters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

NO_LIMIT = int(1e30)  # what transformers writes as model_max_length where a tokenizer has none
# What fills a padded row; None: the id of the pad token, for shapes and pronunciations too, as in transformers.
_FILL: dict[str, Any] = {
    "input_ids": None,
    "input_shape_ids": None,
    "input_pronunciation_ids": None,
    "attention_mask": 0,
    "token_type_ids": 0,
    "special_tokens_mask": 1,
    "offset_mapping": (0, 0),
}


class CharSpan(NamedTuple):
    """The characters of a text from `start` up to `end`, without the latter."""

    start: int
    end: int


class TokenSpan(NamedTuple):
    """The tokens of a row from `start` up to `end`, without the latter."""

    start: int
    end: int


class BatchEncoding(dict[str, Any]):
    """What a tokenizer returns: a dict, for `model(**it)`, whose entries are attributes too.

    encodings: what each row was made from, which the methods ask: `tokenizers.Encoding`, or rows made in Python, which
        know their tokens, word_ids and sequence_ids only; None for rows that `pad` got

    The methods about a word, token or character take its index, or, where there is more than one row, the index of
    the row and then its own. They raise ValueError if the rows don't know the answer.
    """

    def __init__(self, rows: Any = (), encodings: Sequence[Any] | None = None) -> None:
        super().__init__(rows)
        self.encodings = encodings

    def __getattr__(self, name: str) -> Any:
        try:
            return dict.__getitem__(self, name)
        except KeyError:
            raise AttributeError(f"no {name!r} here, only {', '.join(self)}") from None

    def __getitem__(self, name: Any) -> Any:
        """An entry by its name, or the encoding of a row by its index."""
        return self._encoding(name, "ids") if isinstance(name, int) else super().__getitem__(name)

    def to(self, device: str | torch.device | int, *, non_blocking: bool = False) -> BatchEncoding:
        """Move every tensor to a device, in place, and return this."""
        for name, value in self.items():
            if isinstance(value, torch.Tensor):
                self[name] = value.to(device, non_blocking=non_blocking)
        return self

    def convert_to_tensors(self, tensor_type: str | None = None) -> BatchEncoding:
        """Make tensors of the rows for "pt", arrays for "np", in place, and return this; None leaves them as they are.

        Raises ValueError for rows of unequal length.
        """
        if one_of("return_tensors", tensor_type, ("pt", "np", None)) is None:
            return self
        for name, value in self.items():
            try:
                tensor = torch.zeros(0, 0, dtype=torch.int64) if value == [] else torch.tensor(value)
            except ValueError as error:
                lengths = sorted({len(row) for row in value if isinstance(row, list)})
                raise ValueError(
                    f"a tensor needs rows of equal length, got lengths {lengths} in {name}; "
                    "give padding=True and truncation=True"
                ) from error
            self[name] = tensor if tensor_type == "pt" else tensor.numpy()
        return self

    @property
    def is_fast(self) -> bool:
        """Whether the rows were made by the package `tokenizers`, so that every method below has its answer."""
        return bool(self.encodings) and all(hasattr(encoding, "char_to_token") for encoding in self.encodings or ())

    @property
    def n_sequences(self) -> int | None:
        """1 for texts, 2 for pairs of them, None where that is not known."""
        return self.encodings[0].n_sequences if self.encodings else None

    def tokens(self, batch_index: int = 0) -> list[str]:
        """The tokens of a row."""
        return self._encoding(batch_index, "tokens").tokens

    def word_ids(self, batch_index: int = 0) -> list[int | None]:
        """For each token of a row the index of its word in its text; None for a special token."""
        return self._encoding(batch_index, "word_ids").word_ids

    def sequence_ids(self, batch_index: int = 0) -> list[int | None]:
        """For each token of a row 0 if it is of the text, 1 if of the pair's other text; None for a special token."""
        return self._encoding(batch_index, "sequence_ids").sequence_ids

    def token_to_sequence(self, batch_or_token_index: int, token_index: int | None = None) -> int | None:
        """0 or 1: whose of the pair a token is; None for a special token."""
        return self._ask("token_to_sequence", batch_or_token_index, token_index)

    def token_to_word(self, batch_or_token_index: int, token_index: int | None = None) -> int | None:
        """The index of a token's word; None for a special token."""
        return self._ask("token_to_word", batch_or_token_index, token_index)

    def token_to_chars(self, batch_or_token_index: int, token_index: int | None = None) -> CharSpan | None:
        """The characters of a token; None for a special token."""
        span = self._ask("token_to_chars", batch_or_token_index, token_index)
        return None if span is None else CharSpan(*span)

    def word_to_tokens(
        self, batch_or_word_index: int, word_index: int | None = None, sequence_index: int = 0
    ) -> TokenSpan | None:
        """The tokens of a word; None if it has none."""
        span = self._ask("word_to_tokens", batch_or_word_index, word_index, sequence_index)
        return None if span is None else TokenSpan(*span)

    def word_to_chars(
        self, batch_or_word_index: int, word_index: int | None = None, sequence_index: int = 0
    ) -> CharSpan | None:
        """The characters of a word; None if there is no such word."""
        span = self._ask("word_to_chars", batch_or_word_index, word_index, sequence_index)
        return None if span is None else CharSpan(*span)

    def char_to_token(
        self, batch_or_char_index: int, char_index: int | None = None, sequence_index: int = 0
    ) -> int | None:
        """The index of the token that a character is in; None for one that is in none, like a space."""
        return self._ask("char_to_token", batch_or_char_index, char_index, sequence_index)

    def char_to_word(
        self, batch_or_char_index: int, char_index: int | None = None, sequence_index: int = 0
    ) -> int | None:
        """The index of the word that a character is in; None for one that is in none, like a space."""
        return self._ask("char_to_word", batch_or_char_index, char_index, sequence_index)

    def _ask(self, method: str, first: int, second: int | None, *sequence: int) -> Any:
        row, index = (0, first) if second is None else (first, second)
        encoding = self._encoding(row, method)
        if method.startswith("token_") and index < 0:
            index += len(encoding.ids)
        return getattr(encoding, method)(index, *sequence)

    def _encoding(self, row: int, attribute: str) -> Any:
        if not self.encodings:
            raise ValueError(f"{attribute} is known of what a tokenizer made out of texts, not of rows out of ids")
        encoding = self.encodings[row]
        if not hasattr(encoding, attribute):
            raise ValueError(
                f"{attribute} is not known of rows that were made in Python (by RoCBertTokenizer, or with never_split "
                "or do_basic_tokenize=False); give return_offsets_mapping=True and read offset_mapping"
            )
        return encoding


def padded_length(
    lengths: Sequence[int],
    padding: bool | str,
    max_length: int,
    pad_to_multiple_of: int | None,
) -> int | None:
    """The length to pad rows of these lengths to; None for no padding.

    padding: True or "longest", "max_length", False or "do_not_pad"
    max_length: the length for "max_length"; NO_LIMIT if there is none
    """
    if not padding or padding == "do_not_pad" or not lengths:
        return None
    if padding is True or padding == "longest":
        length = max(lengths)
    elif padding == "max_length":
        length = max_length
        if length >= NO_LIMIT:
            raise ValueError("padding='max_length' needs max_length: this tokenizer has no model_max_length")
    else:
        raise ValueError(f"padding must be True, False, 'longest' or 'max_length', got {padding!r}")
    if pad_to_multiple_of is not None and pad_to_multiple_of < 0:
        raise ValueError(f"pad_to_multiple_of must be at least 1, or None, got {pad_to_multiple_of}")
    return length if not pad_to_multiple_of else -(-length // pad_to_multiple_of) * pad_to_multiple_of


def pad_rows(rows: BatchEncoding, length: int, side: str, pad_token_id: int) -> None:
    """Pad the columns of `rows` that a tokenizer made to a length, in place; a longer row stays as it is."""
    for name, value in _FILL.items():
        if name in rows:
            fills = [[pad_token_id if value is None else value] * (length - len(row)) for row in rows[name]]
            both = zip(rows[name], fills, strict=True)
            rows[name] = [row + fill if side == "right" else fill + row for row, fill in both]


def plain(value: Any) -> Any:
    """A tensor or an array as the (nested) list or the number that it holds; else the value itself."""
    return value.tolist() if hasattr(value, "tolist") else value


def plain_rows(value: Any) -> Any:
    """Rows that are tensors, arrays or lists, or one such row, as lists."""
    return [plain(row) for row in value] if isinstance(value, list | tuple) else plain(value)


def kind_of_rows(value: Any) -> str | None:
    """The return_tensors that rows, or one row, were made with: "pt", "np" or None."""
    first = value[0] if isinstance(value, list | tuple) and value else value
    if isinstance(first, torch.Tensor):
        return "pt"
    return "np" if hasattr(first, "tolist") else None


def to_list(ids: Any) -> list[int]:
    """One id, a list, an array or a tensor of ids as a list."""
    ids = plain(ids)
    return [ids] if isinstance(ids, int) else list(ids)


def one_of(name: str, value: Any, allowed: Sequence[Any]) -> Any:
    """The value of an argument, if it is one of those allowed. Raises ValueError."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    return value
