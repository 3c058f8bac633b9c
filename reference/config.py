"""The configurations, with the argument names and defaults of the transformers documentation."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar

from .ops.activations import get_activation

if TYPE_CHECKING:
    from typing_extensions import Self

PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")
POSITION_EMBEDDING_TYPES = ("absolute", "relative_key", "relative_key_query")
SUMMARY_TYPES = ("last", "first", "mean", "cls_index")


@dataclass(kw_only=True)
class Config:
    """What the configurations of all families share.

    `extra` holds the keys of a config.json that this library doesn't use, so that they survive a round trip.

    Raises:
        ValueError, TypeError: a value that no model can be built from.
    """

    model_type: ClassVar[str] = ""

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    sep_token_id: int | None = None
    classifier_dropout: float | None = None
    chunk_size_feed_forward: int = 0
    is_decoder: bool = False
    add_cross_attention: bool = False
    use_cache: bool = True
    tie_word_embeddings: bool = True
    num_labels: int = None  # type: ignore[assignment]  # None: the length of id2label, or else 2; then always an int
    id2label: dict[int, str] | None = None
    label2id: dict[str, int] | None = None
    problem_type: str | None = None
    output_attentions: bool = False
    output_hidden_states: bool = False
    return_dict: bool = True
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("id2label", "label2id"):
            if not isinstance(getattr(self, name), (dict, type(None))):
                raise TypeError(f"{name} must be a dict or None, got {getattr(self, name)!r}")
        if self.id2label is None:
            self.num_labels = 2 if self.num_labels is None else self.num_labels
        else:
            if self.num_labels not in (None, len(self.id2label)):
                raise ValueError(
                    f"num_labels must be the length of id2label, {len(self.id2label)}, got {self.num_labels}; "
                    "give one of the two"
                )
            self.id2label = {int(index): label for index, label in self.id2label.items()}
            if self.label2id is None:
                self.label2id = {label: index for index, label in self.id2label.items()}
        self.validate()

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "num_labels" and isinstance(value, int) and len(self.id2label or ()) != value:
            self.id2label = {index: f"LABEL_{index}" for index in range(value)}
            self.label2id = {label: index for index, label in self.id2label.items()}
        if name == "id2label" and value is not None and "extra" in self.__dict__:  # __init__ compares the two
            super().__setattr__("num_labels", len(value))

    def validate(self) -> None:
        """Check every value; models do so again before they are built.

        Raises:
            ValueError, TypeError: which value is wrong, and what it must be.
        """
        for name in ("vocab_size", "hidden_size", "num_attention_heads", "intermediate_size"):
            check_int(name, getattr(self, name), 1)
        for name in ("max_position_embeddings", "type_vocab_size", "num_labels"):
            check_int(name, getattr(self, name), 1)
        for name in ("num_hidden_layers", "chunk_size_feed_forward"):
            check_int(name, getattr(self, name), 0)
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"):
            check_range(name, getattr(self, name), 0.0, 1.0, optional=name == "classifier_dropout")
        check_range("layer_norm_eps", self.layer_norm_eps, 0.0)
        check_range("initializer_range", self.initializer_range, 0.0)
        if self.pad_token_id is not None:
            check_int("pad_token_id", self.pad_token_id, 0)
            if self.pad_token_id >= self.vocab_size:
                raise ValueError(
                    f"pad_token_id must be less than vocab_size {self.vocab_size}, got {self.pad_token_id}"
                )
        for f in fields(self):
            if isinstance(f.default, bool):
                check_choice(f.name, getattr(self, f.name), (True, False))
        if self.add_cross_attention and not self.is_decoder:
            raise ValueError("add_cross_attention needs is_decoder True, got False")
        check_choice("problem_type", self.problem_type, (None, *PROBLEM_TYPES))
        try:
            get_activation(self.hidden_act)
        except ValueError as error:
            raise ValueError(f"hidden_act: {error}") from None

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The configuration that a parsed config.json describes; keys that are unknown here go to `extra`.

        Raises:
            ValueError, TypeError: the dict names another model_type, or holds a value that no model can be built from.
        """
        if not isinstance(values, dict):
            raise TypeError(f"a config must be a JSON object (a dict), got {type(values).__name__}")
        model_type = values.get("model_type", cls.model_type)
        if model_type != cls.model_type:
            raise ValueError(f"{cls.__name__} needs model_type {cls.model_type!r}, got {model_type!r}")
        known = {f.name for f in fields(cls)} - {"extra"}
        values = deepcopy({name: value for name, value in values.items() if name != "model_type"})
        extra = {name: value for name, value in values.items() if name not in known}
        if extra.get("pruned_heads"):
            raise ValueError(f"pruned_heads must be empty, got {extra['pruned_heads']}: pruning is not supported")
        if values.get("id2label") is not None:
            values.pop("num_labels", None)  # the labels decide, as in transformers
        return cls(**{name: value for name, value in values.items() if name in known}, extra=extra)

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds: every argument, model_type, and `extra`. num_labels is the length of id2label."""
        values = {
            f.name: deepcopy(getattr(self, f.name)) for f in fields(self) if f.name not in ("extra", "num_labels")
        }
        return {**deepcopy(self.extra), **values, "model_type": self.model_type}


@dataclass(kw_only=True)
class BertConfig(Config):
    """Configuration of BERT; the defaults are those of bert-base-uncased."""

    model_type: ClassVar[str] = "bert"

    position_embedding_type: str = "absolute"

    def validate(self) -> None:
        super().validate()
        check_choice("position_embedding_type", self.position_embedding_type, POSITION_EMBEDDING_TYPES)
        check_divisible("hidden_size", self.hidden_size, "num_attention_heads", self.num_attention_heads)


@dataclass(kw_only=True)
class RoCBertConfig(Config):
    """Configuration of RoCBert; the defaults are those of transformers, with the vocabulary of an English BERT.

    `concat_input` maps the concatenated word, shape and pronunciation embeddings to hidden_size; without it their mean
    is taken, which needs them to be of hidden_size.
    """

    model_type: ClassVar[str] = "roc_bert"

    position_embedding_type: str = "absolute"
    enable_pronunciation: bool = True
    enable_shape: bool = True
    pronunciation_embed_dim: int = 768
    pronunciation_vocab_size: int = 910
    shape_embed_dim: int = 512
    shape_vocab_size: int = 24858
    concat_input: bool = True

    def validate(self) -> None:
        super().validate()
        check_choice("position_embedding_type", self.position_embedding_type, POSITION_EMBEDDING_TYPES)
        check_divisible("hidden_size", self.hidden_size, "num_attention_heads", self.num_attention_heads)
        for stream, enabled in (("shape", self.enable_shape), ("pronunciation", self.enable_pronunciation)):
            size = getattr(self, f"{stream}_embed_dim")
            check_int(f"{stream}_embed_dim", size, 1)
            vocab_size = getattr(self, f"{stream}_vocab_size")
            check_int(f"{stream}_vocab_size", vocab_size, 1)
            if enabled and not self.concat_input and size != self.hidden_size:
                raise ValueError(
                    f"{stream}_embed_dim must be hidden_size {self.hidden_size} where concat_input is False, got {size}"
                )
            if self.pad_token_id is not None and self.pad_token_id >= vocab_size:
                raise ValueError(
                    f"pad_token_id must be less than {stream}_vocab_size {vocab_size}, got {self.pad_token_id}"
                )


@dataclass(kw_only=True)
class ConvBertConfig(Config):
    """Configuration of ConvBERT; the defaults are those of conv-bert-base, except pad_token_id, as in transformers.

    `num_attention_heads // head_ratio` heads attend, as many convolve, each of `hidden_size / heads / 2` channels.
    """

    model_type: ClassVar[str] = "convbert"

    pad_token_id: int | None = 1
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 2
    embedding_size: int = 768
    head_ratio: int = 2
    conv_kernel_size: int = 9
    num_groups: int = 1
    summary_type: str = "last"
    summary_use_proj: bool = False
    summary_proj_to_labels: bool = False
    summary_activation: str | None = None
    summary_first_dropout: float = 0.0
    summary_last_dropout: float = 0.0

    @property
    def attention_heads(self) -> int:
        """How many heads attend; as many convolve."""
        return max(1, self.num_attention_heads // self.head_ratio)

    @property
    def attention_head_size(self) -> int:
        """Channels of one head."""
        return self.hidden_size // self.attention_heads // 2

    def validate(self) -> None:
        super().validate()
        for name in ("embedding_size", "head_ratio", "num_groups", "conv_kernel_size"):
            check_int(name, getattr(self, name), 1)
        if self.conv_kernel_size % 2 == 0:
            raise ValueError(f"conv_kernel_size must be odd, got {self.conv_kernel_size}")
        check_divisible(
            "hidden_size",
            self.hidden_size,
            f"twice the attention heads ({self.num_attention_heads} // head_ratio {self.head_ratio})",
            2 * self.attention_heads,
        )
        check_divisible("hidden_size", self.hidden_size, "num_groups", self.num_groups)
        check_divisible("intermediate_size", self.intermediate_size, "num_groups", self.num_groups)
        check_choice("summary_type", self.summary_type, SUMMARY_TYPES)
        for name in ("summary_first_dropout", "summary_last_dropout"):
            check_range(name, getattr(self, name), 0.0, 1.0)
        try:
            get_activation(self.summary_activation)
        except ValueError as error:
            raise ValueError(f"summary_activation: {error}") from None


def check_int(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def check_range(name: str, value: Any, low: float, high: float = float("inf"), *, optional: bool = False) -> None:
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be between {low} and {high}, got {value}")


def check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_divisible(name: str, value: int, by_name: str, by: int) -> None:
    if value % by:
        raise ValueError(f"{name} must be divisible by {by_name}, got {value} and {by}")
