"""What every tokenizer here does with ids: special tokens around them, truncation, padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastconv.tokenization.batch_encoding import (
    NO_LIMIT,
    BatchEncoding,
    kind_of_rows,
    one_of,
    pad_rows,
    padded_length,
    plain_rows,
    to_list,
)
from fastconv.tokenization.rows import STRATEGIES, Truncation, check_overflow_of_pair, truncated
from fastconv.tokenization.vocabulary import TokenizerVocabulary

_SIDES = ("right", "left")


class TokenizerOfIds(TokenizerVocabulary):
    """Rows of ids between special tokens.

    model_max_length: how many tokens the model takes, for truncation and padding without a max_length
    padding_side, truncation_side: "right" or "left"
    model_input_names: what a call returns without being asked
    """

    model_input_names: tuple[str, ...]
    model_max_length: int
    padding_side: str
    truncation_side: str

    def _set_options(
        self,
        model_max_length: int | None,
        padding_side: str,
        truncation_side: str,
        model_input_names: Sequence[str] | None,
    ) -> None:
        self.model_max_length = NO_LIMIT if model_max_length is None else int(model_max_length)
        self.padding_side = one_of("padding_side", padding_side, _SIDES)
        self.truncation_side = one_of("truncation_side", truncation_side, _SIDES)
        if model_input_names is not None:
            self.model_input_names = tuple(model_input_names)

    @property
    def pad_token_type_id(self) -> int:
        return 0

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        """How many special tokens one text, or a pair of texts, gets."""
        return self._backend.num_special_tokens_to_add(pair)

    @property
    def max_len_single_sentence(self) -> int:
        """How many tokens of its own a text can have."""
        return self.model_max_length - self.num_special_tokens_to_add()

    @property
    def max_len_sentences_pair(self) -> int:
        """How many tokens of their own two texts can have together."""
        return self.model_max_length - self.num_special_tokens_to_add(pair=True)

    def build_inputs_with_special_tokens(
        self,
        token_ids_0: Sequence[int],
        token_ids_1: Sequence[int] | None = None,
        cls_token_id: int | None = None,
        sep_token_id: int | None = None,
    ) -> list[int]:
        """The ids of a text between cls and sep; those of a pair after it, up to another sep.

        cls_token_id, sep_token_id: what stands there instead of the ids of cls_token and sep_token
        """
        cls = self.cls_token_id if cls_token_id is None else cls_token_id
        sep = self.sep_token_id if sep_token_id is None else sep_token_id
        second = [] if token_ids_1 is None else [*token_ids_1, sep]
        return [cls, *token_ids_0, sep, *second]

    def create_token_type_ids_from_sequences(
        self, token_ids_0: Sequence[int], token_ids_1: Sequence[int] | None = None
    ) -> list[int]:
        """The token_type_ids of build_inputs_with_special_tokens: 0 up to the first sep, then 1."""
        return [0] * (len(token_ids_0) + 2) + [1] * (0 if token_ids_1 is None else len(token_ids_1) + 1)

    def get_special_tokens_mask(
        self,
        token_ids_0: Sequence[int],
        token_ids_1: Sequence[int] | None = None,
        already_has_special_tokens: bool = False,
    ) -> list[int]:
        """1 where build_inputs_with_special_tokens puts a special token, 0 elsewhere.

        already_has_special_tokens: token_ids_0 has them already; 1 for each special token that is in it

        Raises ValueError for token_ids_1 with already_has_special_tokens.
        """
        if already_has_special_tokens:
            if token_ids_1 is not None:
                raise ValueError("with already_has_special_tokens a pair is one row: give all of it as token_ids_0")
            special = set(self.all_special_ids)
            return [int(number in special) for number in to_list(token_ids_0)]
        second = [] if token_ids_1 is None else [*([0] * len(token_ids_1)), 1]
        return [1, *([0] * len(token_ids_0)), 1, *second]

    def truncate_sequences(
        self,
        ids: Sequence[int],
        pair_ids: Sequence[int] | None = None,
        num_tokens_to_remove: int = 0,
        truncation_strategy: str = "longest_first",
        stride: int = 0,
    ) -> tuple[list[int], list[int] | None, list[int]]:
        """The ids of a text and of its pair with num_tokens_to_remove less, and those removed, after `stride` of those
        that stay: no such list for a pair and "longest_first".

        Raises ValueError if what the strategy cuts has fewer tokens.
        """
        strategy = one_of("truncation_strategy", truncation_strategy, STRATEGIES)
        return truncated(ids, pair_ids, num_tokens_to_remove, Truncation(strategy, 0, stride, self.truncation_side))

    def prepare_for_model(
        self,
        ids: Sequence[int],
        pair_ids: Sequence[int] | None = None,
        *,
        add_special_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        stride: int = 0,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_tensors: str | None = None,
        return_token_type_ids: bool | None = None,
        return_attention_mask: bool | None = None,
        return_overflowing_tokens: bool = False,
        return_special_tokens_mask: bool = False,
        return_length: bool = False,
        prepend_batch_axis: bool = False,
    ) -> BatchEncoding:
        """One row out of the ids of a text, or of a pair of texts. The arguments are those of a call, but for:

        return_overflowing_tokens: what truncation cut off, as "overflowing_tokens", after `stride` tokens of what
            stayed; "num_truncated_tokens" says how many are cut off
        prepend_batch_axis: whether tensors are a batch of one row

        Raises ValueError for overflow of a pair with "longest_first", and as a call does.
        """
        added = self.num_special_tokens_to_add(pair_ids is not None) if add_special_tokens else 0
        cut = self._truncation(truncation, max_length, padding, stride, added, pad_to_multiple_of)
        if return_overflowing_tokens and pair_ids is not None:
            check_overflow_of_pair(cut)
        removed = len(ids) + len(pair_ids or ()) + added - cut.length
        first, second, overflow = truncated(ids, pair_ids, removed, cut)
        joined = [*first, *(second or ())]
        out = BatchEncoding()
        if return_overflowing_tokens and overflow and return_tensors is None:
            out.update(overflowing_tokens=overflow, num_truncated_tokens=removed)
        out["input_ids"] = self.build_inputs_with_special_tokens(first, second) if add_special_tokens else joined
        if self._returned("token_type_ids", return_token_type_ids):
            types = self.create_token_type_ids_from_sequences(first, second)
            out["token_type_ids"] = types if add_special_tokens else [0] * len(joined)
        if return_special_tokens_mask:
            mask = self.get_special_tokens_mask(first, second)
            out["special_tokens_mask"] = mask if add_special_tokens else [0] * len(joined)
        out = self.pad(
            out,
            padding,
            max_length,
            pad_to_multiple_of=pad_to_multiple_of,
            padding_side=padding_side,
            return_attention_mask=return_attention_mask,
        )
        return finished(out, return_length, prepend_batch_axis, return_tensors)

    def pad(
        self,
        encoded_inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        padding: bool | str = True,
        max_length: int | None = None,
        *,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: str | None = None,
    ) -> BatchEncoding:
        """Pad rows that are tokenized already, as a data loader gets them.

        encoded_inputs: a result of a call, or a list of the results of single texts; entries that are not the
            tokenizer's own (labels) are carried along as they are
        return_tensors: as in a call; None: tensors or arrays if input_ids are such, else lists

        Raises TypeError for something else; ValueError if there are no input_ids, if they are not rows of ids, or if
        the results have unequal entries.
        """
        given = dict(encoded_inputs) if isinstance(encoded_inputs, Mapping) else _columns(encoded_inputs)
        if "input_ids" not in given:
            raise ValueError(f"pad needs input_ids, got only {', '.join(given) or 'an empty dict'}")
        columns = {name: plain_rows(value) for name, value in given.items()}
        single = len(columns["input_ids"]) > 0 and isinstance(columns["input_ids"][0], int)
        out = BatchEncoding({name: [value] for name, value in columns.items()} if single else columns)
        for ids in out["input_ids"]:
            if not isinstance(ids, list | tuple) or (ids and isinstance(ids[0], list | tuple)):
                raise ValueError(
                    "pad needs rows of ids as input_ids, got a number or a batch as a row; make the rows "
                    "without return_tensors"
                )
        if self._returned("attention_mask", return_attention_mask) and "attention_mask" not in out:
            out["attention_mask"] = [[1] * len(ids) for ids in out["input_ids"]]
        lengths = [len(ids) for ids in out["input_ids"]]
        length = self._padded_length(lengths, padding, max_length, pad_to_multiple_of)
        if length is not None:
            pad_rows(out, length, self._side(padding_side), self.pad_token_id)
        if single:
            out = BatchEncoding({name: value[0] for name, value in out.items()})
        return out.convert_to_tensors(return_tensors or kind_of_rows(given["input_ids"]))

    def _returned(self, name: str, asked: bool | None) -> bool:
        return name in self.model_input_names if asked is None else asked

    def _side(self, padding_side: str | None) -> str:
        return one_of("padding_side", padding_side or self.padding_side, _SIDES)

    def _padded_length(
        self, lengths: Sequence[int], padding: bool | str, max_length: int | None, pad_to_multiple_of: int | None
    ) -> int | None:
        limit = self.model_max_length if max_length is None else max_length
        length = padded_length(lengths, padding, limit, pad_to_multiple_of)
        if length is None or min(lengths) >= length:
            return None
        if self.pad_token_id is None:
            raise ValueError(f"padding={padding!r} needs a pad token; give this tokenizer a pad_token")
        return length

    def _truncation(
        self,
        truncation: bool | str | None,
        max_length: int | None,
        padding: bool | str,
        stride: int,
        added: int,
        pad_to_multiple_of: int | None,
    ) -> Truncation:
        """How to truncate a row, of whose tokens `added` are special."""
        if truncation is None and max_length is not None and padding is False:
            truncation = True
        strategy = "longest_first" if truncation is True else truncation or "do_not_truncate"
        limit = self.model_max_length if max_length is None else max_length
        if one_of("truncation", strategy, STRATEGIES) == "do_not_truncate" or limit >= NO_LIMIT:
            return Truncation("do_not_truncate", limit, stride, self.truncation_side)
        if limit < added:  # tokenizers would not truncate at all
            raise ValueError(f"max_length must be at least {added}, the number of special tokens, got {limit}")
        if not 0 <= stride < max(limit - added, 1):
            most = max(limit - added - 1, 0)
            raise ValueError(f"stride must be from 0 to {most} for max_length {limit}, got {stride}")
        if padding not in (False, "do_not_pad") and pad_to_multiple_of and limit % pad_to_multiple_of:
            raise ValueError(
                f"rows can't be truncated to {limit} tokens and padded to a multiple of {pad_to_multiple_of}: "
                "give a max_length that is such a multiple"
            )
        return Truncation(strategy, limit, stride, self.truncation_side)


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Name -> the entries of that name of all rows. Raises TypeError, ValueError."""
    if not isinstance(rows, list | tuple) or not all(isinstance(row, Mapping) for row in rows):
        kind = type(rows).__name__ + (f" of {type(rows[0]).__name__}" if isinstance(rows, list | tuple) else "")
        raise TypeError(f"pad needs a dict with input_ids or a list of such dicts, got a {kind}")
    names = dict(rows[0]) if rows else {"input_ids": None}
    for number, row in enumerate(rows):
        if row.keys() != names.keys():
            raise ValueError(
                f"all rows must have the same entries, got {', '.join(names)} at 0 and {', '.join(row)} at {number}"
            )
    return {name: [row[name] for row in rows] for name in names}


def finished(row: BatchEncoding, length: bool, prepend_batch_axis: bool, return_tensors: str | None) -> BatchEncoding:
    """A row with its length if asked, as tensors if asked, which may be a batch of one."""
    if length:
        row["length"] = len(row["input_ids"])
    if prepend_batch_axis and return_tensors is not None:
        row = BatchEncoding({name: [value] for name, value in row.items()})
    return row.convert_to_tensors(return_tensors)
