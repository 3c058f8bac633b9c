"""A task over many items: in batches, in order, in constant memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch

from fastconv.tasks.task import Item, Row, Task

# How many batches are looked ahead, to put rows of like length together.
_BATCHES_AHEAD = 16
# What a result may hold for each token, such as its hidden state, is kept until it is its turn: 16,384 tokens times 768
# numbers are 50 MB.
_TOKENS_AHEAD = 16384


class ItemError(ValueError):
    """An item, or a line of text, that can't be used; the message begins with which one it is."""


class Pipeline:
    """A task with a model: call it with an item or a list of items, or `stream` any number of them.

    What it gives for an item does not depend, but for rounding, on the items beside it.
    """

    def __init__(self, task: Task, batch_size: int) -> None:
        self.task = task
        self.batch_size = batch_size
        self._device = task.model.device
        # ConvBERT's convolutions see the padding; and without a pad token there is none.
        self._equal_lengths = (
            task.equal_lengths or task.model.config.model_type == "convbert" or task.tokenizer.pad_token_id is None
        )

    @property
    def model(self) -> Any:
        return self.task.model

    @property
    def tokenizer(self) -> Any:
        return self.task.tokenizer

    @property
    def window(self) -> int:
        """How many items `run` takes best at a time."""
        return self.batch_size * _BATCHES_AHEAD

    def __call__(self, inputs: Any) -> Any:
        """The result of an item, a str or a dict; or the list of results of a list of items.

        Raises ItemError, which is a ValueError; TypeError for what is no item.
        """
        if not isinstance(inputs, str | Mapping | list | tuple):
            raise TypeError(
                f"inputs must be a str, a dict or a list of them, got {type(inputs).__name__}; "
                "for an iterator there is stream"
            )
        if isinstance(inputs, list | tuple):
            return list(self.stream(inputs))
        (result,) = self.run([("the input", inputs)])
        return [result] if isinstance(inputs, str) and self.task.lists_single else result

    def stream(self, inputs: Iterable[Any]) -> Iterator[Any]:
        """The results of items, in order, with as many items in memory as some batches need.

        Raises ItemError, which is a ValueError, after the results of the items before.
        """
        numbered = ((f"inputs[{number}]", item) for number, item in enumerate(inputs))
        while window := list(islice(numbered, self.window)):
            yield from self.run(window)

    def run(self, items: Sequence[tuple[str, Any]]) -> Iterator[Any]:
        """The results of some items, each with its name for an error, in order.

        Raises ItemError after the results of the items before.
        """
        checked, error = _until_error(self.task.check, items)
        encoded = list(zip(checked, self.task.encode(checked), strict=True))
        names = [where for where, _ in items[: len(checked)]]
        passed, row_error = _until_error(lambda pair: self.task.check_rows(*pair), zip(names, encoded, strict=True))
        for span in _spans(encoded[: len(passed)], self.batch_size):
            yield from self._run_span(span)
        if (first := row_error or error) is not None:
            raise first

    def _run_span(self, span: Sequence[tuple[Item, list[Row]]]) -> Iterator[Any]:
        rows = [row for _, own in span for row in own]
        outputs: list[Any] = [None] * len(rows)
        for batch in _batches([len(row) for row in rows], self.batch_size, self._equal_lengths):
            picked = [rows[index] for index in batch]
            inputs = self.tokenizer.pad([row.inputs for row in picked], padding_side="right", return_tensors="pt")
            with torch.inference_mode():
                computed = self.task.compute({name: t.to(self._device) for name, t in inputs.items()}, picked)
            for index, output in zip(batch, computed, strict=True):
                outputs[index] = output
        start = 0
        for item, own in span:
            yield self.task.decode(item, own, outputs[start : start + len(own)])
            outputs[start : start + len(own)] = [None] * len(own)
            start += len(own)


def _until_error(
    function: Callable[[Any], Any], named: Iterable[tuple[str, Any]]
) -> tuple[list[Any], ItemError | None]:
    """What a function returns for items, up to the first for which it raises, and that error with the item's name."""
    results = []
    for where, item in named:
        try:
            results.append(function(item))
        except (TypeError, ValueError) as error:
            told = ItemError(f"{where}: {error}")
            told.__cause__ = error
            return results, told
    return results, None


def _spans(items: Sequence[tuple[Item, list[Row]]], batch_size: int) -> Iterator[list[tuple[Item, list[Row]]]]:
    """Cut into runs of items, each enough to fill batches and little enough to keep in memory."""
    span: list[tuple[Item, list[Row]]] = []
    rows = tokens = 0
    for item, own in items:
        span.append((item, own))
        rows += len(own)
        tokens += sum(map(len, own))
        if rows >= batch_size * _BATCHES_AHEAD or (rows >= batch_size and tokens >= _TOKENS_AHEAD):
            yield span
            span, rows, tokens = [], 0, 0
    if span:
        yield span


def _batches(lengths: Sequence[int], batch_size: int, equal: bool) -> Iterator[list[int]]:
    """The indices of rows of like length, or of equal length."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if len(batch) == batch_size or (batch and equal and lengths[batch[0]] != lengths[index]):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
