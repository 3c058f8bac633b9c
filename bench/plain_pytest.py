"""Runs the tests where pytest is not installed: the part of it that they use, for a GPU machine with plain python3.

    python3 bench/plain_pytest.py PATH ...

It stands in for the module `pytest` while the tests are imported: parametrize, skip, fixtures with scopes, params and
teardown, raises, monkeypatch, capsys, tmp_path. A test that needs more, or a package that is not installed (tokenizers,
safetensors), is counted as not run, never as passed.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import io
import itertools
import math
import os
import re
import sys
import tempfile
import time
import traceback
import unittest.mock
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import checkout  # noqa: F401 (makes fastconv importable)


class Skipped(BaseException):
    """Raised by skip()."""


class UnsupportedError(Exception):
    """A test asks for something that only pytest has."""


def skip(reason: str = "", **_) -> None:
    raise Skipped(reason)


def fail(reason: str = "", **_) -> None:
    raise AssertionError(reason)


def importorskip(name: str, reason: str | None = None, **_) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise Skipped(reason or f"{name} is not installed") from None


@contextlib.contextmanager
def raises(expected, match: str | None = None) -> Iterator[SimpleNamespace]:
    caught = SimpleNamespace(value=None)
    try:
        yield caught
    except expected as error:
        caught.value, caught.type = error, type(error)
        assert match is None or re.search(match, str(error)), f"{match!r} not in {str(error)!r}"
    else:
        raise AssertionError(f"did not raise {expected}")


@contextlib.contextmanager
def warns(expected=Warning, match: str = "") -> Iterator[list]:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        yield seen
    found = [w for w in seen if issubclass(w.category, expected) and re.search(match, str(w.message))]
    assert found, f"no {expected} that matches {match!r}"


class approx:  # noqa: N801 (pytest's name)
    """A number, equal to others near it."""

    def __init__(self, expected: float, rel: float = 1e-6, abs: float = 1e-12) -> None:
        self.expected, self.rel, self.abs = expected, rel, abs

    def __eq__(self, other: object) -> bool:
        return math.isclose(other, self.expected, rel_tol=self.rel, abs_tol=self.abs)  # type: ignore[arg-type]

    def __repr__(self) -> str:
        return f"approx({self.expected})"


class MonkeyPatch:
    """Changes that are undone after the test."""

    def __init__(self) -> None:
        self.undo = contextlib.ExitStack()

    @classmethod
    @contextlib.contextmanager
    def context(cls) -> Iterator[MonkeyPatch]:
        patch = cls()
        with patch.undo:
            yield patch

    def _enter(self, patch) -> None:
        self.undo.enter_context(patch)

    def setattr(self, target, name, value=None, raising: bool = True) -> None:
        if isinstance(target, str):
            self._enter(unittest.mock.patch(target, name))
        else:
            self._enter(unittest.mock.patch.object(target, name, value, create=not raising))

    def setitem(self, mapping, name, value) -> None:
        self._enter(unittest.mock.patch.dict(mapping, {name: value}))

    def delitem(self, mapping, name, raising: bool = True) -> None:
        self._enter(unittest.mock.patch.dict(mapping))
        if raising or name in mapping:
            del mapping[name]

    def setenv(self, name: str, value: str) -> None:
        self.setitem(os.environ, name, value)

    def delenv(self, name: str, raising: bool = True) -> None:
        self.delitem(os.environ, name, raising)

    def syspath_prepend(self, path) -> None:
        self._enter(unittest.mock.patch.object(sys, "path", [str(path), *sys.path]))

    def chdir(self, path) -> None:
        self.undo.callback(os.chdir, Path.cwd())
        os.chdir(path)


FixtureRequest = SimpleNamespace


@dataclass
class Param:
    values: tuple
    marks: tuple


def param(*values, marks=(), id=None) -> Param:
    return Param(values, tuple(marks) if isinstance(marks, (list, tuple)) else (marks,))


@dataclass
class Mark:
    """One use of pytest.mark.<name>(...); as a decorator it adds itself to the function's or class's marks."""

    name: str
    args: tuple = ()
    kwargs: dict = field(default_factory=dict)

    def __call__(self, *args, **kwargs):
        if len(args) == 1 and not kwargs and callable(args[0]):
            args[0].pytestmark = [*getattr(args[0], "pytestmark", []), self]
            return args[0]
        return Mark(self.name, args, kwargs)


class _Marks:
    def __getattr__(self, name: str) -> Mark:
        return Mark(name)


mark = _Marks()


@dataclass
class Fixture:
    function: Callable
    scope: str = "function"
    params: list | None = None
    autouse: bool = False
    name: str | None = None


def fixture(function: Callable | None = None, *, scope="function", params=None, autouse=False, ids=None, name=None):
    if function is None:
        return lambda f: Fixture(f, scope, params, autouse, name)
    return Fixture(function)


def _tmp_path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def _monkeypatch() -> Iterator[MonkeyPatch]:
    with MonkeyPatch.context() as patch:
        yield patch


def _capsys() -> Iterator[SimpleNamespace]:
    out, err = io.StringIO(), io.StringIO()

    def read() -> SimpleNamespace:
        taken = SimpleNamespace(out=out.getvalue(), err=err.getvalue())
        for stream in (out, err):
            stream.seek(0)
            stream.truncate()
        return taken

    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        yield SimpleNamespace(readouterr=read)


_BUILTIN = {f.__name__.lstrip("_"): Fixture(f) for f in (_tmp_path, _monkeypatch, _capsys)}


def _fixtures(*modules: ModuleType) -> dict[str, Fixture]:
    found = dict(_BUILTIN)
    for module in modules:
        found |= {f.name or name: f for name, f in vars(module).items() if isinstance(f, Fixture)}
    return found


def _needed(names: list[str], fixtures: dict[str, Fixture], given: set[str]) -> dict[str, Fixture]:
    """The fixtures that the names need, those before them that these need themselves."""
    needed: dict[str, Fixture] = {}
    for name in names:
        if name in given or name in needed or name == "request":
            continue
        if name not in fixtures:
            raise UnsupportedError(f"the fixture {name!r}")
        inner = [n for n in inspect.signature(fixtures[name].function).parameters if n != name]
        needed |= {**_needed(inner, fixtures, given), name: fixtures[name]}
    return needed


def _marks(*owners: object) -> list[Mark]:
    marks: list[Mark] = []
    for owner in owners:
        own = getattr(owner, "pytestmark", [])
        marks += own if isinstance(own, list) else [own]
    return marks


def _check_skip(marks: list[Mark]) -> None:
    for m in marks:
        if m.name == "skip" or (m.name == "skipif" and m.args[0]):
            raise Skipped(m.kwargs.get("reason", "skip mark"))
        if m.name == "xfail":
            raise UnsupportedError("the mark xfail")


def _argument_sets(marks: list[Mark]) -> Iterator[tuple[dict[str, Any], list[Mark]]]:
    """Every combination of the parametrize marks: the arguments, and the marks of single values."""
    axes = []
    for m in marks:
        if m.name != "parametrize":
            continue
        if m.kwargs.get("indirect"):
            raise UnsupportedError("parametrize(indirect=...)")
        names = m.args[0] if isinstance(m.args[0], (list, tuple)) else [n.strip() for n in m.args[0].split(",")]
        axis = []
        for value in m.args[1]:
            single = value if isinstance(value, Param) else Param(tuple(value) if len(names) > 1 else (value,), ())
            axis.append((dict(zip(names, single.values, strict=True)), list(single.marks)))
        axes.append(axis)
    for combination in itertools.product(*axes):
        arguments = {k: v for values, _ in combination for k, v in values.items()}
        yield arguments, [m for _, extra in combination for m in extra]


class Session:
    """Runs test files and counts what came out."""

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self.values: dict[tuple, Any] = {}
        self.open = contextlib.ExitStack()

    def run_file(self, path: Path, conftest: ModuleType | None) -> None:
        try:
            module = _import(path)
        except (Skipped, Exception) as error:
            self._count(*_outcome(error, path.name))
            return
        fixtures = _fixtures(*([conftest] if conftest else []), module)
        for name, item in list(vars(module).items()):
            if name.startswith("Test") and inspect.isclass(item):
                self._count("not run", f"{path.name}::{name}: test classes")
            elif name.startswith("test_") and inspect.isfunction(item):
                try:
                    self._run_function(f"{path.name}::{name}", item, _marks(item, module), fixtures)
                except UnsupportedError as what:
                    self._count(*_outcome(what, f"{path.name}::{name}"))

    def _run_function(self, name: str, function: Callable, marks: list[Mark], fixtures: dict[str, Fixture]) -> None:
        wanted = [n for n, f in fixtures.items() if f.autouse]
        wanted += [n for m in marks if m.name == "usefixtures" for n in m.args]
        for arguments, extra in _argument_sets(marks):
            parameters = list(inspect.signature(function).parameters)
            needed = _needed(wanted + parameters, fixtures, set(arguments))
            varied = [n for n, f in needed.items() if f.params is not None]
            for values in itertools.product(*(needed[n].params or [] for n in varied)):
                chosen = dict(zip(varied, values, strict=True))
                label = f"{name}[{', '.join(map(str, [*arguments.values(), *values]))}]"
                self._run_one(label, function, arguments, [*marks, *extra], needed, chosen)

    def _run_one(self, label, function, arguments, marks, needed, chosen) -> None:
        outcome, why = "passed", ""
        try:
            with contextlib.ExitStack() as stack:
                _check_skip(marks)
                values = dict(arguments)
                for fixture_name, f in needed.items():
                    values[fixture_name] = self._value(fixture_name, f, values, chosen, stack, [*arguments, *needed])
                function(**{n: values[n] for n in inspect.signature(function).parameters})
        except (Skipped, Exception) as error:
            outcome, why = _outcome(error, label)
        self._count(outcome, why)

    def _value(self, name: str, f: Fixture, values: dict, chosen: dict, stack: contextlib.ExitStack, all_names) -> Any:
        key = (f.function, repr(chosen.get(name)))
        if f.scope != "function" and key in self.values:
            return self.values[key]
        request = SimpleNamespace(param=chosen.get(name), fixturenames=all_names)
        names = inspect.signature(f.function).parameters
        made = f.function(**{n: request if n == "request" else values[n] for n in names})
        if inspect.isgenerator(made):
            generator = made
            made = next(generator)
            (stack if f.scope == "function" else self.open).callback(lambda: next(generator, None))
        if f.scope != "function":
            self.values[key] = made
        return made

    def _count(self, outcome: str, why: str = "") -> None:
        self.outcomes[outcome] += 1
        if why:
            self.reasons[f"{outcome}: {why}"] += 1


def _outcome(error: BaseException, label: str) -> tuple[str, str]:
    """What an exception makes of a test, and why; prints a failure."""
    if isinstance(error, Skipped):
        return "skipped", str(error)
    if isinstance(error, UnsupportedError):
        return "not run", f"{label}: {error}"
    missing = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if missing not in ("", "fastconv"):
        return "not run", f"{missing} is not installed"
    print(f"FAILED {label}\n{''.join(traceback.format_exception(error))}", flush=True)
    return "failed", ""


def _import(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(paths: list[str]) -> int:
    sys.modules["pytest"] = sys.modules[__name__]
    start, session = time.perf_counter(), Session()
    files = [f for p in map(Path, paths) for f in (sorted(p.glob("test_*.py")) if p.is_dir() else [p])]
    conftest = None
    for folder in {f.resolve().parent for f in files}:
        sys.path.insert(0, str(folder))
        if (folder / "conftest.py").exists():
            conftest = _import(folder / "conftest.py")
    with session.open:
        for file in files:
            session.run_file(file, conftest)
            print(f"{file.name}: {dict(session.outcomes)} so far", flush=True)
    for reason, count in session.reasons.items():
        print(f"{count} {reason}")
    counts = ", ".join(f"{session.outcomes[o]} {o}" for o in ("passed", "failed", "skipped", "not run"))
    print(f"{counts} in {time.perf_counter() - start:.0f} s (without pytest)")
    return 1 if session.outcomes["failed"] or not session.outcomes["passed"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
