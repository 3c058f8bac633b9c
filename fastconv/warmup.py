"""Compiling ahead: every variant of a kernel that a model's requests can ask for, before the first of them comes.

Triton compiles a kernel anew for other constants, launch options and types, and for what it makes use of in a number or
an address: that it is 1, or a multiple of 16. A model fixes nearly all of that. What is left depends on the batch and
the length by thresholds, which a tuned table may have anywhere, and where masks are read by what the length is a
multiple of. So the model runs over a lattice of both that is close enough to come by every one of them, with
launches noted instead of made; what was noted is compiled, and lies in Triton's cache for every process from then on.
"""

from __future__ import annotations

import contextlib
import importlib
import pkgutil
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from fastconv import dispatch
from fastconv.graphs import Graphs
from fastconv.swap import original_class

# Called with what is done next, the steps done and the steps in all.
Progress = Callable[[str, int, int], None]
# A variant's name: that of the kernel, and Triton's of what it is compiled for.
Key = tuple[str, str]

_OVER_VOCABULARY = ("ForMaskedLM", "ForPreTraining", "LMHeadModel", "ForCausalLM")


@dataclass(frozen=True)
class Request:
    """What a model is asked for: a batch (B, S).

    padding: how many tokens an attention_mask hides, 0 or, if S is not 1, 1; None: there is none
    typed: with token_type_ids
    """

    batch: int
    length: int
    padding: int | None
    typed: bool


@dataclass(frozen=True)
class Variant:
    """One kernel as Triton compiles it for some requests.

    kernel: the function, of triton.JITFunction
    data: what Triton's `preload` compiles it from
    request: the first one that asks for it
    """

    kernel: Any
    data: str
    request: Request


@dataclass(frozen=True)
class Warmed:
    """What a warm-up did.

    variants: how many of each kernel there are, by its name
    compiled, found: how many of them were compiled now, and how many the cache had
    seconds: what all of it took
    folder: where the cache is
    """

    variants: Mapping[str, int]
    compiled: int
    found: int
    seconds: float
    folder: str


def warm_up(model: nn.Module, *, max_batch: int, max_length: int, progress: Progress | None = None) -> Warmed:
    """Compile what an accelerated model's calls can ask for, up to a batch and a length; run some of these calls.

    model: on a GPU, in the dtype that it will have. In eval mode its calls are those under torch.inference_mode(), a
        decoder's with a cache too; in training mode those with gradients, and with loss_only=True
    max_batch, max_length: of the requests; the length is in tokens, padding included
    progress: called before each step

    What other calls ask for is compiled when they come: those with head masks, an encoder's states, or autocast where
    this one is not under it. Nothing else may launch this library's kernels in this process meanwhile. Parameters,
    their gradients, and the state of random numbers stay as they are.

    Raises: ValueError for a model on a device without the kernels, or limits that don't fit; what the model raises.
    """
    start = time.perf_counter()
    device = next(model.parameters()).device
    check_device(device)
    variants = find_variants(model, max_batch=max_batch, max_length=max_length, progress=progress)
    compiled, found = compile_variants(variants, progress)
    # What a first launch does beside: it loads the code, and makes what passes its arguments.
    for request in dict.fromkeys(variant.request for variant in variants.values()):
        _run(model, request)
    torch.cuda.synchronize(device)
    counts = Counter(kernel for kernel, _ in variants)
    return Warmed(dict(sorted(counts.items())), compiled, found, time.perf_counter() - start, cache_folder())


def check_device(device: torch.device) -> None:
    """Raise ValueError unless the kernels run on a device, and are compiled for it."""
    if device.type != "cuda" or not dispatch.use_triton(torch.empty(0, device=device)):
        raise ValueError(f"there is nothing to compile for the device {str(device)!r}: it needs a GPU that has kernels")


def check_limits(config: Any, max_batch: int, max_length: int) -> None:
    """Raise ValueError for limits below 1, or a length that the model has no positions for."""
    most = config.max_position_embeddings
    if max_batch < 1:
        raise ValueError(f"the largest batch must be at least 1, got {max_batch}")
    if not 1 <= max_length <= most:
        raise ValueError(f"the largest length must be from 1 to {most}, the model's positions, got {max_length}")


def cache_folder() -> str:
    """Where Triton keeps what it compiled."""
    from triton import knobs

    return knobs.cache.dir


def find_variants(
    model: nn.Module, *, max_batch: int, max_length: int, progress: Progress | None = None
) -> dict[Key, Variant]:
    """Every variant that a model's requests ask for, by running it without its kernels: see `warm_up`."""
    variants: dict[Key, Variant] = {}
    asked = list(requests(model, max_batch, max_length))
    device = next(model.parameters()).device
    request = asked[0]

    def note(kernel: Any, key: str, data: str) -> None:
        variants.setdefault((kernel.fn.__qualname__, key), Variant(kernel, data, request))

    with _without_graphs(model), torch.random.fork_rng([device] if device.type == "cuda" else []), _noting(note):
        for number, request in enumerate(asked):
            if progress is not None:
                progress("looking for variants", number, len(asked))
            _run(model, request)
    return variants


def compile_variants(variants: Mapping[Key, Variant], progress: Progress | None = None) -> tuple[int, int]:
    """Compile what Triton's cache doesn't have; how many were compiled, and how many it had."""
    from triton import knobs

    hits: list[bool] = []
    before, start = knobs.compilation.listener, time.perf_counter()
    knobs.compilation.listener = lambda *, cache_hit, **rest: hits.append(cache_hit)
    try:
        for number, ((name, _), variant) in enumerate(variants.items()):
            if progress is not None:
                left = (time.perf_counter() - start) / max(1, number) * (len(variants) - number)
                progress(f"compiling: {name}, {left:.0f} s left" if number else "compiling", number, len(variants))
            variant.kernel.preload(variant.data)
    finally:
        knobs.compilation.listener = before
    return hits.count(False), hits.count(True)


def requests(model: Any, max_batch: int, max_length: int) -> Iterator[Request]:
    """The lattice of requests up to the limits, which the model must have positions for."""
    check_limits(model.config, max_batch, max_length)
    lengths = _steps(max_length, 8)
    # Between two multiples of 16 lies what is one of 4, of 2, or of nothing. That matters where there is a mask.
    beside = {length + more for length in lengths for more in (0, 1, 2, 4)}
    for batch in _steps(max_batch, 2):
        for length in sorted(beside):
            if length > max_length:
                continue
            yield Request(batch, length, padding=1, typed=True)
            if length in lengths:
                yield Request(batch, length, padding=1, typed=False)
                yield Request(batch, length, padding=0, typed=True)
                yield Request(batch, length, padding=None, typed=True)
                yield Request(batch, length, padding=None, typed=False)


def _steps(limit: int, each: int) -> list[int]:
    """Numbers up to the limit, which is the last: `each` from a power of two to the next."""
    steps = {limit}
    power = 1
    while power <= limit:
        steps.update(range(power, min(2 * power, limit + 1), max(1, power // each)))
        power *= 2
    return sorted(steps)


def _run(model: Any, request: Request) -> None:
    """The calls that a request stands for, with gradients if the model is in training mode."""
    call = _call(model, request)
    if not model.training:
        with torch.inference_mode():
            model(**call)
            if getattr(model.config, "is_decoder", False):
                _generate(model, call)
        return
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    calls: list[dict[str, Any]] = [call]
    if _class_name(model).endswith(_OVER_VOCABULARY):
        calls.append({**call, "labels": call["input_ids"], "loss_only": True})
    for given in calls:
        with torch.enable_grad():
            output = model(**given)
            found = [t for t in output.values() if isinstance(t, torch.Tensor) and t.requires_grad]
            loss = torch.stack([t.float().mean() for t in found]).sum()
        torch.autograd.grad(loss, parameters, allow_unused=True)


def _generate(model: Any, call: dict[str, torch.Tensor]) -> None:
    """A decoder's call that fills a cache, and the one for the next token."""
    cache = model(**call, use_cache=True).past_key_values
    length = call["input_ids"].shape[1]
    if cache is None or length == model.config.max_position_embeddings:
        return
    step = {name: tensor[:, -1:].contiguous() for name, tensor in call.items()}
    if "attention_mask" in call:
        step["attention_mask"] = nn.functional.pad(call["attention_mask"], (0, 1), value=1)
    model(**step, past_key_values=cache, use_cache=True)


def _call(model: Any, request: Request) -> dict[str, torch.Tensor]:
    """The arguments of a request's call."""
    config, device = model.config, next(model.parameters()).device
    shape = (request.batch, request.length)
    # Any token but padding, of which transformers warns.
    call = {"input_ids": torch.full(shape, int(config.pad_token_id == 0), device=device)}
    if request.padding is not None:
        mask = torch.ones(shape, dtype=torch.int64, device=device)
        mask[-1, max(1, request.length - request.padding) :] = 0
        call["attention_mask"] = mask
    if request.typed:
        call["token_type_ids"] = torch.zeros_like(call["input_ids"])
    if config.model_type == "roc_bert":
        call |= {name: torch.zeros_like(call["input_ids"]) for name in ("input_shape_ids", "input_pronunciation_ids")}
    if _class_name(model).endswith("ForMultipleChoice"):
        call = {name: tensor[:, None] for name, tensor in call.items()}
    return call


def _class_name(model: nn.Module) -> str:
    return (original_class(model) or type(model)).__name__


@contextlib.contextmanager
def _noting(note: Callable[[Any, str, str], None]) -> Iterator[None]:
    """Every launch of this library's kernels is noted (kernel, key, data), and not made."""
    from triton import knobs

    def hook(*, key: str, fn: Any, compile: dict[str, Any], **rest: Any) -> bool:
        if not fn.module.startswith("fastconv.kernels."):
            return bool(before and before(key=key, fn=fn, compile=compile, **rest))
        note(fn.jit_function, key, compile["specialization_data"])
        return True

    kernels = _kernels()
    known = [kernel.device_caches for kernel in kernels]
    before = knobs.runtime.jit_cache_hook
    knobs.runtime.jit_cache_hook = hook
    try:
        # Of what this process has compiled already Triton would not tell, and launch it, on what others have not made.
        for kernel in kernels:
            kernel.device_caches = defaultdict(kernel.create_binder)
        yield
    finally:
        knobs.runtime.jit_cache_hook = before
        for kernel, caches in zip(kernels, known, strict=True):
            kernel.device_caches = caches


def _kernels() -> list[Any]:
    """Every kernel of this library."""
    import triton

    from fastconv import kernels

    modules = [importlib.import_module(f"{kernels.__name__}.{m.name}") for m in pkgutil.iter_modules(kernels.__path__)]
    return [
        value
        for module in modules
        for value in vars(module).values()
        if isinstance(value, triton.JITFunction) and value.fn.__module__ == module.__name__
    ]


class _Unrecorded(Graphs):
    """Graphs that run every time as they do once before they are recorded."""

    def _record(self, graph: Any, key: tuple, model: nn.Module, forward: Any) -> None:
        graph.replay = partial(graph.run, forward)


@contextlib.contextmanager
def _without_graphs(model: nn.Module) -> Iterator[None]:
    """A model's graphs record nothing: launches that are not made would be missing in them."""
    given = {m: m.fastconv_graphs for m in model.modules() if getattr(m, "fastconv_graphs", None) is not None}
    try:
        for module in given:
            module.fastconv_graphs = _Unrecorded()  # type: ignore[assignment]
        yield
    finally:
        for module, graphs in given.items():
            module.fastconv_graphs = graphs
