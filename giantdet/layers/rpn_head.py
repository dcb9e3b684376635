"""Heads of the region proposal network: over all cells, and at the cells of sampled anchors only.

Shapes: B images · A anchors of all levels · R sampled anchors · K anchors per cell · N cells of all levels.
Reference: detectron2's `StandardRPNHead`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from giantdet.layers.common import gather_slots, normal_


class RpnHead(nn.Module):
    """3x3 convolutions, each followed by a ReLU, and two 1x1 predictors, shared by all levels.

    With `two_logits` each anchor has one for an object and one for none, in this order (Ren et al. 2015;
    mmdetection's `use_sigmoid=False`). The softmax of both is the sigmoid of their difference, so that
    difference is the objectness, and losses and proposals are those of a single logit.
    """

    padding = 1

    def __init__(
        self, channels: int, anchors_per_cell: int, convs: int = 1, two_logits: bool = False
    ) -> None:
        super().__init__()
        self.anchors_per_cell = anchors_per_cell
        # The first convolution has a name of its own: with only one, the names are those of earlier versions.
        first, *further = (nn.Conv2d(channels, channels, 3, padding=self.padding) for _ in range(convs))
        self.conv, self.further_convs = first, nn.ModuleList(further)
        self.objectness = nn.Conv2d(channels, anchors_per_cell * (2 if two_logits else 1), 1)
        self.deltas = nn.Conv2d(channels, anchors_per_cell * 4, 1)
        for layer in (first, *further, self.objectness, self.deltas):
            normal_(layer, std=0.01)

    def forward(self, level: Tensor) -> tuple[Tensor, Tensor]:
        """Return objectness logits `[B, h*w*K]` and deltas `[B, h*w*K, 4]`, float32, of `[B, C, h, w]`."""
        hidden = F.relu(self.conv(level))
        for conv in self.further_convs:
            hidden = F.relu(conv(hidden))
        logits = rearrange(
            self.objectness(hidden).float(), "b (k n) h w -> b (h w k) n", k=self.anchors_per_cell
        )
        objectness = logits[..., 0] - logits[..., 1] if logits.shape[-1] == 2 else logits.squeeze(-1)
        deltas = rearrange(self.deltas(hidden), "b (k d) h w -> b (h w k) d", d=4)
        return objectness, deltas.float()

    def over_levels(self, levels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return the outputs of `forward` for each level."""
        objectness, deltas = zip(*(self(level) for level in levels), strict=True)
        return list(objectness), list(deltas)

    def at_anchors(
        self, levels: list[Tensor], objectness: list[Tensor], deltas: list[Tensor], index_BR: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return objectness `[B, R]` and deltas `[B, R, 4]` at anchors `index_BR` of all levels, to train.

        `objectness` and `deltas` are those of `over_levels`.
        """
        return torch.cat(objectness, 1).gather(1, index_BR), gather_slots(torch.cat(deltas, 1), index_BR)


class SampledRpnHead(RpnHead):
    """The same function, whose backward pass covers only the sampled anchors.

    The loss reads 256 of about 250,000 anchors, and no gradient flows through the proposals. So the forward
    pass over all cells keeps no graph, and the cells of the sampled anchors, with their 3 x 3 neighbours,
    pass through the head a second time. Values and gradients are equal up to rounding. It has exactly one
    convolution: with more, cells beyond a level's border would have to be masked after each of them.
    """

    padding = 0  # in `at_anchors` the input is a neighbourhood of 3 x 3 cells

    def __init__(self, channels: int, anchors_per_cell: int, two_logits: bool = False) -> None:
        super().__init__(channels, anchors_per_cell, two_logits=two_logits)

    @torch.no_grad()
    def over_levels(self, levels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return the outputs of `RpnHead.forward` for each level, without a graph."""
        return super().over_levels([F.pad(level, (1, 1, 1, 1)) for level in levels])

    def at_anchors(
        self, levels: list[Tensor], objectness: list[Tensor], deltas: list[Tensor], index_BR: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `RpnHead.at_anchors`."""
        anchors_per_cell = self.anchors_per_cell
        around_BRX = _neighbours(levels)[index_BR // anchors_per_cell]
        batch, channels = levels[0].shape[:2]
        beyond_B1C = levels[0].new_zeros(batch, 1, channels)  # the zero padding beyond the border
        cells_BNC = torch.cat([*(level.flatten(2).mT for level in levels), beyond_B1C], 1)
        count = cells_BNC.shape[1]
        first_B11 = torch.arange(batch, device=index_BR.device)[:, None, None] * count
        patches = F.embedding(around_BRX + first_B11, cells_BNC.flatten(0, 1))
        objectness_K, deltas_K4 = self(rearrange(patches, "b r (y x) c -> (b r) c y x", y=3))
        which_K = (index_BR % anchors_per_cell).flatten()
        deltas_K4 = gather_slots(deltas_K4, which_K[:, None]).squeeze(1)
        return objectness_K.gather(1, which_K[:, None]).view_as(index_BR), deltas_K4.view(*index_BR.shape, 4)


def _neighbours(levels: list[Tensor]) -> Tensor:
    """Return the indices `[N, 9]` of the 3 x 3 cells around each cell, row by row, over all levels.

    The index of a neighbour beyond the border of its level is N.
    """
    shapes = [level.shape[-2:] for level in levels]
    total = sum(height * width for height, width in shapes)
    first, around = 0, []
    for height, width in shapes:
        number_hw = torch.arange(first, first + height * width, device=levels[0].device).view(height, width)
        bordered = F.pad(number_hw, (1, 1, 1, 1), value=total)
        around.append(bordered.unfold(0, 3, 1).unfold(1, 3, 1).reshape(-1, 9))
        first += height * width
    return torch.cat(around)
