"""What is measured: the published models, batches of them, and how long the texts in a batch are."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fastconv import Packing, models
from fastconv.models import FAMILIES
from fastconv.parity.shapes import config_of
from fastconv.reference import Config, ConvBertConfig

# Those that `fastconv verify` has no name for: bert-large-uncased's, and the config's defaults, which are those of
# weiweishi/roc-bert-base-zh but for the vocabulary.
_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}

MODELS = ("ConvBERT base", "ConvBERT medium-small", "ConvBERT small", "BERT base", "BERT large", "RoCBert base")

# Tokens, with [CLS] and [SEP], of 64 sentences spread evenly over the default text of `fastconv verify`, in its order:
# its WordPiece vocabulary of 30,522, the prose of CPython 3.11's help topics. As in any text some are long and most are
# not; a batch of eight, padded to its longest, is 39 % padding, and one of 64 is 53 %. Written down because a machine
# with a GPU may lack the tokenizer; tests/test_bench_cases.py makes them again.
TEXT = (
    34, 17, 21, 16, 20, 50, 36, 31, 22, 28, 51, 60, 26, 22, 50, 19, 47, 18, 27, 15, 18, 39, 42, 22, 25, 38, 21, 16, 20,
    28, 23, 38, 18, 31, 41, 49, 42, 31, 39, 20, 48, 38, 36, 40, 42, 34, 27, 25, 21, 15, 17, 19, 11, 35, 9, 24, 18, 18,
    26, 20, 16, 16, 63, 50,
)  # fmt: skip


@functools.cache
def config(model: str) -> Config:
    """The config of one of MODELS.

    Raises: ValueError for another name.
    """
    if model == "BERT large":
        return config_of("bert-base", **_LARGE)
    if model == "RoCBert base":
        return models.RoCBertConfig()
    if model not in MODELS:
        raise ValueError(f"unknown model {model!r}: expected one of {', '.join(MODELS)}")
    family, size = model.lower().split(" ")
    return config_of(f"{family}-{size}")


def family(config: Config) -> str:
    """What the names of a model's classes begin with."""
    return FAMILIES[config.model_type]


def embedding_size(config: Config) -> int:
    """Channels of the embeddings, and of what a masked language model multiplies with the vocabulary."""
    return config.embedding_size if isinstance(config, ConvBertConfig) else config.hidden_size


def attention_heads(config: Config) -> tuple[int, int]:
    """How many heads attend, and the channels of one. In ConvBERT as many convolve."""
    if isinstance(config, ConvBertConfig):
        return config.attention_heads, config.attention_head_size
    return config.num_attention_heads, config.hidden_size // config.num_attention_heads


@dataclass(frozen=True)
class Place:
    """A batch of a model.

    model: one of MODELS
    batch, length: of the padded batch
    lengths: "full", or "text": the sequences are to `length` as sentences of real text are to the longest of a batch
    compiled: whether torch.compile of a rival is worth its time here
    """

    model: str
    batch: int
    length: int
    lengths: str = "full"
    compiled: bool = False

    @functools.cached_property
    def rows(self) -> tuple[int, ...]:
        """Tokens of each sequence."""
        if self.lengths == "full":
            return (self.length,) * self.batch
        found = [TEXT[row * len(TEXT) // self.batch % len(TEXT)] for row in range(self.batch)]
        return tuple(max(1, round(self.length * tokens / max(found))) for tokens in found)

    @property
    def tokens(self) -> int:
        """Those that are not padding."""
        return sum(self.rows)

    @property
    def size(self) -> int:
        """Tokens with the padding."""
        return self.batch * self.length

    @property
    def padding(self) -> float:
        """The share of the batch that is padding."""
        return 1 - self.tokens / self.size

    # How the convolutions get it: text without its padding, one sequence after the other.

    @property
    def lead(self) -> tuple[int, ...]:
        """The leading dimensions of a tensor: (B, S), of text (T,)."""
        return (self.batch, self.length) if self.lengths == "full" else (self.tokens,)

    def packing(self, device: torch.device) -> Packing | None:
        """Of text; None of a full batch."""
        return None if self.lengths == "full" else packing(self.rows, device)

    def __str__(self) -> str:
        return f"{self.batch}x{self.length}" + (" text" if self.lengths == "text" else "")


@dataclass(frozen=True)
class Point:
    """A place, and what is measured there.

    directions: of ops, those of "infer", "fwd", "bwd", "step"
    model: whether the whole model is measured too
    ops: those measured; None: all
    """

    place: Place
    dtype: torch.dtype
    directions: tuple[str, ...] = ("infer", "step")
    model: bool = False
    ops: tuple[str, ...] | None = None


# A tiny batch, full and of text, of no model.
QUICK = [Place("", 2, 16), Place("", 2, 16, "text")]

_TEXT, _BOTH = ("text",), ("full", "text")
_INFER, _STEP, _EVERY = ("infer",), ("step",), ("infer", "fwd", "bwd", "step")
_HALF, _SINGLE = torch.bfloat16, torch.float32
_BASE, _MEDIUM = MODELS[:2]
_ATTENTION = ("masked_attention",)


def plan(device: torch.device) -> list[Point]:
    """What is worth measuring on a device, the most informative first: a run may be cut short."""
    return _on_gpu() if device.type == "cuda" else _on_cpu()


def _points(
    names: Sequence[str],
    sizes: Sequence[tuple[int, int]],
    lengths: Sequence[str] = ("full",),
    *,
    dtype: torch.dtype = _HALF,
    directions: tuple[str, ...] = ("infer", "step"),
    model: bool = True,
    ops: tuple[str, ...] | None = None,
    compiled: bool = False,
) -> list[Point]:
    """Model by model, of each size a full batch, real text, or both; one sequence has no padding."""
    places = [
        Place(name, batch, length, how, compiled)
        for name in names
        for batch, length in sizes
        for how in lengths
        if how == "full" or batch > 1
    ]
    return [Point(place, dtype, directions, model, ops) for place in places]


def _on_gpu() -> list[Point]:
    # A place that comes twice is measured once, as it came first: with torch.compile, if it is to be.
    large, middle, one = [(64, 512)], [(8, 512)], [(1, 128)]
    every = [(batch, length) for length in (512, 128, 32) for batch in (64, 16, 4, 1)]
    base, others = MODELS[:1], MODELS[1:]
    return [
        # What has a target: of whole models on a full card, alone, in training and without padding; then of the ops.
        *_points(base, [*large, *one], directions=_INFER, ops=(), compiled=True),
        *_points(base, large, directions=_EVERY, ops=()),
        *_points(base, middle, _TEXT, directions=_EVERY, ops=_ATTENTION),
        *_points(base, large, directions=_EVERY, model=False, compiled=True),
        *_points(["BERT base"], middle, _BOTH, directions=_EVERY, model=False, ops=_ATTENTION),
        *_points([_MEDIUM], large, directions=_EVERY, model=False, ops=("grouped_linear",)),
        # Every model once: full, of real text, alone, and against torch.compile, which takes the longest.
        *_points(others, large),
        *_points(MODELS, large, _TEXT),
        *_points(others, one, directions=_INFER, ops=()),
        *_points(base, middle, _BOTH, model=False),
        *_points(MODELS, middle, directions=_INFER, ops=(), compiled=True),
        *_points(base, middle, directions=_STEP, ops=(), compiled=True),
        # The map by batch and length, and the latency by length.
        *_points(MODELS, every, _BOTH),
        *_points(base, [(1, 64), (1, 256)], directions=_INFER, ops=()),
        # What is left of one kind: each half of a step by itself, other dtypes.
        *_points(MODELS, large, _BOTH, directions=_EVERY),
        *_points(MODELS, middle, dtype=torch.float16),
        *_points(MODELS, middle, dtype=_SINGLE),
    ]


def _on_cpu() -> list[Point]:
    # Every op in every direction at one place, whole models that take seconds a call, then the map by batch and length,
    # and what else there is of one kind: a dtype, real text, another size.
    of_sequences = ("separable_conv", "span_kernel_logits", "span_dynamic_conv", "conv_branch", *_ATTENTION)
    found = [
        Point(Place(_BASE, 8, 512, compiled=True), _SINGLE, _EVERY),
        Point(Place(_BASE, 1, 128, compiled=True), _SINGLE, _INFER, model=True),
        Point(Place(_BASE, 8, 512), _SINGLE, _INFER, model=True, ops=()),
        Point(Place(_BASE, 8, 128), _SINGLE, _STEP, model=True, ops=()),
        Point(Place(_MEDIUM, 8, 128), _SINGLE, model=True),
        Point(Place(_MEDIUM, 8, 128, "text"), _SINGLE, _INFER, model=True, ops=()),
        Point(Place(_BASE, 8, 128, "text"), _SINGLE, _INFER, model=True, ops=()),
        Point(Place(_BASE, 8, 512), _HALF, ops=("conv_branch", "masked_lm_loss")),
        Point(Place(_BASE, 8, 512, "text"), _SINGLE, _INFER, ops=(*of_sequences, "embedding_norm")),
    ]
    sizes = [(1, 32), (8, 32), (8, 128), (1, 512)]
    found += _points([_BASE], sizes, dtype=_SINGLE, directions=_INFER)
    found += _points(["BERT base"], [(8, 32)], _TEXT, dtype=_SINGLE, directions=_INFER, ops=())
    return found + _points(["ConvBERT small", "RoCBert base"], [(1, 128)], dtype=_SINGLE, directions=_INFER, ops=())


# What a case needs beside its tensors, made once for all cases of a shape: making them is not what is timed.


@functools.lru_cache(maxsize=4)
def packing(rows: tuple[int, ...], device: torch.device) -> Packing:
    """Of sequences one after the other."""
    return Packing.from_lengths(list(rows), device=device)


@functools.lru_cache(maxsize=4)
def lengths(rows: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """(B,) int32."""
    return torch.tensor(rows, dtype=torch.int32, device=device)


@functools.lru_cache(maxsize=4)
def seed(device: torch.device) -> torch.Tensor:
    """A dropout's."""
    return torch.ones((), dtype=torch.int64, device=device)
