"""Text generation: what follows a prompt, token by token, by the models that predict the next token."""

from __future__ import annotations

import torch
from torch import Tensor

from .config import check_int
from .inputs import check_devices, check_ids, check_inputs
from .model import Model
from .sampling import NextToken


class Generation(Model):
    """Gives a causal language model with BERT's inputs `generate`."""

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        *,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        max_new_tokens: int = 20,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int = 50,
        top_p: float = 1.0,
        seed: int | None = None,
        eos_token_id: int | list[int] | None = None,
        pad_token_id: int | None = None,
        use_cache: bool = True,
    ) -> Tensor:
        """Continue prompts, without gradients; the model's mode, training or not, stays as it is.

        Args:
            input_ids: (B, S), int64 or int32: the prompts, the shorter ones padded on the left.
            attention_mask: (B, S), 1 for tokens, 0 for padding; without it every token is one. Positions count the
                tokens of a row, so padding doesn't change what follows a prompt.
            token_type_ids: (B, S), 0 by default; new tokens get the type of the prompt's last.
            encoder_hidden_states, encoder_attention_mask: for cross-attention, as in the forward.
            max_new_tokens: stop after this many.
            do_sample: draw tokens by their probabilities; False: take the likeliest, and ignore the next four.
            temperature: logits are divided by it.
            top_k: draw from this many likeliest tokens only; 0: from all.
            top_p: draw from the likeliest tokens only that together have at least this probability.
            seed: of a random generator for the draws of this call alone; None: PyTorch's global one.
            eos_token_id: the tokens that end a row; None: those of the config, if it has any; []: none.
            pad_token_id: what fills a row that ended before others; None: that of the config. A batch whose rows can
                end needs one.
            use_cache: keep the keys and values of earlier tokens, instead of computing them for every new token.

        Returns:
            (B, S + new), int64: the prompts and what follows, until every row has ended or there are max_new_tokens.

        Raises:
            ValueError, TypeError, IndexError: no decoder; prompts that are empty, all padding, padded on the right, or
                with max_new_tokens longer than max_position_embeddings; padding tokens, but no attention_mask; an
                option outside its range; what the forward raises.
        """
        return generate_tokens(
            self,
            input_ids,
            attention_mask,
            token_type_ids,
            {},
            encoder_hidden_states,
            encoder_attention_mask,
            max_new_tokens,
            NextToken(do_sample, temperature, top_k, top_p, seed),
            eos_token_id,
            pad_token_id,
            use_cache,
        )


class RoCBertGeneration(Model):
    """Gives a causal language model with RoCBert's inputs `generate`."""

    def generate(
        self,
        input_ids: Tensor,
        input_shape_ids: Tensor | None = None,
        input_pronunciation_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        *,
        shape_ids_of_vocab: Tensor | None = None,
        pronunciation_ids_of_vocab: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        max_new_tokens: int = 20,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int = 50,
        top_p: float = 1.0,
        seed: int | None = None,
        eos_token_id: int | list[int] | None = None,
        pad_token_id: int | None = None,
        use_cache: bool = True,
    ) -> Tensor:
        """Continue prompts: see `Generation.generate`, and beside what is there:

        Args:
            input_shape_ids, input_pronunciation_ids: (B, S), int64 or int32, those of the prompts. Without them the
                new tokens have none either.
            shape_ids_of_vocab, pronunciation_ids_of_vocab: (vocab_size,), int64 or int32: the shape and the
                pronunciation of every token, which new tokens are given.

        Raises:
            ValueError, TypeError, IndexError: only one of the prompts' ids and the vocabulary's; ids of a wrong shape
                or dtype, or outside their table.
        """
        streams = {
            "shape": (input_shape_ids, shape_ids_of_vocab),
            "pronunciation": (input_pronunciation_ids, pronunciation_ids_of_vocab),
        }
        return generate_tokens(
            self,
            input_ids,
            attention_mask,
            token_type_ids,
            streams,
            encoder_hidden_states,
            encoder_attention_mask,
            max_new_tokens,
            NextToken(do_sample, temperature, top_k, top_p, seed),
            eos_token_id,
            pad_token_id,
            use_cache,
        )


@torch.no_grad()
def generate_tokens(
    model: Model,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    token_type_ids: Tensor | None,
    streams: dict[str, tuple[Tensor | None, Tensor | None]],
    encoder_hidden_states: Tensor | None,
    encoder_attention_mask: Tensor | None,
    max_new_tokens: int,
    next_token: NextToken,
    eos_token_id: int | list[int] | None,
    pad_token_id: int | None,
    use_cache: bool,
) -> Tensor:
    """What `generate` does in every family.

    streams: what else the family has ids of: by its name, those of the prompts, (B, S), and of the vocabulary, (V,).
    """
    config = model.config
    if not config.is_decoder:
        raise ValueError("generate needs a config with is_decoder True, got False; set model.config.is_decoder = True")
    check_int("max_new_tokens", max_new_tokens, 1)
    check_devices(model, input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)
    B, S = check_inputs(config, config.hidden_size, input_ids, token_type_ids, None, None)
    if S + max_new_tokens > config.max_position_embeddings:
        raise ValueError(
            f"the prompts and max_new_tokens must fit into max_position_embeddings {config.max_position_embeddings}, "
            f"got {S} + {max_new_tokens}; shorten one of them"
        )
    eos = _token_list("eos_token_id", config.eos_token_id if eos_token_id is None else eos_token_id, config.vocab_size)
    pad = config.pad_token_id if pad_token_id is None else pad_token_id
    _token_list("pad_token_id", None if pad is None else [pad], config.vocab_size)
    if eos and pad is None and B > 1:
        raise ValueError("a batch whose rows end at eos_token_id needs pad_token_id to fill them, got None")
    given = _check_streams(model, B, S, streams)
    mask = _prompt_mask(attention_mask, input_ids, pad)
    mask = torch.cat([mask, mask.new_ones(B, max_new_tokens)], dim=1)
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    generator = next_token.generator(input_ids.device)

    ids, cache = input_ids.long(), None
    ends = torch.tensor(eos, dtype=torch.long, device=ids.device)
    ended = torch.zeros(B, dtype=torch.bool, device=ids.device)
    for _ in range(max_new_tokens):
        inputs = {"input_ids": ids, "position_ids": position_ids[:, : ids.shape[1]]}
        new = ids[:, S:]
        if token_type_ids is not None:
            types = token_type_ids.expand(B, S)
            inputs["token_type_ids"] = torch.cat([types, types[:, -1:].expand_as(new)], dim=1)
        for name, (prompt, of_vocab) in given.items():
            inputs[name] = torch.cat([prompt, of_vocab[new]], dim=1)
        cached = 0 if cache is None else cache.get_seq_length()
        output = model(
            **{name: value[:, cached:] for name, value in inputs.items()},
            attention_mask=mask[:, : ids.shape[1]],
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            past_key_values=cache,
            use_cache=use_cache,
            logits_to_keep=1,
            return_dict=True,
        )
        cache, logits = output.past_key_values, output.logits[:, -1]
        tokens = next_token.choose(logits.to(torch.promote_types(logits.dtype, torch.float32)), generator)
        if pad is not None:
            tokens = tokens.masked_fill(ended, pad)
        ids = torch.cat([ids, tokens[:, None]], dim=1)
        ended = ended | torch.isin(tokens, ends)
        if eos and bool(ended.all()):
            break
    return ids


def _token_list(name: str, ids: int | list[int] | None, vocab_size: int) -> list[int]:
    """`ids` as a list of tokens of the vocabulary."""
    found = [] if ids is None else list(ids) if isinstance(ids, (list, tuple)) else [ids]
    for token in found:
        check_int(name, token, 0)
        if token >= vocab_size:
            raise ValueError(f"{name} must be less than vocab_size {vocab_size}, got {token}")
    return found


def _check_streams(
    model: Model, B: int, S: int, streams: dict[str, tuple[Tensor | None, Tensor | None]]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Those that are given, and not disabled by the config, by the names of the forward's arguments."""
    given = {}
    for name, (prompt, of_vocab) in streams.items():
        argument, vocabulary, size_name = f"input_{name}_ids", f"{name}_ids_of_vocab", f"{name}_vocab_size"
        if (prompt is None and of_vocab is None) or not getattr(model.config, f"enable_{name}"):
            continue
        if prompt is None or of_vocab is None:
            missing = argument if prompt is None else vocabulary
            raise ValueError(
                f"{argument} and {vocabulary} must be given together, since every new token has a {name} too; "
                f"{missing} is None"
            )
        check_devices(model, **{argument: prompt, vocabulary: of_vocab})
        for key, ids, shape in ((argument, prompt, (B, S)), (vocabulary, of_vocab, (model.config.vocab_size,))):
            if tuple(ids.shape) != shape:
                raise ValueError(f"{key} must have shape {shape}, got {tuple(ids.shape)}")
            check_ids(key, ids, B, ids.shape[-1], size_name, getattr(model.config, size_name))
        given[argument] = prompt, of_vocab
    return given


def _prompt_mask(attention_mask: Tensor | None, input_ids: Tensor, pad: int | None) -> Tensor:
    """(B, S), int64: 1 for the tokens of the prompts."""
    if attention_mask is None:
        if pad is not None and bool((input_ids == pad).any()):
            raise ValueError(f"input_ids hold pad_token_id {pad}: give attention_mask, 1 for tokens and 0 for padding")
        return torch.ones_like(input_ids, dtype=torch.long)
    shape = tuple(input_ids.shape)
    if tuple(attention_mask.shape) != shape:
        raise ValueError(f"attention_mask must have shape (B, S) = {shape}, got {tuple(attention_mask.shape)}")
    mask = attention_mask.long()
    if not bool(((attention_mask == 0) | (attention_mask == 1)).all()):
        raise ValueError("attention_mask must have values 1 and 0 only, got others")
    if not bool(mask.any(1).all()):
        rows = (~mask.any(1)).nonzero().flatten().tolist()
        raise ValueError(f"every row needs a token, but attention_mask is 0 everywhere in rows {rows}")
    if not bool(mask[:, -1].all()):
        rows = (mask[:, -1] == 0).nonzero().flatten().tolist()
        raise ValueError(f"prompts must be padded on the left, but attention_mask ends with 0 in rows {rows}")
    return mask
