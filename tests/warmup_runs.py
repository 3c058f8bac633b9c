"""What test_warmup.py runs in processes of their own: the compiler's kernels, with a stand-in for the GPU.

    python warmup_runs.py requests CASE...      prints, as JSON, what a warm-up compiles and what requests ask for
    python warmup_runs.py warm|serve            prints how many variants were compiled, and how many the cache had
    python warmup_runs.py gpu-warm|gpu-serve CASE       the same of a case, and with a GPU

But for the last, tensors are on the CPU, and launches are noted or do nothing: the compiler is Triton's own, for a GPU
of capability 9.0.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

# A kernel decides at its definition whether it is interpreted; Triton 3.10 changes the default of fusion to off.
os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

import fastconv
from fastconv import dispatch, graphs, warmup

SMALL = {
    "vocab_size": 30, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 96,
    "max_position_embeddings": 320,
}  # fmt: skip
CONVBERT = {**SMALL, "embedding_size": 16, "num_groups": 2, "pad_token_id": 0}
# Class, what its config has beside, dtype, padding, whether it trains, graphs, the largest batch and length.
CASES: dict[str, tuple[str, dict[str, Any], torch.dtype, str, bool, bool, int, int]] = {
    "bert": ("BertModel", SMALL, torch.float16, "keep", False, False, 4, 20),
    "bert training": ("BertForMaskedLM", SMALL, torch.float32, "keep", True, False, 2, 17),
    "bert graphs": ("BertForSequenceClassification", SMALL, torch.float16, "keep", False, True, 3, 20),
    "decoder": ("BertLMHeadModel", {**SMALL, "is_decoder": True}, torch.float16, "keep", False, False, 2, 19),
    "convbert long": ("ConvBertModel", CONVBERT, torch.float16, "keep", False, False, 4, 300),
    "convbert packed": ("ConvBertForTokenClassification", CONVBERT, torch.float32, "remove", False, False, 4, 20),
    "convbert training": ("ConvBertModel", CONVBERT, torch.float16, "remove", True, False, 2, 17),
    "roc_bert": ("RoCBertForMultipleChoice", SMALL, torch.float32, "remove", False, False, 2, 18),
}
_REQUESTS = 60


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


def build(case: str) -> tuple[Any, int, int]:
    """The model of a case, and the limits of its requests."""
    name, config, dtype, padding, training, with_graphs, max_batch, max_length = CASES[case]
    model_class = getattr(fastconv, name)
    model = model_class(model_class.config_class(**config)).to(dtype).train(training)
    return fastconv.accelerate(model, padding=padding, graphs=with_graphs), max_batch, max_length


def ask(model: Any, max_batch: int, max_length: int, generator: random.Random) -> None:
    """A request of any batch, lengths and arguments."""
    B, S = generator.randint(1, max_batch), generator.randint(1, max_length)
    shape = (B, S)
    call = {"input_ids": torch.tensor([[generator.randrange(1, 30) for _ in range(S)] for _ in range(B)])}
    lengths = [generator.randint(1, S) for _ in range(B)]
    if generator.random() < 0.7:
        left = generator.random() < 0.3
        rows = [[0] * (S - n) + [1] * n if left else [1] * n + [0] * (S - n) for n in lengths]
        call["attention_mask"] = torch.tensor(rows)
    if generator.random() < 0.5:
        call["token_type_ids"] = torch.zeros(shape, dtype=torch.int64)
    if type(model).__name__.startswith("RoC"):
        call |= {name: torch.zeros(shape, dtype=torch.int64) for name in ("input_shape_ids", "input_pronunciation_ids")}
    if type(model).__name__.endswith("ForMultipleChoice"):
        call = {name: tensor[:, None] for name, tensor in call.items()}
    if not model.training:
        with torch.inference_mode():
            output = model(**call, **({"use_cache": True} if model.config.is_decoder else {}))
            if model.config.is_decoder and max_length > S:
                mask = torch.ones(B, S + 1, dtype=torch.int64)
                model(call["input_ids"][:, -1:], attention_mask=mask, past_key_values=output.past_key_values)
        return
    if "MaskedLM" in type(model).__name__:
        call |= {"labels": call["input_ids"], "loss_only": generator.random() < 0.5}
    output = model(**call)
    loss = output.loss if "labels" in call else output.last_hidden_state[:, 0].float().square().mean()
    loss.backward()


def requests(case: str) -> dict[str, Any]:
    """The variants that a warm-up of a case finds, and those that random requests ask for."""
    model, max_batch, max_length = build(case)
    found = warmup.find_variants(model, max_batch=max_batch, max_length=max_length)
    asked: set[warmup.Key] = set()
    for seed in range(3):
        generator = random.Random(seed)
        for _ in range(_REQUESTS // 3):
            with noting(asked):
                ask(model, max_batch, max_length, generator)
    return {
        "warmed": sorted(map(" ".join, found)),
        "asked": sorted(map(" ".join, asked)),
        "kernels": sorted({kernel for kernel, _ in asked}),
    }


@contextlib.contextmanager
def noting(asked: set[warmup.Key]) -> Iterator[None]:
    """Launches are noted and not made. The process has compiled nothing: Triton tells of every one."""

    def hook(*, key: str, fn: Any, **rest: Any) -> bool:
        asked.add((fn.name, key))
        return True

    knobs.runtime.jit_cache_hook = hook
    try:
        yield
    finally:
        knobs.runtime.jit_cache_hook = None


def warm() -> dict[str, Any]:
    """A warm-up of very small requests, and what it compiled."""
    model, max_batch, _ = build("bert")
    variants = warmup.find_variants(model, max_batch=max_batch, max_length=2)
    compiled, cached = warmup.compile_variants(variants)
    return {"variants": len(variants), "compiled": compiled, "cached": cached, "folder": warmup.cache_folder()}


def serve() -> dict[str, Any]:
    """Requests as small, launched as ever but for the GPU's part, and what they compiled."""
    triton.compiler.CompiledKernel._init_handles = lambda self: setattr(self, "_run", lambda *given: None)
    model, max_batch, _ = build("bert")
    return counted(model, max_batch, 2)


def counted(model: Any, max_batch: int, max_length: int) -> dict[str, Any]:
    """What random requests compiled, and what the cache had for them."""
    hits: list[bool] = []
    knobs.compilation.listener = lambda *, cache_hit, **rest: hits.append(cache_hit)
    generator = random.Random(0)
    for _ in range(20):
        ask(model, max_batch, max_length, generator)
    return {"compiled": hits.count(False), "cached": hits.count(True)}


def on_gpu(mode: str, case: str) -> dict[str, Any]:
    """The warm-up itself, or requests as they come."""
    torch.set_default_device("cuda")
    model, max_batch, max_length = build(case)
    if mode == "gpu-serve":
        return counted(model, max_batch, max_length)
    warmed = warmup.warm_up(model, max_batch=max_batch, max_length=max_length)
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
    if sys.argv[1] == "requests":
        print(json.dumps({case: requests(case) for case in sys.argv[2:]}))
    else:
        print(json.dumps(warm() if sys.argv[1] == "warm" else serve()))
