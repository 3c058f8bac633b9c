"""Where the tests run: on the GPU if there is one, else on the CPU with the kernels in Triton's interpreter.

`pytest --without transformers` runs them as if that package were not installed.
"""

from __future__ import annotations

import importlib.util
import os
import sys

import pytest
import torch

if not torch.cuda.is_available() and importlib.util.find_spec("triton") is not None:
    # Before triton is imported: a kernel decides at its definition how it runs.
    os.environ["TRITON_INTERPRET"] = "1"
# The tests run side by side (pytest -n), and tiny tensors gain nothing from threads.
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--without", action="append", default=[], metavar="PACKAGE", help="run as if PACKAGE were not installed"
    )


def pytest_configure(config: pytest.Config) -> None:
    for package in config.getoption("--without"):
        sys.modules[package] = None  # type: ignore[assignment]  # what makes an import of it fail, and find_spec None


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device that kernels are tested on."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(params=["triton", "native"])
def backend(request: pytest.FixtureRequest):
    """Each implementation of an op in turn."""
    import fastconv

    if request.param == "triton" and importlib.util.find_spec("triton") is None:
        pytest.skip("the package triton is not installed")
    with fastconv.backend(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty filled with NaN: an output element that a kernel doesn't write shows."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        made = empty(*args, **kwargs)
        if made.is_floating_point():
            made.detach().fill_(float("nan"))
        return made

    monkeypatch.setattr(torch, "empty", poisoned)
