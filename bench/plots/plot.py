"""What a plot is: panels that draw themselves, with a sentence on every mark; words and choices that plots share."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastconv.bench.records import is_model, subject
from fastconv.bench.results import Record

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

KINDS = {
    "tokens": "Tokens a second",
    "roofline": "Roofline",
    "heat": "Speed-up by batch and length",
    "latency": "Latency of batch 1",
    "memory": "Peak memory by length",
}
DIRECTIONS = {"infer": "inference", "fwd": "forward", "bwd": "backward", "step": "forward and backward"}
MARK = "mark-"  # and a number: the id of what shows data


class Marks:
    """What a plot shows as data, and a sentence on each."""

    def __init__(self) -> None:
        self.titles: list[str] = []

    def add(self, artist: Artist, title: str) -> None:
        """One more, with its sentence."""
        artist.set_gid(f"{MARK}{len(self.titles)}")
        self.titles.append(title)


@dataclass(frozen=True)
class Panel:
    """One pair of axes. height: in inches"""

    title: str
    draw: Callable[[Axes, Marks], None]
    height: float = 3.2


@dataclass(frozen=True)
class Plot:
    """One picture.

    kind: one of KINDS
    subject: the op or model that it is about; "" of all
    name: of its file, without an ending
    """

    kind: str
    subject: str
    name: str
    title: str
    panels: tuple[Panel, ...]
    footer: str = ""


def subjects(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Whole models first, then the ops, in the order of the records."""
    found: dict[str, list[Record]] = {}
    for record in sorted(records, key=lambda r: not is_model(r)):
        found.setdefault(subject(record), []).append(record)
    return found


def left_out(kind: str, subjects: list[str], why: str) -> list[str]:
    """That there is no plot of a kind for these subjects, if there are any."""
    return [f"{KINDS[kind]}: left out for {', '.join(subjects)}: {why}"] if subjects else []


def listed(*words: str, besides: str) -> str:
    """The words that say something besides the title's."""
    return ", ".join(word for word in words if word not in ("", besides))


def slug(*words: object) -> str:
    """A plot's name: what a file's name and an HTML id can be."""
    return re.sub(r"[^a-z0-9.]+", "-", " ".join(map(str, words)).lower()).strip("-")
