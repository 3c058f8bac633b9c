"""A run that can be cut short and gone on with: what is measured already is left out, and every case is saved."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from fastconv.bench import results as files
from fastconv.bench import roofs
from fastconv.bench.case import Case
from fastconv.bench.results import VERSIONS, Results
from fastconv.bench.run import Progress, run

_OF_A_RECORD = (*VERSIONS, "commit", "dirty", "command")


@dataclass
class Session:
    """What is to be measured, and what came of it.

    results: what is measured so far, of these cases and others
    chosen: all cases asked for, the most informative first; todo: those to measure now
    too_large: names of those that the device has too little memory for
    """

    results: Results
    chosen: Sequence[Case]
    again: bool = False
    todo: list[Case] = field(init=False)
    too_large: list[str] = field(init=False, default_factory=list)
    _done: set[str] = field(init=False, default_factory=set)

    def __post_init__(self) -> None:
        self.todo = [case for case in self.chosen if self.again or not self._measured(case)]

    def _measured(self, case: Case) -> bool:
        return files.measured(self.results["records"].get(case.name, {}), self.results)

    @property
    def names(self) -> list[str]:
        """Of the cases asked for."""
        return [case.name for case in self.chosen]

    @property
    def left_out(self) -> list[str]:
        """Names of those that are still to be measured: there was no time."""
        return [case.name for case in self.todo if case.name not in self._done and case.name not in self.too_large]

    @property
    def red(self) -> list[str]:
        """Names of those whose results are wrong, with this code."""
        records = ((case.name, self._record(case)) for case in self.chosen)
        return [name for name, record in records if "red" in record and files.same_state(record, self.results)]

    def _record(self, case: Case) -> files.Record:
        return self.results["records"].get(case.name, {})

    def measure(
        self,
        device: torch.device,
        progress: Progress,
        save: Callable[[], None],
        *,
        rounds: int | None = None,
        compiled: bool,
        quick: bool = False,
        minutes: float | None = None,
    ) -> None:
        """Measure what is to be measured, the roofs first.

        save: called after the roofs and after every case
        minutes: no case begins that wouldn't be done by then; None: all the time it takes
        """
        if not self.todo:
            return
        deadline = None if minutes is None else time.monotonic() + 60 * minutes
        origin = {key: self.results.get(key) for key in _OF_A_RECORD}
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            rates = roofs.measure(device, quick=quick)
            self.results["roofs"] = vars(rates)
            save()
            for record in run(self.todo, device, rates, progress, rounds=rounds, compiled=compiled, deadline=deadline):
                if "too_large" in record:
                    self.too_large.append(record["case"])
                    continue
                self.results["records"][record["case"]] = record | origin
                self._done.add(record["case"])
                save()
