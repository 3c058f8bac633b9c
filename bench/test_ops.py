"""The cases as pytest-benchmark tests, for those who compare runs with its tools: `pytest bench --benchmark-only`.

bench/run.py is the one to believe: it interleaves the rivals and flushes the caches.
"""

from __future__ import annotations

import pytest
import torch

from fastconv import backend
from fastconv.bench.cases import cases

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

pytest.importorskip("pytest_benchmark", reason="times by its fixture")


@pytest.mark.parametrize("who", ["fastconv", "rival"])
@pytest.mark.parametrize("case", cases(DEVICE), ids=lambda case: case.name.replace(" ", "-"))
def test_op(benchmark, case, who):
    with backend("auto" if DEVICE.type == "cuda" else "native"):
        runs = case.runs(DEVICE, compiled=False)
        timed = runs["fastconv" if who == "fastconv" else next(iter(case.rivals(DEVICE)))]

        def run():
            timed()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()

        benchmark.group = case.name
        benchmark(run)
