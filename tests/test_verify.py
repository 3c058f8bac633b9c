"""`fastconv verify`: what it computes, prints and writes, and that it can fail."""

from __future__ import annotations

import importlib.util
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import TEXT, run, save

import fastconv
from fastconv import models, parity
from fastconv.nn import padding_free
from fastconv.nn.attention import SelfAttention
from fastconv.nn.feed_forward import ResidualOutput
from fastconv.parity import measure, paths, results
from fastconv.progress import ProgressBar
from fastconv.tolerance import Comparison

TRANSFORMERS = importlib.util.find_spec("transformers") is not None
needs_transformers = pytest.mark.skipif(not TRANSFORMERS, reason="the package transformers is not installed")
needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="the package matplotlib is not installed"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a BertModel."""
    return save(tmp_path / "tiny-bert")


@pytest.fixture
def native():
    """Ops run natively: what is tested is not the kernels, and their interpreter is slow."""
    with fastconv.backend("native"):
        yield


def spoil(monkeypatch: pytest.MonkeyPatch, amount: float, forward_class: type = ResidualOutput) -> None:
    """Add an error to every call of a fused forward."""
    original = forward_class.forward

    def wrong(self, *args, **kwargs):
        out = original(self, *args, **kwargs)
        return (out[0] + amount, *out[1:]) if isinstance(out, tuple) else out + amount

    monkeypatch.setattr(forward_class, "forward", wrong)


def expected_paths() -> list[str]:
    return ["reference", *(["transformers", "transformers + accelerate"] if TRANSFORMERS else []), "fastconv"]


@pytest.mark.parametrize(
    "name",
    ["BertModel", "BertForMaskedLM", "BertForSequenceClassification", "BertForQuestionAnswering",
     "BertForMultipleChoice", "BertForPreTraining", "BertLMHeadModel", "BertForNextSentencePrediction",
     "ConvBertModel", "ConvBertForTokenClassification", "ConvBertForMultipleChoice",
     "RoCBertModel", "RoCBertForPreTraining", "RoCBertForCausalLM", "RoCBertForSequenceClassification"],
)  # fmt: skip
def test_verify_runs_every_path_of_every_class(name, tmp_path, native):
    folder = save(tmp_path, name, is_decoder=name.endswith(("LMHeadModel", "CausalLM")))
    result = fastconv.parity.verify(folder, text=TEXT, batch=4, rounds=1)
    assert result.class_name == name and result.source == "checkpoint" and result.dtype == "float32"
    assert [row.path.partition(" (")[0] for row in result.rows] == expected_paths()
    assert [row.ours for row in result.rows] == [path.endswith(("accelerate", "fastconv")) for path in expected_paths()]
    for row in result.rows:
        assert row.comparison.ok and 0 < row.comparison.max_error < 1e-4, row.path
        assert row.peak_bytes > 0 and bool(row.replaced) is row.ours
    assert result.ok and [note for note in result.notes if "transformers is not installed" not in note] == []
    assert result.parameters == sum(p.numel() for p in getattr(models, name).from_pretrained(tmp_path).parameters())


@pytest.mark.parametrize(
    "name",
    ["BertModel", "BertForPreTraining", "BertForSequenceClassification", "BertForMultipleChoice",
     "BertForQuestionAnswering", "ConvBertModel", "ConvBertForMaskedLM", "ConvBertForMultipleChoice",
     "ConvBertForQuestionAnswering", "RoCBertModel", "RoCBertForSequenceClassification"],
)  # fmt: skip
def test_padding_removed(name, tmp_path, native):
    result = parity.verify(save(tmp_path, name), text=TEXT, batch=4, padding="remove", rounds=2)
    found = [row.path for row in result.rows]
    removed = [path for path in found if path.endswith(", no padding")]
    assert [path.partition(" (")[0] for path in found if path not in removed] == expected_paths()
    assert removed == [f"{path}, no padding" for path in expected_paths() if path.endswith(("accelerate", "fastconv"))]
    for row in result.rows:
        kept = result.kept(row)
        assert row.comparison.ok and 0 < row.comparison.max_error < 1e-4, row.path
        assert kept is None if row.path not in removed else f"{kept.path}, no padding" == row.path
        assert bool(row.replaced) is row.ours
        assert kept is None or sum(row.replaced.values()) > sum(kept.replaced.values())
    assert result.ok and result.padding > 0.1
    assert [row["vs_keep"] for row in result.to_dict()["rows"]] == [
        None if (kept := result.kept(row)) is None else row.speedup(kept) for row in result.rows
    ]


def test_padding_removed_is_told_and_can_fail(tmp_path, native, capsys, monkeypatch):
    folder = save(tmp_path, "ConvBertModel")
    arguments = ("verify", folder, "--batch", 4, "--rounds", 1, "--text", "-", "--padding")

    def verify(padding: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(TEXT))
        return run(capsys, *arguments, padding)

    code, out, _ = verify("remove")
    assert code == 0 and "errors: of tokens, against" in out and "\nfastconv, no padding  " in out
    (ratio,) = (line for line in out.splitlines() if line.startswith("fastconv, no padding: "))
    assert ratio.endswith("x of fastconv") and float(ratio.split()[3].removesuffix("x")) > 0
    code, out, _ = verify("keep")
    assert code == 0 and "no padding" not in out.partition("speed:")[0] + out.partition("peak MB  ")[2]
    # With its padding a sequence of ConvBERT is not what it is alone.
    monkeypatch.setattr(padding_free.PaddingFree, "_packing", lambda self, given: None)
    code, out, _ = verify("remove")
    assert code == 1 and "FAIL: " in out and "fastconv, no padding: max error" in out and "; fastconv: " not in out


@needs_transformers
def test_transformers_runs_with_sdpa_where_it_has_it(tmp_path, native):
    bert = parity.verify(save(tmp_path / "bert"), text=TEXT, batch=2, rounds=1)
    convbert = parity.verify(save(tmp_path / "convbert", "ConvBertModel"), text=TEXT, batch=2, rounds=1)
    assert bert.transformers.path == "transformers (sdpa)"
    assert convbert.transformers.path == "transformers (eager)"
    assert bert.rows[-1].replaced["BertSelfAttention"] == 2 and bert.rows[-2].replaced["BertSelfAttention"] == 2


def test_verify_with_kernels(folder):
    # With "auto" the kernels run: on the GPU, or in the interpreter.
    result = parity.verify(folder, text="A dog ran.", batch=1, rounds=1)
    assert result.ok and "riton" in result.ops


@pytest.mark.parametrize("dtype", ["bf16", "fp16", torch.bfloat16])
def test_truth_has_the_weights_as_the_dtype_holds_them(folder, native, dtype):
    result = parity.verify(folder, text=TEXT, batch=4, dtype=dtype, rounds=1)
    assert result.dtype == ("float16" if dtype == "fp16" else "bfloat16")
    # Rounding the weights of a truth in fp32 would cost several times as much.
    assert result.ok and result.reference.comparison.rms_error < 2 * torch.finfo(getattr(torch, result.dtype)).eps


@pytest.mark.parametrize("amount", [1e-4, float("nan")])
def test_verify_fails_when_a_fast_path_is_wrong(folder, native, monkeypatch, capsys, tmp_path, amount):
    spoil(monkeypatch, amount)
    file = tmp_path / "result.json"
    code, out, err = run(capsys, "verify", folder, "--batch", 4, "--rounds", 1, "--json", file)
    assert code == 1 and "FAIL" in out and "PASS" not in out and "Traceback" not in err
    record = json.loads(file.read_text())
    assert record["ok"] is False
    assert {row["path"].partition(" (")[0]: row["ok"] for row in record["rows"]} == {
        path: not path.endswith(("accelerate", "fastconv")) for path in expected_paths()
    }
    assert ("not finite" if amount != amount else " !") in out


@needs_transformers
def test_one_wrong_path_is_enough_to_fail(folder, native, monkeypatch):
    accelerate = paths.accelerate

    def only_theirs(model):
        accelerate(model)
        if type(model).__module__.startswith("transformers"):
            with torch.no_grad():
                model.encoder.layer[0].output.LayerNorm.bias += 1e-3
        return model

    monkeypatch.setattr(paths, "accelerate", only_theirs)
    result = parity.verify(folder, text=TEXT, batch=4, rounds=1)
    assert [row.comparison.ok for row in result.rows] == [True, True, False, True] and not result.ok


@needs_transformers
def test_transformers_own_error_does_not_decide(folder, native, monkeypatch):
    build = paths.build

    def spoiled(*args):
        built, missing = build(*args)
        with torch.no_grad():
            built[1].model.encoder.layer[0].output.LayerNorm.bias += 1e-3
        return built, missing

    monkeypatch.setattr(paths, "build", spoiled)
    result = parity.verify(folder, text=TEXT, batch=4, rounds=1)
    assert not result.transformers.comparison.ok and result.ok


def test_padding_is_compared(folder, native, monkeypatch):
    # An error at padding alone: the last position of the shorter sequence.
    original = SelfAttention.forward

    def wrong(self, hidden_states, attention_mask=None, *args, **kwargs):
        out = original(self, hidden_states, attention_mask, *args, **kwargs)
        context = out[0].clone()
        context[0, -1] += 1e-2
        return context, *out[1:]

    monkeypatch.setattr(SelfAttention, "forward", wrong)
    assert not parity.verify(folder, text="He sat.\n\nThey ran far away.", batch=2, rounds=1).ok


def test_accelerate_that_replaces_nothing_is_no_pass(folder, native, monkeypatch):
    monkeypatch.setattr(fastconv.swap, "_FORWARDS", {})
    with pytest.raises(RuntimeError, match="found nothing to replace"):
        parity.verify(folder, text=TEXT, batch=1, rounds=1)


def test_interleaved_is_interleaved():
    calls, told = [], []
    runs = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    times = measure.interleaved(runs, torch.device("cpu"), rounds=3, tell=told.append)
    assert calls == list("abcabcabc") == told
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 3, "b": 3, "c": 3}


def test_verify_times_every_path_in_every_round(folder, native, monkeypatch):
    calls = []
    monkeypatch.setattr(parity.job, "_run_all", lambda model, inputs: calls.append((id(model), len(inputs))))
    result = parity.verify(folder, text=TEXT, batch=2, rounds=3)
    paths_run = len(result.rows)
    timed = calls[2 * paths_run :]  # before it: memory, warm-up
    assert len(timed) == 3 * paths_run and timed[:paths_run] == timed[paths_run : 2 * paths_run]
    assert len({model for model, _ in timed[:paths_run]}) == paths_run
    assert {inputs for _, inputs in timed} == {result.timed} and len(result.shapes) > result.timed > 1
    assert all(len(row.seconds) == 3 for row in result.rows)


def test_peak_bytes_counts_what_lives_at_a_time():
    def three_in_turn():
        for _ in range(3):
            torch.ones(1000)  # freed before the next
        both = torch.ones(2000), torch.ones(3000)
        return sum(t.numel() for t in both)

    assert measure.peak_bytes(three_in_turn, torch.device("cpu")) == 4 * 5000


def test_row_and_result_arithmetic():
    def row(path, ours, seconds, **errors):
        values = {"max_error": 1.0, "max_allowed": 4.0, "rms_error": 1.0, "rms_allowed": 2.0, "scale": 1.0}
        return results.Row(path, ours, Comparison(**{**values, "finite": True, **errors}), seconds, 10, {})

    reference, own = row("reference", False, [2.0, 4.0, 9.0]), row("fastconv", True, [1.0, 1.0, 3.0])
    assert own.speedup(reference) == 3.0 and own.median_seconds == 1.0 and own.share == 0.5
    assert row("x", True, [1.0], max_error=8.0).share == 2.0
    assert row("x", True, [1.0], max_allowed=0.0, max_error=0.0).share == 0.5
    assert row("x", True, [1.0], finite=False).share == float("inf")
    result = results.Verification(
        "m", "BertModel", "checkpoint", 1, "float32", "cpu", "CPU", "ops", 1, [(2, 5), (2, 4), (2, 9)],
        [(5, 3), (4, 2), (9, 9)], 2, [reference, own], [], {}, "",
    )  # fmt: skip
    assert result.tokens == 14 and result.padding == pytest.approx(4 / 18)
    assert result.tokens_per_second(own) == 14.0 and result.transformers is None and result.reference is reference


def test_progress_is_told_up_to_the_end(folder, native):
    told = []
    result = parity.verify(folder, text=TEXT, batch=1, rounds=2, progress=lambda *step: told.append(step))
    done = [step[1] for step in told]
    assert done == list(range(len(told))) and told[-1] == ("done", len(told) - 1, len(told) - 1)
    assert sum(what.startswith("timing") for what, _, _ in told) == 2 * len(result.rows)


def test_without_transformers_the_rest_runs(folder, native, monkeypatch, capsys):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "transformers" else find_spec(name, *rest)
    )
    code, out, _ = run(capsys, "verify", folder, "--batch", 1, "--rounds", 1)
    assert code == 0 and "note: transformers is not installed, so its rows are left out" in out
    assert "accelerate" not in out


def test_pass_prints_the_table(folder, native, capsys):
    code, out, err = run(capsys, "verify", folder, "--batch", 2, "--rounds", 1)
    assert code == 0 and out.rstrip().endswith("PASS: every path of fastconv keeps the 2x rule")
    assert f"{folder}: BertModel, checkpoint"[-40:] in out and "1 interleaved round," in out
    header, *rows = [line for line in out.splitlines() if line.startswith((*expected_paths(), "path "))][: 1 + 4]
    for column in ("max error", "rms error", "of allowed", "tokens/s", "vs reference", "vs transformers", "peak MB"):
        assert column in header
    assert all(len(row) == len(header) for row in rows if "replaced" not in row)
    assert "fastconv replaced 2 BertSelfAttention" in out
    stages = err.splitlines()
    assert len(stages) == len(set(stages)) < 10 and "timing, 1 rounds ..." in stages, (
        "a line a stage, where no terminal is"
    )


def test_text_from_stdin(folder, native, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "stdin", io.StringIO("One dog.\n\nTwo dogs ran far."))
    code, _, _ = run(
        capsys, "verify", folder, "--text", "-", "--batch", 2, "--rounds", 1, "--json", tmp_path / "stdin.json"
    )
    (tmp_path / "two.txt").write_text("One dog.\n\nTwo dogs ran far.")
    again, _, _ = run(
        capsys, "verify", folder, "--text", tmp_path / "two.txt", "--batch", 2, "--rounds", 1, "--json",
        tmp_path / "file.json",
    )  # fmt: skip
    records = [json.loads((tmp_path / name).read_text()) for name in ("stdin.json", "file.json")]
    # [CLS] o ##n ##e d ##o ##g . [SEP], and the second.
    assert code == again == 0 and records[0]["lengths"][0] == [9, 16] == records[1]["lengths"][0]


def test_json_holds_everything(folder, native, capsys, tmp_path):
    file = tmp_path / "result.json"
    code, out, _ = run(capsys, "verify", folder, "--batch", 2, "--rounds", 2, "--json", file)
    record = json.loads(file.read_text())
    assert code == 0 and record["ok"] is True and record["command"].startswith("fastconv verify ")
    assert record["model"] == str(folder) and record["dtype"] == "float32" and record["device"] == "cpu"
    assert record["device_name"] and record["threads"] == torch.get_num_threads()
    assert record["versions"]["torch"] == torch.__version__ and record["versions"]["python"]
    assert record["date"].endswith("+00:00") and len(record["shapes"]) == len(record["lengths"]) >= record["timed"]
    assert [row["path"].partition(" (")[0] for row in record["rows"]] == expected_paths()
    for row in record["rows"]:
        errors = row["comparison"]
        assert 0 < errors["max_error"] <= errors["max_allowed"] and 0 < errors["rms_error"] <= errors["rms_allowed"]
        assert len(row["seconds"]) == 2 and min(row["seconds"]) > 0 and row["ok"] is True
        assert row["tokens_per_second"] == pytest.approx(record["tokens"] / (sum(row["seconds"]) / 2))
        assert f"{row['tokens_per_second']:,.0f}" in out and f"{errors['max_error']:.1e}" in out
    assert record["rows"][0]["vs_reference"] == 1.0


@needs_matplotlib
@pytest.mark.parametrize("wrong", [False, True])
def test_plot_is_a_png(folder, native, capsys, tmp_path, monkeypatch, wrong):
    if wrong:
        spoil(monkeypatch, float("nan"))
    file = tmp_path / "table.picture"
    code, _, _ = run(capsys, "verify", folder, "--batch", 2, "--rounds", 1, "--plot", file)
    assert code == int(wrong)
    header = file.read_bytes()[:24]
    assert header.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = int.from_bytes(header[16:20], "big"), int.from_bytes(header[20:24], "big")
    assert width > 1500 and 400 < height < width


def test_env_prints_versions_and_devices(capsys):
    code, out, _ = run(capsys, "env")
    told = {line[:18].strip(): line[18:] for line in out.splitlines()}
    assert code == 0 and told["torch"] == torch.__version__ and told["cpu"] and "layer_norm" in out


def test_help_and_missing_command(capsys):
    assert run(capsys, "verify", "--help")[0] == 0
    assert run(capsys, "nothing")[0] == 2 and run(capsys)[0] == 2


def test_importing_the_command_line_is_light():
    program = (
        "import fastconv.cli, sys; print([m for m in ('torch', 'transformers', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_progress_bar_on_a_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "50")
    with ProgressBar() as bar:
        bar("timing: fastconv", 3, 9)
        bar("timing: a path with a name that is long", 4, 9)
    first, second, cleared = terminal.getvalue().split("\r\x1b[K")[1:]
    assert first == f"|{'#' * 6:<20}| 3/9 timing: fastconv" and cleared == ""
    # 49 characters: what stands on a second line couldn't be taken away.
    assert second == f"|{'#' * 8:<20}| 4/9 timing: a path with a "
