"""Lines of text as the items of a task: from arguments, a file or stdin, as they come."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, BinaryIO

from fastconv.tasks import ItemError
from fastconv.tasks.task import Task

FORMATS = ("text", "tsv", "json")
_AT_A_TIME = 1 << 16  # what a pipe holds
_LONGEST_LINE = 1 << 24  # tokenizing takes some 200 bytes of memory a byte: 3 GB for such a line

Item = tuple[str, Any]


def parser(task: type[Task], input_format: str | None) -> Callable[[str], Any]:
    """The function that makes an item of a line.

    input_format: one of FORMATS; None: text where one text is an item, else a JSON object if the line begins with "{",
        or else TAB-separated values

    Raises ValueError for a format that doesn't fit the task.
    """
    if input_format == "text" and task.required > 1:
        raise ValueError(f"--input-format text doesn't fit {task.name}, which takes {' and '.join(task.fields)}")
    if input_format == "tsv" and len(task.fields) == 1:
        raise ValueError(f"--input-format tsv doesn't fit {task.name}, which takes one text")
    if input_format == "json":
        return _from_json
    if input_format == "text":
        return str
    if input_format is None and task.required == 1:
        return _from_text if len(task.fields) > 1 else str
    either = input_format is None
    return lambda line: _from_json(line) if either and line.startswith("{") else _from_tsv(task, line)


def _from_text(line: str) -> str:
    if "\t" in line:
        raise ValueError("there is a TAB: say --input-format tsv if it parts a pair, or text if it is part of a text")
    return line


def _from_json(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"this is not JSON: {error}") from error


def _from_tsv(task: type[Task], line: str) -> dict[str, Any]:
    values = line.split("\t")
    if task.fields == ("prompt", "choices"):
        return {"prompt": values[0], "choices": values[1:]}
    if len(values) != len(task.fields):
        raise ValueError(f"expected {'<TAB>'.join(task.fields)}, got {len(values)} TAB-separated values")
    return dict(zip(task.fields, values, strict=True))


def from_arguments(texts: Sequence[str], parse: Callable[[str], Any], size: int) -> Iterator[list[Item]]:
    """The items that are given on the command line, `size` at a time. Raises ItemError."""
    numbered = [(f"text {number}", text) for number, text in enumerate(texts, 1)]
    yield from _parsed(numbered, parse, size)


def from_file(
    file: BinaryIO, name: str, parse: Callable[[str], Any], size: int, skipped: Callable[[], None] | None = None
) -> Iterator[list[Item]]:
    """The items in a file of UTF-8 lines, at most `size` at a time.

    What has come is given out without waiting for more, so that whoever types or pipes slowly gets results at once.

    name: the file's, for errors
    skipped: called for an empty line, which is left out; None: it is an error

    Raises ItemError after the items of the lines before.
    """
    number = 0
    for raw_lines in _arrived(file, name):
        named: list[tuple[str, bytes]] = []
        for raw in raw_lines:
            number += 1
            line = raw.removesuffix(b"\r")
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if skipped is not None and not line.decode(errors="replace").strip():
                skipped()
            else:
                named.append((f"line {number} of {name}", line))
        yield from _parsed(named, lambda raw: parse(_decoded(raw)), size)


def _decoded(raw: bytes) -> str:
    try:
        line = raw.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"expected UTF-8 text, got the byte {raw[error.start]:#04x} at {error.start + 1}") from error
    if not line.strip():
        raise ValueError("the line is empty; expected some text, or --skip-empty to leave such lines out")
    return line


def _arrived(file: BinaryIO, name: str) -> Iterator[list[bytes]]:
    """The lines of a file without their ends, as many at a time as one read gives."""
    parts: list[bytes] = []  # of the line that is not whole yet
    length = lines = 0
    while chunk := _read(file, name):
        whole, end, rest = chunk.rpartition(b"\n")
        if end:
            arrived = b"".join((*parts, whole)).split(b"\n")
            lines += len(arrived)
            yield arrived
            parts, length = [], 0
        parts.append(rest)
        length += len(rest)
        if length > _LONGEST_LINE:
            raise ItemError(
                f"line {lines + 1} of {name}: it is longer than {_LONGEST_LINE >> 20} MiB; expected lines of text"
            )
    if length:
        yield [b"".join(parts)]


def _read(file: BinaryIO, name: str) -> bytes:
    """What has come, at most so much; nothing at the end."""
    try:
        return getattr(file, "read1", file.read)(_AT_A_TIME)
    except OSError as error:
        raise ItemError(f"can't read {name}: {error.strerror}") from error


def _parsed(named: Iterable[tuple[str, Any]], parse: Callable[[Any], Any], size: int) -> Iterator[list[Item]]:
    items: list[Item] = []
    for where, line in named:
        try:
            items.append((where, parse(line)))
        except ValueError as error:
            if items:
                yield items
            raise ItemError(f"{where}: {error}") from error
        if len(items) == size:
            yield items
            items = []
    if items:
        yield items
