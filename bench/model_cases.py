"""Cases of whole models: an encoder's forward, and a training step of the encoder with a head."""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from fastconv import dispatch, models, reference
from fastconv.bench import shapes
from fastconv.bench.case import Case, Subject
from fastconv.bench.embedding_norm_cases import words
from fastconv.bench.masked_lm_loss_cases import labels_of
from fastconv.bench.records import is_own
from fastconv.bench.shapes import Place, Point
from fastconv.bench.timing import Run
from fastconv.checkpoints.loading import NoRandomInit
from fastconv.parity.paths import main_outputs, outputs_alone, transformers_model
from fastconv.parity.shapes import random_model
from fastconv.reference import Config, ConvBertConfig, RoCBertConfig
from fastconv.swap import accelerate
from fastconv.tolerance import Comparison, compare

# Of a tiny ConvBERT, for a look at whether everything runs.
_TINY: dict[str, Any] = {
    "vocab_size": 200,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "embedding_size": 16,
    "max_position_embeddings": 64,
    "num_groups": 2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}

# Of this library's ways those that keep the padding.
_KEEPING = ("fastconv", "fastconv logits")

# Padding of which the targets say 40 %, within this.
_ABOUT = 0.05


@dataclass(frozen=True)
class ModelCase(Case):
    """A model on a batch of ids: "infer", the encoder's forward; "step", forward, loss and backward, with dropout.

    head: of a step, "SequenceClassification" or "MaskedLM" with 15 % of the tokens labelled

    "fastconv" computes what transformers does, "fastconv remove" runs without padding, "fastconv graphs" replays CUDA
    graphs, "HF" is transformers' model with its own choice of attention, and where transformers is missing "reference"
    is this library's in plain PyTorch. "matmul" is one product of as many operations.

    Rivals make logits for the whole vocabulary in a step of MaskedLM. "fastconv logits" does so too; the others of this
    library make the loss alone, by `loss_only`: nobody looks at the logits in training.
    """

    place: Place
    dtype: torch.dtype
    direction: str
    head: str = "SequenceClassification"

    @property
    def name(self) -> str:
        head = f" {self.head}" if self.direction == "step" else ""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"model {self.direction} {self.place.model or 'tiny'}{head} {self.place} {dtype}"

    @property
    def subject(self) -> Subject:
        place = self.place
        return Subject("model", place.model, place.batch, place.length, place.tokens, place.lengths)

    @property
    def targets(self) -> dict[str, float]:
        place = self.place
        if place.model != "ConvBERT base" or self.dtype.itemsize > 2:
            return {}
        if place.batch == 1 and place.length == 128 and self.direction == "infer":
            compiled = {"HF compile / fastconv graphs": 1.3} if place.compiled else {}
            return {"HF / fastconv graphs": 5.0, **compiled}
        if place.size < 4096:
            return {}
        if place.lengths == "text":
            # Of 40 % padding; those of batches with more of it hold all the more.
            if place.padding < 0.4 - _ABOUT:
                return {}
            return {"HF / fastconv remove": 4.0 if self.direction == "infer" else 3.0}
        if self.direction == "infer":
            return {"HF": 1.8, **({"HF compile": 1.2} if place.compiled else {})}
        # 790 TFLOP/s are what a large product reaches.
        return {"HF memory": 2.5, **({"matmul": 0.5} if place.size >= 32768 else {})}

    @property
    def config(self) -> Config:
        """The model's."""
        return shapes.config(self.place.model) if self.place.model else reference.ConvBertConfig(**_TINY)

    @property
    def class_name(self) -> str:
        """The model's class, in every library."""
        return shapes.family(self.config) + ("Model" if self.direction == "infer" else f"For{self.head}")

    # Its roofline: the products, and what crosses the memory bus if every step of a layer is one kernel.

    def bytes(self) -> int:
        """Of the weights once, and of each token what the steps of a fused layer read and write.

        A backward reads what its step read and the gradient of what it wrote, and writes the gradient of what it read.
        """
        steps = traffic(self.config)
        size, layers = self.dtype.itemsize, self.config.num_hidden_layers
        read, written = (layers * sum(each[i] for each in steps) for i in (0, 1))
        # A word's embedding, to which others are added that all tokens share, and the LayerNorm's result.
        read, written = read + shapes.embedding_size(self.config), written + shapes.embedding_size(self.config)
        size_in, size_out = projection(self.config)
        read, written = read + size_in, written + size_out
        weights = layers * sum(each[2] for each in products(self.config)) + size_in * size_out
        if self.direction == "infer":
            return size * (self.place.tokens * (read + written) + weights)
        # Weights: read by both passes, their gradients written.
        return size * (self.place.tokens * (3 * read + 2 * written) + 3 * weights)

    def flops(self) -> int:
        """Of the tokens that are not padding. A backward has two products for each of the forward's, of attention five
        for two, since it makes the scores again."""
        config, layers = self.config, self.config.num_hidden_layers
        dense = layers * sum(each[1] for each in products(config)) + 2 * math.prod(projection(config))
        heads, size = shapes.attention_heads(config)
        pairs = sum(tokens * tokens for tokens in self.place.rows)
        attention = layers * 2 * 2 * pairs * heads * size  # scores, and what they weigh
        if self.direction == "infer":
            return self.place.tokens * dense + attention
        return 3 * self.place.tokens * dense + attention * 7 // 2

    def labels(self, device: torch.device) -> list[str]:
        found = ["fastconv"]
        if self._padded:
            found.append("fastconv remove")
        if self.class_name.endswith("ForMaskedLM"):
            found.append("fastconv logits")
        if device.type == "cuda" and self.direction == "infer" and self.place.tokens <= 8192:
            found.append("fastconv graphs")
        found.append("HF" if importlib.util.find_spec("transformers") is not None else "reference")
        if device.type == "cuda" and self.direction == "step":
            found.append("matmul")
        return found

    def inputs(self, device: torch.device, place: Place | None = None) -> dict[str, torch.Tensor]:
        """What the model is called with; the words are as frequent as in text."""
        place, config = place or self.place, self.config
        keep = torch.arange(place.length) < torch.tensor(place.rows)[:, None]
        ids = words(place.size, config.vocab_size, torch.device("cpu")).view(place.batch, place.length)
        # What transformers takes for padding is the mask alone.
        made = {"input_ids": ids.masked_fill(~keep, 0), "attention_mask": keep.long()}
        if isinstance(config, RoCBertConfig):
            made["input_shape_ids"] = made["input_ids"] % config.shape_vocab_size
            made["input_pronunciation_ids"] = made["input_ids"] % config.pronunciation_vocab_size
        if self.direction == "step" and self.head == "MaskedLM":
            labels = labels_of(place.size, config.vocab_size, torch.device("cpu")).view(place.batch, place.length)
            made["labels"] = labels.masked_fill(~keep, -100)
        elif self.direction == "step":
            made["labels"] = torch.arange(place.batch) % config.num_labels
        return {name: tensor.to(device) for name, tensor in made.items()}

    def parity(self, device: torch.device) -> dict[str, Comparison]:
        """Of the hidden states or logits, and in a step of the gradients of all parameters, of a small batch that has
        padding, without dropout. Computed once for all batches of a model that are run in the same ways."""
        small = replace(self, place=Place(self.place.model, 2, min(32, self.place.length), "text"))
        ways = tuple(label for label in self.labels(device) if is_own(label))
        return _parity(small, ways, self._padded, device, dispatch.current())

    @property
    def _padded(self) -> bool:
        return self.place.tokens < self.place.size

    def build(self, label: str, removes: bool, device: torch.device) -> nn.Module:
        """One of this library's ways. `removes`: without padding, unless it is one of _KEEPING."""
        weights = _weights(self.class_name, self.config)
        model = _model(models, self.class_name, self.config, weights, self.dtype, device)
        padding = "remove" if removes and label not in _KEEPING else "keep"
        return accelerate(model, padding=padding, graphs=label == "fastconv graphs")

    def called(self, label: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """What one of the ways is called with in a step."""
        alone = is_own(label) and label != "fastconv logits" and self.class_name.endswith("ForMaskedLM")
        return {**inputs, **({"loss_only": True} if alone else {})}

    def runs(self, device: torch.device, *, compiled: bool) -> dict[str, Run]:
        inputs = self.inputs(device)
        found: dict[str, Any] = {}
        broken: dict[str, Run] = {}
        for label in self.labels(device):
            if is_own(label):
                found[label] = self.build(label, self._padded, device)
            elif label == "reference":
                made = _weights(self.class_name, self.config)
                found[label] = _model(reference, self.class_name, self.config, made, self.dtype, device)
            elif label == "HF":
                with NoRandomInit():
                    theirs, why = transformers_model(self.class_name, self.config)
                if theirs is None:
                    broken[label] = _raising(why)
                    continue
                found[label] = _loaded(theirs, _weights(self.class_name, self.config), self.dtype, device)
        rival = next((label for label in ("HF", "reference") if label in found), None)
        if rival is not None and compiled and self.place.compiled:
            # What was compiled for other cases counts against the limit of recompilations.
            torch.compiler.reset()
            mode = "reduce-overhead" if self.replays(f"{rival} compile", device) else None
            found[f"{rival} compile"] = torch.compile(found[rival], dynamic=False, mode=mode)
        runs = {label: self._timed(label, model, inputs) for label, model in found.items()} | broken
        if "matmul" in self.labels(device):
            runs["matmul"] = _product(self.flops(), self.dtype, device)
        return runs

    def replays(self, label: str, device: torch.device) -> bool:
        latency = label.endswith(" compile") and self.place.batch == 1
        return device.type == "cuda" and (latency or label == "fastconv graphs")

    def _timed(self, label: str, model: nn.Module, inputs: dict[str, torch.Tensor]) -> Run:
        if self.direction == "infer":
            return torch.inference_mode()(lambda: model(**inputs))
        model.train()
        given = self.called(label, inputs)

        def step() -> None:
            model(**given).loss.backward()
            # Afterwards: gradients that were there before would hide as much of the peak memory.
            for parameter in model.parameters():
                parameter.grad = None

        return step


@functools.lru_cache(maxsize=32)
def _parity(
    case: ModelCase, ways: tuple[str, ...], removes: bool, device: torch.device, backend: str
) -> dict[str, Comparison]:
    """Of each of the ways on the case's batch, by this backend of the ops."""
    inputs, weights = case.inputs(device), _weights(case.class_name, case.config)
    given = {name: tensor for name, tensor in inputs.items() if name != "labels"}
    # As `dtype` holds the weights, the truth's too.
    own = _model(reference, case.class_name, case.config, weights, case.dtype, device)
    truth = _model(reference, case.class_name, case.config, weights, case.dtype, device).double()
    rounding = case.config.num_hidden_layers * torch.finfo(case.dtype).eps  # one for each layer
    found = {}
    for label in ways:
        model = case.build(label, removes, device)
        # Without padding ConvBERT promises what each sequence gives alone.
        alone = removes and label not in _KEEPING and isinstance(case.config, ConvBertConfig)
        with torch.no_grad():
            y = _flat(main_outputs(model, given, tokens_only=True))
            outputs = outputs_alone if alone else functools.partial(main_outputs, tokens_only=True)
            found[f"{label} y"] = compare(y, *(_flat(outputs(m, given)) for m in (own, truth)), rounding=rounding)
        if case.direction == "step":
            gradients = _gradients_alone if alone else _gradients
            expected = (gradients(each, inputs) for each in (own, truth))
            got = _gradients(model, case.called(label, inputs))
            found[f"{label} gradients"] = compare(got, *expected, rounding=rounding)
    return found


def products(config: Config) -> list[tuple[str, int, int]]:
    """Of a layer: the name of each step that multiplies with weights, its operations a token, and its weights.

    Attention's products, whose operations go with the square of the length, are not among them.
    """
    C, wide = config.hidden_size, config.intermediate_size

    def dense(name: str, size_in: int, size_out: int, groups: int = 1) -> tuple[str, int, int]:
        weights = size_in * size_out // groups
        return name, 2 * weights, weights

    if not isinstance(config, ConvBertConfig):
        return [
            dense("q, k, v", C, 3 * C),
            dense("output", C, C),
            dense("intermediate", C, wide),
            dense("dense", wide, C),
        ]
    half, taps, groups = config.attention_heads * config.attention_head_size, config.conv_kernel_size, config.num_groups
    logits = config.attention_heads * taps
    return [
        dense("q, k, v, conv_out", C, 4 * half),
        ("depthwise", 2 * C * taps, C * taps),
        dense("pointwise", C, half),
        dense("kernel logits", half, logits),
        ("dynamic convolution", 2 * half * taps, 0),
        dense("output", 2 * half, C),
        dense("intermediate", C, wide, groups),
        dense("dense", wide, C, groups),
    ]


def traffic(config: Config) -> list[tuple[int, int]]:
    """Elements that each step of a fused layer reads and writes, of a token, without its weights."""
    C, wide = config.hidden_size, config.intermediate_size
    heads, size = shapes.attention_heads(config)
    half = heads * size
    if isinstance(config, ConvBertConfig):
        steps = [
            (C, 4 * half),  # q, k, v and the convolution's input in one product
            (C, C),  # depthwise convolution
            (C + half, half),  # pointwise product, times q
            (2 * half, half),  # kernel logits, softmax and dynamic convolution: the span and the input; half of y
            (3 * half, half),  # attention; the other half
        ]
    else:
        steps = [(C, 3 * C), (3 * C, C)]  # q, k, v in one product; attention
    return [
        *steps,
        (C, C),  # output product
        (2 * C, C),  # bias, dropout, residual and LayerNorm
        (C, wide),  # the feed-forward network's first layer with its activation
        (wide, C),  # and its second
        (2 * C, C),  # bias, dropout, residual and LayerNorm
    ]


def projection(config: Config) -> tuple[int, int]:
    """Inputs and outputs of the dense layer between the embeddings and the first layer; (0, 0) without one."""
    if isinstance(config, ConvBertConfig) and config.embedding_size != config.hidden_size:
        return config.embedding_size, config.hidden_size
    if isinstance(config, RoCBertConfig) and config.concat_input:
        return config.hidden_size + config.shape_embed_dim + config.pronunciation_embed_dim, config.hidden_size
    return 0, 0


@functools.lru_cache(maxsize=2)
def _made(class_name: str, config: str) -> dict[str, torch.Tensor]:
    return random_model(getattr(reference, class_name), _CONFIGS[config]).state_dict()


# What _made is asked for, by name: a config can't be hashed.
_CONFIGS: dict[str, Config] = {}


def _weights(class_name: str, config: Config) -> dict[str, torch.Tensor]:
    """fp32, on the CPU; those of the last two classes asked for are kept: a model's forward and step take turns."""
    _CONFIGS[repr(config)] = config
    return _made(class_name, repr(config))


def _model(
    library: Any,
    class_name: str,
    config: Config,
    weights: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
    device: torch.device,
) -> nn.Module:
    """A model of `library`, fastconv.models or fastconv.reference."""
    model_class = getattr(library, class_name)
    with torch.device(device), NoRandomInit():
        model = model_class(model_class.config_class.from_dict(config.to_dict()))
    return _loaded(model, weights, dtype, device)


def _loaded(
    model: nn.Module, weights: Mapping[str, torch.Tensor], dtype: torch.dtype, device: torch.device
) -> nn.Module:
    model.load_state_dict(weights)
    return model.to(device=device, dtype=dtype).eval()


def _flat(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def _gradients(model: nn.Module, inputs: Mapping[str, Any]) -> torch.Tensor:
    """Of the loss with respect to every parameter, as one row, without dropout."""
    model.zero_grad(set_to_none=True)
    model(**inputs).loss.backward()
    return _flat([p.grad for p in model.parameters() if p.grad is not None])


def _gradients_alone(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The same where each sequence is run by itself; the batch's loss is the mean over its labels."""
    model.zero_grad(set_to_none=True)
    labelled = [(labels >= 0).sum() for labels in inputs["labels"]]
    for row, length in enumerate(inputs["attention_mask"].sum(-1).tolist()):
        alone = {k: t[row : row + 1, :length] if t.dim() > 1 else t[row : row + 1] for k, t in inputs.items()}
        (model(**alone).loss * labelled[row] / sum(labelled)).backward()
    return _flat([p.grad for p in model.parameters() if p.grad is not None])


def _raising(why: str | None) -> Run:
    """Of a rival that there is, but that can't be built: why is told as if it had failed when it ran."""

    def run() -> None:
        raise RuntimeError(why)

    return run


def _product(flops: int, dtype: torch.dtype, device: torch.device) -> Run:
    """A product of about so many operations, of random numbers: zeros draw less power and run faster."""
    n = 8192
    a, b = (torch.randn(rows, n, device=device, dtype=dtype) for rows in (max(1, round(flops / (2 * n * n))), n))
    return lambda: a @ b


def at(point: Point) -> list[Case]:
    """Its forward, and where a step is asked for one with a classifier; where its halves are, the vocabulary's too."""
    found: list[Case] = [
        ModelCase(point.place, point.dtype, way) for way in point.directions if way in ("infer", "step")
    ]
    if len(point.directions) > 2:
        found.append(ModelCase(point.place, point.dtype, "step", "MaskedLM"))
    return found


def quick(places: list[Place]) -> list[Case]:
    """A tiny model."""
    full, text = places
    single = torch.float32
    return [
        ModelCase(full, single, "infer"),
        ModelCase(text, single, "infer"),
        ModelCase(text, single, "step"),
        ModelCase(full, single, "step", "MaskedLM"),
    ]
