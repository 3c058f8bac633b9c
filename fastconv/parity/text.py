# ruff: noqa: RUF001  (typographic quotes and full-width stops are meant)
"""Real text to run models on: the English prose in CPython's own help topics, and cutting any text into sentences."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator

# What ends a sentence, with the brackets and quotes that belong to it; full-width stops need no space after them.
_STOP = re.compile(r"""[.!?]+["'”’»)\]]*\s+|[。！？]+[”’」』）]*\s*""")
_ABBREVIATION = re.compile(r"(?:\b(?:e\.g|i\.e|cf|etc|vs|approx|Dr|Mr|Mrs|Ms|Prof|St|No|Fig|[A-Z]))\.$")
_OPENING = "\"'“‘«([「『（"

_UNDERLINE = re.compile(r"[*=\-~^\"'.+#]{3,}")
_BULLET = re.compile(
    r"^(?:\*|\d+\.|\[\d+\]|Note:|See also:|(?:New|Added|Changed|Deprecated) (?:in|since)[^:]{9,30}:)\s+"
)
_HYPHENATED = re.compile(r"(?<=\w-)\n\s*(?=\w)")
_NO_PROSE = re.compile(r"::=|>>>|\S   +\S")
_MARKUP = re.compile(r"(\*\*|\*|``|`)(?=\S)(.+?)(?<=\S)\1")
_WORD = re.compile(r"[A-Za-z][A-Za-z’'-]*")
# A sentence with fewer is a note ("New in version 3.3.") or a fragment.
_FEWEST_WORDS = 5
# More is an enumeration (of every attribute of a code object, say), not a sentence.
_MOST_WORDS = 80
# Letters and spaces among a sentence's characters; code and formulas have fewer.
_LEAST_LETTERS = 0.75


@functools.cache
def default_sentences() -> tuple[str, ...]:
    """The sentences in `pydoc_data.topics`, which comes with CPython: about 2000, of 5 to 80 words.

    Headings, code, grammar productions and signatures are left out. The same on every machine with the same Python.

    Raises: ImportError for a Python without these topics.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise ImportError(
            "the default text is that of CPython's module pydoc_data.topics, which this Python lacks; give a text"
        ) from error
    found: dict[str, None] = {}  # in order, each once: topics repeat paragraphs of each other
    for name in sorted(topics):
        for paragraph in _paragraphs(topics[name]):
            found.update(dict.fromkeys(filter(_is_prose, cut(_plain(paragraph)))))
    return tuple(found)


def sentences(text: str) -> list[str]:
    """The sentences of any text.

    A blank line ends one, and so does a line break unless the next line begins with a lower-case letter: both wrapped
    prose and one sentence a line come out right. Within a line a full stop, a question mark or an exclamation mark
    ends one.
    """
    found: list[str] = []
    for paragraph in _paragraphs(text):
        lines: list[str] = []
        for line in paragraph.splitlines():
            if lines and line.lstrip()[:1].islower():
                lines[-1] += f" {line}"
            else:
                lines.append(line)
        for line in lines:
            found += cut(" ".join(line.split()))
    return found


def cut(line: str) -> Iterator[str]:
    """The sentences of one line."""
    start = 0
    for stop in _STOP.finditer(line):
        before = line[start : stop.end()].rstrip()
        after = line[stop.end() :].lstrip(_OPENING)[:1]
        if after.islower() or _ABBREVIATION.search(before):
            continue
        if before:
            yield before
        start = stop.end()
    if line[start:].strip():
        yield line[start:].strip()


def _paragraphs(text: str) -> Iterator[str]:
    for paragraph in re.split(r"\n\s*\n", text):
        if paragraph.strip():
            yield paragraph.strip("\n")


def _plain(paragraph: str) -> str:
    """A paragraph of reStructuredText without its markup, as one line; "" for a heading, a table, code or grammar."""
    if _NO_PROSE.search(paragraph) or any(_UNDERLINE.fullmatch(line.strip()) for line in paragraph.splitlines()):
        return ""
    line = " ".join(_HYPHENATED.sub("", paragraph).split())
    return _MARKUP.sub(r"\2", _BULLET.sub("", line))


def _is_prose(sentence: str) -> bool:
    letters = sum(character.isalpha() or character == " " for character in sentence)
    return (
        sentence.lstrip(_OPENING)[:1].isupper()
        and sentence.rstrip("\"'”’)")[-1:] in (".", "!", "?")
        and _FEWEST_WORDS <= len(_WORD.findall(sentence)) <= _MOST_WORDS
        and letters >= _LEAST_LETTERS * len(sentence)
    )
