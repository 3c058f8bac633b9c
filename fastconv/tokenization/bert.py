"""Text to ids and back: BertTokenizer and ConvBertTokenizer, over the `tokenizers` package.

RoCBertTokenizer is in roc_bert.py, what all of them do in texts.py, ids.py and vocabulary.py.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastconv.folders import find_folder, replacing, what_is_there
from fastconv.tokenization import files
from fastconv.tokenization.python_splitter import PythonSplitter
from fastconv.tokenization.texts import Tokenizer

if TYPE_CHECKING:
    import tokenizers
    from typing_extensions import Self


class BertTokenizer(Tokenizer):
    """BERT's WordPiece tokenizer: transformers' BertTokenizerFast, which is its BertTokenizer too from version 5 on.

    vocab_file: a vocab.txt, one token a line, or a dict token -> id
    tokenizer_file: or a tokenizer.json. Its added tokens and its way of adding special tokens are kept
    do_lower_case, strip_accents (None: as do_lower_case), tokenize_chinese_chars: how text is cleaned
    do_basic_tokenize, never_split: what only the slow tokenizers of transformers know. False splits text at spaces
        only; words of never_split, as they stand between spaces, are left as they are. Either makes this a slow
        tokenizer (is_fast is False), which differs as below, and doesn't know word_ids of characters
    unk_token, sep_token, pad_token, cls_token, mask_token, bos_token, eos_token, additional_special_tokens: the special
        tokens; each role's must be in the vocabulary, but pad, mask, bos and eos may be None
    model_max_length: how many tokens the model takes, for truncation and padding without a max_length
    model_input_names: what a call returns without being asked; None: input_ids, token_type_ids, attention_mask
    padding_side, truncation_side: "right" or "left"
    clean_up_tokenization_spaces: whether decode removes the spaces before 's, n't and the like too; those before
        punctuation it does remove (transformers 4 has True, 5 has False where a checkpoint doesn't say)
    split_special_tokens: whether a special token in a text is text like any other
    added_tokens_decoder: id -> fields of further tokens, as in tokenizer_config.json

    The slow tokenizers (BertTokenizer of transformers 4, BertTokenizerLegacy of 5) differ from the fast in two things:
    they drop characters that Unicode has not assigned, which the fast keep ("a", U+0378, "b" is [UNK] here, and there
    "ab"), and they bring words to normal form C where accents are kept ("e", U+0301 is two characters here, one there).

    Raises FileNotFoundError, or ValueError for a file that is empty, of another kind, with one token or id twice, or
    without a special token.
    """

    model_input_names = ("input_ids", "token_type_ids", "attention_mask")

    def __init__(
        self,
        vocab_file: str | os.PathLike[str] | Mapping[str, int] | None = None,
        *,
        tokenizer_file: str | os.PathLike[str] | None = None,
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
        clean_up_tokenization_spaces: bool = True,
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

        normalizer = {setting: getattr(self, name) for name, setting in files.NORMALIZER_OPTIONS.items()}
        if vocab_file is not None and tokenizer_file is None:
            source, vocab = files.vocab_of(vocab_file)
            unk = files.content_of(unk_token)
            backend = files.backend_from_vocab(vocab, unk or "", normalizer)
        elif tokenizer_file is not None and vocab_file is None:
            source = str(tokenizer_file)
            backend = files.backend_from_json(Path(tokenizer_file))
            files.set_normalizer(backend, normalizer)
        else:
            raise ValueError(
                "give exactly one of vocab_file and tokenizer_file, "
                f"got vocab_file={vocab_file!r} and tokenizer_file={tokenizer_file!r}"
            )
        self._begin(backend, special, additional_special_tokens, added_tokens_decoder, source)
        if vocab_file is not None:
            files.set_template(backend, self.cls_token, self.sep_token)
        self._splitter = None
        if self.never_split or not do_basic_tokenize:
            words = frozenset(self.never_split)
            self._splitter = PythonSplitter(
                do_lower_case, strip_accents, tokenize_chinese_chars, words, do_basic_tokenize
            )

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
        """The tokenizer of a checkpoint: its tokenizer.json, else its vocab.txt, and its tokenizer_config.json.

        name_or_folder: a folder, or a hub id like "org/name", which needs huggingface_hub
        do_lower_case, ..., truncation_side: in the place of what the files say; None: what they say

        Raises FileNotFoundError, ValueError for a file of another kind, ImportError or OSError for a hub id.
        """
        folder = find_folder(name_or_folder, files.FILES)
        options = files.read_options(folder)
        options |= files.given(
            do_lower_case=do_lower_case,
            strip_accents=strip_accents,
            tokenize_chinese_chars=tokenize_chinese_chars,
            model_max_length=model_max_length,
            padding_side=padding_side,
            truncation_side=truncation_side,
        )
        if (folder / "tokenizer.json").is_file():
            stored = files.normalizer_options(folder / "tokenizer.json")
            return cls(tokenizer_file=folder / "tokenizer.json", **{**stored, **options})
        if (folder / "vocab.txt").is_file():
            return cls(folder / "vocab.txt", **options)
        raise FileNotFoundError(f"no tokenizer.json and no vocab.txt in {str(folder)!r}: {what_is_there(folder)}")

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write tokenizer.json, tokenizer_config.json and vocab.txt (if it can hold the vocabulary), which
        transformers reads too.
        """
        with replacing(folder) as temporary:
            self._backend.save(str(temporary / "tokenizer.json"))
            if files.fits_vocab_file(self._backend):
                files.write_vocab(temporary / "vocab.txt", self._backend)
            files.write_config(temporary, self)


class ConvBertTokenizer(BertTokenizer):
    """ConvBERT's tokenizer, which is BERT's."""


# The names that transformers' documentation has as well.
BertTokenizerFast = BertTokenizer
ConvBertTokenizerFast = ConvBertTokenizer
