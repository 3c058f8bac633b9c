"""The ways to run one model that `verify` compares: all with the same weights, each a model of its own."""

from __future__ import annotations

import copy
import importlib.util
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastconv import models, reference
from fastconv.swap import Swapped, accelerate

REFERENCE = "reference"
TRANSFORMERS = "transformers"
ACCELERATED = "transformers + accelerate"
FASTCONV = "fastconv"

_OUTPUTS = (
    "last_hidden_state",
    "logits",
    "start_logits",
    "end_logits",
    "prediction_logits",
    "seq_relationship_logits",
)
_FEW_LOGITS = ("ForSequenceClassification", "ForMultipleChoice", "ForNextSentencePrediction")

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Path:
    """One way to run the model.

    ours: whether it is this library's, so that its errors decide between PASS and FAIL
    replaced: how many modules of each class run a fused forward
    """

    name: str
    model: nn.Module
    ours: bool = False
    replaced: Mapping[str, int] = field(default_factory=dict)


def build(
    class_name: str, config: reference.Config, weights: Weights, dtype: torch.dtype, device: torch.device
) -> tuple[list[Path], str | None]:
    """Every path that can run here, in the order of the table; and why transformers' are left out, if they are.

    class_name: a class of fastconv.models, which is the class of the same name everywhere

    Raises: RuntimeError where `accelerate` finds nothing to replace.
    """

    def ready(model: nn.Module) -> nn.Module:
        model.load_state_dict(weights)
        return model.to(device=device, dtype=dtype).eval()

    paths = [Path(REFERENCE, ready(getattr(reference, class_name)(config)))]
    model, missing = _transformers_model(class_name, config)
    if model is not None:
        original = ready(model)
        attention = getattr(original.config, "_attn_implementation", None)
        paths.append(Path(f"{TRANSFORMERS} ({attention})" if attention else TRANSFORMERS, original))
        paths.append(_accelerated(ACCELERATED, copy.deepcopy(original)))
    own_class = getattr(models, class_name)
    own = own_class(own_class.config_class.from_dict(config.to_dict()))
    paths.append(_accelerated(FASTCONV, ready(own)))
    return paths, missing


def truth(class_name: str, config: reference.Config, weights: Weights, dtype: torch.dtype) -> nn.Module:
    """The reference in fp64 on the CPU or GPU that the caller moves it to, with the weights as `dtype` holds them."""
    model = getattr(reference, class_name)(config)
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in weights.items()})
    return model.double().eval()


def main_output(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """What a model's paths are compared by: its hidden states or logits, padding included.

    Of a head with a few numbers a sequence, too few to compare by, all of them and its encoder's hidden states, flat.
    """
    encoded: list[Tensor] = []
    hook = None
    if type(model).__name__.endswith(_FEW_LOGITS):
        encoder: Any = model.base_model
        hook = encoder.register_forward_hook(lambda module, args, output: encoded.append(output[0]))
    try:
        output = model(**inputs)
    finally:
        if hook is not None:
            hook.remove()
    found = [output[name] for name in _OUTPUTS if name in output] + encoded
    return found[0] if len(found) == 1 else torch.cat([tensor.flatten() for tensor in found])


def _accelerated(name: str, model: nn.Module) -> Path:
    accelerate(model)
    replaced = Counter(module.fastconv_original.__name__ for module in model.modules() if isinstance(module, Swapped))
    return Path(name, model, ours=True, replaced=dict(sorted(replaced.items())))


def _transformers_model(class_name: str, config: reference.Config) -> tuple[Any, str | None]:
    """transformers' model with random weights, with its own choice of attention (sdpa where it has it)."""
    if importlib.util.find_spec("transformers") is None:
        return None, "transformers is not installed, so its rows are left out"
    try:
        import transformers

        theirs = getattr(transformers, type(config).__name__).from_dict(config.to_dict())
        return getattr(transformers, class_name)(theirs), None
    except Exception as error:  # whatever a version outside the supported ones raises; the note names it
        why = str(error).strip().partition("\n")[0]
        return None, f"transformers can't run {class_name}, so its rows are left out: {type(error).__name__}: {why}"
