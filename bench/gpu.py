"""Everything that needs a GPU, in one go: the tests, then every benchmark that this code has no figures for yet.

    python3 bench/gpu.py [--minutes N] [--dry-run] [--tests [PATH ...]]

Needs a CUDA GPU, torch, triton, and pytest for the tests; no network, no installation of this project. Where pytest is
not installed, a folder with its wheels unpacked does, on PYTHONPATH. Tests that need other packages are skipped.
Results go to bench/results/<gpu name>.json after every case, and what tests are done to a file beside it: the same
command goes on where a run was cut short, and runs no test again that has passed with this code. --dry-run does the
same on a CPU with small shapes and writes nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import torch
from checkout import ROOT

from fastconv.bench import passed_tests, table
from fastconv.bench.cases import cases
from fastconv.bench.progress import Progress
from fastconv.bench.provenance import code_state, hash_of, provenance
from fastconv.bench.results import ResultsError, load, new, resume, save
from fastconv.bench.session import Session

RESULTS = ROOT / "bench" / "results"
# Of the time that is given, what the tests may take while there are cases to measure.
_SHARE_OF_TESTS = 0.5
_WORKERS = 8  # compile kernels side by side, where pytest-xdist is there to do so
_NO_PYTEST = (
    "the tests need pytest: install it, or put a folder with its unpacked wheels on PYTHONPATH (pip install --target "
    "FOLDER pytest, on any machine). The benchmarks go on: each checks its own results"
)


def tests_state() -> str:
    """A hash of the code that figures depend on, and of the tests."""
    files = {path.relative_to(ROOT).as_posix(): path for path in (ROOT / "tests").rglob("*") if path.is_file()}
    sources = {name: path for name, path in files.items() if "__pycache__" not in name}
    return f"{code_state()}-{hash_of(sources)}"


def run_tests(paths: list[str], done: Path, seconds: float | None) -> str:
    """Run the tests that haven't passed yet; what came out, in words, beginning with passed, failed or unfinished.

    done: the file that says which have
    seconds: then the run is interrupted; None: never
    """
    if importlib.util.find_spec("pytest") is None:
        print(_NO_PYTEST, file=sys.stderr)
        return "failed: pytest is not installed, nothing was tested"
    command = [sys.executable, "-m", "pytest", "-q", "-c", ROOT / "pyproject.toml", "--rootdir", ROOT]
    command += ["-p", "fastconv.bench.passed_tests", "--passed", done]
    if importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(min(_WORKERS, os.cpu_count() or 1))]
    last, late = "no output", threading.Event()
    # Not from the root: there the folders kernels/ and reference/ would be top-level modules.
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen([*command, *paths], cwd=folder, stdout=subprocess.PIPE, text=True) as tests,
    ):

        def stop() -> None:
            late.set()
            tests.send_signal(signal.SIGINT)

        timers = [] if seconds is None else [threading.Timer(seconds, stop), threading.Timer(seconds + 20, tests.kill)]
        for timer in timers:
            timer.start()
        for line in tests.stdout or ():
            print(line, end="", flush=True)
            last = line.strip("= \n") or last
        code = tests.wait()
        for timer in timers:
            timer.cancel()
    outcomes = Counter(passed_tests.read(done).values())
    so_far = f"{outcomes['passed']} passed, {outcomes['skipped']} skipped"
    if code == 0 or (code == 5 and outcomes):  # 5: no test is left
        return f"passed: {so_far}"
    # Interrupted for a failed test too: then the last line tells so.
    return f"unfinished: {so_far}" if late.is_set() and "failed" not in last else f"failed: {last}; {so_far}"


def results_file(gpu: str) -> Path:
    """bench/results/<gpu name>.json, with nothing in the name that a file system minds."""
    return RESULTS / (re.sub(r"[^A-Za-z0-9.]+", "-", gpu).strip("-") + ".json")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="on a CPU if need be, small, and without writing")
    parser.add_argument("--tests", nargs="*", default=[str(ROOT / "tests")], metavar="PATH", help="default: all")
    parser.add_argument(
        "--minutes", type=float, metavar="N", help="end by then, tests and all; default: when all is done"
    )
    args = parser.parse_args(argv)
    start = time.monotonic()
    if not torch.cuda.is_available() and not args.dry_run:
        build = torch.version.cuda or "none"
        print(f"no GPU found by torch {torch.__version__} (built for CUDA: {build}): nothing was run", file=sys.stderr)
        return 2
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    origin = provenance(device, shlex.join(["python3", "bench/gpu.py", *(sys.argv[1:] if argv is None else argv)]))
    path = results_file(str(origin["device"]))
    try:
        results = new(origin) if args.dry_run else resume(path, origin)
    except ResultsError as error:
        print(f"{error}: nothing was run", file=sys.stderr)
        return 2
    session = Session(results, cases(device, quick=args.dry_run))
    if not session.todo:
        results = load(path)  # with the date, the command and the roofs of what was measured

    def minutes_left() -> float | None:
        return None if args.minutes is None else args.minutes - (time.monotonic() - start) / 60

    def write() -> None:
        if not args.dry_run:
            save(path, results)

    with tempfile.TemporaryDirectory() as folder:
        done = Path(folder) / "tests" if args.dry_run else path.with_suffix(".tests")
        _test(results, args.tests, done, minutes_left(), share=_SHARE_OF_TESTS if session.todo else 1.0)
    write()
    print(f"{len(session.todo)} cases to measure on {results['device']}", flush=True)
    with Progress() as progress:
        session.measure(
            device,
            progress,
            write,
            rounds=3 if args.dry_run else None,
            compiled=not args.dry_run,
            quick=args.dry_run,
            minutes=minutes_left(),
        )
    write()
    print("\n" + table.summary(results, session.names))
    if session.left_out:
        print(f"{len(session.left_out)} cases are left for the next run of this command")
    return 1 if session.red or results["tests"].startswith("failed") else 0


def _test(results: dict, paths: list[str], done: Path, minutes: float | None, *, share: float) -> None:
    """Run the tests, unless they have passed with this code, and note in the results what came out."""
    state = tests_state()
    if results.get("tests_code") == state and results["tests"].startswith("passed"):
        print(f"tests {results['tests']}, with this code, in a run before")
        return
    if not paths:
        results["tests"] = "not run"
        return
    # Beside tests that were done with other code none counts.
    if results.get("tests_code") != state:
        done.unlink(missing_ok=True)
    done.parent.mkdir(parents=True, exist_ok=True)
    seconds = None if minutes is None else max(0.0, 60 * minutes * share)
    results["tests_code"] = state
    results["tests"] = run_tests([str(Path(p).resolve()) for p in paths], done, seconds)
    if results["tests"].startswith("passed"):
        done.unlink(missing_ok=True)


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)  # before the first launch imports a kernel
    sys.exit(main())
