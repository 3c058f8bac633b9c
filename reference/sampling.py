"""How the next token is chosen: the likeliest, or one drawn at random."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .config import check_int


@dataclass(frozen=True)
class NextToken:
    """How the next tokens are chosen from logits.

    do_sample: draw them by their probabilities; False: take the likeliest
    temperature: logits are divided by it
    top_k: draw from this many likeliest tokens only; 0: from all
    top_p: draw from the likeliest tokens only that together have at least this probability
    seed: of a generator for one call of `generate`; None: PyTorch's global one

    Raises:
        ValueError, TypeError: a value out of its range.

    Source: Fan et al., "Hierarchical Neural Story Generation" (2018) for top_k; Holtzman et al., "The Curious Case of
    Neural Text Degeneration" (2020) for top_p.
    """

    do_sample: bool
    temperature: float
    top_k: int
    top_p: float
    seed: int | None

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} must be a number, got {value!r}")
        if not 0.0 < self.temperature < math.inf:
            raise ValueError(
                f"temperature must be above 0 and finite, got {self.temperature}; do_sample=False takes the likeliest"
            )
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}; 1 draws from all tokens")
        check_int("top_k", self.top_k, 0)
        if self.seed is not None:
            check_int("seed", self.seed, 0)

    def generator(self, device: torch.device) -> torch.Generator | None:
        """A new random generator of this seed; None, for the global one, without a seed."""
        return None if self.seed is None else torch.Generator(device).manual_seed(self.seed)

    def choose(self, logits: Tensor, generator: torch.Generator | None) -> Tensor:
        """(B, V) -> (B,), int64.

        Raises:
            ValueError: logits that are NaN, or none of which is finite: no token is likelier than another.
        """
        if not bool(logits.amax(-1).isfinite().all()):  # NaN, if one is
            raise ValueError("the logits of the next token must be finite, got NaN or infinite ones from the model")
        if not self.do_sample:
            return logits.argmax(-1)
        probabilities = self.filter(logits).softmax(-1)
        return torch.multinomial(probabilities, 1, generator=generator).squeeze(1)

    def filter(self, logits: Tensor) -> Tensor:
        """(B, V) -> (B, V): by temperature, then -inf for what top_k, then top_p, excludes.

        Tokens as likely as the last of the top_k stay. One token always does.
        """
        logits = logits / self.temperature
        if 0 < self.top_k < logits.shape[-1]:
            lowest = logits.topk(self.top_k).values[..., -1:]
            logits = logits.masked_fill(logits < lowest, -math.inf)
        if self.top_p < 1.0:
            ascending, order = logits.sort()
            excluded = ascending.softmax(-1).cumsum(-1) <= 1.0 - self.top_p
            excluded[..., -1] = False
            logits = logits.masked_fill(excluded.gather(-1, order.argsort()), -math.inf)
        return logits
