"""Launch configs: candidates, tables and their order, and `fastconv tune`: what it checks, times, keeps and refuses."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import time
import timeit
from dataclasses import asdict, replace

import pytest
import torch
from tiny import run

import fastconv
from fastconv.parity import shapes

pytest.importorskip("triton", reason="launch configs are of Triton kernels, and the package triton is not installed")

import triton

from fastconv import tuning
from fastconv.commands import tune
from fastconv.kernels import _configs, _launch, grouped_linear, layer_norm
from fastconv.kernels._attention import Masks
from fastconv.tuning import attention_cases, case, cases
from fastconv.tuning.judge import Judge
from fastconv.tuning.table import identity

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CARD = _launch.card(torch.empty(0, device=DEVICE))
HALF, SINGLE = torch.bfloat16, torch.float32

# What ConvBERT base asks for at 8 x 512, and BERT for what ConvBERT has not; and as little as the interpreter likes.
SHAPES = {
    "layer_norm_fwd": ((4096, 768), (6, 24)),
    "layer_norm_bwd": ((4096, 768), (6, 24)),
    "embedding_norm_fwd": ((4096, 768), (6, 12)),
    "embedding_norm_bwd_table": ((4096, 768), (6, 12)),
    "linear_act_fwd": ((4096, 3072), (6, 24)),
    "grouped_linear_fwd": ((4096, 2, 192, 768), (6, 2, 16, 16)),
    "grouped_linear_bwd_pre": ((4096, 3072), (6, 24)),
    "separable_conv_fwd": ((4096, 768, 9), (6, 12, 3)),
    "separable_conv_bwd_depthwise": ((4096, 768, 9), (6, 12, 3)),
    "separable_conv_bwd_gate": ((4096, 384), (6, 12)),
    "span_dynamic_conv_fwd": ((4096, 6, 64, 9), (6, 2, 4, 3)),
    "span_dynamic_conv_bwd": ((4096, 4, 48, 9), (6, 2, 4, 3)),
    "span_kernel_logits_fwd": ((4096, 768, 384, 54), (6, 16, 16, 6)),
    "masked_attention_fwd": ((96, 512, 64, 0), (2, 20, 8, 0)),
    "masked_attention_bwd_dq": ((48, 512, 64, 1), (2, 20, 8, 1)),
    "masked_attention_bwd_dkv": ((48, 512, 64, 1), (4, 18, 8, 1)),
    "masked_lm_loss_fwd": ((4096, 768), (8, 16)),
    "masked_lm_loss_bwd_logits": ((4096, 768), (8, 16)),
    "masked_lm_loss_bwd_hidden": ((4096, 768), (8, 16)),
    "masked_lm_loss_bwd_weight": ((30522, 768), (40, 16)),
}
OF_LOSS = {kernel for kernel in SHAPES if kernel.startswith("masked_lm_loss")}


@pytest.fixture(autouse=True)
def config_home(tmp_path, monkeypatch):
    """A home for the user's table, empty at first; and cases with a small vocabulary and short sequences."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setattr(case, "VOCABULARY", 40)
    monkeypatch.setattr(case, "LENGTH", 16)
    monkeypatch.setattr(attention_cases, "_HEADS", 2)
    _configs.all_kernels()
    _configs.forget()
    yield tmp_path / "config"
    monkeypatch.undo()
    _configs.forget()


def entry(config, kernel="layer_norm_fwd", shape=(8, 24), **changes):
    """An entry of a table, for the interpreter."""
    measured = {
        "seconds": {"before": 2e-5, "after": 1e-5},
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": "2026-11-20T12:00:00+00:00",
        "command": "fastconv tune",
    }
    found = {
        "kernel": kernel,
        "device": CARD.name,
        "dtype": "float32",
        "shape": list(shape),
        "config": config if config is None or isinstance(config, dict) else asdict(config),
        "measured": measured,
    }
    return found | changes


def save(entries, path=None):
    """Write a table, by default the user's, and have it read."""
    path = _configs.user_table() if path is None else path
    path.parent.mkdir(parents=True, exist_ok=True)
    content = entries if isinstance(entries, str) else json.dumps({"schema": 1, "entries": entries})
    path.write_text(content)
    _configs.forget()
    return path


def rule(kernel="layer_norm_fwd", shape=(6, 24), dtype=SINGLE):
    return _configs.KERNELS[kernel].rule(kernel, shape, dtype, CARD)


def picked(shape=(6, 24), dtype=SINGLE, card=CARD):
    return layer_norm.pick_config("layer_norm_fwd", shape, dtype, card)


@pytest.mark.parametrize("dtype", [HALF, SINGLE], ids=str)
@pytest.mark.parametrize("kernel", SHAPES)
def test_candidates_are_possible(kernel, dtype):
    (shape, _), of = SHAPES[kernel], _configs.KERNELS[kernel]
    found = list(of.candidates(shape, dtype, CARD))
    assert of.problem(rule(kernel, shape, dtype), shape, dtype, CARD) is None
    assert 5 <= len(found) == len(set(found)) <= 80 and rule(kernel, shape, dtype) not in found
    assert all(of.problem(config, shape, dtype, CARD) is None for config in found)


def test_every_kernel_has_shapes_here_and_a_case():
    assert set(_configs.all_kernels()) == set(SHAPES) == set(cases.MAKERS)


@pytest.mark.parametrize("kernel", SHAPES)
def test_candidates_are_right_and_a_wrong_result_is_found(kernel, monkeypatch):
    dtype = torch.float16 if kernel == "span_kernel_logits_fwd" else SINGLE
    asked = _configs.Asked(kernel, SHAPES[kernel][1], dtype, CARD)
    made = cases.make(asked, DEVICE)
    judge = Judge(kernel, made)
    candidates = list(_configs.KERNELS[kernel].candidates(*asked[1:]))
    assert judge.problem(candidates[-1]) is None
    spoiled = replace(made, op=lambda **t: made.op(**t) * 1.01)
    monkeypatch.setattr(judge, "_case", spoiled)
    assert judge.problem(candidates[-1]) == "the result is wrong"


def test_what_a_kernel_can_not_do_is_no_candidate():
    for kernel, change, why in (
        ("layer_norm_fwd", {"block_c": 512}, "1 parts of block_c must be 1024 channels, got 1 of 512"),
        ("layer_norm_fwd", {"block_t": 3}, "block_t must be a power of two, got 3"),
        ("layer_norm_fwd", {"block_t": 2048}, "the blocks of a tile may have 1048576 values, got 2097152"),
        ("layer_norm_fwd", {"num_warps": 64}, "num_warps must be an integer from 1 to 32, got 64"),
        ("layer_norm_fwd", {"registers": 80.0}, "registers must be an integer from 16 to 255, got 80.0"),
        ("grouped_linear_fwd", {"block_k": 8}, "blocks of products must be at least 16, got (128, 128, 8)"),
        ("grouped_linear_fwd", {"num_warps": 1}, "a thread can hold 128 sums of products, got 512"),
        ("grouped_linear_fwd", {"num_stages": 9}, "num_stages must be an integer from 1 to 8, got 9"),
        ("grouped_linear_fwd", {"num_stages": 8, "block_k": 128}, "8 stages need at least 458752 bytes of shared"),
        ("separable_conv_fwd", {"taps": 10}, "taps must be at most 9, run 16; got 10, 2"),
        ("span_dynamic_conv_fwd", {"block_d": 32}, "block_d must be 64, a whole head, got 32"),
        ("masked_lm_loss_bwd_logits", {"block_n": 256}, "no block may be larger than 128"),
        ("masked_lm_loss_bwd_logits", {"block_m": 32}, "block_m must be at least 64"),
        ("masked_lm_loss_bwd_weight", {"block_k": 128}, "block_k must be at most 64"),
    ):
        shape, _ = SHAPES[kernel]
        of = _configs.KERNELS[kernel]
        config = replace(of.rule(kernel, shape, HALF, _launch.INTERPRETER), **change)
        told = of.problem(config, shape, HALF, _launch.INTERPRETER)
        assert told is not None and told.startswith(why), (kernel, change, told)


def test_forced_config_is_launched_by_every_thread():
    seen = []
    config = replace(rule(), block_t=2, num_warps=2)

    def call():
        with _configs.watched() as asked:
            seen.append((picked(), asked[0]))

    with _configs.forced("layer_norm_fwd", config):
        thread = threading.Thread(target=call)  # as autograd's on a GPU
        thread.start()
        thread.join()
    assert seen == [(config, _configs.Asked("layer_norm_fwd", (6, 24), SINGLE, CARD))]
    assert picked() == rule()


def test_table_order(tmp_path, monkeypatch):
    own, users = replace(rule(), block_t=2), replace(rule(), block_t=4)
    package = tmp_path / "kernels"
    monkeypatch.setattr(_configs, "__file__", str(package / "_configs.py"))
    assert picked() == rule()
    save([entry(own), entry(own, shape=(64, 24))], package / "tables" / "card.json")
    assert picked() == own and picked((40, 24)) == own
    save([entry(users), entry(None, shape=(64, 24))])
    assert picked() == users
    assert picked((40, 24)) == own, "null in the user's table keeps what is used without it"
    assert _configs.without_user_table("layer_norm_fwd", (6, 24), SINGLE, CARD) == own


def test_table_entry_is_for_its_card_dtype_and_tokens():
    config = replace(rule(), block_t=2)
    save([entry(config)])
    assert picked((8, 24)) == picked((5, 24)) == config  # 5 to 8 tokens
    for other in (picked((4, 24)), picked((9, 24)), picked((8, 16)), picked(dtype=torch.float16)):
        assert other != config
    assert picked(card=CARD._replace(name="NVIDIA H100")) != config


def test_user_table_is_where_the_system_says(config_home, monkeypatch):
    assert _configs.user_table() == config_home / "fastconv" / "configs.json"
    monkeypatch.setenv("XDG_CONFIG_HOME", "relative")  # to be ignored, by the XDG base directory specification
    assert str(_configs.user_table()).endswith(os.path.join(".config", "fastconv", "configs.json"))


BAD_FILES = {
    "{": "this is not JSON",
    "[1]": 'expected {"schema": 1, "entries": [...]}',
    '{"schema": 2, "entries": []}': 'expected {"schema": 1, "entries": [...]}',
    "\x00": "this is not JSON",
}


@pytest.mark.parametrize("content", BAD_FILES)
def test_malformed_table_is_told_and_ignored(content, caplog):
    path = save(content)
    assert picked() == rule()
    assert str(path) in caplog.text and BAD_FILES[content] in caplog.text


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"kernel": "nothing"}, "unknown kernel 'nothing'"),
        ({"device": None}, "device must be a GPU's name"),
        ({"dtype": "int8"}, "dtype must be bfloat16, float16 or float32, got 'int8'"),
        ({"shape": [8, -1]}, "shape must be a list of sizes"),
        ({"shape": [8]}, "shape of layer_norm_fwd: [8] does not fit"),
        ({"measured": {}}, "measured must say seconds, torch, triton, date, command"),
        (
            {"config": {"block_t": 2}},
            "config of layer_norm_fwd must have block_t, block_c, num_warps, registers, parts",
        ),
        ({"config": {**asdict(rule()), "num_warps": 3}}, "num_warps must be a power of two, got 3"),
        ({"config": {**asdict(rule()), "num_warps": "2"}}, "num_warps must be an integer"),
        ({"config": {**asdict(rule()), "block_c": 16}}, "1 parts of block_c must be 32 channels"),
    ],
)
def test_impossible_entry_is_told_and_the_others_count(change, why, caplog):
    good = replace(rule(), block_t=2)
    path = save([entry(rule(shape=(64, 24)), shape=(64, 24)) | change, entry(good)])
    assert picked() == good
    (told,) = caplog.messages
    assert str(path) in told and "entry 1: " in told and why in told


def test_entry_of_another_triton_is_ignored_with_one_line(caplog):
    other = entry(replace(rule(), block_t=2))
    other["measured"] = other["measured"] | {"triton": "3.0.0"}
    save([other, other | {"shape": [16, 24]}])
    with caplog.at_level(logging.WARNING, "fastconv"):
        assert picked() == rule() and picked((12, 24)) == rule(shape=(12, 24))
    (told,) = caplog.messages
    assert f"2 measured with triton 3.0.0, this is {triton.__version__}" in told


def test_entry_that_does_not_fit_a_card_is_not_launched(caplog):
    shape, _ = SHAPES["grouped_linear_fwd"]
    config = replace(rule("grouped_linear_fwd", shape, HALF), num_stages=7)
    save([entry(config, "grouped_linear_fwd", shape, dtype="bfloat16")])
    small = CARD._replace(shared=64 * 1024)
    assert grouped_linear.pick_config("grouped_linear_fwd", shape, HALF, CARD) == config
    _configs.forget()
    assert grouped_linear.pick_config("grouped_linear_fwd", shape, HALF, small) != config
    assert "a block gets 65536" in caplog.text


def test_unreadable_table_is_told_and_ignored(caplog):
    path = _configs.user_table()
    path.mkdir(parents=True)
    assert picked() == rule()
    assert str(path) in caplog.text and "directory" in caplog.text


@pytest.mark.skipif(DEVICE.type == "cuda", reason="looks at the grid of a kernel in the interpreter")
def test_a_fresh_process_launches_what_the_table_says():
    config = replace(rule(), block_t=2, num_warps=2)
    save([entry(config)])
    program = (
        "import torch, fastconv\n"
        "from fastconv.kernels import _configs, layer_norm\n"
        "from unittest import mock\n"
        "x, w = torch.randn(6, 24), torch.ones(24)\n"
        "grids = []\n"
        "kernel = layer_norm._layer_norm_fwd_kernel\n"
        "class Kernel:\n"
        "    def __getitem__(self, grid):\n"
        "        grids.append(grid)\n"
        "        return kernel[grid]\n"
        "with mock.patch.object(layer_norm, '_layer_norm_fwd_kernel', Kernel()):\n"
        "    y = fastconv.ops.layer_norm(x, w, None)\n"
        "assert torch.allclose(y, torch.nn.functional.layer_norm(x, (24,), w), atol=1e-5)\n"
        "print(grids)"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "[(3,)]", done.stderr  # 6 tokens, 2 a program


ASKED = _configs.Asked("layer_norm_fwd", (6, 24), SINGLE, CARD)
OTHER = _configs.Asked("layer_norm_fwd", (40, 24), SINGLE, CARD)


def timer(fast):
    """A timer for which one config takes half of what the others take."""

    def times(runs, device, *, rounds):
        found = {}
        for name, launched in runs.items():
            _, config, _ = launched.args
            found[name] = [5e-6 if config == fast else 1e-5] * rounds
        return found

    return times


@pytest.fixture
def few(monkeypatch):
    """Three candidates are enough; the interpreter takes its time."""
    candidates = _configs.Kernel.candidates

    def first(self, shape, dtype, card):
        return iter(list(candidates(self, shape, dtype, card))[:3])

    monkeypatch.setattr(_configs.Kernel, "candidates", first)
    return list(_configs.KERNELS["layer_norm_fwd"].candidates(*ASKED[1:]))


def search(path=None, asked=(ASKED,), fast=None, **options):
    path = _configs.user_table() if path is None else path
    return tuning.Search(asked, path, DEVICE, command="fastconv tune", timer=timer(fast), **options)


def test_fast_candidate_wins_and_is_picked(few):
    (found,) = search(fast=few[1]).run()
    assert found.after == few[1] and found.before == rule() and found.tried == 3 and not found.rejected
    assert picked() == few[1]
    (written,) = json.loads(_configs.user_table().read_text())["entries"]
    measured = written["measured"]
    assert measured["seconds"] == {"before": 1e-5, "after": 5e-6} and measured["command"] == "fastconv tune"
    assert measured["triton"] == triton.__version__ and written["shape"] == [8, 24] and measured["shape"] == [6, 24]


def test_no_candidate_wins_within_the_spread_or_two_percent(few):
    def noisy(runs, device, *, rounds):
        # Faster in the median, but not in a quarter of the rounds.
        found = {name: [1e-5] * rounds for name in runs}
        for name, launched in runs.items():
            if launched.args[1] == few[1]:
                found[name] = [1.1e-5 if n % 3 == 0 else 0.9e-5 for n in range(rounds)]
            if launched.args[1] == few[2]:
                found[name] = [0.99e-5] * rounds
        return found

    made = tuning.Search([ASKED], _configs.user_table(), DEVICE, command="", timer=noisy)
    (found,) = made.run()
    assert found.after is None and picked() == rule()
    assert not search().todo, "and it is not searched again"
    assert search(again=True).todo == [ASKED]


def test_wrong_candidate_is_rejected_however_fast(few, monkeypatch):
    forward = layer_norm.layer_norm_fwd

    def wrong(x, *args):
        made = forward(x, *args)
        config = layer_norm.pick_config("layer_norm_fwd", tuple(x.shape), x.dtype, CARD)
        return (made[0] + (0.01 if config == few[1] else 0.0), *made[1:])

    monkeypatch.setattr(layer_norm, "layer_norm_fwd", wrong)
    (found,) = search(fast=few[1]).run()
    assert found.after is None and found.rejected == {"the result is wrong": 1}
    assert picked() == rule()


def test_failing_candidate_is_rejected(few, monkeypatch):
    options = _launch.options

    def scarce(num_warps, registers):
        if num_warps == few[0].num_warps and registers == few[0].registers:
            raise RuntimeError("out of resource: shared memory\nmore")
        return options(num_warps, registers)

    unlike = replace(few[0], registers=77)
    monkeypatch.setattr(_configs.Kernel, "candidates", lambda *args: iter([replace(few[0], registers=78), unlike]))
    few[0] = replace(few[0], registers=78)
    monkeypatch.setattr(_launch, "options", scarce)
    (found,) = search(fast=unlike).run()
    assert found.rejected == {"RuntimeError: out of resource: shared memory": 1} and found.after == unlike


@pytest.mark.parametrize(
    ("kernel", "shape"),
    [
        ("masked_attention_fwd", (2, 18, 8, 0)),
        ("masked_attention_fwd", (4, 18, 8, 1)),
        ("masked_attention_bwd_dq", (2, 18, 8, 1)),
        ("masked_attention_bwd_dkv", (2, 18, 8, 2)),
    ],
)
def test_calls_that_share_an_entry(kernel, shape, monkeypatch):
    """Every mask's dtype, which decides with the others what is in shared memory, and a packing where there can be."""
    asked = _configs.Asked(kernel, shape, SINGLE, CARD)
    seen = []
    config = Masks.config
    monkeypatch.setattr(Masks, "config", lambda masks, *args: [seen.append(masks), config(masks, *args)][1])
    made = cases.make(asked, DEVICE)
    seen.clear()
    with _configs.watched() as launched:
        for launch in made.others:
            launch()
    found = [each for each in launched if each.kernel == kernel]
    assert {identity(each) for each in found} == {identity(asked)} and len(found) == len(made.others)
    kinds = {None if masks.mask is None else masks.mask.dtype for masks in seen}
    assert kinds == {torch.bool, SINGLE} | ({None} if shape[0] <= 2 and shape[3] == 1 else set())


def test_config_that_another_call_can_not_launch_does_not_win(few, monkeypatch):
    make = cases.make

    def scarce():
        if layer_norm.pick_config(*ASKED) == few[1]:
            raise RuntimeError("out of resource: shared memory")

    monkeypatch.setattr(cases, "make", lambda *args: replace(make(*args), others=[scarce]))
    (found,) = search(fast=few[1]).run()
    assert found.rejected == {"with other masks, RuntimeError: out of resource: shared memory": 1}
    assert found.after is None and picked() == rule()


def test_config_in_use_that_is_wrong_is_red_and_not_kept(few, monkeypatch):
    forward = layer_norm.layer_norm_fwd
    monkeypatch.setattr(layer_norm, "layer_norm_fwd", lambda *args: (forward(*args)[0] + 0.01, *forward(*args)[1:]))
    (found,) = search(fast=few[1]).run()
    assert found.red == "the result is wrong" and found.seconds is None
    assert not _configs.user_table().exists()
    assert any("RED layer_norm_fwd 6x24 float32" in line for line in tune.report([found], 0, 0, _configs.user_table()))


def test_search_goes_on_where_it_was(few):
    first = search(asked=[ASKED, OTHER], fast=few[1]).run()
    next(first)
    first.close()  # as Ctrl-C would leave it
    again = search(asked=[ASKED, OTHER], fast=few[1])
    assert again.todo == [OTHER] and again.done == [ASKED]
    list(again.run())
    assert len(json.loads(_configs.user_table().read_text())["entries"]) == 2
    assert not search(asked=[ASKED, OTHER]).todo


def test_search_keeps_other_entries(few):
    other = entry(None, device="NVIDIA H200")
    older = entry(None)
    older["measured"] = older["measured"] | {"triton": "3.0.0"}
    save([other, older])
    list(search(fast=few[1]).run())
    entries = json.loads(_configs.user_table().read_text())["entries"]
    assert entries[:2] == [other, older] and len(entries) == 3


def test_time_budget(few, monkeypatch):
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    told = []
    # Four steps of ten seconds a shape.
    found = list(search(asked=[ASKED, OTHER]).run(seconds=55, progress=lambda *step: told.append(step)))
    assert [each.asked for each in found] == [ASKED]
    assert told[0][1:] == (0, 8) and told[1] == ("layer_norm_fwd 6x24: candidate 1 of 3, 35 s left", 1, 8)
    assert search(asked=[ASKED, OTHER]).todo == [OTHER], "what was begun is not kept"


def test_table_that_can_not_be_written(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    for path in (file / "configs.json", tmp_path):
        with pytest.raises(tuning.TuningError, match="can't write"):
            tuning.check_writable(path)
    tuning.check_writable(tmp_path / "new" / "configs.json")
    assert list((tmp_path / "new").iterdir()) == []


def test_search_does_not_overwrite_what_is_no_table():
    path = save("not a table")
    with pytest.raises(tuning.TuningError, match="is no table of launch configs: this is not JSON"):
        search()
    assert path.read_text() == "not a table"


@pytest.mark.parametrize("padding", ["keep", "remove"])
def test_what_a_model_asks_for(padding):
    model = shapes.build(
        "convbert-small",
        num_hidden_layers=1,
        hidden_size=32,
        num_attention_heads=4,
        intermediate_size=48,
        embedding_size=16,
        vocab_size=40,
        max_position_embeddings=16,
    ).to(DEVICE)
    asked = tuning.asked_for(model, batch=2, length=8, direction="both", padding=padding).values()
    kernels = {each.kernel for each in asked}
    # In fp32 logits are made by products, which a model without groups makes by cuBLAS.
    assert kernels == set(SHAPES) - OF_LOSS - {"span_kernel_logits_fwd", "grouped_linear_fwd"}
    assert {each.shape for each in asked if each.kernel == "layer_norm_bwd"} == {(16, 32), (16, 16)}


def test_what_a_loss_asks_for():
    config = fastconv.BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
    )
    model = fastconv.BertForMaskedLM(config).to(DEVICE)
    asked = tuning.asked_for(model, batch=2, length=8, direction="train").values()
    shapes = {each.kernel: each.shape for each in asked if each.kernel.startswith("masked_lm_loss")}
    of_tokens = dict.fromkeys(OF_LOSS, (16, 16))
    assert shapes == of_tokens | {"masked_lm_loss_bwd_weight": (40, 16)}


def test_model_of_a_name():
    model = tuning.model_of("convbert-small", 512)
    assert model.config.num_hidden_layers == 1 and model.config.hidden_size == 256
    with pytest.raises(ValueError, match="length must be at most 512, which is all that convbert-small takes, got 513"):
        tuning.model_of("convbert-small", 513)


def test_tune_without_a_gpu_is_told(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    code, out, err = run(capsys, "tune", "convbert-small", "--list")
    assert code == 2 and out == "" and "tuning needs the GPU that it is for" in err


@pytest.fixture
def on_the_cpu(monkeypatch, few):
    """`fastconv tune` of one shape in the interpreter."""
    monkeypatch.setattr(tune, "_device", lambda: DEVICE)
    monkeypatch.setattr(tune, "_asked", lambda args, device: [ASKED])
    monkeypatch.setattr(tuning.Search.__init__, "__kwdefaults__", {"again": False, "timer": timer(few[1])})
    return few


def test_tune_command(capsys, on_the_cpu):
    code, out, _ = run(capsys, "tune", "--list")
    assert code == 0 and out.splitlines()[1].split() == ["layer_norm_fwd", "6x24", "float32", "3"]
    code, out, _ = run(capsys, "tune", "--minutes", "5")
    lines = out.splitlines()
    assert code == 0 and lines[1].split()[:8] == [
        "layer_norm_fwd",
        "6x24",
        "float32",
        "10.0",
        "us",
        "5.0",
        "us",
        "2.00x",
    ]
    assert lines[-1] == f"1 shapes searched, 1 faster; 0 had an entry, 0 are left; table: {_configs.user_table()}"
    assert picked() == on_the_cpu[1]
    code, out, _ = run(capsys, "tune")
    assert code == 0 and out.startswith("0 shapes searched, 0 faster; 1 had an entry")


def test_tune_interrupted_keeps_what_it_has(capsys, on_the_cpu, monkeypatch):
    run_search = tuning.Search.run

    def interrupted(self, **options):
        yield from run_search(self, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(tuning.Search, "run", interrupted)
    code, out, err = run(capsys, "tune")
    assert code == 130 and "1 shapes searched, 1 faster" in out and "interrupted" in err
    assert picked() == on_the_cpu[1]


def test_tune_bad_input(capsys, on_the_cpu, tmp_path):
    for given, why in (
        (["--batch", "0"], "--batch must be at least 1, got 0"),
        (["--minutes", "-1"], "--minutes must be more than 0, got -1.0"),
        (["--out", tmp_path], "can't read"),
    ):
        code, _, err = run(capsys, "tune", *given)
        assert code == 2 and why in err, err


def test_pick_is_cheap():
    # A launch asks once. The rule alone takes 3 us; the table's memory 0.2 (AMD EPYC, Python 3.11): ten times as much
    # is no accident of a busy machine.
    x = torch.empty(0)
    each = min(timeit.repeat(lambda: picked(card=_launch.card(x)), number=2000, repeat=5)) / 2000
    assert each < 1e-5


def test_backward_of_an_op_uses_the_forced_config(device):
    config = _configs.KERNELS["layer_norm_bwd"]
    forced = next(iter(config.candidates((6, 24), SINGLE, CARD)))
    x = torch.randn(6, 24, device=device, requires_grad=True)
    with fastconv.backend("triton"), _configs.watched() as asked, _configs.forced("layer_norm_bwd", forced):
        fastconv.ops.layer_norm(x, torch.ones(24, device=device), None).sum().backward()
    assert [each.kernel for each in asked] == ["layer_norm_fwd", "layer_norm_bwd"]
