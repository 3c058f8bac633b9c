"""`fastconv bench --compare`: a kernel that got slower is told, the noise of another run is not."""

from __future__ import annotations

import copy
import json
import random
import statistics
import time

import pytest
import torch
from made_results import made_results, model_record, op_record

from fastconv import cli
from fastconv.bench import compare, layer_norm_cases, run
from fastconv.bench.roofs import Roofs
from fastconv.bench.shapes import Place

CPU = torch.device("cpu")


def results(*records, cuda=True, **other):
    """Results of a made-up device with these records."""
    return {**made_results(cuda=cuda), "records": {r["case"]: copy.deepcopy(r) for r in records}, **other}


def record(**changes):
    return op_record("layer_norm", "BERT base", "infer", 8, 512, cuda=False) | changes


def scaled(record, by, labels=("fastconv",), kind=""):
    """The same case where some labels take `by` times as long; kind: "graph_" of their replays, "host_" of the CPU."""
    found = copy.deepcopy(record)
    seconds, ratios = found[f"{kind}seconds"], found[f"{kind}ratios"]
    for label in labels:
        seconds[label] = {k: by * v for k, v in seconds[label].items()}
    for label, ratio in ratios.items():
        factor = (by if label in labels else 1) / (by if "fastconv" in labels else 1)
        ratios[label] = {k: factor * v for k, v in ratio.items()}
    return found


def verdicts(found):
    return {(finding.case, finding.label): finding.verdict for finding in found.findings}


def only(found):
    (finding,) = found.findings
    return finding


@pytest.fixture
def measured(monkeypatch):
    """Measures a small case on the CPU, with an op of one's own or as it is."""
    case = layer_norm_cases.LayerNormCase(Place("", 4, 64), torch.float32, "infer", channels=384, fused=False)
    right = layer_norm_cases.layer_norm
    rates = Roofs(1e10, {"float32": 1e11})

    def measure(op=right):
        monkeypatch.setattr(layer_norm_cases, "layer_norm", op)
        found = run.run_case(case, CPU, rates, rounds=25, compiled=False)
        assert "red" not in found
        return results(found, cuda=False)

    return measure


def test_compare_catches_a_slow_kernel_and_no_noise(measured):
    right = layer_norm_cases.layer_norm

    def slowly(*args, **kwargs):
        # By far: on a machine as busy as one that runs tests, several times the work may be within the spread.
        time.sleep(0.02)
        return right(*args, **kwargs)

    first, again, slow = measured(), measured(), measured(slowly)
    assert compare.compare(first, again).regressions == []
    (finding,) = compare.compare(first, slow).regressions
    assert finding.verdict == "slower" and finding.change > 0.4
    assert "torch" in finding.by and "copy" in finding.by
    assert only(compare.compare(slow, first)).verdict == "faster"


def test_compare_equal_runs_with_noise_are_the_same():
    # 200 cases, times with a spread of 10 %, in two runs of which the second's machine is three times slower.
    draw, typical = random.Random(0), {"fastconv": 1e-3, "HF": 2e-3, "copy": 5e-4}

    def noisy(scale):
        records = []
        for number in range(200):
            rounds = [
                {label: scale * t * draw.lognormvariate(0, 0.1) for label, t in typical.items()} for _ in range(15)
            ]
            spreads = {}
            for label in typical:
                low, middle, high = statistics.quantiles([r[label] / r["fastconv"] for r in rounds])
                spreads[label] = {"median": middle, "low": low, "high": high}
            seconds = {label: dict.fromkeys(("median", "low", "high"), 1.0) for label in spreads}
            del spreads["fastconv"]
            records.append(record(case=f"case {number}", seconds=seconds, ratios=spreads, peak_bytes={}))
        return results(*records, cuda=False)

    found = compare.compare(noisy(1.0), noisy(3.0))
    assert len(found.findings) == 200 and found.regressions == []


def test_compare_needs_both_the_threshold_and_the_spread():
    base = record()
    slower = scaled(base, 1.10)
    assert only(compare.compare(results(base, cuda=False), results(slower, cuda=False))).verdict == "slower"
    small = compare.compare(results(base, cuda=False), results(slower, cuda=False), threshold=0.2)
    assert only(small).verdict == "same"
    wide = copy.deepcopy(slower)
    for ratio in wide["ratios"].values():
        ratio["high"] *= 1.2
    assert only(compare.compare(results(base, cuda=False), results(wide, cuda=False))).verdict == "same"


def test_compare_on_a_cpu_needs_most_rivals_to_agree():
    base = record()
    assert set(base["ratios"]) == {"torch", "torch compile", "copy"}

    def judged(**factors):
        other = copy.deepcopy(base)
        for label, factor in factors.items():
            label = label.replace("_", " ")
            other["ratios"][label] = {k: v * factor for k, v in other["ratios"][label].items()}
        return only(compare.compare(results(base, cuda=False), results(other, cuda=False))).verdict

    assert judged(torch=0.7, torch_compile=0.7) == "slower"
    assert judged(torch=0.7) == "same"  # it is torch that is faster
    assert judged(torch=0.7, torch_compile=0.7, copy=1.4) == "same"
    assert judged(torch=1.4, copy=1.4) == "faster"
    # The times themselves say nothing there.
    everything = scaled(base, 3.0, labels=tuple(base["seconds"]))
    assert only(compare.compare(results(base, cuda=False), results(everything, cuda=False))).verdict == "same"


def test_compare_on_a_gpu_needs_time_and_ratios():
    base = op_record("layer_norm", "BERT base", "infer", 8, 512)

    def judged(other):
        time, *others = compare.compare(results(base), results(other)).findings
        assert time.label == "fastconv" and {found.verdict for found in others} == {"same"}
        return time

    slower = judged(scaled(base, 1.3))
    assert slower.verdict == "slower" and slower.change == pytest.approx(0.3)
    assert judged(scaled(base, 1.3, labels=tuple(base["seconds"]))).verdict == "same"  # the card's clock
    assert judged(scaled(base, 0.7, labels=("torch", "torch compile", "copy"))).verdict == "same"
    alone = {**scaled(base, 1.3), "ratios": {}}
    assert judged(alone).verdict == "slower" and "time alone" in judged(alone).by


ON_A_GPU = {"graph_": "fastconv, graph replay", "host_": "fastconv, cost on the CPU"}


@pytest.mark.parametrize("kind", ON_A_GPU)
def test_compare_finds_a_slower_replay_and_a_dearer_call(kind):
    base = op_record("layer_norm", "BERT base", "infer", 8, 512)
    everybody = tuple(base[f"{kind}seconds"])

    def changed(by, **options):
        found = compare.compare(results(base), results(scaled(base, by, kind=kind, **options)))
        assert len(found.findings) == 1 + len(ON_A_GPU)
        return [finding for finding in found.findings if finding.verdict != "same"]

    (slower,), (faster,) = changed(1.3), changed(0.7)
    assert (slower.label, slower.verdict, faster.verdict) == (ON_A_GPU[kind], "slower", "faster")
    assert slower.change == pytest.approx(0.3) and "torch +30 %" in slower.by and "copy +30 %" in slower.by
    # The card or its CPU is slower, or the rivals are faster, or it is within the spread.
    assert changed(1.3, labels=everybody) == changed(0.7, labels=everybody[1:]) == changed(1.04) == []


def test_compare_tells_of_a_graph_that_is_lost():
    base = op_record("layer_norm", "BERT base", "infer", 8, 512)
    lost = copy.deepcopy(base)
    del lost["graph_seconds"]["fastconv"]
    lost["graph_ratios"] = {}
    (finding,) = (f for f in compare.compare(results(base), results(lost)).findings if f.verdict != "same")
    assert (finding.label, finding.verdict) == ("fastconv, graph replay", "not judged")
    lost["uncaptured"] = {"fastconv": "RuntimeError: operation not permitted when stream is capturing"}
    (finding,) = compare.compare(results(base), results(lost)).regressions
    assert (finding.label, finding.verdict) == ("fastconv, graph replay", "wrong")
    assert finding.by.startswith("failed: RuntimeError: operation not permitted")
    # Of a way that failed as a whole that is enough.
    for kind in ("seconds", "graph_seconds", "host_seconds"):
        base[kind]["fastconv compile"] = base[kind]["fastconv"]
    lost["broken"] = {"fastconv compile": "RuntimeError: no compiler"}
    found = [f for f in compare.compare(results(base), results(lost)).findings if "compile" in f.label]
    assert [(f.label, f.verdict, f.by) for f in found] == [
        ("fastconv compile", "wrong", "failed: RuntimeError: no compiler")
    ]


def test_compare_of_other_versions_counts_the_copy_alone():
    base = record()
    other = {**scaled(base, 0.5, labels=("torch", "torch compile")), "torch": "2.14.0"}
    found = compare.compare(results(base, cuda=False), results(other, cuda=False))
    assert only(found).verdict == "same" and only(found).by == "against copy +0 %"
    (warning,) = found.warnings
    assert warning.startswith("torch 2.13.0 in the first, 2.14.0 in the second (1 of 1 cases)")
    slow = {**scaled(base, 1.5), "torch": "2.14.0"}
    assert only(compare.compare(results(base, cuda=False), results(slow, cuda=False))).verdict == "slower"
    del other["ratios"]["copy"]
    found = compare.compare(results(base, cuda=False), results(other, cuda=False))
    assert only(found).verdict == "not judged" and "other versions" in only(found).by


def test_compare_tells_a_path_of_its_own_apart():
    base = model_record("ConvBERT base", "infer", 32, 512, "text")
    removed = copy.deepcopy(base)
    for figures in (removed["seconds"], removed["ratios"]):
        figures["fastconv remove"] = {k: 1.5 * v for k, v in figures["fastconv remove"].items()}
    found = verdicts(compare.compare(results(base), results(removed)))
    assert found[base["case"], "fastconv remove"] == "slower"
    assert found[base["case"], "fastconv"] == found[base["case"], "fastconv graphs"] == "same"


def test_compare_tells_of_a_path_of_its_own_that_is_lost():
    base = model_record("ConvBERT base", "infer", 32, 512, "text")
    lost = copy.deepcopy(base)
    for figures in (lost["seconds"], lost["ratios"], lost["tokens_per_s"]):
        del figures["fastconv graphs"]
    found = compare.compare(results(base), results(lost))
    (finding,) = (finding for finding in found.findings if finding.label == "fastconv graphs")
    assert (finding.verdict, finding.by) == ("not judged", "not in the second") and not found.regressions
    found = compare.compare(results(base), results({**lost, "broken": {"fastconv graphs": "RuntimeError: no"}}))
    (finding,) = found.regressions
    assert (finding.label, finding.verdict, finding.by) == ("fastconv graphs", "wrong", "failed: RuntimeError: no")


def test_compare_memory():
    base = record()

    def judged(**peaks):
        other = {**base, "peak_bytes": {**base["peak_bytes"], **peaks}}
        found = compare.compare(results(base, cuda=False), results(other, cuda=False))
        return [finding.verdict for finding in found.findings]

    own = base["peak_bytes"]["fastconv"]
    assert judged(fastconv=int(1.2 * own)) == ["more memory", "same"]
    assert judged(fastconv=int(0.8 * own)) == ["less memory", "same"]
    assert judged(fastconv=int(1.03 * own)) == judged(fastconv=None) == ["same"]
    assert judged(torch=10 * own) == ["same"]
    tiny = {**base, "peak_bytes": {"fastconv": 64}}
    grown = {**base, "peak_bytes": {"fastconv": 640}}
    assert only(compare.compare(results(tiny, cuda=False), results(grown, cuda=False))).verdict == "same"


def test_compare_new_gone_and_red_cases():
    stays, goes, comes, breaks = (record(case=name) for name in ("stays", "goes", "comes", "breaks"))
    red = {key: breaks[key] for key in ("case", "kind", "op", "direction", "dtype")} | {"red": {"dx": "max error 1"}}
    found = compare.compare(results(stays, goes, breaks, cuda=False), results(stays, comes, red, cuda=False))
    assert (found.new, found.gone, found.red) == (["comes"], ["goes"], ["breaks"])
    (finding,) = found.regressions
    assert (finding.case, finding.verdict, finding.by) == ("breaks", "wrong", "dx: max error 1")
    back = compare.compare(results(red, cuda=False), results(breaks, cuda=False))
    assert only(back).verdict == "right again" and not back.regressions
    still = compare.compare(results(red, cuda=False), results(red, cuda=False))
    assert only(still).verdict == "not judged" and not still.regressions


def test_compare_refuses_what_makes_no_sense():
    base = record()
    with pytest.raises(
        ValueError, match=r"different devices can't be compared: 'Made-up CPU, 2 threads' and 'another'"
    ):
        compare.compare(results(base, cuda=False), results(base, cuda=False, device="another"))
    half = record(case="another", dtype="float16")
    with pytest.raises(
        ValueError, match=r"no case in common: 1 \(layer_norm bfloat16\) in the first, 1 \(.* float16\)"
    ):
        compare.compare(results(base, cuda=False), results(half, cuda=False))
    with pytest.raises(ValueError, match="threshold must be 0 or more, got -1"):
        compare.compare(results(base, cuda=False), results(base, cuda=False), threshold=-1)
    finding = only(compare.compare(results(base, cuda=False), results(scaled(record(tokens=7), 9), cuda=False)))
    assert finding.verdict == "not judged" and "tokens 4096 and 7" in finding.by


@pytest.mark.parametrize("terminal", [False, True])
def test_compare_command(tmp_path, capsys, monkeypatch, terminal):
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal)
    monkeypatch.setenv("COLUMNS", "200")
    first = made_results(cuda=False)
    second = copy.deepcopy(first)
    slow = "layer_norm infer BERT base 8x512 float32"
    second["records"][slow] = scaled(second["records"][slow], 2.0)
    second["records"]["[bold]new[/bold]"] = record(case="[bold]new[/bold]")
    for name, found in (("a", first), ("b", second)):
        (tmp_path / f"{name}.json").write_text(json.dumps(found))
    a, b = str(tmp_path / "a.json"), str(tmp_path / "b.json")

    assert cli.main(["bench", "--compare", a, b]) == 1
    told = capsys.readouterr().out
    (line,) = (line for line in told.splitlines() if slow in line)
    assert "slower" in line and "+100 %" in line and "torch +100 %" in line
    assert "new: 1 cases\n  [bold]new[/bold]" in told
    assert "red in the second: 1 cases" in told
    assert "1 slower, " in told and "(threshold 5 %)" in told
    assert cli.main(["bench", "--compare", a, b, "--threshold", "150"]) == 0
    assert "slower" not in capsys.readouterr().out
    assert cli.main(["bench", "--compare", a, a]) == 0
    assert "both are of the same sources and versions" in capsys.readouterr().out


def test_compare_command_with_bad_input(tmp_path, capsys):
    assert cli.main(["bench", "--compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 2
    assert "a.json" in capsys.readouterr().err
