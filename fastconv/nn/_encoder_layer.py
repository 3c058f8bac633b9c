"""A whole encoder layer by kernels, with its gradients: what its modules compute, in fewer launches.

Between modules there is a tensor that hooks and adapters may look at. Here, where none do, results and gradients go
straight to where they are needed: attention and convolution write into their halves of one context, and their
gradients into slices of one tensor; what the residuals carry is added in the products; one kernel adds up the partial
sums of all small parameters, and one call draws the seeds of all dropouts. It imports Triton.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from fastconv.kernels import MAX_FP32_HEAD_SIZE
from fastconv.kernels._attention import Masks
from fastconv.kernels._reduce import sum_segments
from fastconv.kernels.grouped_linear import grouped_linear_bwd, grouped_linear_fwd
from fastconv.kernels.layer_norm import MAX_CHANNELS, layer_norm_bwd, layer_norm_fwd
from fastconv.kernels.linear_act import linear_act_fwd
from fastconv.kernels.masked_attention import masked_attention_fwd
from fastconv.kernels.masked_attention_bwd import masked_attention_bwd
from fastconv.kernels.separable_conv import (
    separable_conv_bwd_depthwise,
    separable_conv_bwd_gate,
    separable_conv_depthwise,
)
from fastconv.kernels.span_dynamic_conv import span_dynamic_conv_bwd, span_dynamic_conv_fwd
from fastconv.nn.packed_linear import whole_weight
from fastconv.ops._register import needs_grad, once_differentiable
from fastconv.reference import Packing
from fastconv.reference.ops.masked_attention import check


class Layer(NamedTuple):
    """What a layer is beside its parameters, and what a call of it asks for."""

    heads: int
    head_size: int
    scale: float
    causal: bool
    packing: Packing | None
    kernel_size: int  # of ConvBERT's convolutions; 0 without
    activation: str
    epsilons: tuple[float, float]  # of the norms after attention and after the feed-forward network
    dropouts: tuple[float, float, float]  # of attention's probabilities, and before the two norms


class Parameters(NamedTuple):
    """A layer's parameters beside its projections; or their gradients, or whether these are needed.

    A dense layer's weight is (O, I), in the feed-forward network also (G, I, O), of G groups.
    """

    attended_weight: Any  # of the dense layer after attention
    attended_bias: Any
    first_weight: Any  # of the norm there
    first_bias: Any
    inner_weight: Any  # of the feed-forward network
    inner_bias: Any
    outer_weight: Any
    outer_bias: Any
    last_weight: Any  # of the norm there
    last_bias: Any
    depthwise: Any = None  # of ConvBERT
    pointwise: Any = None
    span_bias: Any = None
    kernel_weight: Any = None
    kernel_bias: Any = None


_NUMBER = len(Parameters._fields)
_CONVOLUTIONS = Parameters._fields.index("depthwise")
# What no backward looks at: biases that are added and nothing else.
_UNSAVED = dict.fromkeys(("attended_bias", "first_bias", "outer_bias", "last_bias", "span_bias", "kernel_bias"))


class _Saved(NamedTuple):
    """What a forward leaves for its backward, by tokens (T, ...) but for the logits and statistics."""

    mixed: Any  # the projections, side by side
    context: Any
    stats: Any  # of the attention
    h: Any  # what comes out of the first norm
    z_first: Any
    mean_first: Any
    rstd_first: Any
    pre: Any  # before the activation
    inner: Any
    z_last: Any
    mean_last: Any
    rstd_last: Any
    spread: Any = None  # of the convolutions
    product: Any = None
    gated: Any = None
    logits: Any = None
    conv_stats: Any = None


# What is saved as the input of a product, for the gradient of the product's weight alone.
_INPUTS = {"h": "inner_weight", "inner": "outer_weight", "spread": "pointwise", "gated": "kernel_weight"}


def fit(x: torch.Tensor, layer: Layer, projections: list[torch.Tensor], parameters: Parameters) -> bool:
    """Whether all is there, of the shapes that it must have, and of x's dtype and device.

    Where it isn't, the modules do without or say what is wrong.
    """
    p, C, half, taps = parameters, x.shape[-1], layer.heads * layer.head_size, layer.kernel_size
    if any(t is None for t in (*projections, *p[: None if taps else _CONVOLUTIONS])):
        return False
    number, inner, logits = len(projections) // 2, len(p.inner_bias), layer.heads * taps
    shapes: list[tuple[torch.Tensor, tuple[int, ...]]] = [(t, (half, C)) for t in projections[:number]]
    shapes += [(t, (half,)) for t in projections[number:]]
    shapes += [(p.attended_weight, (C, (2 if taps else 1) * half)), (p.inner_bias, (inner,))]
    shapes += [(t, (C,)) for t in (p.attended_bias, p.first_weight, p.first_bias)]
    shapes += [(t, (C,)) for t in (p.outer_bias, p.last_weight, p.last_bias)]
    for weight, size_in, size_out in ((p.inner_weight, C, inner), (p.outer_weight, inner, C)):
        dense, groups = weight.dim() == 2, len(weight)
        shapes.append((weight, (size_out, size_in) if dense else (groups, size_in // groups, size_out // groups)))
    if taps:
        shapes += [(p.depthwise, (C, 1, taps)), (p.pointwise, (half, C, 1)), (p.span_bias, (half, 1))]
        shapes += [(p.kernel_weight, (logits, half)), (p.kernel_bias, (logits,))]
    packing = layer.packing
    return (
        all(t.shape == shape and t.dtype == x.dtype and t.device == x.device for t, shape in shapes)
        and C <= MAX_CHANNELS
        and (x.dtype.itemsize == 2 or layer.head_size <= MAX_FP32_HEAD_SIZE)
        and (packing is None or (x.shape[:2] == (1, packing.tokens) and packing.first.device == x.device))
    )


def encoder_layer(
    x: torch.Tensor,
    mask: torch.Tensor | None,
    layer: Layer,
    packed: list[torch.Tensor],
    projections: list[torch.Tensor],
    parameters: Parameters,
) -> torch.Tensor:
    """LayerNorm(h + FFN(h)) of h = LayerNorm(x + attention(x)), with the dropouts: (B, S, C) -> (B, S, C).

    mask: as that of masked_attention
    packed: the weight and the bias in whose memory the projections' lie
    projections: the weights of query, key, value and in ConvBERT of the convolution's input, then their biases
    The tensors are plain, of one device and, but for the mask, of one dtype.
    """
    seeds = None
    if any(layer.dropouts):
        # All in one launch; each at a multiple of 16 bytes, as a seed by itself is.
        seeds = torch.randint(2**63 - 1, (3, 2), device=x.device)
    # The function gives no view: nothing may be written into one, and a layer's output anybody may write into.
    if needs_grad(x, *projections, *parameters):
        y = _EncoderLayer.apply(x, mask, seeds, layer, packed, *projections, *parameters)
    else:
        y, _ = _forward(x, mask, seeds, layer, packed, parameters, False)
    return y.view(x.shape)


def _forward(x, mask, seeds, layer, packed, parameters, save) -> tuple[torch.Tensor, Any]:
    """The layer's output (T, C), and what is saved for a backward, complete with `save` only."""
    p, rows, (before, after) = parameters, x.reshape(-1, x.shape[-1]), _around(layer)
    of_attention, *of_norms = (None,) * 3 if seeds is None else seeds[:, 0]
    mixed = F.linear(rows, *packed)
    q, k, v, value = _split(mixed, x, layer)
    check(q, k, v, None, mask, layer.causal, None, None, layer.dropouts[0], None)
    context = torch.empty(*x.shape[:2], p.attended_weight.shape[1], dtype=x.dtype, device=x.device)
    half = layer.heads * layer.head_size
    _, stats = masked_attention_fwd(
        q,
        k,
        v,
        _masks(q, mask, layer),
        layer.dropouts[0],
        of_attention,
        layer.scale,
        context[..., :half].unflatten(-1, q.shape[2:]),
        save,
    )
    convolution: Any = ()
    if layer.kernel_size:
        spread = separable_conv_depthwise(x, p.depthwise, before, after, False).view(rows.shape)
        product = F.linear(spread, p.pointwise.squeeze(-1), p.span_bias.squeeze(-1))
        gated = product * mixed[:, :half]
        logits = F.linear(gated, p.kernel_weight, p.kernel_bias).view(*x.shape[:2], -1)
        _, conv_stats = span_dynamic_conv_fwd(
            value, logits, layer.kernel_size, before, after, context[..., half:], save
        )
        convolution = (spread, product, gated, logits, conv_stats)
    context = context.view(len(rows), -1)

    def norm(number, z, z_bias, residual, weight, bias):
        eps, dropout_p, seed = layer.epsilons[number], layer.dropouts[1 + number], of_norms[number]
        return layer_norm_fwd(z, weight, bias, eps, z_bias, residual, dropout_p, seed, x.dtype, save)

    attended = F.linear(context, p.attended_weight)
    h, *of_first = norm(0, attended, p.attended_bias, rows, p.first_weight, p.first_bias)
    pre: Any
    if p.inner_weight.dim() == 2:
        pre = F.linear(h, p.inner_weight)
        inner = linear_act_fwd(pre, p.inner_bias, layer.activation)
    else:
        inner, pre = grouped_linear_fwd(h, p.inner_weight, p.inner_bias, layer.activation, save)
    y, *of_last = norm(1, _product(inner, p.outer_weight), p.outer_bias, h, p.last_weight, p.last_bias)
    return y, _Saved(*(mixed, context, stats, h, *of_first, pre, inner, *of_last, *convolution))


class _EncoderLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, mask, seeds, layer, packed, *tensors):
        projections, parameters = tensors[:-_NUMBER], Parameters(*tensors[-_NUMBER:])
        y, saved = _forward(x, mask, seeds, layer, packed, parameters, True)
        need = Parameters(*ctx.needs_input_grad[-_NUMBER:])
        saved = saved._replace(**{name: None for name, weight in _INPUTS.items() if not getattr(need, weight)})
        # The projections' weights too, so that a write to one before the backward, which changes the packed memory, is
        # an error.
        weights = projections[: len(projections) // 2]
        ctx.save_for_backward(x, mask, seeds, *parameters._replace(**_UNSAVED), *saved, *weights)
        ctx.layer, ctx.weight = layer, packed[0]
        return y

    @staticmethod
    @once_differentiable("masked_attention")
    def backward(ctx, dy):
        x, mask, seeds, *rest = ctx.saved_tensors
        needs_x, _, _, _, _, *needs = ctx.needs_input_grad
        end = _NUMBER + len(_Saved._fields)
        p, saved, weights = Parameters(*rest[:_NUMBER]), _Saved(*rest[_NUMBER:end]), rest[end:]
        needs_projections, need = needs[:-_NUMBER], Parameters(*needs[-_NUMBER:])
        # The way down ends where nothing below needs a gradient.
        need_mixed = needs_x or any(needs_projections) or any(need[_CONVOLUTIONS:])
        need_h = need_mixed or need.attended_weight or need.attended_bias or need.first_weight or need.first_bias
        found = _Gradients(ctx.layer, x, p, saved, need, (None,) * 3 if seeds is None else tuple(seeds[:, 0]))
        dz, dx = found.norm("last", dy.reshape(-1, x.shape[-1]))
        found.weight("outer_weight", dz, saved.inner)
        if need_h or need.inner_weight or need.inner_bias:
            dx = found.feed_forward(dz, dx, need_h)
        if need_h:
            dz, dx = found.norm("first", dx)
            found.weight("attended_weight", dz, saved.context)
        of_projections = [None] * len(needs_projections)
        if need_mixed:
            number, width = len(weights), saved.mixed.shape[1]
            dmixed = found.mixed(dz @ p.attended_weight, mask, dx if needs_x else None)
            if any(needs_projections[:number]):
                dweight = dmixed[:, :width].t() @ x.reshape(-1, x.shape[-1])
                of_projections[:number] = dweight.split(width // number)
            if any(needs_projections[number:]) or need.kernel_bias:
                dbias = dmixed.sum(0)
                of_projections[number:] = dbias[:width].split(width // number)
                found.gradients["kernel_bias"] = dbias[width : width + found.logits]
            if needs_x:
                dx.addmm_(dmixed[:, :width], whole_weight(ctx.weight, weights))
        made = [*of_projections, *found.of_parameters()]
        made = [d if needed else None for d, needed in zip(made, needs, strict=True)]
        return dx.view(x.shape) if needs_x else None, None, None, None, None, *made


class _Gradients:
    """A layer's backward, step by step: what goes on down is returned, what parameters get is kept."""

    def __init__(self, layer, x, parameters, saved, need, seeds):
        self.layer, self.x, self.p, self.saved, self.need, self.seeds = layer, x, parameters, saved, need, seeds
        self.gradients = {}
        # What each program of a kernel has added up, (sums, programs, C), and whose gradients the sums are.
        self.partials, self.names, self.taps = [], [], None

    def weight(self, name, dy, x):
        """The gradient of a dense layer's weight from that of its result, if it is needed."""
        if getattr(self.need, name):
            self.gradients[name] = _weight_gradient(dy, x, getattr(self.p, name))

    def norm(self, which, dy):
        """The gradients of what a norm's dropout got, without the bias, and of its residual; without dropout one."""
        number = ("first", "last").index(which)
        z, mean, rstd = (getattr(self.saved, f"{name}_{which}") for name in ("z", "mean", "rstd"))
        dropout_p, seed, dtype = self.layer.dropouts[1 + number], self.seeds[1 + number], z.dtype
        weight, other = getattr(self.p, f"{which}_weight"), dtype if dropout_p > 0.0 else None
        dz, dresidual, partial = layer_norm_bwd(
            dy, z, weight, mean, rstd, dropout_p, seed, True, dtype, other, add_up=False
        )
        before = ("attended_bias", "outer_bias")[number]
        self._keep(partial, f"{which}_weight", f"{which}_bias", before)
        return dz, dz if dresidual is None else dresidual

    def feed_forward(self, dz, dh, need_h):
        """The gradient of h, if it is needed: dh, which the residual carries, and what the network adds to it."""
        p, saved = self.p, self.saved
        dense = p.inner_weight.dim() == 2
        dpre, partial = grouped_linear_bwd(
            _input_gradient(dz, p.outer_weight),
            saved.pre,
            p.inner_bias if dense else None,  # which a grouped product has added
            self.layer.activation,
            add_up=False,
        )
        self._keep(partial, "inner_bias")
        self.weight("inner_weight", dpre, saved.h)
        if not need_h:
            return None
        if dense:
            return dh.addmm_(dpre, p.inner_weight)
        groups, size_in, size_out = p.inner_weight.shape
        parts = dpre.view(-1, groups, size_out).transpose(0, 1)
        dh.view(-1, groups, size_in).transpose(0, 1).baddbmm_(parts, p.inner_weight.transpose(1, 2))
        return dh

    @property
    def logits(self):
        """How many a token has, of the dynamic kernels."""
        return 0 if self.saved.logits is None else self.saved.logits.shape[-1]

    def mixed(self, dcontext, mask, dx):
        """The gradients of the projections and, beside them, of the logits: (T, O + N), and columns of anything.

        dx: what x gets; with convolutions what comes through them is added to it in place, unless it is None
        """
        layer, saved = self.layer, self.saved
        q, k, v, value = _split(saved.mixed, self.x, layer)
        half, lead = layer.heads * layer.head_size, self.x.shape[:2]
        width = saved.mixed.shape[1] + self.logits
        if layer.kernel_size:
            width = -(-width // 16) * 16  # or rows would not begin at multiples of 16 bytes
        dmixed = torch.empty(len(saved.mixed), width, dtype=self.x.dtype, device=self.x.device)
        dq, dk, dv, dvalue = _split(dmixed, self.x, layer)
        dcontext, context = dcontext.view(*lead, -1), saved.context.view(*lead, -1)
        masked_attention_bwd(
            dcontext[..., :half].unflatten(-1, q.shape[2:]),
            q,
            k,
            v,
            context[..., :half].unflatten(-1, q.shape[2:]),
            saved.stats,
            _masks(q, mask, layer),
            layer.dropouts[0],
            self.seeds[0],
            layer.scale,
            False,
            (dq, dk, dv),
        )
        if layer.kernel_size:
            start, (before, after) = saved.mixed.shape[1], _around(layer)
            dlogits = dmixed[:, start : start + self.logits]
            span_dynamic_conv_bwd(
                dcontext[..., half:],
                value,
                saved.logits,
                saved.conv_stats,
                layer.kernel_size,
                before,
                after,
                (dvalue, dlogits.unflatten(0, lead)),
            )
            self._convolutions(dlogits, dmixed[:, :half], dx)
        return dmixed

    def _convolutions(self, dlogits, dq, dx):
        """What makes the logits: the gradients of its parameters; those of query and x are added in place."""
        p, saved, x, (before, after) = self.p, self.saved, self.x, _around(self.layer)
        gate = saved.mixed[:, : dq.shape[1]]
        dproduct, _, partial = separable_conv_bwd_gate(
            dlogits @ p.kernel_weight, gate, saved.product, add_to=dq, add_up=False
        )
        self._keep(partial, "span_bias")
        self.weight("kernel_weight", dlogits, saved.gated)
        if self.need.pointwise:
            self.gradients["pointwise"] = dproduct.t() @ saved.spread
        if dx is None and not self.need.depthwise:
            return
        dspread = (dproduct @ p.pointwise.squeeze(-1)).view(x.shape)
        if self.need.depthwise:
            self.taps = separable_conv_bwd_depthwise(dspread, x, self.layer.kernel_size, before, after, add_up=False)
        if dx is not None:
            separable_conv_depthwise(dspread, p.depthwise, before, after, True, dx.view(x.shape))

    def _keep(self, partial, *names):
        self.partials.append(partial)
        self.names.append(names)

    def of_parameters(self):
        """What the parameters get, None for those of which nothing is known."""
        sums = sum_segments(self.partials, self.x.dtype, self.taps)
        for names, rows in zip(self.names, sums, strict=False):
            self.gradients |= zip(names, rows, strict=True)
        if self.taps is not None:
            self.gradients["depthwise"] = sums[-1]
        # As convolutions have them: (C, 1, K), (O, C, 1) and (O, 1).
        for name, place in (("depthwise", 1), ("pointwise", 2), ("span_bias", 1)):
            if name in self.gradients:
                self.gradients[name] = self.gradients[name].unsqueeze(place)
        return [self.gradients.get(name) for name in Parameters._fields]


def _split(mixed, x, layer):
    """Query, key and value, (B, S, H, D) each, and the convolution's input, (B, S, O) or empty: views of (T, ...)."""
    half = layer.heads * layer.head_size
    mixed = mixed.view(*x.shape[:2], -1)
    q, k, v = (mixed[..., i * half : (i + 1) * half].unflatten(-1, (layer.heads, layer.head_size)) for i in range(3))
    return q, k, v, mixed[..., 3 * half : 4 * half]


def _masks(q, mask, layer):
    if mask is not None:
        mask = mask.expand(q.shape[0], q.shape[2], q.shape[1], q.shape[1])
    packing = layer.packing
    return Masks(None, mask, layer.causal, [] if packing is None else [packing.first, packing.last])


def _around(layer) -> Any:
    """How many tokens of its sequence each one has before and after it, as the convolutions take it."""
    packing = layer.packing
    return (None, None) if packing is None else (packing.before, packing.after)


def _product(x, weight):
    return F.linear(x, weight) if weight.dim() == 2 else grouped_linear_fwd(x, weight, None, None, False)[0]


def _input_gradient(dy, weight):
    if weight.dim() == 2:
        return dy @ weight
    return grouped_linear_fwd(dy, weight.transpose(1, 2), None, None, False)[0]


def _weight_gradient(dy, x, weight):
    if weight.dim() == 2:
        return dy.t() @ x
    groups, size_in, size_out = weight.shape
    return torch.bmm(x.view(-1, groups, size_in).permute(1, 2, 0), dy.view(-1, groups, size_out).transpose(0, 1))
