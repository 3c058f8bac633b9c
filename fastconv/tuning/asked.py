"""What models ask for: kernels, shapes and dtypes."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from fastconv import calls, models
from fastconv.calls import Request
from fastconv.kernels import _configs
from fastconv.kernels._configs import Asked, Key
from fastconv.parity import subjects
from fastconv.swap import accelerate
from fastconv.tuning.table import identity


def model_of(name: str, length: int) -> nn.Module:
    """A model of one layer as that of a checkpoint folder or of a published shape is, in fp32 on the CPU.

    name: as in `fastconv verify`; the weights don't matter, every layer has the same shapes

    Raises: what `fastconv.parity.subjects.one_layer` raises; ValueError for a length that it has no positions for.
    """
    class_name, config = subjects.one_layer(name)
    if length > config.max_position_embeddings:
        most = config.max_position_embeddings
        raise ValueError(f"length must be at most {most}, which is all that {name} takes, got {length}")
    return getattr(models, class_name)(config)


def asked_for(
    model: nn.Module, *, batch: int, length: int, direction: str, padding: str = "keep"
) -> dict[tuple[str, Key], Asked]:
    """What an accelerated copy of a model asks for on a batch of full sequences: what it says of each, once.

    model: of fastconv.models or transformers, on the device and in the dtype that it will have; it is changed
    """
    accelerate(model, padding=padding)
    plain = Request(batch, length, ("attention_mask",) if padding == "remove" else ())
    found: dict[tuple[str, Key], Asked] = {}
    with _configs.watched() as asked:
        for training in {"infer": (False,), "train": (True,), "both": (False, True)}[direction]:
            calls.run(model.train(training), plain)
            if training and calls.takes(model, "labels"):
                calls.run(model, replace(plain, given=(*plain.given, "labels")))
    for each in asked:
        found.setdefault(identity(each), each)
    return found
