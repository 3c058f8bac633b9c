"""text-generation: how a text goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from fastconv.reference.sampling import NextToken
from fastconv.tasks.loading import Checkpoint
from fastconv.tasks.task import Item, Row, Task, check_count


class TextGeneration(Task):
    """[{generated_text}]: the prompt and what a decoder makes of it; see `generate` of the model for the arguments.

    add_special_tokens: whether the model reads [CLS] prompt [SEP], as transformers' pipeline has it, or the bare prompt
    """

    name = "text-generation"
    heads: ClassVar[Mapping[str, str]] = {"bert": "LMHeadModel", "roc_bert": "ForCausalLM"}
    # Without padding on the left a prompt's positions are what they are alone.
    equal_lengths = True

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        truncate: bool = False,
        top_k: int | None = None,
        add_special_tokens: bool = True,
        max_new_tokens: int = 20,
        do_sample: bool = False,
        temperature: float | None = None,
        top_p: float | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(checkpoint, truncate=truncate)
        self.add_special_tokens = add_special_tokens
        check_count("max_new_tokens", max_new_tokens)
        sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
        given = {name: value for name, value in sampling.items() if value is not None}
        if given and not do_sample:
            raise ValueError(f"{', '.join(given)} only matters for sampling; give do_sample=True (--sample) too")
        defaults: dict[str, Any] = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "seed": None}
        NextToken(do_sample, **{**defaults, **given})  # raises what generate would for the first text
        self._options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": do_sample, **given}
        # With a seed a text goes on as it does alone; and rows that end early need a token to fill them.
        self._one_by_one = seed is not None or self.model.config.pad_token_id is None
        if self.model.config.model_type == "roc_bert":
            for stream in ("shape", "pronunciation"):
                self._options[f"{stream}_ids_of_vocab"] = self._of_vocab(
                    getattr(self.tokenizer, f"{stream}_ids_of_vocab")()
                )
        self.limit -= max_new_tokens
        if self.limit < 1:
            raise ValueError(
                f"max_new_tokens must be less than the {checkpoint.limit} tokens that the model takes, "
                f"got {max_new_tokens}"
            )

    @classmethod
    def check_config(cls, config: Mapping[str, Any]) -> None:
        if not config.get("is_decoder"):
            raise ValueError(
                "task text-generation needs a decoder, but config.json does not say is_decoder true; "
                "say so there if the checkpoint was trained to continue text, else use --task fill-mask"
            )

    def _of_vocab(self, ids: Tensor) -> Tensor:
        """The shapes or pronunciations of the tokenizer's tokens, for as many tokens as the model has."""
        size = self.model.config.vocab_size
        table = ids[self.tokenizer.unk_token_id].repeat(size)
        table[: len(ids)] = ids[:size]
        return table.to(self.model.device)

    def check_rows(self, item: Item, rows: Sequence[Row]) -> None:
        if len(rows[0]) > self.limit:
            new = self._options["max_new_tokens"]
            raise ValueError(
                f"{len(rows[0])} tokens and {new} new ones are more than the {self.limit + new} that the model takes; "
                "shorten the text or truncate it (--truncate, truncate=True), or lower max_new_tokens"
            )
        super().check_rows(item, rows)

    def compute(self, inputs: dict[str, Tensor], rows: Sequence[Row]) -> Sequence[Any]:
        if self._one_by_one:
            batches = [{name: ids[index : index + 1] for name, ids in inputs.items()} for index in range(len(rows))]
        else:
            batches = [inputs]
        return [row for batch in batches for row in self.model.generate(**batch, **self._options).tolist()]

    def decode(self, item: Item, rows: Sequence[Row], outputs: Sequence[Any]) -> Any:
        prompt = self.tokenizer.decode(rows[0].inputs["input_ids"], skip_special_tokens=True)
        whole = self.tokenizer.decode(outputs[0], skip_special_tokens=True)
        return [{"generated_text": item["text"] + whole[len(prompt) :]}]
