"""SeparableConv1D: ConvBERT's module with the fused op behind it."""

from __future__ import annotations

import torch
from torch import nn

from fastconv.nn._plain import bare
from fastconv.ops import separable_conv
from fastconv.ops._windows import MAX_KERNEL_SIZE, fits
from fastconv.reference import Packing
from fastconv.reference.layers import SeparableConv1D as ReferenceSeparableConv1D


class SeparableConv1D(ReferenceSeparableConv1D):
    """A depthwise and a pointwise convolution along the sequence, with the parameters of ConvBERT's checkpoints.

    SeparableConv1D(size_in, size_out, kernel_size); forward: (B, S, size_in) -> (B, S, size_out). With hooks or
    adapters on its convolutions, or more taps than the op takes, it runs the plain formulation.
    """

    def forward(
        self, x: torch.Tensor, gate: torch.Tensor | None = None, *, packing: Packing | None = None
    ) -> torch.Tensor:
        """See fastconv.ops.separable_conv: x (B, S, size_in), gate (B, S, size_out); with a packing (T, ...).

        Raises: ValueError for a packing where the op can't run.
        """
        if not plain_layers(self):
            if packing is not None:
                raise ValueError(
                    "a packing needs depthwise and pointwise to be nothing but nn.Conv1d, of at most "
                    f"{MAX_KERNEL_SIZE} taps: got hooks, an adapter, a parametrization or more taps; remove them, or "
                    "call with padding"
                )
            return super().forward(x, gate)
        return separable_conv(x, self.depthwise.weight, self.pointwise.weight, self.bias, gate=gate, packing=packing)


class ChannelsFirstSeparableConv1D:
    """The fused forward of transformers' module, which takes and gives the channels before the sequence."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, C, S) -> (B, O, S)."""
        if not plain_layers(self):
            return super().forward(hidden_states)  # type: ignore[misc]
        x = hidden_states.transpose(1, 2)
        y = separable_conv(x, self.depthwise.weight, self.pointwise.weight, self.bias)  # type: ignore[attr-defined]
        return y.transpose(1, 2)


def plain_layers(module: object) -> bool:
    """Whether separable_conv computes what a module's convolutions do: plain nn.Conv1d, with taps that it takes."""
    layers = (module.depthwise, module.pointwise)  # type: ignore[attr-defined]
    return all(type(layer) is nn.Conv1d and bare(layer) for layer in layers) and fits(layers[0].kernel_size[0])
