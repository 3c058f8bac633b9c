"""The configs and models of fastconv: those of the reference, accelerated, with from_pretrained and save_pretrained."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from fastconv import checkpoints, reference
from fastconv.folders import find_folder, read_json, replacing, write_json
from fastconv.swap import accelerate

if TYPE_CHECKING:
    from typing_extensions import Self

# model_type in config.json -> what the names of the family's classes begin with.
FAMILIES = {"bert": "Bert", "convbert": "ConvBert", "roc_bert": "RoCBert"}


class ConfigFiles:
    """Gives a config from_pretrained and save_pretrained."""

    @classmethod
    def from_pretrained(cls, name_or_folder: str | os.PathLike[str]) -> Self:
        """The config in a checkpoint folder, or of a hub id like "org/name", which needs huggingface_hub.

        Raises FileNotFoundError, ValueError (no JSON, another model_type, a value that can't be), TypeError.
        """
        return cls._from_file(find_folder(name_or_folder, ["config.json"]) / "config.json")

    @classmethod
    def _from_file(cls, file: Path) -> Self:
        content = read_json(file)
        try:
            return cls.from_dict(content)  # type: ignore[attr-defined]
        except (TypeError, ValueError) as error:
            raise type(error)(f"{str(file)!r}: {error}") from error

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write config.json, which transformers reads too."""
        with replacing(folder) as temporary:
            write_json(temporary / "config.json", self.to_dict())  # type: ignore[attr-defined]


class FastModel:
    """Gives a model of the reference from_pretrained, save_pretrained and, from construction, the fused forwards.

    `fastconv.restore(model)` takes the fused forwards away. The encoder inside of a head (`model.bert`) is the
    reference's class, with fused forwards under it.
    """

    config_class: ClassVar[Any]

    def __init__(self, config: reference.Config) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        accelerate(self)  # type: ignore[type-var]

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | os.PathLike[str],
        *,
        config: reference.Config | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
    ) -> Self:
        """The model in a checkpoint folder, in eval mode.

        name_or_folder: a folder with config.json and weights (the first there is of safetensors, pytorch_model.bin,
            each in one file or in shards, and ConvBERT's tf_model.h5, which needs h5py), or a hub id like "org/name",
            which needs huggingface_hub; the weights may be those of the encoder alone, or have other heads
        config: in the place of config.json
        dtype: of the parameters; None: the config's dtype, else float32; "auto": that of the stored weights
        device: where the parameters go; None: the CPU

        Warns once, by name, of parameters of a head or of cross-attention that are not stored, which are random, and of
        stored heads that this model lacks. Raises FileNotFoundError; ValueError naming the file, what it holds and what
        was expected; ImportError for h5py or a hub id; OSError for a hub id.
        """
        folder = find_folder(name_or_folder, checkpoints.FILES)
        if config is None:
            config = cls.config_class._from_file(folder / "config.json")
        return checkpoints.load_folder(cls, folder, config, dtype, device)

    def save_pretrained(self, folder: str | os.PathLike[str], max_shard_size: int | str = "5GB") -> None:
        """Write config.json and model.safetensors, or shards and their index, which transformers reads too.

        max_shard_size: the most bytes in a file, an int or such as "200MB"

        What is in the folder is replaced only once all is written, and the safetensors of an older save are removed.
        Raises NotADirectoryError, ValueError, TypeError, OSError.
        """
        checkpoints.save_folder(self, folder, max_shard_size)


class BertConfig(ConfigFiles, reference.BertConfig):
    """The configuration of BERT; the arguments are those of transformers' BertConfig."""


class ConvBertConfig(ConfigFiles, reference.ConvBertConfig):
    """The configuration of ConvBERT; the arguments are those of transformers' ConvBertConfig."""


class RoCBertConfig(ConfigFiles, reference.RoCBertConfig):
    """The configuration of RoCBert; the arguments are those of transformers' RoCBertConfig."""


class BertModel(FastModel, reference.BertModel):
    """BERT's encoder, with a pooler unless `add_pooling_layer` is False."""

    config_class = BertConfig

    def __init__(self, config: BertConfig, add_pooling_layer: bool = True) -> None:
        reference.BertModel.__init__(self, config, add_pooling_layer)
        accelerate(self)


class BertForPreTraining(FastModel, reference.BertForPreTraining):
    """BERT with the heads of its pre-training: masked language modelling and next sentence prediction."""

    config_class = BertConfig


class BertLMHeadModel(FastModel, reference.BertLMHeadModel):
    """BERT with a language modelling head: a decoder, if the config says so."""

    config_class = BertConfig


class BertForMaskedLM(FastModel, reference.BertForMaskedLM):
    """BERT with a masked language modelling head."""

    config_class = BertConfig


class BertForNextSentencePrediction(FastModel, reference.BertForNextSentencePrediction):
    """BERT with a classifier of sentence pairs: whether the second follows the first."""

    config_class = BertConfig


class BertForSequenceClassification(FastModel, reference.BertForSequenceClassification):
    """BERT with a classifier, or a regressor, of sequences."""

    config_class = BertConfig


class BertForTokenClassification(FastModel, reference.BertForTokenClassification):
    """BERT with a classifier of tokens."""

    config_class = BertConfig


class BertForQuestionAnswering(FastModel, reference.BertForQuestionAnswering):
    """BERT with the start and end scores of an answer."""

    config_class = BertConfig


class BertForMultipleChoice(FastModel, reference.BertForMultipleChoice):
    """BERT with a score for each of several choices."""

    config_class = BertConfig


class ConvBertModel(FastModel, reference.ConvBertModel):
    """ConvBERT's encoder."""

    config_class = ConvBertConfig


class ConvBertForMaskedLM(FastModel, reference.ConvBertForMaskedLM):
    """ConvBERT with a masked language modelling head."""

    config_class = ConvBertConfig


class ConvBertForSequenceClassification(FastModel, reference.ConvBertForSequenceClassification):
    """ConvBERT with a classifier, or a regressor, of sequences."""

    config_class = ConvBertConfig


class ConvBertForTokenClassification(FastModel, reference.ConvBertForTokenClassification):
    """ConvBERT with a classifier of tokens."""

    config_class = ConvBertConfig


class ConvBertForQuestionAnswering(FastModel, reference.ConvBertForQuestionAnswering):
    """ConvBERT with the start and end scores of an answer."""

    config_class = ConvBertConfig


class ConvBertForMultipleChoice(FastModel, reference.ConvBertForMultipleChoice):
    """ConvBERT with a score for each of several choices."""

    config_class = ConvBertConfig


class RoCBertModel(FastModel, reference.RoCBertModel):
    """RoCBert's encoder, with a pooler unless `add_pooling_layer` is False."""

    config_class = RoCBertConfig

    def __init__(self, config: RoCBertConfig, add_pooling_layer: bool = True) -> None:
        reference.RoCBertModel.__init__(self, config, add_pooling_layer)
        accelerate(self)


class RoCBertForPreTraining(FastModel, reference.RoCBertForPreTraining):
    """RoCBert as it is pre-trained: masked language modelling and a contrastive loss."""

    config_class = RoCBertConfig


class RoCBertForCausalLM(FastModel, reference.RoCBertForCausalLM):
    """RoCBert with a language modelling head: a decoder, if the config says so."""

    config_class = RoCBertConfig


class RoCBertForMaskedLM(FastModel, reference.RoCBertForMaskedLM):
    """RoCBert with a masked language modelling head."""

    config_class = RoCBertConfig


class RoCBertForSequenceClassification(FastModel, reference.RoCBertForSequenceClassification):
    """RoCBert with a classifier, or a regressor, of sequences."""

    config_class = RoCBertConfig


class RoCBertForMultipleChoice(FastModel, reference.RoCBertForMultipleChoice):
    """RoCBert with a score for each of several choices."""

    config_class = RoCBertConfig


class RoCBertForTokenClassification(FastModel, reference.RoCBertForTokenClassification):
    """RoCBert with a classifier of tokens."""

    config_class = RoCBertConfig


class RoCBertForQuestionAnswering(FastModel, reference.RoCBertForQuestionAnswering):
    """RoCBert with the start and end scores of an answer."""

    config_class = RoCBertConfig
