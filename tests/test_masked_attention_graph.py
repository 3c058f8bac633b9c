"""masked_attention in a captured CUDA graph: every replay drops other probabilities, and its backward the same ones."""

from __future__ import annotations

import pytest
import torch

from fastconv.ops import masked_attention

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA GPU")


def test_masked_attention_graph_draws_new_masks():
    S = 64
    q, k = (torch.randn(2, S, 2, S, device="cuda", requires_grad=True) for _ in range(2))
    # With the unit vectors as v, y is the dropped probabilities themselves, and dv what was dropped of dy.
    v = torch.eye(S, device="cuda")[:, None].repeat(2, 1, 2, 1).requires_grad_()
    lengths = torch.tensor([S, S - 1], device="cuda")

    def step():
        y = masked_attention(q, k, v, lengths=lengths, dropout_p=0.5)
        return y, *torch.autograd.grad(y.sum(), (q, k, v))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, _, _, dv = step()
    replays = []
    for _ in range(2):
        graph.replay()
        replays.append(y.clone())
        # dv[j] is the sum of what the queries kept of key j, in each of its channels.
        torch.testing.assert_close(dv, y.sum(1).transpose(1, 2)[..., None].expand_as(dv), rtol=1e-4, atol=1e-5)
    assert not torch.equal(*replays)
    torch.manual_seed(3)
    graph.replay()
    first = y.clone()
    torch.manual_seed(3)
    graph.replay()
    assert torch.equal(first, y)
