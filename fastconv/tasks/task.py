"""What a task is: how an item becomes rows of ids, what is computed for a row, and how that becomes a result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from fastconv.tasks.loading import TABLES, Checkpoint

Item = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One sequence of ids.

    inputs: what the model is given, by name; lists of one length
    special: 1 for each token that the tokenizer added
    offsets: where each token stands in its text; None where the task doesn't need them
    """

    inputs: dict[str, list[int]]
    special: list[int]
    offsets: list[tuple[int, int]] | None = None

    def __len__(self) -> int:
        return len(self.inputs["input_ids"])


class Task:
    """Base of the tasks.

    name: as in `fastconv run --task`
    heads: model_type -> what follows the family's name in the class of the model
    fields, required: the keys of an item, and how many of them it must have; if one, a str is an item too
    needs_no_head: whether the encoder is all that the task uses
    equal_lengths: whether rows of unequal length may not share a batch
    several_lines: whether a result is several lines of text, see `fastconv.commands.run`
    lists_single: whether the result for a single str is put into a list, as transformers does for the default top_k
    """

    name: ClassVar[str]
    heads: ClassVar[Mapping[str, str]]
    fields: ClassVar[tuple[str, ...]] = ("text",)
    required: ClassVar[int] = 1
    needs_no_head: ClassVar[bool] = False
    equal_lengths: ClassVar[bool] = False
    needs_offsets: ClassVar[bool] = False
    several_lines: bool = False
    lists_single: bool = False

    def __init__(self, checkpoint: Checkpoint, *, truncate: bool = False) -> None:
        self.checkpoint = checkpoint
        self.model = checkpoint.model
        self.tokenizer = checkpoint.tokenizer
        self.truncate = truncate
        self.limit = checkpoint.limit
        self.add_special_tokens = True

    @classmethod
    def check_config(cls, config: Mapping[str, Any]) -> None:
        """Raise ValueError for a config.json that is unfit for the task, apart from its model_type and head."""

    def check(self, item: Any) -> Item:
        """The item as a dict of what `fields` names. Raises TypeError, ValueError."""
        if isinstance(item, str) and self.required == 1:
            item = {self.fields[0]: item}
        if not isinstance(item, Mapping):
            text = "a str or " if self.required == 1 else ""
            raise TypeError(f"expected {text}a dict with {self._expected()}, got {type(item).__name__}")
        missing = [name for name in self.fields[: self.required] if name not in item]
        unknown = [str(name) for name in item if name not in self.fields]
        if missing or unknown:
            raise ValueError(f"expected {self._expected()}, got {', '.join(map(str, item)) or 'nothing'}")
        return {name: self.check_field(name, item[name]) for name in self.fields if name in item}

    def _expected(self) -> str:
        optional = "".join(f" and optionally {name}" for name in self.fields[self.required :])
        return " and ".join(self.fields[: self.required]) + optional

    def check_field(self, name: str, value: Any) -> Any:
        """The value of a field. Raises TypeError, ValueError."""
        return check_text(name, value)

    def encode(self, items: Sequence[Item]) -> list[list[Row]]:
        """The rows of each item."""
        return [[row] for row in self.tokenize([item["text"] for item in items])]

    def tokenize(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> list[Row]:
        """One row a text, or a pair of texts."""
        if not texts:
            return []
        out = self.tokenizer(
            list(texts),
            None if pairs is None else list(pairs),
            add_special_tokens=self.add_special_tokens,
            truncation="longest_first" if self.truncate else False,
            max_length=self.limit if self.truncate else None,
            # Pairs are told apart by them in training, whatever names a version of a tokenizer lists.
            return_token_type_ids=True,
            return_attention_mask=True,
            return_special_tokens_mask=True,
            return_offsets_mapping=self.needs_offsets,
        )
        names = [name for name in (*TABLES, "attention_mask") if name in out]
        offsets = out["offset_mapping"] if self.needs_offsets else [None] * len(texts)
        return [
            Row(dict(zip(names, columns, strict=True)), special, offset)
            for *columns, special, offset in zip(
                *(out[name] for name in names), out["special_tokens_mask"], offsets, strict=True
            )
        ]

    def check_rows(self, item: Item, rows: Sequence[Row]) -> None:
        """Raise ValueError for rows that the model can't take, or not as they were meant."""
        for row in rows:
            if all(row.special):
                raise ValueError("the text is empty: it has no tokens")
            if len(row) > self.limit:
                raise ValueError(
                    f"{len(row)} tokens are more than the {self.limit} that the model takes; "
                    "shorten the text, or truncate it (--truncate, truncate=True)"
                )
            for name, size in self.checkpoint.table_sizes.items():
                if (highest := max(row.inputs.get(name, (0,)))) >= size:
                    raise ValueError(
                        f"the tokenizer gives {highest} in {name}, but the model has only {size} of them; "
                        "do they belong together?"
                    )

    def compute(self, inputs: dict[str, Tensor], rows: Sequence[Row]) -> Sequence[Any]:
        """What the model makes of each row of a batch, on the CPU and in fp32.

        inputs: int64 tensors (batch, length), padded on the right
        """
        raise NotImplementedError

    def decode(self, item: Item, rows: Sequence[Row], outputs: Sequence[Any]) -> Any:
        """The result of an item."""
        raise NotImplementedError


def labels_of(config: Any) -> list[str]:
    """The label of each output of a classifier. Raises ValueError if config.json doesn't name them all."""
    labels = [config.id2label.get(index) for index in range(config.num_labels)]
    if not all(isinstance(label, str) for label in labels):
        raise ValueError(
            f"id2label in config.json must name the outputs from 0 to {len(labels) - 1}, got {config.id2label}"
        )
    return labels


def check_text(name: str, value: Any) -> str:
    """The text. Raises TypeError if it is no str, ValueError if it is empty or no Unicode."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a str, got {type(value).__name__}")
    if not value.strip():
        raise ValueError(f"{name} is empty; expected some text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} must be valid Unicode, got the lone surrogate {value[error.start]!r}") from error
    return value


def check_count(name: str, value: int | None) -> None:
    """Raise TypeError, ValueError unless the value is None or an int of at least 1."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
