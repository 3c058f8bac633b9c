"""question-answering: the part of a context that answers a question."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastconv.tasks.classification import check_pairs
from fastconv.tasks.loading import Checkpoint
from fastconv.tasks.task import Item, Row, Task, check_count

_LONGEST_WINDOW = 384  # as in transformers: that of the models fine-tuned on SQuAD


class QuestionAnswering(Task):
    """{score, start, end, answer} with the answer's place in the context; with top_k above 1 a list of them.

    A context that is too long is cut into windows; doc_stride is how many tokens two of them share. A score is the
    probability of the start times that of the end in its window; those of windows and places with one answer are added.
    Answers begin and end with whole words.
    """

    name = "question-answering"
    heads = dict.fromkeys(("bert", "convbert", "roc_bert"), "ForQuestionAnswering")
    fields = ("question", "context")
    required = 2
    needs_offsets = True

    def __init__(
        self, checkpoint: Checkpoint, *, top_k: int = 1, doc_stride: int | None = None, max_answer_len: int = 15
    ) -> None:
        super().__init__(checkpoint)
        for name, value in (("top_k", top_k), ("doc_stride", doc_stride), ("max_answer_len", max_answer_len)):
            check_count(name, value)
        self._top_k, self._max_answer_len = top_k, max_answer_len
        self.several_lines = top_k > 1
        self._window = min(self.limit, _LONGEST_WINDOW)
        self._shared = min(self._window // 2, 128) if doc_stride is None else doc_stride
        if self._shared >= self._window:
            raise ValueError(f"doc_stride must be less than the {self._window} tokens of a window, got {self._shared}")

    @classmethod
    def check_config(cls, config: Mapping[str, Any]) -> None:
        check_pairs(cls.name, config)

    def encode(self, items: Sequence[Item]) -> list[list[Row]]:
        whole = self.tokenize([item["question"] for item in items], [item["context"] for item in items])
        return [list(self._windows(row)) for row in whole]

    def _windows(self, row: Row) -> Iterator[Row]:
        """Cut a row into windows with the whole question and some of the context."""
        begin, end = _context(row)
        room = self._window - (len(row) - (end - begin))
        if end - begin <= room or room < 1:  # a row without room is refused by check_rows
            yield row
            return
        assert row.offsets is not None
        step = room - min(self._shared, room - 1)
        for start in range(begin, end, step):
            stop = min(start + room, end)
            picked = [*range(begin), *range(start, stop), *range(end, len(row))]
            inputs = {name: [ids[index] for index in picked] for name, ids in row.inputs.items()}
            yield Row(inputs, [row.special[index] for index in picked], [row.offsets[index] for index in picked])
            if stop == end:
                return

    def check_rows(self, item: Item, rows: Sequence[Row]) -> None:
        begin, end = _context(rows[0])
        if end == begin:
            raise ValueError("the context is empty: it has no tokens")
        if len(rows[0]) > self._window:
            question = len(rows[0]) - (end - begin)
            raise ValueError(
                f"the question takes {question} tokens with the special ones, which leaves no room for the context in "
                f"a window of {self._window}; shorten the question"
            )
        super().check_rows(item, rows)

    def compute(self, inputs: dict[str, Tensor], rows: Sequence[Row]) -> Sequence[Any]:
        output = self.model(**inputs)
        both = zip(output.start_logits.float().cpu(), output.end_logits.float().cpu(), rows, strict=True)
        return [self._best_spans(start, end, row) for start, end, row in both]

    def _best_spans(self, start: Tensor, end: Tensor, row: Row) -> list[tuple[float, int, int]]:
        """The likeliest spans of context tokens, (score, first, last), the likeliest first."""
        begin, stop = _context(row)
        # The first token stands for "no answer": it takes its share of the probability, but is none.
        allowed = torch.tensor([0, *range(begin, stop)])
        starts, ends = start[allowed].softmax(0)[1:], end[allowed].softmax(0)[1:]
        length = stop - begin
        spans = torch.ones(length, length, dtype=torch.bool).triu().tril(self._max_answer_len - 1)
        scores = (starts[:, None] * ends).masked_fill(~spans, -1.0)
        # More than are asked for: some become one when they are widened to whole words.
        count = min(2 * self._top_k + 10, int(spans.sum()))
        best, indices = scores.flatten().topk(count)
        return [
            (score, begin + index // length, begin + index % length)
            for score, index in zip(best.tolist(), indices.tolist(), strict=True)
        ]

    def decode(self, item: Item, rows: Sequence[Row], outputs: Sequence[Any]) -> Any:
        context = item["context"]
        answers: dict[str, dict[str, Any]] = {}
        for row, spans in zip(rows, outputs, strict=True):
            bounds = self._word_bounds(row)
            for score, first, last in spans:
                start, end = bounds[first][0], bounds[last][1]
                answer = context[start:end]
                if (known := answers.get(answer.lower())) is not None:
                    known["score"] += score
                else:
                    answers[answer.lower()] = {"score": score, "start": start, "end": end, "answer": answer}
        ranked = sorted(answers.values(), key=lambda entry: entry["score"], reverse=True)
        return ranked[0] if self._top_k == 1 else ranked[: self._top_k]

    def _word_bounds(self, row: Row) -> dict[int, tuple[int, int]]:
        """For each context token, where in the context its word starts and ends."""
        assert row.offsets is not None
        begin, end = _context(row)
        tokens = self.tokenizer.convert_ids_to_tokens(row.inputs["input_ids"])
        bounds: dict[int, tuple[int, int]] = {}
        first = begin
        for index in range(begin, end):
            if index > begin and not tokens[index].startswith("##"):
                first = index
            for part in range(first, index + 1):
                bounds[part] = row.offsets[first][0], row.offsets[index][1]
        return bounds


def _context(row: Row) -> tuple[int, int]:
    """Where the context's tokens begin and end in a row."""
    found = [
        index
        for index, (kind, special) in enumerate(zip(row.inputs["token_type_ids"], row.special, strict=True))
        if kind == 1 and not special
    ]
    return (found[0], found[-1] + 1) if found else (len(row) - 1, len(row) - 1)
