"""The benchmarks: their counts of bytes and operations, their refusal of wrong results, `make gpu` without a GPU."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


@pytest.fixture
def bench(monkeypatch):
    """Imports a module of bench/ by name."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))  # as python does for the script gpu.py
    return lambda name: importlib.import_module(name if name == "gpu" else f"fastconv.bench.{name}")


def script(name: str, *args: object, **environment: str) -> subprocess.CompletedProcess:
    """Run a script of bench/ as on the command line, without the interpreter."""
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, ROOT / "bench" / name, *args]
    return subprocess.run(command, capture_output=True, text=True, env={**clean, **environment})


# By hand for 10 tokens of 4 channels in bf16: a tensor is 80 bytes, a vector 8, mean or rstd 40, a seed 8.
@pytest.mark.parametrize(
    ("direction", "fused", "bytes_", "flops_each"),
    [
        ("infer", False, 80 + 2 * 8 + 80, 7),  # x, weight and bias; y
        ("infer", True, 2 * 80 + 3 * 8 + 80, 9),  # x and residual, three vectors; y
        ("fwd", True, 2 * 80 + 3 * 8 + 8 + 2 * 80 + 2 * 40, 10),  # the same and the seed; y, z, mean and rstd
        ("bwd", False, 2 * 80 + 2 * 40 + 8 + 80 + 2 * 8, 13),  # dy, x, mean, rstd, weight; dx, dweight, dbias
        ("bwd", True, 2 * 80 + 2 * 40 + 8 + 8 + 2 * 80 + 3 * 8, 15),  # and the seed; dresidual and dx_bias too
    ],
)
def test_bench_layer_norm_counts(bench, direction, fused, bytes_, flops_each):
    case = bench("layer_norm_cases").LayerNormCase(10, 4, torch.bfloat16, direction, fused)
    assert case.bytes() == bytes_
    assert case.flops() == flops_each * 40


# By hand for 10 tokens of 2 heads of 4 channels and 3 taps in bf16: values are 160 bytes, logits 120, statistics 160.
@pytest.mark.parametrize(
    ("direction", "bytes_", "flops"),
    [
        ("infer", 160 + 120 + 160, 20 * (4 * 3 * 2 + 4 * 3)),
        ("fwd", 160 + 120 + 160 + 160, 20 * (4 * 3 * 2 + 4 * 3)),
        ("bwd", 2 * 160 + 120 + 160 + 160 + 120, 20 * (2 * 4 * 3 * 2 + 2 * 4 * 3)),
    ],
)
def test_bench_span_dynamic_conv_counts(bench, direction, bytes_, flops):
    case = bench("span_dynamic_conv_cases").SpanDynamicConvCase(2, 5, 2, 4, torch.bfloat16, direction, taps=3)
    assert case.bytes() == bytes_ and case.flops() == flops


def test_bench_span_kernel_logits_counts(bench):
    # By hand for 10 tokens of 8 channels, 4 in between, to 2 heads' 3 taps in bf16: 160 + 80 + 120 bytes and weights.
    case = bench("span_kernel_logits_cases").SpanKernelLogitsCase(2, 5, 8, 2, torch.bfloat16, taps=3)
    assert case.bytes() == 160 + 80 + 120 + 2 * (8 * 3 + 4 * 8 + 4 + 6 * 4 + 6)
    assert case.flops() == 10 * (8 * 3 * 2 + 8 * 4 * 2 + 4 * 2 + 4 * 6 * 2 + 6)


@pytest.mark.parametrize("direction", ["infer", "fwd", "bwd", "step"])
def test_bench_rivals_compute_the_same(bench, direction, monkeypatch):
    # Without dropout, what is timed computes the same thing.
    monkeypatch.setattr(bench("layer_norm_cases").LayerNormCase, "dropout_p", 0.0)
    monkeypatch.setattr(bench("embedding_norm_cases").EmbeddingNormCase, "dropout_p", 0.0)
    for case in bench("cases").cases(CPU, quick=True):
        if case.direction != direction:
            continue
        outputs = {k: run() for k, run in case.runs(CPU, compiled=False).items()}
        own = outputs.pop("fastconv")
        for rival, other in outputs.items():
            for a, b in zip(*(o if isinstance(o, tuple) else (o,) for o in (own, other)), strict=True):
                torch.testing.assert_close(
                    a, b, rtol=1e-3, atol=1e-3, msg=lambda m, what=(case.name, rival): f"{what}: {m}"
                )


def test_bench_layer_norm_targets(bench):
    def targets(tokens, direction, fused):
        return bench("layer_norm_cases").LayerNormCase(tokens, 768, torch.bfloat16, direction, fused).targets

    assert targets(16384, "infer", False) == {"copy": 0.9, "torch.compile": 1.0}
    assert targets(16384, "fwd", True) == {"torch.compile": 1.0}
    assert targets(16384, "bwd", True) == {"torch": 1.4}
    assert targets(128, "infer", False) == {}


@pytest.mark.parametrize("direction", ["infer", "fwd", "bwd"])
def test_bench_parity_replays_dropout(bench, direction):
    results = bench("layer_norm_cases").LayerNormCase(64, 96, torch.float32, direction, True).parity(CPU)
    expected = {"y"} if direction == "infer" else {"y", "dx", "dweight", "dbias", "dx_bias", "dresidual"}
    assert set(results) == expected
    assert all(result.ok for result in results.values()), results


def test_bench_refuses_figures_of_wrong_results(bench, monkeypatch, capsys):
    cases, run, roofs = bench("layer_norm_cases"), bench("run"), bench("roofs")
    right = cases.layer_norm
    monkeypatch.setattr(cases, "layer_norm", lambda *args, **kwargs: right(*args, **kwargs) + 1e-3)
    wrong = cases.LayerNormCase(16, 32, torch.float32, "infer", False)
    (record,) = run.run([wrong], CPU, roofs.Roofs(1.0, {}), rounds=1, compiled=False)
    assert "ms" not in record
    assert "max error" in record["red"]["y"]
    assert "RED, no figures: y: max error" in capsys.readouterr().out


def test_bench_broken_rival_is_reported_and_fastconv_raises(bench):
    working = bench("run")._working

    def broken():
        raise RuntimeError("no compiler\nhere")

    assert working({"fastconv": int, "torch": broken}) == ({"fastconv": int}, {"torch": "RuntimeError: no compiler"})
    with pytest.raises(RuntimeError, match="no compiler"):
        working({"fastconv": broken})


def test_bench_a_whole_piece_is_compiled_and_its_memory_measured(bench, monkeypatch, capsys):
    # Compiling takes long: here nothing is compiled.
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    case, run, roofs = bench("conv_branch_cases").ConvBranchCase, bench("run"), bench("roofs")
    for direction in ("infer", "step"):
        branch = case(2, 512, 2, 16, torch.float32, direction)
        (record,) = run.run([branch], CPU, roofs.Roofs(1.0, {}), rounds=1, compiled=True)
        assert set(record["ms"]) == {"fastconv", "HF", "torch.compile", "fastconv compiled", "copy"}
        assert set(record["ratios"]) == {"HF", "torch.compile", "copy", "HF / compiled", "HF memory"}
        assert set(branch.targets) <= set(record["ratios"])
        # The windows alone, 9 times the values, are more than all that fastconv has.
        assert 2 < record["ratios"]["HF memory"] < 20
        assert f"HF memory {record['ratios']['HF memory']:.2f}x" in capsys.readouterr().out


def test_bench_memory_is_a_ratio_of_peaks(bench):
    def run(numbers):
        return lambda: torch.zeros(numbers) + torch.zeros(numbers)

    runs = {"fastconv": run(1000), "HF": run(4000)}
    assert bench("run")._of_a_whole("HF", runs, {}, CPU) == {"HF memory": 4.0}
    assert bench("run")._of_a_whole("HF", {"fastconv": run(1000)}, {"fastconv": [1.0]}, CPU) == {}


def test_bench_gpu_timing_flushes_before_every_call(bench, monkeypatch):
    # Without a GPU: the order of events, and that seconds come out.
    timing, done = bench("timing"), []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            done.append("event")

        def elapsed_time(self, end):
            return 2.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: done.append("synchronize"))
    monkeypatch.setattr(timing, "_flush_buffer", lambda device: SimpleNamespace(zero_=lambda: done.append("flush")))
    runs = {"a": lambda: done.append("a"), "b": lambda: done.append("b")}
    times = timing.interleaved(runs, SimpleNamespace(type="cuda"), rounds=2, warmup=1)
    assert times == {"a": [2e-3, 2e-3], "b": [2e-3, 2e-3]}
    call = ["flush", "event", "{}", "event"]
    one_round = [step.format(label) for label in runs for step in call] + ["synchronize"]
    assert done == ["a", "b", *one_round, *one_round]


def test_bench_median_ratio_is_of_rounds(bench):
    # A slow round slows both: the ratio of the medians would be 4 / 10.
    assert bench("timing").median_ratio([2.0, 20.0, 4.0], [1.0, 10.0, 20.0]) == 2.0


def test_bench_quick_run_on_cpu(bench, tmp_path):
    done = script("run.py", "--device", "cpu", "--quick", "--json", tmp_path / "out.json", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.rstrip().endswith(f"{len(bench('cases').cases(CPU, quick=True))} cases, all right")
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["torch"] == torch.__version__
    assert written["roofs"]["copy"] > 0
    for record in written["records"]:
        rivals = set(record["ms"]) - {"fastconv", "copy"}
        assert rivals and all(record["ratios"][rival] > 0 for rival in rivals)
        assert ("HF memory" in record["ratios"]) == record["case"].startswith(("conv_branch", "masked_lm_loss"))
        rate = record["bytes"] / (record["ms"]["fastconv"] / 1e3)
        assert record["bytes_per_s"] == pytest.approx(rate)
        assert record["of_roof"] == pytest.approx(rate / written["roofs"]["copy"])


def test_bench_run_names_its_cases():
    done = script("run.py", "--device", "cpu", "--quick", "--filter", "nothing")
    assert done.returncode == 2
    assert "layer_norm infer 256x384 float32" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_bench_gpu_says_when_there_is_none():
    done = script("gpu.py")
    assert done.returncode == 2
    assert "no GPU found" in done.stderr
    done = script("run.py", "--device", "cuda")
    assert done.returncode == 2
    assert "no CUDA GPU found" in done.stderr


def test_bench_gpu_says_that_the_tests_need_pytest(bench, monkeypatch, capsys):
    gpu = bench("gpu")
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    assert gpu.run_tests(["tests"]).startswith("failed: pytest is not installed")
    assert "the tests need pytest" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="would be measured on the GPU")
def test_bench_gpu_dry_run_writes_nothing(bench):
    before = sorted((ROOT / "bench").rglob("*.json"))
    done = script("gpu.py", "--dry-run", "--tests", ROOT / "tests" / "test_tolerance.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tests passed: " in done.stdout
    assert f"{len(bench('cases').cases(CPU, quick=True))} cases to measure" in done.stdout
    assert "targets reached" in done.stdout
    assert sorted((ROOT / "bench").rglob("*.json")) == before


def test_bench_results_are_not_measured_twice(bench):
    measured = bench("gpu").measured
    origin = {"code": "abc", "torch": "2.13", "triton": "3.7"}
    assert measured({"ms": {}, **origin}, origin)
    assert not measured({"ms": {}, **origin}, {**origin, "code": "def"})
    assert not measured({"ms": {}, **origin}, {**origin, "triton": "3.9"})
    assert not measured({"red": {}, **origin}, origin)
    assert not measured({}, origin)


def test_bench_results_file_has_the_gpus_name(bench):
    assert bench("gpu").results_file("NVIDIA H200").name == "NVIDIA-H200.json"


def test_bench_report(bench):
    record = {
        "case": "layer_norm infer",
        "ms": {"fastconv": 0.5},
        "bytes_per_s": 4e12,
        "of_roof": 0.93,
        "ratios": {"copy": 0.92, "torch.compile": 0.8},
        "targets": {"copy": 0.9, "torch.compile": 1.0, "torch": 1.4},
        "code": "abc",
    }
    results = {"device": "a card", "tests": "passed: 3", "records": {"layer_norm infer": record}}
    text = bench("report").report(results, "abc")
    assert "copy 0.92x, want 0.90x;" in text
    assert "torch.compile 0.80x, want 1.00x MISSED;" in text
    assert "torch not measured, want 1.40x MISSED" in text
    assert text.endswith("1 of 3 targets reached")
    assert "of other sources" not in text
    assert "of other sources" in bench("report").report(results, "def")


@pytest.mark.parametrize("cwd", ["elsewhere", "the root"])
def test_checkout_without_installation(tmp_path, cwd):
    # A copy of the sources: the installation that runs this test is of other files.
    for folder in ("fastconv", "kernels", "reference", "bench"):
        shutil.copytree(ROOT / folder, tmp_path / "copy" / folder, ignore=shutil.ignore_patterns("__pycache__"))
    code = (
        f"import sys, subprocess; sys.path.insert(0, {str(tmp_path / 'copy' / 'bench')!r}); import checkout\n"
        "import fastconv.reference.ops, fastconv.kernels, fastconv.ops\n"
        "print(fastconv.__file__, fastconv.kernels.__file__)\n"
        "code = 'import fastconv.kernels; print(fastconv.__file__, fastconv.kernels.__file__)'\n"
        "print(subprocess.run([sys.executable, '-c', code], cwd='..', capture_output=True, text=True).stdout)\n"
    )
    where = tmp_path / "copy" if cwd == "the root" else tmp_path
    done = subprocess.run([sys.executable, "-c", code], cwd=where, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    package, kernels, *below = done.stdout.split()
    assert below == [package, kernels]
    assert kernels == package.replace("__init__", "kernels/__init__")
    # The temporary folder of links, gone with the process.
    assert not package.startswith(str(tmp_path))
    assert not Path(package).exists()
