"""A plugin of pytest that notes which tests are done, and leaves those out the next time: bench/gpu.py's.

    pytest -p fastconv.bench.passed_tests --passed FILE

A run that is cut short so goes on where it stopped. FILE has a line for each test: "passed" or "skipped", and its name.
"""

from __future__ import annotations

import signal
from pathlib import Path

import pytest


def read(path: Path) -> dict[str, str]:
    """Name of a test that is done -> "passed" or "skipped"."""
    if not path.exists():
        return {}
    # The last line may be cut.
    lines = [line.partition(" ") for line in path.read_text(encoding="utf-8").splitlines(keepends=True)]
    return {name.rstrip("\n"): outcome for outcome, _, name in lines if name.endswith("\n")}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--passed", type=Path, metavar="FILE", required=True)


def pytest_configure(config: pytest.Config) -> None:
    # Who runs in the background of a shell ignores the interrupt that ends a run, and so do its children.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    config.pluginmanager.register(_Passed(config), "fastconv-passed-tests")


class _Passed:
    def __init__(self, config: pytest.Config) -> None:
        self._path: Path = config.getoption("--passed")
        self._done = read(self._path)
        self._failed: set[str] = set()
        self._outcomes: dict[str, str] = {}
        # The workers of pytest-xdist tell the process that started them, which writes.
        self._writes = not hasattr(config, "workerinput")

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        done = [item for item in items if item.nodeid in self._done]
        if done:
            config.hook.pytest_deselected(items=done)
            items[:] = [item for item in items if item.nodeid not in self._done]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not self._writes:
            return
        name = report.nodeid
        if report.failed:
            self._failed.add(name)
        elif report.skipped or name not in self._outcomes:
            self._outcomes[name] = report.outcome
        if report.when == "teardown" and name not in self._failed:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(f"{self._outcomes[name]} {name}\n")
