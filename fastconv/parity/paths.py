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
# After the name of a path of which padding is removed.
REMOVED = ", no padding"

_OUTPUTS = (
    "last_hidden_state",
    "logits",
    "start_logits",
    "end_logits",
    "prediction_logits",
    "seq_relationship_logits",
)
# Of these one number, or a row of them, belongs to a token.
_OF_TOKENS = ("last_hidden_state", "start_logits", "end_logits", "prediction_logits")
_FEW_LOGITS = ("ForSequenceClassification", "ForMultipleChoice", "ForNextSentencePrediction")

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Path:
    """One way to run the model.

    ours: whether it is this library's, so that its errors decide between PASS and FAIL
    removes: whether it runs without padding
    replaced: how many modules of each class run a fused forward
    """

    name: str
    model: nn.Module
    ours: bool = False
    removes: bool = False
    replaced: Mapping[str, int] = field(default_factory=dict)


def build(
    class_name: str,
    config: reference.Config,
    weights: Weights,
    dtype: torch.dtype,
    device: torch.device,
    padding: str = "keep",
) -> tuple[list[Path], str | None]:
    """Every path that can run here, in the order of the table; and why transformers' are left out, if they are.

    class_name: a class of fastconv.models, which is the class of the same name everywhere
    padding: "remove" adds this library's paths without padding to those with it

    Raises: RuntimeError where `accelerate` finds nothing to replace.
    """

    def ready(model: nn.Module) -> nn.Module:
        model.load_state_dict(weights)
        return model.to(device=device, dtype=dtype).eval()

    paths = [Path(REFERENCE, ready(getattr(reference, class_name)(config)))]
    model, missing = transformers_model(class_name, config)
    if model is not None:
        original = ready(model)
        attention = getattr(original.config, "_attn_implementation", None)
        paths.append(Path(f"{TRANSFORMERS} ({attention})" if attention else TRANSFORMERS, original))
        paths += _accelerated(ACCELERATED, copy.deepcopy(original), padding)
    own_class = getattr(models, class_name)
    own = own_class(own_class.config_class.from_dict(config.to_dict()))
    paths += _accelerated(FASTCONV, ready(own), padding)
    return paths, missing


def truth(class_name: str, config: reference.Config, weights: Weights, dtype: torch.dtype) -> nn.Module:
    """The reference in fp64 on the CPU or GPU that the caller moves it to, with the weights as `dtype` holds them."""
    model = getattr(reference, class_name)(config)
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in weights.items()})
    return model.double().eval()


def main_outputs(model: nn.Module, inputs: Mapping[str, Tensor], *, tokens_only: bool = False) -> list[Tensor]:
    """What a model's paths are compared by: its hidden states or logits, padding included unless `tokens_only`.

    Of a head with a few numbers a sequence, too few to compare by, all of them and its encoder's hidden states.
    """
    few = type(model).__name__.endswith(_FEW_LOGITS)
    encoded: list[Tensor] = []
    hook = None
    if few:
        encoder: Any = model.base_model
        hook = encoder.register_forward_hook(lambda module, args, output: encoded.append(output[0]))
    try:
        output = model(**inputs)
    finally:
        if hook is not None:
            hook.remove()
    names = [name for name in _OUTPUTS if name in output]
    found = [output[name] for name in names] + encoded
    if not tokens_only:
        return found
    tokens = inputs["attention_mask"].flatten(0, -2).bool()
    of_tokens = [name in _OF_TOKENS or (name == "logits" and not few) for name in names] + [True] * len(encoded)
    return [tensor[tokens] if chosen else tensor for tensor, chosen in zip(found, of_tokens, strict=True)]


def outputs_alone(model: nn.Module, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """main_outputs of the tokens of each sequence, padded on the right in `inputs`, run by itself."""
    lengths = inputs["attention_mask"].flatten(0, -2).sum(-1).tolist()
    rows = [
        main_outputs(model, {name: ids[row : row + 1, ..., :length] for name, ids in inputs.items()}, tokens_only=True)
        for row, length in enumerate(lengths)
    ]
    return [torch.cat(parts) for parts in zip(*rows, strict=True)]


def _accelerated(name: str, model: nn.Module, padding: str) -> list[Path]:
    accelerate(model)
    paths = [Path(name, model, ours=True, replaced=_replaced(model))]
    if padding == "remove":
        removing = accelerate(copy.deepcopy(model), padding="remove")
        paths.append(Path(name + REMOVED, removing, ours=True, removes=True, replaced=_replaced(removing)))
    return paths


def _replaced(model: nn.Module) -> dict[str, int]:
    found = Counter(module.fastconv_original.__name__ for module in model.modules() if isinstance(module, Swapped))
    return dict(sorted(found.items()))


def transformers_model(class_name: str, config: reference.Config) -> tuple[Any, str | None]:
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
