"""Draw the ground truth and the predictions of the demo's model: scripts/demo_picture.py runs/demo PICTURE

Shown are the three validation images, of those with 5 to 8 objects, on which the model has the best F1 score.
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image
from torchvision.ops import box_iou

from giantdet import load_predictor
from giantdet.config.resolved import load_resolved
from giantdet.data.dataset import open_dataset
from giantdet.engine.draw import draw
from giantdet.engine.found import Found, truth_of
from giantdet.engine.labels import with_caption

IMAGES, WIDTH = 3, 380  # pictures side by side, pixels of each


def f1(truth: Found, found: Found) -> float:
    """Return the F1 score of the detections: objects that one of their class overlaps with IoU 0.5."""
    overlaps_TD = box_iou(truth.boxes_D4, found.boxes_D4) >= 0.5
    hits_TD = overlaps_TD & (truth.labels_D[:, None] == found.labels_D)
    return 2 * float(hits_TD.any(1).sum()) / (len(truth.names) + len(found.names))


def main(run: Path, picture: Path) -> None:
    data = load_resolved(run / "config.json").giantdet.data.val
    assert data is not None
    dataset, predictor = open_dataset(data), load_predictor(run)
    chosen = [i for i in range(len(dataset)) if 5 <= len(dataset.objects(i)) <= 8]
    truths = [truth_of(dataset, i) for i in chosen]
    images = [dataset.read_image(i) for i in chosen]
    found = predictor(images, threshold=0.5, batch_size=8)
    f1_scores = [f1(truth, one) for truth, one in zip(truths, found, strict=True)]
    best = sorted(range(len(chosen)), key=lambda n: -f1_scores[n])[:IMAGES]
    gap = WIDTH // 40
    grid = Image.new("RGB", (IMAGES * (WIDTH + gap) - gap, 0), (255, 255, 255))
    for caption, drawn, with_scores in (("Ground truth", truths, False), ("Prediction", found, True)):
        row = Image.new("RGB", (grid.width, WIDTH), (255, 255, 255))
        for column, n in enumerate(best):
            one = draw(images[n], drawn[n], scores=with_scores)
            row.paste(one.resize((WIDTH, WIDTH), Image.Resampling.LANCZOS), (column * (WIDTH + gap), 0))
        row = with_caption(row, caption, 14)
        above, grid = grid, Image.new("RGB", (grid.width, grid.height + row.height + gap), (255, 255, 255))
        grid.paste(above)
        grid.paste(row, (0, above.height))
    picture.parent.mkdir(parents=True, exist_ok=True)
    grid.save(picture, quality=88)
    print(picture)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
