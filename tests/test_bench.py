"""What the benchmarks measure and store: timing, records, the refusal of wrong results, the files, `make gpu`."""

from __future__ import annotations

import csv
import ctypes
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_cases import TinyCase, TinyModel

from fastconv.bench import energy, passed_tests, progress, provenance, results, run, session, table, timing
from fastconv.bench.results import ResultsError
from fastconv.bench.roofs import Roofs

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
ROOFS = Roofs(1e9, {"float32": 1e10})


class Silent:
    def start(self, *args):
        pass

    def finish(self, record):
        pass


def record_of(case, **options):
    (record,) = run.run([case], CPU, ROOFS, Silent(), **{"rounds": 2, "compiled": False, **options})
    return record


# Timing


def test_bench_gpu_timing_flushes_before_every_call(monkeypatch):
    # Without a GPU: the order of events, and that seconds come out.
    done = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            done.append("event")

        def elapsed_time(self, end):
            return 2.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(timing, "synchronize", lambda device: done.append("synchronize"))
    monkeypatch.setattr(timing, "_flush_buffer", lambda device: SimpleNamespace(zero_=lambda: done.append("flush")))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: done.append(f"spin {cycles / 2e9:g} s"))
    runs = {"a": lambda: done.append("a"), "b": lambda: done.append("b")}

    def order(*call):
        done.clear()
        times = timing.interleaved(runs, SimpleNamespace(type="cuda"), rounds=2, warmup=1, hides_host=len(call) > 4)
        assert times == {"a": [2e-3, 2e-3], "b": [2e-3, 2e-3]}
        one_round = [step.format(label) for label in runs for step in call] + ["synchronize"]
        before = ["a", "b", "synchronize"]
        assert done[:3] == before and done[-2 * len(one_round) :] == 2 * one_round
        return done[3 : -2 * len(one_round)]

    assert order("flush", "event", "{}", "event") == []
    # Busy for twice as long as the slower of the two takes to be queued, but not forever.
    monkeypatch.setattr(timing, "host_seconds", lambda runs, device, rounds: {"a": [1e-3], "b": [3e-3]})
    assert order("flush", "spin 0.006 s", "event", "{}", "event") == []
    monkeypatch.setattr(timing, "host_seconds", lambda runs, device, rounds: {"a": [1.0]})
    assert order("flush", "spin 0.02 s", "event", "{}", "event") == []


def test_bench_host_cost_waits_for_nothing_queued_before(monkeypatch):
    done = []
    monkeypatch.setattr(timing, "synchronize", lambda device: done.append("synchronize"))
    clock = iter(range(100))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    found = timing.host_seconds({"a": lambda: done.append("a")}, SimpleNamespace(type="cuda"), rounds=2)
    assert done == ["synchronize", "a", "synchronize", "a", "synchronize"]
    assert found == {"a": [1, 1]}  # one step of the clock each, whatever the wait takes


def test_bench_what_cant_be_captured_has_no_graph(monkeypatch):
    def record(function):
        if function is refused:
            raise RuntimeError("operation not permitted when stream is capturing")
        return lambda: "replayed"

    def refused():
        pass

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    found, why = timing.graphs({"a": lambda: None, "b": refused}, SimpleNamespace(record=record))
    assert list(found) == ["a"] and found["a"]() == "replayed"
    assert list(why) == ["b"] and "not permitted" in str(why["b"]) and why["b"].__traceback__ is None


@pytest.mark.parametrize(
    ("seconds", "device", "rounds"),
    [(1e-4, "cpu", 50), (0.1, "cpu", 10), (0.04, "cuda", 17), (1.0, "cpu", 5), (9, "cpu", 3)],
)
def test_bench_what_takes_long_has_fewer_rounds(seconds, device, rounds):
    assert timing.enough(seconds, torch.device(device)) == rounds


def test_bench_ratio_is_of_rounds():
    # A slow round slows both: the ratio of the medians would be 4 / 10.
    assert timing.ratio([2.0, 20.0, 4.0], [1.0, 10.0, 20.0])["median"] == 2.0
    assert timing.spread([5.0, 1.0, 2.0, 3.0, 4.0]) == {"low": 2.0, "median": 3.0, "high": 4.0}
    assert timing.spread([1.0]) == {"low": 1.0, "median": 1.0, "high": 1.0}


def test_bench_nearer_roof():
    # A second of copying, two of products; in a dtype without a roof of products the copy's is the only one.
    assert ROOFS.nearer(10**9, 2 * 10**10, "float32") == ("matmul", 2.0)
    assert ROOFS.nearer(3 * 10**9, 2 * 10**10, "float32") == ("copy", 3.0)
    assert ROOFS.nearer(10**9, 2 * 10**10, "bfloat16") == ("copy", 1.0)


def test_bench_joules_are_the_counters_difference_for_a_call(monkeypatch):
    # A counter that says 3 J more at each look, over a clock of a tenth of a second: eight calls are 0.8 s.
    asked, clock = [], iter(i / 10 for i in range(1000))

    class Driver:
        def __getattr__(self, name):
            def ask(*args):
                asked.append(name)
                if name == "nvmlDeviceGetTotalEnergyConsumption":
                    args[1]._obj.value = 3000 * asked.count(name)
                return 0

            return ask

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver())
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="abc"))
    monkeypatch.setattr(energy, "synchronize", lambda device: None)
    monkeypatch.setattr(energy.time, "perf_counter", lambda: next(clock))
    calls = []
    found = energy.joules(lambda: calls.append(1), torch.device("cuda"))
    before = calls_of(0.2)
    assert found == 3 / (len(calls) - before) and len(calls) > before
    assert energy.joules(lambda: None, CPU) is None
    monkeypatch.setattr(ctypes, "CDLL", lambda name: (_ for _ in ()).throw(OSError("no driver")))
    assert energy.joules(lambda: None, torch.device("cuda")) is None


def calls_of(seconds: float) -> int:
    """Calls in so many seconds on a clock that goes on a tenth at each look; the first look is the start."""
    return round(10 * seconds) - 1


# Records


def test_bench_record_of_an_op():
    record = record_of(TinyCase(64, "step", goals=(("torch", 0.1), ("torch memory", 0.5), ("other", 1.0))))
    assert {key: record[key] for key in ("case", "kind", "op", "direction", "model", "batch", "length", "tokens")} == {
        "case": "layer_norm step 64x16",
        "kind": "op",
        "op": "layer_norm",
        "direction": "step",
        "model": "tiny",
        "batch": 1,
        "length": 64,
        "tokens": 64,
    }
    assert set(record["seconds"]) == {"fastconv", "torch", "copy"}
    # The rival that fails says why, one that isn't there is nowhere, the target of memory is a ratio.
    assert record["broken"] == {"broken": "RuntimeError: no compiler"}
    assert set(record["ratios"]) == {"torch", "copy", "torch memory"}
    own = record["seconds"]["fastconv"]
    assert own["low"] <= own["median"] <= own["high"] and record["rounds"] == 2
    assert record["bytes_per_s"] == pytest.approx(record["bytes"] / own["median"])
    # On a CPU the roofs are those of the same rounds.
    of_copy = record["seconds"]["copy"]["median"] / own["median"]
    assert record["of_roof"] == pytest.approx(of_copy) if record["roof"] == "copy" else record["of_roof"] > of_copy
    assert set(record["peak_bytes"]) == {"fastconv", "torch"}
    # The rival copies x first.
    assert record["ratios"]["torch memory"]["median"] > 1
    assert not {"host_seconds", "graph_seconds", "tokens_per_s", "red"} & set(record)


def test_bench_record_of_a_model(monkeypatch):
    # Of each way's one joule a call.
    monkeypatch.setattr(run, "joules", lambda function, device: 1.0)
    record = record_of(TinyModel())
    assert (record["kind"], record["op"], record["lengths"], record["tokens"]) == ("model", "model", "text", 12)
    assert record["tokens_per_s"]["HF"] == pytest.approx(12 / record["seconds"]["HF"]["median"])
    assert set(record["seconds"]) == {"fastconv", "fastconv remove", "HF"}  # a copy says nothing about a model
    assert record["joules_per_token"] == dict.fromkeys(("fastconv", "fastconv remove", "HF"), 1 / 12)
    monkeypatch.setattr(run, "joules", lambda function, device: None)
    assert "joules_per_token" not in record_of(TinyModel())


def test_bench_compiled_rival_and_piece(monkeypatch):
    # Compiling takes long: here nothing is compiled.
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    record = record_of(TinyCase(64, whole=True, goals=(("torch / fastconv compile", 1.0),)), compiled=True)
    assert set(record["seconds"]) == {"fastconv", "torch", "torch compile", "fastconv compile", "copy"}
    assert record["ratios"]["torch / fastconv compile"]["median"] > 0


def test_bench_refuses_figures_of_wrong_results():
    record = record_of(TinyCase(16, off_by=1e-3))
    assert "max error" in record["red"]["y"]
    assert not {"seconds", "ratios", "bytes_per_s", "flops_per_s", "of_roof", "peak_bytes"} & set(record)


def test_bench_a_case_that_raises_doesnt_stop_the_others(monkeypatch):
    monkeypatch.setattr(TinyModel, "runs", lambda *args, **kwargs: 1 / 0)
    wrong, right = run.run([TinyModel(), TinyCase(8)], CPU, ROOFS, Silent(), rounds=1, compiled=False)
    assert wrong["red"] == {"raised": "ZeroDivisionError: division by zero"}
    assert "seconds" in right


def test_bench_a_case_too_large_for_the_device_is_left_out(monkeypatch, capsys):
    def too_large(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    monkeypatch.setattr(TinyModel, "parity", too_large)
    held = results.new({"device": "a card", "code": "abc", "torch": "2.13"})
    measuring = session.Session(held, [TinyModel(), TinyCase(8)])
    with progress.Progress() as told:
        measuring.measure(CPU, told, lambda: None, rounds=1, compiled=False, quick=True)
    assert list(held["records"]) == ["layer_norm infer 8x16"]
    assert not measuring.red and not measuring.left_out and measuring.too_large == [TinyModel().name]
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "too large" in line)
    assert line.endswith(
        f"{TinyModel().name}: left out, too large for this device: OutOfMemoryError: CUDA out of memory. "
        "Tried to allocate 9 GiB"
    )


def test_bench_only_some_of_our_own_ways_may_fail():
    def fails():
        raise RuntimeError("no")

    for label in ("HF", "fastconv compile", "fastconv graphs"):
        assert run._working({"fastconv": int, label: fails}) == ({"fastconv": int}, {label: "RuntimeError: no"})
    for label in ("fastconv", "fastconv remove"):
        with pytest.raises(RuntimeError, match="no"):
            run._working({"HF": int, label: fails})


def test_bench_a_product_is_no_path_of_a_model(monkeypatch):
    runs = {"fastconv": int, "matmul": int, "HF": int}
    monkeypatch.setattr(TinyModel, "runs", lambda self, device, compiled: runs)
    monkeypatch.setattr(TinyModel, "replays", lambda self, label, device: label == "HF")
    monkeypatch.setattr(run, "joules", lambda function, device: 1.0)
    record = record_of(TinyModel())
    assert set(record["seconds"]) == set(runs) and set(record["ratios"]) == {"matmul", "HF"}
    # Whose memory is kept from call to call has no peak.
    assert set(record["peak_bytes"]) == {"fastconv", "matmul"}
    assert set(record["tokens_per_s"]) == {"fastconv", "HF"}
    assert set(record["joules_per_token"]) == {"fastconv", "HF"}
    shown = table.plain({**made(), "records": {record["case"]: record}})
    assert "HF" in shown and "\nmatmul" not in shown.replace(" ", "")


def test_bench_a_backward_whose_forward_raises_is_the_rivals_failure():
    record = record_of(TinyCase(8, "bwd"))
    assert record["broken"] == {"broken": "RuntimeError: no compiler"} and "torch" in record["seconds"]


def test_bench_record_says_what_has_no_graph(monkeypatch):
    # Without a GPU: whose figures are kept, and that a file of them can be read.
    def refused():
        pass

    def capture(function):
        if function is refused:
            raise RuntimeError("operation not permitted when stream is capturing\nthat is all")
        return function

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    runs = {"fastconv": lambda: None, "fastconv graphs": lambda: None, "HF": refused, "copy": lambda: None}
    found = run._of_a_gpu(runs, CPU, SimpleNamespace(record=capture), 3)
    assert list(found["host_seconds"]) == list(runs) and set(found["host_ratios"]) == set(runs) - {"fastconv"}
    assert set(found["graph_seconds"]) == {"fastconv", "copy"} and set(found["graph_ratios"]) == {"copy"}
    assert found["uncaptured"] == {"HF": "RuntimeError: operation not permitted when stream is capturing"}
    held = made()
    held["records"]["masked_attention infer"] |= found
    assert results._wrong(held) is None
    # Where nothing can be captured, or fastconv can't.
    assert run._of_a_gpu({"HF": refused}, CPU, SimpleNamespace(record=capture), 3)["graph_seconds"] == {}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: events, graphs and the host's cost")
@pytest.mark.parametrize("direction", ["infer", "fwd", "bwd", "step"])
def test_bench_record_on_a_gpu(direction):
    (record,) = run.run([TinyCase(512, direction)], torch.device("cuda"), ROOFS, Silent(), rounds=3, compiled=False)
    assert "red" not in record, record["red"]
    for key in ("host_seconds", "graph_seconds"):
        assert {"fastconv", "torch"} <= set(record[key]), key
        assert set(record[key.replace("seconds", "ratios")]) == set(record[key]) - {"fastconv"}
    assert record["uncaptured"] == {}


def test_bench_what_doesnt_fit_into_the_time_is_left_out(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(run.time, "monotonic", lambda: clock.now)
    seconds = {"op": 10.0, "model": 30.0}

    def record(case, *args, **kwargs):
        kind = "model" if case.subject.op == "model" else "op"
        clock.now += seconds[kind]
        return {"case": case.name}

    monkeypatch.setattr(run, "_record", record)
    told = []
    teller = SimpleNamespace(
        start=lambda case, done, total, left: told.append((done, total, left)), finish=Silent().finish
    )
    cases = [TinyCase(1), TinyModel(), TinyCase(2), TinyModel("another"), TinyCase(3)]
    found = run.run(cases, CPU, ROOFS, teller, compiled=False, deadline=65.0)
    # After 50 s another model doesn't fit, one more op does.
    assert [each["case"] for each in found] == [cases[i].name for i in (0, 1, 2, 4)]
    # Nothing is known at first; then as long as the average so far, then as long as the others of the kind.
    assert told == [(0, 5, None), (1, 5, 40.0), (2, 5, 25.0), (4, 5, 10.0)]


# The results file


def test_bench_results_are_measured_once(monkeypatch):
    origin = {"device": "a card", "code": "abc", "torch": "2.13", "triton": "3.7", "transformers": "5.23"}
    held = results.new(origin)
    first = session.Session(held, [TinyCase(8), TinyCase(16, off_by=1.0)])
    first.measure(CPU, Silent(), lambda: None, rounds=1, compiled=False, quick=True)
    assert first.red == ["layer_norm infer 16x16"] and not first.left_out
    assert held["records"]["layer_norm infer 8x16"]["code"] == "abc"
    assert held["roofs"]["copy"] > 0 and "float32" in held["roofs"]["matmul"]
    cases = [TinyCase(8), TinyCase(16), TinyCase(24)]
    # What was wrong is measured again, and what there is no figure of.
    assert [case.tokens for case in session.Session(held, cases).todo] == [16, 24]
    assert session.Session(held, cases).left_out == ["layer_norm infer 16x16", "layer_norm infer 24x16"]
    assert len(session.Session(held, cases, again=True).todo) == 3
    for version in results.VERSIONS:
        assert len(session.Session({**held, version: "another"}, cases).todo) == 3


def test_bench_what_is_measured_again_is_kept_until_then(monkeypatch):
    monkeypatch.setattr(session.roofs, "measure", lambda device, quick: ROOFS)
    origin = {"device": "a card", "code": "abc", "torch": "2.13", "triton": "3.7", "transformers": "5.23"}
    held = results.new(origin)
    session.Session(held, [TinyCase(8)]).measure(CPU, Silent(), lambda: None, rounds=1, compiled=False, quick=True)
    before = dict(held["records"])
    again = session.Session(held, [TinyCase(8)], again=True)
    again.measure(CPU, Silent(), lambda: None, rounds=1, compiled=False, quick=True, minutes=-1.0)
    assert held["records"] == before and again.left_out == list(before)
    again.measure(CPU, Silent(), lambda: None, rounds=2, compiled=False, quick=True)
    assert held["records"].keys() == before.keys() and held["records"] != before and not again.left_out


def test_bench_results_that_go_on(tmp_path):
    origin = {"device": "a card", "code": "abc", "torch": "2", "triton": "3", "transformers": "5"}
    path = tmp_path / "new" / "results.json"
    assert results.resume(path, origin) == {"schema": 1, **origin, "records": {}}
    record = {**made()["records"]["model infer 8x512"], **origin, "case": "x"}
    results.save(path, {**results.new(origin), "tests": "passed", "records": {"x": record}})
    assert not list(path.parent.glob("*.part"))
    assert results.resume(path, origin)["records"] == {"x": record}
    kept = results.resume(path, {**origin, "code": "def"})
    assert kept["records"] == {"x": record} and kept["code"] == "def" and kept["tests"] == "passed"
    with pytest.raises(ResultsError, match="holds results of a card, and this is another: name another file"):
        results.resume(path, {**origin, "device": "another"})


def damaged(record) -> str:
    origin = {"device": "a card", "torch": "2.13", "code": "abc"}
    return json.dumps({**results.new(origin), "records": {"x": record}})


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (None, "can't read .*: No such file"),
        ("{", "is not JSON .*expected a file that `fastconv bench` wrote"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "holds no results"),
        ('{"name": "x"}', "holds no results"),
        ('{"records": []}', "has schema None, expected 1: another version of fastconv wrote it"),
        ('{"schema": 2, "records": {}}', "has schema 2, expected 1"),
        ('{"schema": 1, "records": []}', "damaged: records must be an object by case, got list"),
        ('{"schema": 1, "records": {}}', "damaged: device must be a string, got None"),
        (damaged({}), "the record of 'x' must be an object of that case"),
        (damaged({"case": "x"}), "the record of 'x' has neither seconds of fastconv nor why there are none"),
    ],
)
def test_bench_a_file_that_holds_no_results_is_refused(tmp_path, text, why):
    path = tmp_path / "file.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ResultsError, match=why):
        results.load(path)


@pytest.mark.parametrize("key", ["of_roof", "bytes_per_s", "flops_per_s", "roof", "kind", "model", "ratios"])
def test_bench_a_record_without_what_a_table_reads_is_refused(tmp_path, key):
    path, held = tmp_path / "file.json", made()
    path.write_text(json.dumps(held))
    assert results.load(path) == held
    del held["records"]["masked_attention infer"][key]
    path.write_text(json.dumps(held))
    with pytest.raises(ResultsError, match=rf"damaged: the record of 'masked_attention infer' has {key} None"):
        results.load(path)


@pytest.mark.parametrize(
    ("case", "wrong", "why"),
    [
        ("model infer 8x512", {"tokens_per_s": {"HF": None}}, "tokens_per_s {'HF': None}"),
        ("model infer 8x512", {"seconds": {"fastconv": {"median": 1.0}}}, "seconds {'fastconv': {'median': 1.0}}"),
        ("model infer 8x512", {"ratios": {}}, "ratios {}"),
        ("masked_attention infer", {"graph_seconds": 7}, "graph_seconds 7"),
        ("masked_attention infer", {"host_seconds": {"HF": 4e-5}}, "host_seconds {'HF': 4e-05}"),
        ("masked_attention fwd", {"red": "why"}, "red why"),
    ],
)
def test_bench_a_record_with_something_else_is_refused(tmp_path, case, wrong, why):
    path, held = tmp_path / "file.json", made()
    held["records"][case].update(wrong)
    path.write_text(json.dumps(held))
    with pytest.raises(ResultsError, match=f"damaged: the record of '{case}' has {re.escape(why)}"):
        results.load(path)


def spread(median: float) -> dict[str, float]:
    return {"median": median, "low": 0.98 * median, "high": 1.03 * median}


def made() -> results.Results:
    """Results with a figure of every kind, one case that is wrong and one that is of other code."""
    state = {"code": "abc", "torch": "2.13", "triton": "3.7", "transformers": "5.23"}
    fast = {
        "case": "masked_attention infer", "kind": "op", "op": "masked_attention", "direction": "infer",
        "model": "BERT base", "batch": 8, "length": 512, "tokens": 4096, "lengths": "full", "dtype": "bfloat16",
        "bytes": 10**6, "flops": 10**9, "bytes_per_s": 5e9, "flops_per_s": 5e12, "roof": "matmul", "of_roof": 0.33,
        "rounds": 9, "date": "2026-11-20", **state,
        "seconds": {"fastconv": spread(2e-4), "HF": spread(6e-4), "SDPA": spread(1e-4)},
        "ratios": {"HF": spread(3.1), "SDPA": spread(0.5)},
        "graph_seconds": {"fastconv": spread(1.5e-4), "HF": spread(5e-4)},
        "host_seconds": {"fastconv": spread(11e-6), "HF": spread(40e-6)},
        "peak_bytes": {"fastconv": 10**6, "HF": 10**7},
        "targets": {"HF": 1.8, "SDPA": 1.0, "FlexAttention": 1.0},
        "broken": {"FlexAttention": "RuntimeError: no compiler"},
        "uncaptured": {"SDPA": "RuntimeError: a copy to the host"},
    }  # fmt: skip
    slow = {**fast, "case": "masked_attention bwd", "ratios": {"HF": spread(1.5)}, "code": "def"}
    for key in ("graph_seconds", "host_seconds", "broken", "uncaptured", "targets"):
        del slow[key]
    wrong = {**slow, **state, "case": "masked_attention fwd", "red": {"y": "max error 3.1e-01", "dk": "max error nan"}}
    for key in ("seconds", "ratios", "bytes_per_s", "flops_per_s", "roof", "of_roof", "peak_bytes"):
        del wrong[key]
    model = slow | state | {
        "case": "model infer 8x512", "kind": "model", "op": "model",
        "seconds": {"fastconv": spread(2e-2), "HF": spread(5e-2)},
        "ratios": {"HF": spread(2.5)},
        "tokens_per_s": {"fastconv": 204800.0, "HF": 81920.0},
        "joules_per_token": {"fastconv": 4.1e-4, "HF": 9e-4},
        "targets": {"HF": 1.8},
    }  # fmt: skip
    origin = {
        "device": "a card",
        "python": "3.12",
        "commit": "c0ffee" * 5,
        "dirty": True,
        "tests": "passed: 3",
        **state,
    }
    roofs = {"copy": 3e12, "matmul": {"bfloat16": 6e14}}
    return {
        **results.new(origin),
        "tests": "passed: 3",
        "roofs": roofs,
        "records": {r["case"]: r for r in (fast, slow, wrong, model)},
    }


def test_bench_csv_has_a_row_for_each_label(tmp_path):
    held = made()
    results.write_csv(held, tmp_path / "out.csv")
    with open(tmp_path / "out.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    record = held["records"]["masked_attention infer"]
    own, rival, sdpa, flex = (row for row in rows if row["case"] == record["case"])
    assert [row["label"] for row in (own, rival, sdpa, flex)] == ["fastconv", "HF", "SDPA", "FlexAttention"]
    assert float(own["seconds"]) == 2e-4 and own["ratio"] == "" and own["batch"] == "8"
    assert float(own["of_roof"]) == 0.33 and rival["of_roof"] == "" and own["roof"] == "matmul"
    assert (float(rival["ratio"]), float(rival["ratio_low"])) == (3.1, 0.98 * 3.1)
    assert (float(rival["graph_seconds"]), sdpa["graph_seconds"]) == (5e-4, "")
    assert (float(rival["host_seconds"]), float(rival["peak_bytes"])) == (40e-6, 10**7)
    assert (flex["seconds"], flex["failed"]) == ("", "RuntimeError: no compiler")
    (red,) = (row for row in rows if row["case"] == "masked_attention fwd")
    assert (red["seconds"], red["failed"]) == ("", "y: max error 3.1e-01; dk: max error nan")
    (model,) = (row for row in rows if row["kind"] == "model" and row["label"] == "HF")
    assert (float(model["tokens_per_s"]), float(model["joules_per_token"])) == (81920.0, 9e-4)


def test_bench_code_state_is_of_what_figures_depend_on(monkeypatch, tmp_path):
    (tmp_path / "commands").mkdir()
    files = [tmp_path / name for name in ("swap.py", "cli.py", "commands/bench.py")]
    for file in files:
        file.write_text("1")
    package = SimpleNamespace(__path__=[str(tmp_path)], __name__="fastconv")
    monkeypatch.setattr(provenance, "_PACKAGES", (package,))
    monkeypatch.setattr("fastconv.kernels._configs.user_table", lambda: tmp_path / "configs.json")
    states = [provenance.code_state()]
    for file in reversed(files):
        file.write_text("2")
        states.append(provenance.code_state())
    assert states[0] == states[1] == states[2] != states[3]
    # What `fastconv tune` found.
    (tmp_path / "configs.json").write_text("{}")
    assert provenance.code_state() not in states


def test_bench_provenance():
    found = provenance.provenance(CPU, "fastconv bench")
    assert found["torch"] == torch.__version__ and found["command"] == "fastconv bench"
    assert str(found["device"]).endswith(f", {torch.get_num_threads()} threads") and found["capability"] is None


# The table


def test_bench_table():
    lines = table.plain(made()).splitlines()
    assert lines[:3] == [
        "a card; torch 2.13, triton 3.7, transformers 5.23, python 3.12; c0ffeec0ffee with changes, code abc",
        "roofs, measured in this run: copy 3,000.0 GB/s; matmul 600.00 TFLOP/s bfloat16",
        "tests passed: 3",
    ]
    rows = {line.split("  ")[0]: " ".join(line.split()) for line in lines}
    (columns,) = (line for line in lines if line.startswith("case ") and "SDPA" in line)
    assert " ".join(columns.split()) == "case ms spread GB/s TFLOP/s of roof graph ms host us HF SDPA FlexAttention"
    assert rows["infer"] == "infer 0.2000 ±3 % 5.000 5.000 33 % matmul 0.1500 11.00 3.10x 0.50x failed"
    # A rival that isn't there is blank, a wrong result has no figure.
    assert rows["bwd*"] == "bwd* 0.2000 ±3 % 5.000 5.000 33 % matmul 1.50x"
    assert rows["fwd"] == "fwd RED"
    assert "RED, no figures: y: max error 3.1e-01; dk: max error nan (masked_attention fwd)" in lines
    assert "FlexAttention failed in masked_attention infer: RuntimeError: no compiler" in lines
    assert "SDPA has no CUDA graph in masked_attention infer: RuntimeError: a copy to the host" in lines
    assert "* measured with other code or versions" in lines
    assert rows["model infer 8x512"] == "model infer 8x512 fastconv 20.00 ±3 % 204,800 33 % matmul 1.000 0.4100"
    (rival,) = (" ".join(line.split()) for line in lines if line.strip().startswith("HF "))
    assert rival == "HF 50.00 ±3 % 81,920 2.50x 10.00 0.9000"
    assert lines[-3:] == [
        "4 cases, 1 red",
        "missed: masked_attention infer: SDPA 0.50x, want 1.00x",
        "2 of 3 targets reached, 1 not measured",
    ]
    only = table.plain(made(), ["model infer 8x512"])
    assert "masked_attention" not in only and "1 cases, all right" in only
    assert table.summary(made()).splitlines() == [*lines[:3], *lines[-3:]]


def test_bench_table_on_a_terminal(monkeypatch, capsys):
    pytest.importorskip("rich", reason="draws the table")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "200")
    table.show(made())
    drawn = capsys.readouterr().out
    assert "───" in drawn and "masked_attention; under a rival's name" in drawn
    rows = [" ".join(line.split()) for line in drawn.splitlines()]
    assert "infer 0.2000 ±3 % 5.000 5.000 33 % matmul 0.1500 11.00 3.10x 0.50x failed" in rows
    # On a narrow one a case's name has a line of its own, and nothing is cut.
    monkeypatch.setenv("COLUMNS", "95")
    table.show(made())
    drawn = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    rows = [" ".join(line.split()) for line in drawn.splitlines()]
    at = rows.index("infer")
    assert rows[at + 1] == "0.2000 ±3 % 5.000 5.000 33 % matmul 0.1500 11.00 3.10x 0.50x failed"
    monkeypatch.setitem(sys.modules, "rich", None)
    table.show(made())
    assert capsys.readouterr().out == table.plain(made()) + "\n"


def test_bench_progress(monkeypatch, capsys):
    record = record_of(TinyCase(8))
    with progress.Progress() as plain:
        plain.start(TinyCase(8), 2, 7, 200.0)
        plain.finish(record)
    told = capsys.readouterr().err
    assert told.startswith("[3/7, 3 min left] layer_norm infer 8x16: ") and "broken failed" in told
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "250")
    with progress.Progress() as bar:
        bar.start(TinyCase(8), 2, 7, 50.0)
        bar.finish(record)
        bar.start(TinyCase(9), 3, 8, None)
        bar.finish(record_of(TinyCase(9, off_by=1.0)))
    right, wrong, told = capsys.readouterr().err.split("\r\x1b[K")[1:]
    assert right == f"|{'#' * 5:<20}| [3/7, 50 s left] layer_norm infer 8x16"
    assert wrong == f"|{'#' * 7:<20}| [4/8] layer_norm infer 9x16"
    # In the place of the bar, which nothing is left of.
    assert told.startswith("[4/8] layer_norm infer 9x16: RED, no figures: y: max error") and told.endswith("\n")


# make gpu


@pytest.fixture
def gpu(monkeypatch):
    """The script's module."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))  # as python does for a script
    # Of the pytest that it starts: plugins that take longer to load than the tests here.
    monkeypatch.setenv("PYTEST_ADDOPTS", "-p no:hypothesispytest -p no:benchmark")
    return importlib.import_module("gpu")


def script(name: str, *args: object, **environment: str) -> subprocess.CompletedProcess:
    """Run a script of bench/ as on the command line, without the interpreter."""
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, ROOT / "bench" / name, *args]
    return subprocess.run(command, capture_output=True, text=True, env={**clean, **environment})


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_bench_gpu_says_when_there_is_none(gpu, capsys):
    assert gpu.main([]) == 2
    assert "no GPU found" in capsys.readouterr().err


def test_bench_gpu_says_that_the_tests_need_pytest(gpu, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    assert gpu.run_tests(["tests"], tmp_path / "done", None).startswith("failed: pytest is not installed")
    assert "the tests need pytest" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="would be measured on the GPU")
def test_bench_gpu_dry_run_writes_nothing():
    # With the packages of the GPU machine: neither rich nor matplotlib, and of pytest no plugin.
    from fastconv.bench.cases import cases

    before = sorted((ROOT / "bench").rglob("*.json"))
    hide = "import sys; sys.modules |= dict.fromkeys(('rich', 'matplotlib', 'xdist')); sys.argv[0] = 'bench/gpu.py'; "
    hide += f"sys.path.insert(0, {str(ROOT / 'bench')!r}); import gpu; sys.exit(gpu.main())"
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", hide, "--dry-run", "--tests", ROOT / "tests" / "test_tolerance.py"],
        capture_output=True,
        text=True,
        env={**clean, "OMP_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    number = len(cases(CPU, quick=True))
    assert "tests passed: " in done.stdout
    assert f"{number} cases to measure" in done.stdout and f"{number} cases, all right" in done.stdout
    assert sorted((ROOT / "bench").rglob("*.json")) == before


def test_bench_gpu_runs_each_test_once(gpu, monkeypatch, tmp_path):
    # Side by side where pytest-xdist is there, then without it.
    monkeypatch.setattr(gpu, "_WORKERS", 1)
    file, done = tmp_path / "test_some.py", tmp_path / "done"
    wrong = "import pytest\ndef test_a(): pass\n@pytest.mark.skip\ndef test_b(): pass\ndef test_c(): assert {}\n"
    file.write_text(wrong.format(0))
    assert gpu.run_tests([str(file)], done, None).startswith("failed: 1 failed, 1 passed, 1 skipped")
    assert sorted(passed_tests.read(done).values()) == ["passed", "skipped"]
    # The others aren't run again: they would fail now.
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: name != "xdist" or None)
    file.write_text(wrong.format(1).replace("pass", "assert 0"))
    for _ in range(2):  # then there is none left
        assert gpu.run_tests([str(file)], done, None) == "passed: 2 passed, 1 skipped"


def test_bench_gpu_tests_that_take_too_long_go_on_later(gpu, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: name != "xdist" or None)
    file, done = tmp_path / "test_slow.py", tmp_path / "done"
    file.write_text("import time\ndef test_a(): pass\ndef test_b(): time.sleep(60)\n")
    # Whatever it has come to by then.
    assert gpu.run_tests([str(file)], done, 2.0).startswith("unfinished: ")
    assert not any("test_b" in name for name in passed_tests.read(done))


def test_bench_gpu_tests_that_passed_are_not_run_again(gpu, monkeypatch, tmp_path, capsys):
    held, ran, done = {}, [], tmp_path / "done"
    monkeypatch.setattr(gpu, "tests_state", lambda: "state")
    monkeypatch.setattr(gpu, "run_tests", lambda paths, done, seconds: ran.append(seconds) or "passed: 3 passed")
    gpu._test(held, ["tests"], done, 10.0, share=0.5)
    gpu._test(held, ["tests"], done, 10.0, share=0.5)
    assert ran == [300.0] and held == {"tests": "passed: 3 passed", "tests_code": "state"}
    assert "tests passed: 3 passed, with this code, in a run before" in capsys.readouterr().out
    done.write_text("passed of the old code\n")
    monkeypatch.setattr(gpu, "tests_state", lambda: "another")
    monkeypatch.setattr(gpu, "run_tests", lambda paths, done, seconds: f"failed: {done.exists()}")
    gpu._test(held, ["tests"], done, None, share=0.5)
    assert held["tests"] == "failed: False"


def test_bench_gpu_changes_nothing_where_nothing_is_left(gpu, monkeypatch, tmp_path, capsys):
    case = TinyCase(8)
    origin = provenance.provenance(CPU, "the first command")
    held = results.new({**origin, "date": "the first day", "tests": "passed: 3", "tests_code": "state"})
    held |= {"roofs": {"copy": 1e12, "matmul": {}}, "records": {case.name: record_of(case) | origin}}
    path = tmp_path / gpu.results_file(origin["device"]).name
    results.save(path, held)
    stored = path.read_bytes()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu, "provenance", lambda device, command: {**origin, "command": command})
    monkeypatch.setattr(gpu, "cases", lambda device, quick: [case])
    monkeypatch.setattr(gpu, "tests_state", lambda: "state")
    assert gpu.main(["--tests"]) == gpu.main([]) == 0
    assert path.read_bytes() == stored
    assert "0 cases to measure" in capsys.readouterr().out
    # With other code the tests count for nothing, and that is told; the figures stay those of the first day.
    monkeypatch.setattr(gpu, "tests_state", lambda: "another")
    assert gpu.main(["--tests"]) == 0
    assert results.load(path) == {**held, "tests": "not run"}


def test_bench_results_file_has_the_gpus_name(gpu):
    assert gpu.results_file("NVIDIA H200").name == "NVIDIA-H200.json"


@pytest.mark.parametrize("cwd", ["elsewhere", "the root"])
def test_checkout_without_installation(tmp_path, cwd):
    # A copy of the sources: the installation that runs this test is of other files.
    for folder in ("fastconv", "kernels", "reference", "bench"):
        shutil.copytree(ROOT / folder, tmp_path / "copy" / folder, ignore=shutil.ignore_patterns("__pycache__"))
    code = (
        f"import sys, subprocess; sys.path.insert(0, {str(tmp_path / 'copy' / 'bench')!r}); import checkout\n"
        "import fastconv.reference.ops, fastconv.kernels, fastconv.ops\n"
        "print(fastconv.__file__, fastconv.kernels.__file__)\n"
        "code = 'import fastconv, importlib.util; print(fastconv.__file__); '\n"
        "code += 'print(importlib.util.find_spec(\"fastconv.kernels\").origin)'  # not imported: torch takes its time\n"
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
