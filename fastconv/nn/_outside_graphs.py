"""What a graph of torch.compile can't hold; only a trace imports this."""

from __future__ import annotations

import torch

from fastconv.nn import padding_free

packing_of_mask = torch.compiler.disable(
    padding_free.packing_of_mask,
    reason="how many tokens a mask leaves is data; a fastconv.Packing in its place makes one graph of the model",
)
