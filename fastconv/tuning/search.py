"""The search itself: for each shape what is right, what is fastest, and how long it all may take."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import triton

from fastconv.bench.provenance import now
from fastconv.bench.timing import interleaved, ratio
from fastconv.kernels import _configs
from fastconv.kernels._configs import Asked
from fastconv.tuning import cases, table
from fastconv.tuning.case import Case
from fastconv.tuning.judge import Judge

# Called with what is done next, the steps done and the steps in all.
Progress = Callable[[str, int, int], None]
Timer = Callable[..., dict[str, list[float]]]

# A candidate has to be this much faster: less is not worth another kernel in the cache.
_GAIN = 1.02
# All candidates a few times, then the fastest often enough for a spread.
_ROUNDS, _FINAL_ROUNDS, _FINALISTS = 10, 50, 4


@dataclass(frozen=True)
class Searched:
    """What the search found for one kernel and shape.

    before: the config without the user's table; after: what won, or None
    seconds: of both, the medians
    rejected: why candidates could not win -> how many
    red: why nothing was timed at all: the config that is in use is wrong here
    """

    asked: Asked
    before: Any
    after: Any
    seconds: tuple[float, float] | None
    tried: int
    rejected: Mapping[str, int]
    red: str | None = None


class Search:
    """A search for the best configs of what was asked for, into the table at `path`.

    command: how it was started, for the entries
    again: also what the table has an entry for
    device: where the kernels run

    Raises: TuningError for a file that is no table.
    """

    def __init__(
        self,
        asked: Iterable[Asked],
        path: Path,
        device: torch.device,
        *,
        command: str,
        again: bool = False,
        timer: Timer = interleaved,
    ) -> None:
        self._path, self._device, self._command, self._timer = path, device, command, timer
        _configs.all_kernels()
        self._entries = table.read(path)
        done = set() if again else set(self._entries)
        found = {table.identity(each): each for each in asked}
        self.done = [each for identity, each in found.items() if identity in done]
        self.todo = [each for identity, each in found.items() if identity not in done]

    def candidates(self, asked: Asked) -> list[Any]:
        """What is tried beside the config that is used without the user's table."""
        kernel = _configs.KERNELS[asked.kernel]
        before = _configs.without_user_table(*asked)
        around = kernel.candidates(asked.shape, asked.dtype, asked.card)
        return [config for config in around if config != before]

    def run(self, *, seconds: float | None = None, progress: Progress | None = None) -> Iterator[Searched]:
        """Search what is to do, shape by shape, until so many seconds are over; what is begun then is not kept."""
        budget = _Budget(seconds, sum(len(self.candidates(each)) + 1 for each in self.todo), progress)
        for asked in self.todo:
            try:
                found = self._search(asked, budget)
            except _OutOfTimeError:
                return
            if found.red is None:
                self._keep(found)
            yield found

    def _search(self, asked: Asked, budget: _Budget) -> Searched:
        before, candidates = _configs.without_user_table(*asked), self.candidates(asked)
        name = f"{asked.kernel} {'x'.join(map(str, asked.shape))}"
        case = cases.make(asked, self._device)
        judge = Judge(asked.kernel, case)
        budget.step(f"{name}: what is used now")
        red = judge.problem(before)
        if red is not None:
            budget.skip(len(candidates))
            return Searched(asked, before, None, None, 0, {}, red)
        rejected: Counter[str] = Counter()

        def passes(problem_of: Callable[[Any], str | None], config: Any) -> bool:
            problem = problem_of(config)
            if problem is not None:
                rejected[problem] += 1
            return problem is None

        right = []
        for number, config in enumerate(candidates, 1):
            budget.step(f"{name}: candidate {number} of {len(candidates)}")
            if passes(judge.problem, config):
                right.append(config)
        # Only of what may win: each takes several compilations.
        fits = partial(passes, judge.problem_of_others)
        after, times = self._fastest(asked.kernel, case, before, right, fits)
        return Searched(asked, before, after, times, len(candidates), rejected)

    def _fastest(
        self, kernel: str, case: Case, before: Any, candidates: Sequence[Any], fits: Callable[[Any], bool]
    ) -> tuple[Any, tuple[float, float]]:
        """The candidate that fits and is surely faster, or None, and the seconds of what is used now and of it."""

        def times(configs: Sequence[Any], rounds: int) -> list[list[float]]:
            # By number: two configs of different kernels' classes may be equal.
            runs = {str(n): partial(_launched, kernel, config, case.launch) for n, config in enumerate(configs)}
            return list(self._timer(runs, self._device, rounds=rounds).values())

        first, *others = times([before, *candidates], _ROUNDS)
        order = sorted(range(len(candidates)), key=lambda n: statistics.median(others[n]))
        finalists = list(islice(filter(fits, (candidates[n] for n in order)), _FINALISTS))
        first, *others = times([before, *finalists], _FINAL_ROUNDS)
        now_takes = statistics.median(first)
        best, best_gain, best_takes = None, _GAIN, now_takes
        for config, taken in zip(finalists, others, strict=True):
            gain = ratio(first, taken)
            if gain["low"] > 1.0 and gain["median"] > best_gain:
                best, best_gain, best_takes = config, gain["median"], statistics.median(taken)
        return best, (now_takes, best_takes)

    def _keep(self, found: Searched) -> None:
        """Write what was found: None where nothing won, so that it is not searched again."""
        asked = found.asked
        identity = table.identity(asked)
        kernel, device, dtype, shape = identity[1]
        assert found.seconds is not None
        self._entries[identity] = {
            "kernel": kernel,
            "device": device,
            "dtype": dtype,
            "shape": list(shape),
            "config": None if found.after is None else asdict(found.after),
            "measured": {
                "seconds": dict(zip(("before", "after"), found.seconds, strict=True)),
                "before": asdict(found.before),
                "shape": list(asked.shape),
                "torch": torch.__version__,
                "triton": triton.__version__,
                "date": now(),
                "command": self._command,
            },
        }
        table.write(self._path, list(self._entries.values()))
        _configs.forget()


def _launched(kernel: str, config: Any, launch: Callable[[], object]) -> object:
    with _configs.forced(kernel, config):
        return launch()


class _OutOfTimeError(Exception):
    pass


class _Budget:
    """Counts steps, tells of each one before it is done, with the time left, and ends the search in time."""

    def __init__(self, seconds: float | None, total: int, progress: Progress | None) -> None:
        self._seconds, self._total, self._progress = seconds, total, progress
        self._done, self._start = 0, time.monotonic()

    def step(self, what: str) -> None:
        gone = time.monotonic() - self._start
        if self._seconds is not None and gone >= self._seconds:
            raise _OutOfTimeError
        if self._progress is not None:
            left = [gone / self._done * (self._total - self._done)] if self._done else []
            left += [] if self._seconds is None else [self._seconds - gone]
            told = f", {_duration(min(left))} left" if left else ""
            self._progress(what + told, self._done, self._total)
        self._done += 1

    def skip(self, steps: int) -> None:
        self._done += steps


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 100 else f"{seconds:.0f} s"
