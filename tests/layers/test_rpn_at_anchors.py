"""The head at sampled anchors against the head on whole maps: values and all gradients."""

from __future__ import annotations

import torch

from giantdet.layers.rpn import RpnHead


def test_at_anchors_equals_the_dense_pass() -> None:
    torch.manual_seed(0)
    shapes = [(8, 9), (4, 5), (2, 3), (1, 1)]
    head = RpnHead(channels=6, anchors_per_cell=3)
    for parameter in head.parameters():  # biases too: they are zero at the start
        torch.nn.init.normal_(parameter, std=0.3)
    levels = [torch.randn(2, 6, *shape, requires_grad=True) for shape in shapes]
    total = 3 * sum(height * width for height, width in shapes)
    # Every anchor, each in another order: corners, borders and the last level's lone cell are in it.
    index = torch.stack([torch.randperm(total), torch.randperm(total)])

    objectness, deltas = (torch.cat(parts, 1) for parts in zip(*map(head, levels), strict=True))
    dense = objectness.gather(1, index), deltas.gather(1, index[..., None].expand(-1, -1, 4))
    sparse = head.at_anchors(levels, index)
    weights = [torch.randn_like(part) for part in dense]
    inputs = [*levels, *head.parameters()]
    gradients = [
        torch.autograd.grad(sum((p * w).sum() for p, w in zip(parts, weights, strict=True)), inputs)
        for parts in (dense, sparse)
    ]
    for expected, found in zip(dense, sparse, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    for expected, found in zip(*gradients, strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
