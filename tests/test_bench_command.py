"""`fastconv bench` end to end: what it writes, refuses, goes on with, leaves out, and its exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_cases import TinyCase, TinyModel

from fastconv import cli
from fastconv.bench import cases as every_case
from fastconv.bench import results, run, session

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


@pytest.fixture
def few(monkeypatch) -> list:
    """The cases that there are, to be changed."""
    chosen = [TinyCase(8), TinyCase(16, "step"), TinyModel()]
    monkeypatch.setattr(every_case, "cases", lambda device, quick: list(chosen))
    monkeypatch.setattr(session.roofs, "measure", lambda device, quick: run.Roofs(1e10, {"float32": 1e11}))
    return chosen


@pytest.fixture
def bench(capsys):
    """`fastconv bench ...`, where it measures of small shapes on the CPU: its exit code, stdout and stderr."""

    def call(*args: object) -> tuple[int, str, str]:
        measures = () if {"--report", "--compare"} & set(args) else ("--device", "cpu", "--quick")
        code = cli.main(["bench", *measures, *map(str, args)])
        return code, *capsys.readouterr()

    return call


def measured(path: Path) -> dict[str, str]:
    """When each case of a file was measured; what changes when it is measured again."""
    return {name: json.dumps(record) for name, record in results.load(path)["records"].items()}


def real(beginning: str) -> str:
    """The name of a real case, which no other's name contains."""
    names = [case.name for case in every_case.cases(CPU, quick=True)]
    return next(n for n in names if n.startswith(beginning) and sum(n in other for other in names) == 1)


def test_bench_command_writes_everything(bench, tmp_path):
    pytest.importorskip("matplotlib", reason="draws the plots")
    chosen = [real(op) for op in ("bias+residual+layer_norm infer", "masked_attention infer", "model infer")]
    code, out, err = bench("--out", tmp_path / "out", *(f"--filter={name}" for name in chosen))
    assert code == 0, out + err
    written = results.load(tmp_path / "out" / "results.json")
    assert set(written["records"]) == set(chosen)
    assert written["command"].startswith("fastconv bench --device cpu --quick --out ")
    assert written["roofs"]["copy"] > 0 and written["torch"] == torch.__version__
    for record in written["records"].values():
        rivals = set(record["seconds"]) - {"fastconv", "copy"}
        assert rivals and all(record["ratios"][rival]["median"] > 0 for rival in rivals)
        assert record["rounds"] == 3 and record["code"] == written["code"]
    csv, html = ((tmp_path / "out" / name).read_text() for name in ("results.csv", "report.html"))
    assert all(name in csv and name in html for name in chosen)
    assert list((tmp_path / "out").glob("*.png"))
    # A line for each case while it runs, and the table.
    assert err.count("] ") >= 3 and "3 cases, all right" in out and "tokens/s" in out
    assert f"written: {tmp_path / 'out' / 'results.json'}" in out


def test_bench_command_prints_and_stores_no_speed_of_a_wrong_kernel(bench, tmp_path, monkeypatch):
    # The op's own native formulation, as everybody calls it.
    from fastconv.bench import layer_norm_cases

    right = layer_norm_cases.layer_norm
    monkeypatch.setattr(layer_norm_cases, "layer_norm", lambda *args, **kwargs: right(*args, **kwargs) * 1.001)
    name = real("bias+residual+layer_norm infer")
    code, out, err = bench("--json", tmp_path / "a.json", "--csv", tmp_path / "a.csv", "--filter", name)
    assert code == 1
    record = json.loads((tmp_path / "a.json").read_text())["records"][name]
    assert set(record["red"]) == {"y"}
    assert not {"seconds", "ratios", "bytes_per_s", "flops_per_s", "of_roof", "peak_bytes"} & set(record)
    assert "RED, no figures: y: max error" in err and " ms" not in err
    (row,) = [line for line in out.splitlines() if line.startswith(name)]
    assert row.split()[-1] == "RED" and "1 cases, 1 red" in out
    assert "max error" in (tmp_path / "a.csv").read_text()


def test_bench_command_goes_on_with_what_there_is(bench, few, tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    assert bench("--json", path, "--filter", "layer_norm")[0] == 0
    first = measured(path)
    code, out, err = bench("--json", path)
    assert code == 0 and f"2 of 3 cases are in {str(path)!r}, of this code" in out
    assert "[1/1] model infer tiny 2x8 text" in err and "3 cases, all right" in out
    second = measured(path)
    assert set(second) == set(first) | {few[2].name} and first.items() <= second.items()
    # Nothing is left to do; the table is there all the same.
    stored = path.read_bytes()
    code, out, err = bench("--json", path, "--rounds", 2)
    assert path.read_bytes() == stored  # with the date and the command of its figures
    assert (
        code == 0
        and err == ""
        and "layer_norm; under a rival's name its time over fastconv's" in out
        and measured(path) == second
    )
    bench("--json", path, "--again", "--filter", "step")
    third = measured(path)
    assert {name for name in third if third[name] != second[name]} == {few[1].name}
    # Figures of other code stay, marked, until they are measured again.
    monkeypatch.setattr("fastconv.bench.provenance.code_state", lambda: "another")
    assert bench("--json", path, "--filter", "step")[0] == 0
    fourth = measured(path)
    assert {name for name in fourth if fourth[name] != third[name]} == {few[1].name} and set(fourth) == set(third)
    assert "infer 8x16*" in bench("--report", path)[1]


def test_bench_command_interrupted(bench, few, tmp_path, monkeypatch):
    path, right, done = tmp_path / "a.json", run.run_case, []

    def interrupted(case, *args, **kwargs):
        done.append(case.name)
        if len(done) == 2:
            raise KeyboardInterrupt
        return right(case, *args, **kwargs)

    monkeypatch.setattr(run, "run_case", interrupted)
    code, out, _ = bench("--json", path)
    assert code == 130 and "1 cases, all right" in out and "the same command goes on" in out
    assert set(measured(path)) == {few[0].name}
    assert bench("--json", path)[0] == 0
    assert done == [few[0].name, few[1].name, few[1].name, few[2].name]


def test_bench_command_saves_after_every_case(bench, few, tmp_path, monkeypatch):
    # Killed without a word: what is in the file then is all that is left.
    path, seen = tmp_path / "a.json", []
    monkeypatch.setattr(TinyModel, "parity", lambda self, device: seen.append(set(measured(path))) or {})
    assert bench("--json", path)[0] == 0
    assert seen == [{few[0].name, few[1].name}]


def test_bench_command_a_pipe_that_is_cut_loses_nothing(tmp_path):
    path = tmp_path / "a.json"
    command = [sys.executable, "-m", "fastconv.cli", "bench", "--device", "cpu", "--quick", "--json", path]
    command += ["--filter", real("bias+residual+layer_norm infer")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        told = process.stderr.read()
    assert process.returncode == 141, told
    assert measured(path) and "Traceback" not in told


def test_bench_command_in_a_time(bench, few, tmp_path, monkeypatch):
    code, out, _ = bench("--json", tmp_path / "a.json", "--minutes", 1e-9)
    assert code == 0 and "3 cases didn't fit into 1e-09 minutes" in out and "the same command goes on with them:" in out
    assert [line.strip() for line in out.splitlines() if line.startswith("  ")] == [case.name for case in few]
    assert "0 cases, all right" in out
    code, out, _ = bench("--minutes", 10)
    assert code == 0 and "didn't fit" not in out


def test_bench_command_lists(bench, few, capsys):
    assert bench("--list") == (0, "\n".join(case.name for case in few) + "\n", "")
    assert bench("--list", "--filter", "step", "--filter", "tiny")[1].splitlines() == [few[1].name, few[2].name]
    few.append(TinyCase(8, "bwd", dtype=torch.bfloat16))
    assert bench("--list", "--dtype", "bf16")[1] == f"{few[3].name}\n"


def test_bench_command_compiles_if_asked(bench, few, monkeypatch):
    asked = []

    def measure(self, device, progress, save, *, rounds, compiled, quick, minutes):
        asked.append((rounds, compiled, quick, minutes))
        self.todo = []

    monkeypatch.setattr(session.Session, "measure", measure)
    bench()
    bench("--compile", "--rounds", 7)
    assert asked == [(3, False, True, None), (7, True, True, None)]


def test_bench_command_reports_a_file(bench, few, tmp_path):
    path = tmp_path / "a.json"
    few.append(TinyCase(24, off_by=1.0))
    _, out, _ = bench("--json", path)
    before = path.read_bytes()
    code, again, err = bench("--report", path, "--csv", tmp_path / "a.csv", "--html", tmp_path / "a.html")
    assert code == 1  # it has a wrong result
    assert err == "" and again.splitlines()[:-1] == out.splitlines()[:-1]
    assert path.read_bytes() == before and few[0].name in (tmp_path / "a.html").read_text()
    assert again.splitlines()[-1] == f"written: {tmp_path / 'a.csv'}, {tmp_path / 'a.html'}"


def test_bench_command_compares(bench, few, tmp_path):
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    bench("--json", a)
    found = results.load(a)
    slower = {"median": 1e-9, "low": 1e-9, "high": 1e-9}
    for record in found["records"].values():
        record["ratios"] = dict.fromkeys(record["ratios"], slower)
    results.save(b, found)
    assert bench("--compare", a, a)[0] == 0
    code, out, _ = bench("--compare", a, b)
    assert code == 1 and "slower" in out and few[0].name in out


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (
            ("--filter", "nothing"),
            "--filter nothing: there is no such case among the 3 for cpu; `fastconv bench",
        ),
        (("--dtype", "fp16"), "--dtype fp16: there is no such case"),
        (("--dtype", "fp8"), "invalid choice: 'fp8'"),
        (("--device", "meta"), "device 'meta' can't be used"),
        (("--device", "nowhere"), "device 'nowhere' can't be used"),
        (("--minutes", "0"), "--minutes must be more than 0, got 0"),
        (("--minutes", "nan"), "--minutes must be more than 0, got nan"),
        (("--rounds", "-1"), "--rounds must be more than 0, got -1"),
        (("--threshold", "3"), "--threshold goes with --compare"),
        (("--report", "missing.json"), "can't read 'missing.json': No such file or directory"),
        (("--report", "a", "--compare", "a", "b"), "--compare measures nothing and doesn't go with --report"),
        (("--report", "a", "--again"), "--report measures nothing and doesn't go with --again"),
        (("--compare", "missing.json", "b"), "can't read 'missing.json'"),
        (("--json", "no/such/folder.json"), "--json: can't write 'no/such/folder.json': No such file or directory"),
        (("--json", "foreign.json"), "'foreign.json' holds no results"),
        (("--out", "foreign.json"), "--out: can't make the folder 'foreign.json': File exists"),
    ],
)
def test_bench_command_bad_input(bench, few, tmp_path, monkeypatch, args, why):
    if args[0] == "--out":
        pytest.importorskip("matplotlib", reason="draws the plots")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "foreign.json").write_text('{"mine": 1}')
    code, out, err = bench(*args)
    assert (code, out) == (2, "")
    assert err.startswith("fastconv bench: error: ") and why in err
    assert (tmp_path / "foreign.json").read_text() == '{"mine": 1}' and len(list(tmp_path.iterdir())) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_bench_command_says_when_there_is_no_gpu(bench, few):
    code, _, err = bench("--device", "cuda")
    assert code == 2 and "device 'cuda' can't be used" in err


def test_bench_command_results_of_another_device_are_left_alone(bench, few, tmp_path):
    path = tmp_path / "a.json"
    bench("--json", path, "--filter", "step")
    results.save(path, {**results.load(path), "device": "another"})
    before = path.read_bytes()
    code, _, err = bench("--json", path)
    assert code == 2 and "holds results of another, and this is" in err and path.read_bytes() == before


def test_bench_command_plots_need_matplotlib(bench, few, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    from fastconv.bench.plots import picture

    monkeypatch.setattr(picture, "find_spec", lambda name: None)
    code, _, err = bench("--out", tmp_path / "out")
    assert code == 2 and "plots need matplotlib" in err and not (tmp_path / "out").exists()


def test_bench_as_tests_of_pytest_benchmark(tmp_path):
    pytest.importorskip("pytest_benchmark", reason="the plugin is not installed")
    name = next(case.name for case in every_case.cases(CPU) if case.name.startswith("bias+residual+layer_norm infer"))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", ROOT / "bench", "--benchmark-only"]
    command += ["-k", f"{name.replace(' ', '-')}-", "--benchmark-max-time=0.01", "--benchmark-min-rounds=1"]
    command += [f"--benchmark-json={tmp_path / 'out.json'}", "-c", ROOT / "pyproject.toml"]
    command += ["-p", "no:xdist", "-p", "no:hypothesispytest"]
    # Told that it is a worker of pytest-xdist it would time nothing.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "out.json").read_text())["benchmarks"]
    assert [each["group"] for each in found] == [name] * 2
    assert [each["name"].rpartition("-")[2] for each in found] == ["fastconv]", "torch]"]
    for each in found:
        info = each["extra_info"]
        assert info["bytes_per_s"] == pytest.approx(info["bytes"] / each["stats"]["median"])
