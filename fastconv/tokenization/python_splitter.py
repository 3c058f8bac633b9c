"""Text to word pieces in Python, where `tokenizers` can't: RoCBert, never_split, do_basic_tokenize=False.

The algorithm of BERT's first tokenizer (github.com/google-research/bert, tokenization.py), with what transformers'
slow tokenizers put before it: added tokens are cut out first, and words are brought to Unicode's normal form C.
Which characters are letters, marks or punctuation is what Python's `unicodedata` says.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import tokenizers

_CHINESE = (
    (0x4E00, 0x9FFF),
    (0x3400, 0x4DBF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2B73F),
    (0x2B740, 0x2B81F),
    (0x2B820, 0x2CEAF),
    (0xF900, 0xFAFF),
    (0x2F800, 0x2FA1F),
)


class Piece(NamedTuple):
    """A token, the characters of the text that it stands for, and the index of its word."""

    token: str
    start: int
    end: int
    word: int


class _Character(NamedTuple):
    """A character as it has become, and where in the text it comes from."""

    value: str
    start: int
    end: int


_Word = list[_Character]


@dataclass(frozen=True)
class PythonSplitter:
    """How text becomes word pieces.

    do_lower_case, strip_accents (None: as do_lower_case), tokenize_chinese_chars: how text is cleaned
    never_split: words, as they stand between spaces, that are not changed and make one token each
    do_basic_tokenize: False splits at spaces only, and cleans nothing
    """

    do_lower_case: bool = True
    strip_accents: bool | None = None
    tokenize_chinese_chars: bool = True
    never_split: frozenset[str] = frozenset()
    do_basic_tokenize: bool = True

    def pieces(
        self, text: str, backend: tokenizers.Tokenizer, special: Collection[str], split_special_tokens: bool = False
    ) -> list[Piece]:
        """The word pieces of a text.

        backend: its model is the WordPiece, its added tokens are cut out whole
        special: the special tokens, which stay whole too if cleaning makes one of a word
        split_special_tokens: cut out no added tokens
        """
        characters = [_Character(value, index, index + 1) for index, value in enumerate(text)]
        added = {} if split_special_tokens else backend.get_added_tokens_decoder()
        model = backend.model
        prefix = len(model.continuing_subword_prefix)
        pieces: list[Piece] = []
        word_index = 0
        for part, content in _cut_out(characters, list(added.values()), self.do_lower_case):
            if content is not None:
                pieces.append(Piece(content, part[0].start, part[-1].end, word_index))
                word_index += 1
                continue
            for word in self._words(part, self.never_split.union(special)):
                whole = _text(word) in self.never_split and self.do_basic_tokenize
                tokens = [_text(word)] if whole else [token.value for token in model.tokenize(_text(word))]
                pieces.extend(_aligned(tokens, word, word_index, prefix))
                word_index += 1
        return pieces

    def _words(self, characters: _Word, kept: Collection[str]) -> Iterator[_Word]:
        for word in self._between_spaces(characters):
            if not self.do_basic_tokenize:
                yield word
                continue
            word = _composed(word)
            if _text(word) not in kept:
                if self.do_lower_case:
                    word = _changed(word, str.lower)
                if self.strip_accents or (self.do_lower_case and self.strip_accents is None):
                    word = _changed(word, _without_accents)
            if _text(word) in kept:
                yield word
            else:
                yield from _split_at_punctuation(word)

    def _between_spaces(self, characters: _Word) -> Iterator[_Word]:
        word: _Word = []
        for character in characters:
            kind = _kind(character.value) if self.do_basic_tokenize else "other"
            alone = kind == "chinese" and self.tokenize_chinese_chars
            if kind == "dropped":
                continue
            if word and (alone or kind == "space" or character.value.isspace()):
                yield word
                word = []
            if alone:
                yield [character]
            elif kind != "space" and not character.value.isspace():
                word.append(character)
        if word:
            yield word


@cache
def _kind(character: str) -> str:
    """What cleaning makes of a character: "space", "dropped", "chinese", "punctuation" or "other"."""
    code, category = ord(character), unicodedata.category(character)
    if character in " \t\n\r" or category == "Zs":
        return "space"
    if code == 0xFFFD or category[0] == "C":
        return "dropped"
    if any(first <= code <= last for first, last in _CHINESE):
        return "chinese"
    # Not in Unicode's category, but punctuation all the same: $ + < = > ^ ` | ~
    if category[0] == "P" or character in "$+<=>^`|~":
        return "punctuation"
    return "other"


def _text(word: _Word) -> str:
    return "".join([character.value for character in word])


def _composed(word: _Word) -> _Word:
    """A word in normal form C; what becomes one character comes from all that it was."""
    whole = _text(word)
    if unicodedata.is_normalized("NFC", whole):
        return word
    groups: list[_Word] = []
    for character in word:
        # A mark first: normalizing what is before it for each of many marks would take the square of their number.
        if groups and (unicodedata.combining(character.value) != 0 or _become_one(_text(groups[-1]), character.value)):
            groups[-1].append(character)
        else:
            groups.append([character])
    composed = [
        _Character(value, group[0].start, group[-1].end)
        for group in groups
        for value in unicodedata.normalize("NFC", _text(group))
    ]
    expected = unicodedata.normalize("NFC", whole)
    if _text(composed) == expected:
        return composed
    return [_Character(value, word[0].start, word[-1].end) for value in expected]  # then from the whole word


def _become_one(before: str, after: str) -> bool:
    """Whether normal form C joins two pieces of text, as it does Korean letters."""
    apart = unicodedata.normalize("NFC", before) + unicodedata.normalize("NFC", after)
    return unicodedata.normalize("NFC", before + after) != apart


def _changed(word: _Word, change: Callable[[str], str]) -> _Word:
    """A word after a change of its text; each new character comes from the one that it was alone."""
    whole = _text(word)
    changed = change(whole)
    if changed == whole:
        return word
    origins = [character for character in word for _ in change(character.value)]
    return [_Character(value, origin.start, origin.end) for value, origin in zip(changed, origins, strict=True)]


def _without_accents(text: str) -> str:
    return "".join(value for value in unicodedata.normalize("NFD", text) if unicodedata.category(value) != "Mn")


def _split_at_punctuation(word: _Word) -> Iterator[_Word]:
    part: _Word = []
    for character in word:
        if _kind(character.value) == "punctuation":
            if part:
                yield part
                part = []
            yield [character]
        else:
            part.append(character)
    if part:
        yield part


def _aligned(tokens: list[str], word: _Word, index: int, prefix: int) -> Iterator[Piece]:
    """The pieces of a word: its characters belong to the tokens in order, or all to the one there is."""
    if len(tokens) == 1:
        yield Piece(tokens[0], word[0].start, word[-1].end, index)
        return
    start = 0
    for number, token in enumerate(tokens):
        end = start + len(token) - (prefix if number else 0)  # ## before all but the first
        yield Piece(token, word[start].start, word[end - 1].end, index)
        start = end


def _cut_out(
    characters: _Word, added: list[tokenizers.AddedToken], do_lower_case: bool
) -> list[tuple[_Word, str | None]]:
    """The text cut at its added tokens: parts, each with the token that it is, or None.

    A token that is normalized is found in any case if text is lower-cased. lstrip, rstrip: the spaces beside it
    are its own. single_word: only found between spaces.
    """
    by_content = {token.content: token for token in added}
    loose = {token.content.lower(): token for token in added if token.normalized and do_lower_case}
    contents = sorted(by_content, key=len, reverse=True)
    patterns = [f"(?i:{re.escape(one)})" if one.lower() in loose else re.escape(one) for one in contents]
    text, parts, start = _text(characters), [], 0
    for match in re.finditer("|".join(patterns), text) if patterns else ():
        parts += [(characters[start : match.start()], None), (characters[match.start() : match.end()], match[0])]
        start = match.end()
    found: list[tuple[_Word, str | None]] = [*parts, (characters[start:], None)]
    found = [part for part in found if part[0]]
    for index, (part, content) in enumerate(found):
        if content is None:
            continue
        token = by_content.get(content) or loose[content.lower()]
        found[index] = (part, token.content)
        left = found[index - 1] if index else ([], None)
        right = found[index + 1] if index + 1 < len(found) else ([], None)
        if token.rstrip and right[0]:
            found[index + 1] = (right[0][_leading_spaces(right[0]) :], right[1])
        if token.lstrip and left[0]:
            found[index - 1] = (left[0][: len(left[0]) - _leading_spaces(left[0][::-1])], left[1])
        if token.single_word:
            if left[0] and left[0][-1].value != " ":
                found[index - 1 : index + 1] = [(found[index - 1][0] + part, None), ([], None)]
            elif right[0] and right[0][0].value != " ":
                found[index : index + 2] = [([], None), (part + found[index + 1][0], None)]
    return [part for part in found if part[0]]


def _leading_spaces(word: _Word) -> int:
    return len(word) - len(_text(word).lstrip())
