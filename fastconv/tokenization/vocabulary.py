"""What every tokenizer here has in common: tokens and their ids, special and added tokens, ids to text."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastconv.tokenization import files
from fastconv.tokenization.batch_encoding import one_of, plain, to_list
from fastconv.tokenization.files import content_of, special_token

if TYPE_CHECKING:
    import tokenizers

_MUST_BE = ("unk_token", "sep_token", "cls_token")
_CLEAN_UP = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)


class _SpecialToken:
    """A special token by its role: the token, or None. Setting another one makes it a whole word of the text."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, tokenizer: Any, owner: type | None = None) -> Any:
        return self if tokenizer is None else tokenizer._special[self._name]

    def __set__(self, tokenizer: Any, token: Any) -> None:
        tokenizer._set_special_token(self._name, token)


class _SpecialTokenId:
    """The id of the special token of a role, or None if there is no such token."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name.removesuffix("_id")

    def __get__(self, tokenizer: Any, owner: type | None = None) -> Any:
        if tokenizer is None:
            return self
        token = tokenizer._special[self._name]
        return None if token is None else tokenizer._backend.token_to_id(token)


class TokenizerVocabulary:
    """The vocabulary of a tokenizer: its tokens, their ids, their roles.

    unk_token, sep_token, cls_token, pad_token, mask_token, bos_token, eos_token: the special tokens by role. The first
        three must be, the others may be None. unk, sep, cls and mask are four different tokens; the others may repeat
        one, as decoders have cls as bos and sep as eos
    additional_special_tokens: further special tokens, without a role
    """

    _backend: tokenizers.Tokenizer
    _special: dict[str, str | None]
    clean_up_tokenization_spaces: bool

    bos_token, bos_token_id = _SpecialToken(), _SpecialTokenId()
    eos_token, eos_token_id = _SpecialToken(), _SpecialTokenId()
    unk_token, unk_token_id = _SpecialToken(), _SpecialTokenId()
    sep_token, sep_token_id = _SpecialToken(), _SpecialTokenId()
    pad_token, pad_token_id = _SpecialToken(), _SpecialTokenId()
    cls_token, cls_token_id = _SpecialToken(), _SpecialTokenId()
    mask_token, mask_token_id = _SpecialToken(), _SpecialTokenId()

    def _begin(
        self,
        backend: tokenizers.Tokenizer,
        special: Mapping[str, Any],
        additional: Sequence[Any],
        added: Mapping[str, Mapping[str, Any]] | None,
        source: str,
    ) -> None:
        """Take a backend, and make its special and added tokens whole words. Raises ValueError as the class does."""
        self._backend = backend
        self._special = {name: content_of(special.get(name)) for name in files.SPECIAL_TOKENS}
        _check_roles(self._special)
        self._additional: list[str] = []
        files.add_tokens(backend, added or {}, special, source)
        backend.model.unk_token = self._special["unk_token"]
        self.add_special_tokens({"additional_special_tokens": additional or ()})

    def __len__(self) -> int:
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def backend_tokenizer(self) -> tokenizers.Tokenizer:
        """The tokenizer of the package `tokenizers` that this one stands on."""
        return self._backend

    @property
    def vocab_size(self) -> int:
        """The size of the vocabulary, without the added tokens; len() counts those too."""
        return self._backend.get_vocab_size(with_added_tokens=False)

    def get_vocab(self) -> dict[str, int]:
        """Token -> id, the added tokens included."""
        return self._backend.get_vocab(with_added_tokens=True)

    @property
    def added_tokens_decoder(self) -> dict[int, tokenizers.AddedToken]:
        """Id -> token of what is found as a whole in a text: the special tokens and the added ones."""
        return self._backend.get_added_tokens_decoder()

    @property
    def added_tokens_encoder(self) -> dict[str, int]:
        """Content -> id of `added_tokens_decoder`."""
        return {token.content: number for number, token in sorted(self.added_tokens_decoder.items())}

    def get_added_vocab(self) -> dict[str, int]:
        """Content -> id of `added_tokens_decoder`."""
        return self.added_tokens_encoder

    @property
    def special_tokens_map(self) -> dict[str, str]:
        """Role -> special token, of the roles that have one."""
        return {name: token for name, token in self._special.items() if token is not None}

    @property
    def additional_special_tokens(self) -> list[str]:
        return list(self._additional)

    @property
    def additional_special_tokens_ids(self) -> list[int]:
        return self.convert_tokens_to_ids(self._additional)

    @property
    def all_special_tokens(self) -> list[str]:
        """Each special token once."""
        return list(dict.fromkeys([*self.special_tokens_map.values(), *self._additional]))

    @property
    def all_special_ids(self) -> list[int]:
        return self.convert_tokens_to_ids(self.all_special_tokens)

    def add_tokens(
        self,
        new_tokens: str | tokenizers.AddedToken | Sequence[str | tokenizers.AddedToken],
        special_tokens: bool = False,
    ) -> int:
        """Make tokens whole words of the text, with new ids where they have none. Returns how many got one.

        The model needs `resize_token_embeddings(len(tokenizer))` then.

        new_tokens: a str, or a `tokenizers.AddedToken` for a say in the spaces beside it and in its case
        special_tokens: whether they are special: found as they are in text, skipped by `skip_special_tokens`

        Raises TypeError for something else, ValueError for an empty token.
        """
        tokens = list(new_tokens) if isinstance(new_tokens, list | tuple) else [new_tokens]
        for token in tokens:
            if content_of(token) == "":
                raise ValueError("an added token must have at least one character, got ''")
        before = len(self)
        (self._backend.add_special_tokens if special_tokens else self._backend.add_tokens)(tokens)
        return len(self) - before

    def add_special_tokens(
        self, special_tokens_dict: Mapping[str, Any], replace_extra_special_tokens: bool = True
    ) -> int:
        """Give roles to tokens, with new ids where they have none. Returns how many got one.

        special_tokens_dict: role ("pad_token") -> token; or "additional_special_tokens" (also known as
            "extra_special_tokens") -> a list of tokens
        replace_extra_special_tokens: whether such a list replaces what was special before, or joins it

        Raises ValueError for a role that there isn't.
        """
        lists = ("additional_special_tokens", "extra_special_tokens")
        added = 0
        for name, value in special_tokens_dict.items():
            one_of("the name of a special token", name, (*files.SPECIAL_TOKENS, *lists))
            if name in lists:
                if isinstance(value, str) or not isinstance(value, Iterable):
                    raise ValueError(f"{name} must be a list of tokens, got {value!r}")
                value = list(value)
                contents = [str(content_of(token)) for token in value]
                self._additional = list(
                    dict.fromkeys([*([] if replace_extra_special_tokens else self._additional), *contents])
                )
                added += self._make_special(value)
            else:
                _check_roles({**self._special, name: content_of(value)})
                added += self._make_special([value])
                self._set_special_token(name, value)
        return added

    def _make_special(self, tokens: Sequence[Any]) -> int:
        known = {token.content for token in self.added_tokens_decoder.values() if token.special}
        new = [token for token in tokens if not (isinstance(token, str) and token in known)]  # which keeps its fields
        return self.add_tokens([special_token(token) for token in new], special_tokens=True)

    def _set_special_token(self, name: str, value: Any) -> None:
        """Give a role to a token that is there already."""
        content = content_of(value)
        if content is not None and self._backend.token_to_id(content) is None:
            raise ValueError(
                f"{name} must be in the vocabulary, got {content!r}; add it with "
                f"add_special_tokens({{{name!r}: {content!r}}})"
            )
        special = {**self._special, name: content}
        _check_roles(special)
        self._special = special
        if content is not None:
            self._make_special([value])
        if name == "unk_token":
            self._backend.model.unk_token = content
        if name in ("cls_token", "sep_token"):
            files.set_template(self._backend, str(special["cls_token"]), str(special["sep_token"]))

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> Any:
        """The id of a token, or the ids of a list; the id of unk_token for what is not in the vocabulary."""
        if not isinstance(tokens, str):
            return [self.convert_tokens_to_ids(token) for token in tokens]
        found = self._backend.token_to_id(tokens)
        return self.unk_token_id if found is None else found

    def convert_ids_to_tokens(self, ids: int | Sequence[int] | torch.Tensor, skip_special_tokens: bool = False) -> Any:
        """The token of an id, or the tokens of a list; None for what is not in the vocabulary.

        Raises ValueError for a negative id.
        """
        numbers = _checked_ids(ids)
        if isinstance(ids, int):
            return self._token(ids)
        skipped: set[int] = set()
        if skip_special_tokens:
            flagged = {number for number, token in self.added_tokens_decoder.items() if token.special}
            skipped = flagged.union(self.all_special_ids)
        return [self._token(number) for number in numbers if number not in skipped]

    def _token(self, number: int) -> str | None:
        return self._backend.id_to_token(number)

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        """The text of tokens: the words between spaces, without the ## of the pieces."""
        return self._backend.decoder.decode(list(tokens))

    def decode(
        self,
        token_ids: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> Any:
        """The text of one row of ids, or the texts of a list of rows; an id that is not in the vocabulary has none.

        token_ids: an int, a list or a tensor

        Raises ValueError for a negative id.
        """
        ids = plain(token_ids)
        if isinstance(ids, list | tuple) and ids and isinstance(plain(ids[0]), list | tuple):
            return [self.decode(row, skip_special_tokens, clean_up_tokenization_spaces) for row in ids]
        text = self._decode(_checked_ids(ids), skip_special_tokens)
        if clean_up_tokenization_spaces is None:
            clean_up_tokenization_spaces = self.clean_up_tokenization_spaces
        if clean_up_tokenization_spaces:
            for spaced, close in _CLEAN_UP:
                text = text.replace(spaced, close)
        return text

    def _decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def batch_decode(
        self,
        sequences: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> list[str]:
        """The text of each row of ids, or the text of one row in a list."""
        rows = plain(sequences)
        if isinstance(rows, list | tuple) and not rows:
            return []
        texts = self.decode(rows, skip_special_tokens, clean_up_tokenization_spaces)
        return [texts] if isinstance(texts, str) else texts

    def save_vocabulary(
        self, save_directory: str | os.PathLike[str], filename_prefix: str | None = None
    ) -> tuple[str, ...]:
        """Write vocab.txt, without the added tokens, into a folder that exists. Returns the files written.

        filename_prefix: what the names of the files begin with, before a "-"

        Raises NotADirectoryError, or ValueError for a vocabulary whose ids have gaps, which no such file can hold.
        """
        folder = Path(save_directory)
        if not folder.is_dir():
            raise NotADirectoryError(f"expected an existing folder, got {str(folder)!r}")
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        names = self._write_vocabulary(folder, prefix)
        return tuple(str(folder / name) for name in names)

    def _write_vocabulary(self, folder: Path, prefix: str) -> tuple[str, ...]:
        files.write_vocab(folder / f"{prefix}vocab.txt", self._backend)
        return (f"{prefix}vocab.txt",)


def _checked_ids(ids: Any) -> list[int]:
    """One id or some as a list. Raises ValueError for what can be no id."""
    numbers = to_list(ids)
    for number in numbers:
        if not 0 <= number < 2**32:
            raise ValueError(f"ids must be from 0 to 4294967295, got {number}; leave out ignored labels")
    return numbers


def _check_roles(special: Mapping[str, str | None]) -> None:
    """Raises ValueError if a role is empty that must not be, or if two roles have one token that must differ."""
    missing = [name for name in _MUST_BE if special[name] is None]
    if missing:
        raise ValueError(f"{', '.join(missing)} must be tokens of the vocabulary, got None")
    seen: dict[str, str] = {}
    for name in (*_MUST_BE, "mask_token"):
        token = special[name]
        if token is not None and seen.setdefault(token, name) != name:
            raise ValueError(f"{seen[token]} and {name} must be different tokens, both are {token!r}")
