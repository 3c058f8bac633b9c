"""Tasks from text to result: `fastconv.pipeline`, which is also `fastconv run`."""

from __future__ import annotations

import inspect
import os
from typing import Any

import torch

from fastconv.tasks.classification import MultipleChoice, NextSentence, TextClassification
from fastconv.tasks.fill_mask import FillMask
from fastconv.tasks.generation import TextGeneration
from fastconv.tasks.loading import load
from fastconv.tasks.question_answering import QuestionAnswering
from fastconv.tasks.runner import ItemError, Pipeline
from fastconv.tasks.task import Task, check_count
from fastconv.tasks.tokens import FeatureExtraction, TokenClassification

_CLASSES: tuple[type[Task], ...] = (
    FillMask,
    TextClassification,
    TokenClassification,
    QuestionAnswering,
    MultipleChoice,
    NextSentence,
    TextGeneration,
    FeatureExtraction,
)
TASKS = {task.name: task for task in _CLASSES}

__all__ = ["TASKS", "ItemError", "Pipeline", "pipeline"]


def pipeline(
    task: str,
    model: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "fp32",
    batch_size: int = 32,
    truncate: bool | None = None,
    top_k: int | None = None,
    aggregation_strategy: str | None = None,
    doc_stride: int | None = None,
    max_answer_len: int | None = None,
    add_special_tokens: bool | None = None,
    max_new_tokens: int | None = None,
    do_sample: bool | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    seed: int | None = None,
) -> Pipeline:
    """A task with the model and the tokenizer of a checkpoint, accelerated; results as in transformers' pipelines.

        fill = fastconv.pipeline("fill-mask", "folder")
        fill("Plants create [MASK] through photosynthesis.")  # [{score, token, token_str, sequence}, ...]
        fill(["One [MASK].", "Two [MASK]."])  # a list of such results
        for result in fill.stream(open("many.txt")): ...  # in order, in constant memory

    task, and what an item is if not a str -> its result:
        "fill-mask" -> [{score, token, token_str, sequence}, ...], 5 or top_k; for several masks a list of such lists
        "text-classification", also {text, text_pair} -> {label, score}; with top_k a list of them
        "token-classification" -> [{entity, score, index, word, start, end}, ...]
        "question-answering", {question, context} -> {score, start, end, answer}; with top_k above 1 a list of them
        "multiple-choice", {prompt, choices} -> {index, choice, score}; with top_k a list of them
        "next-sentence", {text, text_pair} -> {label, score}, IsNext or NotNext
        "text-generation" -> [{generated_text}]
        "feature-extraction" -> the last hidden state, lists of (1, tokens, hidden_size)
    model: a checkpoint folder, or a hub id like "org/name", which needs huggingface_hub
    device: "cpu", "cuda", ...; None: a GPU if there is one
    dtype: "fp32", "bf16" or "fp16", or the torch.dtype
    batch_size: how many texts go through the model at a time. ConvBERT's results depend on a batch's padding, so its
        batches are of texts of equal length: a result depends on its own text alone
    truncate: whether to cut the end of a text that is longer than the model, instead of raising
    aggregation_strategy: of token-classification, "none" or "simple", see TokenClassification
    doc_stride, max_answer_len: of question-answering, 128 and 15 tokens, see QuestionAnswering
    add_special_tokens: of text-generation, whether the model reads [CLS] prompt [SEP], the default, or the bare prompt
    max_new_tokens, do_sample, temperature, top_p, seed: of text-generation, and there top_k: as of `generate`. With a
        seed each text is sampled by itself, as if it were the only one

    Raises FileNotFoundError, NotADirectoryError, ImportError, OSError: no such checkpoint. ValueError, TypeError: the
    checkpoint is unfit for the task, such as one without its head; an argument that is wrong, or not one of the task.
    """
    from fastconv.parity.environment import usable_device, usable_dtype

    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    check_count("batch_size", batch_size)
    options = {
        "truncate": truncate,
        "top_k": top_k,
        "aggregation_strategy": aggregation_strategy,
        "doc_stride": doc_stride,
        "max_answer_len": max_answer_len,
        "add_special_tokens": add_special_tokens,
        "max_new_tokens": max_new_tokens,
        "do_sample": do_sample,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
    }
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    accepted = inspect.signature(TASKS[task]).parameters
    if unfit := [name for name in given if name not in accepted]:
        raise ValueError(f"task {task} has no {', '.join(unfit)}")
    place = usable_device(device)
    checkpoint = load(TASKS[task], model, place, usable_dtype(dtype, place))
    return Pipeline(TASKS[task](checkpoint, **given), batch_size)
