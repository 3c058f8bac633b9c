"""`fastconv warmup`: compile what a model's requests can ask for, before the first of them comes."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from fastconv.commands import telling_bad_input, telling_memory

if TYPE_CHECKING:
    import torch
    from torch import nn

_DESCRIPTION = (
    "Compile every variant of a kernel that a model's requests can ask for, up to a batch and a length, into Triton's "
    "cache. The first request that is served then compiles nothing, in this process or another one with the same "
    "cache, GPU, driver, and versions of this library, torch and triton. Requests may have any arguments but "
    "output_attentions, and ids of int64; those of a decoder go on token by token with a cache, and get an encoder's "
    "states if the config has cross-attention. Weights don't matter: a folder with config.json will do. The model is "
    "warmed as fastconv's own and, if transformers is installed, as its accelerated one. What the cache has already is "
    "not compiled again."
)
_BATCH, _LENGTH = 32, 512


def add_parser(commands: Any) -> None:
    """Add this command to the subparsers of `fastconv`."""
    parser = commands.add_parser(
        "warmup", help="compile a model's kernels ahead of its first request", description=_DESCRIPTION
    )
    parser.set_defaults(run=_run)
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a checkpoint folder, or convbert-base, convbert-medium-small, convbert-small or bert-base",
    )
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16", "fp16"), help="default: %(default)s")
    parser.add_argument(
        "--autocast",
        choices=("bf16", "fp16"),
        help="of requests under torch.autocast to this dtype; default: without it",
    )
    parser.add_argument("--device", metavar="DEVICE", help="cuda, cuda:1, ...; default: cuda")
    parser.add_argument(
        "--padding", default="keep", choices=("keep", "remove"), help="as in accelerate; default: %(default)s"
    )
    parser.add_argument("--graphs", action="store_true", help="accelerate(graphs=True)")
    parser.add_argument(
        "--max-batch",
        type=int,
        default=_BATCH,
        metavar="N",
        help="sequences of the largest batch; default: %(default)s",
    )
    parser.add_argument(
        "--max-length",
        type=int,
        metavar="N",
        help=f"tokens of the longest sequence; default: {_LENGTH}, or as many as the model takes if these are fewer",
    )
    parser.add_argument("--train", action="store_true", help="for training: with dropout and gradients")


def _run(args: argparse.Namespace, command: str) -> int:
    from fastconv.progress import ProgressBar

    with telling_bad_input():
        from fastconv.parity import environment
        from fastconv.warmup import cache_folder, check_device, check_limits, warm_up

        device = environment.usable_device(args.device)
        check_device(device)
        dtype = environment.usable_dtype(args.dtype, device)
        autocast = None if args.autocast is None else environment.usable_dtype(args.autocast, device)
        class_name, config = _config(args.model)
        length = min(_LENGTH, config.max_position_embeddings) if args.max_length is None else args.max_length
        check_limits(config, args.max_batch, length)
    limits = {"max_batch": args.max_batch, "max_length": length}
    told = args.dtype if autocast is None else f"{args.dtype} under autocast to {args.autocast}"
    seconds = 0.0
    compiled = found = 0
    with telling_memory("--max-batch or --max-length"):
        for name, model in _models(class_name, config, dtype, device, args):
            with ProgressBar() as progress:
                warmed = warm_up(model, **limits, autocast=autocast, progress=progress)
            print(f"{name} {class_name}, {told}, batches up to {args.max_batch} x {length}:")
            for kernel, count in warmed.variants.items():
                print(f"  {kernel.strip('_'):<40}{count:>4}")
            compiled, found, seconds = compiled + warmed.compiled, found + warmed.found, seconds + warmed.seconds
            del model
    print(f"{compiled} compiled, {found} found in the cache {cache_folder()}, {seconds:.0f} s")
    return 0


def _config(name: str) -> tuple[str, Any]:
    """The class and the config of a model, with one layer: they are all alike."""
    from fastconv.parity import subjects

    return subjects.one_layer(name)


def _models(
    class_name: str, config: Any, dtype: torch.dtype, device: torch.device, args: argparse.Namespace
) -> Iterator[tuple[str, nn.Module]]:
    """What serves such a model, by name, accelerated as the arguments say: fastconv's class, and transformers'."""
    from fastconv import accelerate, models
    from fastconv.parity import paths

    theirs, _ = paths.transformers_model(class_name, config)
    for name, model in (("fastconv's", getattr(models, class_name)(config)), ("transformers'", theirs)):
        if model is not None:
            model.to(device=device, dtype=dtype).train(args.train)
            yield name, accelerate(model, padding=args.padding, graphs=args.graphs)
