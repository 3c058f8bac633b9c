"""What every model has: construction from a config, initialisation, tied embeddings; and the checks of its inputs."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .config import Config
from .layers import GroupedLinear, SeparableConv1D


class Model(nn.Module):
    """Base of every model and head. `base_model_prefix` is the attribute under which a head keeps its encoder."""

    config_class: ClassVar[type[Config]] = Config
    base_model_prefix: ClassVar[str] = ""

    def __init__(self, config: Config) -> None:
        super().__init__()
        if not isinstance(config, self.config_class):
            raise TypeError(
                f"{type(self).__name__} needs a {self.config_class.__name__}, got {type(config).__name__}; "
                f"{self.config_class.__name__}.from_dict(config.to_dict()) converts one"
            )
        config.validate()
        for name in ("is_decoder", "add_cross_attention"):
            if getattr(config, name):
                raise ValueError(f"{name} must be False, got True: only encoders are supported")
        kind = getattr(config, "position_embedding_type", "absolute")
        if kind != "absolute":
            raise ValueError(f"position_embedding_type must be 'absolute', got {kind!r}: others are not supported")
        self.config = config

    @property
    def base_model(self) -> Model:
        """The encoder of a head; a base model itself."""
        return getattr(self, self.base_model_prefix, self)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def get_input_embeddings(self) -> nn.Module:
        """The word embeddings."""
        return self.base_model.embeddings.word_embeddings  # type: ignore[union-attr,return-value]

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the word embeddings; call `tie_weights` after it if the decoder shares them."""
        self.base_model.embeddings.word_embeddings = value  # type: ignore[union-attr]

    def get_output_embeddings(self) -> nn.Module | None:
        """The layer that maps to the vocabulary, None where there is none."""
        return None

    def tie_weights(self) -> None:
        """Make the parameters that are one in the checkpoints one object again, after loading or replacing some."""

    @torch.no_grad()
    def init_weights(self, skip: nn.Module | None = None) -> None:
        """Draw weights as transformers does: normal(0, initializer_range); biases and the padding row are 0.

        skip: a submodule to leave as it is, such as an encoder that has drawn its own.
        """
        std = self.config.initializer_range
        skipped = set() if skip is None else set(skip.modules())
        for module in self.modules():
            if module in skipped:
                continue
            if isinstance(module, (nn.Linear, nn.Conv1d, nn.Embedding, GroupedLinear)):
                module.weight.normal_(0.0, std)
            if isinstance(module, (nn.Linear, GroupedLinear, SeparableConv1D)) and module.bias is not None:
                module.bias.zero_()
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx].zero_()
            if isinstance(module, nn.LayerNorm):
                module.reset_parameters()


def choose(value: bool | None, default: bool) -> bool:
    """An argument that falls back to the config."""
    return default if value is None else value


def maybe_tuple(output: Any, return_dict: bool) -> Any:
    """The output object, or its values as a tuple."""
    return output if return_dict else output.to_tuple()


def check_devices(model: Model, **tensors: Tensor | None) -> None:
    """Raise ValueError unless every tensor given is where the parameters are."""
    device = model.device
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device} but the model is on {device}; move them to one device")


def check_inputs(
    config: Config,
    embedding_size: int,
    input_ids: Tensor | None,
    token_type_ids: Tensor | None,
    position_ids: Tensor | None,
    inputs_embeds: Tensor | None,
) -> tuple[int, int]:
    """Check what goes into the embeddings and return (B, S).

    The values of ids are looked at on the CPU only: on a GPU that would wait for the device, and the embedding itself
    asserts.

    Raises:
        TypeError: ids that are not integers, embeddings that are not floating point.
        ValueError: both or neither of input_ids and inputs_embeds, a wrong shape, an empty sequence, a sequence
            longer than max_position_embeddings.
        IndexError: ids outside their table.
    """
    if not (input_ids is None) ^ (inputs_embeds is None):
        given = "neither" if input_ids is None else "both"
        raise ValueError(f"give exactly one of input_ids and inputs_embeds, got {given}")
    if input_ids is not None:
        if input_ids.dim() != 2:
            raise ValueError(f"input_ids must have shape (B, S), got {tuple(input_ids.shape)}")
        B, S = input_ids.shape
    else:
        assert inputs_embeds is not None
        if not inputs_embeds.is_floating_point():
            raise TypeError(f"inputs_embeds must be a floating-point tensor, got {inputs_embeds.dtype}")
        if inputs_embeds.dim() != 3 or inputs_embeds.shape[2] != embedding_size:
            raise ValueError(
                f"inputs_embeds must have shape (B, S, {embedding_size}), got {tuple(inputs_embeds.shape)}"
            )
        B, S = inputs_embeds.shape[:2]
    if S == 0:
        raise ValueError(f"the sequence is empty, got B = {B}, S = {S}; S must be at least 1")
    limit = config.max_position_embeddings
    if position_ids is None and limit < S:
        raise ValueError(
            f"the sequence length must be at most max_position_embeddings {limit}, got {S}; "
            "truncate the input or give position_ids"
        )
    check_ids("input_ids", input_ids, B, S, "vocab_size", config.vocab_size)
    check_ids("token_type_ids", token_type_ids, B, S, "type_vocab_size", config.type_vocab_size)
    check_ids("position_ids", position_ids, B, S, "max_position_embeddings", config.max_position_embeddings)
    return B, S


def can_look_at(tensor: Tensor) -> bool:
    """Whether a tensor's values can be looked at for nothing: on a GPU that would wait for it, in a trace break it."""
    tracing = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return tensor.device.type == "cpu" and tensor.numel() > 0 and not tracing


def check_ids(name: str, ids: Tensor | None, B: int, S: int, size_name: str, size: int) -> None:
    """Check that ids are integers, of shape (B, S), (1, S) or (S,), and, on the CPU, in [0, size)."""
    if ids is None:
        return
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} must be an int64 or int32 tensor, got {ids.dtype}")
    if tuple(ids.shape) not in ((B, S), (1, S), (S,)):
        raise ValueError(f"{name} must have shape (B, S) = {(B, S)}, got {tuple(ids.shape)}")
    if not can_look_at(ids):
        return
    low, high = (int(value) for value in ids.aminmax())
    if low < 0 or high >= size:
        raise IndexError(
            f"{name} must be from 0 to {size - 1} ({size_name} is {size}), got values from {low} to {high}"
        )


def additive_mask(attention_mask: Tensor | None, B: int, heads: int, S: int, dtype: torch.dtype) -> Tensor | None:
    """The mask that is added to the scores: 0 where attention_mask is 1, the lowest number of `dtype` where it is 0.

    attention_mask is (B, S), keys only, or (B, S, S), queries and keys, of 1 and 0 in any dtype; or four-dimensional,
    broadcastable to (B, heads, S, S): bool, or already additive. The result is broadcastable to (B, heads, S, S).

    Raises:
        TypeError: a complex mask. ValueError: another shape.
    """
    if attention_mask is None:
        return None
    if attention_mask.is_complex():
        raise TypeError(f"attention_mask must be bool, integer or floating point, got {attention_mask.dtype}")
    shape = tuple(attention_mask.shape)
    if shape == (B, S):
        mask = attention_mask[:, None, None, :]
    elif shape == (B, S, S):
        mask = attention_mask[:, None, :, :]
    elif len(shape) == 4 and all(n in (1, size) for n, size in zip(shape, (B, heads, S, S), strict=True)):
        if attention_mask.is_floating_point():
            return attention_mask.to(dtype)
        mask = attention_mask
    else:
        raise ValueError(
            f"attention_mask must have shape (B, S) = {(B, S)}, (B, S, S) = {(B, S, S)} or one broadcastable to "
            f"(B, H, S, S) = {(B, heads, S, S)}, got {shape}"
        )
    check_mask_values(attention_mask)
    return (1.0 - mask.to(dtype)) * torch.finfo(dtype).min


def check_mask_values(attention_mask: Tensor) -> None:
    """Raise ValueError, on the CPU, for an integer mask with other values than 1 and 0 (lengths, say)."""
    if attention_mask.is_floating_point() or not can_look_at(attention_mask):
        return
    low, high = (int(value) for value in attention_mask.aminmax())
    if low < 0 or high > 1:
        raise ValueError(f"attention_mask must have values 1 and 0, got values from {low} to {high}")


def expand_head_mask(head_mask: Tensor | None, layers: int, heads: int, dtype: torch.dtype) -> Tensor | None:
    """head_mask (H,) or (L, H), 1 for a head to keep, as (L, 1, H, 1, 1).

    Raises:
        ValueError: another shape.
    """
    if head_mask is None:
        return None
    if tuple(head_mask.shape) not in ((heads,), (layers, heads)):
        raise ValueError(
            f"head_mask must have shape (heads,) = {(heads,)} or (layers, heads) = {(layers, heads)}, "
            f"got {tuple(head_mask.shape)}"
        )
    return head_mask.to(dtype).expand(layers, heads)[:, None, :, None, None]
