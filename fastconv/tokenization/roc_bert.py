"""Text to ids and back for RoCBert, whose tokens have a shape and a pronunciation too."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastconv.folders import find_folder, replacing, what_is_there, write_json
from fastconv.tokenization import files
from fastconv.tokenization.batch_encoding import BatchEncoding
from fastconv.tokenization.ids import finished
from fastconv.tokenization.python_splitter import PythonSplitter
from fastconv.tokenization.rows import Row, truncated
from fastconv.tokenization.texts import Tokenizer

if TYPE_CHECKING:
    import tokenizers
    from typing_extensions import Self


class RoCBertTokenizer(Tokenizer):
    """RoCBert's tokenizer: Chinese characters and word pieces, as transformers' RoCBertTokenizer computes them.

    A call returns three rows of ids a text: input_ids, input_shape_ids, input_pronunciation_ids.

    vocab_file: a vocab.txt, one token a line
    word_shape_file, word_pronunciation_file: JSON of token -> id of its shape, of its pronunciation. A token that is
        not in them has those of unk_token; so have the cls and sep that are put around texts, and padding has
        pad_token_id there
    do_lower_case, strip_accents (None: as do_lower_case), tokenize_chinese_chars: how text is cleaned
    do_basic_tokenize: False splits text at spaces only, and cleans nothing
    never_split: words, as they stand between spaces, that are left as they are. (transformers 4 lower-cases the text
        before it looks for them, so there one with capitals is never found.)
    model_input_names: None: input_ids, token_type_ids, attention_mask. (transformers 5 leaves the second out, and so
        gives a model that was trained on pairs nothing to tell them apart by.)
    The other arguments, and what is raised, are those of BertTokenizer.

    Beyond transformers' it has offset_mapping and words. What truncation cuts off makes further rows, as with the other
    tokenizers here; `prepare_for_model` returns it as overflowing_tokens. Where truncation would leave more than
    max_length, since the text that it may cut is too short, it raises.
    """

    model_input_names = ("input_ids", "token_type_ids", "attention_mask")

    def __init__(
        self,
        vocab_file: str | os.PathLike[str],
        word_shape_file: str | os.PathLike[str],
        word_pronunciation_file: str | os.PathLike[str],
        *,
        do_lower_case: bool = True,
        do_basic_tokenize: bool = True,
        never_split: Iterable[str] | None = None,
        unk_token: str | tokenizers.AddedToken = "[UNK]",
        sep_token: str | tokenizers.AddedToken = "[SEP]",
        pad_token: str | tokenizers.AddedToken | None = "[PAD]",
        cls_token: str | tokenizers.AddedToken = "[CLS]",
        mask_token: str | tokenizers.AddedToken | None = "[MASK]",
        bos_token: str | tokenizers.AddedToken | None = None,
        eos_token: str | tokenizers.AddedToken | None = None,
        additional_special_tokens: Sequence[str | tokenizers.AddedToken] = (),
        tokenize_chinese_chars: bool = True,
        strip_accents: bool | None = None,
        model_max_length: int | None = None,
        model_input_names: Sequence[str] | None = None,
        padding_side: str = "right",
        truncation_side: str = "right",
        clean_up_tokenization_spaces: bool = False,
        split_special_tokens: bool = False,
        added_tokens_decoder: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        self.do_lower_case = do_lower_case
        self.strip_accents = strip_accents
        self.tokenize_chinese_chars = tokenize_chinese_chars
        self.do_basic_tokenize = do_basic_tokenize
        self.never_split = sorted(set(never_split or ()))
        self.clean_up_tokenization_spaces = clean_up_tokenization_spaces
        self.split_special_tokens = bool(split_special_tokens)
        self._set_options(model_max_length, padding_side, truncation_side, model_input_names)
        special = {"unk_token": unk_token, "sep_token": sep_token, "pad_token": pad_token, "cls_token": cls_token}
        special |= {"mask_token": mask_token, "bos_token": bos_token, "eos_token": eos_token}

        source, vocab = files.vocab_of(vocab_file)
        unk = files.content_of(unk_token) or ""
        backend = files.backend_from_vocab(vocab, unk, {}, clean_up=False)
        self._begin(backend, special, additional_special_tokens, added_tokens_decoder, source)
        files.set_template(backend, self.cls_token, self.sep_token)
        words = frozenset(self.never_split)
        self._splitter = PythonSplitter(do_lower_case, strip_accents, tokenize_chinese_chars, words, do_basic_tokenize)
        self.word_shape = files.read_word_ids(Path(word_shape_file), unk)
        self.word_pronunciation = files.read_word_ids(Path(word_pronunciation_file), unk)

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | os.PathLike[str],
        *,
        do_lower_case: bool | None = None,
        strip_accents: bool | None = None,
        tokenize_chinese_chars: bool | None = None,
        model_max_length: int | None = None,
        padding_side: str | None = None,
        truncation_side: str | None = None,
    ) -> Self:
        """The tokenizer of a checkpoint: its vocab.txt, word_shape.json, word_pronunciation.json and
        tokenizer_config.json, of which the last may be missing.

        name_or_folder: a folder, or a hub id like "org/name", which needs huggingface_hub
        do_lower_case, ..., truncation_side: in the place of what the files say; None: what they say

        Raises FileNotFoundError, ValueError for a file of another kind, ImportError or OSError for a hub id.
        """
        folder = find_folder(name_or_folder, files.FILES)
        names = ("vocab.txt", files.SHAPE_FILE, files.PRONUNCIATION_FILE)
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise FileNotFoundError(
                f"RoCBertTokenizer needs {', '.join(names)}; no {' and no '.join(missing)} in {str(folder)!r}: "
                f"{what_is_there(folder)}"
            )
        options = files.read_options(folder, ("RoCBert",))
        options |= files.given(
            do_lower_case=do_lower_case,
            strip_accents=strip_accents,
            tokenize_chinese_chars=tokenize_chinese_chars,
            model_max_length=model_max_length,
            padding_side=padding_side,
            truncation_side=truncation_side,
        )
        return cls(*(folder / name for name in names), **options)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write vocab.txt, word_shape.json, word_pronunciation.json and tokenizer_config.json, which transformers reads
        too.
        """
        with replacing(folder) as temporary:
            self._write_vocabulary(temporary, "")
            files.write_config(temporary, self)

    def _write_vocabulary(self, folder: Path, prefix: str) -> tuple[str, ...]:
        write_json(folder / f"{prefix}{files.SHAPE_FILE}", self.word_shape)
        write_json(folder / f"{prefix}{files.PRONUNCIATION_FILE}", self.word_pronunciation)
        names = (files.SHAPE_FILE, files.PRONUNCIATION_FILE)
        return (*super()._write_vocabulary(folder, prefix), *(f"{prefix}{name}" for name in names))

    def convert_tokens_to_shape_ids(self, tokens: Sequence[str]) -> list[int]:
        """The id of the shape of each token; that of unk_token for one that has none."""
        return self._looked_up(tokens, self.word_shape)

    def convert_tokens_to_pronunciation_ids(self, tokens: Sequence[str]) -> list[int]:
        """The id of the pronunciation of each token; that of unk_token for one that has none."""
        return self._looked_up(tokens, self.word_pronunciation)

    def _looked_up(self, tokens: Sequence[str], ids: dict[str, int]) -> list[int]:
        unknown = self._of_unknown(ids)
        return [ids.get(token, unknown) for token in tokens]

    def _of_unknown(self, ids: dict[str, int]) -> int:
        if self.unk_token not in ids:  # it is at the start, but can be set
            raise ValueError(f"unk_token must have a shape and a pronunciation, {self.unk_token!r} has not")
        return ids[self.unk_token]

    def shape_ids_of_vocab(self) -> torch.Tensor:
        """input_shape_ids for every id, (V,) int64, as a call gives them: what generation looks new tokens up in."""
        return self._of_vocab(self.word_shape)

    def pronunciation_ids_of_vocab(self) -> torch.Tensor:
        """input_pronunciation_ids for every id, (V,) int64, as a call gives them."""
        return self._of_vocab(self.word_pronunciation)

    def _of_vocab(self, ids: dict[str, int]) -> torch.Tensor:
        unknown = self._of_unknown(ids)
        vocab = self.get_vocab()
        table = torch.full((max(vocab.values()) + 1,), unknown)
        for token, number in vocab.items():
            table[number] = ids.get(token, unknown)
        table[[self.cls_token_id, self.sep_token_id]] = unknown
        if self.pad_token_id is not None:
            table[self.pad_token_id] = self.pad_token_id
        return table

    def _streams(self, rows: Sequence[Row]) -> dict[str, list[list[int]]]:
        return {
            "input_shape_ids": [self._stream(row, self.word_shape) for row in rows],
            "input_pronunciation_ids": [self._stream(row, self.word_pronunciation) for row in rows],
        }

    def _stream(self, row: Row, ids: dict[str, int]) -> list[int]:
        unknown = self._of_unknown(ids)
        marks = zip(row.tokens, row.special_tokens_mask, row.attention_mask, strict=True)
        return [
            self.pad_token_id if not attended else unknown if special else ids.get(token, unknown)
            for token, special, attended in marks
        ]

    def prepare_for_model(  # type: ignore[override]  # as transformers' RoCBertTokenizer has it
        self,
        ids: Sequence[int],
        shape_ids: Sequence[int],
        pronunciation_ids: Sequence[int],
        pair_ids: Sequence[int] | None = None,
        pair_shape_ids: Sequence[int] | None = None,
        pair_pronunciation_ids: Sequence[int] | None = None,
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
        """One row out of the ids of a text, or of a pair of texts, and of their shapes and pronunciations. The other
        arguments, and what is raised, are those of BertTokenizer.prepare_for_model.
        """
        pair = pair_ids is not None
        added = self.num_special_tokens_to_add(pair) if add_special_tokens else 0
        cut = self._truncation(truncation, max_length, padding, stride, added, pad_to_multiple_of)
        out = super().prepare_for_model(
            ids,
            pair_ids,
            add_special_tokens=add_special_tokens,
            truncation=cut.strategy,
            max_length=max_length,
            stride=stride,
            return_token_type_ids=return_token_type_ids,
            return_attention_mask=False,
            return_overflowing_tokens=return_overflowing_tokens and return_tensors is None,
            return_special_tokens_mask=return_special_tokens_mask,
        )
        removed = len(ids) + len(pair_ids or ()) + added - cut.length
        streams = {
            "shape_ids": (shape_ids, pair_shape_ids, self.word_shape),
            "pronunciation_ids": (pronunciation_ids, pair_pronunciation_ids, self.word_pronunciation),
        }
        for name, (first, second, table) in streams.items():
            if len(first) != len(ids) or (second is not None) != pair or len(second or ()) != len(pair_ids or ()):
                lengths = f"{len(first)} and {len(second or ())}", f"{len(ids)} and {len(pair_ids or ())}"
                raise ValueError(
                    f"ids and {name} must be of equal length, got {lengths[0]} {name} for {lengths[1]} ids"
                )
            kept, kept_pair, _ = truncated(first, second, removed, cut)
            around = self._of_unknown(table)
            whole = self.build_inputs_with_special_tokens(kept, kept_pair, around, around)
            out[f"input_{name}"] = whole if add_special_tokens else [*kept, *(kept_pair or ())]
        out = self.pad(
            out,
            padding,
            max_length,
            pad_to_multiple_of=pad_to_multiple_of,
            padding_side=padding_side,
            return_attention_mask=return_attention_mask,
        )
        return finished(out, return_length, prepend_batch_axis, return_tensors)

    def _token(self, number: int) -> str | None:
        """The token as it was added, which `tokenizers` may give in lower case; and as in transformers unk_token for an
        id that is not in the vocabulary.
        """
        token = self._backend.model.id_to_token(number)
        if token is not None:
            return token
        added = self.added_tokens_decoder.get(number)
        return self.unk_token if added is None else added.content

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        """The text of tokens: the words between spaces, without the ## of the pieces."""
        return super().convert_tokens_to_string(tokens).strip()

    def _decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return self.convert_tokens_to_string(self.convert_ids_to_tokens(ids, skip_special_tokens))
