"""The cases as pytest-benchmark tests, for those who compare runs with its tools: `pytest bench --benchmark-only`.

`fastconv bench` is the one to believe: it interleaves the rivals and flushes the caches. Here each runs by itself, one
test for each case and label, grouped by case; choose with -k.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
import torch
import torch._functorch.config

from fastconv import backend
from fastconv.bench.case import Case
from fastconv.bench.cases import cases
from fastconv.bench.timing import Run
from fastconv.parity.measure import synchronize
from fastconv.tolerance import exact_convolutions

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

pytest.importorskip("pytest_benchmark", reason="times by its fixture")


@pytest.fixture(autouse=True)
def _path() -> Iterator[None]:
    # A compiled backward that reuses its inputs' memory could run only once.
    donating = torch._functorch.config.patch(donated_buffer=False)
    with backend("auto" if DEVICE.type == "cuda" else "native"), donating:
        yield


# Of one case at a time: its tests follow one another.
@functools.lru_cache(maxsize=1)
def _runs(case: Case) -> dict[str, Run]:
    return case.runs(DEVICE, compiled=False)


@functools.lru_cache(maxsize=1)
def _red(case: Case) -> dict[str, str]:
    with exact_convolutions(DEVICE):
        return {name: str(result) for name, result in case.parity(DEVICE).items() if not result.ok}


def _labelled() -> Iterator[object]:
    for case in cases(DEVICE):
        for label in case.labels(DEVICE):
            yield pytest.param(case, label, id=f"{case.name}-{label}".replace(" ", "-"))


@pytest.mark.parametrize(("case", "label"), _labelled())
def test_case(benchmark, case: Case, label: str):
    assert not _red(case), "no figures of a wrong result"
    timed = _runs(case)[label]

    def run() -> None:
        timed()
        synchronize(DEVICE)

    benchmark.group = case.name
    benchmark(run)
    seconds = benchmark.stats.stats.median
    benchmark.extra_info.update(
        op=case.subject.op,
        direction=case.direction,
        bytes=case.bytes(),
        flops=case.flops(),
        bytes_per_s=case.bytes() / seconds,
        flops_per_s=case.flops() / seconds,
    )
