"""fill-mask: the likeliest tokens in the place of each mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fastconv.tasks.loading import Checkpoint
from fastconv.tasks.task import Item, Row, Task, check_count


class FillMask(Task):
    """[{score, token, token_str, sequence}, ...]; for several masks a list of such lists, each with the others left.

    The probabilities of several masks are those of each alone, not joint ones.
    """

    name = "fill-mask"
    heads = dict.fromkeys(("bert", "convbert", "roc_bert"), "ForMaskedLM")
    several_lines = True

    def __init__(self, checkpoint: Checkpoint, *, truncate: bool = False, top_k: int | None = None) -> None:
        super().__init__(checkpoint, truncate=truncate)
        check_count("top_k", top_k)
        self._top_k = min(top_k or 5, self.model.config.vocab_size)
        if self.tokenizer.mask_token_id is None:
            raise ValueError("fill-mask needs a mask token, but the tokenizer has none")
        self._mask = self.tokenizer.mask_token_id

    def check_rows(self, item: Item, rows: Sequence[Row]) -> None:
        super().check_rows(item, rows)
        if self._mask not in rows[0].inputs["input_ids"]:
            cut = f" in the first {self.limit} tokens, to which it was truncated" if self.truncate else ""
            raise ValueError(f"found no {self.tokenizer.mask_token}{cut}; put one where a token is to be filled in")

    def compute(self, inputs: dict[str, Tensor], rows: Sequence[Row]) -> Sequence[Any]:
        hidden = self.model.base_model(**inputs).last_hidden_state
        at_mask = inputs["input_ids"] == self._mask
        # The head for these tokens alone: for all of them it is most of the work, and of the memory.
        logits = self.model.logits({"last_hidden_state": hidden[at_mask]})
        scores, tokens = logits.float().softmax(-1).topk(self._top_k)
        found = zip(scores.tolist(), tokens.tolist(), strict=True)
        return [[next(found) for _ in range(count)] for count in at_mask.sum(1).tolist()]

    def decode(self, item: Item, rows: Sequence[Row], outputs: Sequence[Any]) -> Any:
        ids = rows[0].inputs["input_ids"]
        places = [place for place, token in enumerate(ids) if token == self._mask]
        results = [
            [self._filled(ids, place, score, token, len(places) == 1) for score, token in zip(*found, strict=True)]
            for place, found in zip(places, outputs[0], strict=True)
        ]
        return results[0] if len(places) == 1 else results

    def _filled(self, ids: list[int], place: int, score: float, token: int, single: bool) -> dict[str, Any]:
        filled = [*ids[:place], token, *ids[place + 1 :]]
        return {
            "score": score,
            "token": token,
            "token_str": self.tokenizer.decode([token]),
            # With special tokens the other masks would go too.
            "sequence": self.tokenizer.decode([n for n in filled if n != self.tokenizer.pad_token_id], single),
        }
