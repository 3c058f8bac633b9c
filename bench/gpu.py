"""Everything that needs a GPU, in one go: the tests, then every benchmark that this code has no figures for yet.

    python3 bench/gpu.py [--dry-run]

Needs a CUDA GPU, torch, triton, and pytest for the tests; no network, no installation of this project. Where pytest is
not installed, a folder with its wheels unpacked does, on PYTHONPATH. Tests that need other packages are skipped.
Results go to bench/results/<gpu name>.json after every case, so that a run that is cut short loses one at most and the
next one goes on. --dry-run does the same on a CPU with small shapes and writes nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from checkout import ROOT

from fastconv.bench.cases import cases
from fastconv.bench.provenance import provenance
from fastconv.bench.report import RESULTS, report
from fastconv.bench.roofs import measure
from fastconv.bench.run import rounds, run

_VERSIONS = ("code", "torch", "triton")  # a figure holds for these


_NO_PYTEST = (
    "the tests need pytest: install it, or put a folder with its unpacked wheels on PYTHONPATH (pip install --target "
    "FOLDER pytest, on any machine). The benchmarks go on: each checks its own results"
)


def run_tests(paths: list[str]) -> str:
    """Run the tests on the GPU; what came out, in words, beginning with "passed" or "failed"."""
    if importlib.util.find_spec("pytest") is None:
        print(_NO_PYTEST, file=sys.stderr)
        return "failed: pytest is not installed, nothing was tested"
    command = [sys.executable, "-m", "pytest", "-q", "-c", ROOT / "pyproject.toml", "--rootdir", ROOT]
    last = "no output"
    # Not from the root: there the folders kernels/ and reference/ would be top-level modules.
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen([*command, *paths], cwd=folder, stdout=subprocess.PIPE, text=True) as tests,
    ):
        for line in tests.stdout or ():
            print(line, end="", flush=True)
            last = line.strip("= \n") or last
    return f"{'failed' if tests.returncode else 'passed'}: {last}"


def results_file(gpu: str) -> Path:
    """bench/results/<gpu name>.json, with nothing in the name that a file system minds."""
    return RESULTS / (re.sub(r"[^A-Za-z0-9.]+", "-", gpu).strip("-") + ".json")


def measured(record: dict, origin: dict) -> bool:
    """Whether a stored record is of this code and these versions, with figures."""
    return "red" not in record and all(record.get(key) == origin[key] for key in _VERSIONS)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="on a CPU if need be, small, and without writing")
    parser.add_argument("--tests", nargs="*", default=[str(ROOT / "tests")], metavar="PATH", help="default: all")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available() and not args.dry_run:
        build = torch.version.cuda or "none"
        print(f"no GPU found by torch {torch.__version__} (built for CUDA: {build}): nothing was run", file=sys.stderr)
        return 2
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    origin = provenance(device)
    path = results_file(str(origin["device"]))
    results: dict = {"records": {}}
    if path.exists():
        results = json.loads(path.read_text())
    results |= origin
    results["tests"] = run_tests([str(Path(p).resolve()) for p in args.tests]) if args.tests else "not run"

    todo = [c for c in cases(device, quick=args.dry_run) if not measured(results["records"].get(c.name, {}), origin)]
    print(f"{len(todo)} cases to measure on {origin['device']}", flush=True)
    if todo:
        roofs = measure(device, quick=args.dry_run)
        results["roofs"] = vars(roofs)
    compiled = not args.dry_run
    for record in run(todo, device, roofs, rounds=rounds(device, args.dry_run), compiled=compiled) if todo else ():
        keep = {key: origin[key] for key in (*_VERSIONS, "commit", "dirty", "command")}
        results["records"][record["case"]] = record | keep
        if not args.dry_run:
            _write(path, results)
    if not args.dry_run:
        _write(path, results)
    print("\n" + report(results, str(origin["code"])))
    red = [r["case"] for r in results["records"].values() if "red" in r]
    return 1 if red or results["tests"].startswith("failed") else 0


def _write(path: Path, results: dict) -> None:
    # By way of another file: a run that is killed while writing would lose what was measured before.
    path.parent.mkdir(exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(results, indent=1) + "\n")
    part.replace(path)


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)  # before the first launch imports a kernel
    sys.exit(main())
