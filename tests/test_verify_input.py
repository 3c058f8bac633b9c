"""What `fastconv verify` runs on: the named shapes, a folder's class, the text, its tokenizer and its batches."""

from __future__ import annotations

import ast
import json
import subprocess
import sys

import pytest
import torch
from tiny import TEXT, run, save

import fastconv
from fastconv import parity
from fastconv.parity import batches, shapes, text


@pytest.mark.parametrize(
    ("name", "millions"),
    [("convbert-base", 105.68), ("convbert-medium-small", 17.48), ("convbert-small", 13.14), ("bert-base", 109.48)],
)
def test_shapes_have_the_published_numbers_of_parameters(name, millions):
    model = shapes.build(name)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)
    assert not model.training and model.config.pad_token_id == 0 and model.config.max_position_embeddings == 512


def test_random_weights_are_the_same_in_every_run_and_leave_no_parameter_untested():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one = shapes.build("convbert-small", num_hidden_layers=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    again = shapes.build("convbert-small", num_hidden_layers=1)
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name
        assert parameter.std() > 0, f"{name} is constant: a forward without it would pass"


def test_verify_a_shape_with_random_weights(monkeypatch, capsys):
    build = shapes.build
    monkeypatch.setattr(shapes, "build", lambda name: build(name, num_hidden_layers=1, vocab_size=200))
    with fastconv.backend("native"):
        code, out, _ = run(capsys, "verify", "convbert-medium-small", "--batch", 2, "--length", 9, "--rounds", 1)
    assert code == 0 and "convbert-medium-small: ConvBertModel, random weights" in out
    assert "of 2 x 9 tokens, no padding" in out and out.rstrip().endswith("keeps the 2x rule"), out


def test_a_folder_goes_before_a_shape_of_the_same_name(tmp_path, monkeypatch):
    save(tmp_path / "bert-base")
    monkeypatch.chdir(tmp_path)
    assert parity.prepare("bert-base", text=TEXT).subject.source == "checkpoint"


@pytest.mark.parametrize(
    ("architectures", "expected"),
    [(["BertForMaskedLM"], "BertForMaskedLM"), (["BertModel"], "BertModel"), (None, "BertModel"),
     (["BertForSummaries"], "BertModel"), (["ConvBertForMaskedLM"], "BertModel")],
)  # fmt: skip
def test_config_chooses_the_class(tmp_path, architectures, expected):
    save(tmp_path, "BertForMaskedLM")
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**content, "architectures": architectures}))
    subject = parity.prepare(tmp_path, text=TEXT).subject
    assert subject.class_name == expected
    told = " ".join(subject.notes)
    assert ("which fastconv lacks" in told) is (architectures not in (None, ["BertModel"], ["BertForMaskedLM"]))
    # What BertModel has beside the stored encoder, its pooler, is random: that is told too.
    assert ("pooler" in told) is (expected == "BertModel")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("Hello there. This is, e.g. A test! Is it? 3 cats sat.",
         ["Hello there.", "This is, e.g. A test!", "Is it?", "3 cats sat."]),
        ("Prose that is\nwrapped goes on.\nNext line\n\nNext paragraph",
         ["Prose that is wrapped goes on.", "Next line", "Next paragraph"]),
        ('He said "No." Then Mr. Smith left.', ['He said "No."', "Then Mr. Smith left."]),
        ("see version 3.14 of a.b. ok", ["see version 3.14 of a.b. ok"]),
        ("他来了。她走了！", ["他来了。", "她走了！"]),  # noqa: RUF001
        ("Weiter\nÜber alles", ["Weiter", "Über alles"]),
        (" \n\n\t\n", []),
    ],
)  # fmt: skip
def test_sentences(given, expected):
    assert text.sentences(given) == expected


def test_default_text_is_prose():
    found = text.default_sentences()
    assert len(found) > 1500 and len(set(found)) == len(found)
    assert any("Assignments to" in sentence for sentence in found)
    lengths = sorted(len(sentence.split()) for sentence in found)
    assert lengths[0] >= 3 and lengths[-1] <= 100 and lengths[len(found) // 4] < lengths[3 * len(found) // 4] / 1.5
    for sentence in found:
        assert sentence == sentence.strip() and "  " not in sentence
        assert not any(code in sentence for code in ("::=", ">>>", "***", "===")), sentence


def test_markup_headings_and_code_are_left_out():
    topic = (
        "The *with* statement\n********************\n\n* The **with** statement wraps a block of code, non-\nstop.\n\n"
        "   with_stmt ::= this is grammar that nobody reads.\n\n   for x in y:\n       print(x)\n\n"
        "   The name     value of this is a table."
    )
    cut = [
        line for paragraph in topic.split("\n\n") for line in text.cut(text._plain(paragraph)) if text._is_prose(line)
    ]
    assert cut == ["The with statement wraps a block of code, non-stop."]


def test_trained_tokenizer_is_deterministic_and_in_bounds():
    found = list(text.default_sentences())[:300]
    vocab = shapes.train_tokenizer(found, 30522).get_vocab()
    assert shapes.train_tokenizer(found, 30522).get_vocab() == vocab and max(vocab.values()) == len(vocab) - 1
    for size in (50, 500):
        assert max(shapes.train_tokenizer(found, size).get_vocab().values()) < size
    tokenizer = shapes.train_tokenizer(found, 30522)
    assert tokenizer.unk_token_id not in {i for row in tokenizer(found)["input_ids"] for i in row}
    assert tokenizer.tokenize("the") == ["the"]
    # In another process, where sets and hash tables have another order, too.
    program = (
        "from fastconv.parity import shapes, text\n"
        "print(shapes.train_tokenizer(text.default_sentences()[:300], 30522).get_vocab())"
    )
    other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert ast.literal_eval(other) == vocab


def test_batches_of_sentences_are_padded_and_cut():
    tokenizer = shapes.train_tokenizer([TEXT], 100)
    made = batches.from_sentences(text.sentences(TEXT), tokenizer, batch=2, count=3, max_length=20)
    assert len(made) == 3
    for each in made:
        ids, mask = each.inputs["input_ids"], each.inputs["attention_mask"]
        assert ids.shape[0] == 2 and ids.shape[1] == max(each.lengths) <= 20 and each.size == ids.numel()
        assert each.tokens == mask.sum() and torch.equal(ids == 0, mask == 0)
    assert len({length for each in made for length in each.lengths}) > 2
    (cut,) = batches.from_sentences(text.sentences(TEXT), tokenizer, batch=9, count=1, max_length=6)
    assert cut.lengths == (6,) * 9, "five sentences make nine, each cut"


def test_batches_of_a_length_are_the_text_going_on():
    tokenizer = shapes.train_tokenizer([TEXT], 100)
    read = text.sentences(TEXT)
    stream = [i for row in tokenizer(read, add_special_tokens=False)["input_ids"] for i in row]
    made = batches.of_length(read, tokenizer, batch=2, count=2, length=30)
    joined = torch.cat([each.inputs["input_ids"][:, 1:-1].flatten() for each in made]).tolist()
    assert joined == (stream * 3)[: len(joined)] and len(joined) > len(stream), "the text is repeated"
    for each in made:
        assert each.lengths == (30, 30) and each.inputs["attention_mask"].all()
        assert set(each.inputs["input_ids"][:, 0].tolist()) == {tokenizer.cls_token_id}
        assert set(each.inputs["input_ids"][:, -1].tolist()) == {tokenizer.sep_token_id}
