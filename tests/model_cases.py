"""Random cases for every model and head: a small config, inputs and how the model is called (drawn by hypothesis)."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from fastconv import reference

hypothesis = pytest.importorskip("hypothesis", reason="the cases are drawn by hypothesis, which is not installed")
st = hypothesis.strategies

_CLASSIFIERS = ("ForSequenceClassification", "ForMultipleChoice", "ForTokenClassification", "ForQuestionAnswering")
HEADS = {
    "ConvBert": ("Model", "ForMaskedLM", *_CLASSIFIERS),
    "Bert": ("Model", "ForPreTraining", "LMHeadModel", "ForMaskedLM", "ForNextSentencePrediction", *_CLASSIFIERS),
    "RoCBert": ("Model", "ForPreTraining", "ForCausalLM", "ForMaskedLM", *_CLASSIFIERS),
}
NAMES = [family + head for family, heads in HEADS.items() for head in heads]
MASKS = ("right", "left", "ragged", "empty row", "square")
VOCABULARY, POSITIONS, SHAPES, SOUNDS = 23, 14, 11, 13


@dataclass
class Case:
    """One call of one model. `inputs` are the keywords of its forward."""

    name: str
    config: dict[str, Any]
    inputs: dict[str, Any]
    arguments: dict[str, Any] = field(default_factory=dict)  # of the class, beside the config
    cached: int = 0  # so many tokens go first, in a call of their own that fills the cache
    train: bool = False
    checkpointing: bool = False


def cases(name: str, version: int | None) -> Any:
    """Cases of the class `name`: what transformers 4, or 5, can do, or all (None)."""
    return st.composite(lambda draw: _Draw(draw, name, version).case())()


def family_of(name: str) -> str:
    """The family of a class by its name."""
    return next(family for family in HEADS if name.startswith(family))


def keywords_of(name: str, version: int | None) -> set[str]:
    """What the cases of a class pass to its forward, each in some of them."""
    missing = {4: {"logits_to_keep", "loss_only"}, 5: {"head_mask", "loss_only"}, None: set()}
    return set(inspect.signature(getattr(reference, name).forward).parameters) - {"self"} - missing[version]


class _Draw:
    """Draws one case. Its tensors come from one generator, so that a case is small to draw."""

    def __init__(self, draw: Any, name: str, version: int | None) -> None:
        self.draw, self.name, self.version = draw, name, version
        self.family = family_of(name)
        self.head = name.removeprefix(self.family)
        self.keywords = keywords_of(name, version)
        self.generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
        self.B, self.S = draw(st.integers(1, 3)), draw(st.integers(1, 8))
        self.lead: tuple[int, ...] = (self.B,)
        if self.head == "ForMultipleChoice":
            self.lead = (self.B, draw(st.integers(1, 3)))
        self.decoder = self.mostly() if "encoder_hidden_states" in self.keywords else self.maybe()
        can_cache = self.decoder and "past_key_values" in self.keywords and self.S > 1
        self.cached = draw(st.integers(1, self.S - 1)) if can_cache and self.mostly() else 0

    def maybe(self) -> bool:
        return self.draw(st.booleans())

    def mostly(self) -> bool:
        """For what needs other draws as well, or few cases have it."""
        return self.one_of(True, True, True, False)

    def one_of(self, *values: Any) -> Any:
        return self.draw(st.sampled_from(values))

    def integers(self, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, high, shape, generator=self.generator)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def case(self) -> Case:
        config = self.config()
        case = Case(self.name, config, self.inputs(config), cached=self.cached)
        if self.head == "Model" and self.family != "ConvBert":
            case.arguments = {"add_pooling_layer": self.maybe()}
        if not self.cached:
            case.train = self.maybe()
            case.checkpointing = case.train and self.maybe()
        if case.checkpointing and "use_cache" in self.keywords:
            case.inputs["use_cache"] = False
        return case

    def config(self) -> dict[str, Any]:
        config = self.sizes()
        hidden, labels = config["hidden_size"], self.one_of(1, 2, 3)
        if self.family == "RoCBert":
            config |= self.rocbert(hidden)
        if self.family != "ConvBert":
            types = ("absolute", "relative_key", "relative_key_query")
            # transformers 4 is wrong with a cache
            relative = self.version is None or (self.version == 4 and not self.cached)
            config["position_embedding_type"] = self.one_of(*types) if relative else "absolute"
        # transformers 4 fails with cross-attention if an encoder's states are missing
        crosses = self.decoder and (self.version != 4 or "encoder_hidden_states" in self.keywords)
        config |= {
            "vocab_size": VOCABULARY,
            "num_hidden_layers": self.one_of(1, 2),
            "hidden_act": self.one_of("gelu", "relu", "gelu_new", "silu", "gelu_pytorch_tanh"),
            "hidden_dropout_prob": self.one_of(0.0, 0.2, 0.5),
            "attention_probs_dropout_prob": self.one_of(0.0, 0.3),
            "classifier_dropout": self.one_of(None, 0.0, 0.4),
            "max_position_embeddings": POSITIONS,
            "type_vocab_size": self.one_of(1, 2, 3),
            "layer_norm_eps": self.one_of(1e-12, 1e-5),
            # RoCBertForPreTraining puts it in the place of ignored labels
            "pad_token_id": self.one_of(0, 3) if self.name == "RoCBertForPreTraining" else self.one_of(None, 0, 3),
            "is_decoder": self.decoder,
            "add_cross_attention": crosses and self.mostly(),
            "tie_word_embeddings": self.maybe(),
            "num_labels": 2 if self.head == "ForQuestionAnswering" else labels,
            "output_hidden_states": self.maybe(),
        }
        config["output_attentions"] = self.can_output_attentions(config) and self.maybe()
        # where no cache can be asked for, transformers puts that of the config among the values of a tuple
        config["use_cache"] = "use_cache" in self.keywords and self.can_cache(config) and self.maybe()
        if self.head == "ForSequenceClassification":
            kinds = ("regression", "multi_label_classification", None)
            # transformers 5 refuses to choose from one label
            config["problem_type"] = self.one_of(*kinds, *["single_label_classification"][: labels - 1])
        return config

    def sizes(self) -> dict[str, Any]:
        config: dict[str, Any] = {}
        heads, groups = self.one_of(1, 2, 4), 1
        unit = heads
        if self.family == "ConvBert":
            config = {
                "embedding_size": self.one_of(8, 12, 16),
                "head_ratio": self.one_of(1, 2, 4, 8),
                "conv_kernel_size": self.one_of(1, 3, 5, 9),
                "num_groups": self.one_of(1, 2, 4),
            }
            groups = config["num_groups"]
            unit = math.lcm(2 * max(1, heads // config["head_ratio"]), groups)
        if self.name == "ConvBertForMultipleChoice":
            config |= {
                "summary_type": self.one_of("last", "first", "mean", "cls_index"),
                "summary_use_proj": self.maybe(),
                "summary_proj_to_labels": False,  # the classifier takes hidden_size, whatever this is
                "summary_activation": self.one_of(None, "tanh", "relu"),
                "summary_first_dropout": self.one_of(0.0, 0.3),
                "summary_last_dropout": self.one_of(0.0, 0.6),
            }
        chunks = (0, 1) if self.cached else (0, *(n for n in range(1, self.S + 1) if self.S % n == 0))
        return config | {
            "num_attention_heads": heads,
            "hidden_size": unit * self.draw(st.integers(-(-8 // unit), 24 // unit)),
            "intermediate_size": groups * self.draw(st.integers(3, 7)),
            "chunk_size_feed_forward": self.one_of(*chunks),
        }

    def rocbert(self, hidden: int) -> dict[str, Any]:
        concat = self.maybe()
        return {
            "enable_pronunciation": self.maybe(),
            "enable_shape": self.maybe(),
            "pronunciation_embed_dim": self.one_of(4, 7) if concat else hidden,
            "pronunciation_vocab_size": SOUNDS,
            "shape_embed_dim": self.one_of(3, 8) if concat else hidden,
            "shape_vocab_size": SHAPES,
            "concat_input": concat,
        }

    def can_output_attentions(self, config: dict[str, Any]) -> bool:
        """transformers 5 mixes the probabilities of ConvBERT's attention and cross-attention."""
        return not (self.version == 5 and self.name == "ConvBertModel" and config["add_cross_attention"])

    def can_cache(self, config: dict[str, Any]) -> bool:
        """Cached relative positions are wrong in transformers 4."""
        return self.version is None or config["position_embedding_type"] == "absolute"

    def inputs(self, config: dict[str, Any]) -> dict[str, Any]:
        shape = (*self.lead, self.S)
        inputs = self.ids(config, "")
        if self.maybe():
            inputs["inputs_embeds"] = self.normal(*shape, config.get("embedding_size", config["hidden_size"]))
            del inputs["input_ids"]
        if self.maybe():
            inputs["attention_mask"] = self.mask(self.one_of(*MASKS), self.S)
        if self.maybe():
            inputs["position_ids"] = self.integers(POSITIONS, *shape)
        if "head_mask" in self.keywords and self.maybe():
            heads = max(1, config["num_attention_heads"] // config.get("head_ratio", 1))
            sizes = self.one_of((heads,), (config["num_hidden_layers"], heads))
            inputs["head_mask"] = self.integers(2, *sizes).double()
        if config["add_cross_attention"] and "encoder_hidden_states" in self.keywords:
            inputs |= self.encoder(config)
        if "use_cache" in self.keywords and not self.cached and self.maybe():
            inputs["use_cache"] = self.can_cache(config) and self.maybe()
        if self.mostly() and not self.cached:
            labels = self.labels(config)
            inputs |= labels
            if "loss_only" in self.keywords and not (self.name == "BertForPreTraining" and len(labels) < 2):
                inputs["loss_only"] = self.maybe()
        elif "logits_to_keep" in self.keywords and self.maybe():
            inputs["logits_to_keep"] = self.draw(st.integers(0, self.S - self.cached))
        if self.maybe():
            inputs["output_hidden_states"] = self.maybe()
        if self.maybe():
            inputs["output_attentions"] = self.can_output_attentions(config) and self.maybe()
        # transformers 4 adds the probabilities of cross-attention to the tuple of a masked language model
        crossed = self.version == 4 and self.head == "ForMaskedLM" and config["add_cross_attention"]
        if self.maybe() and not crossed:
            inputs["return_dict"] = self.maybe()
        return inputs

    def ids(self, config: dict[str, Any], prefix: str) -> dict[str, Any]:
        """Ids of tokens, and maybe of shapes, sounds and types."""
        shape = (*self.lead, self.S)
        ids = {f"{prefix}input_ids": self.integers(VOCABULARY, *shape)}
        if self.family == "RoCBert":
            for stream, size in (("shape", SHAPES), ("pronunciation", SOUNDS)):
                if self.mostly():
                    ids[f"{prefix}input_{stream}_ids"] = self.integers(size, *shape)
        if self.mostly():
            ids[f"{prefix}token_type_ids"] = self.integers(config["type_vocab_size"], *shape)
        return ids

    def encoder(self, config: dict[str, Any]) -> dict[str, Any]:
        """The states of an encoder and maybe their mask."""
        if self.version != 4 and not self.mostly():
            return {}
        # transformers 5 takes the length of ConvBERT's queries for that of the keys
        length = self.S if self.version == 5 and self.family == "ConvBert" else self.draw(st.integers(1, 6))
        states = {"encoder_hidden_states": self.normal(self.B, length, config["hidden_size"])}
        return states | ({"encoder_attention_mask": self.mask(self.one_of(*MASKS), length)} if self.mostly() else {})

    def mask(self, kind: str, length: int) -> torch.Tensor:
        """1 for a key to attend to; (..., length), or (B, S, length) for "square", unless the call goes in parts."""
        keep = torch.rand(*self.lead, length, generator=self.generator) < 0.6
        if kind == "square" and not self.cached and len(self.lead) == 1:
            return torch.rand(self.B, self.S, length, generator=self.generator) < 0.6
        if kind in ("right", "left"):
            keep = torch.arange(length) < 1 + self.integers(length, *self.lead, 1)
            keep = keep.flip(-1) if kind == "left" else keep
        if kind == "empty row":
            keep[0] = False
        return keep.to(self.one_of(torch.int64, torch.bool, torch.float64))

    def labels(self, config: dict[str, Any]) -> dict[str, Any]:
        shape = (*self.lead, self.S)
        if self.name == "RoCBertForPreTraining":
            return self.contrastive(config)
        if self.name == "BertForPreTraining":
            both = {"labels": self.ignored(VOCABULARY, *shape), "next_sentence_label": self.integers(2, self.B)}
            return both if self.maybe() else {key: both[key] for key in [self.one_of(*both)]}
        if self.head in ("ForMaskedLM", "LMHeadModel", "ForCausalLM"):
            return {"labels": self.ignored(VOCABULARY, *shape)}
        if self.head == "ForTokenClassification":
            return {"labels": self.ignored(config["num_labels"], *shape)}
        if self.head == "ForNextSentencePrediction":
            return {"labels": self.integers(2, self.B)}
        if self.head == "ForMultipleChoice":
            return {"labels": self.integers(self.lead[1], self.B)}
        if self.head == "ForQuestionAnswering":  # those outside the sequence are ignored
            column = self.one_of((self.B,), (self.B, 1))
            return {key: self.integers(self.S + 2, *column) for key in ("start_positions", "end_positions")}
        if self.head == "ForSequenceClassification":
            kind, count = config["problem_type"], config["num_labels"]
            if kind == "single_label_classification" or (kind is None and count > 1 and self.maybe()):
                return {"labels": self.integers(count, self.B)}
            labels = self.normal(self.B, count) if kind == "regression" else self.integers(2, self.B, count).double()
            return {"labels": labels[:, 0] if count == 1 and kind != "multi_label_classification" else labels}
        return {}

    def contrastive(self, config: dict[str, Any]) -> dict[str, Any]:
        inputs = self.ids(config, "labels_") | {"labels_input_ids": self.ignored(VOCABULARY, self.B, self.S)}
        if self.mostly():
            inputs["labels_attention_mask"] = self.mask("right", self.S)
        if self.mostly():
            inputs |= self.ids(config, "attack_")
            if self.mostly():
                inputs["attack_attention_mask"] = self.mask("ragged", self.S)
        return inputs

    def ignored(self, high: int, *shape: int) -> torch.Tensor:
        """Labels of which some are -100, or, now and then, all."""
        share = self.one_of(0.0, 0.4, 0.4, 1.0)
        return self.integers(high, *shape).masked_fill(torch.rand(shape, generator=self.generator) < share, -100)
