"""Rows of ids as a tokenizer returns them: the dict that holds them, padding, and lists to tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

NO_LIMIT = int(1e30)  # what transformers writes as model_max_length where a tokenizer has none
# What fills a padded row, where that is not the id of the pad token.
_FILL: dict[str, Any] = {
    "attention_mask": 0,
    "token_type_ids": 0,
    "special_tokens_mask": 1,
    "offset_mapping": (0, 0),
}


class BatchEncoding(dict[str, Any]):
    """What a tokenizer returns: a dict, for `model(**it)`, whose entries are attributes too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no {name!r} here, only {', '.join(self)}") from None

    def to(self, device: str | torch.device | int) -> BatchEncoding:
        """Move every tensor to a device, in place, and return this."""
        for name, value in self.items():
            if isinstance(value, torch.Tensor):
                self[name] = value.to(device)
        return self


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
    return length if not pad_to_multiple_of else -(-length // pad_to_multiple_of) * pad_to_multiple_of


def pad_rows(rows: BatchEncoding, length: int, side: str, pad_token_id: int) -> None:
    """Pad the columns of `rows` that a tokenizer made to a length, in place; a longer row stays as it is."""
    for name, value in {"input_ids": pad_token_id, **_FILL}.items():
        if name in rows:
            fills = [[value] * (length - len(row)) for row in rows[name]]
            both = zip(rows[name], fills, strict=True)
            rows[name] = [row + fill if side == "right" else fill + row for row, fill in both]


def plain(value: Any) -> Any:
    """A tensor or an array as the (nested) list or the number that it holds; else the value itself."""
    return value.tolist() if hasattr(value, "tolist") else value


def to_list(ids: Any) -> list[int]:
    """One id, a list, an array or a tensor of ids as a list."""
    ids = plain(ids)
    return [ids] if isinstance(ids, int) else list(ids)


def to_tensors(rows: BatchEncoding, return_tensors: str | None) -> BatchEncoding:
    """The columns of `rows` as tensors for "pt", in place, or as they are for None.

    Raises ValueError for rows of unequal length.
    """
    if one_of("return_tensors", return_tensors, ("pt", None)) is None:
        return rows
    for name, value in rows.items():
        try:
            rows[name] = torch.tensor(value) if len(value) else torch.zeros(0, 0, dtype=torch.int64)
        except ValueError as error:
            lengths = sorted({len(row) for row in value if isinstance(row, list)})
            raise ValueError(
                f"a tensor needs rows of equal length, got lengths {lengths} in {name}; "
                "give padding=True and truncation=True"
            ) from error
    return rows


def one_of(name: str, value: Any, allowed: Sequence[Any]) -> Any:
    """The value of an argument, if it is one of those allowed. Raises ValueError."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    return value
