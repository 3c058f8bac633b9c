"""`fastconv run` and `fastconv.pipeline`: input, options and checkpoints that are unfit, and errors that say so."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from tiny import run, save

import fastconv
from fastconv.commands import lines
from fastconv.tasks import ItemError, pipeline

GOOD, LONG = b"a dog\n", b"abc " * 7  # LONG has 21 tokens and 2 special ones; the model takes 20


@pytest.fixture(autouse=True)
def _native():
    """Ops run natively: what is tested is not the kernels, and their interpreter is slow."""
    with fastconv.backend("native"):
        yield


@pytest.fixture
def command(tmp_path, capsys, monkeypatch):
    """A function that runs `fastconv run` with a tiny model and bytes on stdin: code, lines of stdout, stderr."""

    def call(task, content, *arguments, name=None, **config):
        heads = {"text-classification": "BertForSequenceClassification", "fill-mask": "BertForMaskedLM"}
        folder = save(tmp_path / "model", name or heads.get(task, "BertModel"), **config)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        code, out, err = run(capsys, "run", "--task", task, "--model", folder, *arguments)
        return code, out.splitlines(), err

    return call


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (b"", r"line 3 of stdin: the line is empty; .*--skip-empty"),
        (b" \t ", "line 3 of stdin: the line is empty"),
        (b"\xe2\x80\x8b\x07", "line 3 of stdin: the text is empty: it has no tokens"),
        (LONG, r"line 3 of stdin: 23 tokens are more than the 20 that the model takes; .*--truncate"),
        (b"caf\xe9", "line 3 of stdin: expected UTF-8 text, got the byte 0xe9 at 4"),
        ("über".encode("utf-16"), "line 3 of stdin: expected UTF-8 text, got the byte 0xff at 1"),
        (b"a\tb", "line 3 of stdin: there is a TAB: say --input-format tsv if it parts a pair, or text"),
    ],
)  # fmt: skip
def test_a_bad_line_is_named_after_the_results_before_it(command, bad, message):
    code, out, err = command("text-classification", GOOD + GOOD + bad + b"\n" + GOOD)
    assert code == 2 and len(out) == 2 and re.search(f"^fastconv run: error: {message}", err), err
    assert len(err.splitlines()) == 1 or b"\n" in bad


def test_line_numbers_count_on_through_windows_and_skipped_lines(command):
    code, out, err = command("text-classification", (GOOD + b"\n") * 150 + LONG, "--skip-empty", "--batch-size", 1)
    assert code == 2 and len(out) == 150 and "line 301 of stdin: 23 tokens" in err


def test_a_bad_argument_is_named(command, tmp_path):
    code, out, err = command("text-classification", b"", "a dog", "", "it")
    assert code == 2 and len(out) == 1 and "text 2: text is empty" in err
    code, _, err = command("text-classification", b"", "a\udce9")
    assert code == 2 and r"text 1: text must be valid Unicode, got the lone surrogate '\udce9'" in err


@pytest.mark.parametrize(
    ("task", "name", "line", "message"),
    [
        ("fill-mask", "BertForMaskedLM", "no mask", r"found no \[MASK\]; put one"),
        ("question-answering", "BertForQuestionAnswering", "who", "expected question<TAB>context, got 1 TAB-separated"),
        ("question-answering", "BertForQuestionAnswering", "a\tb\tc", "got 3 TAB-separated values"),
        ("question-answering", "BertForQuestionAnswering", "a\t", "context is empty"),
        ("question-answering", "BertForQuestionAnswering", "{who", "this is not JSON"),
        ("question-answering", "BertForQuestionAnswering", '{"question": "a"}', "expected question and context, got q"),
        ("question-answering", "BertForQuestionAnswering", '{"question": 1, "context": "b"}', "question must be a str"),
        ("question-answering", "BertForQuestionAnswering", "abc " * 6 + "\tb", "leaves no room for the context"),
        ("multiple-choice", "BertForMultipleChoice", "a\tb", "choices must be at least 2, got 1"),
        ("multiple-choice", "BertForMultipleChoice", '{"prompt": "a", "choices": "bc"}', "choices must be a list"),
        ("multiple-choice", "BertForMultipleChoice", "a\tb\t", r"choices\[1\] is empty"),
        ("multiple-choice", "BertForMultipleChoice", "a\tb\t" + "abc " * 6, "22 tokens are more than the 20"),
        ("next-sentence", "BertForNextSentencePrediction", "a", "expected text<TAB>text_pair, got 1"),
        ("next-sentence", "BertForNextSentencePrediction", '{"text": "a", "next": "b"}', "expected text and text_p"),
    ],
)  # fmt: skip
def test_lines_that_are_no_item_of_their_task(command, task, name, line, message):
    code, out, err = command(task, line.encode() + b"\n", name=name)
    assert code == 2 and out == [] and re.search(f"error: line 1 of stdin: .*{message}", err), err


def test_json_lines(command):
    arguments = ("--input-format", "json")
    code, _, err = command("text-classification", b'"a"\n17\n', *arguments)
    assert code == 2 and "line 2 of stdin: expected a str or a dict with text and optionally text_pair, got int" in err
    code, _, err = command("text-classification", b'"\\ud800"\n', *arguments)
    assert code == 2 and "lone surrogate" in err
    code, _, err = command("text-classification", b"[" * 100000, *arguments)
    assert code == 2 and "not JSON" in err


@pytest.mark.parametrize(
    ("task", "arguments", "message"),
    [
        ("fill-mask", ["--input-format", "tsv"], "--input-format tsv doesn't fit fill-mask, which takes one text"),
        ("fill-mask", ["--batch-size", 0], "batch_size must be at least 1, got 0"),
        ("fill-mask", ["--top-k", 0], "top_k must be at least 1, got 0"),
        ("fill-mask", ["--seed", 1], "task fill-mask has no seed"),
        ("fill-mask", ["--device", "nowhere"], "device 'nowhere' can't be used"),
        ("fill-mask", ["--file", "no-such-file"], "No such file or directory: 'no-such-file'"),
        ("fill-mask", ["--file", "x", "text"], "give texts or --file, not both"),
        ("fill-mask", ["--max-answer-len", 3], "task fill-mask has no max_answer_len"),
    ],
)
def test_options_that_are_unfit(command, task, arguments, message):
    code, out, err = command(task, GOOD, *arguments)
    assert code == 2 and out == [] and message in err, err


@pytest.mark.parametrize(
    "arguments", [["--task", "summarization", "--model", "x"], ["--model", "x"], ["--task", "fill-mask"]]
)
def test_usage_errors(capsys, arguments):
    code, _, err = run(capsys, "run", *arguments)
    assert code == 2 and err.startswith("fastconv run: error:") and "--help" in err


@pytest.mark.parametrize(
    ("name", "task", "message"),
    [
        # Heads that the checkpoint lacks: results would be random.
        ("BertModel", "fill-mask", "unfit for task fill-mask: it lacks the head of BertForMaskedLM .*would be random"),
        ("ConvBertModel", "text-classification", "lacks the head of ConvBertForSequenceClassification"),
        ("BertForMaskedLM", "next-sentence", "lacks the head of BertForNextSentencePrediction"),
        ("BertForSequenceClassification", "question-answering", r"lacks the head .* \(qa_outputs.weight"),
        # Heads of the same names and shapes.
        ("BertForSequenceClassification", "token-classification", "which is for --task text-classification; got token"),
        ("BertForTokenClassification", "text-classification", "which is for --task token-classification"),
        ("BertForMultipleChoice", "text-classification", "which is for --task multiple-choice"),
        # Families and decoders.
        ("ConvBertForMaskedLM", "next-sentence", "task next-sentence is for model_type 'bert', but .* a 'convbert'"),
        ("ConvBertForMaskedLM", "text-generation", "text-generation is for model_type 'bert' or 'roc_bert'"),
        ("BertForMaskedLM", "text-generation", "which is for --task fill-mask; got text-generation"),
    ],
)
def test_a_task_that_is_unfit_for_the_head(tmp_path, capsys, name, task, message):
    folder = save(tmp_path, name)
    code, out, err = run(capsys, "run", "--task", task, "--model", folder, "a\tb")
    assert code == 2 and out == "" and re.search(message, err), err


def test_a_head_without_its_name_is_told_by_its_parameters(tmp_path):
    folder = save(tmp_path, "BertForMaskedLM")
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, "architectures": None}))
    with pytest.raises(ValueError, match=r"lacks the head of BertForTokenClassification \(classifier"):
        pipeline("token-classification", folder)
    assert pipeline("fill-mask", folder)("a [MASK]") and pipeline("feature-extraction", folder)("a")


def test_a_checkpoint_with_more_heads_than_it_names_serves_them(tmp_path):
    # As that of the original BERT: it names its masked language model alone.
    folder = save(tmp_path, "BertForPreTraining")
    content = json.loads((folder / "config.json").read_text())
    for architectures in (["BertForPreTraining"], ["BertForMaskedLM"]):
        (folder / "config.json").write_text(json.dumps({**content, "architectures": architectures}))
        assert pipeline("fill-mask", folder)("a [MASK]")
        assert pipeline("next-sentence", folder)({"text": "a", "text_pair": "b"})


def test_a_model_of_no_family(tmp_path):
    folder = save(tmp_path)
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, "model_type": "gpt2"}))
    with pytest.raises(ValueError, match="model_type must be one of 'bert', 'convbert', 'roc_bert', got 'gpt2'"):
        pipeline("feature-extraction", folder)


def test_text_generation_needs_a_decoder_and_room(tmp_path):
    folder = save(tmp_path / "decoder", "BertLMHeadModel", is_decoder=True)
    content = json.loads((folder / "config.json").read_text())
    with pytest.raises(ValueError, match="max_new_tokens must be less than the 20 tokens that the model takes, got 20"):
        pipeline("text-generation", folder, max_new_tokens=20)
    with pytest.raises(ItemError, match="11 tokens and 10 new ones are more than the 20 that the model takes"):
        pipeline("text-generation", folder, max_new_tokens=10)("abc abc abc")
    assert pipeline("text-generation", folder, max_new_tokens=9)("abc abc abc")
    assert pipeline("text-generation", folder, max_new_tokens=10, truncate=True)("abc abc abc")
    for arguments, message in (
        ({"temperature": 2.0}, "temperature only matters for sampling; give do_sample=True"),
        ({"top_k": 5, "seed": 1}, "top_k, seed only matters"),
        ({"do_sample": True, "temperature": 0.0}, "temperature must be above 0"),
        ({"do_sample": True, "top_p": 1.5}, "top_p must be above 0 and at most 1"),
    ):
        with pytest.raises(ValueError, match=message):
            pipeline("text-generation", folder, **arguments)
    (folder / "config.json").write_text(json.dumps({**content, "is_decoder": False}))
    with pytest.raises(ValueError, match="does not say is_decoder true; say so there if"):
        pipeline("text-generation", folder)


def test_pairs_need_token_types(tmp_path):
    for task, name in (
        ("question-answering", "BertForQuestionAnswering"),
        ("multiple-choice", "BertForMultipleChoice"),
        ("next-sentence", "BertForNextSentencePrediction"),
    ):
        with pytest.raises(ValueError, match=f"task {task} takes pairs of texts, which needs type_vocab_size 2"):
            pipeline(task, save(tmp_path / task, name, type_vocab_size=1))
    classify = pipeline("text-classification", save(tmp_path / "c", "BertForSequenceClassification", type_vocab_size=1))
    assert classify("a")
    with pytest.raises(ItemError, match="gives 1 in token_type_ids, but the model has only 1"):
        classify({"text": "a", "text_pair": "b"})


def test_a_tokenizer_of_another_model(tmp_path):
    folder = save(tmp_path, "BertModel", vocab_size=40)
    pipe = pipeline("feature-extraction", folder)
    with pytest.raises(ItemError, match="the tokenizer gives 45 in input_ids, but the model has only 40"):
        pipe("ak")


def test_a_mask_that_was_cut_off_and_one_that_is_not_there(tmp_path):
    folder = save(tmp_path, "BertForMaskedLM")
    with pytest.raises(ItemError, match=r"found no \[MASK\] in the first 20 tokens, to which it was truncated"):
        pipeline("fill-mask", folder, truncate=True)("abc " * 7 + "[MASK]")


def test_windows_of_question_answering(tmp_path):
    folder = save(tmp_path, "BertForQuestionAnswering")
    with pytest.raises(ValueError, match="doc_stride must be less than the 20 tokens of a window, got 20"):
        pipeline("question-answering", folder, doc_stride=20)
    with pytest.raises(ValueError, match="task question-answering has no truncate"):
        pipeline("question-answering", folder, truncate=True)
    with pytest.raises(ItemError, match="question is empty"):
        pipeline("question-answering", folder)({"question": " ", "context": "a"})


def test_items_that_are_none(tmp_path):
    pipe = pipeline("feature-extraction", save(tmp_path))
    for wrong, error in (
        (17, TypeError),
        (None, TypeError),
        ([17], ValueError),
        ([None], ValueError),
        ("", ValueError),
    ):
        with pytest.raises(error):
            pipe(wrong)
    assert pipe([]) == []
    stream = pipe.stream(["a", "b", ""])
    assert len([next(stream), next(stream)]) == 2
    with pytest.raises(ItemError, match=r"inputs\[2\]: text is empty"):
        next(stream)


def test_arguments_of_the_function(tmp_path):
    folder = save(tmp_path)
    for arguments, message in (
        ({"task": "translation"}, "task must be one of fill-mask, .*, got 'translation'"),
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"dtype": torch.int8}, "dtype must be one of"),
        ({"batch_size": True}, "batch_size must be an int"),
        ({"model": tmp_path / "nothing"}, "neither an existing folder nor a hub id"),
    ):
        with pytest.raises((ValueError, TypeError, FileNotFoundError), match=message):
            pipeline(**{"task": "feature-extraction", "model": folder, **arguments})


def test_a_result_that_is_not_finite_is_no_json(command, monkeypatch):
    monkeypatch.setattr(fastconv.tasks.classification.TextClassification, "compute", lambda *_: [[float("nan"), 0.0]])
    code, out, err = command("text-classification", GOOD, "--json")
    assert code == 2 and out == [] and "not finite, which JSON can't say; try --dtype fp32 or bf16" in err


def test_a_line_without_an_end(command, monkeypatch):
    monkeypatch.setattr(lines, "_LONGEST_LINE", 1 << 20)
    code, out, err = command("text-classification", GOOD + b"a" * (1 << 21))
    assert code == 2 and len(out) == 1 and "line 2 of stdin: it is longer than 1 MiB; expected lines of text" in err


def test_a_file_that_can_not_be_read(command, monkeypatch):
    code, out, err = command("text-classification", b"", "--file", ".")
    assert code == 2 and out == [] and "Is a directory: '.'" in err

    class Broken(io.BytesIO):
        def read1(self, *args):
            raise OSError(5, "Input/output error")

    with pytest.raises(ItemError, match="can't read a disk: Input/output error"):
        list(lines.from_file(Broken(), "a disk", str, 1))


def test_stdin_that_is_closed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)  # as of `fastconv run ... <&-`
    code, _, err = run(capsys, "run", "--task", "feature-extraction", "--model", tmp_path)
    assert code == 2 and "error: stdin and stdout must be open" in err
    folder = save(tmp_path)
    assert run(capsys, "run", "--task", "feature-extraction", "--model", folder, "a dog")[0] == 0


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full here")
def test_a_full_disk_is_told(tmp_path):
    with open("/dev/full", "w") as full:
        command = [
            sys.executable,
            "-m",
            "fastconv.cli",
            "run",
            "--task",
            "feature-extraction",
            "--model",
            save(tmp_path),
        ]
        environment = {**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
        done = subprocess.run([*command, "a dog"], stdout=full, stderr=subprocess.PIPE, env=environment, check=False)
    assert (done.returncode, done.stderr) == (2, b"fastconv run: error: [Errno 28] No space left on device\n")


@pytest.mark.parametrize("task", ["text-classification", "token-classification"])
def test_labels_that_are_not_named(task, tmp_path):
    folder = save(tmp_path, {"text": "BertForSequenceClassification", "toke": "BertForTokenClassification"}[task[:4]])
    content = json.loads((folder / "config.json").read_text())
    for labels in ({"0": "a", "5": "b"}, {"0": "a", "1": None}):
        (folder / "config.json").write_text(json.dumps({**content, "id2label": labels}))
        with pytest.raises(ValueError, match=r"id2label in config\.json must name the outputs from 0 to 1, got"):
            pipeline(task, folder)


def test_out_of_memory_is_told(command, monkeypatch):
    def full(*args):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: 9 bytes")

    monkeypatch.setattr(fastconv.tasks.classification.TextClassification, "compute", full)
    code, _, err = command("text-classification", GOOD)
    assert code == 2 and "try a smaller --batch-size" in err


def test_a_bug_is_not_taken_for_bad_input(command, monkeypatch):
    def broken(*args):
        raise ValueError("the library is wrong")

    monkeypatch.setattr(fastconv.tasks.classification.TextClassification, "compute", broken)
    with pytest.raises(ValueError, match="the library is wrong"):
        command("text-classification", GOOD)
