"""What every model has: construction from a config, initialisation, tied and resized embeddings, checkpointing."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .config import Config, check_int
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

    def get_input_embeddings(self) -> nn.Embedding:
        """The word embeddings."""
        return self.base_model.embeddings.word_embeddings  # type: ignore[union-attr,return-value]

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the word embeddings; call `tie_weights` after it if the decoder shares them.

        Raises:
            ValueError: embeddings of another size.
        """
        check_same_size(self.get_input_embeddings(), value)
        self.base_model.embeddings.word_embeddings = value  # type: ignore[union-attr]

    def get_output_embeddings(self) -> nn.Linear | None:
        """The layer that maps to the vocabulary, None where there is none."""
        return None

    def set_output_embeddings(self, value: nn.Linear) -> None:
        """Replace the layer that maps to the vocabulary.

        Raises:
            ValueError: this model has none, or one of another size.
        """
        raise ValueError(f"{type(self).__name__} has no output embeddings to replace")

    def tie_weights(self) -> None:
        """Make the parameters that are one in the checkpoints one object again, after loading or replacing some."""

    @torch.no_grad()
    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Module:
        """Change the size of the vocabulary, of the word embeddings and of what maps to the vocabulary, tied or not.

        Args:
            new_num_tokens: the new size; the first rows are kept. None: the size as it is, or its next multiple.
            pad_to_multiple_of: round the size up to a multiple of this.
            mean_resizing: new rows are drawn around the mean of the old ones, with 1e-9 of their covariance; else
                normally around 0 with the config's initializer_range. New biases are 0, but the mean of the old ones
                with mean_resizing and untied embeddings, as in transformers.

        Returns:
            The word embeddings.

        Raises:
            ValueError, TypeError: sizes that are no positive ints, or that cut off the padding token.

        Source: Hewitt, "Initializing New Word Embeddings for Pretrained Language Models" (2021).
        """
        size = self.config.vocab_size if new_num_tokens is None else new_num_tokens
        check_int("new_num_tokens", size, 1)
        if pad_to_multiple_of is not None:
            check_int("pad_to_multiple_of", pad_to_multiple_of, 1)
            size = -(-size // pad_to_multiple_of) * pad_to_multiple_of
        words, output = self.get_input_embeddings(), self.get_output_embeddings()
        if words.padding_idx is not None and words.padding_idx >= size:
            raise ValueError(f"the new vocabulary size must be above pad_token_id {words.padding_idx}, got {size}")
        if size == self.config.vocab_size:
            return words
        std = None if mean_resizing else self.config.initializer_range
        tied = output is not None and output.weight is words.weight
        words.weight = _resized(words.weight, size, std)
        words.num_embeddings = size
        if output is not None:
            output.weight = words.weight if tied else _resized(output.weight, size, std)
            if output.bias is not None:
                output.bias = _resized(output.bias, size, None if mean_resizing and not tied else 0.0)
            output.out_features = size
        self.config.vocab_size = size
        self.tie_weights()
        return words

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """In training, keep only what goes into a layer, and compute the layer again in the backward pass.

        gradient_checkpointing_kwargs: arguments of `torch.utils.checkpoint.checkpoint`; use_reentrant is False if it is
        not among them.
        """
        options = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
        self.base_model.encoder.checkpoint_options = options  # type: ignore[union-attr]
        self.base_model.encoder.gradient_checkpointing = True  # type: ignore[union-attr]

    def gradient_checkpointing_disable(self) -> None:
        """Undo `gradient_checkpointing_enable`."""
        self.base_model.encoder.gradient_checkpointing = False  # type: ignore[union-attr]

    @property
    def is_gradient_checkpointing(self) -> bool:
        return self.base_model.encoder.gradient_checkpointing  # type: ignore[union-attr,return-value]

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


def check_same_size(old: nn.Embedding | nn.Linear, new: nn.Embedding | nn.Linear) -> None:
    """Raise ValueError unless embeddings that replace others are as many and as wide."""
    if new.weight.shape != old.weight.shape:
        raise ValueError(
            f"the new embeddings must have the (vocab_size, size) of the old, {tuple(old.weight.shape)}, got "
            f"{tuple(new.weight.shape)}; resize_token_embeddings changes vocab_size"
        )


def _resized(old: Tensor, size: int, std: float | None) -> nn.Parameter:
    """A parameter (size, ...) that begins with the old rows; new ones are normal with `std`, None: like the old."""
    new = old.new_empty(size, *old.shape[1:])
    kept = min(size, old.shape[0])
    new[:kept] = old[:kept]
    if std is not None:
        new[kept:].normal_(0.0, std)
    elif size > kept:
        wide = old.to(torch.promote_types(old.dtype, torch.float32))
        mean = wide.mean(0)
        new[kept:] = mean
        if old.dim() == 2:
            # Normal weights for the old rows' differences from their mean have these rows' covariance.
            weights = torch.randn(size - kept, kept, dtype=wide.dtype, device=wide.device) * (1e-9 / kept) ** 0.5
            new[kept:] = mean + weights @ (wide - mean)
    return nn.Parameter(new, requires_grad=old.requires_grad)
