"""Predict an image of 12,000 x 12,000 pixels with 100 masks, and print the peak memory. Run by a test.

Lines: the peak in MB of this process after a small image, after prediction in tiles, and of the whole image.
"""

from __future__ import annotations

import resource
import sys
from typing import Any

import numpy as np
import torch

from giantdet import load_predictor
from giantdet.structures import Batch, Detections, Outputs

SIDE, DETECTIONS = 12_000, 100


class Finder(torch.nn.Module):
    """Detects the whole image once, and objects of a twentieth of its side."""

    tasks = ("box", "mask")

    def forward(self, batch: Batch) -> Outputs:
        rows = len(batch.sizes_B2)
        corners_D2 = torch.rand(DETECTIONS, 2, generator=torch.Generator().manual_seed(0)) * 60
        boxes_D4 = torch.cat([corners_D2, corners_D2 + 3.2], 1)
        boxes_D4[0] = torch.tensor([0.0, 0, 64, 64])
        return Outputs(
            Detections(
                boxes_BD4=boxes_D4.repeat(rows, 1, 1),
                scores_BD=torch.linspace(1, 0.6, DETECTIONS).repeat(rows, 1),
                labels_BD=torch.zeros(rows, DETECTIONS, dtype=torch.int64),
                valid_BD=torch.ones(rows, DETECTIONS, dtype=torch.bool),
                masks_BDSS=torch.ones(rows, DETECTIONS, 28, 28),
            )
        )


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def main() -> None:
    predictor = load_predictor(sys.argv[1], "cpu")
    detector: Any = Finder()
    predictor.detector = detector
    predictor(np.zeros((100, 100, 3), np.uint8), tile=64)
    print(peak())
    image = np.full((SIDE, SIDE, 3), 7, np.uint8)
    assert len(predictor(image, tile=4096, tile_overlap=0.1).names) > 2 * DETECTIONS
    print(peak())
    assert len(predictor(image).names) == DETECTIONS
    print(peak())


if __name__ == "__main__":
    main()
