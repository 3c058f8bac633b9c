"""Small decoders with random weights, in fp64, and inputs for them."""

from __future__ import annotations

import torch
from swap_models import VOCABULARY, build

from fastconv import reference

KINDS = ("absolute", "relative_key", "relative_key_query")
NAMES = ("BertLMHeadModel", "RoCBertForCausalLM")
BATCH, ENCODED = 3, 5

Tensors = dict[str, torch.Tensor]


def decoder(name: str = "BertLMHeadModel", kind: str = "absolute", cross: bool = False, **config) -> reference.Model:
    """A decoder by class name, in eval mode, whose next tokens differ with what came before."""
    config = {"is_decoder": True, "tie_word_embeddings": False, "max_position_embeddings": 32} | config
    model = build("reference", name, position_embedding_type=kind, add_cross_attention=cross, **config).double()
    with torch.no_grad():  # no token is likely by itself, and what came before matters
        weight = model.get_output_embeddings().weight
        weight.div_(weight.norm(dim=1, keepdim=True) / 4)
        model.get_output_embeddings().bias.zero_()
        model.base_model.embeddings.position_embeddings.weight.mul_(2)
        for layer in model.base_model.encoder.layer:
            layer.attention.self.query.weight.mul_(3)
    return model


def encoder_inputs(model: reference.Model, rows: int = BATCH) -> Tensors:
    """What cross-attention takes, each row with another number of tokens; nothing for a model without it."""
    if not model.config.add_cross_attention:
        return {}
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(rows, ENCODED, model.config.hidden_size, generator=generator, dtype=model.dtype)
    lengths = 1 + torch.arange(rows)[:, None] % ENCODED
    return {"encoder_hidden_states": states, "encoder_attention_mask": (torch.arange(ENCODED) < lengths).long()}


def prompts(model: reference.Model, length: int = 9, rows: int = BATCH, padding: bool = True) -> Tensors:
    """Ids of every stream of a model, of tokens alone if `padding` is False, else with 0, 3, 6, ... tokens of padding
    on the left, and a mask. Padding is token 0; no other token is.
    """
    generator = torch.Generator().manual_seed(2)
    names = ["input_ids"]
    if isinstance(model, reference.RoCBertForCausalLM):
        names += ["input_shape_ids", "input_pronunciation_ids"]
    inputs = {name: torch.randint(1, VOCABULARY, (rows, length), generator=generator) for name in names}
    inputs["token_type_ids"] = torch.randint(0, 2, (rows, length), generator=generator)
    if padding:
        keep = torch.arange(length) >= 3 * (torch.arange(rows)[:, None] % (length // 3))
        inputs = {name: ids * keep for name, ids in inputs.items()} | {"attention_mask": keep.long()}
    return inputs


def positions(inputs: Tensors) -> torch.Tensor:
    """(B, S): the positions of the tokens of a batch padded on the left, counted from each row's first token."""
    return (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)


def cut(inputs: Tensors, start: int, end: int) -> Tensors:
    """What a call for the tokens from start to end is given; masks reach from the first token on, the encoder's tokens
    are always all given.
    """

    def part(name: str, value: torch.Tensor) -> torch.Tensor:
        if name == "attention_mask":
            return value[:, :end] if value.dim() == 2 else value[..., start:end, :end]
        if name.startswith("encoder_"):
            return value if value.dim() == 2 or name.endswith("states") else value[:, start:end]
        return value[:, start:end]

    return {name: part(name, value) for name, value in inputs.items()}


def step_by_step(model: reference.Model, inputs: Tensors, lengths: tuple[int, ...], **options: bool) -> list:
    """The outputs of cached calls for so many tokens each."""
    cache, start, outputs = reference.Cache(), 0, []
    for length in lengths:
        part = cut(inputs, start, start + length)
        outputs.append(model(**part, past_key_values=cache, use_cache=True, **options))
        start += length
        assert outputs[-1].past_key_values is cache and cache.get_seq_length() == start
    return outputs
