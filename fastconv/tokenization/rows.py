"""Rows of tokens made in Python: layout between special tokens, truncation, overflow, padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from fastconv.tokenization.python_splitter import Piece

STRATEGIES = ("longest_first", "only_first", "only_second", "do_not_truncate")
_T = TypeVar("_T")


class Truncation(NamedTuple):
    """How rows are truncated: to how many tokens, special ones included, and with what overlap if they overflow."""

    strategy: str
    length: int
    stride: int
    side: str


@dataclass
class Row:
    """One row of a batch, with the names that `tokenizers.Encoding` has."""

    tokens: list[str] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    type_ids: list[int] = field(default_factory=list)
    special_tokens_mask: list[int] = field(default_factory=list)
    attention_mask: list[int] = field(default_factory=list)
    offsets: list[tuple[int, int]] = field(default_factory=list)
    word_ids: list[int | None] = field(default_factory=list)
    sequence_ids: list[int | None] = field(default_factory=list)
    overflowing: list[Row] = field(default_factory=list)
    n_sequences: int = 1

    def add_text(self, pieces: Sequence[Piece], ids: Sequence[int], sequence: int) -> None:
        """Append the pieces of the first (0) or the second text (1) of a pair."""
        self._add([piece.token for piece in pieces], ids, sequence, special=0)
        self.offsets += [(piece.start, piece.end) for piece in pieces]
        self.word_ids += [piece.word for piece in pieces]
        self.sequence_ids += [sequence] * len(pieces)
        self.n_sequences = sequence + 1

    def add_special(self, token: str, token_id: int, type_id: int) -> None:
        """Append a special token."""
        self._add([token], [token_id], type_id, special=1)
        self.offsets.append((0, 0))
        self.word_ids.append(None)
        self.sequence_ids.append(None)

    def _add(self, tokens: Sequence[str], ids: Sequence[int], type_id: int, special: int) -> None:
        self.tokens += tokens
        self.ids += ids
        self.type_ids += [type_id] * len(ids)
        self.special_tokens_mask += [special] * len(ids)
        self.attention_mask += [1] * len(ids)

    def pad(self, length: int, *, direction: str, pad_id: int, pad_type_id: int, pad_token: str) -> None:
        """Pad every column to a length, in place."""
        missing = length - len(self.ids)
        fills: dict[str, Any] = {"tokens": pad_token, "ids": pad_id, "type_ids": pad_type_id, "attention_mask": 0}
        fills |= {"special_tokens_mask": 1, "offsets": (0, 0), "word_ids": None, "sequence_ids": None}
        for name, value in fills.items():
            old, fill = getattr(self, name), [value] * missing
            setattr(self, name, old + fill if direction == "right" else fill + old)


def truncated(
    first: Sequence[_T], second: Sequence[_T] | None, remove: int, truncation: Truncation
) -> tuple[list[_T], list[_T] | None, list[_T]]:
    """Two texts of tokens with `remove` tokens less, and those of one text that were removed, after `stride` of the
    tokens that stay; none of those for a pair and "longest_first".

    Raises ValueError if the text that the strategy names has no more tokens.
    """
    strategy, _, stride, side = truncation
    if remove <= 0 or strategy == "do_not_truncate":
        return list(first), None if second is None else list(second), []
    if strategy == "longest_first" and second is not None:
        _check(len(first) + len(second), remove, strategy)
        from_longer = min(abs(len(first) - len(second)), remove)
        rest = remove - from_longer  # from both in turn once they are equal, the second one's turn first
        cuts = [rest // 2, rest - rest // 2]
        cuts[0 if len(first) > len(second) else 1] += from_longer
        return _cut(first, cuts[0], side)[0], _cut(second, cuts[1], side)[0], []
    if strategy == "only_second":
        if second is None:
            raise ValueError(f"truncation='only_second' must remove {remove} tokens of text_pair, which is not given")
        _check(len(second), remove, strategy)
        kept, overflow = _cut(second, remove, side, stride)
        return list(first), kept, overflow
    _check(len(first), remove, strategy)
    kept, overflow = _cut(first, remove, side, stride)
    return kept, None if second is None else list(second), overflow


def check_overflow_of_pair(truncation: Truncation) -> None:
    """Raises ValueError where what a pair loses is in no order that overflow could have."""
    if truncation.strategy == "longest_first":
        raise ValueError(
            "return_overflowing_tokens needs to know which text of a pair overflows: give truncation='only_first' or "
            "'only_second', got 'longest_first'"
        )


def windows(tokens: Sequence[_T], length: int, stride: int, side: str) -> list[list[_T]]:
    """All of a text in rows of `length` tokens, each beginning with the last `stride` tokens of the row before; from
    the end that `side` is not, so that the first of them is what truncation leaves.

    Raises ValueError if length is not more than stride.
    """
    if length == 0:
        return [[], list(tokens)]
    if length <= stride:
        raise ValueError(f"stride must be less than the {length} tokens that a row has of the text, got {stride}")
    rows: list[list[_T]] = []
    for start in range(0, len(tokens), length - stride):
        end = min(start + length, len(tokens))
        rows.append(list(tokens[start:end] if side == "right" else tokens[len(tokens) - end : len(tokens) - start]))
        if end == len(tokens):
            break
    return rows


def _cut(tokens: Sequence[_T], remove: int, side: str, stride: int = 0) -> tuple[list[_T], list[_T]]:
    window = min(len(tokens), stride + remove)
    if side == "left":
        return list(tokens[remove:]), list(tokens[:window])
    return list(tokens[: len(tokens) - remove]), list(tokens[len(tokens) - window :])


def _check(tokens: int, remove: int, strategy: str) -> None:
    if remove > tokens or (remove == tokens and strategy != "longest_first"):
        raise ValueError(f"truncation={strategy!r} must remove {remove} of {tokens} tokens, which leaves none of them")
