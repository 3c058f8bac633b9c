"""Bad input of `fastconv verify`: one clear line, exit code 2, nothing computed and nothing left behind."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from tiny import run, save, write_vocab

from fastconv import cli, parity
from fastconv.parity import environment, plot


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a BertModel."""
    return save(tmp_path / "tiny-bert")


BAD = [
    (["nonsense"], "'nonsense' is neither an existing folder nor a hub id .*, nor one of convbert-base, "),
    (["{tmp}/missing"], "missing' is neither an existing folder"),
    (["{tmp}"], "no config.json in"),
    (["{file}"], "expected a checkpoint folder, got the file"),
    (["{gpt}"], "model_type must be 'bert' or 'convbert' or 'roc_bert', got 'gpt2'"),
    (["{wordless}"], "no tokenizer.json and no vocab.txt"),
    (["{weightless}"], "no model.safetensors, model.safetensors.index.json, .* or tf_model.h5 in"),
    (["{truncated}"], "model.safetensors' .*(truncated|whole|corrupt|invalid)"),
    (["{pickled}"], "is a pickle, .* safetensors"),
    (["{no_json}"], "config.json' .*JSON"),
    (["{odd_names}"], "architectures must be a list of names, got 5"),
    (["{many}"], "gives the id .*, but its config has vocab_size 70"),
    (["{folder}", "--text", "{tmp}/none.txt"], "--text: can't read .*No such file"),
    (["{folder}", "--text", "{tmp}"], "--text: can't read .*Is a directory"),
    (["{folder}", "--text", "{binary}"], "expected UTF-8 text, got the byte 0xff"),
    (["{folder}", "--text", "{blank}"], "the text is empty"),
    (["{folder}", "--text", "-"], "--text -: the text is empty"),
    (["{folder}", "--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
    (["{folder}", "--padding", "drop"], "argument --padding: invalid choice: 'drop'"),
    (["{folder}", "--batch", "0"], "batch must be at least 1, got 0"),
    (["{folder}", "--batch", "many"], "argument --batch: invalid int value: 'many'"),
    (["{folder}", "--length", "2"], "length must be at least 3, got 2"),
    (["{folder}", "--length", "21"], "length must be at most 20, .*got 21"),
    (["{folder}", "--rounds", "0"], "rounds must be at least 1, got 0"),
    (["{folder}", "--threads", "0"], "threads must be at least 1, got 0"),
    (["{folder}", "--device", "toaster"], "device 'toaster' can't be used"),
    (["{folder}", "--device", "meta"], "device 'meta' can't be used"),
    (["{folder}", "--json", "{tmp}/no/x.json"], "--json: can't write .*No such file"),
    (["{folder}", "--json", "{tmp}"], "--json: can't write .*Is a directory"),
    (["{folder}", "--plot", "{tmp}/no/x.png"], "--plot: can't write|--plot needs matplotlib"),
    (["{folder}", "--colour"], "unrecognized arguments: --colour"),
    ([], "the following arguments are required: MODEL"),
]


SPOILT = ("weightless", "truncated", "pickled", "no_json", "odd_names")


def spoil(arguments: list[str], tmp_path: Path) -> None:
    """Make the checkpoint folder that the arguments name, with one thing wrong."""
    name = arguments[0].strip("{}") if arguments else ""
    if name not in SPOILT:
        return
    folder = save(tmp_path / name)
    weights, config = folder / "model.safetensors", folder / "config.json"
    if name == "weightless":
        weights.unlink()
    elif name == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif name == "pickled":
        torch.save({"a": torch.zeros(1)}, weights)
    elif name == "no_json":
        config.write_text("model_type: bert")
    else:
        config.write_text(json.dumps({**json.loads(config.read_text()), "architectures": 5}))


@pytest.mark.parametrize(
    ("arguments", "message"), BAD, ids=lambda value: " ".join(value) if type(value) is list else ""
)
def test_bad_input_is_one_clear_line(arguments, message, tmp_path, capsys, monkeypatch):
    if any("{folder}" in argument for argument in arguments):
        save(tmp_path / "folder")
    if arguments == ["{many}"]:
        write_vocab(save(tmp_path / "many"), [*map(str, range(80)), "the"])
    if arguments == ["{wordless}"]:
        (save(tmp_path / "wordless") / "vocab.txt").unlink()
    spoil(arguments, tmp_path)
    if arguments == ["{gpt}"]:
        (tmp_path / "gpt").mkdir()
        (tmp_path / "gpt" / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "file").write_text("x")
    (tmp_path / "blank").write_text(" \n\n")
    (tmp_path / "binary").write_bytes(b"abc\xff\xfe")
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    monkeypatch.setattr(parity.job.Job, "run", lambda *args: pytest.fail("it ran"))
    names = {
        name: tmp_path / name for name in ("folder", "many", "wordless", "gpt", "file", "blank", "binary", *SPOILT)
    }
    before = sorted(tmp_path.rglob("*"))
    code, out, err = run(capsys, "verify", *(argument.format(tmp=tmp_path, **names) for argument in arguments))
    assert code == 2 and not out and err.count("\n") == 1 and err.startswith("fastconv")
    assert "Traceback" not in err and re.search(message, err), err
    assert sorted(tmp_path.rglob("*")) == before, "nothing is left behind"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU")
def test_cuda_without_a_gpu(folder, capsys):
    code, _, err = run(capsys, "verify", folder, "--device", "cuda")
    assert code == 2 and "device 'cuda' can't be used" in err and err.count("\n") == 1


def test_a_dtype_that_the_device_lacks(folder, capsys, monkeypatch):
    def unsupported(*args, **kwargs):
        raise RuntimeError("\"slow_conv\" not implemented for 'Half'")

    monkeypatch.setattr(environment.F, "conv1d", unsupported)
    code, _, err = run(capsys, "verify", folder, "--dtype", "fp16")
    assert code == 2 and "dtype fp16 can't be computed on cpu" in err and "use fp32 or bf16" in err


def test_out_of_memory_is_told(folder, capsys, monkeypatch):
    def full(*args):
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: 9 bytes\nstack"
        )

    monkeypatch.setattr(parity.job.Job, "run", full)
    code, _, err = run(capsys, "verify", folder)
    assert code == 2 and "try a smaller --batch or --length" in err and "stack" not in err


def test_a_bug_is_not_taken_for_bad_input(folder, monkeypatch):
    def broken(*args):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(parity.job.Job, "run", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        cli.main(["verify", str(folder)])


def test_plot_without_matplotlib_is_told_before_the_run(folder, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(plot, "find_spec", lambda name: None)
    monkeypatch.setattr(parity.job.Job, "run", lambda *args: pytest.fail("it ran"))
    code, _, err = run(capsys, "verify", folder, "--plot", tmp_path / "x.png")
    assert code == 2 and 'pip install "fastconv[plot]"' in err and not (tmp_path / "x.png").exists()


def test_a_file_that_exists_is_kept_until_the_result_replaces_it(folder, capsys, monkeypatch, tmp_path):
    (tmp_path / "old.json").write_text("old")
    monkeypatch.setattr(parity.job.Job, "run", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    code, _, err = run(capsys, "verify", folder, "--json", tmp_path / "old.json")
    assert code == 130 and "interrupted" in err and (tmp_path / "old.json").read_text() == "old"


@pytest.mark.parametrize(
    ("keywords", "message"),
    [({"batch": 0}, "batch must be at least 1, got 0"), ({"batch": 2.0}, "batch must be an int, got 2.0"),
     ({"dtype": "int8"}, "dtype must be one of fp32, bf16, fp16, got 'int8'"),
     ({"dtype": torch.int8}, "dtype must be one of"), ({"text": "\n"}, "the text is empty")],
)  # fmt: skip
def test_bad_arguments_of_the_function(folder, keywords, message):
    with pytest.raises((ValueError, TypeError), match=message):
        parity.verify(folder, **keywords)
