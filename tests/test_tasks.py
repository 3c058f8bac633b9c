"""`fastconv.tasks`: what each task gives, for every family, alone and in a stream."""

from __future__ import annotations

import math
from pathlib import Path

import minilm
import pytest
import torch
from tiny import save, save_decoder

import fastconv
from fastconv.tasks import ItemError, pipeline, runner

TEXTS = ["the cat sat.", "a dog", "who ran far away?", "x", "it did so", "the dog sat.", "no!", "he ran, she ran"]
LABELS = {0: "O", 1: "B-PER", 2: "I-PER", 3: "B-LOC", 4: "I-LOC"}
LABELLED = [0, 1, 2, 1, 0, 4, 0]
# Task -> the head, further values of its config, and what the items are.
HEADS = {
    "fill-mask": ("ForMaskedLM", {}),
    "text-classification": ("ForSequenceClassification", {"id2label": {0: "bad", 1: "so so", 2: "good"}}),
    "token-classification": ("ForTokenClassification", {"id2label": LABELS}),
    "question-answering": ("ForQuestionAnswering", {}),
    "multiple-choice": ("ForMultipleChoice", {}),
    "feature-extraction": ("Model", {}),
}
FAMILIES = ("Bert", "ConvBert", "RoCBert")
EVERY = [
    *((task, family + head, config) for task, (head, config) in HEADS.items() for family in FAMILIES),
    ("next-sentence", "BertForNextSentencePrediction", {}),
    ("text-generation", "BertLMHeadModel", {}),
    ("text-generation", "RoCBertForCausalLM", {}),
]


@pytest.fixture(autouse=True)
def _native():
    """Ops run natively: what is tested is not the kernels, and their interpreter is slow."""
    with fastconv.backend("native"):
        yield


def items(task: str) -> list:
    """Items of a task, of several lengths."""
    if task == "fill-mask":
        return [f"{text} [MASK] {'b' * (index % 4)}" for index, text in enumerate(TEXTS)]
    if task == "question-answering":
        return [{"question": "who?", "context": 2 * text} for text in TEXTS]
    if task == "multiple-choice":
        return [{"prompt": "he", "choices": [text[:6], "ran", "s" * (index + 1)]} for index, text in enumerate(TEXTS)]
    if task == "next-sentence":
        return [{"text": text[:8], "text_pair": "he ran"} for text in TEXTS]
    return [text[:12] for text in TEXTS]


def options(task: str) -> dict:
    return {"max_new_tokens": 5} if task == "text-generation" else {}


def build(tmp_path: Path, task: str, name: str, config: dict, **arguments):
    make = save_decoder if task == "text-generation" else save
    return pipeline(task, make(tmp_path / name, name, **config), device="cpu", **options(task), **arguments)


def numbers(result) -> list[float]:
    if isinstance(result, dict | list):
        return [n for each in (result.values() if isinstance(result, dict) else result) for n in numbers(each)]
    return [result] if isinstance(result, float) else []


def rest(result):
    """A result without its floating-point numbers."""
    if isinstance(result, dict):
        return {key: rest(value) for key, value in result.items()}
    if isinstance(result, list):
        return [rest(value) for value in result]
    return None if isinstance(result, float) else result


@pytest.mark.parametrize(("task", "name", "config"), EVERY, ids=[f"{task}-{name}" for task, name, _ in EVERY])
def test_a_result_does_not_depend_on_its_neighbours(task, name, config, tmp_path):
    pipe = build(tmp_path, task, name, config, batch_size=3)
    many = list(pipe.stream(items(task) * 20))
    alone = [next(pipe.run([("it", item)])) for item in items(task)]
    assert len(many) == 20 * len(alone)
    for index, result in enumerate(many):
        expected = alone[index % len(alone)]
        assert rest(result) == rest(expected)
        assert numbers(result) == pytest.approx(numbers(expected), rel=2e-4, abs=2e-5)
    assert len({str(rest(result)) + str(numbers(result)[:1]) for result in alone}) > 1, "all results are the same"


@pytest.mark.parametrize("task", ["token-classification", "question-answering", "feature-extraction"])
def test_a_tokenizer_that_pads_on_the_left(task, tmp_path):
    head, config = HEADS[task]
    folder = save(tmp_path, f"Bert{head}", **config)
    right = list(pipeline(task, folder).stream(items(task)))
    (folder / "tokenizer_config.json").write_text('{"padding_side": "left"}')
    left = list(pipeline(task, folder).stream(items(task)))
    assert left == right


def test_batches_of_convbert_have_no_padding_and_those_of_bert_are_full(tmp_path, monkeypatch):
    shapes: dict[str, list[tuple[int, bool]]] = {}
    for name in ("BertModel", "ConvBertModel"):
        pipe = build(tmp_path, "feature-extraction", name, {}, batch_size=4)
        compute = pipe.task.compute

        def spy(inputs, rows, name=name, compute=compute):
            shapes.setdefault(name, []).append((len(rows), bool(inputs["attention_mask"].all())))
            return compute(inputs, rows)

        monkeypatch.setattr(pipe.task, "compute", spy)
        list(pipe.stream(TEXTS * 3))
    assert all(full for _, full in shapes["ConvBertModel"]) and max(size for size, _ in shapes["ConvBertModel"]) == 4
    assert [size for size, _ in shapes["BertModel"]] == [4] * 6


def test_a_stream_reads_no_further_than_it_must(tmp_path):
    pipe = build(tmp_path, "feature-extraction", "BertModel", {}, batch_size=2)
    read = 0

    def endless():
        nonlocal read
        while True:
            read += 1
            yield "a dog"

    results = pipe.stream(endless())
    next(results)
    assert read == pipe.window == 32
    for _ in range(40):
        next(results)
    assert read == 64


def test_spans_bound_what_is_kept():
    class Sized:
        def __init__(self, length):
            self.length = length

        def __len__(self):
            return self.length

    sound = [({}, [Sized(1000)]) for _ in range(100)]
    assert [len(span) for span in runner._spans(sound, 4)] == [17] * 5 + [15]
    assert [len(span) for span in runner._spans(sound, 32)] == [32, 32, 32, 4], "a batch is never cut"
    assert [len(span) for span in runner._spans([({}, [Sized(1)])] * 70, 4)] == [64, 6]


def test_shapes_of_results(tmp_path):
    fill = build(tmp_path, "fill-mask", "BertForMaskedLM", {})
    single = fill("the [MASK] sat")
    assert [list(entry) for entry in single] == [["score", "token", "token_str", "sequence"]] * 5
    assert fill(["the [MASK] sat"]) == [single]
    two = fill("the [MASK] sat [MASK]")
    assert [len(entries) for entries in two] == [5, 5] and "[MASK]" in two[0][0]["sequence"]
    assert sum(
        entry["score"] for entry in pipeline("fill-mask", tmp_path / "BertForMaskedLM", top_k=999)("[MASK]")
    ) == (pytest.approx(1.0))

    classify = build(tmp_path, "text-classification", "BertForSequenceClassification", {"num_labels": 3})
    assert list(classify("a")[0]) == ["label", "score"] and classify(["a"]) == classify("a")
    pair = classify({"text": "a", "text_pair": "b"})
    assert list(pair) == ["label", "score"] and pair != classify("a")[0]

    features = build(tmp_path, "feature-extraction", "BertModel", {})("a dog")
    assert [len(features), len(features[0]), len(features[0][0])] == [1, 6, 16]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"num_labels": 3}, "softmax"),
        ({"num_labels": 1}, "sigmoid"),
        ({"num_labels": 1, "problem_type": "regression"}, "none"),
        ({"num_labels": 3, "problem_type": "regression"}, "none"),
        ({"num_labels": 3, "problem_type": "multi_label_classification"}, "sigmoid"),
        ({"num_labels": 3, "problem_type": "single_label_classification"}, "softmax"),
    ],
)
def test_problem_type_says_what_a_score_is(config, expected, tmp_path):
    folder = save(tmp_path, "BertForSequenceClassification", **config)
    pipe = pipeline("text-classification", folder, top_k=9)
    with torch.no_grad():
        logits = pipe.model(**pipe.tokenizer(["a dog"], return_tensors="pt")).logits[0]
    scores = {"softmax": logits.softmax(-1), "sigmoid": logits.sigmoid(), "none": logits}[expected]
    result = pipe("a dog")
    assert {entry["label"]: entry["score"] for entry in result} == pytest.approx(
        {f"LABEL_{index}": score for index, score in enumerate(scores.tolist())}
    )
    assert [entry["score"] for entry in result] == sorted((entry["score"] for entry in result), reverse=True)


def test_next_sentence_is_the_first_of_two(tmp_path):
    pipe = build(tmp_path, "next-sentence", "BertForNextSentencePrediction", {})
    for number, item in enumerate(items("next-sentence")):
        with torch.no_grad():
            pipe.model.cls.seq_relationship.bias[0] = 30.0 if number % 2 else -30.0
        encoded = pipe.tokenizer(item["text"], item["text_pair"])
        with torch.no_grad():
            follows = pipe.model(**{k: torch.tensor([v]) for k, v in encoded.items()}).logits.softmax(-1)[0, 0].item()
        result = pipe(item)
        assert result["label"] == ("IsNext" if follows >= 0.5 else "NotNext") == ("IsNext" if number % 2 else "NotNext")
        assert result["score"] == pytest.approx(max(follows, 1 - follows), abs=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_multiple_choice_scores_the_choices_of_a_prompt(family, tmp_path):
    folder = save(tmp_path, f"{family}ForMultipleChoice")
    choices = ["a dog", "a cat", "he ran"]  # of one length: one batch is what the model takes
    pipe = pipeline("multiple-choice", folder, top_k=3)
    encoded = pipe.tokenizer(["who"] * 3, choices, return_tensors="pt", padding=True)
    lengths = encoded["attention_mask"].sum(1)
    with torch.no_grad():
        logits = [
            pipe.model(**{k: v[None, index : index + 1, : lengths[index]] for k, v in encoded.items()}).logits.item()
            for index in range(3)
        ]
    scores = torch.tensor(logits).softmax(0).tolist()
    result = pipe({"prompt": "who", "choices": choices})
    assert {entry["index"]: entry["score"] for entry in result} == pytest.approx(dict(enumerate(scores)), abs=1e-5)
    assert [entry["choice"] for entry in result] == [choices[entry["index"]] for entry in result]
    best = pipeline("multiple-choice", folder)({"prompt": "who", "choices": choices})
    assert rest(best) == rest(result[0])


def test_question_answering_finds_what_the_logits_say(tmp_path, monkeypatch):
    pipe = build(tmp_path, "question-answering", "BertForQuestionAnswering", {"max_position_embeddings": 60})
    context = "Jo lives in Rome, and Al lives in Bern. " * 3
    wanted = context.index("Bern", 60)

    def towards(start, end):
        def compute(inputs, rows):
            return [compute_one(row) for row in rows]

        def compute_one(row):
            # Logits that point at the characters from start to end, where a window has them.
            first, last = (
                torch.tensor([20.0 if kind == 1 and at <= place < to else 0.0 for (at, to), kind in pairs(row)])
                for place in (start, end - 1)
            )
            return pipe.task._best_spans(first, last, row)

        def pairs(row):
            return zip(row.offsets, row.inputs["token_type_ids"], strict=True)

        return compute

    monkeypatch.setattr(pipe.task, "compute", towards(wanted, wanted + 4))
    answer = pipe({"question": "where?", "context": context})
    assert answer["answer"] == "Bern" and (answer["start"], answer["end"]) == (wanted, wanted + 4)
    assert 1.0 < answer["score"] < 3.0, "the sum over the windows that hold it"
    # In the middle of words: widened to them.
    monkeypatch.setattr(pipe.task, "compute", towards(wanted + 1, wanted + 2))
    assert pipe({"question": "where?", "context": context})["answer"] == "Bern"
    # Longer than max_answer_len: something else.
    monkeypatch.setattr(pipe.task, "compute", towards(0, 40))
    assert len(pipe({"question": "where?", "context": context})["answer"]) < 39


def test_windows_of_a_long_context_hold_each_token_with_its_surroundings(tmp_path):
    pipe = build(tmp_path, "question-answering", "BertForQuestionAnswering", {}, doc_stride=4)
    context = "abcdefghij klm nop qrs tuv wxyz, " * 4
    (rows,) = pipe.task.encode([{"question": "who ran?", "context": context}])
    whole = pipe.tokenizer(context, add_special_tokens=False)["input_ids"]
    joined: list[int] = []
    for row in rows:
        assert len(row) <= 20 and row.inputs["input_ids"][:9] == rows[0].inputs["input_ids"][:9]
        tokens = row.inputs["input_ids"][row.inputs["token_type_ids"].index(1) : -1]
        assert row.inputs["input_ids"][-1] == pipe.tokenizer.sep_token_id
        if joined:
            assert joined[-4:] == tokens[:4], "neighbours share doc_stride tokens"
        joined += tokens[4:] if joined else tokens
    assert joined == whole and len(rows) > 9


def test_token_classification_joins_neighbours_of_a_label(tmp_path, monkeypatch):
    folder = save(tmp_path, "BertForTokenClassification", id2label=LABELS)
    text = "he ran"  # tokens h ##e r ##a ##n
    told = {
        "none": [("B-PER", "h", 0, 1), ("I-PER", "##e", 1, 2), ("B-PER", "r", 3, 4), ("I-LOC", "##n", 5, 6)],
        "simple": [("PER", "he", 0, 2), ("PER", "r", 3, 4), ("LOC", "##n", 5, 6)],
    }
    for strategy, expected in told.items():
        pipe = pipeline("token-classification", folder, aggregation_strategy=strategy)
        monkeypatch.setattr(
            pipe.task, "compute", lambda inputs, rows: [([0.5, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4], LABELLED)]
        )
        result = pipe(text)
        assert [
            (next(iter(entry.values())), entry["word"], entry["start"], entry["end"]) for entry in result
        ] == expected
        assert result[0]["score"] == pytest.approx(0.9 if strategy == "none" else 0.85)
        assert ("index" in result[0]) is (strategy == "none")


@pytest.mark.parametrize("strategy", ["none", "simple"])
def test_a_score_that_is_nan_is_seen(strategy, tmp_path):
    folder = save(tmp_path, "BertForTokenClassification", id2label={0: "O", 1: "X"})
    pipe = pipeline("token-classification", folder, aggregation_strategy=strategy)
    with torch.no_grad():
        pipe.model.classifier.bias.fill_(torch.nan)
    results = pipe("he ran")
    assert results and all(math.isnan(entry["score"]) for entry in results)


def test_an_unknown_word_is_told_as_it_stands(tmp_path):
    folder = save(tmp_path, "BertForTokenClassification", id2label={0: "X", 1: "Y"})
    words = [entry["word"] for entry in pipeline("token-classification", folder)("a ☃ dog")]
    assert words == ["a", "☃", "d", "##o", "##g"]


def test_a_tokenizer_without_a_pad_token(tmp_path):
    folder = save(tmp_path, "BertForSequenceClassification")
    texts = ["a dog", "it", "a cat", "who ran"]
    expected = pipeline("text-classification", folder)(texts)
    (folder / "tokenizer_config.json").write_text('{"pad_token": null}')
    results = pipeline("text-classification", folder)(texts)
    assert rest(results) == rest(expected) and numbers(results) == pytest.approx(numbers(expected), abs=1e-5)


def test_truncation_cuts(tmp_path):
    folder = save(tmp_path, "BertModel")
    cut = pipeline("feature-extraction", folder, truncate=True)
    assert len(cut("abcdefgh" * 9)[0]) == 20
    assert numbers(cut("abcdefgh" * 9)) == pytest.approx(numbers(cut("abcdefgh" * 2 + "ab")), abs=1e-5)
    with pytest.raises(ItemError, match="74 tokens are more than the 20"):
        pipeline("feature-extraction", folder)("abcdefgh" * 9)


def test_generation_goes_on_from_the_prompt(tmp_path):
    folder = save_decoder(tmp_path)
    pipe = pipeline("text-generation", folder, max_new_tokens=4)
    ids = pipe.tokenizer("A dog")["input_ids"]
    (expected,) = pipe.model.generate(torch.tensor([ids]), max_new_tokens=4).tolist()
    (result,) = pipe("A dog")
    assert result["generated_text"].startswith("A dog")
    whole, prompt = (pipe.tokenizer.decode(i, skip_special_tokens=True) for i in (expected, ids))
    assert result["generated_text"] == "A dog" + whole[len(prompt) :] != "A dog"

    bare = pipeline("text-generation", folder, max_new_tokens=4, add_special_tokens=False)
    ids = ids[1:-1]
    (expected,) = pipe.model.generate(torch.tensor([ids]), max_new_tokens=4).tolist()
    whole = pipe.tokenizer.decode(expected, skip_special_tokens=True)
    assert bare("A dog") == [{"generated_text": "A dog" + whole[5:]}] != [result]
    assert pipe("A cat")[0]["generated_text"][5:] != result["generated_text"][5:], "the prompt is not looked at"

    def sample(seed, texts):
        return pipeline("text-generation", folder, max_new_tokens=8, do_sample=True, temperature=3.0, seed=seed)(texts)

    together = sample(3, ["a dog", "a cat", "a cat"])
    assert together == sample(3, ["a dog", "a cat", "a cat"]) != sample(4, ["a dog", "a cat", "a cat"])
    assert together[1] == together[2] == sample(3, "a cat"), "with a seed a text goes on as it does alone"


@pytest.mark.parametrize("dtype", ["bf16", torch.bfloat16])
def test_dtype(dtype, tmp_path):
    exact = build(tmp_path, "feature-extraction", "BertModel", {})
    rounded = pipeline("feature-extraction", tmp_path / "BertModel", dtype=dtype)
    assert rounded.model.dtype == torch.bfloat16
    assert numbers(rounded("a dog")) == pytest.approx(numbers(exact("a dog")), abs=0.1)
    assert numbers(rounded("a dog")) != numbers(exact("a dog"))


def test_the_model_is_accelerated(tmp_path):
    pipe = build(tmp_path, "feature-extraction", "BertModel", {})
    assert fastconv.restore(pipe.model) is pipe.model  # raises if there is nothing to restore


def test_minilm_finds_what_is_meant_alike():
    pipe = pipeline("feature-extraction", minilm.folder(), device="cpu")
    sentences = ["The cat sat on the mat.", "A kitten was sitting on a rug.", "Interest rates rose again in March."]
    pooled = torch.stack([torch.tensor(result[0]).mean(0) for result in pipe(sentences)])
    alike = torch.nn.functional.normalize(pooled) @ torch.nn.functional.normalize(pooled).T
    assert alike[0, 1] > 0.5 > 0.2 > alike[0, 2].abs()


def test_minilm_equals_its_golden_vectors():
    from safetensors.torch import load_file

    expected = load_file(minilm.DATA / "expected.safetensors")["all40.mean_pooled_normalized"]
    sentences = [entry["text"] for entry in minilm.golden()["sentences"]]
    pipe = pipeline("feature-extraction", minilm.folder(), device="cpu", batch_size=16)
    pooled = torch.stack([torch.tensor(result[0]).mean(0) for result in pipe.stream(sentences)])
    assert (torch.nn.functional.normalize(pooled) - expected).abs().max() < 1e-5
