"""Which implementation runs: backend names, the context manager, and what "triton" does where it can't run."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch

import fastconv
from fastconv import dispatch
from fastconv.ops import _eager


def test_backend_unknown_name():
    expected = r"unknown backend 'cuda': expected one of 'auto', 'triton', 'native'"
    with pytest.raises(ValueError, match=expected), fastconv.backend("cuda"):
        pass


def test_backend_nests_and_comes_back_after_an_error():
    x = torch.zeros(1)
    with fastconv.backend("native"):
        assert not dispatch.use_triton(x)
        with pytest.raises(KeyError), fastconv.backend("auto"):
            raise KeyError
        assert not dispatch.use_triton(x)
    assert dispatch._current == "auto"


def test_backend_triton_on_a_cpu_tensor(monkeypatch):
    monkeypatch.setattr(dispatch, "_INTERPRETING", False)
    x = torch.zeros(2, 4)
    assert not dispatch.use_triton(x)
    with fastconv.backend("triton"), pytest.raises(RuntimeError, match=r"backend 'triton' can't run: .*'cpu'"):
        fastconv.ops.layer_norm(x, torch.ones(4), torch.zeros(4))


def test_backend_auto_interprets_where_triton_does(monkeypatch):
    monkeypatch.setattr(dispatch, "_INTERPRETING", True)
    assert dispatch.use_triton(torch.zeros(1))
    with fastconv.backend("native"):
        assert not dispatch.use_triton(torch.zeros(1))


def test_use_triton_is_traced_without_a_warning(monkeypatch):
    # As for a tensor on a GPU: the question what it can run is asked in the trace.
    monkeypatch.setattr(dispatch, "_INTERPRETING", False)
    monkeypatch.setattr(dispatch, "unsupported", lambda device: None)
    # The same with a cache, at which Dynamo warns.
    monkeypatch.setattr(dispatch, "_unsupported_once", functools.cache(lambda device: None))
    torch._dynamo.reset()
    with fastconv.backend("triton"), warnings.catch_warnings():
        warnings.simplefilter("error")
        function = torch.compile(lambda x: x + dispatch.use_triton(x), backend="aot_eager", fullgraph=True)
        assert function(torch.zeros(1)).item() == 1


def test_use_kernels_in_fp64_is_the_interpreters(monkeypatch):
    # On a GPU fp64 is native; a meta tensor stands in for one there.
    monkeypatch.setattr(_eager, "use_triton", lambda x: True)
    assert _eager.use_kernels(torch.zeros(1, dtype=torch.float64))
    assert _eager.use_kernels(torch.zeros(1, device="meta"))
    assert not _eager.use_kernels(torch.zeros(1, device="meta", dtype=torch.float64))


def test_use_kernels_where_nothing_but_the_call_follows(monkeypatch):
    monkeypatch.setattr(_eager, "use_triton", lambda x: True)
    x, seen = torch.zeros(1), []

    def ask(x):
        seen.append(_eager.use_kernels(x, None, x))
        return x + 1

    ask(x)
    torch.func.vmap(ask)(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        torch.jit.trace(ask, (x,), check_trace=False)
    assert seen == [True, False, False]
    assert not _eager.use_kernels(x, x.as_subclass(type("Own", (torch.Tensor,), {})))
