"""`fastconv convert`: a TensorFlow 1 checkpoint of ConvBERT's original code to a folder that every library reads."""

from __future__ import annotations

import argparse
import os
from typing import Any

from fastconv.commands import telling_bad_input

_DESCRIPTION = (
    "Convert a TensorFlow 1 checkpoint of ConvBERT's original code (github.com/yitu-opensource/ConvBert) to a folder "
    "with config.json, model.safetensors and vocab.txt, which fastconv and transformers read. Needs tensorflow."
)


def add_parser(commands: Any) -> None:
    """Add this command to the subparsers of `fastconv`."""
    parser = commands.add_parser("convert", help="convert an original ConvBERT checkpoint", description=_DESCRIPTION)
    parser.set_defaults(run=_run)
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="the prefix of the checkpoint's files (model.ckpt-1000000), one of them, or their folder",
    )
    parser.add_argument("folder", metavar="FOLDER", help="the folder to write")
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="JSON with the original's names (linear_groups, ...) or transformers'; default: config.json beside the "
        "checkpoint",
    )
    parser.add_argument("--vocab", metavar="FILE", help="vocab.txt; default: the one beside the checkpoint, if any")
    parser.add_argument(
        "--part",
        default="discriminator",
        choices=("discriminator", "generator"),
        help="the encoder for downstream tasks, or the generator with its masked language modelling head, which needs "
        "the generator's config; default: %(default)s",
    )


def _run(args: argparse.Namespace, command: str) -> int:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # or TensorFlow tells on stderr which CPU it finds
    with telling_bad_input():
        from fastconv.checkpoints.convert import convert_checkpoint

        done = convert_checkpoint(args.checkpoint, args.folder, config=args.config, vocab=args.vocab, part=args.part)
    print(f"{args.folder}: {done.model_class}, {done.parameters:,} parameters")
    if done.left_out:
        scopes = sorted({name.rpartition("/")[0] or name for name in done.left_out})
        shown = ", ".join(scopes[:8]) + (f" and {len(scopes) - 8} more" if len(scopes) > 8 else "")
        print(f"left out: {len(done.left_out)} variables, of {shown}")
    return 0
