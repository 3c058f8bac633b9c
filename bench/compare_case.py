"""One case in two results: what became of its times, of its replays, of what a call costs the CPU, of its memory."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from fastconv.bench.records import ROOFS, is_own, peaks
from fastconv.bench.results import Record

VERDICTS = ("slower", "more memory", "wrong", "not judged", "faster", "less memory", "right again", "same")
_SHAPE = ("kind", "op", "direction", "model", "batch", "length", "tokens", "lengths", "dtype")
_PAGE = 4096  # bytes: less is no growth of a peak, but a scalar or two

Spread = Mapping[str, float]


@dataclass(frozen=True)
class Finding:
    """What became of one case under one of fastconv's labels.

    label: with what was timed where that is not a call as it comes: "fastconv, graph replay"
    verdict: one of VERDICTS
    change: of its time or peak, 0.1 for 10 % more; None where nothing was judged
    by: what was judged by, or why nothing was
    """

    case: str
    label: str
    verdict: str
    change: float | None
    by: str


@dataclass(frozen=True)
class _Timing:
    """A way to time a label: the keys of its spreads, of their ratios and of why there are none; how it is told."""

    seconds: str
    ratios: str
    failures: str
    told: str


_CALLS = _Timing("seconds", "ratios", "broken", "")
_ON_A_GPU = (
    _Timing("graph_seconds", "graph_ratios", "uncaptured", ", graph replay"),
    _Timing("host_seconds", "host_ratios", "broken", ", cost on the CPU"),
)


@dataclass(frozen=True)
class Pair:
    """The records of one case in two results.

    others_changed: whether the versions differ, and with them the rivals
    gpu: whether times of two runs can be compared
    threshold: a smaller change is none
    """

    a: Record
    b: Record
    others_changed: bool
    gpu: bool
    threshold: float

    def findings(self) -> Iterator[Finding]:
        """What became of it under each of fastconv's labels."""
        changed = [key for key in _SHAPE if self.a.get(key) != self.b.get(key)]
        if "red" in self.b:
            why = "; ".join(f"{output}: {reason}" for output, reason in self.b["red"].items())
            if "red" in self.a:
                yield self._not_judged("fastconv", f"wrong in both, {why}")
            else:
                yield self._found("fastconv", "wrong", None, why)
        elif "red" in self.a:
            yield self._found("fastconv", "right again", None, "wrong in the first")
        elif changed:
            what = ", ".join(f"{key} {self.a.get(key)} and {self.b.get(key)}" for key in changed)
            yield self._not_judged("fastconv", f"the case is another: {what}")
        else:
            for label in filter(is_own, self.a["seconds"]):
                yield self._time(_CALLS, label)
                if label in self.b["seconds"]:  # else that is told, and enough
                    yield from self._memory(label)
                    for timing in _ON_A_GPU:
                        if label in self.a.get(timing.seconds, {}):
                            yield self._time(timing, label)

    def _found(self, label: str, verdict: str, change: float | None, by: str) -> Finding:
        return Finding(self.b["case"], label, verdict, change, by)

    def _not_judged(self, label: str, why: str) -> Finding:
        return self._found(label, "not judged", None, why)

    def _time(self, timing: _Timing, label: str) -> Finding:
        told, before, after = label + timing.told, self.a[timing.seconds], self.b.get(timing.seconds, {})
        if label not in after:
            why = self.b.get(timing.failures, {}).get(label)
            if why is None:
                return self._not_judged(told, "not in the second")
            return self._found(told, "wrong", None, f"failed: {why}")
        changes, verdicts = self._against(timing, label)
        by = ", ".join(f"{rival} {100 * change:+.0f} %" for rival, change in changes.items())
        if not self.gpu:
            if not changes:
                why = "no rival is in both"
                if self.others_changed:
                    why = "neither a copy nor a product to judge by, and other versions"
                return self._not_judged(told, f"{why}; times of two runs on a CPU say nothing")
            return self._found(told, _majority(verdicts), statistics.median(changes.values()), f"against {by}")
        verdict = _verdict(before[label], after[label], self.threshold)
        change = after[label]["median"] / before[label]["median"] - 1
        if changes and _majority(verdicts) != verdict:
            verdict = "same"  # the card is slower, or the rivals are
        by = f"time, and against {by}" if by else "time alone, no rival is in both"
        return self._found(told, verdict, change, by)

    def _against(self, timing: _Timing, label: str) -> tuple[dict[str, float], list[str]]:
        """How fastconv's time over each rival's changed, and the verdicts on that."""
        changes, verdicts = {}, []
        for rival in self.b[timing.seconds]:
            if is_own(rival) or (self.others_changed and rival not in ROOFS):
                continue
            if rival in ROOFS and any(self.a.get(key) != self.b.get(key) for key in ("bytes", "flops")):
                continue  # it does another work
            before, after = (_ratio(record.get(timing.ratios, {}), label, rival) for record in (self.a, self.b))
            if before is not None and after is not None:
                # A rival's time over fastconv's: less of it is slower.
                changes[rival] = before["median"] / after["median"] - 1
                verdicts.append(_verdict(after, before, self.threshold))
        return changes, verdicts

    def _memory(self, label: str) -> Iterator[Finding]:
        before, after = (peaks(record).get(label) for record in (self.a, self.b))
        if before is None or after is None or abs(after - before) <= _PAGE:
            return
        if max(before, after) > min(before, after) * (1 + self.threshold):
            verdict = "more memory" if after > before else "less memory"
            change = after / before - 1 if before else None
            yield self._found(label, verdict, change, f"peak {before / 1e6:.3g} MB, then {after / 1e6:.3g} MB")


def _ratio(ratios: Mapping[str, Spread], label: str, rival: str) -> Spread | None:
    """The rival's time over that of fastconv under a label."""
    over = ratios.get(rival)
    if label == "fastconv" or over is None:
        return over
    own = ratios.get(label)  # its time over that of plain fastconv
    if own is None:
        return None
    # Of both spreads the widest that there can be: the rounds themselves aren't stored.
    return {
        "median": over["median"] / own["median"],
        "low": over["low"] / own["high"],
        "high": over["high"] / own["low"],
    }


def _verdict(before: Spread, after: Spread, threshold: float) -> str:
    """Of a quantity that is better when it is less."""
    if after["median"] > before["median"] * (1 + threshold) and after["low"] > before["high"]:
        return "slower"
    if before["median"] > after["median"] * (1 + threshold) and before["low"] > after["high"]:
        return "faster"
    return "same"


def _majority(verdicts: list[str]) -> str:
    for verdict, opposite in (("slower", "faster"), ("faster", "slower")):
        if 2 * verdicts.count(verdict) > len(verdicts) and opposite not in verdicts:
            return verdict
    return "same"
