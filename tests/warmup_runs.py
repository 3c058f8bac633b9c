"""What test_warmup.py runs in processes of their own: the compiler's kernels, with a stand-in for the GPU.

    python warmup_runs.py requests CASE...      prints, as JSON, what a warm-up compiles and what requests ask for
    python warmup_runs.py serve                 prints what warm-ups and requests compiled, and what the cache had
    python warmup_runs.py gpu-warm|gpu-serve CASE       the same of a case, and with a GPU

But for the last, tensors are on the CPU, and launches are noted or do nothing: the compiler is Triton's own, for a GPU
of capability 9.0.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

# A kernel decides at its definition whether it is interpreted; Triton 3.10 changes the default of fusion to off.
os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

import fastconv
from fastconv import dispatch, dry_run, graphs, warmup
from fastconv.parity.paths import transformers_model
from fastconv.reference.sampling import NextToken

SMALL = {
    "vocab_size": 30, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 96,
    "max_position_embeddings": 320,
}  # fmt: skip
CONVBERT = {**SMALL, "embedding_size": 16, "num_groups": 2, "pad_token_id": 0}
ROC_BERT = {**SMALL, "shape_vocab_size": 10, "pronunciation_vocab_size": 10}
DECODER = {**SMALL, "is_decoder": True, "add_cross_attention": True, "eos_token_id": None, "pad_token_id": 0}


class Case(NamedTuple):
    """A model, and what is asked of it."""

    class_name: str
    config: dict[str, Any]
    dtype: torch.dtype
    max_batch: int
    max_length: int
    padding: str = "keep"
    training: bool = False
    graphs: bool = False
    autocast: torch.dtype | None = None
    theirs: bool = False  # transformers' class


HALF, SINGLE = torch.float16, torch.float32
CASES = {
    "bert": Case("BertModel", SMALL, HALF, 2, 18),
    "bert training": Case("BertForPreTraining", SMALL, SINGLE, 2, 17, training=True),
    "bert graphs": Case("BertForSequenceClassification", SMALL, HALF, 2, 17, graphs=True),
    "bert autocast": Case("BertForMaskedLM", SMALL, SINGLE, 2, 17, autocast=HALF),
    "decoder": Case("BertLMHeadModel", DECODER, HALF, 2, 19),
    "decoder training": Case("BertLMHeadModel", DECODER, SINGLE, 2, 17, training=True, autocast=HALF),
    "convbert long": Case("ConvBertModel", {**CONVBERT, "max_position_embeddings": 1100}, HALF, 1, 1100),
    "convbert packed": Case("ConvBertForTokenClassification", CONVBERT, SINGLE, 2, 18, "remove"),
    "convbert training": Case("ConvBertModel", CONVBERT, HALF, 2, 17, "remove", training=True),
    "roc_bert": Case("RoCBertForMultipleChoice", ROC_BERT, SINGLE, 2, 17, "remove"),
    "transformers decoder": Case("BertLMHeadModel", DECODER, HALF, 2, 19, theirs=True),
}
# What is compiled: few variants.
SERVED = Case("RoCBertForMultipleChoice", ROC_BERT, HALF, 2, 1)
_REQUESTS = 130


class _GPU:
    """Triton's driver of a GPU that isn't there."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class _Recorder:
    """Records nothing: a replay is the call again."""

    turn = contextlib.nullcontext

    def wait(self) -> None:
        """Nothing runs."""

    def record(self, function: Callable[[], Any]) -> Callable[[], Any]:
        function()
        return function


def build(case: Case) -> Any:
    """The model of a case."""
    model_class = getattr(fastconv, case.class_name)
    config = model_class.config_class(**case.config)
    model = transformers_model(case.class_name, config)[0] if case.theirs else model_class(config)
    model.to(case.dtype).train(case.training)
    return fastconv.accelerate(model, padding=case.padding, graphs=case.graphs)


def ask(model: Any, case: Case, generator: random.Random) -> None:
    """A request of any batch, lengths and arguments."""

    def maybe(probability: float = 0.4) -> bool:
        return generator.random() < probability

    def mask(B: int, S: int) -> torch.Tensor:
        left, lengths = maybe(), [generator.randint(1, S) for _ in range(B)]
        return torch.tensor([[0] * (S - n) + [1] * n if left else [1] * n + [0] * (S - n) for n in lengths])

    config = model.config
    B, S = generator.choice((1, case.max_batch)), generator.randint(1, case.max_length)
    if maybe(0.2):
        S = min(16, case.max_length)
    call = {"input_ids": torch.ones(B, S, dtype=torch.int64)}
    if case.class_name.startswith("RoC"):
        call |= {name: torch.zeros_like(call["input_ids"]) for name in ("input_shape_ids", "input_pronunciation_ids")}
    if maybe():
        call["token_type_ids"] = torch.zeros_like(call["input_ids"])
    if maybe():
        call["position_ids"] = torch.arange(S).repeat(B, 1)
    if maybe(0.6):
        call["attention_mask"] = mask(B, S)
    if case.class_name.endswith("ForMultipleChoice"):
        call = {name: tensor[:, None] for name, tensor in call.items()}
    elif maybe(0.3):
        call["inputs_embeds"] = torch.zeros(*call.pop("input_ids").shape, getattr(config, "embedding_size", 64))
        call["inputs_embeds"] = call["inputs_embeds"].to(case.dtype)
    elif maybe(0.2) and not case.theirs:
        call["attention_mask"] = torch.ones(B, S, S, dtype=torch.int64).tril()
    if maybe(0.3) and not case.theirs:
        call["head_mask"] = torch.ones(config.num_attention_heads // getattr(config, "head_ratio", 1))
    if getattr(config, "add_cross_attention", False) and maybe(0.7):
        states = generator.choice((1, 16, 32, generator.randint(1, 40)))
        call["encoder_hidden_states"] = torch.zeros(B, states, config.hidden_size, dtype=case.dtype)
        if maybe():
            call["encoder_attention_mask"] = mask(B, states)
    if "input_ids" in call and maybe():
        call |= labels(case.class_name, call["input_ids"])
    with contextlib.nullcontext() if case.autocast is None else torch.autocast(_device(model), case.autocast):
        if not case.training:
            with torch.inference_mode():
                serve_one(model, case, call, generator)
            return
        if getattr(config, "is_decoder", False):
            call["use_cache"] = maybe()
        output = model(**call)
        # The sum over an empty set, of a batch without labels, is no number.
        loss = output.loss if "loss_only" in call else output[0].float().square().mean()
    loss.backward()


def labels(class_name: str, ids: torch.Tensor) -> dict[str, Any]:
    """The arguments of a call for the loss alone, of heads that have one."""
    if not class_name.endswith(("ForPreTraining", "ForMaskedLM", "LMHeadModel")):
        return {}
    given = {"labels": ids.where(torch.rand(ids.shape, device=ids.device) < 0.5, -100), "loss_only": True}
    if class_name.endswith("ForPreTraining"):
        given["next_sentence_label"] = torch.zeros_like(ids[:, 0])
    return given


def serve_one(model: Any, case: Case, call: dict[str, Any], generator: random.Random) -> None:
    """A request in inference; of a decoder what follows it too."""
    if not getattr(model.config, "is_decoder", False):
        model(**call)
        return
    use_cache = generator.random() < 0.7
    cache = model(**call, use_cache=use_cache).past_key_values
    ids, more = call.get("input_ids"), generator.randint(1, 3)
    if ids is None or ids.shape[1] + more > case.max_length:
        return
    given = {name: tensor for name, tensor in call.items() if name.startswith("encoder_")}
    # transformers' generate doesn't know of an encoder's states beside a decoder alone.
    if generator.random() < 0.5 and not (given and case.theirs):
        given |= {"token_type_ids": call["token_type_ids"]} if "token_type_ids" in call else {}
        model.generate(ids, attention_mask=torch.ones_like(ids), **given, max_new_tokens=more, use_cache=use_cache)
    elif cache is not None:
        # As one's own loop may be.
        given |= {"attention_mask": torch.ones(len(ids), ids.shape[1] + 1)} if "attention_mask" in call else {}
        given |= {"token_type_ids": torch.zeros_like(ids[:, :1])} if "token_type_ids" in call else {}
        last = ids[:, -1:] if generator.random() < 0.5 else ids[:, -1:].clone()
        model(last, past_key_values=cache, **given)


def _device(model: Any) -> str:
    return next(model.parameters()).device.type


def requests(name: str) -> dict[str, Any]:
    """The variants that a warm-up of a case finds, and those that random requests ask for."""
    case = CASES[name]
    model = build(case)
    limits = {"max_batch": case.max_batch, "max_length": case.max_length}
    found = warmup.find_variants(model, **limits, autocast=case.autocast)
    asked: set[warmup.Key] = set()
    generator = random.Random(0)
    with noting(asked):
        for _ in range(_REQUESTS):
            ask(model, case, generator)
    return {
        "warmed": sorted(map(" ".join, found)),
        "asked": sorted(map(" ".join, asked)),
        "kernels": sorted({kernel for kernel, _ in asked}),
    }


@contextlib.contextmanager
def noting(asked: set[warmup.Key]) -> Iterator[None]:
    """Launches are noted and not made, in a process that has compiled nothing: Triton tells of every variant."""

    def hook(*, key: str, fn: Any, compile: dict[str, Any], **rest: Any) -> bool:
        asked.add((fn.name, key))
        # Once, which is faster.
        fn.jit_function.device_caches[compile["device"]][0][key] = dry_run.NotLaunched()
        return True

    for kernel in dry_run.all_kernels():
        kernel.device_caches.clear()
    knobs.runtime.jit_cache_hook = hook
    try:
        yield
    finally:
        knobs.runtime.jit_cache_hook = None


def apart(function: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a function returns in a process of its own; this one must have compiled nothing."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=lambda: sender.send(function()))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    finally:
        process.join()


def warm() -> dict[str, Any]:
    """A warm-up of very small requests, and what it compiled."""
    variants = warmup.find_variants(build(SERVED), max_batch=SERVED.max_batch, max_length=SERVED.max_length)
    compiled, cached = warmup.compile_variants(variants)
    return {"variants": len(variants), "compiled": compiled, "cached": cached, "folder": warmup.cache_folder()}


def serve() -> dict[str, Any]:
    """Requests as small, launched as ever but for the GPU's part, and what they compiled."""
    triton.compiler.CompiledKernel._init_handles = lambda self: setattr(self, "_run", lambda *given: None)
    return counted(SERVED)


def counted(case: Case) -> dict[str, Any]:
    """What random requests compiled, and what the cache had for them."""
    hits: list[bool] = []
    knobs.compilation.listener = lambda *, cache_hit, **rest: hits.append(cache_hit)
    model, generator = build(case), random.Random(0)
    for _ in range(40):
        ask(model, case, generator)
    return {"compiled": hits.count(False), "cached": hits.count(True)}


def served() -> dict[str, Any]:
    """Two warm-ups, requests after them, and requests without one of the variants; each in a process of its own."""
    found = {"first": apart(warm), "again": apart(warm), "served": apart(serve)}
    next(file for file in sorted(Path(knobs.cache.dir).glob("*/_layer_norm_fwd_kernel.json"))).unlink()
    return {**found, "without one": apart(serve)}


def on_gpu(mode: str, name: str) -> dict[str, Any]:
    """The warm-up itself, or requests as they come."""
    torch.set_default_device("cuda")
    case = CASES[name]
    if mode == "gpu-serve":
        return counted(case)
    limits = {"max_batch": case.max_batch, "max_length": case.max_length}
    warmed = warmup.warm_up(build(case), **limits, autocast=case.autocast)
    return {"variants": sum(warmed.variants.values()), "compiled": warmed.compiled, "cached": warmed.found}


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if sys.argv[1].startswith("gpu-"):
        print(json.dumps(on_gpu(*sys.argv[1:])))
        sys.exit()
    driver.set_active(_GPU())
    dispatch._INTERPRETING = True  # what makes ops on the CPU run their kernels
    graphs.recorder_of = lambda x: _Recorder()
    # What nothing has computed may be no number, of which generate tells.
    NextToken.choose = lambda self, logits, generator: logits.argmax(-1)
    if sys.argv[1] == "requests":
        print(json.dumps({name: requests(name) for name in sys.argv[2:]}))
    else:
        print(json.dumps(served()))
