"""Compiling ahead: every variant of a kernel that a model's requests can ask for, before the first of them comes.

Triton compiles a kernel anew for other constants, launch options and types, and for what it makes use of in a number or
an address: that it is 1, or a multiple of 16. A model fixes nearly all of that. What is left depends on the batch and
the length by thresholds, which a tuned table may have anywhere, and where masks are read by what the length is a
multiple of. So the model runs over a lattice of both that is close enough to come by every one of them, with every kind
of arguments, and with launches noted instead of made; what was noted is compiled, and lies in Triton's cache for every
process from then on.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import nn

from fastconv import calls, dispatch
from fastconv.calls import Request
from fastconv.dry_run import without_launches

# Called with what is done next, the steps done and the steps in all.
Progress = Callable[[str, int, int], None]
# A variant's name: that of the kernel, and Triton's of what it is compiled for.
Key = tuple[str, str]


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


def warm_up(
    model: nn.Module,
    *,
    max_batch: int,
    max_length: int,
    autocast: torch.dtype | None = None,
    progress: Progress | None = None,
) -> Warmed:
    """Compile what an accelerated model's calls can ask for, up to a batch and a length; run some of these calls.

    model: on a GPU, in the dtype that it will have. In eval mode its calls are those under torch.inference_mode() or
        torch.no_grad(), in training mode those with gradients of all parameters. They have any of its arguments but
        output_attentions, ids of int64, and labels with loss_only=True too; a decoder's are with and without a cache,
        in inference with the next tokens one by one
    max_batch, max_length: of the requests; the length is in tokens, padding and what a cache holds included
    autocast: the dtype that torch.autocast gives the calls, None without it
    progress: called before each step

    What other calls ask for is compiled when they come. Nothing else may launch this library's kernels in this process
    meanwhile. Parameters, their gradients, and the state of random numbers stay as they are.

    Raises: ValueError for a model on a device without the kernels, or limits that don't fit; what the model raises.
    """
    start = time.perf_counter()
    device = next(model.parameters()).device
    check_device(device)
    variants = find_variants(model, max_batch=max_batch, max_length=max_length, autocast=autocast, progress=progress)
    compiled, found = compile_variants(variants, progress)
    # What a first launch does beside: it loads the code, and makes what passes its arguments.
    for request in dict.fromkeys(variant.request for variant in variants.values()):
        calls.run(model, request, autocast)
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
    model: nn.Module,
    *,
    max_batch: int,
    max_length: int,
    autocast: torch.dtype | None = None,
    progress: Progress | None = None,
) -> dict[Key, Variant]:
    """Every variant that a model's requests ask for, by running it without its kernels: see `warm_up`."""
    variants: dict[Key, Variant] = {}
    asked = list(dict.fromkeys(requests(model, max_batch, max_length)))
    device = next(model.parameters()).device
    request = asked[0]

    def note(kernel: Any, key: str, data: str) -> None:
        variants.setdefault((kernel.fn.__qualname__, key), Variant(kernel, data, request))

    with without_launches(model, note), torch.random.fork_rng([device] if device.type == "cuda" else []):
        for number, request in enumerate(asked):
            if progress is not None:
                progress("looking for variants", number, len(asked))
            calls.run(model, request, autocast)
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
    """The lattice of requests up to the limits, which the model must have positions for, each in every kind."""
    check_limits(model.config, max_batch, max_length)
    embedded, attended = list(_of_embeddings(model)), list(_of_attention(model))
    lengths = _steps(max_length, 4)
    # Keys are read by what their number is a multiple of: between two multiples of 16 none is one.
    beside = {length + more for length in lengths for more in (0, 1) if length + more <= max_length}
    for batch in _steps(max_batch, 2):
        for kinds, of_kinds in ((attended, sorted(beside)), (embedded, _steps(max_length, 2))):
            for length, kind in product(of_kinds, kinds):
                yield replace(kind, batch=batch, length=length)


def _of_embeddings(model: Any) -> Iterator[Request]:
    """Every kind of call that looks up other rows, or rows for each sequence of its own."""
    cache = ("use_cache",) if calls.takes(model, "use_cache") else ()
    # Of a batch with padding they are packed where that is removed, and of one without it where there are graphs.
    for types, positions, hidden in product((False, True), (False, True), (0, 1)):
        names = ("token_type_ids",) * types + ("position_ids",) * positions + ("attention_mask",) * hidden
        yield Request(1, 1, (*names, *cache), hidden)
        yield Request(1, 1, ("inputs_embeds", *names), hidden)


def _of_attention(model: Any) -> Iterator[Request]:
    """Every kind of call whose queries see other keys; and the loss."""
    takes = partial(calls.takes, model)
    cache, masked = ("use_cache",) if takes("use_cache") else (), ("attention_mask",)
    yield Request(1, 1)
    yield Request(1, 1, masked)
    yield Request(1, 1, (*masked, *cache), hidden=1)
    if calls.takes_pairs(model):
        yield Request(1, 1, masked, pairs=True)
    if takes("head_mask"):
        yield Request(1, 1, ("head_mask",))
        yield Request(1, 1, (*masked, "head_mask"), hidden=1)
    if takes("encoder_hidden_states"):
        for states, mask, cached in product((1, 16, 17), ((), ("encoder_attention_mask",)), ((), cache)):
            yield Request(1, 1, ("encoder_hidden_states", *mask, *cached), hidden=1, states=states)
    if takes("labels"):
        yield Request(1, 1, ("labels",))


def _steps(limit: int, each: int) -> list[int]:
    """Numbers up to the limit, which is the last: `each` from a power of two to the next."""
    steps = {limit}
    power = 1
    while power <= limit:
        steps.update(range(power, min(2 * power, limit + 1), max(1, power // each)))
        power *= 2
    return sorted(steps)
